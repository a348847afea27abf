"""Show benchmark results: the tables of their CSV files, for a terminal and as a folder's page.

python scripts/benchmarks/report.py docs/benchmarks/h200

Every number of a benchmark comes through here, so a page, a terminal and the files cannot disagree. Source: ours.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.reports.tables import text_table


OURS = "hf_moe_cpt"
Row = dict[str, str]
Column = str | tuple[str | int, ...] | Callable[[Row], str]  # of a file: text, (name, digits), (three names, digits)


def rows_of(path: Path) -> list[Row]:
    """The lines of a CSV file by column name."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown_table(rows: Sequence[Row]) -> str:
    """Rows with the same keys as a table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def experts_rows(rows: Sequence[Row]) -> list[Row]:
    """Every peer, and how many times longer than ours it took; of one that failed what was measured is not shown."""
    ours = {row["shape"]: float(row["training_ms"]) for row in rows if row["peer"] == OURS and row["training_ms"]}
    shown = []
    for row in rows:
        if row["status"] == "failed":
            row = dict.fromkeys(row, "") | {name: row[name] for name in ("shape", "peer", "reason")}
        errors = [float(row[name]) for name in row if name.startswith("error_") and row[name]]
        times = float(row["training_ms"]) / ours[row["shape"]] if row["training_ms"] and row["shape"] in ours else None
        row |= {"times": "" if times is None else str(times)}
        row |= {"error": row["reason"] or (f"{max(errors):.1e}" if errors else "")}
        shown.append(row)
    return _shown(shown, EXPERTS)


def sharding_rows(rows: Sequence[Row]) -> list[Row]:
    """Every engine of a model, of jobs.py before it had engines."""
    done = [row for row in rows if row["status"] == "ok"]
    first = float(done[0]["step ms"]) if done else 1.0
    return _shown([row | {"times": str(float(row["step ms"]) / first)} for row in done], SHARDING)


def trainers_rows(rows: Sequence[Row]) -> list[Row]:
    """Every baseline's step, or, from a file of ratios, each ratio and its bar."""
    return _shown(rows, RATIOS if "ratio" in rows[0] else TRAINERS)


def done_rows(rows: Sequence[Row], columns: dict[str, Column]) -> list[Row]:
    """The columns of what went well."""
    return _shown([row for row in rows if row["status"] == "ok"], columns)


def _shown(rows: Sequence[Row], columns: dict[str, Column]) -> list[Row]:
    return [{heading: _cell(row, column) for heading, column in columns.items()} for row in rows]


def _cell(row: Row, column: Column) -> str:
    """A number with so many digits, "middle (least to most)" of three, or what a function says; "" for nothing."""
    if isinstance(column, str):
        return row[column]
    if callable(column):
        return column(row)
    *names, digits = column
    values = [f"{float(row[name]):.{digits}f}" if row[name] else "" for name in names]
    if not all(values):
        return ""
    return values[0] if len(values) == 1 else "{} ({} to {})".format(*values)


def _or(column: Column, nothing: str = "not taken") -> Callable[[Row], str]:
    return lambda row: _cell(row, column) or nothing


def _tokens(row: Row) -> str:
    return f"{float(row['tokens_per_second']):,.0f}"


EXPERTS: dict[str, Column] = {
    "shape": "shape",
    "peer": "peer",
    "forward ms": ("forward_ms", 2),
    "forward + backward ms (range)": ("training_ms", "training_ms_min", "training_ms_max", 2),
    "TFLOP/s": ("training_tflops", 0),
    "x ours": ("times", 2),
    "extra MiB": ("extra_peak_mib", 0),
    "first call s": ("first_call_seconds", 1),
    "error": "error",
}
STEPS: dict[str, Column] = {
    "run": "run",
    "step ms (range)": ("step_ms", "step_ms_min", "step_ms_max", 1),
    "x first run": ("times_first_run", 2),
    "tokens/s": _tokens,
    "peak GiB": ("peak_gib", 1),
    "loss": ("loss", 3),
    "host syncs": "host_syncs",
    "dense product TFLOP/s": ("product_tflops", 0),
}
JOBS: dict[str, Column] = {
    "run": "run",
    "step ms (range)": ("step_ms", "step_ms_min", "step_ms_max", 1),
    "tokens/s": _tokens,
    "peak GiB": _or(("peak_gib", 1)),
    "first step s": ("first_step_s", 1),
    "loss": ("loss", 3),
}
SHARDING: dict[str, Column] = {
    "engine": "engine",
    "step ms (range)": ("step ms", "least ms", "most ms", 1),
    "x first": ("times", 3),
    "peak GiB": _or(("peak GiB", 1)),
    "first loss": "first loss",
    "last loss": "last loss",
    "model, layers": lambda row: f"{row['model']}, {row['layers']}",
    "blocks of a step x tokens": lambda row: f"{row['rows']} x {row['length']}",
}
TRAINERS: dict[str, Column] = {
    "contender": "contender",
    "step and log ms (range)": _or(("total_ms", "total_ms_min", "total_ms_max", 1)),
    "peak MiB": _or(("peak_mib", 0)),
    "model": "model",
    "rows x tokens": lambda row: f"{row['batch_size']} x {row['length']}",
    "LoRA rank": "lora_rank",
}
RATIOS: dict[str, Column] = {
    "contender": lambda row: f"{row['contender']} / {row['baseline']}",
    "of": "quantity",
    "ratio (quartiles)": ("ratio", "lower_quartile", "upper_quartile", 3),
    "bar": "bar",
    "verdict": "verdict",
}
TABLES: dict[str, Callable[[Sequence[Row]], list[Row]]] = {
    "experts*.csv": experts_rows,
    "jobs.csv": partial(done_rows, columns=JOBS),
    "preference*.csv": trainers_rows,
    "sharding.csv": sharding_rows,
    "step.csv": partial(done_rows, columns=STEPS),
    "surgery*.csv": trainers_rows,
}


def text_of(path: Path) -> str:
    """The table of a file of results for a terminal."""
    rows = rows_of(path)
    table = next(table for pattern, table in TABLES.items() if path.match(pattern))(rows)
    return text_table(table) if table else "nothing was measured"


def page_of(folder: Path) -> str:
    """The page: one section for each CSV that TABLES knows, in order of name."""
    found = sorted((path, table) for pattern, table in TABLES.items() for path in folder.glob(pattern))
    if not found:
        raise ValueError(f"{folder} holds none of {', '.join(TABLES)}: run the benchmarks first.")
    sections = []
    for path, table in found:
        rows = rows_of(path)
        facts = rows[0]
        made = f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, transformers "
        made += f"{facts['transformers']}, {facts['date']}, commit {facts['commit']}."
        sections.append(f"## {path.name}\n\n{made}\n\n{markdown_table(table(rows))}\n")
    written = f"Written by `python scripts/benchmarks/report.py {folder.as_posix()}` from the files beside it"
    head = f"# {folder.name}\n\n{written}; what is measured: [README](../README.md)."
    return f"{head}\n\n" + "\n".join(sections)


@dataclass
class PageArguments:
    """What the page is about."""

    folder: str = HfArg(metadata={"positional": True}, help="Results, such as docs/benchmarks/h200.")


def main(argv: Sequence[str] | None = None) -> None:
    """Write README.md into the folder that is named."""
    (args,) = parse_arguments((PageArguments,), argv, program="report.py", description=__doc__)
    folder = Path(args.folder)
    (folder / "README.md").write_text(page_of(folder), encoding="utf-8")
    print(f"wrote {folder / 'README.md'}")


if __name__ == "__main__":
    run_script(main)
