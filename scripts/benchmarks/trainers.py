"""Time and memory of a training step of one of our trainers, beside other ways to make it, on the same batches.

python scripts/benchmarks/trainers.py --model llama-570m --dtype mixed --batch_size 8 --length 1024
python scripts/benchmarks/trainers.py --trainer surgery --model llama-570m --dtype mixed --batch_size 4 --length 1024

rainbowpo: beside TRL's DPO. surgery: a backward pass for each term, beside one backward of their sum. Every baseline
has a model of its own with equal weights. A step is what `Trainer` does for a batch: `training_step` (copy to the
device, forward passes, reference, loss, metrics, backward), gradient clipping, the optimizer. All live in one process
and take turns, a step each, round after round; memory is taken before, each in a process of its own.

Peak memory is that of the tensors: models, gradients, optimizer, activations, buffers of operators. On a GPU PyTorch's
allocator keeps the account. On a CPU the tensors that live between steps are summed, and the profiler's record of
every allocation inside the steps gives the rest. Both are exact and repeatable, unlike a process's resident memory.

Writes preference.csv or surgery_<preset>.csv and the same with _ratios, and prints the tables last. How and what is
measured: docs/benchmarks/README.md. Source: ours.
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
from typing import Any

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
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import json_object, parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.extras import require
from hf_moe_cpt.machine import check_names, choose_device, machine_facts, package_version
from hf_moe_cpt.planning.plan import MODELS, config_of
from hf_moe_cpt.reports import write_csv
from hf_moe_cpt.scripts.benchmarks import report as tools
from hf_moe_cpt.scripts.benchmarks.report import Attempt, text_of
from hf_moe_cpt.trainers.surgery.data import collate_sets
from hf_moe_cpt.trainers.surgery.gradients import TermGradients
from hf_moe_cpt.trainers.surgery.surgery_config import SurgeryConfig
from hf_moe_cpt.trainers.surgery.surgery_trainer import SurgeryTrainer


NUM_BATCHES = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "mixed": torch.float32}
NEVER_SAVES = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}


@dataclass(frozen=True)
class Workload:
    """Which model steps on which rows; everything that is the same for all baselines of a trainer.

    batch_size: pairs of a step, or rows of each set. length: tokens of every row, or of the longest sequence, the
    first quarter of them prompt; completions are random tokens, a third to all of the rest, or, where lengths are
    mixed, prompts and completions log-uniform from 1 / 32 of it, as in a public set. lora_rank (rainbowpo): of
    adapters on all linear layers, whose reference is the model without them; 0 trains all weights. preset: of surgery.
    """

    trainer: str
    model: str
    overrides: str | None
    dtype: str
    batch_size: int
    length: int
    gradient_checkpointing: bool
    device: str
    seed: int
    lora_rank: int = 0
    preset: str | None = None
    mixed_lengths: bool = False

    def facts(self) -> dict[str, Any]:
        """As columns."""
        columns = asdict(self)
        trainer, preset = columns.pop("trainer"), columns.pop("preset")
        return columns | ({"preset": preset} if trainer == "surgery" else {"trl": package_version("trl")})


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


class Steps:
    """One baseline ready to step: models on the device, optimizer, the collated batches of the workload."""

    def __init__(self, trainer: Any, workload: Workload) -> None:
        self.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        trainer.create_optimizer()
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        if workload.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        trainer.current_gradient_accumulation_steps = 1  # the training loop sets it
        self.batches: list[Any] = []
        self.num_done = 0
        self.loss: torch.Tensor | None = None  # of the last step, on the device

    def backward(self, batch: Any) -> torch.Tensor:
        """Make the gradients of a batch and return its loss."""
        return self.trainer.training_step(self.model, dict(batch))

    def step(self) -> None:
        """Train on the next batch."""
        self.loss = self.backward(self.batches[self.num_done % NUM_BATCHES])
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_done += 1

    def log(self) -> None:
        """What `Trainer` does every `logging_steps`: the metrics collected since the last time become numbers."""
        self.trainer.log({"loss": float(self.loss)})


@dataclass(frozen=True)
class PreferenceBaseline:
    """A trainer and its settings. is_ours: `RainbowPOTrainer`, else `trl.DPOTrainer`."""

    is_ours: bool
    settings: Mapping[str, Any]
    has_reference: bool = True


# A number for dispersion_scale, since calibrating is no part of a step; 0.29 is that of the paper's code.
PREFERENCE_BASELINES = {
    "rainbowpo": PreferenceBaseline(True, {"dispersion_scale": 0.29}),
    "sigmoid_norm": PreferenceBaseline(False, {"loss_type": ["sigmoid_norm"], "beta": 10.0}),
    "rainbowpo-no-reference": PreferenceBaseline(True, {"mixing_alpha": 0.0, "contextual_scaling": "none"}, False),
    "sigmoid": PreferenceBaseline(False, {"loss_type": ["sigmoid"], "beta": 0.1}),
    "rainbowpo-padding-free": PreferenceBaseline(True, {"dispersion_scale": 0.29, "padding_free": True}),
}


def random_pairs(workload: Workload, vocabulary_size: int) -> list[list[dict[str, list[int]]]]:
    """NUM_BATCHES lists of tokenised pairs; one completion in each list has the full length, so that shapes agree."""
    generator = torch.Generator().manual_seed(workload.seed)
    prompt_length = max(1, workload.length // 4)
    longest = workload.length - prompt_length

    def tokens(number: int) -> list[int]:
        return torch.randint(3, vocabulary_size, (number,), generator=generator).tolist()

    def share() -> float:
        drawn = float(torch.rand((), generator=generator))
        return 32 ** (drawn - 1) if workload.mixed_lengths else drawn * 2 / 3 + 1 / 3

    def prompt(is_full: bool) -> list[int]:
        return tokens(prompt_length if is_full or not workload.mixed_lengths else round(share() * prompt_length) or 1)

    def completion(is_full: bool) -> list[int]:
        return tokens(max(1, round((1.0 if is_full else share()) * longest)))

    return [
        [
            {
                "prompt_ids": prompt(number == 0),
                "chosen_ids": completion(number == 0),
                "rejected_ids": completion(False),
            }
            for number in range(workload.batch_size)
        ]
        for _ in range(NUM_BATCHES)
    ]


class PreferenceSteps(Steps):
    """Steps of `RainbowPOTrainer` or `trl.DPOTrainer`."""

    def __init__(self, name: str, workload: Workload) -> None:
        super().__init__(_preference_trainer(PREFERENCE_BASELINES[name], workload), workload)
        pairs = random_pairs(workload, self.trainer.model.config.get_text_config().vocab_size)
        self.batches = [self.trainer.data_collator(rows) for rows in pairs]


def _preference_trainer(baseline: PreferenceBaseline, workload: Workload) -> Any:
    """The trainer, set up but for what only its training loop does."""
    trl = require("trl", needed_by="--trainer rainbowpo")
    from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig
    from hf_moe_cpt.trainers.rainbowpo.rainbowpo_trainer import RainbowPOTrainer

    make_config, make_trainer = (
        (RainbowPOConfig, RainbowPOTrainer) if baseline.is_ours else (trl.DPOConfig, trl.DPOTrainer)
    )
    config = make_config(
        output_dir=tempfile.mkdtemp(prefix="bench_preference_"),  # nothing is written into it
        per_device_train_batch_size=workload.batch_size,
        max_length=None,
        bf16=workload.dtype == "mixed",
        gradient_checkpointing=workload.gradient_checkpointing,
        use_cpu=workload.device == "cpu",
        seed=workload.seed,
        **NEVER_SAVES,
        **baseline.settings,
    )
    Path(config.output_dir).rmdir()
    adapters = {}
    if workload.lora_rank:
        peft = require("peft", needed_by="--lora_rank")
        adapters["peft_config"] = peft.LoraConfig(r=workload.lora_rank, target_modules="all-linear")
    return make_trainer(
        model=build_model(workload),
        ref_model=build_model(workload) if baseline.has_reference and not workload.lora_rank else None,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " a"}]),
        processing_class=build_tokenizer(workload),
        **adapters,
    )


TARGET = 4.0  # nats per token, in place of what unseen text would say
NO_EVALUATION = {
    "eval_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
}
# Sets and settings of a preset: four terms as in the paper, or five.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"sets": ("unlearn", "obsolete", "update", "retain"), "settings": {}},
    "safe": {"sets": ("unlearn", "obsolete", "update", "retain", "neighbour"), "settings": {"forget_target": TARGET}},
}


@dataclass(frozen=True)
class SurgeryBaseline:
    """How a step is made. by_term: a backward pass for each term, else one of their sum. logs: at a logging step."""

    by_term: bool
    reference: str
    logs: bool = False


SURGERY_BASELINES = {
    "by-term": SurgeryBaseline(True, "cache"),
    "summed": SurgeryBaseline(False, "cache"),
    "by-term-copy": SurgeryBaseline(True, "copy"),
    "summed-copy": SurgeryBaseline(False, "copy"),
    "by-term-logged": SurgeryBaseline(True, "cache", logs=True),
}


class SurgerySteps(Steps):
    """Steps of `SurgeryTrainer`, with a backward pass for each term or one of their sum."""

    def __init__(self, name: str, workload: Workload) -> None:
        self.by_term = SURGERY_BASELINES[name].by_term
        self._folder = tempfile.TemporaryDirectory(prefix="bench_surgery_")  # the cache; gone with the steps
        trainer = _surgery_trainer(SURGERY_BASELINES[name], workload, Path(self._folder.name))
        trainer._prepare()
        super().__init__(trainer, workload)
        # the training loop sets these
        trainer.term_gradients = TermGradients(trainer.model.parameters())
        trainer.state.logging_steps = 1
        items = [trainer.train_dataset[place] for place in range(NUM_BATCHES)]
        self.batches = [collate_sets([item], trainer.pad_token_id) for item in items]

    def backward(self, batch: Any) -> torch.Tensor:
        """Make the gradients of a batch and return its loss."""
        if self.by_term:
            return super().backward(batch)
        self.model.train()
        with self.trainer.accelerator.autocast():
            loss = self.trainer.compute_loss(self.model, self.trainer._prepare_inputs(batch))
        self.trainer.accelerator.backward(loss)
        return loss.detach()


def random_rows(workload: Workload, vocabulary_size: int) -> dict[str, Dataset]:
    """NUM_BATCHES batches of tokenised rows of each set, all of full length, so that nothing is padding."""
    generator = torch.Generator().manual_seed(workload.seed)
    shape = NUM_BATCHES * workload.batch_size, workload.length
    return {
        name: Dataset.from_dict({"input_ids": torch.randint(3, vocabulary_size, shape, generator=generator).tolist()})
        for name in PRESETS[workload.preset]["sets"]
    }


def _surgery_trainer(baseline: SurgeryBaseline, workload: Workload, folder: Path) -> SurgeryTrainer:
    """The trainer, set up but for what only its training loop does."""
    settings = {
        **PRESETS[workload.preset]["settings"],
        **NO_EVALUATION,
        **NEVER_SAVES,
        **{f"{name}_batch_size": workload.batch_size for name in PRESETS[workload.preset]["sets"]},
        "output_dir": str(folder / "run"),
        "max_length": workload.length,
        "reference": baseline.reference,
        "log_term_gradients": baseline.logs,
        "bf16": workload.dtype == "mixed",
        "gradient_checkpointing": workload.gradient_checkpointing,
        "use_cpu": workload.device == "cpu",
        "seed": workload.seed,
        "max_steps": 1_000_000,  # never reached
    }
    model = build_model(workload)
    rows = random_rows(workload, model.config.get_text_config().vocab_size)
    config = SurgeryConfig.from_preset(workload.preset, **settings)
    return SurgeryTrainer(model, config, **{f"{name}_dataset": data for name, data in rows.items()})


_ALLOCATION = "[memory]"  # name of the profiler's events, whose Bytes are below 0 when memory is given back
_CPU = 0  # among the profiler's device types


def peak_mebibytes(name: str, workload: Workload, num_steps: int) -> float:
    """Most memory that a baseline holds in steps after the first two; call it in a process of its own."""
    steps = SUITES[workload.trainer].steps(name, workload)
    for _ in range(2):  # the first makes the state of the optimizer
        steps.step()
    gc.collect()
    peak = _peak_on_gpu if workload.device == "cuda" else _peak_on_cpu
    return peak(steps, num_steps) / tools.MEBIBYTE


def _peak_on_gpu(steps: Steps, num_steps: int) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(num_steps):
        steps.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _peak_on_cpu(steps: Steps, num_steps: int) -> int:
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


@dataclass(frozen=True)
class Comparison:
    """Who is measured by whom, and the most that the ratio of time and of memory should be; None: no such bar."""

    name: str
    baseline: str
    time_bar: float | None
    memory_bar: float | None


@dataclass(frozen=True)
class Suite:
    """What belongs to one trainer."""

    baselines: Mapping[str, PreferenceBaseline | SurgeryBaseline]
    steps: Callable[[str, Workload], Steps]
    comparisons: tuple[Comparison, ...]


SUITES = {
    "rainbowpo": Suite(
        PREFERENCE_BASELINES,
        PreferenceSteps,
        (
            Comparison("rainbowpo", "sigmoid_norm", time_bar=1.03, memory_bar=1.03),
            Comparison("rainbowpo-no-reference", "sigmoid", time_bar=0.75, memory_bar=None),
            Comparison("rainbowpo-padding-free", "rainbowpo", time_bar=1 / 1.6, memory_bar=1.0),
        ),
    ),
    "surgery": Suite(
        SURGERY_BASELINES,
        SurgerySteps,
        (
            Comparison("by-term", "summed", time_bar=1.05, memory_bar=0.6),
            Comparison("by-term-copy", "summed-copy", time_bar=1.05, memory_bar=0.6),
            Comparison("by-term", "by-term-copy", time_bar=None, memory_bar=None),
            # Logged steps hold the gradient of every term: what that costs has no bar.
            Comparison("by-term-logged", "by-term", time_bar=None, memory_bar=None),
        ),
    ),
}


@dataclass
class TrainersArguments(tools.BenchmarkArguments):
    """What steps, on what, and how often."""

    trainer: str = HfArg(default="rainbowpo", help=f"Whose steps: {', '.join(SUITES)}.")
    model: str = HfArg(
        default="llama-tiny", help=f"Random weights of {', '.join(MODELS)}; or the folder or Hub id of a causal LM."
    )
    overrides: str | None = HfArg(
        default=None,
        help="Fields to change in a model named above, as JSON: '{\"num_hidden_layers\": 2}'; the others stay.",
    )
    preset: str | None = HfArg(
        default=None, help="Of surgery. paper: four terms, plain ascent; safe (default): five, a bounded forget loss."
    )
    baselines: list[str] | None = HfArg(
        default=None,
        help="Who steps, all if not given. "
        + " ".join(f"{name}: {', '.join(suite.baselines)}." for name, suite in SUITES.items()),
    )
    batch_size: int = HfArg(default=2, help="Pairs of a step, or rows of each set of a surgery.")
    length: int = HfArg(default=128, help="Tokens of a row; of preferences the longest, a quarter of them prompt.")
    dtype: str = HfArg(default="float32", help=f"{', '.join(DTYPES)}; mixed: float32 weights, bfloat16 autocast.")
    gradient_checkpointing: bool = HfArg(
        default=False, help="Recompute layers in the backward pass, as DPOConfig does by default."
    )
    lora_rank: int = HfArg(
        default=0, help="Of rainbowpo: adapters of this rank on all linear layers; 0 trains all weights."
    )
    mixed_lengths: bool = HfArg(default=False, help="Of rainbowpo: lengths log-uniform over a factor of 32.")
    rounds: int = HfArg(default=20, help="Timed rounds; in each, every baseline makes one step.")
    warmup: int = HfArg(default=3, help="Rounds before them.")
    logging_steps: int = HfArg(default=10, help="A step's share of a log is 1 / this; 10 is the default of DPOConfig.")
    memory_steps: int = HfArg(default=3, help="Steps whose peak memory is taken; 0 leaves memory out.")
    seed: int = HfArg(default=0, help="Of weights and tokens.")
    output_dir: str = HfArg(default="runs/trainers", help="Folder for the results.")

    def __post_init__(self) -> None:
        check_names("--trainer", [self.trainer], SUITES)
        check_names("--baselines", self.baselines, SUITES[self.trainer].baselines)
        check_names("--dtype", [self.dtype], DTYPES)
        for name, owner in (("preset", "surgery"), ("lora_rank", "rainbowpo"), ("mixed_lengths", "rainbowpo")):
            if getattr(self, name) and self.trainer != owner:
                raise ValueError(f"--{name} {getattr(self, name)} goes with --trainer {owner}, not {self.trainer}.")
        if self.trainer == "surgery":
            self.preset = self.preset or "safe"
            check_names("--preset", [self.preset], PRESETS)
        least_of = {"batch_size": 1, "length": 8, "rounds": 1, "warmup": 1, "logging_steps": 1}
        self.check_least(least_of | {"memory_steps": 0, "lora_rank": 0})

    @property
    def chosen(self) -> list[str]:
        """The named baselines, all if none is, in the order of the table."""
        return [name for name in SUITES[self.trainer].baselines if self.baselines is None or name in self.baselines]

    def workload(self, device: torch.device) -> Workload:
        """What is the same for all baselines."""
        names = {entry.name for entry in dataclasses.fields(Workload)} - {"device"}
        return Workload(**{name: getattr(self, name) for name in names}, device=device.type)


@dataclass
class Measurement:
    """What is known of one baseline; `reason` says why the rest is missing. Times are those of the timed rounds."""

    name: str
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


def take_memory(measurements: Sequence[Measurement], workload: Workload, num_steps: int, bar: tqdm) -> None:
    """Fill in `peak_mib`, each in a fresh process, so that neither caches nor leftovers of another count.

    They are forked from one that has imported everything and touched no device.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_moe_cpt.scripts.benchmarks.trainers"])
    for measurement in measurements:
        bar.set_description(f"memory of {measurement.name}")
        with Attempt() as attempt, ProcessPoolExecutor(1, context) as pool:
            measurement.peak_mib = pool.submit(peak_mebibytes, measurement.name, workload, num_steps).result()
        measurement.memory_reason = attempt.reason
        bar.update()


