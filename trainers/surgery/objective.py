"""What LLM Surgery minimises: one weighted term per set, of which only forgetting needs a loss of its own.

    loss = w_u F(unlearn) + w_o F(obsolete) + w_n CE(update) + w_r KL(retain) + w_k KL(neighbour)

CE is the mean cross entropy in nats per token, F a forget loss (with ga, F = -CE), KL the divergence from the model
before surgery. The printed objective, to be maximised, is CE(unlearn) - CE(update) - KL(P || P_ref): the negative of
this with weights of 1, ga and the reverse direction. The authors' code has the weights of PAPER_WEIGHTS and the
forward direction. Means are those of counted_tokens.py: over sequences first, as the paper has it, or over all tokens.
Source: Veldanda et al. 2024 (arXiv 2409.13054); neighbour is ours: text of the same kind about other subjects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from hf_moe_cpt.trainers.surgery.counted_tokens import mean_over_tokens
from hf_moe_cpt.trainers.surgery.forget_losses import FORGET_LOSSES, ForgetLoss
from hf_moe_cpt.trainers.surgery.pair_losses import PAIR_LOSSES, PairLoss


TERMS = ("unlearn", "obsolete", "update", "retain", "neighbour")
PAPER_WEIGHTS = {"unlearn": 0.1, "obsolete": 0.1, "update": 2.0, "retain": 0.5, "neighbour": 0.0}


def sequence_cross_entropy(logp: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-probability (B,) of a sequence's tokens, in nats per token; 0 for a sequence without any.

    logp: (B, S) log-probability of the true next token. mask: (B, S) bool, tokens that count.
    """
    return mean_over_tokens(-logp, mask)


def forget_loss_of(loss: str | ForgetLoss | PairLoss | Callable[..., Tensor]) -> ForgetLoss | PairLoss:
    """The loss of this name, or the caller's own.

    A callable must be `loss(logp, mask, settings, ref_logp) -> (B,)`. It counts as unbounded and is given no
    reference; one that wants a reference, or comes to rest by itself, is passed as `ForgetLoss(name, function,
    needs_reference=True, is_bounded=True)`. Raises ValueError for anything else.
    """
    if isinstance(loss, (ForgetLoss, PairLoss)):
        return loss
    known = FORGET_LOSSES | PAIR_LOSSES
    if isinstance(loss, str) and loss in known:
        return known[loss]
    if not isinstance(loss, str) and callable(loss):
        return ForgetLoss(getattr(loss, "__name__", type(loss).__name__), loss)
    raise ValueError(
        f"forget_loss={loss!r} is unknown: choose one of {', '.join(known)}, or give a function of "
        "(logp, mask, settings, ref_logp)."
    )


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise ValueError unless every key is one of TERMS and every weight finite and at least 0, one of them above."""
    for name, weight in weights.items():
        if name not in TERMS:
            raise ValueError(f"{name!r} is no term of the objective: choose among {', '.join(TERMS)}.")
        if not 0.0 <= weight < math.inf:
            raise ValueError(
                f"{name}_weight={weight} must be a finite number, at least 0: a forget loss already has the sign of "
                "what is minimised; 0 leaves a set out."
            )
    if not any(weights.values()):
        raise ValueError("all weights are 0: give at least one set a weight above 0.")


def surgery_objective(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum of the terms, a scalar to be minimised. A term of weight 0 need not be there and is not read.

    terms: a scalar for each name of TERMS, every one with the sign of what is minimised. Raises ValueError for a
    missing term and for what `check_weights` refuses.
    """
    check_weights(weights)
    in_force = {name: weight for name, weight in weights.items() if weight}
    missing = [name for name in in_force if name not in terms]
    if missing:
        raise ValueError(f"no term for {', '.join(missing)}: compute it, or set its weight to 0.")
    return sum(weight * terms[name] for name, weight in in_force.items())
