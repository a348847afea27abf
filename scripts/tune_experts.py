"""Find the tile shapes of the expert kernels on the GPU at hand: every product of a layer with every candidate.

python scripts/tune_experts.py --shapes granular switch olmoe --output-dir runs/tiles

Candidates are compiled by many processes at once, then timed in turns, round after round, beside one dense product,
because a hot GPU is slower than a cool one. Writes tiles.csv and prints the table last: what is best for a generation
and shape class belongs into hf_moe_cpt/kernels/tiles.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.kernels.gated_backward import gated_backward
from hf_moe_cpt.kernels.gated_up import gated_up
from hf_moe_cpt.kernels.grouped_product import grouped_product
from hf_moe_cpt.kernels.permutation import permute_tokens
from hf_moe_cpt.kernels.routing_table import routing_table
from hf_moe_cpt.kernels.tiles import Tile
from hf_moe_cpt.kernels.weight_gradient import weight_gradient
from hf_moe_cpt.scripts import benchmark_tools as tools
from hf_moe_cpt.scripts.bench_experts_case import DTYPES, SHAPES, Shape, chosen_shapes, make_case
from hf_moe_cpt.scripts.quickstart_results import text_table


# As transformers names what the kernels call by shorter names.
ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
PIECES = ("gated_up", "down", "hidden_gradient", "input_gradient", "up_weight_gradient", "down_weight_gradient")

_WIDE = [
    Tile(128, 256, 64, num_warps=8, num_stages=3, persistent=True, tma=True),
    Tile(128, 256, 64, num_warps=8, num_stages=3, tma=True),
    Tile(128, 128, 64, num_warps=4, num_stages=3, tma=True),
    Tile(128, 128, 64, num_warps=8, num_stages=3, tma=True, max_registers=128),
    Tile(128, 128, 64, num_warps=8, num_stages=4, persistent=True, tma=True),
    Tile(128, 128, 32, num_warps=8, num_stages=3),
]
CANDIDATES: dict[str, list[Tile]] = {
    "gated_up": [
        Tile(128, 128, 64, num_warps=8, num_stages=3, persistent=True, tma=True),
        Tile(128, 64, 64, num_warps=8, num_stages=3, tma=True, max_registers=128),
        Tile(128, 64, 64, num_warps=4, num_stages=3, tma=True),
        Tile(128, 64, 64, num_warps=8, num_stages=4, persistent=True, tma=True),
        Tile(128, 64, 32, num_warps=8, num_stages=3),
    ],
    "down": _WIDE,
    "hidden_gradient": [
        Tile(128, 256, 64, num_warps=8, num_stages=4, tma=True),
        Tile(128, 256, 64, num_warps=8, num_stages=3, tma=True),
        Tile(128, 128, 64, num_warps=8, num_stages=3, tma=True, max_registers=128),
        Tile(128, 128, 64, num_warps=4, num_stages=3, tma=True),
        Tile(128, 128, 64, num_warps=8, num_stages=4, tma=True),
        Tile(128, 64, 32, num_warps=4, num_stages=3),
    ],
    "input_gradient": _WIDE,
    "up_weight_gradient": [
        Tile(128, 128, 64, num_warps=4, num_stages=3, tma=True),
        Tile(128, 256, 64, num_warps=8, num_stages=4, tma=True),
        Tile(256, 128, 64, num_warps=8, num_stages=4, tma=True),
        Tile(128, 128, 64, num_warps=8, num_stages=3, tma=True, max_registers=128),
        Tile(128, 128, 32, num_warps=8, num_stages=3),
    ],
}
CANDIDATES["down_weight_gradient"] = CANDIDATES["up_weight_gradient"]


@dataclass
class TuneArguments:
    """What is tuned, and for how long."""

    shapes: list[str] | None = field(
        default=None, metadata={"help": f"Named shapes: {', '.join(SHAPES)}; granular, switch, olmoe if not given."}
    )
    shape: list[str] | None = field(default=None, metadata={"help": "Shapes of your own as name=T,H,I,E,K."})
    pieces: list[str] | None = field(
        default=None, metadata={"help": f"Products, all by default: {', '.join(PIECES)}."}
    )
    groups: list[int] = field(
        default_factory=lambda: [8], metadata={"help": "Row tiles walked together; each is tried with each candidate."}
    )
    dtype: str = field(default="bfloat16", metadata={"help": f"Of weights and tokens: {', '.join(DTYPES)}."})
    activation: str = field(default="silu", metadata={"help": "silu, gelu, gelu_tanh or relu."})
    rounds: int = field(default=5, metadata={"help": "How often each candidate has its turn."})
    seconds: float = field(default=0.02, metadata={"help": "Time for one turn."})
    workers: int = field(default=0, metadata={"help": "Processes that compile; 0 takes one for each core."})
    device: str = field(default="auto", metadata={"help": "auto, cpu (the interpreter, to try the script), cuda."})
    seed: int = field(default=0, metadata={"help": "Of the random inputs."})
    output_dir: str = field(default="runs/tiles", metadata={"help": "Folder for tiles.csv."})

    def __post_init__(self) -> None:
        tools.check_names("--shapes", self.shapes, SHAPES)
        tools.check_names("--pieces", self.pieces, PIECES)
        tools.check_names("--dtype", [self.dtype], DTYPES)
        tools.check_names("--activation", [self.activation], ACTIVATION_NAMES)
        if self.rounds < 1 or any(group < 1 for group in self.groups):
            raise ValueError(f"--rounds {self.rounds} and --groups {self.groups} must be at least 1.")
        self.chosen_shapes()

    def chosen_shapes(self) -> list[Shape]:
        """The named shapes, then the user's own; three of the named without either."""
        return chosen_shapes(self.shapes, self.shape, default=["granular", "switch", "olmoe"])

    def candidates(self, piece: str) -> list[Tile]:
        """Every tile of the piece with every group size."""
        tiles = itertools.product(CANDIDATES[piece], self.groups)
        return [dataclasses.replace(tile, group=group) for tile, group in tiles]


