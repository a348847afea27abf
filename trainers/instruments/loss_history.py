"""Which losses are bad: no number, or far above the last ones. Source: ours; the rule is the usual z-score.

A loss is a spike if it exceeds m + k * max(s, m / 1000), m and s being mean and standard deviation of the last n good
losses, k `spike_sigmas` and n `window`; the least s keeps a loss that hardly moves from making every step a spike.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable


LEAST_LOSSES = 8  # before so many are known nothing is a spike
LEAST_SPREAD = 1e-3  # of the mean


class LossHistory:
    """The last good losses of optimizer steps, oldest first.

    spike_sigmas: 0 finds no spikes. window: number of losses that are compared with.
    """

    def __init__(self, spike_sigmas: float, window: int, losses: Iterable[float] = ()) -> None:
        self.spike_sigmas = spike_sigmas
        self.losses = deque(losses, maxlen=window)

    def harm(self, loss: float, grad_norm: float) -> str | None:
        """What is bad about a step, or None."""
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"its gradient norm is {grad_norm}"
        if not self.spike_sigmas or len(self.losses) < LEAST_LOSSES:
            return None
        mean = statistics.fmean(self.losses)
        spread = max(statistics.pstdev(self.losses, mean), LEAST_SPREAD * abs(mean))
        excess = (loss - mean) / spread if spread else 0.0
        if excess <= self.spike_sigmas:
            return None
        return (
            f"its loss {loss:.4g} lies {excess:.1f} standard deviations above the last {len(self.losses)} ({mean:.4g})"
        )

    def add(self, loss: float) -> None:
        """Note the loss of a good step."""
        self.losses.append(loss)
