"""From the records of the runs to rows with 95 % intervals over seeds, a table, a CSV file and a plot. Source: ours.

Intervals are Student's t over the seeds of the final runs: they tell the spread of pairs, data order and samples, in
one world and from one policy. Differences to another method are taken seed by seed, on the same pairs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hf_moe_cpt.scripts.benchmark_tools import plotting, write_csv
from hf_moe_cpt.scripts.compare_preference_plan import Run
from hf_moe_cpt.scripts.quickstart_results import text_table


CONFIDENCE = 0.95
BASELINE = "rainbowpo"  # whose reward the others' are compared with, if it is among the methods
DIFFERENCE = f"reward_over_{BASELINE}"
LEGEND = (
    "means over held-out prompts, 95 % intervals over seeds; * KL on prompts of one ambiguity; accuracy: log-ratio on "
    "clean pairs"
)
REFERENCE_ROW, BEST_ROW = "(reference)", "(best possible)"


class Estimate(NamedTuple):
    """A mean over seeds and half the width of its interval; None where there are fewer than two."""

    mean: float
    half_width: float | None


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Mean of independent values with Student's t-interval."""
    if not values:
        raise ValueError("an interval needs at least one value.")
    if len(values) == 1:
        return Estimate(values[0], None)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), t_quantile((1 + confidence) / 2, len(values) - 1) * error)


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution. probability: in [1/2, 1). degrees: of freedom, an integer >= 1."""
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(f"probability={probability} must be in [1/2, 1) and degrees={degrees} at least 1.")
    low, high = 0.0, math.pi / 2  # of the angle atan(t / sqrt(degrees)), in which the distribution has a closed form
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _share_within(middle, degrees) < 2 * probability - 1 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _share_within(angle: float, degrees: int) -> float:
    """P(|t| < sqrt(degrees) * tan(angle)); Abramowitz and Stegun 26.7.3 and 26.7.4."""
    cosine, odd = math.cos(angle), degrees % 2
    term = total = cosine if odd else 1.0
    for power in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if degrees > 1 else 0.0))


def choose(runs: Sequence[Run], records: Mapping[str, dict[str, Any]]) -> Run | None:
    """The run of a grid with the largest true reward; of equal ones the first. None if all failed."""
    finished = [run for run in runs if "grades" in records[run.name]]
    return max(finished, key=lambda run: records[run.name]["grades"]["reward"], default=None)


def method_rows(
    methods: Sequence[str], final_runs: Mapping[str, Sequence[Run]], records: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row for each method, best reward first, failed ones last: settings, and each grade as (mean, half width).

    final_runs: of each method, none if every run of its grid failed.
    """
    rows = []
    of_baseline = _rewards(final_runs.get(BASELINE, ()), records)
    for method in methods:
        runs = final_runs[method]
        failed = [records[run.name]["error"] for run in runs if "error" in records[run.name]]
        finished = [records[run.name] for run in runs if "grades" in records[run.name]]
        if failed or not finished:
            rows.append({"method": method, "error": failed[0] if failed else "every run of its grid failed"})
            continue
        row = {
            "method": method,
            "learning_rate": runs[0].learning_rate,
            "strength": runs[0].strength,
            "beta": finished[0]["settings"]["beta"],
            "seeds": len(finished),
        }
        row |= {name: t_interval([record["grades"][name] for record in finished]) for name in finished[0]["grades"]}
        rewards = _rewards(runs, records)
        if method != BASELINE and rewards.keys() == of_baseline.keys():
            row[DIFFERENCE] = t_interval([rewards[seed] - of_baseline[seed] for seed in rewards])
        rows.append(row | {"seconds": statistics.fmean(record["seconds"]["training"] for record in finished)})
    return sorted(rows, key=lambda row: -row["reward"].mean if "reward" in row else math.inf)


def _rewards(runs: Sequence[Run], records: Mapping[str, dict[str, Any]]) -> dict[int, float]:
    finished = [run for run in runs if "grades" in records[run.name]]
    return {run.seed: records[run.name]["grades"]["reward"] for run in finished}


# heading, name of the grade, factor, digits
_COLUMNS = (
    ("true reward", "reward", 1, 2),
    (f"reward minus {BASELINE}'s", DIFFERENCE, 1, 2),
    ("win rate %", "win_rate", 100, 1),
    ("KL nats", "kl", 1, 2),
    ("length tokens", "length", 1, 1),
    ("unfinished %", "unfinished", 100, 1),
    ("accuracy %", "accuracy_of_ratio", 100, 1),
)


