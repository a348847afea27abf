"""Numbers about texts, questions and whole surgeries, as pure functions of a model's log-probabilities.

A text is a row with an entry for each token that counts, teacher-forced: the true beginning is always given. Its
columns are `logps` in nats, `hits`, whether the true token is the most likely one, `kl`, KL(before || now) over the
vocabulary in nats, and `agrees`, whether both models have the same first choice. Letters: Q questions, O options.

Sources. Membership, whose scores are higher for likelier members: loss Yeom et al. 2018 (arXiv 1709.01604), zlib
Carlini et al. 2021 (2012.07805), min-k Shi et al. 2023 (2310.16789), min-k++ Zhang et al. 2024 (2404.02936), privacy
leakage MUSE (2407.06460), all with the settings of OpenUnlearning (2506.12618). Memorisation: exact, Tirumala et al.
2022 (2205.10770); extraction strength, Carlini et al. 2021 as OpenUnlearning's code has it. Multiple choice by
perplexity: LLM Surgery (2409.13054), options one by one without letters; that ties share the point is ours. Token
accuracy (called reliability, generalisation or portability by the question that is asked) and locality: EasyEdit
(2308.07269); neighbours: RWKU (2406.10890). ROUGE-L: Lin 2004 with the words of the package rouge_score without
stemming, the bit-parallel LCS Hyyrö 2004; n-gram entropy, low where a text repeats itself: Zhang et al. 2018
(1809.05972) with the weights of ROME (2202.05262) and EasyEdit, whose two terms are averaged. R and Q:
OpenUnlearning's, Q in the symmetric form of the Unlearning Depth Score (2605.24614), which punishes a value that falls
as one that rises. Conflict score, steps of relearning and the score of a surgery: ours.
"""

import math
import re
import zlib
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from fractions import Fraction
from statistics import harmonic_mean
from typing import NamedTuple

import numpy as np

from hf_moe_cpt.evaluation.statistics import (
    Column,
    TokenRows,
    read_column,
    read_numbers,
    read_strings,
    read_token_rows,
)


LEAST_SHARE = 0.4  # of the tokens, the least likely ones
_LEAST_SPREAD = 1e-3


def loss_score(logps: TokenRows) -> np.ndarray:
    """(texts,): mean log-probability of the tokens, in nats."""
    return np.array([row.mean() for row in read_token_rows("logps", logps, infinite=True)])


def zlib_score(mean_nll: Column, texts: Sequence[str]) -> np.ndarray:
    """(texts,): - mean_nll / bytes of the text after zlib: Carlini et al.'s log-perplexity over zlib's entropy.

    mean_nll: (texts,) negative log-probability of the text in nats per token, at least 0. texts: what was scored.
    """
    losses = read_column("mean_nll", mean_nll, infinite=True)
    if losses.min() < -1e-3:
        raise ValueError(f"mean_nll holds {losses.min():g}: a negative log-probability is at least 0.")
    read = read_strings("texts", texts, num_rows=len(losses))
    return -losses / np.array([len(zlib.compress(text.encode("utf-8"))) for text in read])


def min_k(logps: TokenRows, k: float = LEAST_SHARE) -> np.ndarray:
    """(texts,): mean of the floor(k n) lowest log-probabilities of n tokens, at least one, in nats. k in (0, 1]."""
    return _mean_of_lowest(read_token_rows("logps", logps, infinite=True), k)


def min_k_plus_plus(logps: TokenRows, mean: TokenRows, std: TokenRows, k: float = LEAST_SHARE) -> np.ndarray:
    """(texts,): as `min_k`, of (logp - mean) / std.

    mean, std: of log p(v) over the vocabulary at each token, v drawn from the model's p; a std below 1e-3 counts as
    1e-3.
    """
    rows = read_token_rows("logps", logps, infinite=True)
    means, stds = (read_token_rows(name, part, like=rows) for name, part in (("mean", mean), ("std", std)))
    lowest = min(row.min() for row in stds)
    if lowest < 0:
        raise ValueError(f"std holds {lowest:g}: a standard deviation is at least 0.")
    scores = [
        (row - center) / np.maximum(spread, _LEAST_SPREAD)
        for row, center, spread in zip(rows, means, stds, strict=True)
    ]
    return _mean_of_lowest(scores, k)


