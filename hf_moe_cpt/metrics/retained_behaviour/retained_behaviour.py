"""The measures of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from hf_moe_cpt.evaluation.statistics import bootstrap_interval, ratio_of_sums
from hf_moe_cpt.evaluation.text_metrics import agreement_totals, kl_totals
from hf_moe_cpt.metrics import base


_CITATION = """\
@article{jin2024rwku,
  title = {{RWKU}: Benchmarking Real-World Knowledge Unlearning for Large Language Models},
  journal = {arXiv preprint arXiv:2406.10890},
  year = {2024}
}
"""
_NAMES = {False: ("kl", "top1_agreement", "num_texts"), True: ("neighbour_kl", "locality", "num_neighbours")}


class RetainedBehaviour(base.Metric):
    """How much a model still behaves as before an operation on it, on text that must not change: KL(before || now)
    of the next token, and the share of tokens whose most likely choice is the same. On neighbours, other subjects
    written in the way of the forgotten ones, that share is called locality. Each with a confidence interval by the
    bootstrap.
    """

    CITATION = base.EASYEDIT + _CITATION
    URLS = ("https://arxiv.org/abs/2308.07269", "https://arxiv.org/abs/2406.10890")
    COLUMNS = {"default": {"kl": ["float64"], "agrees": ["int8"], "is_neighbour": "bool"}}
    ARGS = """
    kl (list of list of float): KL(before || now) over the vocabulary at each token of a text, in nats.
    agrees (list of list of int): for each token 1 if both models have the same most likely token, else 0.
    is_neighbour (list of bool): True for a text about a neighbour, False for any other text that must not change.
    """
    RETURNS = """
    kl (float): nats per token, at least 0, of texts that are not neighbours.
    top1_agreement (float): share of their tokens, in [0, 1].
    neighbour_kl, locality (float): the same two of neighbours.
    *_low, *_high (float): their intervals; NaN with a single text or group.
    num_texts, num_neighbours (int): texts behind them; what has no text is left out.
    """
    EXAMPLE = """
    >>> result = metric.compute(kl=[[0.1, 0.3], [0.5]], agrees=[[1, 1], [0]], is_neighbour=[False, True])
    >>> result["kl"], result["top1_agreement"], result["locality"]
    (0.2, 1.0, 0.0)
    """

    def score(
        self,
        *,
        kl: Sequence[Sequence[float]],
        agrees: Sequence[Sequence[int]],
        is_neighbour: Sequence[bool],
        groups: Sequence[Hashable] | None = None,
        **bootstrap: Any,
    ) -> dict[str, float | int]:
        """Means are over tokens, intervals over texts or groups. bootstrap: as in `bootstrap_interval`."""
        totals = kl_totals(kl), agreement_totals(agrees)
        found: dict[str, float | int] = {}
        for neighbours, (*names, number) in _NAMES.items():
            rows = np.flatnonzero(np.asarray(is_neighbour, dtype=bool) == neighbours)
            their_groups = base.groups_of(groups, rows, len(kl))
            for name, column in zip(names, totals, strict=True) if len(rows) else ():
                interval = bootstrap_interval(column[rows], their_groups, statistic=ratio_of_sums, **bootstrap)
                found |= zip((name, f"{name}_low", f"{name}_high"), interval, strict=True)
            found[number] = len(rows)
        return found
