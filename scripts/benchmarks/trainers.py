"""The trainers whose steps are compared, each around models of its own with equal weights, on equal batches.

A step is what `Trainer` does for a batch: `training_step` (copy to the device, policy forward, reference forward where
there is one, loss, metrics, backward), gradient clipping, the optimizer. Source: ours.

Peak memory of the tensors in a contender's steps: models, gradients, optimizer, activations, buffers of operators.

On a GPU PyTorch's allocator keeps the account. On a CPU it does not: there the tensors that live between steps are
summed, and the profiler's record of every allocation inside the steps gives the rest. Both are exact and repeatable,
unlike the resident memory of a process. Source: ours.

Time and memory of a training step of RainbowPO beside TRL's DPO, with the same model on the same batches.

python scripts/benchmarks/trainers.py --model llama-570m --dtype mixed --batch_size 8 --length 1024 --output_dir runs/pref

All contenders live in one process and take turns, a step each, round after round; memory is taken before, each
contender in a process of its own. Writes preference.csv and preference_ratios.csv and prints the table last. How and
what is measured: docs/benchmarks/README.md.

The ways to step that a benchmark of surgery compares, each with a model of its own and equal weights and batches.

A step is what `Trainer` does for a batch: `training_step` (copy to the device, forward passes, reference, loss,
metrics, backward), gradient clipping, the optimizer. Source: ours.

Time and memory of a step of SurgeryTrainer, a backward pass for each term, beside one backward of their sum.

python scripts/benchmarks/trainers.py --model llama-570m --dtype mixed --batch_size 4 --length 1024 --preset safe

All contenders live in one process and take turns, a step each, round after round; memory is taken before, each
contender in a process of its own. Writes surgery_<preset>.csv and surgery_<preset>_ratios.csv and prints the tables
last. How and what is measured: docs/benchmarks/README.md.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import multiprocessing
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
)

from hf_moe_cpt.arguments import json_object, parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.extras import require
from hf_moe_cpt.machine import check_names
from hf_moe_cpt.reports.tables import text_table
from hf_moe_cpt.scripts.benchmarks import harness as tools
from hf_moe_cpt.scripts.benchmarks.step import MODELS, config_of
from hf_moe_cpt.trainers.surgery.data import collate_sets
from hf_moe_cpt.trainers.surgery.gradients import TermGradients
from hf_moe_cpt.trainers.surgery.losses import TERMS
from hf_moe_cpt.trainers.surgery.surgery_config import SurgeryConfig
from hf_moe_cpt.trainers.surgery.surgery_trainer import SurgeryTrainer


NUM_BATCHES = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "mixed": torch.float32}


@dataclass(frozen=True)
class Contender:
    """A trainer and its settings. is_ours: `RainbowPOTrainer`, else `trl.DPOTrainer`."""

    is_ours: bool
    settings: Mapping[str, Any]
    has_reference: bool = True


# A number for dispersion_scale, since calibrating is no part of a step; 0.29 is that of the paper's code.
CONTENDERS = {
    "rainbowpo": Contender(True, {"dispersion_scale": 0.29}),
    "sigmoid_norm": Contender(False, {"loss_type": ["sigmoid_norm"], "beta": 10.0}),
    "rainbowpo-no-reference": Contender(True, {"mixing_alpha": 0.0, "contextual_scaling": "none"}, False),
    "sigmoid": Contender(False, {"loss_type": ["sigmoid"], "beta": 0.1}),
}


@dataclass(frozen=True)
class Workload:
    """Which model steps on which pairs; everything that is the same for all contenders.

    batch_size: pairs of a step. length: tokens of a sequence, the first quarter of them prompt; completions are random
    tokens, a third to all of the rest. lora_rank: of adapters on all linear layers, whose reference is the model
    without them; 0 trains all weights.
    """

    model: str
    overrides: str | None
    dtype: str
    batch_size: int
    length: int
    gradient_checkpointing: bool
    device: str
    seed: int
    lora_rank: int = 0


def check_model(workload: Workload) -> None:
    """Raise ValueError for a model or for overrides that cannot be, before anything is built."""
    if workload.model not in MODELS:
        if workload.overrides is not None:
            raise ValueError(f"--overrides goes with the names {', '.join(MODELS)}, not with {workload.model!r}.")
        is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", workload.model)
        if not (Path(workload.model) / "config.json").is_file() and not is_hub_id:
            raise ValueError(
                f"--model {workload.model!r} is neither a folder with a config.json nor a Hub id nor one of "
                f"{', '.join(MODELS)}."
            )
        return
    _named_config(workload)


def _named_config(workload: Workload) -> PreTrainedConfig:
    config, changes = config_of(workload.model), json_object("--overrides", workload.overrides)
    for name in changes:
        if not hasattr(config, name):
            raise ValueError(f"--overrides {workload.overrides!r}: {workload.model} has no field {name!r}.")
    return type(config)(**{**config.to_dict(), **changes})


def build_model(workload: Workload) -> PreTrainedModel:
    """The model on the device; the same weights at every call."""
    dtype, device = DTYPES[workload.dtype], torch.device(workload.device)
    if workload.model not in MODELS:
        return AutoModelForCausalLM.from_pretrained(workload.model, dtype=dtype).to(device)
    torch.manual_seed(workload.seed)
    with device:
        return AutoModelForCausalLM.from_config(_named_config(workload), dtype=dtype, attn_implementation="sdpa")


def build_tokenizer(workload: Workload) -> PreTrainedTokenizerBase:
    """The model's, or for one without a tokenizer three words; the batches hold ids that no tokenizer made."""
    if workload.model not in MODELS:
        return AutoTokenizer.from_pretrained(workload.model)
    words = Tokenizer(WordLevel({"<end>": 0, "a": 1, "b": 2}, unk_token="<end>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")


def random_pairs(workload: Workload, vocabulary_size: int) -> list[list[dict[str, list[int]]]]:
    """NUM_BATCHES lists of tokenised pairs; one completion in each list has the full length, so that shapes agree."""
    generator = torch.Generator().manual_seed(workload.seed)
    prompt_length = max(1, workload.length // 4)
    longest = workload.length - prompt_length

    def tokens(number: int) -> list[int]:
        return torch.randint(3, vocabulary_size, (number,), generator=generator).tolist()

    def completion(is_full: bool) -> list[int]:
        share = 1.0 if is_full else float(torch.rand((), generator=generator)) * 2 / 3 + 1 / 3
        return tokens(max(1, round(share * longest)))

    return [
        [
            {
                "prompt_ids": tokens(prompt_length),
                "chosen_ids": completion(number == 0),
                "rejected_ids": completion(False),
            }
            for number in range(workload.batch_size)
        ]
        for _ in range(NUM_BATCHES)
    ]


class Steps:
    """One contender ready to step: models on the device, optimizer, the collated batches of the workload."""

    def __init__(self, name: str, workload: Workload) -> None:
        self.trainer = _trainer(CONTENDERS[name], workload)
        arguments = self.trainer.args
        self.trainer.create_optimizer()
        self.model, self.optimizer = self.trainer.accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        if workload.gradient_checkpointing:
            self.trainer.model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
        self.trainer.current_gradient_accumulation_steps = 1  # the training loop sets it
        pairs = random_pairs(workload, self.trainer.model.config.get_text_config().vocab_size)
        self.batches = [self.trainer.data_collator(rows) for rows in pairs]
        self.num_done = 0
        self.loss: torch.Tensor | None = None  # of the last step, on the device

    def step(self) -> None:
        """Train on the next batch."""
        batch = self.batches[self.num_done % NUM_BATCHES]
        self.loss = self.trainer.training_step(self.model, dict(batch))
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_done += 1

    def log(self) -> None:
        """What `Trainer` does every `logging_steps`: the metrics collected since the last time become numbers."""
        self.trainer.log({"loss": float(self.loss)})


def _classes() -> dict[bool, tuple[type, type]]:
    """Configuration and trainer by `Contender.is_ours`."""
    trl = require("trl", needed_by="bench_preference.py")
    from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig
    from hf_moe_cpt.trainers.rainbowpo.rainbowpo_trainer import RainbowPOTrainer

    return {False: (trl.DPOConfig, trl.DPOTrainer), True: (RainbowPOConfig, RainbowPOTrainer)}


def _trainer(contender: Contender, workload: Workload) -> Any:
    """The trainer, set up but for what only its training loop does."""
    config_class, trainer_class = _classes()[contender.is_ours]
    config = config_class(
        output_dir=tempfile.mkdtemp(prefix="bench_preference_"),  # nothing is written into it
        per_device_train_batch_size=workload.batch_size,
        max_length=None,
        bf16=workload.dtype == "mixed",
        gradient_checkpointing=workload.gradient_checkpointing,
        use_cpu=workload.device == "cpu",
        seed=workload.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **contender.settings,
    )
    Path(config.output_dir).rmdir()
    adapters = {}
    if workload.lora_rank:
        peft = require("peft", needed_by="--lora_rank")
        adapters["peft_config"] = peft.LoraConfig(r=workload.lora_rank, target_modules="all-linear")
    has_model_as_reference = contender.has_reference and not workload.lora_rank
    trainer = trainer_class(
        model=build_model(workload),
        ref_model=build_model(workload) if has_model_as_reference else None,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " a"}]),
        processing_class=build_tokenizer(workload),
        **adapters,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def chosen_contenders(names: Sequence[str] | None) -> list[str]:
    """The named contenders, all if None, in the order of the table. Raises ValueError for a name it does not have."""
    check_names("--contenders", names, CONTENDERS)
    return [name for name in CONTENDERS if names is None or name in names]


