"""Time and memory of a training step of RainbowPO beside TRL's DPO, with the same model on the same batches.

python scripts/bench_preference.py --model llama-570m --dtype mixed --batch_size 8 --length 1024 --output_dir runs/pref

All contenders live in one process and take turns, a step each, round after round; memory is taken before, each
contender in a process of its own. Writes preference.csv and preference_ratios.csv and prints the table last. How and
what is measured: docs/benchmarks/README.md.
"""

from __future__ import annotations

import math
import multiprocessing
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
from hf_moe_cpt.scripts import benchmark_tools as tools
from hf_moe_cpt.scripts.bench_preference_contenders import (
    CONTENDERS,
    DTYPES,
    Steps,
    Workload,
    check_model,
    chosen_contenders,
    workload_facts,
)
from hf_moe_cpt.scripts.bench_preference_memory import peak_mebibytes
from hf_moe_cpt.scripts.bench_step_models import MODELS
from hf_moe_cpt.scripts.quickstart_results import text_table


@dataclass
class PreferenceArguments:
    """What steps, on what, and how often."""

    model: str = field(
        default="llama-tiny",
        metadata={"help": f"Random weights of {', '.join(MODELS)}; or the folder or Hub id of a causal LM."},
    )
    overrides: str | None = field(
        default=None,
        metadata={
            "help": "Fields to change in a model named above, as JSON: '{\"num_hidden_layers\": 2}'; the others stay."
        },
    )
    contenders: list[str] | None = field(
        default=None, metadata={"help": f"Who steps: {', '.join(CONTENDERS)}; all if not given."}
    )
    batch_size: int = field(default=2, metadata={"help": "Pairs of a step; the model sees twice as many sequences."})
    length: int = field(default=128, metadata={"help": "Tokens of the longest sequence, a quarter of them prompt."})
    dtype: str = field(
        default="float32", metadata={"help": f"{', '.join(DTYPES)}; mixed: float32 weights, bfloat16 autocast."}
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute layers in the backward pass, as DPOConfig does by default."},
    )
    lora_rank: int = field(
        default=0, metadata={"help": "Train adapters of this rank on all linear layers; 0 trains all weights."}
    )
    rounds: int = field(default=20, metadata={"help": "Timed rounds; in each, every contender makes one step."})
    warmup: int = field(default=3, metadata={"help": "Rounds before them."})
    logging_steps: int = field(
        default=10, metadata={"help": "A step's share of a log is 1 / this; 10 is the default of DPOConfig."}
    )
    memory_steps: int = field(default=3, metadata={"help": "Steps whose peak memory is taken; 0 leaves memory out."})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda; auto takes cuda where there is one."})
    seed: int = field(default=0, metadata={"help": "Of weights and tokens."})
    output_dir: str = field(default="runs/preference", metadata={"help": "Folder for the results."})
    commit: str | None = field(default=None, metadata={"help": "Written into the results in place of git's answer."})

    def __post_init__(self) -> None:
        tools.check_names("--dtype", [self.dtype], DTYPES)
        chosen_contenders(self.contenders)
        least_of = {"batch_size": 1, "length": 8, "rounds": 1, "warmup": 1, "logging_steps": 1, "memory_steps": 0}
        least_of["lora_rank"] = 0
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least {least}.")

    def workload(self, device: torch.device) -> Workload:
        """What is the same for all contenders."""
        names = ("model", "overrides", "dtype", "batch_size", "length", "gradient_checkpointing", "seed", "lora_rank")
        return Workload(**{name: getattr(self, name) for name in names}, device=device.type)


@dataclass
class Measurement:
    """What is known of one contender; `reason` says why the rest is missing. Times are those of the timed rounds."""

    contender: str
    reason: str | None = None
    memory_reason: str | None = None
    parameters: int | None = None
    peak_mib: float | None = None
    loss: float | None = None  # of the first step
    step_ms: list[float] = field(default_factory=list)
    log_ms: list[float] = field(default_factory=list)

    def totals(self, logging_steps: int) -> list[float]:
        """Milliseconds of each round's step and its share of a log."""
        return [step + log / logging_steps for step, log in zip(self.step_ms, self.log_ms, strict=True)]