def pieces_of(shape: Shape, args: TuneArguments, device: torch.device) -> dict[str, Callable[[Tile], Any]]:
    """The products of one layer, each as a call of its tile; their inputs lie ready, routed at random."""
    case = make_case(shape, DTYPES[args.dtype], ACTIVATION_NAMES[args.activation], 0.2, device, args.seed)
    table = routing_table(case.index, case.gates, shape.E, block_m=128)
    rows = permute_tokens(case.tokens, table)
    tile = Tile(128, 64, 32, num_warps=8)
    hidden, preactivation = gated_up(rows, case.gate_up, table, args.activation, save=True, tile=tile)
    return {
        "gated_up": lambda tile: gated_up(rows, case.gate_up, table, args.activation, save=True, tile=tile),
        "down": lambda tile: grouped_product(hidden, case.down, table, contract_last=True, tile=tile),
        "hidden_gradient": lambda tile: gated_backward(rows, case.down, preactivation, table, args.activation, tile),
        "input_gradient": lambda tile: grouped_product(
            preactivation, case.gate_up, table, contract_last=False, tile=tile
        ),
        "up_weight_gradient": lambda tile: weight_gradient(preactivation, rows, table, tile),
        "down_weight_gradient": lambda tile: weight_gradient(rows, hidden, table, tile),
    }


def flops_of(piece: str, shape: Shape) -> int:
    """Of one product: 2 x (token, expert) pairs x hidden size x width, twice that for the two halves."""
    single = 2 * shape.rows * shape.H * shape.I
    return single * (2 if piece in ("gated_up", "input_gradient", "up_weight_gradient") else 1)


def compile_candidates(args: TuneArguments, device: torch.device) -> None:
    """Fill Triton's cache on disk: each process compiles every n-th candidate, for all shapes."""
    jobs = [(piece, tile) for piece in args.pieces or PIECES for tile in args.candidates(piece)]
    workers = min(args.workers or os.cpu_count() or 1, len(jobs))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        shares = [jobs[number::workers] for number in range(workers)]
        list(pool.map(_compile_share, shares, [args] * workers, [device] * workers))


def _compile_share(jobs: Sequence[tuple[str, Tile]], args: TuneArguments, device: torch.device) -> None:
    for shape in args.chosen_shapes():
        small = dataclasses.replace(shape, T=256)
        pieces = pieces_of(small, args, device)
        for piece, tile in jobs:
            with tools.Attempt():  # the same error comes again, and is reported, when the candidate is timed
                pieces[piece](tile)