def comparison_table(results: Mapping[str, Any]) -> str:
    """The rows as text, between what the policy was before and the best that any policy can reach."""
    reference = {name: Estimate(value, None) for name, value in results["reference"].items()}
    by_level = [(f"KL {name[3:]}*", name, 1, 2) for name in reference if name.startswith("kl/")]
    columns = [*_COLUMNS[:4], *by_level, *_COLUMNS[4:]]
    best = {"reward": Estimate(results["best_reward"], None)}
    rows = [{"method": REFERENCE_ROW} | reference, *results["rows"], {"method": BEST_ROW} | best]
    failed = [f"{row['method']} failed: {row['error']}" for row in results["rows"] if "error" in row]
    return "\n".join([text_table([_cells(row, columns) for row in rows]), LEGEND, *failed])


def _cells(row: Mapping[str, Any], columns: Sequence[tuple[str, str, float, int]]) -> dict[str, str]:
    cells = {"method": row["method"]}
    for heading, name, factor, digits in columns:
        cells[heading] = _text(row.get(name), factor, digits)
    for heading, name in (("learning rate", "learning_rate"), ("strength", "strength"), ("beta", "beta")):
        cells[heading] = f"{row[name]:.3g}" if name in row else ""
    return cells


def _text(estimate: Estimate | None, factor: float, digits: int) -> str:
    if estimate is None:
        return ""
    mean, half_width = (None if value is None else value * factor for value in estimate)
    return f"{mean:.{digits}f}" + ("" if half_width is None else f" ± {half_width:.{digits}f}")


def write_rows(path: Path, results: Mapping[str, Any]) -> None:
    """A CSV file with one line for each method, each grade as its mean and, under `name_95`, half its interval."""
    lines = []
    for row in results["rows"]:
        line: dict[str, Any] = {}
        for name, value in row.items():
            line |= {name: value[0], f"{name}_95": value[1]} if isinstance(value, (tuple, list)) else {name: value}
        lines.append(line)
    reference = {"method": REFERENCE_ROW, **results["reference"]}
    write_csv(path, [*lines, reference, {"method": BEST_ROW, "reward": results["best_reward"]}])


def draw(path: Path, results: Mapping[str, Any]) -> None:
    """Reward against KL beside the best reward that is possible at each KL, and rewards as bars; needs matplotlib."""
    pyplot = plotting(path)
    rows = [row for row in results["rows"] if "reward" in row]
    if pyplot is None or not rows:
        return
    figure, (plane, bars) = pyplot.subplots(1, 2, figsize=(15, 7), width_ratios=(3, 2), layout="constrained")
    plane.plot(*zip(*results["frontier"], strict=True), color="black", label="best policies there are")
    plane.axhline(results["best_reward"], color="black", linestyle=":", label="best answer to every prompt")
    plane.scatter([0], [results["reference"]["reward"]], marker="*", s=140, color="black", label="reference")
    colors = pyplot.get_cmap("tab20").colors
    for number, row in enumerate(rows):
        color = colors[number % len(colors)]
        tried = [point for point in results["tuning"] if point["method"] == row["method"]]
        plane.scatter([p["kl"] for p in tried], [p["reward"] for p in tried], s=14, color=color, alpha=0.45)
        errors = {"xerr": row["kl"].half_width or 0, "yerr": row["reward"].half_width or 0}
        plane.errorbar(row["kl"].mean, row["reward"].mean, **errors, fmt="o", color=color, label=row["method"])
    plane.set(xlabel="KL to the reference (nats per answer)", ylabel="mean true reward")
    plane.set_title("dots: the settings that each method tried, on other prompts")
    figure.legend(*plane.get_legend_handles_labels(), fontsize=8, ncols=8, loc="outside lower center")
    plane.grid(alpha=0.3)
    places = range(len(rows), 0, -1)
    widths = [row["reward"].half_width or 0 for row in rows]
    bars.barh(places, [row["reward"].mean for row in rows], xerr=widths, color=colors[0], error_kw={"elinewidth": 1})
    bars.set_yticks(places, [row["method"] for row in rows])
    bars.axvline(results["reference"]["reward"], color="black", linestyle="--")
    bars.set(xlabel="mean true reward, 95 % interval over seeds (dashed: reference)")
    bars.grid(axis="x", alpha=0.3)
    bars.set_axisbelow(True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
