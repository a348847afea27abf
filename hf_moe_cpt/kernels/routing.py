"""Where every routed token goes: rows sorted by expert, copied from tokens and added up again.

T tokens, K experts per token, n = T * K slots (slot t * K + k is the k-th choice of token t), E experts, H hidden
size, M rows per tile, R allocated rows, B slots per block, C column tiles.

Each expert's group of rows is padded to whole tiles. A tile then belongs to one expert, and a product over tiles needs
no masks. R is a bound that does not depend on the data, so the host never waits for the device. Within an expert rows
keep the order of their slots and nothing is added atomically, so two runs agree bit for bit: the table is a counting
sort in three launches (experts counted in every block of slots, a prefix sum over the blocks of each expert, the
scatter), for few slots in one, and copying and adding up both walk over tokens. Source: ours.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


MAX_EXPERTS = 1024
ROWS_PER_TILE = (16, 32, 64, 128)
_MAX_ONE_HOT = 16_384  # B * E as one one-hot block: eight times that kept a first call busy for over a minute
_BLOCKS_PER_STEP = 1024
_MAX_BLOCK_H = 4096
_SLOTS_PER_PROGRAM = 128
_FEW_SLOTS = 512  # a step of decoding


class RoutingTable(NamedTuple):
    """Rows of every expert. Used are the rows before group_start[E]; tiles past them hold nothing."""

    row_of_slot: Tensor  # (n,) int32; -1 if the slot's expert id is outside [0, E): an expert of another rank
    weight_of_row: Tensor  # (R,) float32 gate weights; 0 in padding rows of used tiles, unspecified after them
    expert_of_tile: Tensor  # (R / M,) int32; some id in [0, E) after the last used tile
    group_start: Tensor  # (E + 1,) int32 first row of each group, multiples of M; the last entry: rows in use
    group_size: Tensor  # (E,) int32 rows that hold a slot


def num_tiles_bound(num_slots: int, num_experts: int, block_m: int) -> int:
    """Tiles that suffice for any routing of n slots: n // M full ones and a last one for each group that can exist."""
    return num_slots // block_m + min(num_experts, num_slots)


