"""Steps to relearn against numpy's interpolation; ratios of attacks at their corners and by hand."""

import numpy as np
import pytest

from hf_moe_cpt.analysis.robustness import quantisation_stability, relearning_robustness, steps_until


def test_steps_between_measurements():
    steps, values = [0, 5, 10, 20], [0.25, 0.5, 0.4, 1.0]
    assert [steps_until(steps, values, goal) for goal in (0.1, 0.25, 0.5, 1.0)] == [0, 0, 5, 20]
    assert steps_until(steps, values, 0.375) == pytest.approx(np.interp(0.375, values[:2], steps[:2]))
    assert steps_until(steps, values, 0.7) == pytest.approx(np.interp(0.7, values[2:], steps[2:]))
    assert steps_until(steps, values, 1.01) is None
    assert steps_until([0], [0.3], 0.4) is None


def test_relearning_ratio():
    assert relearning_robustness(0.4, 0.1) == pytest.approx(0.25)
    assert relearning_robustness(0.1, 0.4) == 1  # learns slower than one that never knew
    assert relearning_robustness(0.0, 0.4) == relearning_robustness(-0.2, -0.1) == relearning_robustness(0.0, 0.0) == 1
    assert relearning_robustness(0.4, 0.0) == relearning_robustness(0.4, -0.1) == 0


def test_quantisation_ratio_is_symmetric():
    assert quantisation_stability(0.21, 0.83) == pytest.approx(1 - 0.62 / 1.04)
    assert quantisation_stability(0.83, 0.21) == quantisation_stability(0.21, 0.83)
    assert [quantisation_stability(*pair) for pair in ((0.5, 0.5), (0.0, 0.0), (0.0, 0.3), (0.3, 0.0))] == [1, 1, 0, 0]


REFUSED = {
    "disorder": (lambda: steps_until([0, 5, 5], [0.1, 0.2, 0.3], 0.2), r"steps must ascend, got \[0.0, 5.0, 5.0\]"),
    "lengths": (lambda: steps_until([0, 5], [0.1], 0.2), "values has 1 rows and the other columns 2"),
    "no number": (lambda: relearning_robustness(float("nan"), 0.1), "gain=nan must be finite"),
    "below 0": (lambda: quantisation_stability(-0.1, 0.1), "before=-0.1 and after=0.1 must be at least 0"),
}


@pytest.mark.parametrize("call, text", REFUSED.values(), ids=REFUSED)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()
