"""The attacks of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate.

evaluate copies this file into its cache and imports it from there, so it must find the package installed.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from hf_moe_cpt.evaluation.statistics import RESAMPLES, bootstrap_two_samples
from hf_moe_cpt.evaluation.text_metrics import (
    auc,
    is_over_forgotten,
    loss_score,
    min_k,
    min_k_plus_plus,
    privacy_leakage,
    zlib_score,
)
from hf_moe_cpt.metrics.base import refuse_missing_inputs, refuse_unknown_configuration, refuse_unknown_inputs


_DESCRIPTION = """\
Whether texts that a model should have forgotten can be told from texts that it never saw, by four scores of its
log-probabilities: the loss, the loss over the size after zlib, min-k and min-k++. The area under the curve is 1 where
members give themselves away, 1/2 where nobody can tell, and below 1/2 where they are over-forgotten.
"""

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

_KWARGS_DESCRIPTION = """
Args:
    logps (list of list of float): log-probability of each token of a text, in nats.
    means (list of list of float): mean of log p(v) over the vocabulary at each token, v drawn from the model.
    stds (list of list of float): standard deviation of the same.
    texts (list of str): the texts that were scored.
    is_member (list of bool): True for texts to be forgotten, False for texts that were never seen.
    retrained_aucs (dict of str to float, optional): areas of a model trained without the texts, by the name of the
        result, such as {"min_k_auc": 0.52}; for these the privacy leakage is given.
    groups (list of str, optional): what each text is about; texts of one group are drawn together.
    confidence (float): of the intervals. Default 0.95.
    resamples (int): of the bootstrap. Default 2000.
    seed (int): of the bootstrap. Default 0.
Returns:
    loss_auc, zlib_auc, min_k_auc, min_k_plus_plus_auc (float): in [0, 1].
    *_low, *_high (float): their intervals; NaN with a single text or group on either side.
    *_over_forgotten (bool): whether the whole interval lies below 1/2.
    *_privacy_leakage (float): percent; 0 as the retrained model, below 0 still a member, above 0 over-forgotten.
    num_members, num_others (int): texts.
Examples:
    >>> import evaluate
    >>> from hf_moe_cpt.evaluation.text_metrics import METRIC_FOLDER
    >>> metric = evaluate.load(METRIC_FOLDER)
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

_TOKENS = datasets.List(datasets.Value("float64"))
_COLUMNS = {
    "logps": _TOKENS,
    "means": _TOKENS,
    "stds": _TOKENS,
    "texts": datasets.Value("string"),
    "is_member": datasets.Value("bool"),
}
_AUCS = ("loss_auc", "zlib_auc", "min_k_auc", "min_k_plus_plus_auc")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class MembershipInference(evaluate.Metric):
    """Rows are texts."""

    def _info(self) -> evaluate.MetricInfo:
        refuse_unknown_configuration(self.config_name, ("default",))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(_COLUMNS),
            reference_urls=["https://arxiv.org/abs/2407.06460", "https://arxiv.org/abs/2506.12618"],
        )

    def add_batch(self, **batch: Any) -> None:
        """As evaluate's, of all inputs together."""
        refuse_missing_inputs(batch, _COLUMNS)
        super().add_batch(**batch)

    def _compute(
        self,
        *,
        logps: Sequence[Sequence[float]],
        means: Sequence[Sequence[float]],
        stds: Sequence[Sequence[float]],
        texts: Sequence[str],
        is_member: Sequence[bool],
        retrained_aucs: Mapping[str, float] | None = None,
        groups: Sequence[Hashable] | None = None,
        confidence: float = 0.95,
        resamples: int = RESAMPLES,
        seed: int = 0,
        **unknown: Any,
    ) -> dict[str, float | int | bool]:
        """unknown: refused."""
        options = ("retrained_aucs", "groups", "confidence", "resamples", "seed")
        refuse_unknown_inputs(unknown, (*_COLUMNS, *options))
        refuse_unknown_inputs(retrained_aucs or {}, _AUCS)
        sides = _sides(is_member, groups)
        scores = (
            loss_score(logps),
            zlib_score([-sum(row) for row in logps], texts),
            min_k(logps),
            min_k_plus_plus(logps, means, stds),
        )
        found: dict[str, float | int | bool] = {}
        for name, score in zip(_AUCS, scores, strict=True):
            samples, their_groups = [score[rows] for rows, _ in sides], [names for _, names in sides]
            value, low, high = bootstrap_two_samples(*samples, auc, *their_groups, confidence, resamples, seed)
            found |= {name: value, f"{name}_low": low, f"{name}_high": high}
            attack = name.removesuffix("_auc")
            found[f"{attack}_over_forgotten"] = high == high and is_over_forgotten(high)
            if retrained_aucs and name in retrained_aucs:
                found[f"{attack}_privacy_leakage"] = privacy_leakage(value, retrained_aucs[name])
        return found | {"num_members": len(sides[0][0]), "num_others": len(sides[1][0])}


def _sides(
    is_member: Sequence[bool], groups: Sequence[Hashable] | None
) -> list[tuple[np.ndarray, list[Hashable] | None]]:
    """Rows, and their groups, of members and of the others."""
    inside = np.asarray(is_member, dtype=bool)
    if inside.all() or not inside.any():
        raise ValueError(f"is_member is {bool(inside[0])} for all {len(inside)} texts: give members and others.")
    if groups is not None and len(groups) != len(inside):
        raise ValueError(f"groups has {len(groups)} entries for {len(inside)} rows: name the group of each row.")
    rows_of_sides = np.flatnonzero(inside), np.flatnonzero(~inside)
    return [(rows, None if groups is None else [groups[row] for row in rows]) for rows in rows_of_sides]
