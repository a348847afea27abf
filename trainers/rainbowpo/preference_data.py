"""What preference pairs must be before TRL tokenises them, which of them teach nothing, and their scores in a batch.

Source: ours, around TRL's `DPOTrainer`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from hf_moe_cpt.trainers.rainbowpo.objective import Pair, check_scores
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig


logger = logging.getLogger(__name__)

AnyDataset = Dataset | IterableDataset


def without_text_prompt(dataset: AnyDataset) -> AnyDataset:
    """Drop a `prompt` of text that stands beside lists of messages; the prompt is then taken from the messages.

    Published sets, among them the paper's, have both. TRL tells conversations by one of the columns, not always the
    same, and fails on the other.
    """
    first = next(iter(dataset))
    if isinstance(first.get("prompt"), str) and isinstance(first.get("chosen"), list):
        return dataset.remove_columns("prompt")
    return dataset


def check_score_columns(dataset: AnyDataset, args: RainbowPOConfig, name: str) -> None:
    """Raise ValueError if the columns of scores are missing or hold what gives no advantage (unseen in a stream)."""
    columns = (args.chosen_score_column, args.rejected_score_column)
    found = next(iter(dataset)).keys()
    missing = [column for column in columns if column not in found]
    if missing:
        raise ValueError(
            f"home_advantage_from='score' needs the column(s) {', '.join(missing)} in the {name} data set, which has "
            f"{', '.join(found)}: set chosen_score_column and rejected_score_column."
        )
    if isinstance(dataset, Dataset):
        check_scores(Pair(*(torch.tensor(dataset[column][:]) for column in columns)), args.score_transform)


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
    has_images = train_dataset is not None and {"image", "images"} & next(iter(train_dataset)).keys()
    if isinstance(processing_class, ProcessorMixin) or has_images or hasattr(_config_of(model), "vision_config"):
        raise ValueError("RainbowPOTrainer takes language models and text, not images: use trl.DPOTrainer.")
    if processing_class is not None and getattr(processing_class, "eos_token_id", None) is None:
        raise ValueError("The tokenizer has no end-of-text token, so completions could not end: set its eos_token.")
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


def _config_of(model: str | nn.Module) -> Any:
    return None if isinstance(model, str) else model.config


def drop_empty_pairs(dataset: AnyDataset, eos_token_id: int, name: str) -> AnyDataset:
    """Drop tokenised pairs whose completions are equal, or one of them empty but for its end; say how many.

    Raises ValueError if none is left.
    """

    def fault(row: dict[str, Any]) -> str | None:
        if row["chosen_ids"] == row["rejected_ids"]:
            return "identical"
        return "empty" if any(set(row[key]) <= {eos_token_id} for key in ("chosen_ids", "rejected_ids")) else None

    if isinstance(dataset, IterableDataset):
        return dataset.filter(lambda row: fault(row) is None)
    columns = dataset.select_columns(["chosen_ids", "rejected_ids"])
    faults = [fault(row) for row in columns]
    kept = [index for index, found in enumerate(faults) if found is None]
    if len(kept) == len(dataset):
        return dataset
    counts = f"{faults.count('identical')} with identical completions, {faults.count('empty')} with an empty one"
    if not kept:
        raise ValueError(f"No pair of the {name} data set can teach anything: {len(dataset)} pairs, {counts}.")
    logger.warning(
        "Dropped %d of %d pairs of the %s data set: %s.", len(dataset) - len(kept), len(dataset), name, counts
    )
    return dataset.select(kept)


@dataclass
class CollatorWithScores:
    """Another collator's batch plus `scores` (B, 2), those of the chosen and the rejected completion."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    columns: tuple[str, str]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        scores = torch.tensor([[row[column] for column in self.columns] for row in rows], dtype=torch.float32)
        return self.collate(rows) | {"scores": scores}