def workload_facts(workload: Workload) -> dict[str, Any]:
    """The workload as columns."""
    return dataclasses.asdict(workload) | {"trl": tools.package_version("trl")}


_ALLOCATION = "[memory]"  # name of the profiler's events, whose Bytes are below 0 when memory is given back
_CPU = 0  # among the profiler's device types


class Steppable(Protocol):
    """Anything that trains a step when told to."""

    def step(self) -> None:
        """Train on the next batch."""


def peak_mebibytes(name: str, workload: Workload, num_steps: int) -> float:
    """Most memory that a contender holds in steps after the first two; call it in a process of its own."""
    return peak_of_steps(Steps(name, workload), torch.device(workload.device), num_steps)


def peak_of_steps(steps: Steppable, device: torch.device, num_steps: int) -> float:
    """Most memory in MiB that this process holds in steps after the first two."""
    for _ in range(2):  # the first makes the state of the optimizer
        steps.step()
    gc.collect()
    peak = _peak_on_gpu if device.type == "cuda" else _peak_on_cpu
    return peak(steps, num_steps) / tools.MEBIBYTE


def _peak_on_gpu(steps: Steppable, num_steps: int) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(num_steps):
        steps.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _peak_on_cpu(steps: Steppable, num_steps: int) -> int:
    before = living_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(num_steps):
            steps.step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    allocations = [event for event in events if event.get("name") == _ALLOCATION]
    held = most = 0
    for event in sorted(allocations, key=lambda event: event["ts"]):
        if event["args"]["Device Type"] == _CPU:
            held += event["args"]["Bytes"]
            most = max(most, held)
    return before + most


