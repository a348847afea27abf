"""The trainer of RainbowPO: TRL's DPOTrainer with another loss, on the forward passes that TRL makes anyway.

B pairs, S tokens of the padded sequences, H the reference's entropy of a pair. Rows of a batch are the B chosen
sequences, then the rejected ones, as TRL's `DataCollatorForPreference` lays them out; a token is counted where it is
predicted, so masks have S - 1 columns. Names of the log are TRL's where it has them.
Source: Zhao et al. 2025 (RainbowPO, arXiv 2410.04203); TRL 1.16.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import types
from collections import deque
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.trainer_utils import PredictionOutput, TrainOutput
from transformers.utils import ModelOutput
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.callbacks import LogCompletionsCallback
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head, get_config_model_id, use_adapter

from hf_moe_cpt.machine import gradients_kept, has_process_group, inner_model, own_penalty_off
from hf_moe_cpt.reading import check_weights, read_config, read_generation_config, reading, require_finite
from hf_moe_cpt.trainers.common.checkpointing import read_beside, step_of
from hf_moe_cpt.trainers.common.distributed import repeatable_on_cpu
from hf_moe_cpt.trainers.common.fault_tolerance import FaultTolerantMixin
from hf_moe_cpt.trainers.common.hub_mixin import HubMixin
from hf_moe_cpt.trainers.common.isolation import isolation_for
from hf_moe_cpt.trainers.common.kernels import use_kernels
from hf_moe_cpt.trainers.common.metrics import MeanMeter
from hf_moe_cpt.trainers.common.router_balance import RouterBalance, RouterBalanceMixin
from hf_moe_cpt.trainers.common.router_monitor import PROBE_FILE, RoutingProbe
from hf_moe_cpt.trainers.common.updates import UpdatesMixin, freeze, quantise_experts
from hf_moe_cpt.trainers.rainbowpo.data import (
    LENGTHS,
    MASK_COLUMNS,
    REFERENCE_COLUMNS,
    AnyDataset,
    CollatorWithScores,
    Mended,
    PreferenceCollator,
    check_pairs,
    drop_empty_pairs,
    ends_of,
    first_row,
    normalised,
    shown,
)
from hf_moe_cpt.trainers.rainbowpo.losses import (
    Pair,
    PreferenceTerms,
    dispersion_scale_of,
    length_advantage,
    mallows_phi,
    normalized_entropy,
    per_token,
    preference_terms,
    score_advantage,
)
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig


logger = logging.getLogger(__name__)

NOT_FOR_THE_MODEL = {"completion_mask", "scores", LENGTHS, *REFERENCE_COLUMNS}
OPTIONS_OF_CONFIG = ("revision", "trust_remote_code", "cache_dir", "token", "subfolder")  # of those of a model
OPTIONS_OF_PLACE = ("quantization_config", "device_map", "max_memory", "distributed_config", "tp_plan", "device_mesh")
SWITCHES = (  # of the configuration, as `preference_terms` takes them
    "beta",
    "mixing_alpha",
    "mix_home_advantage",
    "length_normalization",
    "link",
    "label_smoothing",
    "sft_weight",
)
SCALE_FILE = "rainbowpo.json"
ROUNDINGS = 4  # in a log-probability of a text
LONGEST = 2048  # tokens of a sequence that are counted with where none is cut
WINDOW = 3  # logs that are averaged before they are compared
MAX_FALL = 1.0  # nats per token: every chosen token e times less likely than at the start
MAX_GROWTH = 1.3  # length of what the policy prefers / length of what the data prefers, beyond that of the start
WATCHED = ("logps_norm/chosen", "length/preferred", "length/chosen")
PROBED_PAIRS = 8  # whose entropies tell at construction whether phi can be calibrated
_NO_REFERENCE = object()  # what the parent is given so that it neither loads nor copies a reference


class PreferenceMeter(MeanMeter):
    """Means, and minima and maxima, by name between two logs."""

    def __init__(self) -> None:
        super().__init__()
        self._ranges: dict[str, Tensor] = {}  # (2,) least, -most

    def add_range(self, name: str, values: Tensor) -> None:
        """Widen the range of a name by values of any shape."""
        low, high = torch.aminmax(values.detach().double())
        sides = torch.stack([low, -high])
        self._ranges[name] = torch.minimum(self._ranges[name], sides) if name in self._ranges else sides

    def pop(self) -> dict[str, float]:
        """Means by name, `<name>/min` and `<name>/max` of ranges; a collective when a process group exists."""
        means = super().pop()
        if not self._ranges:
            return means
        sides = torch.stack(list(self._ranges.values()))
        if has_process_group():
            dist.all_reduce(sides, op=dist.ReduceOp.MIN)
        for name, (low, high) in zip(self._ranges, sides.tolist(), strict=True):
            means |= {f"{name}/min": low, f"{name}/max": -high}
        self._ranges = {}
        return means


@dataclass
class Completions:
    """Which tokens of a batch are scored, and whose they are: rows of their own, or sequences laid into one row.

    mask: (R, S - 1), a token counted where it is predicted. owner: (R, S - 1), which of the 2B sequences a token is
    of, the B chosen ones first; None: that of its row.
    """

    mask: Tensor
    labels: Tensor  # (R, S), -100 where nothing is scored
    owner: Tensor | None
    num_sequences: int

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor]) -> Completions:
        """Those of a batch of `PreferenceCollator`, or of TRL's collator."""
        scored, ids = inputs["completion_mask"], inputs["input_ids"]
        labels = ids.masked_fill(scored == 0, -100)
        if LENGTHS not in inputs:
            return cls(scored[:, 1:], labels, None, len(ids))
        owner = (inputs["position_ids"] == 0).cumsum(-1) - 1
        return cls(scored[:, 1:], labels, owner[:, 1:], len(inputs[LENGTHS]))

    def sums(self, values: Tensor) -> Pair:
        """Sums over scored tokens of values, which may have virtual tokens of prompt learning in front."""
        values = values[:, -self.mask.shape[1] :] * self.mask
        if self.owner is None:
            return Pair(*values.sum(dim=1).chunk(2))
        sums = values.new_zeros(self.num_sequences).index_add(0, self.owner.flatten(), values.flatten())
        return Pair(*sums.chunk(2))

    def lengths(self) -> Pair:
        """Scored tokens of each completion."""
        return self.sums(torch.ones_like(self.mask))

    def is_chosen(self) -> Tensor:
        """Which scored tokens are of a chosen completion, (R, S - 1) bool."""
        rows = torch.arange(len(self.mask), device=self.mask.device)[:, None] if self.owner is None else self.owner
        return self.mask.bool() & (rows < self.num_sequences // 2)


@dataclass
class PreferenceOutput(ModelOutput):
    """What a batch gave, (B, 2) each, chosen and rejected: rewards, summed log-probabilities, lengths in tokens."""

    loss: Tensor | None = None
    rewards: Tensor | None = None
    logps: Tensor | None = None
    lengths: Tensor | None = None


def token_statistics(outputs: FusedCausalLMOutput, completions: Completions) -> dict[str, tuple[Tensor, Tensor]]:
    """Entropy, mean logits and top-1 accuracy over completion tokens, with TRL's names."""
    length, mask, chosen = completions.mask.shape[1], completions.mask.bool(), completions.is_chosen()
    rejected, logits = mask & ~chosen, outputs.mean_logits[:, -length:]
    return {
        "entropy": (outputs.entropy[:, -length:].masked_fill(~mask, 0.0).sum(), mask.sum()),
        "logits/chosen": (logits.masked_fill(~chosen, 0.0).sum(), chosen.sum()),
        "logits/rejected": (logits.masked_fill(~rejected, 0.0).sum(), rejected.sum()),
        "mean_token_accuracy": ((outputs.is_top1[:, -length:] & chosen).sum(), chosen.sum()),
    }


def rewards_of(own: Pair, reference: Pair | None, beta: float) -> Pair:
    """beta * (log-probability - reference's), of sums or per token as the objective has it; or without a reference."""
    gains = own if reference is None else Pair(*(ours - theirs for ours, theirs in zip(own, reference, strict=True)))
    return Pair(*(beta * gain for gain in gains))


def pair_statistics(
    terms: PreferenceTerms, logps: Pair, ref_logps: Pair | None, lengths: Pair, beta: float, is_per_token: bool
) -> dict[str, tuple[Tensor, int]]:
    """Means over pairs: rewards in the units of the objective, log-probabilities summed and per token, lengths.

    A pair whose rewards differ by no more than rounding is half a hit, as where the
    policy still is its reference: ROUNDINGS times eps of the largest value that the four log-probabilities can reach
    between them, their sum, as each is a sum over tokens and holds some roundings of its own size.
    """
    normed = per_token(logps, lengths)
    own = normed if is_per_token else logps
    reference = None if ref_logps is None else per_token(ref_logps, lengths) if is_per_token else ref_logps
    rewards = rewards_of(own, reference, beta)
    prefers_chosen = own.chosen > own.rejected
    margins, taken = rewards.chosen - rewards.rejected, [*own, *(reference or ())]
    noise = ROUNDINGS * torch.finfo(margins.dtype).eps * beta * sum(value.abs() for value in taken)
    values = {
        "rewards/chosen": rewards.chosen,
        "rewards/rejected": rewards.rejected,
        "rewards/accuracies": ((margins > noise).double() + (margins >= -noise)) / 2,
        "rewards/margins": margins,
        "logps/chosen": logps.chosen,
        "logps/rejected": logps.rejected,
        "logps_norm/chosen": normed.chosen,
        "logps_norm/rejected": normed.rejected,
        "margin/effective": terms.margin,
        "loss/preference": terms.preference,
        "length/chosen": lengths.chosen,
        "length/rejected": lengths.rejected,
        "length/preferred": torch.where(prefers_chosen, lengths.chosen, lengths.rejected),
    }
    return {name: (value.sum(), value.numel()) for name, value in values.items()}


def check_end_of_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError for a tokenizer that has no token to end a completion with."""
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end-of-text token, so completions could not end: set its eos_token.")


def check_request(
    model: str | nn.Module,
    ref_model: nn.Module | None,
    args: RainbowPOConfig,
    train_dataset: AnyDataset | None,
    processing_class: Any,
    others: dict[str, Any],
) -> None:
    """Raise ValueError for what a `RainbowPOTrainer` cannot do, before anything is loaded or computed."""
    if not isinstance(args, RainbowPOConfig):
        raise ValueError(f"args must be a RainbowPOConfig, got {type(args).__name__}: its fields are the objective.")
    if others.get("compute_metrics") is not None:
        raise ValueError("compute_metrics needs logits, which are never formed here: read the logged metrics instead.")
    has_images = train_dataset is not None and {"image", "images"} & first_row(train_dataset, "train").keys()
    config = _config_of(model, args)
    if isinstance(processing_class, ProcessorMixin) or has_images or hasattr(config, "vision_config"):
        raise ValueError("RainbowPOTrainer takes language models and text, not images: use trl.DPOTrainer.")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"A {config.model_type} model has an encoder: RainbowPOTrainer takes causal language models.")
    if processing_class is not None:
        check_end_of_text(processing_class)
    if not args.needs_reference:
        return
    if ref_model is not None and args.needs_reference_entropy and not isinstance(ref_model, PreTrainedModel):
        raise ValueError(
            f"ref_model is a {type(ref_model).__name__}, and phi needs the entropies of a PreTrainedModel: merge its "
            "adapter."
        )
    has_own = ref_model is not None or args.precompute_ref_log_probs or others.get("peft_config") is not None
    is_whole = not isinstance(model, str) and not is_peft_model(model)
    if not has_own and is_whole and not model.config._name_or_path:
        raise ValueError(
            "The reference is a second copy of the model, loaded from where it came from, and this model was never "
            "saved: pass ref_model or peft_config, set precompute_ref_log_probs, or save the model and load it."
        )


def without_unused_reference(args: RainbowPOConfig, ref_model: nn.Module | None) -> RainbowPOConfig:
    """The settings without what only a reference is for, where none is used, as where a sweep of mixing_alpha ends."""
    asked = {"ref_model": ref_model is not None}
    asked |= {name: getattr(args, name) for name in ("precompute_ref_log_probs", "sync_ref_model")}
    unused = [name for name, is_asked in asked.items() if is_asked]
    if args.needs_reference or not unused:
        return args
    logger.warning(
        "%s has no effect: mixing_alpha=0 and contextual_scaling='none' use no reference, and none is kept.",
        " and ".join(unused),
    )
    args.precompute_ref_log_probs = args.sync_ref_model = False
    return args


def _config_of(model: str | nn.Module, args: RainbowPOConfig) -> Any:
    """The model's configuration; of a name it is read alone, so that a model is not loaded to be refused."""
    if not isinstance(model, str):
        return model.config
    return read_config(model, **_options_of_config(args))


def _options_of_model(args: RainbowPOConfig) -> dict[str, Any]:
    return {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}


def _options_of_config(args: RainbowPOConfig) -> dict[str, Any]:
    return {name: value for name, value in _options_of_model(args).items() if name in OPTIONS_OF_CONFIG}


def generation_ends(model: str | nn.Module, args: RainbowPOConfig) -> int | list[int] | None:
    """Tokens at which the model stops to generate, as it says itself; None where it says nothing."""
    if not isinstance(model, str):
        return getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = read_generation_config(model, **_options_of_config(args))
    return None if found is None else found.eos_token_id


def training_entropies(trainer: Any, count: int | None) -> Tensor:
    """H (N,) of training pairs under the reference of a `RainbowPOTrainer`; from its columns where precomputed.

    N `count`, spread evenly over the training set; of a stream the first ones.
    The authors' constant scale of phi, 0.29, is 1 / mean(-ln H) of their model and data; here it is measured.
    """
    args, data = trainer.args, trainer.train_dataset
    if isinstance(data, IterableDataset):
        if count is None:
            raise ValueError("calibration_pairs=None means all pairs, which a stream does not end: set a number.")
        data = Dataset.from_list(list(data.take(count)))
    elif count is not None and count < len(data):
        data = data.select(torch.linspace(0, len(data) - 1, count).round().long().tolist())
    if trainer.precompute_ref_logps:
        return torch.tensor(data["ref_chosen_logps"][:])[:, 1]
    batch_size = args.precompute_ref_batch_size or args.per_device_eval_batch_size
    loader = DataLoader(data, batch_size=batch_size, collate_fn=trainer.data_collator)
    entropies = []
    for batch in tqdm(trainer.accelerator.prepare(loader), desc="Calibrating phi", disable=args.disable_tqdm):
        chosen, _ = trainer.compute_ref_log_probs(trainer.reference, batch)
        entropies.append(trainer.accelerator.gather_for_metrics(chosen[:, 1].contiguous()).cpu())
    return torch.cat(entropies)


def add_components(args: RainbowPOConfig, scale: float | None) -> None:
    """Append the components of the objective and the scale of phi to the card of a run, unless they are in it."""
    card = Path(args.output_dir) / "README.md"
    if args.process_index or not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    if "## Components of the objective" not in text:
        told = "" if scale is None else f"\n\nScale of phi: {scale:.4g}."
        section = f"\n## Components of the objective\n\n```\n{args.components()}\n```{told}\n"
        card.write_text(text + section, encoding="utf-8")


class RunawayWatch:
    """Warns once when chosen text becomes unlikely, and once when longer text is preferred than the data prefers.

    The latest training logs are compared with `start`, the first step, when nothing was updated yet. Source: the
    regimes that blow up in the paper's own runs, docs/rainbowpo.md.
    """

    def __init__(self) -> None:
        self.start: dict[str, float] = {}
        self._logs: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._said: set[str] = set()

    @staticmethod
    def read(metrics: Mapping[str, float]) -> dict[str, float]:
        """What is compared: nats per chosen token; length of what the policy prefers over that of the chosen."""
        ratio = metrics["length/preferred"] / max(metrics["length/chosen"], 1.0)
        return {"chosen": metrics["logps_norm/chosen"], "length": ratio}

    def look(self, metrics: Mapping[str, float]) -> list[str]:
        """Warn about what runs away in a training log; returns the new warnings."""
        if not set(WATCHED) <= metrics.keys():
            return []
        self._logs.append(self.read(metrics))
        now = {name: sum(log[name] for log in self._logs) / len(self._logs) for name in ("chosen", "length")}
        self.start = self.start or now  # of a run that was resumed from elsewhere
        found = {
            "chosen": self.start["chosen"] - now["chosen"] > MAX_FALL,
            "length": len(self._logs) == WINDOW and now["length"] > MAX_GROWTH * max(1.0, self.start["length"]),
        }
        new = [name for name, is_found in found.items() if is_found and name not in self._said]
        self._said.update(new)
        warnings = [self._message(name, now[name]) for name in new]
        for warning in warnings:
            logger.warning(warning)
        return warnings

    def _message(self, name: str, value: float) -> str:
        if name == "chosen":
            return (
                f"The chosen completions fell from {self.start['chosen']:.2f} to {value:.2f} nats per token: the "
                "policy forgets how to write what it should prefer. Lower the learning rate, raise beta, or set "
                "sft_weight (0.05 to 0.1)."
            )
        return (
            f"The policy prefers completions {value:.2f} times as long as the chosen ones: it may stop ending its "
            "text. With length_normalization raise beta (10 or more) and lower home_advantage; without it, turn it on."
        )


def add_entropy_head(model: PreTrainedModel) -> None:
    """Afterwards `model(..., labels=labels, with_entropy=True)` returns `log_probs` and `entropy`, both (B, S - 1).

    TRL gives the policy a fused head with entropies and the reference one without; this is a second one beneath TRL's,
    so that contextual scaling rides on the forward pass that is there anyway. Must come before TRL adds its own head
    and before the model is wrapped; a second call does nothing.
    """
    if getattr(model, "has_entropy_head", False):
        return
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    fused = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, with_entropy: bool = False, **kwargs: Any) -> FusedCausalLMOutput:
        return fused(*args, fused_lm_head=with_entropy, **kwargs)

    model.forward = types.MethodType(forward, model)
    model.has_entropy_head = True


