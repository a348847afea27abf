"""What each metric of a surgery evaluation is: its name in the files, its label, its formula, its source.

Written once for the table in the terminal, the page and docs/surgery_eval.md, whose rows a test compares with these.
Letters: n tokens of a text that count, p_i the model's probability of token i given those before it; members are the
texts of unlearn, the others those of unseen. Source: ours; each metric names its own.
"""

from __future__ import annotations

from typing import NamedTuple

from hf_moe_cpt.analysis.surgery_score import PART_FORMULAS
from hf_moe_cpt.scripts.eval_surgery_robustness import BITS, PREFIXES


class Metric(NamedTuple):
    """label: at most LABEL_WIDTH characters. goal: what one wants to see of the model after surgery."""

    name: str
    label: str
    formula: str
    source: str
    goal: str


LABEL_WIDTH = 30
OURS = "ours"
PAPER, EASY_EDIT, OPEN_UNLEARNING = (
    "LLM Surgery, arXiv 2409.13054",
    "EasyEdit, arXiv 2308.07269",
    "OpenUnlearning, arXiv 2506.12618",
)
MUSE, TOFU = "MUSE, arXiv 2407.06460", "TOFU, arXiv 2401.06121"
RELEARNING, QUANTISATION = "arXiv 2406.13356", "arXiv 2410.16454"
AS_RETRAINED, HIGH, LOW = "as retrained", "high", "low"
KNOWN = "as retrained on what is forgotten, high elsewhere"

_MCQ = "share of questions whose true option has the lowest perplexity exp(-mean log p_i); options that tie share"
_HITS = "share of the true option's tokens that are the most likely ones, after the question and the tokens before"
_CHANGED = "about changed facts if the questions tell which they are"
_AUC = "membership inference, P(score of a member > score of another) + P(equal) / 2; score:"

