"""The trainer of continual pre-training: data, schedule, losses and meters wired into transformers' Trainer.

The loss is the language-model loss and, once per optimizer batch and never in evaluation, the penalty of the routers
(`hf_moe_cpt.trainers.common.router_balance`).
Source: paper 1 (Thérien et al. 2025, arXiv 2503.05029).
"""

from __future__ import annotations

import logging
import math
from copy import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from torch.utils.data import Dataset as TorchDataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from hf_moe_cpt.data.packing import stack_blocks
from hf_moe_cpt.data.text import check_context
from hf_moe_cpt.machine import inner_model
from hf_moe_cpt.optim.schedules import Extension, ScheduleSettings, build_lr_scheduler, phase_at
from hf_moe_cpt.reading import read_model, refuse_adapter
from hf_moe_cpt.routing.metrics import adaptation, forgetting
from hf_moe_cpt.trainers.common.distributed import ranks_of_a_row, repeatable_on_cpu
from hf_moe_cpt.trainers.common.fault_tolerance import FaultTolerantMixin
from hf_moe_cpt.trainers.common.hub_mixin import HubMixin
from hf_moe_cpt.trainers.common.isolation import AttentionOfShards, isolation_for
from hf_moe_cpt.trainers.common.kernels import use_kernels
from hf_moe_cpt.trainers.common.metrics import (
    HeldOutLoss,
    LossRecorder,
    SourceLosses,
    ThroughputMeter,
    flops_per_token,
    shorten_console,
    starting_losses,
)
from hf_moe_cpt.trainers.common.router_balance import RouterBalance, RouterBalanceMixin
from hf_moe_cpt.trainers.common.updates import UpdatesMixin, freeze
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_data import (
    MixtureFrom,
    build_eval_dataset,
    build_train_dataset,
    continue_rate,
    detect_starting_phase,
    extension_of,
    is_raised,
    law_of,
    load_moments,
    mixture_state,
    mixture_that_goes_on,
    named_eval_sets,
    named_sources,
    read_state,
    refuse_another_order,
    warn_of_epochs,
    with_more_replay,
    write_state,
)


logger = logging.getLogger(__name__)


