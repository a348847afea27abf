"""The experts implementation in transformers' own MoE models and in ours, against the eager definition of each."""

import logging
from copy import deepcopy

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import hf_moe_cpt
from hf_moe_cpt.kernels import experts_implementation
from hf_moe_cpt.kernels.experts_implementation import why_unsupported
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from tests.helpers.kernel_device import DEVICE
from tests.helpers.tolerances import assert_matches


NAMES = ["hf_moe_cpt", "hf_moe_cpt_low_memory"]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": OlmoeConfig(**SIZES, num_experts=6, num_experts_per_tok=3),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True
    ),
    "cpt_moe": CptMoeConfig(**SIZES, num_experts=7, num_experts_per_tok=3),
    "cpt_moe switch": CptMoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=1, num_shared_experts=0, hidden_act="gelu_pytorch_tanh"
    ),
}


def _model(name: str, implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return (
        AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name]), experts_implementation=implementation)
        .to(DEVICE)
        .train()
    )


def _loss_and_gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 64, (2, 9), device=DEVICE)
    output = model(input_ids=ids, labels=ids, output_router_logits=True)
    output.loss.backward()
    return {"loss": output.loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("implementation", NAMES)
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_equal_eager(name, implementation):
    want = _loss_and_gradients(_model(name, "eager"))
    got = _loss_and_gradients(_model(name, implementation))
    assert got.keys() == want.keys()
    for key, value in got.items():
        assert_matches(key, value, want[key], limit=2e-5)


def test_kernels_really_run(monkeypatch):
    """Guards the test above: a silent fall back to grouped_mm would pass it as well."""
    monkeypatch.setattr(experts_implementation, "grouped_mm_experts_forward", _must_not_be_called)
    _loss_and_gradients(_model("mixtral", "hf_moe_cpt"))


def _must_not_be_called(*_):
    raise AssertionError("fell back")


def test_generation_equals_eager():
    """Token by token: the plan of few rows, with a cache."""
    ids = torch.arange(5, device=DEVICE)[None]
    texts = [
        _model("olmoe", name).eval().generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        for name in ("eager", "hf_moe_cpt")
    ]
    assert torch.equal(*texts)


def test_autocast_computes_in_its_type():
    model = _model("mixtral", "hf_moe_cpt")
    experts = model.model.layers[0].mlp.experts
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        output = experts(
            torch.randn(3, 16, device=DEVICE),
            torch.zeros(3, 1, dtype=torch.long, device=DEVICE),
            torch.ones(3, 1, device=DEVICE),
        )
    assert output.dtype == torch.float32
    assert torch.equal(output, output.half().float())  # no more digits than float16 has


@use_experts_implementation(is_transposed=True)
class _TransposedExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_experts = 3
        self.gate_up_proj = nn.Parameter(torch.randn(3, 16, 24) * 0.2)
        self.down_proj = nn.Parameter(torch.randn(3, 12, 16) * 0.2)
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise NotImplementedError


def test_transposed_weights():
    runs = []
    for name in ("grouped_mm", "hf_moe_cpt"):
        torch.manual_seed(0)
        config = MixtralConfig(**SIZES)
        config._experts_implementation = name
        experts = _TransposedExperts(config).to(DEVICE)
        tokens = torch.randn(6, 16, device=DEVICE)
        index = torch.tensor([[0, 2]] * 6, device=DEVICE)
        output = experts(tokens, index, torch.full((6, 2), 0.5, device=DEVICE))
        output.square().sum().backward()
        runs.append((output, experts.gate_up_proj.grad, experts.down_proj.grad))
    for got, want in zip(runs[1], runs[0], strict=True):
        assert got.is_contiguous() and got.shape == want.shape
        assert_matches("transposed", got, want, limit=1e-5)


def _experts_of(config) -> nn.Module:
    model = AutoModelForCausalLM.from_config(deepcopy(config), experts_implementation="eager")
    return next(
        module for module in model.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "has_gate")
    )


def _changed(**attributes: object) -> nn.Module:
    experts = _experts_of(CONFIGS["mixtral"])
    for name, value in attributes.items():
        setattr(experts, name, value)
    return experts


