"""One layer of a trace, read once, shard by shard, into tables whose size does not depend on the number of tokens.

Letters: D domains, T tokens, K experts per token, E routed experts, V vocabulary. Source: ours.

Everything there is to say about the routing of some checkpoints on the same text, from their traces alone.

The result is plain data for reports, docs/routing_analysis.md lists its fields. Layers are worked on one after the
other in a few threads, shard by shard: memory is that of the tables of a layer (V x E) a thread, however many tokens.

Letters: L MoE layers, D domains, T tokens, K experts per token, E routed experts, V vocabulary. Source: ours.

From checkpoints to traces: everything is checked before a weight is read, then one model after the other reads.

Layout of the output folder: traces/<name>/ (a routing trace each), then the report. Source: ours.

MRI by training step from the logs of our trainers and of RouterMonitorCallback: trainer_state.json in, curves out.

Source: ours; what recovery means is said in `hf_moe_cpt.routing.metrics`.
"""

from __future__ import annotations

import gc
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_moe_cpt.data.text import load_text_dataset
from hf_moe_cpt.machine import choose_device
from hf_moe_cpt.routing.hooks import layers_to_watch
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
    imbalance_curve,
    load_cv,
    load_entropy,
    max_routing_imbalance_from_load,
    normalized_imbalance,
    router_confidence,
    specialized_tokens,
    suggested_placement,
    vocabulary_specialization_from_counts,
)
from hf_moe_cpt.routing.trace import BEGUN, INDEX, RoutingTrace, collect_routing, tokenizer_checksum


if TYPE_CHECKING:
    from hf_moe_cpt.scripts.analyze import CheckpointArguments, TextArguments


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


FORMAT = 1
DEFAULT_RANKS = 8


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
    settings = LayerSettings(average, num_top_tokens, min_occurrences)
    counts = _count_all(traces, settings, workers, progress)
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
        shapes = [[(layer.num_experts, layer.experts_per_token) for layer in each.layers] for each in (start, trace)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name} has {_words_of(shapes[1])}, {start_name} has {_words_of(shapes[0])}: only checkpoints of one "
                "architecture compare."
            )
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


def _words_of(shape: list[tuple[int, int]]) -> str:
    kinds = ", ".join(f"{k} of {e} experts" for e, k in dict.fromkeys(shape))
    return f"{len(shape)} MoE layers with {kinds}"


