"""What a causal LM makes of texts and of a SurgeryBench, and a number for each question and text from that.

Texts: log-probabilities token by token, greedy continuations, distance to another model. Rows go through the model in
batches of similar length, padded, the longest first, so that memory fails at once. Only positions that count meet the
head, a chunk at a time. With several processes each scores every world-size-th row and all get all results, by the
row's place: no row is scored twice or lost.

Bench: rows are a seeded draw without repetition, the same for every model, so that models are compared row by row. An
option is scored after its question, in the layout `question_template`; its tokens begin where question and option
together leave the tokens of the question alone, so a tokenizer that joins both at the boundary does no harm.

Numbers: rows keep the name of their subject, because questions about one subject are not independent: intervals are
drawn from subjects. The metrics are those of text_metrics.py, explained in docs/surgery_eval.md.

Verdict: forgotten is what a model does that never read the texts, the retrained one, or any model on the set unseen. A
difference that its interval does not settle is called undecided.

Letters: B rows of a batch, S their tokens, N positions that count, H hidden size, V vocabulary. Source: ours.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from hf_moe_cpt.data.random import derive_seed, permute
from hf_moe_cpt.data.surgery_bench import (
    ALL_KINDS,
    QUESTION_KINDS,
    QUIZ_TEMPLATE,
    SETS,
    SPLITS,
    SurgeryBench,
    as_completions,
    group_of_set,
)
from hf_moe_cpt.data.surgery_bench.bench import OPEN, tokens_of_prefix
from hf_moe_cpt.evaluation.text_metrics import (
    LEAST_FLUENCY,
    agreement_totals,
    conflict_score,
    exact_memorisation,
    extraction_strength,
    kl_totals,
    loss_score,
    mcq_correct,
    min_k,
    min_k_plus_plus,
    ngram_entropy,
    probability,
    rouge_l,
    token_accuracy,
    truth_ratio,
    zlib_score,
)
from hf_moe_cpt.trainers.surgery.chunked import LanguageHead, forward_kl, head_of, run_model


LOGITS_AT_ONCE = 2**24  # numbers in the logits of a chunk: 64 MiB in float32, of which a handful live at a time
LEAST_LOGP = -1e4  # what a token of probability 0 counts as where log-probabilities are averaged


class CountedText(NamedTuple):
    """Token ids of which those from place `start` on count; start is at least 1 and below the length.

    ends: whether the last token is an end of text: it counts in losses, and not in what asks whether a text is known.
    """

    ids: Sequence[int]
    start: int
    ends: bool = False


class TokenScores(NamedTuple):
    """Of the n tokens that count, in order; all (n,). Log-probabilities in nats.

    mean, std: of log p(v) over the vocabulary, v drawn from p; empty where they were not asked for.
    """

    logp: np.ndarray
    hit: np.ndarray  # whether the token is the most likely one
    mean: np.ndarray
    std: np.ndarray


class Distances(NamedTuple):
    """Of the n tokens that count, (n,) each: KL of the reference from the model in nats, and whether both's first
    choices are the same."""

    kl: np.ndarray
    agrees: np.ndarray


def score_tokens(
    model: PreTrainedModel,
    texts: Sequence[CountedText],
    batch_size: int,
    *,
    with_moments: bool = False,
    bar: str | None = None,
) -> list[TokenScores]:
    """One entry for each text, in their order. bar: label of a progress bar, None for none."""
    head = head_of(model)

    def score(batch: Sequence[CountedText]) -> list[TokenScores]:
        states, targets = _counted_states(model, batch)
        parts = [
            _score_chunk(chunk, labels, head, with_moments)
            for chunk, labels in zip(_chunks(states, head), _chunks(targets, head), strict=True)
        ]
        return [TokenScores(*columns) for columns in _by_text(parts, batch)]

    return over_rows(texts, lambda text: len(text.ids), score, batch_size, bar)


def score_options(
    model: PreTrainedModel, asked: Sequence[AskedQuestion], batch_size: int, bar: str | None = None
) -> list[dict[str, list[Any]]]:
    """For each question logp (sum, float64), tokens and hits, lists with an entry for each option."""
    scores = iter(score_tokens(model, [text for q in asked for text in q.options], 3 * batch_size, bar=bar))
    found = []
    for question in asked:
        options = [next(scores) for _ in question.options]
        row = {"logp": [float(option.logp.sum(dtype=np.float64)) for option in options]}
        row |= {"tokens": [len(option.logp) for option in options], "hits": [int(o.hit.sum()) for o in options]}
        found.append(row)
    return found


def score_distances(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    texts: Sequence[CountedText],
    batch_size: int,
    *,
    bar: str | None = None,
) -> list[Distances]:
    """How far `model` is from `reference` at each token that counts, one entry for each text, in their order."""
    heads = head_of(model), head_of(reference)
    if heads[0].weight.shape[0] != heads[1].weight.shape[0]:
        raise ValueError(
            f"the model has {heads[0].weight.shape[0]} words and the one before {heads[1].weight.shape[0]}: their "
            "KL is defined for one vocabulary only; leave the part 'divergence' out."
        )

    def compare(batch: Sequence[CountedText]) -> list[Distances]:
        chunks = [_chunks(_counted_states(one, batch)[0], heads[0]) for one in (model, reference)]
        parts = []
        for pair in zip(*chunks, strict=True):
            ours, theirs = (_log_softmax(states, head) for states, head in zip(pair, heads, strict=True))
            parts.append((forward_kl(ours, theirs), ours.argmax(-1) == theirs.argmax(-1)))
        return [Distances(*columns) for columns in _by_text(parts, batch)]

    return over_rows(texts, lambda text: len(text.ids), compare, batch_size, bar)


def continue_greedily(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    *,
    stop: Sequence[int],
    bar: str | None = None,
) -> list[list[int]]:
    """The most likely next token again and again, up to max_new_tokens or before one of `stop`; in order of prompts.

    The model's own generation settings (penalties, sampling) are left aside.
    """
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop) or None,
        pad_token_id=stop[0] if stop else 0,
    )

    def generate(batch: Sequence[Sequence[int]]) -> list[list[int]]:
        width = max(map(len, batch))
        ids = torch.full((len(batch), width), settings.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):  # on the left: what is generated follows the prompt
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
        output = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
        )
        return [_before_stop(row, stop) for row in output[:, width:].tolist()]

    own = model.generation_config
    model.generation_config = settings
    try:
        return over_rows(prompts, len, generate, batch_size, bar)
    finally:
        model.generation_config = own


@torch.no_grad()
def over_rows(
    rows: Sequence[Any],
    length: Callable[[Any], int],
    run: Callable[[Sequence[Any]], list[Any]],
    batch_size: int,
    bar: str | None = None,
) -> list[Any]:
    """What `run` makes of batches of rows, one result for each row, in their order and on every process.

    Must be called by all processes of a group, with the same rows.
    """
    is_alone = not (dist.is_available() and dist.is_initialized())
    rank, world = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
    places_of_all = sorted(range(len(rows)), key=lambda place: -length(rows[place]))
    order, most = places_of_all[rank::world], len(places_of_all[::world])
    results: dict[int, Any] = {}
    with tqdm(total=len(order), desc=bar, disable=bar is None or rank > 0, leave=False, mininterval=1) as progress:
        for begin in range(0, most, batch_size):
            places = order[begin : begin + batch_size]
            # a pass of a model whose weights are spread over processes is one of all of them
            done = run([rows[place] for place in places or places_of_all[-1:]])
            results |= zip(places, done if places else (), strict=True)
            progress.update(len(places))
    if world > 1:
        shares: list[Any] = [None] * world
        dist.all_gather_object(shares, results)
        results = {place: result for share in shares for place, result in share.items()}
    return [results[place] for place in range(len(rows))]


def padded(texts: Sequence[CountedText], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and attention mask (B, S), padded on the right, and (B, S - 1) bool: whether the next token counts."""
    width = max(len(text.ids) for text in texts)
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width, dtype=torch.long)
    counts = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, text in enumerate(texts):
        length = len(text.ids)
        ids[row, :length], mask[row, :length], counts[row, text.start : length] = torch.tensor(text.ids), 1, True
    return ids.to(device), mask.to(device), counts[:, 1:].to(device)


