"""What there is to say about the routing of some checkpoints on the same text, from their traces alone.

The result is plain data for reports; docs/routing_analysis.md lists its fields. Layers are worked on one after the
other in a few threads, shard by shard: memory is that of the tables of a layer (V x E) a thread, however many tokens.

Letters: L MoE layers, D domains, T tokens, K experts per token, E routed experts, V vocabulary. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_moe_cpt.routing.metrics import (
    AVERAGES,
    Average,
    CoactivationCounter,
    SaturationCounter,
    VocabularyCounter,
    coactivation_change,
    contiguous_placement,
    dead_experts,
    domain_specialization,
    estimate_placement,
    favourite_experts,
    load_cv,
    load_entropy,
    max_routing_imbalance_from_load,
    normalized_imbalance,
    router_confidence,
    specialized_tokens,
    suggested_placement,
    vocabulary_specialization_from_counts,
)
from hf_moe_cpt.routing.trace import RoutingTrace


FORMAT = 1
DEFAULT_RANKS = 8
ALL = "all"  # stands for all domains together
Shape = tuple[int, int | None]  # E and K of a layer, None where a configuration does not tell K
_SIDES = ("input", "output")


def analyse_traces(
    traces: Mapping[str, RoutingTrace],
    *,
    tokenizer: Any = None,
    training: Sequence[Mapping[str, Any]] = (),
    average: Average = "occurrences",
    num_top_tokens: int = 8,
    min_occurrences: int = 10,
    num_ranks: int | None = None,
    workers: int = 2,
    progress: bool = False,
) -> dict[str, Any]:
    """Compare checkpoints: every metric of each layer, as JSON-able data.

    traces: checkpoint name -> trace, the first is the start that others are compared with; all of the same text cut
    the same way, with the same layers. tokenizer: names the top tokens (convert_ids_to_tokens), ids are shown without.
    training: entries of `imbalance_curve`. average: of vocabulary specialisation. num_top_tokens, min_occurrences: of
    the most specialised tokens of each expert. num_ranks: of the estimate under expert parallelism, None for the
    smaller of 8 and the fewest experts of a layer. workers: threads, each with the tables of one layer.

    Raises ValueError for no trace, and for traces that differ in tokenizer, layers or text.
    """
    if not traces:
        raise ValueError("No trace was given: collect one for every checkpoint first.")
    if average not in AVERAGES:
        raise ValueError(f"average={average!r} is unknown: choose from {', '.join(AVERAGES)}.")
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1.")
    check_comparable(traces)
    start = next(iter(traces.values()))
    fewest = min(layer.num_experts for layer in start.layers)
    num_ranks = min(DEFAULT_RANKS, fewest) if num_ranks is None else num_ranks
    if not 1 <= num_ranks <= fewest:
        raise ValueError(f"num_ranks={num_ranks} must lie in [1, {fewest}], the experts of a layer.")
    count = partial(count_layer, average=average, num_top_tokens=num_top_tokens, min_occurrences=min_occurrences)
    counts = _count_all(traces, count, workers, progress)
    return {
        "format": FORMAT,
        **_described(traces),
        "metrics": {name: _metrics(layers) for name, layers in counts.items()},
        "vocabulary_specialization": {name: _vocabulary(layers, average) for name, layers in counts.items()},
        "domain_specialization": {
            name: [layer.domain_specialization.tolist() for layer in layers] for name, layers in counts.items()
        },
        **_compared(counts, start),
        "top_tokens": {name: _top_tokens(layers, tokenizer) for name, layers in counts.items()},
        "training": [dict(curve) for curve in training],
        "expert_parallel": {name: _expert_parallel(layers, num_ranks) for name, layers in counts.items()},
        "skipped": _skipped(traces),
    }


def check_comparable(traces: Mapping[str, RoutingTrace]) -> None:
    """Raise ValueError unless all traces are of the same tokens through layers of the same shapes."""
    (start_name, start), *others = traces.items()
    if not start.shards:
        raise ValueError(f"The trace of {start_name} is empty: collect it on some text.")
    if ALL in start.domains:
        raise ValueError(f"A domain is called {ALL!r}, which stands for all domains together: rename it.")
    for name, trace in others:
        tokenizers = {start.description.tokenizer, trace.description.tokenizer}
        if None not in tokenizers and len(tokenizers) > 1:
            raise ValueError(
                f"{name} has another tokenizer than {start_name}: only checkpoints that share one compare."
            )
        check_alike({each: shape_of(of_name) for each, of_name in ((start_name, start), (name, trace))})
        if trace.description.vocab_size != start.description.vocab_size:
            raise ValueError(
                f"{name} has {trace.description.vocab_size} embeddings, {start_name} {start.description.vocab_size}: "
                "only checkpoints that share a tokenizer compare."
            )
        texts = [[(shard.domain, shard.tokens_checksum) for shard in each.shards] for each in (start, trace)]
        if texts[0] != texts[1]:
            raise ValueError(
                f"{name} was traced on other text than {start_name}, or on the same text cut in another way: collect "
                "both with the same data, tokenizer, max_length, tokens_per_domain and tokens_per_shard."
            )


def shape_of(trace: RoutingTrace) -> list[Shape]:
    """E and K of each layer."""
    return [(layer.num_experts, layer.experts_per_token) for layer in trace.layers]


def check_alike(shapes: Mapping[str, Sequence[Shape]]) -> None:
    """Raise ValueError unless all checkpoints have layers like the first one's; a K that is None fits any."""
    (first, wanted), *others = shapes.items()
    for name, shape in others:
        if len(shape) != len(wanted) or any(
            mine != theirs and (mine[0] != theirs[0] or None not in (mine[1], theirs[1]))
            for mine, theirs in zip(shape, wanted, strict=True)
        ):
            raise ValueError(
                f"{name} has {_words_of(shape)}, {first} has {_words_of(wanted)}: only checkpoints of one "
                "architecture compare."
            )


