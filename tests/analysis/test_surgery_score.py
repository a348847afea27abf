"""The headline against scipy's harmonic mean; its parts by hand; what it prints."""

import pytest
from scipy.stats import hmean

from hf_moe_cpt.analysis.surgery_score import (
    forgetting_part,
    harmonic_mean,
    retained_part,
    robustness_part,
    surgery_score,
    update_part,
)


def test_parts():
    assert forgetting_part(0.5, 0.3) == forgetting_part(0.1, 0.3) == pytest.approx(0.8)
    assert forgetting_part(1, 0) == 0 and forgetting_part(0.3, 0.3) == 1
    assert update_part(0.9, 0.5) == pytest.approx(0.45)
    assert [retained_part(*pair) for pair in ((0.4, 0.8), (0.9, 0.8), (0.0, 0.8), (0.2, 0.0))] == [0.5, 1, 0, 1]
    assert robustness_part(0.5, 0.8) == pytest.approx(0.4)


def test_all_four():
    parts = {"forgetting": 0.9, "update": 0.45, "retained": 1.0, "robustness": 0.4}
    got = surgery_score(**parts)
    assert got.value == pytest.approx(hmean(list(parts.values())))
    assert got.parts == parts and got.left_out == ()
    assert got.formula == (
        "harmonic mean of (forgetting: 1 - |accuracy on unlearn - target|, update: reliability x generalisation, "
        "retained: min(retain after / retain before, 1), robustness: R x Q)"
    )


def test_what_was_not_measured_is_left_out_and_named():
    got = surgery_score(forgetting=0.9, retained=0.5)
    assert got.value == pytest.approx(hmean([0.9, 0.5]))
    assert got.left_out == ("update", "robustness")
    assert got.formula.endswith("; not measured and left out: update, robustness")
    assert "reliability" not in got.formula


def test_nothing_makes_up_for_a_part_of_zero():
    assert surgery_score(forgetting=1, update=0, retained=1, robustness=1).value == 0


REFUSED = {
    "nothing": (surgery_score, {}, "no part was measured: give at least one of forgetting, update, retained, robust"),
    "percent": (surgery_score, {"forgetting": 90}, r"forgetting=90 must lie in \[0, 1\]"),
    "no number": (forgetting_part, {"accuracy": float("nan"), "target": 0.3}, r"accuracy=nan must lie in \[0, 1\]"),
    "loss": (retained_part, {"after": 2.3, "before": 0.5}, r"after=2.3 must lie in \[0, 1\]"),
    "negative": (harmonic_mean, {"values": [1.0, -1.0]}, "needs finite values of at least 0"),
}


@pytest.mark.parametrize("function, arguments, text", REFUSED.values(), ids=REFUSED)
def test_refusals(function, arguments, text):
    with pytest.raises(ValueError, match=text):
        function(**arguments)