@pytest.mark.parametrize(
    "experts, dtype, reason",
    [
        (lambda: _experts_of(GptOssConfig(**SIZES, head_dim=8, num_local_experts=2)), torch.float32, "have biases"),
        (lambda: _changed(has_gate=False), torch.float32, "have no gate"),
        (lambda: _changed(is_concatenated=False), torch.float32, "columns are interleaved"),
        (lambda: _changed(has_post_expert_norm=True), torch.float32, "end in a norm"),
        (lambda: _changed(act_fn=nn.Tanh()), torch.float32, "its activation is Tanh"),
        (lambda: _changed(act_fn=nn.GELU(approximate="tanh")), torch.float32, "its activation is GELU"),
        (lambda: _changed(), torch.float64, "the compute dtype is torch.float64"),
    ],
)
def test_reason_is_told(experts, dtype, reason):
    assert reason in why_unsupported(experts(), DEVICE, dtype)


def test_missing_triton_and_gpu_are_told(monkeypatch):
    experts = _experts_of(CONFIGS["mixtral"])
    assert why_unsupported(experts, DEVICE, torch.float32) is None
    monkeypatch.setattr(experts_implementation, "HAS_TRITON", False)
    assert "triton is not installed" in why_unsupported(experts, DEVICE, torch.float32)
    monkeypatch.undo()
    monkeypatch.setattr("hf_moe_cpt.kernels.tiles.IS_INTERPRETED", False)
    assert "on cpu, the kernels need a GPU" in why_unsupported(experts, torch.device("cpu"), torch.float32)


def test_own_gating_rule_is_left_alone():
    class Clamped(type(_experts_of(CONFIGS["mixtral"]))):
        def _apply_gate(self, gate_up):
            return gate_up.chunk(2, dim=-1)[0]

    experts = _experts_of(CONFIGS["mixtral"])
    experts.__class__ = Clamped
    assert "gating rule of its own" in why_unsupported(experts, DEVICE, torch.float32)


def test_fall_back_gives_the_right_numbers_and_one_line(caplog, monkeypatch):
    transformers.utils.logging.enable_propagation()
    config = GptOssConfig(**SIZES, head_dim=8, num_local_experts=4)
    outputs = []
    ids = torch.arange(6, device=DEVICE)[None]
    with caplog.at_level(logging.WARNING):
        for name in ("grouped_mm", "hf_moe_cpt"):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, experts_implementation=name).to(DEVICE)
            outputs.append(model(input_ids=ids).logits)
    assert torch.equal(*outputs)
    told = [record.message for record in caplog.records if "hf_moe_cpt kernels" in record.message]
    assert told == ["The hf_moe_cpt kernels do not run GptOssExperts: its experts have biases; using grouped_mm."]


def test_registration_is_idempotent():
    hf_moe_cpt.register_kernels()
    hf_moe_cpt.register_kernels()
    for name in NAMES:
        assert ALL_EXPERTS_FUNCTIONS[name].__module__ == "hf_moe_cpt.kernels.experts_implementation"


def test_own_models_choose_the_kernels_on_a_gpu(monkeypatch):
    model = AutoModelForCausalLM.from_config(deepcopy(CONFIGS["cpt_moe"]))
    expected = "hf_moe_cpt" if DEVICE.type == "cuda" else "grouped_mm"
    assert model.config._experts_implementation == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert model.get_correct_experts_implementation(None) == "hf_moe_cpt"
    assert model.get_correct_experts_implementation("eager") == "eager"
    dense = AutoModelForCausalLM.from_config(CptMoeConfig(**SIZES, num_experts=0))
    assert dense.get_correct_experts_implementation(None) != "hf_moe_cpt"


@pytest.mark.compiles
def test_compiles_as_one_graph():
    experts = _experts_of(CONFIGS["mixtral"]).to(DEVICE)
    experts.config._experts_implementation = "hf_moe_cpt"
    inputs = (
        torch.randn(5, 16, device=DEVICE),
        torch.zeros(5, 2, dtype=torch.long, device=DEVICE),
        torch.ones(5, 2, device=DEVICE),
    )
    want = experts(*inputs)
    assert torch.equal(torch.compile(experts, fullgraph=True, backend="aot_eager")(*inputs), want)