def auc(members: Column, others: Column) -> float:
    """P(score of a member > score of another text) + P(equal) / 2 over all pairs, in [0, 1].

    members, others: (N,) and (M,) scores, higher for members. Equals Mann-Whitney's U / (N M).
    """
    inside, outside = (
        read_column(name, values, infinite=True) for name, values in (("members", members), ("others", others))
    )
    outside = np.sort(outside)
    below, not_above = (np.searchsorted(outside, inside, side=side) for side in ("left", "right"))
    return float((below + not_above).sum() / (2 * len(inside) * len(outside)))


def privacy_leakage(auc: float, auc_retrained: float) -> float:
    """100 ((1 - AUC) - (1 - AUC_r)) / (1 - AUC_r) percent, AUC_r of a model that was trained without the texts.

    0: as private as that model; below 0: the texts still look like members; above 0: over-forgotten. NaN where
    AUC_r = 1, which leaves nothing to compare with. Without such a model 1/2 is the value to take for AUC_r.
    """
    for name, value in (("auc", auc), ("auc_retrained", auc_retrained)):
        _check_auc(name, value)
    return math.nan if auc_retrained == 1 else 100 * (auc_retrained - auc) / (1 - auc_retrained)


def is_over_forgotten(auc: float) -> bool:
    """Whether the AUC lies below 1/2: the texts look less like members than texts that were never seen.

    Give the upper end of the AUC's interval to flag only what cannot be chance.
    """
    _check_auc("auc", auc)
    return auc < 0.5