def _words_of(shape: Sequence[Shape]) -> str:
    kinds = [f"{e} experts" + (f", {k} a token" if k else "") for e, k in dict.fromkeys(shape)]
    return f"{len(shape)} MoE layers of {'; '.join(kinds)}"


def _count_all(
    traces: Mapping[str, RoutingTrace], count_one: Callable[..., LayerCounts], workers: int, progress: bool
) -> dict[str, list[LayerCounts]]:
    """Layer by layer in threads: what torch and numpy do with big arrays runs side by side."""
    (_, start), *_ = traces.items()
    counts: dict[str, list[LayerCounts]] = {}
    total = len(traces) * len(start.layers)
    with (
        tqdm(total=total, unit=" layers", desc="Analysing routing", disable=not progress) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        first: list[LayerCounts] | None = None
        for name, trace in traces.items():

            def count(layer: int, trace: RoutingTrace = trace, first: list[LayerCounts] | None = first) -> LayerCounts:
                found = count_one(trace, layer, *((start, first[layer]) if first else (None, None)))
                bar.update()
                return found

            counts[name] = list(pool.map(count, range(len(start.layers))))
            first = first or counts[name]
    return counts


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


def count_layer(
    trace: RoutingTrace,
    layer: int,
    start: RoutingTrace | None,
    first: LayerCounts | None,
    *,
    average: Average,
    num_top_tokens: int,
    min_occurrences: int,
) -> LayerCounts:
    """All metrics of one layer, read once, shard by shard, into tables of a size that does not grow with the tokens.

    start, first: trace and counts of the first checkpoint, None if this is the first. The rest: as `analyse_traces`.
    """
    shape = trace.layers[layer]
    load = torch.zeros(len(trace.domains), shape.num_experts, dtype=torch.int64)
    kept = {domain: SaturationCounter(shape.experts_per_token) for domain in trace.domains}
    certainty = {domain: torch.zeros(2, dtype=torch.float64) for domain in trace.domains}
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
            sure = trace.entropy(shard, layer), router_confidence(trace.probabilities(shard, layer))
            certainty[shard.domain] += torch.stack([values.double().sum() for values in sure])
    tokens = torch.tensor([trace.num_tokens(domain) for domain in trace.domains])
    own = {side: favourite_experts(vocabulary[side].counts).to(torch.int16) for side in _SIDES} if not first else {}
    return LayerCounts(
        metrics=_metrics_by_domain(trace, layer, load, certainty),
        saturation=_saturation_by_domain(kept) if start is not None else {},
        vocabulary={
            side: _specialization(vocabulary[side], (first.favourite if first else own)[side], average)
            for side in _SIDES
        },
        favourite=own,
        domain_specialization=domain_specialization(load, tokens),
        coactivation=None if pairs is None else pairs.conditional(),
        top_tokens=specialized_tokens(
            vocabulary["input"].counts, vocabulary["input"].occurrences, num_top_tokens, min_occurrences
        ),
    )


def _specialization(vocabulary: VocabularyCounter, favourite: Tensor, average: Average) -> float | None:
    """VS, None if no token counts."""
    value = vocabulary_specialization_from_counts(
        vocabulary.counts, vocabulary.occurrences, favourite=favourite, average=average
    )
    return None if math.isnan(value) else value


def _metrics_by_domain(
    trace: RoutingTrace, layer: int, load: Tensor, certainty: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    rows = dict(zip(trace.domains, load, strict=True)) | {ALL: load.sum(0)}
    shape = trace.layers[layer]
    found = {}
    for domain, counts in rows.items():
        num_tokens = trace.num_tokens(None if domain == ALL else domain)
        entropy, confidence = sum(part for name, part in certainty.items() if domain in (ALL, name)).tolist()
        mri = float(max_routing_imbalance_from_load(counts.double(), num_tokens))
        recorded = trace.description.has_probabilities
        found[domain] = {
            "load": (counts.double() / counts.sum()).tolist(),
            "mri": mri,
            "mri_normalized": normalized_imbalance(mri, shape.num_experts, shape.experts_per_token),
            "load_entropy": float(load_entropy(counts)),
            "load_cv": float(load_cv(counts)),
            "dead_experts": int(dead_experts(counts)),
            "router_entropy": entropy / num_tokens if recorded else None,
            "router_confidence": confidence / num_tokens if recorded else None,
        }
    return found


def _saturation_by_domain(kept: dict[str, SaturationCounter]) -> dict[str, float]:
    together = SaturationCounter(next(iter(kept.values())).tokens_by_overlap.numel() - 1)
    for counter in kept.values():
        together.tokens_by_overlap += counter.tokens_by_overlap
    return {domain: counter.saturation() for domain, counter in (kept | {ALL: together}).items()}


def _described(traces: Mapping[str, RoutingTrace]) -> dict[str, Any]:
    """What was compared."""
    start = next(iter(traces.values()))
    return {
        "checkpoints": [
            {
                "name": name,
                "model": trace.description.model,
                "step": trace.description.step,
                "num_tokens": trace.num_tokens(),
            }
            for name, trace in traces.items()
        ],
        "domains": list(start.domains),
        "layers": [asdict(layer) for layer in start.layers],
    }


def _compared(counts: Mapping[str, Sequence[LayerCounts]], start: RoutingTrace) -> dict[str, Any]:
    """Co-activation of every checkpoint, its change and saturation of every one but the first."""
    first, *_ = counts.values()
    later = dict(list(counts.items())[1:])
    matrices = changes = None
    if _has_pairs(start):
        matrices = {name: [layer.coactivation.tolist() for layer in layers] for name, layers in counts.items()}
        changes = {
            name: [coactivation_change(a.coactivation, b.coactivation) for a, b in zip(first, layers, strict=True)]
            for name, layers in later.items()
        }
    return {
        "coactivation": matrices,
        "coactivation_change": changes,
        "saturation": {
            name: {domain: [layer.saturation[domain] for layer in layers] for domain in (*start.domains, ALL)}
            for name, layers in later.items()
        },
    }


def _has_pairs(trace: RoutingTrace) -> bool:
    return all(layer.experts_per_token > 1 for layer in trace.layers)


def _vocabulary(layers: Sequence[LayerCounts], average: Average) -> dict[str, Any]:
    """Both sides by layer; None where no token follows another."""
    sides = {side: [layer.vocabulary[side] for layer in layers] for side in ("input", "output")}
    return sides | {"average": average}


def _metrics(layers: Sequence[LayerCounts]) -> dict[str, dict[str, Any]]:
    """By domain, then by metric, then by layer."""
    domains = layers[0].metrics
    return {
        domain: {
            metric: None if domains[domain][metric] is None else [layer.metrics[domain][metric] for layer in layers]
            for metric in domains[domain]
        }
        for domain in domains
    }


def _top_tokens(layers: Sequence[LayerCounts], tokenizer: Any) -> list[list[list[dict[str, Any]]]]:
    names: dict[int, str] = {}
    name_of: Callable[[int], str] = str if tokenizer is None else lambda token: _name(tokenizer, token)
    found = []
    for layer in layers:
        for tokens in layer.top_tokens:
            names.update({token: name_of(token) for token, _, _ in tokens if token not in names})
        found.append(
            [
                [{"token": names[token], "share": share, "count": count} for token, share, count in tokens]
                for tokens in layer.top_tokens
            ]
        )
    return found


def _name(tokenizer: Any, token: int) -> str:
    """What a reader sees: the decoded text, or the raw token where decoding leaves nothing or half a character."""
    text = tokenizer.decode([token])
    if text and "\ufffd" not in text:
        return text
    return str(tokenizer.convert_ids_to_tokens([token])[0])


def _expert_parallel(layers: Sequence[LayerCounts], num_ranks: int) -> dict[str, Any]:
    loads = [layer.metrics[ALL]["load"] for layer in layers]
    usual = [estimate_placement(load, contiguous_placement(len(load), num_ranks), num_ranks) for load in loads]
    better = [estimate_placement(load, suggested_placement(load, num_ranks), num_ranks) for load in loads]
    return {
        "num_ranks": num_ranks,
        "contiguous": {"max_load": [e.max_load for e in usual], "slowdown": [e.slowdown for e in usual]},
        "suggested": {
            "max_load": [e.max_load for e in better],
            "slowdown": [e.slowdown for e in better],
            "placement": [e.placement for e in better],
        },
    }


def _skipped(traces: Mapping[str, RoutingTrace]) -> dict[str, str]:
    """Part of the dictionary -> why it is empty."""
    skipped = {}
    if not _has_pairs(next(iter(traces.values()))):
        skipped["coactivation"] = "Each token visits a single expert (K = 1), so no two experts share a token."
    bare = [name for name, trace in traces.items() if not trace.description.has_probabilities]
    if bare:
        skipped["router_entropy"] = f"The traces of {', '.join(bare)} were collected without router probabilities."
    if len(traces) == 1:
        skipped["saturation"] = "There is one checkpoint only: saturation compares a later one with the first."
    return skipped
