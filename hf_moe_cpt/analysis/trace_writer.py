"""Write a routing trace shard by shard, so that a killed collection goes on where it was and never looks finished.

A shard appears by one rename, then its record shard_00000.json by another; `finish` gathers the records into the index
trace.json, which only a finished trace has. Several processes may write shards of one trace on a shared disk, each its
own. What a shard holds: routing_trace.py. Source: ours.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from hf_moe_cpt.analysis.routing_trace import (
    FORMAT,
    INDEX,
    RoutingTrace,
    TraceDescription,
    TraceShard,
    checksum_of_file,
    checksum_of_json,
    read_index,
    shapes_of_shard,
)


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
        mine = json.loads(json.dumps(self.description.as_json()))
        for name in (INDEX, BEGUN):
            if (self.folder / name).is_file():
                theirs = self._read_json(name)
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
            found = {
                int(path.stem.removeprefix("shard_")): TraceShard(**self._read_json(path.name))
                for path in sorted(self.folder.glob("shard_*.json"))
            }
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
        data: dict[str, Any] = {"format": FORMAT, "description": self.description.as_json(), "shards": shards}
        self._write_json(INDEX, data | {"checksum": checksum_of_json(json.loads(json.dumps(data)))})
        for leftover in [*self.folder.glob("shard_*.json"), *self.folder.glob("*.tmp"), self.folder / BEGUN]:
            leftover.unlink(missing_ok=True)
        return RoutingTrace.open(self.folder, verify=False)

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            data = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder / name} is damaged ({error}): remove it and start again.") from error
        if not isinstance(data, dict):
            raise ValueError(f"{self.folder / name} is damaged (no object): remove it and start again.")
        return data

    def _write_json(self, name: str, data: dict[str, Any]) -> None:
        unfinished = self.folder / f".{name}.{os.getpid()}.tmp"
        unfinished.write_text(json.dumps(data, indent=1), encoding="utf-8")
        os.replace(unfinished, self.folder / name)


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
