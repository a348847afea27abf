"""Time whole training steps: forward, backward and optimizer, of one model beside others.

python scripts/benchmarks/step.py --runs dense-570m:fused pb-granular-2b:grouped_mm pb-granular-2b:fused:hf_moe_cpt

Random tokens and AdamW; our presets and stock models of the same size, one at a time, built on the device and freed. A
run is written `model:switch:switch`; a word that is no switch names an experts implementation. Writes step.csv and
prints the table last. How to read the numbers: docs/benchmarks/README.md. Source: ours.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.hf_argparser import HfArg
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.extras import require
from hf_moe_cpt.machine import (
    check_names,
    choose_device,
    machine_facts,
    package_version,
    release_memory,
)
from hf_moe_cpt.planning.plan import MODELS, STOCK, config_of
from hf_moe_cpt.reports import write_csv
from hf_moe_cpt.scripts.benchmarks import report as tools
from hf_moe_cpt.scripts.benchmarks.report import GIBIBYTE, Attempt, Unavailable, text_of


SWITCHES = {
    "fused": ("fused", True),
    "plain": ("fused", False),
    "compile": ("compile", True),
    "checkpointing": ("checkpointing", True),
}


@dataclass(frozen=True)
class StepRun:
    """One model and how it computes. experts: the experts implementation, "" in a dense model."""

    name: str
    model: str
    experts: str
    fused: bool
    compile: bool
    checkpointing: bool


def parse_run(text: str, default: StepRun) -> StepRun:
    """A run from `model:switch:switch`; what it does not say is as in `default`. Raises ValueError."""
    model, *words = text.split(":")
    if model not in MODELS:
        raise ValueError(f"--runs {text!r}: no model {model!r}; choose from {', '.join(MODELS)}.")
    run = replace(default, name=text, model=model)
    for word in words:
        if word in SWITCHES:
            run = replace(run, **dict([SWITCHES[word]]))
        else:
            check_experts(f"--runs {text!r}", word)
            run = replace(run, experts=word)
    is_dense = not getattr(config_of(model), "num_experts", getattr(config_of(model), "num_local_experts", 0))
    return replace(run, experts="") if is_dense else run


def check_experts(option: str, name: str) -> None:
    """Raise ValueError unless an experts implementation of this name could exist.

    Ours is checked when the run is made: where it is not registered the run fails and the others go on.
    """
    known = ["eager", *ALL_EXPERTS_FUNCTIONS.keys()]
    if name not in known and not name.startswith("hf_moe_cpt"):
        raise ValueError(
            f"{option}: {name!r} is neither a switch ({', '.join(SWITCHES)}) nor an experts implementation "
            f"({', '.join(known)})."
        )


def build_model(run: StepRun, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Fresh weights of one run on the device, ready to train."""
    if run.experts.startswith("hf_moe_cpt"):
        tools.check_registered(run.experts)
    experts = {"experts_implementation": run.experts} if run.experts else {}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config_of(run.model), dtype=dtype, attn_implementation="sdpa", **experts
        )
    model.train()
    if run.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if run.fused:
        fuse(model, device)
    return model


def fuse(model: PreTrainedModel, device: torch.device) -> None:
    """Our models: Liger's norms and rotation with our fused head. Others: what Liger does to them by default.

    Liger puts experts of its own into Mixtral, whatever the experts implementation.
    """
    if device.type != "cuda":
        raise Unavailable("fused kernels need a CUDA device")
    model_type = model.config.model_type
    if model_type == "cpt_moe":
        importlib.import_module("hf_moe_cpt.kernels.cross_entropy").apply_liger_kernel_to_cpt_moe(model=model)
        return
    require("liger_kernel", needed_by="fused")
    table = importlib.import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    if model_type not in table:
        raise Unavailable(f"Liger has no kernels for the model type {model_type}")
    table[model_type](model=model)


@contextmanager
def classes_kept(model: str) -> Iterator[None]:
    """Undo on leaving what Liger changed in the module of a stock model, for the sake of the runs after it."""
    if model not in STOCK:
        yield
        return
    model_type = config_of(model).model_type
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)


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
PRODUCT_SIDE = {"cuda": 8192, "cpu": 256}


