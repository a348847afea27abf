"""From the raw measurements of up to three models to numbers with intervals, warnings, and what is missing.

`summarise` gives plain data, as JSON holds it:

    sides        names of the models that were measured
    confidence   of all intervals: percentiles of a bootstrap over subjects
    measures     rows of side, set, metric, value, low, high, n (questions or texts); the metrics are explained in
                 eval_surgery_definitions.py. None where a number does not exist, such as an interval of one subject
    curves       rows of side, training, asked, step, accuracy, low, high: relearning
    score        of each side the formula of its score and the parts that are left out
    chance       accuracy of guessing on unlearn, or None
    warnings     lines about over-forgetting
    missing      lines about what could not be computed, and why

Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from hf_moe_cpt.analysis.bootstrap import (
    RESAMPLES,
    Interval,
    bootstrap_interval,
    bootstrap_two_samples,
    ratio_of_sums,
)
from hf_moe_cpt.analysis.membership import auc, is_over_forgotten, privacy_leakage
from hf_moe_cpt.analysis.surgery_score import surgery_score
from hf_moe_cpt.scripts.eval_surgery import SIDES
from hf_moe_cpt.scripts.eval_surgery_joint import PARTS, JointNumbers
from hf_moe_cpt.scripts.eval_surgery_missing import missing_lines
from hf_moe_cpt.scripts.eval_surgery_table import ALL_SETS
from hf_moe_cpt.scripts.eval_surgery_values import (
    FORGOTTEN,
    UNSEEN,
    Key,
    Rows,
    chance_of,
    curves_of,
    membership_scores,
    values_of,
)


Raw = Mapping[str, Any]
Summary = dict[str, Any]
LEAKAGE_SCORE = "auc_min_k"  # MUSE's


def summarise(
    before: Raw | None = None,
    after: Raw | None = None,
    retrained: Raw | None = None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Summary:
    """Everything that is printed and written. before, after, retrained: from `evaluate_model`, at least one."""
    raws = {side: raw for side, raw in zip(SIDES, (before, after, retrained), strict=True) if raw is not None}
    if not raws:
        raise ValueError("nothing to summarise: give the measurements of before, after or retrained.")
    return _Summing(raws, confidence, seed, resamples).summary()


class _Summing:
    """One call of `summarise`."""

    def __init__(self, raws: dict[str, Raw], confidence: float, seed: int, resamples: int) -> None:
        self.raws, self.confidence, self.seed, self.resamples = raws, confidence, seed, resamples
        self.values: dict[str, dict[Key, Rows]] = {}
        self.refused: dict[str, dict[Key, str]] = {}
        for side, raw in raws.items():
            self.values[side], self.refused[side] = values_of(raw)
        self.chance = next((chance for raw in raws.values() if (chance := chance_of(raw)) is not None), None)
        self.curves = {side: curves_of(raw) for side, raw in raws.items()}
        self.joint = JointNumbers(self.values, self.curves, self._half_way(), resamples, seed)
        self.measures: list[dict[str, Any]] = []

    def summary(self) -> Summary:
        score = {}
        for side in self.raws:
            for (metric, set_name), rows in self.values[side].items():
                self._add(side, set_name, metric, self._mean(rows), len(rows.values))
            self._compare_with_unseen(side)
            for metric, number in self.joint.robustness_of(side).items():
                name = "relearn_own_taught" if metric.startswith("relearn") else "accuracy"
                count = len(self.values[side][name, FORGOTTEN].values)
                self._add(side, FORGOTTEN, metric, number.interval(self.confidence), count)
            score[side] = self._score(side)
        return {
            "format": 1,
            "sides": list(self.raws),
            "confidence": self.confidence,
            "chance": self.chance,
            "measures": self.measures,
            "curves": list(self._curve_rows()),
            "score": {side: found for side, found in score.items() if found is not None},
            "warnings": self._warnings(),
            "missing": missing_lines(self.raws, self.refused, self.measures),
        }

    def _half_way(self) -> float | None:
        """The accuracy on unlearn halfway from chance to the model before surgery."""
        known = self.values.get("before", {}).get(("accuracy", FORGOTTEN))
        return None if known is None or self.chance is None else float(self.chance + known.values.mean()) / 2

    def _add(self, side: str, set_name: str, metric: str, interval: Interval, count: int | None) -> None:
        value, low, high = (float(number) if math.isfinite(number) else None for number in interval)
        row = {"side": side, "set": set_name, "metric": metric, "value": value, "low": low, "high": high, "n": count}
        self.measures.append(row)

    def _mean(self, rows: Rows) -> Interval:
        statistic = np.mean if rows.values.ndim == 1 else ratio_of_sums
        return bootstrap_interval(rows.values, rows.subjects, self.confidence, self.resamples, self.seed, statistic)

    def _compare_with_unseen(self, side: str) -> None:
        """Membership inference, privacy leakage, and how far the loss lies above that on unseen texts."""
        loss = [self.values[side].get(("loss", name)) for name in (FORGOTTEN, UNSEEN)]
        if all(loss):
            self._two_samples(side, "loss_gap", *loss, lambda ours, theirs: float(ours.mean() - theirs.mean()))
        scores = self._scores(side)
        if not scores and all(self.raws[side].get("texts", {}).get(name) for name in (FORGOTTEN, UNSEEN)):
            self.refused[side]["auc_loss", FORGOTTEN] = "the loss of a text is not finite."
        for metric, pair in scores.items():
            self._two_samples(side, metric, *pair, auc)
        oracle = self._scores("retrained")
        if side != "retrained" and LEAKAGE_SCORE in scores and LEAKAGE_SCORE in oracle:
            pairs = [_side_by_side(*rows) for rows in zip(scores[LEAKAGE_SCORE], oracle[LEAKAGE_SCORE], strict=True)]
            if all(pair is not None for pair in pairs):
                self._two_samples(side, "privacy_leakage", *pairs, _leakage)

    def _scores(self, side: str) -> dict[str, tuple[Rows, Rows]]:
        """Membership scores of unlearn and unseen by metric, as far as all of them are finite."""
        if not all(("loss", name) in self.values.get(side, {}) for name in (FORGOTTEN, UNSEEN)):
            return {}
        ours, theirs = (membership_scores(self.raws[side], name) for name in (FORGOTTEN, UNSEEN))
        return {name: (ours[name], theirs[name]) for name in ours}

    def _two_samples(
        self, side: str, metric: str, ours: Rows, theirs: Rows, statistic: Callable[[np.ndarray, np.ndarray], float]
    ) -> None:
        interval = bootstrap_two_samples(
            ours.values,
            theirs.values,
            statistic,
            ours.subjects,
            theirs.subjects,
            self.confidence,
            self.resamples,
            self.seed,
        )
        self._add(side, FORGOTTEN, metric, interval, len(ours.values) + len(theirs.values))

    def _score(self, side: str) -> dict[str, Any] | None:
        parts = self.joint.score_parts_of(side)
        if not parts:
            return None
        for name, number in parts.items():
            metric = name if name == "score" else f"score_{name}"
            self._add(side, ALL_SETS, metric, number.interval(self.confidence), None)
        found = surgery_score(**{name: parts[name].value for name in PARTS if name in parts})
        has_oracle = ("accuracy", FORGOTTEN) in self.values.get("retrained", {})
        target = "of the retrained model" if has_oracle else "on unseen"
        told = f"; target: accuracy {target}" if "forgetting" in parts else ""
        return {"formula": found.formula + told, "left_out": list(found.left_out)}

    def _curve_rows(self) -> Iterator[dict[str, Any]]:
        for side, curves in self.curves.items():
            for (training, who), curve in curves.items():
                for step, answers in zip(curve.steps, curve.answers, strict=True):
                    value, low, high = (float(n) if math.isfinite(n) else None for n in self._mean(answers))
                    row = {"side": side, "training": training, "asked": who, "step": step}
                    yield row | {"accuracy": value, "low": low, "high": high, "n": len(answers.values)}

    def _warnings(self) -> list[str]:
        """Over-forgetting of the model after surgery that cannot be chance."""
        lines = []
        for metric, side_of_line in (
            ("loss_gap", "the loss on unlearn lies above that on unseen texts by {} nats"),
            *((name, f"membership AUC ({name.removeprefix('auc_')}) is {{}}, below 1/2") for name in _AUCS),
        ):
            row, oracle = (self._find(side, metric) for side in ("after", "retrained"))
            if row is None or row["low"] is None:
                continue
            is_beyond = row["low"] > 0 if metric == "loss_gap" else is_over_forgotten(row["high"])
            if is_beyond:
                value = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
                beside = "" if oracle is None else f"; retrained: {oracle['value']:.3f}"
                lines.append(f"after is over-forgotten: {side_of_line.format(value)}{beside}")
        return lines

    def _find(self, side: str, metric: str) -> dict[str, Any] | None:
        rows = (row for row in self.measures if row["side"] == side and row["metric"] == metric)
        return next((row for row in rows if row["value"] is not None), None)


_AUCS = ("auc_loss", "auc_zlib", "auc_min_k", "auc_min_k_plus_plus")


def _leakage(ours: np.ndarray, theirs: np.ndarray) -> float:
    return privacy_leakage(auc(ours[:, 0], theirs[:, 0]), auc(ours[:, 1], theirs[:, 1]))


def _side_by_side(ours: Rows, oracle: Rows) -> Rows | None:
    """(N, 2) values of the same texts by two models, None if they did not read the same."""
    if ours.subjects != oracle.subjects:
        return None
    return Rows(np.stack([ours.values, oracle.values], axis=1), ours.subjects)
