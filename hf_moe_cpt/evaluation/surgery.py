"""Judge a surgery: take all raw measurements of up to three models, and make numbers with intervals of them.

`evaluate_model` measures one model, `summarise` compares those of up to three, `run` does both for a command, with a
folder in which a killed run goes on. Raw measurements, by part:

    questions      {set: {kind: columns}}    log-probability, tokens and hits of each option
    answers        {set: {kind: columns}}    what the model answers by itself, greedily, and the true answer
    texts          {set: columns}            log-probability, hit, vocabulary mean and spread of each token
    continuations  {set: columns}            what the model writes after the first half of a text, greedily
    divergence     {set: columns}            KL and agreement with a reference at each token
    robustness     {attack: ...}             attacks.py

Columns are lists with an entry for each row, `id` and `subject` among them. A summary:

    sides        names of the models that were measured
    verdict      one line: what is wrong with the model after surgery, the worst first, or that it is as it should be
    notes        lines about which rows of the bench were measured
    confidence   of all intervals: of a bootstrap over subjects, Wilson's for shares
    measures     rows of side, set, metric (of METRICS), value, low, high, n (questions or texts). None where a number
                 does not exist, such as an interval of one subject
    curves       rows of side, training, asked, step, accuracy, low, high: relearning
    score        of each side the formula of its score and the parts that are left out
    chance       accuracy of guessing on unlearn, or None
    warnings     lines about over-forgetting
    missing      lines about what could not be computed, and why

All of it is plain data, as JSON holds it. The subjects of a set are drawn once for all models and questions, so that
what moves together is drawn together; sets are drawn independently. Source: ours; each metric names its own.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import harmonic_mean
from typing import Any, NamedTuple

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from hf_moe_cpt.data.random import derive_seed
from hf_moe_cpt.data.surgery_bench import SETS, SPLITS, SurgeryBench
from hf_moe_cpt.data.surgery_bench.rows import digest_of_subject, read_columns
from hf_moe_cpt.evaluation.attacks import BITS, PREFIXES, attack
from hf_moe_cpt.evaluation.resumable import ResumableFolder, checksum_of_files
from hf_moe_cpt.evaluation.scoring import (
    ALL_SETS,
    ANCHORED_SETS,
    ANSWERED_KINDS,
    ASKING_ATTACKS,
    CONTINUED_SETS,
    FORGOTTEN,
    PARTS,
    UNSEEN,
    UPDATED,
    CountedText,
    Curve,
    EvalSettings,
    Key,
    ReadDocument,
    Rows,
    chance_of,
    continue_greedily,
    curves_of,
    documents_of,
    membership_scores,
    questions_of,
    score_distances,
    score_options,
    score_tokens,
    sets_of,
    truth_ratios,
    values_of,
    verdict_of,
)
from hf_moe_cpt.evaluation.statistics import (
    RESAMPLES,
    Interval,
    bootstrap_interval,
    bootstrap_replicates,
    bootstrap_two_samples,
    interval_of,
    num_groups,
    ratio_of_sums,
)
from hf_moe_cpt.evaluation.text_metrics import (
    PART_FORMULAS,
    auc,
    forgetting_part,
    is_over_forgotten,
    ks_pvalue,
    privacy_leakage,
    quantisation_stability,
    relearning_robustness,
    retained_part,
    robustness_part,
    score_formula,
    steps_until,
    surgery_score,
    update_part,
)
from hf_moe_cpt.extras import require
from hf_moe_cpt.machine import DEVICES, DTYPES, check_names, choose_device, machine_facts, modes_kept, release_memory
from hf_moe_cpt.reading import is_adapter, read_adapter, read_config, read_json, read_model, read_tokenizer, reading
from hf_moe_cpt.routing.hooks import moe_layers
from hf_moe_cpt.trainers.surgery.chunked import check_head, head_of


SIDES = ("before", "after", "retrained")
MORE_TOKENS = 4  # of an answer than the true one has
Raw = dict[str, Any]  # measurements by part


@dataclass
class ModelArguments:
    """The models, folders or Hub ids; at least one."""

    before: str | None = HfArg(default=None, help="The model that surgery started from.")
    after: str | None = HfArg(default=None, help="The model that surgery made.")
    retrained: str | None = HfArg(
        default=None, help="A model that never read what was to be forgotten: the yardstick."
    )
    tokenizer: str | None = HfArg(default=None, help="Default: that of the first model given.")
    dtype: str = HfArg(default="auto", help=f"Type of the weights: {', '.join(DTYPES)}.")
    attn_implementation: str | None = HfArg(default=None, help="eager, sdpa, flash_attention_2, ...")
    trust_remote_code: bool = HfArg(default=False, help="Run model code from the Hub.")
    device: str = HfArg(default="auto", help="auto, cpu or cuda.")

    def __post_init__(self) -> None:
        check_names("--dtype", [self.dtype], DTYPES)
        check_names("--device", [self.device], DEVICES)
        if not self.given:
            raise ValueError("nothing to evaluate: give --before, --after or --retrained, best all three.")

    @property
    def given(self) -> dict[str, str]:
        """Names of the models by side."""
        return {side: name for side in SIDES if (name := getattr(self, side)) is not None}


@dataclass
class BenchArguments:
    """Documents and questions: a saved bench, a generated one, or your own JSON Lines."""

    bench: str | None = HfArg(default=None, help="Folder that SurgeryBench.save wrote.")
    bench_seed: int = HfArg(default=0, help="Of the bench that is generated where none is named.")
    num_subjects: int | None = HfArg(default=None, help="Size of the bench that is to be generated.")
    documents: list[str] | None = HfArg(
        default=None,
        help="One .jsonl whose rows name their set, or several as unlearn=a.jsonl: what hf-moe-cpt surgery reads, "
        "also tables and ID:CONFIGURATION:SPLIT of the Hub.",
    )
    questions: list[str] | None = HfArg(default=None, help="Questions about --documents, named in the same ways.")
    dataset_split: str = HfArg(default="train", help="Split of data sets on the Hub that name none.")
    columns: list[str] | None = HfArg(
        default=None,
        help="Your names of our columns of documents, as text=article, or prompt='Question: {question}\nAnswer:'.",
    )
    question_columns: list[str] | None = HfArg(
        default=None, help="The same of questions: question, answer, options, wrong, subject, ..."
    )

    def __post_init__(self) -> None:
        given = [name for name in ("bench", "num_subjects", "documents") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give one of --bench, --num_subjects and --documents, got {', '.join(given) or 'none'}: which texts?"
            )
        if self.questions is not None and self.documents is None:
            raise ValueError("--questions needs --documents: whom are they about?")

    def load(self, tokenizer: PreTrainedTokenizerBase | None = None) -> SurgeryBench:
        """The bench that the arguments name, generated if none is. tokenizer: lays conversations out."""
        if self.bench is not None:
            return SurgeryBench.load(self.bench)
        if self.documents is None:
            return SurgeryBench.generate(self.bench_seed, self.num_subjects)
        documents, questions = self._sources("documents"), self._sources("questions")
        columns = read_columns(self.columns), read_columns(self.question_columns, "--question_columns")
        return SurgeryBench.from_jsonl(documents, questions, *columns, tokenizer)

    def _sources(self, option: str) -> Path | dict[str, Path | Dataset] | None:
        """One file, or by set a file or a table."""
        given = getattr(self, option)
        if not given:
            return None
        if len(given) == 1 and "=" not in given[0]:
            return Path(given[0])
        from hf_moe_cpt.generation.pairs import load_table  # with samplers and the Hub, which files need not

        named = read_columns(given, f"--{option}", "unlearn=a.jsonl, or one file whose rows name their set")
        is_file = {name: Path(source).suffix == ".jsonl" for name, source in named.items()}
        return {
            name: Path(source) if is_file[name] else load_table(source, self.dataset_split)
            for name, source in named.items()
        }


@dataclass
class OutputArguments:
    """Where it goes, and how wide its intervals are."""

    output_dir: str = HfArg(help="A new folder, or one in which this very run was interrupted.")
    confidence: float = HfArg(default=0.95, help="Of the intervals.")
    resamples: int = HfArg(default=RESAMPLES, help="Of the bootstrap.")
    commit: str | None = HfArg(default=None, help="Written into the results in place of git's answer.")

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"--confidence {self.confidence} must lie in (0, 1), such as 0.95.")
        if self.resamples < 1:
            raise ValueError(f"--resamples {self.resamples} must be at least 1; 2000 is usual.")


class Subject(NamedTuple):
    """One model under examination. reference: the model before surgery, for the divergence. bar: show progress."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    bench: SurgeryBench
    settings: EvalSettings
    reference: PreTrainedModel | None
    bar: bool

    def label(self, text: str) -> str | None:
        """Of a progress bar, None for none."""
        return text if self.bar else None


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    bench: SurgeryBench,
    settings: EvalSettings | None = None,
    reference: PreTrainedModel | None = None,
    bar: bool = False,
) -> Raw:
    """Measurements of each part of the settings; "divergence" only with a reference, the model before.

    All processes of a group must call it, each with the whole model; all get the same. The model is left as it was.
    bar: show the progress.
    """
    settings = settings or EvalSettings()
    check_head(model)
    subject = Subject(model, tokenizer, bench, settings, reference, bar)
    with modes_kept(model):
        model.eval()
        parts = [part for part in settings.measured_parts if part != "divergence" or reference is not None]
        return {part: MEASURES[part](subject) for part in parts}


