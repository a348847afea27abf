"""Values of the experts that a dense feed-forward block becomes: parts, noise, partial re-initialisation, scale.

E experts, S shared ones, m width of an expert, H hidden size. Every random number follows from the seed, the layer,
the expert and the matrix alone, so an upcycling can be repeated anywhere. Source: arXiv 2502.19261 (drop-upcycling).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hf_moe_cpt.hub.streaming_plan import scaled
from hf_moe_cpt.hub.upcycle_layout import ROUTER_INITS, ExpertLayout


@dataclass(frozen=True)
class UpcycleOptions:
    """What may differ between experts at step 0; the defaults keep the dense model's function.

    router_init: "noise" or "zero"; router_std: of the logits of a token of root-mean-square 1, None for the layout's
    default. expert_noise: standard deviation of what is added to routed experts, as a multiple of the matrix's own.
    drop_ratio: share in [0, 1] of each routed expert's intermediate dimensions that is drawn anew.
    """

    router_init: str = "noise"
    router_std: float | None = None
    expert_noise: float = 0.0
    drop_ratio: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.router_init not in ROUTER_INITS:
            raise ValueError(f"router_init={self.router_init!r} is unknown: choose one of {', '.join(ROUTER_INITS)}.")
        if self.router_std is not None and not self.router_std > 0:
            raise ValueError(f"router_std={self.router_std} must be above 0; for none use router_init='zero'.")
        if self.expert_noise < 0:
            raise ValueError(f"expert_noise={self.expert_noise} must be at least 0.")
        if not 0 <= self.drop_ratio <= 1:
            raise ValueError(f"drop_ratio={self.drop_ratio} must lie in [0, 1]; 0.5 is the paper's choice.")

    @property
    def changes_experts(self) -> bool:
        """Whether experts differ from the parts of the dense block."""
        return self.expert_noise > 0 or self.drop_ratio > 0


def generator_of(*words: object) -> torch.Generator:
    """A random generator that follows from the words alone."""
    digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def gate_up_pieces(
    gate: torch.Tensor, up: torch.Tensor, layout: ExpertLayout, options: UpcycleOptions, layer: int
) -> Iterator[torch.Tensor]:
    """Dense gate and up (I, H) -> for each expert (1, 2m, H)."""
    for expert, part in enumerate(layout.part_of_expert):
        halves = (
            changed(rows_of(dense, part, layout), 0, name, options, layer, expert)
            for name, dense in (("gate", gate), ("up", up))
        )
        yield torch.cat(tuple(halves))[None]


def down_pieces(
    down: torch.Tensor, layout: ExpertLayout, options: UpcycleOptions, layer: int
) -> Iterator[torch.Tensor]:
    """Dense down (H, I) -> for each expert (1, H, m), scaled."""
    for expert, part in enumerate(layout.part_of_expert):
        columns = rows_of(down.T, part, layout).T
        yield scaled(changed(columns, 1, "down", options, layer, expert), layout.routed_scale)[None]


def rows_of(weight: torch.Tensor, part: int, layout: ExpertLayout) -> torch.Tensor:
    """Part `part` of a tensor's first dimension, I -> m."""
    return weight.chunk(layout.num_parts)[part]


def changed(
    weight: torch.Tensor, dimension: int, name: str, options: UpcycleOptions, layer: int, expert: int
) -> torch.Tensor:
    """One matrix of an expert with noise and with a share of its intermediate `dimension` drawn anew.

    The three matrices of an expert drop the same intermediate dimensions. What is drawn has the mean and the standard
    deviation of what it replaces.
    """
    if not options.changes_experts:
        return weight
    value = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    generator = generator_of(options.seed, "expert", layer, expert, name)
    if options.expert_noise > 0:
        noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        value += noise * (options.expert_noise * weight.to(value.dtype).std(correction=0))
    width = weight.shape[dimension]
    if num_dropped := round(options.drop_ratio * width):
        index = torch.randperm(width, generator=generator_of(options.seed, "drop", layer, expert))[:num_dropped]
        old = weight.to(value.dtype).index_select(dimension, index)
        fresh = torch.randn(old.shape, generator=generator, dtype=value.dtype)
        value.index_copy_(dimension, index, old.mean() + old.std(correction=0) * fresh)
    return value.to(weight.dtype)