class StepCallback(TrainerCallback):
    """Tells the instruments where steps begin and end.

    It also logs at every step that is saved: means between logs are not part of a checkpoint, so a resumed run has the
    same log as an uninterrupted one only if no mean spans a checkpoint.
    """

    def __init__(self, throughput: ThroughputMeter) -> None:
        self.throughput = throughput

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self.throughput.begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Close the step and log if it will be saved."""
        self.throughput.end_step()
        control.should_log = control.should_log or control.should_save
        return control


def liger_kernels(args: CPTConfig) -> dict[str, Any]:
    """What `use_liger_kernel` puts in: all of Liger but its heads, where losses per source cannot be seen."""
    heads = {"fused_linear_cross_entropy": False, "cross_entropy": False}
    asked = [name for name in heads if (args.liger_kernel_config or {}).get(name)]
    if asked:
        raise ValueError(
            f"liger_kernel_config sets {', '.join(asked)}, in which losses per source cannot be seen: leave it out; "
            "kernels='auto' fuses the loss into the output head of any model."
        )
    return {**(args.liger_kernel_config or {}), **heads}


class CPTTrainer(RouterBalanceMixin, UpdatesMixin, FaultTolerantMixin, HubMixin, Trainer):
    """Continual pre-training of any causal LM, dense or MoE, with exact replay and infinite schedules.

    Overrides `compute_loss` (sources, router penalties), `create_scheduler`, `create_optimizer` (kept moments),
    `_get_train_sampler` (the mixture is ordered), `log` (meters), `evaluate` and `evaluation_loop` (forgetting,
    adaptation, a mean over tokens), `floating_point_ops` (active parameters), `train` (resume and refusals),
    `_save_checkpoint` (not timed) and `_save` (`cpt_state.json`).

    Args:
        model: a causal LM of transformers, a PEFT model around one, or the name or folder of one.
        args: a `CPTConfig`.
        train_dataset: new text: rows with `text`, or with `input_ids`; a stream for data too large to tokenise first.
            With `args.mixture` a dict of such, by the names of the sources.
        replay_dataset: old text of the same kind, needed when `args.replay_ratio` > 0.
        eval_dataset: held-out new text, reported as `eval_new_loss`; a dict of data sets is evaluated by its names.
        replay_eval_dataset: held-out old text, reported as `eval_replay_loss`; forgetting is measured on it.
        processing_class: the tokenizer; may be left out when every data set is tokenised.
        callbacks: as in `Trainer`.
    """

    run_method = "cpt"

    def __init__(
        self,
        model: str | nn.Module,
        args: CPTConfig,
        train_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset],
        replay_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        replay_eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if isinstance(model, str):
            refuse_adapter(model)
            model = read_model(AutoModelForCausalLM, model, **(args.model_init_kwargs or {}))
        check_context(model.config, processing_class, args.max_length)
        freeze(model, args.freeze or ())
        args = copy(args)  # what is unset is decided for this model; the caller's may serve for another one
        args.ranks_of_a_row = ranks_of_a_row(model, args)
        args.liger_kernel_config = liger_kernels(args)
        self.isolation = isolation_for(model, args, args.max_length) if args.packing == "document" else None
        if self.isolation is not None and self.isolation.method == "padded":
            args.packing = "padded"
        if hasattr(model, "add_model_tags"):
            model.add_model_tags(["hf_moe_cpt", "continual-pre-training"])
        vocab_size = self._vocab_size = model.config.get_text_config().vocab_size
        held_out = named_eval_sets(eval_dataset, replay_eval_dataset)
        self.starting_checkpoint = model.config._name_or_path
        self.starting_phase = (
            detect_starting_phase(self.starting_checkpoint) if args.starting_phase == "auto" else args.starting_phase
        )
        self.extension: Extension | None = None  # of a resumed run, see `train`
        self._mixture_from: list[MixtureFrom] = []
        self._goes_on = False  # with these weights, once it has stopped
        if args.starting_phase == "auto" and self.starting_phase == "constant":
            continue_rate(args, self.starting_checkpoint)
        sources = named_sources(args, train_dataset, replay_dataset)
        self.mixture = build_train_dataset(args, processing_class, vocab_size, sources, self.starting_phase)
        self._own_law = self.mixture.law  # of the settings, whatever a checkpoint says
        if args.process_index == 0:
            warn_of_epochs(self.mixture)
        self.loss_recorder, self.source_losses = LossRecorder(), SourceLosses(self.mixture.law.names)
        self.loss_recorder.attach(model)
        self._held_out = HeldOutLoss(0)  # of the evaluation under way
        balance = RouterBalance(args, model, args.log_expert_load)
        super().__init__(
            model=model,
            args=args,
            data_collator=stack_blocks,
            train_dataset=self.mixture,
            eval_dataset={
                name: build_eval_dataset(args, processing_class, vocab_size, data, name)
                for name, data in held_out.items()
            }
            or None,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.global_batch_size = self.get_total_train_batch_size(args)
        self._flops_per_token = flops_per_token(model, args.max_length)
        self.throughput = ThroughputMeter(
            self.global_batch_size * args.max_length, self._flops_per_token, args.world_size * max(1, args.n_gpu)
        )
        self.balance_routers(balance)
        use_kernels(self.model, self.args, fuses_head=True)
        self.add_callback(StepCallback(self.throughput))
        if self.isolation is not None:
            self.add_callback(AttentionOfShards(self.isolation, args.max_length))
        if self.args.use_liger_kernel:  # `train` does it too; an evaluation before it must find the same model
            apply_liger_kernel(self.model, self.args.liger_kernel_config)
        shorten_console(self)

    # ---- data: the mixture is ordered already, position by position ----

    def _get_train_sampler(self, train_dataset: TorchDataset | None = None) -> Sampler | None:
        return None if isinstance(self.mixture, torch.utils.data.IterableDataset) else SequentialSampler(self.mixture)

    # ---- optimisation ----

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The parent's optimizer, with the moments of the starting checkpoint if they are to be kept."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.args.keep_optimizer_state:
            load_moments(optimizer, self.starting_checkpoint)
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of `args`, which counts its phases in shares of `max_steps`."""
        if self.lr_scheduler is None:
            self.lr_scheduler = build_lr_scheduler(
                self.optimizer if optimizer is None else optimizer, **self.schedule_settings()
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def schedule_settings(self) -> ScheduleSettings:
        """What the functions of `hf_moe_cpt.optim.schedules` take for this run."""
        return {**self.args.schedule_settings(self.starting_phase), "extension": self.extension}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Language-model loss plus, in training, the router penalties once per optimizer batch."""
        if not model.training:
            with self.loss_recorder.tell(self._held_out.listener(inputs.pop("block")), len(inputs["input_ids"])):
                loss, outputs = super().compute_loss(model, self._apart(inputs), True, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        listener, given = self.source_losses.listener(inputs.pop("source")), self._apart(inputs)
        with self.loss_recorder.tell(listener, len(inputs["input_ids"])), self.balance.observe(given):
            loss, outputs = super().compute_loss(model, given, True, num_items_in_batch)
        loss = self.balance.added_to(loss, self.penalty_scale(num_items_in_batch is not None))
        return (loss, outputs) if return_outputs else loss

    def _apart(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the model is given: its documents apart, and without a router penalty of its own."""
        return (inputs if self.isolation is None else self.isolation(inputs)) | self.balance.switched_off

    def _describe_batch(self, step: int) -> str:
        first = (step - 1) * self.global_batch_size
        return f"blocks {first} to {first + self.global_batch_size - 1} of the mixture"

    # ---- measurement: everything leaves through `log` ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the instruments saw since the last training log: losses per source, MRI, rates."""
        if "loss" in logs:
            logs.update(self.source_losses.pop())
            logs["tokens_seen"] = self.token_count.total(self.args.device)
            logs.update(self.throughput.pop())
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: TorchDataset | dict[str, TorchDataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out losses; with the losses at step 0 also `forgetting` and `adaptation`, in nats per token.

        eval_dataset: text to evaluate on instead of the trainer's own, raw or tokenised, or a dict of such.
        """
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._packed(data) for name, data in eval_dataset.items()}
        with self.throughput.pause():
            metrics = super().evaluate(self._packed(eval_dataset), ignore_keys, metric_key_prefix)
        if eval_dataset is None:
            changes = self._changes_since_start(metrics)
            if changes:
                self.log(changes)
                metrics.update(changes)
                self._keep_within_budget(changes)
        return metrics

    def _packed(self, data: Any) -> Any:
        is_text = isinstance(data, Dataset | IterableDataset)
        return build_eval_dataset(self.args, self.processing_class, self._vocab_size, data) if is_text else data

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The parent's loop; the loss is the mean over tokens, the same for any batch size and number of ranks."""
        self._held_out = HeldOutLoss(self.num_examples(dataloader))
        if (fused := getattr(inner_model(self.model), "_fused_head", None)) is not None:
            fused.in_evaluation = bool(kwargs.get("prediction_loss_only"))  # `predict` wants logits
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        prefix, loss = kwargs.get("metric_key_prefix", "eval"), self._held_out.mean()
        output.metrics.update({f"{prefix}_loss": loss, f"{prefix}_perplexity": math.exp(min(loss, 700.0))})
        if (tokens_per_byte := getattr(dataloader.dataset, "tokens_per_byte", None)) is not None:
            output.metrics[f"{prefix}_bits_per_byte"] = loss / math.log(2) * tokens_per_byte
        return output

    def _changes_since_start(self, metrics: dict[str, float]) -> dict[str, float]:
        """By source, and as the mean over the old and over the new ones; text that is no source counts as old."""
        names = [name.removeprefix("eval_").removesuffix("_loss") for name in metrics if name.endswith("_loss")]
        names = names if self.args.mixture is not None else [name for name in ("replay", "new") if name in names]
        before, settings = starting_losses(self.state.log_history, names), self.args.sources()
        changes: dict[str, list[float]] = {}
        for source in before:
            is_new = source in settings and settings[source].role == "new"
            name, measure = ("adaptation", adaptation) if is_new else ("forgetting", forgetting)
            change = measure(before[source], metrics[f"eval_{source}_loss"])
            changes.setdefault(name, []).append(change)
            if self.args.mixture is not None:
                changes[f"{name}/{source}"] = [change]
        return {name: sum(values) / len(values) for name, values in changes.items()}

    def _keep_within_budget(self, changes: dict[str, float]) -> None:
        """Replay more, or end the run, with a checkpoint, if text of a source got worse by more than `max_forgetting`.

        With more replay nothing is done while the loss falls again.
        """
        limit, rises = self.args.max_forgetting, {k: v for k, v in changes.items() if k.startswith("forgetting")}
        worst = max(rises, key=rises.get, default=None)
        if limit is None or worst is None or rises[worst] <= limit or not self.is_in_train:
            return
        step = self.state.global_step
        if self.args.on_forgetting == "replay" and step < self.args.max_steps:
            seen = [entry[worst] for entry in self.state.log_history if worst in entry]
            if is_raised(self._mixture_from) and rises[worst] < seen[-2]:
                return
            over = [name.partition("/")[2] for name, rise in rises.items() if rise > limit]
            weights = with_more_replay(self.args, self.mixture.law, step, over)
            if weights:
                read = mixture_state(self.mixture.law, step)["blocks_read"]
                told = {name: str(weight) for name, weight in weights.items()}
                self._mixture_from.append(MixtureFrom(step, told, read))
                self._goes_on = self.control.should_training_stop = self.control.should_save = True
                shown = ", ".join(f"{name} {float(weight):.1%}" for name, weight in weights.items())
                message = "%s is %.3f nats per token at step %d, above max_forgetting=%g: from here on %s."
                logger.warning(message, worst, rises[worst], step, limit, shown)
                return
        logger.warning(
            "%s is %.3f nats per token at step %d, above max_forgetting=%g: the run ends here. Raise the weight of "
            "replay or lower the rate, from an earlier checkpoint.",
            *(worst, rises[worst], step, limit),
        )
        self.control.should_training_stop = self.control.should_save = True

    def compared_data(self) -> dict[str, Any]:
        """The documents of the sources, whatever their mixture and packing."""
        sources = getattr(self.mixture, "blocks", None) or self.mixture.documents
        return {name: getattr(source, "documents", source) for name, source in sources.items()}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Model FLOPs of a micro-batch, counting the parameters that are active for a token."""
        return int(self._flops_per_token * inputs["input_ids"].numel())

    # ---- starting, saving, resuming ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, or go on from a checkpoint: a folder, or True / "last" for the newest whole one in `output_dir`.

        Raises ValueError, before anything is computed, for a folder that is in use, a checkpoint that is not whole or
        was made with other settings, or a disk that is too small.
        """
        checkpoint = self.open_run(resume_from_checkpoint)
        self.extension = None if checkpoint is None else extension_of(checkpoint, self.args)
        self.args.eval_on_start = self.args.eval_on_start and checkpoint is None and self.eval_dataset is not None
        state = {} if checkpoint is None else read_state(str(checkpoint)) or {}
        law = (self.args, self.starting_phase, self.mixture, self._own_law)
        self._mixture_from = mixture_that_goes_on(state, *law, self._changed)
        with repeatable_on_cpu(self.args.device):
            while True:
                self._goes_on, self.mixture.law = False, law_of(*law, self._mixture_from)
                output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
                if not self._goes_on:
                    return output
                checkpoint = self.whole_checkpoint_before(self.state.global_step + 1)
                self.args.eval_on_start = False

    def _opened(self, asked: str | bool | None) -> tuple[Path | None, list[str]]:
        checkpoint, changed = super()._opened(asked)
        if checkpoint is not None:
            refuse_another_order(checkpoint, self.args, self.mixture)
        return checkpoint, changed

    def _facts(self) -> dict[str, Any]:
        """The parent's, the order of the sources and their numbers of tokens."""
        blocks = getattr(self.mixture, "blocks", {})
        tokens = {f"tokens_{name}": part.num_tokens for name, part in blocks.items()}
        return {**super()._facts(), **tokens, "source_order": list(self.mixture.law.names)}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.throughput.pause():
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_state(Path(output_dir or self.args.output_dir), self._schedule_state())

    def _schedule_state(self) -> dict[str, Any]:
        settings = self.args.schedule_settings(self.starting_phase)
        last_step = max(self.state.global_step - 1, 0)
        return {
            "schedule": self.args.cpt_schedule,
            "step": self.state.global_step,
            "max_steps": self.args.max_steps,
            "phase": phase_at(last_step, num_steps=settings["num_steps"], phases=settings["phases"]),
            "learning_rate": self._get_learning_rate() if self.lr_scheduler is not None else None,
            "tokens_seen": self.token_count.last,
            "started_from": self.starting_checkpoint or None,
            "starting_phase": self.starting_phase,
            "extension": self.extension,
            "mixture_from": self._mixture_from,
            **mixture_state(self.mixture.law, self.state.global_step),
        }
