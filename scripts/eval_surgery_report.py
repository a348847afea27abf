"""Show a surgery evaluation: the table for a terminal, results.csv, results.json and the page report.html.

Everything is made of what `eval_surgery_results.summarise` gives. Source: ours.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_moe_cpt.scripts.benchmark_tools import write_csv
from hf_moe_cpt.scripts.eval_surgery_definitions import METRICS
from hf_moe_cpt.scripts.eval_surgery_page import write_page
from hf_moe_cpt.scripts.eval_surgery_table import score_lines, table_blocks
from hf_moe_cpt.scripts.quickstart_folder import write_json


TERMINAL_WIDTH = 120

Summary = Mapping[str, Any]


def text_report(summary: Summary) -> str:
    """The table of the models side by side, at most 120 columns wide, how the score was made, and what is missing."""
    blocks = table_blocks(summary)
    sides = list(summary["sides"])
    widths = [max(len(row[column]) for _, rows in blocks for row in rows) for column in ("measure", "set")]
    widths += [max(len(side), *(len(row[side]) for _, rows in blocks for row in rows)) for side in sides]
    lines = [f"{100 * summary['confidence']:.4g} % intervals of a bootstrap over subjects", ""]
    lines += [_line(["", "", *sides], widths), "-" * (sum(widths) + 2 * (len(widths) - 1))]
    for heading, rows in blocks:
        lines += [
            heading,
            *(_line([row["measure"], row["set"], *(row[side] for side in sides)], widths) for row in rows),
        ]
    lines += ["", *wrapped(score_lines(summary))]
    lines += wrapped([f"! {line}" for line in summary["warnings"]])
    if summary["missing"]:
        lines += ["", "not measured:", *wrapped([f"- {line}" for line in summary["missing"]])]
    return "\n".join(line.rstrip() for line in lines)


def wrapped(lines: Sequence[str], width: int = TERMINAL_WIDTH) -> list[str]:
    """Each line in pieces of at most `width` characters, those after the first indented."""
    return [piece for line in lines for piece in textwrap.wrap(line, width, subsequent_indent="  ")]


def write_files(root: Path, summary: Summary, raws: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """results.csv, results.json and report.html in a folder that is there.

    raws: measurements by side, of which the page shows what the models wrote. facts: settings and machine.
    """
    write_csv(root / "results.csv", long_rows(summary))
    definitions = {row["metric"]: METRICS[row["metric"]]._asdict() for row in summary["measures"]}
    write_json(root / "results.json", {**summary, "metrics": definitions, **facts})
    write_page(root / "report.html", summary, raws, facts)


def long_rows(summary: Summary) -> list[dict[str, Any]]:
    """side, set, metric, value, low, high, n: the measures, then every point of the relearning curves."""
    rows = [dict(row) for row in summary["measures"]]
    for point in summary["curves"]:
        metric = f"relearn_{point['training']}_{point['asked']}_step_{point['step']}"
        row = {"side": point["side"], "set": "unlearn", "metric": metric, "value": point["accuracy"]}
        rows.append(row | {name: point[name] for name in ("low", "high", "n")})
    return rows


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    placed = [
        cell.ljust(width) if place < 2 else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(placed)
