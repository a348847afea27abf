"""Router penalties against loops in float64, their gradients, padding, scope of the counts and the weight.

The penalties weigh the same for any accumulation count: transformers' Trainer takes the same step.

Routers: the plan against an independent iteration, gates, gradients, precision, padding and the operator's seam.
"""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp
from transformers import DeepseekV3Config, Trainer, TrainingArguments
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import (
    ROUTER_CLASSES,
    CptMoeForCausalLM,
    CptMoeRouter,
    expert_counts,
    float32_linear,
    in_three_pieces,
    load_balancing_loss,
    penalty_weight,
    plain_sinkhorn_plan,
    router_penalties,
    router_z_loss,
    sinkhorn_plan,
    token_mask_of,
)
from tests.helpers.tolerances import assert_matches, relative_rms_error


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
def test_penalties_equal_a_loop_over_tokens(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    logits, index, mask = case
    counts = expert_counts(index, logits.shape[1], mask)
    got = load_balancing_loss(logits, counts, mask).item()
    assert got == pytest.approx(balance_by_hand(logits.tolist(), index.tolist(), mask.tolist()), rel=1e-12)
    assert router_z_loss(logits, mask).item() == pytest.approx(z_by_hand(logits.tolist(), mask.tolist()), rel=1e-12)


@given(routed())
def test_padding_takes_part_in_nothing(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    """As if it were not there, even where it holds no number."""
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


def test_the_weight_is_the_share_of_predicted_tokens_and_the_mask_the_last_columns() -> None:
    labels = torch.tensor([[5, -100, 7, 8], [1, 2, 3, -100]])
    assert penalty_weight(labels) == 1.0
    assert penalty_weight(labels, None, 16).item() == 4 / 16  # the first of a row predicts nothing
    assert penalty_weight(labels, None, torch.tensor(8)).item() == 0.5
    assert penalty_weight(labels, torch.tensor([[3, 3, -100, -100]]), 4).item() == 0.5
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
    assert token_mask_of(mask, 4).tolist() == [False, False, True, True, False, True, True, False]
    assert token_mask_of(mask, 1).tolist() == [True, False]
    assert token_mask_of(None, 4) is None
    assert token_mask_of(mask[:, None, None].expand(2, 1, 4, 4), 4) is None


def router_update(tmp_path, accumulation: int, z_loss_coef: float) -> torch.Tensor:
    """What one SGD step on 8 sequences does to all routers, in `accumulation` micro-batches."""
    torch.manual_seed(0)
    config = CptMoeConfig.from_preset(
        "pb-granular-tiny",
        vocab_size=64,
        num_hidden_layers=2,
        router_aux_loss_coef=0.0,  # not linear in the batch: only its scale is the same, not its value
        router_z_loss_coef=z_loss_coef,
        output_router_logits=True,
    )
    model = CptMoeForCausalLM(config)
    before = torch.stack([layer.mlp.gate.weight.detach().clone() for layer in model.model.layers])
    tokens = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(1)).tolist()
    arguments = TrainingArguments(
        output_dir=tmp_path,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": tokens, "labels": tokens}),
        optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None),
    )
    trainer.train()
    return torch.stack([layer.mlp.gate.weight.detach() for layer in model.model.layers]) - before


def test_one_step_is_the_same_for_any_accumulation(tmp_path) -> None:
    whole = router_update(tmp_path, 1, 0.1)
    without_penalty = router_update(tmp_path, 1, 0.0)
    assert relative_rms_error(whole, without_penalty) > 0.5, "the penalty must be visible for this test to see it"
    assert relative_rms_error(router_update(tmp_path, 4, 0.1), whole) == pytest.approx(0.0, abs=2e-5)


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
        {"softmax_topk": "pb", "sinkhorn": "sb", "bias_topk": "lf"}[kind] + "-granular-tiny",
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
def test_plan_equals_an_iteration_in_the_log_domain(tokens: int, experts: int, passes: int, scale: float) -> None:
    logits = scale * torch.randn(tokens, experts, dtype=torch.float64)
    want = torch.from_numpy(log_domain_plan(logits.numpy(), passes))
    torch.testing.assert_close(sinkhorn_plan(logits, passes), want, rtol=1e-9, atol=1e-15)


def test_plan_converges_does_not_overflow_and_balances() -> None:
    logits = 2 * torch.randn(64, 31, dtype=torch.float64)
    plan = sinkhorn_plan(logits, 200)
    # The 1e-8 in the denominators (sums of size 1/64) leaves about 1e-6 of error.
    torch.testing.assert_close(plan.sum(1), torch.full((64,), 1 / 64, dtype=torch.float64), rtol=2e-6, atol=0)
    torch.testing.assert_close(plan.sum(0), torch.full((31,), 1 / 31, dtype=torch.float64), rtol=2e-6, atol=0)
    logits = torch.randn(48, 31, dtype=torch.float64)
    assert_matches("plan", sinkhorn_plan(logits.float(), 3), sinkhorn_plan(logits, 3))
    assert torch.isfinite(sinkhorn_plan(1000 * logits.float(), 3)).all()
    # Heaviest expert's share of assignments: about twice the ideal by top-k, near the ideal by plan
    logits = (torch.randn(4096, 8) + torch.linspace(0, 3, 8)).double()
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
    [*(("softmax_topk", k, "softmax") for k in (1, 3)), ("sinkhorn", 1, "sigmoid"), ("sinkhorn", 3, "softmax")],
)
@pytest.mark.parametrize("training", [True, False])
def test_gates_are_the_raw_scores_of_the_chosen_experts(kind, per_token, activation, training) -> None:
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


