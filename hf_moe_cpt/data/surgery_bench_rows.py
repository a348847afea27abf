"""A user's own documents and questions, read from JSON Lines into the columns of SurgeryBench.

Every complaint names the file and the line, counted from 1. A row of documents needs subject and text, and its set
unless the whole file is one set; a row of questions needs subject, set, question, options and answer. The rest has
defaults: kind "mcq"; split by a hash of subject and question, which puts half of them on either side. Source: ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets

from hf_moe_cpt.data.file_checks import json_lines
from hf_moe_cpt.data.permutation import derive_seed
from hf_moe_cpt.data.surgery_bench_grammar import SPLITS
from hf_moe_cpt.data.surgery_bench_schema import (
    DOCUMENT_FEATURES,
    QUESTION_FEATURES,
    as_dataset,
    check_kind,
    check_set,
    check_split,
    group_of_set,
)
from hf_moe_cpt.data.surgery_bench_world import SETS


logger = logging.getLogger(__name__)

USER_VERSION = "user"
MIN_OPTIONS = 2


class _RowError(ValueError):
    """What is wrong with a row; the reader adds the place."""


class BenchRows:
    """Collects rows of several files and checks them against each other."""

    def __init__(self) -> None:
        self._documents: dict[str, list[dict[str, Any]]] = {name: [] for name in SETS}
        self._questions: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
        self._group_of_subject: dict[str, tuple[str, str]] = {}  # group, place of its first row
        self._subjects_of_set: dict[str, set[str]] = {name: set() for name in SETS}
        self._place_of_id: dict[tuple[str, str], str] = {}
        self._place_of_question: dict[tuple[str, str, str, str], str] = {}
        self._warned_of: set[tuple[Path, str]] = set()

    def read_documents(self, path: Path, set_name: str | None, columns: Mapping[str, str]) -> None:
        """Add a file of documents. set_name: the set of all its rows, None if each names its own."""
        if set_name is not None:
            check_set(set_name)
        wrong = sorted(set(columns) - set(DOCUMENT_FEATURES))
        if wrong:
            raise ValueError(f"columns renames {wrong}, which are no columns of documents: {list(DOCUMENT_FEATURES)}.")
        count = self._read(path, columns, lambda row, place: self._add_document(row, place, set_name, path))
        if not count:
            raise ValueError(f"{path} holds no documents: give it at least one line.")

    def read_questions(self, path: Path) -> None:
        """Add a file of questions about subjects whose documents were read before."""
        if not self._read(path, {}, lambda row, place: self._add_question(row, place, path)):
            raise ValueError(f"{path} holds no questions: give it at least one line or leave it out.")

    def documents(self) -> datasets.DatasetDict:
        """All documents read so far, by set; sets without any are empty."""
        return datasets.DatasetDict({k: as_dataset(rows, DOCUMENT_FEATURES) for k, rows in self._documents.items()})

    def questions(self) -> datasets.DatasetDict:
        """All questions read so far, by split."""
        return datasets.DatasetDict({k: as_dataset(rows, QUESTION_FEATURES) for k, rows in self._questions.items()})

    def _read(self, path: Path, columns: Mapping[str, str], add: Callable[[dict, int], None]) -> int:
        count = 0
        for number, row in json_lines(path):
            place = f"{path}, line {number}"
            renamed = {name: row.pop(yours) for name, yours in columns.items() if yours in row}
            missing = [yours for name, yours in columns.items() if name in ("subject", "text") and name not in renamed]
            try:
                if missing:
                    raise _RowError(f"has no column {missing[0]!r}, which columns asks for; it has {sorted(row)}.")
                add({**row, **renamed}, number)
            except ValueError as error:
                text = str(error)
                raise ValueError(f"{place}{' ' if isinstance(error, _RowError) else ': '}{text}") from None
            count += 1
        return count

    def _add_document(self, row: dict[str, Any], number: int, set_name: str | None, path: Path) -> None:
        subject, text = _text(row, "subject"), _text(row, "text")
        named = _text(row, "set") if set_name is None else _text(row, "set", default=set_name)
        check_set(named)
        if set_name not in (None, named):
            raise _RowError(f"has the set {named!r}, but its file was given as {set_name!r}: give one of them.")
        group, place = group_of_set(named), f"{path}, line {number}"
        first_group, first_place = self._group_of_subject.setdefault(subject, (group, place))
        if first_group != group:
            raise _RowError(
                f"puts the subject {subject!r} into {named}, but {first_place} has it in {first_group}: a subject can "
                "only be in one of unlearn, obsolete and update together, retain, neighbour, unseen."
            )
        self._subjects_of_set[named].add(subject)
        prefix = _text(row, "prefix", default="", may_be_empty=True)
        if not text.startswith(prefix) or len(prefix) == len(text):
            raise _RowError(f"has a prefix, {_shown(prefix)}, that its text does not begin with and go on from.")
        self._documents[named].append(
            {
                "id": self._id(row, "document", f"{named}-{path.stem}-{number}", place),
                "subject": subject,
                "subject_kind": _text(row, "subject_kind", default=None),
                "set": named,
                "form": _text(row, "form", default=None),
                "prefix": prefix,
                "text": text,
                "facts": _facts(row),
                "version": USER_VERSION,
            }
        )
        self._warn_of_unknown(row, DOCUMENT_FEATURES, path)

    def _add_question(self, row: dict[str, Any], number: int, path: Path) -> None:
        subject, set_name, question = (_text(row, name) for name in ("subject", "set", "question"))
        check_set(set_name)
        if subject not in self._subjects_of_set[set_name]:
            raise _RowError(
                f"asks about {subject!r} in {set_name}, where no document has that subject: spell it as there."
            )
        kind = _text(row, "kind", default="mcq")
        check_kind(kind)
        halves = SPLITS[derive_seed(subject, question) % len(SPLITS)]
        split = _text(row, "split", default=halves)
        check_split(split)
        place = f"{path}, line {number}"
        first = self._place_of_question.setdefault((set_name, subject, kind, question), place)
        if first != place:
            raise _RowError(f"asks the same question as {first}: validation and test must not share any.")
        options = _options(row)
        answer = _place_in(row, "answer", options)
        old_answer = _place_in(row, "old_answer", options) if row.get("old_answer") is not None else None
        if old_answer == answer:
            raise _RowError(f"has {options[answer]!r} as both answer and old_answer: they must differ.")
        self._questions[split].append(
            {
                "id": self._id(row, "question", f"{set_name}-{path.stem}-{number}", place),
                "subject": subject,
                "subject_kind": _text(row, "subject_kind", default=None),
                "set": set_name,
                "kind": kind,
                "split": split,
                "attribute": _text(row, "attribute", default=None),
                "question": question,
                "options": options,
                "answer": answer,
                "answer_text": options[answer],
                "old_answer": old_answer,
                "version": USER_VERSION,
            }
        )
        self._warn_of_unknown(row, QUESTION_FEATURES, path)

    def _id(self, row: dict[str, Any], what: str, default: str, place: str) -> str:
        name = _text(row, "id", default=default)
        first = self._place_of_id.setdefault((what, name), place)
        if first != place:
            raise _RowError(f"has the id {name!r}, which {first} has too: ids must differ.")
        return name

    def _warn_of_unknown(self, row: dict[str, Any], features: datasets.Features, path: Path) -> None:
        """Once for each file and column."""
        for name in sorted(set(row) - set(features)):
            if (path, name) not in self._warned_of:
                self._warned_of.add((path, name))
                logger.warning("%s: the column %r is not used", path, name)


_REQUIRED = object()


def _text(row: dict[str, Any], name: str, default: Any = _REQUIRED, may_be_empty: bool = False) -> Any:
    """A column that holds text, or the default where it is absent or null."""
    value = row.get(name)
    if value is None:
        if default is _REQUIRED:
            raise _RowError(f"has no {name!r}: it has {sorted(row)}.")
        return default
    if not isinstance(value, str):
        raise _RowError(f"has {_shown(value)} as {name!r}, a {type(value).__name__}: it must be a string.")
    if not value.strip() and not may_be_empty:
        raise _RowError(f"has an empty {name!r}: fill it or remove the row.")
    return value


def _facts(row: dict[str, Any]) -> list[dict[str, str]]:
    facts = row.get("facts")
    if facts is None:
        return []
    is_list = isinstance(facts, list) and all(isinstance(fact, dict) for fact in facts)
    if not is_list or any({*map(type, fact.values())} != {str} or {*fact} != {"attribute", "value"} for fact in facts):
        raise _RowError(
            f'has {_shown(facts)} as \'facts\': it must be a list of {{"attribute": "...", "value": "..."}}.'
        )
    return facts


def _options(row: dict[str, Any]) -> list[str]:
    options = row.get("options")
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        raise _RowError(f"has {_shown(options)} as 'options': it must be a list of strings that are not empty.")
    if len(options) < MIN_OPTIONS or len(set(options)) < len(options):
        raise _RowError(f"has the options {_shown(options)}: it needs at least {MIN_OPTIONS}, all different.")
    return options


def _place_in(row: dict[str, Any], name: str, options: list[str]) -> int:
    """The place of an option that is named by its place, counted from 0, or by its text."""
    value = row.get(name)
    if isinstance(value, str) and value in options:
        return options.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(options):
        return value
    raise _RowError(
        f"has {_shown(value)} as {name!r}: it must be one of the {len(options)} options, or its place from 0 to "
        f"{len(options) - 1}."
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
