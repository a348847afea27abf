"""A routing trace: what the routers of a checkpoint did with every token of a text, on disk, opened without a model.

    trace.json                 what it is of, its layers and domains, and a checksum of every file and of itself
    shard_00000.safetensors    up to some 2^18 tokens of one domain, in the order of the text
        token_ids              (T,) int32
        next_token_ids         (T,) int32, the token that follows in its sequence, -1 after the last
        layer_000.experts      (T, K) uint8, or uint16 for more than 256 experts
        layer_000.probabilities (T, K) float16, router distribution g at these experts } only if they
        layer_000.entropy      (T,) float16, entropy of g over log E                   } were recorded

`RoutingTrace` maps files into memory and reads a layer at a time; a trace that is altered, cut off or unfinished is
refused by name. `TraceWriter` lets a shard appear by one rename, then its record shard_00000.json by another, and
gathers the records into trace.json, which only a finished trace has. `collect_routing` runs a model in eval mode,
without dropout, Sinkhorn balancing or capacity noise. Order and shards depend on the text alone: ranks share the
shards, a killed collection goes on where it was, and traces of two checkpoints line up token by token.

Letters: B sequences, S tokens each, T tokens that count, K experts per token, E routed experts. Source: ours.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_moe_cpt.machine import inner_model, modes_kept
from hf_moe_cpt.reading import SHARD, read_json, reading
from hf_moe_cpt.routing.hooks import LayerRouting, RoutingTap


INDEX = "trace.json"
FORMAT = 1
NO_TOKEN = -1  # what follows the last token of a sequence


@dataclass(frozen=True)
class TraceLayer:
    """An MoE layer of the traced model."""

    name: str  # of its experts, as in named_modules
    num_experts: int  # E
    experts_per_token: int  # K


@dataclass(frozen=True)
class TraceShard:
    """A file of tokens of one domain."""

    file: str
    domain: str
    num_tokens: int
    checksum: str  # SHA-256 of the file
    tokens_checksum: str  # SHA-256 of its token ids, equal in traces of the same text


@dataclass(frozen=True)
class TraceDescription:
    """What a trace is of."""

    model: str
    step: int | None
    layers: tuple[TraceLayer, ...]
    vocab_size: int  # rows of the embedding
    tokenizer: str | None  # SHA-256 of the vocabulary, None if it was not given
    has_probabilities: bool
    settings: dict[str, Any]  # of the collection, for people and for resuming


class RoutingTrace:
    """A finished trace in a folder, opened by `RoutingTrace.open`; reading maps files and keeps none of them."""

    def __init__(self, folder: Path, description: TraceDescription, shards: Sequence[TraceShard]) -> None:
        self.folder = folder
        self.description = description
        self.shards = tuple(shards)

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True) -> RoutingTrace:
        """Open a folder. verify: read every file once to compare its checksum; sizes are always compared.

        Raises ValueError that names the file if the trace is unfinished, altered or not one of ours.
        """
        folder = Path(folder)
        description, shards = read_index(folder)
        trace = cls(folder, description, shards)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda shard: trace._check(shard, verify), trace.shards))
        return trace

    @property
    def layers(self) -> tuple[TraceLayer, ...]:
        """MoE layers in the order in which they run."""
        return self.description.layers

    @property
    def domains(self) -> tuple[str, ...]:
        """Names in the order of the text."""
        return tuple(dict.fromkeys(shard.domain for shard in self.shards))

    def num_tokens(self, domain: str | None = None) -> int:
        """Tokens of a domain, None for all."""
        return sum(shard.num_tokens for shard in self.shards if domain in (None, shard.domain))

    def token_ids(self, shard: TraceShard) -> Tensor:
        """(T,) int32."""
        return self._read(shard, "token_ids")

    def next_token_ids(self, shard: TraceShard) -> Tensor:
        """(T,) int32, -1 where the sequence ends."""
        return self._read(shard, "next_token_ids")

    def experts(self, shard: TraceShard, layer: int) -> Tensor:
        """(T, K) uint8, or int16 for more than 256 experts."""
        return self._read(shard, f"layer_{layer:03d}.experts")

    def probabilities(self, shard: TraceShard, layer: int) -> Tensor:
        """(T, K) float16, the router's distribution at the chosen experts. Raises ValueError if not recorded."""
        self._need_probabilities()
        return self._read(shard, f"layer_{layer:03d}.probabilities")

    def entropy(self, shard: TraceShard, layer: int) -> Tensor:
        """(T,) float16 in [0, 1], entropy of the router's distribution over log E. ValueError if not recorded."""
        self._need_probabilities()
        return self._read(shard, f"layer_{layer:03d}.entropy")

    def top_k_index(self, layer: int, domain: str | None = None) -> Tensor:
        """(T, K) of a whole domain, None for all: memory grows with the tokens."""
        parts = [self.experts(shard, layer) for shard in self.shards if domain in (None, shard.domain)]
        if not parts:
            raise ValueError(f"{self.folder} has no domain {domain!r}: choose from {', '.join(self.domains)}.")
        return torch.cat(parts)

    def _need_probabilities(self) -> None:
        if not self.description.has_probabilities:
            raise ValueError(
                f"{self.folder} holds no router probabilities: collect it again with probabilities=True, or leave "
                "entropy and confidence out."
            )

    def _read(self, shard: TraceShard, name: str) -> Tensor:
        # opened anew for every tensor: pages of a mapped file count as memory of this process as long as it is open
        with safe_open(self.folder / shard.file, framework="np") as file:
            array = file.get_tensor(name)
        return torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array)

    def _check(self, shard: TraceShard, verify: bool) -> None:
        path = self.folder / shard.file
        try:
            if verify and checksum_of_file(path) != shard.checksum:
                raise ValueError(
                    f"{path} is damaged, its checksum differs from the index's: collect this trace again."
                )
            with safe_open(path, framework="np") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error}): collect this trace again.") from error
        wanted = shapes_of_shard(self.description, shard.num_tokens)
        if shapes != wanted:
            wrong = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
            raise ValueError(
                f"{path} does not hold what the index says, {', '.join(wrong[:3])} differ: collect this trace again."
            )


