"""How many tokens each expert gets while any Trainer trains any mixture of experts, and how far its routers drift.

Every forward pass in training mode counts, once: passes of an evaluation, of a reference model, of a generation and of
recomputation do not. Works with accumulation, several ranks, adapters and checkpointing. Counts stay on the device
until the trainer logs.

Letters: L MoE layers, E experts, K experts per token, B sequences, S tokens of the longest, T tokens of a call.
Source: MRI (Eq. 1) and router saturation are metrics of paper 1 (arXiv 2503.05029); the rest is ours.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from hf_moe_cpt.machine import has_process_group, inner_model, modes_kept
from hf_moe_cpt.routing.hooks import RoutingTap, layers_to_watch, listen, moe_layers
from hf_moe_cpt.routing.metrics import max_routing_imbalance_from_load, router_saturation


logger = logging.getLogger(__name__)

PROBE_FILE = "router_probe.safetensors"
MAX_PENDING_NUMBERS = 1 << 23  # expert numbers that wait to be counted: 64 MiB of integers
Batch = Mapping[str, Tensor]


BALANCE = ("mri", "mri_normalized", "load_entropy")  # of a layer, as the log names them


def by_layer(found: Mapping[str, list[float]], per_layer: bool = True) -> dict[str, float]:
    """Log entries of values of layers, by name: the mean as `name`, with `per_layer` also each as `name/layer_00`."""
    entries = {}
    for name, values in found.items():
        entries[name] = sum(values) / len(values)
        if per_layer:
            entries |= {f"{name}/layer_{layer:02d}": value for layer, value in enumerate(values)}
    return entries


class ExpertLoadMeter:
    """Expert loads of each optimizer step, and from them the balance of the experts in each layer.

    A step may consist of several micro-batches on several ranks: loads are added over all of them before the maximum
    is taken, so MRI means the same for any way of splitting the batch. Layers are counted together, a few kernels for
    all of them: one by one, the launches alone cost a training step of a small model some percent.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = moe_layers(model, lone_routers=True)
        self._widths = [layer.num_experts for layer in self.layers]
        self._observing = False
        self._logits: list[tuple[int, Tensor]] | None = None  # layer, its (T, E) logits, for who asked for them
        self._pending: list[tuple[int, Tensor]] = []  # layer, its (T, K) experts, not counted yet
        self._pending_numbers = 0
        self._counts: dict[torch.device, Tensor] = {}  # (L, widest E + 1): load of each expert, then tokens
        self._rows: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
        self._balance_of_steps: list[Tensor] = []  # each (L, 3): MRI, MRI x E/K, entropy over log E
        self._keep: Tensor | None = None
        self._num_experts: Tensor | None = None  # (L,)
        self._hooks = ExitStack()
        self._hooks.enter_context(listen(self.layers, self._hear))

    def close(self) -> None:
        """Remove the hooks from the model."""
        self._hooks.close()

    @contextmanager
    def observe(
        self, token_mask: Tensor | None = None, logits: list[tuple[int, Tensor]] | None = None
    ) -> Iterator[None]:
        """Count the forward passes inside this context; recomputation by checkpointing happens outside of it.

        token_mask: (B, T) or (T,), true for tokens that count; None counts all. logits: a list that gets (place of the
        layer, logits (T, E) with their gradient) of every call of a layer.
        """
        self._observing, self._logits = True, logits
        self._keep = None if token_mask is None else token_mask.flatten()
        try:
            yield
            self._count_pending()
        finally:
            self._observing, self._logits = False, None
            self._keep, self._pending, self._pending_numbers = None, [], 0

    def _hear(self, layer: int, experts: Tensor, logits: Tensor | None) -> None:
        # what is no part of training is in evaluation mode; reentrant checkpointing has no gradient either
        if not self._observing or not self.layers[layer].experts.training:
            return
        if self._logits is not None and logits is not None:
            self._logits.append((layer, logits))
        self._pending.append((layer, experts))
        self._pending_numbers += experts.numel()
        if self._pending_numbers > MAX_PENDING_NUMBERS:
            self._count_pending()

    def _count_pending(self) -> None:
        """Add what was heard to the counts, all layers of one shape at once."""
        pending, self._pending, self._pending_numbers = self._pending, [], 0
        for (device, (num_tokens, _)), group in groupby(pending, key=lambda item: (item[1].device, item[1].shape)):
            layers, indices = zip(*group, strict=True)
            if device not in self._counts:
                shape = (len(self.layers), max(self._widths) + 1)
                self._counts[device] = torch.zeros(shape, dtype=torch.int64, device=device)
            counts = self._counts[device]
            rows = self._rows_on(device, layers)
            cells = torch.stack(indices).long() + rows[:, None, None] * counts.shape[1]  # (layers, T, K)
            if self._keep is None:
                votes, tokens = torch.ones_like(cells), torch.full_like(rows, num_tokens)
            else:
                keep = self._keep.to(device).bool().long()
                votes, tokens = keep[None, :, None].expand_as(cells).contiguous(), keep.sum().expand_as(rows)
            counts.view(-1).scatter_add_(0, cells.flatten(), votes.flatten())
            counts[:, -1].index_add_(0, rows, tokens)

    def _rows_on(self, device: torch.device, layers: tuple[int, ...]) -> Tensor:
        """The numbers of these layers, copied to the device once: a copy from the host waits for the device."""
        if (device, layers) not in self._rows:
            self._rows[device, layers] = torch.tensor(layers, device=device)
        return self._rows[device, layers]

    def load(self, over_ranks: bool = True) -> Tensor | None:
        """Counts of the step so far, (L, widest E + 1): of each expert, then of tokens; None if there were none.

        over_ranks: those of all ranks, in a collective without host sync.
        """
        if not self._counts:
            return None
        first, *others = self._counts.values()
        counts = sum((other.to(first.device) for other in others), first.clone())
        if over_ranks and has_process_group():
            dist.all_reduce(counts)
        return counts

    def restart(self) -> None:
        """Forget what was counted since the last step ended."""
        self._counts = {}

    def end_step(self) -> Tensor | None:
        """Turn the loads counted since the last call into each layer's balance; returns them, as `load` does."""
        counts = self.load()
        if counts is None:
            return None
        self.restart()
        load, tokens = counts[:, :-1].double(), counts[:, -1].double()
        if self._num_experts is None:  # copied to the device once
            self._num_experts = torch.tensor(self._widths, device=counts.device)
        widths = self._num_experts
        mri = max_routing_imbalance_from_load(load, tokens)
        ideal = load.sum(-1) / tokens / widths  # K / E
        share = load / load.sum(-1, keepdim=True)
        entropy = torch.special.entr(share).sum(-1) / widths.double().log()
        self._balance_of_steps.append(torch.stack([mri, mri / ideal, entropy], dim=-1))
        return counts

    def pop(self) -> dict[str, list[float]]:
        """Means over the steps since the last call, one per layer, empty if there were none; the one host sync.

        mri: in [K/E, 1]. mri_normalized: mri x E/K, 1 when perfectly balanced. load_entropy: over log E, in [0, 1], 1
        when perfectly balanced.
        """
        if not self._balance_of_steps:
            return {}
        mean = torch.stack(self._balance_of_steps).mean(0)
        self._balance_of_steps = []
        return dict(zip(BALANCE, mean.T.tolist(), strict=True))


