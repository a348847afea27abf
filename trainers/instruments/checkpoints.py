"""Which checkpoints are whole, whether an output folder may be used, and whether the disk can hold what will come.

A checkpoint is whole when `trainer_state.json`, the last file that the Trainer writes, parses and names the step of
its folder, and every safetensors file opens (its header is checked against the size of the file). A process killed
while saving leaves a folder that fails this test; it is never resumed from. Source: ours.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open


logger = logging.getLogger(__name__)

CHECKPOINT_FOLDER = re.compile(r"^checkpoint-(\d+)$")
BYTES_PER_MOMENT_PAIR = 8  # Adam keeps two float32 numbers per trained parameter


def is_whole(checkpoint: Path) -> bool:
    """Whether the Trainer finished writing `checkpoint`."""
    match = CHECKPOINT_FOLDER.match(checkpoint.name)
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        for weights in checkpoint.glob("*.safetensors"):
            with safe_open(weights, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return match is None or state.get("global_step") == int(match[1])


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders of a run, whole or not, oldest step first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if CHECKPOINT_FOLDER.match(path.name)]
    return sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]))


def last_whole_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None."""
    return next((path for path in reversed(checkpoints_in(output_dir)) if is_whole(path)), None)


def resolve_resume(output_dir: str | Path, resume: str | bool | None) -> Path | None:
    """The checkpoint to resume from: None, the last whole one of `output_dir` (True or "last"), or the folder named.

    Raises ValueError if what was asked for is missing or half-written.
    """
    if not resume:
        return None
    if resume is True or resume in ("last", "True", "true"):
        found = last_whole_checkpoint(output_dir)
        if found is None:
            raise ValueError(
                f"resume_from_checkpoint={resume!r}: {output_dir} holds no whole checkpoint. "
                "Start without it, or name the folder of a checkpoint."
            )
        return found
    checkpoint = Path(resume)
    if not is_whole(checkpoint):
        whole = last_whole_checkpoint(checkpoint.parent)
        remedy = f"use {whole}" if whole else "start the run anew"
        raise ValueError(f"resume_from_checkpoint={resume!r} is missing or was not written to its end: {remedy}.")
    return checkpoint


def discard_half_written(output_dir: str | Path) -> list[Path]:
    """Remove checkpoint folders that a killed process left unfinished; returns what was removed."""
    broken = [path for path in checkpoints_in(output_dir) if not is_whole(path)]
    for path in broken:
        logger.warning("Removing %s: it was not written to its end and cannot be resumed from.", path)
        shutil.rmtree(path)
    return broken


def require_unused(output_dir: str | Path, besides: Collection[str] = ()) -> None:
    """Refuse a folder that already holds something, so that no run overwrites the result of another.

    besides: names that may be there.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        return
    found = next((path for path in sorted(folder.iterdir()) if path.name not in besides), None)
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
