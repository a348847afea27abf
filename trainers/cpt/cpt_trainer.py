"""From what the user passed to what the Trainer iterates: tokenised, packed, mixed with replay. Source: ours.

What continual pre-training minimises: the language-model loss and, once per optimizer batch, the router penalties.

Our models put their penalties into `loss` with the right weight and report `lm_loss`, `aux_loss` and `z_loss` beside
it. Other MoEs of transformers add `coef * aux_loss` to every micro-batch of every rank, and also while evaluating; the
functions here take that back to once per batch and never in evaluation. Source: ours; the defect was measured.

What a run starts from: the phase in which its checkpoint was saved, and that checkpoint's Adam moments.

Every model that `CPTTrainer` saves carries `cpt_state.json`, a few facts about where on its schedule it stood. A later
run reads them to decide whether to warm up again. Source: paper 1, sections 3.2 and 5.

What happens at the edges of an optimizer step: clocks, expert loads, and a log wherever a checkpoint is saved.

Whether a run uses Liger-Kernel: what `use_liger_kernel` means for a model, and what is refused. Source: ours.

The trainer of continual pre-training: wiring of data, schedule, objective and instruments into Trainer.

Source: paper 1 (Thérien et al. 2025, arXiv 2503.05029); data law, schedules and metrics live in their own rooms.
"""

from __future__ import annotations

import inspect
import json
import logging
from copy import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.optim import Optimizer
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
from transformers.utils import cached_file

from hf_moe_cpt.data.packing import (
    IGNORED_LABEL,
    SOURCES,
    PackedDataset,
    ReplayMixture,
    StreamingReplayMixture,
    stack_blocks,
)
from hf_moe_cpt.data.text import tokenize_documents
from hf_moe_cpt.extras import is_installed
from hf_moe_cpt.optim.schedules import build_lr_scheduler, phase_at
from hf_moe_cpt.routing.metrics import adaptation, forgetting
from hf_moe_cpt.trainers.common.checkpointing import discard_half_written, require_free_space, require_unused
from hf_moe_cpt.trainers.common.distributed import repeatable_on_cpu
from hf_moe_cpt.trainers.common.fault_tolerance import FaultTolerantMixin, LossGuard
from hf_moe_cpt.trainers.common.hub_mixin import HubMixin
from hf_moe_cpt.trainers.common.metrics import (
    HeldOutLoss,
    LossRecorder,
    MeanMeter,
    SourceLosses,
    ThroughputMeter,
    flops_per_token,
    shorten_console,
    starting_losses,
)
from hf_moe_cpt.trainers.common.router_monitor import ExpertLoadMeter
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig


class NumberedBlocks(TorchDataset):
    """Blocks that carry their position as "block", so that each is counted once however it is batched."""

    def __init__(self, blocks: PackedDataset) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {**self.blocks[position], "block": position}


