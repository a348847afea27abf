"""Compare surgery methods on models that learnt a SurgeryBench: what is gone, what is new, what stayed, what it cost.

A cell is a seed of one architecture: a world of its own, a model trained from scratch on the texts before the change
("before"), another on those after it that never read what is to be forgotten ("retrained"), and one run of each method
from the model before; all are asked the same questions, as `hf-moe-cpt surgery-eval` does. Methods share steps and
rows of a step. Each is tuned by a walk through a grid without end, of learning rate, strength (a factor of the weights
of the forget losses, or what a method has instead) and counterfactual copies, from the best place to its best
neighbour until the best lies inside; places are judged by validation questions about a world of their own.

Of retain, neighbour and unseen a surgery gets a part of the subjects, and keeps some of these apart to choose the best
model by; what is reported of these sets is asked about the other subjects, which nothing of it has seen. What is
claimed stands in surgery_methods.yaml, written before the runs: a difference or ratio of two numbers within a seed,
whose interval over seeds lies within bounds (confirmed, met), outside (refuted, missed), or over a bound (undecided).

With --minutes no run begins after that time; what is there is judged, and the same command goes on.

Models read the texts of the bench `epochs` times, each text a row of its own. The tokenizer is made from all texts of
the bench, those that are never read included, so that no word is easier for a model that has read it.

    accuracy/<set>               MCQ accuracy of a set's questions; chance is 1/3
    accuracy/<set>_paraphrase    the same questions in roundabout words; _4bit, _8bit: weights rounded
    accuracy/retain_anchored     of the subjects that a surgery was held to
    accuracy/<set>_old_routes    mixtures: every token takes the experts that it took before
    accuracy/changed             of the update set, questions about facts that changed
    answers/<set>                ROUGE-L recall of what the model answers by itself, no options shown
    old_answers                  share of changed facts whose old answer is likelier than the new one
    ce/<set>                     nats per token, the mean over texts of their means
    gauge                        ce/unlearn - ce/unseen: 0 is forgotten, above is over-forgotten
    kl/<set>, agreement/<set>    KL(before || now) in nats and share of equal first choices, means over tokens
    auc/min_k                    membership inference, unlearn against unseen; 1/2 is as never read
    forget_quality               p of Kolmogorov and Smirnov: truth ratios on unlearn are as of the retrained model
    relearn/untaught             accuracy after half of the facts about each subject were taught, about the other half
    drift/<set>_ce, <set>_kl     of a long run, from its first measurement on: the most that it moved away
    seconds                      of training or operation: of the processor on a CPU, whose cores are shared

Source: ours; claims, objective, accuracy and the weights of "paper" follow arXiv 2409.13054.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
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
    AutoTokenizer,
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
    truth_ratios,
    without_last,
)
from hf_moe_cpt.evaluation.surgery import evaluate_model
from hf_moe_cpt.evaluation.text_metrics import auc, forgetting_part, ks_pvalue, mcq_correct, min_k, rouge_l
from hf_moe_cpt.hub.upcycle import upcycle
from hf_moe_cpt.machine import choose_device, machine_facts, release_memory
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.reports import text_table
from hf_moe_cpt.scripts.replication.factbook import COUNTRIES, MODEL, factbook_bench, read_countries
from hf_moe_cpt.scripts.replication.sweep import (
    LEAST_SEEDS,
    Column,
    Crew,
    Place,
    Records,
    Walk,
    check_choice,
    check_request,
    end_of,
    grouped_bars,
    open_folder,
    plotting,
    t_interval,
    table_row,
    tell_rest,
    walk,
    write_page,
    write_results,
)
from hf_moe_cpt.trainers.surgery.losses import TERMS
from hf_moe_cpt.trainers.surgery.surgery_config import ANCHOR_SETS, SurgeryConfig, preset_settings
from hf_moe_cpt.trainers.surgery.surgery_trainer import SurgeryTrainer


DATA = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
BEFORE, RETRAINED, SAFE = "before", "retrained", "safe"
KNOWN_TOPIC = "capitals"  # of benches about countries: what a real model knows before anything is trained
TUNING_SEED = 0  # final runs have the seeds from 1 on
COPIES = 2  # of each forgotten text with an invented name, where there are any
# A step of each axis of the grid: a factor, or one of two levels.
FACTORS, LIMITS = {"rate": 2.0, "strength": 3.0}, {"counterfactuals": (0, 1)}


@dataclass(frozen=True)
class Method:
    """A preset, what differs from it, the axes along which it is tuned, and the fields that a strength multiplies."""

    preset: str
    changes: dict[str, Any] = field(default_factory=dict)
    scaled: list[str] = field(default_factory=lambda: ["unlearn_weight", "obsolete_weight"])
    axes: list[str] = field(default_factory=lambda: ["rate", "strength", "counterfactuals"])
    start: list[int] = field(default_factory=lambda: [0, 0, 0])  # of the walk
    architectures: list[str] | None = None  # that it is for; None: all
    tuned_as: str = ""  # the method whose settings it takes
    seeds: int | None = None  # at most
    steps: int | None = None  # in place of the setting's; measured ten times, and nothing stops it


METHODS = {name: Method(**fields) for name, fields in DATA["methods"].items()}


@dataclass(frozen=True)
class Scale:
    """Sizes of everything that one setting trains and asks."""

    # --- the world and the models that read it ---
    subjects: dict[str, int]  # of each group
    kinds: list[str]
    forms: list[str]  # documents of a subject
    changed_facts: int  # of the eight of each updated subject
    vocab_size: int
    max_length: int
    epochs: int
    batch_size: int
    training_rate: float
    # Fields of the configuration, by architecture; of a real model the topic of its bench, and experts if upcycled
    models: dict[str, dict[str, Any]]
    seeds: dict[str, int]  # final runs of a method, by architecture
    # --- the operation ---
    steps: int
    rows: int  # of each set in a step
    given: float  # share of the subjects of an anchor that a surgery gets
    held_out: float  # share of these that it keeps apart to measure on
    eval_steps: int  # between two such measurements
    eval_rows: int  # of each set in one
    rate: float  # in the middle of the grid
    rounds: dict[str, int]  # in which a grid may grow; 0: settings are taken over from the architecture before
    # --- the questions ---
    max_questions: int  # of each set and kind
    max_documents: int  # of each set
    relearn_steps: int
    relearn_every: int
    relearn_rate: float


SETTINGS = {name: Scale(**fields) for name, fields in DATA["settings"].items()}


@dataclass(frozen=True)
class Run:
    """One model that is examined: of a method, or BEFORE or RETRAINED. place: steps from the middle of the grid."""

    method: str
    architecture: str
    seed: int
    split: str = "test"  # of the questions: "validation" for the choice of settings
    place: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        """Also its file in the folder, without the ending."""
        place = "".join(f"-{axis}{step:+d}" for axis, step in self.place)
        return f"{self.architecture}-seed{self.seed}-{self.split}-{self.method}{place}"

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
    real: str | None = None  # what scripts/replication/factbook.py made, where models are real

    def topic(self, architecture: str) -> str | None:
        """Of the bench about countries; None where the world is made up."""
        return self.scale.models[architecture].get("topic")

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same in a folder that is taken up again, as JSON can hold it."""
        scale = {name: v for name, v in dataclasses.asdict(self.scale).items() if name not in ("seeds", "rounds")}
        return {"setting": self.setting, "device": self.device} | scale

    def final_runs(self, architecture: str, method: str, place: tuple[tuple[str, int], ...] = ()) -> list[Run]:
        """Runs of one method, or of BEFORE or RETRAINED, with the seeds that no choice has seen."""
        most = METHODS[method].seeds if method in METHODS else None
        count = min(self.scale.seeds[architecture], math.inf if most is None else most)
        return [
            Run(method, architecture, seed, "test", place) for seed in range(self.first_seed, self.first_seed + count)
        ]

    def surgery_settings(self, run: Run) -> dict[str, Any]:
        """Fields of `SurgeryConfig` that make this run its method; where and on what it runs is left open."""
        method, scale, steps = METHODS[run.method], self.scale, dict(run.place)
        defaults = {field.name: field.default for field in dataclasses.fields(SurgeryConfig)}
        factor = {axis: base ** steps.get(axis, 0) for axis, base in FACTORS.items()}
        settings = preset_settings(method.preset) | {
            **{f"{name}_batch_size": scale.rows for name in TERMS},
            "learning_rate": factor["rate"] * scale.rate,
            "max_steps": method.steps or scale.steps,
            "eval_steps": scale.eval_steps,  # only where a preset measures at all
            "eval_rows": scale.eval_rows,
            "eval_batch_size": scale.eval_rows,
            "held_out_fraction": scale.held_out,
            "max_length": scale.max_length,
            "gradient_checkpointing": False,  # the same numbers in less time
            "counterfactuals": COPIES * steps.get("counterfactuals", 0),
            "seed": run.seed,
        }
        if method.steps:
            settings |= {"eval_steps": method.steps // 10, "update_target": 1e-9, "save_strategy": "no"}
            settings |= {"load_best_model_at_end": False, "metric_for_best_model": None}
        settings |= method.changes
        for name in method.scaled:
            settings[name] = factor["strength"] * settings.get(name, defaults[name])
        return settings


def model_config(comparison: Comparison, architecture: str, vocab_size: int) -> PretrainedConfig:
    """The configuration of an untrained model of a made-up world; token 0 ends a text and token 1 pads."""
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


PROSE_CHARACTERS, PROSE_ROWS = 2_000_000, 100  # of English beside countries: read, and of each side of a surgery
UPCYCLED = "upcycled-base"  # folder of the real model as a mixture


@dataclass(frozen=True)
class Material:
    """What the models of one seed read and are asked. given: subjects of each anchor that a surgery gets.

    prose: English that a real model must go on writing, train and held_out; None in a made-up world.
    """

    bench: SurgeryBench
    tokenizer: PreTrainedTokenizerBase
    given: dict[str, list[str]]
    prose: Mapping[str, list[str]] | None = None

    @cached_property
    def operated(self) -> SurgeryBench:
        """The texts of a surgery."""
        return self.bench.only(self.given)

    @cached_property
    def examined(self) -> SurgeryBench:
        """Texts and questions of the examination, those of the anchors about subjects that no surgery has seen."""
        return self.bench.only(
            {name: set(self.bench.subjects(name)) - set(subjects) for name, subjects in self.given.items()}
        )

    def rows(self, name: str) -> datasets.Dataset:
        """Of a set of a surgery; prose is retained too."""
        rows = self.operated.documents[name].select_columns(["subject", "text"])
        if name != "retain" or self.prose is None:
            return rows
        texts = self.prose["train"][:PROSE_ROWS]
        own = {"subject": [f"prose {place}" for place in range(len(texts))], "text": texts}
        return datasets.concatenate_datasets([rows, datasets.Dataset.from_dict(own, features=rows.features)])


def make_material(comparison: Comparison, architecture: str, seed: int, root: Path | None = None) -> Material:
    """The world of a seed, without the texts and questions about cities, firms and schools, or countries.

    root: where prose is kept.
    """
    scale, topic, prose = comparison.scale, comparison.topic(architecture), None
    if topic is None:
        whole = SurgeryBench.generate(
            seed, scale.subjects, tuple(scale.kinds), tuple(scale.forms), scale.changed_facts
        )
        tables = (_without_hubs(tables, scale) for tables in (whole.documents, whole.questions))
        bench = SurgeryBench(*tables, whole.version)
        texts = [text for rows in bench.documents.values() for text in rows["text"]]
        tokenizer = train_byte_level_bpe(
            texts, scale.vocab_size, model_max_length=2 * scale.max_length, progress=False
        )
    else:
        countries = read_countries(Path(comparison.real) / COUNTRIES, topic)
        bench = factbook_bench(countries, topic, scale.subjects, scale.changed_facts, seed)
        tokenizer = AutoTokenizer.from_pretrained(Path(comparison.real) / MODEL, local_files_only=True)
        found = build_python_corpus(max_characters_per_domain=PROSE_CHARACTERS, cache_dir=root, progress=False)[
            "prose"
        ]
        prose = {side: list(rows["text"][:PROSE_ROWS]) for side, rows in found.items()}
    given = {}
    for name in ANCHOR_SETS:
        subjects = bench.subjects(name)
        order = permute(np.arange(len(subjects)), len(subjects), derive_seed("surgery", name, "given", seed))
        given[name] = [subjects[place] for place in order[: round(scale.given * len(subjects))]]
    return Material(bench, tokenizer, given, prose)


def base_model(comparison: Comparison, architecture: str, root: Path) -> Path:
    """Folder of the real model that is trained on; of a mixture the one that is made of it, once, under `root`."""
    dense = Path(comparison.real) / MODEL
    experts = {name: value for name, value in comparison.scale.models[architecture].items() if name != "topic"}
    if not experts:
        return dense
    folder = root / UPCYCLED
    if not folder.is_dir():
        partial = root / f".{UPCYCLED}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        upcycle(dense, partial, "switch", **experts)
        os.replace(partial, folder)
    return folder


def _without_hubs(tables: datasets.DatasetDict, scale: Scale) -> datasets.DatasetDict:
    found = {}
    for name, rows in tables.items():
        found[name] = rows.select(np.flatnonzero(np.isin(np.asarray(rows["subject_kind"]), scale.kinds)))
    return datasets.DatasetDict(found)


def train_model(comparison: Comparison, run: Run, material: Material, root: Path | None = None) -> PreTrainedModel:
    """A model that has read what `run` asks for, BEFORE or RETRAINED, in evaluation mode.

    A real model goes on from its weights; of capitals it has read before. root: where mixtures made of it are kept.
    """
    scale, device = comparison.scale, torch.device(comparison.device)
    topic, is_retrained = comparison.topic(run.architecture), run.method == RETRAINED
    set_seed(derive_seed("model", run.seed) % 2**31)
    if topic is None:
        config = model_config(comparison, run.architecture, len(material.tokenizer))
        model = AutoModelForCausalLM.from_config(config).to(device).train()
    else:
        folder = base_model(comparison, run.architecture, root)
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        model = model.to(device).train()
        if topic == KNOWN_TOPIC:
            return model.eval()
    corpus = material.bench.retrained_corpus() if is_retrained else material.bench.before_corpus()
    rows = token_rows(material.tokenizer, list(corpus["text"]), scale.max_length)
    batches = list(reading_order(rows, scale, derive_seed("surgery", run.method, run.seed)))
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=scale.training_rate, betas=ADAM_BETAS, weight_decay=0.0, fused=fused
    )
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


