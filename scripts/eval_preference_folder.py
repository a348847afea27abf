"""The output folder of an evaluation: the settings it belongs to, and the finished shards of each stage.

Layout: eval_preference.json (the settings), work/<stage>/<number>.jsonl (a line for each row of a shard), then the
results. A shard appears whole or not at all, so a killed run goes on after its last one. Source: ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_moe_cpt.scripts.quickstart_folder import write_json


SETTINGS_FILE = "eval_preference.json"

Row = dict[str, Any]
MakeRows = Callable[[Sequence[Any], Callable[[int], Any]], list[Row]]  # rows of a shard, progress -> lines


class EvaluationFolder:
    """Shards of stages in a folder that belongs to one set of settings."""

    def __init__(self, root: str | Path, settings: dict[str, Any], shard_size: int) -> None:
        self.root, self.settings, self.shard_size = Path(root), {**settings, "shard_size": shard_size}, shard_size

    def claim(self) -> None:
        """Make the folder, or take up the unfinished work in it.

        Raises ValueError if it holds anything else, or the work of other settings.
        """
        path = self.root / SETTINGS_FILE
        now = json.loads(json.dumps(self.settings))
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
            if changed:
                name = changed[0]
                raise ValueError(
                    f"--output_dir {str(self.root)!r} was made with {name}={before.get(name)}, and now it is "
                    f"{now.get(name)}: name another folder."
                )
        elif self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise ValueError(
                f"--output_dir {str(self.root)!r} is not empty and this tool did not write it: name another folder."
            )
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(path, now)

    def rows_of(self, stage: str, items: Sequence[Any], load: Callable[[], MakeRows], unit: str) -> list[Row]:
        """One row for each item: those on disk, and the missing shards made by what `load` returns.

        load is called only if a shard is missing, so a finished stage reads no weights.
        """
        shards = [items[start : start + self.shard_size] for start in range(0, len(items), self.shard_size)]
        paths = [self.root / "work" / stage / f"{number:05d}.jsonl" for number in range(len(shards))]
        missing = [number for number, path in enumerate(paths) if not path.is_file()]
        if missing:
            make = load()
            done = len(items) - sum(len(shards[number]) for number in missing)
            with tqdm(total=len(items), initial=done, desc=stage, unit=unit, mininterval=1) as bar:
                for number in missing:
                    write_lines(paths[number], make(shards[number], bar.update))
                    done += len(shards[number])
                    bar.update(done - bar.n)  # rows that were left out
        return [row for path in paths for row in read_lines(path)]


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    """A file of JSON lines, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_lines(path: Path) -> list[Row]:
    """The rows of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
