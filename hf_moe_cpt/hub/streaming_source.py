"""Read a checkpoint tensor by tensor: safetensors whose names, shapes and wholeness are checked first.

Nothing is kept in memory and a file is open, and mapped, only while one tensor is read from it, so that a model larger
than memory can be rewritten.
Source: ours; the files are read by safetensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from hf_moe_cpt.hub.streaming_hub import locate


WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class _Place:
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class CheckpointReader:
    """The configuration and the tensors that `save_pretrained` wrote, in a folder or in a repository on the Hub.

    name: as it was given; short_name: without the path; folder: where the files are; commit: None for a folder.
    Raises ValueError, in one line, for what is no checkpoint, files that are missing, cut short or damaged, and types
    that are no plain floats; the weights are fetched and checked when the first of them is asked for.
    """

    def __init__(self, source: str | Path, revision: str | None = None) -> None:
        self._location = locate(source, revision)
        self.name, self.short_name = self._location.name, self._location.short_name
        self.folder, self.commit = self._location.folder, self._location.commit
        self.config = _read_config(self.folder, self.name)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name."""
        return {name: place.shape for name, place in self._places.items()}

    def require(self, name: str, shape: tuple[int, ...]) -> torch.dtype:
        """The type of a tensor; raises ValueError if it is missing or its shape is not what the configuration says."""
        if name not in self._places:
            raise ValueError(f"{self.name} has no tensor {name}, which its config.json promises.")
        place = self._places[name]
        if place.shape != tuple(shape):
            raise ValueError(f"{self.name}: {name} has shape {place.shape}, but its config.json means {tuple(shape)}.")
        return place.dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        with safe_open(self._places[name].file, framework="pt") as file:
            return file.get_tensor(name)

    def row(self, name: str, index: int) -> torch.Tensor:
        """Entry `index` of a tensor's first dimension, and no more than that is read: (A, B, ...) -> (B, ...)."""
        with safe_open(self._places[name].file, framework="pt") as file:
            return file.get_slice(name)[index : index + 1][0]

    @cached_property
    def _places(self) -> dict[str, _Place]:
        """Where every tensor is; brings the weights here first."""
        indexed = _indexed_files(self.folder)
        files = sorted(set(indexed.values())) or [WEIGHTS_FILE]
        self._location.fetch(files)
        places: dict[str, _Place] = {}
        for file in files:
            places |= self._read_header(self.folder / file)
        for name, file in indexed.items():
            if name not in places or places[name].file != self.folder / file:
                raise ValueError(
                    f"{self.folder / file} lacks {name}, which {INDEX_FILE} says is in it: fetch the checkpoint again."
                )
        return places

    def _read_header(self, path: Path) -> dict[str, _Place]:
        if not path.is_file():
            raise ValueError(f"{path} is missing: {self.name} is no whole checkpoint in safetensors.")
        places = {}
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    view = file.get_slice(name)
                    if view.get_dtype() not in DTYPES:
                        raise ValueError(
                            f"{path}: {name} has type {view.get_dtype()}, allowed are {', '.join(DTYPES)}: "
                            "save the model unquantised."
                        )
                    places[name] = _Place(path, tuple(view.get_shape()), DTYPES[view.get_dtype()])
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is cut short or damaged ({error}): fetch it again.") from error
        return places


def _read_config(folder: Path, name: str) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name!r} is no checkpoint (no config.json): name a folder of one, or a Hub id (me/model).")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be used: {' '.join(str(error).split())}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{name!r} is quantised: its weights cannot be rewritten; use the original.")
    return config


def _indexed_files(folder: Path) -> dict[str, str]:
    """Tensor name -> file of a sharded checkpoint; empty for one of a single file."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of safetensors: fetch it again.") from error
