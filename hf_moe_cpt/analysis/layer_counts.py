"""One layer of a trace, read once, shard by shard, into tables whose size does not depend on the number of tokens.

Letters: D domains, T tokens, K experts per token, E routed experts, V vocabulary. Source: ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_moe_cpt.analysis.coactivation import CoactivationCounter
from hf_moe_cpt.analysis.domain_specialization import domain_specialization
from hf_moe_cpt.analysis.load_balance import dead_experts, load_cv
from hf_moe_cpt.analysis.router_certainty import router_confidence
from hf_moe_cpt.analysis.routing import load_entropy, max_routing_imbalance_from_load, normalized_imbalance
from hf_moe_cpt.analysis.routing_trace import RoutingTrace
from hf_moe_cpt.analysis.saturation import SaturationCounter
from hf_moe_cpt.analysis.vocabulary import (
    Average,
    VocabularyCounter,
    favourite_experts,
    specialized_tokens,
    vocabulary_specialization_from_counts,
)


ALL = "all"  # stands for all domains together
_SIDES = ("input", "output")


@dataclass(frozen=True)
class LayerSettings:
    """Choices of the analysis."""

    average: Average
    num_top_tokens: int
    min_occurrences: int


@dataclass(frozen=True)
class LayerCounts:
    """What is kept of a layer when its tables are gone."""

    metrics: dict[str, dict[str, Any]]  # domain or "all" -> metric -> value
    saturation: dict[str, float]  # domain or "all"; empty for the first checkpoint
    vocabulary: dict[str, float | None]  # side -> VS with the favourites of the first checkpoint
    favourite: dict[str, Tensor]  # side -> (V,) int16; empty for later checkpoints
    domain_specialization: Tensor  # (D, E)
    coactivation: Tensor | None  # (E, E), None with K = 1
    top_tokens: list[list[tuple[int, float, int]]]  # of each expert, by input token


class _Certainty:
    """Sums of entropy and confidence over the tokens of a domain."""

    def __init__(self) -> None:
        self.entropy = self.confidence = 0.0

    def add(self, entropy: Tensor, probabilities: Tensor) -> None:
        self.entropy += float(entropy.double().sum())
        self.confidence += float(router_confidence(probabilities).double().sum())


def count_layer(
    trace: RoutingTrace,
    layer: int,
    settings: LayerSettings,
    start: RoutingTrace | None = None,
    first: LayerCounts | None = None,
) -> LayerCounts:
    """All metrics of one layer. start, first: trace and counts of the first checkpoint, None if this is the first."""
    shape = trace.layers[layer]
    load = torch.zeros(len(trace.domains), shape.num_experts, dtype=torch.int64)
    kept = {domain: SaturationCounter(shape.experts_per_token) for domain in trace.domains}
    certainty = {domain: _Certainty() for domain in trace.domains}
    pairs = CoactivationCounter(shape.num_experts) if shape.experts_per_token > 1 else None
    vocabulary = {side: VocabularyCounter(trace.description.vocab_size, shape.num_experts) for side in _SIDES}
    for number, shard in enumerate(trace.shards):
        index = trace.experts(shard, layer)
        load[trace.domains.index(shard.domain)] += torch.bincount(index.flatten(), minlength=shape.num_experts)
        vocabulary["input"].add(trace.token_ids(shard), index)
        vocabulary["output"].add(trace.next_token_ids(shard), index)
        if pairs is not None:
            pairs.add(index)
        if start is not None:
            kept[shard.domain].add(start.experts(start.shards[number], layer), index)
        if trace.description.has_probabilities:
            certainty[shard.domain].add(trace.entropy(shard, layer), trace.probabilities(shard, layer))
    tokens = torch.tensor([trace.num_tokens(domain) for domain in trace.domains])
    own = {side: favourite_experts(vocabulary[side].counts).to(torch.int16) for side in _SIDES} if not first else {}
    return LayerCounts(
        metrics=_metrics_by_domain(trace, layer, load, certainty),
        saturation=_saturation_by_domain(kept) if start is not None else {},
        vocabulary={
            side: _specialization(vocabulary[side], (first.favourite if first else own)[side], settings.average)
            for side in _SIDES
        },
        favourite=own,
        domain_specialization=domain_specialization(load, tokens),
        coactivation=None if pairs is None else pairs.conditional(),
        top_tokens=specialized_tokens(
            vocabulary["input"].counts,
            vocabulary["input"].occurrences,
            settings.num_top_tokens,
            settings.min_occurrences,
        ),
    )


def _specialization(vocabulary: VocabularyCounter, favourite: Tensor, average: Average) -> float | None:
    """VS, None if no token counts."""
    value = vocabulary_specialization_from_counts(
        vocabulary.counts, vocabulary.occurrences, favourite=favourite, average=average
    )
    return None if math.isnan(value) else value


def _metrics_by_domain(
    trace: RoutingTrace, layer: int, load: Tensor, certainty: dict[str, _Certainty]
) -> dict[str, dict[str, Any]]:
    rows = dict(zip(trace.domains, load, strict=True)) | {ALL: load.sum(0)}
    shape = trace.layers[layer]
    found = {}
    for domain, counts in rows.items():
        num_tokens = trace.num_tokens(None if domain == ALL else domain)
        parts = [part for name, part in certainty.items() if domain in (ALL, name)]
        mri = float(max_routing_imbalance_from_load(counts.double(), num_tokens))
        recorded = trace.description.has_probabilities
        found[domain] = {
            "load": (counts.double() / counts.sum()).tolist(),
            "mri": mri,
            "mri_normalized": normalized_imbalance(mri, shape.num_experts, shape.experts_per_token),
            "load_entropy": float(load_entropy(counts)),
            "load_cv": float(load_cv(counts)),
            "dead_experts": int(dead_experts(counts)),
            "router_entropy": sum(part.entropy for part in parts) / num_tokens if recorded else None,
            "router_confidence": sum(part.confidence for part in parts) / num_tokens if recorded else None,
        }
    return found


def _saturation_by_domain(kept: dict[str, SaturationCounter]) -> dict[str, float]:
    together = SaturationCounter(next(iter(kept.values())).tokens_by_overlap.numel() - 1)
    for counter in kept.values():
        together.tokens_by_overlap += counter.tokens_by_overlap
    return {domain: counter.saturation() for domain, counter in (kept | {ALL: together}).items()}
