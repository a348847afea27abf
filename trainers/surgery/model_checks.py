"""What a model and its tokenizer must be before a surgery begins. Source: ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from hf_moe_cpt.extras import require
from hf_moe_cpt.trainers.surgery.model_pass import causal_lm_of, check_head


# what configuration and weights have in common
SOURCE_OPTIONS = ("revision", "subfolder", "trust_remote_code", "token", "cache_dir", "local_files_only")


def config_of(model: str | nn.Module, options: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of a causal LM; of one that is given by name without its weights.

    options: arguments of `from_pretrained`. Raises ValueError for what is no causal LM, and for an adapter alone.
    """
    if isinstance(model, nn.Module):
        return causal_lm_of(model).config
    if (Path(model) / "adapter_config.json").is_file() and not (Path(model) / "config.json").is_file():
        raise ValueError(
            f"{model!r} is an adapter, and a surgery changes whole models: merge it into its base first "
            "(merge_and_unload of PEFT), and name the folder of the result."
        )
    if isinstance(options.get("config"), PreTrainedConfig):
        return options["config"]
    return AutoConfig.from_pretrained(model, **{key: options[key] for key in SOURCE_OPTIONS if key in options})


def open_model(model: str | nn.Module, options: Mapping[str, Any], peft_config: Any = None) -> nn.Module:
    """The model that is operated on, its weights read if it is given by name, with a new adapter if one is wanted.

    Raises ValueError for a head that is not one product.
    """
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model, **options)
    if peft_config is not None:
        model = require("peft", needed_by="peft_config").get_peft_model(model, peft_config)
    check_head(model)
    if hasattr(model, "add_model_tags"):
        model.add_model_tags(["hf_moe_cpt", "llm-surgery"])
    return model


def check_context(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, max_length: int) -> None:
    """Raise ValueError for a tokenizer with more tokens than the model has, and for rows beyond its context."""
    config = config.get_text_config()
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {config.vocab_size}: use the tokenizer that "
            "belongs to the model, or model.resize_token_embeddings(len(tokenizer))."
        )
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise ValueError(
            f"max_length={max_length} is longer than the model's context of {context} tokens: lower max_length."
        )


def check_sharding(args: Any, *, is_deepspeed: bool, is_fsdp: bool) -> None:
    """Raise ValueError for ways to share a model that a surgery cannot go."""
    if is_deepspeed:
        raise ValueError(
            "DeepSpeed runs one backward pass a step, and a surgery one for each set: use FSDP or plain data "
            "parallelism, or train an adapter."
        )
    if is_fsdp and args.target_experts:
        raise ValueError("target_experts trains rows of whole tensors, which FSDP shards: use data parallelism.")


def check_vocabulary(model: nn.Module, ref_model: nn.Module) -> None:
    """Raise ValueError unless both models give a probability to the same words."""
    ours, theirs = (causal_lm_of(one).config.get_text_config().vocab_size for one in (model, ref_model))
    if ours != theirs:
        raise ValueError(
            f"The model has a vocabulary of {ours} and ref_model of {theirs}: the reference must be the model before "
            "surgery, with the same tokenizer."
        )
    check_head(ref_model)


def pad_token_of(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Any token will do, since padding is masked: that for padding, else that for an end, else 0."""
    ids = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None))
    return next((token for token in ids if token is not None), 0)
