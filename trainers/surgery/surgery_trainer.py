"""The trainer of LLM Surgery: several sets, a term for each, one backward pass per term, and rules that stop it.

Source: paper 3 (Veldanda et al. 2024, arXiv 2409.13054); objective.py, surgery_terms.py and the files beside them hold
the formulas, this one wires them into Trainer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from hf_moe_cpt.trainers.instruments.checkpoints import discard_half_written, require_unused
from hf_moe_cpt.trainers.instruments.loss_guard import LossGuard
from hf_moe_cpt.trainers.instruments.mean_meter import MeanMeter
from hf_moe_cpt.trainers.instruments.model_cost import flops_per_token
from hf_moe_cpt.trainers.instruments.ranks import reduce_at_once
from hf_moe_cpt.trainers.instruments.repeatable import repeatable_on_cpu
from hf_moe_cpt.trainers.instruments.survives_faults import SurvivesFaults
from hf_moe_cpt.trainers.surgery.expert_targets import ExpertTargets
from hf_moe_cpt.trainers.surgery.expert_watch import SelectionWatch, check_expert_settings, target_experts
from hf_moe_cpt.trainers.surgery.model_checks import (
    check_context,
    check_sharding,
    check_vocabulary,
    config_of,
    open_model,
    pad_token_of,
)
from hf_moe_cpt.trainers.surgery.reference import Reference, build_reference, compared_rows
from hf_moe_cpt.trainers.surgery.routers import RouterTap
from hf_moe_cpt.trainers.surgery.set_mixture import SurgeryMixture, collate_sets, eval_batches
from hf_moe_cpt.trainers.surgery.settings_checks import FORGET_SETS, UNSEEN, check_sets, losses_of_sets
from hf_moe_cpt.trainers.surgery.surgery_config import SurgeryConfig
from hf_moe_cpt.trainers.surgery.surgery_probe import last_unseen_loss, measure, stop_reason, surgery_gap
from hf_moe_cpt.trainers.surgery.surgery_record import KeepsRecord
from hf_moe_cpt.trainers.surgery.surgery_sets import prepare_sets, tokenized
from hf_moe_cpt.trainers.surgery.surgery_terms import Batch, RouterPull, SurgeryTerms, units_of_step
from hf_moe_cpt.trainers.surgery.term_gradients import TermGradients


logger = logging.getLogger(__name__)

REFERENCE_FOLDER = "reference"  # in the output folder


class SurgeryTrainer(KeepsRecord, SurvivesFaults, Trainer):
    """Unlearn, update and retain in one operation, for any causal LM, dense or MoE, all weights or an adapter.

    Every step takes rows of each set, makes one term out of each (`hf_moe_cpt.trainers.surgery.objective`), and runs a
    backward pass for each term, so that one graph exists at a time. Logged: `<set>/ce`, `<set>/loss`, `<set>/kl`, and
    at logging steps `grad_norm/<set>` and `grad_cosine/<set>_<set>`; measured on fixed rows: `eval_<set>_ce`,
    `eval_<set>_kl`, `eval_surgery_gap`.

    Overrides `training_step` (one backward per term), `get_batch_samples` (units of the whole optimizer batch),
    `compute_loss` (the sum of the terms: the definition), `evaluate`, `log`, `get_decay_parameter_names`, `train`
    (reference, targets, stop rules, resume) and `_save_checkpoint` (nothing is saved after a loss that is no number).
    Every model is saved with `surgery.json`, which says what was done (`hf_moe_cpt.trainers.surgery.surgery_record`).

    Args:
        model: a causal LM of transformers, a PEFT model around one, or the name or folder of one.
        args: a `SurgeryConfig`.
        unlearn_dataset: rows that are to be forgotten.
        update_dataset: rows that are to be learnt.
        retain_dataset: rows on which the model must stay as it is.
        obsolete_dataset: old versions of what is updated, to be forgotten.
        neighbour_dataset: rows like the unlearned ones about other subjects, a second anchor.
        unseen_dataset: rows of the same kind that the model never read; only measured, and the target of forgetting.
        processing_class: the tokenizer; may be left out when every set is tokenised.
        ref_model: the model before surgery, if it is not `model` as given.
        peft_config: train an adapter of this kind.
        callbacks: as in `Trainer`.
    """

    def __init__(
        self,
        model: str | nn.Module,
        args: SurgeryConfig,
        unlearn_dataset: Dataset | None = None,
        update_dataset: Dataset | None = None,
        retain_dataset: Dataset | None = None,
        obsolete_dataset: Dataset | None = None,
        neighbour_dataset: Dataset | None = None,
        unseen_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: PreTrainedModel | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        given = {
            "unlearn": unlearn_dataset,
            "obsolete": obsolete_dataset,
            "update": update_dataset,
            "retain": retain_dataset,
            "neighbour": neighbour_dataset,
            UNSEEN: unseen_dataset,
        }
        if args.n_gpu > 1:
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs: start with torchrun or accelerate launch, one each."
            )
        check_sets(args, given)
        options = args.model_init_kwargs or {}
        config = config_of(model, options)
        check_context(config, processing_class, args.max_length)
        self._vocab_size = config.get_text_config().vocab_size
        self.sets, self.measured_sets = prepare_sets(args, processing_class, self._vocab_size, given)
        model = open_model(model, options, peft_config)
        if ref_model is not None:
            check_vocabulary(model, ref_model)
        self.pad_token_id = pad_token_of(processing_class)
        check_expert_settings(model, args)
        self.given_reference = ref_model
        self.forget_target = None if args.forget_target == UNSEEN else args.forget_target
        self.terms: SurgeryTerms | None = None
        self.term_meter, self.gradient_meter = MeanMeter(), MeanMeter()
        self.loss_guard = LossGuard(args.bad_step_policy == "stop")
        self.units: dict[str, Tensor] = {}  # of each set in the optimizer batch
        super().__init__(
            model=model,
            args=args,
            data_collator=partial(collate_sets, pad_token_id=self.pad_token_id),
            train_dataset=self._mixture(args),
            eval_dataset=self.measured_sets,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        is_sharded = self.is_fsdp_enabled or getattr(self, "is_distributed_loading_by_transformers", False)
        check_sharding(args, is_deepspeed=self.is_deepspeed_enabled, is_fsdp=is_sharded)
        self.term_gradients: TermGradients | None = None  # of the step, where it wants them apart
        self._flops_per_token = flops_per_token(model, args.max_length)
        self.targets: ExpertTargets | None = None
        self.selections: SelectionWatch | None = None

    def _mixture(self, args: SurgeryConfig) -> SurgeryMixture:
        sizes = {name: getattr(args, f"{name}_batch_size") for name in self.sets}
        num_items = args.max_steps * args.gradient_accumulation_steps * args.world_size
        return SurgeryMixture(self.sets, sizes, num_items, args.seed if args.data_seed is None else args.data_seed)

    # ---- data: the mixture is ordered already, position by position ----

    def _get_train_sampler(self, train_dataset: TorchDataset | None = None) -> Sampler | None:
        return SequentialSampler(self.train_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """The micro-batches of an optimizer step; counts the units of each set in all of them on all ranks."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples:
            self.units = units_of_step(samples, self.sets, self.args.normalization, device)
            self.terms.routed_tokens = self.units.get(f"{self.terms.penalised_set}/routed")
        return samples, None

    # ---- the step ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One backward pass for each term; gradients meet once, or once for each term where they are wanted apart."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        apart = self._wants_terms_apart()
        if apart:
            reduce_at_once(model)
            if self.term_gradients is None:
                self.term_gradients = TermGradients.of(self.optimizer, self.accelerator.mixed_precision)
        loss_of_step, measures = torch.zeros((), device=self.args.device), {}
        for place, name in enumerate(self.sets):
            is_last = place == len(self.sets) - 1
            held = self.term_gradients.collect(name) if apart else nullcontext()
            synchronised = nullcontext() if apart or is_last else self.accelerator.no_sync(model)
            with held, synchronised:
                with self.accelerator.autocast():
                    loss, found = self._weighted_term(name, model, inputs[name])
                self.accelerator.backward(loss)
            loss_of_step += loss.detach()
            measures.update(found)
            del loss
        if apart and self.accelerator.sync_gradients:
            self._merge_terms()
        self._record(loss_of_step, measures)
        return loss_of_step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, None]:
        """The sum of all weighted terms, with the graphs of all of them: the definition of what a step descends on."""
        loss = sum(self._weighted_term(name, model, inputs[name])[0] for name in self.sets)
        return (loss, None) if return_outputs else loss

    def _weighted_term(self, name: str, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """A term's part in the loss of this rank, of which micro-batches add up and ranks are averaged."""
        term = self.terms.of(name, model, batch, self.units.get(name))
        loss = self.args.weights[name] * term.loss
        loss = loss if term.extra is None else loss + term.extra
        return self.accelerator.num_processes * loss, term.measures

    def _record(self, loss: Tensor, measures: dict[str, Tensor]) -> None:
        # shares of a step's mean: the meter takes the mean over ranks and micro-batches, and wants their sum
        parts = self.accelerator.num_processes * self.args.gradient_accumulation_steps
        self.term_meter.add({name: parts * value for name, value in measures.items()})
        step = self.state.global_step + 1
        self.loss_guard.record(loss, step, self._describe_batch(step))

    def _wants_terms_apart(self) -> bool:
        """Whether this step needs every term's gradient by itself: to change it, or to log it."""
        args = self.args
        is_logged = args.log_term_gradients and not (self.state.global_step + 1) % self.state.logging_steps
        return is_logged or args.gradient_surgery != "none" or args.max_term_grad_norm is not None

    def _merge_terms(self) -> None:
        args, step = self.args, self.state.global_step
        rules = args.gradient_surgery, args.max_term_grad_norm, args.seed, step
        self.gradient_meter.add(*self.term_gradients.merge(*rules, args.weights))

    def _describe_batch(self, step: int) -> str:
        parts = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        return f"items {(step - 1) * parts} to {step * parts - 1} of the mixture of {', '.join(self.sets)}"

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The parent's choice, or all parameters with `decay_all_parameters`; never tensors of which rows train."""
        decayed = super().get_decay_parameter_names(model)
        if self.args.decay_all_parameters:
            decayed = [name for name, _ in model.named_parameters()]
        return [name for name in decayed if self.targets is None or name not in self.targets.no_decay]

    # ---- measurement ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the terms were since the last training log, and norms and cosines of their gradients."""
        if "loss" in logs:
            self.loss_guard.check(self._describe_batch)
            logs.update(self.term_meter.pop())
            logs.update(self.gradient_meter.pop())
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the first `eval_rows` rows of each set in an order of its own, always the same.

        `<set>_ce` and, of anchors, `<set>_kl` in nats per token, and `surgery_gap`, the criterion of the best model
        (`hf_moe_cpt.trainers.surgery.surgery_probe`). eval_dataset: other sets by name; then only their losses.
        """
        self._prepare()
        args = self.args
        own = eval_dataset is None or eval_dataset is self.measured_sets
        sets = self.measured_sets if own else tokenized(args, self.processing_class, self._vocab_size, eval_dataset)
        with self.accelerator.autocast():
            terms = self.terms if own else replace(self.terms, reference=None)
            measured = measure(self.model, partial(self._batches, sets), list(sets), terms)
        bad = [name for name, value in measured.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(f"{bad[0]} is {measured[bad[0]]} at step {self.state.global_step}.")
        reason = None
        if own:
            if args.follows_unseen and f"{UNSEEN}_ce" in measured:
                self._aim_at(measured[f"{UNSEEN}_ce"])
            rules = self.forget_target, args.update_target, args.max_retain_kl
            measured["surgery_gap"] = surgery_gap(measured, *rules)
            reason = stop_reason(measured, *rules)
            measured |= self.selections.measure(self.model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        if reason is not None and self.is_in_train and self.state.global_step:
            logger.warning("Stopping at step %d: %s.", self.state.global_step, reason)
            self.stop_reason = reason
            self.control.should_training_stop = True
        return metrics

    def _batches(self, sets: Mapping[str, Dataset], name: str, max_rows: int | None = None) -> Iterator[Batch]:
        rows = eval_batches(
            sets[name],
            batch_size=self.args.eval_batch_size,
            pad_token_id=self.pad_token_id,
            max_rows=self.args.eval_rows if max_rows is None else max_rows,
            seed=self.args.seed,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        return map(self._prepare_inputs, rows)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Model FLOPs of the trained passes of a micro-batch."""
        return int(self._flops_per_token * sum(inputs[name]["input_ids"].numel() for name in self.sets))

    # ---- starting, stopping, saving ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Operate, or go on from a checkpoint: a folder, or True / "last" for the newest whole one in `output_dir`.

        The model must be the one before surgery in both cases: reference and targets are taken from it before any
        checkpoint is loaded. Raises ValueError before anything is computed for a folder that is in use or a checkpoint
        that is not whole; FloatingPointError for a loss that is no number, after the last good weights are back.
        """
        output_dir = self.args.output_dir
        checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        if self.is_world_process_zero():
            fresh = partial(require_unused, besides=(REFERENCE_FOLDER,))
            (fresh if checkpoint is None else discard_half_written)(output_dir)
        self.args.eval_on_start = self.args.eval_on_start and checkpoint is None
        with repeatable_on_cpu(self.args.device):
            self._prepare()
            self.term_gradients = None
            try:
                return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            except FloatingPointError as error:
                raise FloatingPointError(f"{error} {self._restore_last_good()}") from error

    def _restore_last_good(self) -> str:
        self.stop_reason, best = "a loss that is no number", self.state.best_model_checkpoint
        if best is None:
            return "No model was saved before: start again with a lower learning_rate or a bounded forget_loss."
        self._load_best_model()
        return f"The model holds the weights of {best} again."

    def _prepare(self) -> None:
        """What is taken from the model before surgery: the reference, and the loss of unseen text."""
        if self.terms is not None:
            return
        args = self.args
        self.selections = SelectionWatch(self.model, partial(self._batches, self.measured_sets), self.sets)
        self.terms = SurgeryTerms(
            losses_of_sets(args),
            args.forget_settings(self.forget_target),
            self._build_reference(),
            args.normalization,
            args.kl_direction,
            args.chunk_tokens,
            penalised_set=next((name for name in self.sets if name not in FORGET_SETS), None),
            routers=self._pull_on_routers(),
        )
        if args.forget_target == UNSEEN and UNSEEN in self.measured_sets:
            with self.accelerator.autocast():
                found = measure(self.model, partial(self._batches, self.measured_sets), [UNSEEN], self.terms)
            self._aim_at(found[f"{UNSEEN}_ce"])
            logger.info("Unseen text has a loss of %.4g nats per token: forgetting aims at it.", self.forget_target)

    def _aim_at(self, target: float | None) -> None:
        self.forget_target = target
        self.terms.forget = self.args.forget_settings(target)

    def _build_reference(self) -> Reference | None:
        args = self.args
        return build_reference(
            args.reference,
            self.model,
            compared_rows(self.sets, losses_of_sets(args)),
            self.accelerator,
            args.reference_cache_dir or Path(args.output_dir) / REFERENCE_FOLDER,
            given=self.given_reference,
            with_routers=args.router_anchor > 0,
            batch_size=args.eval_batch_size,
            chunk_tokens=args.chunk_tokens,
        )

    def _pull_on_routers(self) -> RouterPull | None:
        args = self.args
        if args.target_experts:
            rows = self._batches(self.sets, "unlearn", max_rows=len(self.sets["unlearn"]))
            self.targets = target_experts(self.model, rows, args.target_experts)
        if not (args.router_anchor or args.target_experts):
            return None
        chosen = [] if self.targets is None else self.targets.chosen
        return RouterPull(RouterTap(self.model), args.router_anchor, args.expert_anchor, chosen)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.loss_guard.check(self._describe_batch)
        super()._save_checkpoint(model, trial)

    def read_beside_state(self, checkpoint: Path | None) -> None:
        """Take up the target of a checkpoint, also when the run goes back to it."""
        super().read_beside_state(checkpoint)
        if checkpoint is not None and self.args.follows_unseen:
            self._aim_at(last_unseen_loss(checkpoint, self.forget_target))
