"""One pass of any mixture of experts over texts that leaves a routing trace, so that checkpoints are compared later.

Order and shards depend on the text alone: ranks of torch.distributed share the shards, a killed collection goes on
where it was, and traces of two checkpoints line up token by token. The model runs as it does at inference: in eval
mode, so without dropout, without Sinkhorn balancing, without capacity noise.

Letters: B sequences, S tokens each, T tokens that count, K experts per token, E routed experts. Source: ours.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_moe_cpt.analysis.routing_copies import HostCopy, copy_to_host
from hf_moe_cpt.analysis.routing_tap import RoutingTap, inner_model
from hf_moe_cpt.analysis.routing_trace import RoutingTrace, TraceDescription, TraceLayer
from hf_moe_cpt.analysis.token_batches import CutSettings, ShardOfText, shards_of_text
from hf_moe_cpt.analysis.trace_writer import TraceWriter, checksum_of_tokens


DEFAULT_DOMAIN = "text"
_SAMPLE_OF_PARAMETER = 64  # numbers of each parameter by which a resumed collection knows its model


def collect_routing(
    model: nn.Module,
    data: Mapping[str, Iterable[Any]] | Iterable[Any],
    folder: str | Path,
    *,
    name: str | None = None,
    step: int | None = None,
    tokenizer: Callable[..., Any] | None = None,
    batch_size: int = 8,
    max_length: int = 2048,
    tokens_per_domain: int | None = None,
    probabilities: bool = True,
    tokens_per_shard: int = 1 << 18,
    progress: bool = True,
) -> RoutingTrace:
    """Run `model` over `data` and write the routing of every token to `folder`; returns the finished trace.

    model: any MoE causal LM of transformers or of ours, wrapped or with an adapter; it stays on its devices. data:
    domain name -> rows, or rows alone for one domain called "text". A row has input_ids, or text if there is a
    tokenizer (no special tokens are added), or is a padded batch with attention_mask. Padding is not traced.
    name, step: of the checkpoint, for reports; the model's own name if None. tokenizer: also for telling that two
    traces share it. max_length: longer rows are cut into sequences of so many tokens. tokens_per_domain: the first so
    many of each domain, None for all. probabilities: record the router's distribution at the chosen experts and its
    entropy, 2 K + 2 bytes a token and layer beside K for the experts. tokens_per_shard: work lost at most by a kill.

    Called again after a kill with the same arguments it goes on; on a finished trace it only compares the text. With
    torch.distributed every rank must call it with the same arguments and the whole model on its device; the folder is
    shared. Raises ValueError for a dense model, a router that is not found, empty data, a folder of another trace.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    domains = data if isinstance(data, Mapping) and "input_ids" not in data else {DEFAULT_DOMAIN: data}
    if not domains:
        raise ValueError("data holds no domain: pass rows, or a mapping from the names of domains to rows.")
    model = _without_synchronisation(model)
    tap = RoutingTap(model, probabilities)
    cut = CutSettings(max_length, tokens_per_domain, tokens_per_shard, _vocab_size(model))
    description = TraceDescription(
        model=name or _name_of(model),
        step=step,
        layers=_layers_of(model, tap),
        vocab_size=cut.vocab_size,
        tokenizer=tokenizer_checksum(tokenizer),
        has_probabilities=probabilities,
        settings=asdict(cut) | {"domains": list(domains), "weights": _weights_checksum(model)},
    )
    rank, num_ranks = _rank()
    writer = TraceWriter(folder, description)
    _in_turn(rank, writer.begin)
    writer.find_finished()
    num_shards = 0
    with tqdm(unit=" tokens", unit_scale=True, desc="Collecting routing", disable=not progress or rank > 0) as bar:
        for shard in shards_of_text(domains, tokenizer, cut):
            token_ids = shard.token_ids()
            if shard.number in writer.records:
                _check_same_text(writer, shard, token_ids)
            elif shard.number % num_ranks == rank:
                writer.write(shard.number, shard.domain, _trace_shard(model, tap, shard, token_ids, batch_size))
            bar.update(len(token_ids))
            num_shards += 1
    _wait()
    _in_turn(rank, lambda: writer.finish(num_shards))
    return RoutingTrace.open(folder, verify=False)


