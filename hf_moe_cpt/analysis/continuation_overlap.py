"""What a model writes on its own: how much of it is the true continuation, and whether it is still language.

ROUGE-L compares words of two texts by their longest common subsequence (LCS): words in the same order, gaps allowed.
N-gram entropy is low where a text repeats itself, the usual sign of a damaged model.

Source: ROUGE-L Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", with the words of the package
rouge_score without stemming; the bit-parallel LCS Hyyrö 2004; entropy Zhang et al. 2018 (arXiv 1809.05972) with the
weights of ROME (2202.05262) and EasyEdit (2308.07269), whose two terms are averaged.
"""

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hf_moe_cpt.analysis.columns import read_strings


METRIC_FOLDER = str(Path(__file__).parent / "metrics" / "continuation_overlap")  # for evaluate.load
FLUENCY_METRIC_FOLDER = str(Path(__file__).parent / "metrics" / "fluency")
ENTROPY_WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # by length of the n-grams
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
