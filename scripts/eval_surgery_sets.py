"""From a SurgeryBench to what is measured: which documents and questions of each set, and their tokens.

The rows are a seeded draw without repetition, the same for every model, so that models are compared row by row. An
option is scored after its question, in the layout `question_template`; its tokens begin where question and option
together leave the tokens of the question alone, so a tokenizer that joins both at the boundary does no harm.

Source: ours. The measures are in docs/surgery_eval.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_moe_cpt.data.permutation import derive_seed, permute
from hf_moe_cpt.data.prefix_tokens import tokens_of_prefix
from hf_moe_cpt.data.surgery_bench import SurgeryBench
from hf_moe_cpt.data.surgery_bench_grammar import SPLITS
from hf_moe_cpt.data.surgery_bench_questions import QUESTION_KINDS, QUIZ_TEMPLATE, as_completions
from hf_moe_cpt.data.surgery_bench_schema import group_of_set
from hf_moe_cpt.data.surgery_bench_world import SETS
from hf_moe_cpt.scripts.eval_surgery_scoring import CountedText


PARTS = ("questions", "texts", "continuations", "divergence", "robustness")
ATTACKS = ("relearn", "quantise", "prefix")
KINDS_OF_SET = {
    "unlearn": ("mcq", "cloze", "paraphrase"),
    "obsolete": ("mcq",),
    "update": QUESTION_KINDS,
    "retain": ("mcq",),
    "neighbour": ("mcq",),
    "unseen": ("mcq",),
}
CONTINUED_SETS = ("unlearn", "update", "retain", "neighbour", "unseen")
ANCHORED_SETS = ("retain", "neighbour")  # where a model must stay as it was before
BARE_TEMPLATE = "{question}"  # of the paper, and of clozes


@dataclass(frozen=True)
class EvalSettings:
    """What is measured, on how many rows.

    sets, kinds: of the bench and its questions; None for all that are asked of each set, KINDS_OF_SET. max_questions:
    most of each set and kind. max_documents: most of each set. question_template: how a question is put before its
    options, "{subject}" in it replaced; clozes are put bare. header: put before each document, not counted, such as
    `surgery_bench.HEADER`. max_length: tokens of a text, the rest is cut; None for what the model can read.
    new_tokens: of a continuation. attacks: of ATTACKS, in the part "robustness". relearn_*: of the relearning attack;
    accuracy is taken every relearn_every steps.
    """

    sets: tuple[str, ...] | None = None
    split: str = "test"
    parts: tuple[str, ...] = PARTS
    kinds: tuple[str, ...] | None = None
    max_questions: int = 200
    max_documents: int = 200
    batch_size: int = 16
    question_template: str = QUIZ_TEMPLATE
    header: str | None = None
    max_length: int | None = None
    new_tokens: int = 64
    attacks: tuple[str, ...] = ATTACKS
    relearn_steps: int = 60
    relearn_every: int = 10
    relearn_lr: float = 1e-5
    relearn_batch_size: int = 8
    seed: int = 0
    show_progress: bool = False

    def __post_init__(self) -> None:
        for name, known in (("sets", SETS), ("parts", PARTS), ("kinds", QUESTION_KINDS), ("attacks", ATTACKS)):
            for value in getattr(self, name) or ():
                if value not in known:
                    raise ValueError(f"{name} has {value!r}, which is unknown: choose from {', '.join(known)}.")
        if self.split not in SPLITS:
            raise ValueError(f"split {self.split!r} is unknown: choose {' or '.join(SPLITS)}.")
        positive = ("max_questions", "max_documents", "batch_size", "new_tokens")
        for name in (*positive, "relearn_steps", "relearn_every", "relearn_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 < self.relearn_lr < float("inf"):
            raise ValueError(f"relearn_lr={self.relearn_lr} must be above 0 and finite.")
        if "{question}" not in self.question_template:
            raise ValueError(f"question_template {self.question_template!r} must contain {{question}}.")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length={self.max_length} must be at least 2, so that a token has one before it.")


class AskedQuestion(NamedTuple):
    """A row of questions, and its options after it."""

    row: dict[str, Any]
    options: list[CountedText]


class ReadDocument(NamedTuple):
    """A row of documents and its tokens; the header does not count."""

    row: dict[str, Any]
    tokens: CountedText


def read_own_bench(documents: Sequence[str], questions: str | None) -> SurgeryBench:
    """A bench of a user's own JSON Lines: one file whose rows name their set, or files as set=path."""
    named = [text.partition("=") for text in documents]
    if len(named) == 1 and not named[0][1]:
        return SurgeryBench.from_jsonl(documents[0], questions)
    if not all(sign for _, sign, _ in named):
        raise ValueError("--documents takes one file whose rows name their set, or several as unlearn=a.jsonl.")
    return SurgeryBench.from_jsonl({name: Path(path) for name, _, path in named}, questions)