def _check_auc(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must lie in [0, 1]: give the area under the curve, not percent.")


def _mean_of_lowest(rows: Sequence[np.ndarray], k: float) -> np.ndarray:
    if not 0 < k <= 1:
        raise ValueError(f"k={k} must lie in (0, 1]: it is the share of the tokens that are averaged, such as 0.4.")
    return np.array([np.sort(row)[: max(1, math.floor(k * len(row) + 1e-9))].mean() for row in rows])


def truth_ratio(true_logp: Column, wrong_logps: Sequence[Column]) -> np.ndarray:
    """(questions,), at least 0: geometric mean of the wrong answers' probabilities over that of the true one.

    true_logp: (Q,) mean log-probability of the true answer's tokens in nats. wrong_logps: Q rows, one of each wrong
    answer. 1: the model does not prefer the truth. Source: TOFU, 2401.06121, which words true answers anew.
    """
    true = read_column("true_logp", true_logp)
    wrong = [np.mean(read_column("wrong_logps", row)) for row in wrong_logps]
    return np.exp(np.array(wrong) - true)


def ks_pvalue(first: Column, second: Column) -> float:
    """Two-sided p of the two-sample test of Kolmogorov and Smirnov, exact: both (N,) and (M,) of one distribution.

    The share of all ways to merge both samples in which their distribution functions come as far apart.
    """
    ours, theirs = (np.sort(read_column(name, values)) for name, values in (("first", first), ("second", second)))
    n, m, both = len(ours), len(theirs), np.concatenate([ours, theirs])
    below = [np.searchsorted(sample, both, side="right") for sample in (ours, theirs)]
    widest = int(np.abs(below[0] * m - below[1] * n).max())  # the distance times n m, exact in integers
    if not widest:
        return 1.0
    ways = [int(j * n < widest) for j in range(m + 1)]  # of merging the first i and j that stay nearer than that
    for j in range(1, m + 1):
        ways[j] = ways[j] and ways[j - 1]
    for i in range(1, n + 1):
        ways[0] = int(i * m < widest)
        for j in range(1, m + 1):
            ways[j] = ways[j] + ways[j - 1] if abs(i * m - j * n) < widest else 0
    return float(1 - Fraction(ways[m], math.comb(n + m, n)))


def exact_memorisation(hits: TokenRows) -> np.ndarray:
    """(texts,): share of the tokens that are the model's first choice."""
    return np.array([row.mean() for row in read_token_rows("hits", hits, binary=True)])


def extraction_strength(hits: TokenRows) -> np.ndarray:
    """(texts,): 1 - k / n, n the tokens and k the shortest beginning after which every first choice is right.

    1: all of it comes out. k is at most n - 1, as in OpenUnlearning's code: 1 / n where not even the last token does.
    """
    rows = read_token_rows("hits", hits, binary=True)
    lost = [np.flatnonzero(row == 0) for row in rows]  # the last of these ends the shortest beginning
    begins = [min(miss[-1] + 1, len(row) - 1) if len(miss) else 0 for row, miss in zip(rows, lost, strict=True)]
    return np.array([1 - begin / len(row) for row, begin in zip(rows, begins, strict=True)])


def probability(logps: TokenRows) -> np.ndarray:
    """(texts,): exp(mean log-probability), the geometric mean of the tokens' probabilities, 1 / perplexity.

    logps: nats, at most 0; minus infinity for a token of probability 0.
    """
    rows = read_token_rows("logps", logps, infinite=True)
    highest = max(row.max() for row in rows)
    if highest > 1e-3:  # rounding of half precision
        raise ValueError(f"logps holds {highest:g}: a log-probability is at most 0; give log p, not the loss.")
    return np.exp([min(row.mean(), 0.0) for row in rows])


def mcq_correct(option_losses: Sequence[Column] | np.ndarray, answers: Column) -> np.ndarray:
    """(Q,) in [0, 1]: 1 if the true option has the lowest loss, 1 / number of the lowest if several tie, else 0.

    option_losses: (Q, O) nats per token, O at least 2. A question with fewer options than others is filled up with
    infinity. answers: (Q,) place of the true option, an integer in [0, O).
    """
    losses = read_numbers("option_losses", option_losses, infinite=True)
    if losses.ndim != 2 or losses.shape[0] == 0 or losses.shape[1] < 2:
        raise ValueError(f"option_losses must be (questions, options) with two options or more, got {losses.shape}.")
    places = read_column("answers", answers, num_rows=len(losses))
    wrong = (places != np.floor(places)) | (places < 0) | (places >= losses.shape[1])
    if wrong.any():
        raise ValueError(
            f"answers holds {places[wrong][0]:g} at question {int(np.argmax(wrong))}: the place of the true option is "
            f"an integer from 0 to {losses.shape[1] - 1}."
        )
    best = losses == losses.min(axis=1, keepdims=True)
    return best[np.arange(len(losses)), places.astype(int)] / best.sum(axis=1)


def token_accuracy(hits: TokenRows | Column, tokens: Column | None = None) -> np.ndarray:
    """(questions,) in [0, 1]: share of the true answer's tokens that are the model's first choice, teacher-forced.

    hits: for each question a row of 0 and 1, one for each token of its answer. With `tokens` (questions,), the tokens
    of each answer, hits is (questions,) too: how many of them were hit.
    """
    if tokens is None:
        return np.array([row.mean() for row in read_token_rows("hits", hits, binary=True)])
    lengths = read_column("tokens", tokens)
    counts = read_column("hits", hits, num_rows=len(lengths))
    if lengths.min() < 1:
        raise ValueError(f"tokens holds {lengths.min():g}: an answer has at least 1 token.")
    wrong = (counts < 0) | (counts > lengths)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ValueError(f"hits holds {counts[row]:g} at question {row}, whose answer has {lengths[row]:g} tokens.")
    return counts / lengths


def conflict_score(old_logp: Column, new_logp: Column) -> np.ndarray:
    """(questions,) in [0, 1]: P(old) / (P(old) + P(new)): 1/2 where both are as likely, 0 where the new answer won.

    old_logp, new_logp: (questions,) log-probabilities in nats of the answers from before and after the change; per
    token, so that the shorter answer has no advantage, or summed. Exact for probabilities that underflow.
    """
    old = read_column("old_logp", old_logp)
    new = read_column("new_logp", new_logp, num_rows=len(old))
    return np.exp(old - np.logaddexp(old, new))


ENTROPY_WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # by length of the n-grams
LEAST_FLUENCY = 0.5  # `ngram_entropy` of what a model writes over that of the true texts; below it is incoherent
_ROUGE_WORD = re.compile(r"[a-z0-9]+")
_WORD_OR_SIGN = re.compile(r"\w+|[^\w\s]")


class RougeL(NamedTuple):
    """(texts,) each, in [0, 1]: LCS over the prediction's words, over the reference's words, their harmonic mean."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> RougeL:
    """ROUGE-L of each prediction against the reference in the same place; 0 where either has no word.

    Words are runs of a-z and 0-9 after lower-casing: text in other scripts has none.
    """
    written = read_strings("predictions", predictions)
    true = read_strings("references", references, num_rows=len(written))
    columns = np.zeros((3, len(written)))
    for row, pair in enumerate(zip(written, true, strict=True)):
        words, true_words = (_ROUGE_WORD.findall(text.lower()) for text in pair)
        common = lcs_length(words, true_words)
        if common:
            lengths = len(words), len(true_words)
            columns[:, row] = common / lengths[0], common / lengths[1], 2 * common / sum(lengths)
    return RougeL(*columns)


def lcs_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence.

    A bit of `unmatched` for each place of `first`; an element of `second` moves all at once, by the carry of a sum.
    """
    places: dict[Hashable, int] = {}
    for place, element in enumerate(first):
        places[element] = places.get(element, 0) | 1 << place
    full = (1 << len(first)) - 1
    unmatched = full
    for element in second:
        here = unmatched & places.get(element, 0)
        unmatched = ((unmatched + here) | (unmatched - here)) & full
    return len(first) - unmatched.bit_count()


def ngram_entropy(texts: Sequence[str]) -> np.ndarray:
    """(texts,) in bits: (2/3 H_2 + 4/3 H_3) / 2, H_n the entropy of the text's n-grams of words and signs.

    0 where a text has no n-gram; at most about log2 of the number of words, so compare texts of one length. EasyEdit
    cuts words with nltk, which splits contractions otherwise.
    """
    read = [_WORD_OR_SIGN.findall(text) for text in read_strings("texts", texts)]
    terms = [[weight * _entropy(words, n) for words in read] for n, weight in ENTROPY_WEIGHTS.items()]
    return np.mean(terms, axis=0)


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    if not counts:
        return 0.0
    share = np.array(list(counts.values())) / counts.total()
    return float(-(share * np.log2(share)).sum()) + 0.0  # not -0


_ROUNDING = 1e-3  # nats below 0 that half precision may leave


def kl_totals(kl: TokenRows) -> np.ndarray:
    """(texts, 2): sum of the KL over each text's tokens, and their number.

    For a mean over all tokens instead of over texts: `bootstrap_interval(..., statistic=ratio_of_sums)`.
    """
    rows = read_token_rows("kl", kl)
    lowest = min(row.min() for row in rows)
    if lowest < -_ROUNDING:
        raise ValueError(f"kl holds {lowest:g}: a KL divergence is at least 0; give it summed over the vocabulary.")
    return _totals(rows)


def agreement_totals(agrees: TokenRows) -> np.ndarray:
    """(texts, 2): tokens where both models' first choices are the same, and all tokens, of each text."""
    return _totals(read_token_rows("agrees", agrees, binary=True))


def _totals(rows: list[np.ndarray]) -> np.ndarray:
    return np.array([(row.sum(), len(row)) for row in rows])


def steps_until(steps: Sequence[float], values: Sequence[float], goal: float) -> float | None:
    """Steps of relearning until `values` first reach the goal, between measurements in a straight line.

    steps: (n,) ascending, the first before any training. values: (n,) measured there. 0 where the goal was reached
    from the start, None where it never is.
    """
    places = read_column("steps", steps)
    measured = read_column("values", values, num_rows=len(places))
    if (places[1:] <= places[:-1]).any():
        raise ValueError(f"steps must ascend, got {places.tolist()}.")
    if measured[0] >= goal:
        return 0.0
    for place in range(1, len(places)):
        if measured[place] >= goal:
            share = (goal - measured[place - 1]) / (measured[place] - measured[place - 1])
            return float(places[place - 1] + share * (places[place] - places[place - 1]))
    return None


def relearning_robustness(gain: float, gain_retrained: float) -> float:
    """R = min(gain_retrained / gain, 1) in [0, 1]; 1: relearns no faster than a model that never knew.

    gain: what the value of the unlearned model rose by in a relearning attack; gain_retrained: the same of a model
    that was trained without the texts. Where nothing came back (gain <= 0) R is 1; where only the unlearned model
    gained, 0.
    """
    _check_finite(gain=gain, gain_retrained=gain_retrained)
    return 1.0 if gain <= 0 else min(max(gain_retrained, 0.0) / gain, 1.0)


def quantisation_stability(before: float, after: float) -> float:
    """Q = 1 - |after - before| / (|after| + |before|) in [0, 1]; 1: rounding the weights changes nothing.

    before, after: the value with full and with rounded weights, both at least 0. Both 0 gives 1.
    """
    _check_finite(before=before, after=after)
    if min(before, after) < 0:
        raise ValueError(f"before={before} and after={after} must be at least 0, such as accuracies.")
    return 1.0 if before == after else 1 - abs(after - before) / (after + before)


def _check_finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} must be finite.")


