"""Every experts implementation computes what a loop over tokens in float64 does, with the same gradients."""

import pytest
import torch
from torch.nn.functional import gelu
from transformers.activations import ACT2FN

from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.experts_cpt_moe import CptMoeExperts, CptMoeMLP, CptMoeSparseMoeBlock
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM
from tests.helpers.tolerances import assert_matches


EDGES = {"one token": (1, 8, 1), "tokens < experts": (5, 31, 3), "top-1": (64, 8, 1), "all experts": (9, 4, 4)}


def experts(E: int, K: int, implementation: str, dtype: torch.dtype) -> CptMoeExperts:
    config = CptMoeConfig.from_preset(
        "pb-granular-tiny", hidden_size=32, num_experts=E, num_experts_per_tok=K, moe_intermediate_size=16
    )
    config._experts_implementation = implementation
    module = CptMoeExperts(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    return module


def loop(tokens: torch.Tensor, index: torch.Tensor, gates: torch.Tensor, module: CptMoeExperts) -> torch.Tensor:
    rows = []
    for token, chosen, gate in zip(tokens, index, gates, strict=True):
        row = torch.zeros_like(token)
        for expert, weight in zip(chosen, gate, strict=True):
            gate_part, up = (module.gate_up_proj[expert] @ token).chunk(2)
            row = row + weight * (module.down_proj[expert] @ (gelu(gate_part) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize(("T", "E", "K"), EDGES.values(), ids=EDGES)
def test_implementations_equal_the_loop(implementation: str, T: int, E: int, K: int) -> None:
    tokens = torch.randn(T, 32)
    index = torch.rand(T, E).argsort(1)[:, :K]
    gates = torch.rand(T, K)
    upstream = torch.randn(T, 32)
    results = {}
    for name, dtype in ((implementation, torch.float32), ("loop", torch.float64)):
        module = experts(E, K, name if name != "loop" else "eager", dtype)
        inputs = [value.detach().to(dtype, copy=True).requires_grad_() for value in (tokens, gates)]
        if name == "loop":
            output = loop(inputs[0], index, inputs[1], module)
        else:
            output = module(inputs[0], index, inputs[1])
        output.backward(upstream.to(dtype))
        gradients = [value.grad for value in [*inputs, module.gate_up_proj, module.down_proj]]
        results[name] = dict(zip(("tokens", "gates", "gate_up_proj", "down_proj"), gradients, strict=True))
        results[name]["output"] = output
    for name, want in results["loop"].items():
        assert_matches(name, results[implementation][name], want)


def test_a_missing_id_of_another_rank_adds_nothing() -> None:
    """Expert parallelism marks it with the id `num_experts`."""
    module = experts(4, 2, "eager", torch.float64)
    tokens, gates = torch.randn(6, 32, dtype=torch.float64), torch.rand(6, 2, dtype=torch.float64)
    index = torch.tensor([[0, 4], [4, 4], [3, 1], [4, 2], [1, 0], [2, 3]])
    got = module(tokens, index, gates)
    want = loop(tokens, index.clamp(max=3), gates.masked_fill(index == 4, 0.0), module)
    assert_matches("output", got, want)
    assert (got[1] == 0).all()


def test_shared_experts_are_added_with_weight_one() -> None:
    config = CptMoeConfig.from_preset("pb-granular-tiny", num_shared_experts=2, moe_intermediate_size=16)
    config._experts_implementation = "eager"
    block = CptMoeSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert block.shared_experts.down_proj.weight.shape == (128, 32)
    hidden = torch.randn(2, 5, 128)
    tokens = hidden.view(10, 128)
    _, gates, index = block.gate(tokens)
    want = block.experts(tokens, index, gates) + block.shared_experts(tokens)
    assert_matches("block", block(hidden), want.view(2, 5, 128))


def test_the_activation_is_exact_gelu_unless_asked() -> None:
    hidden = torch.randn(3, 128)
    for act, function in (
        ("gelu", gelu),
        ("gelu_pytorch_tanh", ACT2FN["gelu_pytorch_tanh"]),
        ("silu", ACT2FN["silu"]),
    ):
        mlp = CptMoeMLP(CptMoeConfig.from_preset("dense-tiny", hidden_act=act), 16)
        want = mlp.down_proj(function(mlp.gate_proj(hidden)) * mlp.up_proj(hidden))
        assert torch.equal(mlp(hidden), want)


def test_the_implementation_is_chosen_as_in_transformers() -> None:
    config = CptMoeConfig.from_preset("pb-granular-tiny", vocab_size=64, num_hidden_layers=1)
    model = CptMoeForCausalLM(config)
    assert model.config._experts_implementation == "grouped_mm"
    for implementation in ("eager", "batched_mm"):
        model.set_experts_implementation(implementation)
        assert model.model.layers[0].mlp.experts.config._experts_implementation == implementation
    batched = CptMoeForCausalLM._from_config(config, experts_implementation="batched_mm")
    assert batched.config._experts_implementation == "batched_mm"
    with pytest.raises(ValueError, match="nonesuch"):
        model.set_experts_implementation("nonesuch")


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts_multiply_in_the_dtype_of_autocast(implementation):
    """As linear layers do: with float32 weights and bfloat16 autocast the products are those of bfloat16 weights."""
    config = CptMoeConfig.from_preset("pb-granular-tiny", vocab_size=64, num_hidden_layers=1)
    torch.manual_seed(0)
    model = CptMoeForCausalLM._from_config(config, experts_implementation=implementation)
    block, seen = model.model.layers[0].mlp, []
    block.experts.register_forward_pre_hook(
        lambda module, args: seen.append((module.gate_up_proj.dtype, module.down_proj.dtype, args[0].dtype))
    )
    tokens = torch.randn(1, 24, config.hidden_size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = block(tokens)
    assert seen == [(torch.bfloat16,) * 3] and block.experts.gate_up_proj.dtype == torch.float32
    low.float().square().sum().backward()
    assert block.experts.gate_up_proj.grad.dtype == torch.float32
    high = block(tokens)
    assert 0 < (low.float() - high).norm() / high.norm() < 2e-2


def test_a_model_runs_on_the_meta_device():
    """Shapes and costs are worked out there, and torch has no autocast for it."""
    with torch.device("meta"):
        model = CptMoeForCausalLM._from_config(
            CptMoeConfig.from_preset("pb-granular-tiny"), experts_implementation="grouped_mm", dtype=torch.bfloat16
        )
        logits = model(torch.zeros(2, 8, dtype=torch.long)).logits
    assert logits.shape == (2, 8, 4096) and logits.is_meta
