"""The models that plans and benchmarks call by name: our presets, and transformers' at the same sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig, Qwen2MoeConfig

from hf_moe_cpt.modeling.configuration_cpt_moe import PRESETS, CptMoeConfig
from hf_moe_cpt.reading import read_config as config_at


def _sizes(preset: str) -> dict[str, int]:
    """What every decoder of the preset's size shares."""
    config = CptMoeConfig.from_preset(preset)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {name: getattr(config, name) for name in (*names, "max_position_embeddings")}


def _llama(preset: str) -> LlamaConfig:
    return LlamaConfig(**_sizes(preset), intermediate_size=CptMoeConfig.from_preset(preset).intermediate_size)


def _qwen2_moe(preset: str) -> Qwen2MoeConfig:
    """Routed and one shared expert in every layer, as in our granular models, whose gates it has besides."""
    ours = CptMoeConfig.from_preset(preset)
    return Qwen2MoeConfig(
        **_sizes(preset),
        num_experts=ours.num_experts,
        num_experts_per_tok=ours.num_experts_per_tok,
        moe_intermediate_size=ours.moe_intermediate_size,
        shared_expert_intermediate_size=ours.num_shared_experts * ours.moe_intermediate_size,
        output_router_logits=True,
        router_aux_loss_coef=ours.router_aux_loss_coef,
    )


def _mixtral(preset: str) -> MixtralConfig:
    ours = CptMoeConfig.from_preset(preset)
    return MixtralConfig(
        **_sizes(preset),
        num_local_experts=ours.num_experts,
        num_experts_per_tok=ours.num_experts_per_tok,
        intermediate_size=ours.moe_intermediate_size,
        output_router_logits=True,
        router_aux_loss_coef=ours.router_aux_loss_coef,
    )


STOCK: dict[str, tuple[Callable[[str], PreTrainedConfig], str]] = {
    "llama-570m": (_llama, "dense-570m"),
    "qwen2-moe-granular-2b": (_qwen2_moe, "pb-granular-2b"),
    "mixtral-switch-2b": (_mixtral, "pb-switch-2b"),
    "llama-tiny": (_llama, "dense-tiny"),
    "qwen2-moe-granular-tiny": (_qwen2_moe, "pb-granular-tiny"),
    "mixtral-switch-tiny": (_mixtral, "pb-switch-tiny"),
}
MODELS = (*PRESETS, *STOCK)


def config_of(model: str) -> PreTrainedConfig:
    """A fresh configuration of a model named in `MODELS`."""
    if model not in STOCK:
        return CptMoeConfig.from_preset(model)
    build, preset = STOCK[model]
    return build(preset)


def read_config(preset: str | None, model: str | None) -> PreTrainedConfig:
    """The configuration of a name in `MODELS`, or of a folder or name on the Hub. Raises ValueError for neither."""
    if preset is not None:
        if preset not in MODELS:
            raise ValueError(f"--preset {preset!r} is unknown: choose from {', '.join(MODELS)}.")
        return config_of(preset)
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"--model {model!r} is a folder without config.json: give one that a model was saved in.")
    try:
        return config_at(model)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--model {model!r} has no configuration that can be read: {reason}") from error
