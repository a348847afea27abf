"""Sums and means over the tokens that count: of one sequence, and of a batch by sequences or by tokens.

Letters: B sequences, S positions; mask (B, S) bool, True where a token counts; n tokens that count in a sequence.
What a masked position holds is never looked at, so that padding may be infinite or NaN. A sequence without tokens has
the value 0 and no share in the mean of its batch. Half precision is summed in float32. Source: ours.
"""

from __future__ import annotations

import torch
from torch import Tensor


NORMALISATIONS = ("sequence", "token")


def counted(values: Tensor, mask: Tensor) -> Tensor:
    """`values` (B, S) where they count and 0 elsewhere, at least in float32; no gradient reaches the others.

    Raises ValueError unless both are (B, S) and mask is bool.
    """
    if values.ndim != 2 or mask.shape != values.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"values {tuple(values.shape)} and mask {tuple(mask.shape)} {mask.dtype} must both be (sequences, "
            "tokens), the mask torch.bool: drop the first label of each row and mark the tokens that count with True."
        )
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return torch.where(mask, wide, torch.zeros_like(wide))


def sum_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` (B, S) over the tokens that count, (B,)."""
    return counted(values, mask).sum(1)


def mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` (B, S) over the n tokens that count, (B,); 0 where there are none."""
    return sum_over_tokens(values, mask) / token_count(mask)


def token_count(mask: Tensor) -> Tensor:
    """n (B,) int64, at least 1 so that it can divide."""
    return mask.sum(1).clamp(min=1)


def num_units(mask: Tensor, normalisation: str) -> Tensor:
    """How many sequences with tokens, or how many tokens, this mask (B, S) holds; 0-d int64 on the mask's device.

    The sum over all micro-batches and ranks of an optimizer batch is the `total` of the functions below.
    """
    _check_normalisation(normalisation)
    return mask.any(1).sum() if normalisation == "sequence" else mask.sum()


def sequence_weights(
    mask: Tensor, normalisation: str, total: Tensor | int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Share (B,) of each sequence in the mean of its optimizer batch.

    "sequence": 1 / total, whatever the length; "token": n / total. total: units of the whole optimizer batch as
    `num_units` counts them; None: those of this mask, and the shares then sum to 1.
    """
    units = num_units(mask, normalisation) if total is None else total
    own = mask.any(1) if normalisation == "sequence" else mask.sum(1)
    return own.to(dtype) / (units.clamp(min=1) if isinstance(units, Tensor) else max(units, 1))


def token_weights(
    mask: Tensor, normalisation: str, total: Tensor | int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Share (B, S) of each token in the mean of its optimizer batch: that of its sequence over n, 0 where masked."""
    return mask * (sequence_weights(mask, normalisation, total, dtype) / token_count(mask))[:, None]


def reduce_sequences(losses: Tensor, mask: Tensor, normalisation: str, total: Tensor | int | None = None) -> Tensor:
    """Mean of one loss per sequence (B,), a scalar; mask (B, S) says how long each sequence is."""
    if losses.shape != mask.shape[:1]:
        raise ValueError(f"losses {tuple(losses.shape)} must be one per sequence of the mask, ({mask.shape[0]},).")
    return (losses * sequence_weights(mask, normalisation, total, losses.dtype)).sum()


def reduce_tokens(values: Tensor, mask: Tensor, normalisation: str, total: Tensor | int | None = None) -> Tensor:
    """Mean of one value per token (B, S), a scalar: of the sequences' means, or of all tokens."""
    values = counted(values, mask)
    return (values * token_weights(mask, normalisation, total, values.dtype)).sum()


def _check_normalisation(normalisation: str) -> None:
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation={normalisation!r} is unknown: choose one of {', '.join(NORMALISATIONS)}.")