def living_bytes() -> int:
    """Memory of all plain tensors of this process on the CPU; what several share counts once."""
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


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
        check_names("--dtype", [self.dtype], DTYPES)
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
    (args,) = parse_arguments((PreferenceArguments,), argv, program="bench_preference.py", description=__doc__)
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


TARGET = 5.0  # nats per token, in place of what unseen text would say
NO_EVALUATION = {
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
}
# Sets and settings of a preset: four terms as in the paper, or five.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"sets": ("unlearn", "obsolete", "update", "retain"), "settings": {}},
    "safe": {
        "sets": TERMS,
        "settings": {"forget_target": TARGET},
    },
}


@dataclass(frozen=True)
class SurgeryContender:
    """How a step is made. by_term: a backward pass for each term, else one of their sum. logs: at a logging step."""

    by_term: bool
    reference: str
    logs: bool = False


SURGERY_CONTENDERS: Mapping[str, SurgeryContender] = {
    "by-term": SurgeryContender(True, "cache"),
    "summed": SurgeryContender(False, "cache"),
    "by-term-copy": SurgeryContender(True, "copy"),
    "summed-copy": SurgeryContender(False, "copy"),
    "by-term-logged": SurgeryContender(True, "cache", logs=True),
}


@dataclass(frozen=True)
class SurgeryWorkload(Workload):
    """Which model steps on which rows. batch_size: rows of each set in a step. length: tokens of every row."""

    preset: str = "safe"


class SurgerySteps:
    """One contender ready to step: model and reference on the device, optimizer, the batches of the workload."""

    def __init__(self, name: str, workload: SurgeryWorkload) -> None:
        self.contender = SURGERY_CONTENDERS[name]
        self._folder = tempfile.TemporaryDirectory(prefix="bench_surgery_")  # the cache; gone with the steps
        self.trainer = _trainer_bench_surgery_contenders(self.contender, workload, Path(self._folder.name))
        trainer = self.trainer
        trainer._prepare()
        trainer.create_optimizer()
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        # the training loop sets these
        trainer.term_gradients = TermGradients(trainer.model.parameters())
        trainer.current_gradient_accumulation_steps = 1
        trainer.state.logging_steps = 1
        if workload.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        items = [trainer.train_dataset[place] for place in range(NUM_BATCHES)]
        self.batches = [collate_sets([item], trainer.pad_token_id) for item in items]
        self.num_done = 0
        self.loss: torch.Tensor | None = None  # of the last step, on the device

    def step(self) -> None:
        """Train on the next batch."""
        trainer, batch = self.trainer, self.batches[self.num_done % NUM_BATCHES]
        if self.contender.by_term:
            self.loss = trainer.training_step(self.model, batch)
        else:
            self.model.train()
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(self.model, trainer._prepare_inputs(batch))
            trainer.accelerator.backward(loss)
            self.loss = loss.detach()
            del loss
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_done += 1

    def log(self) -> None:
        """What `Trainer` does every `logging_steps`: the metrics collected since the last time become numbers."""
        self.trainer.log({"loss": float(self.loss)})