def check_model_fits(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, args: CPTConfig) -> None:
    """Refuse a tokenizer with more tokens than the model, and blocks longer than its context."""
    config = model.config.get_text_config()
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {config.vocab_size}: use the tokenizer that "
            "belongs to the model, or model.resize_token_embeddings(len(tokenizer))."
        )
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and args.max_length > context:
        raise ValueError(
            f"max_length={args.max_length} is longer than the model's context of {context} tokens: lower max_length."
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if args.packing == "document" and "position_ids" not in inspect.signature(base.forward).parameters:
        raise ValueError(
            f"packing='document' needs position_ids, which {type(base).__name__} does not take: set packing='concat'."
        )


def build_train_dataset(
    args: CPTConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    new: Dataset | IterableDataset,
    replay: Dataset | IterableDataset | None,
) -> TorchDataset:
    """The mixture of both sources, exactly `max_steps` optimizer batches long (endless when streaming)."""
    _check_sources(args, new, replay)
    global_batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    with args.main_process_first(desc="tokenising"):
        sources = [None if data is None else _tokenize(data, args, tokenizer, vocab_size) for data in (new, replay)]
    common: dict[str, Any] = {
        "replay_ratio": args.replay_ratio,
        "batch_size": global_batch,
        "num_batches": args.max_steps,
        "seed": args.seed if args.data_seed is None else args.data_seed,
    }
    if isinstance(new, IterableDataset):
        return StreamingReplayMixture(
            *sources,
            **common,
            max_length=args.max_length,
            packing=args.packing,
            micro_batch_size=args.train_batch_size,
            shuffle_buffer=args.shuffle_buffer,
        )
    packed = [None if data is None else PackedDataset(data, args.max_length, args.packing) for data in sources]
    return ReplayMixture(*packed, **common)


def build_eval_dataset(
    args: CPTConfig, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, held_out: Dataset
) -> NumberedBlocks:
    """Held-out text packed like the training text, in its own order."""
    if isinstance(held_out, IterableDataset):
        raise ValueError(
            "eval_dataset is a stream, and losses need the same text each time: pass a map-style Dataset."
        )
    with args.main_process_first(desc="tokenising held-out text"):
        blocks = PackedDataset(_tokenize(held_out, args, tokenizer, vocab_size), args.max_length, args.packing)
    return NumberedBlocks(blocks)


def _tokenize(
    data: Dataset | IterableDataset, args: CPTConfig, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> Dataset | IterableDataset:
    return tokenize_documents(
        data,
        tokenizer,
        text_column=args.text_column,
        num_proc=args.dataset_num_proc,
        add_eos=tokenizer is not None,
        vocab_size=vocab_size,
    )


def _check_sources(args: CPTConfig, new: object, replay: object) -> None:
    if args.replay_ratio > 0 and replay is None:
        raise ValueError(
            f"replay_ratio={args.replay_ratio} without replay_dataset: pass the old text, or set it to 0."
        )
    if args.replay_ratio == 0 and replay is not None:
        raise ValueError("replay_dataset without replay_ratio: set replay_ratio above 0, or leave replay_dataset out.")
    for name, data in (("train_dataset", new), ("replay_dataset", replay)):
        if data is not None and not isinstance(data, Dataset | IterableDataset):
            raise ValueError(
                f"{name} is a {type(data).__name__}: pass a datasets.Dataset or IterableDataset "
                "(datasets.Dataset.from_dict({'text': [...]}) makes one from a list)."
            )
    if replay is not None and isinstance(new, IterableDataset) != isinstance(replay, IterableDataset):
        raise ValueError("train_dataset and replay_dataset must both be streams, or both not: load them the same way.")


def penalty_share(labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """Share in [0, 1] of the optimizer batch's predicted tokens that these labels (B, T) hold; 1 if it is unknown.

    The shares of all micro-batches of all ranks sum to 1, so a penalty weighted by them counts once per batch.
    """
    if num_items_in_batch is None:
        return 1.0
    return labels[..., 1:].ne(IGNORED_LABEL).sum() / num_items_in_batch


def foreign_penalty(outputs: Any, coefficient: float) -> Tensor | None:
    """The penalty that a model other than ours has added to `outputs.loss`, or None if it adds none.

    coefficient: `router_aux_loss_coef` of its configuration.
    """
    if getattr(outputs, "lm_loss", None) is not None or not coefficient:
        return None
    aux_loss = getattr(outputs, "aux_loss", None)
    return coefficient * aux_loss if isinstance(aux_loss, Tensor) else None


def corrected_loss(loss: Tensor, penalty: Tensor, share: Tensor | float, loss_scale: float) -> Tensor:
    """`loss`, which holds `loss_scale * penalty`, with the penalty weighted by `share` instead of 1."""
    return loss + loss_scale * (share - 1.0) * penalty.to(loss.device)


def reported_terms(outputs: Any) -> dict[str, Tensor]:
    """The router losses of a forward pass that exist, detached: raw, before their coefficients."""
    terms = {name: getattr(outputs, name, None) for name in ("aux_loss", "z_loss")}
    return {name: value.detach().float() for name, value in terms.items() if isinstance(value, torch.Tensor)}


STATE_FILE = "cpt_state.json"
OPTIMIZER_FILE = "optimizer.pt"
# Saved in this phase of a schedule -> the starting phase of a run that continues from it.
CONTINUES_AS = {"warmup": "constant", "cooldown": "constant", "constant": "constant", "anneal": "decayed"}

logger = logging.getLogger(__name__)


def write_state(folder: str | Path, state: dict[str, Any]) -> None:
    """Write `cpt_state.json` into a saved model."""
    (Path(folder) / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")


def read_state(name_or_path: str) -> dict[str, Any] | None:
    """The facts saved with a model, by folder or Hub id; None if it was not saved by `CPTTrainer`."""
    try:
        path = cached_file(
            name_or_path,
            STATE_FILE,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # a folder that is gone since the model was loaded
        return None
    return None if path is None else json.loads(Path(path).read_text())


def detect_starting_phase(name_or_path: str | None) -> str:
    """ "scratch" without a checkpoint; else "constant" or "decayed", as the checkpoint says ("decayed" if silent)."""
    if not name_or_path:
        return "scratch"
    state = read_state(name_or_path)
    if state is None:
        logger.info("%s does not say where its schedule stood: it counts as decayed and warms up again.", name_or_path)
        return "decayed"
    return CONTINUES_AS[state["phase"]]


def load_moments(optimizer: Optimizer, checkpoint: str | Path) -> None:
    """Give `optimizer` the moments saved in `checkpoint`; its learning rates and other settings stay as they are.

    Raises ValueError if there are none, or if they belong to other parameters.
    """
    path = Path(checkpoint) / OPTIMIZER_FILE
    if not path.is_file():
        raise ValueError(
            f"keep_optimizer_state: {str(checkpoint)!r} holds no {OPTIMIZER_FILE}. Start from a checkpoint-N folder "
            "that was saved without save_only_model, or set keep_optimizer_state=False."
        )
    saved = torch.load(path, map_location="cpu", weights_only=True)
    current = optimizer.state_dict()
    shapes_now = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    shapes_saved = {index: entry["exp_avg"].shape for index, entry in saved["state"].items() if "exp_avg" in entry}
    if len(shapes_saved) != len(shapes_now) or any(shapes_now[i] != shape for i, shape in shapes_saved.items()):
        raise ValueError(
            f"keep_optimizer_state: the moments in {str(path)!r} belong to other parameters ({len(shapes_saved)} "
            f"against {len(shapes_now)}): start from the checkpoint of this model, or set keep_optimizer_state=False."
        )
    optimizer.load_state_dict({"state": saved["state"], "param_groups": current["param_groups"]})
    logger.info("Adam moments of %d parameters carried over from %s.", len(shapes_now), path)


class StepCallback(TrainerCallback):
    """Tells the instruments where steps begin and end.

    It also logs at every step that is saved: means between logs are not part of a checkpoint, so a resumed run has the
    same log as an uninterrupted one only if no mean spans a checkpoint.
    """

    def __init__(self, throughput: ThroughputMeter, load_meter: ExpertLoadMeter | None) -> None:
        self.throughput = throughput
        self.load_meter = load_meter

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self.throughput.begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Close the step and log if it will be saved."""
        self.throughput.end_step()
        if self.load_meter is not None:
            self.load_meter.end_step()
        control.should_log = control.should_log or control.should_save
        return control


# Its entry in Liger's table is ours, and its fused head hands the losses of tokens on.
OUR_MODEL_TYPE = "cpt_moe"


def decide_liger(args: CPTConfig, model: nn.Module) -> bool:
    """True or False as asked for; unset: on for a `cpt_moe` on one CUDA device per process, if Liger is installed.

    Several devices in one process (`DataParallel`) copy a model, and Liger's methods stay with the original. Raises
    ValueError where another model's loss would be fused into its head.
    """
    is_ours = model.config.get_text_config().model_type == OUR_MODEL_TYPE
    if args.use_liger_kernel is None:
        return is_ours and args.device.type == "cuda" and args.n_gpu == 1 and is_installed("liger_kernel")
    is_head_fused = (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True)
    if args.use_liger_kernel and is_head_fused and not is_ours:
        raise ValueError(
            "use_liger_kernel fuses the loss into the output head, where losses per source cannot be seen: set "
            'liger_kernel_config={"fused_linear_cross_entropy": False}.'
        )
    return args.use_liger_kernel


class CPTTrainer(FaultTolerantMixin, HubMixin, Trainer):
    """Continual pre-training of any causal LM, dense or MoE, with exact replay and infinite schedules.

    Overrides `compute_loss` (sources, router penalties), `create_scheduler`, `create_optimizer` (kept moments), `log`,
    `evaluate` (forgetting and adaptation), `train` (resume and refusals) and the saving hooks (whole checkpoints).

    Args:
        model: a causal LM of transformers, a PEFT model around one, or the name or folder of one.
        args: a `CPTConfig`.
        train_dataset: new text: rows with `text`, or with `input_ids`; a stream for data too large to tokenise first.
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
        train_dataset: Dataset | IterableDataset,
        replay_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        replay_eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, **(args.model_init_kwargs or {}))
        check_model_fits(model, processing_class, args)
        args = copy(args)  # what is unset is decided for this model; the caller's may serve for another one
        args.use_liger_kernel = decide_liger(args, model)
        if hasattr(model, "add_model_tags"):
            model.add_model_tags(["hf_moe_cpt", "continual-pre-training"])
        vocab_size = self._vocab_size = model.config.get_text_config().vocab_size
        held_out = _named_eval_sets(eval_dataset, replay_eval_dataset)
        self.mixture = build_train_dataset(args, processing_class, vocab_size, train_dataset, replay_dataset)
        self.starting_checkpoint = model.config._name_or_path
        self.starting_phase = (
            detect_starting_phase(self.starting_checkpoint) if args.starting_phase == "auto" else args.starting_phase
        )
        self.loss_recorder, self.source_losses = LossRecorder(), SourceLosses(SOURCES)
        self.loss_recorder.attach(model)
        self._held_out = HeldOutLoss(0)  # of the evaluation under way
        self.load_meter = ExpertLoadMeter(model) if args.log_expert_load else None
        self.term_meter, self.loss_guard = MeanMeter(), LossGuard(args.bad_step_policy == "stop")
        super().__init__(
            model=model,
            args=args,
            data_collator=stack_blocks,
            train_dataset=self.mixture,
            eval_dataset={
                name: build_eval_dataset(args, processing_class, vocab_size, data) for name, data in held_out.items()
            }
            or None,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.global_batch_size = self._train_batch_size * args.world_size * args.gradient_accumulation_steps
        self._flops_per_token = flops_per_token(model, args.max_length)
        self.throughput = ThroughputMeter(
            self.global_batch_size * args.max_length, self._flops_per_token, args.world_size * max(1, args.n_gpu)
        )
        self.add_callback(StepCallback(self.throughput, self.load_meter))
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
            settings = self.args.schedule_settings(self.starting_phase)
            self.lr_scheduler = build_lr_scheduler(self.optimizer if optimizer is None else optimizer, **settings)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Language-model loss plus, in training, the router penalties once per optimizer batch."""
        if not model.training:
            with self.loss_recorder.tell(self._held_out.listener(inputs.pop("block"))):
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        with self.loss_recorder.tell(self.source_losses.listener(inputs.pop("source"))), self._observe_experts(inputs):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        share = penalty_share(inputs["labels"], num_items_in_batch)
        loss = self._correct_penalty(loss, outputs, share, scaled=num_items_in_batch is not None)
        self.term_meter.add(reported_terms(outputs))
        self.loss_guard.record(loss, self.state.global_step + 1, self._describe_batch(self.state.global_step + 1))
        return (loss, outputs) if return_outputs else loss

    def _correct_penalty(self, loss: Tensor, outputs: Any, share: Tensor | float, scaled: bool) -> Tensor:
        config = self.accelerator.unwrap_model(self.model).config.get_text_config()
        penalty = foreign_penalty(outputs, getattr(config, "router_aux_loss_coef", 0.0))
        if penalty is None:
            return loss
        world = self.accelerator.num_processes if scaled and self.args.average_tokens_across_devices else 1
        return corrected_loss(loss, penalty, share, world)

    def _observe_experts(self, inputs: dict[str, Tensor]):
        return self.load_meter.observe(inputs.get("attention_mask")) if self.load_meter else torch.enable_grad()

    def _describe_batch(self, step: int) -> str:
        first = (step - 1) * self.global_batch_size
        return f"blocks {first} to {first + self.global_batch_size - 1} of the mixture"

    # ---- measurement: everything leaves through `log` ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the instruments saw since the last training log: losses per source, MRI, rates."""
        if "loss" in logs:
            self.loss_guard.check(self._describe_batch)
            logs.update(self.source_losses.pop())
            logs.update(self.term_meter.pop())
            logs.update(self._pop_imbalance())
            logs["tokens_seen"] = self.state.global_step * self.throughput.tokens_per_step
            logs.update(self.throughput.pop())
        super().log(logs, start_time)

    def _pop_imbalance(self) -> dict[str, float]:
        summary = self.load_meter.pop() if self.load_meter else None
        if summary is None:
            return {}
        layers = range(len(summary.mri))
        return {
            "mri": sum(summary.mri) / len(summary.mri),
            "mri_normalized": sum(summary.normalized) / len(summary.normalized),
            **{f"mri/layer_{layer:02d}": summary.mri[layer] for layer in layers},
            **{f"mri_normalized/layer_{layer:02d}": summary.normalized[layer] for layer in layers},
        }

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
        return metrics

    def _packed(self, data: Any) -> Any:
        is_text = isinstance(data, Dataset | IterableDataset)
        return build_eval_dataset(self.args, self.processing_class, self._vocab_size, data) if is_text else data

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The parent's loop; the loss is the mean over tokens, the same for any batch size and number of ranks."""
        self._held_out = HeldOutLoss(self.num_examples(dataloader))
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = self._held_out.mean()
        return output

    def _changes_since_start(self, metrics: dict[str, float]) -> dict[str, float]:
        before = starting_losses(self.state.log_history, SOURCES)
        changes = {"forgetting": ("replay", forgetting), "adaptation": ("new", adaptation)}
        return {
            name: measure(before[source], metrics[f"eval_{source}_loss"])
            for name, (source, measure) in changes.items()
            if source in before and f"eval_{source}_loss" in metrics
        }

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Model FLOPs of a micro-batch, counting the parameters that are active for a token."""
        return int(self._flops_per_token * inputs["input_ids"].numel())

    # ---- starting, saving, resuming ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, or go on from a checkpoint: a folder, or True / "last" for the newest whole one in `output_dir`.

        Raises ValueError, before anything is computed, for a folder that is in use, a checkpoint that is not whole, or
        a disk that is too small.
        """
        output_dir = self.args.output_dir
        checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        if self.is_world_process_zero():
            if checkpoint is None:
                require_unused(output_dir)
            else:
                discard_half_written(output_dir)
            self._require_disk()
        self.args.eval_on_start = self.args.eval_on_start and checkpoint is None and self.eval_dataset is not None
        with repeatable_on_cpu(self.args.device):
            return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    def _require_disk(self) -> None:
        if str(getattr(self.args.save_strategy, "value", self.args.save_strategy)) == "no":
            return
        weight_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        trained = (
            0 if self.args.save_only_model else sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        )
        kept = self.args.save_total_limit
        copies = 1 if kept is None else kept + 1  # the oldest goes only when the newest is written
        require_free_space(self.args.output_dir, weight_bytes, trained, copies)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.loss_guard.check(self._describe_batch)
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
            "tokens_seen": self.state.global_step * self.throughput.tokens_per_step,
            "started_from": self.starting_checkpoint or None,
            "starting_phase": self.starting_phase,
        }


def _named_eval_sets(new: Dataset | dict[str, Dataset] | None, replay: Dataset | None) -> dict[str, Dataset]:
    named = dict(new) if isinstance(new, dict) else ({} if new is None else {"new": new})
    return named if replay is None else {**named, "replay": replay}
