"""Balance of the experts of one layer (`hf_moe_cpt.routing`) as a metric of the library evaluate."""

from collections.abc import Sequence

from hf_moe_cpt.metrics import base
from hf_moe_cpt.routing.metrics import (
    dead_experts,
    expert_load,
    load_cv,
    load_entropy,
    max_routing_imbalance,
    normalized_imbalance,
)


class RoutingImbalance(base.Metric):
    """How evenly a router spreads tokens over the experts of a layer: share of the tokens that visit the busiest
    expert (maximum routing imbalance, MRI), the same in units of a balanced load, entropy and variation of the
    loads, and experts without any token.
    """

    CITATION = base.CONTINUAL_MOE
    URLS = ("https://arxiv.org/abs/2503.05029",)
    COLUMNS = {"default": {"top_k_index": ["int64"]}}
    OPTIONS = ("num_experts",)
    ARGS = """
    top_k_index (list of list of int): the K experts of each token, distinct, in [0, num_experts).
    num_experts (int): routed experts of the layer, E.
    """
    RETURNS = """
    mri (float): share of the tokens that visit the busiest expert, in [K/E, 1].
    mri_normalized (float): mri times E/K, load of the busiest expert over the mean load, in [1, E/K].
    load_entropy (float): entropy of the loads over log E, in [0, 1]; 1 is perfect balance.
    load_cv (float): standard deviation of the loads over their mean; 0 is perfect balance.
    dead_experts (int): experts that no token visits.
    num_tokens (int): tokens.
    """
    EXAMPLE = """
    >>> result = metric.compute(top_k_index=[[0, 1], [0, 2]], num_experts=4)
    >>> result["mri"], result["mri_normalized"], result["dead_experts"]
    (1.0, 2.0, 1)
    """

    def score(self, *, top_k_index: Sequence[Sequence[int]], num_experts: int | None = None) -> dict[str, float | int]:
        """Rows are tokens, in one layer."""
        index, num_experts = base.experts_of_rows(top_k_index, num_experts)
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
