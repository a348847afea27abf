"""Whether forgetting lasts: does the knowledge return by training a little, or by rounding the weights?

R and Q compare a value of the model before and after an attack. The value is one that knowledge raises, such as the
accuracy on the forgotten questions.

Source: R and Q are OpenUnlearning's (arXiv 2506.12618); Q in the symmetric form of the Unlearning Depth Score
(2605.24614), which punishes a value that falls as one that rises. Relearning steps are ours.
"""

import math
from collections.abc import Sequence

from hf_moe_cpt.analysis.columns import read_column


def steps_until(steps: Sequence[float], values: Sequence[float], goal: float) -> float | None:
    """Steps of relearning until `values` first reach the goal, between measurements in a straight line.

    steps: (n,) ascending, the first before any training. values: (n,) measured there. 0 where the goal was reached
    from the start, None where it never is.
    """
    places = read_column("steps", steps)
    measured = read_column("values", values, num_rows=len(places))
    if (places[1:] <= places[:-1]).any():
        raise ValueError(f"steps must ascend, got {places.tolist()}.")
    if measured[0] >= goal:
        return 0.0
    for place in range(1, len(places)):
        if measured[place] >= goal:
            share = (goal - measured[place - 1]) / (measured[place] - measured[place - 1])
            return float(places[place - 1] + share * (places[place] - places[place - 1]))
    return None


def relearning_robustness(gain: float, gain_retrained: float) -> float:
    """R = min(gain_retrained / gain, 1) in [0, 1]; 1: relearns no faster than a model that never knew.

    gain: what the value of the unlearned model rose by in a relearning attack; gain_retrained: the same of a model
    that was trained without the texts. Where nothing came back (gain <= 0) R is 1; where only the unlearned model
    gained, 0.
    """
    _check_finite(gain=gain, gain_retrained=gain_retrained)
    return 1.0 if gain <= 0 else min(max(gain_retrained, 0.0) / gain, 1.0)


def quantisation_stability(before: float, after: float) -> float:
    """Q = 1 - |after - before| / (|after| + |before|) in [0, 1]; 1: rounding the weights changes nothing.

    before, after: the value with full and with rounded weights, both at least 0. Both 0 gives 1.
    """
    _check_finite(before=before, after=after)
    if min(before, after) < 0:
        raise ValueError(f"before={before} and after={after} must be at least 0, such as accuracies.")
    return 1.0 if before == after else 1 - abs(after - before) / (after + before)


def _check_finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} must be finite.")
