"""How sure a router is of its choice: entropy of its distribution over experts, and its largest probability.

g is softmax of the router's logits before any bias or group limit it chooses by; where gates are sigmoids
(DeepSeek-V3) g has the same order of experts. Letters: T tokens, K experts per token, E routed experts. Source: ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


# Rows of probabilities add up to 1 within this in any type down to bfloat16.
_ROUNDING_OF_A_SUM = 0.02


def router_distribution(logits: Tensor) -> Tensor:
    """g = softmax of the logits, (..., E) -> (..., E) in float32 at least, without a device synchronisation.

    Some routers record probabilities under the name of logits: if every row is at least 0 and sums to 1 it is taken as
    it is.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    is_done = (wide >= 0).all() & ((wide.sum(-1) - 1).abs() < _ROUNDING_OF_A_SUM).all()
    return torch.where(is_done, wide, torch.softmax(wide, dim=-1))


def router_entropy(probs: Tensor) -> Tensor:
    """Entropy of g over log E: (..., E) -> (...) in [0, 1]; 1 is undecided, 0 certain. Needs all E probabilities."""
    if probs.shape[-1] == 1:
        return torch.zeros_like(probs[..., 0])
    return torch.special.entr(probs).sum(dim=-1) / math.log(probs.shape[-1])


def router_confidence(probs: Tensor) -> Tensor:
    """Largest probability: (..., E) or only those of the chosen experts (..., K) -> (...) in [1/E, 1].

    From chosen experts alone it is the same number wherever the router chooses by g; with a bias on the choice
    (DeepSeek-V3) it is that of the surest expert chosen, which may lie below 1/E.
    """
    return probs.amax(dim=-1)
