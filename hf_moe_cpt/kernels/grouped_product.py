"""Grouped product: every row times the matrix of its expert.

R rows sorted by expert in padded groups (see `routing_table`), E experts, K contracted and N resulting columns. Used
for the down projection and for the gradient of the up projection's input. Source: ours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_moe_cpt.kernels.routing_table import RoutingTable
from hf_moe_cpt.kernels.tile_access import (
    dot_precision,
    fits_tma,
    load_expert_matrix,
    load_matrix,
    store_matrix,
    tile_position,
    tile_source,
)
from hf_moe_cpt.kernels.tiles import Tile


def plain_grouped_product(rows: Tensor, weight: Tensor, table: RoutingTable, contract_last: bool) -> Tensor:
    """The definition: rows (R, K), weight (E, N, K) if `contract_last` else (E, K, N) -> (R, N).

    Rows past the last used group are 0 here and unspecified in `grouped_product`.
    """
    out = rows.new_zeros(rows.shape[0], weight.shape[1 if contract_last else 2])
    starts = table.group_start.tolist()
    for expert, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        matrix = weight[expert].T if contract_last else weight[expert]
        out[start:end] = rows[start:end] @ matrix
    return out


def grouped_product(rows: Tensor, weight: Tensor, table: RoutingTable, contract_last: bool, tile: Tile) -> Tensor:
    """`plain_grouped_product` in one launch; all tensors contiguous, `tile.block_m` the table's rows per tile."""
    num_experts, first, second = weight.shape
    num_columns = first if contract_last else second
    out = torch.empty(rows.shape[0], num_columns, dtype=rows.dtype, device=rows.device)
    use_tma = tile.tma and fits_tma(rows, weight, out)
    box = [1, tile.block_n, tile.block_k] if contract_last else [1, tile.block_k, tile.block_n]
    num_row_tiles, num_column_tiles = table.expert_of_tile.shape[0], triton.cdiv(num_columns, tile.block_n)
    _grouped_product_kernel[tile.grid(num_row_tiles * num_column_tiles, rows.device)](
        tile_source(rows, [tile.block_m, tile.block_k], use_tma),
        tile_source(weight, box, use_tma),
        tile_source(out, [tile.block_m, tile.block_n], use_tma),
        table.expert_of_tile,
        table.group_start,
        num_experts,
        num_columns,
        rows.shape[1],
        CONTRACT_LAST=contract_last,
        TMA=use_tma,
        PERSISTENT=tile.persistent,
        PRECISION=dot_precision(rows.dtype),
        **tile.launch_options(),
    )
    return out


@triton.jit(do_not_specialize=["num_experts"])
def _grouped_product_kernel(
    rows,  # (R, K)
    weight,  # (E, N, K) or (E, K, N)
    out,  # (R, N)
    expert_of_tile,  # (row tiles,) int32
    group_start,  # (E + 1,) int32
    num_experts,
    num_columns,
    depth,
    CONTRACT_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program owns one (BLOCK_M, BLOCK_N) tile of `out`, or, if persistent, every num_programs-th of them."""
    num_row_tiles = tl.load(group_start + num_experts) // BLOCK_M
    num_tiles = num_row_tiles * tl.cdiv(num_columns, BLOCK_N)
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
            _write_tile(
                tile, num_row_tiles, rows, weight, out, expert_of_tile, num_columns, depth,
                CONTRACT_LAST, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, TMA, PRECISION,
            )  # fmt: skip
    elif tl.program_id(0) < num_tiles:
        _write_tile(
            tl.program_id(0), num_row_tiles, rows, weight, out, expert_of_tile, num_columns, depth,
            CONTRACT_LAST, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, TMA, PRECISION,
        )  # fmt: skip


@triton.jit
def _write_tile(
    tile, num_row_tiles, rows, weight, out, expert_of_tile, num_columns, depth,
    CONTRACT_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute and write the tile-th (BLOCK_M, BLOCK_N) tile of `out`."""
    row_tile, column_tile = tile_position(tile, num_row_tiles, tl.cdiv(num_columns, BLOCK_N), GROUP)
    row, column = row_tile * BLOCK_M, column_tile * BLOCK_N
    expert = tl.load(expert_of_tile + row_tile)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, depth, BLOCK_K):
        left = load_matrix(rows, row, k, depth, depth, BLOCK_M, BLOCK_K, TMA)
        if CONTRACT_LAST:
            right = load_expert_matrix(weight, expert, column, k, num_columns, depth, BLOCK_N, BLOCK_K, TMA).T
        else:
            right = load_expert_matrix(weight, expert, k, column, depth, num_columns, BLOCK_K, BLOCK_N, TMA)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    store_matrix(out, total, row, column, num_columns, num_columns, BLOCK_M, BLOCK_N, TMA)
