"""Read prompts, and responses and scores where a data set has them, and refuse what cannot become preference data.

Source: ours. Checked here, before any model is loaded: columns, types, conversations that ask for an answer, lengths.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from hf_moe_cpt.scripts.rejection_sample_models import Prompt


KIND_OF_EXTENSION = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
SPLITS = {"train", "validation", "valid", "val", "dev", "test", "eval"}
ANSWERED_ROLES = ("user", "tool", "system")  # a conversation that ends with one of them asks for an answer


@dataclass(frozen=True)
class PromptRow:
    """One prompt; index is its row in the data set. responses (N,) and scores (N,) where the data set has them."""

    index: int
    prompt: Prompt
    responses: list[str] | None = None
    scores: list[float] | None = None


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read; as_chat: a string prompt becomes the turn of a user."""

    prompt: str = "prompt"
    responses: str | None = None
    scores: str | None = None
    as_chat: bool = False

    def names(self) -> list[str]:
        """Those that are asked for."""
        return [name for name in (self.prompt, self.responses, self.scores) if name is not None]


def load_table(name: str, split: str = "train", config_name: str | None = None) -> datasets.Dataset:
    """The rows of a .jsonl, .json, .parquet or .arrow file, a folder of them or from save_to_disk, or a Hub id.

    Of a folder: the files with the split in their path (train.parquet, test/a.jsonl); all, where no path has one.
    """
    path = Path(name).expanduser()
    if path.is_dir() and any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
        return _saved(path, split)
    if path.exists():
        files = _files_of_folder(path, split.partition("[")[0]) if path.is_dir() else [path]
        return _load_files(files, name, split)
    if path.suffix.lower() in KIND_OF_EXTENSION or path.is_absolute() or name.startswith("."):  # no id of the Hub
        raise ValueError(f"the data set {name!r} is no file or folder here: check the path.")
    with _named(name, split):
        return datasets.load_dataset(name, config_name, split=split)


@contextmanager
def _named(name: object, split: str) -> Iterator[None]:
    """Give the errors of `datasets` the name of what was read, in one line."""
    try:
        yield
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        line = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise ValueError(f"the data set {str(name)!r} (split {split!r}) cannot be read: {line}") from error


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    """Not left to `datasets`: it goes by the folder's name and card, and may load what it cached of another folder."""
    words_of_file = {
        path: set(re.split(r"[^a-z0-9]+", str(path.relative_to(folder)).lower()))
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in KIND_OF_EXTENSION
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    chosen = [path for path, words in words_of_file.items() if split in words]
    if not chosen and split == "train":
        chosen = [path for path, words in words_of_file.items() if not words & SPLITS]
    if not chosen:
        raise ValueError(f"the folder {folder} has no {', '.join(KIND_OF_EXTENSION)} file of the split {split!r}.")
    return chosen


def _load_files(files: list[Path], name: str, split: str) -> datasets.Dataset:
    kinds = {KIND_OF_EXTENSION.get(path.suffix.lower()) for path in files}
    if len(kinds) > 1 or None in kinds:
        found = sorted({path.suffix for path in files})
        raise ValueError(f"{name} has the extension(s) {found}: give one kind of {', '.join(KIND_OF_EXTENSION)}.")
    data_files = {split.partition("[")[0]: [str(path.resolve()) for path in files]}
    with _named(name, split):
        return datasets.load_dataset(kinds.pop(), data_files=data_files, split=split)


def _saved(path: Path, split: str) -> datasets.Dataset:
    with _named(path, split):
        saved = datasets.load_from_disk(str(path))
    if "[" in split:
        raise ValueError(f"split {split!r}: a saved data set cannot be sliced, use --max_prompts.")
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise ValueError(f"the saved data set {path} has the splits {list(saved)}, not {split!r}: choose one of them.")
    return saved[split]


def read_rows(table: datasets.Dataset, columns: Columns, max_prompts: int | None = None) -> list[PromptRow]:
    """The first `max_prompts` rows, checked one by one. Raises ValueError for the first that cannot be used."""
    for name in columns.names():
        if name not in table.column_names:
            raise ValueError(f"the data set has no column {name!r} but {table.column_names}: name the right one.")
    count = len(table) if max_prompts is None else min(max_prompts, len(table))
    if count == 0:
        raise ValueError("the data set has no rows: there is nothing to sample.")
    selected = table.select(range(count)).select_columns(columns.names()).with_format(None)
    rows = [_read_row(index, row, columns) for index, row in enumerate(selected)]
    kinds = {isinstance(row.prompt, str) for row in rows}
    if len(kinds) > 1:
        raise ValueError(f"column {columns.prompt!r} mixes strings and conversations: bring them into one form.")
    return rows


def checksum(rows: list[PromptRow]) -> str:
    """16 hexadecimal digits that change with any prompt, response or score."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.prompt, row.responses, row.scores]).encode() + b"\n")
    return digest.hexdigest()[:16]


def shards(rows: list[PromptRow], size: int) -> list[list[PromptRow]]:
    """The rows in groups of `size`, which are worked on and stored one after the other."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _read_row(index: int, row: dict[str, Any], columns: Columns) -> PromptRow:
    where = f"row {index} (counted from 0)"
    prompt = _read_prompt(row[columns.prompt], f"{where} of column {columns.prompt!r}")
    if columns.as_chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    responses = scores = None
    if columns.responses is not None:
        responses = [_read_text(item, where, columns.responses) for item in _items(row[columns.responses])]
    if columns.scores is not None:
        scores = list(_items(row[columns.scores]))
        if not all(_is_number(score) for score in scores):
            raise ValueError(
                f"{where} of column {columns.scores!r} is no list of finite numbers: give one per response."
            )
        if len(scores) != len(responses or ()):
            raise ValueError(
                f"{where} has {len(responses or ())} responses and {len(scores)} scores: give a score per response."
            )
        scores = [float(score) for score in scores]
    return PromptRow(index, prompt, responses, scores)


def _read_prompt(value: object, where: str) -> Prompt:
    if isinstance(value, str):
        if not value:
            raise ValueError(f"{where} is empty: remove that row.")
        return value
    turns = [{k: v for k, v in turn.items() if v is not None} for turn in _items(value) if isinstance(turn, dict)]
    if not turns or any(not isinstance(turn.get(key), str) for turn in turns for key in ("role", "content")):
        raise ValueError(f"{where} is neither a string nor a list of messages with role and content.")
    if turns[-1]["role"] not in ANSWERED_ROLES:
        raise ValueError(
            f"{where} ends with a message of {turns[-1]['role']!r}: end it with one that asks, as 'user'."
        )
    return turns


def _read_text(item: object, where: str, column: str) -> str:
    """A response as a string, or as the one message of an assistant."""
    messages = list(_items(item))
    if len(messages) == 1 and isinstance(messages[0], dict):
        item = messages[0].get("content")
    if not isinstance(item, str):
        raise ValueError(f"{where} of column {column!r} is no list of responses: each is a string or one message.")
    return item


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _items(value: object) -> Iterator[Any]:
    """The elements of a list; nothing for anything else."""
    return iter(value if isinstance(value, list) else [])
