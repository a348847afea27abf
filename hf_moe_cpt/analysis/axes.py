"""Axis arithmetic of the charts: round tick values, their labels, and thinning of long curves. Source: ours."""

import math
from collections.abc import Sequence


def linear_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that lie in [low, high], about `count` of them."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(factor * power for factor in (1, 2, 5, 10) if raw <= factor * power * (1 + 1e-9))
    first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
    digits = 1 - math.floor(math.log10(size))  # 0.1 * 3 is not 0.3
    return [round(i * size, digits) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Decades in [low, high], with their doubles and fives below three decades; linear ticks within one decade."""
    decades = math.log10(high / low)
    if decades < 1:
        return [tick for tick in linear_ticks(low, high) if tick > 0]
    factors = (1, 2, 5) if decades < 3 else (1,)
    stride = max(1, math.ceil(decades / 8))
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**e for e in exponents if e % stride == 0 for factor in factors]
    return [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def format_tick(value: float) -> str:
    """Short label: 1.5M, 20k, 0.25, 1.5e-4."""
    size = abs(value)
    if size == 0:
        return "0"
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= unit and (letter != "k" or size >= 1e4):
            return f"{value / unit:.6g}{letter}"
    if size < 1e-3:
        mantissa, exponent = f"{value:.5e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


def thin(x: Sequence[float], y: Sequence[float], max_points: int) -> tuple[list[float], list[float]]:
    """Keep at most about max_points of a curve: first, lowest, highest and last of equal runs, so spikes survive.

    A run that is all NaN leaves one NaN, so wide gaps survive too.
    """
    if len(x) <= max_points:
        return list(x), list(y)
    num_runs = max(1, max_points // 4)
    kept: list[int] = []
    for run in range(num_runs):
        indices = range(run * len(x) // num_runs, (run + 1) * len(x) // num_runs)
        finite = [i for i in indices if math.isfinite(y[i])]
        if not finite:
            kept.extend(indices[:1])
            continue
        extremes = {finite[0], finite[-1], min(finite, key=y.__getitem__), max(finite, key=y.__getitem__)}
        kept.extend(sorted(extremes))
    return [x[i] for i in kept], [y[i] for i in kept]
