"""Time the routed experts of one layer, forward and with backward, ours beside every other library that is installed.

python scripts/bench_experts.py --shapes granular switch --rounds 5 --output-dir runs/experts

All peers run in one process and take turns, round after round, beside dense products of the same FLOPs. How and what
is measured: docs/benchmarks/README.md. Writes experts.csv and experts.png, and prints the table last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.activations import ACT2FN

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.scripts import benchmark_tools as tools
from hf_moe_cpt.scripts.bench_experts_case import (
    DTYPES,
    ERROR_LIMITS,
    GRADIENTS,
    SHAPES,
    Case,
    Shape,
    chosen_shapes,
    exact_results,
    make_case,
    relative_error,
)
from hf_moe_cpt.scripts.bench_experts_peers import CEILING, PEERS, Calls
from hf_moe_cpt.scripts.quickstart_results import text_table


@dataclass
class ExpertsArguments:
    """What is measured, on what, and for how long."""

    shapes: list[str] | None = field(
        default=None,
        metadata={"help": f"Named shapes: {', '.join(SHAPES)}; all without this and --shape."},
    )
    shape: list[str] | None = field(
        default=None, metadata={"help": "Shapes of your own as name=T,H,I,E,K: tokens, hidden, width, experts, top-k."}
    )
    peers: list[str] | None = field(
        default=None, metadata={"help": f"What is compared: {', '.join(PEERS)}; all if not given."}
    )
    dtype: str = field(default="bfloat16", metadata={"help": f"Of weights and tokens: {', '.join(DTYPES)}."})
    activation: str = field(default="silu", metadata={"help": "Of the gate, as transformers names it."})
    skew: float = field(
        default=0.2, metadata={"help": "Power of the load's tilt: expert number r is drawn with weight r^-skew."}
    )
    rounds: int = field(default=5, metadata={"help": "How often each peer has its turn."})
    seconds: float = field(default=0.2, metadata={"help": "Time for one measurement of a turn; there are two."})
    check: bool = field(default=True, metadata={"help": "Compare results and gradients with float64 first."})
    check_tokens: int = field(default=512, metadata={"help": "Tokens of that comparison."})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda; auto takes cuda where there is one."})
    seed: int = field(default=0, metadata={"help": "Of the random inputs."})
    output_dir: str = field(default="runs/experts", metadata={"help": "Folder for experts.csv and experts.png."})
    commit: str | None = field(default=None, metadata={"help": "Written into the results in place of git's answer."})

    def __post_init__(self) -> None:
        tools.check_names("--peers", self.peers, PEERS)
        tools.check_names("--shapes", self.shapes, SHAPES)
        tools.check_names("--dtype", [self.dtype], DTYPES)
        tools.check_names("--activation", [self.activation], ACT2FN)
        for name, least in (("rounds", 1), ("check_tokens", 1), ("seconds", 0), ("skew", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least {least}.")
        self.chosen_shapes()

    def chosen_shapes(self) -> list[Shape]:
        """The named shapes, then the user's own; all named ones without either."""
        return chosen_shapes(self.shapes, self.shape, default=list(SHAPES))


@dataclass
class Measurement:
    """What is known of one peer at one shape; `reason` says why the rest is missing."""

    shape: Shape
    peer: str
    reason: str | None = None
    first_call_seconds: float | None = None
    extra_peak_mib: float | None = None
    errors: dict[str, float] = field(default_factory=dict)  # relative, of the output and each gradient
    forward_ms: list[float] = field(default_factory=list)  # one a round
    training_ms: list[float] = field(default_factory=list)