@contextlib.contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Every module of a model in evaluation mode; afterwards each is in the mode that it was in.

    `eval()` and `train()` assign through `nn.Module.__setattr__`, twice for each of an adapter's thousands of modules:
    13 ms a step on the host of an H200. This costs the walk alone.
    """
    training = [vars(module) for module in model.modules() if module.training]
    try:
        for attributes in training:
            attributes["training"] = False
        yield
    finally:
        for attributes in training:
            attributes["training"] = True


class RainbowPOTrainer(RouterBalanceMixin, UpdatesMixin, FaultTolerantMixin, HubMixin, DPOTrainer):
    """Preference optimisation of any causal LM, dense or MoE, with the seven components of RainbowPO as switches.

    Data, adapters, references (a model, the adapter switched off, or precomputed columns) and saving are the parent's.
    No reference is loaded where neither its log-probabilities nor its entropies are used. Logged under TRL's names,
    and besides: `phi/mean|min|max`, `ref_entropy` (H), `margin/effective`, `logps_norm/*`, `loss/*` (the parts of the
    loss, as they enter it), `length/*`. `rewards/*` are in the units of the objective.

    An update is the mean over the pairs of its optimizer batch, however they are dealt to micro-batches and ranks.
    `predict` gives the rewards of both completions, (N, 2), as its predictions.

    Overrides `compute_loss`, `prediction_step` and `_get_num_items_in_batch` (the objective, per pair),
    `compute_ref_log_probs`, `_precompute_ref_logps` and the attribute `ref_model` (entropies of the reference beside
    its log-probabilities), `_prepare_dataset`, `get_eval_dataloader`, `get_test_dataloader` and
    `_set_signature_columns_if_needed` (pairs and scores), `train`, `evaluate`, `predict` and `_save` (the scale of
    phi), `log` (meters) and `create_model_card`.

    Args:
        model: a causal LM of transformers, a PEFT model around one, or the name or folder of one.
        ref_model: the reference; by default the model as it starts.
        args: a `RainbowPOConfig`.
        train_dataset, eval_dataset: preference pairs as for `trl.DPOTrainer`; with `home_advantage_from="score"` also
            the two columns of scores.
        processing_class: the tokenizer, which must have an end-of-text token; by default the model's.
        kwargs: the parent's other arguments, such as `peft_config` and `callbacks`.
    """

    run_method = "rainbowpo"
    loss_is_scaled_for_ga = True
    _tag_names = ["trl", "hf_moe_cpt", "rainbowpo"]
    _name = "RainbowPO"
    _paper = {
        "title": "RainbowPO: A Unified Framework for Combining Improvements in Preference Optimization",
        "id": "2410.04203",
        "citation": "@inproceedings{zhao2025rainbowpo,\n"
        "    title     = {{RainbowPO: A Unified Framework for Combining Improvements in Preference Optimization}},\n"
        "    author    = {Zhao, Hanyang and others},\n"
        "    booktitle = {International Conference on Learning Representations},\n    year      = 2025,\n}",
    }

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: PreTrainedModel | None = None,
        args: RainbowPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = RainbowPOConfig(f"{name.split('/')[-1]}-RainbowPO")
        check_request(model, ref_model, args, train_dataset, processing_class, kwargs)
        if isinstance(model, str):
            options = _options_of_model(args).items()
            options = {name: value for name, value in options if name not in OPTIONS_OF_PLACE}
            check_weights(AutoModelForCausalLM, model, **options)
        args = without_unused_reference(copy(args), ref_model)
        is_padding_free, args.padding_free = args.padding_free, False  # the parent's is out of order
        scale = args.dispersion_scale if args.needs_reference_entropy else None
        self.dispersion_scale = None if scale == "auto" else scale
        self.meters = {name: PreferenceMeter() for name in ("train", "eval", "start")}
        self.runaway_watch, self.isolation = RunawayWatch(), None
        self.router_probe = self.router_saturation = None
        self._generation_ends = generation_ends(model, args)
        super().__init__(
            model,
            ref_model if args.needs_reference else _NO_REFERENCE,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            **kwargs,
        )
        require_finite(self.model)
        quantise_experts(self.model)
        freeze(self.model, args.freeze or ())
        self._take_collator()
        if is_padding_free:
            self._lay_into_one_row()
        self.balance_routers(RouterBalance(args, self.model))
        use_kernels(self.model, args, fuses_head=False)  # TRL's head has no logits either
        if args.home_advantage_from == "score":
            columns = (args.chosen_score_column, args.rejected_score_column)
            self.data_collator = CollatorWithScores(self.data_collator, columns)
        is_dealt = self.is_fsdp_enabled or self.is_deepspeed_enabled  # its weights come together in `train`
        if self.dispersion_scale is None and args.needs_reference_entropy and not is_dealt:
            dispersion_scale_of(training_entropies(self, PROBED_PAIRS))  # refuses what cannot be calibrated

    # ---- data ----

    def _take_collator(self) -> None:
        theirs = self.data_collator
        if type(theirs) is DataCollatorForPreference:
            names = ("pad_token_id", "max_length", "truncation_mode", "pad_to_multiple_of")
            self.data_collator = PreferenceCollator(*(getattr(theirs, name) for name in names))

    @property
    def reference(self) -> nn.Module:
        """The model that gives the reference's log-probabilities: the policy's own where none was given."""
        return self.model if self.ref_model is None else self.ref_model  # a compiled one has no truth value

    def _lay_into_one_row(self) -> None:
        """From now on a micro-batch is one row without padding, where sequences of the model can be kept apart."""
        policy, reference = (self.accelerator.unwrap_model(model) for model in (self.model, self.reference))
        is_prompted = is_peft_model(policy) and policy.active_peft_config.is_prompt_learning
        reasons = {
            "a data_collator is given": not isinstance(self.data_collator, PreferenceCollator),
            "the adapter puts virtual tokens in front of a row": is_prompted,
            f"ref_model is a {type(reference).__name__} and the policy another": self.ref_model is not None
            and type(reference) is not type(inner_model(policy)),
        }
        for reason, is_so in reasons.items():
            if is_so:
                raise ValueError(f"padding_free=True is not possible, as {reason}: leave it out.")
        isolation = isolation_for(self.model, self.args, self.args.max_length or LONGEST)
        if isolation.method == "padded":
            return  # said by a warning
        self.args.padding_free = self.data_collator.padding_free = True
        self.isolation = isolation
        attention = isolation.model.config.get_text_config()._attn_implementation
        if self.ref_model is not None and reference.config.get_text_config()._attn_implementation != attention:
            reference.set_attn_implementation(attention)

    def _prepare_dataset(
        self, dataset: AnyDataset, processing_class: Any, args: RainbowPOConfig, dataset_name: str
    ) -> AnyDataset:
        if self._is_vlm:
            raise ValueError("RainbowPOTrainer takes language models, and this one has a processor for images.")
        check_end_of_text(self._tokenizer)
        check_pairs(dataset, args, dataset_name)
        given = len(dataset) if isinstance(dataset, Dataset) else None
        dataset = normalised(dataset, args, dataset_name)
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        ends = ends_of(self._tokenizer, self._generation_ends)
        how = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        dataset = dataset.map(Mended(self._tokenizer, ends), **how)
        max_length = args.max_length if args.truncation_mode == "keep_start" else None
        return drop_empty_pairs(dataset, self._tokenizer, max_length, dataset_name, given)

    def first_pairs(self, count: int = 2) -> str:
        """The first training pairs as the model sees them: decoded, cut, with what is scored marked."""
        collator = getattr(self.data_collator, "collate", self.data_collator)
        return shown(list(islice(self.train_dataset, count)), self._tokenizer, collator)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The parent's; pairs that are not prepared yet are."""
        return super().get_eval_dataloader(self._ready(eval_dataset, "eval"))

    def get_test_dataloader(self, test_dataset: AnyDataset) -> DataLoader:
        """The parent's; pairs that are not prepared yet are."""
        return super().get_test_dataloader(self._ready(test_dataset, "test"))

    def _ready(self, dataset: Any, name: str) -> Any:
        if dataset is None or isinstance(dataset, str) or MASK_COLUMNS[0] in first_row(dataset, name):
            return dataset
        is_gone = self.precompute_ref_logps and self.ref_model is None and not is_peft_model(self.model)
        if is_gone and self.state.global_step > 0:
            raise ValueError(
                f"The {name} data set came after training, and with precompute_ref_log_probs=True the reference is "
                "gone: pass ref_model, or set precompute_ref_log_probs=False."
            )
        dataset = self._prepare_dataset(dataset, self.processing_class, self.args, name)
        batch_size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
        return self._precompute_ref_logps(dataset, name, batch_size) if self.precompute_ref_logps else dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = [self.args.chosen_score_column, self.args.rejected_score_column, *MASK_COLUMNS]
        self._signature_columns += [column for column in columns if column not in self._signature_columns]

    # ---- the reference ----

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference model; None where there is none, or where it is the policy without its adapter."""
        return self._ref_model

    @ref_model.setter
    def ref_model(self, model: Any) -> None:
        # The parent assigns the bare model before it adds its own head, and again once it is wrapped.
        if isinstance(model, PreTrainedModel) and self.args.needs_reference_entropy:
            add_entropy_head(model)
        self._ref_model = None if model is _NO_REFERENCE else model

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of chosen and rejected, (B, 2) each: the reference's summed log-probability, and H of the pair.

        The parent caches both in the columns of its own log-probabilities; H is 0 where it is not used.
        """
        head = "fused_lm_head" if self.ref_model is None or not self.args.needs_reference_entropy else "with_entropy"
        completions = Completions.of(inputs)
        with torch.no_grad(), self._policy_as_reference(), self.accelerator.autocast():
            outputs = model(**self._model_inputs(inputs, completions, self.ref_model), **{head: True})
        logps = completions.sums(outputs.log_probs)
        entropy = torch.zeros_like(logps.chosen)
        if self.args.needs_reference_entropy:
            vocabulary_size = self.model.config.get_text_config().vocab_size
            entropy = normalized_entropy(completions.sums(outputs.entropy), completions.lengths(), vocabulary_size)
        return torch.stack([logps.chosen, entropy], dim=1), torch.stack([logps.rejected, entropy], dim=1)

    @contextlib.contextmanager
    def _policy_as_reference(self) -> Iterator[None]:
        """Without a reference model the policy answers: as in evaluation, and without its adapter if it has one."""
        if self.ref_model is not None:
            yield
            return
        policy = self.accelerator.unwrap_model(self.model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs))
            if is_peft_model(policy):
                stack.enter_context(gradients_kept(policy))
                stack.enter_context(use_adapter(policy, "ref" if "ref" in policy.peft_config else None))
            stack.enter_context(in_evaluation(self.model))  # a Sinkhorn router balances the batch in training
            yield

    def _precompute_ref_logps(self, dataset: AnyDataset, name: str, batch_size: int) -> AnyDataset:
        self._take_collator()  # the parent calls this before it is done
        if not self._precompute_model_hash.startswith(self._name):  # the parent's cache holds other columns
            cut = (self.args.max_length, self.args.truncation_mode, self.args.needs_reference_entropy)
            self._precompute_model_hash = self._name + Hasher.hash((self._precompute_model_hash, cut))
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _reference(self, inputs: dict[str, Tensor]) -> tuple[Pair | None, Tensor | None]:
        """The reference's log-probabilities and H (B,) of a batch; None for what there is not."""
        if not self.args.needs_reference:
            return None, None
        if self.precompute_ref_logps:
            columns = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            columns = self.compute_ref_log_probs(self.reference, inputs)
        return Pair(*(column[:, 0] for column in columns)), columns[0][:, 1]

    # ---- the loss ----

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Pairs of the optimizer batch on all ranks; ranks that share their batch count it once."""
        if not batch_samples:
            return None
        pairs = torch.tensor(float(sum(len(batch.get(LENGTHS, batch["input_ids"])) // 2 for batch in batch_samples)))
        pairs = self.accelerator.gather(pairs.to(device)).sum()
        return pairs / (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Mean loss of the pairs, or their part of the mean over `num_items_in_batch` pairs, times ranks.

        With return_outputs also a `PreferenceOutput`; there are no logits.
        """
        completions = Completions.of(inputs)
        with self.balance.observe(inputs) if self.model.training else contextlib.nullcontext():
            outputs = model(**self._model_inputs(inputs, completions), fused_lm_head=True)
        logps, lengths = completions.sums(outputs.log_probs), completions.lengths()
        ref_logps, entropy = self._reference(inputs)
        phi = mallows_phi(entropy, self.dispersion_scale) if self.args.needs_reference_entropy else 1.0
        switches = {name: getattr(self.args, name) for name in SWITCHES}
        terms = preference_terms(logps, lengths, ref_logps, self._home_advantage(inputs, lengths), phi, **switches)
        ranks = self.accelerator.num_processes // self.get_tp_size()
        share = 1.0 if num_items_in_batch is None else len(terms.loss) * ranks / num_items_in_batch  # of the step
        loss = share * terms.loss.mean()

        statistics = token_statistics(outputs, completions)
        of_pairs = pair_statistics(terms, logps, ref_logps, lengths, self.args.beta, self.args.length_normalization)
        if self.args.sft_weight:
            of_pairs["loss/sft"] = (self.args.sft_weight * terms.sft.sum(), len(terms.sft))
        if self.args.needs_reference_entropy:
            of_pairs |= {"phi/mean": (phi.sum(), len(phi)), "ref_entropy": (entropy.sum(), len(entropy))}
        self._count(statistics | of_pairs, phi)
        if self.balance.is_penalised and self.model.training:
            preference, loss = loss, self.balance.added_to(loss, self.penalty_scale(is_summed=True))
            self.meters["train"].add({"loss/aux": (loss - preference, share)})
        if not return_outputs:
            return loss
        is_per_token = self.args.length_normalization
        own, reference = (
            per_token(sums, lengths) if is_per_token and sums is not None else sums for sums in (logps, ref_logps)
        )
        pairs = {"rewards": rewards_of(own, reference, self.args.beta), "logps": logps, "lengths": lengths}
        return loss, PreferenceOutput(loss, **{name: torch.stack(pair, dim=1) for name, pair in pairs.items()})

    def _count(self, statistics: dict[str, Any], phi: Tensor | float) -> None:
        """Add a micro-batch to what is logged."""
        mode = "train" if self.model.training else "eval"
        self.meters[mode].add(statistics)
        if isinstance(phi, Tensor):
            self.meters[mode].add_range("phi", phi)
        if mode == "train" and self.state.global_step == 0:
            self.meters["start"].add({name: statistics[name] for name in WATCHED})

    def _model_inputs(
        self, inputs: dict[str, Tensor], completions: Completions, reference: nn.Module | None = None
    ) -> dict[str, Any]:
        kept = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
        kept["labels"] = completions.labels
        if self.isolation is not None and LENGTHS in inputs:
            base = self.isolation.model if reference is None else self.accelerator.unwrap_model(reference)
            kept = replace(self.isolation, model=base)(kept)
        return kept | {"use_cache": False} | own_penalty_off(self.model)

    def _home_advantage(self, inputs: dict[str, Tensor], lengths: Pair) -> Tensor | float:
        if self.args.home_advantage_from == "length":
            return length_advantage(lengths, self.args.home_advantage)
        if self.args.home_advantage_from == "score":
            pair = Pair(*inputs["scores"].unbind(1))
            return score_advantage(pair, self.args.home_advantage, self.args.score_transform)
        return self.args.home_advantage

    # ---- calibration, running, reporting ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, or go on from a checkpoint: a folder, or True / "last" for the newest whole one in `output_dir`."""
        checkpoint = self.open_run(resume_from_checkpoint)
        kept = read_beside(checkpoint, SCALE_FILE, start=dict[str, float], dispersion_scale=float | None)
        with reading(f"{checkpoint}/{SCALE_FILE}: start"):
            start = kept.get("start")
            self.runaway_watch.start = {name: start[name] for name in ("chosen", "length")} if start else {}
        if self.dispersion_scale is None:
            self.dispersion_scale = kept.get("dispersion_scale")
        self._probe_routers(checkpoint)
        with repeatable_on_cpu(self.args.device):
            self._calibrate()
            return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    def _probe_routers(self, checkpoint: Path | None) -> None:
        """Remember which experts the start chooses for the tokens of some training pairs."""
        if not self.args.router_probe_pairs:
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "router_probe_pairs needs whole weights on every rank: leave it out where they are dealt."
            )
        collate = getattr(self.data_collator, "collate", self.data_collator)
        if isinstance(collate, PreferenceCollator):
            collate = replace(collate, padding_free=False)
        batch = collate(list(islice(self.train_dataset, self.args.router_probe_pairs)))
        self.router_probe = RoutingProbe([{name: batch[name] for name in ("input_ids", "attention_mask")}])
        step = 0 if checkpoint is None else step_of(checkpoint)
        self.router_probe.start(
            self.model, Path(self.args.output_dir) / PROBE_FILE, step, self.args.process_index == 0
        )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor | None, None]:
        """Loss of a batch and, unless it is the loss only, the rewards of its completions (B, 2); no labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss, None if prediction_loss_only else outputs.rewards, None

    def predict(
        self, test_dataset: AnyDataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Rewards (N, 2) of the chosen and rejected completions of pairs, as `predictions`, and all metrics."""
        self._calibrate()
        predicted = super().predict(test_dataset, ignore_keys, metric_key_prefix)
        means = self.meters["eval"].pop()
        return predicted._replace(
            metrics=predicted.metrics | {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the parent's; `dispersion_scale="auto"` is calibrated first if it has not been."""
        self._calibrate()
        return super().evaluate(*args, **kwargs)

    def _calibrate(self) -> None:
        if self.dispersion_scale is None and self.args.needs_reference_entropy:
            self.dispersion_scale = dispersion_scale_of(training_entropies(self, self.args.calibration_pairs))
            logger.info("dispersion_scale=%.4g gives phi the mean 1 on the training pairs.", self.dispersion_scale)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the meters saw since the last log, and warn of a policy that runs away."""
        mode = "train" if self.model.training else "eval"
        metrics = self.meters[mode].pop()
        if mode == "train" and metrics:
            metrics["num_tokens"] = self.token_count.total(self.args.device) // self._tp_size
            start = self.meters["start"].pop()
            if start:
                self.runaway_watch.start = self.runaway_watch.read(start)
            self.runaway_watch.look(metrics)
            if self.router_probe is not None:
                metrics["router_saturation"] = self.router_saturation = fmean(self.router_probe.saturation(self.model))
        if mode == "eval":
            prefix = next((name.removesuffix("loss") for name in logs if name.endswith("_loss")), "eval_")
            metrics = {f"{prefix}{name}": value for name, value in metrics.items()}
        logs.update(metrics)
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            kept = {"dispersion_scale": self.dispersion_scale, "start": self.runaway_watch.start}
            (Path(output_dir or self.args.output_dir) / SCALE_FILE).write_text(json.dumps(kept) + "\n")

    def run_details(self) -> dict[str, str]:
        """The row of the table of methods that the objective is, for training_run.json and the card."""
        told = {"components": str(self.args.components())}
        if self.router_saturation is not None:
            told["router_saturation"] = f"{self.router_saturation:.3f} of a token's experts are those of the start"
        return told

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card with the components of the objective and the scale of phi, also before a model is saved."""
        super().create_model_card(*args, **kwargs)
        add_components(self.args, self.dispersion_scale)


def completions_logged(trainer: RainbowPOTrainer, count: int) -> LogCompletionsCallback:
    """TRL's table of answers, 128 new tokens each. Raises ValueError without held-out pairs, or for several sets."""
    if not isinstance(trainer.eval_dataset, Dataset):
        raise ValueError("--log_completions answers held-out prompts: name one set by --dataset_test_split.")
    every = int(trainer.args.eval_steps or max(1, trainer.args.logging_steps))
    generation = GenerationConfig(max_new_tokens=128, do_sample=True)
    return LogCompletionsCallback(trainer, generation, min(count, len(trainer.eval_dataset)), freq=every)
