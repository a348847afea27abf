"""Compare surgery methods on models that learnt a SurgeryBench: what is gone, what is new, what stayed.

A cell is a seed of one architecture: a world of its own, a model trained from scratch on the texts before the change
("before"), another on those after it that never read what is to be forgotten ("retrained"), and one run of each method
from the model before; all are asked the same questions, as `hf-moe-cpt surgery-eval` does. Methods share steps and
rows of a step, and each had the same number of settings to choose from: learning rates times strengths, judged by
validation questions about worlds of their own. A strength multiplies the weights of the forget losses, or what a
method has instead. `--setting gpu` takes models of 100 million parameters and real text among what they read. What is
measured and how: docs/surgery_comparison.md.

Models read the texts of the bench `epochs` times, each text a row of its own, and real text once, cut into rows. The
tokenizer is made from all texts of the bench, those that are never read included, so that no word is easier for a
model that has read it.

    accuracy/<set>              MCQ accuracy of a set's questions; chance is 1/3
    accuracy/<set>_paraphrase   the same questions in roundabout words
    accuracy/changed            of the update set, questions about facts that changed
    old_answers                 share of these whose old answer is likelier than the new one
    ce/<set>                    nats per token, the mean over texts of their means
    gauge                       ce/unlearn - ce/unseen: 0 is forgotten, above is over-forgotten
    kl/<set>, agreement/<set>   KL(before || now) in nats and share of equal first choices, means over tokens

A claim holds in a seed or it does not; it is confirmed if it holds in all, refuted if in none, and mixed otherwise.
Targets of the method "safe" are about means over seeds of differences and ratios within a seed. Source: ours; claims,
objective, accuracy and the weights of "paper" follow arXiv 2409.13054, the others what is known of gradient ascent.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_program, run_script
from hf_moe_cpt.data.python_corpus import build_python_corpus, train_byte_level_bpe
from hf_moe_cpt.data.random import derive_seed, permute
from hf_moe_cpt.data.surgery_bench import SETS, SurgeryBench
from hf_moe_cpt.evaluation.attacks import relearn
from hf_moe_cpt.evaluation.resumable import ResumableFolder
from hf_moe_cpt.evaluation.scoring import (
    EvalSettings,
    option_losses,
    questions_of,
    read_documents,
    room_of,
    score_tokens,
)
from hf_moe_cpt.evaluation.surgery import evaluate_model
from hf_moe_cpt.evaluation.text_metrics import forgetting_part, mcq_correct, steps_until
from hf_moe_cpt.machine import choose_device, machine_facts, release_memory
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.reports import text_table
from hf_moe_cpt.scripts.replication.sweep import (
    SCALE_OF_SWEEP,
    Column,
    Crew,
    Records,
    check_choice,
    check_request,
    grouped_bars,
    open_folder,
    plotting,
    t_interval,
    table_row,
    write_page,
    write_results,
)
from hf_moe_cpt.trainers.surgery.losses import TERMS
from hf_moe_cpt.trainers.surgery.surgery_config import SurgeryConfig, preset_settings
from hf_moe_cpt.trainers.surgery.surgery_trainer import SurgeryTrainer


DATA = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
BEFORE, RETRAINED, SAFE = "before", "retrained", "safe"
TUNING_SEED = 0  # final runs have the seeds from 1 on


@dataclass(frozen=True)
class Method:
    """A preset, what differs from it, and the fields that a strength multiplies."""

    preset: str
    changes: dict[str, Any]
    scaled: list[str]


METHODS = {name: Method(**fields) for name, fields in DATA["methods"].items()}


@dataclass(frozen=True)
class Scale:
    """Sizes of everything that one setting trains and asks."""

    # --- the world and the models that read it ---
    subjects: int  # of each of the five groups
    kinds: list[str]
    forms: list[str]  # documents of a subject
    changed_facts: int  # of the eight of each updated subject
    keep_hubs: bool  # whether retain holds the texts about cities, firms and schools too
    real_characters: int  # of real text read beside the bench; 0: none
    vocab_size: int
    max_length: int
    epochs: int  # in which the texts of the bench are read; real text is read once
    batch_size: int
    training_rate: float
    models: dict[str, dict[str, Any]]  # fields of the configuration, by architecture
    seeds: dict[str, int]  # final runs of a method, by architecture
    # --- the operation ---
    steps: int
    rows: int  # of each set in a step
    eval_steps: int  # between two measurements of "safe", whose stop rules need them
    eval_rows: int  # of each set in such a measurement
    learning_rates: list[float]
    strengths: list[float]
    # --- the questions ---
    max_questions: int  # of each set and kind
    max_documents: int  # of each set
    relearn_steps: int  # the 2k of "no faster in k steps than the retrained model in 2k"
    relearn_every: int
    relearn_rate: float


SETTINGS = {name: Scale(**fields) for name, fields in DATA["settings"].items()}
Choice = tuple[float, float]  # learning rate and strength
# By setting, architecture and method. Only small was tuned; gpu takes its choices, in the ratio of the training rates.
CHOSEN: dict[str, dict[str, dict[str, Choice]]] = {
    setting: {
        architecture: {
            name: (scale.training_rate / SETTINGS["small"].training_rate * rate, strength)
            for name, (rate, strength) in chosen.items()
        }
        for architecture, chosen in DATA["chosen"].items()
    }
    for setting, scale in SETTINGS.items()
}


@dataclass(frozen=True)
class Run:
    """One model that is examined: of a method, or BEFORE or RETRAINED, which have neither rate nor strength."""

    method: str
    architecture: str
    seed: int
    split: str = "test"  # of the questions: "validation" for the choice of settings
    learning_rate: float = 0.0
    strength: float = 1.0

    @property
    def name(self) -> str:
        """Also its file in the folder, without the ending."""
        start = f"{self.architecture}-seed{self.seed}-{self.split}-{self.method}"
        return f"{start}-lr{self.learning_rate:g}-strength{self.strength:g}" if self.method in METHODS else start

    @property
    def cell(self) -> str:
        """Architecture and seed, which have their own models before and retrained."""
        return f"{self.architecture}-seed{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """Everything that decides the numbers, besides which methods, architectures and seeds are asked for."""

    setting: str
    scale: Scale
    device: str  # "cpu" or "cuda"
    first_seed: int = TUNING_SEED + 1  # of the final runs

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same in a folder that is taken up again, as JSON can hold it."""
        scale = {name: v for name, v in dataclasses.asdict(self.scale).items() if name not in SCALE_OF_SWEEP}
        return {"setting": self.setting, "device": self.device} | scale

    def tuning_runs(self, architecture: str, method: str) -> list[Run]:
        """The grid of a method."""
        return [
            Run(method, architecture, TUNING_SEED, "validation", rate, strength)
            for strength in self.scale.strengths
            for rate in self.scale.learning_rates
        ]

    def final_runs(self, architecture: str, method: str, rate: float = 0.0, strength: float = 1.0) -> list[Run]:
        """Runs of one method, or of BEFORE or RETRAINED, with the seeds that no choice has seen."""
        seeds = range(self.first_seed, self.first_seed + self.scale.seeds[architecture])
        return [Run(method, architecture, seed, "test", rate, strength) for seed in seeds]

    def surgery_settings(self, run: Run) -> dict[str, Any]:
        """Fields of `SurgeryConfig` that make this run its method; where and on what it runs is left open."""
        method, scale = METHODS[run.method], self.scale
        defaults = {field.name: field.default for field in dataclasses.fields(SurgeryConfig)}
        settings = preset_settings(method.preset) | method.changes | {"learning_rate": run.learning_rate}
        for name in method.scaled:
            settings[name] = run.strength * settings.get(name, defaults[name])
        return settings | {
            **{f"{name}_batch_size": scale.rows for name in TERMS},
            "max_steps": scale.steps,
            "eval_steps": scale.eval_steps,  # only where a preset measures at all
            "eval_rows": scale.eval_rows,
            "max_length": scale.max_length,
            "gradient_checkpointing": False,  # the same numbers in less time
            "seed": run.seed,
        }


