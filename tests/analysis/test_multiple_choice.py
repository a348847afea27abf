"""Multiple choice by perplexity against a loop over questions, and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_moe_cpt.analysis.multiple_choice import mcq_accuracy, mcq_correct


def test_right_wrong_and_ties_by_hand():
    losses = [[1.0, 2.0, 3.0], [2.0, 1.0, 3.0], [1.0, 1.0, 3.0], [1.0, 1.0, 1.0], [3.0, 3.0, 1.0]]
    got = mcq_correct(losses, [0, 0, 0, 2, 0])
    np.testing.assert_allclose(got, [1, 0, 1 / 2, 1 / 3, 0])
    assert got.dtype == np.float64
    assert mcq_accuracy(losses, [0, 0, 0, 2, 0]) == pytest.approx((1 + 1 / 2 + 1 / 3) / 5)


@given(st.integers(1, 12), st.integers(2, 5), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_every_question_as_a_loop_finds_it(questions, options, seed):
    generator = np.random.default_rng(seed)
    losses, answers = generator.integers(0, 3, (questions, options)), generator.integers(0, options, questions)
    expected = []
    for row, answer in zip(losses.tolist(), answers.tolist(), strict=True):
        lowest = [place for place, loss in enumerate(row) if np.exp(loss) == min(map(np.exp, row))]
        expected.append(1 / len(lowest) if answer in lowest else 0)
    np.testing.assert_allclose(mcq_correct(losses, answers), expected)
    by_answer = sum(mcq_correct(losses, np.full(questions, place)) for place in range(options))
    np.testing.assert_allclose(by_answer, 1)  # an answer for each question, whatever it is


def test_guessing_gives_one_over_the_options():
    generator = np.random.default_rng(0)
    assert mcq_accuracy(generator.random((20_000, 3)), generator.integers(0, 3, 20_000)) == pytest.approx(
        1 / 3, abs=0.01
    )


def test_fewer_options_are_filled_up_with_infinity():
    assert mcq_correct([[2.0, 1.0, np.inf], [1.0, 2.0, 3.0]], [1, 0]).tolist() == [1, 1]


REFUSED = {
    "one option": (
        [[1.0]],
        [0],
        r"option_losses must be \(questions, options\) with two options or more, got \(1, 1\)",
    ),
    "ragged": ([[1.0, 2.0], [1.0]], [0, 0], "option_losses must be numbers in rows of one length, got "),
    "no number": ([[1.0, np.nan]], [0], "option_losses holds nan at place 1: no value may be NaN"),
    "answer too high": ([[1.0, 2.0]] * 2, [0, 2], "answers holds 2 at question 1: .* an integer from 0 to 1"),
    "answer below": ([[1.0, 2.0]], [-1], "answers holds -1 at question 0"),
    "half an answer": ([[1.0, 2.0]], [0.5], "answers holds 0.5"),
    "answers missing": ([[1.0, 2.0]] * 3, [0], "answers has 1 rows and the other columns 3"),
}


@pytest.mark.parametrize("losses, answers, text", REFUSED.values(), ids=REFUSED)
def test_refusals(losses, answers, text):
    with pytest.raises(ValueError, match=text):
        mcq_accuracy(losses, answers)
