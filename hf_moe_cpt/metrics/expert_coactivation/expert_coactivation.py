"""`expert_coactivation` of `hf_moe_cpt.routing` as a metric of the library evaluate."""

from collections.abc import Sequence
from typing import Any

from hf_moe_cpt.metrics import base
from hf_moe_cpt.routing.metrics import expert_coactivation


class ExpertCoactivation(base.Metric):
    """Which experts of a layer work on the same tokens: for each pair, the share of the tokens of expert i that
    visit expert j too. All pairs of a token's K experts count.
    """

    CITATION = base.OLMOE + base.CONTINUAL_MOE
    URLS = ("https://arxiv.org/abs/2409.02060", "https://arxiv.org/abs/2503.05029")
    COLUMNS = {"default": {"top_k_index": ["int64"]}}
    OPTIONS = ("num_experts",)
    ARGS = """
    top_k_index (list of list of int): the K experts of each token, distinct, in [0, num_experts); K at least 2.
    num_experts (int): routed experts of the layer, E.
    """
    RETURNS = """
    expert_coactivation (list of list of float): row i, column j: P(j | i) in [0, 1]; 1 on the diagonal, and a row of 0
        for an expert without tokens.
    if_independent (float): (K - 1) / (E - 1), what balanced, unrelated choices give off the diagonal.
    strongest (float): the largest value off the diagonal.
    num_tokens (int): tokens.
    """
    EXAMPLE = """
    >>> metric.compute(top_k_index=[[0, 1], [0, 2]], num_experts=3)["expert_coactivation"]
    [[1.0, 0.5, 0.5], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
    """

    def score(self, *, top_k_index: Sequence[Sequence[int]], num_experts: int | None = None) -> dict[str, Any]:
        """Rows are tokens, in one layer."""
        index, num_experts = base.experts_of_rows(top_k_index, num_experts)
        matrix = expert_coactivation(index, num_experts)
        return {
            "expert_coactivation": matrix.tolist(),
            "if_independent": (index.shape[1] - 1) / (num_experts - 1),
            "strongest": float(matrix.clone().fill_diagonal_(0).max()),
            "num_tokens": len(index),
        }
