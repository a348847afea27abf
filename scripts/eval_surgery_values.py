"""From the raw measurements of one model to a number for each question and text, by metric and set.

Rows keep the name of their subject, because questions about one subject are not independent: intervals are drawn from
subjects. The metrics are those of hf_moe_cpt.analysis, a file for each family. Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hf_moe_cpt.analysis.continuation_overlap import ngram_entropy, rouge_l
from hf_moe_cpt.analysis.editing import conflict_score, token_accuracy
from hf_moe_cpt.analysis.membership import loss_score, min_k, min_k_plus_plus, zlib_score
from hf_moe_cpt.analysis.memorisation import exact_memorisation, extraction_strength, probability
from hf_moe_cpt.analysis.multiple_choice import mcq_correct
from hf_moe_cpt.analysis.retained_behaviour import agreement_totals, kl_totals


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
    """Of each text of a set the four scores, by the metric that they lead to; {} without texts.

    zlib takes the text as it is, also where the model read only its beginning.
    """
    columns = raw.get("texts", {}).get(set_name)
    if not columns:
        return {}
    nll = [-float(np.sum(logp, dtype=np.float64)) for logp in columns["logp"]]
    scores = {
        "auc_loss": loss_score(columns["logp"]),
        "auc_zlib": zlib_score(nll, columns["text"]),
        "auc_min_k": min_k(columns["logp"]),
        "auc_min_k_plus_plus": min_k_plus_plus(columns["logp"], columns["mean"], columns["std"]),
    }
    return {name: Rows(values, list(columns["subject"])) for name, values in scores.items()}


def curves_of(raw: Mapping[str, Any]) -> dict[tuple[str, str], Curve]:
    """Relearning curves by training and by whom was asked about: ("own", "taught"), ..., ("benign", "others")."""
    return {
        (training, who): Curve(list(curve["steps"]), [_answers(columns) for columns in points])
        for training, curve in raw.get("robustness", {}).get("relearn", {}).items()
        for who, points in curve.items()
        if who != "steps"
    }


def chance_of(raw: Mapping[str, Any]) -> float | None:
    """Accuracy of guessing on the questions about unlearn, None where there are none."""
    asked = raw.get("questions", {}).get(FORGOTTEN, {}).get("mcq")
    return float(np.mean([1 / len(options) for options in asked["logp"]])) if asked else None


def option_losses(columns: Columns) -> np.ndarray:
    """(questions, options) nats per token; infinity where a question has fewer options, or the model said NaN."""
    most = max(map(len, columns["logp"]))
    losses = np.full((len(columns["logp"]), most), np.inf)
    for row, (logp, tokens) in enumerate(zip(columns["logp"], columns["tokens"], strict=True)):
        losses[row, : len(logp)] = -np.asarray(logp, dtype=np.float64) / np.asarray(tokens)
    return np.where(np.isnan(losses), np.inf, losses)


def _all_metrics(raw: Mapping[str, Any]) -> Iterator[tuple[str, str, Sequence[str], Callable[[], Any]]]:
    """Metric, set, subjects of its rows, and what computes the rows. Empty columns are passed over."""
    for set_name, kinds in raw.get("questions", {}).items():
        for kind, columns in kinds.items():
            if columns and columns["id"]:
                yield from _of_questions(set_name, kind, columns)
    for part, metrics in (
        ("texts", _of_texts),
        ("continuations", _of_continuations),
        ("divergence", _of_divergence),
    ):
        for set_name, columns in raw.get(part, {}).items():
            if columns and columns["id"]:
                for metric, compute in metrics(columns).items():
                    yield metric, set_name, columns["subject"], compute
    yield from _of_attacks(raw.get("robustness", {}))


def _of_questions(
    set_name: str, kind: str, columns: Columns
) -> Iterator[tuple[str, str, Sequence[str], Callable[[], Any]]]:
    yield (
        ACCURACY_OF_KIND[kind],
        set_name,
        columns["subject"],
        lambda: mcq_correct(option_losses(columns), columns["answer"]),
    )
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


def _of_texts(columns: Columns) -> dict[str, Callable[[], Any]]:
    return {
        "loss": lambda: -loss_score(columns["logp"]),
        "probability": lambda: probability(columns["logp"]),
        "exact_memorisation": lambda: exact_memorisation(columns["hit"]),
        "extraction_strength": lambda: extraction_strength(columns["hit"]),
    }


def _of_continuations(columns: Columns) -> dict[str, Callable[[], Any]]:
    return {
        "rouge_l": lambda: rouge_l(columns["text"], columns["true_text"]).f1,
        "fluency": lambda: ngram_entropy(columns["text"]),
    }


def _of_divergence(columns: Columns) -> dict[str, Callable[[], Any]]:
    return {"kl": lambda: kl_totals(columns["kl"]), "agreement": lambda: agreement_totals(columns["agrees"])}


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
    answers += [(f"prefix_{name}", FORGOTTEN, columns) for name, columns in attacks.get("prefix", {}).items()]
    for metric, set_name, columns in answers:
        yield metric, set_name, columns["subject"], lambda columns=columns: columns["right"]


def _answers(columns: Columns) -> Rows:
    return Rows(np.asarray(columns["right"], dtype=np.float64), list(columns["subject"]))


def _rows(columns: Columns, places: Sequence[int]) -> dict[str, list[Any]]:
    return {name: [column[place] for place in places] for name, column in columns.items()}


def _at(column: Sequence[Sequence[Any]], options: Sequence[int]) -> list[Any]:
    """Of each question the entry of one option."""
    return [entries[option] for entries, option in zip(column, options, strict=True)]


def _per_token(columns: Columns, option: str) -> np.ndarray:
    """Mean log-probability of the tokens of an option, such as "answer"."""
    logp, tokens = (_at(columns[name], columns[option]) for name in ("logp", "tokens"))
    return np.asarray(logp, dtype=np.float64) / np.asarray(tokens)
