"""Balance of the experts of one layer (`hf_moe_cpt.analysis`) as a metric of the library evaluate.

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
from hf_moe_cpt.routing.metrics import (
    dead_experts,
    expert_load,
    load_cv,
    load_entropy,
    max_routing_imbalance_from_load,
    normalized_imbalance,
)


_DESCRIPTION = """\
How evenly a router spreads tokens over the experts of a layer: share of the tokens that visit the busiest expert
(maximum routing imbalance, MRI), the same in units of a balanced load, entropy and variation of the loads, and experts
without any token.
"""

_CITATION = """\
@article{therien2025continual,
  title = {Continual Pre-training of MoEs: How robust is your router?},
  author = {Th{\\'e}rien, Benjamin and others},
  journal = {arXiv preprint arXiv:2503.05029},
  year = {2025}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    top_k_index (list of list of int): the K experts of each token, distinct, in [0, num_experts).
    num_experts (int): routed experts of the layer, E.
Returns:
    mri (float): share of the tokens that visit the busiest expert, in [K/E, 1].
    mri_normalized (float): mri times E/K, load of the busiest expert over the mean load, in [1, E/K].
    load_entropy (float): entropy of the loads over log E, in [0, 1]; 1 is perfect balance.
    load_cv (float): standard deviation of the loads over their mean; 0 is perfect balance.
    dead_experts (int): experts that no token visits.
    num_tokens (int): tokens.
Examples:
    >>> import evaluate
    >>> from hf_moe_cpt.metrics.base import ROUTING_IMBALANCE_FOLDER
    >>> metric = evaluate.load(ROUTING_IMBALANCE_FOLDER)
    >>> result = metric.compute(top_k_index=[[0, 1], [0, 2]], num_experts=4)
    >>> result["mri"], result["mri_normalized"], result["dead_experts"]
    (1.0, 2.0, 1)
"""

_INDEX = datasets.Sequence(datasets.Value("int64"))
_COLUMNS = {"top_k_index": _INDEX}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RoutingImbalance(evaluate.Metric):
    """Rows are tokens, in one layer."""

    def _info(self) -> evaluate.MetricInfo:
        refuse_unknown_configuration(self.config_name, ("default",))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(_COLUMNS),
            reference_urls=["https://arxiv.org/abs/2503.05029"],
        )

    def add_batch(self, **batch: Any) -> None:
        """As evaluate's, of all inputs together."""
        refuse_missing_inputs(batch, _COLUMNS)
        super().add_batch(**batch)

    def _compute(
        self, *, top_k_index: Sequence[Sequence[int]], num_experts: int | None = None, **unknown: Any
    ) -> dict[str, float | int]:
        """unknown: refused."""
        refuse_unknown_inputs(unknown, (*_COLUMNS, "num_experts"))
        num_experts = check_num_experts(num_experts)
        index = index_of_rows("top_k_index", top_k_index, num_experts)
        load = expert_load(index, num_experts)
        mri = float(max_routing_imbalance_from_load(load.double(), len(index)))
        return {
            "mri": mri,
            "mri_normalized": normalized_imbalance(mri, num_experts, index.shape[1]),
            "load_entropy": float(load_entropy(load)),
            "load_cv": float(load_cv(load)),
            "dead_experts": int(dead_experts(load)),
            "num_tokens": len(index),
        }
