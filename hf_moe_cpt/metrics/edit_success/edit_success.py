"""The measures of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from hf_moe_cpt.evaluation.statistics import mean_intervals
from hf_moe_cpt.evaluation.text_metrics import conflict_score, token_accuracy
from hf_moe_cpt.metrics import base


_KINDS = ("reliability", "generalisation", "portability")
_HITS = {"kinds": "string", "hits": "int64", "tokens": "int64"}


class EditSuccess(base.Metric):
    """Whether knowledge that was edited arrived: teacher-forced accuracy of the new answers' tokens, for the
    edited questions (reliability), the same in other words (generalisation), and questions whose answer follows
    from the edit (portability). With the configuration "conflict" also how likely the old answer still is beside
    the new one.
    """

    CITATION = base.EASYEDIT
    URLS = ("https://arxiv.org/abs/2308.07269",)
    COLUMNS = {"default": _HITS, "conflict": _HITS | {"old_logps": "float64", "new_logps": "float64"}}
    ARGS = """
    kinds (list of str): of each question "reliability", "generalisation" or "portability".
    hits (list of int): tokens of the new answer that are the model's first choice.
    tokens (list of int): tokens of the new answer, at least 1.
    old_logps (list of float): log-probability of the old answer, in nats, per token or summed; NaN for a question
        without an old answer; configuration "conflict".
    new_logps (list of float): the same of the new answer; configuration "conflict".
    """
    RETURNS = """
    reliability, generalisation, portability (float): in [0, 1], of the kinds that were asked.
    conflict_score (float): mean of P(old) / (P(old) + P(new)), in [0, 1]; configuration "conflict".
    *_low, *_high (float): their intervals; NaN with a single question or group.
    num_reliability, num_generalisation, num_portability, num_conflict_score (int): questions behind each.
    """
    EXAMPLE = """
    >>> result = metric.compute(kinds=["reliability", "reliability", "portability"], hits=[2, 1, 0], tokens=[2, 2, 3])
    >>> result["reliability"], result["portability"]
    (0.75, 0.0)
    """

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
            their_groups = base.groups_of(groups, rows_of[name], len(kinds))
            if len(column):
                found |= mean_intervals({name: column}, their_groups, **bootstrap)
                found[f"num_{name}"] = len(column)
        return found
