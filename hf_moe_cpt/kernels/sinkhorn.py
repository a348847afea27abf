"""The Sinkhorn plan of router logits in a few launches: every pass reads the logits once and stores no (T, E) matrix.

T tokens, E experts, B programs, z (T, E) logits. Source: arXiv 2503.05029, section 3; the definition, with its start
vector and epsilon, is the model's own `plain_sinkhorn_plan`. The kernels are ours.

A program owns `chunks` tiles of `rows` tokens, one after the other, all experts of a token at once. A pass needs
column sums over all tokens, that is, over all programs. Instead of a launch of its own for that, every program of the
next launch adds up the B rows of partial sums again, in the same order: 2 + num_iterations launches, no atomics, the
same bits on every run, and no synchronisation with the host.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hf_moe_cpt.kernels.grouped_gemm import IS_INTERPRETED
from hf_moe_cpt.modeling.modeling_cpt_moe import EPSILON, plain_sinkhorn_plan


MAX_EXPERTS = 1024
MAX_PROGRAMS = 128  # about one per multiprocessor of a large GPU
MIN_TILE = 1024  # elements: a tile of fewer would leave lanes of a program idle
MAX_TILE = 8192  # elements
_EPSILON = tl.constexpr(EPSILON)


class TokenBlocks(NamedTuple):
    """How T tokens are dealt out: programs x chunks x rows >= T."""

    rows: int  # tokens per tile, a power of two
    chunks: int  # tiles per program
    programs: int
    columns: int  # experts per tile: the power of two that holds E
    num_warps: int


def token_blocks(num_tokens: int, num_experts: int) -> TokenBlocks:
    """Deal out `num_tokens` > 0 to at most MAX_PROGRAMS programs."""
    columns = triton.next_power_of_2(num_experts)
    wanted = triton.next_power_of_2(triton.cdiv(num_tokens, MAX_PROGRAMS))
    rows = max(MIN_TILE // columns, min(MAX_TILE // columns, wanted), 1)
    num_tiles = triton.cdiv(num_tokens, rows)
    chunks = triton.cdiv(num_tiles, MAX_PROGRAMS)
    num_warps = min(max(rows * columns // 512, 1), 8)  # 16 elements of a tile per thread
    return TokenBlocks(rows, chunks, triton.cdiv(num_tiles, chunks), columns, num_warps)


@torch.library.custom_op(
    "hf_moe_cpt::sinkhorn_plan",
    mutates_args=(),
    schema="(Tensor logits, int num_iterations, Tensor? token_mask) -> Tensor",
)
def sinkhorn_plan(logits: torch.Tensor, num_iterations: int, token_mask: torch.Tensor | None) -> torch.Tensor:
    """`plain_sinkhorn_plan` as an operator for every device and dtype; Triton on a GPU. It has no gradient.

    Raises ValueError if logits are not (T, E) or the mask is not (T,) bool.
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (tokens, experts), got {tuple(logits.shape)}: flatten batch and time first.")
    if token_mask is not None and (token_mask.dtype != torch.bool or token_mask.shape != logits.shape[:1]):
        got = f"{tuple(token_mask.shape)} {token_mask.dtype}"
        raise ValueError(f"token_mask must be ({logits.shape[0]},) torch.bool, False for padding, got {got}.")
    has_kernel = logits.dtype in (torch.float32, torch.bfloat16, torch.float16) and logits.shape[1] <= MAX_EXPERTS
    if has_kernel and (logits.is_cuda or IS_INTERPRETED):
        return _triton_sinkhorn_plan(logits, num_iterations, token_mask)
    return plain_sinkhorn_plan(logits, num_iterations, token_mask)


@sinkhorn_plan.register_fake
def _(logits: torch.Tensor, num_iterations: int, token_mask: torch.Tensor | None) -> torch.Tensor:
    return logits.new_empty(logits.shape, dtype=torch.promote_types(logits.dtype, torch.float32))


@triton.jit
def _load_mass(logits_ptr, mask_ptr, tokens, experts, num_tokens, NUM_EXPERTS: tl.constexpr):
    """exp(z - the token's largest z) for a tile, 0 for padding; and which of its tokens exist and are no padding.

    z is -inf past the last expert and 0 past the last token, a row without NaN.
    """
    is_expert = (experts < NUM_EXPERTS)[None, :]
    pointers = logits_ptr + tokens.to(tl.int64)[:, None] * NUM_EXPERTS + experts[None, :]
    logits = tl.load(pointers, mask=(tokens < num_tokens)[:, None] & is_expert, other=0.0).to(tl.float32)
    logits = tl.where(is_expert, logits, float("-inf"))
    counted = tokens < num_tokens
    if mask_ptr is not None:
        counted = counted & (tl.load(mask_ptr + tokens, mask=counted, other=0) != 0)
    mass = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return tl.where(counted[:, None], mass, 0.0), counted


@triton.jit
def _per_expert(sums_ptr, num_programs, experts, NUM_EXPERTS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr):
    """The scaling (COLUMNS,) of every expert, from B rows of partial column sums, STEP rows at a time."""
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, num_programs, STEP):
        programs = first + tl.arange(0, STEP)
        keep = (programs < num_programs)[:, None] & (experts < NUM_EXPERTS)[None, :]
        total += tl.sum(
            tl.load(sums_ptr + programs[:, None] * NUM_EXPERTS + experts[None, :], mask=keep, other=0.0), 0
        )
    return 1.0 / (NUM_EXPERTS * (total + _EPSILON))