def sets_of(bench: SurgeryBench, settings: EvalSettings) -> tuple[str, ...]:
    """The sets to be measured: those chosen, or those with documents or questions."""
    asked = set(bench.questions[settings.split]["set"])
    there = [name for name in SETS if len(bench.documents[name]) or name in asked]
    return tuple(name for name in there if settings.sets is None or name in settings.sets)


def chosen_rows(rows: Dataset, most: int, seed: int, *names: str) -> list[dict[str, Any]]:
    """At most `most` rows, drawn without repetition by (seed, names), in the order of the table."""
    if len(rows) <= most:
        return rows.to_list()
    drawn = permute(np.arange(most), len(rows), derive_seed("surgery eval", seed, *names))
    return rows.select(np.sort(drawn)).to_list()


def documents_of(
    bench: SurgeryBench, set_name: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, s: EvalSettings
) -> list[ReadDocument]:
    """The documents of a set; of obsolete and update the same subjects, which are the rows at the same places."""
    rows = chosen_rows(bench.with_header(set_name, s.header), s.max_documents, s.seed, group_of_set(set_name))
    return read_documents(rows, tokenizer, room_of(model, s))


def read_documents(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, room: int | None
) -> list[ReadDocument]:
    """Rows with `text` and `prefix` as tokens, those left out of which no token counts; at most `room` of each."""
    if not rows:
        return []
    has_prefix = any(row["prefix"] for row in rows)
    if has_prefix and not tokenizer.is_fast:
        raise ValueError(f"a header needs a fast tokenizer, got {type(tokenizer).__name__}: leave the header out.")
    found = tokenizer([row["text"] for row in rows], return_offsets_mapping=has_prefix)
    documents = []
    for place, row in enumerate(rows):
        ids = found["input_ids"][place][:room]
        offsets = found["offset_mapping"][place] if row["prefix"] else []
        start = max(1, tokens_of_prefix(offsets, row["prefix"]))
        if start < len(ids):
            documents.append(ReadDocument(row, CountedText(ids, start)))
    return documents


def questions_of(
    bench: SurgeryBench,
    set_name: str,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    s: EvalSettings,
    kinds: Sequence[str] | None = None,
) -> list[AskedQuestion]:
    """The questions of a set, of every kind that is asked of it or of `kinds` alone."""
    wanted = KINDS_OF_SET[set_name] if kinds is None else kinds
    wanted = [kind for kind in wanted if s.kinds is None or kind in s.kinds]
    asked = bench.ask(set_name, s.split)
    kind_of_row = np.asarray(asked["kind"])
    rows = [
        row
        for kind in wanted
        for row in chosen_rows(
            asked.select(np.flatnonzero(kind_of_row == kind)), s.max_questions, s.seed, set_name, kind
        )
    ]
    return ask(rows, tokenizer, room_of(model, s), s.question_template)


def ask(
    rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, room: int | None, template: str
) -> list[AskedQuestion]:
    """Questions in a layout, each option after its question; where it is too long, the question loses its beginning.

    Raises ValueError for a question that alone has no token, or an option that adds none.
    """
    if not rows:
        return []
    pairs = []
    for row in rows:
        layout = BARE_TEMPLATE if row["kind"] == "cloze" else template.replace("{subject}", row["subject"])
        pairs.append(as_completions(row["question"], row["options"], layout))
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    wholes = iter(tokenizer([prompt + option for prompt, options in pairs for option in options])["input_ids"])
    questions = []
    for row, prompt, (_, options) in zip(rows, prompts, pairs, strict=True):
        texts = [next(wholes) for _ in options]
        start = min(_common_start(prompt, ids) for ids in texts)
        if start < 1 or any(len(ids) <= start for ids in texts):
            raise ValueError(
                f"question {row['id']!r} cannot be scored: the tokenizer {type(tokenizer).__name__} gives it or an "
                "option no token of its own."
            )
        too_long = 0 if room is None else max(0, max(map(len, texts)) - room)
        cut = min(too_long, start - 1)
        questions.append(AskedQuestion(row, [CountedText(ids[cut:][:room], start - cut) for ids in texts]))
    return questions


def room_of(model: PreTrainedModel, settings: EvalSettings) -> int | None:
    """Most tokens of a text: what the model can read or what the settings allow, None where neither has a limit."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (window, settings.max_length) if limit is not None]
    return min(limits, default=None)


def _common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens are equal."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))
