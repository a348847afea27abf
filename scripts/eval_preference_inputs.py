"""What is judged: prompts, ready-made responses as JSON lines, and preference pairs; bad rows are refused by number.

Source: ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_moe_cpt.scripts.rejection_sample_data import Columns, PromptRow, load_table, read_rows
from hf_moe_cpt.scripts.rejection_sample_models import Prompt


@dataclass(frozen=True)
class PairRow:
    """One preference pair: strings, or a conversation with answers as lists of messages."""

    index: int
    prompt: Prompt
    chosen: Any
    rejected: Any


def read_responses(path: str, option: str, max_rows: int | None) -> tuple[list[PromptRow], list[str]]:
    """Prompts and responses of a file with the columns `prompt` and `response`. Raises ValueError, naming the option.

    A response is a string, or a list with one message.
    """
    table = load_table(path)
    if "response" not in table.column_names:
        raise ValueError(f"{option} {path!r} has no column 'response' but {table.column_names}.")
    rows = read_rows(table, Columns(), max_rows)
    responses = [_one_text(value) for value in table["response"][: len(rows)]]
    for index, response in enumerate(responses):
        if response is None:
            raise ValueError(f"{option} {path!r}: the response of row {index} (counted from 0) is no string.")
    return rows, responses


def _one_text(value: Any) -> str | None:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    return value if isinstance(value, str) else None


def require_same_prompts(rows: Sequence[PromptRow], others: Sequence[PromptRow], option: str, source: str) -> None:
    """Raise ValueError unless both hold the same prompts in the same order. option, source: what names them."""
    if len(rows) != len(others):
        raise ValueError(f"{option} answers {len(others)} prompts and {source} has {len(rows)}: give one for each.")
    for row, other in zip(rows, others, strict=True):
        if row.prompt != other.prompt:
            raise ValueError(
                f"row {row.index} (counted from 0) of {option} answers another prompt than {source} has there: give "
                "both in the same order."
            )


def read_pairs(name: str, config_name: str | None, split: str, max_pairs: int | None) -> list[PairRow]:
    """Preference pairs with or without the column `prompt`. Raises ValueError for the first row that is no pair.

    Without it, and where it is a text beside messages, the prompt is what both answers begin with, as in TRL.
    """
    table = load_table(name, split, config_name)
    for column in ("chosen", "rejected"):
        if column not in table.column_names:
            raise ValueError(f"--dataset_name {name!r} has no column {column!r} but {table.column_names}.")
    count = len(table) if max_pairs is None else min(max_pairs, len(table))
    if count == 0:
        raise ValueError(f"--dataset_name {name!r} has no rows in split {split!r}.")
    kept = [column for column in ("prompt", "chosen", "rejected") if column in table.column_names]
    selected = table.select(range(count)).select_columns(kept).with_format(None)
    return [_pair(index, row, f"row {index} (counted from 0) of {name!r}") for index, row in enumerate(selected)]


def _pair(index: int, row: dict[str, Any], where: str) -> PairRow:
    chosen, rejected = (_answer(row[side]) for side in ("chosen", "rejected"))
    prompt = _answer(row.get("prompt"))
    if type(chosen) is not type(rejected) or chosen is None:
        raise ValueError(
            f"{where} is no preference pair: give chosen and rejected as strings, or as lists of messages with role "
            "and content."
        )
    if type(prompt) is not type(chosen):
        shared = _num_shared(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not (prompt and chosen and rejected):
        raise ValueError(f"{where} lacks a prompt or an answer: both answers must begin alike and end apart.")
    return PairRow(index, prompt, chosen, rejected)


def _num_shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many messages or characters both begin with, the last of either left out; no prompt ends with a space."""
    most = max(0, min(len(one), len(other)) - 1)
    shared = next((place for place in range(most) if one[place] != other[place]), most)
    return shared - 1 if shared and one[shared - 1] == " " else shared


def _answer(value: Any) -> Any:
    """A string or a list of messages as it is, without empty fields; None for anything else."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return None
    turns = [{name: part for name, part in turn.items() if part is not None} for turn in value]
    is_text = all(isinstance(turn.get(name), str) for turn in turns for name in ("role", "content"))
    return turns if turns and is_text else None


def prompts_of(pairs: Sequence[PairRow]) -> list[PromptRow]:
    """The different prompts of the pairs, in order."""
    distinct = {json.dumps(pair.prompt): pair.prompt for pair in pairs}
    return [PromptRow(index, prompt) for index, prompt in enumerate(distinct.values())]


def checksum_of(values: Sequence[Any]) -> str:
    """16 hexadecimal digits that change with any of the values, which JSON can hold."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode() + b"\n")
    return digest.hexdigest()[:16]
