"""Active parameters and FLOPs against closed forms and torch's own FLOP counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_moe_cpt.trainers.instruments.model_cost import active_parameters, experts_per_token, flops_per_token


SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def test_dense_counts_everything_but_the_embedding():
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    assert active_parameters(model) == sum(p.numel() for p in model.parameters()) - 48 * 16


def test_tied_head_counts_once_as_the_head():
    tied = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    untied = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    assert active_parameters(tied) == active_parameters(untied)


def test_moe_counts_the_chosen_share_of_its_experts():
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2))
    one_expert = 3 * 16 * 40
    total = sum(p.numel() for p in model.parameters())
    assert active_parameters(model) == total - 48 * 16 - 3 * (8 - 2) * one_expert


def test_flops_agree_with_what_torch_counts_for_a_dense_model():
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager"))
    ids = torch.randint(0, 48, (1, 32))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    full_attention = 6 * 3 * 16 * 32  # torch counts the masked half of the scores as well
    norms = 6 * (2 * 3 + 1) * 16  # our count takes norm weights for matrices
    assert counter.get_total_flops() / 32 == pytest.approx(
        flops_per_token(model, 32) + full_attention - norms, rel=0.02
    )


def test_a_configuration_without_a_known_name_is_refused():
    with pytest.raises(ValueError, match="names its experts per token by none of num_experts_per_tok"):
        experts_per_token(LlamaConfig(**SIZES))
