"""The part of a decoder that upcycling and conversion leave alone, as fields of `CptMoeConfig` and back.

Skeleton: embeddings, attention (`convert_attention`), norms, head, sizes and rotary positions. What `cpt_moe` cannot
express is refused.
Source: transformers' configurations and modelling code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from hf_moe_cpt.hub.convert_attention import attention_fields, foreign_attention_fields
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM


SHARED_FIELDS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings rms_norm_eps attention_dropout tie_word_embeddings initializer_range use_cache "
    "pad_token_id bos_token_id eos_token_id dtype"
).split()


def skeleton_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Fields of `CptMoeConfig` that give the skeleton of another family's model, or of one of ours.

    Raises ValueError for what `attention_fields` refuses, and for a head of which only a part is rotated although the
    family rotates all of it.
    """
    fields = {name: getattr(config, name) for name in SHARED_FIELDS}
    fields["head_dim"] = head_dim_of(config)
    fields["rope_parameters"] = dict(config.rope_parameters)
    fields |= attention_fields(config)
    if isinstance(config, CptMoeConfig):
        return fields | {"norm_type": config.norm_type}
    if fields["rope_parameters"].setdefault("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{config.model_type} with partial_rotary_factor below 1 is unknown: set it to 1.0.")
    return fields


def foreign_fields(config: CptMoeConfig, model_type: str) -> dict[str, Any]:
    """Fields of a Llama-like family's configuration that give the skeleton of one of ours.

    Raises ValueError for LayerNorm, for rotation of a part of each head and for attention that the family lacks.
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
    fields |= foreign_attention_fields(config, model_type)
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
