"""What every function over chosen experts asks of its input, and how long inputs are cut into pieces.

Letters: T tokens, K experts per token, E routed experts. Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


CHUNK_TOKENS = 1 << 18  # scratch memory of the counters is a few times CHUNK_TOKENS * K * 8 bytes


def check_top_k_index(top_k_index: Tensor, num_experts: int | None = None) -> None:
    """Raise ValueError unless top_k_index is (T, K) integers; with num_experts also unless all lie in [0, E).

    The second check reads the values, which waits for the device.
    """
    if top_k_index.ndim != 2:
        raise ValueError(f"top_k_index must be (T, K), got {tuple(top_k_index.shape)}: flatten batch and time first.")
    if top_k_index.is_floating_point() or top_k_index.dtype == torch.bool:
        raise ValueError(f"top_k_index must hold integers, got {top_k_index.dtype}: pass expert numbers, not scores.")
    if num_experts is not None and top_k_index.numel():
        least, most = int(top_k_index.min()), int(top_k_index.max())
        if least < 0 or most >= num_experts:
            raise ValueError(
                f"top_k_index holds {least if least < 0 else most}, outside [0, num_experts={num_experts}): pass the "
                "number of routed experts of this layer."
            )


def check_same_tokens(name: str, tokens: Tensor, top_k_index: Tensor) -> None:
    """Raise ValueError unless `tokens` is (T,) like the rows of top_k_index."""
    if tokens.shape != top_k_index.shape[:1]:
        raise ValueError(
            f"{name} must be ({top_k_index.shape[0]},) like the tokens, got {tuple(tokens.shape)}: flatten both."
        )


def chunks(num_tokens: int, chunk_tokens: int = CHUNK_TOKENS) -> Iterator[slice]:
    """Consecutive slices of at most chunk_tokens that cover [0, num_tokens)."""
    return (slice(begin, min(begin + chunk_tokens, num_tokens)) for begin in range(0, num_tokens, chunk_tokens))
