"""Liger-Kernel for cpt_moe: which modules of one model change, that nothing else does, and that numbers stay."""

import sys
from copy import deepcopy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.integrations.liger import apply_liger_kernel

from hf_moe_cpt.kernels.liger import (
    apply_liger_kernel_to_cpt_moe,
    liger_rotate_query_and_key,
    register_with_liger,
)
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.layers_cpt_moe import CptMoeAttention, CptMoeRMSNorm, rotate
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM
from tests.helpers.kernel_device import DEVICE
from tests.helpers.tiny_models import CONFIGS, VOCABULARY, tiny_model
from tests.helpers.tolerances import assert_matches


pytest.importorskip("liger_kernel")

ALL_OFF = {name: False for name in ("rope", "rms_norm", "swiglu", "geglu", "fused_linear_cross_entropy")}
# What Triton's interpreter can run of Liger.
INTERPRETABLE = {"rms_norm": False, "swiglu": False, "geglu": False}
GROUPED_QUERIES = {"num_attention_heads": 4, "num_key_value_heads": 2}


def rope(fraction):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": fraction}}


def patched(model, **kernels):
    model = deepcopy(model)
    apply_liger_kernel_to_cpt_moe(model=model, **kernels)
    return model


def changed_modules(model):
    """Names of the modules that hold a method of their own, and those methods' names."""
    names = ("forward", "rotate_query_and_key", "head_and_loss")
    return {(path, name) for path, module in model.named_modules() for name in names if name in vars(module)}


NORMS = {("model.norm", "forward")} | {
    (f"model.layers.{layer}.{norm}", "forward")
    for layer in (0, 1)
    for norm in ("input_layernorm", "post_attention_layernorm")
}
ROPES = {(f"model.layers.{layer}.self_attn", "rotate_query_and_key") for layer in (0, 1)}
HEAD = {("", "head_and_loss")}


def mlps(name):
    return {(f"model.layers.{layer}.{name}", "forward") for layer in (0, 1)}


DENSE = {"num_experts": 0, "num_experts_per_tok": 0}
PARTS = {
    "all of the default model": ({}, {}, NORMS | ROPES | HEAD),
    "shared experts": ({"hidden_act": "silu"}, {}, NORMS | ROPES | HEAD | mlps("mlp.shared_experts")),
    "dense": ({"hidden_act": "gelu_pytorch_tanh", **DENSE}, {}, NORMS | ROPES | HEAD | mlps("mlp")),
    "no shared experts": (
        {"hidden_act": "silu", "num_shared_experts": 0, "moe_intermediate_size": 8},
        {},
        NORMS | ROPES | HEAD,
    ),
    "layer norm": ({"norm_type": "layernorm"}, {}, ROPES | HEAD),
    "no rope": ({}, {"rope": False}, NORMS | HEAD),
    "no norms": ({}, {"rms_norm": False}, ROPES | HEAD),
    "no gated MLP": ({"hidden_act": "silu"}, {"swiglu": False}, NORMS | ROPES | HEAD),
    "no fused head": ({}, {"fused_linear_cross_entropy": False}, NORMS | ROPES),
    "nothing": ({"hidden_act": "silu"}, ALL_OFF, set()),
}


@pytest.mark.parametrize("changes, kernels, want", PARTS.values(), ids=PARTS)
def test_what_is_asked_for_and_possible_is_changed_in_this_model_alone(changes, kernels, want):
    plain = tiny_model("cpt_moe", **changes)
    model = patched(patched(plain, **kernels), **kernels)
    assert changed_modules(model) == want
    assert changed_modules(plain) == set()


def test_norms_compute_as_ours_do_and_with_our_epsilon():
    from liger_kernel.transformers import LigerRMSNorm

    model = patched(tiny_model("cpt_moe", rms_norm_eps=3e-4))
    norms = [module for module in model.modules() if isinstance(module, CptMoeRMSNorm)]
    assert len(norms) == 5
    for norm in norms:
        assert norm.forward.__func__ is LigerRMSNorm.forward
        assert (norm.casting_mode, norm.offset, norm.variance_epsilon) == ("llama", 0.0, 3e-4)


def test_no_class_and_no_function_changes():
    function = torch.nn.functional.cross_entropy
    classes = (CptMoeForCausalLM, CptMoeAttention, CptMoeRMSNorm, torch.nn.Linear)
    before = [dict(vars(one)) for one in classes]
    apply_liger_kernel_to_cpt_moe(model=tiny_model("cpt_moe", hidden_act="silu"))
    assert torch.nn.functional.cross_entropy is function
    assert [dict(vars(one)) for one in classes] == before


