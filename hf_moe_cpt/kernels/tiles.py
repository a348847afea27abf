"""Tile shapes of the grouped products: a small table, with a sane default for the rest.

Key: GPU generation, kernel, shape class. `python scripts/tune_experts.py` measures candidates on the GPU at hand.
Nothing is tuned at run time: the first call of a shape only compiles. Source: the Hopper entries were the fastest on
an H200, or within 3 % of it, at three shapes (docs/benchmarks/); the others are sane, not timed.
"""

import functools
from dataclasses import dataclass, replace

import torch
import triton


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
