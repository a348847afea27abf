"""What continual pre-training minimises: the language-model loss and, once per optimizer batch, the router penalties.

Our models put their penalties into `loss` with the right weight and report `lm_loss`, `aux_loss` and `z_loss` beside
it. Other MoEs of transformers add `coef * aux_loss` to every micro-batch of every rank, and also while evaluating; the
functions here take that back to once per batch and never in evaluation. Source: ours; the defect was measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_moe_cpt.data.packing import IGNORED_LABEL


def penalty_share(labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """Share in [0, 1] of the optimizer batch's predicted tokens that these labels (B, T) hold; 1 if it is unknown.

    The shares of all micro-batches of all ranks sum to 1, so a penalty weighted by them counts once per batch.
    """
    if num_items_in_batch is None:
        return 1.0
    return labels[..., 1:].ne(IGNORED_LABEL).sum() / num_items_in_batch


def foreign_penalty(outputs: Any, coefficient: float) -> Tensor | None:
    """The penalty that a model other than ours has added to `outputs.loss`, or None if it adds none.

    coefficient: `router_aux_loss_coef` of its configuration.
    """
    if getattr(outputs, "lm_loss", None) is not None or not coefficient:
        return None
    aux_loss = getattr(outputs, "aux_loss", None)
    return coefficient * aux_loss if isinstance(aux_loss, Tensor) else None


def corrected_loss(loss: Tensor, penalty: Tensor, share: Tensor | float, loss_scale: float) -> Tensor:
    """`loss`, which holds `loss_scale * penalty`, with the penalty weighted by `share` instead of 1."""
    return loss + loss_scale * (share - 1.0) * penalty.to(loss.device)


def reported_terms(outputs: Any) -> dict[str, Tensor]:
    """The router losses of a forward pass that exist, detached: raw, before their coefficients."""
    terms = {name: getattr(outputs, name, None) for name in ("aux_loss", "z_loss")}
    return {name: value.detach().float() for name, value in terms.items() if isinstance(value, torch.Tensor)}
