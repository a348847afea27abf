"""The part of a decoder that upcycling and conversion leave alone, as fields of `CptMoeConfig` and back.

Skeleton: embeddings, attention, norms, head, sizes and rotary positions. What `cpt_moe` cannot express is refused.
Source: transformers' configurations and modelling code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM


SHARED_FIELDS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings rms_norm_eps attention_dropout tie_word_embeddings initializer_range use_cache "
    "pad_token_id bos_token_id eos_token_id dtype"
).split()
HAS_QK_NORM = ("olmoe", "qwen3", "qwen3_moe")


def refuse_qk_norm(model_type: str) -> None:
    """Raise ValueError for a family that normalises queries and keys: no weights make such a norm the identity."""
    if model_type in HAS_QK_NORM:
        raise ValueError(
            f"{model_type} normalises queries and keys (q_norm, k_norm) and cpt_moe does not: the two cannot compute "
            "the same."
        )


def skeleton_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Fields of `CptMoeConfig` that give the skeleton of another family's model, or of one of ours.

    Raises ValueError for an attention window that hides tokens within the context, query and key norms, and a head of
    which only a part is rotated although the family rotates all of it.
    """
    fields = {name: getattr(config, name) for name in SHARED_FIELDS}
    fields["head_dim"] = head_dim_of(config)
    fields["rope_parameters"] = dict(config.rope_parameters)
    if isinstance(config, CptMoeConfig):
        return fields | {"norm_type": config.norm_type}
    refuse_qk_norm(config.model_type)
    window = _window_of(config)
    if window is not None and window < config.max_position_embeddings:
        raise ValueError(
            f"{config.model_type} attends to the last {window} of {config.max_position_embeddings} tokens and cpt_moe "
            f"to all: set max_position_embeddings to {window} in its config.json, and keep texts within that."
        )
    if fields["rope_parameters"].setdefault("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{config.model_type} with partial_rotary_factor below 1 is unknown: set it to 1.0.")
    return fields


def foreign_fields(config: CptMoeConfig, model_type: str) -> dict[str, Any]:
    """Fields of a Llama-like family's configuration that give the skeleton of one of ours.

    Raises ValueError for LayerNorm and for rotation of a part of each head.
    """
    if config.norm_type != "rmsnorm":
        raise ValueError(f"norm_type={config.norm_type!r}: {model_type} has RMSNorm and no biases.")
    rope = dict(config.rope_parameters)
    if (factor := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(
            f"partial_rotary_factor={factor}: {model_type} rotates whole heads; only models that were trained with "
            "1.0 can become one."
        )
    fields = {name: getattr(config, name) for name in SHARED_FIELDS} | {"rope_parameters": rope}
    if fields["initializer_range"] is None:  # our own initialisation, which no number stands for
        del fields["initializer_range"]
    return fields


def head_dim_of(config: PreTrainedConfig) -> int:
    """Size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A causal language model without memory, to ask for names and shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def write_config(model: PreTrainedModel, folder: Path) -> None:
    """Write config.json as `save_pretrained` does and, for a model of ours, the code beside it."""
    model.config.architectures = [type(model).__name__]
    if isinstance(model, CptMoeForCausalLM):
        custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)


def _window_of(config: PreTrainedConfig) -> int | None:
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None) or None