def reading_order(rows: list[list[int]], scale: Scale, seed: int) -> Iterator[list[list[int]]]:
    """Batches of all epochs: every row in each epoch, similar lengths together."""
    for epoch in range(scale.epochs):
        order = permute(np.arange(len(rows)), len(rows), derive_seed(seed, epoch))
        batches = []
        for begin in range(0, len(order), BUCKET * scale.batch_size):
            places = sorted(order[begin : begin + BUCKET * scale.batch_size], key=lambda place: len(rows[place]))
            batches += [places[at : at + scale.batch_size] for at in range(0, len(places), scale.batch_size)]
        for place in permute(np.arange(len(batches)), len(batches), derive_seed(seed, epoch, "batches")):
            yield [rows[row] for row in batches[place]]


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
    if all(name in raw.get("texts", {}) for name in ("unlearn", "unseen")):
        scores = (min_k(without_last(raw["texts"][name], "logp")) for name in ("unlearn", "unseen"))
        found["auc/min_k"] = auc(*scores)
    for name, kinds in raw.get("answers", {}).items():
        columns = kinds["mcq"]
        found[f"answers/{name}"] = float(rouge_l(columns["text"], columns["true_text"]).recall.mean())
    for bits, of_sets in raw.get("robustness", {}).get("quantise", {}).items():
        for name, columns in of_sets.items():
            found[f"accuracy/{name}_{bits.replace('-', '')}"] = fmean(columns["right"])
    for name, columns in raw.get("robustness", {}).get("routes", {}).items():
        found[f"accuracy/{name}_old_routes"] = fmean(columns["right"])
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