def test_the_router_with_a_bias_is_deepseeks() -> None:
    config = DeepseekV3Config(
        hidden_size=48, n_routed_experts=7, num_experts_per_tok=3, n_group=1, topk_group=1, routed_scaling_factor=1.0
    )
    theirs, ours = DeepseekV3TopkRouter(config), router("bias_topk", 7, 3)
    theirs.load_state_dict(ours.state_dict() | {"e_score_correction_bias": torch.randn(7)})
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randn(33, 48)
    for got, want in zip(_in_order(ours(tokens)), _in_order(theirs(tokens)), strict=True):
        torch.testing.assert_close(got, want)
    assert torch.equal(ours.train()(tokens)[2], ours.eval()(tokens)[2])
    assert not torch.equal(ours(tokens)[2], ours(tokens)[0].topk(3).indices)  # the bias decides


def _in_order(routed: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    logits, gates, index = routed
    order = index.argsort(-1)
    return logits, gates.gather(1, order), index.gather(1, order)


@pytest.mark.parametrize("kind, per_token", [(kind, k) for kind in ROUTER_CLASSES for k in (1, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_a_scaling_factor_multiplies_gates_and_their_gradients_and_nothing_else(kind, per_token, training) -> None:
    """Against the same router without it; normalised gates too."""
    for normalises in {False, per_token > 1}:
        fields = {"norm_topk_prob": normalises}
        plain = router(kind, 7, per_token, **fields).train(training)
        scaled = router(kind, 7, per_token, **fields, routed_scaling_factor=2.5).train(training)
        scaled.load_state_dict(plain.state_dict())
        tokens, found = torch.randn(33, 48), []
        for module in (plain, scaled):
            logits, gates, index = module(tokens)
            (gates * torch.linspace(-1, 1, gates.numel()).view_as(gates)).sum().backward()
            found.append((logits, index, gates.detach(), module.weight.grad))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
        torch.testing.assert_close(found[1][2], 2.5 * found[0][2])
        torch.testing.assert_close(found[1][3], 2.5 * found[0][3])


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
        tokens = torch.randint(0, 256, (1, 16))
        model(input_ids=tokens, labels=tokens).lm_loss.backward()
        return max(layer.mlp.gate.weight.grad.abs().max().item() for layer in model.model.layers)

    assert gradient(normalise=False) > 1e-4
    assert gradient(normalise=True) < 1e-7  # g / g rounds to 1, its derivative nearly to 0


@pytest.mark.parametrize("kind", ROUTER_CLASSES)
def test_routing_is_computed_in_fp32_under_bf16_weights_and_under_autocast(kind: str) -> None:
    module = router(kind, 7, 3).to(torch.bfloat16)
    tokens = torch.randn(40, 48, dtype=torch.bfloat16)
    want = tokens.double() @ module.weight.double().T
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits, gates, _ = module(tokens)
        assert (logits.dtype, gates.dtype) == (torch.float32, torch.float32)
        assert_matches("logits", logits, want)


def test_three_pieces_are_the_float32_that_they_come_from() -> None:
    values = torch.randn(50, 7) * 10.0 ** torch.randint(-20, 20, (50, 7))
    pieces = in_three_pieces(values)
    assert pieces.dtype == torch.bfloat16 and pieces.shape == (50, 21)
    error = (pieces.double().view(50, 3, 7).sum(1) - values).abs()
    assert bool((error <= 2.0**-24 * values.abs()).all())


@pytest.mark.gpu
def test_the_product_of_bfloat16_has_the_values_and_gradients_of_float64() -> None:
    tokens = torch.randn(3000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(31, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(3000, 31, device="cuda")
    logits = float32_linear(tokens, weight)
    found = (logits, *torch.autograd.grad(logits, (tokens, weight), upstream))
    wide = tokens.double().detach().requires_grad_(), weight.double().detach().requires_grad_()
    want = wide[0] @ wide[1].T
    gradients = torch.autograd.grad(want, wide, upstream.double())
    assert logits.dtype == torch.float32 and relative_rms_error(found[0], want) < 1e-6
    for gradient, exact in zip(found[1:], gradients, strict=True):  # bfloat16, so rounded once: 2^-9 at most
        torch.testing.assert_close(gradient, exact.to(torch.bfloat16), rtol=2**-7, atol=1e-3)


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


@pytest.mark.parametrize("preset", ["lf-granular-tiny", "pb-granular-tiny"])
def test_a_bias_that_balances_stays_in_float32_and_no_other_model_names_one(preset: str, tmp_path) -> None:
    """As DeepSeek-V3's: in bfloat16 the steps of 0.001 would be lost beside a bias of 1."""
    model = CptMoeForCausalLM(CptMoeConfig.from_preset(preset, vocab_size=64, num_hidden_layers=1))
    model.save_pretrained(tmp_path)
    loaded = CptMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    biases = {name: buffer for name, buffer in loaded.named_buffers() if name.endswith("e_score_correction_bias")}
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.bfloat16}
    assert [bias.dtype for bias in biases.values()] == [torch.float32] * (preset == "lf-granular-tiny")
    assert bool(loaded._keep_in_fp32_modules_strict) == bool(biases)
