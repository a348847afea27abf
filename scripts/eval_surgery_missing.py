"""What a surgery evaluation could not compute, in lines that say why and what to do. Source: ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_moe_cpt.scripts.eval_surgery_definitions import METRICS
from hf_moe_cpt.scripts.eval_surgery_sets import ATTACKS, PARTS
from hf_moe_cpt.scripts.eval_surgery_values import Key


ABSENT_MODEL = {
    "before": "no model before: no KL, agreement, retained part of the score, steps to half relearnt (--before)",
    "after": "no model after surgery: nothing is judged, the others are yardsticks (--after)",
    "retrained": "no retrained model: no privacy leakage, no R; forgetting aims at accuracy on unseen (--retrained)",
}
NEEDED_SETS = {
    "unlearn": "no membership inference, no attacks, no forgetting part of the score",
    "unseen": "no membership inference, no loss above unseen",
    "update": "no reliability, generalisation, portability and conflict, no update part of the score",
    "retain": "no retained part of the score",
}


def missing_lines(
    raws: Mapping[str, Mapping[str, Any]],
    refused: Mapping[str, Mapping[Key, str]],
    measures: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Models, parts, attacks and sets that are not there, and metrics that exist for other rows but not for these."""
    lines = [line for side, line in ABSENT_MODEL.items() if side not in raws]
    for side, raw in raws.items():
        needed = [part for part in PARTS if part != "divergence" or (side != "before" and "before" in raws)]
        lines += [f"{side}: the part {part} was not measured (--parts)" for part in needed if part not in raw]
        attacks = raw.get("robustness", {})
        absent = [attack for attack in ATTACKS if attack not in attacks]
        if attacks:
            lines += [f"{side}: the attack {attack} was not made (--robustness)" for attack in absent]
        elif "robustness" in raw:
            lines.append(f"{side}: no attack was made: there are no questions about unlearn")
    measured = {row["set"] for row in measures}
    lines += [f"nothing of the set {name}: {what}" for name, what in NEEDED_SETS.items() if name not in measured]
    lines += [
        f"{side}, {name}: no {_label(metric)}: {why}"
        for side, of in refused.items()
        for (metric, name), why in of.items()
    ]
    lines += [
        f"{row['side']}, {row['set']}: {_label(row['metric'])} {_why(row['metric'])}"
        for row in measures
        if row["value"] is None
    ]
    return lines


def _why(metric: str) -> str:
    if metric == "relearn_half_steps":
        return "were not enough: half was not relearnt within all steps (--relearn_steps)"
    return "does not exist: the retrained model's AUC is 1"


def _label(metric: str) -> str:
    return METRICS[metric].label if metric in METRICS else metric
