"""Copies and near copies: closed cases, and shingles against a set of word tuples."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_moe_cpt.data.deduplication import SeenTexts, content_key, positions_without_leaks, shingles


def words(start: int, stop: int) -> str:
    return " ".join(f"word{number}" for number in range(start, stop))


def test_content_key_ignores_case_and_white_space_only():
    assert content_key("A  b\n") == content_key("a b")
    assert content_key("a b") != content_key("ab")


@given(st.lists(st.sampled_from(["a", "b", "c"]), max_size=30))
def test_shingles_count_the_distinct_n_grams(text: list[str]):
    expected = {tuple(text[start : start + 3]) for start in range(len(text) - 2)}
    assert len(shingles(" ".join(text), words_per_shingle=3, keep_one_in=1)) == len(expected)


def test_thinning_keeps_the_same_shingles_everywhere():
    whole, part = shingles(words(0, 3000)), shingles(words(500, 1500))
    assert set(part.tolist()) <= set(whole.tolist())
    assert len(whole) == pytest.approx(3000 / 4, rel=0.1)


def test_shingles_are_the_same_in_another_process():
    command = "from hf_moe_cpt.data.deduplication import shingles; print(shingles('a b c d e', 2, 1).tolist())"
    other = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(shingles("a b c d e", 2, 1).tolist())


def test_overlap_is_the_share_of_the_new_text_seen_before():
    seen = SeenTexts()
    assert seen.overlap(shingles(words(0, 2000))) == 0.0
    seen.add(shingles(words(0, 2000)))
    assert seen.overlap(shingles(words(0, 2000))) == 1.0
    assert seen.overlap(shingles(words(1000, 3000))) == pytest.approx(0.5, abs=0.05)
    assert seen.overlap(np.empty(0, dtype=np.uint64)) == 0.0


def test_add_exact_says_whether_a_text_is_new():
    seen = SeenTexts()
    assert [seen.add_exact(text) for text in ("a b", "A B ", "a c")] == [True, False, True]


def test_a_held_out_text_spread_over_several_train_texts_is_a_leak():
    held_out = [shingles(words(0, 1000)), shingles(words(5000, 6000)), shingles(words(7000, 8000))]
    train = [shingles(words(0, 500)), shingles(words(500, 3000)), shingles(words(7970, 9000))]
    assert positions_without_leaks(held_out, train) == [1, 2]
    assert positions_without_leaks(held_out, train, largest_overlap=0.0) == [1]
    assert positions_without_leaks(held_out, train, largest_overlap=1.0) == [0, 1, 2]


def test_largest_overlap_is_a_share():
    with pytest.raises(ValueError, match=r"largest_overlap=1.5 is a share: pass a number in \[0, 1\]"):
        positions_without_leaks([], [], largest_overlap=1.5)
