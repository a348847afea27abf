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
import numbers
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_utils import TrainOutput
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head, get_config_model_id, use_adapter

from hf_moe_cpt.machine import has_process_group
from hf_moe_cpt.routing.hooks import own_penalty_off
from hf_moe_cpt.trainers.common.fault_tolerance import FaultTolerantMixin
from hf_moe_cpt.trainers.common.freezing import freeze, gradients_kept
from hf_moe_cpt.trainers.common.hub_mixin import HubMixin
from hf_moe_cpt.trainers.common.kernels import use_kernels
from hf_moe_cpt.trainers.common.metrics import MeanMeter
from hf_moe_cpt.trainers.common.router_balance import RouterBalance, RouterBalanceMixin
from hf_moe_cpt.trainers.common.updates import UpdatesMixin
from hf_moe_cpt.trainers.rainbowpo.losses import (
    Pair,
    PreferenceTerms,
    check_scores,
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

AnyDataset = Dataset | IterableDataset
PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen", "rejected")
NOT_FOR_THE_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps", "scores"}
OPTIONS_OF_CONFIG = ("revision", "trust_remote_code", "cache_dir", "token", "subfolder")  # of those of a model
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
WINDOW = 3  # logs that are averaged before they are compared
MAX_FALL = 1.0  # nats per token: every chosen token e times less likely than at the first log
MAX_GROWTH = 1.3  # length of what the policy prefers / length of what the data prefers, beyond that of the first log
_NO_REFERENCE = object()  # what the parent is given so that it neither loads nor copies a reference


def first_row(dataset: AnyDataset, name: str) -> dict[str, Any]:
    """The first pair of a data set, by which its columns are known. Raises ValueError if there is none."""
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"The {name} data set has no rows: give at least one pair.")
    return row


def without_text_prompt(dataset: AnyDataset) -> AnyDataset:
    """Drop a `prompt` of text that stands beside lists of messages; the prompt is then taken from the messages.

    Published sets, among them the paper's, have both. TRL tells conversations by one of the columns, not always the
    same, and fails on the other.
    """
    first = next(iter(dataset))
    if isinstance(first.get("prompt"), str) and isinstance(first.get("chosen"), list):
        return dataset.remove_columns("prompt")
    return dataset


def check_pairs(dataset: AnyDataset, args: RainbowPOConfig, name: str) -> None:
    """Raise ValueError for rows that are no preference pairs, and for scores that give no advantage."""
    first = first_row(dataset, name)
    for column in ("chosen", "rejected"):
        if column not in first:
            raise ValueError(
                f"A preference pair needs a column {column!r}, and the {name} data set has {', '.join(first)}."
            )
    kinds = {column: _kind(first[column]) for column in ("prompt", "chosen", "rejected") if column in first}
    is_pair = kinds["chosen"] == kinds["rejected"] and kinds["chosen"] in ("text", "messages")
    if not is_pair or kinds.get("prompt", "text") not in ("text", kinds["chosen"]):
        raise ValueError(
            f"The columns of the {name} data set do not go together "
            f"({', '.join(f'{column}: {kind}' for column, kind in kinds.items())}): make all of them text, or all of "
            "them lists of messages."
        )
    if args.home_advantage_from == "score":
        check_score_columns(dataset, args, name)


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "messages" if isinstance(value, list) else type(value).__name__


def check_score_columns(dataset: AnyDataset, args: RainbowPOConfig, name: str) -> None:
    """Raise ValueError if the columns of scores are missing or hold what gives no advantage (unseen in a stream)."""
    columns, first = (args.chosen_score_column, args.rejected_score_column), first_row(dataset, name)
    missing = [column for column in columns if column not in first]
    if missing:
        raise ValueError(
            f"home_advantage_from='score' needs the column(s) {', '.join(missing)} in the {name} data set, which has "
            f"{', '.join(first)}: set chosen_score_column and rejected_score_column."
        )
    for column in columns:
        values = dataset[column][:] if isinstance(dataset, Dataset) else [first[column]]
        wrong = [index for index, value in enumerate(values) if not isinstance(value, numbers.Real)]
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(values)} scores in the column {column} of the {name} data set are no numbers, "
                f"the first {values[wrong[0]]!r} in row {wrong[0]}: drop those pairs, or name another column."
            )
    if isinstance(dataset, Dataset):
        check_scores(Pair(*(torch.tensor(dataset[column][:]) for column in columns)), args.score_transform)