def _count_all(
    traces: Mapping[str, RoutingTrace], settings: LayerSettings, workers: int, progress: bool
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
                found = count_layer(trace, layer, settings, start if first else None, first[layer] if first else None)
                bar.update()
                return found

            counts[name] = list(pool.map(count, range(len(start.layers))))
            first = first or counts[name]
    return counts


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


_NAMED = re.compile(r"([^=/\\]+)=(.+)", re.DOTALL)
Shape = tuple[int, int | None]  # E and K of a layer, None where the configuration does not tell K
ALL_TEXT = "all"  # what the analysis calls all kinds together


@dataclass(frozen=True)
class Checkpoint:
    """A model or a finished trace, and what it is called in tables."""

    name: str
    path: str
    is_trace: bool


class Tracing:
    """The traces of all checkpoints on the same text; what cannot work raises ValueError before anything is run."""

    def __init__(self, models: CheckpointArguments, text: TextArguments, folder: Path) -> None:
        self.models, self.text, self.folder = models, text, folder
        self.checkpoints = named_checkpoints(models.checkpoints or [])
        to_run = [checkpoint for checkpoint in self.checkpoints if not checkpoint.is_trace]
        kinds = named_texts(text.data or [])
        if to_run and not kinds:
            raise ValueError("--data is needed to run a model: give --data NAME=PATH, or finished traces only.")
        self.state = PartialState(cpu=models.device == "cpu")
        self.device = choose_device(models.device) if self.state.num_processes == 1 else self.state.device
        self.is_main_process = self.state.is_main_process
        self.opened = {each.name: RoutingTrace.open(each.path) for each in self.checkpoints if each.is_trace}
        configs = {checkpoint.name: self._config(checkpoint) for checkpoint in to_run}
        self.tokenizer = self._common_tokenizer(to_run)
        self._check_tokenizer_of_traces()
        self._check_architectures(configs)
        self.data = {name: self._rows(paths) for name, paths in kinds.items()} if to_run else {}

    def traces(self) -> dict[str, RoutingTrace]:
        """By name of the checkpoint, in order."""
        found = {}
        for checkpoint in self.checkpoints:
            found[checkpoint.name] = self.opened.get(checkpoint.name) or self._trace(checkpoint)
        return found

    def check_ranks(self, num_ranks: int | None) -> None:
        """Raise ValueError for more ranks than the smallest layer has experts."""
        if num_ranks is not None and num_ranks > self.fewest_experts:
            raise ValueError(
                f"--num_ranks {num_ranks} must lie in [1, {self.fewest_experts}], the experts of a layer."
            )

    def _trace(self, checkpoint: Checkpoint) -> RoutingTrace:
        if self.is_main_process:
            print(f"{checkpoint.name}: {checkpoint.path}", flush=True)
        model = self._load(checkpoint)
        window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or self.text.max_length
        trace = collect_routing(
            model,
            self.data,
            self.folder / "traces" / re.sub(r"[^\w.-]+", "-", checkpoint.name),
            name=checkpoint.path,
            tokenizer=self.tokenizer,
            batch_size=self.text.batch_size,
            max_length=min(self.text.max_length, window),
            tokens_per_domain=self.text.tokens_per_domain,
            probabilities=self.text.router_probabilities,
        )
        del model
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return trace

    def _load(self, checkpoint: Checkpoint) -> PreTrainedModel:
        chosen = {name: getattr(self.models, name) for name in ("attn_implementation", "experts_implementation")}
        options: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
        device_map = self.models.device_map
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=self.models.dtype,
            trust_remote_code=self.models.trust_remote_code,
            **({} if device_map is None else {"device_map": device_map}),
            **options,
        )
        return model if device_map is not None else model.to(self.device)

    # ---- checks ----

    def _common_tokenizer(self, to_run: Sequence[Checkpoint]) -> PreTrainedTokenizerBase | None:
        """The one given, or the first model's if all share it; None if there is nothing to run."""
        given = self.models.tokenizer_name_or_path
        if given is not None:
            return self._tokenizer(given)
        first: PreTrainedTokenizerBase | None = None
        for checkpoint in to_run:
            tokenizer = self._tokenizer(checkpoint.path)
            if first is None:
                first = tokenizer
            elif tokenizer_checksum(tokenizer) != tokenizer_checksum(first):
                raise ValueError(
                    f"{checkpoint.name} has another tokenizer than {to_run[0].name}: only checkpoints that share one "
                    "compare."
                )
        return first

    def _tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=self.models.trust_remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name} has no tokenizer that loads ({_first_line(error)}): give --tokenizer_name_or_path."
            ) from error

    def _config(self, checkpoint: Checkpoint) -> PretrainedConfig:
        try:
            return AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=self.models.trust_remote_code)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{checkpoint.path!r} is neither a finished trace nor a model, here or on the Hub "
                f"({_first_line(error)}): check the spelling."
            ) from error

    def _check_tokenizer_of_traces(self) -> None:
        """Refuse traces of another vocabulary than that of the tokenizer which names the tokens."""
        for name, trace in self.opened.items() if self.tokenizer is not None else ():
            if trace.description.tokenizer not in (None, tokenizer_checksum(self.tokenizer)):
                raise ValueError(
                    f"The trace {name} has another tokenizer than {self.tokenizer.name_or_path}: only checkpoints "
                    "that share one compare."
                )

    def _check_architectures(self, configs: Mapping[str, PretrainedConfig]) -> None:
        """Refuse dense models and different shapes, on models without weights."""
        shapes: dict[str, list[Shape]] = {}
        for name in (checkpoint.name for checkpoint in self.checkpoints):
            if name in self.opened:
                shapes[name] = [(layer.num_experts, layer.experts_per_token) for layer in self.opened[name].layers]
                continue
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    configs[name], trust_remote_code=self.models.trust_remote_code
                )
            top_k = getattr(configs[name].get_text_config(), "num_experts_per_tok", None)
            top_k = top_k if isinstance(top_k, int) else None
            try:
                shapes[name] = [(layer.num_experts, top_k) for layer in layers_to_watch(model)]
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        self.fewest_experts = min(num_experts for shape in shapes.values() for num_experts, _ in shape)
        first = self.checkpoints[0].name
        for name, shape in shapes.items():
            if not _are_alike(shape, shapes[first]):
                raise ValueError(
                    f"{name} has {_words(shape)}, {first} has {_words(shapes[first])}: only checkpoints of one "
                    "architecture compare."
                )

    def _rows(self, paths: Sequence[str]) -> datasets.Dataset:
        """Documents with the column input_ids or text."""
        source = paths[0] if len(paths) == 1 else list(paths)
        with self.state.main_process_first():
            found = load_text_dataset(source, split=self.text.data_split, text_column=self.text.text_column)
        column = self.text.text_column
        return found.rename_column(column, "text") if column != "text" and column in found.column_names else found


def named_checkpoints(words: Sequence[str]) -> list[Checkpoint]:
    """From PATH or NAME=PATH; a name that is not given is as much of the path's end as tells the checkpoints apart."""
    if not words:
        raise ValueError(
            "No checkpoint was given: hf-moe-cpt analyze CHECKPOINT [CHECKPOINT ...] --data NAME=PATH ..."
        )
    split = [_NAMED.fullmatch(word) if not Path(word).exists() else None for word in words]
    paths = [match[2] if match else word for match, word in zip(split, words, strict=True)]
    parts = [Path(path).parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-depth:]) for part in parts]
        names = [match[1] if match else end for match, end in zip(split, ends, strict=True)]
        if len(set(names)) == len(names):
            break
    else:
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Two checkpoints are called {twice!r}: name them, as in start={paths[0]}.")
    return [Checkpoint(name, path, _is_trace(Path(path))) for name, path in zip(names, paths, strict=True)]


