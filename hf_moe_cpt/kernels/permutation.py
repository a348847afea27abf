"""Copy tokens into the rows of their experts, and add the rows of a token up again.

Letters: T tokens, K slots per token, n = T * K slots, E experts, H hidden size, R allocated rows, C column tiles.
The rows are those of a `RoutingTable`. Both directions walk over tokens: a token is read once and written K times, or
its K rows are read and written as one sum, so there are no atomics and two runs agree bit for bit.
Source: ours. The third function does the second's job for the gradient of the gate weights, which a product over
column tiles leaves behind as one partial sum for each row and tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_moe_cpt.kernels.routing_table import RoutingTable


_MAX_BLOCK_H = 4096
_SLOTS_PER_PROGRAM = 128


def plain_permute_tokens(tokens: Tensor, table: RoutingTable) -> Tensor:
    """What `permute_tokens` computes, in plain PyTorch; the unspecified rows are 0."""
    num_slots_per_token = _slots_per_token(table.row_of_slot, tokens.shape[0])
    rows = tokens.new_zeros(table.weight_of_row.shape[0], tokens.shape[1])
    kept = table.row_of_slot >= 0
    rows[table.row_of_slot[kept].long()] = tokens.repeat_interleave(num_slots_per_token, dim=0)[kept]
    return rows


@triton.jit(do_not_specialize=["num_experts"])
def _permute_kernel(
    tokens_ptr,
    rows_ptr,
    row_of_slot_ptr,
    group_start_ptr,
    group_size_ptr,
    num_experts,
    tokens_stride,
    H,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid (E + T, column blocks). One program owns BLOCK_H columns of one expert or of one token.

    Program e < E writes zeros to the padding rows of group e. Program E + t copies token t to its rows.
    """
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    if program < num_experts:
        first = tl.load(group_start_ptr + program) + tl.load(group_size_ptr + program)
        num_padding = tl.load(group_start_ptr + program + 1) - first
        nothing = tl.zeros((BLOCK_H,), rows_ptr.dtype.element_ty)
        for padding in range(0, num_padding):
            tl.store(rows_ptr + (first.to(tl.int64) + padding) * H + columns, nothing, mask=columns < H)
    else:
        token = (program - num_experts).to(tl.int64)
        value = tl.load(tokens_ptr + token * tokens_stride + columns, mask=columns < H)
        for k in tl.static_range(K):
            row = tl.load(row_of_slot_ptr + token * K + k)
            width = tl.where(row >= 0, H, 0)
            tl.store(rows_ptr + row.to(tl.int64) * H + columns, value, mask=columns < width)


def permute_tokens(tokens: Tensor, table: RoutingTable) -> Tensor:
    """Copy each token to its rows: (T, H) -> (R, H) of the same dtype.

    Padding rows of used tiles are exact zeros, rows past the last used tile are unspecified. Tokens whose columns lie
    side by side are read where they are, others are made contiguous first. Raises ValueError if the table is not of T
    tokens.
    """
    num_slots_per_token = _slots_per_token(table.row_of_slot, tokens.shape[0])
    tokens = _with_columns_side_by_side(tokens)
    num_tokens, hidden_size = tokens.shape
    num_experts = table.group_size.shape[0]
    rows = torch.empty(table.weight_of_row.shape[0], hidden_size, dtype=tokens.dtype, device=tokens.device)
    block_h = _block_h(hidden_size)
    _permute_kernel[(num_experts + num_tokens, triton.cdiv(hidden_size, block_h))](
        tokens,
        rows,
        table.row_of_slot,
        table.group_start,
        table.group_size,
        num_experts,
        tokens.stride(0),
        hidden_size,
        K=num_slots_per_token,
        BLOCK_H=block_h,
        num_warps=4,
    )
    return rows


def plain_combine_rows(rows: Tensor, row_of_slot: Tensor, weights: Tensor | None, num_slots_per_token: int) -> Tensor:
    """What `combine_rows` computes, in plain PyTorch."""
    row = row_of_slot.view(-1, num_slots_per_token).long()
    terms = rows.float()[row.clamp(min=0)]
    if weights is not None:
        terms = terms * weights.float().unsqueeze(-1)
    return terms.masked_fill((row < 0).unsqueeze(-1), 0.0).sum(dim=1).to(rows.dtype)