def test_other_heads_get_the_layers_only():
    config = CONFIGS["cpt_moe"](num_labels=3)
    classifier = AutoModelForSequenceClassification.from_config(config)
    apply_liger_kernel_to_cpt_moe(model=classifier)
    assert changed_modules(classifier) == NORMS | ROPES
    decoder = tiny_model("cpt_moe").model
    apply_liger_kernel_to_cpt_moe(model=decoder)
    assert len(changed_modules(decoder)) == len(NORMS | ROPES)


@pytest.mark.parametrize("rotated", [2, 6, 8])
def test_rotation(rotated):
    def states(heads):
        return torch.randn(2, 5, heads, 8, device=DEVICE).requires_grad_()

    query, key = states(4), states(2)
    angles = torch.randn(2, 5, rotated // 2, device=DEVICE)
    angles = torch.cat((angles, angles), dim=-1)
    upstream = torch.randn(2, 4, 5, 8, device=DEVICE), torch.randn(2, 2, 5, 8, device=DEVICE)
    want = [rotate(one.transpose(1, 2), angles.cos(), angles.sin()) for one in (query, key)]
    want_gradients = torch.autograd.grad(want, (query, key), upstream)
    projected = [one * 1.0 for one in (query, key)]  # rotated in place, as the outputs of a projection are
    got = liger_rotate_query_and_key(*(one.transpose(1, 2) for one in projected), angles.cos(), angles.sin())
    got_gradients = torch.autograd.grad(got, (query, key), [one.clone() for one in upstream])
    for name, left, right in zip(
        ("query", "key", "query gradient", "key gradient"),
        (*got, *got_gradients),
        (*want, *want_gradients),
        strict=True,
    ):
        assert_matches(name, left, right)


def assert_same_step(plain, fused, limit=2e-5):
    ids = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    packed = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4], device=DEVICE).expand(2, -1)
    losses = []
    for model in (plain, fused):
        output = model.train()(input_ids=ids, labels=ids, position_ids=packed, num_items_in_batch=12)
        output.loss.backward()
        losses.append(output.loss)
    assert_matches("loss", losses[1], losses[0], limit)
    for (name, want), got in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert_matches(name, got.grad, want.grad, limit)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["cpt_moe", "cpt_moe switch", "cpt_moe sinkhorn"])
def test_a_step_gives_the_same_loss_and_gradients(kind, fraction):
    plain = tiny_model(kind, **GROUPED_QUERIES, **rope(fraction)).to(DEVICE)
    assert_same_step(plain, patched(plain, **INTERPRETABLE))


@pytest.mark.gpu
@pytest.mark.parametrize("hidden_act", ["gelu", "silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("changes", [{}, DENSE, {"norm_type": "layernorm"}], ids=["moe", "dense", "layernorm"])
def test_a_step_with_every_kernel_gives_the_same_loss_and_gradients(changes, hidden_act):
    plain = tiny_model("cpt_moe", hidden_act=hidden_act, **changes, **GROUPED_QUERIES, **rope(0.5)).to(DEVICE)
    assert_same_step(plain, patched(plain), 1e-4)


@pytest.mark.gpu
def test_norm_in_half_precision_rounds_where_ours_does():
    norm = CptMoeRMSNorm(64, 1e-5).to(DEVICE, torch.bfloat16)
    torch.nn.init.normal_(norm.weight)
    model = tiny_model("cpt_moe", hidden_size=64)
    model.model.norm = norm
    states = torch.randn(7, 64, device=DEVICE, dtype=torch.bfloat16)
    want = norm(states)
    apply_liger_kernel_to_cpt_moe(model=model)
    assert_matches("norm", norm(states), want, 1e-3)


def test_transformers_finds_us_through_ligers_table():
    register_with_liger()
    model = AutoModelForCausalLM.from_config(CptMoeConfig(**CONFIGS["cpt_moe"]().to_diff_dict()))
    apply_liger_kernel(model, {"rms_norm": False})
    assert changed_modules(model) == ROPES | HEAD


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="Pass model=...: .* never into its classes"):
        apply_liger_kernel_to_cpt_moe()
    model = tiny_model("cpt_moe")
    with pytest.raises(ValueError, match="cross_entropy=True would replace torch's cross entropy"):
        apply_liger_kernel_to_cpt_moe(cross_entropy=True, model=model)
    assert changed_modules(model) == set()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ImportError, match=r"apply_liger_kernel_to_cpt_moe needs .* pip install 'hf_moe_cpt\[liger\]'"):
        apply_liger_kernel_to_cpt_moe(model=tiny_model("cpt_moe"))
