"""Backward of the down projection and the gated activation, in one product with an epilogue.

R rows sorted by expert in padded groups, H hidden size, I width, E experts; w a row's gate weight, y' the gradient of
the layer's output at that row. With h = act(gate) * up and h' = y' W_down:

    gradient of w     sum over I of h' h           (a partial sum per column tile, see `permutation.gather_partials`)
    gradient of gate  w h' up act'(gate)
    gradient of up    w h' act(gate)
    w h               what the gradient of W_down is made from

Source: ours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_moe_cpt.kernels.activations import ACTIVATIONS, activate_with_derivative
from hf_moe_cpt.kernels.grouped_product import plain_grouped_product
from hf_moe_cpt.kernels.routing_table import RoutingTable
from hf_moe_cpt.kernels.tile_access import (
    dot_precision,
    fits_tma,
    load_expert_matrix,
    load_matrix,
    tile_position,
    tile_source,
)
from hf_moe_cpt.kernels.tiles import Tile


def plain_gated_backward(
    grad_rows: Tensor, down: Tensor, preactivation: Tensor, table: RoutingTable, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: grad_rows (R, H), down (E, H, I), preactivation (R, 2I) = [gate, up]

    -> gradient of the pre-activations (R, 2I), weighted hidden w h (R, I), partial gradients of w (1, R) float32.
    """
    weight = table.weight_of_row[:, None].to(grad_rows.dtype)
    with torch.enable_grad():
        leaf = preactivation.detach().requires_grad_()
        gate, up = leaf.chunk(2, dim=-1)
        hidden = ACTIVATIONS[activation](gate) * up
    grad_hidden = plain_grouped_product(grad_rows, down, table, contract_last=False)
    (grad_preactivation,) = torch.autograd.grad(hidden, leaf, weight * grad_hidden)
    partials = (grad_hidden * hidden.detach()).sum(-1).float()
    return grad_preactivation, weight * hidden.detach(), partials[None]


