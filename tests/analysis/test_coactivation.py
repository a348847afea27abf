"""Expert co-activation against a double loop over all pairs, closed forms and invariances."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_moe_cpt.analysis.coactivation import CoactivationCounter, coactivation_change, expert_coactivation
from tests.helpers.routings import random_routing, routings


def by_hand(index: torch.Tensor, num_experts: int) -> list[list[float]]:
    tokens = [set(row) for row in index.tolist()]
    rows = []
    for i in range(num_experts):
        mine = [token for token in tokens if i in token]
        rows.append([sum(j in token for token in mine) / len(mine) if mine else 0.0 for j in range(num_experts)])
    return rows


@given(routings(least_k=2), st.integers(0, 40))
def test_equals_all_pairs_by_hand_and_ignores_order_and_splits(routing, cut):
    index, num_experts = routing
    got = expert_coactivation(index, num_experts)
    assert torch.equal(got, torch.tensor(by_hand(index, num_experts), dtype=torch.float64))
    assert torch.equal(expert_coactivation(index[torch.randperm(len(index))].flip(1), num_experts), got)
    counter = CoactivationCounter(num_experts)
    counter.add(index[:cut].to(torch.uint8))
    counter.add(index[cut:].to(torch.int16))
    assert torch.equal(counter.conditional(), got)
    names = torch.randperm(num_experts)
    renamed = expert_coactivation(names[index], num_experts)
    assert torch.equal(renamed[names][:, names], got)


def test_rows_sum_to_k_and_the_diagonal_is_one():
    got = expert_coactivation(random_routing(500, 8, 3), 8)
    torch.testing.assert_close(got.sum(1), torch.full((8,), 3.0, dtype=torch.float64))
    assert torch.equal(got.diagonal(), torch.ones(8, dtype=torch.float64))
    dead = expert_coactivation(torch.tensor([[0, 1]] * 5), 3)
    assert dead.tolist() == [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_pairs_that_are_not_neighbours_in_rank_count():
    """OLMoE's code sees only (0, 1) and (1, 2) here."""
    assert expert_coactivation(torch.tensor([[0, 1, 2]]), 3)[0, 2] == 1.0


def test_many_experts_do_not_overflow():
    index = random_routing(200, 300, 4)
    assert torch.equal(expert_coactivation(index, 300), torch.tensor(by_hand(index, 300), dtype=torch.float64))


def test_change_between_checkpoints():
    before, after = (expert_coactivation(random_routing(300, 6, 2, seed), 6) for seed in (1, 2))
    pairs = [abs(float(after[i, j] - before[i, j])) for i in range(6) for j in range(6) if i != j]
    assert coactivation_change(before, after) == pytest.approx(sum(pairs) / 30, rel=1e-12)
    assert coactivation_change(before, before) == 0.0
    together, apart = expert_coactivation(torch.tensor([[0, 1], [2, 3]]), 4), torch.eye(4, dtype=torch.float64)
    assert coactivation_change(together, apart) == pytest.approx(4 / 12)
    with pytest.raises(ValueError, match=r"both must be \(E, E\) of one layer"):
        coactivation_change(before, together)


def test_refusals():
    with pytest.raises(ValueError, match="needs at least two experts per token, and K is 1: with a single expert"):
        expert_coactivation(torch.zeros(4, 1, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match=r"top_k_index holds 5, outside \[0, num_experts=4\)"):
        expert_coactivation(torch.tensor([[0, 5]]), 4)
    with pytest.raises(ValueError, match=r"top_k_index holds -1, outside"):
        expert_coactivation(torch.tensor([[0, -1]]), 4)
