"""Tokens and model FLOPs per second between two logs, without evaluation and saving. Source: ours."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class ThroughputMeter:
    """Wall-clock rate of training steps; `pause` takes the time of evaluation and saving out.

    The rate is honest on an accelerator although nothing waits for it here: `pop` is called when the loss has just
    been read, which waits for every step that it averages.
    """

    def __init__(self, tokens_per_step: int, flops_per_token: float, num_devices: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.num_devices = num_devices
        self._since: float | None = None
        self._steps = 0
        self._paused = 0.0
        self._pauses = 0

    def begin(self) -> None:
        """Start the clock if it does not run yet."""
        if self._since is None:
            self._since = time.perf_counter()

    def end_step(self) -> None:
        """Count one optimizer step."""
        self._steps += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside does not count; may be nested."""
        began = time.perf_counter()
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if self._pauses == 0 and self._since is not None:
                self._paused += time.perf_counter() - began

    def pop(self) -> dict[str, float]:
        """`tokens_per_second` over all devices and `model_tflops` (TFLOP/s of each device) since the last call."""
        if self._since is None or self._steps == 0:
            return {}
        seconds = max(time.perf_counter() - self._since - self._paused, 1e-9)
        rate = self._steps * self.tokens_per_step / seconds
        self._since, self._steps, self._paused = time.perf_counter(), 0, 0.0
        return {
            "tokens_per_second": round(rate, 1),
            "model_tflops": rate * self.flops_per_token / self.num_devices / 1e12,
        }
