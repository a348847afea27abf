"""An output folder that belongs to one set of settings, in which a killed run goes on after its last whole file.

Every file appears whole or not at all. Settings are a JSON object, in which objects may be nested. Source: ours.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_moe_cpt.reading import read_json, reading


Row = dict[str, Any]
Progress = Callable[[int], Any]
MakeRows = Callable[[int, Progress], list[Row]]  # place of a file, what counts its items -> its rows
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.json")


class ResumableFolder:
    """Files under `root`, made with `settings`, which lie in `settings_file`. Names of files are relative to `root`.

    settings: what JSON can hold; tuples become lists.
    """

    def __init__(self, root: str | Path, settings_file: str, settings: Mapping[str, Any]) -> None:
        self.root, self.settings = Path(root), json.loads(json.dumps(settings))
        self.settings_file = self.root / settings_file

    def check(self) -> None:
        """Raise ValueError if the folder holds anything but work with these settings, finished or not."""
        # Looked at before the settings: they appear first, so whatever is there besides them proves that they are.
        begun = f".{self.settings_file.name}."
        in_use = self.root.exists() and (
            not self.root.is_dir() or any(not path.name.startswith(begun) for path in self.root.iterdir())
        )
        option = f"--output_dir {str(self.root)!r}"
        if not self.settings_file.is_file():
            if in_use:
                raise ValueError(f"{option} is not empty and this tool did not write it: name another folder.")
        elif change := _first_change(read_json(self.settings_file), self.settings):
            names, before, now = change
            raise ValueError(
                f"{option} was made with {names[-1]}={before}, and now it is {now}: name another folder"
                f"{self.remedy(names[0])}."
            )

    def claim(self) -> None:
        """Make the folder, or take up the unfinished work in it; ValueError as for `check`."""
        self.check()
        self.root.mkdir(parents=True, exist_ok=True)
        if not self.settings_file.is_file():  # under a name of its own: parts of a run may start at the same moment
            _write_whole(self.settings_file, [json.dumps(self.settings, indent=1)], uuid.uuid4().hex)

    def remedy(self, changed: str) -> str:
        """Said after "name another folder": what can be kept though the outermost setting `changed` is another."""
        return ""

    def read(self, name: str) -> dict[str, Any] | None:
        """The object in a finished JSON file, None if it is not finished."""
        path = self.root / name
        return read_json(path) if path.is_file() else None

    def write(self, name: str, value: Any) -> None:
        """Keep what JSON can hold; folders on the way are made."""
        write_json(self.root / name, value)

    def make_rows(self, label: str, sizes: Mapping[str, int], load: Callable[[], MakeRows], unit: str) -> None:
        """Make those files of JSON lines that are not there, under one bar.

        sizes: items of each file by its name. load: called only if a file is missing, so what is finished reads no
        weights. label, unit: of the bar.
        """
        missing = {place: name for place, name in enumerate(sizes) if not _is_finished(self.root / name)}
        if not missing:
            return
        make, total = load(), sum(sizes.values())
        done = total - sum(sizes[name] for name in missing.values())
        with tqdm(total=total, initial=done, desc=label, unit=unit, mininterval=1) as bar:
            for place, name in missing.items():
                write_shard(self.root / name, make(place, bar.update))
                done += sizes[name]
                bar.update(done - bar.n)  # what was left out


def _first_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[tuple[str, ...], Any, Any] | None:
    """Names of the first setting that differs, the outermost first, and both values; None if none does."""
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            if change := _first_change(old, new):
                return (name, *change[0]), *change[1:]
        elif old != new:
            return (name,), old, new
    return None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all; its folder is made."""
    _write_whole(path, [json.dumps(value, indent=1)])


def read_shard(path: Path) -> list[Row]:
    """The rows of a file that `write_shard` wrote. Raises ValueError for one that was cut or changed since."""
    with reading(path, "remove it, and it is made again"):
        data = path.read_bytes()
        if read_json(_seal_of(path)).get("checksum") != hashlib.sha256(data).hexdigest():
            raise ValueError("it was cut or changed since it was written")
        return [json.loads(line) for line in data.splitlines()]


def write_shard(path: Path, rows: Iterable[Row]) -> None:
    """Rows of work in progress as JSON lines, and their checksum beside them, without which they are not finished."""
    write_lines(path, rows)
    write_json(_seal_of(path), {"checksum": hashlib.sha256(path.read_bytes()).hexdigest()})


def _seal_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.checksum")


def _is_finished(path: Path) -> bool:
    return path.is_file() and _seal_of(path).is_file()


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    """A file of JSON lines, whole or not at all; its folder is made."""
    _write_whole(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_whole(path: Path, parts: Iterable[str], ending: str = "partial") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{ending}")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def checksum_of_values(values: Sequence[Any]) -> str:
    """16 hexadecimal digits that change with any of the values, which JSON can hold."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode() + b"\n")
    return digest.hexdigest()[:16]


def checksum_of_files(name: str) -> str | None:
    """What the files of a model's folder look like by name, size and date; None for a model on the Hub."""
    folder = Path(name)
    if not folder.is_dir():
        return None
    files = sorted({path for pattern in WEIGHT_FILES for path in folder.glob(pattern)})
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()
