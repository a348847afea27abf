"""Weights that are stored under other names come back as `from_pretrained` reads them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen3MoeConfig

from hf_moe_cpt.trainers.instruments.stored_weights import load_translated, stored_names
from tests.helpers.tiny_models import SIZES, tiny_model


MIXTURES = {
    "olmoe": lambda: OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2),
}


def _model(kind):
    if kind not in MIXTURES:
        return tiny_model(kind)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MIXTURES[kind]())


def _changed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
@pytest.mark.parametrize("kind", ["mixtral", *MIXTURES])
def test_every_weight_of_a_mixture_comes_back(kind, shard, tmp_path):
    saved = _changed(_model(kind))
    saved.save_pretrained(tmp_path, max_shard_size=shard)
    model = _model(kind)
    assert not stored_names(tmp_path) <= model.state_dict().keys()  # else there would be nothing to translate
    assert load_translated(model, tmp_path)
    for name, want in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], want), name


def test_a_model_of_two_types_is_read_without_rounding(tmp_path):
    saved = _changed(tiny_model("mixtral"))
    saved.save_pretrained(tmp_path)
    model = tiny_model("mixtral").to(torch.bfloat16)
    model.lm_head.float()
    assert load_translated(model, tmp_path)
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight)
    for name, want in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], want.to(model.state_dict()[name].dtype)), name


@pytest.mark.parametrize("kind", ["llama", "cpt_moe"])
def test_where_names_agree_nothing_is_done(kind, tmp_path):
    _changed(tiny_model(kind)).save_pretrained(tmp_path)
    model = tiny_model(kind)
    assert not load_translated(model, tmp_path)
    for name, value in tiny_model(kind).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_other_checkpoints_and_modules_are_left_to_the_trainer(tmp_path):
    assert stored_names(tmp_path) == set()
    tiny_model("mixtral").save_pretrained(tmp_path)
    assert not load_translated(torch.nn.Linear(2, 2), tmp_path)