def _is_silent(completion: Any, eos_token: str | None) -> bool:
    """Whether text, or a list of messages, says nothing before its end."""
    if isinstance(completion, str):
        return not completion.removesuffix(eos_token or "").strip()
    return isinstance(completion, list) and not any(
        message.get("tool_calls") or str(message.get("content") or "").strip() for message in completion
    )


def drop_empty_pairs(
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    name: str,
    given: int | None = None,
) -> AnyDataset:
    """Drop tokenised pairs whose completions are equal, or one of them empty but for its end; say how many.

    max_length: completions that are equal as far as this many tokens of prompt and completion go are equal; None if
    sequences are not cut at their end. given: pairs before tokenisation, which drops prompts that fill max_length.
    Of a stream the pairs are counted as they pass. Raises ValueError if none is left.
    """

    def fault(row: dict[str, Any]) -> str | None:
        room = None if max_length is None else max(0, max_length - len(row["prompt_ids"]))
        if row["chosen_ids"][:room] == row["rejected_ids"][:room]:
            return "identical"
        ends = ({tokenizer.eos_token_id}, tokenizer.eos_token)
        for side in ("chosen", "rejected"):
            if set(row[f"{side}_ids"]) <= ends[0] or _is_silent(row.get(side), ends[1]):
                return "empty"
        return None

    if isinstance(dataset, IterableDataset):
        return dataset.filter(_CountingFilter(fault, name))
    columns = [column for column in dataset.column_names if column in PAIR_COLUMNS]
    faults = [fault(row) for row in dataset.select_columns(columns)]
    kept = [index for index, found in enumerate(faults) if found is None]
    given = len(dataset) if given is None else given
    if kept and len(kept) == given:
        return dataset
    counts = f"{faults.count('identical')} with identical completions, {faults.count('empty')} with an empty one"
    if given > len(dataset):
        counts += f", {given - len(dataset)} whose prompt alone fills max_length"
    if not kept:
        raise ValueError(f"No pair of the {name} data set can teach anything: {given} pairs, {counts}.")
    logger.warning("Dropped %d of %d pairs of the %s data set: %s.", given - len(kept), given, name, counts)
    return dataset.select(kept)


@dataclass
class _CountingFilter:
    """Lets pairs of a stream pass that have no fault, and says at the 1st, 10th, 100th ... how many had one."""

    fault: Callable[[dict[str, Any]], str | None]
    name: str
    dropped: int = 0

    def __call__(self, row: dict[str, Any]) -> bool:
        found = self.fault(row)
        if found is None:
            return True
        self.dropped += 1
        if str(self.dropped).strip("0") == "1":
            logger.warning(
                "Dropped %d pair(s) of the %s stream so far for identical or empty completions.",
                self.dropped,
                self.name,
            )
        return False


@dataclass
class CollatorWithScores:
    """Another collator's batch plus `scores` (B, 2), those of the chosen and the rejected completion."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    columns: tuple[str, str]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        scores = torch.tensor([[row[column] for column in self.columns] for row in rows], dtype=torch.float32)
        return self.collate(rows) | {"scores": scores}


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


def token_statistics(outputs: FusedCausalLMOutput, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Entropy, mean logits and top-1 accuracy over completion tokens, with TRL's names. mask: (2B, S - 1)."""
    length, mask = mask.shape[1], mask.bool()
    chosen, rejected = mask.chunk(2)
    of_chosen, of_rejected = outputs.mean_logits[:, -length:].masked_fill(~mask, 0.0).chunk(2)
    top1 = outputs.is_top1[:, -length:].chunk(2)[0] & chosen
    return {
        "entropy": (outputs.entropy[:, -length:].masked_fill(~mask, 0.0).sum(), mask.sum()),
        "logits/chosen": (of_chosen.sum(), chosen.sum()),
        "logits/rejected": (of_rejected.sum(), rejected.sum()),
        "mean_token_accuracy": (top1.sum(), chosen.sum()),
    }


