"""Write the page of a folder of benchmark results: tables out of its CSV files, plots beside them.

python scripts/benchmarks/report.py docs/benchmarks/h200

Every number of a folder of benchmarks comes through here, so a page and its files cannot disagree. Source: ours.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script


OURS = "hf_moe_cpt"


def rows_of(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file by column name."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """Rows with the same keys as a table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def experts_table(rows: Sequence[dict[str, str]]) -> str:
    """Milliseconds, rate, memory and error of every peer, and how many times longer than ours it took."""
    ours = {row["shape"]: float(row["training_ms"]) for row in rows if row["peer"] == OURS}
    return markdown_table([_experts_row(row, ours.get(row["shape"])) for row in rows])


def _experts_row(row: dict[str, str], ours: float | None) -> dict[str, str]:
    if row["status"] == "failed":
        return dict.fromkeys(_EXPERTS_COLUMNS, "") | {
            "shape": row["shape"],
            "peer": row["peer"],
            "error": row["reason"],
        }
    training = float(row["training_ms"])
    errors = [float(row[name]) for name in row if name.startswith("error_") and row[name]]
    values = (
        row["shape"],
        row["peer"],
        f"{float(row['forward_ms']):.2f}",
        f"{training:.2f} ({float(row['training_ms_min']):.2f} to {float(row['training_ms_max']):.2f})",
        f"{float(row['training_tflops']):.0f}",
        f"{training / ours:.2f}" if ours else "",
        f"{float(row['extra_peak_mib']):.0f}" if row["extra_peak_mib"] else "",
        f"{float(row['first_call_seconds']):.1f}",
        f"{max(errors):.1e}" if errors else "",
    )
    return dict(zip(_EXPERTS_COLUMNS, values, strict=True))


_EXPERTS_COLUMNS = (
    "shape",
    "peer",
    "forward ms",
    "forward + backward ms (range)",
    "TFLOP/s",
    "x ours",
    "extra MiB",
    "first call s",
    "error",
)


def step_table(rows: Sequence[dict[str, str]]) -> str:
    """Milliseconds, tokens a second and memory of every run."""
    return markdown_table(
        [
            {
                "run": row["run"],
                "step ms (range)": f"{float(row['step_ms']):.1f} "
                f"({float(row['step_ms_min']):.1f} to {float(row['step_ms_max']):.1f})",
                "tokens/s": f"{float(row['tokens_per_second']):,.0f}",
                "peak GiB": f"{float(row['peak_gib']):.1f}",
                "host syncs": row["host_syncs"],
                "dense product TFLOP/s": f"{float(row['product_tflops']):.0f}",
            }
            for row in rows
            if row["status"] == "ok"
        ]
    )


def trainers_table(rows: Sequence[dict[str, str]]) -> str:
    """Milliseconds and memory of every baseline's step, or, from a file of ratios, each ratio and its bar."""
    return markdown_table([_ratio_row(row) if "ratio" in row else _trainer_row(row) for row in rows])


def _trainer_row(row: dict[str, str]) -> dict[str, str]:
    times = [f"{float(row[name]):.1f}" for name in ("total_ms", "total_ms_min", "total_ms_max") if row[name]]
    return {
        "contender": row["contender"],
        "step and log ms (range)": "{} ({} to {})".format(*times) if times else "not taken",
        "peak MiB": f"{float(row['peak_mib']):.0f}" if row["peak_mib"] else "not taken",
        "model": row["model"],
        "rows x tokens": f"{row['batch_size']} x {row['length']}",
        "LoRA rank": row["lora_rank"],
    }


def _ratio_row(row: dict[str, str]) -> dict[str, str]:
    return {
        "contender": f"{row['contender']} / {row['baseline']}",
        "of": row["quantity"],
        "ratio (quartiles)": f"{float(row['ratio']):.3f} "
        f"({float(row['lower_quartile']):.3f} to {float(row['upper_quartile']):.3f})",
        "bar": row["bar"],
        "verdict": row["verdict"],
    }


def sharding_table(rows: Sequence[dict[str, str]]) -> str:
    """Milliseconds, memory and losses of every engine of a model."""
    return markdown_table(
        [
            {
                "engine": row["engine"],
                "step ms (range)": f"{float(row['step ms']):.1f} "
                f"({float(row['least ms']):.1f} to {float(row['most ms']):.1f})",
                "peak GiB": f"{float(row['peak GiB']):.1f}" if row["peak GiB"] else "not taken",
                "first loss": row["first loss"],
                "last loss": row["last loss"],
                "model, layers": f"{row['model']}, {row['layers']}",
                "blocks of a step x tokens": f"{row['rows']} x {row['length']}",
            }
            for row in rows
            if row["status"] == "ok"
        ]
    )


TABLES = (
    ("experts*.csv", experts_table),
    ("preference*.csv", trainers_table),
    ("sharding.csv", sharding_table),
    ("step.csv", step_table),
    ("surgery*.csv", trainers_table),
)


def page_of(folder: Path) -> str:
    """The page: one section for each CSV that TABLES knows, in order of name."""
    found = sorted((path, table) for pattern, table in TABLES for path in folder.glob(pattern))
    if not found:
        raise ValueError(f"{folder} holds none of {', '.join(name for name, _ in TABLES)}: run the benchmarks first.")
    sections = []
    for path, table in found:
        rows = rows_of(path)
        facts = rows[0]
        made = f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, transformers "
        made += f"{facts['transformers']}, {facts['date']}, commit {facts['commit']}."
        plot = path.with_suffix(".png")
        drawn = f"\n![]({plot.name})\n" if plot.exists() else ""
        sections.append(f"## {path.name}\n\n{made}\n\n{table(rows)}\n{drawn}")
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
