"""Numbers that join several means: R, Q, steps of relearning, and the score, each with its interval.

The subjects of a set are drawn once for all models and questions, so that what moves together is drawn together; sets
are drawn independently. A formula is taken of the means of every draw. Letters: R draws. Source: ours; the formulas
are those of hf_moe_cpt.analysis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from hf_moe_cpt.analysis.bootstrap import Interval, bootstrap_replicates, percentile_interval, ratio_of_sums
from hf_moe_cpt.analysis.robustness import quantisation_stability, relearning_robustness, steps_until
from hf_moe_cpt.analysis.surgery_score import (
    forgetting_part,
    harmonic_mean,
    retained_part,
    robustness_part,
    update_part,
)
from hf_moe_cpt.data.permutation import derive_seed
from hf_moe_cpt.scripts.eval_surgery_robustness import BITS
from hf_moe_cpt.scripts.eval_surgery_values import FORGOTTEN, UNSEEN, UPDATED, Curve, Key, Rows


SCORE_BITS = 4  # of the Q in the score
RETAINED = "retain"
_SETS = (FORGOTTEN, UNSEEN, UPDATED, RETAINED)
PARTS = ("forgetting", "update", "retained", "robustness")
JOINED = ("accuracy", *(f"accuracy_{bits}bit" for bits in BITS), "reliability", "generalisation")


class Joint(NamedTuple):
    """A number, and what it is in each of the R draws; NaN where a draw has none of the rows that it needs."""

    value: float
    replicates: np.ndarray

    def interval(self, confidence: float) -> Interval:
        """Between the percentiles of the draws that have a number; NaN ends where fewer than two do."""
        known = self.replicates[np.isfinite(self.replicates)]
        return percentile_interval(self.value, known if len(known) > 1 else np.full(1, math.nan), confidence)


def joined(formula: Callable[..., float | None], *numbers: Joint) -> Joint:
    """The formula of the numbers, and of their draws place by place; None of a formula is NaN."""
    replicates = [
        _number(formula(*draw)) if all(map(math.isfinite, draw)) else math.nan
        for draw in zip(*(number.replicates.tolist() for number in numbers), strict=True)
    ]
    return Joint(_number(formula(*(number.value for number in numbers))), np.array(replicates))


def joint_means(columns: Mapping[str, Rows], resamples: int, seed: int) -> dict[str, Joint]:
    """The mean of each column and of its share of every draw of the subjects of all columns."""
    subjects = [subject for rows in columns.values() for subject in rows.subjects]
    table = np.zeros((len(subjects), 2))
    found, begin = {}, 0
    for name, rows in columns.items():
        end = begin + len(rows.values)
        table[:] = 0.0
        table[begin:end] = np.stack([rows.values, np.ones(len(rows.values))], axis=1)
        with np.errstate(invalid="ignore"):  # a draw without a row of this column is 0 / 0
            drawn = bootstrap_replicates(table, subjects, resamples, seed, ratio_of_sums)
        found[name] = Joint(float(rows.values.mean()), drawn)
        begin = end
    return found


class JointNumbers:
    """Everything that is made of the means of several columns.

    values, curves: of each model by side, from eval_surgery_values. goal: accuracy that is halfway relearnt, or None.
    """

    def __init__(
        self,
        values: Mapping[str, Mapping[Key, Rows]],
        curves: Mapping[str, Mapping[tuple[str, str], Curve]],
        goal: float | None,
        resamples: int,
        seed: int,
    ) -> None:
        self.goal = goal
        self.steps = {side: own["own", "taught"].steps for side, own in curves.items() if ("own", "taught") in own}
        columns: dict[str, dict[str, Rows]] = {}
        for side, rows_of in values.items():
            for (metric, set_name), rows in rows_of.items():
                if metric in JOINED and set_name in _SETS:
                    columns.setdefault(set_name, {})[f"{side} {metric}"] = rows
        for side in self.steps:
            for place, rows in enumerate(curves[side]["own", "taught"].answers):
                columns.setdefault(FORGOTTEN, {})[f"{side} relearning {place}"] = rows
        self.means = {
            name: joint_means(of_set, resamples, derive_seed("surgery eval", seed, "bootstrap", name))
            for name, of_set in columns.items()
        }

    def robustness_of(self, side: str) -> dict[str, Joint]:
        """R, Q and steps to half relearnt of a model, as far as what they need was measured."""
        found = {}
        gains = {other: self._gain(other) for other in (side, "retrained")}
        if all(gain is not None for gain in gains.values()):
            found["relearn_robustness"] = joined(relearning_robustness, gains[side], gains["retrained"])
        if self.goal is not None and side in self.steps:
            found["relearn_half_steps"] = self._half_steps(side)
        full = self._mean(FORGOTTEN, f"{side} accuracy")
        for bits in BITS:
            rounded = self._mean(FORGOTTEN, f"{side} accuracy_{bits}bit")
            if full is not None and rounded is not None:
                found[f"quantisation_robustness_{bits}bit"] = joined(quantisation_stability, full, rounded)
        return found

    def score_parts_of(self, side: str) -> dict[str, Joint]:
        """The parts of the score that the measurements allow, and `score`, their harmonic mean; {} without any."""
        robust = self.robustness_of(side)
        target = self._mean(FORGOTTEN, "retrained accuracy") or self._mean(UNSEEN, f"{side} accuracy")
        wanted = {
            "forgetting": (forgetting_part, self._mean(FORGOTTEN, f"{side} accuracy"), target),
            "update": (update_part, *(self._mean(UPDATED, f"{side} {n}") for n in ("reliability", "generalisation"))),
            "retained": (retained_part, *(self._mean(RETAINED, f"{other} accuracy") for other in (side, "before"))),
            "robustness": (
                robustness_part,
                robust.get("relearn_robustness"),
                robust.get(f"quantisation_robustness_{SCORE_BITS}bit"),
            ),
        }
        parts = {
            name: joined(formula, *numbers)
            for name, (formula, *numbers) in wanted.items()
            if all(number is not None for number in numbers)
        }
        if parts:
            parts["score"] = joined(lambda *values: harmonic_mean(values), *parts.values())
        return parts

    def _mean(self, set_name: str, name: str) -> Joint | None:
        return self.means.get(set_name, {}).get(name)

    def _gain(self, side: str) -> Joint | None:
        """Accuracy of the taught after relearning - before it."""
        if side not in self.steps:
            return None
        means = self.means[FORGOTTEN]
        last = means[f"{side} relearning {len(self.steps[side]) - 1}"]
        return joined(lambda end, start: end - start, last, means[f"{side} relearning 0"])

    def _half_steps(self, side: str) -> Joint:
        """A draw in which the goal is not reached counts as all steps that were made, the value itself as NaN."""
        steps = self.steps[side]
        means = [self.means[FORGOTTEN][f"{side} relearning {place}"] for place in range(len(steps))]
        found = joined(lambda *values: steps_until(steps, values, self.goal), *means)
        has_draw = np.isfinite(means[0].replicates)
        return found._replace(
            replicates=np.where(has_draw & np.isnan(found.replicates), float(steps[-1]), found.replicates)
        )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
