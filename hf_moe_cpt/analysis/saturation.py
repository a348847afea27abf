"""Router saturation: how many of a token's experts are still those that it had at an earlier checkpoint.

    RS(before, after) = mean over tokens of |S_before(x) n S_after(x)| / K,   S(x) the K experts of token x

1 is unchanged, K/E what two unrelated routers reach. Letters: T tokens, K experts per token, E routed experts.
Source: Muennighoff et al. 2024 (OLMoE, arXiv 2409.02060), in the continual form of Thérien et al. 2025
(arXiv 2503.05029): the start is the checkpoint before continual pre-training, not the end of training.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_moe_cpt.analysis.top_k_index import check_same_tokens, check_top_k_index, chunks


class SaturationCounter:
    """Router saturation of a stream of tokens; holds K + 1 numbers, the tokens that kept 0, 1, ..., K experts."""

    def __init__(self, experts_per_token: int) -> None:
        self.tokens_by_overlap = torch.zeros(experts_per_token + 1, dtype=torch.int64)

    def add(self, before: Tensor, after: Tensor) -> None:
        """before, after: (T, K) integers of the same tokens in the same order; the K of a token distinct."""
        check_top_k_index(before)
        check_top_k_index(after)
        num_experts_per_token = self.tokens_by_overlap.numel() - 1
        if before.shape != after.shape or before.shape[1] != num_experts_per_token:
            raise ValueError(
                f"before is {tuple(before.shape)} and after {tuple(after.shape)}, K is {num_experts_per_token}: "
                "saturation compares the same tokens in the same layer, with as many experts each."
            )
        before, after = before.cpu(), after.cpu()
        for part in chunks(len(before)):
            self.tokens_by_overlap += _tokens_by_overlap(before[part], after[part])

    def saturation(self) -> float:
        """Of all tokens added, in [0, 1]; NaN without any."""
        counts = self.tokens_by_overlap.tolist()
        kept = sum(overlap * tokens for overlap, tokens in enumerate(counts))
        return kept / (sum(counts) * (len(counts) - 1)) if sum(counts) else float("nan")


def router_saturation(before: Tensor, after: Tensor, token_mask: Tensor | None = None) -> float:
    """Share of a token's experts that it had before too, a mean over tokens: a number in [0, 1], NaN without tokens.

    before, after: (T, K) integers, the experts of the same tokens in the same order at two checkpoints; the K of a
    token distinct, in any order. token_mask: (T,), True or 1 for tokens that count (False for padding).
    """
    check_top_k_index(before)
    if token_mask is not None:
        check_same_tokens("token_mask", token_mask, before)
        if before.shape == after.shape:
            before, after = before[token_mask.bool()], after[token_mask.bool()]
    counter = SaturationCounter(before.shape[1])
    counter.add(before, after)
    return counter.saturation()


def _tokens_by_overlap(before: Tensor, after: Tensor) -> Tensor:
    """(K + 1,) int64. Columns are compared one by one: K^2 passes over contiguous bytes, four times as fast."""
    old, new = (np.ascontiguousarray(index.numpy().T) for index in (before, after))
    overlap = np.zeros(old.shape[1], np.uint8 if len(old) < 256 else np.uint16)
    for old_column in old:
        for new_column in new:
            overlap += old_column == new_column
    return torch.from_numpy(np.bincount(overlap, minlength=len(old) + 1))
