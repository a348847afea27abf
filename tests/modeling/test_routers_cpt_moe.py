"""Routers: the plan against an independent iteration, gates, gradients, precision, padding and the operator's seam."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM
from hf_moe_cpt.modeling.routers_cpt_moe import ROUTER_CLASSES, CptMoeRouter, plain_sinkhorn_plan, sinkhorn_plan
from tests.helpers.tolerances import assert_matches


def log_domain_plan(logits: np.ndarray, passes: int) -> np.ndarray:
    """Another way to the same plan: scipy's logsumexp on potentials, rows and columns in turn, epsilon included."""
    T, E = logits.shape
    log_epsilon = math.log(1e-8)
    z = logits - logits.max(axis=1, keepdims=True)
    column = -math.log(E) - np.logaddexp(logsumexp(z, axis=0), log_epsilon)
    for _ in range(passes):
        row = -math.log(T) - np.logaddexp(logsumexp(z + column, axis=1), log_epsilon)
        column = -math.log(E) - np.logaddexp(logsumexp(z + row[:, None], axis=0), log_epsilon)
    return np.exp(row[:, None] + z + column)


def router(kind: str, experts: int, per_token: int, **fields) -> CptMoeRouter:
    config = CptMoeConfig.from_preset(
        "pb-granular-tiny" if kind == "softmax_topk" else "sb-granular-tiny",
        hidden_size=48,
        num_attention_heads=1,
        num_experts=experts,
        num_experts_per_tok=per_token,
        num_shared_experts=0,
        moe_intermediate_size=8,
        **fields,
    )
    module = ROUTER_CLASSES[kind](config)
    torch.nn.init.normal_(module.weight, std=0.5)
    return module


@given(tokens=st.integers(1, 40), experts=st.integers(1, 12), passes=st.integers(1, 5), scale=st.floats(0.0, 200.0))
@settings(max_examples=60, deadline=None)
def test_plan_equals_an_iteration_in_the_log_domain(tokens: int, experts: int, passes: int, scale: float) -> None:
    logits = scale * torch.randn(tokens, experts, dtype=torch.float64)
    want = torch.from_numpy(log_domain_plan(logits.numpy(), passes))
    torch.testing.assert_close(sinkhorn_plan(logits, passes), want, rtol=1e-9, atol=1e-15)


def test_plan_converges_to_its_marginals() -> None:
    logits = 2 * torch.randn(64, 31, dtype=torch.float64)
    plan = sinkhorn_plan(logits, 200)
    # The 1e-8 in the denominators (sums of size 1/64) leaves about 1e-6 of error.
    torch.testing.assert_close(plan.sum(1), torch.full((64,), 1 / 64, dtype=torch.float64), rtol=2e-6, atol=0)
    torch.testing.assert_close(plan.sum(0), torch.full((31,), 1 / 31, dtype=torch.float64), rtol=2e-6, atol=0)


def test_plan_in_fp32_follows_fp64_and_does_not_overflow() -> None:
    logits = torch.randn(512, 31, dtype=torch.float64)
    assert_matches("plan", sinkhorn_plan(logits.float(), 3), sinkhorn_plan(logits, 3))
    assert torch.isfinite(sinkhorn_plan(1000 * logits.float(), 3)).all()


def test_plan_balances_what_plain_top_k_does_not() -> None:
    """Heaviest expert's share of assignments: about twice the ideal by top-k, near the ideal by plan."""
    logits = torch.randn(4096, 8) + torch.linspace(0, 3, 8)
    heaviest = {}
    for name, scores in {"top-k": logits, "plan": sinkhorn_plan(logits, 3)}.items():
        heaviest[name] = torch.bincount(scores.argmax(1), minlength=8).max().item() / 4096
    assert heaviest["top-k"] > 0.45
    assert heaviest["plan"] < 0.16  # the ideal is 0.125


@pytest.mark.parametrize("num_padded", [1, 20, 31])
def test_masked_tokens_take_no_part_in_the_plan(num_padded: int) -> None:
    logits = torch.randn(32, 7, dtype=torch.float64)
    mask = torch.arange(32) >= num_padded
    plan = plain_sinkhorn_plan(logits, 3, mask)
    torch.testing.assert_close(plan[mask], plain_sinkhorn_plan(logits[mask], 3), rtol=1e-12, atol=0)
    assert (plan[~mask] == 0).all()


