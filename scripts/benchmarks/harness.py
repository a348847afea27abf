"""What the benchmarks share: a stopwatch, peak memory, failures as lines, numbers of a table.

Method: docs/benchmarks/README.md. Source: ours.
"""

from __future__ import annotations

import importlib
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.hf_argparser import HfArg
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe_cpt.machine import synchronize


FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any GPU
MEBIBYTE, GIBIBYTE = 2**20, 2**30
MIN_REPEATS, MAX_REPEATS = 3, 500
_REASON_LENGTH = 300


class Unavailable(Exception):
    """What was asked for cannot be done here; the message says why."""


class Attempt:
    """`with Attempt() as attempt:` turns an error of the block into `attempt.reason`, one line, and goes on after it.

    For code that is other people's and fails in ways nobody can list: a missing package, memory, a compiler. Whoever
    interrupts the run ends it.
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


@dataclass
class BenchmarkArguments:
    """What every benchmark is told."""

    device: str = HfArg(default="auto", help="auto, cpu, cuda; auto takes cuda where there is one.")
    output_dir: str = HfArg(default="runs/benchmark", help="Folder for the results.")
    commit: str | None = HfArg(default=None, help="Written into the results in place of git's answer.")

    def check_least(self, least_of: Mapping[str, float]) -> None:
        """Raise ValueError for the first number below its least."""
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least {least}.")


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


def check_registered(experts: str) -> None:
    """Raise Unavailable for an experts implementation that transformers does not know."""
    if experts != "eager" and experts not in ALL_EXPERTS_FUNCTIONS:
        raise Unavailable(f"{experts!r} is not registered with transformers' experts interface")


def refuse_fallback(modules: Iterable[torch.nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Raise Unavailable where ours would run through grouped_mm, whose time must not stand under our name."""
    implementation = importlib.import_module("hf_moe_cpt.kernels.experts_interface")
    for module in modules:
        if (reason := implementation.why_unsupported(module, device, dtype)) is not None:
            raise Unavailable(f"our experts would fall back to grouped_mm: {reason}")


def middle(values: Sequence[float]) -> float | None:
    """Median, None for no values."""
    return statistics.median(values) if values else None


class StepClock(TrainerCallback):
    """Seconds of each step of a `Trainer` after so many that do not count, the device being idle at both ends."""

    def __init__(self, device: torch.device, warmup: int) -> None:
        self.device, self.warmup = device, warmup
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        synchronize(self.device)
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        synchronize(self.device)
        if state.global_step > self.warmup:
            self.seconds.append(time.perf_counter() - self._started)
