"""What routing analysis costs, and what watching the routers costs a training step.

python scripts/benchmarks/routing.py --tokens 10000000 --layers 24 --experts 31 --top_k 3
python scripts/benchmarks/routing.py --parts collecting --model pb-granular-2b --batch_size 16 --length 2048
python scripts/benchmarks/routing.py --parts monitor --model pb-granular-570m --device cuda --batches 20 --rounds 4

Traces of random routing (popular tokens and experts as in text) are written, then analysed in a process of its own,
whose time and largest resident memory count. Collecting and the bare forward pass take turns on the same batches;
a ratio is taken within each round, and decides nothing if its quartiles lie on both sides of the bar.
Bars: ten million tokens in 2 minutes and 2 GiB on 2 cores; 1.1 times the forward pass. Writes routing.csv.

monitor: the same steps with and without RouterMonitorCallback, in turns. Two figures. The relation of the median
steps: the whole truth, but blurred by whatever else the machine does. And the share of a step that the host spends
inside the monitor's hooks, whose bar is 1 %: exact on the CPU, where hooks do their work themselves, and on a GPU the
time to launch it. Source: ours.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.machine import check_names, choose_device, machine_facts, synchronize
from hf_moe_cpt.planning.plan import MODELS, config_of
from hf_moe_cpt.reports import write_csv
from hf_moe_cpt.routing.compare import analyse_traces
from hf_moe_cpt.routing.trace import RoutingTrace, TraceDescription, TraceLayer, TraceWriter, collect_routing
from hf_moe_cpt.scripts.benchmarks.report import GIBIBYTE, BenchmarkArguments, StepClock
from hf_moe_cpt.trainers.common.router_monitor import RouterMonitorCallback


PARTS = ("analysis", "collecting", "monitor")
SECONDS_BAR, GIBIBYTES_BAR, RATIO_BAR, MONITOR_BAR = 120.0, 2.0, 1.1, 0.01
WARM_UP_STEPS = 3  # of each turn of the monitor, not counted
TOKENS_PER_SHARD = 1 << 18


@dataclass
class RoutingArguments(BenchmarkArguments):
    """Sizes of the trace and of the pass."""

    parts: list[str] = HfArg(default_factory=lambda: list(PARTS[:2]), help=f"Of {', '.join(PARTS)}.")
    tokens: int = HfArg(default=10_000_000, help="Tokens of each checkpoint's trace.")
    checkpoints: int = HfArg(default=2, help="Traces that are compared.")
    domains: int = HfArg(default=3, help="Domains of a trace, of equal size.")
    layers: int = HfArg(default=24, help="MoE layers of the trace; the defaults are the paper's model.")
    experts: int = HfArg(default=31, help="Routed experts of a layer.")
    top_k: int = HfArg(default=3, help="Experts of a token.")
    vocabulary: int = HfArg(default=128_256, help="Token ids.")
    workers: int = HfArg(default=2, help="Threads of the analysis.")
    model: str = HfArg(default="pb-granular-tiny", help=f"Who is listened to: {', '.join(MODELS)}.")
    batch_size: int = HfArg(default=8, help="Sequences of a batch.")
    length: int = HfArg(default=128, help="Tokens of a sequence.")
    rounds: int = HfArg(default=20, help="Timed turns of each, after one that does not count.")
    batches: int = HfArg(default=8, help="Batches, or steps, of a turn.")
    dtype: str = HfArg(default="float32", help="Of the weights: float32, bfloat16.")
    output_dir: str = HfArg(default="runs/routing", help="Folder for the results.")

    def __post_init__(self) -> None:
        check_names("--parts", self.parts, PARTS)
        check_names("--model", [self.model], MODELS)
        check_names("--dtype", [self.dtype], ("float32", "bfloat16"))
        positive = ("tokens", "checkpoints", "domains", "layers", "workers", "batch_size", "batches")
        self.check_least(dict.fromkeys(positive, 1))
        if self.rounds < 2:
            raise ValueError(f"--rounds {self.rounds} must be at least 2: quartiles need them.")
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"--top_k {self.top_k} must lie in [1, --experts {self.experts}].")


def write_synthetic_trace(folder: Path, args: RoutingArguments, seed: int) -> None:
    """A trace whose ids follow Zipf's law, and whose experts depend on the id in two of three tokens."""
    layers = tuple(TraceLayer(f"layer.{at}", args.experts, args.top_k) for at in range(args.layers))
    writer = TraceWriter(folder, TraceDescription(f"seed {seed}", None, layers, args.vocabulary, None, True, {}))
    writer.begin()
    number = 0
    for domain in range(args.domains):
        left = args.tokens * (domain + 1) // args.domains - args.tokens * domain // args.domains
        while left:
            size = min(left, TOKENS_PER_SHARD)
            writer.write(number, f"domain {domain}", _synthetic_shard(args, size, number, seed))
            number, left = number + 1, left - size
    writer.finish(number)


