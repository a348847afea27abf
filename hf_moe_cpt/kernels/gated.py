"""The products around the gate: what they compute, and the kernels that work on a tile once its product is there.

R rows sorted by expert in padded groups (see `routing`), E experts, H hidden size, I width, w a row's gate weight.

gated up          up projection with the gated activation act(gate) * up in its epilogue: gate and up columns of one
                  tile come out of one product twice as wide, so both halves meet in registers
gated backward    of down projection and activation in one product. With h = act(gate) * up, y' the gradient of the
                  layer's output at a row and h' = y' W_down, the gradient of w is the sum over I of h' h (a partial
                  sum per column tile, see `gather_partials`), of gate w h' up act'(gate), of up w h' act(gate); the
                  gradient of W_down is made from w h

Source: ours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_moe_cpt.kernels.gates import (
    Form,
    gated,
    gated_with_derivatives,
    load_both_halves,
    matrix_of_form,
    pair_columns,
    split_pairs,
)
from hf_moe_cpt.kernels.grouped_gemm import (
    Tile,
    dot_precision,
    expert_product,
    fits_tma,
    load_matrix,
    plain_grouped_product,
    store_matrix,
    tile_position,
    tile_source,
)
from hf_moe_cpt.kernels.routing import RoutingTable


def plain_gated_up(
    rows: Tensor, gate_up: Tensor, table: RoutingTable, form: Form, save: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: rows (R, H), gate_up (E, 2I, H) = [gate; up], bias (E, 2I) -> hidden act(gate) * up (R, I) and,
    to be saved for the backward pass, the pre-activations [gate, up] (R, 2I), or an empty tensor.
    """
    preactivation = plain_grouped_product(rows, gate_up, table, not form.transposed, bias)
    return form.hidden(preactivation), preactivation if save else preactivation.new_empty(0)


