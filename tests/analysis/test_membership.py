"""Membership scores by hand, the AUC against all pairs and scipy's Mann-Whitney, leakage in closed form."""

import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from hf_moe_cpt.analysis.membership import (
    auc,
    is_over_forgotten,
    loss_score,
    min_k,
    min_k_plus_plus,
    privacy_leakage,
    zlib_score,
)


SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=15)
LOGPS = [[-1.0, -5.0, -2.0, -4.0, -3.0], [-0.5], [-1.0, -2.0]]


def test_scores_by_hand():
    np.testing.assert_allclose(loss_score(LOGPS), [-3, -0.5, -1.5])
    np.testing.assert_allclose(min_k(LOGPS), [-4.5, -0.5, -2])  # floor(2.0), 1 at least, floor(0.8) -> 1
    np.testing.assert_allclose(min_k(LOGPS, k=1), loss_score(LOGPS))
    np.testing.assert_allclose(min_k([[-1.0, -2.0, -3.0, -4.0]]), [-4])  # floor(1.6)
    np.testing.assert_allclose(min_k([np.arange(-100.0, 0)], k=0.29), [-86])  # 29 of them, though 0.29 * 100 < 29
    texts = ["a" * 500, "the quick brown fox"]
    sizes = [len(zlib.compress(text.encode())) for text in texts]
    np.testing.assert_allclose(zlib_score([30.0, 40.0], texts), [-30 / sizes[0], -40 / sizes[1]])


def test_min_k_plus_plus_standardises_each_token():
    mean, std = [[-2.0, -2.0, -2.0, -2.0, -2.0], [-1.0], [0.0, -2.0]], [[1.0, 2.0, 0.5, 4.0, 1.0], [0.0], [1.0, 1.0]]
    got = min_k_plus_plus(LOGPS, mean, std)
    np.testing.assert_allclose(got, [(-1.5 - 1.0) / 2, 0.5 / 1e-3, -1.0])
    same = min_k_plus_plus(LOGPS, [np.zeros(len(row)) for row in LOGPS], [np.ones(len(row)) for row in LOGPS])
    np.testing.assert_allclose(same, min_k(LOGPS))


@pytest.mark.parametrize("score", [loss_score, min_k])
def test_likelier_texts_score_higher(score):
    assert auc(score([[-0.1, -0.2, -0.1]]), score([[-3.0, -2.0, -4.0]])) == 1
    assert auc(zlib_score([0.4], ["one text"]), zlib_score([9.0], ["two text"])) == 1


@given(SCORES, SCORES)
@settings(max_examples=60, deadline=None)
def test_auc_of_all_pairs_and_of_scipy(members, others):
    pairs = [(a > b) + (a == b) / 2 for a in members for b in others]
    assert auc(members, others) == pytest.approx(sum(pairs) / len(pairs))
    statistic = mannwhitneyu(members, others).statistic
    assert auc(members, others) == pytest.approx(statistic / len(members) / len(others))
    assert auc(others, members) == pytest.approx(1 - auc(members, others))


def test_infinite_losses_are_ranked_too():
    assert auc(loss_score([[-1.0], [-np.inf]]), loss_score([[-2.0, -np.inf]])) == 0.75


def test_leakage_and_its_sides():
    assert privacy_leakage(1.0, 0.5) == -100  # not forgotten at all
    assert privacy_leakage(0.5, 0.5) == 0
    assert privacy_leakage(0.0, 0.5) == 100  # over-forgotten
    assert privacy_leakage(0.7, 0.6) == pytest.approx(100 * ((1 - 0.7) - (1 - 0.6)) / (1 - 0.6))
    assert math.isnan(privacy_leakage(0.7, 1.0))
    assert [is_over_forgotten(value) for value in (0.0, 0.499, 0.5, 1.0)] == [True, True, False, False]


REFUSED = {
    "k of percent": (lambda: min_k(LOGPS, k=40), r"k=40 must lie in \(0, 1\]"),
    "k of none": (lambda: min_k(LOGPS, k=0), r"k=0 must lie in \(0, 1\]"),
    "other tokens": (lambda: min_k_plus_plus(LOGPS, LOGPS[:2], LOGPS), "mean has other numbers of tokens"),
    "spread below 0": (lambda: min_k_plus_plus([[-1.0]], [[-1.0]], [[-1.0]]), "std holds -1: a standard deviation"),
    "sum of logps": (
        lambda: zlib_score([-30.0], ["a"]),
        "sum_nll holds -30: a negative log-probability is at least 0",
    ),
    "texts missing": (lambda: zlib_score([3.0, 3.0], ["a"]), "texts has 1 rows and the other columns 2"),
    "no others": (lambda: auc([1.0], []), r"others must be \(N,\) with at least one row"),
    "no number": (lambda: auc([np.nan], [1.0]), "members holds nan"),
    "percent": (lambda: privacy_leakage(50, 0.5), r"auc=50 must lie in \[0, 1\]"),
}


@pytest.mark.parametrize("call, text", REFUSED.values(), ids=REFUSED)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()
