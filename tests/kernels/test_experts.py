"""The experts operator against its definition in float64, and in models against their eager experts."""

import gc
import importlib
import logging
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.integrations import use_experts_implementation

from hf_moe_cpt.kernels import experts_interface
from hf_moe_cpt.kernels.experts import _experts_forward, _slices, experts, plain_experts
from hf_moe_cpt.kernels.experts_interface import why_unsupported
from hf_moe_cpt.kernels.gates import Form
from hf_moe_cpt.kernels.grouped_gemm import (
    DECODING,
    DEFAULT_TRAINING,
    FEW_ROWS,
    HOPPER_TRAINING,
    SINGLE_PRECISION,
    tile_plan,
)
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from tests.helpers.expert_layers import DEVICE, FLOAT_DTYPES, ExpertLayer, expert_layer
from tests.helpers.tolerances import assert_matches


NAMES = ["hf_moe_cpt", "hf_moe_cpt_low_memory"]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2),
    "olmoe": OlmoeConfig(**SIZES, num_experts=6, num_experts_per_tok=3),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True
    ),
    "cpt_moe": CptMoeConfig(**SIZES, num_experts=3, num_experts_per_tok=2),
    "cpt_moe switch": CptMoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=1, num_shared_experts=0, hidden_act="gelu_pytorch_tanh"
    ),
    "gpt_oss": GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
}


def _model(name: str, implementation: str) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name]), experts_implementation=implementation)
    return model.to(DEVICE).train()


def _loss_and_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 64, (2, 5), device=DEVICE)
    output = model(input_ids=ids, labels=ids, output_router_logits=True)
    output.loss.backward()
    return {"loss": output.loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


FAMILIES = list(zip(CONFIGS, 3 * NAMES, strict=False))
SLOW = (
    "mixtral",
    "olmoe",
    "qwen3_moe",
    "cpt_moe",
    "gpt_oss",
)  # experts as those of "cpt_moe switch", more of them a token


@pytest.mark.parametrize(
    "name, implementation", [pytest.param(*one, marks=[pytest.mark.slow] * (one[0] in SLOW)) for one in FAMILIES]
)
def test_loss_and_gradients_equal_eager(name, implementation, monkeypatch):
    monkeypatch.setattr(experts_interface, "grouped_mm_experts_forward", None)  # a silent fall back would pass
    want = _loss_and_gradients(_model(name, "eager"))
    got = _loss_and_gradients(_model(name, implementation))
    assert got.keys() == want.keys()
    for key, value in got.items():
        assert_matches(key, value, want[key], limit=2e-5)


@pytest.mark.slow
def test_generation_equals_eager():
    """Token by token: the plan of few rows, with a cache."""
    ids = torch.arange(5, device=DEVICE)[None]
    texts = [
        _model("olmoe", name).eval().generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
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
    return next(part for part in model.modules() if hasattr(part, "gate_up_proj") and hasattr(part, "has_gate"))


def test_reason_is_told(monkeypatch):
    experts = _experts_of(CONFIGS["mixtral"])
    assert why_unsupported(experts, DEVICE, torch.float32) is None
    assert "the compute dtype is torch.float64" in why_unsupported(experts, DEVICE, torch.float64)
    for attributes, reason in (
        ({"has_gate": False}, "have no gate"),
        ({"has_post_expert_norm": True}, "end in a norm"),
        ({"act_fn": nn.Tanh()}, "its activation is Tanh"),
        ({"act_fn": nn.GELU(approximate="tanh")}, "its activation is GELU"),
        ({"__class__": type("Clamped", (type(experts),), {"_apply_gate": _model})}, "a gating rule of its own"),
    ):
        changed = deepcopy(experts)
        for name, value in attributes.items():
            setattr(changed, name, value)
        assert reason in why_unsupported(changed, DEVICE, torch.float32)
    monkeypatch.setattr(experts_interface, "HAS_TRITON", False)
    assert "triton is not installed" in why_unsupported(experts, DEVICE, torch.float32)
    monkeypatch.undo()
    monkeypatch.setattr("hf_moe_cpt.kernels.grouped_gemm.IS_INTERPRETED", False)
    assert "on cpu, the kernels need a GPU" in why_unsupported(experts, torch.device("cpu"), torch.float32)


def test_fall_back_gives_the_right_numbers_and_one_line(caplog):
    transformers.utils.logging.enable_propagation()
    config = MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2, hidden_act="tanh")
    outputs = []
    ids = torch.arange(6, device=DEVICE)[None]
    with caplog.at_level(logging.WARNING):
        for name in ("grouped_mm", "hf_moe_cpt"):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, experts_implementation=name).to(DEVICE)
            outputs.append(model(input_ids=ids).logits)
    assert torch.equal(*outputs)
    told = [record.message for record in caplog.records if "hf_moe_cpt kernels" in record.message]
    assert told == ["The hf_moe_cpt kernels do not run MixtralExperts: its activation is Tanh; using grouped_mm."]


