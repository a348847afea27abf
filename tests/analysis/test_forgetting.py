"""Signs of forgetting and adaptation."""

import pytest

from hf_moe_cpt.analysis.forgetting import ContinualOutcome, adaptation, forgetting


def test_signs():
    assert forgetting(2.0, 2.5) == 0.5  # the old loss rose: forgot
    assert adaptation(4.0, 3.0) == 1.0  # the new loss fell: learnt


def test_outcome_takes_each_from_its_own_distribution():
    outcome = ContinualOutcome(old_before=2.0, old_after=2.25, new_before=4.0, new_after=3.0)
    assert (outcome.forgetting, outcome.adaptation) == pytest.approx((0.25, 1.0))
