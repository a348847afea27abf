"""Whole training steps of models as people own them, through stock `Trainer`, with Liger, and through `CPTTrainer`.

python scripts/benchmarks/jobs.py --runs olmoe:stock olmoe:auto qwen3:liger qwen3:auto llama:liger llama:auto
python scripts/benchmarks/jobs.py --runs pb-granular-2b:auto{,:fsdp2-1,:ddp-2,:fsdp2-2} --dtype float32 --layers 12
python scripts/benchmarks/jobs.py speeds    # writes hf_moe_cpt/planning/speeds.csv: the documents are not installed
python scripts/benchmarks/jobs.py errors    # prints the table of docs/scaling.md

A run is model:way or model:way:engine. Models have the layers of OLMoE-1B-7B, ten of Qwen3-30B-A3B's, six of
gpt-oss-20b's or a dense Llama of 0.55 B, or are those of `hf-moe-cpt plan` as pb-granular-2b; random weights, rows of
one document. Ways: stock, `Trainer` with fused AdamW; liger, the same with all of Liger; kernels, the same with
`use_kernels`, what CPTTrainer adds to; nearest, `CPTTrainer` with fused AdamW; plain and auto, it with those
`kernels` and an optimizer of its choice; bits8 and bits16, auto with moments of that size; qlora, an adapter, rank 16
on Linears and experts over weights of 4 bits, checkpointed. Engines: ddp or fsdp2 with its ranks, on one host; the
rows of a step are the same for any of them, so losses must agree (docs/scaling.md).

Each runs in processes of its own. A step is timed from one idle device to the next; the first, which compiles, stands
apart. Peak memory is that of the fullest rank. Writes jobs.csv.

`speeds` is what `hf-moe-cpt plan` takes from docs/benchmarks, `errors` how far its memory estimates are from the peaks
there: of step benchmarks that train all weights, but for TRL's own trainer and for surgeries that keep all terms at
once, which ours does not. The layers of the measured models are equal, so two of them are counted. Source: ours.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import logging
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, Trainer, TrainingArguments
from transformers.hf_argparser import HfArg

import hf_moe_cpt.planning
from hf_moe_cpt.arguments import fsdp2_arguments, parse_arguments
from hf_moe_cpt.cli import run_program, run_script
from hf_moe_cpt.machine import check_names, choose_device, leave_process_group, machine_facts
from hf_moe_cpt.model_arguments import ModelArguments
from hf_moe_cpt.planning.memory import (
    KeptBytes,
    ModelSize,
    TrainingSetup,
    kept_gathered,
    measure_kept,
    measure_size,
    training_memory,
)
from hf_moe_cpt.planning.plan import MODELS as NAMED
from hf_moe_cpt.planning.plan import PRECISION_OF, MeasuredStep, config_of, flops_per_token
from hf_moe_cpt.reports import write_csv
from hf_moe_cpt.scripts.benchmarks.ranks import shape_of
from hf_moe_cpt.scripts.benchmarks.report import (
    GIBIBYTE,
    Attempt,
    BenchmarkArguments,
    StepClock,
    Unavailable,
    middle,
    rows_of,
    text_of,
)
from hf_moe_cpt.trainers.common.distributed import SPARE_MEMORY
from hf_moe_cpt.trainers.common.kernels import use_kernels
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer


MODELS: dict[str, dict[str, Any]] = {
    "olmoe": {"model_type": "olmoe", "intermediate_size": 1024},
    "qwen3": {"model_type": "qwen3_moe", "num_hidden_layers": 10, "norm_topk_prob": True, "head_dim": 128},
    "gpt-oss": {"model_type": "gpt_oss", "num_hidden_layers": 6, "num_local_experts": 32, "sliding_window": 128},
    "llama": {"model_type": "llama", "vocab_size": 128256, "hidden_size": 1024, "intermediate_size": 2816,
              "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8},
}  # fmt: skip
TINY = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16, "head_dim": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 8,
        "num_experts_per_tok": 2}  # fmt: skip
WAYS = ("stock", "liger", "kernels", "nearest", "plain", "auto", "bits8", "bits16", "qlora")
OF_OURS: dict[str, dict[str, Any]] = {"plain": {"kernels": "plain"}, "nearest": {"optim": "adamw_torch_fused"},
                                      "bits8": {"optim": "adamw_stochastic_8bit"},
                                      "bits16": {"optim": "adamw_stochastic"}, "auto": {},
                                      "qlora": {"gradient_checkpointing": True}}  # fmt: skip
ENGINES = ("ddp", "fsdp2")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Run(NamedTuple):
    """A word of --runs. engine: "" for one process without any."""

    model: str
    way: str
    engine: str
    ranks: int


@dataclass
class JobArguments(BenchmarkArguments):
    """What is run."""

    runs: list[str] = HfArg(
        default_factory=lambda: ["olmoe:stock", "olmoe:auto"],
        help=f"model:way[:engine-ranks]. Models: {', '.join((*MODELS, *NAMED))}; ways: {', '.join(WAYS)}; engines: "
        f"{', '.join(ENGINES)}.",
    )
    batch_size: int = HfArg(default=8, help="Rows of a step, of all ranks together.")
    length: int = HfArg(default=2048, help="Tokens of a row.")
    layers: int | None = HfArg(default=None, help="Layers of the models; their own if unset.")
    dtype: str = HfArg(default="bfloat16", help="Of the weights: bfloat16; float32, on a GPU under bfloat16 autocast.")
    steps: int = HfArg(default=12, help="Timed steps.")
    warmup: int = HfArg(default=3, help="Steps before them, the first apart.")
    tiny: bool = HfArg(default=False, help="Two layers, 32 wide: a check of this script on a CPU.")
    timeout: float = HfArg(default=400.0, help="Seconds that one run may take.")

    def __post_init__(self) -> None:
        self.check_least({"batch_size": 1, "length": 2, "steps": 1, "warmup": 1})
        check_names("--dtype", [self.dtype], DTYPES)
        for run in self.runs:
            model, way, engine, ranks = self.read_run(run)
            check_names("--runs", [model], [*MODELS, *NAMED])
            check_names("--runs", [way], WAYS)
            if engine and (engine not in ENGINES or ranks < 1):
                raise ValueError(f"--runs {run!r}: write an engine with its ranks, {' or '.join(ENGINES)}: fsdp2-2.")
            if self.batch_size % ranks:
                raise ValueError(f"--batch_size {self.batch_size} does not fall evenly to the {ranks} ranks of {run}.")

    @staticmethod
    def read_run(run: str) -> Run:
        """Its parts; 0 ranks where they are no number."""
        model, _, rest = run.partition(":")
        way, _, engine = rest.partition(":")
        name, _, ranks = engine.partition("-")
        return Run(model, way, name, (int(ranks) if ranks.isdigit() else 0) if engine else 1)


def read_config(name: str, args: JobArguments) -> PreTrainedConfig:
    """The configuration of a model, as large as it is asked for."""
    if name in NAMED:
        config = config_of(name)
    else:
        settings = dict(MODELS[name])
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        config.output_router_logits = True
    config.use_cache = False
    for field, value in TINY.items() if args.tiny else ():
        if hasattr(config, field):
            setattr(config, field, value)
    config.num_hidden_layers = args.layers or config.num_hidden_layers
    config.pad_token_id = config.eos_token_id = 1
    return config


def build_trainer(run: Run, args: JobArguments, folder: str) -> Trainer:
    """The trainer of a run over rows of random tokens, with a `StepClock`."""
    config = read_config(run.model, args)
    with torch.device("meta"):
        layer = type(AutoModelForCausalLM.from_config(config).model.layers[0]).__name__
    common = {
        "output_dir": folder, "per_device_train_batch_size": args.batch_size // run.ranks,
        "max_steps": args.warmup + args.steps, "learning_rate": 1e-5, "logging_steps": min(5, args.steps),
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": choose_device(args.device).type == "cpu", "bf16": True,
        **(fsdp2_arguments(layer) if run.engine == "fsdp2" else {}),
    }  # fmt: skip
    is_ours = run.way in OF_OURS
    if is_ours:
        settings = CPTConfig(**common, **OF_OURS[run.way], max_length=args.length, eval_on_start=False)
    else:
        settings = TrainingArguments(**common, optim="adamw_torch_fused", use_liger_kernel=run.way == "liger")
    torch.manual_seed(0)
    with settings.device:
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[args.dtype])
    if run.way == "qlora":  # weights are read by transformers, which quantises what is Linear
        with tempfile.TemporaryDirectory() as made:
            model.save_pretrained(made)
            del model
            words = ModelArguments(made, dtype=args.dtype, use_peft=True, load_in_4bit=True)
            words.lora_target_modules = ["all-linear"]
            model = words.adapted(AutoModelForCausalLM.from_pretrained(made, **words.loading(None)))
    shape = args.batch_size * (args.warmup + args.steps), args.length
    ids = torch.randint(2, config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    rows, clock = Dataset.from_dict({"input_ids": ids.tolist()}), StepClock(settings.device, 0)
    if is_ours:
        return CPTTrainer(model, settings, rows, callbacks=[clock])
    if run.way == "kernels":
        settings.kernels = "auto"
        use_kernels(model, settings, fuses_head=True)
    rows = rows.map(lambda row: {"labels": row["input_ids"]})
    return Trainer(model, settings, train_dataset=rows, callbacks=[clock])


def one_main(argv: Sequence[str]) -> None:
    """A rank of one job: the first leaves what was measured in report.json of the folder; `models` starts it."""
    (args,) = parse_arguments((JobArguments,), argv, program="jobs.py one", description=__doc__)
    logging.basicConfig(level=logging.INFO)
    trainer = build_trainer(args.read_run(args.runs[0]), args, args.output_dir)
    clock = next(part for part in trainer.callback_handler.callbacks if isinstance(part, StepClock))
    device = trainer.args.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.tensor(torch.cuda.max_memory_allocated() / GIBIBYTE if device.type == "cuda" else 0.0, device=device)
    if dist.is_initialized():
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        found = {"seconds": clock.seconds, "peak_gib": peak.item() or None, "loss": losses[-1]}
        (Path(args.output_dir) / "report.json").write_text(json.dumps(found), encoding="utf-8")
    del trainer
    leave_process_group()


def models_main(argv: Sequence[str]) -> None:
    """Run every job in turn; write and print the rows."""
    (args,) = parse_arguments((JobArguments,), argv, program="jobs.py", description=__doc__)
    facts = machine_facts(choose_device(args.device), args.commit)
    path, rows = Path(args.output_dir) / "jobs.csv", []
    for run in tqdm(args.runs, unit="run"):
        row = {"run": run, "status": "ok"}
        with Attempt() as attempt:
            row |= measured(run, list(argv), args)
        rows.append(row | ({} if attempt.reason is None else {"status": attempt.reason}) | facts)
        write_csv(path, rows)  # what is measured stays, whatever comes
    for row in rows:
        if row["status"] != "ok":
            print(f"{row['run']}: {row['status']}")
    print(text_of(path))


def measured(run: str, given: list[str], args: JobArguments) -> dict[str, Any]:
    """The row of a run, from processes of its own. Raises RuntimeError with the last error they said if they fail."""
    _, _, engine, ranks = args.read_run(run)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if engine else []
    with tempfile.TemporaryDirectory() as folder:
        program = ["-m", "hf_moe_cpt.scripts.benchmarks.jobs", "one", *given, "--runs", run, "--output_dir", folder]
        try:
            start = [sys.executable, *launch, *program]
            done = subprocess.run(start, capture_output=True, text=True, timeout=args.timeout)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"it had not ended after {args.timeout:g} seconds: raise --timeout") from None
        report = Path(folder) / "report.json"
        if done.returncode or not report.exists():
            lines = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines() or [""]
            raise RuntimeError(f"exit code {done.returncode}: {lines[-1].strip()}")
        found = json.loads(report.read_text(encoding="utf-8"))
    milliseconds = [1000 * second for second in found["seconds"]]
    taken = milliseconds[args.warmup :]
    return {
        "step_ms": middle(taken),
        "step_ms_min": min(taken),
        "step_ms_max": max(taken),
        "tokens_per_second": 1000 * args.batch_size * args.length / middle(taken),
        "peak_gib": found["peak_gib"],
        "first_step_s": milliseconds[0] / 1000,
        "loss": found["loss"],
        "steps_ms": " ".join(f"{value:.1f}" for value in milliseconds),
    }


STEPS = "h200/step.csv"
JOBS = "h200/jobs.csv"
H200_GIB = 139.8
KERNELS_OF_WAY = {"stock": "plain", "auto": "fused"}
PREFERENCES = ("h200/preference_full.csv", "h100/preference_full.csv")  # the same steps on two devices
REFERENCE_OF = {"rainbowpo": "copy", "rainbowpo-no-reference": "none", "by-term": "cache", "by-term-copy": "copy"}
TERMS_OF_PRESET = {"paper": 4, "safe": 5}


@dataclass(frozen=True)
class MeasuredPeak:
    """A committed peak, in GiB, and the setup it was measured with."""

    source: str
    run: str
    model: str
    setup: TrainingSetup
    gib: float
    layers: int | None = None  # None for all of the model's


def done_rows(folder: Path, name: str) -> list[dict[str, str]]:
    """The runs of a file that went well."""
    return [row for row in rows_of(folder / name) if row["status"] == "ok"]


@functools.cache
def size_of(model: str, layers: int | None = None) -> ModelSize:
    """The size of a model that benchmarks name, with its own number of layers or another, counted once."""
    return measure_size(shape_of(model, layers), model)


@functools.cache
def kept_by(model: str, layers: int | None, length: int, precision: str, kernels: str) -> KeptBytes:
    """As `measure_kept`, counted once."""
    return measure_kept(shape_of(model, layers), length, precision, kernels)


def kernels_of(run: str) -> str:
    """What a run of step.csv computes with, as `TrainingSetup` calls it."""
    if ":fused" in run:
        return "fused"
    return "experts" if run.endswith(":hf_moe_cpt") else "plain"


def measured_steps(folder: Path) -> list[MeasuredStep]:
    """The lines of speeds.csv."""
    steps = []
    for row in done_rows(folder, STEPS):
        size, length = size_of(row["model"]), int(row["seq_length"])
        steps.append(
            MeasuredStep(
                model=row["model"],
                kernels=kernels_of(row["run"]),
                is_mixture=size.num_experts > 0,
                sequence_length=length,
                tokens_per_second=float(row["tokens_per_second"]),
                flops_per_token=flops_per_token(size, length, 4.0 if row["checkpointing"] == "True" else 3.0),
                device=row["device"],
                date=row["date"][:10],
                commit=row["commit"],
            )
        )
    return steps + [step for step in map(step_of_job, done_rows(folder, JOBS)) if step]


def step_of_job(row: dict[str, str]) -> MeasuredStep | None:
    """The line of a run of jobs.py on a model that others published, by stock `Trainer` or ours; None of any other."""
    model, _, way = row["run"].partition(":")
    if model not in MODELS or way not in KERNELS_OF_WAY:
        return None
    arguments = JobArguments(runs=[row["run"]])
    size = measure_size(read_config(model, arguments), model)
    return MeasuredStep(
        model=model,
        kernels=KERNELS_OF_WAY[way],
        is_mixture=size.num_experts > 0,
        sequence_length=arguments.length,
        tokens_per_second=float(row["tokens_per_second"]),
        flops_per_token=flops_per_token(size, arguments.length),
        device=row["device"],
        date=row["date"][:10],
        commit=row["commit"],
    )


def device_ratio(folder: Path) -> float:
    """Speed of an H100 over an H200's: the median over trainers that both timed."""
    h200, h100 = (
        {row["contender"]: float(row["total_ms"]) for row in done_rows(folder, name) if row["total_ms"]}
        for name in PREFERENCES
    )
    return statistics.median(h200[name] / h100[name] for name in h200.keys() & h100.keys())


