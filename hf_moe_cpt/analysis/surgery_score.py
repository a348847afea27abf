"""One number for a surgery: the harmonic mean of what was forgotten, updated, retained, and of how long it lasts.

A harmonic mean is 0 as soon as one part is, so nothing can be bought with something else. A part that was not measured
is left out and named; scores of different parts are not comparable.

Source: ours; R and Q of the last part are OpenUnlearning's (arXiv 2506.12618).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass


PART_FORMULAS = {
    "forgetting": "1 - |accuracy on unlearn - target|",
    "update": "reliability x generalisation",
    "retained": "min(retain after / retain before, 1)",
    "robustness": "R x Q",
}


@dataclass(frozen=True)
class SurgeryScore:
    """value: the harmonic mean of `parts`, in [0, 1]. left_out: names of the parts that were not measured."""

    value: float
    parts: dict[str, float]
    left_out: tuple[str, ...]

    @property
    def formula(self) -> str:
        """What was computed, to be printed beside the value."""
        inside = ", ".join(f"{name}: {PART_FORMULAS[name]}" for name in self.parts)
        missing = f"; not measured and left out: {', '.join(self.left_out)}" if self.left_out else ""
        return f"harmonic mean of ({inside}){missing}"


def surgery_score(
    *,
    forgetting: float | None = None,
    update: float | None = None,
    retained: float | None = None,
    robustness: float | None = None,
) -> SurgeryScore:
    """The headline score of the parts that were measured, each in [0, 1]; None for one that was not."""
    given = {"forgetting": forgetting, "update": update, "retained": retained, "robustness": robustness}
    parts = {name: _share(name, value) for name, value in given.items() if value is not None}
    if not parts:
        raise ValueError(f"no part was measured: give at least one of {', '.join(PART_FORMULAS)}.")
    left_out = tuple(name for name in given if name not in parts)
    return SurgeryScore(harmonic_mean(parts.values()), parts, left_out)


def forgetting_part(accuracy: float, target: float) -> float:
    """1 - |accuracy - target| in [0, 1]: how near the accuracy on forgotten questions is to where it should be.

    target: the accuracy of a model that was trained without the texts, on the same questions; where there is none,
    that of the model itself on `unseen`. Below the target is as wrong as above.
    """
    return 1 - abs(_share("accuracy", accuracy) - _share("target", target))


def update_part(reliability: float, generalisation: float) -> float:
    """reliability x generalisation in [0, 1]: share of new answers that arrive, plainly asked and in other words."""
    return _share("reliability", reliability) * _share("generalisation", generalisation)


def retained_part(after: float, before: float) -> float:
    """min(after / before, 1) in [0, 1]: what is left of the accuracy on retained questions; 1 if it was 0 before."""
    after, before = _share("after", after), _share("before", before)
    return 1.0 if before == 0 else min(after / before, 1.0)


def robustness_part(relearning: float, quantisation: float) -> float:
    """R x Q in [0, 1] of `robustness.relearning_robustness` and `robustness.quantisation_stability`."""
    return _share("relearning", relearning) * _share("quantisation", quantisation)


def harmonic_mean(values: Iterable[float]) -> float:
    """Of values of at least 0; 0 if one of them is 0."""
    read = list(values)
    if not read or not all(math.isfinite(value) and value >= 0 for value in read):
        raise ValueError(f"a harmonic mean needs finite values of at least 0, got {read}.")
    return len(read) / sum(1 / value for value in read) if min(read) > 0 else 0.0


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must lie in [0, 1].")
    return float(value)