def tune_shape(shape: Shape, args: TuneArguments, device: torch.device, progress: tqdm) -> list[dict[str, Any]]:
    """A row for each candidate of each piece, fastest first within a piece."""
    pieces = pieces_of(shape, args, device)
    watch = tools.Stopwatch(device)
    times: dict[tuple[str, Tile], list[float]] = {}
    reasons: dict[tuple[str, Tile], str] = {}
    dense = _dense_product(shape, DTYPES[args.dtype], device)
    for _ in range(args.rounds):
        times.setdefault(("dense", None), []).append(watch.milliseconds(dense, args.seconds))
        for piece in args.pieces or PIECES:
            for tile in args.candidates(piece):
                progress.update()
                if (piece, tile) in reasons:
                    continue
                with tools.Attempt() as attempt:
                    elapsed = watch.milliseconds(lambda run=pieces[piece], tile=tile: run(tile), args.seconds)
                    times.setdefault((piece, tile), []).append(elapsed)
                if attempt.reason is not None:
                    reasons[piece, tile] = attempt.reason
    rows = [_row(shape, piece, tile, values) for (piece, tile), values in times.items()]
    rows += [_row(shape, piece, tile, [], reason) for (piece, tile), reason in reasons.items()]
    order = ["dense", *PIECES]
    return sorted(rows, key=lambda row: (order.index(row["piece"]), row["ms"] or float("inf")))


def _dense_product(shape: Shape, dtype: torch.dtype, device: torch.device) -> Callable[[], torch.Tensor]:
    """One dense product with the FLOPs of the up projection: what the machine gives at this temperature."""
    left = torch.randn(shape.rows, shape.H, dtype=dtype, device=device)
    right = torch.randn(2 * shape.I, shape.H, dtype=dtype, device=device)
    return lambda: left @ right.T


def _row(shape: Shape, piece: str, tile: Tile | None, times: list[float], reason: str = "") -> dict[str, Any]:
    milliseconds = statistics.median(times) if times else None
    flops = flops_of("gated_up" if piece == "dense" else piece, shape)
    return {
        "shape": shape.name,
        "piece": piece,
        "tile": "" if tile is None else _text_of(tile),
        "ms": milliseconds,
        "TFLOP/s": flops / milliseconds / 1e9 if milliseconds else None,
        "reason": reason,
    }


def _text_of(tile: Tile) -> str:
    """ "128x256x64 8 warps 3 stages" and what else differs from the default."""
    marks = [
        f"{tile.block_m}x{tile.block_n}x{tile.block_k} {tile.num_warps} warps {tile.num_stages} stages",
        "persistent" if tile.persistent else "",
        "TMA" if tile.tma else "",
        f"group {tile.group}" if tile.group != 8 else "",
        f"{tile.max_registers} registers" if tile.max_registers else "",
    ]
    return " ".join(filter(None, marks))


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, compile, time, write and print."""
    (args,) = parse_arguments(
        (TuneArguments,), argv, program="tune_experts", description="Find the fastest tiles of the expert kernels."
    )
    device = tools.choose_device(args.device)
    shapes = args.chosen_shapes()
    if device.type == "cuda":
        seconds = tools.Stopwatch(device).wall_seconds(lambda: compile_candidates(args, device))
        print(f"compiled every candidate in {seconds:.0f} s")
    num_turns = sum(len(args.candidates(piece)) for piece in args.pieces or PIECES) * args.rounds * len(shapes)
    rows = []
    with tqdm(total=num_turns, desc="timing", unit="turn", mininterval=2) as progress:
        for shape in shapes:
            rows += tune_shape(shape, args, device, progress)
            tools.release_memory(device)
    facts = tools.machine_facts(device, commit=None)
    path = Path(args.output_dir) / "tiles.csv"
    tools.write_csv(path, [{**row, **facts} for row in rows])
    print(text_table([{**row, "ms": row["ms"] and round(row["ms"], 3)} for row in rows]))
    print(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}; written to {path}")


if __name__ == "__main__":
    run_script(main)