def model_config(comparison: Comparison, architecture: str, vocab_size: int) -> PretrainedConfig:
    """The configuration of an untrained model; token 0 ends a text and token 1 pads."""
    kind = {"llama": LlamaConfig, "cpt_moe": CptMoeConfig}[architecture]
    return kind(
        **comparison.scale.models[architecture],
        vocab_size=vocab_size,
        max_position_embeddings=2 * comparison.scale.max_length,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )


ADAM_BETAS = (0.9, 0.99)
WARMUP = 0.1  # of all steps; then linearly down to FLOOR
FLOOR = 0.02
BUCKET = 8  # batches of which the rows are sorted by length together
HELD_OUT = 0.05  # of the real text
REAL_ROWS = 200  # of real text among what is to be kept; the texts of the bench must be the most of it


@dataclass(frozen=True)
class Material:
    """What the models of one seed read and are asked. real, held_out: rows with `text`, None without real text."""

    bench: SurgeryBench
    tokenizer: PreTrainedTokenizerBase
    real: datasets.Dataset | None
    held_out: datasets.Dataset | None

    def retained(self) -> datasets.Dataset:
        """Rows on which a model must stay as it is: the retain set, and beginnings of real texts."""
        rows = self.bench.documents["retain"]
        if self.real is None:
            return rows
        real = self.real.select(range(min(REAL_ROWS, len(self.real))))
        return datasets.concatenate_datasets([rows.select_columns("text"), real.select_columns("text")])


def make_material(scale: Scale, seed: int, cache_dir: Path) -> Material:
    """The world of a seed. cache_dir: where real text is kept once it has been collected."""
    bench = make_bench(scale, seed)
    real = held_out = None
    if scale.real_characters:
        limits = {"max_characters_per_domain": scale.real_characters, "held_out_fraction": HELD_OUT}
        prose = build_python_corpus(**limits, cache_dir=cache_dir, progress=False)["prose"]
        real, held_out = prose["train"], prose["held_out"]
    texts = [text for rows in bench.documents.values() for text in rows["text"]]
    texts += [] if real is None else list(real["text"])
    tokenizer = train_byte_level_bpe(texts, scale.vocab_size, model_max_length=2 * scale.max_length, progress=False)
    return Material(bench, tokenizer, real, held_out)


