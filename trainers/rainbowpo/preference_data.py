"""What preference pairs must be before TRL tokenises them, which of them teach nothing, and their scores in a batch.

Source: ours, around TRL's `DPOTrainer`.
"""

from __future__ import annotations

import logging
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from hf_moe_cpt.trainers.rainbowpo.objective import Pair, check_scores
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig


logger = logging.getLogger(__name__)

AnyDataset = Dataset | IterableDataset
PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen", "rejected")


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
