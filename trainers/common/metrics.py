"""What trainers measure while they train: losses by sequence, means, speed, where the seconds go, what a token costs.

Nothing here waits for the device before a log is written; `pop` is the one synchronisation of each meter.
Letters: B sequences, T tokens, V vocabulary, S sources, N held-out blocks. Source: ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_moe_cpt.data.packing import IGNORED_LABEL
from hf_moe_cpt.routing.hooks import active_parameters
from hf_moe_cpt.trainers.common.distributed import RankAgreement, has_process_group


Listener = Callable[[Tensor], None]  # takes (B, 2) float64: nats and predicted tokens of each sequence


def shifted_labels(labels: Tensor) -> Tensor:
    """Labels (B, T) moved one to the left, so that position t holds the token that position t predicts."""
    return nn.functional.pad(labels, (0, 1), value=IGNORED_LABEL)[..., 1:]


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every position in nats, float32 (B, T); 0 where the target is ignored.

    logits: (B, T, V), any float type. targets: (B, T), already shifted, -100 where ignored.
    """
    flat = nn.functional.cross_entropy(
        logits.float().flatten(0, -2),
        targets.flatten().to(logits.device),
        ignore_index=IGNORED_LABEL,
        reduction="none",
    )
    return flat.view(targets.shape)


class LossRecorder:
    """Stands where a model computes its loss and tells a listener the loss of each sequence.

    A causal LM of transformers computes its loss through `self.loss_function`, where `attach` puts the recorder: it
    returns the same number as `ForCausalLMLoss`. A head that is fused with its loss has no logits to pass on and gives
    its token losses instead (`of_tokens`). Of a model that computes its loss by itself, as code of the Hub may, the
    listener is told what its logits say.
    """

    def __init__(self) -> None:
        self._listener: Listener | None = None
        self._has_told = False
        self._num_rows: int | None = None

    def attach(self, model: nn.Module) -> None:
        """Let `model` compute its loss through this recorder; models without `loss_function` are refused."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not isinstance(base, PreTrainedModel):
            raise ValueError(
                f"The model is a {type(base).__name__}, which has no `loss_function`: pass a causal LM of "
                "transformers (a PreTrainedModel, or a PEFT model around one)."
            )
        base.loss_function = self
        model.register_forward_hook(self._after_forward, with_kwargs=True)

    def _after_forward(self, model: nn.Module, args: tuple, inputs: dict[str, Any], outputs: Any) -> None:
        labels, logits = inputs.get("labels"), getattr(outputs, "logits", None)
        if self._listener is not None and not self._has_told and labels is not None and logits is not None:
            with torch.no_grad():
                self(logits, labels, shift_labels=inputs.get("shift_labels"))

    @contextmanager
    def tell(self, listener: Listener, num_rows: int | None = None) -> Iterator[None]:
        """Hand the losses computed inside this context to `listener`, of `num_rows` sequences that may lie in one."""
        self._listener, self._num_rows, self._has_told = listener, num_rows, False
        try:
            yield
        finally:
            self._listener = None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: object,  # transformers passes attention and loss options of every kind through this hook
    ) -> Tensor:
        """The loss of `ForCausalLMLoss`: the sum over tokens / `num_items_in_batch`, or the mean if that is None."""
        targets = shifted_labels(labels) if shift_labels is None else shift_labels
        losses = token_losses(logits, targets)
        return self.of_tokens(losses.sum(), losses, targets, num_items_in_batch)

    def of_tokens(
        self, loss_sum: Tensor, losses: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The same from what a fused head has: the sum, which carries the gradient, and the losses it is the sum of.

        losses: (B, T), in nats, 0 where ignored. targets: (B, T), already shifted, -100 where ignored.
        """
        counted = targets.ne(IGNORED_LABEL).to(losses.device)
        self._has_told = True
        if self._listener is not None:
            rows = (self._num_rows or 1 if len(losses) == 1 else len(losses), -1)
            both = (losses.detach().double(), counted.double())
            self._listener(torch.stack([values.reshape(rows).sum(-1) for values in both], dim=-1))
        return loss_sum / (counted.sum() if num_items_in_batch is None else num_items_in_batch)


