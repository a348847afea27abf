"""Time whole training steps: forward, backward and AdamW of our presets and of stock models of the same size.

python scripts/bench_step.py --runs dense-570m:fused pb-granular-2b:grouped_mm pb-granular-2b:fused:hf_moe_cpt

Random tokens; one model at a time, built on the device and freed. How to read the numbers:
docs/benchmarks/README.md. Writes step.csv and step.png (with --profile step_kernels.csv), and prints the table last.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.scripts import benchmark_tools as tools
from hf_moe_cpt.scripts.bench_step_models import (
    MODELS,
    SWITCHES,
    StepRun,
    build_model,
    check_experts,
    classes_kept,
    our_experts_fall_back,
    parse_run,
)
from hf_moe_cpt.scripts.bench_step_profile import class_table, profile_steps
from hf_moe_cpt.scripts.quickstart_results import text_table


DEFAULT_RUNS = (
    "dense-570m",
    "dense-570m:fused",
    "llama-570m",
    "llama-570m:fused",
    "pb-granular-2b:grouped_mm",
    "pb-granular-2b:fused:hf_moe_cpt",
    "sb-granular-2b:fused:hf_moe_cpt",
    "qwen2-moe-granular-2b:grouped_mm",
    "qwen2-moe-granular-2b:hf_moe_cpt",
    "pb-switch-2b:grouped_mm",
    "pb-switch-2b:fused:hf_moe_cpt",
    "sb-switch-2b:fused:hf_moe_cpt",
    "mixtral-switch-2b:grouped_mm",
    "mixtral-switch-2b:fused",
)
WEIGHTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUM_BATCHES = 4
PROFILED_STEPS = 3
PRODUCT_SIDE = {"cuda": 8192, "cpu": 256}
TOP_KERNELS = 8


@dataclass
class StepArguments:
    """Which models take steps, and how; the switches hold for all runs that do not say otherwise."""

    runs: list[str] = field(
        default_factory=lambda: list(DEFAULT_RUNS),
        metadata={
            "help": f"Each as model:switch:switch; models: {', '.join(MODELS)}; switches: {', '.join(SWITCHES)}; any "
            "other word names an experts implementation. Times are also given as multiples of the first run's."
        },
    )
    batch_size: int = field(default=16, metadata={"help": "Sequences of a step."})
    seq_length: int = field(default=2048, metadata={"help": "Tokens of a sequence."})
    weights: str = field(
        default="float32", metadata={"help": "float32: with bfloat16 autocast; bfloat16: everything in it."}
    )
    experts_implementation: str = field(default="grouped_mm", metadata={"help": "As for from_pretrained."})
    fused: bool = field(
        default=False, metadata={"help": "Liger's layers with our fused head; stock models: what Liger does to them."}
    )
    compile: bool = field(default=False, metadata={"help": "torch.compile the model."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute layers in the backward pass."})
    steps: int = field(default=10, metadata={"help": "Timed steps of each run."})
    warmup: int = field(default=3, metadata={"help": "Steps before them."})
    check_sync: bool = field(
        default=False, metadata={"help": "Count how often the host waits for the device in one step."}
    )
    profile: bool = field(default=False, metadata={"help": "Time the kernels of each run, by name and by class."})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda; auto takes cuda where there is one."})
    seed: int = field(default=0, metadata={"help": "Of weights and tokens."})
    output_dir: str = field(default="runs/step", metadata={"help": "Folder for the results."})
    commit: str | None = field(default=None, metadata={"help": "Written into the results in place of git's answer."})

    def __post_init__(self) -> None:
        tools.check_names("--weights", [self.weights], WEIGHTS)
        for name, least in (("batch_size", 1), ("seq_length", 2), ("steps", 1), ("warmup", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least {least}.")
        check_experts("--experts_implementation", self.experts_implementation)
        names = [run.name for run in self.chosen_runs()]
        if len(set(names)) < len(names):
            raise ValueError(f"--runs {' '.join(names)} names a run twice.")

    def chosen_runs(self) -> list[StepRun]:
        """The runs, in order."""
        default = StepRun("", "", self.experts_implementation, self.fused, self.compile, self.gradient_checkpointing)
        return [parse_run(text, default) for text in self.runs]


@dataclass
class StepMeasurement:
    """What is known of one run; `reason` says why the rest is missing."""

    run: StepRun
    reason: str | None = None
    parameters: int | None = None
    step_ms: list[float] = field(default_factory=list)
    peak_gib: float | None = None
    loss: float | None = None  # after the timed steps, in nats per token, penalties included
    host_syncs: int | None = None
    product_tflops: float | None = None  # of a large dense product right after the steps: how warm the device was
    kernels: list[dict[str, Any]] = field(default_factory=list)


def measure(measurement: StepMeasurement, args: StepArguments, device: torch.device, bar: tqdm) -> None:
    """Fill in one run; whatever it holds on the device dies with this call."""
    run, dtype = measurement.run, WEIGHTS[args.weights]
    torch.manual_seed(args.seed)
    model = build_model(run, dtype, device)
    measurement.parameters = model.num_parameters()
    if run.experts.startswith("hf_moe_cpt"):
        reason = our_experts_fall_back(model, torch.bfloat16, device)
        if reason is not None:
            raise tools.Unavailable(f"our experts would fall back to grouped_mm: {reason}")
    step = training_step(model, run, args, device)
    for _ in range(args.warmup):
        step()
        bar.update()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    times, loss = timed_steps(step, args.steps, device, bar)
    if device.type == "cuda":
        measurement.peak_gib = torch.cuda.max_memory_allocated(device) / tools.GIBIBYTE
    measurement.product_tflops = product_tflops(device)
    measurement.loss = float(loss)
    if not math.isfinite(measurement.loss):
        raise FloatingPointError(f"the loss is {measurement.loss} after {args.warmup + args.steps} steps")
    measurement.step_ms = times
    if args.check_sync:
        measurement.host_syncs = count_host_syncs(step, device)
    if args.profile:
        measurement.kernels = profile_steps(step, PROFILED_STEPS, device)


def training_step(
    model: torch.nn.Module, run: StepRun, args: StepArguments, device: torch.device
) -> Callable[[], torch.Tensor]:
    """A function that makes one optimizer step on the next batch of random tokens and returns the loss."""
    generator = torch.Generator(device=device).manual_seed(args.seed)
    size = (NUM_BATCHES, args.batch_size, args.seq_length)
    batches = torch.randint(model.config.vocab_size, size, generator=generator, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    compute = torch.compile(model) if run.compile else model
    is_mixed = WEIGHTS[args.weights] == torch.float32
    number = 0

    def step() -> torch.Tensor:
        nonlocal number
        tokens = batches[number % NUM_BATCHES]
        number += 1
        mixed = torch.autocast(device.type, torch.bfloat16) if is_mixed else contextlib.nullcontext()
        with mixed:
            loss = compute(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def timed_steps(
    step: Callable[[], torch.Tensor], steps: int, device: torch.device, bar: tqdm
) -> tuple[list[float], torch.Tensor]:
    """Milliseconds of each step, from its beginning to the beginning of the next, and the last loss.

    The steps follow one another without a wait, as in training.
    """
    if device.type != "cuda":
        stopwatch, losses, times = tools.Stopwatch(device), [], []
        for _ in range(steps):
            times.append(1000 * stopwatch.wall_seconds(lambda: losses.append(step())))
            bar.update()
        return times, losses[-1]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        loss = step()
        mark.record()
        bar.update()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in zip(marks, marks[1:], strict=False)], loss


def count_host_syncs(step: Callable[[], torch.Tensor], device: torch.device) -> int | None:
    """How often torch made the host wait for the device in one step; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def product_tflops(device: torch.device) -> float:
    """Rate of a large square bfloat16 product at this moment."""
    side = PRODUCT_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times, _ = timed_steps(lambda: left @ right, 10, device, tqdm(disable=True))
    return 2 * side**3 / tools.middle(times) / 1e9