def pair_statistics(
    terms: PreferenceTerms, logps: Pair, ref_logps: Pair | None, lengths: Pair, beta: float, is_per_token: bool
) -> dict[str, tuple[Tensor, int]]:
    """Means over pairs: rewards in the units of the objective, log-probabilities summed and per token, lengths.

    A reward is beta * (log-probability - reference's), of sums or per token as the objective has it; without a
    reference beta * log-probability. A pair whose rewards differ by no more than rounding is half a hit, as where the
    policy still is its reference: ROUNDINGS times eps of the largest value that the four log-probabilities can reach
    between them, their sum, as each is a sum over tokens and holds some roundings of its own size.
    """
    normed = per_token(logps, lengths)
    own = normed if is_per_token else logps
    reference = None if ref_logps is None else per_token(ref_logps, lengths) if is_per_token else ref_logps
    rewards = own if reference is None else Pair(*(ours - theirs for ours, theirs in zip(own, reference, strict=True)))
    rewards = Pair(*(beta * reward for reward in rewards))
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
        for name, given in (
            ("ref_model", ref_model is not None),
            ("precompute_ref_log_probs", args.precompute_ref_log_probs),
            ("sync_ref_model", args.sync_ref_model),
        ):
            if given:
                raise ValueError(
                    f"{name} is set, but mixing_alpha=0 and contextual_scaling='none' use no reference: leave it out."
                )
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


def _config_of(model: str | nn.Module, args: RainbowPOConfig) -> Any:
    """The model's configuration; of a name it is read alone, so that a model is not loaded to be refused."""
    if not isinstance(model, str):
        return model.config
    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    options = {name: value for name, value in options.items() if name in OPTIONS_OF_CONFIG}
    return AutoConfig.from_pretrained(model, **options)


def training_entropies(trainer: Any) -> Tensor:
    """H (N,) of training pairs under the reference of a `RainbowPOTrainer`; from its columns where precomputed.

    N `calibration_pairs`, spread evenly over the training set; of a stream the first ones.
    The authors' constant scale of phi, 0.29, is 1 / mean(-ln H) of their model and data; here it is measured.
    """
    args, data, count = trainer.args, trainer.train_dataset, trainer.args.calibration_pairs
    if isinstance(data, IterableDataset):
        if count is None:
            raise ValueError("calibration_pairs=None means all pairs, which a stream does not end: set a number.")
        data = Dataset.from_list(list(data.take(count)))
    elif count is not None and count < len(data):
        data = data.select(torch.linspace(0, len(data) - 1, count).round().long().tolist())
    if "ref_chosen_logps" in data.column_names:
        return torch.tensor(data["ref_chosen_logps"][:])[:, 1]
    batch_size = args.precompute_ref_batch_size or args.per_device_eval_batch_size
    loader = DataLoader(data, batch_size=batch_size, collate_fn=trainer.data_collator)
    model = trainer.ref_model or trainer.model
    entropies = []
    for batch in tqdm(trainer.accelerator.prepare(loader), desc="Calibrating phi", disable=args.disable_tqdm):
        chosen, _ = trainer.compute_ref_log_probs(model, batch)
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

    The latest training logs are compared with the first. Source: the regimes that blow up in the paper's own runs,
    docs/rainbowpo.md.
    """

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        self._logs: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._said: set[str] = set()

    def look(self, metrics: Mapping[str, float]) -> list[str]:
        """Warn about what runs away in a training log; returns the new warnings."""
        if "logps_norm/chosen" not in metrics:
            return []
        ratio = metrics["length/preferred"] / max(metrics["length/chosen"], 1.0)
        self._logs.append({"chosen": metrics["logps_norm/chosen"], "length": ratio})
        if len(self._logs) < WINDOW:
            return []
        now = {name: sum(log[name] for log in self._logs) / WINDOW for name in ("chosen", "length")}
        self._first = self._first or now
        found = {
            "chosen": self._first["chosen"] - now["chosen"] > MAX_FALL,
            "length": now["length"] > MAX_GROWTH * max(1.0, self._first["length"]),
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
                f"The chosen completions fell from {self._first['chosen']:.2f} to {value:.2f} nats per token: the "
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


def mask_and_labels(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Which predicted tokens belong to a completion (2B, S - 1), and labels with -100 elsewhere (2B, S)."""
    mask = inputs["completion_mask"]
    return mask[:, 1:], inputs["input_ids"].masked_fill(mask == 0, -100)


