"""A routing trace on disk: what the routers of a checkpoint did with every token of a text, opened without a model.

    trace.json                 what it is of, its layers and domains, and a checksum of every file and of itself
    shard_00000.safetensors    up to some 2^18 tokens of one domain, in the order of the text
        token_ids              (T,) int32
        next_token_ids         (T,) int32, the token that follows in its sequence, -1 after the last
        layer_000.experts      (T, K) uint8, or uint16 for more than 256 experts
        layer_000.probabilities (T, K) float16, router distribution g at these experts } only if they
        layer_000.entropy      (T,) float16, entropy of g over log E                   } were recorded

Files are mapped into memory and read a layer at a time. A trace that is altered, cut off or unfinished is refused by
name before anything is read. trace_writer.py writes. Letters: T tokens, K experts per token, E experts. Source: ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


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

    def as_json(self) -> dict[str, Any]:
        """Plain data that `from_json` reads."""
        return asdict(self) | {"layers": [asdict(layer) for layer in self.layers]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TraceDescription:
        """The description written by `as_json`."""
        return cls(**data | {"layers": tuple(TraceLayer(**layer) for layer in data["layers"])})


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
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["checksum"] != checksum_of_json(data):
            raise ValueError("its checksum differs")
        if data["format"] != FORMAT:
            raise ValueError(f"it has format {data['format']}, and this version reads {FORMAT}")
        return TraceDescription.from_json(data["description"]), [TraceShard(**shard) for shard in data["shards"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or no index of a trace ({error}): collect this trace again.") from error
