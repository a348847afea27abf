"""How much of a text a model knows by heart, teacher-forced: the true beginning is always given.

A text is a row with an entry for each token that counts: `hits`, whether the true token is the most likely one, and
`logps`, its log-probability in nats. All results are (texts,), in [0, 1].

Source: exact memorisation Tirumala et al. 2022 (arXiv 2205.10770), extraction strength Carlini et al. 2021
(2012.07805) as in OpenUnlearning (2506.12618), whose code gives a text that ends on a miss 1/n; the formula gives 0.
"""

from pathlib import Path

import numpy as np

from hf_moe_cpt.analysis.columns import TokenRows, read_token_rows


METRIC_FOLDER = str(Path(__file__).parent / "metrics" / "memorisation")  # for evaluate.load


def exact_memorisation(hits: TokenRows) -> np.ndarray:
    """(texts,): share of the tokens that are the model's first choice."""
    return np.array([row.mean() for row in read_token_rows("hits", hits, binary=True)])


def extraction_strength(hits: TokenRows) -> np.ndarray:
    """(texts,): 1 - k / n, n the tokens and k the shortest beginning after which every first choice is right.

    1: all of it comes out; 0: not even the last token.
    """
    rows = read_token_rows("hits", hits, binary=True)
    lost = [np.flatnonzero(row == 0) for row in rows]  # the last of these ends the shortest beginning
    return np.array([1 - (miss[-1] + 1 if len(miss) else 0) / len(row) for row, miss in zip(rows, lost, strict=True)])


def probability(logps: TokenRows) -> np.ndarray:
    """(texts,): exp(mean log-probability), the geometric mean of the tokens' probabilities, 1 / perplexity.

    logps: nats, at most 0; minus infinity for a token of probability 0.
    """
    rows = read_token_rows("logps", logps, infinite=True)
    highest = max(row.max() for row in rows)
    if highest > 1e-3:  # rounding of half precision
        raise ValueError(f"logps holds {highest:g}: a log-probability is at most 0; give log p, not the loss.")
    return np.exp([min(row.mean(), 0.0) for row in rows])
