"""Where Mixtral and Qwen2-MoE keep, in a checkpoint, what `cpt_moe` keeps: names, configuration, what has no place.

E experts, K per token, S shared ones, L layers, m width of an expert. Source: transformers' configurations, modelling
code and conversion mappings. The names are those of files (one matrix per expert), which other tools read as well; a
test compares them with transformers' mapping from files to its fused parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from hf_moe_cpt.hub.convert_skeleton import foreign_fields, head_dim_of, refuse_qk_norm, skeleton_fields
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig


DEAD_SHARED_WIDTH = 64  # at most; Qwen2-MoE always has a shared expert, and zeros of this width stand for none


@dataclass(frozen=True)
class Family:
    """Names in files, after `model.layers.<layer>.`: block holds the mixture, the others name matrices in it."""

    block: str
    gate: str
    up: str
    down: str


FAMILIES = {
    "mixtral": Family("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": Family("mlp", "gate_proj", "up_proj", "down_proj"),
}


def config_from(config: PreTrainedConfig) -> CptMoeConfig:
    """Our configuration of a Mixtral or Qwen2-MoE model. Raises ValueError for what we cannot express."""
    fields = skeleton_fields(config) | {"router_type": "softmax_topk", "router_z_loss_coef": 0.0}
    fields |= _mixture_of_mixtral(config) if config.model_type == "mixtral" else _mixture_of_qwen2_moe(config)
    fields["num_experts_per_tok"] = config.num_experts_per_tok
    # Theirs is K if uniform, over all layers at once; ours is 1 per layer, summed over layers.
    scale = config.num_experts_per_tok / config.num_hidden_layers
    fields["router_aux_loss_coef"] = config.router_aux_loss_coef * scale
    fields["output_router_logits"] = config.output_router_logits
    if fields["norm_topk_prob"] and config.num_experts_per_tok == 1:
        raise ValueError(
            f"{config.model_type} with num_experts_per_tok=1 and normalised gates: every gate is 1 whatever the "
            "router says, which cpt_moe refuses."
        )
    return CptMoeConfig(**fields)


def config_to(config: CptMoeConfig, model_type: str) -> PreTrainedConfig:
    """Mixtral's or Qwen2-MoE's configuration of a model of ours. Raises ValueError for what it cannot express."""
    refuse_qk_norm(model_type)
    if not config.is_moe:
        raise ValueError(f"num_experts=0: a dense model has no place in {model_type}; upcycle it first.")
    if config.router_type == "sinkhorn" and config.num_experts_per_tok == 1:
        raise ValueError(f"router_type='sinkhorn' with one expert per token: {model_type} has no sigmoid gates.")
    fields = foreign_fields(config, model_type)
    fields |= {"num_experts_per_tok": config.num_experts_per_tok, "output_router_logits": config.output_router_logits}
    fields["router_aux_loss_coef"] = (
        config.router_aux_loss_coef * config.num_hidden_layers / config.num_experts_per_tok
    )
    fields |= _mixtral_of(config) if model_type == "mixtral" else _qwen2_moe_of(config)
    return AutoConfig.for_model(model_type, **fields)


def lost_in_training(config: CptMoeConfig) -> list[str]:
    """What of a model of ours another family does not do when it is trained further; logits do not depend on it."""
    lost = []
    if config.router_type == "sinkhorn":
        lost.append("experts are no longer chosen by a Sinkhorn plan")
    if config.router_z_loss_coef > 0:
        lost.append(f"router_z_loss_coef={config.router_z_loss_coef} has no counterpart")
    return lost


def _mixture_of_mixtral(config: PreTrainedConfig) -> dict[str, Any]:
    width = config.intermediate_size
    return {
        "num_experts": config.num_local_experts,
        "num_shared_experts": 0,
        "intermediate_size": width * config.num_experts_per_tok,
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
    }


def _mixture_of_qwen2_moe(config: PreTrainedConfig) -> dict[str, Any]:
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise ValueError(
            f"qwen2_moe with mlp_only_layers={config.mlp_only_layers} and decoder_sparse_step="
            f"{config.decoder_sparse_step} mixes dense layers and mixtures: in cpt_moe all layers are alike."
        )
    width, shared = config.moe_intermediate_size, config.shared_expert_intermediate_size
    return {
        "num_experts": config.num_experts,
        "num_shared_experts": shared // width,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": width,
        "norm_topk_prob": config.norm_topk_prob,
    }


def _mixtral_of(config: CptMoeConfig) -> dict[str, Any]:
    if config.num_shared_experts:
        raise ValueError(f"num_shared_experts={config.num_shared_experts}: mixtral has none; try qwen2_moe.")
    if not config.norm_topk_prob:
        raise ValueError("norm_topk_prob=False: mixtral divides gates by their sum; try qwen2_moe.")
    return {
        "num_local_experts": config.num_experts,
        "intermediate_size": config.moe_intermediate_size,
        "head_dim": config.head_dim,
        "sliding_window": None,
    }


def _qwen2_moe_of(config: CptMoeConfig) -> dict[str, Any]:
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"head_dim={head_dim_of(config)}: qwen2_moe has heads of hidden_size / num_attention_heads = "
            f"{config.hidden_size / config.num_attention_heads:g}."
        )
    width = config.moe_intermediate_size
    return {
        "num_experts": config.num_experts,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": config.num_shared_experts * width or min(DEAD_SHARED_WIDTH, width),
        "norm_topk_prob": config.norm_topk_prob,
        "qkv_bias": False,
    }