def result_row(
    measurement: StepMeasurement, baseline: StepMeasurement, args: StepArguments, facts: dict[str, str]
) -> dict[str, Any]:
    """One line of step.csv."""
    run, times = measurement.run, measurement.step_ms
    median, baseline_ms = tools.middle(times), tools.middle(baseline.step_ms)
    return {
        "run": run.name,
        "status": "ok" if measurement.reason is None else "failed",
        "reason": measurement.reason,
        **{name: getattr(run, name) for name in ("model", "experts", "fused", "compile", "checkpointing")},
        "parameters": measurement.parameters,
        "step_ms": median,
        "step_ms_min": min(times, default=None),
        "step_ms_max": max(times, default=None),
        "tokens_per_second": median and 1000 * args.batch_size * args.seq_length / median,
        "times_first_run": median / baseline_ms if median and baseline_ms else None,
        "peak_gib": measurement.peak_gib,
        "loss": measurement.loss,
        "host_syncs": measurement.host_syncs,
        "product_tflops": measurement.product_tflops,
        **{name: getattr(args, name) for name in ("batch_size", "seq_length", "weights", "steps", "seed")},
        "liger_kernel": tools.package_version("liger-kernel"),
        **facts,
    }


def table_rows(rows: Sequence[dict[str, Any]], measurements: Sequence[StepMeasurement]) -> list[dict[str, Any]]:
    """The results for a terminal."""
    return [
        {
            "run": row["run"],
            "step ms": tools.with_range(measurement.step_ms, 1),
            "tokens/s": row["tokens_per_second"] and round(row["tokens_per_second"]),
            "x first run": tools.rounded(row["times_first_run"], 2),
            "peak GiB": tools.rounded(row["peak_gib"], 1),
            "loss": tools.rounded(row["loss"], 3),
            "host syncs": row["host_syncs"],
            "product TFLOP/s": tools.rounded(row["product_tflops"], 0),
            "status": row["status"],
        }
        for row, measurement in zip(rows, measurements, strict=True)
    ]


