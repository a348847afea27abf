"""Routing metrics against counting by hand, known bounds, and what must not change them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from hf_moe_cpt.analysis.routing import (
    expert_load,
    imbalance_around_shift,
    load_entropy,
    max_routing_imbalance,
    max_routing_imbalance_from_load,
    normalized_imbalance,
    recovery_step,
)


@st.composite
def routings(draw):
    """(top_k_index (T, K) with distinct experts per token, num_experts)."""
    num_experts = draw(st.integers(1, 12))
    k = draw(st.integers(1, num_experts))
    tokens = draw(st.integers(1, 40))
    scores = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    return scores.topk(k, dim=-1).indices, num_experts


@given(routings(), st.integers(0, 99))
def test_load_and_mri_equal_counting_by_hand(routing, seed):
    index, num_experts = routing
    mask = torch.rand(len(index), generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[0] = True
    kept = [row for row, keep in zip(index.tolist(), mask.tolist(), strict=True) if keep]
    counts = [sum(expert in row for row in kept) for expert in range(num_experts)]
    assert expert_load(index, num_experts, mask).tolist() == counts
    assert float(max_routing_imbalance(index, num_experts, mask)) == pytest.approx(max(counts) / len(kept), rel=1e-6)


@given(routings())
def test_mri_lies_between_balance_and_one_and_ignores_expert_names(routing):
    index, num_experts = routing
    mri = max_routing_imbalance(index, num_experts)
    assert index.shape[1] / num_experts - 1e-6 <= mri <= 1
    renamed = torch.randperm(num_experts)[index]
    assert torch.equal(max_routing_imbalance(renamed, num_experts), mri)
    shuffled = index[torch.randperm(len(index))].flip(1)
    assert torch.equal(max_routing_imbalance(shuffled, num_experts), mri)


@given(routings(), st.integers(1, 39))
def test_loads_of_parts_add_up_to_the_whole(routing, cut):
    index, num_experts = routing
    parts = expert_load(index[:cut], num_experts) + expert_load(index[cut:], num_experts)
    got = max_routing_imbalance_from_load(parts, len(index))
    assert torch.equal(got, max_routing_imbalance(index, num_experts))


def test_perfect_and_worst_balance_of_the_paper_models():
    granular = torch.stack([torch.arange(31).roll(-i) for i in range(31)])[:, :3]
    assert float(max_routing_imbalance(granular, 31)) == pytest.approx(3 / 31)
    assert float(normalized_imbalance(max_routing_imbalance(granular, 31), 31, 3)) == pytest.approx(1.0)
    collapsed = torch.zeros(50, 1, dtype=torch.int32)
    assert float(max_routing_imbalance(collapsed, 8)) == 1.0
    assert normalized_imbalance(1.0, 8, 1) == 8.0


def test_mri_of_stacked_layers():
    load = torch.tensor([[5, 5, 0], [9, 1, 0]])
    assert max_routing_imbalance_from_load(load, 10).tolist() == pytest.approx([0.5, 0.9])
    assert max_routing_imbalance_from_load(load, torch.tensor([10, 20])).tolist() == pytest.approx([0.5, 0.45])


def test_padding_only_batch_has_no_imbalance():
    index = torch.zeros(4, 2, dtype=torch.long)
    assert torch.isnan(max_routing_imbalance(index, 3, torch.zeros(4, dtype=torch.bool)))


def test_load_entropy_equals_scipy_and_its_ends():
    load = torch.tensor([[3, 1, 4, 1], [1, 0, 0, 0], [7, 7, 7, 7]])
    want = [entropy(row) / math.log(4) for row in load.numpy()]
    assert load_entropy(load).tolist() == pytest.approx(want, rel=1e-12)
    assert load_entropy(torch.tensor([6])).item() == 1.0


@pytest.mark.parametrize(
    "level, patience, want",
    [(0.2, None, 4), (0.2, 1, 2), (0.2, 2, 4), (0.2, 5, None), (0.05, None, None), (1.0, None, 0)],
)
def test_recovery_step(level, patience, want):
    mri = [0.1, 0.1, 0.1, 0.5, 0.4, 0.2, 0.3, 0.1, 0.1, 0.1]
    assert recovery_step(mri, 3, level, patience) == want


def test_recovery_against_another_runs_curve_and_nan():
    mri = [0.1, 0.9, 0.3, math.nan, 0.2, 0.2]
    assert recovery_step(mri, 1, [0.1, 0.3, 0.3, 0.3, 0.25, 0.2]) == 3
    assert recovery_step([*mri, math.nan], 1, 0.9) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0, 1), st.data())
def test_recovery_step_is_the_first_quiet_tail(mri, level, data):
    shift = data.draw(st.integers(0, len(mri) - 1))
    tails = [i - shift for i in range(shift, len(mri)) if all(value <= level for value in mri[i:])]
    assert recovery_step(mri, shift, level) == (tails[0] if tails else None)


def test_imbalance_around_shift_summary():
    before = [0.9] * 10 + [0.1] * 20
    after = [0.5, 0.3, 0.2] + [0.104] * 40
    got = imbalance_around_shift(before, after, smooth=1, steps_per_point=10)
    assert (got.before, got.peak, got.after) == pytest.approx((0.1, 0.5, 0.104))
    assert got.recovery_step == 30
    smoothed = imbalance_around_shift(before, after, smooth=4)
    assert smoothed.peak == 0.5 and smoothed.recovery_step == 6  # 3 + the memory of a mean over 4 points
    assert imbalance_around_shift(before, [0.5] * 9).recovery_step is None


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: expert_load(torch.zeros(2, 3, 4, dtype=torch.long), 4), r"must be \(T, K\), got \(2, 3, 4\)"),
        (lambda: expert_load(torch.zeros(2, 3), 4), r"must hold integers, got torch.float32"),
        (lambda: expert_load(torch.zeros(2, 3, dtype=torch.long), 4, torch.ones(3)), r"\(2,\) like the tokens"),
        (lambda: normalized_imbalance(0.5, 4, 5), r"num_experts_per_tok=5"),
        (lambda: recovery_step([0.1], 1, 0.2), r"shift_step=1 is outside the 1 points"),
        (lambda: recovery_step([0.1], 0, 0.2, 0), r"patience=0"),
        (lambda: recovery_step([0.1], 0, [0.2, 0.3]), r"level has 2 points and mri 1"),
        (lambda: imbalance_around_shift([], [0.1]), r"mri_before has no points"),
        (lambda: imbalance_around_shift([0.1], [0.1], smooth=0), r"smooth=0"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()