def completion_sums(values: Tensor, mask: Tensor) -> Pair:
    """Sums over completion tokens of values (2B, S - 1), which may have virtual tokens of prompt learning in front."""
    return Pair(*(values[:, -mask.shape[1] :] * mask).sum(dim=1).chunk(2))


def completion_lengths(mask: Tensor) -> Pair:
    """Tokens of each completion."""
    return Pair(*mask.sum(dim=1).chunk(2))


class RainbowPOTrainer(RouterBalanceMixin, UpdatesMixin, FaultTolerantMixin, HubMixin, DPOTrainer):
    """Preference optimisation of any causal LM, dense or MoE, with the seven components of RainbowPO as switches.

    Data, adapters, references (a model, the adapter switched off, or precomputed columns) and saving are the parent's.
    No reference is loaded where neither its log-probabilities nor its entropies are used. Logged under TRL's names,
    and besides: `phi/mean|min|max`, `ref_entropy` (H), `margin/effective`, `logps_norm/*`, `loss/*` (the parts of the
    loss, as they enter it), `length/*`. `rewards/*` are in the units of the objective.

    Overrides `_compute_loss` (the objective), `compute_ref_log_probs`, `_precompute_ref_logps` and the attribute
    `ref_model` (entropies of the reference beside its log-probabilities), `_prepare_dataset` and
    `_set_signature_columns_if_needed` (pairs and scores), `train`, `evaluate` and `_save` (the scale of phi), `log`
    (meters) and `create_model_card`.

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
        scale = args.dispersion_scale if args.needs_reference_entropy else None
        self.dispersion_scale = None if scale == "auto" else scale
        self.meters, self.runaway_watch = {"train": PreferenceMeter(), "eval": PreferenceMeter()}, RunawayWatch()
        self._tokens_seen: Tensor | int = 0
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
        freeze(self.model, args.freeze or ())
        self.balance_routers(RouterBalance(args, self.model))
        use_kernels(self.model, args, fuses_head=False)  # TRL's head has no logits either
        if args.home_advantage_from == "score":
            columns = (args.chosen_score_column, args.rejected_score_column)
            self.data_collator = CollatorWithScores(self.data_collator, columns)

    # ---- data ----

    def _prepare_dataset(
        self, dataset: AnyDataset, processing_class: Any, args: RainbowPOConfig, dataset_name: str
    ) -> AnyDataset:
        if self._is_vlm:
            raise ValueError("RainbowPOTrainer takes language models, and this one has a processor for images.")
        check_end_of_text(self._tokenizer)
        check_pairs(dataset, args, dataset_name)
        given = len(dataset) if isinstance(dataset, Dataset) else None
        dataset = super()._prepare_dataset(without_text_prompt(dataset), processing_class, args, dataset_name)
        max_length = args.max_length if args.truncation_mode == "keep_start" else None
        return drop_empty_pairs(dataset, self._tokenizer, max_length, dataset_name, given)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = [self.args.chosen_score_column, self.args.rejected_score_column]
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
        mask, labels = mask_and_labels(inputs)
        with torch.no_grad(), self._policy_as_reference(), self.accelerator.autocast():
            outputs = model(**self._model_inputs(inputs), labels=labels, **{head: True})
        logps = completion_sums(outputs.log_probs, mask)
        entropy = torch.zeros_like(logps.chosen)
        if self.args.needs_reference_entropy:
            vocabulary_size = self.model.config.get_text_config().vocab_size
            entropy = normalized_entropy(
                completion_sums(outputs.entropy, mask), completion_lengths(mask), vocabulary_size
            )
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
            columns = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        return Pair(*(column[:, 0] for column in columns)), columns[0][:, 1]

    # ---- the loss ----

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        mask, labels = mask_and_labels(inputs)
        with self.balance.observe(inputs) if self.model.training else contextlib.nullcontext():
            outputs = model(**self._model_inputs(inputs), labels=labels, fused_lm_head=True)
        logps, lengths = completion_sums(outputs.log_probs, mask), completion_lengths(mask)
        ref_logps, entropy = self._reference(inputs)
        phi = mallows_phi(entropy, self.dispersion_scale) if self.args.needs_reference_entropy else 1.0
        switches = {name: getattr(self.args, name) for name in SWITCHES}
        terms = preference_terms(logps, lengths, ref_logps, self._home_advantage(inputs, lengths), phi, **switches)
        loss = terms.loss.mean()

        statistics = token_statistics(outputs, mask)
        statistics |= pair_statistics(terms, logps, ref_logps, lengths, self.args.beta, self.args.length_normalization)
        if self.args.sft_weight:
            statistics["loss/sft"] = (self.args.sft_weight * terms.sft.sum(), len(terms.sft))
        if self.balance.is_penalised and self.model.training:
            preference, loss = loss, self.balance.added_to(loss, self.penalty_scale(is_summed=False))
            statistics["loss/aux"] = (loss - preference, 1)
        meter = self.meters["train" if self.model.training else "eval"]
        if self.args.needs_reference_entropy:
            statistics |= {"phi/mean": (phi.sum(), len(phi)), "ref_entropy": (entropy.sum(), len(entropy))}
            meter.add_range("phi", phi)
        meter.add(statistics)
        if self.model.training:
            self._tokens_seen = self._tokens_seen + inputs["attention_mask"].sum()
        return (loss, outputs) if return_outputs else loss

    def _model_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        kept = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
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
        checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        if self.dispersion_scale is None and checkpoint is not None:
            kept = checkpoint / SCALE_FILE
            self.dispersion_scale = json.loads(kept.read_text())["dispersion_scale"] if kept.exists() else None
        self._calibrate()
        return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the parent's; `dispersion_scale="auto"` is calibrated first if it has not been."""
        self._calibrate()
        return super().evaluate(*args, **kwargs)

    def _calibrate(self) -> None:
        if self.dispersion_scale is None and self.args.needs_reference_entropy:
            self.dispersion_scale = dispersion_scale_of(training_entropies(self))
            logger.info("dispersion_scale=%.4g gives phi the mean 1 on the training pairs.", self.dispersion_scale)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the meters saw since the last log, and warn of a policy that runs away."""
        mode = "train" if self.model.training else "eval"
        metrics = self.meters[mode].pop()
        if mode == "train" and metrics:
            metrics["num_tokens"] = self.accelerator.reduce(self._tokens_seen).item() // self._tp_size
            self.runaway_watch.look(metrics)
        if mode == "eval":
            prefix = next((name.removesuffix("loss") for name in logs if name.endswith("_loss")), "eval_")
            metrics = {f"{prefix}{name}": value for name, value in metrics.items()}
        logs.update(metrics)
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        kept = Path(output_dir or self.args.output_dir) / SCALE_FILE
        kept.write_text(json.dumps({"dispersion_scale": self.dispersion_scale}) + "\n")

    def run_details(self) -> dict[str, str]:
        """The row of the table of methods that the objective is, for training_run.json and the card."""
        return {"components": str(self.args.components())}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card with the components of the objective and the scale of phi, also before a model is saved."""
        super().create_model_card(*args, **kwargs)
        add_components(self.args, self.dispersion_scale)