PART_FORMULAS = {
    "forgetting": "1 - |accuracy on unlearn - target|",
    "update": "reliability x generalisation",
    "retained": "min(retain after / retain before, 1)",
    "robustness": "R x Q",
}


def surgery_score(parts: Mapping[str, float]) -> float:
    """The score of a surgery, in [0, 1]: the harmonic mean of the parts that were measured, some of PART_FORMULAS.

    It is 0 as soon as one part is, so nothing can be bought with something else. Scores of different parts are not
    comparable: `score_formula` tells them.
    """
    if not parts or not parts.keys() <= PART_FORMULAS.keys():
        raise ValueError(f"parts of the score are {', '.join(PART_FORMULAS)}, at least one, got {list(parts)}.")
    return harmonic_mean(_share(name, value) for name, value in parts.items())


def score_formula(measured: Collection[str]) -> str:
    """What the score is made of, and which parts were not measured, to be printed beside it."""
    inside = ", ".join(f"{name}: {formula}" for name, formula in PART_FORMULAS.items() if name in measured)
    left_out = [name for name in PART_FORMULAS if name not in measured]
    return f"harmonic mean of ({inside})" + (f"; not measured and left out: {', '.join(left_out)}" if left_out else "")


def forgetting_part(accuracy: float, target: float) -> float:
    """1 - |accuracy - target| in [0, 1]: how near the accuracy on forgotten questions is to where it should be.

    target: the accuracy of a model that was trained without the texts, on the same questions; where there is none,
    that of the model itself on `unseen`. Below the target is as wrong as above.
    """
    return 1 - abs(_share("accuracy", accuracy) - _share("target", target))


def update_part(reliability: float, generalisation: float) -> float:
    """reliability x generalisation in [0, 1]: share of new answers that arrive, plainly asked and in other words."""
    return _share("reliability", reliability) * _share("generalisation", generalisation)


def retained_part(after: float, before: float) -> float:
    """min(after / before, 1) in [0, 1]: what is left of the accuracy on retained questions; 1 if it was 0 before."""
    after, before = _share("after", after), _share("before", before)
    return 1.0 if before == 0 else min(after / before, 1.0)


def robustness_part(relearning: float, quantisation: float) -> float:
    """R x Q in [0, 1] of `robustness.relearning_robustness` and `robustness.quantisation_stability`."""
    return _share("relearning", relearning) * _share("quantisation", quantisation)


def _share(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must lie in [0, 1].")
    return float(value)
