"""Gradient checkpointing: exact without re-entrance, refused with it while a penalty is on."""

import pytest
import torch

from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM


def model_of(preset: str, **fields) -> CptMoeForCausalLM:
    torch.manual_seed(0)
    return CptMoeForCausalLM(CptMoeConfig.from_preset(preset, vocab_size=256, num_hidden_layers=2, **fields)).train()


def gradients(model: CptMoeForCausalLM) -> dict[str, torch.Tensor]:
    tokens = torch.arange(64).view(2, 32)
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("preset", ["pb-granular-tiny", "sb-granular-tiny", "dense-tiny"])
def test_gradients_are_bit_equal_without_reentrance(preset: str) -> None:
    want = gradients(model_of(preset))
    for settings in (None, {"use_reentrant": False}):
        model = model_of(preset)
        model.gradient_checkpointing_enable(settings)
        got = gradients(model)
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_reentrance_is_refused_where_a_penalty_would_lose_its_gradient() -> None:
    with pytest.raises(ValueError, match='cuts the router penalties off.*"use_reentrant": False'):
        model_of("pb-granular-tiny").gradient_checkpointing_enable({"use_reentrant": True})
    # Switched on afterwards: refused at the forward that would train on it.
    model = model_of("pb-granular-tiny", output_router_logits=False)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    tokens = torch.arange(64).view(2, 32)
    with pytest.raises(ValueError, match="cuts the router penalties off"):
        model(input_ids=tokens, labels=tokens, output_router_logits=True)
    assert model.eval()(input_ids=tokens, labels=tokens, output_router_logits=True).aux_loss > 0


@pytest.mark.parametrize("preset", ["sb-granular-tiny", "dense-tiny"])
def test_reentrance_is_allowed_without_penalties(preset: str) -> None:
    model = model_of(preset)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    got, want = gradients(model), gradients(model_of(preset))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_reentrance_is_allowed_with_both_coefficients_zero() -> None:
    model = model_of("pb-granular-tiny", router_aux_loss_coef=0.0, router_z_loss_coef=0.0, output_router_logits=True)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    assert all(gradient is not None for gradient in gradients(model).values())
