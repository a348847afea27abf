"""A frozen model that answers with log-probabilities and entropies of its tokens, without forming logits.

TRL gives the policy a fused head with entropies and the reference one without. Here the reference gets a second one
beneath TRL's, asked for by name, so that contextual scaling rides on the forward pass that is there anyway.
Source: ours, on TRL's `add_fused_lm_head`.
"""

import functools
import types
from typing import Any

from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head


def add_entropy_head(model: PreTrainedModel) -> None:
    """Afterwards `model(..., labels=labels, with_entropy=True)` returns `log_probs` and `entropy`, both (B, S - 1).

    Must come before TRL adds its own head and before the model is wrapped; a second call does nothing.
    """
    if getattr(model, "has_entropy_head", False):
        return
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    fused = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, with_entropy: bool = False, **kwargs: Any) -> FusedCausalLMOutput:
        return fused(*args, fused_lm_head=with_entropy, **kwargs)

    model.forward = types.MethodType(forward, model)
    model.has_entropy_head = True
