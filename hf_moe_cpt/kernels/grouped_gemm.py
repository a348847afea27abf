"""The products of the expert layer over rows sorted by expert: what they compute, their tiles, their kernels.

R rows sorted by expert in padded groups (see `routing`), E experts, H hidden size, I width, w a row's gate weight.

grouped product   every row times the matrix of its expert: down projection, gradient of the up projection's input
weight gradient   per expert, the transposed rows on one side times the rows on the other
bias gradient     per expert, the sum of its rows

A matrix is read either through a tensor descriptor, which the copy engine of Hopper and later GPUs serves (TMA), or
through pointers, which works everywhere; the two differ in nothing else. Rows are never masked. Columns past the end
read 0 and are not written. An epilogue computes in float32.

Tile shapes are a small table with a sane default for the rest. Nothing is tuned at run time: the first call of a
shape only compiles. `python scripts/benchmarks/experts.py` measures candidates on the GPU at hand; the Hopper entries
were the fastest on an H200, or within 3 % of it, at six shapes (docs/benchmarks/), the others are sane, not timed.

Source: ours.
"""

import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_moe_cpt.kernels.routing import RoutingTable


# Whether Triton runs kernels on the CPU, one operation after the other; read once, as Triton's decorators do.
IS_INTERPRETED: bool = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Tile:
    """Shape of one program's tile and how it is launched.

    block_m, block_n: rows and columns of the result; block_k: step of the contraction; all powers of two, at least 16.
    persistent: as many programs as multiprocessors, each walking over many tiles; only gated up and grouped product
    can. tma: read and write through tensor descriptors where the tensors allow it. group: row tiles walked together.
    max_registers: per thread, None = free.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    persistent: bool = False
    tma: bool = False
    group: int = 8
    max_registers: int | None = None

    def grid(self, num_tiles: int, device: torch.device) -> tuple[int]:
        """Programs to launch for at most `num_tiles` tiles."""
        return (min(num_tiles, num_multiprocessors(device)) if self.persistent else num_tiles,)

    def launch_options(self) -> dict[str, int]:
        """Keyword arguments of a Triton launch: the constants that every product has, and how it is launched."""
        options = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "GROUP": self.group}
        options |= {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}


@dataclass(frozen=True)
class TilePlan:
    """The tiles of all products of one expert layer; `rows_per_tile` is the padding of the expert groups."""

    rows_per_tile: int
    gated_up: Tile
    down: Tile
    hidden_gradient: Tile
    input_gradient: Tile
    up_weight_gradient: Tile
    down_weight_gradient: Tile


HOPPER_TRAINING = TilePlan(
    rows_per_tile=128,
    gated_up=Tile(128, 128, 64, num_warps=8, num_stages=3, persistent=True, tma=True),
    down=Tile(128, 256, 64, num_warps=8, num_stages=3, persistent=True, tma=True),
    hidden_gradient=Tile(128, 256, 64, num_warps=16, num_stages=4, tma=True),
    input_gradient=Tile(128, 256, 64, num_warps=8, num_stages=3, persistent=True, tma=True),
    up_weight_gradient=Tile(128, 256, 64, num_warps=8, num_stages=4, tma=True),
    down_weight_gradient=Tile(128, 256, 64, num_warps=8, num_stages=4, tma=True),
)
# For widths that leave much of a last tile of 128 columns empty, and for interleaved columns, of which wider tiles do
# not fit into shared memory.
_NARROW_UP = Tile(128, 64, 64, num_warps=8, num_stages=3, tma=True, max_registers=128)
# For the weight gradients of experts with few rows: two programs of a multiprocessor, one of which writes.
_SHORT_GRADIENT = Tile(128, 128, 64, num_warps=4, num_stages=3, tma=True)

# Any GPU with tensor cores and 100 KiB of shared memory (Ampere and newer, AMD): pointers, small tiles.
DEFAULT_TRAINING = TilePlan(
    rows_per_tile=128,
    gated_up=Tile(128, 64, 32, num_warps=8),
    down=Tile(128, 128, 32, num_warps=8),
    hidden_gradient=Tile(128, 64, 32, num_warps=4),
    input_gradient=Tile(128, 128, 32, num_warps=8),
    up_weight_gradient=Tile(128, 128, 32, num_warps=8),
    down_weight_gradient=Tile(128, 128, 32, num_warps=8),
)

_MIDDLE = Tile(64, 64, 32, num_warps=4)
FEW_ROWS = TilePlan(64, _MIDDLE, _MIDDLE, _MIDDLE, _MIDDLE, _MIDDLE, _MIDDLE)

_SMALL = Tile(16, 64, 64, num_warps=4)
_SMALL_GRADIENT = Tile(64, 64, 16, num_warps=4)
DECODING = TilePlan(16, _SMALL, _SMALL, _SMALL, _SMALL, _SMALL_GRADIENT, _SMALL_GRADIENT)

_SINGLE = Tile(64, 32, 32, num_warps=4, num_stages=2)
SINGLE_PRECISION = TilePlan(64, _SINGLE, _SINGLE, _SINGLE, _SINGLE, replace(_SINGLE, block_n=64), _SINGLE)


def tile_plan(
    num_slots: int, num_experts: int, width: int, dtype: torch.dtype, device: torch.device, interleaved: bool = False
) -> TilePlan:
    """The plan for n slots on E experts of width I, by what is known without looking at the routing.

    Few rows per expert waste tall tiles on padding, so the mean n / E chooses the rows per tile.
    """
    rows_per_expert = num_slots / num_experts
    if rows_per_expert < 24:
        return DECODING
    if dtype == torch.float32:
        return SINGLE_PRECISION
    if rows_per_expert < 96:
        return FEW_ROWS
    if gpu_generation(device) != "hopper":
        return DEFAULT_TRAINING
    return hopper_plan(rows_per_expert < 1536, interleaved or triton.cdiv(width, 128) * 128 > 1.05 * width)


@functools.cache
def hopper_plan(has_short_groups: bool, has_narrow_up: bool) -> TilePlan:
    """HOPPER_TRAINING with other tiles where it loses."""
    plan = replace(HOPPER_TRAINING, gated_up=_NARROW_UP) if has_narrow_up else HOPPER_TRAINING
    if not has_short_groups:
        return plan
    return replace(plan, up_weight_gradient=_SHORT_GRADIENT, down_weight_gradient=_SHORT_GRADIENT)


@functools.cache
def gpu_generation(device: torch.device) -> str:
    """ "hopper" for data-centre GPUs with tensor descriptors and 227 KiB of shared memory, else "other"."""
    if IS_INTERPRETED or device.type != "cuda" or torch.version.hip is not None:
        return "other"
    return "hopper" if torch.cuda.get_device_capability(device)[0] in (9, 10) else "other"


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 4 in Triton's interpreter, so that programs own several tiles there too."""
    return 4 if IS_INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def tile_source(tensor: Tensor, block_shape: list[int], use_tma: bool) -> Tensor | TensorDescriptor:
    """What a kernel receives for `tensor`: itself, or a descriptor that moves boxes of `block_shape`."""
    if not use_tma:
        return tensor
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block_shape)


