"""The list of a checkpoint's files with sizes and checksums, written last: it says that all is there, and unharmed.

Source: ours. Checksums are CRC-32: they find what a disk or a copy did to a file, not what a person did.
"""

from __future__ import annotations

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


MANIFEST = "checkpoint_files.json"
CHUNK_BYTES = 1 << 24
THREADS = 4  # zlib leaves the interpreter to others while it works


def write_manifest(folder: Path, step: int) -> None:
    """List all files of `folder`, the checkpoint of `step`, after they were forced to the disk."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(THREADS) as pool:
        described = pool.map(_force_and_describe, [folder / name for name in names])
        files = dict(zip(names, described, strict=True))
    (folder / MANIFEST).write_text(json.dumps({"global_step": step, "files": files}, indent=1))
    force_to_disk(folder / MANIFEST)
    force_to_disk(folder)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `write_manifest` wrote; None where it wrote nothing. Raises ValueError if the list itself is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{folder / MANIFEST} is no list of files.")
    return manifest


def incomplete_file(folder: Path, manifest: dict[str, Any]) -> str | None:
    """The first listed file that is missing or has another size, which costs no reading; else None."""
    for name, described in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != described["bytes"]:
            return name
    return None


def damaged_file(folder: Path) -> str | None:
    """The first listed file that does not hold what was written, after reading them all; None also without a list."""
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    incomplete = incomplete_file(folder, manifest)
    if incomplete is not None:
        return incomplete
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(_checksum, [folder / name for name in manifest["files"]])
        for (name, described), checksum in zip(manifest["files"].items(), found, strict=True):
            if checksum != described["crc32"]:
                return name
    return None


def force_to_disk(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk and would outlast a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _force_and_describe(path: Path) -> dict[str, int]:
    force_to_disk(path)
    return {"bytes": path.stat().st_size, "crc32": _checksum(path)}


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
