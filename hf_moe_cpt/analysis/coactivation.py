"""Expert co-activation: which experts work on the same tokens, and how that changes between checkpoints.

    P(j | i) = N(i, j) / N(i),   N(i, j) tokens that visit both experts, N(i) tokens that visit expert i

All pairs of a token's K experts count, not only neighbours in the order of their scores, as in OLMoE's code. Letters:
T tokens, K experts per token, E routed experts. Source: Muennighoff et al. 2024 (OLMoE, arXiv 2409.02060); its change
between checkpoints is studied by Thérien et al. 2025 (arXiv 2503.05029), whose norm is not stated: the mean is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_moe_cpt.analysis.top_k_index import check_top_k_index, chunks


class CoactivationCounter:
    """Pairs of experts in a stream of tokens; holds `counts` (E, E) int64, symmetric, with N(i) on its diagonal."""

    def __init__(self, num_experts: int) -> None:
        self.counts = torch.zeros(num_experts, num_experts, dtype=torch.int64)

    def add(self, top_k_index: Tensor) -> None:
        """top_k_index: (T, K) integers in [0, E), the K of a token distinct. Raises ValueError for K = 1."""
        num_experts = len(self.counts)
        check_top_k_index(top_k_index, num_experts)
        if top_k_index.shape[1] == 1:
            raise ValueError(
                "Co-activation needs at least two experts per token, and K is 1: with a single expert no token has a "
                "pair; leave it out for this model."
            )
        top_k_index = top_k_index.cpu()
        for part in chunks(len(top_k_index)):
            self.counts += _pair_counts(top_k_index[part], num_experts)

    def conditional(self) -> Tensor:
        """P(j | i) of all tokens added, as `expert_coactivation` returns it."""
        return self.counts.double() / self.counts.diagonal().clamp(min=1)[:, None]


def expert_coactivation(top_k_index: Tensor, num_experts: int) -> Tensor:
    """P(j | i), row i: share of the tokens of expert i that also visit j: (E, E) float64 in [0, 1].

    The diagonal is 1 and rows sum to K; a row of an expert without tokens is 0 throughout. top_k_index: (T, K)
    integers in [0, E), the K of a token distinct. Balanced, unrelated choices give (K - 1)/(E - 1) off the diagonal.
    Raises ValueError for K = 1, where no token has a pair.
    """
    counter = CoactivationCounter(num_experts)
    counter.add(top_k_index)
    return counter.conditional()


def coactivation_change(before: Tensor, after: Tensor) -> float:
    """Mean of |P_after(j | i) - P_before(j | i)| over the E (E - 1) ordered pairs i != j: a number in [0, 1].

    before, after: (E, E) from `expert_coactivation` of the same layer. 0 is unchanged.
    """
    if before.shape != after.shape or before.ndim != 2 or before.shape[0] != before.shape[1] or len(before) < 2:
        raise ValueError(
            f"before is {tuple(before.shape)} and after {tuple(after.shape)}: both must be (E, E) of one layer, E > 1."
        )
    is_pair = ~torch.eye(len(before), dtype=torch.bool, device=before.device)
    return float((after - before).abs()[is_pair].mean())


def _pair_counts(top_k_index: Tensor, num_experts: int) -> Tensor:
    """N (E, E) of a chunk: one histogram for each of the K (K - 1) / 2 pairs of places, mirrored."""
    dtype = torch.int16 if num_experts**2 <= 1 << 15 else torch.int32
    places = [place.contiguous() for place in top_k_index.to(dtype).T]
    upper = torch.zeros(num_experts**2, dtype=torch.int64)
    for first, place in enumerate(places):
        for other in places[first + 1 :]:
            upper += torch.bincount(place * num_experts + other, minlength=num_experts**2)
    pairs = upper.view(num_experts, num_experts)
    load = torch.bincount(top_k_index.flatten(), minlength=num_experts)
    return pairs + pairs.T + torch.diag(load)