def draw(path: Path, measurements: Sequence[StepMeasurement], args: StepArguments, device: str) -> None:
    """Tokens per second and peak memory of every run; a line instead of a plot without matplotlib."""
    plot = tools.plotting(path)
    done = [measurement for measurement in measurements if measurement.step_ms]
    if plot is None or not done:
        return
    tokens = args.batch_size * args.seq_length
    names = [measurement.run.name.replace(":", "\n") for measurement in done]
    rates = {name: [1000 * tokens / ms for ms in m.step_ms] for name, m in zip(names, done, strict=True)}
    memory = {name: [m.peak_gib] for name, m in zip(names, done, strict=True) if m.peak_gib is not None}
    figure, panels = plot.subplots(2, 1, figsize=(max(8, 1.4 * len(done)), 8), sharex=True, layout="constrained")
    for axes, label, values in zip(panels, ("tokens per second", "peak GiB"), (rates, memory), strict=True):
        tools.grouped_bars(axes, names, {label: values})
        axes.set_ylabel(label)
    panels[1].tick_params(axis="x", labelsize="small")
    figure.suptitle(
        f"Training step, {args.batch_size} x {args.seq_length} tokens, {args.weights} weights, {device}: median, "
        "whiskers least and most"
    )
    figure.savefig(path, dpi=150)
    plot.close(figure)


def show_profiles(measurements: Sequence[StepMeasurement], path: Path) -> None:
    """Write all kernels as CSV; print the longest of each run and the classes of all."""
    kernels_of_run = {m.run.name: m.kernels for m in measurements if m.kernels}
    if not kernels_of_run:
        return
    tools.write_csv(path, [{"run": run} | kernel for run, kernels in kernels_of_run.items() for kernel in kernels])
    for run, kernels in kernels_of_run.items():
        print(f"\nlongest kernels of {run}, ms of a step and share:")
        for kernel in kernels[:TOP_KERNELS]:
            print(f"  {kernel['ms']:8.3f}  {kernel['share']:6.1%}  {kernel['class']:<16}  {kernel['kernel'][:90]}")
    print(f"\n{text_table(class_table(kernels_of_run))}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure run by run; the results so far are on disk after each."""
    (args,) = parse_arguments((StepArguments,), argv, program="bench_step.py", description=__doc__)
    device = tools.choose_device(args.device)
    facts, folder = tools.machine_facts(device, args.commit), Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    measurements = [StepMeasurement(run) for run in args.chosen_runs()]
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(measurements) * (args.warmup + args.steps), unit="step", dynamic_ncols=True) as bar:
        for number, measurement in enumerate(measurements, start=1):
            bar.set_description(measurement.run.name)
            with classes_kept(measurement.run.model), tools.Attempt() as attempt:
                measure(measurement, args, device, bar)
            measurement.reason = attempt.reason
            with tools.Attempt():
                torch.compiler.reset()
                tools.release_memory(device)
            bar.update(number * (args.warmup + args.steps) - bar.n)
            rows.append(result_row(measurement, measurements[0], args, facts))
            tools.write_csv(folder / "step.csv", rows)
        bar.set_description("done")
    draw(folder / "step.png", measurements, args, facts["device"])
    show_profiles(measurements, folder / "step_kernels.csv")
    for row in rows:
        if row["reason"]:
            print(f"{row['run']}: {row['reason']}")
    print(
        f"\n{facts['device']}, torch {facts['torch']}, {args.batch_size} x {args.seq_length} tokens; files: {folder}\n"
    )
    print(text_table(table_rows(rows, measurements)))


if __name__ == "__main__":
    run_script(main)
