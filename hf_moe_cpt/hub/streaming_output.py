"""Write a planned checkpoint shard by shard into a folder that appears whole or not at all.

Memory holds one shard and the piece that is being computed. Everything goes into a hidden neighbour of the output
folder, which gets its name in the last step; an error removes it, and a killed run leaves it to be deleted.
Source: ours; the files are written by safetensors, the shards cut by huggingface_hub.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from tqdm.auto import tqdm

from hf_moe_cpt.hub.streaming_hub import COMPANIONS
from hf_moe_cpt.hub.streaming_plan import PlannedTensor
from hf_moe_cpt.hub.streaming_source import INDEX_FILE


MAX_SHARD_SIZE = "5GB"
_PARTIAL = ".partial"
_SPARE_BYTES = 32 * 2**20  # tokenizer, code and whatever the disk itself needs


def check_output(output_dir: str | Path, source: Path) -> Path:
    """The output folder; raises ValueError if it is in use or lies inside the checkpoint that is read."""
    output = Path(output_dir).absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output_dir {str(output_dir)!r} is in use: name a new or an empty folder.")
    if source.resolve() in output.resolve().parents:
        raise ValueError(f"--output_dir {str(output_dir)!r} lies inside the checkpoint {str(source)!r}: name another.")
    return output


def check_disk_space(output: Path, num_bytes: int) -> None:
    """Raise ValueError if the disk of the output folder cannot hold so much."""
    parent = next(folder for folder in output.parents if folder.exists())
    free, needed = shutil.disk_usage(parent).free, num_bytes + _SPARE_BYTES
    if free < needed:
        raise ValueError(
            f"--output_dir {str(output)!r} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free: "
            f"make room{''.join(f', such as by deleting {path}' for path in leftovers(output)[:1])}."
        )


def leftovers(output: Path) -> list[Path]:
    """Folders in which earlier runs towards this output were killed."""
    return sorted(output.parent.glob(f".{output.name}.*{_PARTIAL}"))


@contextmanager
def appearing_whole(output: Path) -> Iterator[Path]:
    """A folder to write into; it becomes `output` if the block ends well and is removed if it does not."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.{uuid.uuid4().hex}{_PARTIAL}"
    partial.mkdir()
    try:
        yield partial
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_weights(folder: Path, plan: Sequence[PlannedTensor], max_shard_size: int | str = MAX_SHARD_SIZE) -> None:
    """Compute and store all tensors, in files of at most max_shard_size ("5GB", or bytes) unless one is larger."""
    planned = {tensor.name: tensor for tensor in plan}
    on_meta = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in planned.items()}
    split = split_torch_state_dict_into_shards(on_meta, max_shard_size=max_shard_size)
    with tqdm(total=len(planned), desc="tensors", disable=None) as progress:
        for file, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = _filled(planned[name])
                progress.update()
            save_file(shard, folder / file, metadata={"format": "pt"})
            del shard
            _to_disk(folder / file)
    if split.is_sharded:
        total = sum(tensor.num_bytes for tensor in planned.values())
        index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copy tokenizer, generation settings and licence; returns the names."""
    found = sorted({path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()})
    for path in found:
        shutil.copyfile(path, folder / path.name)
    return [path.name for path in found]


def _filled(planned: PlannedTensor) -> torch.Tensor:
    value = torch.empty(planned.shape, dtype=planned.dtype)
    start = 0
    for piece in planned.pieces():
        value[start : start + len(piece)] = piece
        start += len(piece)
    if start != planned.shape[0]:
        raise RuntimeError(f"{planned.name}: {start} of {planned.shape[0]} rows were made.")
    return value


def _to_disk(path: Path) -> None:
    """Wait until the file is on the disk: a full one may say so only now."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
