"""Show benchmark results: the tables of their CSV files, for a terminal and, with the plots, as a folder's page.

python scripts/benchmarks/report.py docs/benchmarks/h200

Every number of a benchmark comes through here, so a page, a terminal and the files cannot disagree. Source: ours.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.reports.tables import text_table


OURS = "hf_moe_cpt"
Row = dict[str, str]


def rows_of(path: Path) -> list[Row]:
    """The lines of a CSV file by column name."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown_table(rows: Sequence[Row]) -> str:
    """Rows with the same keys as a table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def experts_rows(rows: Sequence[Row]) -> list[Row]:
    """Milliseconds, rate, memory and error of every peer, and how many times longer than ours it took."""
    ours = {row["shape"]: float(row["training_ms"]) for row in rows if row["peer"] == OURS and row["training_ms"]}
    return [_experts_row(row, ours.get(row["shape"])) for row in rows]


def _experts_row(row: Row, ours: float | None) -> Row:
    if row["status"] == "failed":  # what was measured before it failed is not shown
        row = dict.fromkeys(row, "") | {name: row[name] for name in ("shape", "peer", "reason")}
    errors = [float(row[name]) for name in row if name.startswith("error_") and row[name]]
    return {
        "shape": row["shape"],
        "peer": row["peer"],
        "forward ms": _fixed(row["forward_ms"], 2),
        "forward + backward ms (range)": _ranged(row, "training_ms", "training_ms_min", "training_ms_max", digits=2),
        "TFLOP/s": _fixed(row["training_tflops"], 0),
        "x ours": f"{float(row['training_ms']) / ours:.2f}" if ours and row["training_ms"] else "",
        "extra MiB": _fixed(row["extra_peak_mib"], 0),
        "first call s": _fixed(row["first_call_seconds"], 1),
        "error": row["reason"] or (f"{max(errors):.1e}" if errors else ""),
    }


def _fixed(value: str, digits: int) -> str:
    """A number of a file with so many digits after the point; nothing where there is none."""
    return f"{float(value):.{digits}f}" if value else ""


def _ranged(row: Row, *names: str, digits: int) -> str:
    """ "middle (least to most)" of three columns; nothing where they are empty."""
    values = [_fixed(row[name], digits) for name in names]
    return "{} ({} to {})".format(*values) if all(values) else ""


def step_rows(rows: Sequence[Row]) -> list[Row]:
    """Milliseconds, tokens a second, memory and loss of every run."""
    return [
        {
            "run": row["run"],
            "step ms (range)": _ranged(row, "step_ms", "step_ms_min", "step_ms_max", digits=1),
            "x first run": _fixed(row["times_first_run"], 2),
            "tokens/s": f"{float(row['tokens_per_second']):,.0f}",
            "peak GiB": _fixed(row["peak_gib"], 1),
            "loss": _fixed(row["loss"], 3),
            "host syncs": row["host_syncs"],
            "dense product TFLOP/s": _fixed(row["product_tflops"], 0),
        }
        for row in rows
        if row["status"] == "ok"
    ]


def trainers_rows(rows: Sequence[Row]) -> list[Row]:
    """Milliseconds and memory of every baseline's step, or, from a file of ratios, each ratio and its bar."""
    return [_ratio_row(row) if "ratio" in row else _trainer_row(row) for row in rows]


def _trainer_row(row: Row) -> Row:
    times = _ranged(row, "total_ms", "total_ms_min", "total_ms_max", digits=1)
    return {
        "contender": row["contender"],
        "step and log ms (range)": times or "not taken",
        "peak MiB": _fixed(row["peak_mib"], 0) or "not taken",
        "model": row["model"],
        "rows x tokens": f"{row['batch_size']} x {row['length']}",
        "LoRA rank": row["lora_rank"],
    }


def _ratio_row(row: Row) -> Row:
    return {
        "contender": f"{row['contender']} / {row['baseline']}",
        "of": row["quantity"],
        "ratio (quartiles)": _ranged(row, "ratio", "lower_quartile", "upper_quartile", digits=3),
        "bar": row["bar"],
        "verdict": row["verdict"],
    }


def sharding_rows(rows: Sequence[Row]) -> list[Row]:
    """Milliseconds, memory and losses of every engine of a model."""
    done = [row for row in rows if row["status"] == "ok"]
    return [
        {
            "engine": row["engine"],
            "step ms (range)": _ranged(row, "step ms", "least ms", "most ms", digits=1),
            "x first": f"{float(row['step ms']) / float(done[0]['step ms']):.3f}",
            "peak GiB": _fixed(row["peak GiB"], 1) or "not taken",
            "first loss": row["first loss"],
            "last loss": row["last loss"],
            "model, layers": f"{row['model']}, {row['layers']}",
            "blocks of a step x tokens": f"{row['rows']} x {row['length']}",
        }
        for row in done
    ]


def jobs_rows(rows: Sequence[Row]) -> list[Row]:
    """Milliseconds, tokens a second, memory and the first step of every run."""
    return [
        {
            "run": row["run"],
            "step ms (range)": _ranged(row, "step_ms", "step_ms_min", "step_ms_max", digits=1),
            "tokens/s": f"{float(row['tokens_per_second']):,.0f}",
            "peak GiB": _fixed(row["peak_gib"], 1) or "not taken",
            "first step s": _fixed(row["first_step_s"], 1),
            "loss": _fixed(row["loss"], 3),
        }
        for row in rows
        if row["status"] == "ok"
    ]


TABLES = {
    "experts*.csv": experts_rows,
    "jobs.csv": jobs_rows,
    "preference*.csv": trainers_rows,
    "sharding.csv": sharding_rows,
    "step.csv": step_rows,
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
        plot = path.with_suffix(".png")
        drawn = f"\n![]({plot.name})\n" if plot.exists() else ""
        sections.append(f"## {path.name}\n\n{made}\n\n{markdown_table(table(rows))}\n{drawn}")
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
