"""The measures of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from hf_moe_cpt import metrics
from hf_moe_cpt.evaluation.statistics import bootstrap_interval, ratio_of_sums
from hf_moe_cpt.evaluation.text_metrics import agreement_totals, kl_totals


_NAMES = {False: ("kl", "top1_agreement", "num_texts"), True: ("neighbour_kl", "locality", "num_neighbours")}


class RetainedBehaviour(metrics.Metric):
    """How much a language model still behaves as before an operation, on text that must not change."""

    COLUMNS = {"default": {"kl": ["float64"], "agrees": ["int8"], "is_neighbour": "bool"}}

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
            their_groups = metrics.groups_of(groups, rows, len(kl))
            for name, column in zip(names, totals, strict=True) if len(rows) else ():
                options = {"statistic": ratio_of_sums, "is_share": column is totals[1], **bootstrap}
                interval = bootstrap_interval(column[rows], their_groups, **options)
                found |= zip((name, f"{name}_low", f"{name}_high"), interval, strict=True)
            found[number] = len(rows)
        return found
