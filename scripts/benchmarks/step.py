"""Time whole training steps: forward, backward and optimizer, of one model beside others and under several engines.

python scripts/benchmarks/step.py --runs dense-570m:fused pb-granular-2b:grouped_mm pb-granular-2b:fused:hf_moe_cpt
python scripts/benchmarks/step.py sharding --model pb-granular-570m --engines single fsdp2-1 ddp-2 fsdp2-2

The first: random tokens and AdamW; our presets and stock models of the same size, one at a time, built on the device
and freed. A run is written `model:switch:switch`; a word that is no switch names an experts implementation. Writes
step.csv and step.png (with --profile step_kernels.csv). How to read the numbers: docs/benchmarks/README.md.

The second: what sharding costs. An engine is written `name-ranks`. Every engine starts processes of its own, trains
the same fresh weights on the same random blocks with the same global batch, and reports time, peak memory of the
fullest rank, and the loss, which must agree. Writes sharding.csv. How to read the numbers: docs/scaling.md.

Both print the table last. Source: ours.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback
from transformers.hf_argparser import HfArg
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe_cpt.arguments import fsdp2_arguments, parse_arguments
from hf_moe_cpt.attempts import Attempt, Unavailable
from hf_moe_cpt.cli import run_program, run_script
from hf_moe_cpt.extras import require
from hf_moe_cpt.machine import (
    check_names,
    choose_device,
    leave_process_group,
    machine_facts,
    package_version,
    release_memory,
)
from hf_moe_cpt.planning.models import MODELS, STOCK, config_of
from hf_moe_cpt.reports.plots import grouped_bars, plotting
from hf_moe_cpt.reports.tables import text_table, write_csv
from hf_moe_cpt.scripts.benchmarks import harness as tools
from hf_moe_cpt.scripts.benchmarks.harness import GIBIBYTE, StepClock
from hf_moe_cpt.scripts.benchmarks.report import text_of
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer


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


CLASSES = {
    name: re.compile(pattern, re.IGNORECASE)
    for name, pattern in {
        "experts product": r"gated_up|gated_backward|grouped_product|weight_gradient|GroupProblemShape|grouped_?g?e?mm"
        r"|_fused_up_proj|_fused_down_proj|_moe_bwd|scatter2scatter|groupXtY",
        "experts order": r"permute_kernel|combine_kernel|gather_partials|block_histogram|block_offset|_scatter_kernel"
        r"|router_tail|sinkhorn|topk|_moe_router|token_gather|radixsort|bitonic|histc|kernelHistogram",
        "attention": r"flash|fmha|sdpa|scaled_dot_product|attention",
        "optimizer": r"multi_tensor|adam",
        "head and loss": r"cross_entropy|nll_loss|log_?softmax|softmax",
        "dense product": r"gemm|nvjet|cutlass|cublas|splitk|xmma|aten::(add|ba)?(b|d)?mm|aten::linear",
        "element-wise": r"elementwise|vectorized|reduce_kernel|norm|rope|rotary|copy|memcpy|memset|fill|index|cat"
        r"|embedding|triton_|silu|gelu|swiglu|geglu|scan|aten::(mul|add|sub|div|sum|mean|to|pow|neg|where|zeros)",
    }.items()
}
OTHER = "other"


def class_of(kernel: str) -> str:
    """The class of a kernel by its name."""
    return next((name for name, pattern in CLASSES.items() if pattern.search(kernel)), OTHER)


def profile_steps(step: Callable[[], Any], steps: int, device: torch.device) -> list[dict[str, Any]]:
    """Kernels of some steps, longest first: class, name, milliseconds and calls of one step, share of all kernels.

    On a CPU the operators of torch stand in for kernels.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    kernels = []
    for event in recorded.key_averages():
        if event.device_type != kind or getattr(event, "is_user_annotation", False):
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds > 0:
            kernels.append((event.key, microseconds / 1000 / steps, event.count / steps))
    total = sum(milliseconds for _, milliseconds, _ in kernels)
    return [
        {"class": class_of(name), "kernel": name, "ms": milliseconds, "calls": calls, "share": milliseconds / total}
        for name, milliseconds, calls in sorted(kernels, key=lambda kernel: -kernel[1])
    ]