@pytest.mark.parametrize("name", [NAMES[0], pytest.param(NAMES[1], marks=pytest.mark.slow)])
def test_experts_of_gpt_oss(name, monkeypatch):
    """Compared with transformers' own in float64: gradients of tokens, gate weights, matrices and biases; gates reach
    both limits.
    """
    monkeypatch.setattr(experts_interface, "grouped_mm_experts_forward", None)
    monkeypatch.setattr("hf_moe_cpt.kernels.experts._ROWS_WORTH_A_SLICE", 1)
    module = _experts_of(GptOssConfig(**SIZES, head_dim=8, num_local_experts=3, swiglu_limit=1.5)).to(DEVICE)
    module.config = deepcopy(module.config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    inputs = (torch.randn(9, 16, device=DEVICE), torch.rand(9, 2, device=DEVICE))
    index = torch.tensor([[0, 2]] * 6 + [[2, 0]] * 3, device=DEVICE)  # expert 1 has no rows
    runs = []
    for implementation, dtype in (("eager", torch.float64), (name, torch.float32)):
        module.config._experts_implementation = implementation
        module.to(dtype)
        tokens, weights = (tensor.to(dtype).requires_grad_() for tensor in inputs)
        output = module(tokens, index, weights)
        leaves = {"tokens": tokens, "weights": weights, **dict(module.named_parameters())}
        gradients = torch.autograd.grad(output.square().sum(), list(leaves.values()))
        runs.append({"output": output.detach(), **dict(zip(leaves, gradients, strict=True))})
    for key, value in runs[1].items():
        assert_matches(key, value, runs[0][key])


@pytest.mark.parametrize("rule", [*experts_interface.CLAMPED_GATES, *experts_interface.FLOAT_GATES])
def test_gating_rules_are_those_of_the_classes(rule):
    """Compared with the method of transformers' class, where the installed version has it."""
    name = rule.split(".")[0]
    found = _modules_with(f"class {name}(")
    if not found:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    cls = getattr(importlib.import_module(f"transformers.models.{found[0]}.modeling_{found[0]}"), name)
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    module.act_fn = nn.SiLU()
    for attribute, value in (("alpha", 1.7), ("swiglu_alpha", 1.3), ("limit", 0.8), ("swiglu_limit", 0.8)):
        setattr(module, attribute, value)
    activation, *constants = experts_interface._gate(module)
    form = Form(activation, False, name == "GptOssExperts", *constants)
    pairs = torch.randn(5, 16, dtype=torch.float64)
    assert_matches(name, form.hidden(pairs), module._apply_gate(pairs), limit=1e-6)


def _modules_with(text: str) -> list[str]:
    folder = Path(transformers.__file__).parent / "models"
    paths = folder.glob("*/modeling_*.py")
    return [path.parent.name for path in paths if text in path.read_text(encoding="utf-8")]


def test_own_models_choose_the_kernels_on_a_gpu(monkeypatch):
    model = AutoModelForCausalLM.from_config(deepcopy(CONFIGS["cpt_moe"]))
    expected = "hf_moe_cpt" if DEVICE.type == "cuda" else "grouped_mm"
    assert model.config._experts_implementation == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert model.get_correct_experts_implementation(None) == "hf_moe_cpt"
    assert model.get_correct_experts_implementation("eager") == "eager"
    dense = AutoModelForCausalLM.from_config(CptMoeConfig(**SIZES, num_experts=0))
    assert dense.get_correct_experts_implementation(None) != "hf_moe_cpt"


@pytest.mark.slow
@pytest.mark.compiles
def test_compiles_as_one_graph():
    experts = _experts_of(CONFIGS["mixtral"]).to(DEVICE)
    experts.config._experts_implementation = "hf_moe_cpt"
    index, weights = torch.zeros(5, 2, dtype=torch.long, device=DEVICE), torch.ones(5, 2, device=DEVICE)
    tokens = torch.randn(5, 16, device=DEVICE, requires_grad=True)
    runs = []
    for compute in (experts, torch.compile(experts, fullgraph=True, backend="aot_eager")):
        output = compute(tokens * 2, index, weights)
        leaves = (tokens, experts.gate_up_proj, experts.down_proj)
        runs.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
    assert all(torch.equal(left, right) for left, right in zip(*runs, strict=True))


def _run(function, layer: ExpertLayer, grad_output: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    """The output and the gradients of all leaves by name."""
    inputs = (layer.tokens, layer.top_k_index, layer.top_k_weights, layer.gate_up, layer.down)
    output = function(*inputs, **options)
    output.backward(grad_output.to(output.dtype))
    return {"output": output} | {f"gradient of {name}": leaf.grad for name, leaf in layer.leaves.items()}


def _assert_agrees(layer: ExpertLayer, dtype: torch.dtype, activation: str = "silu", low_memory: bool = False) -> None:
    rounded = layer.to(dtype)
    grad_output = torch.randn(layer.tokens.shape, dtype=dtype, device=layer.tokens.device)
    got = _run(experts, rounded, grad_output, form=activation, low_memory=low_memory)
    want = _run(plain_experts, rounded.to(torch.float64), grad_output, form=activation)
    for name, value in got.items():
        assert value.dtype == dtype
        if want[name].any() or value.any():
            assert_matches(name, value, want[name])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_values_and_gradients(dtype):
    low_memory = dtype == torch.float16
    _assert_agrees(expert_layer(9, 3, 2, 40, 24), dtype, "gelu" if low_memory else "silu", low_memory)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 30), st.integers(2, 12), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40))
