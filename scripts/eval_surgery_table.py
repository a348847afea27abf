"""The rows of a surgery evaluation's table: which numbers stand where, and how they are written. Source: ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_moe_cpt.scripts.eval_surgery_definitions import METRICS
from hf_moe_cpt.scripts.eval_surgery_robustness import BITS, PREFIXES


NOTHING = "–"
ALL_SETS = "all"  # the set of a number that is made of several
REMEMBERED = ("probability", "exact_memorisation", "extraction_strength", "rouge_l")
MEMBERSHIP = ("auc_loss", "auc_zlib", "auc_min_k", "auc_min_k_plus_plus", "privacy_leakage")
# heading, and what stands below it: (metric, sets)
TABLE = (
    ("Forgotten?", (
        ("accuracy", ("unlearn", "unseen", "obsolete")),
        ("accuracy_cloze", ("unlearn",)),
        ("accuracy_paraphrase", ("unlearn",)),
        ("loss", ("unlearn", "unseen", "obsolete")),
        ("loss_gap", ("unlearn",)),
        *((metric, ("unlearn",)) for metric in (*REMEMBERED, *MEMBERSHIP)),
    )),
    ("Learnt?", (
        ("accuracy", ("update",)),
        ("loss", ("update",)),
        *((metric, ("update",)) for metric in ("reliability", "generalisation")),
        *((metric, ("update",)) for metric in ("portability_one_hop", "portability_inverse", "conflict")),
    )),
    ("Kept?", (
        *((metric, ("retain", "neighbour")) for metric in ("accuracy", "loss", "kl", "agreement")),
        ("fluency", ("unlearn", "update", "retain")),
    )),
    ("Does it last?", (
        *((metric, ("unlearn",)) for metric in ("relearn_own_taught", "relearn_own_others", "relearn_benign")),
        *((metric, ("unlearn",)) for metric in ("relearn_half_steps", "relearn_robustness")),
        *((f"accuracy_{bits}bit", ("unlearn", "update", "retain")) for bits in BITS),
        *((f"quantisation_robustness_{bits}bit", ("unlearn",)) for bits in BITS),
        *((f"prefix_{name}", ("unlearn",)) for name in PREFIXES),
    )),
    ("Score", tuple((metric, ("all",)) for metric in METRICS if metric.startswith("score"))),
)  # fmt: skip

Summary = Mapping[str, Any]
Found = Mapping[tuple[str, str, str], Mapping[str, Any]]  # a row of measures by side, set and metric


def table_blocks(summary: Summary) -> list[tuple[str, list[dict[str, str]]]]:
    """Heading and rows of measure, set, and a cell for each side; rows of which no side has anything are left out."""
    found = found_measures(summary)
    blocks = []
    for heading, entries in TABLE:
        rows = [
            {
                "measure": METRICS[metric].label,
                "set": set_name,
                **{side: cell(found.get((side, set_name, metric))) for side in summary["sides"]},
            }
            for metric, sets in entries
            for set_name in sets
        ]
        rows = [row for row in rows if any(row[side] != NOTHING for side in summary["sides"])]
        if rows:
            blocks.append((heading, rows))
    return blocks or [
        ("nothing was measured", [{"measure": "", "set": "", **dict.fromkeys(summary["sides"], NOTHING)}])
    ]


def found_measures(summary: Summary) -> Found:
    """The rows of measures by side, set and metric."""
    return {(row["side"], row["set"], row["metric"]): row for row in summary["measures"]}


def cell(row: Mapping[str, Any] | None) -> str:
    """ "0.412 [0.380, 0.450]", without an interval where there is none, a dash without a value."""
    if row is None or row["value"] is None:
        return NOTHING
    if row["low"] is None or row["high"] is None:
        return number(row["value"])
    return f"{number(row['value'])} [{number(row['low'])}, {number(row['high'])}]"


def number(value: float) -> str:
    """Three decimals below 1, two below 10, one below 1000, three digits above."""
    size = abs(value)
    decimals = 3 if size < 1 else 2 if size < 10 else 1
    return f"{value:.{decimals}f}" if size < 1000 else f"{value:.3g}"


def score_lines(summary: Summary) -> list[str]:
    """What the score is made of, a line for all models of which it is the same."""
    sides_of: dict[str, list[str]] = {}
    for side, told in summary["score"].items():
        sides_of.setdefault(told["formula"], []).append(side)
    return [f"score of {', '.join(sides)}: {formula}" for formula, sides in sides_of.items()]