def class_table(kernels_of_run: dict[str, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a run: milliseconds of a step in each class and in all kernels."""
    rows = []
    for run, kernels in kernels_of_run.items():
        spent = {name: 0.0 for name in (*CLASSES, OTHER)}
        for kernel in kernels:
            spent[kernel["class"]] += kernel["ms"]
        rows.append({"kernel ms of run": run, **{name: f"{ms:.2f}" for name, ms in spent.items()}})
        rows[-1]["all kernels"] = f"{sum(spent.values()):.2f}"
    return rows


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
    profile: bool = HfArg(default=False, help="Time the kernels of each run, by name and by class.")
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
    kernels: list[dict[str, Any]] = field(default_factory=list)


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
        "liger_kernel": package_version("liger-kernel"),
        **facts,
    }


def draw(path: Path, measurements: Sequence[StepMeasurement], args: StepArguments, device: str) -> None:
    """Tokens per second and peak memory of every run; a line instead of a plot without matplotlib."""
    plot = plotting(path)
    done = [measurement for measurement in measurements if measurement.step_ms]
    if plot is None or not done:
        return
    tokens = args.batch_size * args.seq_length
    names = [measurement.run.name.replace(":", "\n") for measurement in done]
    rates = {name: [1000 * tokens / ms for ms in m.step_ms] for name, m in zip(names, done, strict=True)}
    memory = {name: [m.peak_gib] for name, m in zip(names, done, strict=True) if m.peak_gib is not None}
    figure, panels = plot.subplots(2, 1, figsize=(max(8, 1.4 * len(done)), 8), sharex=True, layout="constrained")
    for axes, label, values in zip(panels, ("tokens per second", "peak GiB"), (rates, memory), strict=True):
        grouped_bars(axes, names, {label: values})
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
    write_csv(path, [{"run": run} | kernel for run, kernels in kernels_of_run.items() for kernel in kernels])
    for run, kernels in kernels_of_run.items():
        print(f"\nlongest kernels of {run}, ms of a step and share:")
        for kernel in kernels[:TOP_KERNELS]:
            print(f"  {kernel['ms']:8.3f}  {kernel['share']:6.1%}  {kernel['class']:<16}  {kernel['kernel'][:90]}")
    print(f"\n{text_table(class_table(kernels_of_run))}")


def models_main(argv: Sequence[str]) -> None:
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
    draw(folder / "step.png", measurements, args, facts["device"])
    show_profiles(measurements, folder / "step_kernels.csv")
    for row in rows:
        if row["reason"]:
            print(f"{row['run']}: {row['reason']}")
    print(
        f"\n{facts['device']}, torch {facts['torch']}, {args.batch_size} x {args.seq_length} tokens; files: {folder}\n"
    )
    print(text_of(folder / "step.csv"))


KINDS = ("single", "ddp", "fsdp2")
SEED = 0


@dataclass(frozen=True)
class ShardingJob:
    """What every rank of an engine does. rows: blocks of a rank in a step."""

    model: str
    kind: str
    device: str
    layers: int | None
    rows: int
    length: int
    warmup: int
    steps: int


def layer_class(model: str) -> str:
    """Name of the class whose modules are sharded one by one."""
    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(config_of(model)).model.layers[0]).__name__


def fresh_model(job: ShardingJob, device: torch.device) -> PreTrainedModel:
    """Fresh weights in float32, the same on every rank and under every engine."""
    config = config_of(job.model)
    if job.layers is not None:
        config.num_hidden_layers = job.layers
    torch.manual_seed(SEED)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def random_blocks(job: ShardingJob, ranks: int, vocab_size: int) -> Dataset:
    """Blocks for all steps of all ranks, in the order of the steps."""
    count = (job.warmup + job.steps) * job.rows * ranks
    tokens = torch.randint(0, vocab_size, (count, job.length), generator=torch.Generator().manual_seed(SEED))
    return Dataset.from_dict({"input_ids": tokens.tolist()})


def train(job: ShardingJob, layer: str, folder: str) -> dict[str, Any]:
    """Seconds of the steps, peak memory of the fullest rank in GiB (None on a CPU), losses of two steps."""
    on_gpu = job.device == "cuda"
    args = CPTConfig(
        output_dir=folder,
        max_steps=job.warmup + job.steps,
        per_device_train_batch_size=job.rows,
        max_length=job.length,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="no",
        eval_on_start=False,
        report_to="none",
        disable_tqdm=True,
        starting_phase="scratch",
        **(fsdp2_arguments(layer) if job.kind == "fsdp2" else {}),
    )
    model = fresh_model(job, args.device)
    clock = StepClock(args.device, job.warmup)
    blocks = random_blocks(job, args.world_size, model.config.vocab_size)
    trainer = CPTTrainer(model, args, blocks, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = torch.tensor(torch.cuda.max_memory_allocated() / GIBIBYTE if on_gpu else 0.0, device=args.device)
    if dist.is_initialized():
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return {
        "seconds": clock.seconds,
        "peak GiB": peak.item() if on_gpu else None,
        "first loss": losses[0],
        "last loss": losses[-1],
    }


def rank_main(argv: Sequence[str]) -> None:
    """One rank of one engine: do what the word, JSON, asks for, and let the first rank report."""
    asked = json.loads(argv[0])
    layer, folder = asked.pop("layer"), asked.pop("folder")
    report = train(ShardingJob(**asked), layer, folder)
    if not dist.is_initialized() or dist.get_rank() == 0:
        (Path(folder) / "report.json").write_text(json.dumps(report), encoding="utf-8")
    if dist.is_initialized():
        leave_process_group()


@dataclass
class ShardingArguments(tools.BenchmarkArguments):
    """What is timed and for how long."""

    model: str = HfArg(default="pb-granular-tiny", help=f"Any of: {', '.join(MODELS)}.")
    engines: list[str] = HfArg(
        default_factory=lambda: ["single", "fsdp2-1"],
        help=f"Engines as name-ranks; names: {', '.join(KINDS)}. single is one process without any.",
    )
    layers: int | None = HfArg(default=None, help="Layers of the model; its own if unset.")
    rows: int = HfArg(default=16, help="Blocks of an optimizer step, shared out over the ranks.")
    length: int = HfArg(default=2048, help="Tokens of a block.")
    steps: int = HfArg(default=20, help="Timed steps.")
    warmup: int = HfArg(default=5, help="Steps before them.")
    timeout: float = HfArg(default=600.0, help="Seconds that one engine may take.")
    output_dir: str = HfArg(default="runs/bench_sharding", help="Folder of sharding.csv.")


def sharding_main(argv: Sequence[str]) -> None:
    """Time every engine that can run here; write and print the rows."""
    (args,) = parse_arguments((ShardingArguments,), argv, program="step.py sharding", description=__doc__)
    jobs = make_jobs(args)
    rows = []
    for name, (job, ranks) in tqdm(jobs.items(), unit="engine"):
        with Attempt() as attempt:
            rows.append({"engine": name, "ranks": ranks, **run_engine(job, ranks, args.timeout), "status": "ok"})
        if attempt.reason is not None:
            rows.append({"engine": name, "ranks": ranks, "status": attempt.reason})
    facts = machine_facts(choose_device(args.device), args.commit)
    settings = {"model": args.model, "layers": args.layers, "rows": args.rows, "length": args.length}
    path = Path(args.output_dir) / "sharding.csv"
    write_csv(path, [row | settings | facts for row in rows])
    for row in rows:
        if row["status"] != "ok":
            print(f"{row['engine']}: {row['status']}")
    work = f"{args.model}, {args.rows} blocks of {args.length} tokens a step"
    print(f"\n{facts['device']}, torch {facts['torch']}: {work}\n")
    print(text_of(path))


def make_jobs(args: ShardingArguments) -> dict[str, tuple[ShardingJob, int]]:
    """A job and its number of ranks by engine. Raises ValueError for what cannot be run, before anything is."""
    check_names("--model", [args.model], MODELS)
    device = choose_device(args.device).type
    jobs = {}
    for name in args.engines:
        kind, _, ranks = name.partition("-")
        if (
            kind not in KINDS
            or not (ranks or "1").isdigit()
            or int(ranks or 1) < 1
            or (kind == "single") == bool(ranks)
        ):
            raise ValueError(
                f"--engines {name!r}: write single, or one of {', '.join(KINDS[1:])} with its ranks: fsdp2-2."
            )
        count = int(ranks or 1)
        if args.rows % count:
            raise ValueError(f"--rows {args.rows} do not fall evenly to the {count} ranks of {name}.")
        sizes = (args.layers, args.rows // count, args.length, args.warmup, args.steps)
        jobs[name] = ShardingJob(args.model, kind, device, *sizes), count
    return jobs


def run_engine(job: ShardingJob, ranks: int, timeout: float) -> dict[str, Any]:
    """What the first rank reports. Raises RuntimeError with the last line of what the processes said if they fail."""
    with tempfile.TemporaryDirectory() as folder:
        asked = json.dumps(asdict(job) | {"folder": folder, "layer": layer_class(job.model)})
        program = ["-m", "hf_moe_cpt.scripts.benchmarks.step", "rank", asked]
        start = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            if job.kind != "single"
            else []
        )
        try:
            done = subprocess.run([sys.executable, *start, *program], capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"it had not ended after {timeout:g} seconds: raise --timeout") from None
        report = Path(folder) / "report.json"
        if done.returncode or not report.exists():
            lines = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines() or [""]
            raise RuntimeError(f"exit code {done.returncode}: {lines[-1].strip()}")
        found = json.loads(report.read_text(encoding="utf-8"))
    seconds = found.pop("seconds")
    return {
        "step ms": 1000 * statistics.median(seconds),
        "least ms": 1000 * min(seconds),
        "most ms": 1000 * max(seconds),
        **found,
    }


PROGRAMS = {"models": models_main, "sharding": sharding_main, "rank": rank_main}


def main(argv: Sequence[str] | None = None) -> None:
    """The program that the first word names, `models` without one; `rank` is what `sharding` starts."""
    run_program(PROGRAMS, argv)


if __name__ == "__main__":
    run_script(main)