def test_any_shape(num_tokens, num_experts, top_k, hidden_size, width):
    _assert_agrees(expert_layer(num_tokens, num_experts, top_k, hidden_size, width), torch.float32)


@pytest.mark.parametrize("E, K", [(2, 16), (1, 1), *(pytest.param(E, 1, marks=pytest.mark.slow) for E in (9, 256))])
def test_extreme_numbers_of_experts(E, K):
    _assert_agrees(expert_layer(3, E, K, 8, 8), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_other_plans(dtype):
    """Enough rows for the plans of few rows and of float32."""
    _assert_agrees(expert_layer(30, 1, 1, 16, 8), dtype)


def test_experts_of_other_ranks_add_nothing_and_no_tokens_give_nothing():
    """Ids outside [0, E) mark them; a token of only such ids gets exact zeros."""
    layer = expert_layer(7, 2, 2, 16, 8)
    layer.top_k_index[:, 1] = 2
    layer.top_k_index[4] = 2
    layer.top_k_index[5, 0] = -1
    _assert_agrees(layer, torch.float32)
    rounded = layer.to(torch.float32)
    got = _run(experts, rounded, torch.randn_like(rounded.tokens), form="silu")
    assert got["output"][4].eq(0).all() and got["output"][5].eq(0).all()
    assert got["gradient of tokens"][4].eq(0).all()
    assert got["gradient of top_k_weights"][:, 1].eq(0).all()
    none = expert_layer(0, 3, 2, 16, 8).to(torch.float32)
    got = _run(experts, none, torch.zeros_like(none.tokens), form="silu")
    assert got["output"].shape == (0, 16)
    assert got["gradient of gate_up"].eq(0).all() and got["gradient of down"].eq(0).all()


def test_only_asked_gradients_are_computed_and_strides_do_not_matter():
    layer = expert_layer(3, 1, 1, 8, 8).to(torch.float32)
    layer.gate_up.requires_grad_(False)
    layer.top_k_weights.requires_grad_(False)
    wanted = _run(plain_experts, layer.to(torch.float32), torch.ones_like(layer.tokens), form="silu")
    got = _run(experts, layer, torch.ones_like(layer.tokens), form="silu")
    assert got["gradient of gate_up"] is None and got["gradient of top_k_weights"] is None
    for name in ("gradient of tokens", "gradient of down"):
        assert_matches(name, got[name], wanted[name])
    layer = expert_layer(3, 2, 2, 8, 8).to(torch.float32)
    strided = layer.tokens.detach().repeat(1, 2)[:, :8].requires_grad_()
    transposed = layer.top_k_index.T.contiguous().T
    output = experts(strided, transposed, layer.top_k_weights, layer.gate_up, layer.down, "silu")
    output.sum().backward()
    want = _run(experts, layer.to(torch.float32), torch.ones_like(layer.tokens), form="silu")
    assert torch.equal(output, want["output"]) and torch.equal(strided.grad, want["gradient of tokens"])


def _forward(layer: ExpertLayer, **options) -> torch.Tensor:
    inputs = (layer.tokens, layer.top_k_index, layer.top_k_weights, layer.gate_up, layer.down)
    return experts(*inputs, "silu", **options)


@pytest.mark.parametrize("low_memory", [pytest.param(False, marks=pytest.mark.slow), True])
def test_twice_gives_the_same_bits(low_memory):
    """Two runs, and two backward passes through one graph: nothing saved may be used as scratch memory.

    The pre-activations are kept for a backward pass only where memory is not scarce.
    """
    layer = expert_layer(3, 1, 1, 8, 8).to(torch.float32)
    leaves = list(layer.leaves.values())
    runs = []
    for _ in range(2):
        output = _forward(layer, low_memory=low_memory)
        assert (output.grad_fn.saved_tensors[6].numel() == 0) == low_memory
        for retain in (True, False):
            runs.append(torch.autograd.grad(output, leaves, torch.ones_like(output), retain_graph=retain))
    for run in runs[1:]:
        assert all(torch.equal(first, again) for first, again in zip(runs[0], run, strict=True))


FEW = {
    "silu": Form(),
    "of gpt-oss": Form("clamped", True, True, alpha=1.7, limit=1.0, offset=1.0),
    "transposed": Form(transposed=True),
    "interleaved": Form("clamped", interleaved=True, alpha=1.7, limit=1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FEW)
def test_few_tokens_without_gradients(name, dtype, monkeypatch):
    """Compared with float64; a step of decoding sorts nothing, and ids of other ranks add nothing."""
    monkeypatch.setattr("hf_moe_cpt.kernels.experts._forward", None)
    form, layer = FEW[name], expert_layer(2, 9, 2, 300, 24)
    layer.top_k_index[1] = torch.tensor([9, -1])
    matrices = [x.transpose(1, 2).contiguous() if form.transposed else x for x in (layer.gate_up, layer.down)]
    biases = [torch.randn(9, size, device=DEVICE, dtype=torch.float64) for size in (48, 300)]
    inputs = (layer.tokens, layer.top_k_weights, *matrices, *(biases if form.activation == "clamped" else ()))
    outputs = []
    for function, to in ((experts, dtype), (plain_experts, torch.float64)):
        tokens, weights, gate_up, down, *of_form = (x.to(dtype).to(to) for x in inputs)
        names = dict(zip(("gate_up_bias", "down_bias"), of_form, strict=False))
        with torch.no_grad():
            outputs.append(function(tokens, layer.top_k_index, weights, gate_up, down, form, **names))
    assert_matches("output", *outputs)
    assert outputs[0][1].eq(0).all()


def test_no_operator_where_nobody_looks_for_one(monkeypatch):
    """Compared with the operators, which a dispatch mode sees, bit for bit."""
    layer = expert_layer(3, 2, 2, 8, 8).to(torch.float32)
    with FlopCounterMode(display=False):
        want = _step(layer)
    for name in ("_experts_forward", "_experts_backward", "_experts_backward_in_place"):
        monkeypatch.setattr(f"hf_moe_cpt.kernels.experts.{name}", None)
    assert all(torch.equal(got, seen) for got, seen in zip(_step(layer), want, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_bits(use_reentrant):
    """Compared with a step that keeps all: a layer that is computed again reads what it saved once."""
    layer = expert_layer(3, 2, 2, 8, 8).to(torch.float32)
    want = _step(layer)
    leaves = list(layer.leaves.values())

    def forward(tokens, *others):
        return experts(tokens, layer.top_k_index, *others, "silu")

    output = checkpoint(forward, *leaves, use_reentrant=use_reentrant)
    output.sum().backward()
    assert all(torch.equal(leaf.grad, gradient) for leaf, gradient in zip(leaves, want[1:], strict=True))


def test_a_second_derivative_is_refused():
    layer = expert_layer(3, 2, 2, 8, 8).to(torch.float32)
    (gradient,) = torch.autograd.grad(_forward(layer).sum(), layer.tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


@pytest.mark.parametrize("retain", [True, False])
def test_pre_activations_are_given_back_where_nobody_reads_them_again(retain):
    """Compared with what was saved: a graph that is retained keeps it, the last pass through one has no need of it."""
    layer = expert_layer(3, 1, 1, 8, 8).to(torch.float32)
    output = _forward(layer)
    saved = output.grad_fn.saved_tensors[6]
    before = saved.clone()
    output.sum().backward(retain_graph=retain)
    assert bool(saved.untyped_storage().nbytes()) == retain
    assert not retain or torch.equal(saved[:3], before[:3])


@pytest.mark.parametrize("tokens", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_low_memory_takes_slices_of_the_tokens(tokens, monkeypatch):
    """Compared with float64; slices of unequal size in which an expert may have no rows, ids of other ranks beside."""
    monkeypatch.setattr("hf_moe_cpt.kernels.experts._ROWS_WORTH_A_SLICE", 1)
    assert [end - first for first, end in _slices(10, 2, 3)] == [4, 4, 2]
    layer = expert_layer(tokens, 3, 1, 16, 8)
    layer.top_k_index[: tokens // 2] = 1
    layer.top_k_index[-3:-2] = 3
    _assert_agrees(layer, torch.float32, low_memory=True)


@pytest.mark.parametrize("save", [True, False])
def test_operator_obeys_pytorchs_rules(save):
    layer = expert_layer(3, 1, 1, 8, 8).to(torch.float32)
    inputs = (layer.tokens, layer.top_k_index, layer.top_k_weights, layer.gate_up, layer.down)
    inputs += (None, None, "silu", False, False, [1.0, 1.0, 0.0], save)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(_experts_forward, inputs, test_utils=checks)


def test_plan_follows_rows_per_expert_and_width(monkeypatch):
    cpu = torch.device("cpu")
    assert tile_plan(64, 8, 704, torch.bfloat16, cpu) is DECODING
    assert tile_plan(64 * 8, 8, 704, torch.bfloat16, cpu) is FEW_ROWS
    assert tile_plan(999 * 8, 8, 704, torch.float32, cpu) is SINGLE_PRECISION
    assert tile_plan(10**6, 8, 704, torch.bfloat16, cpu) is DEFAULT_TRAINING
    monkeypatch.setattr("hf_moe_cpt.kernels.grouped_gemm.gpu_generation", lambda _: "hopper")
    assert tile_plan(10**6, 8, 2816, torch.bfloat16, cpu) is HOPPER_TRAINING
    assert tile_plan(10**6, 8, 704, torch.bfloat16, cpu).gated_up.block_n == 64  # 768 columns would be computed
    assert tile_plan(10**6, 8, 2880, torch.bfloat16, cpu, interleaved=True).gated_up.block_n == 64
    assert tile_plan(10**3 * 8, 8, 768, torch.bfloat16, cpu).up_weight_gradient.block_n == 128


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [256, 704, 200])
def test_plan_of_the_gpu(dtype, width):
    """Real sizes on the real tiles; several hundred rows per expert, not a multiple of anything."""
    _assert_agrees(expert_layer(2049, 8, 2, 512, width), dtype)
    _assert_agrees(expert_layer(2049, 8, 2, 512, width), dtype, "gelu", low_memory=True)


@pytest.mark.gpu
@pytest.mark.parametrize("transposed, interleaved", [(True, True), (True, False), (False, True)])
def test_forms_on_the_plan_of_the_gpu(transposed, interleaved):
    """Real sizes on the real tiles, with biases and a clamped gate.

    Pre-activations are kept in bfloat16, so those beside the limit may pass it, and their derivative jumps: at a limit
    of 1 those of one in a thousand, an error of 6 % in the gradients; at 5, of one in 70,000.
    """
    form = Form("clamped", transposed, interleaved, alpha=1.7, limit=5.0, offset=1.0)
    layer = expert_layer(2049, 8, 2, 512, 704)
    matrices = [x.transpose(1, 2).contiguous() if transposed else x for x in (layer.gate_up, layer.down)]
    leaves = [layer.tokens, layer.top_k_weights, *matrices]
    leaves += [torch.randn(8, size, device=DEVICE, dtype=torch.float64) for size in (1408, 512)]
    upstream = torch.randn(2049, 512, device=DEVICE)
    runs = []
    for function, dtype in ((experts, torch.bfloat16), (plain_experts, torch.float64)):
        rounded = [x.bfloat16().to(dtype).requires_grad_() for x in leaves]
        tokens, weights, gate_up, down, *biases = rounded
        names = dict(zip(("gate_up_bias", "down_bias"), biases, strict=True))
        output = function(tokens, layer.top_k_index, weights, gate_up, down, form, **names)
        runs.append([output, *torch.autograd.grad(output, rounded, upstream.to(dtype))])
    names = ("output", "tokens", "weights", "gate_up", "down", "gate_up_bias", "down_bias")
    for name, got, want in zip(names, *runs, strict=True):
        assert_matches(name, got, want)


def _step(layer: ExpertLayer) -> list[torch.Tensor]:
    """Output and gradients, without the graph that made them."""
    output = _forward(layer)
    gradients = torch.autograd.grad(output, list(layer.leaves.values()), torch.ones_like(output))
    return [output.detach(), *gradients]


@pytest.mark.gpu
def test_the_host_never_waits():
    layer = expert_layer(1024, 8, 2, 256, 256, torch.bfloat16)
    _step(layer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(layer)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("low_memory, limit", [(False, 1.0), (True, 0.7)])
def test_memory_of_a_step(low_memory, limit):
    """Compared with the least that holds output, both pre-activations and hidden rows at a time, as SonicMoE does."""
    tokens, width, hidden_size = 16_384, 704, 1024
    layer = expert_layer(1, 8, 3, hidden_size, width, torch.bfloat16)
    inputs = expert_layer(tokens, 8, 3, hidden_size, 8, torch.bfloat16)
    layer = replace(inputs, gate_up=layer.gate_up, down=layer.down).to(torch.bfloat16)
    upstream = torch.randn_like(layer.tokens)
    for _ in range(2):
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = _forward(layer, low_memory=low_memory)
        gradients = torch.autograd.grad(output, list(layer.leaves.values()), upstream)
        extra = torch.cuda.max_memory_allocated() - before
        del output, gradients
    rows = tokens * 3
    assert extra <= limit * 2 * (tokens * hidden_size + rows * 5 * width + 8 * hidden_size * width)


@pytest.mark.gpu
def test_graph_capture():
    """Leaves are made anew for the capture: autograd remembers the stream on which a leaf was first used."""
    layer = expert_layer(1024, 8, 2, 256, 256, torch.bfloat16)
    want = _step(layer)
    captured = layer.to(torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _step(captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        got = _step(captured)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(first, second) for first, second in zip(got, want, strict=True))


@pytest.mark.gpu
def test_address_arithmetic_beyond_two_to_the_31():
    """T x K rows of H + 2I elements: 3.2e9 elements of pre-activations."""
    layer = expert_layer(1, 2, 1, 64, 8192)
    tokens = torch.randn(200_000, 64, device=DEVICE, dtype=torch.bfloat16)
    index = torch.arange(200_000, device=DEVICE)[:, None] % 2
    weights = torch.ones(200_000, 1, device=DEVICE)
    gate_up, down = layer.gate_up.detach().bfloat16(), layer.down.detach().bfloat16()
    tokens.requires_grad_()
    output = experts(tokens, index, weights, gate_up, down, "silu")
    output.backward(torch.ones_like(output))
    tail = tokens.detach()[-64:].double().requires_grad_()
    want = plain_experts(tail, index[-64:], weights[-64:], gate_up.double(), down.double(), "silu")
    want.backward(torch.ones_like(want))
    assert_matches("output", output[-64:], want)
    assert_matches("gradient", tokens.grad[-64:], tail.grad)
