"""The products of the expert layer over rows sorted by expert: what they compute, their tiles, their kernels.

R rows sorted by expert in padded groups (see `routing`), E experts, H hidden size, I width, w a row's gate weight.

grouped product   every row times the matrix of its expert: down projection, gradient of the up projection's input
gated up          up projection with the gated activation act(gate) * up in its epilogue: gate and up columns of one
                  tile come out of one product twice as wide, so both halves meet in registers
gated backward    of down projection and activation in one product. With h = act(gate) * up, y' the gradient of the
                  layer's output at a row and h' = y' W_down, the gradient of w is the sum over I of h' h (a partial
                  sum per column tile, see `gather_partials`), of gate w h' up act'(gate), of up w h' act(gate); the
                  gradient of W_down is made from w h
weight gradient   per expert, the transposed rows on one side times the rows on the other

A matrix is read either through a tensor descriptor, which the copy engine of Hopper and later GPUs serves (TMA), or
through pointers, which works everywhere; the two differ in nothing else. Rows are never masked. Columns past the end
read 0 and are not written. Everything in an epilogue is in float32.

Tile shapes are a small table with a sane default for the rest. Nothing is tuned at run time: the first call of a
shape only compiles. `python scripts/benchmarks/experts.py` measures candidates on the GPU at hand; the Hopper entries
were the fastest on an H200, or within 3 % of it, at three shapes (docs/benchmarks/), the others are sane, not timed.

Source: ours. Activations: GELU, arXiv 1606.08415 (exact form by erf, and the tanh form); GLU, arXiv 2002.05202.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
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
    gated_up=Tile(128, 64, 64, num_warps=8, num_stages=3, tma=True, max_registers=128),
    down=Tile(128, 256, 64, num_warps=8, num_stages=3, persistent=True, tma=True),
    hidden_gradient=Tile(128, 256, 64, num_warps=8, num_stages=3, tma=True),
    input_gradient=Tile(128, 256, 64, num_warps=8, num_stages=3, persistent=True, tma=True),
    up_weight_gradient=Tile(128, 256, 64, num_warps=8, num_stages=4, tma=True),
    down_weight_gradient=Tile(128, 256, 64, num_warps=8, num_stages=4, tma=True),
)

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


def tile_plan(num_slots: int, num_experts: int, dtype: torch.dtype, device: torch.device) -> TilePlan:
    """The plan for n slots on E experts, by what is known without looking at the routing.

    Few rows per expert waste tall tiles on padding, so the mean n / E chooses the rows per tile.
    """
    rows_per_expert = num_slots / num_experts
    if rows_per_expert < 24:
        return DECODING
    if dtype == torch.float32:
        return SINGLE_PRECISION
    if rows_per_expert < 96:
        return FEW_ROWS
    return HOPPER_TRAINING if gpu_generation(device) == "hopper" else DEFAULT_TRAINING


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
        tile_source(rows, [tile.block_m, tile.block_k], use_tma), tile_source(weight, box, use_tma),
        tile_source(out, [tile.block_m, tile.block_n], use_tma), table.expert_of_tile, table.group_start, num_experts,
        num_columns, rows.shape[1], CONTRACT_LAST=contract_last, TMA=use_tma, PERSISTENT=tile.persistent,
        PRECISION=dot_precision(rows.dtype), **tile.launch_options(),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_experts"])
def _grouped_product_kernel(
    rows,  # (R, K)
    weight,  # (E, N, K) or (E, K, N)
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


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x) for a float32 tile; ACTIVATION is a key of ACTIVATIONS."""
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        y = x * _tanh_gate(x)
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def activate_with_derivative(x, ACTIVATION: tl.constexpr):
    """act(x) and act'(x) for a float32 tile; the derivative of ReLU at 0 is 0, as in PyTorch."""
    if ACTIVATION == "silu":
        gate = tl.sigmoid(x)
        y = x * gate
        slope = gate * (1.0 + x * (1.0 - gate))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        y = x * cdf
        slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        gate = _tanh_gate(x)
        y = x * gate
        slope = gate + y * (1.0 - gate) * (1.5957691216057308 + 0.2140644488 * x * x)
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.maximum(x, 0.0)
        slope = tl.where(x > 0.0, 1.0, 0.0)
    return y, slope


@triton.jit
def _tanh_gate(x):
    """(1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, written as a sigmoid of twice the argument."""
    return tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


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
        tile_source(rows, [tile.block_m, tile.block_k], use_tma), tile_source(halves, box, use_tma),
        tile_source(hidden, [tile.block_m, tile.block_n], use_tma),
        tile_source(saved_halves, saved_box, use_tma) if save else hidden, table.expert_of_tile, table.group_start,
        num_experts, width, hidden_size, ACTIVATION=activation, SAVE=save, TMA=use_tma, PERSISTENT=tile.persistent,
        PRECISION=dot_precision(rows.dtype), **tile.launch_options(),
    )  # fmt: skip
    return hidden, preactivation


@triton.jit(do_not_specialize=["num_experts"])
def _gated_up_kernel(
    rows,  # (R, H)
    gate_up,  # (E, 2, I, H)
    hidden,  # (R, I)
    preactivation,  # (R, 2, I)
    expert_of_tile,  # (row tiles,) int32
    group_start,  # (E + 1,) int32
    num_experts, width, hidden_size, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program owns a (BLOCK_M, BLOCK_N) tile of `hidden` and the two of `preactivation` that it is made from; if
    persistent, every num_programs-th of them.
    """
    num_row_tiles = tl.load(group_start + num_experts) // BLOCK_M
    num_tiles = num_row_tiles * tl.cdiv(width, BLOCK_N)
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
            _write_gated_tile(
                tile, num_row_tiles, rows, gate_up, hidden, preactivation, expert_of_tile, width, hidden_size,
                ACTIVATION, SAVE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, TMA, PRECISION,
            )  # fmt: skip
    elif tl.program_id(0) < num_tiles:
        _write_gated_tile(
            tl.program_id(0), num_row_tiles, rows, gate_up, hidden, preactivation, expert_of_tile, width, hidden_size,
            ACTIVATION, SAVE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, TMA, PRECISION,
        )  # fmt: skip


@triton.jit
def _write_gated_tile(
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
        tile_source(down, [1, tile.block_k, tile.block_n], use_tma), preactivation, table.weight_of_row,
        grad_preactivation, weighted, partials, table.expert_of_tile, table.group_start, num_experts, width,
        hidden_size, grad_rows.shape[0], ACTIVATION=activation,
        CHUNKS=min(4, max(1, tile.block_m * tile.block_n // (1024 * tile.num_warps))), TMA=use_tma,
        PRECISION=dot_precision(grad_rows.dtype), **tile.launch_options(),
    )  # fmt: skip
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
    num_experts, width, hidden_size, num_rows, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr, GROUP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
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


def plain_weight_gradient(left: Tensor, right: Tensor, table: RoutingTable) -> Tensor:
    """The definition: left (R, M), right (R, N) -> (E, M, N), left^T right over each expert's rows.

    Padding rows must be 0 on both sides. Experts without rows get zeros.
    """
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
        tile_source(out, [1, tile.block_m, tile.block_n], use_tma), table.group_start, num_rows, num_columns,
        TMA=use_tma, PRECISION=dot_precision(left.dtype), **tile.launch_options(),
    )  # fmt: skip
    return out


@triton.jit
def _weight_gradient_kernel(
    left,  # (R, M)
    right,  # (R, N)
    out,  # (E, M, N)
    group_start,  # (E + 1,) int32
    num_rows, num_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
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
