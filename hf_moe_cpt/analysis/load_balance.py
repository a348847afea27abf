"""How unequal the loads of experts are: their coefficient of variation, and experts without work.

Beside routing.py (MRI, entropy). Letters: K experts per token, E routed experts. Source: the coefficient of variation
is the importance measure of Shazeer et al. 2017 (arXiv 1701.06538) before squaring; dead experts are ours.
"""

from __future__ import annotations

from torch import Tensor


def load_cv(load: Tensor) -> Tensor:
    """Standard deviation of the load over its mean: (..., E) -> (...) float64 in [0, sqrt(E/K - 1)]; 0 is uniform.

    load: tokens of each expert, from `expert_load`. The deviation is that of all E experts (divided by E, not E - 1).
    NaN without tokens.
    """
    values = load.double()
    return values.std(dim=-1, correction=0) / values.mean(dim=-1)


def dead_experts(load: Tensor, share_of_mean: float = 0.0) -> Tensor:
    """Number of experts with at most `share_of_mean` of the mean load: (..., E) -> (...) int64 in [0, E].

    share_of_mean: in [0, 1); 0 counts experts that no token chose. How many are found depends on how much text was
    read: a rare expert may look dead in a short one.
    """
    if not 0 <= share_of_mean < 1:
        raise ValueError(f"share_of_mean={share_of_mean} must lie in [0, 1): 0 counts experts without any token.")
    values = load.double()
    return (values <= share_of_mean * values.mean(dim=-1, keepdim=True)).sum(dim=-1)
