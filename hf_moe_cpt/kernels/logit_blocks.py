"""Router logits (T, E) walked in blocks of tokens, all experts of a token at once: what the router kernels share.

T tokens, E experts, z (T, E) logits. A program owns `chunks` tiles of `rows` tokens, one after the other, and writes
one row of partial sums over its tokens; few programs keep the sum over those rows cheap and its order fixed.
Source: ours.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hf_moe_cpt.kernels.tiles import IS_INTERPRETED


MAX_PROGRAMS = 128  # about one per multiprocessor of a large GPU
MIN_TILE = 1024  # elements: a tile of fewer would leave lanes of a program idle


class TokenBlocks(NamedTuple):
    """How T tokens are dealt out: programs x chunks x rows >= T."""

    rows: int  # tokens per tile, a power of two
    chunks: int  # tiles per program
    programs: int
    columns: int  # experts per tile: the power of two that holds E
    num_warps: int


def token_blocks(num_tokens: int, num_experts: int, max_tile: int) -> TokenBlocks:
    """Deal out `num_tokens` > 0 to at most MAX_PROGRAMS programs; `max_tile`: most elements of a tile, e.g. 4096."""
    columns = triton.next_power_of_2(num_experts)
    wanted = triton.next_power_of_2(triton.cdiv(num_tokens, MAX_PROGRAMS))
    rows = max(MIN_TILE // columns, min(max_tile // columns, wanted), 1)
    num_tiles = triton.cdiv(num_tokens, rows)
    chunks = triton.cdiv(num_tiles, MAX_PROGRAMS)
    num_warps = min(max(rows * columns // 512, 1), 8)  # 16 elements of a tile per thread
    return TokenBlocks(rows, chunks, triton.cdiv(num_tiles, chunks), columns, num_warps)


def runs_in_triton(logits: torch.Tensor, max_experts: int) -> bool:
    """Whether the Triton kernels serve these logits: CUDA or the interpreter, at most fp32, at most `max_experts`."""
    has_kernel = logits.dtype in (torch.float32, torch.bfloat16, torch.float16) and logits.shape[-1] <= max_experts
    return has_kernel and (logits.is_cuda or IS_INTERPRETED)


def check_logits(logits: torch.Tensor, token_mask: torch.Tensor | None) -> None:
    """Raise ValueError unless logits are (T, E) with E > 0 and the mask, if any, is (T,) bool."""
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (tokens, experts), got {tuple(logits.shape)}: flatten batch and time first.")
    if token_mask is None:
        return
    if token_mask.dtype != torch.bool or token_mask.shape != logits.shape[:1]:
        got = f"{tuple(token_mask.shape)} {token_mask.dtype}"
        raise ValueError(f"token_mask must be ({logits.shape[0]},) torch.bool, False for padding, got {got}.")


@triton.jit
def load_logits(logits_ptr, tokens, experts, num_tokens, NUM_EXPERTS: tl.constexpr):
    """The fp32 tile z[tokens, experts]; -inf past the last expert, 0 past the last token (a row without NaN)."""
    is_expert = (experts < NUM_EXPERTS)[None, :]
    pointers = logits_ptr + tokens.to(tl.int64)[:, None] * NUM_EXPERTS + experts[None, :]
    logits = tl.load(pointers, mask=(tokens < num_tokens)[:, None] & is_expert, other=0.0).to(tl.float32)
    return tl.where(is_expert, logits, float("-inf"))


@triton.jit
def load_counted(mask_ptr, tokens, num_tokens):
    """Which tokens of a tile count, bool: those that exist and, if there is a mask, are no padding."""
    counted = tokens < num_tokens
    if mask_ptr is not None:
        counted = counted & (tl.load(mask_ptr + tokens, mask=counted, other=0) != 0)
    return counted