def measured_peaks(folder: Path) -> Iterator[MeasuredPeak]:
    """Those of docs/benchmarks, in the order of the files."""
    for row in done_rows(folder, STEPS):
        setup = TrainingSetup(
            batch_size=int(row["batch_size"]),
            sequence_length=int(row["seq_length"]),
            precision=PRECISION_OF[row["weights"]],
            kernels=kernels_of(row["run"]),
        )
        if row["peak_gib"]:
            yield MeasuredPeak(STEPS, row["run"], row["model"], setup, float(row["peak_gib"]))
    for name, trainer in (*((name, "rainbowpo") for name in PREFERENCES), ("h100/surgery_safe.csv", "surgery")):
        for row in done_rows(folder, name):
            if row["contender"] in REFERENCE_OF and row["peak_mib"]:
                setup = TrainingSetup(
                    batch_size=int(row["batch_size"]),
                    sequence_length=int(row["length"]),
                    precision=row["dtype"],
                    kernels="plain",
                    trainer=trainer,
                    reference=REFERENCE_OF[row["contender"]],
                    terms=TERMS_OF_PRESET[row["preset"]] if trainer == "surgery" else 1,
                )
                yield MeasuredPeak(name, row["contender"], row["model"], setup, float(row["peak_mib"]) / 1024)