class SourceLosses:
    """Sums of token losses and token counts per source since the last `pop`, on the device of the loss."""

    def __init__(self, source_names: tuple[str, ...]) -> None:
        self.source_names = source_names
        self._sums: Tensor | None = None  # (S, 2)

    def listener(self, source_of_sequence: Tensor) -> Listener:
        """A listener that adds sequences under `source_of_sequence` (B,), integers in [0, S)."""

        def add(per_sequence: Tensor) -> None:
            sums = per_sequence.new_zeros(len(self.source_names), 2)
            sums.index_add_(0, source_of_sequence.to(per_sequence.device), per_sequence)
            self._sums = sums if self._sums is None else self._sums + sums

        return add

    def pop(self) -> dict[str, float]:
        """`lm_loss` and `lm_loss/<source>`: mean nats per token since the last call, over all ranks; then reset.

        Every rank must call it at the same step: it is a collective when a process group exists. The one host sync.
        """
        if self._sums is None:
            return {}
        sums, self._sums = self._sums, None
        if has_process_group():
            dist.all_reduce(sums)
        nats, tokens = sums.T.tolist()
        by_source = zip(self.source_names, nats, tokens, strict=True)
        losses = {f"lm_loss/{name}": sum_ / count for name, sum_, count in by_source if count > 0}
        return {"lm_loss": sum(nats) / max(sum(tokens), 1), **losses}


class HeldOutLoss:
    """Mean loss over all predicted tokens of N held-out blocks, whatever the batch size and the number of ranks.

    Each block has its own place in a table, so a block that several ranks see (data loaders repeat blocks to fill the
    last batch) counts once.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._table: Tensor | None = None  # (N, 2)

    def listener(self, block_of_sequence: Tensor) -> Listener:
        """A listener that puts sequences into the places `block_of_sequence` (B,), integers in [0, N)."""

        def put(per_sequence: Tensor) -> None:
            if self._table is None:
                self._table = per_sequence.new_zeros(self.num_blocks, 2)
            self._table[block_of_sequence.to(per_sequence.device)] = per_sequence

        return put

    def mean(self) -> float:
        """Nats per token over all blocks of all ranks; a collective when a process group exists."""
        if self._table is None:
            raise ValueError(
                "no batch was evaluated: give more rows, a smaller eval batch, or leave dataloader_drop_last off."
            )
        if has_process_group():
            dist.all_reduce(self._table, op=dist.ReduceOp.MAX)  # a place is 0 on the ranks that did not fill it
        nats, tokens = self._table.sum(0).tolist()
        return nats / tokens


class MeanMeter:
    """Running means by name, summed in double precision; `pop` averages over calls and ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor | int]] = {}  # sum of values, their number

    def add(
        self, values: Mapping[str, Tensor | tuple[Tensor, Tensor | int]], present: Mapping[str, Tensor] | None = None
    ) -> None:
        """Add for each name a value (a 0-d tensor), or the sum of several values and their number.

        present: for names that there is nothing to say of at times, whether there is (0-d bool): else the value does
        not count, whatever it is.
        """
        for name, value in values.items():
            total, number = value if isinstance(value, tuple) else (value, 1)
            if present is not None and name in present:
                total, number = torch.where(present[name], total, 0.0), present[name].to(torch.int64)
            sums = self._sums.get(name, (0, 0))
            self._sums[name] = sums[0] + total.detach().double(), sums[1] + number

    def pop(self) -> dict[str, float]:
        """Mean of each name since the last call, without names that never counted; a collective with several ranks."""
        if not self._sums:
            return {}
        totals = torch.stack([total for total, _ in self._sums.values()])
        numbers = [
            torch.as_tensor(number, dtype=totals.dtype, device=totals.device) for _, number in self._sums.values()
        ]
        both = torch.stack([totals, torch.stack(numbers)])
        names, self._sums = list(self._sums), {}
        if has_process_group():
            dist.all_reduce(both)
        return {name: total / number for name, total, number in zip(names, *both.tolist(), strict=True) if number}


