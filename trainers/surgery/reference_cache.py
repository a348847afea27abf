"""States of the model before surgery on disk, one entry for each row of a set, made once and never altered.

Layout: <folder>/<set>-<key>/states-<number>.safetensors; a shard holds the states of consecutive rows, their tokens
one after the other. The key is a hash of the model's weights and configuration, its precision, and the tokens of all
rows, and every shard names it: a cache of another model or of other rows is never read, a new one is made beside it,
and a damaged shard is made anew. A shard appears whole or not at all, so a killed run goes on after its last one; one
run at a time may write. What a kernel rounds otherwise on another device is not in the key.
Letters: B sequences, S tokens of the longest, n tokens of a shard. Source: ours.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from hf_moe_cpt.trainers.surgery.model_pass import causal_lm_of


logger = logging.getLogger(__name__)

FORMAT = 1
SHARD_BYTES = 64 * 2**20
# What a configuration says about where a model came from and who asked for it, not about what it computes.
_NO_MATTER = ("_name_or_path", "transformers_version", "use_cache", "architectures", "output_router_logits")
_NO_MATTER += ("distributed_config",)

States = dict[str, Tensor]
StatesOf = Callable[[dict[str, Tensor]], States]  # a batch (B, S) on the device -> (B, S, ...) each


class RowStates:
    """The states of every row of one set; those of a batch are read from disk when they are asked for."""

    def __init__(self, folder: Path, key: str, tokens: Sequence[Tensor], bytes_per_token: int) -> None:
        self.folder, self.key, self.tokens, self.bytes_per_token = folder, key, list(tokens), bytes_per_token
        self.shards = _split([len(row) for row in tokens], max(1, SHARD_BYTES // bytes_per_token))
        self._shard_of = [number for number, rows in enumerate(self.shards) for _ in rows]
        self._start_of = [start for rows in self.shards for start in _starts([len(tokens[row]) for row in rows])]
        self._open: dict[int, Any] = {}

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there as they should be."""
        return [number for number in range(len(self.shards)) if not self._is_whole(number)]

    def num_tokens(self, shard: int) -> int:
        """n, the tokens of all rows of a shard."""
        return sum(len(self.tokens[row]) for row in self.shards[shard])

    def write(self, shard: int, states: States) -> None:
        """Keep the states (n, ...) of a shard, whole or not at all."""
        path = self._path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        save_file({name: value.contiguous() for name, value in states.items()}, partial, {"key": self.key})
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

    def _is_whole(self, number: int) -> bool:
        path = self._path(number)
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                shape = file.get_slice("hidden").get_shape()
                if (file.metadata() or {}).get("key") == self.key and shape[0] == self.num_tokens(number):
                    return True
        except (OSError, SafetensorError):
            pass
        logger.warning("%s is damaged or not what its name says: it is made anew.", path)
        return False

    def _path(self, number: int) -> Path:
        return self.folder / f"states-{number:05d}.safetensors"


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
    one = states_of({name: torch.ones(1, 2, dtype=torch.long, device=accelerator.device) for name in _INPUTS})
    bytes_per_token = sum(value[0, 0].numel() * value.element_size() for value in one.values())
    facts = {"format": FORMAT, **made_by, "states": {name: [str(v.dtype), *v.shape[2:]] for name, v in one.items()}}
    found = {name: _row_states(folder, name, facts, tokens, bytes_per_token) for name, tokens in rows.items()}
    jobs = [(states, number) for states in found.values() for number in states.missing()]
    _require_space(folder, sum(states.num_tokens(number) * bytes_per_token for states, number in jobs))
    accelerator.wait_for_everyone()  # all have seen the same gaps
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
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


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of the configuration and of every weight and buffer of a causal LM, the same on all ranks."""
    inner = causal_lm_of(model)
    config = json.loads(inner.config.to_json_string())
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps({k: v for k, v in config.items() if k not in _NO_MATTER}, sort_keys=True).encode())
    for name, value in (*inner.named_parameters(), *inner.named_buffers()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        digest.update(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return broadcast_object_list([digest.hexdigest()])[0]


_INPUTS = ("input_ids", "attention_mask")


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
    shape = len(tokens), max(len(row) for row in tokens)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for place, row in enumerate(tokens):
        ids[place, : len(row)], mask[place, : len(row)] = row, 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _split(lengths: Sequence[int], most_tokens: int) -> list[range]:
    """Consecutive rows by shard: as many as fit, at least one."""
    shards, start, held = [], 0, 0
    for row, length in enumerate(lengths):
        if row > start and held + length > most_tokens:
            shards.append(range(start, row))
            start, held = row, 0
        held += length
    return [*shards, range(start, len(lengths))] if lengths else []


def _starts(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)][:-1]


def _require_space(folder: Path, needed: int) -> None:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"The reference cache needs {needed / 1e9:.2f} GB and {str(folder)!r} has {free / 1e9:.2f} GB free: free "
            "space, set reference_cache_dir to another folder, or use reference='copy'."
        )
