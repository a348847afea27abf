"""Token accuracy by hand in both forms, conflict scores against probabilities in float64."""

import numpy as np
import pytest
from scipy.special import expit

from hf_moe_cpt.analysis.editing import conflict_score, token_accuracy


def test_rows_and_counts_say_the_same():
    hits = [[1, 0, 1, 1], [0], [1, 1]]
    np.testing.assert_allclose(token_accuracy(hits), [3 / 4, 0, 1])
    np.testing.assert_array_equal(token_accuracy([3, 0, 2], [4, 1, 2]), token_accuracy(hits))


def test_conflict_of_probabilities():
    old, new = np.array([0.2, 0.5, 1e-3, 0.9]), np.array([0.2, 0.1, 0.4, 1e-9])
    np.testing.assert_allclose(conflict_score(np.log(old), np.log(new)), old / (old + new), rtol=1e-12)


def test_conflict_where_probabilities_underflow():
    old, new = np.array([-2000.0, -2000.0, -5000.0, 0.0]), np.array([-2001.0, -2000.0, -1.0, -5000.0])
    np.testing.assert_allclose(conflict_score(old, new), expit(old - new), rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(conflict_score(old, new) + conflict_score(new, old), 1)


REFUSED = {
    "more hits than tokens": (
        lambda: token_accuracy([1, 3], [1, 2]),
        "hits holds 3 at question 1, whose answer has 2",
    ),
    "no tokens": (lambda: token_accuracy([0], [0]), "tokens holds 0: an answer has at least 1 token"),
    "counts alone": (lambda: token_accuracy([3, 2]), r"hits\[0\] must be \(n,\)"),
    "columns differ": (lambda: conflict_score([-1.0], [-1.0, -2.0]), "new_logp has 2 rows and the other columns 1"),
    "infinite": (
        lambda: conflict_score([-np.inf], [-1.0]),
        "old_logp holds -inf at place 0: every value must be finite",
    ),
}


@pytest.mark.parametrize("call, text", REFUSED.values(), ids=REFUSED)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()