def peaks_of_ranks(folder: Path) -> Iterator[MeasuredPeak]:
    """Those of runs on several GPUs, the fullest rank's, largest of all rounds."""
    found: dict[MeasuredPeak, float] = {}
    for path in sorted(folder.glob("*/ranks*.csv")):
        for row in rows_of(path):
            if row["part"] != "model" or not row["peak_gib"] or row["device"].startswith("CPU"):
                continue
            engine, ranks = row["way"], int(row["ranks"])
            setup = TrainingSetup(
                batch_size=int(row["batch_size"]),
                sequence_length=int(row["length"]),
                precision=PRECISION_OF[row["weights"]],
                kernels="fused",
                checkpointing=row["checkpointing"] == "True",
                engine="ep" if engine.startswith("ep") else engine,
                gpus=ranks,
                gpus_per_node=ranks,
            )
            run = f"{row['what']}, {ranks} GPU{'s' if ranks > 1 else ''}, {engine}"
            name = path.relative_to(folder).as_posix()
            peak = MeasuredPeak(name, run, row["model"], setup, 0.0, int(row["num_layers"]))
            found[peak] = max(found.get(peak, 0.0), float(row["peak_gib"]))
    for peak, gib in found.items():
        yield dataclasses.replace(peak, gib=gib)