def measure_questions(subject: Subject) -> Raw:
    """Of each set and kind: answer, old_answer, attribute, and of each option logp (sum), tokens and hits."""
    model, tokenizer, bench, s, *_ = subject
    found: Raw = {}
    for name in sets_of(bench, s):
        asked = questions_of(bench, name, tokenizer, model, s)
        scores = score_options(model, asked, s.batch_size, subject.label(f"questions about {name}"))
        for question, score in zip(asked, scores, strict=True):
            row = {key: question.row[key] for key in ("id", "subject", "attribute", "answer", "old_answer")}
            _append(found.setdefault(name, {}).setdefault(question.row["kind"], {}), row | score)
    return found


def measure_texts(subject: Subject) -> Raw:
    """Of each set: logp, hit, mean and std, lists with an entry for each token that counts, text, ends and guess.

    text: what these tokens make. ends: whether the last one is the end of text. guess: ln of the vocabulary's size,
    what knowing nothing costs.
    """
    model, tokenizer, bench, s, *_ = subject
    found: Raw = {}
    for name in sets_of(bench, s):
        documents = documents_of(bench, name, tokenizer, model, s)
        tokens = [document.tokens for document in documents]
        bar = subject.label(f"texts of {name}")
        scores = score_tokens(model, tokens, s.batch_size, with_moments=True, bar=bar)
        for document, score in zip(documents, scores, strict=True):
            counted = document.tokens.ids[document.tokens.start :]
            row = {**_who(document), "text": tokenizer.decode(counted, skip_special_tokens=True)}
            row |= {key: column.tolist() for key, column in score._asdict().items()}
            row |= {"ends": document.tokens.ends, "guess": math.log(head_of(model).weight.shape[0])}
            _append(found.setdefault(name, {}), row)
    return found


