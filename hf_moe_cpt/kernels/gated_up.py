"""Up projection of the experts with the gated activation in its epilogue.

R rows sorted by expert in padded groups, H hidden size, I width, E experts. Gate and up columns of one tile come out
of one product twice as wide, so both halves meet in registers. Source: ours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_moe_cpt.kernels.activations import ACTIVATIONS, activate
from hf_moe_cpt.kernels.grouped_product import plain_grouped_product
from hf_moe_cpt.kernels.routing_table import RoutingTable
from hf_moe_cpt.kernels.tile_access import (
    dot_precision,
    fits_tma,
    load_matrix,
    store_matrix,
    tile_position,
    tile_source,
)
from hf_moe_cpt.kernels.tiles import Tile


def plain_gated_up(
    rows: Tensor, gate_up: Tensor, table: RoutingTable, activation: str, save: bool
) -> tuple[Tensor, Tensor]:
    """The definition: rows (R, H), gate_up (E, 2I, H) = [gate; up] -> hidden act(gate) * up (R, I) and, to be saved
    for the backward pass, the pre-activations [gate, up] (R, 2I), or an empty tensor.
    """
    preactivation = plain_grouped_product(rows, gate_up, table, contract_last=True)
    gate, up = preactivation.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up, preactivation if save else preactivation.new_empty(0)


def gated_up(
    rows: Tensor, gate_up: Tensor, table: RoutingTable, activation: str, save: bool, tile: Tile
) -> tuple[Tensor, Tensor]:
    """`plain_gated_up` in one launch; `tile.block_n` counts columns of each half."""
    num_experts, double_width, hidden_size = gate_up.shape
    width = double_width // 2
    hidden = torch.empty(rows.shape[0], width, dtype=rows.dtype, device=rows.device)
    preactivation = hidden.new_empty(rows.shape[0], double_width) if save else hidden.new_empty(0)
    use_tma = tile.tma and fits_tma(rows, gate_up, hidden)
    halves = gate_up.view(num_experts, 2, width, hidden_size)
    saved_halves = preactivation.view(-1, 2, width) if save else hidden  # never touched without `save`
    box, saved_box = [1, 2, tile.block_n, tile.block_k], [tile.block_m, 1, tile.block_n]
    num_row_tiles, num_column_tiles = table.expert_of_tile.shape[0], triton.cdiv(width, tile.block_n)
    _gated_up_kernel[tile.grid(num_row_tiles * num_column_tiles, rows.device)](
        tile_source(rows, [tile.block_m, tile.block_k], use_tma),
        tile_source(halves, box, use_tma),
        tile_source(hidden, [tile.block_m, tile.block_n], use_tma),
        tile_source(saved_halves, saved_box, use_tma) if save else hidden,
        table.expert_of_tile,
        table.group_start,
        num_experts,
        width,
        hidden_size,
        ACTIVATION=activation,
        SAVE=save,
        TMA=use_tma,
        PERSISTENT=tile.persistent,
        PRECISION=dot_precision(rows.dtype),
        **tile.launch_options(),
    )
    return hidden, preactivation


@triton.jit(do_not_specialize=["num_experts"])
def _gated_up_kernel(
    rows,  # (R, H)
    gate_up,  # (E, 2, I, H)
    hidden,  # (R, I)
    preactivation,  # (R, 2, I)
    expert_of_tile,  # (row tiles,) int32
    group_start,  # (E + 1,) int32
    num_experts,
    width,
    hidden_size,
    ACTIVATION: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program owns a (BLOCK_M, BLOCK_N) tile of `hidden` and the two of `preactivation` that it is made from; if
    persistent, every num_programs-th of them.
    """
    num_row_tiles = tl.load(group_start + num_experts) // BLOCK_M
    num_tiles = num_row_tiles * tl.cdiv(width, BLOCK_N)
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
            _write_tile(
                tile, num_row_tiles, rows, gate_up, hidden, preactivation, expert_of_tile, width, hidden_size,
                ACTIVATION, SAVE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, TMA, PRECISION,
            )  # fmt: skip
    elif tl.program_id(0) < num_tiles:
        _write_tile(
            tl.program_id(0), num_row_tiles, rows, gate_up, hidden, preactivation, expert_of_tile, width, hidden_size,
            ACTIVATION, SAVE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, TMA, PRECISION,
        )  # fmt: skip


@triton.jit
def _write_tile(
    tile, num_row_tiles, rows, gate_up, hidden, preactivation, expert_of_tile, width, hidden_size,
    ACTIVATION: tl.constexpr, SAVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute and write the tile-th tile: one product with 2 BLOCK_N columns, split into gate and up."""
    row_tile, column_tile = tile_position(tile, num_row_tiles, tl.cdiv(width, BLOCK_N), GROUP)
    row, column = row_tile * BLOCK_M, column_tile * BLOCK_N
    expert = tl.load(expert_of_tile + row_tile)
    total = tl.zeros((BLOCK_M, 2 * BLOCK_N), dtype=tl.float32)
    for k in range(0, hidden_size, BLOCK_K):
        left = load_matrix(rows, row, k, hidden_size, hidden_size, BLOCK_M, BLOCK_K, TMA)
        right = _load_both_halves(gate_up, expert, column, k, width, hidden_size, BLOCK_N, BLOCK_K, TMA)
        total = tl.dot(left, right.T, total, input_precision=PRECISION)
    gate, up = total.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
    if SAVE:
        if TMA:
            preactivation.store([row, 0, column], gate.to(preactivation.dtype).reshape(BLOCK_M, 1, BLOCK_N))
            preactivation.store([row, 1, column], up.to(preactivation.dtype).reshape(BLOCK_M, 1, BLOCK_N))
        else:
            store_matrix(preactivation, gate, row, column, 2 * width, width, BLOCK_M, BLOCK_N, TMA)
            store_matrix(preactivation + width, up, row, column, 2 * width, width, BLOCK_M, BLOCK_N, TMA)
    store_matrix(hidden, activate(gate, ACTIVATION) * up, row, column, width, width, BLOCK_M, BLOCK_N, TMA)


@triton.jit
def _load_both_halves(
    gate_up, expert, column, k, width, hidden_size, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr
):
    """BLOCK_N rows of the gate matrix above the same rows of the up matrix: (2 BLOCK_N, BLOCK_K)."""
    if TMA:
        both = gate_up.load([expert, 0, column, k]).reshape(2 * BLOCK_N, BLOCK_K)
    else:
        line = tl.arange(0, 2 * BLOCK_N)
        within = column + line % BLOCK_N
        ks = k + tl.arange(0, BLOCK_K)
        matrix_row = expert.to(tl.int64) * 2 * width + line // BLOCK_N * width + within
        inside = (within < width)[:, None] & (ks < hidden_size)[None, :]
        both = tl.load(gate_up + matrix_row[:, None] * hidden_size + ks[None, :], mask=inside, other=0.0)
    return both
