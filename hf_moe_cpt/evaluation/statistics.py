"""Intervals: of any statistic of rows in groups, and of how often a policy agrees with people.

Bootstrap: questions about one subject are not independent, so whole groups (subjects) are drawn with replacement, as
many as there are, with all of their rows; the interval lies between the percentiles of the statistic over many draws.
Of a share those percentiles fall together where all rows agree, and 10 of 10 would be certain: it gets Wilson's for as
many independent trials as would vary as much as the draws do, n = p (1 - p) / variance (Korn and Graubard 1998,
"Confidence intervals for proportions with small expected number of positive counts estimated from survey data"), and
for the number of groups where nothing varies.
Letters: N rows, G groups, R resamples. Source: Efron 1979; the cluster bootstrap as in Davison and Hinkley 1997,
"Bootstrap Methods and their Application", section 3.8.

Preference accuracy: N pairs; w (N,) outcomes, 1 where the chosen answer wins, 0 where it loses, 1/2 for a tie; d (N,)
length of the chosen minus length of the rejected answer. Log-probabilities are in nats, sums over an answer's tokens.
Length control is a logistic regression in the spirit of the length-controlled win rate of AlpacaEval 2 (Dubois et al.
2024, arXiv 2404.04475): P(win | d) = sigmoid(theta + gamma tanh(d / s)), s the root mean square of d; reported is
sigmoid(theta), the share of wins that the fit gives to answers of equal length. Wilson's interval: Wilson (1927).
Source: ours.

What a user hands in becomes float64; an error is one line: what came, what is allowed, what to do.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


Column = Sequence[float] | np.ndarray
TokenRows = Sequence[Sequence[float] | np.ndarray]  # a text each


def read_column(name: str, values: Column, *, num_rows: int | None = None, infinite: bool = False) -> np.ndarray:
    """(N,) float64, N at least 1, and num_rows if that is given; NaN is refused, infinities unless `infinite`."""
    read = read_numbers(name, values, infinite=infinite)
    if read.ndim != 1 or len(read) == 0:
        raise ValueError(f"{name} must be (N,) with at least one row, got shape {read.shape}.")
    if num_rows is not None and len(read) != num_rows:
        raise ValueError(f"{name} has {len(read)} rows and the other columns {num_rows}: give one value for each row.")
    return read


def read_token_rows(
    name: str, rows: TokenRows, *, binary: bool = False, infinite: bool = False, like: Sequence[np.ndarray] = ()
) -> list[np.ndarray]:
    """Each row as (n,) float64 with n at least 1; lengths may differ.

    binary: only 0 and 1 (or False and True). like: rows of another column that must have the same lengths.
    """
    if isinstance(rows, str) or len(rows) == 0:
        raise ValueError(f"{name} must be a sequence of texts, each with one number for each token; got {rows!r:.40}.")
    read = [read_numbers(f"{name}[{place}]", row, infinite=infinite) for place, row in enumerate(rows)]
    for place, row in enumerate(read):
        if row.ndim != 1 or len(row) == 0:
            raise ValueError(
                f"{name}[{place}] must be (n,) with at least one token, got shape {row.shape}: leave empty texts out."
            )
        if binary and ((row != 0) & (row != 1)).any():
            wrong = row[(row != 0) & (row != 1)][0]
            raise ValueError(f"{name}[{place}] holds {wrong:g}: for each token it is 1 (yes) or 0 (no).")
    if like and [len(row) for row in read] != [len(row) for row in like]:
        raise ValueError(f"{name} has other numbers of tokens than the other columns: give one number for each token.")
    return read


def read_numbers(name: str, values: Any, *, infinite: bool = False) -> np.ndarray:
    """float64 of any shape; NaN is refused, infinities unless `infinite`."""
    try:
        read = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers in rows of one length, got {values!r:.60}.") from None
    wrong = np.isnan(read) if infinite else ~np.isfinite(read)
    if wrong.any():
        allowed = "no value may be NaN" if infinite else "every value must be finite"
        raise ValueError(f"{name} holds {read[wrong][0]} at place {int(np.argmax(wrong))}: {allowed}.")
    return read


def read_strings(name: str, texts: Sequence[str], *, num_rows: int | None = None) -> list[str]:
    """A list of strings, at least one, and num_rows if that is given."""
    if isinstance(texts, str) or len(texts) == 0:
        raise ValueError(f"{name} must be a sequence of at least one string, got {texts!r:.40}.")
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{place}] must be a string, got {type(text).__name__}.")
    if num_rows is not None and len(texts) != num_rows:
        raise ValueError(f"{name} has {len(texts)} rows and the other columns {num_rows}: give one text for each row.")
    return list(texts)


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
    is_share: bool = False,
) -> Interval:
    """The statistic of the rows and its percentile interval, or that of a share.

    values: (N,) or (N, D), a row for each question or text, finite. groups: (N,) names of what rows belong to, such as
    their subjects; None if every row stands for itself. statistic: of rows, (n,) or (n, D) -> number; n varies with
    the groups drawn. is_share: it lies in [0, 1].
    """
    rows = _read_rows("values", values)
    replicates = bootstrap_replicates(rows, groups, resamples, seed, statistic)
    return interval_of(float(statistic(rows)), replicates, confidence, num_groups(groups, rows) if is_share else None)


def bootstrap_two_samples(
    first: Column | np.ndarray,
    second: Column | np.ndarray,
    statistic: TwoSampleStatistic,
    first_groups: Sequence[Hashable] | None = None,
    second_groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    is_share: bool = False,
) -> Interval:
    """A statistic of two independent samples, such as `text_metrics.auc`; each is drawn on its own.

    first, second: (N,) and (M,), or (N, D) and (M, D). Both ends are NaN where either sample is a single group.
    is_share: the statistic lies in [0, 1].
    """
    samples = {"first": _read_rows("first", first), "second": _read_rows("second", second)}
    groups = {"first_groups": first_groups, "second_groups": second_groups}
    streams = np.random.default_rng(seed).spawn(2)
    replicates = _replicates(list(samples.values()), groups, resamples, streams, statistic)
    counts = [num_groups(of, rows) for of, rows in zip(groups.values(), samples.values(), strict=True)]
    return interval_of(float(statistic(*samples.values())), replicates, confidence, min(counts) if is_share else None)


def bootstrap_replicates(
    values: Column | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    statistic: Statistic = np.mean,
) -> np.ndarray:
    """(R,) the statistic over resamples, NaN throughout with a single group; arguments of `bootstrap_interval`.

    For a formula of several numbers: replicates of independent sets, each with its own seed, go through it place by
    place, and `interval_of` takes the result.
    """
    rows = _read_rows("values", values)
    return _replicates([rows], {"groups": groups}, resamples, [np.random.default_rng(seed)], statistic)


def _replicates(
    samples: Sequence[np.ndarray],
    groups: Mapping[str, Sequence[Hashable] | None],
    resamples: int,
    streams: Sequence[np.random.Generator],
    statistic: Callable[..., float],
) -> np.ndarray:
    """(R,) the statistic of samples that are drawn independently, each from its own stream."""
    if resamples < 1:
        raise ValueError(f"resamples={resamples} must be at least 1; 2000 is usual.")
    members = [_members(name, of, len(rows)) for (name, of), rows in zip(groups.items(), samples, strict=True)]
    if min(map(len, members)) < 2:
        return np.full(resamples, math.nan)
    rows = samples[0]
    if len(samples) == 1 and (statistic, rows.ndim) in ((np.mean, 1), (ratio_of_sums, 2)):
        totals = np.stack([rows, np.ones(len(rows))], axis=1) if rows.ndim == 1 else rows
        sums = np.array([totals[member].sum(axis=0) for member in members[0]])  # (G, 2): no row is touched again
        parts = [sums[drawn].sum(axis=1) for drawn in _draws(len(sums), resamples, streams[0])]
        above, below = np.concatenate(parts).T
        return above / below
    drawn = [_drawn_rows(member, resamples, stream) for member, stream in zip(members, streams, strict=True)]
    resampled = (
        [sample[places] for sample, places in zip(samples, one, strict=True)] for one in zip(*drawn, strict=True)
    )
    return np.array([statistic(*one) for one in resampled], dtype=np.float64)


def num_groups(groups: Sequence[Hashable] | None, rows: Sequence[Any] | np.ndarray) -> int:
    """G, how many things are drawn independently of each other."""
    return len(rows) if groups is None else len(set(groups))


def interval_of(
    value: float, replicates: np.ndarray, confidence: float = 0.95, share_of: int | None = None
) -> Interval:
    """`value` between the percentiles (1 - confidence) / 2 and (1 + confidence) / 2 of the replicates (R,).

    share_of: of a value in [0, 1] the number of groups that it is made of; then Wilson's interval, see the head.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie in (0, 1), such as 0.95.")
    variance = float(np.var(replicates, ddof=1)) if len(replicates) > 1 else math.nan
    if share_of is not None and 0 <= value <= 1 and math.isfinite(variance):
        spread = value * (1 - value)
        trials = spread / variance if min(spread, variance) > 1e-12 else share_of
        return Interval(value, *wilson_interval(value, max(1.0, trials), confidence))
    low, high = np.quantile(replicates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))