@dataclass
class StepArguments(tools.BenchmarkArguments):
    """Which models take steps, and how; the switches hold for all runs that do not say otherwise."""

    runs: list[str] = HfArg(
        default_factory=lambda: list(DEFAULT_RUNS),
        help=f"Each as model:switch:switch; models: {', '.join(MODELS)}; switches: {', '.join(SWITCHES)}; any "
        "other word names an experts implementation. Times are also given as multiples of the first run's.",
    )
    batch_size: int = HfArg(default=16, help="Sequences of a step.")
    seq_length: int = HfArg(default=2048, help="Tokens of a sequence.")
    weights: str = HfArg(default="float32", help="float32: with bfloat16 autocast; bfloat16: everything in it.")
    experts_implementation: str = HfArg(default="grouped_mm", help="As for from_pretrained.")
    fused: bool = HfArg(
        default=False, help="Liger's layers with our fused head; stock models: what Liger does to them."
    )
    compile: bool = HfArg(default=False, help="torch.compile the model.")
    gradient_checkpointing: bool = HfArg(default=False, help="Recompute layers in the backward pass.")
    steps: int = HfArg(default=10, help="Timed steps of each run.")
    warmup: int = HfArg(default=3, help="Steps before them.")
    check_sync: bool = HfArg(default=False, help="Count how often the host waits for the device in one step.")
    seed: int = HfArg(default=0, help="Of weights and tokens.")
    output_dir: str = HfArg(default="runs/step", help="Folder for the results.")

    def __post_init__(self) -> None:
        check_names("--weights", [self.weights], WEIGHTS)
        self.check_least({"batch_size": 1, "seq_length": 2, "steps": 1, "warmup": 1})
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


def measure(measurement: StepMeasurement, args: StepArguments, device: torch.device, bar: tqdm) -> None:
    """Fill in one run; whatever it holds on the device dies with this call."""
    run, dtype = measurement.run, WEIGHTS[args.weights]
    torch.manual_seed(args.seed)
    model = build_model(run, dtype, device)
    measurement.parameters = model.num_parameters()
    if run.experts.startswith("hf_moe_cpt"):
        layers = [part for part in model.modules() if hasattr(part, "gate_up_proj") and hasattr(part, "has_gate")]
        tools.refuse_fallback(layers, device, torch.bfloat16)
    step = training_step(model, run, args, device)
    for _ in range(args.warmup):
        step()
        bar.update()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    times, loss = timed_steps(step, args.steps, device, bar)
    if device.type == "cuda":
        measurement.peak_gib = torch.cuda.max_memory_allocated(device) / GIBIBYTE
    measurement.product_tflops = product_tflops(device)
    measurement.loss = float(loss)
    if not math.isfinite(measurement.loss):
        raise FloatingPointError(f"the loss is {measurement.loss} after {args.warmup + args.steps} steps")
    measurement.step_ms = times
    if args.check_sync:
        measurement.host_syncs = count_host_syncs(step, device)


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
        "liger_kernel": package_version("liger-kernel"),
        **facts,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure run by run; the results so far are on disk after each."""
    (args,) = parse_arguments((StepArguments,), argv, program="step.py", description=__doc__)
    device = choose_device(args.device)
    facts, folder = machine_facts(device, args.commit), Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    measurements = [StepMeasurement(run) for run in args.chosen_runs()]
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(measurements) * (args.warmup + args.steps), unit="step", dynamic_ncols=True) as bar:
        for number, measurement in enumerate(measurements, start=1):
            bar.set_description(measurement.run.name)
            with classes_kept(measurement.run.model), Attempt() as attempt:
                measure(measurement, args, device, bar)
            measurement.reason = attempt.reason
            with Attempt():
                torch.compiler.reset()
                release_memory(device)
            bar.update(number * (args.warmup + args.steps) - bar.n)
            rows.append(result_row(measurement, measurements[0], args, facts))
            write_csv(folder / "step.csv", rows)
        bar.set_description("done")
    for row in rows:
        if row["reason"]:
            print(f"{row['run']}: {row['reason']}")
    print(
        f"\n{facts['device']}, torch {facts['torch']}, {args.batch_size} x {args.seq_length} tokens; files: {folder}\n"
    )
    print(text_of(folder / "step.csv"))


if __name__ == "__main__":
    run_script(main)