@dataclass(frozen=True)
class Comparison:
    """Who is measured by whom, and the most that the ratio of time and of memory should be; None: no such bar."""

    contender: str
    baseline: str
    time_bar: float | None
    memory_bar: float | None


COMPARISONS = (
    Comparison("rainbowpo", "sigmoid_norm", time_bar=1.03, memory_bar=1.03),
    Comparison("rainbowpo-no-reference", "sigmoid", time_bar=0.75, memory_bar=None),
)


def take_memory(
    measurements: Sequence[Measurement],
    workload: Workload,
    num_steps: int,
    bar: tqdm,
    peak: Callable[[str, Any, int], float] = peak_mebibytes,
) -> None:
    """Fill in `peak_mib`, each in a fresh process, so that neither caches nor leftovers of another count."""
    for measurement in measurements:
        bar.set_description(f"memory of {measurement.contender}")
        with tools.Attempt() as attempt:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                future = pool.submit(peak, measurement.contender, workload, num_steps)
                measurement.peak_mib = future.result()
        measurement.memory_reason = attempt.reason
        bar.update()


def take_times(
    measurements: Sequence[Measurement],
    args: PreferenceArguments,
    workload: Workload,
    bar: tqdm,
    make: Callable[[str, Any], Steps] = Steps,
) -> None:
    """Fill in the times of every contender: a step each a round, and each round another one begins."""
    device = torch.device(workload.device)
    stopwatch = tools.Stopwatch(device)
    ready: list[tuple[Measurement, Steps]] = []
    for measurement in measurements:
        bar.set_description(f"building {measurement.contender}")
        with tools.Attempt() as attempt:
            steps = make(measurement.contender, workload)
            measurement.parameters = steps.trainer.model.num_parameters()
            ready.append((measurement, steps))
        measurement.reason = attempt.reason
        bar.update()
    for number in range(args.warmup + args.rounds):
        bar.set_description("warming up" if number < args.warmup else "rounds")
        first = number % max(1, len(ready))
        for measurement, steps in ready[first:] + ready[:first]:
            if measurement.reason is None:
                with tools.Attempt() as attempt:
                    _take_turn(measurement, steps, stopwatch, counts=number >= args.warmup)
                measurement.reason = attempt.reason
        bar.update()


def _take_turn(measurement: Measurement, steps: Steps, stopwatch: tools.Stopwatch, counts: bool) -> None:
    step_ms = 1000 * stopwatch.wall_seconds(steps.step)
    if measurement.loss is None:
        measurement.loss = float(steps.loss)
    log_ms = 1000 * stopwatch.wall_seconds(steps.log)
    if not math.isfinite(float(steps.loss)):
        raise FloatingPointError(f"the loss is {float(steps.loss)} after {steps.num_done} steps")
    if counts:
        measurement.step_ms.append(step_ms)
        measurement.log_ms.append(log_ms)


def result_row(measurement: Measurement, args: PreferenceArguments, facts: dict[str, Any]) -> dict[str, Any]:
    """One line of preference.csv."""
    totals = measurement.totals(args.logging_steps)
    return {
        "contender": measurement.contender,
        "status": "ok" if measurement.reason is None else "failed",
        "reason": measurement.reason or measurement.memory_reason,
        "parameters": measurement.parameters,
        "total_ms": tools.middle(totals),
        "total_ms_min": min(totals, default=None),
        "total_ms_max": max(totals, default=None),
        "step_ms": tools.middle(measurement.step_ms),
        "log_ms": tools.middle(measurement.log_ms),
        "peak_mib": measurement.peak_mib,
        "first_loss": measurement.loss,
        **{name: getattr(args, name) for name in ("rounds", "logging_steps")},
        **facts,
    }


