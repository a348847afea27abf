"""Membership inference: can one tell from a model's log-probabilities that a text was in its training data?

Every score is (texts,), and higher means: rather a member. A text is a row with an entry for each token that counts.
The AUC is the chance that a member scores above a text that was never seen:

    AUC = 1     members give themselves away
    AUC = 1/2   they look like any unseen text, which is what forgetting should reach
    AUC < 1/2   over-forgotten: they look stranger than unseen text, which gives them away as well

Source: loss Yeom et al. 2018 (arXiv 1709.01604), zlib Carlini et al. 2021 (2012.07805), min-k Shi et al. 2023
(2310.16789), min-k++ Zhang et al. 2024 (2404.02936), privacy leakage MUSE (2407.06460), all with the settings of
OpenUnlearning (2506.12618), whose zlib score divides the mean instead of the sum.
"""

import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_moe_cpt.analysis.columns import Column, TokenRows, read_column, read_strings, read_token_rows


METRIC_FOLDER = str(Path(__file__).parent / "metrics" / "membership_inference")  # for evaluate.load
LEAST_SHARE = 0.4  # of the tokens, the least likely ones
_LEAST_SPREAD = 1e-3


def loss_score(logps: TokenRows) -> np.ndarray:
    """(texts,): mean log-probability of the tokens, in nats."""
    return np.array([row.mean() for row in read_token_rows("logps", logps, infinite=True)])


def zlib_score(sum_nll: Column, texts: Sequence[str]) -> np.ndarray:
    """(texts,): - sum_nll / bytes of the text after zlib: nats that the model needs for a byte that zlib needs.

    sum_nll: (texts,) negative log-probability of the whole text, in nats, at least 0. texts: what was scored.
    """
    losses = read_column("sum_nll", sum_nll, infinite=True)
    if losses.min() < -1e-3:
        raise ValueError(f"sum_nll holds {losses.min():g}: a negative log-probability is at least 0.")
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