def make_bench(scale: Scale, seed: int) -> SurgeryBench:
    """The bench of a seed, with or without the texts and questions about hubs."""
    bench = SurgeryBench.generate(
        seed, 5 * scale.subjects, tuple(scale.kinds), tuple(scale.forms), scale.changed_facts
    )
    if scale.keep_hubs:
        return bench
    return SurgeryBench(_without_hubs(bench.documents, scale), _without_hubs(bench.questions, scale), bench.version)


def _without_hubs(tables: datasets.DatasetDict, scale: Scale) -> datasets.DatasetDict:
    found = {}
    for name, rows in tables.items():
        found[name] = rows.select(np.flatnonzero(np.isin(np.asarray(rows["subject_kind"]), scale.kinds)))
    return datasets.DatasetDict(found)


def train_model(comparison: Comparison, run: Run, material: Material) -> PreTrainedModel:
    """A model that has read what `run` asks for, BEFORE or RETRAINED, in evaluation mode."""
    scale, device = comparison.scale, torch.device(comparison.device)
    is_retrained = run.method == RETRAINED
    corpus = material.bench.retrained_corpus() if is_retrained else material.bench.before_corpus()
    texts = (corpus["text"], [] if material.real is None else material.real["text"])
    rows, real = (token_rows(material.tokenizer, list(part), scale.max_length) for part in texts)
    batches = list(reading_order(rows, real, scale, derive_seed("surgery", run.method, run.seed)))
    set_seed(derive_seed("model", run.seed) % 2**31)
    config = model_config(comparison, run.architecture, len(material.tokenizer))
    model = AutoModelForCausalLM.from_config(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=scale.training_rate, betas=ADAM_BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, len(batches)))
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**padded(batch, device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def rate_share(step: int, num_steps: int) -> float:
    """Share of the learning rate at a step, from 0: up during WARMUP, then down to FLOOR."""
    warmup = max(1.0, WARMUP * num_steps)
    return min((step + 1) / warmup, max(FLOOR, (num_steps - step) / max(1.0, num_steps - warmup)))


def token_rows(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int) -> list[list[int]]:
    """Tokens of each text and an end, cut into rows of at most max_length; rows of a single token are left out."""
    rows = []
    for ids in tokenizer(texts)["input_ids"] if texts else []:
        ids = [*ids, tokenizer.eos_token_id]
        rows += [ids[begin : begin + max_length] for begin in range(0, len(ids), max_length)]
    return [row for row in rows if len(row) > 1]


def reading_order(rows: list[list[int]], real: list[list[int]], scale: Scale, seed: int) -> Iterator[list[list[int]]]:
    """Batches of all epochs: every row in each epoch, an equal part of the real rows beside them, similar lengths."""
    real_order = permute(np.arange(len(real)), len(real), derive_seed(seed, "real")) if real else np.arange(0)
    for epoch, part in enumerate(np.array_split(real_order, scale.epochs)):
        pool = rows + [real[place] for place in part]
        order = permute(np.arange(len(pool)), len(pool), derive_seed(seed, epoch))
        batches = []
        for begin in range(0, len(order), BUCKET * scale.batch_size):
            places = sorted(order[begin : begin + BUCKET * scale.batch_size], key=lambda place: len(pool[place]))
            batches += [places[at : at + scale.batch_size] for at in range(0, len(places), scale.batch_size)]
        for place in permute(np.arange(len(batches)), len(batches), derive_seed(seed, epoch, "batches")):
            yield [pool[row] for row in batches[place]]


def padded(rows: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels (B, S), padded on the right; padding is no label."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def measures_of(raw: Mapping[str, Any]) -> dict[str, float]:
    """Everything that `raw` of `evaluate_model` has a part for."""
    found: dict[str, float] = {}
    for name, kinds in raw.get("questions", {}).items():
        for kind, columns in kinds.items():
            label = name if kind == "mcq" else f"{name}_{kind}"
            found[f"accuracy/{label}"] = _accuracy(columns)
    asked = raw.get("questions", {}).get("update", {}).get("mcq")
    if asked is not None:
        found |= _about_changes(asked)
    for name, columns in raw.get("texts", {}).items():
        found[f"ce/{name}"] = -fmean(fmean(logp) for logp in columns["logp"])
    if {"ce/unlearn", "ce/unseen"} <= found.keys():
        found["gauge"] = found["ce/unlearn"] - found["ce/unseen"]
    for name, columns in raw.get("divergence", {}).items():
        found[f"kl/{name}"] = float(np.concatenate(columns["kl"]).mean())
        found[f"agreement/{name}"] = float(np.concatenate(columns["agrees"]).mean())
    return found


def _accuracy(columns: Mapping[str, Sequence[Any]]) -> float:
    return float(mcq_correct(option_losses(columns), columns["answer"]).mean())


def _about_changes(columns: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    places = [place for place, old in enumerate(columns["old_answer"]) if old is not None]
    if not places:
        return {}
    losses = option_losses(columns)
    changed = {name: [columns[name][place] for place in places] for name in ("logp", "tokens", "answer")}
    old, new = (losses[places, [columns[name][place] for place in places]] for name in ("old_answer", "answer"))
    return {"accuracy/changed": _accuracy(changed), "old_answers": float(np.mean(old < new))}


def tuning_criterion(measures: Mapping[str, float]) -> float:
    """What settings are chosen by, in [0, 1]: the harmonic mean of what was forgotten, learnt and kept.

    Forgotten: 1 - |accuracy on unlearn - accuracy on unseen|; learnt and kept: accuracy on update and retain.
    """
    forgotten = forgetting_part(measures["accuracy/unlearn"], measures["accuracy/unseen"])
    return harmonic_mean((forgotten, measures["accuracy/update"], measures["accuracy/retain"]))


def curve_of(raw: Mapping[str, Any]) -> dict[str, list[float]]:
    """Of a relearning curve: `steps`, and the accuracy at each for subjects that were taught and for the others."""
    groups = {name: values for name, values in raw.items() if name != "steps"}
    curve = {name: [fmean(answers["right"]) for answers in values] for name, values in groups.items()}
    if not all(map(math.isfinite, chain.from_iterable(curve.values()))):
        raise ValueError("the model said NaN while it relearnt: there is no curve.")
    return {"steps": list(raw["steps"])} | curve


KINDS = ("mcq", "paraphrase")
EVAL_BATCH_SIZE = 32


class Worker:
    """Trains, operates on and examines the models of one comparison; models before are kept under `root`."""

    def __init__(self, comparison: Comparison, root: Path) -> None:
        self.comparison, self.root = comparison, root
        self.device = torch.device(comparison.device)
        self._materials: dict[int, Material] = {}

    def material(self, seed: int) -> Material:
        """The world of a seed and its tokenizer, made once."""
        if seed not in self._materials:
            self._materials[seed] = make_material(self.comparison.scale, seed, self.root / "corpus")
        return self._materials[seed]

    def carry_out(self, run: Run) -> dict[str, Any]:
        """The record of a run: measures by name, settings, curve of relearning, seconds, and peak memory on a GPU."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        model, training = self._operated(run) if run.method in METHODS else (self._trained(run), {})
        trained = time.perf_counter()
        record = {"method": run.method, "architecture": run.architecture, "seed": run.seed, "split": run.split}
        record |= {"learning_rate": run.learning_rate, "strength": run.strength, "training": training}
        if self.device.type == "cuda":
            record["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        record |= self.examine(model, run)
        record["seconds"] = {"training": trained - started, "examination": time.perf_counter() - trained}
        del model
        release_memory(self.device)
        return record

    def _trained(self, run: Run) -> PreTrainedModel:
        model = train_model(self.comparison, run, self.material(run.seed))
        if run.method == BEFORE:
            partial, folder = self.root / "models" / f".{run.cell}.partial", self.root / "models" / run.cell
            shutil.rmtree(partial, ignore_errors=True)
            model.save_pretrained(partial)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
        return model

    def before(self, run: Run) -> PreTrainedModel:
        """The model before of the run's cell, in float32."""
        folder = self.root / "models" / run.cell
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        return model.to(self.device).eval()

    def _operated(self, run: Run) -> tuple[PreTrainedModel, dict[str, Any]]:
        material = self.material(run.seed)
        settings = self.comparison.surgery_settings(run)
        rows = dict(material.bench.documents) | {"retain": material.retained()}
        with tempfile.TemporaryDirectory() as folder:
            trainer = SurgeryTrainer(
                self.before(run),
                args=_arguments(settings, folder, self.device),
                **{f"{name}_dataset": rows[name] for name in SETS},
                processing_class=material.tokenizer,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        facts = {"settings": settings, "steps": trainer.state.global_step, "log": trainer.state.log_history}
        facts["forget_target"] = trainer.aims.forget
        return trainer.model.eval(), facts

    def examine(self, model: PreTrainedModel, run: Run) -> dict[str, Any]:
        """`measures` of the run's split and, of the test split, `relearn`; of the validation split, `criterion`."""
        scale, material = self.comparison.scale, self.material(run.seed)
        settings = EvalSettings(
            split=run.split,
            parts=("questions", "texts", "divergence") if run.split == "test" else ("questions",),
            kinds=KINDS if run.split == "test" else KINDS[:1],
            max_questions=scale.max_questions,
            max_documents=scale.max_documents,
            batch_size=EVAL_BATCH_SIZE,
            max_length=scale.max_length,
            relearn_steps=scale.relearn_steps,
            relearn_every=scale.relearn_every,
            relearn_lr=scale.relearn_rate,
            seed=run.seed,
        )
        reference = model if run.method == BEFORE else self.before(run)
        raw = evaluate_model(model, material.tokenizer, material.bench, settings, reference)
        measures = measures_of(raw)
        if run.split != "test":
            return {"measures": measures, "criterion": tuning_criterion(measures)}
        if material.held_out is not None:
            measures["ce/real"] = self._loss_of(model, material, settings)
        if run.method == BEFORE:
            return {"measures": measures}
        bench = _only_unlearn(material.bench)
        asked = questions_of(bench, "unlearn", material.tokenizer, model, settings)
        curves = relearn(model, material.tokenizer, bench, asked, settings)
        return {"measures": measures, "relearn": curve_of(curves["own"])}

    def _loss_of(self, model: PreTrainedModel, material: Material, settings: EvalSettings) -> float:
        """Mean loss of held-out real text, in nats per token."""
        rows = [{"text": text, "prefix": ""} for text in material.held_out["text"][: settings.max_documents]]
        documents = read_documents(rows, material.tokenizer, room_of(model, settings))
        scores = score_tokens(model, [document.tokens for document in documents], EVAL_BATCH_SIZE)
        return -sum(float(score.logp.sum()) for score in scores) / sum(len(score.logp) for score in scores)


def _only_unlearn(bench: SurgeryBench) -> SurgeryBench:
    """The bench without the documents of other sets, which the relearning attack would train on as well."""
    documents = {name: rows if name == "unlearn" else rows.select([]) for name, rows in bench.documents.items()}
    return SurgeryBench(datasets.DatasetDict(documents), bench.questions, bench.version)


def _arguments(settings: dict[str, Any], folder: str, device: torch.device) -> SurgeryConfig:
    """Training in single precision on a CPU, in bfloat16 with single-precision weights on a GPU."""
    on_gpu = device.type == "cuda"
    return SurgeryConfig(
        **settings,
        output_dir=folder,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        log_term_gradients=False,
        report_to="none",
        disable_tqdm=True,
    )


Record = Mapping[str, Any]
Cell = Mapping[str, Record]  # the records of one seed by method


class Claim(NamedTuple):
    """Something that is said of the methods; it holds in a seed if all of its numbers are in (above, at_most]."""

    text: str
    of: str  # a name of CLAIMED
    methods: list[str]  # that must have been run, beside BEFORE and RETRAINED
    form: str  # how a number is written
    above: float = -math.inf
    at_most: float = math.inf


class Target(NamedTuple):
    """Something that the method safe should reach: a mean over seeds in [least, most]."""

    text: str
    of: str  # a name of TARGETED
    form: str
    measure: str = ""
    other: str = SAFE  # the model that it is compared with
    least: float = -math.inf
    most: float = math.inf


CLAIMS = [Claim(**fields) for fields in DATA["claims"]]
TARGETS = [Target(**fields) for fields in DATA["targets"]]


def cells_of(records: Sequence[Record], *needed: str) -> list[Cell]:
    """The records of one architecture by seed, and by method within a seed; seeds that lack a method are left out."""
    seeds = sorted({record["seed"] for record in records})
    cells = [{record["method"]: record for record in records if record["seed"] == seed} for seed in seeds]
    return [cell for cell in cells if cell.keys() >= set(needed)]


def claims_of(architecture: str, records: Sequence[Record]) -> list[dict[str, str]]:
    """A row for each claim whose methods were run: verdict, and the numbers that decide it."""
    rows = []
    for claim in CLAIMS:
        found = [
            CLAIMED[claim.of](cell, claim.methods) for cell in cells_of(records, *claim.methods, BEFORE, RETRAINED)
        ]
        if not found:
            continue
        held = sum(all(claim.above < value <= claim.at_most for value in values) for values in found)
        mixed = f"mixed, {held} of {len(found)} seeds"
        verdict = "confirmed" if held == len(found) else "refuted" if held == 0 else mixed
        numbers = "; ".join(", ".join(map(claim.form.format, values)) for values in found)
        rows.append({"architecture": architecture, "claim": claim.text, "verdict": verdict, "in each seed": numbers})
    return rows


def loss_ratios(cell: Cell, methods: Sequence[str]) -> list[float]:
    """Loss on the unlearn set over the loss on unseen text before surgery, of each method."""
    unseen = cell[BEFORE]["measures"]["ce/unseen"]
    return [cell[method]["measures"]["ce/unlearn"] / unseen for method in methods]


def update_spread(cell: Cell, methods: Sequence[str]) -> list[float]:
    """Largest minus smallest accuracy on updates, in points."""
    values = [cell[method]["measures"]["accuracy/update"] for method in methods]
    return [100 * (max(values) - min(values))]


def left_over(cell: Cell, methods: Sequence[str]) -> list[float]:
    """What a method leaves of unlearn and obsolete above the retrained model, in points of accuracy."""
    sets = ("accuracy/unlearn", "accuracy/obsolete")
    return [rise(cell[method], cell[RETRAINED], name) for method in methods for name in sets]


CLAIMED = {"loss_ratio": loss_ratios, "update_spread": update_spread, "left_over": left_over}


def targets_of(architecture: str, records: Sequence[Record]) -> list[dict[str, str]]:
    """A row for each target of the method safe whose runs are there: what was asked for, what came, whether met.

    An interval over seeds that reaches over a bar settles nothing: "undecided", as is one seed.
    """
    rows = []
    for target in TARGETS:
        cells = cells_of(records, SAFE, target.other)
        if cells:
            values = [TARGETED[target.of](cell[SAFE], cell[target.other], target.measure) for cell in cells]
            value, half = t_interval(values)
            row = {"architecture": architecture, "target": target.text, "value": target.form.format(value)}
            row["interval"] = "one seed" if half is None else f"± {target.form.format(half).lstrip('+')}"
            rows.append(row | {"met": "undecided" if half is None else met(target, value - half, value + half)})
    return rows


def met(target: Any, low: float, high: float) -> str:
    """Whether an interval lies within a target: yes, no, or undecided where it reaches over a bar."""
    if target.least <= low and high <= target.most:
        return "yes"
    return "no" if high < target.least or low > target.most else "undecided"


def rise(ours: Record, theirs: Record, measure: str) -> float:
    """By how much an accuracy lies above that of another model, in points."""
    return 100 * (ours["measures"][measure] - theirs["measures"][measure])


def ratio(ours: Record, theirs: Record, measure: str) -> float:
    """A measure over that of another model."""
    return ours["measures"][measure] / theirs["measures"][measure]


def relearning_lead(ours: Record, theirs: Record, _: str = "") -> float:
    """Mean over k of accuracy after k steps of relearning, less that of the other after 2k, in points.

    On the subjects that are taught; k are the steps above 0 for which 2k was measured too.
    """
    curves = (record["relearn"] for record in (ours, theirs))
    mine, others = (dict(zip(curve["steps"], curve["taught"], strict=True)) for curve in curves)
    return 100 * fmean(mine[k] - others[2 * k] for k in mine if k and 2 * k in others)


TARGETED: dict[str, Callable[[Record, Record, str], float]] = {
    "rise": rise,
    "fall": lambda ours, theirs, measure: rise(theirs, ours, measure),
    "ratio": ratio,
    "percent": lambda ours, theirs, measure: 100 * ratio(ours, theirs, measure),
    "gauge": lambda ours, _, measure: 100 * abs(ours["measures"]["gauge"]) / ours["measures"]["ce/unseen"],
    "relearning_lead": relearning_lead,
}


CHANCE = 1 / 3
RELEARN_STEPS, SECONDS = "relearn_steps", "seconds"
LEGEND = (
    "accuracies in % of questions with three options, losses (CE) and KL in nats per token, gauge: CE unlearn - CE "
    "unseen; 95 % intervals over seeds",
    "relearn: steps of training on unlearned texts until half of the accuracy is back, or the most that were made",
)
COLUMNS: tuple[Column, ...] = tuple(map(tuple, DATA["columns"]))


def flat_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row for each finished run: who it is, its settings, all measures, steps of relearning, seconds."""
    before = {(r["architecture"], r["seed"]): r for r in records if r["method"] == BEFORE}
    rows = []
    for record in records:
        row = {name: record[name] for name in ("architecture", "method", "seed", "learning_rate", "strength")}
        row |= record["measures"]
        start = before.get((record["architecture"], record["seed"]))
        if "relearn" in record and start is not None:
            goal = (CHANCE + start["measures"]["accuracy/unlearn"]) / 2
            curve = record["relearn"]
            steps = steps_until(curve["steps"], curve["taught"], goal)
            row[RELEARN_STEPS] = curve["steps"][-1] if steps is None else steps
        row[SECONDS] = record["seconds"]["training"]
        if "peak_gib" in record:
            row["peak_gib"] = record["peak_gib"]
        rows.append(row)
    return rows


def summary_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each architecture and method, with the mean over seeds and half its interval of each number."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for architecture in dict.fromkeys(row["architecture"] for row in rows):
        for row in sorted((row for row in rows if row["architecture"] == architecture), key=_place):
            groups.setdefault((architecture, row["method"]), []).append(row)
    made = []
    for (architecture, method), runs in groups.items():
        row: dict[str, Any] = {"architecture": architecture, "method": method, "seeds": len(runs)}
        if method in METHODS:
            row |= {name: runs[0][name] for name in ("learning_rate", "strength")}
        names = [name for name in runs[0] if "/" in name or name in ("gauge", "old_answers", RELEARN_STEPS, SECONDS)]
        made.append(row | {name: t_interval([run[name] for run in runs]) for name in names})
    return made


def conclude(records: Sequence[Record], failed: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Everything that is printed and written, as JSON can hold it, besides what the comparison was.

    records: of finished final runs. failed: rows with `run` and `error`.
    """
    runs = flat_rows(records)
    architectures = list(dict.fromkeys(row["architecture"] for row in runs))
    of_each = {name: [record for record in records if record["architecture"] == name] for name in architectures}
    return {
        "rows": summary_rows(runs),
        "runs": runs,
        "failed": list(failed),
        "claims": [claim for name, own in of_each.items() for claim in claims_of(name, own)],
        "targets": [target for name, own in of_each.items() for target in targets_of(name, own)],
        "curves": [
            {name: record[name] for name in ("architecture", "method", "seed", "relearn")}
            for record in records
            if "relearn" in record
        ],
    }


def comparison_text(results: Mapping[str, Any]) -> str:
    """The table of each architecture, the verdicts on the claims, and the targets."""
    parts = []
    for architecture in dict.fromkeys(row["architecture"] for row in results["rows"]):
        own = [row for row in results["rows"] if row["architecture"] == architecture]
        shown = [column for column in COLUMNS if any(column[1] in row for row in own)]
        table = text_table([table_row(row, shown, {"rate": "learning_rate", "strength": "strength"}) for row in own])
        parts += [f"{architecture}, {max(row['seeds'] for row in own)} seeds", table]
    parts += LEGEND
    for title, key in (("Claims", "claims"), ("Targets for the method safe", "targets")):
        if results[key]:
            parts += ["", title, text_table(results[key])]
    parts += [f"{row['run']} failed: {row['error']}" for row in results["failed"]]
    return "\n".join(parts)


def draw(path: Path, results: Mapping[str, Any]) -> None:
    """Accuracies, losses, divergences and relearning, a line of panels for each architecture; needs matplotlib."""
    pyplot = plotting(path)
    if pyplot is None or not results["runs"]:
        return
    architectures = list(dict.fromkeys(row["architecture"] for row in results["runs"]))
    methods = list(dict.fromkeys(row["method"] for row in sorted(results["runs"], key=_place)))
    size = {"figsize": (24, 5 * len(architectures)), "width_ratios": (5, 2, 2, 3), "layout": "constrained"}
    figure, grid = pyplot.subplots(len(architectures), 4, squeeze=False, **size)
    for architecture, panels in zip(architectures, grid, strict=True):
        runs = [row for row in results["runs"] if row["architecture"] == architecture]
        bars = (
            ("accuracy", {name: f"accuracy/{name}" for name in SETS}),
            ("nats per token", {"CE unlearn": "ce/unlearn", "CE unseen": "ce/unseen"}),
            ("nats per token", {"KL retain": "kl/retain", "KL neighbour": "kl/neighbour"}),
        )
        for axes, (label, measures) in zip(panels, bars, strict=False):
            grouped_bars(axes, list(measures), {method: _values(runs, method, measures) for method in methods})
            axes.set(ylabel=label, yscale="linear" if label == "accuracy" else "log")
        panels[0].axhline(CHANCE, color="black", linestyle=":", linewidth=0.8)
        panels[0].set_title(architecture)
        own = [curve for curve in results["curves"] if curve["architecture"] == architecture]
        _draw_curves(panels[3], own, methods)
    figure.legend(*grid[0][0].get_legend_handles_labels(), ncols=8, loc="outside lower center")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _values(runs: Sequence[Mapping[str, Any]], method: str, measures: Mapping[str, str]) -> dict[str, list[float]]:
    """A method's values of all seeds by group; zeros are left out, which a logarithm does not show."""
    own = [row for row in runs if row["method"] == method]
    return {group: [row[name] for row in own if row.get(name, 0.0) > 0.0] for group, name in measures.items()}


def _place(row: Mapping[str, Any]) -> int:
    return [BEFORE, *METHODS, RETRAINED].index(row["method"])


def _draw_curves(axes: Any, curves: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> None:
    """Mean over seeds of the taught subjects' accuracy while they are learnt again."""
    for method in dict.fromkeys(curve["method"] for curve in curves):
        own = [curve["relearn"] for curve in curves if curve["method"] == method]
        means = [fmean(values) for values in zip(*(curve["taught"] for curve in own), strict=True)]
        axes.plot(own[0]["steps"], means, color=f"C{methods.index(method)}")
    axes.axhline(CHANCE, color="black", linestyle=":", linewidth=0.8)
    axes.set(xlabel="steps of relearning", ylabel="accuracy on taught subjects")


ARCHITECTURES = ("llama", "cpt_moe")


@dataclass
class CompareArguments:
    """What is compared and how much work to spend; the rest is in `SETTINGS`."""

    setting: str = HfArg(default="small", help=f"Size of the comparison: {', '.join(SETTINGS)}.")
    methods: list[str] = HfArg(default_factory=lambda: list(METHODS), help=f"Any of: {', '.join(METHODS)}.")
    architectures: list[str] = HfArg(
        default_factory=lambda: list(ARCHITECTURES), help=f"Any of: {', '.join(ARCHITECTURES)}."
    )
    seeds: int | None = HfArg(
        default=None, help="Final runs of each method; the setting's own if unset. More can be added."
    )
    first_seed: int = HfArg(default=TUNING_SEED + 1, help="Seed of the first final run; the others follow it.")
    tune: bool = HfArg(
        default=False, help="Choose settings by the grid, on a seed of its own, instead of taking the stored choice."
    )
    output_dir: str = HfArg(
        default="runs/surgery-methods",
        help="Folder for models, a record of each run, results and plot; finished runs are kept.",
    )
    workers: int = HfArg(default=2, help="Processes with one thread each; 1: this process does it all.")
    device: str = HfArg(default="auto", help="auto, cpu or cuda; auto: cpu with the setting small.")


def compare_main(argv: Sequence[str]) -> None:
    """Train the models before, operate on them, examine all; write and print what came out."""
    (args,) = parse_arguments((CompareArguments,), argv, program="surgery_methods.py", description=__doc__)
    comparison = make_comparison(args)
    folder = open_folder(args.output_dir, comparison.fingerprint())
    results = compare(comparison, args, folder)
    write_results(folder.root, results, results["runs"], draw, comparison_text)


def make_comparison(args: CompareArguments) -> Comparison:
    """What the arguments ask for. Raises ValueError for what cannot be run, before anything is."""
    check_request(args, SETTINGS, METHODS)
    check_choice("--architectures", args.architectures, ARCHITECTURES)
    if args.first_seed <= TUNING_SEED:
        raise ValueError(
            f"--first_seed {args.first_seed}: settings were chosen on seed {TUNING_SEED}; take a later one."
        )
    scale = SETTINGS[args.setting]
    if args.seeds is not None:
        scale = replace(scale, seeds=dict.fromkeys(scale.seeds, args.seeds))
    is_small = args.setting == "small" and args.device == "auto"
    device = "cpu" if is_small else choose_device(args.device).type
    return Comparison(args.setting, scale, device, args.first_seed)


def compare(comparison: Comparison, args: CompareArguments, folder: ResumableFolder) -> dict[str, Any]:
    """All runs that are not finished, then everything that is printed, as JSON can hold it."""
    pairs = [(name, method) for name in dict.fromkeys(args.architectures) for method in dict.fromkeys(args.methods)]
    grids = {pair: comparison.tuning_runs(*pair) if args.tune else [] for pair in pairs}
    final_models = [run for name in dict.fromkeys(args.architectures) for run in comparison.final_runs(name, BEFORE)]
    retrained = [replace(run, method=RETRAINED) for run in final_models]
    tuned_models = [Run(BEFORE, name, TUNING_SEED, "validation") for name in args.architectures if args.tune]
    num_runs = len(final_models) * (2 + len(set(args.methods))) + len(tuned_models) + sum(map(len, grids.values()))
    bar = tqdm(total=num_runs, unit="run", dynamic_ncols=True)
    with Crew(folder, args.workers, Worker, comparison, folder.root) as crew, bar:
        records = crew.records([*tuned_models, *final_models], bar)
        records |= crew.records([*retrained, *(run for grid in grids.values() for run in grid)], bar)
        chosen = {pair: choice_of(comparison, *pair, grid, records) for pair, grid in grids.items()}
        final = [run for pair, choice in chosen.items() for run in comparison.final_runs(*pair, *choice)]
        records |= crew.records(final, bar)
        bar.set_description("done")
    shown = [*final_models, *final, *retrained]
    failed = [{"run": name, "error": record["error"]} for name, record in records.items() if "error" in record]
    return {
        "comparison": comparison.fingerprint(),
        "machine": machine_facts(torch.device(comparison.device), commit=None),
        **conclude([records[run.name] for run in shown if "error" not in records[run.name]], failed),
        "tuning": [
            {"architecture": run.architecture, "method": run.method, "learning_rate": run.learning_rate}
            | {"strength": run.strength, "criterion": records[run.name].get("criterion")}
            | records[run.name].get("measures", {})
            for grid in grids.values()
            for run in grid
        ],
    }


def choice_of(comparison: Comparison, architecture: str, method: str, grid: Sequence[Run], records: Records) -> Choice:
    """Learning rate and strength of the run of a grid with the largest criterion, the stored choice without a grid.

    Raises ValueError if every run of the grid failed.
    """
    if not grid:
        return CHOSEN[comparison.setting][architecture][method]
    finished = [run for run in grid if "criterion" in records[run.name]]
    if not finished:
        error = records[grid[0].name]["error"]
        raise ValueError(f"every run of the grid of {method} on {architecture} failed, the first with: {error}")
    best = max(finished, key=lambda run: records[run.name]["criterion"])
    return best.learning_rate, best.strength


PROGRAM, GUIDE = "surgery_methods.py", "[surgery methods](../../surgery_comparison.md)"
PROGRAMS = {"compare": compare_main, "page": lambda argv: write_page(argv, PROGRAM, GUIDE, comparison_text)}


def main(argv: Sequence[str] | None = None) -> None:
    """The program that the first word names: `compare`, the first, or `page`."""
    run_program(PROGRAMS, argv)


if __name__ == "__main__":
    run_script(main)