def ratio_rows(
    measurements: Sequence[Measurement],
    args: PreferenceArguments,
    facts: dict[str, Any],
    comparisons: Sequence[Comparison] = COMPARISONS,
) -> list[dict[str, Any]]:
    """The lines of preference_ratios.csv: for each comparison time, taken in each round, and memory."""
    found, rows = {m.contender: m for m in measurements if m.reason is None}, []
    for comparison in comparisons:
        if comparison.contender not in found or comparison.baseline not in found:
            continue
        ours, theirs = found[comparison.contender], found[comparison.baseline]
        pairs = zip(ours.totals(args.logging_steps), theirs.totals(args.logging_steps), strict=True)
        of_memory = [ours.peak_mib / theirs.peak_mib] if ours.peak_mib and theirs.peak_mib else []
        measured = {
            "time": ([mine / yours for mine, yours in pairs], comparison.time_bar),
            "memory": (of_memory, comparison.memory_bar),
        }
        for quantity, (ratios, bar) in measured.items():
            if ratios:
                names = {"contender": comparison.contender, "baseline": comparison.baseline, "quantity": quantity}
                rows.append(names | _spread(ratios) | {"bar": bar, "verdict": _verdict(ratios, bar)} | facts)
    return rows


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, range."""
    lower, _, upper = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
    ends = {"least": min(ratios), "most": max(ratios)}
    return {"ratio": statistics.median(ratios), "lower_quartile": lower, "upper_quartile": upper} | ends


def _verdict(ratios: Sequence[float], bar: float | None) -> str | None:
    """Whether the median is at most the bar."""
    return None if bar is None else "met" if statistics.median(ratios) <= bar else "missed"


def contender_table(measurements: Sequence[Measurement], args: PreferenceArguments) -> list[dict[str, Any]]:
    """The contenders for a terminal."""
    return [
        {
            "contender": measurement.contender,
            "step and log ms": tools.with_range(measurement.totals(args.logging_steps), 1),
            "log ms": tools.rounded(tools.middle(measurement.log_ms), 2),
            "peak MiB": tools.rounded(measurement.peak_mib, 0),
            "first loss": tools.rounded(measurement.loss, 4),
            "status": "ok" if measurement.reason is None else "failed",
        }
        for measurement in measurements
    ]


def ratio_table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratios for a terminal."""
    return [
        {
            "comparison": f"{row['contender']} / {row['baseline']}",
            "of": row["quantity"],
            "ratio": f"{row['ratio']:.3f}",
            "quartiles": f"{row['lower_quartile']:.3f}-{row['upper_quartile']:.3f}",
            "bar": tools.rounded(row["bar"], 2),
            "verdict": row["verdict"],
        }
        for row in rows
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure memory, then time; write after each."""
    (args,) = parse_arguments(
        (PreferenceArguments,), argv, program="bench_preference.py", description=__doc__
    )
    device = tools.choose_device(args.device)
    workload, folder = args.workload(device), Path(args.output_dir)
    check_model(workload)
    machine = tools.machine_facts(device, args.commit)
    facts = workload_facts(workload) | machine
    folder.mkdir(parents=True, exist_ok=True)
    measurements = [Measurement(name) for name in chosen_contenders(args.contenders)]

    def write() -> list[dict[str, Any]]:
        tools.write_csv(folder / "preference.csv", [result_row(m, args, facts) for m in measurements])
        ratios = ratio_rows(measurements, args, facts)
        tools.write_csv(folder / "preference_ratios.csv", ratios)
        return ratios

    turns = len(measurements) * (2 if args.memory_steps else 1) + args.warmup + args.rounds
    with tqdm(total=turns, unit="turn", dynamic_ncols=True) as bar:
        if args.memory_steps:
            take_memory(measurements, workload, args.memory_steps, bar)
            write()
        take_times(measurements, args, workload, bar)
        bar.set_description("done")
    ratios = write()
    for measurement in measurements:
        if measurement.reason or measurement.memory_reason:
            print(f"{measurement.contender}: {measurement.reason or measurement.memory_reason}")
    print(
        f"\n{machine['device']}, torch {machine['torch']}, {args.model}, {args.dtype}, {args.batch_size} pairs of "
        f"{args.length} tokens, {args.rounds} rounds; files: {folder}\n"
    )
    print(text_table(contender_table(measurements, args)))
    if ratios:
        print(f"\n{text_table(ratio_table(ratios))}")


if __name__ == "__main__":
    run_script(main)