def tokenizer_checksum(tokenizer: Any) -> str | None:
    """SHA-256 of a tokenizer's vocabulary; None without a tokenizer or for one that does not tell it."""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def _trace_shard(
    model: nn.Module, tap: RoutingTap, shard: ShardOfText, token_ids: np.ndarray, batch_size: int
) -> dict[str, np.ndarray]:
    """The arrays of a shard. The results of a batch are fetched while the next one runs."""
    parts: list[list[np.ndarray]] = []
    waiting: HostCopy | None = None
    run = _forward_of(model)
    with _inference(model), tap.listening():
        for input_ids, mask in shard.batches(batch_size):
            run(input_ids, mask)
            copied = copy_to_host(tap.take(input_ids.numel()), mask)
            if waiting is not None:
                parts.append(waiting.arrays())
            waiting = copied
        parts.append(waiting.arrays())
    arrays = {"token_ids": token_ids, "next_token_ids": shard.next_token_ids()}
    names = [name for number in range(len(tap.layers)) for name in _names_of_layer(number, tap.with_probabilities)]
    small = {f"layer_{number:03d}.experts": layer.num_experts <= 256 for number, layer in enumerate(tap.layers)}
    for place, name in enumerate(names):
        array = np.concatenate([part[place] for part in parts])
        arrays[name] = array.astype(np.uint8 if small[name] else np.uint16) if name in small else array
    return arrays


def _names_of_layer(number: int, with_probabilities: bool) -> list[str]:
    kinds = ("experts", "probabilities", "entropy") if with_probabilities else ("experts",)
    return [f"layer_{number:03d}.{kind}" for kind in kinds]


def _check_same_text(writer: TraceWriter, shard: ShardOfText, token_ids: np.ndarray) -> None:
    record = writer.records[shard.number]
    if (record.domain, record.tokens_checksum) != (shard.domain, checksum_of_tokens(token_ids)):
        raise ValueError(
            f"{writer.folder / record.file} was collected on other text than what came now for {shard.domain!r}: pass "
            "the same data in the same order, or name another folder."
        )


# ---- the model ----


def _layers_of(model: nn.Module, tap: RoutingTap) -> tuple[TraceLayer, ...]:
    """Layers with the K that a pass over two tokens shows."""
    two = torch.tensor([[0, 1]])
    with _inference(model), tap.listening():
        _forward_of(model)(two, torch.ones_like(two))
        heard = tap.take(2)
    return tuple(
        TraceLayer(layer.name, layer.num_experts, routing.experts.shape[1])
        for layer, routing in zip(tap.layers, heard, strict=True)
    )


def _without_synchronisation(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, whose forward passes wait for those of the other ranks."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _name_of(model: nn.Module) -> str:
    inner = inner_model(model)
    return getattr(getattr(inner, "config", None), "_name_or_path", "") or type(inner).__name__


def _vocab_size(model: nn.Module) -> int:
    return inner_model(model).get_input_embeddings().weight.shape[0]


def _forward_of(model: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """Run a batch that lies on the host, asking for as little beside the layers as the model lets one ask for."""
    accepted = inspect.signature(inner_model(model).forward).parameters
    wishes = {"use_cache": False, "logits_to_keep": 1, "output_router_logits": False}
    options = {name: value for name, value in wishes.items() if name in accepted}
    device = inner_model(model).get_input_embeddings().weight.device

    def run(input_ids: Tensor, attention_mask: Tensor) -> None:
        model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), **options)

    return run


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _weights_checksum(model: nn.Module) -> str:
    """SHA-256 of the first numbers of every parameter: training moves them, whatever it trains."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sample = parameter.detach().flatten()[:_SAMPLE_OF_PARAMETER]
        found.update(name.encode())
        if not sample.is_meta:
            found.update(sample.float().cpu().numpy().tobytes())
    return found.hexdigest()


# ---- ranks ----


def _rank() -> tuple[int, int]:
    """Rank and number of ranks, 0 and 1 outside of torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _wait() -> None:
    if _rank()[1] > 1:
        dist.barrier()


def _in_turn(rank: int, act: Callable[[], Any]) -> None:
    """Let rank 0 act while the others wait; what it refuses, all refuse."""
    refusal: list[str | None] = [None]
    if rank == 0:
        try:
            act()
        except ValueError as error:
            if _rank()[1] == 1:
                raise
            refusal = [str(error)]
    if _rank()[1] > 1:
        dist.broadcast_object_list(refusal)
        if refusal[0] is not None:
            raise ValueError(refusal[0])