def measure_shape(shape: Shape, args: ExpertsArguments, stopwatch: tools.Stopwatch, bar: tqdm) -> list[Measurement]:
    """Prepare and check every peer, then let them take turns."""
    device = stopwatch.device
    names = args.peers or list(PEERS)
    measurements = {name: Measurement(shape, name) for name in names}
    with tools.Attempt() as inputs:
        case = make_case(shape, DTYPES[args.dtype], args.activation, args.skew, device, args.seed)
        exact = exact_results(case.first_tokens(args.check_tokens)) if args.check else None
    if inputs.reason is not None:
        bar.update(len(names) * (1 + args.rounds))
        return [dataclasses.replace(m, reason=f"inputs or reference: {inputs.reason}") for m in measurements.values()]
    calls: dict[str, Calls] = {}
    for name, measurement in measurements.items():
        bar.set_description(f"{shape.name} {name}")
        with tools.Attempt() as attempt:
            calls[name] = prepare(measurement, case, exact, args.check_tokens, stopwatch)
        measurement.reason = attempt.reason
        bar.write(_prepared(measurement))  # what a run that is killed leaves of an unfinished shape
        bar.update()
    exact = None
    with tools.Attempt():  # after an error that lasts the device refuses this too; the turns will say so
        tools.release_memory(device)
    for _ in range(args.rounds):
        for name, measurement in measurements.items():
            bar.set_description(f"{shape.name} {name}")
            if measurement.reason is None:
                with tools.Attempt() as attempt:
                    measurement.forward_ms.append(stopwatch.milliseconds(calls[name].forward, args.seconds))
                    measurement.training_ms.append(stopwatch.milliseconds(calls[name].training, args.seconds))
                measurement.reason = attempt.reason
            bar.update()
    return list(measurements.values())


def _prepared(measurement: Measurement) -> str:
    """One line on a peer that is ready, or why it is not."""
    if measurement.reason is not None:
        return f"{measurement.shape.name} {measurement.peer}: {measurement.reason}"
    facts = {"first call s": measurement.first_call_seconds, "extra MiB": measurement.extra_peak_mib}
    facts |= {f"error {name}": error for name, error in measurement.errors.items()}
    told = ", ".join(f"{name} {value:.2g}" for name, value in facts.items() if value is not None)
    return f"{measurement.shape.name} {measurement.peer}: {told}"


def prepare(
    measurement: Measurement,
    case: Case,
    exact: dict[str, torch.Tensor] | None,
    check_tokens: int,
    stopwatch: tools.Stopwatch,
) -> Calls:
    """Build a peer, time its first call, read its memory at the second, compare it with the exact results."""
    layer = PEERS[measurement.peer].build(case)
    calls = layer.calls(case)
    measurement.first_call_seconds = stopwatch.wall_seconds(calls.training)
    if calls.results is not None:
        measurement.extra_peak_mib = tools.extra_peak_mebibytes(calls.training, stopwatch.device)
        if exact is not None:
            _leave_nan_in_free_memory(stopwatch.device)
            results = layer.calls(case.first_tokens(check_tokens)).results()
            measurement.errors = {name: relative_error(results[name], exact[name]) for name in exact}
    return calls