def gated_up(
    rows: Tensor, gate_up: Tensor, table: RoutingTable, form: Form, save: bool, tile: Tile, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`plain_gated_up` in one launch; `tile.block_n` counts columns of each half."""
    num_experts, hidden_size = gate_up.shape[0], rows.shape[1]
    double_width = gate_up.shape[2 if form.transposed else 1]
    width = double_width // 2
    hidden = torch.empty(rows.shape[0], width, dtype=rows.dtype, device=rows.device)
    preactivation = hidden.new_empty(rows.shape[0], double_width) if save else hidden.new_empty(0)
    use_tma = tile.tma and fits_tma(rows, gate_up, hidden)
    matrix, box = matrix_of_form(gate_up, form, tile)
    saved_halves = preactivation if not save or form.interleaved else preactivation.view(-1, 2, width)
    saved_box = [tile.block_m, 2 * tile.block_n] if form.interleaved else [tile.block_m, 1, tile.block_n]
    num_row_tiles, num_column_tiles = table.expert_of_tile.shape[0], triton.cdiv(width, tile.block_n)
    _gated_up_kernel[tile.grid(num_row_tiles * num_column_tiles, rows.device)](
        tile_source(rows, [tile.block_m, tile.block_k], use_tma), tile_source(matrix, box, use_tma), bias,
        tile_source(hidden, [tile.block_m, tile.block_n], use_tma),
        tile_source(saved_halves, saved_box, use_tma) if save else hidden, table.expert_of_tile, table.group_start,
        num_experts, width, hidden_size, SAVE=save, TMA=use_tma, PERSISTENT=tile.persistent,
        PRECISION=dot_precision(rows.dtype), **form.launch_options(), **tile.launch_options(),
    )  # fmt: skip
    return hidden, preactivation


@triton.jit(do_not_specialize=["num_experts"])
def _gated_up_kernel(
    rows,  # (R, H)
    gate_up,  # (E, 2, I, H), interleaved (E, 2I, H), or transposed
    bias,  # (E, 2I) or None
    hidden,  # (R, I)
    preactivation,  # (R, 2, I), interleaved (R, 2I)
    expert_of_tile,  # (row tiles,) int32
    group_start,  # (E + 1,) int32
    num_experts, width, hidden_size, GATE: tl.constexpr, TRANSPOSED: tl.constexpr, INTERLEAVED: tl.constexpr,
    SAVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, PERSISTENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns a (BLOCK_M, BLOCK_N) tile of `hidden` and the two of `preactivation` that it is made from; if
    persistent, every num_programs-th of them.
    """
    num_row_tiles = tl.load(group_start + num_experts) // BLOCK_M
    num_tiles = num_row_tiles * tl.cdiv(width, BLOCK_N)
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
            _write_gated_tile(
                tile, num_row_tiles, rows, gate_up, bias, hidden, preactivation, expert_of_tile, width, hidden_size,
                GATE, TRANSPOSED, INTERLEAVED, SAVE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, TMA, PRECISION,
            )  # fmt: skip
    elif tl.program_id(0) < num_tiles:
        _write_gated_tile(
            tl.program_id(0), num_row_tiles, rows, gate_up, bias, hidden, preactivation, expert_of_tile, width,
            hidden_size, GATE, TRANSPOSED, INTERLEAVED, SAVE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, TMA, PRECISION,
        )  # fmt: skip


@triton.jit
def _write_gated_tile(
    tile, num_row_tiles, rows, gate_up, bias, hidden, preactivation, expert_of_tile, width, hidden_size,
    GATE: tl.constexpr, TRANSPOSED: tl.constexpr, INTERLEAVED: tl.constexpr, SAVE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute and write the tile-th tile: one product with 2 BLOCK_N columns, split into gate and up."""
    row_tile, column_tile = tile_position(tile, num_row_tiles, tl.cdiv(width, BLOCK_N), GROUP)
    row, column = row_tile * BLOCK_M, column_tile * BLOCK_N
    expert = tl.load(expert_of_tile + row_tile)
    total = tl.zeros((BLOCK_M, 2 * BLOCK_N), dtype=tl.float32)
    for k in range(0, hidden_size, BLOCK_K):
        left = load_matrix(rows, row, k, hidden_size, hidden_size, BLOCK_M, BLOCK_K, TMA)
        right = load_both_halves(
            gate_up, expert, column, k, width, hidden_size, BLOCK_N, BLOCK_K, TRANSPOSED, INTERLEAVED, TMA
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    if bias is not None:
        position, inside = pair_columns(column, width, BLOCK_N, INTERLEAVED)
        added = tl.load(bias + expert.to(tl.int64) * 2 * width + position, mask=inside, other=0.0)
        total += added.to(tl.float32)[None, :]
    gate, up = split_pairs(total, BLOCK_M, BLOCK_N, INTERLEAVED)
    if SAVE:
        if INTERLEAVED:
            store_matrix(preactivation, total, row, 2 * column, 2 * width, 2 * width, BLOCK_M, 2 * BLOCK_N, TMA)
        elif TMA:
            preactivation.store([row, 0, column], gate.to(preactivation.dtype).reshape(BLOCK_M, 1, BLOCK_N))
            preactivation.store([row, 1, column], up.to(preactivation.dtype).reshape(BLOCK_M, 1, BLOCK_N))
        else:
            store_matrix(preactivation, gate, row, column, 2 * width, width, BLOCK_M, BLOCK_N, TMA)
            store_matrix(preactivation + width, up, row, column, 2 * width, width, BLOCK_M, BLOCK_N, TMA)
    store_matrix(hidden, gated(gate, up, GATE), row, column, width, width, BLOCK_M, BLOCK_N, TMA)


def plain_gated_backward(
    grad_rows: Tensor, down: Tensor, preactivation: Tensor, table: RoutingTable, form: Form
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: grad_rows (R, H), down (E, H, I), preactivation (R, 2I) = [gate, up]

    -> gradient of the pre-activations (R, 2I), weighted hidden w h (R, I), partial gradients of w (1, R) float32.
    """
    weight = table.weight_of_row[:, None].to(grad_rows.dtype)
    with torch.enable_grad():
        leaf = preactivation.detach().requires_grad_()
        hidden = form.hidden(leaf)
    grad_hidden = plain_grouped_product(grad_rows, down, table, contract_last=form.transposed)
    (grad_preactivation,) = torch.autograd.grad(hidden, leaf, weight * grad_hidden)
    partials = (grad_hidden * hidden.detach()).sum(-1).float()
    return grad_preactivation, weight * hidden.detach(), partials[None]


def gated_backward(
    grad_rows: Tensor,
    down: Tensor,
    preactivation: Tensor,
    table: RoutingTable,
    form: Form,
    tile: Tile,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`plain_gated_backward` in one launch, with as many partial gradients of w as there are column tiles.

    in_place: the gradient of the pre-activations replaces them.
    """
    num_experts, hidden_size = down.shape[0], grad_rows.shape[1]
    width = preactivation.shape[1] // 2
    grad_preactivation = preactivation if in_place else torch.empty_like(preactivation)
    weighted = torch.empty(grad_rows.shape[0], width, dtype=grad_rows.dtype, device=grad_rows.device)
    num_row_tiles, num_column_tiles = table.expert_of_tile.shape[0], triton.cdiv(width, tile.block_n)
    partials = torch.empty(num_column_tiles, grad_rows.shape[0], dtype=torch.float32, device=grad_rows.device)
    use_tma = tile.tma and fits_tma(grad_rows, down)
    box = [1, tile.block_n, tile.block_k] if form.transposed else [1, tile.block_k, tile.block_n]
    _gated_backward_kernel[(num_row_tiles * num_column_tiles,)](
        tile_source(grad_rows, [tile.block_m, tile.block_k], use_tma), tile_source(down, box, use_tma), preactivation,
        table.weight_of_row, grad_preactivation, weighted, partials, table.expert_of_tile, table.group_start,
        num_experts, width, hidden_size, grad_rows.shape[0],
        CHUNKS=min(4, max(1, tile.block_m * tile.block_n // (1024 * min(8, tile.num_warps)))), TMA=use_tma,
        PRECISION=dot_precision(grad_rows.dtype), **form.launch_options(), **tile.launch_options(),
    )  # fmt: skip
    return grad_preactivation, weighted, partials


@triton.jit(do_not_specialize=["num_experts", "num_rows"])
def _gated_backward_kernel(
    grad_rows,  # (R, H)
    down,  # (E, H, I), or transposed
    preactivation,  # (R, 2I)
    weight_of_row,  # (R,) float32
    grad_preactivation,  # (R, 2I)
    weighted,  # (R, I)
    partials,  # (column tiles, R) float32
    expert_of_tile,  # (row tiles,) int32
    group_start,  # (E + 1,) int32
    num_experts, width, hidden_size, num_rows, GATE: tl.constexpr, TRANSPOSED: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns a (BLOCK_M, BLOCK_N) tile of `weighted`, the two of `grad_preactivation` beside it, and BLOCK_M
    entries of one row of `partials`. The epilogue works on CHUNKS parts of the columns, or registers would spill, and
    on h' as its type rounds it, in half the registers.
    """
    num_row_tiles = tl.load(group_start + num_experts) // BLOCK_M
    num_column_tiles = tl.cdiv(width, BLOCK_N)
    if tl.program_id(0) >= num_row_tiles * num_column_tiles:
        return
    row_tile, column_tile = tile_position(tl.program_id(0), num_row_tiles, num_column_tiles, GROUP)
    row, column = row_tile * BLOCK_M, column_tile * BLOCK_N
    expert = tl.load(expert_of_tile + row_tile)
    total = expert_product(
        grad_rows, down, row, expert, column, width, hidden_size, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION
    )

    lines = row + tl.arange(0, BLOCK_M)
    weight = tl.load(weight_of_row + lines)
    lines = lines.to(tl.int64)
    partial = _parts_backward(
        total.to(weighted.dtype.element_ty), weight, lines, column, width, preactivation, grad_preactivation, weighted,
        GATE, INTERLEAVED, BLOCK_N, CHUNKS,
    )  # fmt: skip
    tl.store(partials + column_tile.to(tl.int64) * num_rows + lines, partial)


@triton.jit
def _parts_backward(
    grad_hidden, weight, lines, column, width, preactivation, grad_preactivation, weighted, GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`_columns_backward` of one part of the columns after the other."""
    if PARTS == 1:
        partial = _columns_backward(
            grad_hidden, weight, lines, column, width, preactivation, grad_preactivation, weighted, GATE, INTERLEAVED,
            COLUMNS,
        )  # fmt: skip
    else:
        half: tl.constexpr = COLUMNS // 2
        left, right = grad_hidden.reshape(grad_hidden.shape[0], 2, half).permute(0, 2, 1).split()
        partial = _parts_backward(
            left, weight, lines, column, width, preactivation, grad_preactivation, weighted, GATE, INTERLEAVED, half,
            PARTS // 2,
        )  # fmt: skip
        partial += _parts_backward(
            right, weight, lines, column + half, width, preactivation, grad_preactivation, weighted, GATE, INTERLEAVED,
            half, PARTS // 2,
        )  # fmt: skip
    return partial


@triton.jit
def _columns_backward(
    grad_hidden, weight, lines, column, width, preactivation, grad_preactivation, weighted, GATE: tl.constexpr,
    INTERLEAVED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write what follows from h' (rows, COLUMNS); returns these columns' part of the gradient of w (rows,)."""
    columns = column + tl.arange(0, COLUMNS)
    inside = (columns < width)[None, :]
    row = lines[:, None] * (2 * width)
    if INTERLEAVED:
        position, exists = pair_columns(column, width, COLUMNS, INTERLEAVED)
        pairs = tl.load(preactivation + row + position[None, :], mask=exists[None, :], other=0.0)
        gate, up = split_pairs(pairs, lines.shape[0], COLUMNS, INTERLEAVED)
    else:
        gate = tl.load(preactivation + row + columns[None, :], mask=inside, other=0.0)
        up = tl.load(preactivation + row + columns[None, :] + width, mask=inside, other=0.0)
    grad_hidden = grad_hidden.to(tl.float32)
    hidden, by_gate, by_up = gated_with_derivatives(gate.to(tl.float32), up.to(tl.float32), GATE)
    weighted_grad = grad_hidden * weight[:, None]
    dtype = weighted.dtype.element_ty
    grad_gate, grad_up = (weighted_grad * by_gate).to(dtype), (weighted_grad * by_up).to(dtype)
    if INTERLEAVED:
        pairs = tl.join(grad_gate, grad_up).reshape(lines.shape[0], 2 * COLUMNS)
        tl.store(grad_preactivation + row + position[None, :], pairs, mask=exists[None, :])
    else:
        tl.store(grad_preactivation + row + columns[None, :], grad_gate, mask=inside)
        tl.store(grad_preactivation + row + columns[None, :] + width, grad_up, mask=inside)
    tl.store(weighted + lines[:, None] * width + columns[None, :], (hidden * weight[:, None]).to(dtype), mask=inside)
    return tl.sum(grad_hidden * hidden, axis=1)