def measure_continuations(subject: Subject) -> Raw:
    """Of each set: the tokens and the text that follow the first half of a text, and the true rest, as long at most.

    With a reference also what both cost it, in nats per token: loss_before, true_loss_before; None where nothing was
    written. Texts of fewer than four tokens that count are left out.
    """
    model, tokenizer, bench, s, reference, _ = subject
    known = getattr(model.generation_config, "eos_token_id", None)
    stop = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}
    found: Raw = {}
    for name in (name for name in sets_of(bench, s) if name in CONTINUED_SETS):
        documents = [
            document
            for document in documents_of(bench, name, tokenizer, model, s)
            if len(document.tokens.ids) - document.tokens.start >= 4
        ]
        documents = [document._replace(tokens=_without_eos(document.tokens)) for document in documents]
        halves = [(document.tokens.start + len(document.tokens.ids)) // 2 for document in documents]
        prompts = [document.tokens.ids[:half] for document, half in zip(documents, halves, strict=True)]
        bar = subject.label(f"continuations of {name}")
        written = continue_greedily(model, prompts, s.new_tokens, s.batch_size, stop=sorted(stop), bar=bar)
        for document, half, ids in zip(documents, halves, written, strict=True):
            rest = list(document.tokens.ids[half : half + s.new_tokens])
            text, true_text = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids, rest))
            row = {"tokens": ids, "true_tokens": rest, "text": text, "true_text": true_text}
            _append(found.setdefault(name, {}), _who(document) | row)
        if reference is not None and name in found:
            for column, rests in (("loss_before", written), ("true_loss_before", found[name]["true_tokens"])):
                texts = [
                    CountedText([*prompt, *rest], len(prompt)) for prompt, rest in zip(prompts, rests, strict=True)
                ]
                scores = iter(
                    score_tokens(reference, [text for text in texts if len(text.ids) > text.start], s.batch_size)
                )
                found[name][column] = [
                    -float(next(scores).logp.mean()) if len(text.ids) > text.start else None for text in texts
                ]
    return found


def measure_answers(subject: Subject) -> Raw:
    """Of each set and kind of question: the text that follows the question, as many tokens as the true answer has and
    a few more, and the true answer. No options are shown: choosing among them overstates what was forgotten."""
    model, tokenizer, bench, s, *_ = subject
    stop = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found: Raw = {}
    for name in sets_of(bench, s):
        kinds = [kind for kind in ANSWERED_KINDS if s.kinds is None or kind in s.kinds]
        asked = questions_of(bench, name, tokenizer, model, s, kinds=kinds)
        true = [question.options[question.row["answer"]] for question in asked]
        prompts = [text.ids[: text.start] for text in true]
        room = max((len(text.ids) - text.start for text in true), default=0) + MORE_TOKENS
        bar = subject.label(f"answers about {name}")
        written = continue_greedily(model, prompts, room, s.batch_size, stop=stop, bar=bar) if asked else []
        for question, text, ids in zip(asked, true, written, strict=True):
            own = ids[: len(text.ids) - text.start + MORE_TOKENS]
            row = {key: question.row[key] for key in ("id", "subject")}
            row |= {"text": tokenizer.decode(own, skip_special_tokens=True)}
            row |= {"true_text": tokenizer.decode(text.ids[text.start :], skip_special_tokens=True)}
            _append(found.setdefault(name, {}).setdefault(question.row["kind"], {}), row)
    return found


def measure_divergence(subject: Subject) -> Raw:
    """Of the sets that must not change: kl and agrees, lists with an entry for each token that counts."""
    model, tokenizer, bench, s, reference, _ = subject
    found: Raw = {}
    for name in (name for name in sets_of(bench, s) if name in ANCHORED_SETS):
        documents = documents_of(bench, name, tokenizer, model, s)
        tokens = [document.tokens for document in documents]
        distances = score_distances(model, reference, tokens, s.batch_size, bar=subject.label(f"divergence on {name}"))
        for document, distance in zip(documents, distances, strict=True):
            columns = {key: column.tolist() for key, column in distance._asdict().items()}
            _append(found.setdefault(name, {}), {**_who(document), **columns})
    return found


MEASURES: dict[str, Callable[[Subject], Raw]] = {
    "questions": measure_questions,
    "answers": measure_answers,
    "texts": measure_texts,
    "continuations": measure_continuations,
    "divergence": measure_divergence,
    "robustness": lambda subject: attack(*subject),
}


def _without_eos(tokens: CountedText) -> CountedText:
    return tokens._replace(ids=tokens.ids[:-1], ends=False) if tokens.ends else tokens


def _who(document: ReadDocument) -> Raw:
    return {key: document.row[key] for key in ("id", "subject", "form")}


def _append(columns: dict[str, list[Any]], row: Raw) -> None:
    for key, value in row.items():
        columns.setdefault(key, []).append(value)


SCORE_BITS = 4  # of the Q in the score
NO_SHARES = ("loss", "fluency", "kl")  # means of rows that do not lie in [0, 1]
RETAINED = "retain"
UTILITY = ("option_probability", "answer_probability", "truth_ratio", "rouge_recall")  # of what is kept, TOFU's
_SETS = (FORGOTTEN, UNSEEN, UPDATED, RETAINED)
JOINED = ("accuracy", *(f"accuracy_{bits}bit" for bits in BITS), "reliability", "generalisation")


class Joint(NamedTuple):
    """A number, and what it is in each of the R draws; NaN where a draw has none of the rows that it needs.

    share_of: of a number in [0, 1] the subjects that it is made of, of several numbers the fewest; else None.
    """

    value: float
    replicates: np.ndarray
    share_of: int | None = None

    def interval(self, confidence: float) -> Interval:
        """Made of the draws that have a number; NaN ends where fewer than two do."""
        known = self.replicates[np.isfinite(self.replicates)]
        return interval_of(self.value, known if len(known) > 1 else np.full(1, math.nan), confidence, self.share_of)


