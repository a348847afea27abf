"""Numbers of raw measurements made by hand: accuracies, old answers, losses, the gauge, curves of relearning."""

import math

import pytest

from hf_moe_cpt.scripts.compare_surgery_measures import curve_of, measures_of, steps_until, validation_score


def asked(*questions: tuple[list[float], list[int], int, int | None]) -> dict:
    names = ("logp", "tokens", "answer", "old_answer")
    return dict(zip(names, map(list, zip(*questions, strict=True)), strict=True))


# the true option is 0
PLAIN = asked(([-1.0, -2.0, -3.0], [1, 1, 1], 0, None), ([-2.0, -1.0, -3.0], [1, 1, 1], 0, None))
UPDATED = asked(
    ([-4.0, -3.0, -2.0], [4, 2, 1], 0, None),
    ([-1.0, -2.0, -9.0], [1, 1, 1], 0, 1),
    ([-2.0, -1.0, -9.0], [1, 1, 1], 0, 1),
    ([-2.0, -3.0, -1.0], [1, 1, 1], 0, 1),
)


def test_accuracies_and_old_answers():
    found = measures_of({"questions": {"unlearn": {"mcq": PLAIN, "paraphrase": PLAIN}, "update": {"mcq": UPDATED}}})
    assert found == pytest.approx(
        {
            "accuracy/unlearn": 1 / 2,
            "accuracy/unlearn_paraphrase": 1 / 2,
            "accuracy/update": 2 / 4,
            "accuracy/changed": 1 / 3,
            "old_answers": 1 / 3,
        }
    )


def test_losses_gauge_and_divergence_weigh_texts_and_tokens():
    texts = {"unlearn": {"logp": [[-4.0], [-1.0, -3.0]]}, "unseen": {"logp": [[-2.0, -2.0]]}}
    divergence = {"retain": {"kl": [[0.3], [0.0, 0.0]], "agrees": [[False], [True, True]]}}
    found = measures_of({"texts": texts, "divergence": divergence})
    expected = {"ce/unlearn": 3.0, "ce/unseen": 2.0, "gauge": 1.0, "kl/retain": 0.1, "agreement/retain": 2 / 3}
    assert found == pytest.approx(expected)


def test_score_is_the_harmonic_mean_of_forgotten_learnt_and_kept():
    measures = {"accuracy/unlearn": 0.2, "accuracy/unseen": 0.4, "accuracy/update": 0.5, "accuracy/retain": 1.0}
    assert validation_score(measures) == pytest.approx(3 / (1 / 0.8 + 1 / 0.5 + 1))
    assert validation_score(measures | {"accuracy/update": 0.0}) == 0.0


def test_curves_and_when_they_reach_an_accuracy():
    raw = {"steps": [0, 5, 10], "taught": [{"right": [0.0, 0.5]}, {"right": [1.0, 0.0]}, {"right": [1.0, 1.0]}]}
    curve = curve_of(raw)
    assert curve == {"steps": [0, 5, 10], "taught": [0.25, 0.5, 1.0]}
    assert [steps_until(curve, goal) for goal in (0.2, 0.25, 0.375, 0.75, 1.0)] == [0.0, 0.0, 2.5, 7.5, 10.0]
    assert steps_until(curve, math.nextafter(1.0, 2.0)) is None
