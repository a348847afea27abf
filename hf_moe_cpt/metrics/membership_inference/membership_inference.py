"""The attacks of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from hf_moe_cpt import metrics
from hf_moe_cpt.evaluation.statistics import bootstrap_two_samples
from hf_moe_cpt.evaluation.text_metrics import (
    auc,
    is_over_forgotten,
    loss_score,
    min_k,
    min_k_plus_plus,
    privacy_leakage,
    zlib_score,
)


_AUCS = ("loss_auc", "zlib_auc", "min_k_auc", "min_k_plus_plus_auc")


class MembershipInference(metrics.Metric):
    """Whether texts that a language model should have forgotten can be told from texts that it never saw."""

    COLUMNS = {
        "default": {
            "logps": ["float64"],
            "means": ["float64"],
            "stds": ["float64"],
            "texts": "string",
            "is_member": "bool",
        }
    }
    OPTIONS = ("retrained_aucs", *metrics.Metric.OPTIONS)

    def score(
        self,
        *,
        logps: Sequence[Sequence[float]],
        means: Sequence[Sequence[float]],
        stds: Sequence[Sequence[float]],
        texts: Sequence[str],
        is_member: Sequence[bool],
        retrained_aucs: Mapping[str, float] | None = None,
        groups: Sequence[Hashable] | None = None,
        **bootstrap: Any,
    ) -> dict[str, float | int | bool]:
        """bootstrap: as in `bootstrap_two_samples`."""
        metrics.refuse_unknown_inputs(retrained_aucs or {}, _AUCS)
        inside = np.asarray(is_member, dtype=bool)
        if inside.all() or not inside.any():
            raise ValueError(f"is_member is {bool(inside[0])} for all {len(inside)} texts: give members and others.")
        sides = np.flatnonzero(inside), np.flatnonzero(~inside)
        groups_of_sides = [metrics.groups_of(groups, rows, len(inside)) for rows in sides]
        scores = (
            loss_score(logps),
            zlib_score(-loss_score(logps), texts),
            min_k(logps),
            min_k_plus_plus(logps, means, stds),
        )
        found: dict[str, float | int | bool] = {}
        for name, score in zip(_AUCS, scores, strict=True):
            samples = [score[rows] for rows in sides]
            value, low, high = bootstrap_two_samples(*samples, auc, *groups_of_sides, is_share=True, **bootstrap)
            found |= {name: value, f"{name}_low": low, f"{name}_high": high}
            attack = name.removesuffix("_auc")
            found[f"{attack}_over_forgotten"] = high == high and is_over_forgotten(high)
            if retrained_aucs and name in retrained_aucs:
                found[f"{attack}_privacy_leakage"] = privacy_leakage(value, retrained_aucs[name])
        return found | {"num_members": len(sides[0]), "num_others": len(sides[1])}
