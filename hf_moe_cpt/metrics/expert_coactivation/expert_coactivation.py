"""`expert_coactivation` of `hf_moe_cpt.analysis` as a metric of the library evaluate.

evaluate copies this file into its cache and imports it from there, so it must find the package installed.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from hf_moe_cpt.metrics.base import (
    check_num_experts,
    index_of_rows,
    refuse_missing_inputs,
    refuse_unknown_configuration,
    refuse_unknown_inputs,
)
from hf_moe_cpt.routing.metrics import expert_coactivation


_DESCRIPTION = """\
Which experts of a layer work on the same tokens: for each pair, the share of the tokens of expert i that visit
expert j too. All pairs of a token's K experts count.
"""

_CITATION = """\
@article{muennighoff2024olmoe,
  title = {OLMoE: Open Mixture-of-Experts Language Models},
  author = {Muennighoff, Niklas and others},
  journal = {arXiv preprint arXiv:2409.02060},
  year = {2024}
}
@article{therien2025continual,
  title = {Continual Pre-training of MoEs: How robust is your router?},
  author = {Th{\\'e}rien, Benjamin and others},
  journal = {arXiv preprint arXiv:2503.05029},
  year = {2025}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    top_k_index (list of list of int): the K experts of each token, distinct, in [0, num_experts); K at least 2.
    num_experts (int): routed experts of the layer, E.
Returns:
    expert_coactivation (list of list of float): row i, column j: P(j | i) in [0, 1]; 1 on the diagonal, and a row of 0
        for an expert without tokens.
    if_independent (float): (K - 1) / (E - 1), what balanced, unrelated choices give off the diagonal.
    strongest (float): the largest value off the diagonal.
    num_tokens (int): tokens.
Examples:
    >>> import evaluate
    >>> from hf_moe_cpt.metrics.base import EXPERT_COACTIVATION_FOLDER
    >>> metric = evaluate.load(EXPERT_COACTIVATION_FOLDER)
    >>> metric.compute(top_k_index=[[0, 1], [0, 2]], num_experts=3)["expert_coactivation"]
    [[1.0, 0.5, 0.5], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
"""

_INDEX = datasets.Sequence(datasets.Value("int64"))
_COLUMNS = {"top_k_index": _INDEX}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ExpertCoactivation(evaluate.Metric):
    """Rows are tokens, in one layer."""

    def _info(self) -> evaluate.MetricInfo:
        refuse_unknown_configuration(self.config_name, ("default",))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(_COLUMNS),
            reference_urls=["https://arxiv.org/abs/2409.02060", "https://arxiv.org/abs/2503.05029"],
        )

    def add_batch(self, **batch: Any) -> None:
        """As evaluate's, of all inputs together."""
        refuse_missing_inputs(batch, _COLUMNS)
        super().add_batch(**batch)

    def _compute(
        self, *, top_k_index: Sequence[Sequence[int]], num_experts: int | None = None, **unknown: Any
    ) -> dict[str, Any]:
        """unknown: refused."""
        refuse_unknown_inputs(unknown, (*_COLUMNS, "num_experts"))
        num_experts = check_num_experts(num_experts)
        index = index_of_rows("top_k_index", top_k_index, num_experts)
        matrix = expert_coactivation(index, num_experts)
        return {
            "expert_coactivation": matrix.tolist(),
            "if_independent": (index.shape[1] - 1) / (num_experts - 1),
            "strongest": float(matrix.clone().fill_diagonal_(0).max()),
            "num_tokens": len(index),
        }