def estimated_gib(peak: MeasuredPeak) -> float:
    """What the arithmetic says for the same setup, with gathered weights where there was room to keep them."""
    setup = peak.setup
    size = size_of(peak.model, peak.layers)
    kept = kept_by(peak.model, peak.layers, setup.sequence_length, setup.precision, setup.kernels)
    needed, more = training_memory(size, kept, setup).total / GIBIBYTE, kept_gathered(size, setup) / GIBIBYTE
    return needed + (more if needed + more <= (1 - SPARE_MEMORY) * H200_GIB else 0.0)


def error_table(folder: Path) -> str:
    """Markdown: measured, estimated, and the error as a share of the measured peak."""
    lines = ["| file | run | measured GiB | estimated GiB | error |", "|---|---|---|---|---|"]
    for peak in (*measured_peaks(folder), *peaks_of_ranks(folder)):
        estimate = estimated_gib(peak)
        error = f"{estimate / peak.gib - 1:+.1%}"
        lines.append(f"| {peak.source} | {peak.run} | {peak.gib:.2f} | {estimate:.2f} | {error} |")
    return "\n".join(lines)


@dataclass
class PlannerArguments:
    """Where the results are and the speeds go."""

    benchmarks: str = HfArg(default="docs/benchmarks", help="Folder of the committed results.")
    output: str = HfArg(default=str(Path(hf_moe_cpt.planning.__file__).with_name("speeds.csv")), help="For `speeds`.")


def write_speeds(argv: Sequence[str]) -> None:
    """Write speeds.csv with all digits."""
    (args,) = parse_arguments((PlannerArguments,), argv, program="jobs.py speeds", description=__doc__)
    steps = measured_steps(Path(args.benchmarks))
    with Path(args.output).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [entry.name for entry in dataclasses.fields(MeasuredStep)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, steps))
    print(f"written: {args.output}; SPEED_OF_GPU['h100'] is {device_ratio(Path(args.benchmarks)):.4f}")


def print_errors(argv: Sequence[str]) -> None:
    """Print the table."""
    (args,) = parse_arguments((PlannerArguments,), argv, program="jobs.py errors", description=__doc__)
    print(error_table(Path(args.benchmarks)))


PROGRAMS = {"models": models_main, "one": one_main, "speeds": write_speeds, "errors": print_errors}


def main(argv: Sequence[str] | None = None) -> None:
    """The program that the first word names, `models` without one."""
    run_program(PROGRAMS, argv)


if __name__ == "__main__":
    run_script(main)
