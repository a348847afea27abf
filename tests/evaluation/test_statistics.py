"""Intervals against scipy, all possible draws, and the loop that sums of groups replace;
accuracies of preferences against counting by hand, scipy, closed forms and a world whose truth is known.
"""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, logit
from scipy.stats import binomtest, bootstrap

from hf_moe_cpt.evaluation.statistics import (
    Interval,
    bootstrap_interval,
    bootstrap_replicates,
    bootstrap_two_samples,
    interval_of,
    length_controlled_share,
    mean_intervals,
    pair_outcomes,
    preference_accuracy,
    ratio_of_sums,
    share_of_wins,
    wilson_interval,
)
from hf_moe_cpt.evaluation.text_metrics import auc


GENERATOR = np.random.default_rng(7)
VALUES = GENERATOR.random(40)
GROUPS = [f"subject {place}" for place in GENERATOR.integers(0, 12, 40)]


def test_agrees_with_scipy():
    got = bootstrap_interval(VALUES, resamples=20_000)
    theirs = bootstrap((VALUES,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert got.value == VALUES.mean()
    np.testing.assert_allclose(got[1:], theirs, atol=2e-3)
    got = bootstrap_two_samples(VALUES[:15], VALUES[15:], auc, resamples=4000)
    theirs = bootstrap(
        (VALUES[:15], VALUES[15:]), auc, n_resamples=4000, method="percentile", vectorized=False, rng=1
    ).confidence_interval
    assert got.value == auc(VALUES[:15], VALUES[15:])
    np.testing.assert_allclose(got[1:], theirs, atol=0.02)


def test_draws_of_whole_groups_are_all_that_can_be_drawn():
    values, groups = np.array([1.0, 2.0, 4.0, 8.0, 16.0]), ["a", "b", "a", "c", "c"]
    parts = [values[[0, 2]], values[[1]], values[[3, 4]]]
    possible = {float(np.concatenate(drawn).mean()) for drawn in product(parts, repeat=3)}
    got = bootstrap_replicates(values, groups)
    np.testing.assert_allclose(np.unique(got.round(9)), sorted({round(value, 9) for value in possible}))
    exact = [np.concatenate(drawn).mean() for drawn in product(parts, repeat=3)]
    assert got.mean() == pytest.approx(np.mean(exact), abs=0.2) and got.std() == pytest.approx(np.std(exact), rel=0.1)


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["rows", "groups"])
def test_sums_of_groups_give_what_the_rows_give(groups):
    totals = np.stack([VALUES, 1 + np.arange(40) % 5], axis=1)
    for rows, fast in ((VALUES, np.mean), (totals, ratio_of_sums)):
        slow = bootstrap_interval(rows, groups, resamples=300, seed=3, statistic=lambda drawn, of=fast: of(drawn))
        np.testing.assert_allclose(bootstrap_interval(rows, groups, resamples=300, seed=3, statistic=fast), slow)
    assert ratio_of_sums(totals) == pytest.approx(totals[:, 0].sum() / totals[:, 1].sum())


def test_seed_confidence_and_a_formula_of_two_sets():
    assert bootstrap_interval(VALUES, GROUPS, seed=1) == bootstrap_interval(VALUES, GROUPS, seed=1)
    assert bootstrap_interval(VALUES, GROUPS, seed=1) != bootstrap_interval(VALUES, GROUPS, seed=2)
    narrow, wide = (bootstrap_interval(VALUES, confidence=confidence) for confidence in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
    one, other = (bootstrap_replicates(part, seed=seed) for seed, part in enumerate((VALUES[:20], VALUES[20:])))
    got = interval_of(VALUES[:20].mean() - VALUES[20:].mean(), one - other)
    spread = np.sqrt(VALUES[:20].var() / 20 + VALUES[20:].var() / 20)
    assert got.high - got.low == pytest.approx(2 * 1.96 * spread, rel=0.1)


def test_ten_of_ten_is_not_certain():
    """scipy's Wilson interval; rows that agree within their subject count as one trial each."""
    from scipy.stats import binomtest

    for right in (0, 3, 10):
        rows = np.array([1.0] * right + [0.0] * (10 - right))
        got = bootstrap_interval(rows, resamples=20_000, is_share=True)
        want = binomtest(right, 10).proportion_ci(method="wilson")
        loose = 0.0 if right in (0, 10) else 0.01  # of draws, and of a variance over 10 instead of 9
        assert got == pytest.approx((right / 10, want.low, want.high), abs=loose + 1e-12)
        fives = bootstrap_interval(
            np.repeat(rows, 5), np.repeat(np.arange(10), 5).tolist(), 0.95, 20_000, is_share=True
        )
        assert fives == pytest.approx(got, abs=loose + 1e-12)
    plain = bootstrap_interval(np.ones(10), resamples=100)
    assert plain.high == plain.low == 1.0, "what is no share keeps percentiles"
    apart = bootstrap_two_samples([5.0, 6.0, 7.0], [1.0, 2.0, 3.0, 4.0], auc, resamples=50, is_share=True)
    assert (apart.value, apart.high) == (1.0, 1.0)
    assert apart.low == pytest.approx(binomtest(3, 3).proportion_ci(method="wilson").low)


def test_one_group_has_no_interval_and_columns_get_their_ends():
    for got in (bootstrap_interval([0.2, 0.4], ["a", "a"]), bootstrap_two_samples([0.2, 0.4], [0.3], auc)):
        assert isinstance(got, Interval) and np.isnan(got[1:]).all() and not np.isnan(got.value)
    got = mean_intervals({"first": VALUES, "second": 1 - VALUES}, GROUPS, 0.8, 100, 5)
    expected = bootstrap_interval(VALUES, GROUPS, 0.8, 100, 5, is_share=True)
    assert (got["first"], got["first_low"], got["first_high"]) == expected
    assert got["second_low"] == pytest.approx(1 - expected.high)


WEAK = 1e6  # a prior too wide to matter


def test_the_three_accuracies_of_four_pairs_by_hand():
    chosen, rejected = [-10.0, -12.0, -8.0, -6.0], [-11.0, -10.0, -8.0, -9.0]
    lengths = [5, 12, 4, 2], [5, 2, 2, 9]
    got = preference_accuracy(chosen, rejected, *lengths)
    assert (got.plain.value, got.num_pairs, got.num_ties) == (2.5 / 4, 4, 1)
    assert got.length_normalized.value == 3 / 4  # -2 > -2.2, -1 > -5, -2 > -4, -3 < -1
    assert got.plain[1:] == wilson_interval(2.5 / 4, 4)
    reference = [-9.0, -14.0, -8.0, -1.0], [-9.5, -10.0, -9.0, -9.0]
    got = preference_accuracy(chosen, rejected, *lengths, *reference)
    assert got.plain.value == 2 / 4  # -1 > -1.5, 2 > 0, 0 < 1, -5 < 0
    assert got.length_normalized.value == 2 / 4
    assert got.as_dict()["accuracy"] == 2 / 4 and got.as_dict()["num_ties"] == 0


@given(st.integers(1, 40), st.integers(0, 999), st.integers(0, 2), st.integers(2, 50))
@settings(max_examples=25, deadline=None)
def test_neither_unit_of_lengths_nor_kind_of_array_nor_side_matters(num, seed, digits, unit):
    generator = np.random.default_rng(seed)
    logps = [np.round(-30 * generator.random(num), digits) for _ in range(4)]
    columns = [*logps[:2], *(generator.integers(1, 12, num) for _ in range(2)), *logps[2:]]
    got = preference_accuracy(*columns)
    scaled = [*columns[:2], *(unit * column for column in columns[2:4]), *columns[4:]]
    again = preference_accuracy(*[torch.tensor(column, requires_grad=column.dtype == float) for column in scaled])
    listed = preference_accuracy(*[column.tolist() for column in scaled])
    np.testing.assert_allclose(list(again.as_dict().values()), list(got.as_dict().values()), rtol=1e-7)
    assert listed == again or math.isnan(got.length_controlled.value)
    turned = preference_accuracy(*[columns[place] for place in (1, 0, 3, 2, 5, 4)])
    for name in ("plain", "length_normalized", "length_controlled"):
        one, other = getattr(got, name), getattr(turned, name)
        np.testing.assert_allclose([1 - other.value, 1 - other.high, 1 - other.low], one[:3], atol=1e-8)


@pytest.mark.parametrize("wins, num", [(0, 1), (1, 1), (0, 30), (30, 30), (7, 30), (512, 805)])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_wilson_equals_scipy(wins, num, confidence):
    want = binomtest(wins, num).proportion_ci(confidence, method="wilson")
    assert wilson_interval(wins / num, num, confidence) == pytest.approx((want.low, want.high), abs=1e-12)


def test_ties_count_half_and_the_tie_margin_makes_them():
    margins = [-0.3, -0.1, 0.0, 0.1, 0.3]
    assert pair_outcomes(margins).tolist() == [0, 0, 0.5, 1, 1]
    assert pair_outcomes(torch.tensor(margins, dtype=torch.float64), 0.1).tolist() == [0, 0.5, 0.5, 0.5, 1]
    assert share_of_wins([0.5, 0.5, 1, 1]) == (0.75, *wilson_interval(0.75, 4))


def test_two_groups_of_lengths_have_a_closed_form():
    """d = +a or -a saturates the regression: theta is the mean of the two groups' logits."""
    longer, shorter = [1] * 30 + [0] * 10, [1] * 5 + [0] * 15
    got = length_controlled_share(longer + shorter, [7] * 40 + [-7] * 20, prior_scale=WEAK)
    assert got.value == pytest.approx(expit((logit(30 / 40) + logit(5 / 20)) / 2), abs=1e-9)
    assert got.length_effect == pytest.approx((logit(0.75) - logit(0.25)) / 2 / math.tanh(1), rel=1e-6)
    error = math.sqrt((1 / 30 + 1 / 10 + 1 / 5 + 1 / 15) / 4)  # of a mean of two independent logits
    ends = [expit(logit(got.value) + sign * 1.959963984540054 * error) for sign in (-1, 1)]
    assert [got.low, got.high] == pytest.approx(ends, abs=1e-8)


@given(st.integers(0, 999), st.integers(5, 200), st.sampled_from([0.3, 2.5, 40.0]))
@settings(max_examples=25, deadline=None)
def test_the_fit_is_the_maximum_that_scipy_finds(seed, num, prior_scale):
    generator = np.random.default_rng(seed)
    differences = np.round(generator.normal(5, 30, num))
    outcomes = generator.choice([0, 0.5, 1], num)
    outcomes[:2], differences[:2] = (0, 1), (-1, 2)
    got = length_controlled_share(outcomes, differences, prior_scale=prior_scale)
    feature = np.tanh(differences / np.sqrt(np.mean(differences**2)))

    def minus_log_posterior(place):
        logits = place[0] + place[1] * feature
        return np.sum(np.logaddexp(0, logits) - outcomes * logits) + (place[1] / prior_scale) ** 2 / 2

    want = minimize(minus_log_posterior, [0, 0], method="BFGS", options={"gtol": 1e-7}).x
    assert [logit(got.value), got.length_effect] == pytest.approx(want, abs=2e-4)
    assert 0 <= got.low < got.value < got.high <= 1


def _world(quality: float, effect: float, num: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pairs whose longer answer is preferred too often: outcomes and length differences, mostly above 0."""
    differences = np.round(generator.normal(40, 60, num))
    scale = np.sqrt(np.mean(differences**2))
    wins = generator.random(num) < expit(quality + effect * np.tanh(differences / scale))
    return wins.astype(float), differences


@pytest.mark.parametrize(
    "quality, effect",
    [(0.8, -1.0), *(pytest.param(*truth, marks=pytest.mark.slow) for truth in ((0.0, 1.5), (-0.5, 0.0)))],
)
def test_where_the_truth_is_known_it_is_found_and_the_interval_covers_it(quality, effect):
    generator = np.random.default_rng(1)
    worlds = [_world(quality, effect, 400, generator) for _ in range(300)]
    got = [length_controlled_share(*world) for world in worlds]
    truth = expit(quality)
    covered = sum(share.low <= truth <= share.high for share in got)
    assert 0.91 < covered / len(worlds) < 0.985  # 0.95 plus or minus three standard errors
    bias = np.mean([share.value for share in got]) - truth
    assert abs(bias) < 0.012
    plain = np.mean([share_of_wins(wins).value for wins, _ in worlds]) - truth
    assert abs(plain) > 0.07 if effect else abs(plain) < 0.012  # what length control is for


def test_length_that_separates_everything_or_nothing_leaves_numbers():
    got = length_controlled_share([1] * 20 + [0] * 20, list(range(1, 21)) + list(range(-20, 0)))
    assert got.value == pytest.approx(0.5, abs=0.01) and 2 < got.length_effect < 20
    assert 0 < got.low < 0.4 and 0.6 < got.high < 1
    assert length_controlled_share([1, 1, 1], [5, -3, 2]) == (1.0, *wilson_interval(1.0, 3), 0.0)
    assert length_controlled_share([1, 0.5, 0], [0, 0, 0]) == (0.5, *wilson_interval(0.5, 3), 0.0)
    assert all(math.isnan(number) for number in length_controlled_share([1, 0, 1], [4, 4, 4]))


PAIR = ([-1.0, -2.0], [-2.0, -1.0], [3, 4], [5, 6])
REFUSED = {
    "no rows": (lambda: bootstrap_interval([]), r"values must have at least one row, got shape \(0,\)"),
    "infinite": (lambda: bootstrap_interval([1.0, np.inf]), "values holds inf at place 1: every value must be finite"),
    "groups": (lambda: bootstrap_interval([1.0, 2.0], ["a"]), "groups has 1 entries for 2 rows: name the group"),
    "percent": (lambda: bootstrap_interval([1.0, 2.0], confidence=95), r"confidence=95 must lie in \(0, 1\)"),
    "no draws": (lambda: bootstrap_interval([1.0, 2.0], resamples=0), "resamples=0 must be at least 1"),
    "more": (lambda: bootstrap_two_samples([1], [2, 3], auc, second_groups=["a"]), "second_groups has 1 entries"),
    "no pairs": (lambda: preference_accuracy([], [], [], []), r"chosen_logps must be \(N,\) with at least one pair"),
    "two dimensions": (lambda: preference_accuracy(torch.zeros(2, 2), *PAIR[1:]), r"must be \(N,\).*\(2, 2\)"),
    "short": (lambda: preference_accuracy(PAIR[0], [-1.0], *PAIR[2:]), "rejected_logps has 1 values and chosen_logps"),
    "NaN": (lambda: preference_accuracy([-1, math.nan], *PAIR[1:]), "chosen_logps holds nan at pair 1"),
    "an empty answer": (lambda: preference_accuracy(*PAIR[:3], [0, 6]), "rejected_lengths holds 0: an answer has"),
    "half a pair": (lambda: preference_accuracy(*PAIR, ref_chosen_logps=[-1, -1]), "ref_rejected_logps is missing"),
    "confidence": (lambda: preference_accuracy(*PAIR, confidence=95), r"confidence=95 must lie in \(0, 1\)"),
    "prior": (lambda: preference_accuracy(*PAIR, prior_scale=0), "prior_scale=0 must be a finite number above 0"),
    "tie margin": (lambda: pair_outcomes([0.1], -1), "tie_margin=-1 must be a number of at least 0"),
    "outcomes": (lambda: share_of_wins([0, 2]), "outcomes lie between 0 and 2: 1 is a win"),
    "a share above 1": (lambda: wilson_interval(1.5, 3), "share=1.5 of num=3 trials"),
}


@pytest.mark.parametrize("call, text", REFUSED.values(), ids=REFUSED)
def test_refusals_are_one_line(call, text):
    with pytest.raises(ValueError, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)
