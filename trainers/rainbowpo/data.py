"""Preference pairs as the model sees them: every row checked, every completion ended once, its speaker alone scored.

TRL's `DPOTrainer` tokenises; what it leaves to chance is settled here, row by row:

- a start of text stands once, also where the text has one already;
- a completion ends with one end of text: written by the template or not, twice or followed by a line break;
- of a completion with several turns only the assistant's are scored, not what a tool or the user says.

Columns of a prepared data set: `prompt_ids`, `chosen_ids`, `rejected_ids`, and of either completion a mask of the
scored tokens. Letters: B pairs, T tokens. Source: ours.
"""

from __future__ import annotations

import json
import logging
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length, extract_prompt

from hf_moe_cpt.reading import reading
from hf_moe_cpt.trainers.rainbowpo.losses import Pair, check_scores
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig


logger = logging.getLogger(__name__)

AnyDataset = Dataset | IterableDataset
SIDES = ("chosen", "rejected")
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
MASK_COLUMNS = ("chosen_mask", "rejected_mask")
READ_OF_A_PAIR = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen", "rejected", "ends_added")
LENGTHS = "sequence_lengths"  # of a padding-free batch, (2B,)
SCORED = "«{}»"  # how a text that is scored is shown


def mixed(tables: Sequence[Dataset], names: Sequence[str], weights: Sequence[float] | None, seed: int) -> Dataset:
    """One data set of the columns that all have, drawn by weight until one is used up, or all rows without weights.

    Raises ValueError for weights that are none, and for columns of different types. names: of the sets, for errors.
    """
    if weights is not None and (len(weights) != len(names) or not all(0 < weight < math.inf for weight in weights)):
        raise ValueError(f"--dataset_weights {weights} must be a number above 0 for each of {', '.join(names)}.")
    shared = [name for name in tables[0].column_names if all(name in table.column_names for table in tables)]
    tables = [table.select_columns(shared) for table in tables]
    for name, table in zip(names, tables, strict=True):
        if table.features != tables[0].features:
            raise ValueError(f"{name} and {names[0]} have columns of other types: bring {shared} into one form.")
    if weights is None:
        return concatenate_datasets(tables)
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(tables, shares, seed=seed, stopping_strategy="first_exhausted")


def first_row(dataset: AnyDataset, name: str) -> dict[str, Any]:
    """The first pair of a data set, by which its columns are known. Raises ValueError if there is none."""
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"The {name} data set has no rows: give at least one pair.")
    return row


def check_pairs(dataset: AnyDataset, args: RainbowPOConfig, name: str) -> None:
    """Raise ValueError for rows that are no preference pairs, and for scores that give no advantage.

    Of a stream only the first row is seen; the others are checked by `Pairs` as they pass.
    """
    first = first_row(dataset, name)
    for column in SIDES:
        if column not in first:
            raise ValueError(
                f"A preference pair needs a column {column!r}, and the {name} data set has {', '.join(first)}."
            )
    columns = [column for column in ("prompt", *SIDES, "tools", "chat_template_kwargs") if column in first]
    check = Pairs(name, _kind(first["chosen"]))
    rows = dataset.select_columns(columns) if isinstance(dataset, Dataset) else [first]
    for index, row in enumerate(rows):
        check.look_at(row, index)
    if args.home_advantage_from == "score":
        check_score_columns(dataset, args, name)


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "messages" if isinstance(value, list) else type(value).__name__


