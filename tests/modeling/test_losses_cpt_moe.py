"""Router penalties against loops in float64, their gradients, padding, scope of the counts and the weight."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_moe_cpt.modeling.losses_cpt_moe import (
    expert_counts,
    load_balancing_loss,
    penalty_weight,
    router_penalties,
    router_z_loss,
    token_mask_of,
)
from tests.helpers.tolerances import assert_matches


def balance_by_hand(logits: list[list[float]], chosen: list[list[int]], valid: list[bool]) -> float:
    """E * sum_i f_i P_i in plain Python floats."""
    E, K = len(logits[0]), len(chosen[0])
    tokens = [t for t, is_valid in enumerate(valid) if is_valid]
    total = 0.0
    for expert in range(E):
        f = sum(chosen[t].count(expert) for t in tokens) / (len(tokens) * K)
        P = sum(math.exp(logits[t][expert]) / sum(map(math.exp, logits[t])) for t in tokens) / len(tokens)
        total += f * P
    return E * total


def z_by_hand(logits: list[list[float]], valid: list[bool]) -> float:
    tokens = [t for t, is_valid in enumerate(valid) if is_valid]
    return sum(math.log(sum(map(math.exp, logits[t]))) ** 2 for t in tokens) / len(tokens)


@st.composite
def routed(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float64 logits, ids that are not their top-k (as Sinkhorn's are not) and a mask with a valid token."""
    tokens, experts = draw(st.integers(1, 20)), draw(st.integers(1, 9))
    per_token = draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = 3 * torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    index = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :per_token]
    mask = torch.rand(tokens, generator=generator) > 0.3
    mask[draw(st.integers(0, tokens - 1))] = True
    return logits, index, mask


@given(routed())
@settings(max_examples=60, deadline=None)
def test_penalties_equal_a_loop_over_tokens(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    logits, index, mask = case
    counts = expert_counts(index, logits.shape[1], mask)
    got = load_balancing_loss(logits, counts, mask).item()
    assert got == pytest.approx(balance_by_hand(logits.tolist(), index.tolist(), mask.tolist()), rel=1e-12)
    assert router_z_loss(logits, mask).item() == pytest.approx(z_by_hand(logits.tolist(), mask.tolist()), rel=1e-12)


@given(routed())
@settings(max_examples=30, deadline=None)
def test_padding_takes_part_in_nothing(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """As if it were not there, even where it holds no number; and no gradient reaches it."""
    logits, index, mask = case
    padded = logits.masked_fill(~mask[:, None], float("nan")).requires_grad_()
    counts = expert_counts(index, logits.shape[1], mask)
    assert torch.equal(counts, expert_counts(index[mask], logits.shape[1]))
    assert counts.sum() == mask.sum() * index.shape[1]
    aux, z_loss = router_penalties((padded,), (index,), mask)
    want = router_penalties((logits[mask],), (index[mask],))
    torch.testing.assert_close((aux, z_loss), want, rtol=1e-12, atol=0)


def test_padding_gets_no_gradient() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False, True, True, False, True])
    aux, z_loss = router_penalties((logits,), (logits.topk(2).indices,), mask)
    (aux + z_loss).backward()
    assert (logits.grad[~mask] == 0).all() and (logits.grad[mask] != 0).any(1).all()


def test_uniform_routing_gives_one_and_collapse_gives_the_number_of_experts() -> None:
    index = torch.arange(8).repeat(4)[:, None]
    uniform = load_balancing_loss(torch.zeros(32, 8), expert_counts(index, 8))
    assert uniform.item() == pytest.approx(1.0)
    collapsed = torch.zeros(32, 8)
    collapsed[:, 5] = 100.0
    counts = expert_counts(torch.full((32, 1), 5), 8)
    assert load_balancing_loss(collapsed, counts).item() == pytest.approx(8.0)


def test_layers_are_summed_and_gradients_are_those_of_the_formula() -> None:
    logits = [torch.randn(10, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    index = [z.detach().topk(2).indices for z in logits]
    aux, z_loss = router_penalties(tuple(logits), tuple(index))
    apart = [
        (load_balancing_loss(z, expert_counts(i, 5)), router_z_loss(z)) for z, i in zip(logits, index, strict=True)
    ]
    torch.testing.assert_close((aux, z_loss), tuple(map(sum, zip(*apart, strict=True))))

    z = logits[0]
    P = z.softmax(-1)
    f = torch.bincount(index[0].flatten(), minlength=5).double() / 20
    want = 5 / 10 * P * (f - (P * f).sum(1, keepdim=True))  # through P only
    assert_matches("aux gradient", torch.autograd.grad(aux, z, retain_graph=True)[0], want)
    want = 2 / 10 * z.logsumexp(1, keepdim=True) * P
    assert_matches("z gradient", torch.autograd.grad(z_loss, z)[0], want)


def test_the_weight_is_the_share_of_predicted_tokens() -> None:
    labels = torch.tensor([[5, -100, 7, 8], [1, 2, 3, -100]])
    assert penalty_weight(labels) == 1.0
    assert penalty_weight(labels, None, 16).item() == 4 / 16  # the first of a row predicts nothing
    assert penalty_weight(labels, None, torch.tensor(8)).item() == 0.5
    assert penalty_weight(labels, torch.tensor([[3, 3, -100, -100]]), 4).item() == 0.5


def test_the_mask_is_the_last_columns_of_a_two_dimensional_attention_mask() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
    assert token_mask_of(mask, 4).tolist() == [False, False, True, True, False, True, True, False]
    assert token_mask_of(mask, 1).tolist() == [True, False]
    assert token_mask_of(None, 4) is None
    assert token_mask_of(mask[:, None, None].expand(2, 1, 4, 4), 4) is None
