"""How far a model's next-token distribution has moved from its reference: KL, in both directions, by definition.

    forward  KL(P_ref || P) = sum_v P_ref(v) (log P_ref(v) - log P(v))     authors' code: covers what P_ref knows
    reverse  KL(P || P_ref) = sum_v P(v) (log P(v) - log P_ref(v))         printed: avoids what P_ref rules out

Letters: V vocabulary; logp and ref_logp (..., V) normalised log-probabilities in nats of model and reference; z the
logits under logp. Both are 0 where the distributions are equal. The reference is a constant: it gets no gradient.
Source: Veldanda et al. 2024 (arXiv 2409.13054). Their code minimises the cross entropy of the reference against the
model, which is the forward KL plus the reference's entropy: the same gradient, but not 0 at the start.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def forward_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(P_ref || P) (...,) in nats, at least 0 up to rounding; its gradient with respect to z is P - P_ref.

    A word that the reference rules out (-inf) adds nothing. No floor is set under P: one would stop the pull exactly
    where the model has lost a word that the reference likes.
    """
    return _divergence(ref_logp.detach(), logp)


def reverse_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(P || P_ref) (...,) in nats, at least 0 up to rounding; its gradient over z is P (log P - log P_ref - KL)."""
    return _divergence(logp, ref_logp.detach())


KL_DIRECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"forward": forward_kl, "reverse": reverse_kl}


def kl_divergence(logp: Tensor, ref_logp: Tensor, direction: str = "forward") -> Tensor:
    """`forward_kl` or `reverse_kl` (...,) of logp and ref_logp (..., V).

    Raises ValueError for another direction, or if the shapes differ, as those of two vocabularies do.
    """
    check_direction(direction)
    if logp.shape != ref_logp.shape:
        raise ValueError(
            f"logp {tuple(logp.shape)} and ref_logp {tuple(ref_logp.shape)} must have one shape: model and reference "
            "need the same tokens and the same vocabulary."
        )
    return KL_DIRECTIONS[direction](logp, ref_logp)


def check_direction(direction: str) -> None:
    """Raise ValueError unless `direction` is a key of KL_DIRECTIONS."""
    if direction not in KL_DIRECTIONS:
        raise ValueError(f"kl_direction={direction!r} is unknown: choose one of {', '.join(KL_DIRECTIONS)}.")


def _divergence(left: Tensor, right: Tensor) -> Tensor:
    """sum_v e^left (left - right) over the last axis, where e^left = 0 counts as 0 in value and in gradient."""
    is_ruled_out = left == float("-inf")
    left, right = left.masked_fill(is_ruled_out, 0.0), right.masked_fill(is_ruled_out, 0.0)
    return (left.exp() * (left - right)).masked_fill(is_ruled_out, 0.0).sum(-1)
