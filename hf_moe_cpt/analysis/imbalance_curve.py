"""MRI by training step as the analysis shows it: mean over layers, its ideal, and how long a shift was felt.

Letters: L MoE layers, K experts per token, E routed experts. Source: Thérien et al. 2025 (arXiv 2503.05029) for MRI;
what counts as recovered is ours (routing.py).
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from hf_moe_cpt.analysis.routing import imbalance_around_shift


def imbalance_curve(
    name: str,
    steps: Sequence[int],
    layers: Sequence[Sequence[float]],
    *,
    ideal: float,
    shift_step: int | None = None,
    tolerance: float = 0.05,
) -> dict[str, Any]:
    """An entry of "training" in the dictionary of `analyse_traces`.

    steps: rising optimizer steps. layers: for each layer the MRI at each of them. ideal: K/E. shift_step: first step
    on the new text, None without a shift. `recovery_step` counts optimizer steps after the shift until the mean over
    layers stays within `tolerance` of its level before; None if it never does or nothing came before.
    """
    if not steps or not layers or any(len(layer) != len(steps) for layer in layers):
        raise ValueError(
            f"{name}: {len(steps)} steps and layers of {sorted({len(layer) for layer in layers})} values: give every "
            "layer one value a step."
        )
    if any(later <= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
        raise ValueError(f"{name}: steps must rise, and do not: sort the log and drop what was logged twice.")
    mean = [statistics.fmean(values) for values in zip(*layers, strict=True)]
    recovery = None
    if shift_step is not None:
        cut = bisect_left(steps, shift_step)
        if 0 < cut < len(steps):
            points = imbalance_around_shift(mean[:cut], mean[cut:], tolerance).recovery_step
            recovery = None if points is None else steps[cut + points] - shift_step
    return {
        "name": name,
        "steps": list(steps),
        "layers": [list(layer) for layer in layers],
        "mean": mean,
        "ideal": ideal,
        "shift_step": shift_step,
        "recovery_step": recovery,
    }
