"""The curve of MRI by training step: its mean, and recovery in optimizer steps."""

import pytest

from hf_moe_cpt.analysis.imbalance_curve import imbalance_curve


def test_mean_and_recovery_in_steps():
    steps = list(range(0, 200, 10))
    layer = [0.2] * 10 + [0.6, 0.4] + [0.2] * 8
    curve = imbalance_curve("run", steps, [layer, [0.2] * 20], ideal=0.1, shift_step=100)
    assert curve["mean"] == pytest.approx([(a + 0.2) / 2 for a in layer])
    # smoothed over 5 points, the last loud one is gone 6 points after the shift
    assert curve["recovery_step"] == 60 and curve["ideal"] == 0.1 and curve["layers"][1] == [0.2] * 20


def test_without_a_shift_or_anything_before_it_there_is_no_recovery():
    layers = [[0.2, 0.3, 0.2]]
    assert imbalance_curve("run", [1, 2, 3], layers, ideal=0.1)["recovery_step"] is None
    assert imbalance_curve("run", [1, 2, 3], layers, ideal=0.1, shift_step=1)["recovery_step"] is None
    assert imbalance_curve("run", [1, 2, 3], [[0.2, 0.9, 0.9]], ideal=0.1, shift_step=2)["recovery_step"] is None


def test_refusals():
    with pytest.raises(ValueError, match=r"run: 2 steps and layers of \[1\] values"):
        imbalance_curve("run", [1, 2], [[0.1]], ideal=0.1)
    with pytest.raises(ValueError, match="run: steps must rise"):
        imbalance_curve("run", [2, 1], [[0.1, 0.1]], ideal=0.1)
