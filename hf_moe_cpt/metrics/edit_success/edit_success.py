"""The measures of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate.

evaluate copies this file into its cache and imports it from there, so it must find the package installed.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from hf_moe_cpt.evaluation.statistics import RESAMPLES, mean_intervals
from hf_moe_cpt.evaluation.text_metrics import conflict_score, token_accuracy
from hf_moe_cpt.metrics.base import refuse_missing_inputs, refuse_unknown_configuration, refuse_unknown_inputs


_DESCRIPTION = """\
Whether knowledge that was edited arrived: teacher-forced accuracy of the new answers' tokens, for the edited questions
(reliability), the same in other words (generalisation), and questions whose answer follows from the edit
(portability). With the configuration "conflict" also how likely the old answer still is beside the new one.
"""

_CITATION = """\
@article{wang2023easyedit,
  title = {{EasyEdit}: An Easy-to-use Knowledge Editing Framework for Large Language Models},
  journal = {arXiv preprint arXiv:2308.07269},
  year = {2023}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    kinds (list of str): of each question "reliability", "generalisation" or "portability".
    hits (list of int): tokens of the new answer that are the model's first choice.
    tokens (list of int): tokens of the new answer, at least 1.
    old_logps (list of float): log-probability of the old answer, in nats, per token or summed; NaN for a question
        without an old answer; configuration "conflict".
    new_logps (list of float): the same of the new answer; configuration "conflict".
    groups (list of str, optional): what each question is about; questions of one group are drawn together.
    confidence (float): of the intervals. Default 0.95.
    resamples (int): of the bootstrap. Default 2000.
    seed (int): of the bootstrap. Default 0.
Returns:
    reliability, generalisation, portability (float): in [0, 1], of the kinds that were asked.
    conflict_score (float): mean of P(old) / (P(old) + P(new)), in [0, 1]; configuration "conflict".
    *_low, *_high (float): their intervals; NaN with a single question or group.
    num_reliability, num_generalisation, num_portability, num_conflict_score (int): questions behind each.
Examples:
    >>> import evaluate
    >>> from hf_moe_cpt.evaluation.text_metrics import METRIC_FOLDER
    >>> metric = evaluate.load(METRIC_FOLDER)
    >>> result = metric.compute(kinds=["reliability", "reliability", "portability"], hits=[2, 1, 0], tokens=[2, 2, 3])
    >>> result["reliability"], result["portability"]
    (0.75, 0.0)
"""

_KINDS = ("reliability", "generalisation", "portability")
_HIT_COLUMNS = {"kinds": datasets.Value("string"), "hits": datasets.Value("int64"), "tokens": datasets.Value("int64")}
_LOGP_COLUMNS = {"old_logps": datasets.Value("float64"), "new_logps": datasets.Value("float64")}
_COLUMNS = {"default": _HIT_COLUMNS, "conflict": _HIT_COLUMNS | _LOGP_COLUMNS}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class EditSuccess(evaluate.Metric):
    """Rows are questions. Configuration "default" takes hits, "conflict" also log-probabilities of both answers."""

    def _info(self) -> evaluate.MetricInfo:
        refuse_unknown_configuration(self.config_name, _COLUMNS)
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(_COLUMNS[self.config_name]),
            reference_urls=["https://arxiv.org/abs/2308.07269"],
        )

    def add_batch(self, **batch: Any) -> None:
        """As evaluate's, of all inputs together."""
        refuse_missing_inputs(batch, _COLUMNS[self.config_name])
        super().add_batch(**batch)

    def _compute(
        self,
        *,
        kinds: Sequence[str],
        hits: Sequence[int],
        tokens: Sequence[int],
        old_logps: Sequence[float] | None = None,
        new_logps: Sequence[float] | None = None,
        groups: Sequence[Hashable] | None = None,
        confidence: float = 0.95,
        resamples: int = RESAMPLES,
        seed: int = 0,
        **unknown: Any,
    ) -> dict[str, float | int]:
        """unknown: refused."""
        known = _COLUMNS[self.config_name]
        refuse_unknown_inputs(unknown, (*known, "groups", "confidence", "resamples", "seed"))
        with_conflict = old_logps is not None or new_logps is not None
        if with_conflict and self.config_name != "conflict":
            raise ValueError("Two answers need their configuration: evaluate.load(..., config_name='conflict').")
        if groups is not None and len(groups) != len(kinds):
            raise ValueError(f"groups has {len(groups)} entries for {len(kinds)} rows: name the group of each row.")
        parts = _rows_of_kinds(kinds)
        accuracy = token_accuracy(hits, tokens)
        columns = {kind: accuracy[rows] for kind, rows in parts.items()}
        if with_conflict:
            old, new = np.asarray(old_logps, dtype=np.float64), np.asarray(new_logps, dtype=np.float64)
            changed = np.flatnonzero(~np.isnan(old))
            if len(changed):
                parts["conflict_score"] = changed
                columns["conflict_score"] = conflict_score(old[changed], new[changed])
        found: dict[str, float | int] = {}
        for name, column in columns.items():
            their_groups = None if groups is None else [groups[row] for row in parts[name]]
            found |= mean_intervals({name: column}, their_groups, confidence, resamples, seed)
            found[f"num_{name}"] = len(column)
        return found


def _rows_of_kinds(kinds: Sequence[str]) -> dict[str, np.ndarray]:
    for place, kind in enumerate(kinds):
        if kind not in _KINDS:
            raise ValueError(f"kinds holds {kind!r} at question {place}: choose from {', '.join(_KINDS)}.")
    rows = {kind: np.flatnonzero([kind == found for found in kinds]) for kind in _KINDS}
    return {kind: places for kind, places in rows.items() if len(places)}