def shapes_of_shard(description: TraceDescription, num_tokens: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a shard."""
    shapes: dict[str, tuple[int, ...]] = {"token_ids": (num_tokens,), "next_token_ids": (num_tokens,)}
    for number, layer in enumerate(description.layers):
        shapes[f"layer_{number:03d}.experts"] = (num_tokens, layer.experts_per_token)
        if description.has_probabilities:
            shapes[f"layer_{number:03d}.probabilities"] = (num_tokens, layer.experts_per_token)
            shapes[f"layer_{number:03d}.entropy"] = (num_tokens,)
    return shapes


def checksum_of_file(path: Path) -> str:
    """SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_of_json(data: dict[str, Any]) -> str:
    """SHA-256 of the sorted, compact text, without the key "checksum"."""
    rest = {key: value for key, value in data.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_index(folder: Path) -> tuple[TraceDescription, list[TraceShard]]:
    """Description and shards that trace.json tells of. ValueError if it is missing, altered or of another format."""
    path = folder / INDEX
    if not path.is_file():
        begun = len(list(folder.glob("shard_*.json"))) if folder.is_dir() else 0
        hint = f"call collect_routing again to complete the {begun} shards that lie there" if begun else "collect one"
        raise ValueError(f"{folder} holds no finished trace, {INDEX} is missing: {hint}.")
    with reading(path, "collect this trace again"):
        data = read_json(path)
        if data["checksum"] != checksum_of_json(data):
            raise ValueError("its checksum differs")
        if data["format"] != FORMAT:
            raise ValueError(f"it has format {data['format']}, and this version reads {FORMAT}")
        description = data["description"]
        layers = tuple(TraceLayer(**layer) for layer in description["layers"])
        shards = [TraceShard(**shard) for shard in data["shards"]]
        outside = next((shard.file for shard in shards if not SHARD.fullmatch(shard.file)), None)
        if outside is not None:
            raise ValueError(f"it names {outside!r}, which is no safetensors file beside it")
        return TraceDescription(**description | {"layers": layers}), shards


BEGUN = "unfinished.json"  # description of the trace that the shards in the folder belong to


class TraceWriter:
    """Shards of one trace in a folder: those that are there already, and new ones."""

    def __init__(self, folder: str | Path, description: TraceDescription) -> None:
        self.folder = Path(folder)
        self.description = description
        self.records: dict[int, TraceShard] = {}

    def begin(self) -> None:
        """Make the folder or take up what is in it. ValueError if it holds a trace of something else."""
        self.folder.mkdir(parents=True, exist_ok=True)
        mine = json.loads(json.dumps(asdict(self.description)))
        for name in (INDEX, BEGUN):
            if (self.folder / name).is_file():
                theirs = read_json(self.folder / name, description=dict)
                theirs = theirs.get("description") if name == INDEX else theirs
                if theirs != mine:
                    raise ValueError(
                        f"{self.folder} holds a trace with another {_first_difference(theirs, mine)}: name another "
                        "folder, or remove this one."
                    )
        if not (self.folder / INDEX).is_file():
            self._write_json(BEGUN, mine)

    def find_finished(self) -> None:
        """Read which shards are there; records of damaged or missing files do not count, so they are made again."""
        if (self.folder / INDEX).is_file():
            found = dict(enumerate(read_index(self.folder)[1]))
        else:
            found = dict(map(_read_record, sorted(self.folder.glob("shard_*.json"))))
        self.records = {
            number: shard
            for number, shard in found.items()
            if (self.folder / shard.file).is_file() and checksum_of_file(self.folder / shard.file) == shard.checksum
        }

    def write(self, number: int, domain: str, arrays: Mapping[str, np.ndarray]) -> TraceShard:
        """Write shard `number`. arrays: by name as `shapes_of_shard` says, of one number of tokens."""
        num_tokens = len(arrays["token_ids"])
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != shapes_of_shard(self.description, num_tokens):
            raise ValueError(f"Shard {number} holds {shapes}, which its description does not ask for.")
        path = self.folder / f"shard_{number:05d}.safetensors"
        unfinished = path.with_suffix(".tmp")
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, unfinished)
        checksum = checksum_of_file(unfinished)
        os.replace(unfinished, path)
        shard = TraceShard(path.name, domain, num_tokens, checksum, checksum_of_tokens(arrays["token_ids"]))
        self._write_json(f"shard_{number:05d}.json", asdict(shard))
        self.records[number] = shard
        return shard

    def finish(self, num_shards: int) -> RoutingTrace:
        """Write the index over all shards, those of other processes too, and open the trace.

        Raises ValueError if a shard is missing.
        """
        if len(self.records) < num_shards:
            self.find_finished()
        if len(self.records) > num_shards:
            raise ValueError(
                f"{self.folder} holds {len(self.records)} shards and the text now makes {num_shards}: pass the same "
                "data in the same order, or name another folder."
            )
        missing = [number for number in range(num_shards) if number not in self.records]
        if missing:
            raise ValueError(
                f"{self.folder} lacks shard {missing[0]} of {num_shards}: call collect_routing again to complete it."
            )
        shards = [asdict(self.records[number]) for number in range(num_shards)]
        data: dict[str, Any] = {"format": FORMAT, "description": asdict(self.description), "shards": shards}
        self._write_json(INDEX, data | {"checksum": checksum_of_json(json.loads(json.dumps(data)))})
        for leftover in [*self.folder.glob("shard_*.json"), *self.folder.glob("*.tmp"), self.folder / BEGUN]:
            leftover.unlink(missing_ok=True)
        return RoutingTrace.open(self.folder, verify=False)

    def _write_json(self, name: str, data: dict[str, Any]) -> None:
        unfinished = self.folder / f".{name}.{os.getpid()}.tmp"
        unfinished.write_text(json.dumps(data, indent=1), encoding="utf-8")
        os.replace(unfinished, self.folder / name)


def _read_record(path: Path) -> tuple[int, TraceShard]:
    """Number and record of a shard that a run wrote to its end."""
    with reading(path, "remove it and start again"):
        return int(path.stem.removeprefix("shard_")), TraceShard(**read_json(path, **get_type_hints(TraceShard)))


def checksum_of_tokens(token_ids: np.ndarray) -> str:
    """SHA-256 of token ids (T,), whatever their type."""
    return hashlib.sha256(np.ascontiguousarray(token_ids, dtype="<i4").tobytes()).hexdigest()


def _first_difference(theirs: dict[str, Any] | None, mine: dict[str, Any]) -> str:
    """Name of the first field that differs, in words for an error."""
    theirs = theirs or {}
    for name, value in mine.items():
        if theirs.get(name) != value:
            if isinstance(value, dict) and isinstance(theirs.get(name), dict):
                return _first_difference(theirs[name], value)
            return f"{name} ({_short(theirs.get(name))}, now {_short(value)})"
    return "description"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class ShardOfText:
    """Sequences of one domain that go into one file."""

    number: int
    domain: str
    sequences: list[np.ndarray]  # each (T,) int32, T >= 1

    def token_ids(self) -> np.ndarray:
        """(T,) int32, in order."""
        return np.concatenate(self.sequences)

    def next_token_ids(self) -> np.ndarray:
        """(T,) int32, the token that follows in the same sequence, -1 after its last."""
        end = np.array([NO_TOKEN], np.int32)
        return np.concatenate([np.concatenate([sequence[1:], end]) for sequence in self.sequences])

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """input_ids and attention_mask (B, S) int64, padded on the right with 0."""
        for begin in range(0, len(self.sequences), batch_size):
            rows = self.sequences[begin : begin + batch_size]
            ids = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(rows):
                ids[place, : len(row)], mask[place, : len(row)] = torch.from_numpy(row), 1
            yield ids, mask


@dataclass(frozen=True)
class CutSettings:
    """How texts become shards."""

    max_length: int
    tokens_per_domain: int | None
    tokens_per_shard: int
    vocab_size: int

    def __post_init__(self) -> None:
        for name in ("max_length", "tokens_per_domain", "tokens_per_shard"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")


def shards_of_text(
    data: Mapping[str, Iterable[Any]], tokenizer: Callable[..., Any] | None, settings: CutSettings
) -> Iterator[ShardOfText]:
    """All shards in order. ValueError for a domain without tokens, rows without ids and ids outside the vocabulary."""
    number = 0
    for domain, rows in data.items():
        first, sequences, num_tokens = number, [], 0
        for sequence in _first_tokens(_pieces(domain, rows, tokenizer, settings), settings.tokens_per_domain):
            sequences.append(sequence)
            num_tokens += len(sequence)
            if num_tokens >= settings.tokens_per_shard:
                yield ShardOfText(number, domain, sequences)
                number, sequences, num_tokens = number + 1, [], 0
        if sequences:
            yield ShardOfText(number, domain, sequences)
            number += 1
        if number == first:
            raise ValueError(f"The domain {domain!r} holds no tokens: give it text, or leave it out.")


def _first_tokens(pieces: Iterator[np.ndarray], limit: int | None) -> Iterator[np.ndarray]:
    """The pieces up to so many tokens, the last one cut; None for all."""
    for piece in pieces:
        if limit is None:
            yield piece
            continue
        yield piece[:limit]
        limit -= len(piece)
        if limit <= 0:
            return


def _pieces(
    domain: str, rows: Iterable[Any], tokenizer: Callable[..., Any] | None, settings: CutSettings
) -> Iterator[np.ndarray]:
    """Sequences of 1 to max_length tokens."""
    for place, row in enumerate(rows):
        for sequence in _sequences_of_row(domain, place, row, tokenizer):
            if len(sequence) and not 0 <= sequence.min() <= sequence.max() < settings.vocab_size:
                wrong = sequence.min() if sequence.min() < 0 else sequence.max()
                raise ValueError(
                    f"Row {place} of {domain!r} holds token id {wrong}, outside [0, {settings.vocab_size}): tokenizer "
                    "and model disagree."
                )
            for begin in range(0, len(sequence), settings.max_length):
                yield sequence[begin : begin + settings.max_length].astype(np.int32)


def _sequences_of_row(domain: str, place: int, row: Any, tokenizer: Callable[..., Any] | None) -> Iterator[np.ndarray]:
    if isinstance(row, Mapping) and "input_ids" in row:
        ids, mask = np.asarray(row["input_ids"]), row.get("attention_mask")
    elif isinstance(row, Mapping) and "text" in row and tokenizer is not None:
        # a text longer than the model's context is cut afterwards, so its length is no warning
        quiet = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}
        ids, mask = np.asarray(tokenizer(row["text"], add_special_tokens=False, **quiet)["input_ids"]), None
    else:
        has = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(
            f"Row {place} of {domain!r} has {has}: it needs input_ids, or text together with tokenizer=..."
        )
    if ids.size == 0:
        return
    if ids.dtype.kind not in "iu" or ids.ndim > 2:
        raise ValueError(
            f"Row {place} of {domain!r} holds input_ids of type {ids.dtype} and shape {ids.shape}: give the integers "
            "of one sequence, or of a padded batch with attention_mask."
        )
    if mask is None:
        yield from np.atleast_2d(ids)
        return
    keep = np.atleast_2d(np.asarray(mask)).astype(bool)
    if keep.shape != np.atleast_2d(ids).shape:
        raise ValueError(f"Row {place} of {domain!r} has an attention_mask {keep.shape} for input_ids {ids.shape}.")
    yield from (sequence[kept] for sequence, kept in zip(np.atleast_2d(ids), keep, strict=True))


def _copy_to_host(routing: Sequence[LayerRouting], mask: Tensor) -> Callable[[], list[np.ndarray]]:
    """Start copying the T rows that count, behind the batch's own kernels; the result waits for that copy alone.

    mask: (B, S) on the host, not 0 for tokens that count. The arrays are in the order of layers, experts,
    probabilities and entropy of each. Whoever asks after starting the next batch finds them done.
    """
    kept = mask.flatten().nonzero().squeeze(1)
    is_full = len(kept) == mask.numel()
    rows_on: dict[torch.device, Tensor] = {}
    copies, events = [], []
    for layer in routing:
        for tensor in (layer.experts, layer.probabilities, layer.entropy):
            if tensor is None:
                continue
            if not is_full:
                if tensor.device not in rows_on:
                    rows_on[tensor.device] = kept.to(tensor.device)
                tensor = tensor.index_select(0, rows_on[tensor.device])
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies.append(pinned.copy_(tensor, non_blocking=True))
    for device in {layer.experts.device for layer in routing if layer.experts.is_cuda}:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        events.append(event)

    def arrays() -> list[np.ndarray]:
        for event in events:
            event.synchronize()
        return [tensor.numpy() for tensor in copies]

    return arrays


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
    inner = inner_model(model)
    vocab_size = inner.get_input_embeddings().weight.shape[0]
    cut = CutSettings(max_length, tokens_per_domain, tokens_per_shard, vocab_size)
    description = TraceDescription(
        model=name or getattr(getattr(inner, "config", None), "_name_or_path", "") or type(inner).__name__,
        step=step,
        layers=_layers_of(model, tap),
        vocab_size=vocab_size,
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
    if num_ranks > 1:
        dist.barrier()
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
    waiting: Callable[[], list[np.ndarray]] | None = None
    run = _forward_of(model)
    with _inference(model), tap.listening():
        for input_ids, mask in shard.batches(batch_size):
            run(input_ids, mask)
            copied = _copy_to_host(tap.take(input_ids.numel()), mask)
            if waiting is not None:
                parts.append(waiting())
            waiting = copied
        parts.append(waiting())
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
    with modes_kept(model), torch.no_grad():
        model.eval()
        yield


def _weights_checksum(model: nn.Module) -> str:
    """SHA-256 of the first numbers of every parameter: training moves them, whatever it trains."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sample = parameter.detach().flatten()[:_SAMPLE_OF_PARAMETER]
        found.update(name.encode())
        if not sample.is_meta:
            found.update(sample.float().cpu().numpy().tobytes())
    return found.hexdigest()


def _rank() -> tuple[int, int]:
    """Rank and number of ranks, 0 and 1 outside of torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


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
