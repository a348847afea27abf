"""What the benchmarks share: a stopwatch, peak memory, failures kept as text, facts of the machine, tables and plots.

A measurement that fails must not end a run of many: `Attempt` keeps its reason. Method: docs/benchmarks/README.md.
Source: ours.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch

from hf_moe_cpt.machine import synchronize


FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any GPU
MEBIBYTE, GIBIBYTE = 2**20, 2**30
MIN_REPEATS, MAX_REPEATS = 3, 500
_REASON_LENGTH = 300


class Unavailable(Exception):
    """What was asked for cannot be measured here; the message says why."""


class Attempt:
    """`with Attempt() as attempt:` turns an error of the block into `attempt.reason`, one line, and goes on after it.

    Measured code is other people's and fails in ways nobody can list: a missing package, memory, a compiler. Every
    reason ends up in the results. Whoever interrupts the run ends it.
    """

    def __init__(self) -> None:
        self.reason: str | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self.reason = one_line(error)
        return True


def one_line(error: Exception) -> str:
    """The message as a short single line, led by the kind of error unless it is a plain refusal."""
    message = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        wanted = re.search(r"allocate [\d.]+ \w+", message)
        message = f"out of memory: tried to {wanted[0]}" if wanted else "out of memory"
    elif not (type(error) in (Unavailable, ValueError) and message):
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    return message if len(message) <= _REASON_LENGTH else f"{message[:_REASON_LENGTH]} ..."


class Stopwatch:
    """Median milliseconds of a call that begins with a cold L2 cache: CUDA events, or the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.flush = torch.zeros(FLUSH_BYTES, dtype=torch.uint8, device=device) if self.on_gpu else None

    def milliseconds(self, run: Callable[[], Any], seconds: float) -> float:
        """Time `run` as often as fits into about `seconds`, 3 to 500 times, after one call that does not count."""
        run()
        guess = self._times(run, 1)[0]
        budget = 1000 * seconds / max(guess, 1e-3)
        return statistics.median(self._times(run, max(MIN_REPEATS, min(MAX_REPEATS, round(budget)))))

    def _times(self, run: Callable[[], Any], repeats: int) -> list[float]:
        if not self.on_gpu:
            return [self.wall_seconds(run) * 1000 for _ in range(repeats)]
        begins, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
        for begin, end in zip(begins, ends, strict=True):
            self.flush.zero_()
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True)]

    def wall_seconds(self, run: Callable[[], Any]) -> float:
        """Seconds of one call as its caller waits for it."""
        synchronize(self.device)
        started = time.perf_counter()
        run()
        synchronize(self.device)
        return time.perf_counter() - started


def extra_peak_mebibytes(run: Callable[[], Any], device: torch.device) -> float | None:
    """Most memory that one call holds above what was held before it; None where it cannot be read, on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MEBIBYTE


def middle(values: Sequence[float]) -> float | None:
    """Median, None for no values."""
    return statistics.median(values) if values else None


def with_range(values: Sequence[float], digits: int) -> str | None:
    """ "median (least-most)" with so many digits after the point, None for no values."""
    if not values:
        return None
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def rounded(value: float | None, digits: int) -> str | None:
    """A number as text with so many digits after the point; None stays None."""
    return None if value is None or math.isnan(value) else f"{value:.{digits}f}"


def plotting(path: Path) -> ModuleType | None:
    """matplotlib.pyplot set up to write files, or None after a line that says why `path` will not be written."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        print(f"no plot {path}: it needs matplotlib (pip install matplotlib); {one_line(error)}")
        return None


def grouped_bars(axes: Any, groups: Sequence[str], bars: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Bars of medians with whiskers from least to most, side by side in each group.

    axes: of matplotlib. bars: for each label the values of each group; a group that is missing leaves a gap.
    """
    width = 0.8 / max(1, len(bars))
    for number, (label, values_of_group) in enumerate(bars.items()):
        present = [(place, values_of_group[group]) for place, group in enumerate(groups) if values_of_group.get(group)]
        centers = [place + (number - (len(bars) - 1) / 2) * width for place, _ in present]
        medians = [statistics.median(values) for _, values in present]
        below = [median - min(values) for median, (_, values) in zip(medians, present, strict=True)]
        above = [max(values) - median for median, (_, values) in zip(medians, present, strict=True)]
        axes.bar(centers, medians, width, yerr=[below, above], label=label, error_kw={"elinewidth": 0.8})
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
