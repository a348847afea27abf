"""Biases, norms of queries and keys, and windows of the attention of each family, and our fields for them.

Biases: `attention_bias` on all four projections, `qkv_bias` on queries, keys and values. Source: transformers'
configurations and modelling code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig


BIASES = ("attention_bias", "qkv_bias")
ATTENTION_FIELDS = (*BIASES, "qk_norm", "sliding_window")
_WHAT_IS_NORMALISED = {
    "head": "each head of queries and keys",
    "projection": "all heads of queries and keys together",
    None: "neither queries nor keys",
}


@dataclass(frozen=True)
class Attention:
    """bias: the one of `BIASES` that the family can have. qk_norm: our field's value. has_window: for all layers."""

    bias: str | None = None
    qk_norm: str | None = None
    has_window: bool = False


ATTENTION = {
    "llama": Attention("attention_bias"),
    "mistral": Attention(has_window=True),
    "mixtral": Attention(has_window=True),
    "qwen2": Attention("qkv_bias"),
    "qwen2_moe": Attention("qkv_bias"),
    "qwen3": Attention("attention_bias", "head"),
    "qwen3_moe": Attention("attention_bias", "head", has_window=True),
    "olmoe": Attention("attention_bias", "projection"),
}


def attention_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """`ATTENTION_FIELDS` of another family's model, or of one of ours.

    Raises ValueError for clipped queries, keys and values, and for a window that only some layers have.
    """
    if isinstance(config, CptMoeConfig):
        return {name: getattr(config, name) for name in ATTENTION_FIELDS}
    if (limit := getattr(config, "clip_qkv", None)) is not None:
        raise ValueError(
            f"clip_qkv={limit}: {config.model_type} clips queries, keys and values, and cpt_moe does not; "
            "only models with clip_qkv=None can be carried over."
        )
    family = ATTENTION[config.model_type]
    fields = dict.fromkeys(BIASES, False) | {"qk_norm": family.qk_norm, "sliding_window": _window_of(config)}
    if family.bias is not None:
        fields[family.bias] = getattr(config, family.bias, True)  # Qwen2 has no switch for it: always
    return fields


def foreign_attention_fields(config: CptMoeConfig, model_type: str) -> dict[str, Any]:
    """Fields of another family that give the attention of a model of ours. Raises ValueError for what it lacks."""
    family = ATTENTION[model_type]
    for name in BIASES:
        if getattr(config, name) and name != family.bias:
            has = f"those of {family.bias} alone" if family.bias else "none"
            raise ValueError(f"{name}=True: of biases, the attention of {model_type} can have {has}.")
    if config.qk_norm != family.qk_norm:
        raise ValueError(
            f"qk_norm={config.qk_norm!r} normalises {_WHAT_IS_NORMALISED[config.qk_norm]}, {model_type} "
            f"{_WHAT_IS_NORMALISED[family.qk_norm]}: no weights make the two equal."
        )
    if config.sliding_window is not None and not family.has_window:
        raise ValueError(f"sliding_window={config.sliding_window}: {model_type} has no window for all layers.")
    fields: dict[str, Any] = {} if family.bias is None else {family.bias: getattr(config, family.bias)}
    if family.has_window:
        has_window = config.sliding_window is not None
        fields |= {"sliding_window": config.sliding_window}
        fields |= {"use_sliding_window": has_window} if model_type == "qwen3_moe" else {}
    return fields


def _window_of(config: PreTrainedConfig) -> int | None:
    """Tokens that a token sees; None for all. Raises ValueError if layers differ within the context."""
    window = getattr(config, "sliding_window", None) or None
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    if ATTENTION[config.model_type].has_window:
        return window
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds == {"sliding_attention"}:
        return window
    if "sliding_attention" in kinds and window < config.max_position_embeddings:
        raise ValueError(
            f"{config.model_type} attends in some layers to the last {window} of {config.max_position_embeddings} "
            "tokens and in others to all, and cpt_moe is the same in all layers: set max_position_embeddings to "
            f"{window} in its config.json, and keep texts within that."
        )
    return None
