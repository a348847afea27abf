"""Notice a policy that runs away: chosen text becomes unlikely, or longer text is preferred than the data prefers.

Log-probabilities are nats per token. Source: the regimes that blow up in the paper's own runs, docs/rainbowpo.md.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping


logger = logging.getLogger(__name__)

WINDOW = 3  # logs that are averaged before they are compared
MAX_FALL = 1.0  # nats per token: every chosen token e times less likely than at the first log
MAX_GROWTH = 1.3  # length of what the policy prefers / length of what the data prefers, beyond that of the first log


class RunawayWatch:
    """Compares the mean of the latest training logs with that of the first, and warns once about each of the two."""

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        self._logs: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._said: set[str] = set()

    def look(self, metrics: Mapping[str, float]) -> list[str]:
        """Warn about what runs away in a training log; returns the new warnings."""
        if "logps_norm/chosen" not in metrics:
            return []
        ratio = metrics["length/preferred"] / max(metrics["length/chosen"], 1.0)
        self._logs.append({"chosen": metrics["logps_norm/chosen"], "length": ratio})
        if len(self._logs) < WINDOW:
            return []
        now = {name: sum(log[name] for log in self._logs) / WINDOW for name in ("chosen", "length")}
        self._first = self._first or now
        found = {
            "chosen": self._first["chosen"] - now["chosen"] > MAX_FALL,
            "length": now["length"] > MAX_GROWTH * max(1.0, self._first["length"]),
        }
        new = [name for name, is_found in found.items() if is_found and name not in self._said]
        self._said.update(new)
        warnings = [self._message(name, now[name]) for name in new]
        for warning in warnings:
            logger.warning(warning)
        return warnings

    def _message(self, name: str, value: float) -> str:
        if name == "chosen":
            return (
                f"The chosen completions fell from {self._first['chosen']:.2f} to {value:.2f} nats per token: the "
                "policy forgets how to write what it should prefer. Lower the learning rate, raise beta, or set "
                "sft_weight (0.05 to 0.1)."
            )
        return (
            f"The policy prefers completions {value:.2f} times as long as the chosen ones: it may stop ending its "
            "text. With length_normalization raise beta (10 or more) and lower home_advantage; without it, turn it on."
        )
