"""The model before surgery, which anchors and some forget losses compare with: three ways behind one interface.

    copy      a frozen second model: exact, and all its weights stay in memory
    adapter   the base under a PEFT adapter, which is switched off for the pass: exact, and costs no memory
    cache     the states of every row, on disk, and a copy of the head: exact up to rounding, no pass while training

Whatever the trained model's mode, the reference is in evaluation mode, draws no random numbers and gets no gradient.

Layout of the cache: <folder>/<set>-<key>/states-<number>.safetensors; a shard holds the states of consecutive rows,
their tokens one after the other. The key is a hash of the model's weights and configuration, its precision, and the
tokens of all rows, and every shard names it, with a checksum of what it holds: a cache of another model or of other
rows is never read, a new one is made beside it, and a damaged shard is made anew. A shard appears whole or not at
all, so a killed run goes on after its last one; one run at a time may write. What a kernel rounds otherwise on another
device is not in the key.

Letters: B sequences, S tokens of the longest, H hidden size, T = B S; n tokens of a shard; L MoE layers, E experts.
Source: ours.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.logging import tqdm

from hf_moe_cpt.machine import modes_kept
from hf_moe_cpt.trainers.surgery.chunked import (
    CHUNK_TOKENS,
    LanguageHead,
    causal_lm_of,
    check_vocabulary,
    head_of,
    run_model,
    token_logp,
)
from hf_moe_cpt.trainers.surgery.data import RENAMED, WINNER
from hf_moe_cpt.trainers.surgery.experts import RouterTap, router_probs
from hf_moe_cpt.trainers.surgery.losses import ForgetLoss, PairLoss
from hf_moe_cpt.trainers.surgery.surgery_config import ANCHOR_SETS


logger = logging.getLogger(__name__)

FORMAT = 2
HELD_OUT = "held_out"  # rows of an anchor that are measured and not trained on
SHARD_BYTES = 64 * 2**20
# What a configuration says about where a model came from and who asked for it, not about what it computes.
_NO_MATTER = ("_name_or_path", "transformers_version", "use_cache", "architectures", "output_router_logits")
_NO_MATTER += ("distributed_config",)

States = dict[str, Tensor]
StatesOf = Callable[[dict[str, Tensor]], States]  # a batch (B, S) on the device -> (B, S, ...) each
Batch = Mapping[str, Tensor]
Rows = Mapping[str, Sequence[Sequence[int]]]  # token ids of the rows of each set that is compared
# An adapter that moves states by less, relative to the largest, changes nothing: DoRA's norms are not exact.
ADAPTER_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
HALF_TOLERANCE = 0.02


class Reference(ABC):
    """What a surgery asks of the model before it. Every answer is without gradient."""

    chunk_tokens: int
    head: LanguageHead  # makes logits of `hidden`

    @abstractmethod
    def hidden(self, batch: Batch, name: str) -> Tensor:
        """Hidden states (B, S, H) after the final norm of a batch of the set `name`; at padding they mean nothing."""

    @abstractmethod
    def router_probs(self, batch: Batch, name: str) -> list[Tensor]:
        """What the routers made of a batch, of each MoE layer (T, E); only of a reference built with them."""

    @torch.no_grad()
    def token_logp(self, batch: Batch, name: str) -> Tensor:
        """Log-probability (B, S - 1) in nats of tokens 1 to S - 1."""
        return token_logp(self.hidden(batch, name), self.head, batch["input_ids"], self.chunk_tokens)


class LiveReference(Reference):
    """A model that runs: a frozen copy, or the base of the trained model itself with its adapter switched off."""

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        *,
        is_adapter: bool = False,
        with_routers: bool = False,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self.model, self.accelerator, self.is_adapter, self.chunk_tokens = model, accelerator, is_adapter, chunk_tokens
        self._tap = RouterTap(model) if with_routers else None
        self._heard: tuple[Tensor, list[Tensor]] | None = None  # of the last pass, until it is asked for

    @property
    def head(self) -> LanguageHead:
        """The original head, also where the adapter trains one of its own."""
        with self._before():
            return head_of(self.model).detached()

    @torch.no_grad()
    def hidden(self, batch: Batch, name: str) -> Tensor:
        """One pass of the model; `name` does not matter."""
        listening = nullcontext() if self._tap is None else self._tap.record()
        with self._before(), self.accelerator.autocast(), listening as logits:
            states = run_model(self.model, batch)
        if logits is not None:
            self._heard = batch["input_ids"], router_probs(logits)
        return states

    @torch.no_grad()
    def router_probs(self, batch: Batch, name: str) -> list[Tensor]:
        """Of the pass that `hidden` has just made of this batch, or of one of its own."""
        if self._heard is None or self._heard[0] is not batch["input_ids"]:
            self.hidden(batch, name)
        (_, probs), self._heard = self._heard, None
        return probs

    def _before(self) -> AbstractContextManager[None]:
        return adapter_off(self.model) if self.is_adapter else nullcontext()


class CachedReference(Reference):
    """States that were computed before step 1; batches say with `row` (B,) which rows of their set they hold."""

    def __init__(
        self,
        states: Mapping[str, RowStates],
        head: LanguageHead,
        num_routers: int = 0,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self.states, self.head, self.num_routers, self.chunk_tokens = dict(states), head, num_routers, chunk_tokens

    def hidden(self, batch: Batch, name: str) -> Tensor:
        """The states of the batch's rows, 0 at padding. Raises ValueError if the batch holds other tokens."""
        return self._of(name).read("hidden", batch)

    def router_probs(self, batch: Batch, name: str) -> list[Tensor]:
        """The distributions of the batch's rows, 0 at padding."""
        layers = [self._of(name).read(f"router_{place}", batch) for place in range(self.num_routers)]
        return [layer.flatten(0, 1) for layer in layers]

    def _of(self, name: str) -> RowStates:
        if name not in self.states:
            raise ValueError(f"The reference cache holds {', '.join(self.states)}, not {name}: use reference='copy'.")
        return self.states[name]