@pytest.mark.parametrize("kind", ROUTER_CLASSES)
def test_padding_does_not_change_the_route_of_other_tokens(kind: str) -> None:
    module = router(kind, 7, 3).train()
    tokens = torch.randn(40, 48)
    mask = torch.arange(40) % 4 != 0
    tokens[~mask] *= 50
    _, gates, index = module(tokens, mask)
    _, gates_alone, index_alone = module(tokens[mask])
    assert torch.equal(index[mask], index_alone)
    torch.testing.assert_close(gates[mask], gates_alone)
    assert ((index >= 0) & (index < 7)).all() and all(len(set(row)) == 3 for row in index.tolist())


@pytest.mark.parametrize(
    ("kind", "per_token", "activation"),
    [
        ("softmax_topk", 1, "softmax"),
        ("softmax_topk", 3, "softmax"),
        ("sinkhorn", 1, "sigmoid"),
        ("sinkhorn", 3, "softmax"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_gates_are_the_raw_scores_of_the_chosen_experts(
    kind: str, per_token: int, activation: str, training: bool
) -> None:
    module = router(kind, 7, per_token).train(training)
    tokens = torch.randn(33, 48)
    logits, gates, index = module(tokens)
    want_logits = tokens.double() @ module.weight.double().T
    assert_matches("logits", logits, want_logits)
    scores = want_logits.sigmoid() if activation == "sigmoid" else want_logits.softmax(-1)
    plan = torch.from_numpy(log_domain_plan(want_logits.detach().numpy(), 3))
    order = plan if kind == "sinkhorn" and training else want_logits
    assert torch.equal(index, order.topk(per_token).indices)
    assert_matches("gates", gates, scores.gather(1, index))


def test_normalised_gates_sum_to_one() -> None:
    _, gates, index = router("softmax_topk", 7, 3, norm_topk_prob=True)(torch.randn(20, 48))
    torch.testing.assert_close(gates.sum(1), torch.ones(20))
    _, raw, _ = router("softmax_topk", 7, 3)(torch.randn(20, 48))
    assert (raw.sum(1) < 1).all() and raw.sum(1).min() < 0.9


@pytest.mark.parametrize("kind", ["pb-switch-tiny", "sb-switch-tiny"])
def test_with_k_1_raw_gates_train_the_router_and_normalised_ones_would_not(kind: str) -> None:
    """The gradient that the language-model loss alone sends to the routers."""

    def gradient(normalise: bool) -> float:
        torch.manual_seed(0)
        model = CptMoeForCausalLM(CptMoeConfig.from_preset(kind, vocab_size=256, num_hidden_layers=2)).train()
        for layer in model.model.layers:
            layer.mlp.gate.norm_topk_prob = normalise  # the configuration refuses this for K = 1
        tokens = torch.randint(0, 256, (2, 32))
        model(input_ids=tokens, labels=tokens).lm_loss.backward()
        return max(layer.mlp.gate.weight.grad.abs().max().item() for layer in model.model.layers)

    assert gradient(normalise=False) > 1e-4
    assert gradient(normalise=True) < 1e-7  # g / g rounds to 1, its derivative nearly to 0


@pytest.mark.parametrize("kind", ROUTER_CLASSES)
def test_routing_is_computed_in_fp32_under_bf16_weights_and_under_autocast(kind: str) -> None:
    module = router(kind, 7, 3).to(torch.bfloat16)
    tokens = torch.randn(200, 48, dtype=torch.bfloat16)
    want = tokens.double() @ module.weight.double().T
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits, gates, _ = module(tokens)
        assert (logits.dtype, gates.dtype) == (torch.float32, torch.float32)
        assert_matches("logits", logits, want)


def test_a_registered_operator_takes_over_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, mask = torch.randn(6, 4, requires_grad=True), torch.tensor([True] * 5 + [False])
    calls = []

    def fused(logits: torch.Tensor, num_iterations: int, token_mask: torch.Tensor | None) -> torch.Tensor:
        calls.append((num_iterations, token_mask is mask))
        return 2 * plain_sinkhorn_plan(logits, num_iterations, token_mask)

    monkeypatch.setattr(torch.ops.hf_moe_cpt, "sinkhorn_plan", fused, raising=False)
    plan = sinkhorn_plan(logits, 3, mask)
    assert calls == [(3, True)] and not plan.requires_grad
    torch.testing.assert_close(plan, 2 * plain_sinkhorn_plan(logits.detach(), 3, mask))