class TokenCount:
    """Tokens of all batches of a run that were trained on, padding apart: counted, so that a change counts from then.

    `last`: what `total` was when it was asked for last.
    """

    def __init__(self) -> None:
        self.copies = 1  # ranks that are given the same batch
        self.before = self.last = 0  # `before`: those of the run until its checkpoint
        self._here: Tensor | int = 0  # on this rank since then; on the device, so that nothing waits for it

    def begin(self, before: int) -> None:
        """Go on from a count."""
        self.before = self.last = before
        self._here = 0

    def add(self, batch: Any) -> None:
        """Count a batch, or the batches in one of several sets."""
        if not isinstance(batch, Mapping):
            return
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if ids is None:
            for part in batch.values():
                self.add(part)
            return
        self._here = self._here + (mask.sum() if mask is not None and mask.shape == ids.shape else ids.numel())

    def total(self, device: torch.device) -> int:
        """Of all ranks. A collective when a process group exists."""
        here = torch.as_tensor(self._here, dtype=torch.int64, device=device)
        if has_process_group():
            here = here.clone()
            dist.all_reduce(here)
        self.last = self.before + int(here) // self.copies
        return self.last


class ThroughputMeter:
    """Wall-clock rate of training steps; `pause` takes the time of evaluation and saving out.

    The rate is honest on an accelerator although nothing waits for it here: `pop` is called when the loss has just
    been read, which waits for every step that it averages.
    """

    def __init__(self, tokens_per_step: int, flops_per_token: float, num_devices: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.num_devices = num_devices
        self._since: float | None = None
        self._steps = 0
        self._paused = 0.0
        self._pauses = 0

    def begin(self) -> None:
        """Start the clock if it does not run yet."""
        if self._since is None:
            self._since = time.perf_counter()

    def end_step(self) -> None:
        """Count one optimizer step."""
        self._steps += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside does not count; may be nested."""
        began = time.perf_counter()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if self._pauses == 0 and self._since is not None:
                self._paused += time.perf_counter() - began

    def pop(self) -> dict[str, float]:
        """`tokens_per_second` over all devices and `model_tflops` (TFLOP/s of each device) since the last call."""
        if self._since is None or self._steps == 0:
            return {}
        seconds = max(time.perf_counter() - self._since - self._paused, 1e-9)
        rate = self._steps * self.tokens_per_step / seconds
        self._since, self._steps, self._paused = time.perf_counter(), 0, 0.0
        return {
            "tokens_per_second": round(rate, 1),
            "model_tflops": rate * self.flops_per_token / self.num_devices / 1e12,
        }


class StepTiming(TrainerCallback):
    """Seconds for each optimizer step, means since the last log, and the slowest rank; no evaluation and no saving.

    Ranks wait for each other in the backward pass, so their steps take equally long and only what a rank does by
    itself tells a straggler: the seconds that it waits for data and those of its forward passes. On CUDA the passes
    are timed by events. Under FSDP a forward pass also holds what it gathers from others.
    """

    def __init__(self, model: nn.Module) -> None:
        self.agreement: RankAgreement | None = None
        self._on_cuda = next(model.parameters()).is_cuda
        self._began: list[Any] = []  # of passes under way: seconds, or an event
        self._passes: list[tuple[Any, Any]] = []
        self._waited = self._stepped = 0.0
        self._since: float | None = None
        self._ended = 0.0
        self._steps = 0
        model.register_forward_pre_hook(self._before_forward)
        model.register_forward_hook(self._after_forward)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time inside is time without data; the step begins here."""
        began = time.perf_counter()
        self._since = began
        try:
            yield
        finally:
            self._waited += time.perf_counter() - began

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _before_forward(self, model: nn.Module, *_: Any) -> None:
        if model.training:
            self._began.append(self._now())

    def _after_forward(self, model: nn.Module, *_: Any) -> None:
        if model.training and self._began:
            self._passes.append((self._began.pop(), self._now()))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the step."""
        self._steps += 1
        self._ended = time.perf_counter()
        if self._since is not None:
            self._stepped += self._ended - self._since

    def pop(self) -> dict[str, float]:
        """The means since the last call, over all ranks; to be called when the loss was just read. A collective.

        runtime/step, runtime/data_wait (of the rank that waited longest) and, with several ranks, runtime/rank_min and
        runtime/rank_max (own seconds of the fastest and the slowest) and runtime/slowest_rank.
        """
        if not self._steps:
            return {}
        self._stepped += time.perf_counter() - self._ended  # in which the loss was read, and the device waited for
        forward = sum(self._seconds(*times) for times in self._passes)
        own = [value / self._steps for value in (self._stepped, self._waited, self._waited + forward)]
        self._waited, self._stepped, self._steps, self._passes, self._began = 0.0, 0.0, 0, [], []
        ranks = torch.tensor([own]) if self.agreement is None else self.agreement.of_all(own)
        logs = {"runtime/step": float(ranks[:, 0].mean()), "runtime/data_wait": float(ranks[:, 1].max())}
        if len(ranks) > 1:
            slowest = int(ranks[:, 2].argmax())
            logs |= {
                "runtime/rank_min": float(ranks[:, 2].min()),
                "runtime/rank_max": float(ranks[slowest, 2]),
                "runtime/slowest_rank": slowest,
            }
        return logs

    def _seconds(self, began: Any, ended: Any) -> float:
        return began.elapsed_time(ended) / 1e3 if self._on_cuda else ended - began


PER_LAYER = "/layer_"


class _WithoutLayers:
    """For a callback that prints logs: without the keys of single layers, which go to trackers and the log file."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Print the short line."""
        short = {name: value for name, value in (logs or {}).items() if PER_LAYER not in name}
        super().on_log(args, state, control, logs=short, **kwargs)


class ShortProgress(_WithoutLayers, ProgressCallback):
    """transformers' progress bar without the keys of single layers."""


class ShortPrinter(_WithoutLayers, PrinterCallback):
    """transformers' printed log without the keys of single layers."""


def shorten_console(trainer: Trainer) -> None:
    """Put the short callbacks in the place of transformers' own, whichever of them the trainer has."""
    for ordinary, short in ((ProgressCallback, ShortProgress), (PrinterCallback, ShortPrinter)):
        if trainer.pop_callback(ordinary) is not None:
            trainer.add_callback(short)


def starting_losses(log_history: Iterable[Mapping[str, float]], names: Iterable[str]) -> dict[str, float]:
    """The first `eval_<name>_loss` logged at step 0, for each of `names` that has one.

    The log is saved in every checkpoint, so a resumed run finds the losses of the model it started from.
    """
    found: dict[str, float] = {}
    for entry in log_history:
        for name in names:
            if entry.get("step") == 0 and f"eval_{name}_loss" in entry:
                found.setdefault(name, entry[f"eval_{name}_loss"])
    return found


def flops_per_token(model: nn.Module, sequence_length: int) -> float:
    """Model FLOPs of forward and backward for one token of a sequence of `sequence_length`, without recomputation.

    6 for each active parameter (Kaplan et al. 2020), and for causal attention 6 x layers x heads x head width x
    length: 12 halved, since a token sees half of the sequence on average (PaLM, appendix B).
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 6.0 * active_parameters(model) + 6.0 * config.num_hidden_layers * heads * head_dim * sequence_length