def build_reference(
    kind: str,
    model: nn.Module,
    rows: Rows,
    accelerator: Accelerator,
    folder: str | Path,
    *,
    given: nn.Module | None = None,
    fingerprint: str | None = None,
    with_routers: bool = False,
    batch_size: int = 8,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Reference | None:
    """The reference of a surgery on `model`, which has not begun; None if no set is compared with one.

    kind: "copy", "adapter", "cache", or "auto": adapter where PEFT has an adapter that changes nothing yet, else
    cache. rows: of `compared_rows`. folder: of the cache. given: another model than `model` as the reference.
    fingerprint: `weights_fingerprint` of the reference without an adapter, from a caller that has it already.
    with_routers: `router_probs` will be asked for. batch_size: rows of a pass that fills the cache.

    All ranks must call it: each computes a share of the cache and reads all of it. Raises ValueError for a kind that
    does not fit, a reference with another vocabulary, and a disk that cannot hold the cache.
    """
    if not rows:
        return None
    if given is not None:
        check_vocabulary(model, given)
    options = {"with_routers": with_routers, "chunk_tokens": chunk_tokens}
    kind = _resolve(kind, model, given)
    if kind == "adapter":
        return LiveReference(model, accelerator, is_adapter=True, **options)
    if kind == "copy":
        frozen = copy.deepcopy(model) if given is None else given
        frozen = placed(frozen.eval().requires_grad_(False), accelerator.device)
        return LiveReference(frozen, accelerator, **options)
    source = model if given is None else given
    home = causal_lm_of(source).device
    with modes_kept(source):
        placed(source.eval(), accelerator.device)
        try:
            weights = None if hasattr(source, "peft_config") else fingerprint
            weights = weights or weights_fingerprint(source)
            return _cached(source, rows, accelerator, Path(folder), batch_size, weights, **options)
        finally:
            placed(source, home)


def compared_rows(
    sets: Mapping[str, Dataset],
    losses: Mapping[str, ForgetLoss | PairLoss],
    held_out: Mapping[str, Dataset] | None = None,
) -> dict[str, Any]:
    """Token ids of the rows of every set that is compared with a reference, by the name that a batch is looked up by.

    sets: tokenised sets with a term. losses: forget losses by set. held_out: rows of anchors that are only measured.
    Winners are `<set>/winner`, copies `<set>/renamed`, what is held out `<set>/held_out`.
    """
    needed = [name for name in sets if name in ANCHOR_SETS or (name in losses and losses[name].needs_reference)]
    rows = {name: sets[name]["input_ids"] for name in needed}
    roles = [(name, role) for name in needed for role in (WINNER, RENAMED)]
    rows |= {f"{name}/{HELD_OUT}": apart["input_ids"] for name, apart in (held_out or {}).items()}
    paired = [(name, role) for name, role in roles if f"{role}_input_ids" in sets[name].column_names]
    return rows | {f"{name}/{role}": sets[name][f"{role}_input_ids"] for name, role in paired}


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The base of a PEFT model in evaluation mode; modules_to_save are the original ones in here.

    PEFT switches the gradient of all its weights on again afterwards, of frozen ones too: that is undone.
    """
    with modes_kept(model):
        model.eval()
        with model.disable_adapter():
            yield


def _resolve(kind: str, model: nn.Module, given: nn.Module | None) -> str:
    has_adapter = hasattr(model, "disable_adapter")
    if kind == "adapter" and not has_adapter:
        raise ValueError(
            f"reference='adapter' needs a PEFT model, not a {type(model).__name__}: pass peft_config, or choose copy "
            "or cache."
        )
    if kind == "adapter" and given is not None:
        raise ValueError("reference='adapter' is the base of the model itself: leave ref_model out, or choose copy.")
    if kind == "auto" and (given is not None or not has_adapter):
        return "cache"
    if kind in ("auto", "adapter") and not _adapter_is_new(model):
        if kind == "auto":
            return "cache"
        logger.warning("The adapter changes the model before step 1: reference='adapter' compares with its base.")
    return "adapter" if kind == "auto" else kind


@torch.no_grad()
def _adapter_is_new(model: nn.Module) -> bool:
    """Whether base and adapter make the same states as the base alone, tried on four tokens."""
    inner = causal_lm_of(model)
    tokens = torch.arange(4, device=inner.device)[None] % inner.get_input_embeddings().weight.shape[0]
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with modes_kept(model):
        model.eval()
        now = run_model(model, batch)
    with adapter_off(model):
        base = run_model(model, batch)
    limit = ADAPTER_TOLERANCE.get(base.dtype, HALF_TOLERANCE) * float(base.abs().max())
    return torch.allclose(now.float(), base.float(), rtol=0.0, atol=limit)


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on a device, unless its parts are where an engine put them."""
    inner = causal_lm_of(model)
    is_spread = getattr(inner, "hf_device_map", None) is not None
    is_spread = is_spread or any(
        isinstance(weight, DTensor) for weight in inner.parameters()
    )  # where the engine put them
    return model if is_spread or inner.device == device else model.to(device)


def _cached(
    model: nn.Module,
    rows: Rows,
    accelerator: Accelerator,
    folder: Path,
    batch_size: int,
    weights: str,
    with_routers: bool,
    chunk_tokens: int,
) -> CachedReference:
    """The reference whose states `model`, in evaluation mode on its device, has on disk or makes now."""
    tap = RouterTap(model) if with_routers else None

    @torch.no_grad()
    def states_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with accelerator.autocast(), nullcontext() if tap is None else tap.record() as logits:
            found = {"hidden": run_model(model, batch)}
        shape = batch["input_ids"].shape
        for place, probs in enumerate(router_probs(logits or ())):
            found[f"router_{place}"] = probs.view(*shape, -1)
        return found

    made_by = {"weights": weights, "mixed_precision": accelerator.mixed_precision}
    is_sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    states = fill_states(states_of, rows, accelerator, folder, made_by, batch_size, together=is_sharded)
    weight, bias, form = head_of(model).detached()
    head = LanguageHead(weight.clone(), None if bias is None else bias.clone(), form)
    return CachedReference(states, head, len(tap.layers) if tap is not None else 0, chunk_tokens)


class RowStates:
    """The states of every row of one set; those of a batch are read from disk when they are asked for."""

    def __init__(self, folder: Path, key: str, tokens: Sequence[Tensor], bytes_per_token: int) -> None:
        self.folder, self.key, self.tokens, self.bytes_per_token = folder, key, list(tokens), bytes_per_token
        self.shards = _split([len(row) for row in tokens], max(1, SHARD_BYTES // bytes_per_token))
        self._shard_of = [number for number, rows in enumerate(self.shards) for _ in rows]
        lengths = ([len(tokens[row]) for row in rows] for rows in self.shards)
        self._start_of = [start for shard in lengths for start in accumulate(shard[:-1], initial=0)]
        self._open: dict[int, Any] = {}

    def missing(self, read_back: bool = False, rank: int = 0, num_ranks: int = 1) -> list[int]:
        """Numbers of the shards, of those that fall to a rank, that are not there as they should be.

        read_back: also compare what they hold with the checksum that was written with them.
        """
        mine = range(rank, len(self.shards), num_ranks)
        return [number for number in mine if not self._is_whole(number, read_back)]

    def num_tokens(self, shard: int) -> int:
        """n, the tokens of all rows of a shard."""
        return sum(len(self.tokens[row]) for row in self.shards[shard])

    def write(self, shard: int, states: States) -> None:
        """Keep the states (n, ...) of a shard, whole or not at all."""
        path = self._path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        states = {name: value.contiguous() for name, value in states.items()}
        save_file(states, partial, {"key": self.key, "crc32": str(_checksum(states))})
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)

    def read(self, kind: str, batch: Mapping[str, Tensor]) -> Tensor:
        """States (B, S, ...) of a batch's rows on its device, 0 at padding, which is on the right.

        batch["row"]: the rows' numbers, a list, so that the host need not wait for a device. Raises ValueError for
        rows that are not here, and on the CPU, where it costs nothing to look, for other tokens than theirs.
        """
        ids, result = batch["input_ids"], None
        for place, row in enumerate(self._rows_of(batch)):
            states = self._read_row(kind, row)
            if result is None:
                result = states.new_zeros(*ids.shape, *states.shape[1:])
                result = result.pin_memory() if ids.is_cuda else result
            result[place, : len(states)] = states
        return result.to(ids.device, non_blocking=True)

    def _rows_of(self, batch: Mapping[str, Any]) -> list[int]:
        if "row" not in batch:
            raise ValueError("A batch without `row` cannot be found in the reference cache: use reference='copy'.")
        ids = batch["input_ids"]
        for place, row in enumerate(batch["row"]):
            is_known = 0 <= row < len(self.tokens) and len(self.tokens[row]) <= ids.shape[1]
            if is_known and not ids.is_cuda:
                own = ids[place][batch["attention_mask"][place].bool()]
                is_known = torch.equal(own, self.tokens[row].to(own.dtype))
            if not is_known:
                raise ValueError(
                    f"Row {row} of a batch does not hold the tokens that {self.folder.name} was made of: measure "
                    "other rows with reference='copy'."
                )
        return batch["row"]

    def _read_row(self, kind: str, row: int) -> Tensor:
        number = self._shard_of[row]
        if number not in self._open:
            self._open[number] = safe_open(self._path(number), framework="pt")
        start = self._start_of[row]
        return self._open[number].get_slice(kind)[start : start + len(self.tokens[row])]

    def _is_whole(self, number: int, read_back: bool) -> bool:
        path = self._path(number)
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                shape = file.get_slice("hidden").get_shape()
                facts = file.metadata() or {}
                is_ours = facts.get("key") == self.key and shape[0] == self.num_tokens(number)
                if is_ours and not read_back:
                    return True
                if is_ours and facts.get("crc32") == str(_checksum({k: file.get_tensor(k) for k in file.keys()})):
                    return True
        except (OSError, SafetensorError):
            pass
        logger.warning("%s is damaged or not what its name says: it is made anew.", path)
        return False

    def _path(self, number: int) -> Path:
        return self.folder / f"states-{number:05d}.safetensors"


def _checksum(states: States) -> int:
    """CRC-32 of the bytes of all states, in the order of their names."""
    checksum = 0
    for name in sorted(states):
        checksum = zlib.crc32(states[name].flatten().view(torch.uint8).numpy(), checksum)
    return checksum


def fill_states(
    states_of: StatesOf,
    rows: Mapping[str, Sequence[Sequence[int]]],
    accelerator: Accelerator,
    folder: Path,
    made_by: Mapping[str, Any],
    batch_size: int,
    together: bool = False,
) -> dict[str, RowStates]:
    """The states of every set, after what is missing was made; every rank makes a share of the files.

    together: the model is sharded, so that its ranks meet in every pass: all make every file and one writes it.

    rows: token ids by set. made_by: what, besides the rows, decides the states. Raises ValueError for a disk that
    cannot hold what is missing, and if the ranks do not see each other's files.
    """
    one = states_of(
        {
            name: torch.ones(1, 2, dtype=torch.long, device=accelerator.device)
            for name in ("input_ids", "attention_mask")
        }
    )
    bytes_per_token = sum(value[0, 0].numel() * value.element_size() for value in one.values())
    facts = {"format": FORMAT, **made_by, "states": {name: [str(v.dtype), *v.shape[2:]] for name, v in one.items()}}
    found = {name: _row_states(folder, name, facts, tokens, bytes_per_token) for name, tokens in rows.items()}
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    gaps = [[name, number] for name in found for number in found[name].missing(True, rank, num_ranks)]
    gaps = sorted(gather_object(gaps)) if num_ranks > 1 else gaps  # of what all have read, each its share
    jobs = [(found[name], number) for name, number in gaps]
    _require_space(folder, sum(states.num_tokens(number) * bytes_per_token for states, number in jobs))
    own = [
        (place % num_ranks == rank, *job) for place, job in enumerate(jobs) if together or place % num_ranks == rank
    ]
    for is_writer, states, number in tqdm(own, "Reference states", disable=not (own and accelerator.is_main_process)):
        made = _states_of_shard(states_of, states, number, batch_size, accelerator.device)
        if is_writer:
            states.write(number, made)
    accelerator.wait_for_everyone()
    if any(states.missing() for states in found.values()):
        raise ValueError(
            f"Ranks do not see each other's files in {str(folder)!r}: set reference_cache_dir to a folder that all "
            "of them share, or use reference='copy'."
        )
    return found


def weights_fingerprint(model: nn.Module, with_adapter: bool = True) -> str:
    """Hash of the configuration and of every weight and buffer of a causal LM, the same on all ranks.

    with_adapter: also of those of a PEFT adapter; without, it is that of what the adapter was put on.
    """
    inner = causal_lm_of(model)
    adapters = () if with_adapter else tuple(getattr(model, "peft_config", ()))
    config = json.loads(inner.config.to_json_string())
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps({k: v for k, v in config.items() if k not in _NO_MATTER}, sort_keys=True).encode())
    for name, value in (*inner.named_parameters(), *inner.named_buffers()):
        if any(f".{adapter}." in f"{name}." for adapter in adapters):
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        copied = whole.detach().to("cpu", copy=True)  # NumPy keeps what it sees from being freed, as engines do
        digest.update(copied.contiguous().flatten().view(torch.uint8).numpy())
    return broadcast_object_list([digest.hexdigest()])[0]


def _row_states(
    folder: Path, name: str, facts: Mapping[str, Any], rows: Sequence[Sequence[int]], bytes_per_token: int
) -> RowStates:
    tokens = [torch.as_tensor(row, dtype=torch.int32) for row in rows]
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    for row in tokens:
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(row.numpy())
    key = digest.hexdigest()
    return RowStates(folder / f"{name.replace('/', '_')}-{key[:16]}", key, tokens, bytes_per_token)


def _states_of_shard(
    states_of: StatesOf, states: RowStates, number: int, batch_size: int, device: torch.device
) -> States:
    """States (n, ...) of a shard in the order of its rows; rows of like length share a pass."""
    rows = sorted(states.shards[number], key=lambda row: len(states.tokens[row]))
    parts: dict[str, dict[int, Tensor]] = {}
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        found = states_of(_padded([states.tokens[row] for row in chosen], device))
        for name, values in found.items():
            for row, value in zip(chosen, values, strict=True):
                parts.setdefault(name, {})[row] = value[: len(states.tokens[row])].cpu()
    return {name: torch.cat([by_row[row] for row in states.shards[number]]) for name, by_row in parts.items()}


def _padded(tokens: Sequence[Tensor], device: torch.device) -> dict[str, Tensor]:
    ids = pad_sequence([row.long() for row in tokens], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in tokens])[:, None]
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}


def _split(lengths: Sequence[int], most_tokens: int) -> list[range]:
    """Consecutive rows by shard: as many as fit, at least one."""
    shards, start, held = [], 0, 0
    for row, length in enumerate(lengths):
        if row > start and held + length > most_tokens:
            shards.append(range(start, row))
            start, held = row, 0
        held += length
    return [*shards, range(start, len(lengths))] if lengths else []


def _require_space(folder: Path, needed: int) -> None:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"The reference cache needs {needed / 1e9:.2f} GB and {str(folder)!r} has {free / 1e9:.2f} GB free: free "
            "space, set reference_cache_dir to another folder, or use reference='copy'."
        )