class RoutingProbe:
    """Fixed batches, and the experts that the starting model chose for their tokens.

    The choices are kept in a file beside the checkpoints, so a resumed run is still compared with the model that
    training began with.

    batches: input_ids (B, S) and, where there is padding, attention_mask (B, S). Raises ValueError for anything else.
    """

    def __init__(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.batches = [_checked(batch) for batch in batches]
        if not self.batches:
            raise ValueError("probe holds no batch: give at least one, a dict of input_ids and attention_mask.")
        self.before: list[Tensor] = []  # of each layer (T, K) int16 on the CPU

    def start(self, model: nn.Module, path: Path, step: int, is_writer: bool) -> None:
        """Remember what the model chooses; a resumed run (step > 0) reads what was remembered at its start."""
        if step > 0:
            if self._read(path):
                return
            logger.warning(
                "%s has no routing of the starting model on this probe: saturation is told against step %d.",
                path,
                step,
            )
        self.before = self._choices(model)
        if is_writer:
            path.parent.mkdir(parents=True, exist_ok=True)
            layers = {f"layer_{layer:03d}": index for layer, index in enumerate(self.before)}
            save_file(layers, path, metadata={"tokens": self._checksum()})

    def saturation(self, model: nn.Module) -> list[float]:
        """Share of a token's experts that the starting model chose too: of each layer a number in [0, 1]."""
        return [router_saturation(*layer) for layer in zip(self.before, self._choices(model), strict=True)]

    def _choices(self, model: nn.Module) -> list[Tensor]:
        """The experts of every token that counts, of each layer (T, K) int16 on the CPU."""
        tap = RoutingTap(model, with_probabilities=False)
        inner = inner_model(model)
        is_known = isinstance(inner, PreTrainedModel)
        decoder = inner.base_model if is_known else inner  # heads are not needed
        options = {"use_cache": False} if is_known else {}
        device = next(model.parameters()).device
        parts = []
        with modes_kept(model), torch.no_grad(), tap.listening():
            model.eval()
            for ids, mask in self.batches:
                decoder(input_ids=ids.to(device), attention_mask=mask.to(device), **options)
                kept = mask.flatten().bool()
                parts.append([layer.experts.cpu()[kept] for layer in tap.take(ids.numel())])
        return [torch.cat(layer) for layer in zip(*parts, strict=True)]

    def _read(self, path: Path) -> bool:
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("tokens") != self._checksum():
                    return False
                self.before = [file.get_tensor(name) for name in sorted(file.keys())]
        except (OSError, SafetensorError):
            return False
        return True

    def _checksum(self) -> str:
        found = hashlib.sha256()
        for ids, mask in self.batches:
            found.update(ids.numpy().tobytes() + mask.numpy().tobytes())
        return found.hexdigest()


def _checked(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask (B, S) int64 on the CPU."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        has = ", ".join(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"A batch of the probe has {has}: it needs input_ids (B, S), and attention_mask for padding.")
    ids = torch.as_tensor(batch["input_ids"]).long().cpu()
    mask = torch.as_tensor(batch.get("attention_mask", torch.ones_like(ids))).long().cpu()
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise ValueError(
            f"A batch of the probe has input_ids {tuple(ids.shape)} and attention_mask {tuple(mask.shape)}: both must "
            "be (B, S)."
        )
    return ids, mask


class RouterMonitorCallback(TrainerCallback):
    """Adds to the training log, per layer and as the mean over layers:

    `mri` (share of the tokens that visit the busiest expert, in [K/E, 1]), `mri_normalized` (x E/K, 1 is perfect
    balance), `load_entropy` (over log E, 1 is perfect balance), each as `name` and `name/layer_00`, means over the
    optimizer steps since the last log; with a probe also `router_saturation` (share of a token's experts that the
    starting model chose too, 1 is unchanged).

    With `callbacks=[...]` or `add_callback` the values reach log_history, the console and callbacks that come later;
    W&B, TensorBoard and other reporters come first in a Trainer's list: `attach` puts the monitor before them.

    Args:
        every: optimizer steps between two entries, at which the trainer is made to log; None: whenever it logs.
        per_layer: whether layers are logged one by one beside the mean.
        probe: batches of input_ids and attention_mask (B, S) on which saturation is measured.
        probe_every: optimizer steps between two measurements of saturation at least; a measurement costs one forward
            pass over the probe.
    """

    def __init__(
        self,
        every: int | None = None,
        per_layer: bool = True,
        probe: Batch | Iterable[Batch] | None = None,
        probe_every: int = 1,
    ) -> None:
        for name, value in (("every", every), ("probe_every", probe_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1: it counts optimizer steps.")
        self.every, self.per_layer, self.probe_every = every, per_layer, probe_every
        self.probe = None if probe is None else RoutingProbe([probe] if isinstance(probe, Mapping) else list(probe))
        self.meter: ExpertLoadMeter | None = None
        self._watching = ExitStack()
        self._probed_at = 0

    def attach(self, trainer: Trainer) -> RouterMonitorCallback:
        """Add the monitor to a trainer before the callbacks that report to W&B, TensorBoard and the like."""
        callbacks = trainer.callback_handler.callbacks
        flows = [place for place, callback in enumerate(callbacks) if isinstance(callback, DefaultFlowCallback)]
        callbacks.insert(flows[0] + 1 if flows else 0, self)
        return self

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Find the experts and begin to listen; one warning and nothing more for a model without any."""
        self._stop()
        try:
            layers = layers_to_watch(model, lone_routers=True)
        except ValueError as error:
            logger.warning("RouterMonitorCallback logs nothing: %s", error)
            return
        self.meter = ExpertLoadMeter(model)
        self._watching.callback(self.meter.close)
        self._listen(_whole_of_experts(model, [layer.experts for layer in layers]))
        if self.probe is not None:
            self._probed_at = state.global_step
            self.probe.start(model, Path(args.output_dir) / PROBE_FILE, state.global_step, state.is_world_process_zero)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Close the step; nothing here waits for the device."""
        if self.meter is not None:
            self.meter.end_step()
            if self.every is not None and state.global_step % self.every == 0:
                control.should_log = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Add the values to a training log, the one just written to the history included."""
        is_due = self.every is None or state.global_step % self.every == 0
        if self.meter is None or not is_due or not logs or "loss" not in logs:
            return
        found = self.meter.pop()
        if self.probe is not None and state.global_step - self._probed_at >= self.probe_every:
            self._probed_at = state.global_step
            found["router_saturation"] = self.probe.saturation(model)
        values = by_layer(found, self.per_layer)
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the model as it was."""
        self._stop()

    # ---- which forward passes count ----

    def _listen(self, whole: nn.Module) -> None:
        """Observe each forward pass of `whole` that belongs to a training step."""
        names = list(inspect.signature(whole.forward).parameters)
        passes: list[ExitStack] = []

        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            passes.append(ExitStack())
            if module.training and torch.is_grad_enabled():
                mask = token_mask(dict(zip(names, args, strict=False)) | kwargs)
                passes[-1].enter_context(self.meter.observe(mask))

        def end(module: nn.Module, args: tuple, output: Any) -> None:
            if passes:
                passes.pop().close()

        for handle in (
            whole.register_forward_pre_hook(begin, with_kwargs=True),
            whole.register_forward_hook(end, always_call=True),
        ):
            self._watching.callback(handle.remove)

    def _stop(self) -> None:
        self._watching.close()
        self.meter = None


def _whole_of_experts(model: nn.Module, experts: list[nn.Module]) -> nn.Module:
    """The innermost model of transformers that holds all experts, `model` itself if there is none.

    It lies outside of every part that checkpointing recomputes, and inside of the heads that some trainers leave out.
    """
    wanted = set(experts)
    whole = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return next((module for module in reversed(whole) if wanted <= set(module.modules())), model)


def token_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """Which tokens count, (B, S), where the model was given one of that form; None: every token counts."""
    mask = inputs.get("attention_mask")
    states = next((inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None), None)
    if not isinstance(mask, Tensor) or states is None or mask.shape != states.shape[:2]:
        return None
    return mask
