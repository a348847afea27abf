"""`expert_coactivation` of `hf_moe_cpt.routing` as a metric of the library evaluate."""

from collections.abc import Sequence
from typing import Any

from hf_moe_cpt import metrics
from hf_moe_cpt.routing.metrics import expert_coactivation


class ExpertCoactivation(metrics.Metric):
    """Which experts of a layer work on the same tokens."""

    COLUMNS = {"default": {"top_k_index": ["int64"]}}
    OPTIONS = ("num_experts",)

    def score(self, *, top_k_index: Sequence[Sequence[int]], num_experts: int | None = None) -> dict[str, Any]:
        """Rows are tokens, in one layer."""
        index, num_experts = metrics.experts_of_rows(top_k_index, num_experts)
        matrix = expert_coactivation(index, num_experts)
        return {
            "expert_coactivation": matrix.tolist(),
            "if_independent": (index.shape[1] - 1) / (num_experts - 1),
            "strongest": float(matrix.clone().fill_diagonal_(0).max()),
            "num_tokens": len(index),
        }
