"""Which part of a dense feed-forward block each expert gets, how it is scaled, and how routers start.

E routed experts, K per token, S shared, A = K + S active slots, I width of the dense block, m width of an expert,
G = I / m parts. A slot's part is its number modulo G; the shared experts are slots 0..S-1, the routed ones that a
token sees the rest. If A is a multiple of G, every part is seen A / G times, so each slot must count G / A for the
function to stay what it was. Routers of split blocks send a token to whole groups of experts: the rows of a group are
equal, so its members are chosen together.

Sources: sparse upcycling, arXiv 2212.05055; groups and scales ("virtual groups"), arXiv 2410.07524; the cover by
shared experts, groups that do not divide E, and the scales for our routers: ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig


ROUTER_INITS = ("noise", "zero")


@dataclass(frozen=True)
class ExpertLayout:
    """num_parts: G. part_of_expert (E), shared_parts (S): numbers in 0..G-1. group_size: experts chosen together.

    routed_scale, shared_scale: factors on the output matrices. gates_are_exact: whether the routed weights that the
    scales count on hold for every router, not only for one whose logits are 0.
    """

    num_parts: int
    part_of_expert: tuple[int, ...]
    shared_parts: tuple[int, ...]
    group_size: int
    routed_scale: float
    shared_scale: float
    gates_are_exact: bool

    @property
    def default_router_std(self) -> float:
        """Deviation of the first logits where none is asked for.

        Where gates are exact it costs nothing, and groups that lie far apart are still chosen whole after the first
        updates (docs/upcycle.md); where they are not, it is a price: parts pay some for their groups, copies little.
        """
        if self.gates_are_exact:
            return 1.0
        return 0.01 if self.group_size == 1 else 0.1


def plan_layout(config: CptMoeConfig, dense_width: int) -> ExpertLayout:
    """Divide a dense block of width I among the experts of a configuration.

    Raises ValueError if m does not divide I, if A is no multiple of G, or if E experts cannot be grouped.
    """
    E, K, S = config.num_experts, config.num_experts_per_tok, config.num_shared_experts
    width = config.moe_intermediate_size
    if dense_width % width:
        raise ValueError(
            f"moe_intermediate_size={width} does not divide the dense block's intermediate_size={dense_width}: "
            "choose a divisor."
        )
    num_parts = dense_width // width
    if (K + S) % num_parts:
        raise ValueError(
            f"moe_intermediate_size={width} makes {num_parts} parts of the dense block, which {K + S} active experts "
            f"(num_experts_per_tok={K} + num_shared_experts={S}) cannot cover evenly: choose a multiple of "
            f"{num_parts} active experts, or another width."
        )
    group_size = _group_size(E, K, num_parts)
    each = num_parts / (K + S)
    return ExpertLayout(
        num_parts=num_parts,
        part_of_expert=tuple((S + expert % group_size) % num_parts for expert in range(E)),
        shared_parts=tuple(slot % num_parts for slot in range(S)),
        group_size=group_size,
        routed_scale=each / first_gate(config),
        shared_scale=each,
        gates_are_exact=config.norm_topk_prob or (E == group_size and not _has_sigmoid_gates(config)),
    )


def first_gate(config: CptMoeConfig) -> float:
    """The gate of a chosen expert when all router logits are 0."""
    if config.norm_topk_prob:
        return 1 / config.num_experts_per_tok
    if _has_sigmoid_gates(config):
        return 0.5
    return 1 / config.num_experts


def router_rows(
    layout: ExpertLayout, hidden_size: int, router_init: str, logit_std: float, generator: torch.Generator
) -> torch.Tensor:
    """Router weights (E, H) in float64.

    "noise": normal, with logits of standard deviation logit_std for a token of root-mean-square 1; rows of a group are
    equal. Experts left over when the group size does not divide E get the mean of the rows: a mean is never the
    largest, so step 0 does not choose them. "zero": all 0. Raises ValueError for zeros that would leave it to chance
    which parts of a split block a token sees.
    """
    num_experts, size = len(layout.part_of_expert), layout.group_size
    if router_init == "zero":
        if size > 1 and num_experts > size:
            raise ValueError(
                f"router_init='zero' leaves it to chance which of the {layout.num_parts} parts of the dense block a "
                "token sees: use 'noise' for a split block."
            )
        return torch.zeros(num_experts, hidden_size, dtype=torch.float64)
    num_groups = num_experts // size
    rows = torch.randn(num_groups, hidden_size, generator=generator, dtype=torch.float64)
    rows *= logit_std / hidden_size**0.5
    left_over = rows.mean(dim=0).expand(num_experts - num_groups * size, -1)
    return torch.cat((rows.repeat_interleave(size, dim=0), left_over))


def _has_sigmoid_gates(config: CptMoeConfig) -> bool:
    return config.router_type == "sinkhorn" and config.num_experts_per_tok == 1


def _group_size(num_experts: int, top_k: int, num_parts: int) -> int:
    """Experts that must be chosen together: the parts in turn if K and E hold whole rounds of them, else all K."""
    if top_k % num_parts == 0 and num_experts % num_parts == 0:
        return num_parts
    if num_experts % top_k and num_experts < 2 * top_k:
        raise ValueError(
            f"num_experts={num_experts} is neither a multiple of num_experts_per_tok={top_k} nor at least "
            f"{2 * top_k}: the parts of a split block are chosen in groups of {top_k}; change one of the two."
        )
    return top_k