def surgery_peak_mebibytes(name: str, workload: SurgeryWorkload, num_steps: int) -> float:
    """Most memory that a contender holds in steps after the first two; call it in a process of its own."""
    return peak_of_steps(SurgerySteps(name, workload), torch.device(workload.device), num_steps)


def reference_mebibytes(workload: SurgeryWorkload) -> tuple[float, float]:
    """Size of the whole model before surgery, and of its head alone, which a cache keeps."""
    with torch.device("meta"):
        model = build_model(dataclasses.replace(workload, device="meta"))
    parameters = sum(weight.nbytes for weight in model.parameters())
    head = model.get_output_embeddings()
    return parameters / tools.MEBIBYTE, sum(weight.nbytes for weight in head.parameters()) / tools.MEBIBYTE


def chosen_surgery_contenders(names: Sequence[str] | None) -> list[str]:
    """The named contenders, all if None, in the order of the table. Raises ValueError for a name it does not have."""
    check_names("--contenders", names, SURGERY_CONTENDERS)
    return [name for name in SURGERY_CONTENDERS if names is None or name in names]


def random_rows(workload: SurgeryWorkload, vocabulary_size: int) -> dict[str, Dataset]:
    """NUM_BATCHES batches of tokenised rows of each set, all of full length, so that nothing is padding."""
    generator = torch.Generator().manual_seed(workload.seed)
    shape = NUM_BATCHES * workload.batch_size, workload.length
    return {
        name: Dataset.from_dict({"input_ids": torch.randint(3, vocabulary_size, shape, generator=generator).tolist()})
        for name in PRESETS[workload.preset]["sets"]
    }


