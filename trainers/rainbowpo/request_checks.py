"""What a `RainbowPOTrainer` cannot do, refused before a model is loaded where that can be known.

Source: ours, around TRL's `DPOTrainer`.
"""

from __future__ import annotations

from typing import Any

from accelerate.utils import is_peft_model
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from hf_moe_cpt.trainers.rainbowpo.preference_data import AnyDataset, first_row
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig


OPTIONS_OF_CONFIG = ("revision", "trust_remote_code", "cache_dir", "token", "subfolder")  # of those of a model


def check_end_of_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError for a tokenizer that has no token to end a completion with."""
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end-of-text token, so completions could not end: set its eos_token.")


def check_request(
    model: str | nn.Module,
    ref_model: nn.Module | None,
    args: RainbowPOConfig,
    train_dataset: AnyDataset | None,
    processing_class: Any,
    others: dict[str, Any],
) -> None:
    """Raise ValueError for what a `RainbowPOTrainer` cannot do, before anything is loaded or computed."""
    if not isinstance(args, RainbowPOConfig):
        raise ValueError(f"args must be a RainbowPOConfig, got {type(args).__name__}: its fields are the objective.")
    if others.get("compute_metrics") is not None:
        raise ValueError("compute_metrics needs logits, which are never formed here: read the logged metrics instead.")
    has_images = train_dataset is not None and {"image", "images"} & first_row(train_dataset, "train").keys()
    config = _config_of(model, args)
    if isinstance(processing_class, ProcessorMixin) or has_images or hasattr(config, "vision_config"):
        raise ValueError("RainbowPOTrainer takes language models and text, not images: use trl.DPOTrainer.")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"A {config.model_type} model has an encoder: RainbowPOTrainer takes causal language models.")
    if processing_class is not None:
        check_end_of_text(processing_class)
    if not args.needs_reference:
        for name, given in (
            ("ref_model", ref_model is not None),
            ("precompute_ref_log_probs", args.precompute_ref_log_probs),
            ("sync_ref_model", args.sync_ref_model),
        ):
            if given:
                raise ValueError(
                    f"{name} is set, but mixing_alpha=0 and contextual_scaling='none' use no reference: leave it out."
                )
        return
    if ref_model is not None and args.needs_reference_entropy and not isinstance(ref_model, PreTrainedModel):
        raise ValueError(
            f"ref_model is a {type(ref_model).__name__}, and phi needs the entropies of a PreTrainedModel: merge its "
            "adapter."
        )
    has_own = ref_model is not None or args.precompute_ref_log_probs or others.get("peft_config") is not None
    is_whole = not isinstance(model, str) and not is_peft_model(model)
    if not has_own and is_whole and not model.config._name_or_path:
        raise ValueError(
            "The reference is a second copy of the model, loaded from where it came from, and this model was never "
            "saved: pass ref_model or peft_config, set precompute_ref_log_probs, or save the model and load it."
        )


def _config_of(model: str | nn.Module, args: RainbowPOConfig) -> Any:
    """The model's configuration; of a name it is read alone, so that a model is not loaded to be refused."""
    if not isinstance(model, str):
        return model.config
    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    options = {name: value for name, value in options.items() if name in OPTIONS_OF_CONFIG}
    return AutoConfig.from_pretrained(model, **options)
