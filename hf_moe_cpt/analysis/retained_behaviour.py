"""How much a model still behaves as before surgery, on texts that it should leave alone.

On retained text this is the damage of surgery; on neighbours, which are other subjects written in the same way as the
forgotten ones, the share of equal first choices is called locality.

A text is a row with an entry for each token that counts: `kl`, KL(before || now) over the vocabulary in nats, and
`agrees`, whether both models have the same first choice. Source: locality EasyEdit (arXiv 2308.07269), neighbours
RWKU (2406.10890), the KL is that of LLM Surgery's anchor (2409.13054).
"""

from pathlib import Path

import numpy as np

from hf_moe_cpt.analysis.columns import TokenRows, read_token_rows


METRIC_FOLDER = str(Path(__file__).parent / "metrics" / "retained_behaviour")  # for evaluate.load
_ROUNDING = 1e-3  # nats below 0 that half precision may leave


def kl_per_token(kl: TokenRows) -> np.ndarray:
    """(texts,): mean of each text's tokens in nats, at least 0 up to rounding."""
    sums, counts = kl_totals(kl).T
    return sums / counts


def top1_agreement(agrees: TokenRows) -> np.ndarray:
    """(texts,) in [0, 1]: share of each text's tokens where both models' first choices are the same."""
    sums, counts = agreement_totals(agrees).T
    return sums / counts


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
