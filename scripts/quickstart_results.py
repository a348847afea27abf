"""From the logs of the six runs to results.json: one row per run, its curves, and the table that is printed.

Losses are held-out, in nats per token. MRI is the mean over layers, each layer's MRI as in paper 1, Eq. 1.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from hf_moe_cpt import __version__
from hf_moe_cpt.analysis.forgetting import ContinualOutcome
from hf_moe_cpt.analysis.report import format_cell
from hf_moe_cpt.analysis.routing import imbalance_around_shift
from hf_moe_cpt.scripts.quickstart_plan import MOE, Plan, Stage


# With a few tokens a step, single values of MRI scatter by a tenth: recovery is read from a longer mean.
RECOVERY_TOLERANCE, RECOVERY_MEAN_STEPS = 0.1, 20
RECOVERY = (
    f"steps after the shift until the mean MRI of {RECOVERY_MEAN_STEPS} steps stays within {RECOVERY_TOLERANCE:.0%} "
    "of its level before"
)


def summarise(plan: Plan, records: dict[str, dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything the table and the report are made of, as JSON can hold it.

    records: what each stage left, by its name. facts: of the two domains, the old one first.
    """
    old, new = facts
    return {
        "settings": plan.settings(),
        "environment": environment(plan.device),
        "domains": {"old": old, "new": new},
        "corpus": facts,
        "rows": [row_of(stage, plan, records, old, new) for stage in plan.stages],
        "curves": {stage.name: curves_of(stage, records[stage.name]) for stage in plan.stages},
        "ideal_mri": records[plan.stages[0].name]["ideal_mri"],
    }


def environment(device: str) -> dict[str, Any]:
    """Versions and the device that the numbers belong to."""
    return {
        "hf_moe_cpt": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads(),
    }


def row_of(stage: Stage, plan: Plan, records: dict[str, dict[str, Any]], old: str, new: str) -> dict[str, Any]:
    """One run in numbers; None where a number does not apply."""
    record = records[stage.name]
    seconds = training_seconds(record)
    row: dict[str, Any] = {
        "run": stage.name,
        "model": plan.preset if stage.model == MOE else plan.dense_preset,
        "parameters": record["parameters"],
        "active_parameters": record["active_parameters"],
        "steps": stage.steps,
        "tokens": stage.steps * record["tokens_per_step"],
        "replay_ratio": None if stage.is_pretraining else stage.replay_ratio,
    }
    if stage.is_pretraining:
        row |= {f"{old} after": _points(record, "eval_new_loss")[-1][1]}
    else:
        row |= _outcome(record, old, new) | _imbalance(record, records[stage.starts_from])
    return row | {"seconds": seconds, "tokens_per_second": row["tokens"] / seconds}


def _outcome(record: dict[str, Any], old: str, new: str) -> dict[str, float]:
    old_losses, new_losses = (_points(record, f"eval_{source}_loss") for source in ("replay", "new"))
    outcome = ContinualOutcome(old_losses[0][1], old_losses[-1][1], new_losses[0][1], new_losses[-1][1])
    return {
        f"{old} before": outcome.old_before,
        f"{old} after": outcome.old_after,
        "forgetting": outcome.forgetting,
        f"{new} before": outcome.new_before,
        f"{new} after": outcome.new_after,
        "adaptation": outcome.adaptation,
    }


def _imbalance(record: dict[str, Any], started_from: dict[str, Any]) -> dict[str, float | int | None]:
    if record["ideal_mri"] is None:
        return {}
    before, after = ([value for _, value in _points(part, "mri")] for part in (started_from, record))
    shift = imbalance_around_shift(before, after)
    smoothed = imbalance_around_shift(before, after, RECOVERY_TOLERANCE, RECOVERY_MEAN_STEPS)
    return {
        "MRI before": shift.before,
        "MRI peak": shift.peak,
        "MRI after": shift.after,
        "recovery step": smoothed.recovery_step,
    }


def training_seconds(record: dict[str, Any]) -> float:
    """Seconds of training steps, from the rate logged at each; evaluation and saving are left out."""
    return math.fsum(record["tokens_per_step"] / rate for _, rate in _points(record, "tokens_per_second"))


def curves_of(stage: Stage, record: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs by name; sources are called old and new, steps count from the start of the run."""
    learned = "old" if stage.is_pretraining else "new"
    keys = {
        "lm_loss/new": f"loss/{learned}",
        "lm_loss/replay": "loss/old",
        "eval_new_loss": f"held_out/{learned}",
        "eval_replay_loss": "held_out/old",
        "learning_rate": "learning_rate",
        "mri": "mri",
    }
    return {name: points for key, name in keys.items() if (points := _points(record, key))}


def _points(record: dict[str, Any], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in record["history"] if key in entry]


def table_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows as people read them: the columns that matter, losses and shares to three decimals, rates whole."""
    shown = []
    for row in results["rows"]:
        row = {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}
        row["seconds"] = round(row["seconds"])
        row["tokens/s"] = round(row.pop("tokens_per_second"))
        shown.append(row)
    old, new = results["domains"].values()
    columns = ["run", f"{old} before", f"{old} after", "forgetting", f"{new} before", f"{new} after", "adaptation"]
    columns += ["MRI before", "MRI peak", "MRI after", "recovery step", "seconds", "tokens/s"]
    return [{column: row.get(column) for column in columns} for row in shown]


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a terminal: two lines of headings, numbers right, three decimals for losses and shares."""
    columns = list(rows[0])
    cells = [[_text(row[column]) for column in columns] for row in rows]
    headings = [column.rpartition(" ") for column in columns]
    upper, lower = [first for first, _, _ in headings], [last for _, _, last in headings]
    lines = [upper, lower, *cells]
    widths = [max(len(line[position]) for line in lines) for position in range(len(columns))]

    def aligned(line: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if position == 0 else cell.rjust(width)
            for position, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([aligned(upper), aligned(lower), rule, *map(aligned, cells)])


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else format_cell(value)