@triton.jit
def _combine_kernel(
    rows_ptr,
    row_of_slot_ptr,
    weights_ptr,
    out_ptr,
    rows_stride,
    H,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):
    """Grid (T, column blocks). One program owns BLOCK_H columns of one token: it adds up K rows in float32."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_of_slot_ptr + token * K + k)
        width = tl.where(row >= 0, H, 0)
        term = tl.load(rows_ptr + row.to(tl.int64) * rows_stride + columns, mask=columns < width, other=0.0)
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + token * K + k, mask=row >= 0, other=0.0)
            total += weight.to(tl.float32) * term.to(tl.float32)
        else:
            total += term.to(tl.float32)
    tl.store(out_ptr + token * H + columns, total.to(out_ptr.dtype.element_ty), mask=columns < H)


def combine_rows(rows: Tensor, row_of_slot: Tensor, weights: Tensor | None, num_slots_per_token: int) -> Tensor:
    """Sum over each token's slots of weight * row, in float32: (R, H) -> (T, H) of the dtype of rows.

    row_of_slot: (n,) int32; a slot with -1 adds nothing, whatever its weight. weights: (T, K) of any float dtype; None
    means a plain sum. num_slots_per_token: K. Raises ValueError if these do not fit together.
    """
    num_tokens = row_of_slot.numel() // num_slots_per_token
    _check_shape_of_slots(row_of_slot, (num_tokens, num_slots_per_token))
    if weights is not None and weights.shape != (num_tokens, num_slots_per_token):
        raise ValueError(
            f"weights must be ({num_tokens}, {num_slots_per_token}) like the slots, got {tuple(weights.shape)}: "
            "pass those of the same routing."
        )
    rows = _with_columns_side_by_side(rows)
    hidden_size = rows.shape[1]
    out = torch.empty(num_tokens, hidden_size, dtype=rows.dtype, device=rows.device)
    block_h = _block_h(hidden_size)
    _combine_kernel[(num_tokens, triton.cdiv(hidden_size, block_h))](
        rows,
        row_of_slot,
        None if weights is None else weights.contiguous(),
        out,
        rows.stride(0),
        hidden_size,
        K=num_slots_per_token,
        BLOCK_H=block_h,
        HAS_WEIGHTS=weights is not None,
        num_warps=4,
    )
    return out


def plain_gather_partials(partials: Tensor, row_of_slot: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """What `gather_partials` computes, in plain PyTorch."""
    total = partials[:, row_of_slot.clamp(min=0).long()].sum(dim=0)
    return total.masked_fill(row_of_slot < 0, 0.0).view(shape).to(dtype)


@triton.jit(do_not_specialize=["num_slots", "num_rows"])
def _gather_partials_kernel(
    partials_ptr, row_of_slot_ptr, out_ptr, num_slots, num_rows, C: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (slot blocks). One program adds up the C partial sums of each of its BLOCK slots, in float32."""
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_of_slot_ptr + slots, mask=slots < num_slots, other=-1)
    total = tl.zeros((BLOCK,), tl.float32)
    for c in tl.static_range(C):
        total += tl.load(partials_ptr + num_rows.to(tl.int64) * c + row, mask=row >= 0, other=0.0)
    tl.store(out_ptr + slots, total.to(out_ptr.dtype.element_ty), mask=slots < num_slots)


def gather_partials(partials: Tensor, row_of_slot: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Sum over column tiles at each slot's row: (C, R) float32 -> (T, K), the gradient of the gate weights.

    row_of_slot: (n,) int32; a slot with -1 gets 0. shape: (T, K). dtype: of the result; the sum is in float32.
    Raises ValueError if T * K is not n.
    """
    _check_shape_of_slots(row_of_slot, shape)
    partials = partials.contiguous()
    num_slots = row_of_slot.numel()
    out = torch.empty(shape, dtype=dtype, device=partials.device)
    _gather_partials_kernel[(triton.cdiv(num_slots, _SLOTS_PER_PROGRAM),)](
        partials,
        row_of_slot,
        out,
        num_slots,
        partials.shape[1],
        C=partials.shape[0],
        BLOCK=_SLOTS_PER_PROGRAM,
        num_warps=4,
    )
    return out


def _slots_per_token(row_of_slot: Tensor, num_tokens: int) -> int:
    """K of a table of T tokens; 1 if there are no tokens."""
    num_slots = row_of_slot.numel()
    if num_tokens == 0 and num_slots == 0:
        return 1
    if num_tokens == 0 or num_slots % num_tokens:
        raise ValueError(
            f"a table of {num_slots} slots is not of {num_tokens} tokens: pass the tokens that it routes."
        )
    return num_slots // num_tokens


def _check_shape_of_slots(row_of_slot: Tensor, shape: tuple[int, int]) -> None:
    if shape[0] * shape[1] != row_of_slot.numel():
        raise ValueError(
            f"{row_of_slot.numel()} slots are not {shape[0]} tokens of {shape[1]} slots: pass the K of their routing."
        )


def _with_columns_side_by_side(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _block_h(hidden_size: int) -> int:
    """Columns of one program: a whole row up to 4096."""
    return min(_MAX_BLOCK_H, triton.next_power_of_2(hidden_size))
