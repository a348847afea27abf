"""Gradient of the experts' matrices: per expert, the transposed rows on one side times the rows on the other.

R rows sorted by expert in padded groups, E experts, M and N columns of the two sides. Padding rows must be 0 on both
sides. Experts without rows get zeros. Source: ours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_moe_cpt.kernels.routing_table import RoutingTable
from hf_moe_cpt.kernels.tile_access import (
    dot_precision,
    fits_tma,
    load_matrix,
    store_expert_matrix,
    tile_position,
    tile_source,
)
from hf_moe_cpt.kernels.tiles import Tile


def plain_weight_gradient(left: Tensor, right: Tensor, table: RoutingTable) -> Tensor:
    """The definition: left (R, M), right (R, N) -> (E, M, N), left^T right over each expert's rows."""
    starts = table.group_start.tolist()
    pairs = zip(starts[:-1], starts[1:], strict=True)
    return torch.stack([left[start:end].T @ right[start:end] for start, end in pairs])


def weight_gradient(left: Tensor, right: Tensor, table: RoutingTable, tile: Tile) -> Tensor:
    """`plain_weight_gradient` in one launch; `tile.block_k` must divide the table's rows per tile."""
    num_experts, num_rows, num_columns = table.group_size.shape[0], left.shape[1], right.shape[1]
    out = torch.empty(num_experts, num_rows, num_columns, dtype=left.dtype, device=left.device)
    use_tma = tile.tma and fits_tma(left, right, out)
    num_row_tiles, num_column_tiles = triton.cdiv(num_rows, tile.block_m), triton.cdiv(num_columns, tile.block_n)
    _weight_gradient_kernel[(num_experts * num_row_tiles * num_column_tiles,)](
        tile_source(left, [tile.block_k, tile.block_m], use_tma),
        tile_source(right, [tile.block_k, tile.block_n], use_tma),
        tile_source(out, [1, tile.block_m, tile.block_n], use_tma),
        table.group_start,
        num_rows,
        num_columns,
        TMA=use_tma,
        PRECISION=dot_precision(left.dtype),
        **tile.launch_options(),
    )
    return out


@triton.jit
def _weight_gradient_kernel(
    left,  # (R, M)
    right,  # (R, N)
    out,  # (E, M, N)
    group_start,  # (E + 1,) int32
    num_rows,
    num_columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program owns a (BLOCK_M, BLOCK_N) tile of one expert's matrix and walks over all rows of that expert."""
    num_row_tiles = tl.cdiv(num_rows, BLOCK_M)
    num_column_tiles = tl.cdiv(num_columns, BLOCK_N)
    tiles_per_expert = num_row_tiles * num_column_tiles
    expert = tl.program_id(0) // tiles_per_expert
    position = tl.program_id(0) % tiles_per_expert
    row_tile, column_tile = tile_position(position, num_row_tiles, num_column_tiles, GROUP)
    row, column = row_tile * BLOCK_M, column_tile * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(tl.load(group_start + expert), tl.load(group_start + expert + 1), BLOCK_K):
        above = load_matrix(left, start, row, num_rows, num_rows, BLOCK_K, BLOCK_M, TMA)
        below = load_matrix(right, start, column, num_columns, num_columns, BLOCK_K, BLOCK_N, TMA)
        total = tl.dot(above.T, below, total, input_precision=PRECISION)
    store_expert_matrix(out, total, expert, row, column, num_rows, num_columns, BLOCK_M, BLOCK_N, TMA)