def plain_routing_table(top_k_index: Tensor, top_k_weights: Tensor, num_experts: int, block_m: int) -> RoutingTable:
    """What `routing_table` computes, in plain PyTorch; the unspecified entries are 0."""
    num_tiles = _checked_num_tiles(top_k_index, top_k_weights, num_experts, block_m)
    expert = top_k_index.flatten().long()
    kept = (expert >= 0) & (expert < num_experts)
    expert_of_rank, slot_of_rank = expert.where(kept, num_experts).sort(stable=True)  # dropped slots come last
    first_rank = torch.searchsorted(expert_of_rank, torch.arange(num_experts + 1, device=expert.device))
    group_size = first_rank.diff()
    group_start = torch.zeros_like(first_rank)
    group_start[1:] = ((group_size + block_m - 1) // block_m * block_m).cumsum(0)

    rank_in_group = torch.arange(expert.numel(), device=expert.device) - first_rank[expert_of_rank]
    row_of_slot = torch.full_like(expert, -1)
    row_of_slot[slot_of_rank] = group_start[expert_of_rank] + rank_in_group
    row_of_slot[~kept] = -1
    weight_of_row = torch.zeros(num_tiles * block_m, dtype=torch.float32, device=expert.device)
    weight_of_row[row_of_slot[kept]] = top_k_weights.detach().flatten()[kept].float()
    first_row = torch.arange(num_tiles, device=expert.device) * block_m
    expert_of_tile = torch.searchsorted(group_start[1:], first_row, right=True)
    expert_of_tile[expert_of_tile == num_experts] = 0
    return RoutingTable(row_of_slot.int(), weight_of_row, expert_of_tile.int(), group_start.int(), group_size.int())


@triton.jit
def _load_experts(top_k_index_ptr, slots, num_slots, num_experts):
    """Expert of each of these slots, -1 for a slot that is dropped or past the end; compared before it is narrowed."""
    expert = tl.load(top_k_index_ptr + slots, mask=slots < num_slots, other=-1)
    return tl.where((expert >= 0) & (expert < num_experts), expert, -1).to(tl.int32)


@triton.jit(do_not_specialize=["num_slots", "num_experts"])
def _block_histogram_kernel(
    top_k_index_ptr, block_counts_ptr, num_slots, num_experts, BLOCK: tl.constexpr, EXPERTS: tl.constexpr
):
    """Grid (blocks). One program counts the experts of its BLOCK slots: block_counts[block, :], EXPERTS wide."""
    block = tl.program_id(0)
    expert = _load_experts(top_k_index_ptr, block * BLOCK + tl.arange(0, BLOCK), num_slots, num_experts)
    columns = tl.arange(0, EXPERTS)
    counts = tl.sum((expert[:, None] == columns[None, :]).to(tl.int32), axis=0)
    tl.store(block_counts_ptr + block.to(tl.int64) * EXPERTS + columns, counts)


@triton.jit(do_not_specialize=["num_blocks"])
def _block_offset_kernel(block_counts_ptr, group_size_ptr, num_blocks, EXPERTS: tl.constexpr, STEP: tl.constexpr):
    """Grid (E). One program turns its expert's column of counts, in place, into counts of all earlier blocks.

    It also writes the expert's group_size. STEP blocks are read at a time.
    """
    expert = tl.program_id(0)
    steps = tl.arange(0, STEP)
    before = tl.zeros((), tl.int32)
    for first in range(0, num_blocks, STEP):
        block = first + steps
        pointers = block_counts_ptr + block.to(tl.int64) * EXPERTS + expert
        counts = tl.load(pointers, mask=block < num_blocks, other=0)
        tl.store(pointers, before + tl.cumsum(counts, axis=0) - counts, mask=block < num_blocks)
        before += tl.sum(counts, axis=0)
    tl.store(group_size_ptr + expert, before)


@triton.jit
def _fill(pointer, first, end, value, STEP: tl.constexpr):
    """Write value to pointer[first:end]."""
    steps = tl.arange(0, STEP)
    for done in range(0, end - first, STEP):
        tl.store(pointer + first + done + steps, value, mask=done + steps < end - first)


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_tiles"])
def _scatter_kernel(
    top_k_index_ptr, top_k_weights_ptr, block_offsets_ptr, group_size_ptr, row_of_slot_ptr, weight_of_row_ptr,
    expert_of_tile_ptr, group_start_ptr, num_slots, num_experts, num_tiles, BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid (E + blocks). Every program first adds up the padded group sizes by itself.

    Program e < E describes group e: its start, the expert of its tiles, the zero weights of its padding rows; the last
    of them also writes the rows in use and fills the tiles after them. Program E + b gives the slots of block b their
    rows and their rows their weights.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, EXPERTS)
    size = tl.load(group_size_ptr + columns, mask=columns < num_experts, other=0)
    padded = (size + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    start = tl.cumsum(padded, axis=0) - padded
    if program < num_experts:
        mine = columns == program
        group_start = tl.sum(tl.where(mine, start, 0), axis=0)
        group_size = tl.sum(tl.where(mine, size, 0), axis=0)
        end = tl.sum(tl.where(mine, start + padded, 0), axis=0)
        tl.store(group_start_ptr + program, group_start)
        padding = group_start + group_size + tl.arange(0, BLOCK_M)
        tl.store(weight_of_row_ptr + padding, tl.zeros((BLOCK_M,), tl.float32), mask=padding < end)
        _fill(expert_of_tile_ptr, group_start // BLOCK_M, end // BLOCK_M, program, 128)
        if program == num_experts - 1:
            tl.store(group_start_ptr + num_experts, end)
            _fill(expert_of_tile_ptr, end // BLOCK_M, num_tiles, 0, 128)
    else:
        block = program - num_experts
        slots = block * BLOCK + tl.arange(0, BLOCK)
        expert = _load_experts(top_k_index_ptr, slots, num_slots, num_experts)
        chosen = (expert[:, None] == columns[None, :]).to(tl.int32)
        first_row = start + tl.load(block_offsets_ptr + block.to(tl.int64) * EXPERTS + columns)
        row = tl.sum(chosen * (first_row[None, :] + tl.cumsum(chosen, axis=0) - 1), axis=1)
        tl.store(row_of_slot_ptr + slots, tl.where(expert >= 0, row, -1), mask=slots < num_slots)
        weight = tl.load(top_k_weights_ptr + slots, mask=slots < num_slots, other=0.0)
        tl.store(weight_of_row_ptr + row, weight.to(tl.float32), mask=expert >= 0)


@triton.jit(do_not_specialize=["num_slots", "num_experts", "num_tiles"])
def _small_table_kernel(
    top_k_index_ptr, top_k_weights_ptr, group_size_ptr, row_of_slot_ptr, weight_of_row_ptr, expert_of_tile_ptr,
    group_start_ptr, num_slots, num_experts, num_tiles, BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The whole table by one program: few slots are counted sooner than two more launches begin."""
    columns = tl.arange(0, EXPERTS)
    exists = columns < num_experts
    size = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, num_slots, BLOCK):
        expert = _load_experts(top_k_index_ptr, first + tl.arange(0, BLOCK), num_slots, num_experts)
        size += tl.sum((expert[:, None] == columns[None, :]).to(tl.int32), axis=0)
    padded = (size + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    end = tl.cumsum(padded, axis=0)
    start = end - padded
    tl.store(group_size_ptr + columns, size, mask=exists)
    tl.store(group_start_ptr + columns, start, mask=exists)
    tl.store(group_start_ptr + columns + 1, end, mask=columns == num_experts - 1)
    padding = (start + size)[:, None] + tl.arange(0, BLOCK_M)[None, :]
    tl.store(weight_of_row_ptr + padding, tl.zeros((EXPERTS, BLOCK_M), tl.float32), mask=padding < end[:, None])
    for first in range(0, num_tiles, TILES):
        tile = first + tl.arange(0, TILES)
        behind = (end[None, :] <= tile[:, None] * BLOCK_M) & exists[None, :]
        expert = tl.sum(behind.to(tl.int32), axis=1)
        tl.store(expert_of_tile_ptr + tile, tl.where(expert == num_experts, 0, expert), mask=tile < num_tiles)
    for first in range(0, num_slots, BLOCK):
        slots = first + tl.arange(0, BLOCK)
        expert = _load_experts(top_k_index_ptr, slots, num_slots, num_experts)
        chosen = (expert[:, None] == columns[None, :]).to(tl.int32)
        row = tl.sum(chosen * (start[None, :] + tl.cumsum(chosen, axis=0) - 1), axis=1)
        start += tl.sum(chosen, axis=0)
        tl.store(row_of_slot_ptr + slots, tl.where(expert >= 0, row, -1), mask=slots < num_slots)
        weight = tl.load(top_k_weights_ptr + slots, mask=slots < num_slots, other=0.0)
        tl.store(weight_of_row_ptr + row, weight.to(tl.float32), mask=expert >= 0)


def routing_table(
    top_k_index: Tensor, top_k_weights: Tensor, num_experts: int, block_m: int, num_pairs: int | None = None
) -> RoutingTable:
    """Sort slots by expert into padded groups of rows; stable, deterministic, no wait for the device.

    top_k_index: (T, K) int32 or int64; ids outside [0, E) are dropped, an id may repeat within a token.
    top_k_weights: (T, K) of any float dtype. num_experts: 1 to 1024. block_m: rows per tile M, 16, 32, 64 or 128.
    num_pairs: a bound on the ids in [0, E) that the caller vouches for; fewer rows are allocated then.
    Nothing of it is differentiable. Raises ValueError for anything else.
    """
    num_tiles = _checked_num_tiles(top_k_index, top_k_weights, num_experts, block_m, num_pairs)
    top_k_index, top_k_weights = top_k_index.contiguous(), top_k_weights.contiguous()
    num_slots = top_k_index.numel()
    num_columns = triton.next_power_of_2(num_experts)
    block = min(1024, _MAX_ONE_HOT // num_columns)  # of E alone: batches of other sizes compile nothing anew
    num_blocks = max(1, triton.cdiv(num_slots, block))

    def int32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=top_k_index.device)

    weight_of_row = torch.empty(num_tiles * block_m, dtype=torch.float32, device=top_k_index.device)
    table = RoutingTable(int32(num_slots), weight_of_row, int32(num_tiles), int32(num_experts + 1), int32(num_experts))
    if num_slots <= _FEW_SLOTS and num_columns * block_m <= _MAX_ONE_HOT:
        small_block = min(block, 128)
        _small_table_kernel[(1,)](
            top_k_index, top_k_weights, table.group_size, table.row_of_slot, table.weight_of_row, table.expert_of_tile,
            table.group_start, num_slots, num_experts, num_tiles, BLOCK=small_block, EXPERTS=num_columns,
            BLOCK_M=block_m, TILES=small_block, num_warps=8,
        )  # fmt: skip
        return table
    num_warps = 4 if num_columns >= 128 else 8  # at 128 experts the table takes 24 us instead of 72
    block_counts = int32(num_blocks, num_columns)  # of which the second launch makes offsets
    _block_histogram_kernel[(num_blocks,)](
        top_k_index, block_counts, num_slots, num_experts, BLOCK=block, EXPERTS=num_columns, num_warps=num_warps
    )
    _block_offset_kernel[(num_experts,)](
        block_counts, table.group_size, num_blocks, EXPERTS=num_columns, STEP=_BLOCKS_PER_STEP, num_warps=4
    )
    _scatter_kernel[(num_experts + num_blocks,)](
        top_k_index, top_k_weights, block_counts, table.group_size, table.row_of_slot, table.weight_of_row,
        table.expert_of_tile, table.group_start, num_slots, num_experts, num_tiles, BLOCK=block, EXPERTS=num_columns,
        BLOCK_M=block_m, num_warps=num_warps,
    )  # fmt: skip
    return table


def _checked_num_tiles(
    top_k_index: Tensor, top_k_weights: Tensor, num_experts: int, block_m: int, num_pairs: int | None = None
) -> int:
    """Refuse what the table cannot hold, and return how many tiles it allocates."""
    if top_k_index.ndim != 2:
        raise ValueError(f"top_k_index must be (T, K), got {tuple(top_k_index.shape)}: flatten batch and time first.")
    if top_k_index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"top_k_index must be int32 or int64, got {top_k_index.dtype}: pass expert numbers.")
    if top_k_weights.shape != top_k_index.shape or not top_k_weights.is_floating_point():
        raise ValueError(
            f"top_k_weights must be floats of shape {tuple(top_k_index.shape)} like top_k_index, "
            f"got {tuple(top_k_weights.shape)} {top_k_weights.dtype}: pass one gate weight for each choice."
        )
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(
            f"num_experts={num_experts} is outside [1, {MAX_EXPERTS}]: use another experts implementation."
        )
    if block_m not in ROWS_PER_TILE:
        raise ValueError(f"block_m={block_m} is not one of {ROWS_PER_TILE}: choose one of them.")
    num_slots = top_k_index.numel() if num_pairs is None else min(num_pairs, top_k_index.numel())
    num_tiles = num_tiles_bound(num_slots, num_experts, block_m)
    if num_tiles * block_m >= 2**31:
        raise ValueError(
            f"{num_slots} slots need {num_tiles * block_m} rows, but rows are numbered in int32: split the batch."
        )
    return num_tiles


def plain_permute_tokens(tokens: Tensor, table: RoutingTable) -> Tensor:
    """What `permute_tokens` computes, in plain PyTorch; the unspecified rows are 0."""
    num_slots_per_token = _slots_per_token(table.row_of_slot, tokens.shape[0])
    rows = tokens.new_zeros(table.weight_of_row.shape[0], tokens.shape[1])
    kept = table.row_of_slot >= 0
    rows[table.row_of_slot[kept].long()] = tokens.repeat_interleave(num_slots_per_token, dim=0)[kept]
    return rows


@triton.jit(do_not_specialize=["num_experts"])
def _permute_kernel(
    tokens_ptr, rows_ptr, row_of_slot_ptr, group_start_ptr, group_size_ptr, num_experts, tokens_stride, H,
    K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
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
        tokens, rows, table.row_of_slot, table.group_start, table.group_size, num_experts, tokens.stride(0),
        hidden_size, K=num_slots_per_token, BLOCK_H=block_h, num_warps=4,
    )  # fmt: skip
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
    rows_ptr, row_of_slot_ptr, weights_ptr, out_ptr, rows_stride, H, K: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
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


def combine_rows(
    rows: Tensor, row_of_slot: Tensor, weights: Tensor | None, num_slots_per_token: int, out: Tensor | None = None
) -> Tensor:
    """Sum over each token's slots of weight * row, in float32: (R, H) -> (T, H) of the dtype of rows.

    row_of_slot: (n,) int32; a slot with -1 adds nothing, whatever its weight. weights: (T, K) of any float dtype; None
    means a plain sum. num_slots_per_token: K. out: contiguous, to be written and returned. Raises ValueError if these
    do not fit together.
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
    if out is None:
        out = torch.empty(num_tokens, hidden_size, dtype=rows.dtype, device=rows.device)
    block_h = _block_h(hidden_size)
    _combine_kernel[(num_tokens, triton.cdiv(hidden_size, block_h))](
        rows, row_of_slot, None if weights is None else weights.contiguous(), out, rows.stride(0), hidden_size,
        K=num_slots_per_token, BLOCK_H=block_h, HAS_WEIGHTS=weights is not None, num_warps=4,
    )  # fmt: skip
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


def gather_partials(
    partials: Tensor, row_of_slot: Tensor, shape: tuple[int, int], dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Sum over column tiles at each slot's row: (C, R) float32 -> (T, K), the gradient of the gate weights.

    A product over column tiles leaves it behind as one partial sum for each row and tile.

    row_of_slot: (n,) int32; a slot with -1 gets 0. shape: (T, K). dtype: of the result; the sum is in float32. out:
    contiguous, to be written and returned. Raises ValueError if T * K is not n.
    """
    _check_shape_of_slots(row_of_slot, shape)
    partials = partials.contiguous()
    num_slots = row_of_slot.numel()
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=partials.device)
    _gather_partials_kernel[(triton.cdiv(num_slots, _SLOTS_PER_PROGRAM),)](
        partials, row_of_slot, out, num_slots, partials.shape[1], C=partials.shape[0], BLOCK=_SLOTS_PER_PROGRAM,
        num_warps=4,
    )  # fmt: skip
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
