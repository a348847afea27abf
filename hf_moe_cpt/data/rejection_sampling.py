"""Preference pairs by statistical rejection sampling: which of N scored responses to a prompt become data.

Responses y ~ policy are thinned until what is left is distributed as policy(y) exp(r(y) / tau), the policy that a
reward r and a KL penalty tau ask for; pairs are then formed among the accepted ones.

Letters: N responses to one prompt, k accepted ones, r rewards, tau temperature in the unit of r.
Source: Liu et al. 2024, Statistical Rejection Sampling Improves Preference Optimization (arXiv 2309.06657, algorithm
and pairings); Zhao et al. 2025, RainbowPO (arXiv 2410.04203, percentile rewards, "RS+").

Every random choice for a prompt comes from `prompt_generator(seed, prompt_index)`: no other prompt matters.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hf_moe_cpt.data.random import derive_seed


REWARDS = ("raw", "percentile")


class PreferencePair(NamedTuple):
    """Places of the two responses among the N of their prompt."""

    chosen: int
    rejected: int


def prompt_generator(seed: int, prompt_index: int) -> np.random.Generator:
    """The random numbers of one prompt: a stream keyed by (seed, prompt_index), always from its beginning."""
    return np.random.Generator(np.random.Philox(derive_seed(seed, "rejection sampling", prompt_index)))


def percentile_rewards(rewards: Sequence[float] | np.ndarray) -> np.ndarray:
    """Rewards (N,) as ranks in [0, 1]: 0 the worst, 1 the best, equal rewards their mean rank; 1/2 if N = 1.

    The scale of a reward model drops out, so that one tau serves all prompts and all reward models.
    """
    values = _checked(rewards)
    if len(values) == 1:
        return np.array([0.5])
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place] / (len(values) - 1)


def acceptance_probabilities(rewards: Sequence[float] | np.ndarray, tau: float) -> np.ndarray:
    """Chance (N,) in [0, 1] that each response is accepted when it is drawn first: exp((r - max r) / tau).

    Its mean is the acceptance rate of the first draw. tau: above 0, may be infinite.
    """
    values = _checked(rewards)
    _check_tau(tau)
    with np.errstate(over="ignore"):  # a tau near 0 sends all but the best to exp(-inf) = 0
        return np.exp((values - values.max()) / tau)


def rejection_sample(
    rewards: Sequence[float] | np.ndarray, num_accepted: int, tau: float, generator: np.random.Generator
) -> list[int]:
    """Places of `num_accepted` of the N responses, in the order of their acceptance, each at most once.

    Repeats: draw one of the responses that are left, all alike; draw u uniform in [0, 1); accept it if
    u < exp((r - r_max) / tau), r_max the best reward among those left. Hence the next one accepted is response i with
    probability exp(r_i / tau) / (sum over those left): tau -> 0 takes the best, tau -> inf takes any. The best one
    left is always accepted when drawn, so a response costs at most N draws on average.

    num_accepted: in [1, N]. tau: above 0, in the unit of the rewards, may be infinite.
    """
    values = _checked(rewards)
    _check_tau(tau)
    if not 1 <= num_accepted <= len(values):
        raise ValueError(
            f"num_accepted={num_accepted} of {len(values)} response(s): accept at least 1 and at most all of them."
        )
    left = list(range(len(values)))
    accepted: list[int] = []
    while len(accepted) < num_accepted:
        chances = acceptance_probabilities(values[left], tau)
        place = int(generator.integers(len(left)))
        while generator.random() >= chances[place]:
            place = int(generator.integers(len(left)))
        accepted.append(left.pop(place))
    return accepted


def make_pairs(
    accepted: Sequence[int],
    rewards: Sequence[float] | np.ndarray,
    how: str = "max_min",
    min_margin: float = 0.0,
    generator: np.random.Generator | None = None,
) -> list[PreferencePair]:
    """Pairs among the accepted responses (k of N places), the better of a pair chosen.

    how: "max_min" pairs the best with the worst (1 pair); "first_round" draws partners at random (k // 2 pairs);
    "tournament" lets the better of each pair meet again, round after round, until one is left (k - 1 pairs).
    min_margin: pairs whose rewards (N,) differ by less are left out, equal ones always; the tournament goes on with
    the one drawn first. generator: needed for all but max_min; draws as many numbers whatever the rewards.
    """
    values = _checked(rewards)
    if how not in PAIRINGS:
        raise ValueError(f"how={how!r} is no way to make pairs: choose from {', '.join(PAIRINGS)}.")
    if len(accepted) < 2:
        raise ValueError(f"{len(accepted)} accepted response(s) make no pair: accept at least 2.")
    if not 0 <= min_margin < math.inf:
        raise ValueError(f"min_margin={min_margin} must be at least 0 and finite.")
    if generator is None and how != "max_min":
        raise ValueError(f"how={how!r} draws partners at random: pass a generator, such as prompt_generator's.")
    met = PAIRINGS[how](list(accepted), values, generator)
    return [pair for pair in met if values[pair.chosen] - values[pair.rejected] >= max(min_margin, _SMALLEST)]


_SMALLEST = math.ulp(0.0)  # the least number above 0: a margin of 0 still drops equal rewards


def _max_min(accepted: list[int], values: np.ndarray, generator: np.random.Generator | None) -> list[PreferencePair]:
    rewards = values[accepted]
    return [PreferencePair(accepted[int(rewards.argmax())], accepted[int(rewards.argmin())])]


def _first_round(accepted: list[int], values: np.ndarray, generator: np.random.Generator) -> list[PreferencePair]:
    drawn = generator.permutation(accepted).tolist()
    return [_judged(first, second, values) for first, second in zip(drawn[::2], drawn[1::2], strict=False)]


def _tournament(accepted: list[int], values: np.ndarray, generator: np.random.Generator) -> list[PreferencePair]:
    pairs: list[PreferencePair] = []
    remaining = list(accepted)
    while len(remaining) > 1:
        remaining = generator.permutation(remaining).tolist()
        met = [_judged(first, second, values) for first, second in zip(remaining[::2], remaining[1::2], strict=False)]
        rests = remaining[len(met) * 2 :]  # of an odd number the last one waits for the next round
        pairs += met
        remaining = [pair.chosen for pair in met] + rests
    return pairs


PAIRINGS: dict[str, Callable[..., list[PreferencePair]]] = {
    "max_min": _max_min,
    "first_round": _first_round,
    "tournament": _tournament,
}


def _judged(first: int, second: int, values: np.ndarray) -> PreferencePair:
    return PreferencePair(first, second) if values[first] >= values[second] else PreferencePair(second, first)


def distinct_places(texts: Sequence[str]) -> list[int]:
    """Places of the texts that are not empty and not said before, space around them aside."""
    first: dict[str, int] = {}
    for place, text in enumerate(texts):
        if text.strip():
            first.setdefault(text.strip(), place)
    return list(first.values())


@dataclass(frozen=True)
class SelectionRule:
    """How scored responses become pairs; all fields are those of the functions of this module.

    rewards: "raw" or "percentile", for the rejection sampling; pairs and min_margin are always about raw scores.
    num_accepted: of a prompt with fewer distinct responses all are accepted.
    """

    rewards: str = "percentile"
    tau: float = 0.5
    num_accepted: int = 4
    pairs: str = "max_min"
    min_margin: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rewards not in REWARDS:
            raise ValueError(f"rewards={self.rewards!r} is unknown: choose from {', '.join(REWARDS)}.")
        if self.pairs not in PAIRINGS:
            raise ValueError(f"pairs={self.pairs!r} is unknown: choose from {', '.join(PAIRINGS)}.")
        if self.num_accepted < 2:
            raise ValueError(f"num_accepted={self.num_accepted} makes no pair: accept at least 2.")
        if not 0 <= self.min_margin < math.inf:
            raise ValueError(f"min_margin={self.min_margin} must be at least 0 and finite.")
        _check_tau(self.tau)


class Selection(NamedTuple):
    """What became of one prompt's N responses. distinct, accepted: places; acceptance: of the first draw, (0, 1]."""

    distinct: list[int]
    accepted: list[int]
    pairs: list[PreferencePair]
    acceptance: float | None


def select_pairs(
    texts: Sequence[str], scores: Sequence[float] | np.ndarray, prompt_index: int, rule: SelectionRule
) -> Selection:
    """Pairs among the N responses of one prompt, a function of the arguments alone.

    Of identical texts the first takes part, with its score; empty ones never do. With fewer than two left there is no
    pair and acceptance is None.
    """
    if len(texts) != len(scores):
        raise ValueError(f"prompt {prompt_index} has {len(texts)} responses and {len(scores)} scores: give one each.")
    distinct = distinct_places(texts)
    if len(distinct) < 2:
        return Selection(distinct, [], [], None)
    kept = _checked(scores)[distinct]
    rewards = percentile_rewards(kept) if rule.rewards == "percentile" else kept
    generator = prompt_generator(rule.seed, prompt_index)
    accepted = rejection_sample(rewards, min(rule.num_accepted, len(distinct)), rule.tau, generator)
    pairs = make_pairs(accepted, kept, rule.pairs, rule.min_margin, generator)
    return Selection(
        distinct,
        [distinct[place] for place in accepted],
        [PreferencePair(distinct[pair.chosen], distinct[pair.rejected]) for pair in pairs],
        float(acceptance_probabilities(rewards, rule.tau).mean()),
    )


def _checked(rewards: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(
            f"rewards have shape {values.shape}: they must be (N,), one for each of at least one response."
        )
    if not np.isfinite(values).all():
        place = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"reward {place} is {values[place]}: rewards must be finite numbers.")
    return values


def _check_tau(tau: float) -> None:
    if not tau > 0:
        raise ValueError(
            f"tau={tau} must be above 0: small values keep the best responses, large ones (or inf) any of them."
        )