def mean_intervals(
    columns: Mapping[str, Column | np.ndarray],
    groups: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    is_share: bool = True,
) -> dict[str, float]:
    """Of each column (N,) its mean as `name`, and the ends of its interval as `name_low` and `name_high`.

    is_share: the values lie in [0, 1].
    """
    found: dict[str, float] = {}
    for name, column in columns.items():
        value, low, high = bootstrap_interval(column, groups, confidence, resamples, seed, is_share=is_share)
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
    for chunk in _draws(len(members), resamples, stream):
        for drawn in chunk:
            yield np.concatenate([members[group] for group in drawn])


Values = Tensor | np.ndarray | Sequence[float]

PRIOR_SCALE = 2.5
_MAX_NEWTON_STEPS = 100
_GRADIENT_LIMIT = 1e-10  # of one pair


class LengthControlledShare(NamedTuple):
    """The share of wins at equal lengths, its interval, and `length_effect`: the fitted gamma, in log-odds.

    length_effect > 0: the longer answer wins more often than at equal lengths.
    """

    value: float
    low: float
    high: float
    length_effect: float


@dataclass(frozen=True)
class PreferenceAccuracy:
    """Three accuracies of one policy on N pairs."""

    plain: Interval
    length_normalized: Interval
    length_controlled: LengthControlledShare
    num_pairs: int
    num_ties: int  # of the plain comparison

    def as_dict(self) -> dict[str, float | int]:
        """Flat names for logs and tables: accuracy, accuracy_low, ..., length_effect, num_pairs, num_ties."""
        shares = {
            "accuracy": self.plain,
            "length_normalized_accuracy": self.length_normalized,
            "length_controlled_accuracy": self.length_controlled,
        }
        flat: dict[str, float | int] = {}
        for name, share in shares.items():
            flat |= {name: share.value, f"{name}_low": share.low, f"{name}_high": share.high}
        effect = self.length_controlled.length_effect
        return flat | {"length_effect": effect, "num_pairs": self.num_pairs, "num_ties": self.num_ties}