def gated_backward(
    grad_rows: Tensor,
    down: Tensor,
    preactivation: Tensor,
    table: RoutingTable,
    activation: str,
    tile: Tile,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`plain_gated_backward` in one launch, with as many partial gradients of w as there are column tiles.

    in_place: the gradient of the pre-activations replaces them.
    """
    num_experts, hidden_size, width = down.shape
    grad_preactivation = preactivation if in_place else torch.empty_like(preactivation)
    weighted = torch.empty(grad_rows.shape[0], width, dtype=grad_rows.dtype, device=grad_rows.device)
    num_row_tiles, num_column_tiles = table.expert_of_tile.shape[0], triton.cdiv(width, tile.block_n)
    partials = torch.empty(num_column_tiles, grad_rows.shape[0], dtype=torch.float32, device=grad_rows.device)
    use_tma = tile.tma and fits_tma(grad_rows, down)
    _gated_backward_kernel[(num_row_tiles * num_column_tiles,)](
        tile_source(grad_rows, [tile.block_m, tile.block_k], use_tma),
        tile_source(down, [1, tile.block_k, tile.block_n], use_tma),
        preactivation,
        table.weight_of_row,
        grad_preactivation,
        weighted,
        partials,
        table.expert_of_tile,
        table.group_start,
        num_experts,
        width,
        hidden_size,
        grad_rows.shape[0],
        ACTIVATION=activation,
        CHUNKS=min(4, max(1, tile.block_m * tile.block_n // (1024 * tile.num_warps))),
        TMA=use_tma,
        PRECISION=dot_precision(grad_rows.dtype),
        **tile.launch_options(),
    )
    return grad_preactivation, weighted, partials


@triton.jit(do_not_specialize=["num_experts", "num_rows"])
def _gated_backward_kernel(
    grad_rows,  # (R, H)
    down,  # (E, H, I)
    preactivation,  # (R, 2I)
    weight_of_row,  # (R,) float32
    grad_preactivation,  # (R, 2I)
    weighted,  # (R, I)
    partials,  # (column tiles, R) float32
    expert_of_tile,  # (row tiles,) int32
    group_start,  # (E + 1,) int32
    num_experts,
    width,
    hidden_size,
    num_rows,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program owns a (BLOCK_M, BLOCK_N) tile of `weighted`, the two of `grad_preactivation` beside it, and BLOCK_M
    entries of one row of `partials`. The epilogue works on CHUNKS parts of the columns, or registers would spill.
    """
    num_row_tiles = tl.load(group_start + num_experts) // BLOCK_M
    num_column_tiles = tl.cdiv(width, BLOCK_N)
    if tl.program_id(0) >= num_row_tiles * num_column_tiles:
        return
    row_tile, column_tile = tile_position(tl.program_id(0), num_row_tiles, num_column_tiles, GROUP)
    row, column = row_tile * BLOCK_M, column_tile * BLOCK_N
    expert = tl.load(expert_of_tile + row_tile)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, hidden_size, BLOCK_K):
        left = load_matrix(grad_rows, row, k, hidden_size, hidden_size, BLOCK_M, BLOCK_K, TMA)
        right = load_expert_matrix(down, expert, k, column, hidden_size, width, BLOCK_K, BLOCK_N, TMA)
        total = tl.dot(left, right, total, input_precision=PRECISION)

    lines = row + tl.arange(0, BLOCK_M)
    weight = tl.load(weight_of_row + lines)
    lines = lines.to(tl.int64)
    part: tl.constexpr = BLOCK_N // CHUNKS
    tensors = (preactivation, grad_preactivation, weighted)
    if CHUNKS == 1:
        partial = _columns_backward(total, weight, lines, column, width, *tensors, ACTIVATION, part)
    else:
        left, right = _halves(total)
        if CHUNKS == 2:
            partial = _columns_backward(left, weight, lines, column, width, *tensors, ACTIVATION, part)
            partial += _columns_backward(right, weight, lines, column + part, width, *tensors, ACTIVATION, part)
        else:
            tl.static_assert(CHUNKS == 4)
            first, second = _halves(left)
            third, fourth = _halves(right)
            partial = _columns_backward(first, weight, lines, column, width, *tensors, ACTIVATION, part)
            partial += _columns_backward(second, weight, lines, column + part, width, *tensors, ACTIVATION, part)
            partial += _columns_backward(third, weight, lines, column + 2 * part, width, *tensors, ACTIVATION, part)
            partial += _columns_backward(fourth, weight, lines, column + 3 * part, width, *tensors, ACTIVATION, part)
    tl.store(partials + column_tile.to(tl.int64) * num_rows + lines, partial)


@triton.jit
def _halves(total):
    """Left and right half of the columns of a tile."""
    return total.reshape(total.shape[0], 2, total.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _columns_backward(
    grad_hidden, weight, lines, column, width, preactivation, grad_preactivation, weighted,
    ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write what follows from h' (rows, COLUMNS); returns these columns' part of the gradient of w (rows,)."""
    columns = column + tl.arange(0, COLUMNS)
    inside = (columns < width)[None, :]
    pair = lines[:, None] * (2 * width) + columns[None, :]
    gate = tl.load(preactivation + pair, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(preactivation + pair + width, mask=inside, other=0.0).to(tl.float32)
    activated, slope = activate_with_derivative(gate, ACTIVATION)
    hidden = activated * up
    weighted_grad = grad_hidden * weight[:, None]
    dtype = weighted.dtype.element_ty
    tl.store(grad_preactivation + pair, (weighted_grad * up * slope).to(dtype), mask=inside)
    tl.store(grad_preactivation + pair + width, (weighted_grad * activated).to(dtype), mask=inside)
    single = lines[:, None] * width + columns[None, :]
    tl.store(weighted + single, (hidden * weight[:, None]).to(dtype), mask=inside)
    return tl.sum(grad_hidden * hidden, axis=1)