@triton.jit(do_not_specialize=["num_tokens", "num_chunks", "num_programs"])
def _pass_kernel(
    logits_ptr, mask_ptr, per_token_ptr, old_sums_ptr, new_sums_ptr, counts_ptr, num_tokens, num_chunks, num_programs,
    IS_START: tl.constexpr, NUM_EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """One pass over all tokens. Grid (B,): a program owns num_chunks * ROWS tokens.

    It writes their scalings into per_token (T,) and its column sums of mass * per_token into a row of new_sums (B, E).
    The start takes 1 as scaling of every token and also writes into counts (B,) how many of its tokens count.
    """
    program = tl.program_id(0)
    experts = tl.arange(0, COLUMNS)
    if not IS_START:
        per_expert = _per_expert(old_sums_ptr, num_programs, experts, NUM_EXPERTS, STEP, COLUMNS)
        programs = tl.arange(0, PROGRAMS)
        counts = tl.load(counts_ptr + programs, mask=programs < num_programs, other=0)
        num_counted = tl.maximum(tl.sum(counts, axis=0), 1).to(tl.float32)
    sums = tl.zeros((COLUMNS,), tl.float32)
    count = tl.zeros((ROWS,), tl.int32)
    for chunk in range(num_chunks):
        tokens = (program * num_chunks + chunk) * ROWS + tl.arange(0, ROWS)
        mass, counted = _load_mass(logits_ptr, mask_ptr, tokens, experts, num_tokens, NUM_EXPERTS)
        if IS_START:
            per_token = tl.full((ROWS,), 1.0, tl.float32)
            count += counted.to(tl.int32)
        else:
            per_token = 1.0 / (num_counted * (tl.sum(mass * per_expert[None, :], axis=1) + _EPSILON))
        tl.store(per_token_ptr + tokens, per_token, mask=tokens < num_tokens)
        sums += tl.sum(mass * per_token[:, None], axis=0)
    tl.store(new_sums_ptr + program * NUM_EXPERTS + experts, sums, mask=experts < NUM_EXPERTS)
    if IS_START:
        tl.store(counts_ptr + program, tl.sum(count, axis=0))


@triton.jit(do_not_specialize=["num_tokens", "num_chunks", "num_programs"])
def _plan_kernel(
    logits_ptr, mask_ptr, per_token_ptr, sums_ptr, plan_ptr, num_tokens, num_chunks, num_programs,
    NUM_EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The plan per_token * mass * per_expert. Grid (B,): a program writes num_chunks * ROWS rows of plan (T, E)."""
    program = tl.program_id(0)
    experts = tl.arange(0, COLUMNS)
    per_expert = _per_expert(sums_ptr, num_programs, experts, NUM_EXPERTS, STEP, COLUMNS)
    for chunk in range(num_chunks):
        tokens = (program * num_chunks + chunk) * ROWS + tl.arange(0, ROWS)
        mass, _ = _load_mass(logits_ptr, mask_ptr, tokens, experts, num_tokens, NUM_EXPERTS)
        per_token = tl.load(per_token_ptr + tokens, mask=tokens < num_tokens, other=0.0)
        keep = (tokens < num_tokens)[:, None] & (experts < NUM_EXPERTS)[None, :]
        pointers = plan_ptr + tokens.to(tl.int64)[:, None] * NUM_EXPERTS + experts[None, :]
        tl.store(pointers, per_token[:, None] * mass * per_expert[None, :], mask=keep)


def _triton_sinkhorn_plan(logits: torch.Tensor, num_iterations: int, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Launch the passes; column sums alternate between two buffers, since all programs read those of the last pass."""
    logits = logits.contiguous()
    token_mask = None if token_mask is None else token_mask.contiguous()
    num_tokens, num_experts = logits.shape
    plan = torch.empty((num_tokens, num_experts), dtype=torch.float32, device=logits.device)
    if num_tokens == 0:
        return plan
    blocks = token_blocks(num_tokens, num_experts)
    per_token = torch.empty(num_tokens, dtype=torch.float32, device=logits.device)
    sums = torch.empty((2, blocks.programs, num_experts), dtype=torch.float32, device=logits.device)
    counts = torch.empty(blocks.programs, dtype=torch.int32, device=logits.device)
    sizes = (num_tokens, blocks.chunks, blocks.programs)
    tile = {
        "NUM_EXPERTS": num_experts,
        "COLUMNS": blocks.columns,
        "ROWS": blocks.rows,
        "STEP": min(triton.next_power_of_2(blocks.programs), MAX_TILE // blocks.columns),
        "num_warps": blocks.num_warps,
    }
    grid = (blocks.programs,)
    with torch.cuda.device_of(logits):
        for step in range(num_iterations + 1):
            old_sums, new_sums = sums[1 - step % 2], sums[step % 2]
            _pass_kernel[grid](
                logits, token_mask, per_token, old_sums, new_sums, counts, *sizes,
                IS_START=step == 0, PROGRAMS=triton.next_power_of_2(blocks.programs), **tile,
            )  # fmt: skip
        _plan_kernel[grid](logits, token_mask, per_token, sums[num_iterations % 2], plan, *sizes, **tile)
    return plan