def joined(formula: Callable[..., float | None], *numbers: Joint) -> Joint:
    """The formula of the numbers, and of their draws place by place; None of a formula is NaN."""
    replicates = [
        _number(formula(*draw)) if all(map(math.isfinite, draw)) else math.nan
        for draw in zip(*(number.replicates.tolist() for number in numbers), strict=True)
    ]
    groups = [number.share_of for number in numbers]
    fewest = None if None in groups else min(groups)
    return Joint(_number(formula(*(number.value for number in numbers))), np.array(replicates), fewest)


def joint_means(columns: Mapping[str, Rows], resamples: int, seed: int) -> dict[str, Joint]:
    """The mean of each column and of its share of every draw of the subjects of all columns."""
    subjects = [subject for rows in columns.values() for subject in rows.subjects]
    table = np.zeros((len(subjects), 2))
    found, begin = {}, 0
    for name, rows in columns.items():
        end = begin + len(rows.values)
        table[:] = 0.0
        table[begin:end] = np.stack([rows.values, np.ones(len(rows.values))], axis=1)
        with np.errstate(invalid="ignore"):  # a draw without a row of this column is 0 / 0
            drawn = bootstrap_replicates(table, subjects, resamples, seed, ratio_of_sums)
        found[name] = Joint(float(rows.values.mean()), drawn, num_groups(rows.subjects, rows.values))
        begin = end
    return found


class JointNumbers:
    """Everything that is made of the means of several columns.

    values, curves: of each model by side, from eval_surgery_values. goal: accuracy that is halfway relearnt, or None.
    """

    def __init__(
        self,
        values: Mapping[str, Mapping[Key, Rows]],
        curves: Mapping[str, Mapping[tuple[str, str], Curve]],
        goal: float | None,
        resamples: int,
        seed: int,
    ) -> None:
        self.goal = goal
        taught = {side: own["own", "taught"] for side, own in curves.items() if ("own", "taught") in own}
        self.steps = {
            side: curve.steps
            for side, curve in taught.items()
            if all(np.isfinite(rows.values).all() for rows in curve.answers)
        }
        columns: dict[str, dict[str, Rows]] = {}
        for side, rows_of in values.items():
            for (metric, set_name), rows in rows_of.items():
                if metric in JOINED and set_name in _SETS:
                    columns.setdefault(set_name, {})[f"{side} {metric}"] = rows
        for side in self.steps:
            for place, rows in enumerate(curves[side]["own", "taught"].answers):
                columns.setdefault(FORGOTTEN, {})[f"{side} relearning {place}"] = rows
        self.means = {
            name: joint_means(of_set, resamples, derive_seed("surgery eval", seed, "bootstrap", name))
            for name, of_set in columns.items()
        }

    def robustness_of(self, side: str) -> dict[str, Joint]:
        """R, Q and steps to half relearnt of a model, as far as what they need was measured."""
        found = {}
        gains = {other: self._gain(other) for other in (side, "retrained")}
        if all(gain is not None for gain in gains.values()):
            found["relearn_robustness"] = joined(relearning_robustness, gains[side], gains["retrained"])
        if self.goal is not None and side in self.steps:
            found["relearn_half_steps"] = self._half_steps(side)
        full = self._mean(FORGOTTEN, f"{side} accuracy")
        for bits in BITS:
            rounded = self._mean(FORGOTTEN, f"{side} accuracy_{bits}bit")
            if full is not None and rounded is not None:
                found[f"quantisation_robustness_{bits}bit"] = joined(quantisation_stability, full, rounded)
        return found

    def score_parts_of(self, side: str) -> dict[str, Joint]:
        """The parts of the score that the measurements allow, and `score`, their harmonic mean; {} without any."""
        robust = self.robustness_of(side)
        target = self._mean(FORGOTTEN, "retrained accuracy") or self._mean(UNSEEN, f"{side} accuracy")
        wanted = {
            "forgetting": (forgetting_part, self._mean(FORGOTTEN, f"{side} accuracy"), target),
            "update": (update_part, *(self._mean(UPDATED, f"{side} {n}") for n in ("reliability", "generalisation"))),
            "retained": (retained_part, *(self._mean(RETAINED, f"{other} accuracy") for other in (side, "before"))),
            "robustness": (
                robustness_part,
                robust.get("relearn_robustness"),
                robust.get(f"quantisation_robustness_{SCORE_BITS}bit"),
            ),
        }
        parts = {
            name: joined(formula, *numbers)
            for name, (formula, *numbers) in wanted.items()
            if all(number is not None for number in numbers)
        }
        if parts:
            of = tuple(parts)
            parts["score"] = joined(lambda *values: surgery_score(dict(zip(of, values, strict=True))), *parts.values())
        return parts

    def _mean(self, set_name: str, name: str) -> Joint | None:
        return self.means.get(set_name, {}).get(name)

    def _gain(self, side: str) -> Joint | None:
        """Accuracy of the taught after relearning - before it."""
        if side not in self.steps:
            return None
        means = self.means[FORGOTTEN]
        last = means[f"{side} relearning {len(self.steps[side]) - 1}"]
        return joined(lambda end, start: end - start, last, means[f"{side} relearning 0"])

    def _half_steps(self, side: str) -> Joint:
        """A draw in which the goal is not reached counts as all steps that were made, the value itself as NaN."""
        steps = self.steps[side]
        means = [self.means[FORGOTTEN][f"{side} relearning {place}"] for place in range(len(steps))]
        found = joined(lambda *values: steps_until(steps, values, self.goal), *means)
        has_draw = np.isfinite(means[0].replicates)
        return found._replace(
            share_of=None,
            replicates=np.where(has_draw & np.isnan(found.replicates), float(steps[-1]), found.replicates),
        )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


