"""Read a checkpoint back whose weights are stored under other names than the model in memory has them.

Mixtral, OLMoE, Qwen's mixtures and others keep the experts of a layer in one tensor and save each expert by itself,
as they were published. `from_pretrained` translates between the two; `Trainer` (transformers 5.23), when it resumes or
goes back to the best model, does not: it warns of missing keys and leaves every expert and router as it happens to be.
Source: ours.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel


class ReadsStoredWeights:
    """Mixin in front of `Trainer`: resuming and going back to the best model bring all weights back.

    Not with FSDP and DeepSpeed, which store in their own way. Overrides `_load_from_checkpoint` and
    `_load_best_model`; where names agree they are the parent's.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._is_sharded() or not load_translated(self.model if model is None else model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._is_sharded() or not load_translated(self.model, self.state.best_model_checkpoint):
            super()._load_best_model()

    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled


def load_translated(model: nn.Module, checkpoint: str | Path) -> bool:
    """Load the weights of a checkpoint that needs translation into `model`; False, and nothing done, where none is.

    A copy of the weights is in the host's memory meanwhile. Raises RuntimeError if a weight is missing.
    """
    if not isinstance(model, PreTrainedModel) or stored_names(checkpoint) <= model.state_dict().keys():
        return False
    dtypes = {parameter.dtype for parameter in model.parameters()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # holds every shorter type exactly
    stored = type(model).from_pretrained(checkpoint, dtype=dtype)
    model.load_state_dict(stored.state_dict())
    return True


def stored_names(checkpoint: str | Path) -> set[str]:
    """Names of the weights in a model's safetensors files; empty for an adapter or a checkpoint of another kind."""
    names: set[str] = set()
    for path in sorted(Path(checkpoint).glob("model*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            names.update(weights.keys())
    return names
