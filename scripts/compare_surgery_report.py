"""From the records of the runs to rows with 95 % intervals over seeds, verdicts, targets, a table, CSV and a plot.

Every seed has a world, a model before and a retrained model of its own; differences and ratios are taken within a
seed. Intervals are Student's t over seeds. Source: ours; the claims are those of arXiv 2409.13054 and its critics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_moe_cpt.scripts.benchmark_tools import grouped_bars, plotting, write_csv
from hf_moe_cpt.scripts.compare_preference_report import Estimate, t_interval
from hf_moe_cpt.scripts.compare_surgery_measures import steps_until
from hf_moe_cpt.scripts.compare_surgery_plan import BEFORE, METHODS, RETRAINED
from hf_moe_cpt.scripts.compare_surgery_verdicts import claims_of, targets_of
from hf_moe_cpt.scripts.quickstart_results import text_table


CHANCE = 1 / 3
RELEARN_STEPS, SECONDS = "relearn_steps", "seconds"
LEGEND = (
    "accuracies in % of questions with three options, losses (CE) and KL in nats per token, gauge: CE unlearn - CE "
    "unseen; 95 % intervals over seeds",
    "relearn: steps of training on unlearned texts until half of the accuracy is back, or the most that were made",
)
# heading, measure, factor, digits
COLUMNS = (
    ("unlearn", "accuracy/unlearn", 100, 1),
    ("obsolete", "accuracy/obsolete", 100, 1),
    ("update", "accuracy/update", 100, 1),
    ("changed", "accuracy/changed", 100, 1),
    ("retain", "accuracy/retain", 100, 1),
    ("neighbour", "accuracy/neighbour", 100, 1),
    ("unseen", "accuracy/unseen", 100, 1),
    ("CE unlearn", "ce/unlearn", 1, 2),
    ("CE unseen", "ce/unseen", 1, 2),
    ("gauge", "gauge", 1, 2),
    ("KL retain", "kl/retain", 1, 3),
    ("KL neighbour", "kl/neighbour", 1, 3),
    ("CE real", "ce/real", 1, 2),
    ("relearn", RELEARN_STEPS, 1, 0),
    ("seconds", SECONDS, 1, 0),
)
_SETS = ("unlearn", "obsolete", "update", "retain", "neighbour", "unseen")

Record = Mapping[str, Any]


def flat_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row for each finished run: who it is, its settings, all measures, steps of relearning, seconds."""
    before = {(r["architecture"], r["seed"]): r for r in records if r["method"] == BEFORE}
    rows = []
    for record in records:
        row = {name: record[name] for name in ("architecture", "method", "seed", "learning_rate", "strength")}
        row |= record["measures"]
        start = before.get((record["architecture"], record["seed"]))
        if "relearn" in record and start is not None:
            goal = (CHANCE + start["measures"]["accuracy/unlearn"]) / 2
            steps = steps_until(record["relearn"], goal)
            row[RELEARN_STEPS] = record["relearn"]["steps"][-1] if steps is None else steps
        row[SECONDS] = record["seconds"]["training"]
        if "peak_gib" in record:
            row["peak_gib"] = record["peak_gib"]
        rows.append(row)
    return rows


def summary_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each architecture and method, with the mean over seeds and half its interval of each number."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for architecture in dict.fromkeys(row["architecture"] for row in rows):
        for row in sorted((row for row in rows if row["architecture"] == architecture), key=_place):
            groups.setdefault((architecture, row["method"]), []).append(row)
    made = []
    for (architecture, method), runs in groups.items():
        row: dict[str, Any] = {"architecture": architecture, "method": method, "seeds": len(runs)}
        if method in METHODS:
            row |= {name: runs[0][name] for name in ("learning_rate", "strength")}
        names = [name for name in runs[0] if "/" in name or name in ("gauge", "old_answers", RELEARN_STEPS, SECONDS)]
        made.append(row | {name: t_interval([run[name] for run in runs]) for name in names})
    return made


