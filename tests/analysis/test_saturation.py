"""Router saturation against sets in a double loop, its ends, and what must not change it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_moe_cpt.analysis import saturation
from hf_moe_cpt.analysis.saturation import SaturationCounter, router_saturation
from tests.helpers.routings import random_routing, routings


@given(routings(), st.integers(0, 99), st.integers(0, 40))
def test_equals_sets_and_ignores_names_order_and_splits(routing, seed, cut):
    before, num_experts = routing
    after = random_routing(len(before), num_experts, before.shape[1], seed + 1000)
    want = sum(
        len(set(old) & set(new)) / len(old) for old, new in zip(before.tolist(), after.tolist(), strict=True)
    ) / len(before)
    assert router_saturation(before, after) == pytest.approx(want, rel=1e-12)
    names = torch.randperm(num_experts)
    assert router_saturation(names[before], names[after].flip(1)) == router_saturation(before, after)
    counter = SaturationCounter(before.shape[1])
    counter.add(before[:cut].to(torch.uint8), after[:cut].to(torch.uint8))
    counter.add(before[cut:].short(), after[cut:].short())
    assert counter.saturation() == router_saturation(before, after)


def test_ends_and_the_random_floor():
    index = random_routing(20_000, 16, 4, seed=1)
    assert router_saturation(index, index) == 1.0
    assert router_saturation(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1, dtype=torch.int64)) == 0.0
    assert router_saturation(index, random_routing(20_000, 16, 4, seed=2)) == pytest.approx(4 / 16, abs=0.01)
    assert math.isnan(SaturationCounter(4).saturation())


def test_padding_does_not_count():
    before, after = random_routing(10, 6, 2, seed=1), random_routing(10, 6, 2, seed=2)
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1, 0])
    kept = mask.bool()
    assert router_saturation(before, after, mask) == router_saturation(before[kept], after[kept])


def test_chunks_change_nothing(monkeypatch):
    before, after = random_routing(50, 300, 3, seed=1), random_routing(50, 300, 3, seed=2)
    whole = router_saturation(before, after)
    monkeypatch.setattr(saturation, "chunks", lambda tokens: [slice(at, at + 7) for at in range(0, tokens, 7)])
    assert router_saturation(before, after) == whole


@pytest.mark.parametrize(
    "before, after, text",
    [
        (torch.zeros(2, 1, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64), r"before is \(2, 1\) and after"),
        (torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64), "as many experts each"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), r"must be \(T, K\), got \(2,\)"),
        (torch.zeros(2, 1), torch.zeros(2, 1), "must hold integers, got torch.float32"),
    ],
)
def test_refusals(before, after, text):
    with pytest.raises(ValueError, match=text):
        router_saturation(before, after)
    with pytest.raises(ValueError, match=r"token_mask must be \(2,\) like the tokens, got \(3,\)"):
        router_saturation(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64), torch.ones(3))