def _synthetic_shard(args: RoutingArguments, size: int, number: int, seed: int) -> dict[str, np.ndarray]:
    text = np.random.default_rng(number)  # the same text in every checkpoint
    ids = (text.zipf(1.2, size) % args.vocabulary).astype(np.int32)
    arrays = {"token_ids": ids, "next_token_ids": np.append(ids[1:], np.int32(-1))}
    random = np.random.default_rng((seed, number))
    kind = np.uint8 if args.experts <= 256 else np.uint16
    for layer in range(args.layers):
        first = np.where(random.random(size) < 0.67, ids * 7919 + layer, random.integers(0, 1 << 30, size))
        step = 1 + random.integers(0, max(1, (args.experts - 1) // args.top_k), size)
        places = first[:, None] + step[:, None] * np.arange(args.top_k)  # distinct: K steps stay below E
        gates = np.sort(random.random((size, args.top_k)).astype(np.float16) / args.top_k, axis=1)[:, ::-1]
        arrays[f"layer_{layer:03d}.experts"] = (places % args.experts).astype(kind)
        arrays[f"layer_{layer:03d}.probabilities"] = gates
        arrays[f"layer_{layer:03d}.entropy"] = random.random(size).astype(np.float16)
    return arrays


def _analyse(folders: Sequence[Path], workers: int) -> dict[str, float]:
    """Of this new process: seconds of opening with checksums and of all, CPU seconds, the most GiB it ever held."""
    started, cpu_before = time.perf_counter(), time.process_time()
    traces = {folder.name: RoutingTrace.open(folder) for folder in folders}
    opened = time.perf_counter()
    analyse_traces(traces, workers=workers)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return {
        "opening_seconds": opened - started,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_before,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIBIBYTE,
    }


def measure_analysis(args: RoutingArguments) -> dict[str, Any]:
    """A row of the table; traces are written to a temporary folder and removed."""
    with tempfile.TemporaryDirectory() as root:
        folders = [Path(root) / f"checkpoint_{seed}" for seed in range(args.checkpoints)]
        for seed, folder in enumerate(folders):
            write_synthetic_trace(folder, args, seed)
        size = sum(path.stat().st_size for folder in folders for path in folder.iterdir())
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(_analyse, folders, args.workers).result()
    shape = f"{args.checkpoints} x {args.tokens:,} tokens, {args.layers} layers, {args.top_k} of {args.experts}"
    return {
        "part": "analysis",
        "what": shape,
        "trace_gib": size / GIBIBYTE,
        **found,
        "verdict": _verdict(found["seconds"] <= SECONDS_BAR and found["peak_gib"] <= GIBIBYTES_BAR),
    }


def measure_collecting(args: RoutingArguments, device: torch.device) -> dict[str, Any]:
    """Collecting / bare forward passes over the same batches: median over rounds, in which both take turns."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(args.model)).to(device, getattr(torch, args.dtype)).eval()
    tokens = torch.randint(0, model.config.vocab_size, (args.batches, args.batch_size, args.length))
    rows = [{"input_ids": row.numpy()} for row in tokens.flatten(0, 1)]

    def bare() -> None:
        with torch.no_grad():
            for batch in tokens:
                ids = batch.to(device)
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)

    def collect() -> None:
        with tempfile.TemporaryDirectory() as folder:
            collect_routing(model, rows, folder, batch_size=args.batch_size, max_length=args.length, progress=False)

    bare(), collect()
    pairs = []
    for turn in range(args.rounds):  # whoever comes second finds other caches and clocks: they swap
        first, second = (bare, collect) if turn % 2 else (collect, bare)
        times = {run: _seconds(run, device) for run in (first, second)}
        pairs.append((times[bare], times[collect]))
    ratios = [collecting / alone for alone, collecting in pairs]
    lower, ratio, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "part": "collecting",
        "what": f"{args.model}, {args.batches} batches of {args.batch_size} x {args.length}, {args.dtype}",
        "clock": "wall" if device.type == "cuda" else "CPU",
        "bare_seconds": statistics.median(alone for alone, _ in pairs),
        "seconds": statistics.median(collecting for _, collecting in pairs),
        "lower_quartile": lower,
        "ratio": ratio,
        "upper_quartile": upper,
        "verdict": _verdict(ratio <= RATIO_BAR) if (lower <= RATIO_BAR) == (upper <= RATIO_BAR) else "undecided",
    }


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """Wall seconds on a GPU. On a CPU those of all threads at work: other processes slow a wall clock threefold."""
    synchronize(device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    started = clock()
    run()
    synchronize(device)
    return clock() - started


def _verdict(holds: bool) -> str:
    return "within the bar" if holds else "above the bar"


class TimedMonitor(RouterMonitorCallback):
    """The monitor, with the host's time inside its counting."""

    inside = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """As the monitor's; then its counting is timed."""
        super().on_train_begin(*args, **kwargs)
        for name in ("_count_pending", "end_step", "pop"):
            setattr(self.meter, name, self._timed(getattr(self.meter, name)))

    def _timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            result = work(*args)
            self.inside += time.perf_counter() - begin
            return result

        return timed


def measure_monitor(args: RoutingArguments, device: torch.device) -> dict[str, Any]:
    """Seconds of a step without and with the monitor, their relation, and the share of the host's time inside it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(args.model), dtype=getattr(torch, args.dtype))
    shape = args.batch_size * (args.batches + WARM_UP_STEPS), args.length
    data = [{"input_ids": row, "labels": row} for row in torch.randint(model.config.vocab_size, shape)]
    plain, watched, shares = [], [], []
    for _ in range(args.rounds):
        plain += _block(args, model, data, device, [])
        monitor = TimedMonitor()
        seconds = _block(args, model, data, device, [monitor])
        watched += seconds
        shares.append(monitor.inside / (args.batches + WARM_UP_STEPS) / statistics.median(seconds))
    before, after = statistics.median(plain), statistics.median(watched)
    return {
        "part": "monitor",
        "what": f"{args.model}, steps of {args.batch_size} x {args.length}, {args.dtype}",
        "bare_seconds": before,
        "seconds": after,
        "ratio": after / before,
        "inside_the_monitor": (share := statistics.median(shares)),
        "verdict": _verdict(share <= MONITOR_BAR),
    }


def _block(
    args: RoutingArguments,
    model: nn.Module,
    data: list[dict[str, torch.Tensor]],
    device: torch.device,
    callbacks: list[TrainerCallback],
) -> list[float]:
    clock = StepClock(device, WARM_UP_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=args.batches + WARM_UP_STEPS,
            per_device_train_batch_size=args.batch_size,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            bf16=device.type == "cuda",
        )
        trainer = Trainer(model, settings, train_dataset=data, callbacks=[*callbacks, clock])
        trainer.train()
    return clock.seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what was asked for, write routing.csv, print the table."""
    (args,) = parse_arguments((RoutingArguments,), argv, program="routing.py", description=__doc__)
    device = choose_device(args.device)
    facts = machine_facts(device, args.commit)
    rows = []
    for part in args.parts:
        measure = {"collecting": measure_collecting, "monitor": measure_monitor}.get(part)
        rows.append((measure_analysis(args) if measure is None else measure(args, device)) | facts)
        write_csv(Path(args.output_dir) / "routing.csv", rows)
    columns = ["part", "what", "seconds", "cpu_seconds", "opening_seconds", "peak_gib", "trace_gib"]
    columns += ["clock", "bare_seconds", "lower_quartile", "ratio", "upper_quartile", "inside_the_monitor", "verdict"]
    print(f"\n{facts['device']}, torch {facts['torch']}; files: {args.output_dir}\n")
    for row in rows:
        shown = {name: row[name] for name in columns if name in row}
        print("  ".join(f"{name}={v:.3f}" if isinstance(v, float) else f"{v}" for name, v in shown.items()))


if __name__ == "__main__":
    run_script(main)