def _is_trace(folder: Path) -> bool:
    """Whether it holds a trace, finished or not: an unfinished one is refused as such when it is opened."""
    return any((folder / name).is_file() for name in (INDEX, BEGUN, "shard_00000.safetensors"))


def named_texts(words: Sequence[str]) -> dict[str, list[str]]:
    """From NAME=PATH; paths of one name are read one after the other."""
    found: dict[str, list[str]] = {}
    for word in words:
        match = _NAMED.fullmatch(word)
        if match is None:
            raise ValueError(f"--data {word!r} has no name: give NAME=PATH, such as english={word.strip('=')}.")
        if match[1] == ALL_TEXT:
            raise ValueError(f"--data {word!r}: the name {ALL_TEXT!r} stands for all kinds together; choose another.")
        found.setdefault(match[1], []).append(match[2])
    return found


def _are_alike(one: Sequence[Shape], other: Sequence[Shape]) -> bool:
    """Whether layers have as many experts, and each token as many of them where both tell."""
    return len(one) == len(other) and all(
        mine[0] == theirs[0] and (mine[1] == theirs[1] or None in (mine[1], theirs[1]))
        for mine, theirs in zip(one, other, strict=True)
    )


def _words(shape: Sequence[Shape]) -> str:
    kinds = [f"{e} experts" + (f", {k} a token" if k else "") for e, k in dict.fromkeys(shape)]
    return f"{len(shape)} MoE layers of {'; '.join(kinds)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


STATE_FILE = "trainer_state.json"
_LAYER = re.compile(r"mri/layer_(\d+)")


def training_curves(runs: Sequence[str], shift_step: int | None) -> list[dict[str, Any]]:
    """An entry of "training" for each of `runs`, which are RUN, NAME=RUN or NAME=BEFORE,AFTER.

    RUN: a folder with trainer_state.json, in it or in its newest checkpoint, or such a file. Steps of AFTER count on
    from the end of BEFORE, where the data changes; shift_step is for runs that are a single one. Raises ValueError
    for a log without MRI of layers.
    """
    curves = []
    for run in runs:
        name, _, paths = run.rpartition("=")
        parts = [_imbalance_of(path) for path in paths.split(",")]
        if len({len(layers) for _, layers, _ in parts}) > 1:
            raise ValueError(f"--log_history {run!r} joins runs of models with different numbers of MoE layers.")
        steps, layers = [], [[] for _ in parts[0][1]]
        shift, offset = shift_step, 0
        for place, (own_steps, own_layers, _) in enumerate(parts):
            if place == 1:
                shift = offset + 1
            steps += [offset + step for step in own_steps]
            for layer, values in zip(layers, own_layers, strict=True):
                layer += values
            offset = steps[-1]
        label = name or Path(paths.split(",")[-1]).name
        curves.append(imbalance_curve(label, steps, layers, ideal=parts[0][2], shift_step=shift))
    return curves


def _imbalance_of(run: str) -> tuple[list[int], list[list[float]], float]:
    """Steps, MRI of each layer at each of them, and the ideal K/E as the mean over layers."""
    path = _state_of(run)
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--log_history: {path} is no state of a trainer: {error}.") from error
    entries = {entry["step"]: entry for entry in history if "mri/layer_00" in entry}  # the last one of a step
    if not entries:
        raise ValueError(
            f"--log_history: {path} holds no MRI of layers: train with CPTTrainer, or add RouterMonitorCallback."
        )
    steps = sorted(entries)
    first = entries[steps[0]]
    keys = sorted((key for key in first if _LAYER.fullmatch(key)), key=lambda key: int(_LAYER.fullmatch(key)[1]))
    ideals = [first[key] / first[key.replace("mri/", "mri_normalized/")] for key in keys]
    return steps, [[entries[step][key] for step in steps] for key in keys], round(sum(ideals) / len(ideals), 9)


def _state_of(run: str) -> Path:
    folder = Path(run).expanduser()
    if folder.is_file():
        return folder
    found = [path for path in folder.glob(f"checkpoint-*/{STATE_FILE}") if path.parent.name[11:].isdigit()]
    newest = sorted(found, key=lambda path: int(path.parent.name[11:]))[-1:]
    path = next((path for path in (folder / STATE_FILE, *newest) if path.is_file()), None)
    if path is None:
        raise ValueError(f"--log_history {run!r} has no {STATE_FILE}: name the output folder of a trainer.")
    return path
