"""The measures of `hf_moe_cpt.evaluation.text_metrics` as a metric of the library evaluate.

evaluate copies this file into its cache and imports it from there, so it must find the package installed.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from hf_moe_cpt.evaluation.statistics import RESAMPLES, bootstrap_interval, ratio_of_sums
from hf_moe_cpt.evaluation.text_metrics import agreement_totals, kl_totals
from hf_moe_cpt.metrics.base import refuse_missing_inputs, refuse_unknown_configuration, refuse_unknown_inputs


_DESCRIPTION = """\
How much a model still behaves as before an operation on it, on text that must not change: KL(before || now) of the
next token, and the share of tokens whose most likely choice is the same. On neighbours, other subjects written in the
way of the forgotten ones, that share is called locality. Each with a confidence interval by the bootstrap.
"""

_CITATION = """\
@article{wang2023easyedit,
  title = {{EasyEdit}: An Easy-to-use Knowledge Editing Framework for Large Language Models},
  journal = {arXiv preprint arXiv:2308.07269},
  year = {2023}
}
@article{jin2024rwku,
  title = {{RWKU}: Benchmarking Real-World Knowledge Unlearning for Large Language Models},
  journal = {arXiv preprint arXiv:2406.10890},
  year = {2024}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    kl (list of list of float): KL(before || now) over the vocabulary at each token of a text, in nats.
    agrees (list of list of int): for each token 1 if both models have the same most likely token, else 0.
    is_neighbour (list of bool): True for a text about a neighbour, False for any other text that must not change.
    groups (list of str, optional): what each text is about; texts of one group are drawn together.
    confidence (float): of the intervals. Default 0.95.
    resamples (int): of the bootstrap. Default 2000.
    seed (int): of the bootstrap. Default 0.
Returns:
    kl (float): nats per token, at least 0, of texts that are not neighbours.
    top1_agreement (float): share of their tokens, in [0, 1].
    neighbour_kl, locality (float): the same two of neighbours.
    *_low, *_high (float): their intervals; NaN with a single text or group.
    num_texts, num_neighbours (int): texts behind them; what has no text is left out.
Examples:
    >>> import evaluate
    >>> from hf_moe_cpt.evaluation.text_metrics import METRIC_FOLDER
    >>> metric = evaluate.load(METRIC_FOLDER)
    >>> result = metric.compute(kl=[[0.1, 0.3], [0.5]], agrees=[[1, 1], [0]], is_neighbour=[False, True])
    >>> result["kl"], result["top1_agreement"], result["locality"]
    (0.2, 1.0, 0.0)
"""

_COLUMNS = {
    "kl": datasets.List(datasets.Value("float64")),
    "agrees": datasets.List(datasets.Value("int8")),
    "is_neighbour": datasets.Value("bool"),
}
_NAMES = {False: ("kl", "top1_agreement", "num_texts"), True: ("neighbour_kl", "locality", "num_neighbours")}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RetainedBehaviour(evaluate.Metric):
    """Rows are texts; means are over tokens, intervals over texts or groups."""

    def _info(self) -> evaluate.MetricInfo:
        refuse_unknown_configuration(self.config_name, ("default",))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(_COLUMNS),
            reference_urls=["https://arxiv.org/abs/2308.07269", "https://arxiv.org/abs/2406.10890"],
        )

    def add_batch(self, **batch: Any) -> None:
        """As evaluate's, of all inputs together."""
        refuse_missing_inputs(batch, _COLUMNS)
        super().add_batch(**batch)

    def _compute(
        self,
        *,
        kl: Sequence[Sequence[float]],
        agrees: Sequence[Sequence[int]],
        is_neighbour: Sequence[bool],
        groups: Sequence[Hashable] | None = None,
        confidence: float = 0.95,
        resamples: int = RESAMPLES,
        seed: int = 0,
        **unknown: Any,
    ) -> dict[str, float | int]:
        """unknown: refused."""
        refuse_unknown_inputs(unknown, (*_COLUMNS, "groups", "confidence", "resamples", "seed"))
        totals = kl_totals(kl), agreement_totals(agrees)
        if groups is not None and len(groups) != len(totals[0]):
            raise ValueError(f"groups has {len(groups)} entries for {len(kl)} rows: name the group of each row.")
        found: dict[str, float | int] = {}
        for neighbours, (*names, number) in _NAMES.items():
            rows = np.flatnonzero(np.asarray(is_neighbour, dtype=bool) == neighbours)
            their_groups = None if groups is None else [groups[row] for row in rows]
            for name, column in zip(names, totals, strict=True) if len(rows) else ():
                drawing = (their_groups, confidence, resamples, seed)
                value, low, high = bootstrap_interval(column[rows], *drawing, statistic=ratio_of_sums)
                found |= {name: value, f"{name}_low": low, f"{name}_high": high}
            found[number] = len(rows)
        return found
