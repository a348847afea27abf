"""Load the two models of preference data, the policy and the reward model, after checking that each can do its part.

What can be refused is refused from the configuration and the tokenizer, before weights are read. A Prompt is a string,
or a conversation as a list of {"role": ..., "content": ...}. Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_moe_cpt.scripts.benchmark_tools import choose_device


Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class LoadOptions:
    """How a model is read. dtype: float32, bfloat16, float16 or auto. device: auto, cpu or cuda."""

    revision: str = "main"
    dtype: str = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    device: str = "auto"

    def source(self) -> dict[str, Any]:
        """What configuration, tokenizer and weights have in common."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def load_tokenizer(name: str, options: LoadOptions) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; where texts must be cut, their beginning goes, not the response at their end."""
    return AutoTokenizer.from_pretrained(name, truncation_side="left", **options.source())


def read_config(name: str, options: LoadOptions) -> PreTrainedConfig:
    """The configuration alone."""
    return AutoConfig.from_pretrained(name, **options.source())


def load_policy(name: str, options: LoadOptions) -> PreTrainedModel:
    """A causal LM on its device, ready to generate."""
    return _load(AutoModelForCausalLM, name, options)


def load_reward_model(name: str, options: LoadOptions) -> PreTrainedModel:
    """A sequence classifier with one label on its device; see `check_reward_model`."""
    return _load(AutoModelForSequenceClassification, name, options)


def _load(auto_class: type, name: str, options: LoadOptions) -> PreTrainedModel:
    attention = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    model = auto_class.from_pretrained(name, dtype=options.dtype, **attention, **options.source())
    return model.to(choose_device(options.device)).eval()


def check_reward_model(name: str, options: LoadOptions) -> None:
    """Raise ValueError unless the configuration announces one label, whose logit is the reward."""
    config = read_config(name, options)
    if config.num_labels != 1:
        raise ValueError(
            f"the reward model {name!r} has {config.num_labels} labels and must have one, whose logit is the reward: "
            "name another model, or score the responses yourself and name their columns."
        )


def load_generation_config(name: str, options: LoadOptions) -> GenerationConfig:
    """The generation configuration of a model, or what its configuration says where it has none."""
    try:
        return GenerationConfig.from_pretrained(name, revision=options.revision)
    except OSError:  # many checkpoints come without that file
        return GenerationConfig.from_model_config(read_config(name, options))


def stop_tokens(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a response: those of the generation configuration, and the tokenizer's EOS.

    Raises ValueError if there is none: every response would run to its limit.
    """
    known = generation.eos_token_id
    ids = [] if known is None else [known] if isinstance(known, int) else list(known)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} has no EOS token and the policy's generation configuration has "
            "none: no response would ever end; set tokenizer.eos_token and save the tokenizer with the policy."
        )
    return sorted(set(ids))


def room_for_prompt(config: PreTrainedConfig, max_new_tokens: int, max_prompt_length: int | None) -> int | None:
    """Most tokens that a prompt may have beside its response; None where the model has no limit.

    Raises ValueError if a response alone fills the model.
    """
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    if window is None:
        return max_prompt_length
    if max_new_tokens >= window:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt: the policy has {window} positions."
        )
    room = window - max_new_tokens
    return room if max_prompt_length is None else min(room, max_prompt_length)