class Metric(NamedTuple):
    """label: at most 30 characters. goal: what one wants to see of the model after surgery."""

    name: str
    label: str
    formula: str
    source: str
    goal: str


def _metrics() -> Iterator[Metric]:
    """Those of metrics.csv, then what is made of attacks and parts of the score."""
    with (Path(__file__).parent / "metrics.csv").open(newline="", encoding="utf-8") as file:
        yield from (Metric(**row) for row in csv.DictReader(file))
    known, high = "as retrained on what is forgotten, high elsewhere", "high"
    stability = "1 - |a - b| / (a + b), a and b the MCQ accuracy on unlearn before and after rounding to {} bits"
    source = "OpenUnlearning, arXiv 2506.12618; symmetric as in arXiv 2605.24614"
    for bits in BITS:
        label, formula = f"MCQ accuracy, {bits}-bit", f"with weights rounded to {bits} bits"
        yield Metric(f"accuracy_{bits}bit", label, formula, "arXiv 2410.16454", known)
    for bits in BITS:
        yield Metric(f"quantisation_robustness_{bits}bit", f"Q, {bits}-bit", stability.format(bits), source, high)
    for name, layout in PREFIXES.items():
        yield Metric(
            f"prefix_{name}", f"asked as: {name}", f"MCQ accuracy, asked as {layout!r}", "ours", "as retrained"
        )
    yield Metric("score", "score", "harmonic mean of the parts that were measured, in [0, 1]", "ours", high)
    for part, formula in PART_FORMULAS.items():
        yield Metric(f"score_{part}", f"- {part}", formula, "ours", high)


METRICS = {metric.name: metric for metric in _metrics()}


ABSENT_MODEL = {
    "before": "no model before: no KL, agreement, retained part of the score, steps to half relearnt (--before)",
    "after": "no model after surgery: nothing is judged, the others are yardsticks (--after)",
    "retrained": "no retrained model: no privacy leakage, no R; forgetting aims at accuracy on unseen (--retrained)",
}
NEEDED_SETS = {
    "unlearn": "no membership inference, no attacks, no forgetting part of the score",
    "unseen": "no membership inference, no loss above unseen",
    "update": "no reliability, generalisation, portability and conflict, no update part of the score",
    "retain": "no retained part of the score",
}


NEEDED_OF_PART = {
    "forgetting": "multiple-choice questions about unlearn, and about unseen or a retrained model",
    "update": "multiple-choice questions and paraphrases about update",
    "retained": "multiple-choice questions about retain, and the model before",
    "robustness": "the attacks relearn and quantise, and a retrained model",
}


