"""Balance of the experts of one layer (`hf_moe_cpt.routing`) as a metric of the library evaluate."""

from collections.abc import Sequence

from hf_moe_cpt import metrics
from hf_moe_cpt.routing.metrics import (
    dead_experts,
    expert_load,
    load_cv,
    load_entropy,
    max_routing_imbalance,
    normalized_imbalance,
)


class RoutingImbalance(metrics.Metric):
    """How evenly a router spreads tokens over the experts of a layer."""

    COLUMNS = {"default": {"top_k_index": ["int64"]}}
    OPTIONS = ("num_experts",)

    def score(self, *, top_k_index: Sequence[Sequence[int]], num_experts: int | None = None) -> dict[str, float | int]:
        """Rows are tokens, in one layer."""
        index, num_experts = metrics.experts_of_rows(top_k_index, num_experts)
        load = expert_load(index, num_experts)
        mri = float(max_routing_imbalance(index, num_experts))
        return {
            "mri": mri,
            "mri_normalized": normalized_imbalance(mri, num_experts, index.shape[1]),
            "load_entropy": float(load_entropy(load)),
            "load_cv": float(load_cv(load)),
            "dead_experts": int(dead_experts(load)),
            "num_tokens": len(index),
        }
