"""A frozen model that answers with log-probabilities and entropies of its tokens, without forming logits.

TRL gives the policy a fused head with entropies and the reference one without. Here the reference gets a second one
beneath TRL's, asked for by name, so that contextual scaling rides on the forward pass that is there anyway.
Source: ours, on TRL's `add_fused_lm_head`.
"""

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn
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


@contextlib.contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Every module of a model in evaluation mode; afterwards each is in the mode that it was in.

    `eval()` and `train()` assign through `nn.Module.__setattr__`, twice for each of an adapter's thousands of modules:
    13 ms a step on the host of an H200. This costs the walk alone.
    """
    training = [vars(module) for module in model.modules() if module.training]
    try:
        for attributes in training:
            attributes["training"] = False
        yield
    finally:
        for attributes in training:
            attributes["training"] = True
