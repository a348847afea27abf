"""How evenly a router spreads tokens over experts, and how fast it recovers from a change of the data.

Letters: T tokens, K experts per token, E routed experts (shared experts never count).
Source: maximum routing imbalance (MRI) is Eq. 1 of Thérien et al. 2025 (arXiv 2503.05029); the rest is ours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def expert_load(top_k_index: Tensor, num_experts: int, token_mask: Tensor | None = None) -> Tensor:
    """Count the tokens that chose each expert, without a device synchronisation: (E,) int64, summing to K * T.

    top_k_index: (T, K) integers in [0, E), the K of a token distinct. token_mask: (T,), True or 1 for tokens that
    count (False for padding).
    """
    if top_k_index.ndim != 2:
        raise ValueError(f"top_k_index must be (T, K), got {tuple(top_k_index.shape)}: flatten batch and time first.")
    if top_k_index.is_floating_point() or top_k_index.dtype == torch.bool:
        raise ValueError(f"top_k_index must hold integers, got {top_k_index.dtype}: pass expert numbers, not scores.")
    index = top_k_index.long()
    if token_mask is None:
        votes = torch.ones_like(index)
    else:
        if token_mask.shape != index.shape[:1]:
            raise ValueError(
                f"token_mask must be ({index.shape[0]},) like the tokens, got {tuple(token_mask.shape)}: flatten both."
            )
        votes = token_mask.bool().long().to(index.device).unsqueeze(1).expand_as(index)
    load = torch.zeros(num_experts, dtype=torch.long, device=index.device)
    return load.scatter_add_(0, index.flatten(), votes.flatten())


def max_routing_imbalance(top_k_index: Tensor, num_experts: int, token_mask: Tensor | None = None) -> Tensor:
    """MRI: share of the tokens that visit the busiest expert; scalar in [K/E, 1], NaN without tokens.

    Arguments as in `expert_load`; the denominator is the number of tokens that count, not of assignments.
    """
    load = expert_load(top_k_index, num_experts, token_mask)
    num_tokens = top_k_index.shape[0] if token_mask is None else token_mask.bool().sum().to(load.device)
    return max_routing_imbalance_from_load(load, num_tokens)


def max_routing_imbalance_from_load(load: Tensor, num_tokens: int | Tensor) -> Tensor:
    """MRI from counts: (..., E) and the number of tokens behind them, an int or a tensor (...) -> (...).

    Loads of parts of a batch must be added first: the MRI of a whole is at most the mean of its parts' MRI.
    """
    return load.amax(dim=-1) / num_tokens


def normalized_imbalance(mri: float | Tensor, num_experts: int, num_experts_per_tok: int) -> float | Tensor:
    """MRI x E / K: load of the busiest expert over the mean load, in [1, E/K]; 1 is perfect balance.

    Comparable between architectures, which MRI is not (its ideal is 3/31 for Granular and 1/8 for Switch).
    """
    if not 1 <= num_experts_per_tok <= num_experts:
        raise ValueError(
            f"num_experts_per_tok={num_experts_per_tok} must lie in [1, num_experts={num_experts}]: check the config."
        )
    return mri * num_experts / num_experts_per_tok


def load_entropy(load: Tensor) -> Tensor:
    """Entropy of the load over log E: (..., E) -> (...) in [0, 1]; 1 is uniform, 0 one expert, NaN without tokens."""
    share = load.double() / load.sum(dim=-1, keepdim=True)
    if load.shape[-1] == 1:
        return share.squeeze(-1)
    return torch.special.entr(share).sum(dim=-1) / math.log(load.shape[-1])


def recovery_step(
    mri: Sequence[float],
    shift_step: int,
    level: float | Sequence[float],
    patience: int | None = None,
) -> int | None:
    """Steps after the shift until the MRI is back at or below `level` and stays there; None if it never is.

    mri: one value per step, of the whole run. shift_step: index of the first step on the new distribution; 0 is
    returned if the level was never exceeded from it on. level: a number, or one value per step, such as the MRI of a
    Sinkhorn-balanced run (the paper's yardstick). patience: None asks that it stays there to the end of the run, n
    only that it does so for n points in a row. NaN counts as above the level.
    """
    if not 0 <= shift_step < len(mri):
        raise ValueError(f"shift_step={shift_step} is outside the {len(mri)} points of mri: pass a point's index.")
    if patience is not None and patience < 1:
        raise ValueError(f"patience={patience} must be >= 1, or None for the rest of the run.")
    levels = [level] * len(mri) if isinstance(level, int | float) else list(level)
    if len(levels) != len(mri):
        raise ValueError(f"level has {len(levels)} points and mri {len(mri)}: give one level per point or one in all.")
    quiet = [value <= limit for value, limit in zip(mri[shift_step:], levels[shift_step:], strict=True)]
    if patience is None:
        last_loud = max((i for i, is_quiet in enumerate(quiet) if not is_quiet), default=-1)
        return last_loud + 1 if last_loud + 1 < len(quiet) else None
    run = 0
    for i, is_quiet in enumerate(quiet):
        run = run + 1 if is_quiet else 0
        if run == patience:
            return i - patience + 1
    return None


@dataclass(frozen=True)
class ImbalanceShift:
    """Routing imbalance around a change of the data; the first three in the unit of the input."""

    before: float  # mean over the last points before the shift
    peak: float  # highest smoothed value after it
    after: float  # mean over the last points of the run
    recovery_step: int | None  # steps after the shift until it stays at or below before * (1 + tolerance)


def imbalance_around_shift(
    mri_before: Sequence[float],
    mri_after: Sequence[float],
    tolerance: float = 0.05,
    smooth: int = 5,
    baseline: int = 20,
    steps_per_point: int = 1,
) -> ImbalanceShift:
    """Summarise MRI (or MRI x E/K) logged before and after a shift.

    smooth: points of the trailing mean taken after the shift (it starts anew there, so the first point is the raw
    one and the spike is not diluted by what came before). baseline: points averaged for `before` and `after`.
    steps_per_point: optimizer steps between two points; `recovery_step` is in optimizer steps.
    """
    for name, curve in (("mri_before", mri_before), ("mri_after", mri_after)):
        if len(curve) == 0:
            raise ValueError(f"{name} has no points: log the imbalance on both sides of the shift.")
    for name, value in (("smooth", smooth), ("baseline", baseline), ("steps_per_point", steps_per_point)):
        if value < 1:
            raise ValueError(f"{name}={value} must be >= 1: it counts points or steps.")
    before = _mean(mri_before[-baseline:])
    curve = [_mean(mri_after[max(0, i + 1 - smooth) : i + 1]) for i in range(len(mri_after))]
    points = recovery_step(curve, 0, before * (1 + tolerance))
    peak = max((value for value in curve if not math.isnan(value)), default=math.nan)
    steps = None if points is None else points * steps_per_point
    return ImbalanceShift(before, peak, _mean(mri_after[-baseline:]), steps)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
