"""Which checkpoints are whole, whether an output folder may be used, and whether the disk can hold what will come.

A checkpoint is whole when every file of its list is there (checkpoint_manifest.py). One without a list, which others
wrote, is whole when `trainer_state.json`, the last file that the Trainer writes, parses and names the step of its
folder, and every safetensors file opens (its header is checked against the size of the file). What a killed process
left unfinished fails this test or lies in `_unfinished`; it is never resumed from. Source: ours.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hf_moe_cpt.trainers.instruments.checkpoint_manifest import damaged_file, incomplete_file, read_manifest


logger = logging.getLogger(__name__)

CHECKPOINT_FOLDER = re.compile(r"^checkpoint-(\d+)$")
UNFINISHED = "_unfinished"  # folder in the output folder with what is being written or removed
HEARTBEATS = "_heartbeats"  # folder in the output folder where ranks tell that they live
NEWEST = ("last", "auto", "True", "true")
BYTES_PER_MOMENT_PAIR = 8  # Adam keeps two float32 numbers per trained parameter


def is_whole(checkpoint: Path) -> bool:
    """Whether all files of `checkpoint` are there, of the right size; their contents are not read."""
    match = CHECKPOINT_FOLDER.match(checkpoint.name)
    try:
        manifest = read_manifest(checkpoint)
        if manifest is not None and incomplete_file(checkpoint, manifest) is not None:
            return False
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        for weights in checkpoint.glob("*.safetensors") if manifest is None else ():
            with safe_open(weights, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return match is None or state.get("global_step") == int(match[1])


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders of a run, whole or not, oldest step first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if CHECKPOINT_FOLDER.match(path.name)]
    return sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]))


def last_whole_checkpoint(output_dir: str | Path, before: float = math.inf, read_back: bool = False) -> Path | None:
    """The newest checkpoint, of a step below `before`, that was written to its end, or None.

    read_back: also read it and compare checksums. What is passed over is said in one line each.
    """
    for path in reversed(checkpoints_in(output_dir)):
        if int(path.name.rpartition("-")[2]) >= before:
            continue
        harm = _harm(path, read_back)
        if harm is None:
            return path
        logger.warning("Passing over %s: %s.", path, harm)
    return None


def _harm(checkpoint: Path, read_back: bool) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not is_whole(checkpoint):
        return "it is missing or was not written to its end"
    damaged = damaged_file(checkpoint) if read_back else None
    return None if damaged is None else f"its file {damaged} is damaged (not what was written)"


def resolve_resume(output_dir: str | Path, resume: str | bool | None, read_back: bool = False) -> Path | None:
    """The checkpoint to resume from: None, the newest whole one of `output_dir`, or the folder named.

    resume: True or "last" for the newest, which must exist; "auto" for the newest if there is one; or a folder.
    read_back: compare the files' contents with their checksums. Raises ValueError if what was asked for is missing,
    half-written, or damaged.
    """
    if not resume:
        return None
    if resume is True or resume in NEWEST:
        found = last_whole_checkpoint(output_dir, read_back=read_back)
        if found is None and resume != "auto":
            raise ValueError(
                f"resume_from_checkpoint={resume!r}: {output_dir} holds no whole checkpoint. "
                "Start without it, or name the folder of a checkpoint."
            )
        return found
    checkpoint = Path(resume)
    harm = _harm(checkpoint, read_back)
    if harm is not None:
        whole = last_whole_checkpoint(checkpoint.parent, read_back=read_back)
        remedy = f"use {whole}" if whole else "start the run anew"
        raise ValueError(f"resume_from_checkpoint={resume!r} cannot be used, {harm}: {remedy}.")
    return checkpoint


def discard_half_written(output_dir: str | Path) -> list[Path]:
    """Remove checkpoint folders that a killed process left unfinished; returns what was removed."""
    shutil.rmtree(Path(output_dir) / UNFINISHED, ignore_errors=True)
    broken = [path for path in checkpoints_in(output_dir) if not is_whole(path)]
    for path in broken:
        logger.warning("Removing %s: it was not written to its end and cannot be resumed from.", path)
        shutil.rmtree(path)
    return broken


def require_unused(output_dir: str | Path, besides: Collection[str] = ()) -> None:
    """Refuse a folder that already holds something, so that no run overwrites the result of another.

    besides: names that may be there; what a killed process left unfinished may always.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        return
    found = next(
        (path for path in sorted(folder.iterdir()) if path.name not in (*besides, UNFINISHED, HEARTBEATS)), None
    )
    if found is not None:
        raise ValueError(
            f"output_dir={str(output_dir)!r} is not empty (it holds {found.name!r}): name another folder, or continue "
            'the run in it with resume_from_checkpoint="last".'
        )


def require_free_space(output_dir: str | Path, weight_bytes: int, trained_parameters: int, copies: int) -> None:
    """Refuse to start when the disk cannot hold `copies` checkpoints and the final model.

    weight_bytes: size of the model's weights. trained_parameters: number of parameters with Adam moments.
    """
    existing = next(
        path for path in (Path(output_dir).absolute(), *Path(output_dir).absolute().parents) if path.exists()
    )
    needed = copies * (weight_bytes + BYTES_PER_MOMENT_PAIR * trained_parameters) + weight_bytes
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"output_dir={str(output_dir)!r} has {free / 1e9:.2f} GB free, but {copies} checkpoint(s) and the final "
            f"model need about {needed / 1e9:.2f} GB: free space, name another folder, lower save_total_limit, or set "
            "save_only_model."
        )
