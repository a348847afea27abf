"""Confidence intervals by the bootstrap, for any statistic of rows that come in groups.

Questions about one subject are not independent: whole groups (subjects) are drawn with replacement, as many as there
are, with all of their rows. The interval lies between the percentiles of the statistic over many such draws.

Letters: N rows, G groups, R resamples. Source: Efron 1979; the cluster bootstrap as in Davison and Hinkley 1997,
"Bootstrap Methods and their Application", section 3.8.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hf_moe_cpt.analysis.columns import Column, read_numbers


Statistic = Callable[[np.ndarray], float]
TwoSampleStatistic = Callable[[np.ndarray, np.ndarray], float]

RESAMPLES = 2000
_DRAWN_AT_ONCE = 2**20  # group numbers, 8 MiB


class Interval(NamedTuple):
    """A value and its confidence interval; both ends are NaN where a single group leaves nothing to draw from."""

    value: float
    low: float
    high: float


def ratio_of_sums(totals: np.ndarray) -> float:
    """Sum of the first column over sum of the second, of rows (N, 2): a mean over tokens from totals of texts."""
    return float(totals[:, 0].sum() / totals[:, 1].sum())


def bootstrap_interval(
    values: Column | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    statistic: Statistic = np.mean,
) -> Interval:
    """The statistic of the rows and its percentile interval.

    values: (N,) or (N, D), a row for each question or text, finite. groups: (N,) names of what rows belong to, such as
    their subjects; None if every row stands for itself. statistic: of rows, (n,) or (n, D) -> number; n varies with
    the groups drawn.
    """
    rows = _read_rows("values", values)
    replicates = bootstrap_replicates(rows, groups, resamples, seed, statistic)
    return percentile_interval(float(statistic(rows)), replicates, confidence)


def bootstrap_difference(
    after: Column | np.ndarray,
    before: Column | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    statistic: Statistic = np.mean,
) -> Interval:
    """statistic(after) - statistic(before) of the same rows, paired: both are drawn together. As `bootstrap_interval`.

    after, before: (N,) or (N, D), row by row the same question or text.
    """
    pair = {name: _read_rows(name, values) for name, values in (("after", after), ("before", before))}
    if pair["after"].shape != pair["before"].shape:
        raise ValueError(
            f"after has shape {pair['after'].shape} and before {pair['before'].shape}: pairs need the same rows."
        )
    rows = np.stack(list(pair.values()), axis=-1)  # (N, [D,] 2)

    def difference(drawn: np.ndarray) -> float:
        return float(statistic(drawn[..., 0])) - float(statistic(drawn[..., 1]))

    if statistic is np.mean and rows.ndim == 2:
        return bootstrap_interval(rows[:, 0] - rows[:, 1], groups, confidence, resamples, seed)
    return bootstrap_interval(rows, groups, confidence, resamples, seed, difference)


def bootstrap_two_samples(
    first: Column | np.ndarray,
    second: Column | np.ndarray,
    statistic: TwoSampleStatistic,
    first_groups: Sequence[Hashable] | None = None,
    second_groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """A statistic of two independent samples, such as `membership.auc`; each is drawn on its own.

    first, second: (N,) and (M,), or (N, D) and (M, D). Both ends are NaN where either sample is a single group.
    """
    samples = [_read_rows("first", first), _read_rows("second", second)]
    value = float(statistic(*samples))
    members = [
        _members(name, groups, len(rows))
        for name, groups, rows in zip(
            ("first_groups", "second_groups"), (first_groups, second_groups), samples, strict=True
        )
    ]
    if min(map(len, members)) < 2:
        return percentile_interval(value, np.full(1, math.nan), confidence)
    streams = np.random.default_rng(seed).spawn(2)
    drawn = [_drawn_rows(member, resamples, stream) for member, stream in zip(members, streams, strict=True)]
    replicates = [statistic(samples[0][ours], samples[1][theirs]) for ours, theirs in zip(*drawn, strict=True)]
    return percentile_interval(value, np.array(replicates, dtype=np.float64), confidence)


def bootstrap_replicates(
    values: Column | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    statistic: Statistic = np.mean,
) -> np.ndarray:
    """(R,) the statistic over resamples, NaN throughout with a single group; arguments of `bootstrap_interval`.

    For a formula of several numbers: replicates of independent sets, each with its own seed, go through it place by
    place, and `percentile_interval` takes the result.
    """
    rows = _read_rows("values", values)
    members = _members("groups", groups, len(rows))
    _check_resamples(resamples)
    if len(members) < 2:
        return np.full(resamples, math.nan)
    stream = np.random.default_rng(seed)
    if (statistic is np.mean and rows.ndim == 1) or (statistic is ratio_of_sums and rows.ndim == 2):
        totals = np.stack([rows, np.ones(len(rows))], axis=1) if rows.ndim == 1 else rows
        sums = np.array([totals[member].sum(axis=0) for member in members])  # (G, 2): no row is touched again
        parts = [sums[drawn].sum(axis=1) for drawn in _draws(len(members), resamples, stream)]
        above, below = np.concatenate(parts).T
        return above / below
    return np.array([statistic(rows[drawn]) for drawn in _drawn_rows(members, resamples, stream)], dtype=np.float64)


def percentile_interval(value: float, replicates: np.ndarray, confidence: float = 0.95) -> Interval:
    """`value` between the percentiles (1 - confidence) / 2 and (1 + confidence) / 2 of the replicates (R,)."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie in (0, 1), such as 0.95.")
    low, high = np.quantile(replicates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))


def mean_intervals(
    columns: Mapping[str, Column | np.ndarray],
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, float]:
    """Of each column (N,) its mean as `name`, and the ends of its interval as `name_low` and `name_high`."""
    found: dict[str, float] = {}
    for name, column in columns.items():
        value, low, high = bootstrap_interval(column, groups, confidence, resamples, seed)
        found |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return found


def _read_rows(name: str, values: Column | np.ndarray) -> np.ndarray:
    rows = read_numbers(name, values)
    if rows.ndim == 0 or len(rows) == 0:
        raise ValueError(f"{name} must have at least one row, got shape {rows.shape}.")
    return rows


def _members(name: str, groups: Sequence[Hashable] | None, num_rows: int) -> list[np.ndarray]:
    """Row numbers of each group, groups in the order in which they first appear."""
    if groups is None:
        return list(np.arange(num_rows)[:, None])
    if len(groups) != num_rows:
        raise ValueError(f"{name} has {len(groups)} entries for {num_rows} rows: name the group of each row.")
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    return [np.array(rows) for rows in members.values()]


def _draws(num_groups: int, resamples: int, stream: np.random.Generator) -> Iterator[np.ndarray]:
    """(r, G) group numbers, R rows in all, a chunk at a time."""
    at_once = max(1, _DRAWN_AT_ONCE // num_groups)
    for begin in range(0, resamples, at_once):
        yield stream.integers(num_groups, size=(min(at_once, resamples - begin), num_groups))


def _drawn_rows(members: Sequence[np.ndarray], resamples: int, stream: np.random.Generator) -> Iterator[np.ndarray]:
    """Row numbers of each resample."""
    _check_resamples(resamples)
    for chunk in _draws(len(members), resamples, stream):
        for drawn in chunk:
            yield np.concatenate([members[group] for group in drawn])


def _check_resamples(resamples: int) -> None:
    if resamples < 1:
        raise ValueError(f"resamples={resamples} must be at least 1; 2000 is usual.")
