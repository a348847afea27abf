"""What a model and its tokenizer must be before a surgery begins. Source: ours."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_moe_cpt.trainers.surgery.model_pass import causal_lm_of, check_head


def check_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, max_length: int) -> None:
    """Raise ValueError for what is no causal LM, a tokenizer with more tokens than it has, rows beyond its context."""
    config = causal_lm_of(model).config.get_text_config()
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
    check_head(model)


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
