"""Memorisation against loops that follow the definitions, and closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import gmean

from hf_moe_cpt.analysis.memorisation import exact_memorisation, extraction_strength, probability


TEXTS = st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=5)


def test_by_hand():
    hits = [[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 0, 1, 1], [0], [1]]
    np.testing.assert_allclose(exact_memorisation(hits), [1, 1 / 2, 3 / 4, 3 / 5, 0, 1])
    np.testing.assert_allclose(extraction_strength(hits), [1, 1 / 2, 0, 2 / 5, 0, 1])


@given(TEXTS)
@settings(max_examples=60, deadline=None)
def test_shortest_beginning_is_found_by_trying_all(texts):
    shortest = [next(k for k in range(len(hits) + 1) if all(hits[k:])) for hits in texts]
    expected = [1 - k / len(hits) for k, hits in zip(shortest, texts, strict=True)]
    np.testing.assert_allclose(extraction_strength(texts), expected)
    assert (extraction_strength(texts) <= exact_memorisation(texts) + 1e-12).all()


def test_probability_is_the_geometric_mean():
    shares = [[0.5, 0.25, 0.9], [1.0], [1e-200, 1e-200]]
    got = probability([np.log(row) for row in shares])
    np.testing.assert_allclose(got, [gmean(row) for row in shares], rtol=1e-12)
    assert probability([[-1.0, -np.inf], [0.0, 1e-7]]).tolist() == [0.0, 1.0]


REFUSED = {
    "losses instead": (probability, [[0.0], [0.5]], "logps holds 0.5: a log-probability is at most 0"),
    "no number": (probability, [[0.0], [np.nan]], r"logps\[1\] holds nan at place 0: no value may be NaN"),
    "empty text": (exact_memorisation, [[1], []], r"hits\[1\] must be \(n,\) with at least one token"),
    "no text": (extraction_strength, [], "hits must be a sequence of texts"),
    "counts": (exact_memorisation, [[0, 1, 2]], r"hits\[0\] holds 2: for each token it is 1 \(yes\) or 0 \(no\)"),
    "one text, not several": (exact_memorisation, [1, 0], r"hits\[0\] must be \(n,\)"),
}


@pytest.mark.parametrize("function, rows, text", REFUSED.values(), ids=REFUSED)
def test_refusals(function, rows, text):
    with pytest.raises(ValueError, match=text):
        function(rows)
