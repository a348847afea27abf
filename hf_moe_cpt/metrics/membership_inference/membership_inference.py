"""The attacks of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

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
from hf_moe_cpt.metrics import base


_CITATION = """\
@article{shi2024muse,
  title = {{MUSE}: Machine Unlearning Six-Way Evaluation for Language Models},
  journal = {arXiv preprint arXiv:2407.06460},
  year = {2024}
}
@article{dorna2025openunlearning,
  title = {{OpenUnlearning}: Accelerating {LLM} Unlearning via Unified Benchmarking of Methods and Metrics},
  journal = {arXiv preprint arXiv:2506.12618},
  year = {2025}
}
"""
_AUCS = ("loss_auc", "zlib_auc", "min_k_auc", "min_k_plus_plus_auc")


class MembershipInference(base.Metric):
    """Whether texts that a model should have forgotten can be told from texts that it never saw, by four scores of
    its log-probabilities: the loss, the loss over the size after zlib, min-k and min-k++. The area under the curve
    is 1 where members give themselves away, 1/2 where nobody can tell, and below 1/2 where they are
    over-forgotten.
    """

    CITATION = _CITATION
    URLS = ("https://arxiv.org/abs/2407.06460", "https://arxiv.org/abs/2506.12618")
    COLUMNS = {
        "default": {
            "logps": ["float64"],
            "means": ["float64"],
            "stds": ["float64"],
            "texts": "string",
            "is_member": "bool",
        }
    }
    OPTIONS = ("retrained_aucs", *base.Metric.OPTIONS)
    ARGS = """
    logps (list of list of float): log-probability of each token of a text, in nats.
    means (list of list of float): mean of log p(v) over the vocabulary at each token, v drawn from the model.
    stds (list of list of float): standard deviation of the same.
    texts (list of str): the texts that were scored.
    is_member (list of bool): True for texts to be forgotten, False for texts that were never seen.
    retrained_aucs (dict of str to float, optional): areas of a model trained without the texts, by the name of the
        result, such as {"min_k_auc": 0.52}; for these the privacy leakage is given.
    """
    RETURNS = """
    loss_auc, zlib_auc, min_k_auc, min_k_plus_plus_auc (float): in [0, 1].
    *_low, *_high (float): their intervals; NaN with a single text or group on either side.
    *_over_forgotten (bool): whether the whole interval lies below 1/2.
    *_privacy_leakage (float): percent; 0 as the retrained model, below 0 still a member, above 0 over-forgotten.
    num_members, num_others (int): texts.
    """
    EXAMPLE = """
    >>> result = metric.compute(
    ...     logps=[[-1.0, -2.0], [-3.0, -4.0], [-5.0, -1.0]],
    ...     means=[[-2.0, -2.0]] * 3,
    ...     stds=[[1.0, 1.0]] * 3,
    ...     texts=["one", "two", "six"],
    ...     is_member=[True, False, False],
    ...     retrained_aucs={"loss_auc": 0.5},
    ... )
    >>> result["loss_auc"], result["loss_privacy_leakage"]
    (1.0, -100.0)
    """

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
        base.refuse_unknown_inputs(retrained_aucs or {}, _AUCS)
        inside = np.asarray(is_member, dtype=bool)
        if inside.all() or not inside.any():
            raise ValueError(f"is_member is {bool(inside[0])} for all {len(inside)} texts: give members and others.")
        sides = np.flatnonzero(inside), np.flatnonzero(~inside)
        groups_of_sides = [base.groups_of(groups, rows, len(inside)) for rows in sides]
        scores = (
            loss_score(logps),
            zlib_score([-sum(row) for row in logps], texts),
            min_k(logps),
            min_k_plus_plus(logps, means, stds),
        )
        found: dict[str, float | int | bool] = {}
        for name, score in zip(_AUCS, scores, strict=True):
            samples = [score[rows] for rows in sides]
            value, low, high = bootstrap_two_samples(*samples, auc, *groups_of_sides, **bootstrap)
            found |= {name: value, f"{name}_low": low, f"{name}_high": high}
            attack = name.removesuffix("_auc")
            found[f"{attack}_over_forgotten"] = high == high and is_over_forgotten(high)
            if retrained_aucs and name in retrained_aucs:
                found[f"{attack}_privacy_leakage"] = privacy_leakage(value, retrained_aucs[name])
        return found | {"num_members": len(sides[0]), "num_others": len(sides[1])}