def tuning_criterion(measures: Mapping[str, float], before: Mapping[str, float]) -> float:
    """What settings are chosen by, in [0, 1]: the harmonic mean of what was forgotten, learnt and kept.

    Forgotten: 1 - the distance of accuracies on unlearn and obsolete from that on unseen, and e^-|gauge|; learnt and
    kept: accuracy on update, retain and neighbour, and e^-|move of the loss of unseen text|.
    """
    unseen = measures["accuracy/unseen"]
    parts = [forgetting_part(measures[f"accuracy/{name}"], unseen) for name in ("unlearn", "obsolete")]
    parts += [measures[f"accuracy/{name}"] for name in ("update", "retain", "neighbour")]
    moves = measures["gauge"], measures["ce/unseen"] - before["ce/unseen"]
    return harmonic_mean([*parts, *(math.exp(-abs(move)) for move in moves)])


def drifts(log: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of every loss and divergence that a trainer measured: the most that it left its value at the first measurement.

    log: of a long run; the value before step 1 does not count. Losses count both ways, divergences where they grow.
    """
    points = [entry for entry in log if entry.get("step", 0) and "eval_surgery_gap" in entry]
    found = {}
    for key in (key for key in points[0] if key.endswith(("_ce", "_kl"))):
        moves = [point[key] - points[0][key] for point in points]
        found[f"drift/{key.removeprefix('eval_')}"] = max(map(abs, moves)) if key.endswith("_ce") else max(moves)
    return found


KINDS = ("mcq", "paraphrase")
EVAL_BATCH_SIZE = {"cpu": 32, "cuda": 128}


class Worker:
    """Trains, operates on and examines the models of one comparison; models before are kept under `root`."""

    def __init__(self, comparison: Comparison, root: Path) -> None:
        self.comparison, self.root = comparison, root
        self.device = torch.device(comparison.device)
        self._materials: dict[tuple[str | None, int], Material] = {}

    def material(self, run: Run) -> Material:
        """The world of a run's seed and its tokenizer, made once."""
        key = self.comparison.topic(run.architecture), run.seed
        if key not in self._materials:
            self._materials[key] = make_material(self.comparison, run.architecture, run.seed, self.root / "corpus")
        return self._materials[key]

    def carry_out(self, run: Run) -> dict[str, Any]:
        """The record of a run: who it is, settings, measures by name, truth ratios, peak memory on a GPU."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.material(run)  # is no part of what training costs
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time  # workers share the cores
        started = clock()
        model, training = self._operated(run) if run.method in METHODS else (self._trained(run), {})
        trained = clock()
        record = {"method": run.method, "architecture": run.architecture, "seed": run.seed, "split": run.split}
        record |= {"place": dict(run.place), "training": training, "measures": {"seconds": trained - started}}
        if self.device.type == "cuda":
            record["measures"]["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        if run.method in METHODS and METHODS[run.method].steps:
            record["measures"] |= drifts(training["log"])
        measures, ratios = self.examine(model, run)
        record["measures"] |= measures
        record["truth_ratios"] = ratios
        record["examination_seconds"] = clock() - trained
        del model
        release_memory(self.device)
        return record

    def _trained(self, run: Run) -> PreTrainedModel:
        model = train_model(self.comparison, run, self.material(run), self.root)
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
        material = self.material(run)
        settings = self.comparison.surgery_settings(run)
        with tempfile.TemporaryDirectory() as folder:
            trainer = SurgeryTrainer(
                self.before(run),
                args=_arguments(settings, folder, self.device),
                **{f"{name}_dataset": material.rows(name) for name in SETS},
                processing_class=material.tokenizer,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        facts = {"settings": settings, "steps": trainer.state.global_step, "verdict": trainer.verdict}
        facts |= {"forget_target": trainer.aims.forget}
        log = trainer.state.log_history
        return trainer.model.eval(), facts | {"log": [entry for entry in log if "eval_surgery_gap" in entry]}

    def examine(self, model: PreTrainedModel, run: Run) -> tuple[dict[str, float], list[float]]:
        """Measures of the run's split, and the truth ratio of each question about unlearn."""
        scale, material = self.comparison.scale, self.material(run)
        is_final = run.split == "test"
        s = EvalSettings(
            split=run.split,
            parts=["questions", "texts", *(["divergence", "robustness"] if is_final else [])],
            kinds=list(KINDS if is_final else KINDS[:1]),
            robustness=["quantise", "routes"],
            max_questions=scale.max_questions,
            max_documents=scale.max_documents,
            batch_size=EVAL_BATCH_SIZE[self.device.type],
            max_length=scale.max_length,
            relearn_steps=scale.relearn_steps,
            relearn_every=scale.relearn_every,
            relearn_lr=scale.relearn_rate,
            seed=run.seed,
        )
        reference = model if run.method == BEFORE else self.before(run)
        look = partial(evaluate_model, model, material.tokenizer)
        raw = look(material.examined, s, reference)
        measures = measures_of(raw)
        ratios = truth_ratios(raw["questions"]["unlearn"]["mcq"])
        if is_final:
            anchored = look(material.operated, replace(s, parts=["questions"], sets=["retain"], kinds=["mcq"]))
            measures["accuracy/retain_anchored"] = measures_of(anchored)["accuracy/retain"]
            told = replace(s, parts=["answers"], sets=["unlearn", "obsolete", "update"], kinds=["mcq"])
            measures |= measures_of(look(material.examined, told))
            if run.method != BEFORE:
                measures |= self._relearnt(model, material, s)
            if material.prose is not None:
                measures["ce/prose"] = self._loss_of(model, material, s)
        return measures, [float(f"{ratio:.5g}") for ratio in ratios]

    def _relearnt(self, model: PreTrainedModel, material: Material, s: EvalSettings) -> dict[str, float]:
        """Accuracy on the facts that were not taught after the others were; nothing where subjects have one fact."""
        no_texts = datasets.DatasetDict({name: rows.select([]) for name, rows in material.bench.documents.items()})
        bench = SurgeryBench(no_texts, material.bench.questions, material.bench.version)
        asked = questions_of(bench, "unlearn", material.tokenizer, model, s, kinds=KINDS[:1])
        curve = relearn(model, material.tokenizer, bench, asked, s).get("facts")
        return {"relearn/untaught": fmean(curve["untaught"][-1]["right"])} if curve else {}

    def _loss_of(self, model: PreTrainedModel, material: Material, s: EvalSettings) -> float:
        """Mean loss of held-out prose, in nats per token."""
        rows = [{"text": text, "prefix": ""} for text in material.prose["held_out"]]
        read = [document.tokens for document in read_documents(rows, material.tokenizer, room_of(model, s))]
        logp = [score.logp for score in score_tokens(model, read, s.batch_size)]
        return -float(np.concatenate(logp).mean())


def _arguments(settings: dict[str, Any], folder: str, device: torch.device) -> SurgeryConfig:
    """Training in single precision on a CPU, in bfloat16 with single-precision weights on a GPU."""
    on_gpu = device.type == "cuda"
    return SurgeryConfig(
        **settings,
        output_dir=folder,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        save_only_model=True,  # of the best one nothing else is wanted
        report_to="none",
        disable_tqdm=True,
    )


Record = Mapping[str, Any]
Cell = Mapping[str, Record]  # the records of one seed by method


class Statement(NamedTuple):
    """A number of a seed, or a difference or ratio of two, that should lie in [least, most] as a mean over seeds.

    of: value, difference, ratio, or quality: p of Kolmogorov and Smirnov's test of all seeds' truth ratios together.
    other: the model that it is compared with, by default itself. than: the number of the other, by default the same.
    """

    text: str
    of: str
    form: str
    method: str
    measure: str = ""
    other: str = ""
    than: str = ""
    factor: float = 1.0
    least: float = -math.inf
    most: float = math.inf

    def value(self, cell: Cell) -> float | None:
        """In a seed; None where a number is not there."""
        ours = cell[self.method]["measures"].get(self.measure)
        theirs = cell[self.other or self.method]["measures"].get(self.than or self.measure)
        if ours is None or theirs is None:
            return None
        made = {"value": lambda: ours, "difference": lambda: ours - theirs, "ratio": lambda: ours / theirs}
        return self.factor * made[self.of]()


CLAIMS = [Statement(**fields) for fields in DATA["claims"]]
TARGETS = [Statement(**fields) for fields in DATA["targets"]]
VERDICTS = {"claims": ("confirmed", "refuted"), "targets": ("met", "missed")}
UNDECIDED = "undecided"


def cells_of(records: Sequence[Record], *needed: str) -> list[Cell]:
    """The records of one architecture by seed, and by method within a seed; seeds that lack a method are left out."""
    seeds = sorted({record["seed"] for record in records})
    cells = [{record["method"]: record for record in records if record["seed"] == seed} for seed in seeds]
    return [cell for cell in cells if cell.keys() >= set(needed)]


def judged(key: str, architecture: str, records: Sequence[Record]) -> list[dict[str, str]]:
    """A row for each claim or target (`key`) whose runs are there: what came, over how many seeds, and the verdict.

    An interval over seeds that reaches over a bound settles nothing, and neither do fewer than LEAST_SEEDS.
    """
    rows = []
    for one in {"claims": CLAIMS, "targets": TARGETS}[key]:
        cells = cells_of(records, one.method, one.other or one.method)
        row = {"architecture": architecture, key[:-1]: one.text}
        if one.of == "quality" and cells:
            p = quality([cell[one.method] for cell in cells], [cell[one.other] for cell in cells])
            is_so = one.least <= p <= one.most
            row |= {"value": one.form.format(p), "interval": "a test", "seeds": str(len(cells))}
            rows.append(row | {"verdict": VERDICTS[key][not is_so]})
            continue
        values = [value for cell in cells if (value := one.value(cell)) is not None]
        if values:
            mean, half = t_interval(values)
            told = "one seed" if half is None else f"± {one.form.format(half).lstrip('+')}"
            row |= {"value": one.form.format(mean), "interval": told, "seeds": str(len(values))}
            is_known = len(values) >= LEAST_SEEDS
            low, high = (mean - half, mean + half) if is_known else (-math.inf, math.inf)
            rows.append(row | {"verdict": verdict(one, low, high, *VERDICTS[key])})
    return rows


def verdict(one: Any, low: float, high: float, inside: str, outside: str) -> str:
    """What an interval says of bounds `least` and `most`."""
    if one.least <= low and high <= one.most:
        return inside
    return outside if high < one.least or low > one.most else UNDECIDED


def quality(ours: Sequence[Record], theirs: Sequence[Record]) -> float:
    """p of the test that truth ratios on unlearn are distributed as those of the other model."""
    return ks_pvalue(*([ratio for record in side for ratio in record["truth_ratios"]] for side in (ours, theirs)))


CHANCE = 1 / 3
LEGEND = (
    "accuracies in % of questions with three options, losses (CE) and KL in nats per token, gauge: CE unlearn - CE "
    "unseen; retain, neighbour and unseen: subjects that no surgery saw; 95 % intervals over seeds",
    "answers: ROUGE-L recall; untaught: accuracy after the other half of the facts was taught; quality: p of the "
    "truth ratios; cost: share of the time of training again; edge: the best setting is at the edge of the grid",
    "or was taken over; rate, strength, counterfactuals: steps from the middle of the grid",
)
COLUMNS: list[list[Column]] = [list(map(tuple, table)) for table in DATA["columns"]]
PAIRED: list[Column] = list(map(tuple, DATA["paired"]))


def flat_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row for each finished run: who it is, its place in the grid, all measures."""
    again = {(r["architecture"], r["seed"]): r for r in records if r["method"] == RETRAINED}
    rows = []
    for record in records:
        row = {name: record[name] for name in ("architecture", "method", "seed")}
        row |= {axis: record["place"].get(axis) for axis in (*FACTORS, *LIMITS)} | record["measures"]
        oracle = again.get((record["architecture"], record["seed"]))
        if oracle is not None and record["method"] in METHODS:
            row["cost"] = record["measures"]["seconds"] / oracle["measures"]["seconds"]
            row["forget_quality"] = quality([record], [oracle])
        rows.append(row)
    return rows


def summary_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each architecture and method, with the mean over seeds and half its interval of each number."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    order = list(dict.fromkeys(row["architecture"] for row in rows))
    for row in sorted(rows, key=lambda row: (order.index(row["architecture"]), _place(row))):
        groups.setdefault((row["architecture"], row["method"]), []).append(row)
    made = []
    for (architecture, method), runs in groups.items():
        row: dict[str, Any] = {"architecture": architecture, "method": method, "seeds": len(runs)}
        row |= {axis: runs[0][axis] for axis in (*FACTORS, *LIMITS)}
        known = [{name for name, value in run.items() if isinstance(value, float)} for run in runs]
        names = [name for name in runs[0] if name in set.intersection(*known)]
        made.append(row | {name: t_interval([run[name] for run in runs]) for name in names})
    return made


def paired_rows(architecture: str, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Of each other method and the retrained model the differences from safe within a seed, with their intervals."""
    made = []
    for method in (*METHODS, RETRAINED):
        cells = [] if method == SAFE else cells_of(records, method, SAFE)
        row: dict[str, Any] = {"architecture": architecture, "method": method}
        for _, name, *_ in PAIRED:
            pairs = [[cell[one]["measures"].get(name) for one in (method, SAFE)] for cell in cells]
            if pairs and None not in sum(pairs, []):
                row[name] = t_interval([ours - theirs for ours, theirs in pairs])
        made += [row] if cells else []
    return made


def conclude(records: Sequence[Record], failed: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Everything that is printed and written, as JSON can hold it, besides what the comparison was.

    records: of finished final runs. failed: rows with `run` and `error`.
    """
    runs = flat_rows(records)
    of_each: dict[str, list[Record]] = {}
    for record in records:
        of_each.setdefault(record["architecture"], []).append(record)
    return {
        "rows": summary_rows(runs),
        "runs": runs,
        "paired": [row for name, own in of_each.items() for row in paired_rows(name, own)],
        "failed": list(failed),
        **{key: [row for name, own in of_each.items() for row in judged(key, name, own)] for key in VERDICTS},
    }


def comparison_text(results: Mapping[str, Any]) -> str:
    """The table of each architecture, the verdicts on the claims, and the targets."""
    parts = []
    edges = {(row["architecture"], row["method"]) for row in results.get("tuning", ()) if row["edge"]}
    for architecture in dict.fromkeys(row["architecture"] for row in results["rows"]):
        own = [row for row in results["rows"] if row["architecture"] == architecture]
        parts.append(f"{architecture}, {max(row['seeds'] for row in own)} seeds")
        for names in COLUMNS:
            shown = [column for column in names if any(column[1] in row for row in own)]
            steps = {axis: axis for axis in (*FACTORS, *LIMITS)} if names is COLUMNS[0] else {}
            lines = [table_row(row, shown, {}) | {a: _step(row.get(a)) for a in steps} for row in own]
            for line, row in zip(lines, own, strict=True):
                is_edge = (architecture, row["method"]) in edges
                line |= {"seeds": str(row["seeds"]), "edge": "edge" if is_edge else ""} if steps else {}
            parts.append(text_table(lines))
        beside = [row for row in results["paired"] if row["architecture"] == architecture]
        if beside:
            parts += ["less safe, within a seed", text_table([table_row(row, PAIRED, {}) for row in beside])]
    parts += LEGEND
    for title, key in (("Claims", "claims"), ("Targets", "targets")):
        if results[key]:
            parts += ["", title, text_table(results[key])]
    parts += [f"{row['run']} failed: {row['error']}" for row in results["failed"]]
    return "\n".join(parts)


def _step(step: int | None) -> str:
    return "" if step is None else f"{step:+d}"


def draw(path: Path, results: Mapping[str, Any]) -> None:
    """Accuracies, losses and divergences, a line of panels for each architecture; needs matplotlib."""
    pyplot = plotting(path)
    if pyplot is None or not results["runs"]:
        return
    architectures = list(dict.fromkeys(row["architecture"] for row in results["runs"]))
    methods = list(dict.fromkeys(row["method"] for row in sorted(results["runs"], key=_place)))
    size = {"figsize": (24, 5 * len(architectures)), "width_ratios": (6, 2, 2), "layout": "constrained"}
    figure, grid = pyplot.subplots(len(architectures), 3, squeeze=False, **size)
    for architecture, panels in zip(architectures, grid, strict=True):
        runs = [row for row in results["runs"] if row["architecture"] == architecture]
        bars = (
            ("accuracy", {name: f"accuracy/{name}" for name in SETS} | {"untaught": "relearn/untaught"}),
            ("nats per token", {"CE unlearn": "ce/unlearn", "CE unseen": "ce/unseen"}),
            ("nats per token", {"KL retain": "kl/retain", "KL neighbour": "kl/neighbour"}),
        )
        for axes, (label, measures) in zip(panels, bars, strict=True):
            values = {method: _values(runs, method, measures) for method in methods}
            grouped_bars(axes, list(measures), values)
            is_log = label != "accuracy" and any(any(own.values()) for own in values.values())
            axes.set(ylabel=label, yscale="log" if is_log else "linear")
        panels[0].axhline(CHANCE, color="black", linestyle=":", linewidth=0.8)
        panels[0].set_title(architecture)
    figure.legend(*grid[0][0].get_legend_handles_labels(), ncols=8, loc="outside lower center")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _values(runs: Sequence[Mapping[str, Any]], method: str, measures: Mapping[str, str]) -> dict[str, list[float]]:
    """A method's values of all seeds by group; zeros are left out, which a logarithm does not show."""
    own = [row for row in runs if row["method"] == method]
    return {group: [row[name] for row in own if row.get(name, 0.0) > 0.0] for group, name in measures.items()}


def _place(row: Mapping[str, Any]) -> int:
    return [BEFORE, *METHODS, RETRAINED].index(row["method"])


class Search(Walk):
    """The way of a method through its grid. before: measures of the tuning world's model before surgery."""

    def __init__(self, method: str, architecture: str, before: Mapping[str, float], start: Mapping[str, int]) -> None:
        self.method, self.architecture, self.before = method, architecture, before
        self.axes = METHODS[method].axes
        super().__init__(tuple(start.get(axis, 0) for axis in self.axes), [LIMITS.get(axis) for axis in self.axes])

    def named(self, place: Place) -> tuple[tuple[str, int], ...]:
        """A place with the names of its axes."""
        return tuple(zip(self.axes, place, strict=True))

    def run_at(self, place: Place) -> Run:
        """The run of a place in the grid."""
        return Run(self.method, self.architecture, TUNING_SEED, "validation", self.named(place))

    def score_of(self, place: Place, record: Mapping[str, Any]) -> float:
        """`tuning_criterion`, less than that of any other where the run failed."""
        return -1.0 if "error" in record else tuning_criterion(record["measures"], self.before)


@dataclass
class CompareArguments:
    """What is compared and how much work to spend; the rest is in `SETTINGS`."""

    setting: str = HfArg(default="small", help=f"Size of the comparison: {', '.join(SETTINGS)}.")
    methods: list[str] = HfArg(default_factory=lambda: list(METHODS), help=f"Any of: {', '.join(METHODS)}.")
    architectures: list[str] | None = HfArg(default=None, help="Some of those of the setting.")
    real: str | None = HfArg(
        default=None, help="Folder that scripts/replication/factbook.py made, for the setting smollm2."
    )
    seeds: int | None = HfArg(
        default=None, help="Final runs of each method; the setting's own if unset. More can be added."
    )
    rounds: int | None = HfArg(
        default=None, help="In which a grid may grow; 0: every method at the place where its walk begins."
    )
    first_seed: int = HfArg(default=TUNING_SEED + 1, help="Seed of the first final run; the others follow it.")
    output_dir: str = HfArg(
        default="runs/surgery-methods",
        help="Folder for models, a record of each run, results and plot; finished runs are kept.",
    )
    workers: int = HfArg(default=2, help="Processes with one thread each; 1: this process does it all.")
    device: str = HfArg(default="auto", help="auto, cpu or cuda; auto: cpu.")
    minutes: float | None = HfArg(
        default=None, help="No run begins later than this; what is there is judged, the same command goes on."
    )


def compare_main(argv: Sequence[str]) -> None:
    """Train the models before, tune, operate on them, examine all; write and print what came out."""
    (args,) = parse_arguments((CompareArguments,), argv, program="surgery_methods.py", description=__doc__)
    comparison = make_comparison(args)
    folder = open_folder(args.output_dir, comparison.fingerprint())
    results, is_all = compare(comparison, args, folder)
    write_results(folder.root, results, results["runs"], draw, comparison_text)
    tell_rest(args, is_all)


def make_comparison(args: CompareArguments) -> Comparison:
    """What the arguments ask for. Raises ValueError for what cannot be run, before anything is."""
    check_request(args, SETTINGS, METHODS)
    scale = SETTINGS[args.setting]
    if args.architectures is not None:
        check_choice("--architectures", args.architectures, scale.models)
    is_real = any("topic" in fields for fields in scale.models.values())
    if is_real and (args.real is None or not all((Path(args.real) / name).is_dir() for name in (COUNTRIES, MODEL))):
        raise ValueError(
            f"--real {args.real!r}: --setting {args.setting} needs a folder with {COUNTRIES} and {MODEL}, which "
            "scripts/replication/factbook.py makes."
        )
    if args.first_seed <= TUNING_SEED:
        raise ValueError(
            f"--first_seed {args.first_seed}: settings were chosen on seed {TUNING_SEED}; take a later one."
        )
    if args.seeds is not None:
        scale = replace(scale, seeds=dict.fromkeys(scale.seeds, args.seeds))
    if args.rounds is not None:
        if args.rounds < 0:
            raise ValueError(f"--rounds {args.rounds}: at least 0, at which nothing is tuned.")
        scale = replace(scale, rounds=dict.fromkeys(scale.rounds, args.rounds))
    device = "cpu" if args.device == "auto" else choose_device(args.device).type
    return Comparison(args.setting, scale, device, args.first_seed, args.real)


class Campaign:
    """Carries out what an architecture needs: models, walks through the grids, final runs."""

    def __init__(self, comparison: Comparison, methods: Sequence[str], crew: Crew, bar: tqdm) -> None:
        self.comparison, self.methods, self.crew, self.bar = comparison, methods, crew, bar
        self.searches: dict[tuple[str, str], Search] = {}
        self.final: list[Run] = []
        self.records: Records = {}

    def carry_out(self, runs: Sequence[Run]) -> Records:
        """Records of runs; models before whose weights are not there are trained again."""
        for run in runs:
            if run.method == BEFORE and not (self.crew.folder.root / "models" / run.cell).is_dir():
                (self.crew.folder.root / f"runs/{run.name}.json").unlink(missing_ok=True)
        self.bar.total += len(runs)
        found = self.crew.records(runs, self.bar)
        self.records |= found
        return found

    def architecture(self, name: str) -> None:
        """All runs of an architecture, the final ones method by method in all seeds, long ones first.

        A walk begins where that of an architecture before it ended.
        """
        before = self.comparison.final_runs(name, BEFORE)
        topic = self.comparison.topic(name)
        retrained = [] if topic == KNOWN_TOPIC else [replace(run, method=RETRAINED) for run in before]
        self.final += [*before, *retrained]
        if topic is not None:  # once, before the workers want it
            base_model(self.comparison, name, self.crew.folder.root)
            make_material(self.comparison, name, self.comparison.first_seed, self.crew.folder.root / "corpus")
        rounds, start = self.comparison.scale.rounds[name], Run(BEFORE, name, TUNING_SEED, "validation")
        found = self.carry_out([*([start] if rounds else []), *before])
        if "error" in found.get(start.name, ()):
            raise RuntimeError(f"{start.name} failed: {found[start.name]['error']}")
        measures = found[start.name]["measures"] if rounds else {}
        own = [method for method in self.methods if name in (METHODS[method].architectures or (name,))]
        for method in dict.fromkeys(METHODS[method].tuned_as or method for method in own):
            begin = next((s.best for (_, m), s in reversed(self.searches.items()) if m == method), None)
            begin = METHODS[method].start if begin is None else begin
            place = dict(zip(METHODS[method].axes, begin, strict=False))
            self.searches[name, method] = Search(method, name, measures, place)
        searches = [search for (architecture, _), search in self.searches.items() if architecture == name]
        walk(searches, rounds, self.carry_out)
        final = list(retrained)
        for method in own:
            search = self.searches[name, METHODS[method].tuned_as or method]
            final += self.comparison.final_runs(name, method, search.named(search.best))
        self.final += final[len(retrained) :]
        self.carry_out(sorted(final, key=lambda run: run.method not in METHODS or METHODS[run.method].steps is None))


def compare(comparison: Comparison, args: CompareArguments, folder: ResumableFolder) -> tuple[dict[str, Any], bool]:
    """All runs that are not finished, as far as time allows; what is printed, as JSON can hold it; if it is all."""
    is_all = True
    with (
        tqdm(total=0, unit="run", dynamic_ncols=True, mininterval=2) as bar,
        Crew(folder, args.workers, Worker, comparison, folder.root, until=end_of(args.minutes)) as crew,
    ):
        campaign = Campaign(comparison, list(dict.fromkeys(args.methods)), crew, bar)
        try:
            for name in dict.fromkeys(args.architectures or comparison.scale.models):
                campaign.architecture(name)
        except TimeoutError:
            is_all = False
    done = campaign.records
    records = {run.name: done.get(run.name) or folder.read(f"runs/{run.name}.json") for run in campaign.final}
    failed = [{"run": name, "error": record["error"]} for name, record in records.items() if "error" in (record or ())]
    return {
        "comparison": comparison.fingerprint(),
        "machine": machine_facts(torch.device(comparison.device), commit=None),
        **conclude([record for record in records.values() if record and "error" not in record], failed),
        "tuning": [
            {"architecture": search.architecture, "method": search.method, "edge": not search.is_inside}
            | {"best": place == search.best, "criterion": score, **dict(search.named(place))}
            for search in campaign.searches.values()
            for place, score in (search.scores or {search.best: None}).items()
        ],
    }, is_all


PROGRAM, GUIDE = "surgery_methods.py", "[surgery methods](../../surgery_comparison.md)"
PROGRAMS = {"compare": compare_main, "page": lambda argv: write_page(argv, PROGRAM, GUIDE, comparison_text)}


def main(argv: Sequence[str] | None = None) -> None:
    """The program that the first word names: `compare`, the first, or `page`."""
    run_program(PROGRAMS, argv)


if __name__ == "__main__":
    run_script(main)
