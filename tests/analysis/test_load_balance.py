"""Unevenness of loads, certainty of routers and domains of experts, against numpy, scipy and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy, variation

from hf_moe_cpt.analysis.domain_specialization import domain_specialization
from hf_moe_cpt.analysis.load_balance import dead_experts, load_cv
from hf_moe_cpt.analysis.router_certainty import router_confidence, router_distribution, router_entropy
from hf_moe_cpt.analysis.routing import expert_load
from tests.helpers.routings import random_routing, routings


@given(routings())
def test_cv_equals_scipy_and_lies_in_its_range(routing):
    index, num_experts = routing
    load = expert_load(index, num_experts)
    assert float(load_cv(load)) == pytest.approx(variation(load.numpy()), rel=1e-12)
    assert 0 <= float(load_cv(load)) <= math.sqrt(num_experts / index.shape[1] - 1) + 1e-12
    assert float(load_cv(load[torch.randperm(num_experts)])) == pytest.approx(float(load_cv(load)), rel=1e-12)


def test_cv_of_uniform_collapsed_and_empty_loads():
    loads = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [8, 8, 0, 0], [0, 0, 0, 0]])
    assert load_cv(loads).tolist()[:3] == pytest.approx([0.0, math.sqrt(3), 1.0])
    assert math.isnan(load_cv(loads)[3])


def test_dead_experts_are_counted_by_layer():
    loads = torch.tensor([[0, 5, 0, 5], [1, 99, 100, 200], [3, 3, 3, 3]])
    assert dead_experts(loads).tolist() == [2, 0, 0]
    assert dead_experts(loads, share_of_mean=0.01).tolist() == [2, 1, 0]
    with pytest.raises(ValueError, match=r"share_of_mean=1 must lie in \[0, 1\)"):
        dead_experts(loads, 1)


@given(st.integers(1, 9), st.integers(2, 9), st.integers(0, 99))
def test_entropy_and_confidence_equal_scipy(tokens, num_experts, seed):
    logits = torch.randn(tokens, num_experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    probs = router_distribution(logits)
    want = [entropy(row) / math.log(num_experts) for row in np.exp(logits.numpy())]  # scipy makes them sum to 1
    assert router_entropy(probs).tolist() == pytest.approx(want, rel=1e-9)
    chosen = probs.topk(min(2, num_experts)).values
    assert torch.equal(router_confidence(chosen), router_confidence(probs))
    assert (router_confidence(probs) >= 1 / num_experts - 1e-12).all()


def test_certain_and_undecided_routers():
    probs = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    assert router_entropy(probs).tolist() == [0.0, 1.0]
    assert router_confidence(probs).tolist() == [1.0, 0.25]
    assert router_entropy(torch.ones(3, 1)).tolist() == [0.0, 0.0, 0.0]


def test_recorded_probabilities_are_not_softened_again():
    probs = torch.softmax(torch.randn(6, 5), -1)
    assert torch.equal(router_distribution(probs), probs)
    assert torch.equal(router_distribution(probs.bfloat16()), probs.bfloat16().float())
    positive = torch.rand(6, 5) + 1  # not negative, but no distribution either
    torch.testing.assert_close(router_distribution(positive), positive.softmax(-1))


def test_domain_specialization_equals_counting():
    routings_of = [random_routing(20, 6, 2, seed=1), random_routing(7, 6, 2, seed=2)]
    load = torch.stack([expert_load(index, 6) for index in routings_of])
    got = domain_specialization(load, torch.tensor([20, 7]))
    for row, index in zip(got.tolist(), routings_of, strict=True):
        want = [sum(expert in token for token in index.tolist()) / len(index) for expert in range(6)]
        assert row == pytest.approx(want) and sum(row) == pytest.approx(2)
    with pytest.raises(ValueError, match=r"they must be \(D, E\) and \(D,\)"):
        domain_specialization(load, torch.tensor([20]))