def _leave_nan_in_free_memory(device: torch.device) -> None:
    """What a peer then allocates and forgets to write shows up in its results."""
    if device.type == "cuda":
        torch.full((tools.GIBIBYTE // 4,), float("nan"), device=device)


def status_of(measurement: Measurement, dtype: torch.dtype) -> str:
    """ "ok", "wrong" where an error is above the limit of the dtype, "failed" where there is a reason."""
    if measurement.reason is not None:
        return "failed"
    limit = ERROR_LIMITS[dtype]
    return "ok" if all(error <= limit for error in measurement.errors.values()) else "wrong"  # NaN is wrong


def result_row(
    measurement: Measurement, ceiling: Measurement | None, args: ExpertsArguments, facts: dict[str, str]
) -> dict[str, Any]:
    """One line of experts.csv. ceiling: the dense products at the same shape."""
    shape = measurement.shape
    row: dict[str, Any] = {"shape": shape.name, **{letter: getattr(shape, letter) for letter in "THIEK"}}
    row |= {
        "peer": measurement.peer,
        "status": status_of(measurement, DTYPES[args.dtype]),
        "reason": measurement.reason,
    }
    kinds = {
        "forward": (measurement.forward_ms, shape.forward_flops, ceiling and ceiling.forward_ms),
        "training": (measurement.training_ms, shape.training_flops, ceiling and ceiling.training_ms),
    }
    for kind, (times, flops, ceiling_times) in kinds.items():
        median = tools.middle(times)
        row |= {f"{kind}_ms": median, f"{kind}_ms_min": min(times, default=None)}
        row |= {f"{kind}_ms_max": max(times, default=None), f"{kind}_tflops": median and flops / median / 1e9}
        # Numbers of the same round only: the clock of a GPU drifts between rounds.
        row[f"{kind}_share_of_dense"] = tools.middle([d / t for d, t in zip(ceiling_times or (), times, strict=False)])
    row |= {"extra_peak_mib": measurement.extra_peak_mib, "first_call_seconds": measurement.first_call_seconds}
    row |= {f"error_{name}": measurement.errors.get(name) for name in ("out", *GRADIENTS)}
    row |= {name: getattr(args, name) for name in ("dtype", "activation", "skew", "rounds", "seconds", "seed")}
    return row | {"peer_version": PEERS[measurement.peer].version, **facts}


def table_rows(rows: Sequence[dict[str, Any]], measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """The results for a terminal; milliseconds with the range over rounds."""
    table = []
    for row, measurement in zip(rows, measurements, strict=True):
        errors = measurement.errors.values()
        worst = f"{max(errors):.1e}" if measurement.errors else None
        shares = [row[f"{kind}_share_of_dense"] for kind in ("forward", "training")]
        table.append(
            {
                "shape / peer": f"{row['shape']} {row['peer']}",
                "forward ms": tools.with_range(measurement.forward_ms, 3),
                "fwd+bwd ms": tools.with_range(measurement.training_ms, 3),
                "forward TFLOP/s": tools.rounded(row["forward_tflops"], 0),
                "fwd+bwd TFLOP/s": tools.rounded(row["training_tflops"], 0),
                "forward /dense": tools.rounded(shares[0], 2),
                "fwd+bwd /dense": tools.rounded(shares[1], 2),
                "extra MiB": tools.rounded(row["extra_peak_mib"], 0),
                "first s": tools.rounded(row["first_call_seconds"], 1),
                "worst error": worst,
                "status": row["status"],
            }
        )
    return table


def draw(path: Path, measurements: Sequence[Measurement], device: str) -> None:
    """TFLOP/s of every peer at every shape, forward and training; a line instead of a plot without matplotlib."""
    plot = tools.plotting(path)
    if plot is None:
        return
    shapes = list({m.shape.name: m.shape for m in measurements}.values())
    figure, panels = plot.subplots(2, 1, figsize=(max(8, 3 + 2.2 * len(shapes)), 8), sharex=True, layout="constrained")
    for axes, kind in zip(panels, ("forward", "training"), strict=True):
        bars: dict[str, dict[str, list[float]]] = {}
        for measurement in measurements:
            flops = getattr(measurement.shape, f"{kind}_flops")
            rates = [flops / milliseconds / 1e9 for milliseconds in getattr(measurement, f"{kind}_ms")]
            if rates:
                bars.setdefault(measurement.peer, {})[measurement.shape.name] = rates
        tools.grouped_bars(axes, [shape.name for shape in shapes], bars)
        axes.set_ylabel("TFLOP/s")
        axes.set_title("forward" if kind == "forward" else "forward and backward")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    figure.suptitle(f"Routed experts of one layer, {device}: median over rounds, whiskers least and most")
    figure.savefig(path, dpi=150)
    plot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure shape by shape; the results so far are on disk after each."""
    (args,) = parse_arguments(
        (ExpertsArguments,), argv, program="bench_experts.py", description=__doc__
    )
    device = tools.choose_device(args.device)
    facts, folder, shapes = tools.machine_facts(device, args.commit), Path(args.output_dir), args.chosen_shapes()
    folder.mkdir(parents=True, exist_ok=True)
    stopwatch = tools.Stopwatch(device)
    measurements: list[Measurement] = []
    rows: list[dict[str, Any]] = []
    total = len(shapes) * len(args.peers or PEERS) * (1 + args.rounds)
    with tqdm(total=total, unit="turn", dynamic_ncols=True) as bar:
        for shape in shapes:
            found = measure_shape(shape, args, stopwatch, bar)
            ceiling = next((m for m in found if m.peer == CEILING), None)
            measurements += found
            rows += [result_row(measurement, ceiling, args, facts) for measurement in found]
            tools.write_csv(folder / "experts.csv", rows)
            with tools.Attempt():
                tools.release_memory(device)
        bar.set_description("done")
    draw(folder / "experts.png", measurements, facts["device"])
    for row in rows:
        if row["status"] == "failed":
            print(f"{row['shape']} {row['peer']}: {row['reason']}")
    print(f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, {args.dtype}; files in {folder}\n")
    print(text_table(table_rows(rows, measurements)))


if __name__ == "__main__":
    run_script(main)
