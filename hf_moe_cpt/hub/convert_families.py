"""Where other mixtures keep, in a checkpoint, what `cpt_moe` keeps: names, configuration, what has no place.

E experts, K per token, S shared ones, L layers, m width of an expert. Source: transformers' configurations, modelling
code and conversion mappings. The names are those of files (one matrix per expert), which other tools read as well; a
test compares them with transformers' mapping from files to its fused parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from hf_moe_cpt.hub.convert_skeleton import foreign_fields, head_dim_of, skeleton_fields
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
    "olmoe": Family("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen2_moe": Family("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": Family("mlp", "gate_proj", "up_proj", "down_proj"),
}


def config_from(config: PreTrainedConfig) -> CptMoeConfig:
    """Our configuration of a model of another family. Raises ValueError for what we cannot express."""
    fields = skeleton_fields(config) | {"router_type": "softmax_topk", "router_z_loss_coef": 0.0}
    fields |= _MIXTURE_OF[config.model_type](config)
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
    """Another family's configuration of a model of ours. Raises ValueError for what it cannot express."""
    if not config.is_moe:
        raise ValueError(f"num_experts=0: a dense model has no place in {model_type}; upcycle it first.")
    if config.router_type == "sinkhorn" and config.num_experts_per_tok == 1:
        raise ValueError(f"router_type='sinkhorn' with one expert per token: {model_type} has no sigmoid gates.")
    fields = foreign_fields(config, model_type)
    fields |= {"num_experts_per_tok": config.num_experts_per_tok, "output_router_logits": config.output_router_logits}
    fields["router_aux_loss_coef"] = (
        config.router_aux_loss_coef * config.num_hidden_layers / config.num_experts_per_tok
    )
    fields |= _MIXTURE_TO[model_type](config)
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
    return _experts_alone(config) | {"num_experts": config.num_local_experts, "norm_topk_prob": True}


def _mixture_of_olmoe(config: PreTrainedConfig) -> dict[str, Any]:
    return _experts_alone(config) | {"num_experts": config.num_experts, "norm_topk_prob": config.norm_topk_prob}


def _experts_alone(config: PreTrainedConfig) -> dict[str, Any]:
    """Of families whose `intermediate_size` is the width of an expert, and that share none."""
    width = config.intermediate_size
    return {
        "num_shared_experts": 0,
        "intermediate_size": width * config.num_experts_per_tok,
        "moe_intermediate_size": width,
    }


def _mixture_of_qwen_moe(config: PreTrainedConfig) -> dict[str, Any]:
    """Of Qwen2-MoE and Qwen3-MoE, of which only the former has shared experts."""
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise ValueError(
            f"{config.model_type} with mlp_only_layers={config.mlp_only_layers} and decoder_sparse_step="
            f"{config.decoder_sparse_step} mixes dense layers and mixtures: in cpt_moe all layers are alike."
        )
    width = config.moe_intermediate_size
    return {
        "num_experts": config.num_experts,
        "num_shared_experts": getattr(config, "shared_expert_intermediate_size", 0) // width,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": width,
        "norm_topk_prob": config.norm_topk_prob,
    }


def _mixtral_of(config: CptMoeConfig) -> dict[str, Any]:
    _refuse_shared_experts(config, "mixtral")
    if not config.norm_topk_prob:
        raise ValueError("norm_topk_prob=False: mixtral divides gates by their sum; try qwen2_moe.")
    return {
        "num_local_experts": config.num_experts,
        "intermediate_size": config.moe_intermediate_size,
        "head_dim": config.head_dim,
    }


def _olmoe_of(config: CptMoeConfig) -> dict[str, Any]:
    _refuse_shared_experts(config, "olmoe")
    _refuse_other_heads(config, "olmoe")
    return {
        "num_experts": config.num_experts,
        "intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
    }


def _qwen2_moe_of(config: CptMoeConfig) -> dict[str, Any]:
    _refuse_other_heads(config, "qwen2_moe")
    width = config.moe_intermediate_size
    shared_width = config.num_shared_experts * width or min(DEAD_SHARED_WIDTH, width)
    return _experts_of_qwen_moe(config) | {"shared_expert_intermediate_size": shared_width}


def _qwen3_moe_of(config: CptMoeConfig) -> dict[str, Any]:
    _refuse_shared_experts(config, "qwen3_moe")
    return _experts_of_qwen_moe(config) | {"head_dim": config.head_dim}


def _experts_of_qwen_moe(config: CptMoeConfig) -> dict[str, Any]:
    return {
        "num_experts": config.num_experts,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
    }


def _refuse_shared_experts(config: CptMoeConfig, model_type: str) -> None:
    if config.num_shared_experts:
        raise ValueError(f"num_shared_experts={config.num_shared_experts}: {model_type} has none; try qwen2_moe.")


def _refuse_other_heads(config: CptMoeConfig, model_type: str) -> None:
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"head_dim={head_dim_of(config)}: {model_type} has heads of hidden_size / num_attention_heads = "
            f"{config.hidden_size / config.num_attention_heads:g}."
        )


_MIXTURE_OF = {
    "mixtral": _mixture_of_mixtral,
    "olmoe": _mixture_of_olmoe,
    "qwen2_moe": _mixture_of_qwen_moe,
    "qwen3_moe": _mixture_of_qwen_moe,
}
_MIXTURE_TO = {
    "mixtral": _mixtral_of,
    "olmoe": _olmoe_of,
    "qwen2_moe": _qwen2_moe_of,
    "qwen3_moe": _qwen3_moe_of,
}