def take_times(measurements: Sequence[Measurement], args: TrainersArguments, workload: Workload, bar: tqdm) -> None:
    """Fill in the times of every baseline: a step each a round, and each round another one begins."""
    stopwatch = tools.Stopwatch(torch.device(workload.device))
    ready: list[tuple[Measurement, Steps]] = []
    for measurement in measurements:
        bar.set_description(f"building {measurement.name}")
        with Attempt() as attempt:
            steps = SUITES[workload.trainer].steps(measurement.name, workload)
            measurement.parameters = steps.trainer.model.num_parameters()
            ready.append((measurement, steps))
        measurement.reason = attempt.reason
        bar.update()
    for number in range(args.warmup + args.rounds):
        bar.set_description("warming up" if number < args.warmup else "rounds")
        first = number % max(1, len(ready))
        for measurement, steps in ready[first:] + ready[:first]:
            if measurement.reason is None:
                with Attempt() as attempt:
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


def result_row(measurement: Measurement, args: TrainersArguments, facts: dict[str, Any]) -> dict[str, Any]:
    """One line of preference.csv or surgery_<preset>.csv."""
    totals = measurement.totals(args.logging_steps)
    return {
        "contender": measurement.name,
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
    measurements: Sequence[Measurement], args: TrainersArguments, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """For each comparison time, taken in each round, and memory."""
    found, rows = {m.name: m for m in measurements if m.reason is None}, []
    for comparison in SUITES[args.trainer].comparisons:
        if comparison.name not in found or comparison.baseline not in found:
            continue
        ours, theirs = found[comparison.name], found[comparison.baseline]
        pairs = zip(ours.totals(args.logging_steps), theirs.totals(args.logging_steps), strict=True)
        of_memory = [ours.peak_mib / theirs.peak_mib] if ours.peak_mib and theirs.peak_mib else []
        measured = {
            "time": ([mine / yours for mine, yours in pairs], comparison.time_bar),
            "memory": (of_memory, comparison.memory_bar),
        }
        for quantity, (ratios, bar) in measured.items():
            if ratios:
                names = {"contender": comparison.name, "baseline": comparison.baseline, "quantity": quantity}
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


KEPT = "kept of the reference"  # share of a whole reference model that a cached one still holds in memory
SLACK = 0.02  # of that share: buffers of a batch's states


def reference_mebibytes(workload: Workload) -> tuple[float, float]:
    """Size of the whole model before surgery, and of its head alone, which a cache keeps."""
    with torch.device("meta"):
        model = build_model(dataclasses.replace(workload, device="meta"))
    parameters = sum(weight.nbytes for weight in model.parameters())
    head = sum(weight.nbytes for weight in model.get_output_embeddings().parameters())
    return parameters / tools.MEBIBYTE, head / tools.MEBIBYTE


def kept_rows(measurements: Sequence[Measurement], workload: Workload, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A ratio line for what the cache of a surgery leaves of the reference in memory; the bar is its head."""
    peaks = {m.name: m.peak_mib for m in measurements if m.peak_mib}
    if not {"by-term", "by-term-copy"} <= peaks.keys():
        return []
    whole, head = reference_mebibytes(workload)
    kept, bar = 1.0 - (peaks["by-term-copy"] - peaks["by-term"]) / whole, head / whole + SLACK
    names = {"contender": "by-term", "baseline": "by-term-copy", "quantity": KEPT}
    return [names | _spread([kept]) | {"bar": bar, "verdict": _verdict([kept], bar)} | facts]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure memory, then time; write after each."""
    (args,) = parse_arguments((TrainersArguments,), argv, program="trainers.py", description=__doc__)
    device = choose_device(args.device)
    workload, folder = args.workload(device), Path(args.output_dir)
    check_model(workload)
    machine = machine_facts(device, args.commit)
    facts = workload.facts() | machine
    measurements = [Measurement(name) for name in args.chosen]
    name = "preference" if args.trainer == "rainbowpo" else f"surgery_{args.preset}"

    def write() -> list[dict[str, Any]]:
        write_csv(folder / f"{name}.csv", [result_row(m, args, facts) for m in measurements])
        ratios = ratio_rows(measurements, args, facts) + kept_rows(measurements, workload, facts)
        write_csv(folder / f"{name}_ratios.csv", ratios)
        return ratios

    turns = len(measurements) * (2 if args.memory_steps else 1) + args.warmup + args.rounds
    with tqdm(total=turns, unit="turn", dynamic_ncols=True) as bar:
        for measurement in measurements if args.memory_steps else ():
            take_memory([measurement], workload, args.memory_steps, bar)
            write()
        take_times(measurements, args, workload, bar)
        bar.set_description("done")
    ratios = write()
    for measurement in measurements:
        if measurement.reason or measurement.memory_reason:
            print(f"{measurement.name}: {measurement.reason or measurement.memory_reason}")
    rows = f"rows of each set of {args.preset}" if args.preset else "pairs"
    print(
        f"\n{machine['device']}, torch {machine['torch']}, {args.model}, {args.dtype}, {args.batch_size} {rows} of "
        f"{args.length} tokens, {args.rounds} rounds; files: {folder}\n"
    )
    print(text_of(folder / f"{name}.csv"))
    if ratios:
        print(f"\n{text_of(folder / f'{name}_ratios.csv')}")


if __name__ == "__main__":
    run_script(main)
