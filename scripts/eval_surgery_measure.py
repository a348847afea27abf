"""Take all raw measurements of one model: `evaluate_model`. What they mean is worked out in eval_surgery_results.py.

    questions      {set: {kind: columns}}    log-probability, tokens and hits of each option
    texts          {set: columns}            log-probability, hit, vocabulary mean and spread of each token
    continuations  {set: columns}            what the model writes after the first half of a text, greedily
    divergence     {set: columns}            KL and agreement with a reference at each token
    robustness     {attack: ...}             eval_surgery_robustness.py

Columns are lists with an entry for each row, `id` and `subject` among them. All of it is plain numbers, text, lists
and dictionaries, as JSON holds them. Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_moe_cpt.data.surgery_bench import SurgeryBench
from hf_moe_cpt.scripts.eval_surgery_robustness import attack
from hf_moe_cpt.scripts.eval_surgery_scoring import continue_greedily, score_distances, score_tokens
from hf_moe_cpt.scripts.eval_surgery_sets import (
    ANCHORED_SETS,
    CONTINUED_SETS,
    EvalSettings,
    ReadDocument,
    documents_of,
    questions_of,
    sets_of,
)
from hf_moe_cpt.trainers.surgery.model_pass import check_head


Raw = dict[str, Any]  # measurements by part


class Subject(NamedTuple):
    """One model under examination. reference: the model before surgery, for the divergence."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    bench: SurgeryBench
    settings: EvalSettings
    reference: PreTrainedModel | None


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    bench: SurgeryBench,
    settings: EvalSettings | None = None,
    reference: PreTrainedModel | None = None,
) -> Raw:
    """Measurements of each part of the settings; "divergence" only where the reference, the model before, is given.

    All processes of a group must call it, each with the whole model; all get the same. The model is left as it was.
    """
    s = settings or EvalSettings()
    check_head(model)
    subject = Subject(model, tokenizer, bench, s, reference)
    was_training = model.training
    model.eval()
    try:
        return {part: MEASURES[part](subject) for part in s.parts if part != "divergence" or reference is not None}
    finally:
        model.train(was_training)


def measure_questions(subject: Subject) -> Raw:
    """Of each set and kind: answer, old_answer, attribute, and of each option logp (sum), tokens and hits."""
    model, tokenizer, bench, s, _ = subject
    found: Raw = {}
    for name in sets_of(bench, s):
        asked = questions_of(bench, name, tokenizer, model, s)
        options = [text for question in asked for text in question.options]
        scores = iter(score_tokens(model, options, 3 * s.batch_size, bar=_bar(s, f"questions about {name}")))
        for question in asked:
            of_options = [next(scores) for _ in question.options]
            row = {key: question.row[key] for key in ("id", "subject", "attribute", "answer", "old_answer")}
            row["logp"] = [float(option.logp.sum(dtype=np.float64)) for option in of_options]
            row["tokens"] = [len(option.logp) for option in of_options]
            row["hits"] = [int(option.hit.sum()) for option in of_options]
            _append(found.setdefault(name, {}).setdefault(question.row["kind"], {}), row)
    return found


def measure_texts(subject: Subject) -> Raw:
    """Of each set: logp, hit, mean and std, lists with an entry for each token that counts, and the text."""
    model, tokenizer, bench, s, _ = subject
    found: Raw = {}
    for name in sets_of(bench, s):
        documents = documents_of(bench, name, tokenizer, model, s)
        tokens = [document.tokens for document in documents]
        bar = _bar(s, f"texts of {name}")
        scores = score_tokens(model, tokens, s.batch_size, with_moments=True, bar=bar)
        for document, score in zip(documents, scores, strict=True):
            row = {**_who(document), "text": document.row["text"][len(document.row["prefix"]) :]}
            row |= {key: column.tolist() for key, column in score._asdict().items()}
            _append(found.setdefault(name, {}), row)
    return found


def measure_continuations(subject: Subject) -> Raw:
    """Of each set: the tokens and the text that follow the first half of a text, and the true rest, as long at most.

    Texts of fewer than four tokens that count are left out.
    """
    model, tokenizer, bench, s, _ = subject
    stop = _stop_tokens(model, tokenizer)
    found: Raw = {}
    for name in (name for name in sets_of(bench, s) if name in CONTINUED_SETS):
        documents = [
            document
            for document in documents_of(bench, name, tokenizer, model, s)
            if len(document.tokens.ids) - document.tokens.start >= 4
        ]
        halves = [(document.tokens.start + len(document.tokens.ids)) // 2 for document in documents]
        prompts = [document.tokens.ids[:half] for document, half in zip(documents, halves, strict=True)]
        bar = _bar(s, f"continuations of {name}")
        written = continue_greedily(model, prompts, s.new_tokens, s.batch_size, stop=stop, bar=bar)
        for document, half, ids in zip(documents, halves, written, strict=True):
            rest = document.tokens.ids[half : half + s.new_tokens]
            texts = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids, rest))
            row = dict(zip(("tokens", "true_tokens", "text", "true_text"), (ids, list(rest), *texts), strict=True))
            _append(found.setdefault(name, {}), {**_who(document), **row})
    return found


def measure_divergence(subject: Subject) -> Raw:
    """Of the sets that must not change: kl and agrees, lists with an entry for each token that counts."""
    model, tokenizer, bench, s, reference = subject
    found: Raw = {}
    for name in (name for name in sets_of(bench, s) if name in ANCHORED_SETS):
        documents = documents_of(bench, name, tokenizer, model, s)
        tokens = [document.tokens for document in documents]
        distances = score_distances(model, reference, tokens, s.batch_size, bar=_bar(s, f"divergence on {name}"))
        for document, distance in zip(documents, distances, strict=True):
            columns = {key: column.tolist() for key, column in distance._asdict().items()}
            _append(found.setdefault(name, {}), {**_who(document), **columns})
    return found


def measure_robustness(subject: Subject) -> Raw:
    """The attacks of the settings."""
    return attack(subject.model, subject.tokenizer, subject.bench, subject.settings)


MEASURES: dict[str, Callable[[Subject], Raw]] = {
    "questions": measure_questions,
    "texts": measure_texts,
    "continuations": measure_continuations,
    "divergence": measure_divergence,
    "robustness": measure_robustness,
}


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    known = getattr(model.generation_config, "eos_token_id", None)
    ids = [] if known is None else [known] if isinstance(known, int) else list(known)
    return sorted({*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


def _who(document: ReadDocument) -> Raw:
    return {key: document.row[key] for key in ("id", "subject", "form")}


def _append(columns: dict[str, list[Any]], row: Raw) -> None:
    for key, value in row.items():
        columns.setdefault(key, []).append(value)


def _bar(settings: EvalSettings, label: str) -> str | None:
    return label if settings.show_progress else None