def _trainer_bench_surgery_contenders(
    contender: SurgeryContender, workload: SurgeryWorkload, folder: Path
) -> SurgeryTrainer:
    """The trainer, set up but for what only its training loop does."""
    sets = PRESETS[workload.preset]["sets"]
    settings = {
        **PRESETS[workload.preset]["settings"],
        **NO_EVALUATION,
        **{f"{name}_batch_size": workload.batch_size for name in sets},
        "output_dir": str(folder / "run"),
        "max_length": workload.length,
        "reference": contender.reference,
        "log_term_gradients": contender.logs,
        "bf16": workload.dtype == "mixed",
        "gradient_checkpointing": workload.gradient_checkpointing,
        "use_cpu": workload.device == "cpu",
        "seed": workload.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 1_000_000,  # never reached
    }
    model = build_model(workload)
    rows = random_rows(workload, model.config.get_text_config().vocab_size)
    trainer = SurgeryTrainer(
        model,
        SurgeryConfig.from_preset(workload.preset, **settings),
        **{f"{name}_dataset": data for name, data in rows.items()},
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@dataclass
class SurgeryBenchArguments:
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
    preset: str = field(
        default="safe",
        metadata={"help": "paper: four terms with plain ascent; safe: five, and a bounded forget loss."},
    )
    contenders: list[str] | None = field(
        default=None, metadata={"help": f"How a step is made: {', '.join(SURGERY_CONTENDERS)}; all if not given."}
    )
    batch_size: int = field(default=2, metadata={"help": "Rows of each set in a step."})
    length: int = field(default=128, metadata={"help": "Tokens of every row."})
    dtype: str = field(
        default="float32", metadata={"help": f"{', '.join(DTYPES)}; mixed: float32 weights, bfloat16 autocast."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute layers in the backward pass."})
    rounds: int = field(default=20, metadata={"help": "Timed rounds; in each, every contender makes one step."})
    warmup: int = field(default=3, metadata={"help": "Rounds before them."})
    logging_steps: int = field(default=10, metadata={"help": "A step's share of a log is 1 / this."})
    memory_steps: int = field(default=3, metadata={"help": "Steps whose peak memory is taken; 0 leaves memory out."})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda; auto takes cuda where there is one."})
    seed: int = field(default=0, metadata={"help": "Of weights and tokens."})
    output_dir: str = field(default="runs/surgery", metadata={"help": "Folder for the results."})
    commit: str | None = field(default=None, metadata={"help": "Written into the results in place of git's answer."})

    def __post_init__(self) -> None:
        check_names("--dtype", [self.dtype], DTYPES)
        check_names("--preset", [self.preset], PRESETS)
        chosen_surgery_contenders(self.contenders)
        least_of = {"batch_size": 1, "length": 8, "rounds": 1, "warmup": 1, "logging_steps": 1, "memory_steps": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least {least}.")

    def workload(self, device: torch.device) -> SurgeryWorkload:
        """What is the same for all contenders."""
        names = ("model", "overrides", "dtype", "batch_size", "length", "gradient_checkpointing", "seed", "preset")
        return SurgeryWorkload(**{name: getattr(self, name) for name in names}, device=device.type)


# Logged steps hold the gradient of every term: what that costs has no bar.
COMPARISONS_BENCH_SURGERY = (
    Comparison("by-term", "summed", time_bar=1.05, memory_bar=0.6),
    Comparison("by-term-copy", "summed-copy", time_bar=1.05, memory_bar=0.6),
    Comparison("by-term", "by-term-copy", time_bar=None, memory_bar=None),
    Comparison("by-term-logged", "by-term", time_bar=None, memory_bar=None),
)
KEPT = "kept of the reference"  # share of a whole reference model that a cached one still holds in memory
SLACK = 0.02  # of that share: buffers of a batch's states


def kept_rows(
    measurements: Sequence[Measurement], workload: SurgeryWorkload, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """A ratio line for what the cache leaves of the reference in memory; the bar is its head."""
    peaks = {m.contender: m.peak_mib for m in measurements if m.peak_mib}
    if not {"by-term", "by-term-copy"} <= peaks.keys():
        return []
    whole, head = reference_mebibytes(workload)
    kept, bar = 1.0 - (peaks["by-term-copy"] - peaks["by-term"]) / whole, head / whole + SLACK
    spread = dict.fromkeys(("ratio", "lower_quartile", "upper_quartile", "least", "most"), kept)
    names = {"contender": "by-term", "baseline": "by-term-copy", "quantity": KEPT}
    return [names | spread | {"bar": bar, "verdict": "met" if kept <= bar else "missed"} | facts]


def surgery_main(argv: Sequence[str] | None = None) -> None:
    """Measure memory, then time; write after each."""
    (args,) = parse_arguments((SurgeryBenchArguments,), argv, program="bench_surgery.py", description=__doc__)
    device = tools.choose_device(args.device)
    workload, folder = args.workload(device), Path(args.output_dir)
    check_model(workload)
    machine = tools.machine_facts(device, args.commit)
    facts = asdict(workload) | machine
    folder.mkdir(parents=True, exist_ok=True)
    measurements = [Measurement(name) for name in chosen_surgery_contenders(args.contenders)]

    def write() -> list[dict[str, Any]]:
        tools.write_csv(folder / f"surgery_{args.preset}.csv", [result_row(m, args, facts) for m in measurements])
        ratios = ratio_rows(measurements, args, facts, COMPARISONS_BENCH_SURGERY) + kept_rows(
            measurements, workload, facts
        )
        tools.write_csv(folder / f"surgery_{args.preset}_ratios.csv", ratios)
        return ratios

    turns = len(measurements) * (2 if args.memory_steps else 1) + args.warmup + args.rounds
    with tqdm(total=turns, unit="turn", dynamic_ncols=True) as bar:
        if args.memory_steps:
            take_memory(measurements, workload, args.memory_steps, bar, surgery_peak_mebibytes)
            write()
        take_times(measurements, args, workload, bar, SurgerySteps)
        bar.set_description("done")
    ratios = write()
    for measurement in measurements:
        if measurement.reason or measurement.memory_reason:
            print(f"{measurement.contender}: {measurement.reason or measurement.memory_reason}")
    print(
        f"\n{machine['device']}, torch {machine['torch']}, {args.model}, {args.dtype}, {args.preset}: "
        f"{len(PRESETS[args.preset]['sets'])} sets of {args.batch_size} rows of {args.length} tokens, {args.rounds} "
        f"rounds; files: {folder}\n"
    )
    print(text_table(contender_table(measurements, args)))
    if ratios:
        print(f"\n{text_table(ratio_table(ratios))}")


if __name__ == "__main__":
    run_script(surgery_main)