def preference_accuracy(
    chosen_logps: Values,
    rejected_logps: Values,
    chosen_lengths: Values,
    rejected_lengths: Values,
    ref_chosen_logps: Values | None = None,
    ref_rejected_logps: Values | None = None,
    *,
    confidence: float = 0.95,
    prior_scale: float = PRIOR_SCALE,
) -> PreferenceAccuracy:
    """The three accuracies of a policy; with a reference, of its log-ratios to the reference.

    chosen_logps, ref_chosen_logps, ...: (N,) summed log-probabilities in nats. chosen_lengths, ...: (N,) numbers of
    tokens, at least 1. Plain compares sums, length-normalised compares sums / length, length-controlled takes the
    outcomes of the plain comparison. Raises ValueError for shapes that differ, no pairs, values that are not finite.
    """
    if (ref_chosen_logps is None) != (ref_rejected_logps is None):
        missing = "ref_chosen_logps" if ref_chosen_logps is None else "ref_rejected_logps"
        raise ValueError(f"{missing} is missing: give the reference's log-probabilities of both answers, or of none.")
    columns = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
    }
    if ref_chosen_logps is not None:
        columns |= {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
    read = _columns(columns)
    lengths = {side: read[f"{side}_lengths"] for side in ("chosen", "rejected")}
    for side, length in lengths.items():
        if length.min() < 1:
            raise ValueError(f"{side}_lengths holds {float(length.min()):g}: an answer has at least 1 token.")
    scores = {side: read[f"{side}_logps"] - read.get(f"ref_{side}_logps", 0.0) for side in lengths}
    outcomes = pair_outcomes(scores["chosen"] - scores["rejected"])
    per_token = scores["chosen"] / lengths["chosen"] - scores["rejected"] / lengths["rejected"]
    differences = lengths["chosen"] - lengths["rejected"]
    return PreferenceAccuracy(
        plain=share_of_wins(outcomes, confidence),
        length_normalized=share_of_wins(pair_outcomes(per_token), confidence),
        length_controlled=length_controlled_share(outcomes, differences, confidence, prior_scale),
        num_pairs=len(outcomes),
        num_ties=int((outcomes == 0.5).sum()),
    )


def pair_outcomes(margins: Values, tie_margin: float = 0.0) -> Tensor:
    """(N,) float64: 1 where the margin is above tie_margin, 0 where it is below -tie_margin, else 1/2.

    margins: (N,) score of the first answer minus score of the second, in any unit. tie_margin: same unit, at least 0.
    """
    if not tie_margin >= 0 or math.isinf(tie_margin):
        raise ValueError(f"tie_margin={tie_margin} must be a number of at least 0.")
    (read,) = _columns({"margins": margins}).values()
    return ((read > tie_margin).double() - (read < -tie_margin).double() + 1) / 2


def wilson_interval(share: float, num: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share of `num` independent trials, a whole number or not; both ends lie in [0, 1].

    A share with halves for ties is taken as it is: a tie varies less than a win or a loss, so the interval is then
    rather too wide than too narrow.
    """
    if not 0 <= share <= 1 or num < 1:
        raise ValueError(f"share={share} of num={num} trials: a share lies in [0, 1], of at least 1 trial.")
    z2 = _quantile(confidence) ** 2
    center = (share + z2 / (2 * num)) / (1 + z2 / num)
    half_width = math.sqrt(z2 * (share * (1 - share) / num + z2 / (4 * num**2))) / (1 + z2 / num)
    low = 0.0 if share == 0 else max(0.0, center - half_width)  # exact, where rounding leaves 1e-17
    return low, 1.0 if share == 1 else min(1.0, center + half_width)


def share_of_wins(outcomes: Values, confidence: float = 0.95) -> Interval:
    """Mean of the outcomes (N,) in [0, 1], ties as halves, with Wilson's interval."""
    read = _outcomes(outcomes)
    value = float(read.mean())
    return Interval(value, *wilson_interval(value, len(read), confidence))


def length_controlled_share(
    outcomes: Values, length_differences: Values, confidence: float = 0.95, prior_scale: float = PRIOR_SCALE
) -> LengthControlledShare:
    """The share of wins at d = 0 of a logistic regression of the outcomes on tanh(d / s), s the root mean square of d.

    outcomes: (N,) in [0, 1]. length_differences: (N,) in tokens or characters, winner-to-be minus opponent.
    prior_scale: standard deviation of a normal prior on gamma centred at 0, in log-odds; it keeps gamma finite where
    length alone separates wins from losses, and vanishes against many pairs. theta has no prior.
    The interval is that of theta (normal approximation), mapped through the sigmoid. Where all pairs win, or all lose,
    or all have equal lengths, there is nothing to control for: the share of wins with Wilson's interval, gamma 0.
    Where all differences are the same and not 0, length cannot be told from quality: NaN throughout.
    """
    if not 0 < prior_scale < math.inf:
        raise ValueError(f"prior_scale={prior_scale} must be a finite number above 0, in log-odds.")
    wins, differences = _columns({"outcomes": outcomes, "length_differences": length_differences}).values()
    wins = _outcomes(wins)
    plain = share_of_wins(wins, confidence)
    if plain.value in (0.0, 1.0) or not differences.any():
        return LengthControlledShare(*plain, 0.0)
    if bool((differences == differences[0]).all()):
        return LengthControlledShare(math.nan, math.nan, math.nan, math.nan)
    feature = torch.tanh(differences / differences.square().mean().sqrt())
    theta, gamma, error = _fit(wins, feature, prior_scale**-2)
    reach = _quantile(confidence) * error
    ends = torch.tensor([theta, theta - reach, theta + reach], dtype=torch.float64).sigmoid().tolist()
    return LengthControlledShare(*ends, gamma)


def _fit(wins: Tensor, feature: Tensor, penalty: float) -> tuple[float, float, float]:
    """theta, gamma and the standard error of theta, where sum log-likelihood - penalty gamma^2 / 2 is largest.

    Newton's method with halved steps; the objective is strictly concave and, as wins and losses both occur, bounded.
    """
    design = torch.stack([torch.ones_like(feature), feature], dim=1)  # (N, 2)
    ridge = torch.tensor([0.0, penalty], dtype=torch.float64)
    share = wins.mean()
    place = torch.tensor([float(torch.logit(share)), 0.0], dtype=torch.float64)

    def objective(at: Tensor) -> Tensor:
        logits = design @ at
        return (wins * logits - torch.nn.functional.softplus(logits)).sum() - (ridge * at.square()).sum() / 2

    curvature = torch.eye(2, dtype=torch.float64)
    for _ in range(_MAX_NEWTON_STEPS):
        probabilities = (design @ place).sigmoid()
        gradient = design.T @ (wins - probabilities) - ridge * place
        curvature = (design * (probabilities * (1 - probabilities))[:, None]).T @ design + torch.diag(ridge)
        if gradient.abs().max() <= _GRADIENT_LIMIT * len(wins):
            break
        step, here = torch.linalg.solve(curvature, gradient), objective(place)
        while objective(place + step) < here and step.abs().max() > 1e-14:
            step = step / 2
        place = place + step
    theta, gamma = place.tolist()
    return theta, gamma, float(torch.linalg.inv(curvature)[0, 0].sqrt())


def _quantile(confidence: float) -> float:
    """z with P(|normal| < z) = confidence."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie in (0, 1), such as 0.95.")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _outcomes(outcomes: Values) -> Tensor:
    (read,) = _columns({"outcomes": outcomes}).values()
    if read.min() < 0 or read.max() > 1:
        raise ValueError(
            f"outcomes lie between {float(read.min()):g} and {float(read.max()):g}: 1 is a win, 0 a loss, 0.5 a tie."
        )
    return read


def _columns(columns: dict[str, Values]) -> dict[str, Tensor]:
    """Each as (N,) float64 on the CPU; N the same for all and at least 1, every value finite."""
    read = {name: torch.as_tensor(values, dtype=torch.float64).detach().cpu() for name, values in columns.items()}
    first_name, first = next(iter(read.items()))
    for name, values in read.items():
        if values.ndim != 1 or len(values) == 0:
            raise ValueError(f"{name} must be (N,) with at least one pair, got shape {tuple(values.shape)}.")
        if len(values) != len(first):
            raise ValueError(f"{name} has {len(values)} values and {first_name} {len(first)}: give one for each pair.")
        if not bool(values.isfinite().all()):
            place = int((~values.isfinite()).nonzero()[0])
            raise ValueError(f"{name} holds {float(values[place])} at pair {place}: every value must be finite.")
    return read
