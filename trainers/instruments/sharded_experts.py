"""How many experts a layer has when its module holds those of one rank only. Source: ours.

Under expert parallelism `num_experts` of an experts module is what the rank serves, because the implementations count
by it; the sharded weights still know all of them.
"""

from __future__ import annotations

from torch import nn


def num_experts_of(experts: nn.Module) -> int:
    """E of an experts module, over all ranks."""
    if not getattr(experts, "_is_expert_parallel", False):
        return experts.num_experts
    return max(weight.shape[0] for weight in experts.parameters(recurse=False) if weight.ndim == 3)
