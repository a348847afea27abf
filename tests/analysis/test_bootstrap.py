"""Intervals against scipy, all possible draws, coverage of the truth, and the loop that sums of groups replace."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import bootstrap

from hf_moe_cpt.analysis.bootstrap import (
    Interval,
    bootstrap_difference,
    bootstrap_interval,
    bootstrap_replicates,
    bootstrap_two_samples,
    mean_intervals,
    percentile_interval,
    ratio_of_sums,
)
from hf_moe_cpt.analysis.membership import auc


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


def test_copies_of_a_row_in_its_group_add_nothing():
    plain = bootstrap_interval(VALUES)
    copied = np.repeat(VALUES, 5)
    np.testing.assert_allclose(bootstrap_interval(copied, np.repeat(np.arange(40), 5)), plain)
    assert np.ptp(bootstrap_interval(copied)[1:]) < 0.6 * np.ptp(plain[1:])  # as if each copy were news


def test_it_covers_the_truth_as_often_as_it_says():
    generator, covered = np.random.default_rng(0), 0
    for trial in range(300):
        subjects = generator.normal(size=30)
        values = np.repeat(subjects, 4) + generator.normal(size=120)
        _, low, high = bootstrap_interval(values, np.repeat(np.arange(30), 4), 0.9, resamples=400, seed=trial)
        covered += low <= 0 <= high
    assert 0.82 <= covered / 300 <= 0.94  # percentile intervals of 30 groups are a little short


def test_pairs_are_drawn_together():
    after = VALUES + 0.1
    got = bootstrap_difference(after, VALUES, GROUPS)
    np.testing.assert_allclose(got, [0.1, 0.1, 0.1])
    got = bootstrap_difference(after, VALUES, GROUPS, statistic=np.median)
    np.testing.assert_allclose(got, [0.1, 0.1, 0.1])
    totals = np.stack([VALUES, np.ones(40)], axis=1)
    by_sums = bootstrap_difference(totals * [2, 1], totals, GROUPS, statistic=ratio_of_sums, resamples=200)
    np.testing.assert_allclose(by_sums, bootstrap_interval(VALUES, GROUPS, resamples=200))


def test_seed_confidence_and_a_formula_of_two_sets():
    assert bootstrap_interval(VALUES, GROUPS, seed=1) == bootstrap_interval(VALUES, GROUPS, seed=1)
    assert bootstrap_interval(VALUES, GROUPS, seed=1) != bootstrap_interval(VALUES, GROUPS, seed=2)
    narrow, wide = (bootstrap_interval(VALUES, confidence=confidence) for confidence in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
    one, other = (bootstrap_replicates(part, seed=seed) for seed, part in enumerate((VALUES[:20], VALUES[20:])))
    got = percentile_interval(VALUES[:20].mean() - VALUES[20:].mean(), one - other)
    spread = np.sqrt(VALUES[:20].var() / 20 + VALUES[20:].var() / 20)
    assert got.high - got.low == pytest.approx(2 * 1.96 * spread, rel=0.1)


def test_one_group_has_no_interval():
    for got in (bootstrap_interval([0.2, 0.4], ["a", "a"]), bootstrap_two_samples([0.2, 0.4], [0.3], auc)):
        assert isinstance(got, Interval) and np.isnan(got[1:]).all() and not np.isnan(got.value)


def test_columns_with_their_ends():
    got = mean_intervals({"first": VALUES, "second": 1 - VALUES}, GROUPS, 0.8, 100, 5)
    expected = bootstrap_interval(VALUES, GROUPS, 0.8, 100, 5)
    assert (got["first"], got["first_low"], got["first_high"]) == expected
    assert got["second_low"] == pytest.approx(1 - expected.high)


REFUSED = {
    "no rows": (lambda: bootstrap_interval([]), r"values must have at least one row, got shape \(0,\)"),
    "infinite": (lambda: bootstrap_interval([1.0, np.inf]), "values holds inf at place 1: every value must be finite"),
    "groups": (lambda: bootstrap_interval([1.0, 2.0], ["a"]), "groups has 1 entries for 2 rows: name the group"),
    "percent": (lambda: bootstrap_interval([1.0, 2.0], confidence=95), r"confidence=95 must lie in \(0, 1\)"),
    "no draws": (lambda: bootstrap_interval([1.0, 2.0], resamples=0), "resamples=0 must be at least 1"),
    "pairs": (
        lambda: bootstrap_difference([1.0, 2.0], [1.0]),
        r"after has shape \(2,\) and before \(1,\): pairs need",
    ),
    "second groups": (
        lambda: bootstrap_two_samples([1.0], [2.0, 3.0], auc, second_groups=["a"]),
        "second_groups has 1 entries for 2 rows",
    ),
}


@pytest.mark.parametrize("call, text", REFUSED.values(), ids=REFUSED)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()