def missing_lines(
    raws: Mapping[str, Mapping[str, Any]],
    refused: Mapping[str, Mapping[Key, str]],
    measures: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Models, parts, attacks and sets that are not there, and metrics that exist for other rows but not for these."""
    lines = [line for side, line in ABSENT_MODEL.items() if side not in raws]
    for side, raw in raws.items():
        needed = [part for part in PARTS if part != "divergence" or (side != "before" and "before" in raws)]
        lines += [f"{side}: the part {part} was not measured (--parts)" for part in needed if part not in raw]
        attacks = raw.get("robustness", {})
        absent = [attack for attack in ASKING_ATTACKS if attack not in attacks]
        if len(absent) < len(ASKING_ATTACKS):
            lines += [f"{side}: the attack {attack} was not made (--robustness)" for attack in absent]
        elif "robustness" in raw:
            lines.append(
                f"{side}: no attack asked anything: no questions about unlearn, or none of those (--robustness)"
            )
    measured = {row["set"] for row in measures}
    lines += [f"nothing of the set {name}: {what}" for name, what in NEEDED_SETS.items() if name not in measured]
    lines += [
        f"{side}, {name}: no {_label(metric)}: {why}"
        for side, of in refused.items()
        for (metric, name), why in of.items()
    ]
    lines += [
        f"{row['side']}, {row['set']}: {_label(row['metric'])} {_why(row['metric'])}"
        for row in measures
        if row["value"] is None
    ]
    return lines


def _why(metric: str) -> str:
    if metric == "relearn_half_steps":
        return "were not enough: half was not relearnt within all steps (--relearn_steps)"
    return "does not exist: the retrained model's AUC is 1"


def _label(metric: str) -> str:
    return METRICS[metric].label if metric in METRICS else metric


RawTable = Mapping[str, Any]
Summary = dict[str, Any]
LEAKAGE_SCORE = "auc_min_k"  # MUSE's


def summarise(
    before: RawTable | None = None,
    after: RawTable | None = None,
    retrained: RawTable | None = None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
    notes: Sequence[str] = (),
) -> Summary:
    """Everything that is printed and written. before, after, retrained: from `evaluate_model`, at least one.

    notes: lines about which rows were measured.
    """
    raws = {side: raw for side, raw in zip(SIDES, (before, after, retrained), strict=True) if raw is not None}
    if not raws:
        raise ValueError("nothing to summarise: give the measurements of before, after or retrained.")
    return {**_Summing(raws, confidence, seed, resamples).summary(), "notes": list(notes)}


class _Summing:
    """One call of `summarise`."""

    def __init__(self, raws: dict[str, RawTable], confidence: float, seed: int, resamples: int) -> None:
        self.raws, self.confidence, self.seed, self.resamples = raws, confidence, seed, resamples
        self.values: dict[str, dict[Key, Rows]] = {}
        self.refused: dict[str, dict[Key, str]] = {}
        for side, raw in raws.items():
            self.values[side], self.refused[side] = values_of(raw)
        self.chance = next((chance for raw in raws.values() if (chance := chance_of(raw)) is not None), None)
        self.curves = {side: curves_of(raw) for side, raw in raws.items()}
        for side, curves in self.curves.items():
            own = curves.get(("own", "taught"))
            if own is not None and not all(np.isfinite(rows.values).all() for rows in own.answers):
                self.refused[side]["relearn_half_steps", FORGOTTEN] = "the model said NaN while it relearnt."
        self.joint = JointNumbers(self.values, self.curves, self._half_way(), resamples, seed)
        self.measures: list[dict[str, Any]] = []

    def summary(self) -> Summary:
        score = {}
        for side in self.raws:
            for (metric, set_name), rows in self.values[side].items():
                self._add(side, set_name, metric, self._mean(rows, metric not in NO_SHARES), len(rows.values))
            self._compare_with_unseen(side)
            for metric, number in self.joint.robustness_of(side).items():
                name = "relearn_own_taught" if metric.startswith("relearn") else "accuracy"
                count = len(self.values[side][name, FORGOTTEN].values)
                self._add(side, FORGOTTEN, metric, number.interval(self.confidence), count)
            self._add_of_tofu(side)
            score[side] = self._score(side)
        return {
            "format": 1,
            "verdict": verdict_of(self.measures, self.raws),
            "sides": list(self.raws),
            "confidence": self.confidence,
            "chance": self.chance,
            "measures": self.measures,
            "curves": list(self._curve_rows()),
            "score": {side: found for side, found in score.items() if found is not None},
            "warnings": self._warnings(),
            "missing": [*missing_lines(self.raws, self.refused, self.measures), *self._absent_parts()],
        }

    def _add_of_tofu(self, side: str) -> None:
        """Forget quality and model utility, numbers without an interval."""
        sides = [one for one in (side, "retrained") if ("truth_ratio", FORGOTTEN) in self.values.get(one, {})]
        if side != "retrained" and len(sides) == 2:
            ratios = [truth_ratios(self.raws[one]["questions"][FORGOTTEN]["mcq"]) for one in sides]
            quality = Interval(ks_pvalue(*ratios), math.nan, math.nan)
            self._add(side, FORGOTTEN, "forget_quality", quality, len(ratios[0]))
        parts = [
            self.values[side][metric, name].values.mean()
            for name in ANCHORED_SETS
            for metric in UTILITY
            if (metric, name) in self.values[side]
        ]
        if len(parts) > 1:
            utility = harmonic_mean(map(float, parts))
            self._add(side, ALL_SETS, "model_utility", Interval(utility, *(math.nan,) * 2), len(parts))

    def _absent_parts(self) -> Iterator[str]:
        """Why a part of a model's score, or all of it, is not there."""
        for side in self.raws:
            there = self.joint.score_parts_of(side)
            absent = [name for name in PART_FORMULAS if name not in there]
            wanted = "; ".join(f"{name} wants {NEEDED_OF_PART[name]}" for name in absent)
            if absent:
                yield f"{side}: {'no score' if not there else 'a score without some parts'}: {wanted}"

    def _half_way(self) -> float | None:
        """The accuracy on unlearn halfway from chance to the model before surgery."""
        known = self.values.get("before", {}).get(("accuracy", FORGOTTEN))
        return None if known is None or self.chance is None else float(self.chance + known.values.mean()) / 2

    def _add(self, side: str, set_name: str, metric: str, interval: Interval, count: int | None) -> None:
        value, low, high = (float(number) if math.isfinite(number) else None for number in interval)
        row = {"side": side, "set": set_name, "metric": metric, "value": value, "low": low, "high": high, "n": count}
        self.measures.append(row)

    def _mean(self, rows: Rows, is_share: bool = True) -> Interval:
        statistic = np.mean if rows.values.ndim == 1 else ratio_of_sums
        options = self.confidence, self.resamples, self.seed, statistic, is_share
        return bootstrap_interval(rows.values, rows.subjects, *options)

    def _compare_with_unseen(self, side: str) -> None:
        """Membership inference, privacy leakage, and how far the loss lies above that on unseen texts."""
        loss = [self.values[side].get(("loss", name)) for name in (FORGOTTEN, UNSEEN)]
        if all(loss):
            self._two_samples(side, "loss_gap", *loss, lambda ours, theirs: float(ours.mean() - theirs.mean()))
        scores = self._scores(side)
        if not scores and all(self.raws[side].get("texts", {}).get(name) for name in (FORGOTTEN, UNSEEN)):
            self.refused[side]["auc_loss", FORGOTTEN] = "the loss of a text is not finite."
        for metric, pair in scores.items():
            self._two_samples(side, metric, *pair, auc)
        oracle = self._scores("retrained")
        if side != "retrained" and "auc_loss" in scores and "auc_loss" in oracle:
            pairs = [_side_by_side(*rows) for rows in zip(scores["auc_loss"], oracle["auc_loss"], strict=True)]
            if all(pair is not None for pair in pairs):  # what this model knows better than one that never read it
                gains = [pair._replace(values=pair.values[:, 0] - pair.values[:, 1]) for pair in pairs]
                self._two_samples(side, "auc_reference", *gains, auc)
        if side != "retrained" and LEAKAGE_SCORE in scores and LEAKAGE_SCORE in oracle:
            pairs = [_side_by_side(*rows) for rows in zip(scores[LEAKAGE_SCORE], oracle[LEAKAGE_SCORE], strict=True)]
            if all(pair is not None for pair in pairs):
                self._two_samples(side, "privacy_leakage", *pairs, _leakage)

    def _scores(self, side: str) -> dict[str, tuple[Rows, Rows]]:
        """Membership scores of unlearn and unseen by metric, as far as all of them are finite."""
        if not all(("loss", name) in self.values.get(side, {}) for name in (FORGOTTEN, UNSEEN)):
            return {}
        ours, theirs = (membership_scores(self.raws[side], name) for name in (FORGOTTEN, UNSEEN))
        return {name: (ours[name], theirs[name]) for name in ours}

    def _two_samples(
        self, side: str, metric: str, ours: Rows, theirs: Rows, statistic: Callable[[np.ndarray, np.ndarray], float]
    ) -> None:
        interval = bootstrap_two_samples(
            ours.values,
            theirs.values,
            statistic,
            ours.subjects,
            theirs.subjects,
            self.confidence,
            self.resamples,
            self.seed,
            is_share=metric.startswith("auc_"),
        )
        self._add(side, FORGOTTEN, metric, interval, len(ours.values) + len(theirs.values))

    def _score(self, side: str) -> dict[str, Any] | None:
        parts = self.joint.score_parts_of(side)
        if not parts:
            return None
        for name, number in parts.items():
            metric = name if name == "score" else f"score_{name}"
            self._add(side, ALL_SETS, metric, number.interval(self.confidence), None)
        has_oracle = ("accuracy", FORGOTTEN) in self.values.get("retrained", {})
        target = "of the retrained model" if has_oracle else "on unseen"
        told = f"; target: accuracy {target}" if "forgetting" in parts else ""
        left_out = [name for name in PART_FORMULAS if name not in parts]
        return {"formula": score_formula(parts) + told, "left_out": left_out}

    def _curve_rows(self) -> Iterator[dict[str, Any]]:
        for side, curves in self.curves.items():
            for (training, who), curve in curves.items():
                for step, answers in zip(curve.steps, curve.answers, strict=True):
                    known = np.isfinite(answers.values).all()
                    mean = self._mean(answers) if known else (math.nan,) * 3
                    value, low, high = (float(n) if math.isfinite(n) else None for n in mean)
                    row = {"side": side, "training": training, "asked": who, "step": step}
                    yield row | {"accuracy": value, "low": low, "high": high, "n": len(answers.values)}

    def _warnings(self) -> list[str]:
        """Over-forgetting of the model after surgery that cannot be chance."""
        lines = []
        for metric, side_of_line in (
            ("loss_gap", "the loss on unlearn lies above that on unseen texts by {} nats"),
            *((name, f"membership AUC ({name.removeprefix('auc_')}) is {{}}, below 1/2") for name in _AUCS),
        ):
            row, oracle = (self._find(side, metric) for side in ("after", "retrained"))
            if row is None or row["low"] is None:
                continue
            is_beyond = row["low"] > 0 if metric == "loss_gap" else is_over_forgotten(row["high"])
            if is_beyond:
                value = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
                beside = "" if oracle is None else f"; retrained: {oracle['value']:.3f}"
                lines.append(f"after is over-forgotten: {side_of_line.format(value)}{beside}")
        return lines

    def _find(self, side: str, metric: str) -> dict[str, Any] | None:
        rows = (row for row in self.measures if row["side"] == side and row["metric"] == metric)
        return next((row for row in rows if row["value"] is not None), None)


_AUCS = ("auc_loss", "auc_zlib", "auc_min_k", "auc_min_k_plus_plus", "auc_gradient")


def _leakage(ours: np.ndarray, theirs: np.ndarray) -> float:
    return privacy_leakage(auc(ours[:, 0], theirs[:, 0]), auc(ours[:, 1], theirs[:, 1]))


def _side_by_side(ours: Rows, oracle: Rows) -> Rows | None:
    """(N, 2) values of the same texts by two models, None if they did not read the same."""
    if ours.subjects != oracle.subjects:
        return None
    return Rows(np.stack([ours.values, oracle.values], axis=1), ours.subjects)


class SurgeryEvaluation:
    """The checked inputs of a run. Raises ValueError before any weight is read.

    The folder holds eval_surgery.json (settings), work/<model>/<part>.json (raw measurements), then results.json,
    results.csv and report.html.
    """

    def __init__(self, models: ModelArguments, bench: BenchArguments, settings: EvalSettings, root: str) -> None:
        self.models, self.settings, self.arguments = models.given, settings, models
        choose_device(models.device)  # refuses one that is not there
        for name in self.models.values():  # before the first is measured, which takes minutes
            whole = base_of_adapter(name) if is_adapter(name) else name
            read_config(whole, trust_remote_code=models.trust_remote_code)
        self.state = PartialState(cpu=models.device == "cpu")
        self.device = choose_device(models.device)
        tokenizer = models.tokenizer or next(iter(self.models.values()))
        self.tokenizer = read_tokenizer(tokenizer, trust_remote_code=models.trust_remote_code)
        self.bench, self.notes = without_anchored(bench.load(self.tokenizer), self.models.get("after"))
        if not sets_of(self.bench, settings):
            raise ValueError(f"the bench holds nothing of the sets {', '.join(settings.sets or SETS)}: name others.")
        self.folder = ResumableFolder(root, "eval_surgery.json", self._identity(models, bench))

    def measurements(self) -> dict[str, Raw]:
        """Raw measurements of each model by side, from disk where they are there."""
        self.folder.check()
        self.state.wait_for_everyone()
        if self.state.is_main_process:  # the only one that writes
            self.folder.claim()
        self.state.wait_for_everyone()
        missing = {side: self._missing_parts(side) for side in self.models}
        self.state.wait_for_everyone()  # nobody writes before everybody has looked
        for side, parts in missing.items():
            if parts:
                self._measure(side, parts)
        self.state.wait_for_everyone()
        found = {side: {part: self._read(side, part) for part in self.settings.measured_parts} for side in self.models}
        return {side: {part: raw for part, raw in raws.items() if raw is not None} for side, raws in found.items()}

    def _read(self, side: str, part: str) -> Raw | None:
        return self.folder.read(f"work/{side}/{part}.json")

    def _missing_parts(self, side: str) -> list[str]:
        has_reference = side != "before" and "before" in self.models
        return [
            part
            for part in self.settings.measured_parts
            if self._read(side, part) is None and (part != "divergence" or has_reference)
        ]

    def _measure(self, side: str, parts: list[str]) -> None:
        model, is_main = load_whole(self.models[side], self.arguments), self.state.is_main_process
        for part in parts:
            has_routes = part == "robustness" and "routes" in self.settings.attacks and bool(moe_layers(model))
            has_before, wants = "before" in self.models, part in ("divergence", "continuations")
            needs_reference = has_before and (wants or (has_routes and side == "after"))
            reference = model if side == "before" else None
            if needs_reference and side != "before":
                reference = load_whole(self.models["before"], self.arguments)
            settings = replace(self.settings, parts=[part])
            found = evaluate_model(model, self.tokenizer, self.bench, settings, reference, bar=is_main)
            if is_main:
                self.folder.write(f"work/{side}/{part}.json", found[part])
            if reference is not None and reference is not model:
                del reference
                release_memory(self.device)
        del model
        release_memory(self.device)

    def _identity(self, models: ModelArguments, bench: BenchArguments) -> dict[str, Any]:
        """Everything that decides the measurements, up to rounding: neither batch size nor device."""
        identity: dict[str, Any] = {f"{side}_files": checksum_of_files(name) for side, name in self.models.items()}
        identity |= {
            f"{side}_base_files": checksum_of_files(base_of_adapter(name))
            for side, name in self.models.items()
            if is_adapter(name)
        }
        identity |= self.models
        identity |= {name: getattr(bench, name) for name in ("bench", "num_subjects", "bench_seed", "documents")}
        identity["anchors"] = self.notes
        identity["bench_content"] = checksum_of_bench(self.bench)
        tokenizer = models.tokenizer
        identity |= {"tokenizer": tokenizer, "tokenizer_files": tokenizer and checksum_of_files(tokenizer)}
        undecisive = ("batch_size", "parts", "robustness")
        identity |= {name: value for name, value in asdict(self.settings).items() if name not in undecisive}
        return identity | {"attacks": self.settings.attacks, "dtype": models.dtype}


def load_whole(name: str, arguments: ModelArguments) -> PreTrainedModel:
    """A causal LM on its device; the folder of an adapter is merged into its base, as it would be for use.

    Side by side with its base an adapter would be rounded by itself, and relearning would leave it as it is.
    """
    options = {"dtype": arguments.dtype, "trust_remote_code": arguments.trust_remote_code}
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    peft = require("peft", needed_by=f"the adapter {name!r}") if is_adapter(name) else None
    model = read_model(AutoModelForCausalLM, name if peft is None else base_of_adapter(name), **options)
    model = model.to(choose_device(arguments.device))
    if peft is not None:
        with reading(f"the adapter {name!r}"):
            adapted = peft.PeftModel.from_pretrained(model, name)
        read_adapter(name, peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
        model = adapted.merge_and_unload()
    return model.eval()


def base_of_adapter(name: str) -> str:
    """The model that the adapter in a folder belongs to."""
    field = "base_model_name_or_path"
    return read_json(Path(name) / "adapter_config.json", **{field: str | None}).get(field) or ""


RECORD_FILE = "surgery.json"  # beside an operated model; trainers/surgery/verdict.py writes it


def without_anchored(bench: SurgeryBench, after: str | None) -> tuple[SurgeryBench, list[str]]:
    """The bench without what the operated model was held to, as surgery.json beside it tells, and what was done.

    Retention is what became of texts that no term of the surgery saw. A set of which nothing would be left stays, and
    the line about it says so.
    """
    record = None if after is None else Path(after) / RECORD_FILE
    if record is None or not record.is_file():
        return bench, []
    anchored, notes = set(read_json(record, anchored=list[str] | None).get("anchored") or ()), []
    tables = {}
    for name in (*ANCHORED_SETS, UNSEEN) if anchored else ():
        subjects = [table["subject"] for table in (bench.documents[name], *map(bench.ask, (name,) * 2, SPLITS))]
        known = {subject for column in subjects for subject in column}
        kept = {subject for subject in known if digest_of_subject(subject) not in anchored}
        if len(kept) == len(known):
            continue
        if not kept:
            notes.append(f"{name}: the surgery was held to all of it, so nothing here says what became of the rest")
            continue
        tables[name] = kept
        notes.append(f"{name}: {len(kept)} of {len(known)} subjects, those that the surgery was not held to")
    return (bench.only(tables) if tables else bench), notes


def checksum_of_bench(bench: SurgeryBench) -> str:
    """Of all documents and questions, so that an edited file is another bench."""
    digest = hashlib.blake2b(digest_size=8)
    for rows in (*bench.documents.values(), *bench.questions.values()):
        digest.update(json.dumps(rows.to_list(), sort_keys=True).encode())
    return digest.hexdigest()


def run(models: ModelArguments, bench: BenchArguments, settings: EvalSettings, output: OutputArguments) -> str | None:
    """Check everything, measure what is missing, write; what to print at the end, None on all ranks but the first."""
    work = SurgeryEvaluation(models, bench, settings, output.output_dir)
    raws = work.measurements()
    if not work.state.is_main_process:
        return None
    options = {"confidence": output.confidence, "seed": settings.seed, "resamples": output.resamples}
    from hf_moe_cpt.evaluation.surgery_report import text_report, write_files

    facts = {"settings": work.folder.settings, "machine": machine_facts(work.device, output.commit)}
    with reading(work.folder.root / "work", "remove the part that was changed there, and it is measured again"):
        summary = summarise(**raws, notes=work.notes, **options)
        write_files(work.folder.root, summary, raws, facts)
        return f"files: {output.output_dir}\n\n{text_report(summary)}"
