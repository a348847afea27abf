"""Tiny mixtures of experts of many families of transformers and of ours, and where their layers keep the mixture."""

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    JetMoeConfig,
    Llama4TextConfig,
    NemotronHConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from hf_moe_cpt.routing.hooks import moe_layers
from tests.helpers.tiny_models import SIZES, VOCABULARY, tiny_model


FOUR = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "deepseek_v3": lambda: DeepseekV3Config(
        **SIZES,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    ),
    "gpt_oss": lambda: GptOssConfig(**FOUR, head_dim=8, layer_types=["full_attention"] * 2),
    "granitemoe": lambda: GraniteMoeConfig(**FOUR),
    "jamba": lambda: JambaConfig(
        **{**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "use_mamba_kernels": False, "pad_token_id": 0},
        expert_layer_period=1,
        expert_layer_offset=0,
        attn_layer_period=1,
        attn_layer_offset=0,
    ),
    "llama4": lambda: Llama4TextConfig(**{**FOUR, "num_experts_per_tok": 1}, head_dim=8, intermediate_size_mlp=32),
    "olmoe": lambda: OlmoeConfig(**SIZES, num_experts=6, num_experts_per_tok=3),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SIZES, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8
    ),
}
RECURRENT_FIRST = ["linear_attention", "full_attention"]
GATED_DELTA = {
    "head_dim": 8,
    "layer_types": RECURRENT_FIRST,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}


def _without(*names: str) -> dict[str, object]:
    return {name: value for name, value in FOUR.items() if name not in names}


# Families beside CONFIGS: with recurrent layers or masks of their own, and two more without either.
OTHERS = {
    "gpt_oss sliding": lambda: GptOssConfig(
        **FOUR, head_dim=8, layer_types=["sliding_attention", "full_attention"], sliding_window=4
    ),
    "glm4_moe": lambda: Glm4MoeConfig(
        **_without("num_local_experts"), head_dim=8, n_routed_experts=4, num_mtp_layers=0
    ),
    "jetmoe": lambda: JetMoeConfig(**_without("num_attention_heads"), kv_channels=8),
    "granitemoehybrid": lambda: GraniteMoeHybridConfig(
        **FOUR,
        layer_types=RECURRENT_FIRST,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=16,
        shared_intermediate_size=16,
    ),
    "jamba hybrid": lambda: JambaConfig(
        **{**FOUR, "pad_token_id": 0}, num_experts=4, mamba_d_state=4, attn_layer_period=2, attn_layer_offset=1
    ),
    "nemotron_h": lambda: NemotronHConfig(
        **_without("num_hidden_layers", "num_local_experts"),
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=16,
        n_routed_experts=4,
        moe_intermediate_size=8,
        moe_shared_expert_intermediate_size=8,
    ),
    "qwen3_5_moe": lambda: Qwen3_5MoeTextConfig(
        **{**_without("num_local_experts", "intermediate_size"), **GATED_DELTA}
    ),
    "qwen3_next": lambda: Qwen3NextConfig(**{**_without("num_local_experts"), **GATED_DELTA}),
}
BLOCKS = {  # of the decoder layers -> (experts, router, E)
    "deepseek_v3": {1: ("mlp.experts", "mlp.gate", 8)},
    "gpt_oss": dict.fromkeys((0, 1), ("mlp.experts", "mlp.router", 4)),
    "granitemoe": dict.fromkeys((0, 1), ("block_sparse_moe.experts", "block_sparse_moe.router", 4)),
    "jamba": dict.fromkeys((0, 1), ("feed_forward.experts", "feed_forward.router", 4)),
    "llama4": dict.fromkeys((0, 1), ("feed_forward.experts", "feed_forward.router", 4)),
    "olmoe": dict.fromkeys((0, 1), ("mlp.experts", "mlp.gate", 6)),
    "qwen2_moe": dict.fromkeys((0, 1), ("mlp.experts", "mlp.gate", 5)),
    "qwen3_moe": dict.fromkeys((0, 1), ("mlp.experts", "mlp.gate", 4)),
    "mixtral": dict.fromkeys((0, 1), ("mlp.experts", "mlp.gate", 4)),
    "cpt_moe": dict.fromkeys((0, 1), ("mlp.experts", "mlp.gate", 7)),
    "cpt_moe sinkhorn": dict.fromkeys((0, 1), ("mlp.experts", "mlp.gate", 7)),
}


def moe_model(kind: str) -> PreTrainedModel:
    """A tiny mixture of experts with the same weights at every call, in float32 and with eager experts."""
    torch.manual_seed(0)
    configs = CONFIGS | OTHERS
    model = AutoModelForCausalLM.from_config(configs[kind]()) if kind in configs else tiny_model(kind)
    if kind != "llama4":
        model.set_experts_implementation("eager")
    for router in (layer.router for layer in moe_layers(model)):  # the routers of some families start at 0
        for weight in router.parameters():
            nn.init.normal_(weight, std=0.3)
    return model


def padded_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Three texts of 6, 4 and 2 tokens, padded on the right."""
    ids = torch.randint(1, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 4:], mask[2, 2:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}