@dataclass
class Pairs:
    """Makes every row of a data set a pair of one kind: text, or lists of messages with a prompt of messages.

    A `prompt` of text beside messages, as published sets have it, is dropped where the messages hold the user's turn,
    and becomes that turn where they begin with the assistant.
    """

    name: str
    kind: str  # "text" or "messages", of both completions
    scores: tuple[str, ...] = ()

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        self.look_at(row, index)
        if self.kind == "text":
            return row
        row = row | {side: row[side] or [{"role": "assistant", "content": ""}] for side in SIDES}
        if isinstance(row.get("prompt"), str):
            asked = [{"role": "user", "content": row["prompt"]}]
            answers = {side: _before_assistant(row[side]) for side in SIDES}
            if any("user" in roles for roles in answers.values()):
                row |= extract_prompt({side: row[side] for side in SIDES})
            else:
                head = row["chosen"][: len(answers["chosen"])]
                row |= {"prompt": head + asked} | {side: row[side][len(answers[side]) :] for side in SIDES}
        return row

    def look_at(self, row: Mapping[str, Any], index: int) -> None:
        """Raise ValueError, with the row's number, for what is missing or of another kind than the first row's."""
        for column in ("prompt", *SIDES, *self.scores):
            if column in row and row[column] is None:
                raise ValueError(
                    f"Row {index} of the {self.name} data set has no {column} (null): fill it in, or drop the row."
                )
        kinds = {column: _kind(row[column]) for column in ("prompt", *SIDES) if column in row}
        is_pair = kinds["chosen"] == kinds["rejected"] == self.kind and self.kind in ("text", "messages")
        if not is_pair or kinds.get("prompt", "text") not in ("text", self.kind):
            raise ValueError(
                f"The columns of row {index} of the {self.name} data set do not go together "
                f"({', '.join(f'{column}: {kind}' for column, kind in kinds.items())}): make all of them text, or "
                "all of them lists of messages."
            )
        if self.kind == "messages":
            self._look_at_messages(row, index)

    def _look_at_messages(self, row: Mapping[str, Any], index: int) -> None:
        where = f"row {index} of the {self.name} data set"
        if not isinstance(options := row.get("chat_template_kwargs") or {}, Mapping):
            raise ValueError(f"chat_template_kwargs={options!r} in {where} is no mapping: mend or drop that column.")
        if isinstance(row.get("tools"), str):
            with reading(f"the tools in {where}", "write them as a JSON list, or drop that column"):
                json.loads(row["tools"])
        for column in ("prompt", *SIDES):
            messages = row.get(column)
            for message in messages if isinstance(messages, list) else ():
                has_role = isinstance(message, dict) and isinstance(message.get("role"), str)
                if not has_role or (message.get("content") is None and not message.get("tool_calls")):
                    raise ValueError(
                        f"Row {index} of the {self.name} data set has a message without role or content in {column}: "
                        f"{str(message)[:80]}; fill it in, or drop the row."
                    )


