"""Which model a trainer of the command line gets, and how it is loaded: TRL's fields, most used first; needs TRL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from transformers import TrainingArguments
from trl import ModelConfig

from hf_moe_cpt.extras import require
from hf_moe_cpt.trainers.common.checkpointing import require_unused, resolve_resume


Training = TypeVar("Training", bound=TrainingArguments)
DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass
class ModelArguments(ModelConfig):
    """Which model, how it is loaded, and whether an adapter is trained."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of the model to train."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    dtype: str | None = field(default="float32", metadata={"help": "Type of the weights.", "choices": list(DTYPES)})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    experts_implementation: str | None = field(
        default=None, metadata={"help": "Of a mixture of experts: eager, grouped_mm, hf_moe_cpt, ..."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of the whole model."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Its scale is lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers that are adapted; unset: peft's choice for the model."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the weights to 4 bit, under an adapter."})

    def check(self, training: TrainingArguments, besides: tuple[str, ...] = ()) -> None:
        """Raise ValueError or ImportError for what cannot work, before anything is loaded.

        besides: what may lie in the output folder of a run that starts anew.
        """
        if self.model_name_or_path is None:
            raise ValueError("--model_name_or_path is missing: name the model to train, a Hub id or a folder.")
        if self.use_peft:
            require("peft", needed_by="--use_peft")
        resumed = resolve_resume(training.output_dir, training.resume_from_checkpoint)
        if resumed is None and training.process_index == 0:
            require_unused(training.output_dir, besides=besides)

    def given_to(self, training: Training, **more: Any) -> Training:
        """`training` with how the model is loaded; its `model_init_kwargs` win, and None leaves an option out."""
        options = {
            "revision": self.model_revision,
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
            "experts_implementation": self.experts_implementation,
            **more,
        }
        chosen = {name: value for name, value in options.items() if value is not None}
        training.model_init_kwargs = {**chosen, **(training.model_init_kwargs or {})}
        return training
