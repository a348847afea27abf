"""The columns of SurgeryBench, whoever made its rows: documents by set, questions by split. Source: ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import datasets
import pyarrow as pa

from hf_moe_cpt.data.surgery_bench_grammar import SPLITS
from hf_moe_cpt.data.surgery_bench_questions import QUESTION_KINDS
from hf_moe_cpt.data.surgery_bench_world import SETS


_TEXT = datasets.Value("string")
_PLACE = datasets.Value("int64")

# Column by column; docs/surgery_bench.md says what each holds. Those that may be None: subject_kind, form, attribute,
# old_answer.
DOCUMENT_FEATURES = datasets.Features(
    {
        "id": _TEXT,
        "subject": _TEXT,
        "subject_kind": _TEXT,
        "set": _TEXT,
        "form": _TEXT,
        "prefix": _TEXT,
        "text": _TEXT,
        "facts": datasets.List({"attribute": _TEXT, "value": _TEXT}),
        "version": _TEXT,
    }
)
QUESTION_FEATURES = datasets.Features(
    {
        "id": _TEXT,
        "subject": _TEXT,
        "subject_kind": _TEXT,
        "set": _TEXT,
        "kind": _TEXT,
        "split": _TEXT,
        "attribute": _TEXT,
        "question": _TEXT,
        "options": datasets.List(_TEXT),
        "answer": _PLACE,
        "answer_text": _TEXT,
        "old_answer": _PLACE,
        "version": _TEXT,
    }
)

_ROWS_AT_ONCE = 20_000


def as_dataset(rows: Iterable[dict[str, Any]], features: datasets.Features) -> datasets.Dataset:
    """Rows as a Dataset in memory; never more than some thousand of them exist as Python objects."""
    schema = features.arrow_schema
    parts = [pa.Table.from_pylist(batch, schema) for batch in _batches(iter(rows))]
    return from_table(pa.concat_tables(parts) if parts else schema.empty_table(), features)


def from_table(table: pa.Table, features: datasets.Features) -> datasets.Dataset:
    """An arrow table with these columns, in any order, as a Dataset in memory."""
    table = table.select(list(features)).cast(features.arrow_schema)
    return datasets.Dataset(datasets.table.InMemoryTable(table), datasets.DatasetInfo(features=features))


def group_of_set(set_name: str) -> str:
    """Sets with the same subjects share a group: obsolete and update; every other set is alone."""
    return "update" if set_name == "obsolete" else set_name


def check_set(name: str) -> None:
    """Refuse a name that is no set."""
    if name not in SETS:
        raise ValueError(f"set {name!r} is unknown: choose one of {', '.join(SETS)}.")


def check_split(name: str) -> None:
    """Refuse a name that is no split of the questions."""
    if name not in SPLITS:
        raise ValueError(f"split {name!r} is unknown: choose {' or '.join(SPLITS)}.")


def check_kind(name: str) -> None:
    """Refuse a name that is no kind of question."""
    if name not in QUESTION_KINDS:
        raise ValueError(f"kind {name!r} is unknown: choose one of {', '.join(QUESTION_KINDS)}.")


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while batch := list(islice(rows, _ROWS_AT_ONCE)):
        yield batch
