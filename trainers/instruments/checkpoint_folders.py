"""How a checkpoint appears in its run's folder, and how old ones go: in one rename each, so never in part.

What is being written or removed lies in `_unfinished` of the run's folder meanwhile; pushes to the Hub leave it out,
since its name begins with an underscore. Source: ours.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from hf_moe_cpt.trainers.instruments.checkpoint_manifest import force_to_disk
from hf_moe_cpt.trainers.instruments.checkpoints import UNFINISHED, checkpoints_in, is_whole


logger = logging.getLogger(__name__)


def publish(written: Path, run_dir: Path) -> Path:
    """Rename a finished checkpoint from `_unfinished` into the run's folder, in the place of one of the same step."""
    final = run_dir / written.name
    if final.exists():
        _set_aside(final)
    written.rename(final)
    force_to_disk(run_dir)
    return final


def remove_old(run_dir: Path, limit: int | None, kept: Collection[Path]) -> list[Path]:
    """Remove the oldest checkpoints until `limit` are left; those in `kept` stay and count. Returns what went.

    limit: None or 0 keeps all. The newest whole checkpoint always stays, so there is one at any moment.
    """
    if not limit:
        return []
    folders = checkpoints_in(run_dir)
    newest_whole = next((path for path in reversed(folders) if is_whole(path)), None)
    stay = {_resolved(path) for path in kept} | ({_resolved(newest_whole)} if newest_whole else set())
    removable = [path for path in folders if _resolved(path) not in stay]
    gone = removable[: max(0, len(folders) - max(limit, len(stay)))]
    for path in gone:
        _set_aside(path)
    return gone


def _resolved(path: Path) -> str:
    return os.path.realpath(path)


def _set_aside(folder: Path) -> None:
    """Take a checkpoint out of the run in one rename, then delete it; a process killed meanwhile leaves no half."""
    bin_folder = folder.parent / UNFINISHED / "removed"
    bin_folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(bin_folder / folder.name, ignore_errors=True)
    folder.rename(bin_folder / folder.name)
    shutil.rmtree(bin_folder, ignore_errors=True)
