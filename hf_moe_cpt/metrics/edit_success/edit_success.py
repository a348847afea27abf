"""The measures of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from hf_moe_cpt import metrics
from hf_moe_cpt.evaluation.statistics import mean_intervals
from hf_moe_cpt.evaluation.text_metrics import conflict_score, token_accuracy


_KINDS = ("reliability", "generalisation", "portability")
_HITS = {"kinds": "string", "hits": "int64", "tokens": "int64"}


class EditSuccess(metrics.Metric):
    """Whether edited knowledge arrived in a language model, also in other words and in what follows from it."""

    COLUMNS = {"default": _HITS, "conflict": _HITS | {"old_logps": "float64", "new_logps": "float64"}}

    def score(
        self,
        *,
        kinds: Sequence[str],
        hits: Sequence[int],
        tokens: Sequence[int],
        old_logps: Sequence[float] | None = None,
        new_logps: Sequence[float] | None = None,
        groups: Sequence[Hashable] | None = None,
        **bootstrap: Any,
    ) -> dict[str, float | int]:
        """bootstrap: as in `mean_intervals`."""
        for place, kind in enumerate(kinds):
            if kind not in _KINDS:
                raise ValueError(f"kinds holds {kind!r} at question {place}: choose from {', '.join(_KINDS)}.")
        accuracy = token_accuracy(hits, tokens)
        rows_of = {kind: np.flatnonzero([kind == found for found in kinds]) for kind in _KINDS}
        columns = {kind: accuracy[rows] for kind, rows in rows_of.items()}
        if old_logps is not None:
            old, new = np.asarray(old_logps, dtype=np.float64), np.asarray(new_logps, dtype=np.float64)
            rows = rows_of["conflict_score"] = np.flatnonzero(~np.isnan(old))
            columns["conflict_score"] = conflict_score(old[rows], new[rows]) if len(rows) else rows
        found: dict[str, float | int] = {}
        for name, column in columns.items():
            their_groups = metrics.groups_of(groups, rows_of[name], len(kinds))
            if len(column):
                found |= mean_intervals({name: column}, their_groups, **bootstrap)
                found[f"num_{name}"] = len(column)
        return found