def conclude(records: Sequence[Record], failed: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Everything that is printed and written, as JSON can hold it, besides what the comparison was.

    records: of finished final runs. failed: rows with `run` and `error`.
    """
    runs = flat_rows(records)
    architectures = list(dict.fromkeys(row["architecture"] for row in runs))
    of_each = {name: [record for record in records if record["architecture"] == name] for name in architectures}
    return {
        "rows": summary_rows(runs),
        "runs": runs,
        "failed": list(failed),
        "claims": [claim for name, own in of_each.items() for claim in claims_of(name, own)],
        "targets": [target for name, own in of_each.items() for target in targets_of(name, own)],
        "curves": [
            {name: record[name] for name in ("architecture", "method", "seed", "relearn")}
            for record in records
            if "relearn" in record
        ],
    }


def comparison_text(results: Mapping[str, Any]) -> str:
    """The table of each architecture, the verdicts on the claims, and the targets."""
    parts = []
    for architecture in dict.fromkeys(row["architecture"] for row in results["rows"]):
        own = [row for row in results["rows"] if row["architecture"] == architecture]
        shown = [column for column in COLUMNS if any(column[1] in row for row in own)]
        table = text_table([_cells(row, shown) for row in own])
        parts += [f"{architecture}, {max(row['seeds'] for row in own)} seeds", table]
    parts += LEGEND
    for title, key in (("Claims", "claims"), ("Targets for the method safe", "targets")):
        if results[key]:
            parts += ["", title, text_table(results[key])]
    parts += [f"{row['run']} failed: {row['error']}" for row in results["failed"]]
    return "\n".join(parts)


def _cells(row: Mapping[str, Any], columns: Sequence[tuple[str, str, float, int]]) -> dict[str, str]:
    cells = {"method": row["method"]}
    for heading, name, factor, digits in columns:
        cells[heading] = _text(row.get(name), factor, digits)
    for heading, name in (("rate", "learning_rate"), ("strength", "strength")):
        cells[heading] = f"{row[name]:.3g}" if name in row else ""
    return cells


def _text(estimate: Sequence[float | None] | None, factor: float, digits: int) -> str:
    if estimate is None:
        return ""
    mean, half_width = Estimate(*estimate)
    return f"{mean * factor:.{digits}f}" + ("" if half_width is None else f" ± {half_width * factor:.{digits}f}")


def write_runs(path: Path, results: Mapping[str, Any]) -> None:
    """A CSV file with one line for each run: method, seed, architecture and every number."""
    write_csv(path, results["runs"])


def draw(path: Path, results: Mapping[str, Any]) -> None:
    """Accuracies, losses, divergences and relearning, a line of panels for each architecture; needs matplotlib."""
    pyplot = plotting(path)
    if pyplot is None or not results["runs"]:
        return
    architectures = list(dict.fromkeys(row["architecture"] for row in results["runs"]))
    methods = list(dict.fromkeys(row["method"] for row in sorted(results["runs"], key=_place)))
    size = {"figsize": (24, 5 * len(architectures)), "width_ratios": (5, 2, 2, 3), "layout": "constrained"}
    figure, grid = pyplot.subplots(len(architectures), 4, squeeze=False, **size)
    for architecture, panels in zip(architectures, grid, strict=True):
        runs = [row for row in results["runs"] if row["architecture"] == architecture]
        bars = (
            ("accuracy", {name: f"accuracy/{name}" for name in _SETS}),
            ("nats per token", {"CE unlearn": "ce/unlearn", "CE unseen": "ce/unseen"}),
            ("nats per token", {"KL retain": "kl/retain", "KL neighbour": "kl/neighbour"}),
        )
        for axes, (label, measures) in zip(panels, bars, strict=False):
            grouped_bars(axes, list(measures), {method: _values(runs, method, measures) for method in methods})
            axes.set(ylabel=label, yscale="linear" if label == "accuracy" else "log")
        panels[0].axhline(CHANCE, color="black", linestyle=":", linewidth=0.8)
        panels[0].set_title(architecture)
        own = [curve for curve in results["curves"] if curve["architecture"] == architecture]
        _draw_curves(panels[3], own, methods)
    figure.legend(*grid[0][0].get_legend_handles_labels(), ncols=8, loc="outside lower center")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _values(runs: Sequence[Mapping[str, Any]], method: str, measures: Mapping[str, str]) -> dict[str, list[float]]:
    """A method's values of all seeds by group; zeros are left out, which a logarithm does not show."""
    own = [row for row in runs if row["method"] == method]
    return {group: [row[name] for row in own if row.get(name, 0.0) > 0.0] for group, name in measures.items()}


def _place(row: Mapping[str, Any]) -> int:
    return [BEFORE, *METHODS, RETRAINED].index(row["method"])


def _draw_curves(axes: Any, curves: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> None:
    """Mean over seeds of the taught subjects' accuracy while they are learnt again."""
    for method in dict.fromkeys(curve["method"] for curve in curves):
        own = [curve["relearn"] for curve in curves if curve["method"] == method]
        means = [fmean(values) for values in zip(*(curve["taught"] for curve in own), strict=True)]
        axes.plot(own[0]["steps"], means, color=f"C{methods.index(method)}")
    axes.axhline(CHANCE, color="black", linestyle=":", linewidth=0.8)
    axes.set(xlabel="steps of relearning", ylabel="accuracy on taught subjects")
