"""A SurgeryBench on disk: parquet files in the layout of the Hub, a card, and a small file that says what it is.

    README.md               the card, whose YAML tells `load_dataset` where things are
    bench.json              format, version, settings, number of rows of each file
    documents/<set>.parquet, questions/<split>.parquet

Sets and splits without rows have no file. Source: ours.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from hf_moe_cpt.data.surgery_bench_card import write_card
from hf_moe_cpt.data.surgery_bench_grammar import SPLITS
from hf_moe_cpt.data.surgery_bench_schema import DOCUMENT_FEATURES, QUESTION_FEATURES, as_dataset, from_table
from hf_moe_cpt.data.surgery_bench_world import SETS


FORMAT = "surgery_bench"
INDEX_FILE = "bench.json"
LICENSE = "apache-2.0"  # of generated texts
_LAYOUT = {"documents": (SETS, DOCUMENT_FEATURES), "questions": (SPLITS, QUESTION_FEATURES)}


class SavedBench(NamedTuple):
    """What a folder holds. settings: arguments of BenchSettings, None for texts that were not generated."""

    documents: datasets.DatasetDict
    questions: datasets.DatasetDict
    version: str
    settings: dict[str, Any] | None


def write_bench(bench: SavedBench, folder: Path, license: str | None = None) -> Path:
    """Write all files; bench.json comes last, so a folder that has it is whole. The folder must be new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: name a new one, nothing is overwritten.")
    parts = {"documents": bench.documents, "questions": bench.questions}
    if not sum(map(len, bench.documents.values())):
        raise ValueError("the bench holds no documents: there is nothing to save.")
    counts: dict[str, dict[str, int]] = {}
    for config, by_name in parts.items():
        (folder / config).mkdir(parents=True, exist_ok=True)
        counts[config] = {name: len(part) for name, part in by_name.items()}
        for name, part in by_name.items():
            if len(part):
                part.to_parquet(str(folder / config / f"{name}.parquet"))
    license = LICENSE if license is None and bench.settings is not None else license
    card = write_card(bench.documents, bench.questions, bench.version, bench.settings, license)
    (folder / "README.md").write_text(card, encoding="utf-8")
    index = {"format": FORMAT, "version": bench.version, "settings": bench.settings, "rows": counts}
    unfinished = folder / f"{INDEX_FILE}.part"
    unfinished.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / INDEX_FILE)
    return folder


def read_bench(folder: Path) -> SavedBench:
    """Read what `write_bench` wrote, checking columns and numbers of rows."""
    index = _read_index(folder / INDEX_FILE)
    found = {
        config: datasets.DatasetDict(
            {
                name: _read_part(folder / config / f"{name}.parquet", features, index["rows"][config].get(name, 0))
                for name in names
            }
        )
        for config, (names, features) in _LAYOUT.items()
    }
    return SavedBench(found["documents"], found["questions"], index["version"], index["settings"])


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{path} cannot be read: name a folder that SurgeryBench.save wrote to its end.") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): write the folder again.") from None
    if (
        not isinstance(index, dict)
        or index.get("format") != FORMAT
        or not {"version", "settings", "rows"} <= set(index)
    ):
        raise ValueError(f"{path} does not describe a SurgeryBench: name a folder that SurgeryBench.save wrote.")
    return index


def _read_part(path: Path, features: datasets.Features, rows: int) -> datasets.Dataset:
    if not rows:
        return as_dataset([], features)
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}): write the folder again.") from None
    if table.column_names != list(features):
        raise ValueError(f"{path} has the columns {table.column_names}: a bench has {list(features)}.")
    if len(table) != rows:
        raise ValueError(f"{path} has {len(table)} rows, {INDEX_FILE} says {rows}: write the folder again.")
    return from_table(table, features)