def _counted_states(model: PreTrainedModel, batch: Sequence[CountedText]) -> tuple[Tensor, Tensor]:
    """Hidden states (N, H) that predict the tokens that count, and these tokens (N,), text after text."""
    ids, mask, counts = padded(batch, model.device)
    hidden = run_model(model, {"input_ids": ids, "attention_mask": mask})
    return hidden[:, :-1][counts], ids[:, 1:][counts]


def _chunks(tensor: Tensor, head: LanguageHead) -> tuple[Tensor, ...]:
    return tensor.split(max(1, LOGITS_AT_ONCE // head.weight.shape[0]))


def _log_softmax(states: Tensor, head: LanguageHead) -> Tensor:
    logits = functional.linear(states, head.weight, head.bias)
    return head.form.apply(logits.to(torch.promote_types(logits.dtype, torch.float32))).log_softmax(-1)


def _score_chunk(states: Tensor, targets: Tensor, head: LanguageHead, with_moments: bool) -> tuple[Tensor, ...]:
    logp = _log_softmax(states, head)
    target_logp = logp.gather(-1, targets[:, None])[:, 0]
    hit = logp.argmax(-1) == targets
    if not with_moments:
        return target_logp, hit, target_logp[:0], target_logp[:0]
    floored = logp.clamp_min(LEAST_LOGP)  # 0 * inf is no number
    mean = (floored.exp() * floored).sum(-1)
    variance = (floored.exp() * (floored - mean[:, None]).square()).sum(-1)
    return target_logp, hit, mean, variance.sqrt()


def _by_text(parts: Sequence[tuple[Tensor, ...]], batch: Sequence[CountedText]) -> Iterator[tuple[np.ndarray, ...]]:
    """The columns of all chunks, cut into those of each text; a column without entries stays so."""
    columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    begin = 0
    for text in batch:
        end = begin + len(text.ids) - text.start
        yield tuple(column[begin:end] for column in columns)
        begin = end


def _before_stop(ids: list[int], stop: Sequence[int]) -> list[int]:
    ends = [place for place, token in enumerate(ids) if token in stop]
    return ids[: ends[0]] if ends else ids


PARTS = ("questions", "answers", "texts", "continuations", "divergence", "robustness")
ASKING_ATTACKS = ("relearn", "quantise", "prefix")
ATTACKS, NO_ATTACKS = (*ASKING_ATTACKS, "gradients", "routes"), "none"
KINDS_OF_SET = {  # of other kinds a set's questions are asked only where it has none of these
    "unlearn": ("mcq", "cloze", "paraphrase"),
    "obsolete": ("mcq",),
    "update": QUESTION_KINDS,
    "retain": ("mcq",),
    "neighbour": ("mcq",),
    "unseen": ("mcq",),
}
GONE_SETS = ("unlearn", "obsolete", "unseen")  # where nothing should be known
ANSWERED_KINDS = ("mcq", "paraphrase", "open")  # asked once more without options
CONTINUED_SETS = ("unlearn", "update", "retain", "neighbour", "unseen")
ANCHORED_SETS = ("retain", "neighbour")  # where a model must stay as it was before
BARE_TEMPLATE = "{question}"  # of the paper, and of clozes


@dataclass(frozen=True)
class EvalSettings:
    """What is measured, on how many rows."""

    sets: list[str] | None = HfArg(default=None, help="Only these sets of the bench.")
    split: str = HfArg(default="test", help="Of the questions: validation to choose by, test to report.")
    parts: list[str] = HfArg(default_factory=lambda: list(PARTS), help="Leave out what you do not need.")
    kinds: list[str] | None = HfArg(default=None, help="Only questions of these kinds.")
    max_questions: int = HfArg(default=200, help="Most questions of each set and kind.")
    max_documents: int = HfArg(default=200, help="Most documents of each set.")
    batch_size: int = HfArg(default=16, help="Documents, or questions with all options, side by side.")
    question_template: str = HfArg(
        default=QUIZ_TEMPLATE, help="Before the options, {subject} replaced; clozes stand bare, as all in the paper."
    )
    header: str | None = HfArg(default=None, help="Put before each document and not counted; {subject} is replaced.")
    max_length: int | None = HfArg(default=None, help="Tokens of a text. Default: the model's.")
    append_eos: bool = HfArg(
        default=True, help="End each text with EOS, which counts in losses and divergences, as when it was trained on."
    )
    new_tokens: int = HfArg(default=64, help="Of a continuation, at most.")
    robustness: list[str] = HfArg(default_factory=lambda: list(ATTACKS), help=f"Attacks, or {NO_ATTACKS}.")
    relearn_steps: int = HfArg(default=60, help="Of the relearning attack.")
    relearn_every: int = HfArg(default=10, help="Steps between two points of its curve.")
    relearn_lr: float = HfArg(default=1e-5, help="Its learning rate; small models need more.")
    relearn_batch_size: int = HfArg(default=8, help="Its documents a step.")
    seed: int = HfArg(default=0, help="Of the rows that are drawn, of relearning and of the bootstrap.")

    def __post_init__(self) -> None:
        if NO_ATTACKS in self.robustness and len(self.robustness) > 1:
            raise ValueError(f"--robustness {NO_ATTACKS} stands alone, got {' '.join(self.robustness)}.")
        known_names = {"sets": SETS, "parts": PARTS, "kinds": ALL_KINDS, "robustness": (*ATTACKS, NO_ATTACKS)}
        for name, known in known_names.items():
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

    @property
    def attacks(self) -> list[str]:
        """Those of ATTACKS that are made."""
        return [name for name in self.robustness if name != NO_ATTACKS]

    @property
    def measured_parts(self) -> list[str]:
        """The parts, without the attacks where there are none."""
        return [part for part in self.parts if part != "robustness" or self.attacks]


class AskedQuestion(NamedTuple):
    """A row of questions, and its options after it."""

    row: dict[str, Any]
    options: list[CountedText]


class ReadDocument(NamedTuple):
    """A row of documents and its tokens; the header does not count."""

    row: dict[str, Any]
    tokens: CountedText


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
    return read_documents(rows, tokenizer, room_of(model, s), s.append_eos)


def read_documents(
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    room: int | None,
    append_eos: bool = False,
) -> list[ReadDocument]:
    """Rows with `text` and `prefix` as tokens, those left out of which no token counts; at most `room` of each.

    append_eos: end each with EOS, once and where there is one, before it is cut: as a surgery reads them.
    """
    eos = tokenizer.eos_token_id
    if not rows:
        return []
    has_prefix = any(row["prefix"] for row in rows)
    if has_prefix and not tokenizer.is_fast:
        raise ValueError(f"a header needs a fast tokenizer, got {type(tokenizer).__name__}: leave the header out.")
    found = tokenizer([row["text"] for row in rows], return_offsets_mapping=has_prefix)
    documents = []
    for place, row in enumerate(rows):
        ids = found["input_ids"][place]
        ids = [*ids, eos] if append_eos and eos is not None and ids[-1:] != [eos] else ids
        ids = ids[:room]
        offsets = found["offset_mapping"][place] if row["prefix"] else []
        start = max(1, tokens_of_prefix(offsets, row["prefix"]))
        if start < len(ids):
            documents.append(ReadDocument(row, CountedText(ids, start, ids[-1] == eos)))
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
    asked = bench.ask(set_name, s.split)
    kind_of_row = np.asarray(asked["kind"])
    wanted = KINDS_OF_SET[set_name] if kinds is None else kinds
    if kinds is None and not set(wanted) & set(kind_of_row.tolist()):
        wanted = ALL_KINDS
    wanted = [kind for kind in wanted if s.kinds is None or kind in s.kinds]
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
        start = len(os.path.commonprefix([prompt, *texts]))
        if start < 1 or any(len(ids) <= start for ids in texts):
            raise ValueError(
                f"question {row['id']!r} cannot be scored: the tokenizer {type(tokenizer).__name__} gives it or an "
                "option no token of its own."
            )
        too_long = 0 if room is None else max(0, max(map(len, texts)) - room)
        cut = min(too_long, start - 1)
        questions.append(AskedQuestion(row, [CountedText(ids[cut:][:room], start - cut) for ids in texts]))
    return questions


def room_of(model: PreTrainedModel, settings: Any) -> int | None:
    """Most tokens of a text: what the model can read or `settings.max_length`, None where neither has a limit."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (window, settings.max_length) if limit is not None]
    return min(limits, default=None)


Columns = Mapping[str, Sequence[Any]]
Key = tuple[str, str]  # metric, set

UPDATED, FORGOTTEN, UNSEEN = "update", "unlearn", "unseen"
ACCURACY_OF_KIND = {"mcq": "accuracy"} | {
    kind: f"accuracy_{kind}" for kind in ("cloze", "paraphrase", "one_hop", "inverse")
}
EDIT_OF_KIND = {
    "mcq": "reliability",
    "paraphrase": "generalisation",
    "one_hop": "portability_one_hop",
    "inverse": "portability_inverse",
}


METRICS_OF_PART: dict[str, dict[str, Callable[[Columns], Any]]] = {
    "texts": {
        "loss": lambda columns: -loss_score(columns["logp"]),
        "probability": lambda columns: probability(columns["logp"]),
        "exact_memorisation": lambda columns: exact_memorisation(without_last(columns, "hit")),
        "extraction_strength": lambda columns: extraction_strength(without_last(columns, "hit")),
    },
    "continuations": {
        "rouge_l": lambda columns: rouge_l(columns["text"], columns["true_text"]).f1,
        "rouge_recall": lambda columns: rouge_l(columns["text"], columns["true_text"]).recall,
        "fluency": lambda columns: ngram_entropy(columns["text"]),
    },
    "divergence": {
        "kl": lambda columns: kl_totals(columns["kl"]),
        "agreement": lambda columns: agreement_totals(columns["agrees"]),
    },
}


class Rows(NamedTuple):
    """values: (N,) numbers of which the mean is taken, or (N, 2) totals and counts of which the ratio of sums is.

    subjects: (N,) whom each row is about.
    """

    values: np.ndarray
    subjects: list[str]


class Curve(NamedTuple):
    """Accuracy while a model relearns. answers: for each of the steps, 1 or 0 of every question."""

    steps: list[int]
    answers: list[Rows]


def without_last(columns: Columns, name: str) -> list[Sequence[Any]]:
    """A column of texts without the last entry, which is the end of text where there is one.

    OpenUnlearning counts the last label in loss and probability and drops it elsewhere, be it an end or not.
    """
    return [row[:-1] if len(row) > 1 else row for row in columns[name]]


def values_of(raw: Mapping[str, Any]) -> tuple[dict[Key, Rows], dict[Key, str]]:
    """Rows of every metric that the measurements allow, and the reason where they hold what no metric accepts."""
    found, refused = {}, {}
    for metric, set_name, subjects, compute in _all_metrics(raw):
        try:
            values = np.asarray(compute(), dtype=np.float64)
        except ValueError as error:
            refused[metric, set_name] = str(error)
            continue
        if len(values) and np.isfinite(values).all():
            found[metric, set_name] = Rows(values, list(subjects))
        elif len(values):
            refused[metric, set_name] = f"{int((~np.isfinite(values)).sum())} of {len(values)} rows are not finite."
    return found, refused


def membership_scores(raw: Mapping[str, Any], set_name: str) -> dict[str, Rows]:
    """Of each text of a set the scores that were measured, by the metric that they lead to; {} without texts."""
    columns = raw.get("texts", {}).get(set_name)
    if not columns:
        return {}
    steep = raw.get("robustness", {}).get("gradients", {}).get(set_name)
    scores = {
        "auc_loss": loss_score(columns["logp"]),
        "auc_zlib": zlib_score(-loss_score(columns["logp"]), columns["text"]),
        "auc_min_k": min_k(without_last(columns, "logp")),
        "auc_min_k_plus_plus": min_k_plus_plus(*(without_last(columns, name) for name in ("logp", "mean", "std"))),
    }
    found = {name: Rows(values, list(columns["subject"])) for name, values in scores.items()}
    if steep and np.isfinite(steep["norm"]).all():
        found["auc_gradient"] = Rows(-np.asarray(steep["norm"], dtype=np.float64), list(steep["subject"]))
    return found


def curves_of(raw: Mapping[str, Any]) -> dict[tuple[str, str], Curve]:
    """Relearning curves by training and by whom was asked about: ("own", "taught"), ..., ("benign", "others")."""
    return {
        (training, who): Curve(
            list(curve["steps"]),
            [Rows(np.asarray(columns["right"], dtype=np.float64), list(columns["subject"])) for columns in points],
        )
        for training, curve in raw.get("robustness", {}).get("relearn", {}).items()
        for who, points in curve.items()
        if who != "steps"
    }


def chance_of(raw: Mapping[str, Any]) -> float | None:
    """Accuracy of guessing on the questions about unlearn, None where there are none."""
    asked = raw.get("questions", {}).get(FORGOTTEN, {}).get("mcq")
    return float(np.mean([1 / len(options) for options in asked["logp"]])) if asked else None


def option_losses(columns: Columns) -> np.ndarray:
    """(Q, O) nats per token; infinity where a question has fewer options, NaN where the model says so."""
    most = max(map(len, columns["logp"]))
    losses = np.full((len(columns["logp"]), most), np.inf)
    for row, (logp, tokens) in enumerate(zip(columns["logp"], columns["tokens"], strict=True)):
        losses[row, : len(logp)] = -np.asarray(logp, dtype=np.float64) / np.asarray(tokens)
    return losses


def right_answers(columns: Columns) -> np.ndarray:
    """(Q,) of `mcq_correct`, NaN for a question of which the model says NaN: that is no answer, and no guess."""
    losses, answers = option_losses(columns), np.asarray(columns["answer"])
    known = ~np.isnan(losses).any(axis=1)
    right = np.full(len(losses), np.nan)
    if known.any():
        right[known] = mcq_correct(losses[known], answers[known])
    return right


def option_probabilities(columns: Columns) -> np.ndarray:
    """(Q,) in [0, 1]: the share of the true option in the sum of the options' probabilities exp(mean log p_i)."""
    logp = -option_losses(columns)
    answers = np.asarray(columns["answer"])
    return np.exp(logp[np.arange(len(logp)), answers] - np.logaddexp.reduce(logp, axis=1))


def truth_ratios(columns: Columns) -> np.ndarray:
    """(Q,) of `truth_ratio`: the wrong options of each question against the true one."""
    losses, answers = option_losses(columns), columns["answer"]
    wrong = [
        np.delete(row, place)[np.isfinite(np.delete(row, place))] for row, place in zip(losses, answers, strict=True)
    ]
    return truth_ratio(-losses[np.arange(len(losses)), np.asarray(answers)], [-row for row in wrong])


STRANGEST = 0.05  # of ordinary text that counts as gibberish too


def gibberish(columns: Columns, ordinary: Sequence[float]) -> np.ndarray:
    """(texts,) 1 for a continuation that is no language, else 0.

    It is less likely, in nats per token under the model before surgery, than all but STRANGEST of the true texts that
    this model never read (`ordinary`), or it repeats itself: its n-gram entropy is below LEAST_FLUENCY of the true
    rest's. One without a word is both.
    """
    most = float(np.quantile(ordinary, 1 - STRANGEST))
    is_strange = [loss is None or loss > most for loss in columns["loss_before"]]
    written, true = (ngram_entropy(columns[key]) for key in ("text", "true_text"))
    return (np.asarray(is_strange) | (written < LEAST_FLUENCY * true)).astype(float)


def near_one(ratios: np.ndarray) -> np.ndarray:
    """min(R, 1/R) of truth ratios, wanted where nothing should be known."""
    return np.minimum(ratios, 1 / np.maximum(ratios, 1e-300))


def _all_metrics(raw: Mapping[str, Any]) -> Iterator[tuple[str, str, Sequence[str], Callable[[], Any]]]:
    """Metric, set, subjects of its rows, and what computes the rows. Empty columns are passed over."""
    for set_name, kinds in raw.get("questions", {}).items():
        for kind, columns in kinds.items():
            if columns and columns["id"]:
                yield from _of_questions(set_name, kind, columns)
    for set_name, kinds in raw.get("answers", {}).items():
        for kind, columns in kinds.items():
            compute = partial(rouge_l, columns["text"], columns["true_text"])
            metric = "answer_recall" if kind != "paraphrase" else "answer_recall_paraphrase"
            yield metric, set_name, columns["subject"], lambda compute=compute: compute().recall
    for part, metrics in METRICS_OF_PART.items():
        for set_name, columns in raw.get(part, {}).items():
            if columns and columns["id"]:
                for metric, compute in metrics.items():
                    yield metric, set_name, columns["subject"], partial(compute, columns)
    written = raw.get("continuations", {})
    ordinary = [loss for loss in written.get(UNSEEN, {}).get("true_loss_before", []) if loss is not None]
    for set_name, columns in written.items() if ordinary else ():
        if columns["id"]:
            yield "gibberish", set_name, columns["subject"], partial(gibberish, columns, ordinary)
    yield from _of_attacks(raw.get("robustness", {}))


def _of_questions(
    set_name: str, kind: str, columns: Columns
) -> Iterator[tuple[str, str, Sequence[str], Callable[[], Any]]]:
    true = partial(_per_token, columns, "answer")
    if kind == OPEN:
        yield "answer_probability", set_name, columns["subject"], lambda: np.exp(true())
        return
    yield ACCURACY_OF_KIND[kind], set_name, columns["subject"], lambda: right_answers(columns)
    if kind == "mcq":
        yield "option_probability", set_name, columns["subject"], lambda: option_probabilities(columns)
        is_gone = set_name in GONE_SETS
        measure = near_one if is_gone else lambda ratios: np.maximum(0.0, 1 - ratios)
        yield "truth_ratio", set_name, columns["subject"], lambda: measure(truth_ratios(columns))
    if set_name != UPDATED:
        return
    changed = [row for row, old in enumerate(columns["old_answer"]) if old is not None]
    asked = _rows(columns, changed) if changed else columns
    if kind in EDIT_OF_KIND:
        hits, tokens = (_at(asked[name], asked["answer"]) for name in ("hits", "tokens"))
        yield EDIT_OF_KIND[kind], set_name, asked["subject"], lambda: token_accuracy(hits, tokens)
    if kind == "mcq" and changed:
        old, new = (_per_token(asked, name) for name in ("old_answer", "answer"))
        yield "conflict", set_name, asked["subject"], lambda: conflict_score(old, new)


def _of_attacks(attacks: Mapping[str, Any]) -> Iterator[tuple[str, str, Sequence[str], Callable[[], Any]]]:
    answers = [
        (f"relearn_{training}" if training == "benign" else f"relearn_{training}_{who}", FORGOTTEN, points[-1])
        for training, curve in attacks.get("relearn", {}).items()
        for who, points in curve.items()
        if who != "steps"
    ]
    answers += [
        (f"accuracy_{bits.replace('-', '')}", set_name, columns)
        for bits, of_sets in attacks.get("quantise", {}).items()
        for set_name, columns in of_sets.items()
    ]
    answers += [("accuracy_old_routes", name, columns) for name, columns in attacks.get("routes", {}).items()]
    answers += [(f"prefix_{name}", FORGOTTEN, columns) for name, columns in attacks.get("prefix", {}).items()]
    for metric, set_name, columns in answers:
        yield metric, set_name, columns["subject"], lambda columns=columns: columns["right"]


def _rows(columns: Columns, places: Sequence[int]) -> dict[str, list[Any]]:
    return {name: [column[place] for place in places] for name, column in columns.items()}


def _at(column: Sequence[Sequence[Any]], options: Sequence[int]) -> list[Any]:
    """Of each question the entry of one option."""
    return [entries[option] for entries, option in zip(column, options, strict=True)]


def _per_token(columns: Columns, option: str) -> np.ndarray:
    """Mean log-probability of the tokens of an option, such as "answer"."""
    logp, tokens = (_at(columns[name], columns[option]) for name in ("logp", "tokens"))
    return np.asarray(logp, dtype=np.float64) / np.asarray(tokens)


ALL_SETS = "all"  # the set of a number that is made of several


MOST_LOST = 0.03  # of accuracy on what was to be kept
MOST_KL = 0.1  # nats per token from the model before, on what was to be kept
MOST_GIBBERISH = 0.5  # of what it writes
OFF_TARGET = 0.1  # what may be left of the way from the loss of text not read to that of text known
OF_TEXTS = "exact_memorisation"
# the first that was measured is judged
JUDGED = ("accuracy", "accuracy_cloze", "accuracy_paraphrase", "answer_probability", OF_TEXTS)


def verdict_of(measures: Sequence[Mapping[str, Any]], raws: Mapping[str, Mapping[str, Any]]) -> str:
    """One line on the model after surgery: what is wrong with it, the worst first.

    What is judged by an interval is called wrong where the whole interval says so, and undecided where it reaches over
    the limit, or where there is nothing to compare with.
    """
    if "after" not in raws:
        return "no model after surgery was measured: nothing is judged"
    rows = {(row["side"], row["set"], row["metric"]): row for row in measures if row["value"] is not None}
    found = [*_ruined(rows, raws["after"]), *_not_forgotten(rows), *_not_learnt(rows), *_lost(rows)]
    if found:
        return "; ".join(sorted(found, key=lambda line: line.startswith("undecided")))
    judged = {name for side, name, _ in rows if side == "after"} & {FORGOTTEN, UPDATED, *ANCHORED_SETS}
    return (
        f"as it should be on {', '.join(name for name in SETS if name in judged)}" if judged else "nothing was judged"
    )


Found = Mapping[tuple[str, str, str], Mapping[str, Any]]


def _ruined(rows: Found, raw: Mapping[str, Any]) -> Iterator[str]:
    for name, columns in raw.get("texts", {}).items():
        guess, row = columns.get("guess"), rows.get(("after", name, "loss"))
        before = rows.get(("before", name, "loss"))
        if guess and row and row["value"] > guess[0] and not (before and before["value"] > guess[0]):
            yield f"RUINED: the loss of {name} is {row['value']:.3g} nats, beyond {guess[0]:.3g} of knowing nothing"
    for name, columns in raw.get("continuations", {}).items():
        written, true = (float(ngram_entropy(columns[key]).mean()) for key in ("text", "true_text"))
        if written < LEAST_FLUENCY * true:
            yield f"INCOHERENT: what it writes on {name} has {written / true:.0%} of the entropy of the true texts"
    for name in raw.get("continuations", {}):
        row = rows.get(("after", name, "gibberish"))
        if row and row["low"] is not None and row["low"] > MOST_GIBBERISH:
            yield f"INCOHERENT: {row['value']:.0%} of what it writes on {name} is no language to the model before"


def _not_forgotten(rows: Found) -> Iterator[str]:
    metric = next((metric for metric in JUDGED if ("after", FORGOTTEN, metric) in rows), None)
    ours = rows.get(("after", FORGOTTEN, metric))
    # the new texts were not read either before they were learnt
    unread = [("retrained", FORGOTTEN), ("after", UNSEEN), *([("before", UPDATED)] if metric == OF_TEXTS else [])]
    goal = next((rows[*key, metric] for key in unread if (*key, metric) in rows), None)
    if ours is not None and goal is None:
        yield f"undecided: nothing says what {metric} is without having read unlearn (unseen text, a retrained model)"
    elif ours is not None:
        told = f"{metric} on unlearn is {ours['value']:.3f}, of a model that never read it {goal['value']:.3f}"
        if None in (ours["low"], goal["high"]):
            yield f"undecided: {told}, of too few subjects for an interval"
        elif ours["low"] > goal["high"]:
            yield f"NOT FORGOTTEN: {told}"
        elif ours["high"] < goal["low"]:
            yield f"OVER-FORGOTTEN: {told}"
    gap = rows.get(("after", FORGOTTEN, "loss_gap"))
    if gap is not None and gap["low"] is not None and (gap["low"] > 0 or gap["high"] < 0):
        word = "OVER-FORGOTTEN" if gap["low"] > 0 else "NOT FORGOTTEN"
        yield f"{word}: the loss on unlearn lies {gap['value']:+.3f} nats from that on unseen texts"


def _not_learnt(rows: Found) -> Iterator[str]:
    """Losses of the new texts lie between that before, of text not read, and that of the old versions, text known."""
    ours, start = (rows.get((side, UPDATED, "loss")) for side in ("after", "before"))
    known = rows.get(("before", "obsolete", "loss")) or rows.get(("before", FORGOTTEN, "loss"))
    if ours is None or start is None or known is None or start["value"] <= known["value"]:
        return
    most = known["value"] + OFF_TARGET * (start["value"] - known["value"])
    told = f"the loss of update is {ours['value']:.3g} nats (before {start['value']:.3g}, known {known['value']:.3g})"
    if ours["value"] > most:
        yield f"NOT LEARNT: {told}" if ours["low"] is not None and ours["low"] > most else f"undecided: {told}"


def _lost(rows: Found) -> Iterator[str]:
    for name in ANCHORED_SETS:
        kl = rows.get(("after", name, "kl"))
        if kl is not None and kl["value"] > MOST_KL:
            told = f"the KL on {name} is {kl['value']:.3g} nats"
            yield f"DAMAGED: {told}" if kl["low"] is not None and kl["low"] > MOST_KL else f"undecided: {told}"
        for metric in JUDGED:
            ours, before = (rows.get((side, name, metric)) for side in ("after", "before"))
            if ours is None or before is None:
                continue
            told = f"{metric} on {name} went from {before['value']:.3f} to {ours['value']:.3f}"
            is_lower = before["value"] - ours["value"] > MOST_LOST
            if is_lower:
                is_sure = ours["high"] is not None and ours["high"] < before["value"] - MOST_LOST
                yield f"DAMAGED: {told}" if is_sure else f"undecided: {told}"
            break