QUESTION_METRICS = (
    Metric("accuracy", "MCQ accuracy", _MCQ, PAPER, KNOWN),
    Metric(
        "accuracy_cloze", "accuracy, clozes", "MCQ accuracy in completing the beginning of a statement", PAPER, KNOWN
    ),
    Metric(
        "accuracy_paraphrase",
        "accuracy, paraphrases",
        "MCQ accuracy on the same questions in roundabout words",
        PAPER,
        KNOWN,
    ),
    Metric(
        "accuracy_one_hop", "accuracy, one hop", "MCQ accuracy on questions about a fact of the answer", PAPER, HIGH
    ),
    Metric(
        "accuracy_inverse", "accuracy, inverse", "MCQ accuracy on questions from the fact to its subject", PAPER, HIGH
    ),
    Metric("reliability", "reliability", f"{_HITS}; mean over questions {_CHANGED}", EASY_EDIT, HIGH),
    Metric("generalisation", "generalisation", f"reliability on paraphrases {_CHANGED}", EASY_EDIT, HIGH),
    Metric(
        "portability_one_hop", "portability, one hop", f"reliability one fact further, {_CHANGED}", EASY_EDIT, HIGH
    ),
    Metric("portability_inverse", "portability, inverse", "reliability from the fact to its subject", EASY_EDIT, HIGH),
    Metric(
        "conflict",
        "conflict score",
        "P(old) / (P(old) + P(new)), P per token, mean over questions about changed facts",
        OURS,
        LOW,
    ),
)
TEXT_METRICS = (
    Metric(
        "loss", "loss, nats per token", "-mean log p_i of a text, mean over texts", PAPER, "as unseen, not above it"
    ),
    Metric("probability", "probability", "exp(mean log p_i) of a text, mean over texts", TOFU, AS_RETRAINED),
    Metric(
        "exact_memorisation",
        "exact memorisation",
        "share of tokens that are the most likely ones after the true beginning, mean over texts",
        "arXiv 2205.10770",
        AS_RETRAINED,
    ),
    Metric(
        "extraction_strength",
        "extraction strength",
        "1 - k/n, k the shortest prefix after which every most likely token is the true one; mean over texts",
        "arXiv 2012.07805",
        AS_RETRAINED,
    ),
    Metric(
        "loss_gap",
        "loss above unseen",
        "loss on unlearn - loss on unseen, of the same model",
        OURS,
        "0; above is over-forgotten",
    ),
)
CONTINUATION_METRICS = (
    Metric(
        "rouge_l",
        "ROUGE-L",
        "F1 of the longest common subsequence of words, the model's second half against the true one",
        MUSE,
        AS_RETRAINED,
    ),
    Metric(
        "fluency",
        "fluency, bits",
        "(2/3 H_2 + 4/3 H_3) / 2, H_n entropy in bits of the n-grams of what the model writes, mean over texts",
        EASY_EDIT,
        "as before; falls with repetition",
    ),
)
MEMBERSHIP_METRICS = (
    Metric("auc_loss", "AUC, loss", f"{_AUC} mean log p_i", "arXiv 1709.01604", "as retrained, or 0.5"),
    Metric(
        "auc_zlib",
        "AUC, zlib",
        f"{_AUC} sum log p_i / zlib bytes",
        "arXiv 2012.07805",
        "as retrained, or 0.5",
    ),
    Metric(
        "auc_min_k",
        "AUC, min-k",
        f"{_AUC} mean of the lowest 40 % of log p_i",
        "arXiv 2310.16789",
        "as retrained, or 0.5",
    ),
    Metric(
        "auc_min_k_plus_plus",
        "AUC, min-k++",
        f"{_AUC} the same of (log p_i - mean) / std over the vocabulary",
        "arXiv 2404.02936",
        "as retrained, or 0.5",
    ),
    Metric(
        "privacy_leakage",
        "privacy leakage, %",
        "100 ((1 - AUC) - (1 - AUC retrained)) / (1 - AUC retrained), min-k",
        MUSE,
        "0; below: still known, above: over-forgotten",
    ),
)
DIVERGENCE_METRICS = (
    Metric("kl", "KL(before || now), nats", "sum_v q(v) log(q(v) / p(v)), q before, mean over tokens", OURS, LOW),
    Metric(
        "agreement",
        "top-1 agreement",
        "share of tokens at which the first choices before and now are the same: locality",
        f"{EASY_EDIT}; neighbours: RWKU, arXiv 2406.10890",
        HIGH,
    ),
)
ROBUSTNESS_METRICS = (
    Metric(
        "relearn_own_taught",
        "relearnt own, taught",
        "MCQ accuracy after training on the documents of half of the subjects, about these",
        RELEARNING,
        AS_RETRAINED,
    ),
    Metric("relearn_own_others", "relearnt own, others", "the same, about the other half", RELEARNING, AS_RETRAINED),
    Metric(
        "relearn_benign",
        "relearnt benign",
        "MCQ accuracy after training on documents of neighbours, or retain",
        RELEARNING,
        AS_RETRAINED,
    ),
    Metric(
        "relearn_half_steps",
        "steps to half relearnt",
        "steps on own documents until the accuracy of the taught is halfway from chance to that before surgery",
        OURS,
        AS_RETRAINED,
    ),
    Metric(
        "relearn_robustness",
        "R, relearning",
        "min(gain of accuracy of the retrained / of this model by relearning own documents, 1), taught",
        OPEN_UNLEARNING,
        HIGH,
    ),
    *(
        Metric(
            f"accuracy_{bits}bit",
            f"MCQ accuracy, {bits}-bit",
            f"with weights rounded to {bits} bits",
            QUANTISATION,
            KNOWN,
        )
        for bits in BITS
    ),
    *(
        Metric(
            f"quantisation_robustness_{bits}bit",
            f"Q, {bits}-bit",
            f"1 - |a - b| / (a + b), a and b the MCQ accuracy on unlearn before and after rounding to {bits} bits",
            f"{OPEN_UNLEARNING}; symmetric as in arXiv 2605.24614",
            HIGH,
        )
        for bits in BITS
    ),
    *(
        Metric(f"prefix_{name}", f"asked as: {name}", f"MCQ accuracy, asked as {layout!r}", OURS, AS_RETRAINED)
        for name, layout in PREFIXES.items()
    ),
)
SCORE_METRICS = (
    Metric("score", "score", "harmonic mean of the parts that were measured, in [0, 1]", OURS, HIGH),
    *(Metric(f"score_{part}", f"- {part}", formula, OURS, HIGH) for part, formula in PART_FORMULAS.items()),
)
METRICS = {
    metric.name: metric
    for metrics in (
        QUESTION_METRICS,
        TEXT_METRICS,
        CONTINUATION_METRICS,
        MEMBERSHIP_METRICS,
        DIVERGENCE_METRICS,
        ROBUSTNESS_METRICS,
        SCORE_METRICS,
    )
    for metric in metrics
}
