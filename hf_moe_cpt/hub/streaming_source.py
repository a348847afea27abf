"""Read a checkpoint tensor by tensor: a folder of safetensors whose names, shapes and wholeness are checked first.

Nothing is kept in memory and a file is open, and mapped, only while one tensor is read from it, so that a model larger
than memory can be rewritten.
Source: ours; the files are read by safetensors.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig


WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class CheckpointReader:
    """The configuration and the tensors of a folder that `save_pretrained` wrote.

    config: the configuration. shapes, dtypes: of every tensor by name. Raises ValueError, in one line, for a folder
    that is no checkpoint, files that are missing, cut short or damaged, and types that are no plain floats.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = _read_config(self.folder)
        self.file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        indexed = _indexed_files(self.folder)
        for path in sorted(set(indexed.values())) if indexed else [self.folder / WEIGHTS_FILE]:
            self._read_header(path)
        for name, path in indexed.items():
            if self.file_of.get(name) != path:
                raise ValueError(f"{path} lacks {name}, which {INDEX_FILE} says is in it: fetch the checkpoint again.")

    def require(self, name: str, shape: tuple[int, ...]) -> torch.dtype:
        """The type of a tensor; raises ValueError if it is missing or its shape is not what the configuration says."""
        if name not in self.shapes:
            raise ValueError(f"{self.folder} has no tensor {name}, which its config.json promises.")
        if self.shapes[name] != tuple(shape):
            raise ValueError(
                f"{self.folder}: {name} has shape {self.shapes[name]}, but its config.json means {tuple(shape)}."
            )
        return self.dtypes[name]

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        with safe_open(self.file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def row(self, name: str, index: int) -> torch.Tensor:
        """Entry `index` of a tensor's first dimension, and no more than that is read: (A, B, ...) -> (B, ...)."""
        with safe_open(self.file_of[name], framework="pt") as file:
            return file.get_slice(name)[index : index + 1][0]

    def _read_header(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"{path} is missing: {self.folder} is no whole checkpoint in safetensors.")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    view = file.get_slice(name)
                    if view.get_dtype() not in DTYPES:
                        raise ValueError(
                            f"{path}: {name} has type {view.get_dtype()}, allowed are {', '.join(DTYPES)}: "
                            "save the model unquantised."
                        )
                    self.file_of[name] = path
                    self.shapes[name] = tuple(view.get_shape())
                    self.dtypes[name] = DTYPES[view.get_dtype()]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is cut short or damaged ({error}): fetch it again.") from error


def _read_config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} is no checkpoint folder (no config.json): name one, or fetch it first.")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be used: {' '.join(str(error).split())}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{str(folder)!r} is quantised: its weights cannot be rewritten; use the original.")
    return config


def _indexed_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file of a sharded checkpoint; empty for one of a single file."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no index of safetensors: fetch it again.") from error
    return {name: folder / file for name, file in weight_map.items()}