def _before_assistant(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Roles of the messages before the first one by the assistant."""
    roles = [message["role"] for message in messages]
    return roles[: roles.index("assistant")] if "assistant" in roles else roles


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


def normalised(dataset: AnyDataset, args: RainbowPOConfig, name: str) -> AnyDataset:
    """Pairs of one kind, without log-probabilities of a reference that nobody here computed."""
    first = first_row(dataset, name)
    brought = [column for column in REFERENCE_COLUMNS if column in first]
    if brought:
        logger.warning(
            "The %s data set brings %s, of a reference that is not known here: the column(s) are left out.",
            name,
            " and ".join(brought),
        )
        dataset = dataset.remove_columns(brought)
    scores = (args.chosen_score_column, args.rejected_score_column) if args.home_advantage_from == "score" else ()
    pairs = Pairs(name, _kind(first["chosen"]), scores)
    if isinstance(dataset, IterableDataset):
        return dataset.map(pairs, with_indices=True)
    has_text_prompt = isinstance(first.get("prompt"), str)
    if pairs.kind == "text" or not (has_text_prompt or any(not row for side in SIDES for row in dataset[side])):
        return dataset
    features = None if has_text_prompt else dataset.features  # a column may change its type
    return dataset.map(pairs, with_indices=True, num_proc=args.dataset_num_proc, features=features)


def ends_of(tokenizer: PreTrainedTokenizerBase, generation_ids: int | Sequence[int] | None) -> tuple[int, ...]:
    """Tokens that end a completion, the tokenizer's own first: also those special ones at which generation stops."""
    asked = [generation_ids] if isinstance(generation_ids, int) else list(generation_ids or ())
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    own = tokenizer.eos_token_id
    return (own, *(token for token in asked if token in special and token != own))


@dataclass
class Mended:
    """Gives a tokenised row one start of text, completions that end once, and masks of what is scored."""

    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        prompt = list(row["prompt_ids"])
        start = self.tokenizer.bos_token_id
        row, added = dict(row), 0
        for side in SIDES:
            ids = list(row[f"{side}_ids"])
            spoken = self._spoken(row, side, prompt + ids)[len(prompt) :]
            if spoken and spoken[-1]:
                kept = self._ended(ids, len(spoken) - spoken[::-1].index(False) if False in spoken else 0)
                added += len(kept) > len(ids)
                spoken = (spoken + [True])[: len(kept)]
                ids = kept
            row |= {f"{side}_ids": ids, f"{side}_mask": spoken}
        while start is not None and prompt[:2] == [start, start]:
            del prompt[0]
        return row | {"prompt_ids": prompt, "ends_added": added}

    def _ended(self, ids: list[int], begin: int) -> list[int]:
        """A completion whose last turn, which begins at a token, stops at its end of text; with one if it has none."""
        places = [place for place in range(begin, len(ids)) if ids[place] in self.ends]
        if not places:
            return [*ids, self.ends[0]]
        last = places[-1]
        for place in reversed(places):  # the first of those between which there is nothing
            if self.tokenizer.decode([token for token in ids[place:last] if token not in self.ends]).strip():
                break
            last = place
        return ids[: last + 1]

    def _spoken(self, row: Mapping[str, Any], side: str, whole: list[int]) -> list[bool]:
        """Which tokens of prompt and completion are scored: those of the assistant, up to the end of its turn."""
        spoken = [True] * len(whole)
        messages = row.get(side)
        if not isinstance(messages, list) or all(message["role"] == "assistant" for message in messages):
            return spoken
        place, begin = 0, len(row["prompt_ids"])
        for is_assistant, turn in groupby(messages, key=lambda message: message["role"] == "assistant"):
            place += len(list(turn))
            is_last = place == len(messages)
            end = len(whole) if is_last else self._rendered(row, messages[:place], whole, not is_assistant)
            if not is_assistant:
                spoken[begin:end] = [False] * (end - begin)
            elif not is_last:
                stop = max((at for at in range(begin, end) if whole[at] in self.ends), default=end)
                spoken[stop + 1 : end] = [False] * (end - stop - 1)
            begin = end
        return spoken

    def _rendered(self, row: Mapping[str, Any], turns: list[Any], whole: list[int], asks: bool) -> int:
        """Tokens of a conversation up to some turn, and with the header of the assistant's next one if it asks."""
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options = {"tools": tools, **(row.get("chat_template_kwargs") or {}), "add_generation_prompt": asks}
        given = self.tokenizer.apply_chat_template(row["prompt"] + turns, tokenize=True, return_dict=True, **options)
        length = common_prefix_length(given["input_ids"], whole)
        if length < len(given["input_ids"]):
            raise ValueError(
                "The chat template writes a conversation differently once it goes on, so the assistant's tokens in a "
                f"completion of {len(row['chosen'])} turns cannot be told: put all turns but the last into the prompt."
            )
        return length


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

    Said too: how many completions are cut, so that they have no end, and how many were given one. max_length: None if
    sequences are not cut at their end. given: pairs before tokenisation, which drops prompts that fill max_length.
    Of a stream the pairs are counted as they pass. Raises ValueError if none is left.
    """

    def fault(row: dict[str, Any]) -> str | None:
        room = None if max_length is None else max(0, max_length - len(row["prompt_ids"]))
        if row["chosen_ids"][:room] == row["rejected_ids"][:room]:
            return "identical"
        ends = ({tokenizer.eos_token_id}, tokenizer.eos_token)
        for side in SIDES:
            if set(row[f"{side}_ids"]) <= ends[0] or _is_silent(row.get(side), ends[1]):
                return "empty"
        return None

    if isinstance(dataset, IterableDataset):
        return dataset.filter(_CountingFilter(fault, name))
    columns = [column for column in dataset.column_names if column in READ_OF_A_PAIR]
    faults, cut, added = [], 0, 0
    for row in dataset.select_columns(columns):
        faults.append(fault(row))
        if faults[-1] is None:
            added += row.get("ends_added", 0)
            lengths = [len(row["prompt_ids"]) + len(row[f"{side}_ids"]) for side in SIDES if max_length is not None]
            cut += sum(length > max_length for length in lengths)
    kept = [index for index, found in enumerate(faults) if found is None]
    given = len(dataset) if given is None else given
    counts = f"{faults.count('identical')} with identical completions, {faults.count('empty')} with an empty one"
    if given > len(dataset):
        counts += f", {given - len(dataset)} whose prompt alone fills max_length"
    if not kept:
        raise ValueError(f"No pair of the {name} data set can teach anything: {given} pairs, {counts}.")
    if len(kept) < given:
        logger.warning("Dropped %d of %d pairs of the %s data set: %s.", given - len(kept), given, name, counts)
    if cut or added:
        told = f"{cut} are cut by max_length={max_length} and never end, {added} were given an end of text"
        logger.warning("Of the %d completions of the %s data set %s.", 2 * len(kept), name, told)
    dataset = dataset.remove_columns([column for column in ("ends_added",) if column in columns])
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


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
class PreferenceCollator:
    """Batches of prepared pairs: rows of chosen, then of rejected sequences, as TRL's collator makes them.

    padding_free: all sequences one after the other in one row, position_ids (1, T) that restart with each, and
    `sequence_lengths` (2B,) in front; no attention_mask. The first token of a sequence is never scored.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    padding_free: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        cut = slice(self.max_length) if self.truncation_mode == "keep_start" else slice(-(self.max_length or 0), None)
        ids, scored = [], []
        for side in SIDES:
            for row in rows:
                mask = row.get(f"{side}_mask") or [True] * len(row[f"{side}_ids"])
                ids.append(torch.tensor((row["prompt_ids"] + row[f"{side}_ids"])[cut]))
                scored.append(torch.tensor(([False] * len(row["prompt_ids"]) + mask)[cut]).long())
                scored[-1][:1] = 0  # nothing predicts it
        batch = self._in_one_row(ids, scored) if self.padding_free else self._padded(ids, scored)
        columns = [column for column in REFERENCE_COLUMNS if column in rows[0]]
        return batch | {column: torch.tensor([row[column] for row in rows]) for column in columns}

    def _in_one_row(self, ids: list[Tensor], scored: list[Tensor]) -> dict[str, Tensor]:
        positions = torch.cat([torch.arange(len(sequence)) for sequence in ids])
        tokens = {"input_ids": torch.cat(ids), "position_ids": positions, "completion_mask": torch.cat(scored)}
        lengths = torch.tensor([len(sequence) for sequence in ids])
        return {LENGTHS: lengths} | {name: value[None] for name, value in tokens.items()}

    def _padded(self, ids: list[Tensor], scored: list[Tensor]) -> dict[str, Tensor]:
        padded = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "completion_mask": pad_sequence(scored, batch_first=True),
        }
        missing = -padded["input_ids"].shape[1] % (self.pad_to_multiple_of or 1)
        fill = {"input_ids": self.pad_token_id}
        return {
            name: torch.nn.functional.pad(value, (0, missing), value=fill.get(name, 0))
            for name, value in padded.items()
        }


@dataclass
class CollatorWithScores:
    """Another collator's batch plus `scores` (B, 2), those of the chosen and the rejected completion."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    columns: tuple[str, str]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        scores = torch.tensor([[row[column] for column in self.columns] for row in rows], dtype=torch.float32)
        return self.collate(rows) | {"scores": scores}


def shown(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, collator: Any) -> str:
    """Prepared pairs as the model sees them after the cut, decoded, what is scored between « and »."""
    lines = ["The first pairs as the model sees them; what is scored stands between « and »:"]
    for number, row in enumerate(rows):
        batch = PreferenceCollator(collator.pad_token_id, collator.max_length, collator.truncation_mode)([dict(row)])
        for side, *columns in zip(SIDES, *(batch[name].tolist() for name in batch), strict=True):
            length = sum(columns[1])
            ids, scored = columns[0][:length], columns[2][:length]
            text = ""
            for is_scored, run in groupby(zip(ids, scored, strict=True), key=lambda token: token[1]):
                part = tokenizer.decode([token for token, _ in run])
                text += SCORED.format(part) if is_scored else part
            lines.append(f"pair {number}, {side}, {len(ids)} tokens, {sum(scored)} scored: {text!r}")
    return "\n".join(lines)
