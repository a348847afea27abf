"""The experts of a surgery on a mixture: which of them train, and whether the routers still choose as before.

Source: Zhuang et al. 2025 (SEUF, arXiv 2411.18797) for both; expert_targets.py and routers.py have the formulas.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from hf_moe_cpt.analysis.moe_layers import moe_layers
from hf_moe_cpt.trainers.surgery.expert_targets import (
    ExpertTargets,
    choose_experts,
    expert_affinity,
    train_only_experts,
)
from hf_moe_cpt.trainers.surgery.routers import expert_selections, freeze_routers, overlap_with


logger = logging.getLogger(__name__)

WATCHED_SETS = ("unlearn", "retain")
Batches = Callable[[str], Iterable[Mapping[str, Tensor]]]


def check_expert_settings(model: nn.Module, args: Any) -> None:
    """Raise ValueError for what needs a mixture of experts where there is none, or contradicts itself."""
    wanted = [name for name in ("freeze_router", "router_anchor", "target_experts") if getattr(args, name)]
    if not wanted:
        return
    layers = moe_layers(model)
    if not layers:
        raise ValueError(
            f"{wanted[0]}={getattr(args, wanted[0])} is for mixtures of experts, and {type(model).__name__} has none: "
            "leave it off."
        )
    if args.target_experts and args.unlearn_weight == 0:
        raise ValueError("target_experts are found by what the unlearn set uses: give unlearn_weight a value above 0.")
    available = sum(layer.num_experts for layer in layers)
    if args.target_experts > available:
        raise ValueError(f"target_experts={args.target_experts} must be at most {available}, all experts.")
    if args.freeze_router:
        freeze_routers(model)


def target_experts(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], num: int) -> ExpertTargets:
    """Make the `num` experts that the batches use most, and their routers, all that trains."""
    targets = train_only_experts(model, choose_experts(expert_affinity(model, batches), num))
    logger.info("%d weights of %d experts are trained: %s.", targets.num_trained, num, ", ".join(targets.names))
    return targets


class SelectionWatch:
    """What the experts of each token were before surgery, for the overlap with what they are now."""

    def __init__(self, model: nn.Module, batches: Batches, sets: Iterable[str]) -> None:
        watched = [name for name in WATCHED_SETS if name in sets] if moe_layers(model) else []
        self._batches = batches
        self._before = {name: expert_selections(model, batches(name)) for name in watched}

    def measure(self, model: nn.Module) -> dict[str, float]:
        """`<set>_expert_overlap` in [0, 1], the mean over layers, and `<set>_expert_overlap_min`, the least."""
        found = {}
        for name, before in self._before.items():
            overlap = overlap_with(model, self._batches(name), before)
            found[f"{name}_expert_overlap"] = float(overlap.mean())
            found[f"{name}_expert_overlap_min"] = float(overlap.min())
        return found
