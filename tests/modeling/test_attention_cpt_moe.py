"""Biases, norms of queries and keys, and windows: off by default, and the same with caches, padding and packing.

That they compute what Llama, Mistral, Qwen2, Qwen3 and OLMoE do: test_equal_to_transformers.py.
"""

import json

import pytest
import torch
from transformers import AutoConfig

from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM
from tests.helpers.tolerances import assert_matches


VARIANTS = {
    "biases, norms of heads": {"qkv_bias": True, "qk_norm": "head", "num_key_value_heads": 2},
    "all biases, norms of projections": {"attention_bias": True, "qk_norm": "projection", "num_key_value_heads": 1},
    "window": {"sliding_window": 4},
}
NEW_FIELDS = ("attention_bias", "qkv_bias", "qk_norm", "sliding_window")


def config_of(**fields: object) -> CptMoeConfig:
    return CptMoeConfig.from_preset("pb-switch-tiny", vocab_size=256, num_hidden_layers=2, **fields)


def model_of(variant: str) -> CptMoeForCausalLM:
    """In evaluation, with biases and norms that matter and attention that is far from uniform."""
    torch.manual_seed(0)
    model = CptMoeForCausalLM(config_of(**VARIANTS[variant])).eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            torch.nn.init.uniform_(weight, -1.0, 1.0)
        elif ".self_attn." in name:
            weight.data *= 4
    return model


def tokens_of(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, columns))


def test_off_by_default_also_for_configurations_that_never_heard_of_them(tmp_path) -> None:
    model = CptMoeForCausalLM(config_of())
    assert {name.rpartition(".")[2] for name in model.state_dict() if ".self_attn." in name} == {"weight"}
    assert not [name for name in model.state_dict() if "q_norm" in name or "k_norm" in name]
    model.config.save_pretrained(tmp_path)
    old = json.loads((tmp_path / "config.json").read_text())
    assert [old.pop(name) for name in NEW_FIELDS] == [False, False, None, None]
    (tmp_path / "config.json").write_text(json.dumps(old))
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_round_trip_changes_nothing(variant: str, tmp_path) -> None:
    config = config_of(**VARIANTS[variant])
    config.save_pretrained(tmp_path)
    assert not [key for key in json.loads((tmp_path / "config.json").read_text()) if key.endswith("_plan")]
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert again.base_model_tp_plan == config.base_model_tp_plan


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_with_a_cache_equals_one_forward(variant: str) -> None:
    model, tokens = model_of(variant), tokens_of(2, 12)
    cache, rows = None, []
    for column in tokens.split([5, 1, 1, 5], dim=1):
        out = model(input_ids=column, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits)
    want = model(input_ids=tokens, use_cache=False).logits
    assert_matches("logits", torch.cat(rows, dim=1), want)
    model.set_attn_implementation("eager")
    assert_matches("eager", model(input_ids=tokens).logits, want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_is_greedy_search_with_padding_and_with_a_static_cache(variant: str) -> None:
    model, prompt = model_of(variant), tokens_of(1, 6)
    want = prompt
    for _ in range(5):
        want = torch.cat([want, model(input_ids=want).logits[:, -1:].argmax(-1)], dim=1)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(9) >= 3).long()[None]
    for cache in (None, "static"):
        got = model.generate(padded, attention_mask=mask, cache_implementation=cache, **settings)
        assert torch.equal(got[0, 3:], want[0]), cache


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_do_not_see_each_other(variant: str, implementation: str) -> None:
    model = model_of(variant)
    model.set_attn_implementation(implementation)
    first, second = tokens_of(1, 7), tokens_of(1, 9)
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    packed = model(input_ids=torch.cat([first, second], 1), position_ids=positions).logits
    assert_matches("first", packed[:, :7], model(input_ids=first).logits)
    assert_matches("second", packed[:, 7:], model(input_ids=second).logits)


def test_a_token_sees_no_more_than_its_window() -> None:
    """Two layers of a window of 4 reach 6 tokens back, and exactly that far (beyond: rounding, 1e-7)."""
    model, tokens = model_of("window"), tokens_of(1, 12)
    changed = tokens.clone()
    changed[0, 3] = (tokens[0, 3] + 1) % 256
    differs = (model(tokens).logits - model(changed).logits).abs().amax(-1)[0]
    assert (differs > 1e-4).tolist() == [3 <= position <= 9 for position in range(12)]
