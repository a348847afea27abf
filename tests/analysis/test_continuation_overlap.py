"""ROUGE-L against cases counted by hand and all subsequences tried out; entropy against scipy's."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from hf_moe_cpt.analysis.continuation_overlap import lcs_length, ngram_entropy, rouge_l


SHORT = st.text("abc", max_size=8)


@given(SHORT, SHORT)
@settings(max_examples=80, deadline=None)
def test_lcs_of_short_strings_by_trying_all_subsequences(first, second):
    def subsequences(text):
        return {picked for size in range(len(text) + 1) for picked in combinations(text, size)}

    assert lcs_length(first, second) == max(map(len, subsequences(first) & subsequences(second)))


def test_lcs_of_long_lists_against_the_table():
    generator = np.random.default_rng(0)
    for sizes in ((150, 90), (64, 64), (63, 65), (1, 200)):
        first, second = (generator.integers(0, 9, size).tolist() for size in sizes)
        table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
        for i, a in enumerate(first):
            for j, b in enumerate(second):
                table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
        assert lcs_length(first, second) == table[-1, -1]


def test_rouge_l_by_hand():
    # the example of Lin 2004, section 3, in which the order of the words decides
    reference = "police killed the gunman"
    got = rouge_l(["police kill the gunman", "the gunman kill police", "The gunman, police-killed!"], [reference] * 3)
    np.testing.assert_allclose(got.f1, [3 / 4, 2 / 4, 2 / 4])
    got = rouge_l(["a b c", "A... b", "x", "", "été"], ["a c d e f", "a, b", "y", "y", "été"])
    np.testing.assert_allclose(got.precision, [2 / 3, 1, 0, 0, 1])
    np.testing.assert_allclose(got.recall, [2 / 5, 1, 0, 0, 1])  # "été" has the word "t" only
    np.testing.assert_allclose(got.f1, [2 / (3 / 2 + 5 / 2), 1, 0, 0, 1])


def test_swapping_prediction_and_reference_swaps_precision_and_recall():
    one, other = ["the cat sat on the mat", "a b"], ["on the mat the cat sat down", "b a b"]
    there, back = rouge_l(one, other), rouge_l(other, one)
    np.testing.assert_array_equal(there.precision, back.recall)
    np.testing.assert_array_equal(there.f1, back.f1)


def test_entropy_against_scipy():
    text = "It is so, it is so, it is not. It's so!"
    words = ["It", "is", "so", ",", "it", "is", "so", ",", "it", "is", "not", ".", "It", "'", "s", "so", "!"]
    parts = []
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = [tuple(words[place : place + n]) for place in range(len(words) - n + 1)]
        parts.append(weight * entropy([grams.count(gram) for gram in set(grams)], base=2))
    np.testing.assert_allclose(ngram_entropy([text]), [sum(parts) / 2], rtol=1e-12)


def test_entropy_of_extremes():
    got = ngram_entropy([" ".join(map(str, range(18))), "no no no no no", "one", "", "two words"])
    np.testing.assert_allclose(got, [(2 / 3 * np.log2(17) + 4 / 3 * 4) / 2, 0, 0, 0, 0])
    assert not np.signbit(got).any()


REFUSED = {
    "one string": (("a b", ["a"]), "predictions must be a sequence of at least one string, got 'a b'"),
    "none": (([], []), "predictions must be a sequence of at least one string"),
    "lengths": ((["a"], ["a", "b"]), "references has 2 rows and the other columns 1: give one text for each row"),
    "a number": ((["a", 3], ["a", "b"]), r"predictions\[1\] must be a string, got int"),
}


@pytest.mark.parametrize("arguments, text", REFUSED.values(), ids=REFUSED)
def test_refusals(arguments, text):
    with pytest.raises(ValueError, match=text):
        rouge_l(*arguments)