def fits_tma(*tensors: Tensor) -> bool:
    """Whether descriptors can be made: addresses and all strides but the last in whole 16 bytes, last stride 1."""
    return all(
        tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )


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
def expert_product(
    rows, weight, row, expert, column, num_columns, depth, CONTRACT_LAST: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The (BLOCK_M, BLOCK_N) tile at (row, column) of rows times their expert's matrix, in float32."""
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, depth, BLOCK_K):
        left = load_matrix(rows, row, k, depth, depth, BLOCK_M, BLOCK_K, TMA)
        if CONTRACT_LAST:
            right = load_expert_matrix(weight, expert, column, k, num_columns, depth, BLOCK_N, BLOCK_K, TMA).T
        else:
            right = load_expert_matrix(weight, expert, k, column, depth, num_columns, BLOCK_K, BLOCK_N, TMA)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def store_expert_matrix(
    target, tile, expert, row, column, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Write the (ROWS, COLUMNS) tile at (row, column) of an expert's matrix in its dtype, up to its ends."""
    if TMA:
        target.store([expert, row, column], tile.to(target.dtype).reshape(1, ROWS, COLUMNS))
    else:
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        offset = (expert.to(tl.int64) * num_rows + rows[:, None]) * num_columns + columns[None, :]
        inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
        tl.store(target + offset, tile.to(target.dtype.element_ty), mask=inside)


def plain_grouped_product(
    rows: Tensor, weight: Tensor, table: RoutingTable, contract_last: bool, bias: Tensor | None = None
) -> Tensor:
    """The definition: rows (R, K), weight (E, N, K) if `contract_last` else (E, K, N), bias (E, N) -> (R, N).

    Rows past the last used group are 0 here and unspecified in `grouped_product`.
    """
    out = rows.new_zeros(rows.shape[0], weight.shape[1 if contract_last else 2])
    starts = table.group_start.tolist()
    for expert, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        matrix = weight[expert].T if contract_last else weight[expert]
        out[start:end] = rows[start:end] @ matrix
        if bias is not None:
            out[start:end] += bias[expert]
    return out


def grouped_product(
    rows: Tensor, weight: Tensor, table: RoutingTable, contract_last: bool, tile: Tile, bias: Tensor | None = None
) -> Tensor:
    """`plain_grouped_product` in one launch; all tensors contiguous, `tile.block_m` the table's rows per tile."""
    num_experts, first, second = weight.shape
    num_columns = first if contract_last else second
    out = torch.empty(rows.shape[0], num_columns, dtype=rows.dtype, device=rows.device)
    use_tma = tile.tma and fits_tma(rows, weight, out)
    box = [1, tile.block_n, tile.block_k] if contract_last else [1, tile.block_k, tile.block_n]
    num_row_tiles, num_column_tiles = table.expert_of_tile.shape[0], triton.cdiv(num_columns, tile.block_n)
    _grouped_product_kernel[tile.grid(num_row_tiles * num_column_tiles, rows.device)](
        tile_source(rows, [tile.block_m, tile.block_k], use_tma), tile_source(weight, box, use_tma),
        bias, tile_source(out, [tile.block_m, tile.block_n], use_tma), table.expert_of_tile, table.group_start,
        num_experts, num_columns, rows.shape[1], CONTRACT_LAST=contract_last, TMA=use_tma, PERSISTENT=tile.persistent,
        PRECISION=dot_precision(rows.dtype), **tile.launch_options(),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_experts"])
def _grouped_product_kernel(
    rows,  # (R, K)
    weight,  # (E, N, K) or (E, K, N)
    bias,  # (E, N) or None
    out,  # (R, N)
    expert_of_tile,  # (row tiles,) int32
    group_start,  # (E + 1,) int32
    num_experts, num_columns, depth, CONTRACT_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns one (BLOCK_M, BLOCK_N) tile of `out`, or, if persistent, every num_programs-th of them."""
    num_row_tiles = tl.load(group_start + num_experts) // BLOCK_M
    num_tiles = num_row_tiles * tl.cdiv(num_columns, BLOCK_N)
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
            _write_tile(
                tile, num_row_tiles, rows, weight, bias, out, expert_of_tile, num_columns, depth,
                CONTRACT_LAST, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, TMA, PRECISION,
            )  # fmt: skip
    elif tl.program_id(0) < num_tiles:
        _write_tile(
            tl.program_id(0), num_row_tiles, rows, weight, bias, out, expert_of_tile, num_columns, depth,
            CONTRACT_LAST, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, TMA, PRECISION,
        )  # fmt: skip


@triton.jit
def _write_tile(
    tile, num_row_tiles, rows, weight, bias, out, expert_of_tile, num_columns, depth,
    CONTRACT_LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute and write the tile-th (BLOCK_M, BLOCK_N) tile of `out`."""
    row_tile, column_tile = tile_position(tile, num_row_tiles, tl.cdiv(num_columns, BLOCK_N), GROUP)
    row, column = row_tile * BLOCK_M, column_tile * BLOCK_N
    expert = tl.load(expert_of_tile + row_tile)
    total = expert_product(
        rows, weight, row, expert, column, num_columns, depth, CONTRACT_LAST, BLOCK_M, BLOCK_N, BLOCK_K, TMA, PRECISION
    )
    if bias is not None:
        columns = column + tl.arange(0, BLOCK_N)
        added = tl.load(bias + expert.to(tl.int64) * num_columns + columns, mask=columns < num_columns, other=0.0)
        total += added.to(tl.float32)[None, :]
    store_matrix(out, total, row, column, num_columns, num_columns, BLOCK_M, BLOCK_N, TMA)


def plain_weight_gradient(left: Tensor, right: Tensor, table: RoutingTable) -> Tensor:
    """The definition: left (R, M), right (R, N) -> (E, M, N), left^T right over each expert's rows.

    Padding rows must be 0 on both sides. Experts without rows get zeros.
    """
    starts = table.group_start.tolist()
    pairs = zip(starts[:-1], starts[1:], strict=True)
    return torch.stack([left[start:end].T @ right[start:end] for start, end in pairs])


def weight_gradient(
    left: Tensor, right: Tensor, table: RoutingTable, tile: Tile, total: Tensor | None = None
) -> Tensor:
    """`plain_weight_gradient` in one launch; `tile.block_k` must divide the table's rows per tile.

    total: (E, M, N), to which it is added and which is returned.
    """
    num_experts, num_rows, num_columns = table.group_size.shape[0], left.shape[1], right.shape[1]
    shape = (num_experts, num_rows, num_columns)
    out = torch.empty(shape, dtype=left.dtype, device=left.device) if total is None else total
    use_tma = tile.tma and fits_tma(left, right, out)
    num_row_tiles, num_column_tiles = triton.cdiv(num_rows, tile.block_m), triton.cdiv(num_columns, tile.block_n)
    _weight_gradient_kernel[(num_experts * num_row_tiles * num_column_tiles,)](
        tile_source(left, [tile.block_k, tile.block_m], use_tma),
        tile_source(right, [tile.block_k, tile.block_n], use_tma),
        tile_source(out, [1, tile.block_m, tile.block_n], use_tma), table.group_start, table.group_size, num_rows,
        num_columns, ACCUMULATE=total is not None, TMA=use_tma, PRECISION=dot_precision(left.dtype),
        **tile.launch_options(),
    )  # fmt: skip
    return out


@triton.jit
def _weight_gradient_kernel(
    left,  # (R, M)
    right,  # (R, N)
    out,  # (E, M, N)
    group_start,  # (E + 1,) int32
    group_size,  # (E,) int32
    num_rows, num_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ACCUMULATE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns a (BLOCK_M, BLOCK_N) tile of one expert's matrix and walks over all rows of that expert, but
    for steps that are all padding.
    """
    num_row_tiles = tl.cdiv(num_rows, BLOCK_M)
    num_column_tiles = tl.cdiv(num_columns, BLOCK_N)
    tiles_per_expert = num_row_tiles * num_column_tiles
    expert = tl.program_id(0) // tiles_per_expert
    position = tl.program_id(0) % tiles_per_expert
    row_tile, column_tile = tile_position(position, num_row_tiles, num_column_tiles, GROUP)
    row, column = row_tile * BLOCK_M, column_tile * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first_row = tl.load(group_start + expert)
    for start in range(first_row, first_row + tl.load(group_size + expert), BLOCK_K):
        above = load_matrix(left, start, row, num_rows, num_rows, BLOCK_K, BLOCK_M, TMA)
        below = load_matrix(right, start, column, num_columns, num_columns, BLOCK_K, BLOCK_N, TMA)
        total = tl.dot(above.T, below, total, input_precision=PRECISION)
    if ACCUMULATE:
        before = load_expert_matrix(out, expert, row, column, num_rows, num_columns, BLOCK_M, BLOCK_N, TMA)
        total += before.to(tl.float32)
    store_expert_matrix(out, total, expert, row, column, num_rows, num_columns, BLOCK_M, BLOCK_N, TMA)


def plain_bias_gradient(rows: Tensor, table: RoutingTable, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The definition: rows (R, N), 0 in padding, and bias (E, N) where the rows are not yet weighted

    -> gradient of the bias (E, N), the sum of each expert's rows, or with `bias` of w times each; and with `bias` each
    row times its expert's bias, (1, R) float32: the bias' part of the gradient of w.
    """
    starts = table.group_start.tolist()
    scaled = rows if bias is None else rows * table.weight_of_row[:, None].to(rows.dtype)
    pairs = list(zip(starts[:-1], starts[1:], strict=True))
    total = torch.stack([scaled[start:end].sum(0) for start, end in pairs])
    if bias is None:
        return total, None
    partials = rows.new_zeros(1, rows.shape[0], dtype=torch.float32)
    for expert, (start, end) in enumerate(pairs):
        partials[0, start:end] = (rows[start:end] @ bias[expert]).float()
    return total, partials


def bias_gradient(
    rows: Tensor, table: RoutingTable, bias: Tensor | None = None, total: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`plain_bias_gradient` in one launch, with as many partials as there are column blocks.

    total: (E, N), to which the gradient is added and which is returned.
    """
    num_experts, (num_rows, num_columns) = table.group_size.shape[0], rows.shape
    out = torch.empty(num_experts, num_columns, dtype=rows.dtype, device=rows.device) if total is None else total
    num_blocks = triton.cdiv(num_columns, 128)
    partials = None
    if bias is not None:
        partials = torch.empty(num_blocks, num_rows, dtype=torch.float32, device=rows.device)
    _bias_gradient_kernel[(num_experts, num_blocks)](
        rows, table.weight_of_row, bias, out, partials, table.group_start, num_rows, num_columns,
        ACCUMULATE=total is not None, BLOCK_R=16, BLOCK_C=128, num_warps=4,
    )  # fmt: skip
    return out, partials


@triton.jit(do_not_specialize=["num_rows"])
def _bias_gradient_kernel(
    rows,  # (R, N)
    weight_of_row,  # (R,) float32
    bias,  # (E, N) or None
    out,  # (E, N)
    partials,  # (column blocks, R) float32 or None
    group_start,  # (E + 1,) int32
    num_rows, num_columns, ACCUMULATE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (E, column blocks). One program walks over all rows of one expert, BLOCK_R at a time."""
    expert, block = tl.program_id(0), tl.program_id(1)
    columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < num_columns
    of_expert = expert.to(tl.int64) * num_columns + columns
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(tl.load(group_start + expert), tl.load(group_start + expert + 1), BLOCK_R):
        lines = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        value = tl.load(rows + lines[:, None] * num_columns + columns[None, :], mask=inside[None, :], other=0.0)
        value = value.to(tl.float32)
        if bias is not None:
            factor = tl.load(bias + of_expert, mask=inside, other=0.0).to(tl.float32)
            tl.store(partials + block.to(tl.int64) * num_rows + lines, tl.sum(value * factor[None, :], axis=1))
            value *= tl.load(weight_of_row + lines)[:, None]
        total += value
    result = tl.sum(total, axis=0)
    if ACCUMULATE:
        result += tl.load(out + of_expert, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + of_expert, result.to(out.dtype.element_ty), mask=inside)
