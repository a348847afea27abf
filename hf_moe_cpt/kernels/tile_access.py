"""How a program of the grouped products finds its tile and reads or writes it.

A matrix is read either through a tensor descriptor, which the copy engine of Hopper and later GPUs serves (TMA), or
through pointers, which works everywhere; the two differ in nothing else. Rows are never masked: the routing table pads
every expert's group to whole tiles. Columns past the end read 0 and are not written. Source: ours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def tile_source(tensor: Tensor, block_shape: list[int], use_tma: bool) -> Tensor | TensorDescriptor:
    """What a kernel receives for `tensor`: itself, or a descriptor that moves boxes of `block_shape`."""
    if not use_tma:
        return tensor
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block_shape)


def fits_tma(*tensors: Tensor) -> bool:
    """Whether descriptors can be made: addresses and all strides but the last in whole 16 bytes, last stride 1."""
    return all(_fits_tma(tensor) for tensor in tensors)


def _fits_tma(tensor: Tensor) -> bool:
    *strides, last = tensor.stride()
    size = tensor.element_size()
    return last == 1 and tensor.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in strides)


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's name for how float32 is multiplied, as `torch.set_float32_matmul_precision` asks; no matter else."""
    is_exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if is_exact else "tf32"


@triton.jit
def tile_position(tile, num_row_tiles, num_column_tiles, GROUP: tl.constexpr):
    """Row and column tile of the tile-th program: columns are walked inside groups of GROUP row tiles.

    So the programs that run at the same time read few rows and few weights, and both stay in the L2 cache.
    """
    tiles_per_group = GROUP * num_column_tiles
    first_row = tile // tiles_per_group * GROUP
    group_rows = tl.minimum(num_row_tiles - first_row, GROUP)
    within = tile % tiles_per_group
    return first_row + within % group_rows, within // group_rows


@triton.jit
def load_matrix(
    source, row, column, stride, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """The (ROWS, COLUMNS) tile at (row, column) of a matrix with `num_columns` columns."""
    if TMA:
        tile = source.load([row, column])
    else:
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)
        columns = column + tl.arange(0, COLUMNS)
        tile = tl.load(
            source + rows[:, None] * stride + columns[None, :], mask=columns[None, :] < num_columns, other=0.0
        )
    return tile


@triton.jit
def store_matrix(
    target, tile, row, column, stride, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """Write the (ROWS, COLUMNS) tile at (row, column) in the target's dtype, up to the last column."""
    if TMA:
        target.store([row, column], tile.to(target.dtype))
    else:
        rows = (row + tl.arange(0, ROWS)).to(tl.int64)
        columns = column + tl.arange(0, COLUMNS)
        inside = columns[None, :] < num_columns
        tl.store(target + rows[:, None] * stride + columns[None, :], tile.to(target.dtype.element_ty), mask=inside)


@triton.jit
def load_expert_matrix(
    source, expert, row, column, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """The (ROWS, COLUMNS) tile at (row, column) of an expert's matrix; (E, num_rows, num_columns) is contiguous."""
    if TMA:
        tile = source.load([expert, row, column]).reshape(ROWS, COLUMNS)
    else:
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        offset = (expert.to(tl.int64) * num_rows + rows[:, None]) * num_columns + columns[None, :]
        inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
        tile = tl.load(source + offset, mask=inside, other=0.0)
    return tile


@triton.jit
def store_expert_matrix(
    target,
    tile,
    expert,
    row,
    column,
    num_rows,
    num_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Write the (ROWS, COLUMNS) tile at (row, column) of an expert's matrix in its dtype, up to its ends."""
    if TMA:
        target.store([expert, row, column], tile.to(target.dtype).reshape(1, ROWS, COLUMNS))
    else:
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        offset = (expert.to(tl.int64) * num_rows + rows[:, None]) * num_columns + columns[None, :]
        inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
        tl.store(target + offset, tile.to(target.dtype.element_ty), mask=inside)
