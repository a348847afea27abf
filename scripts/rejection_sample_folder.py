"""The output folder of the rejection sampling: whose it is, which shards are finished, files that appear whole.

Layout: rejection_sample.json (the settings of each stage), stages/<stage>/<number>-<fingerprint>.jsonl (one line for
each prompt), then data/, README.md and summary.json. A fingerprint is a hash of the settings of a stage and of all
stages before it, so a shard cannot be taken for one made otherwise. Source: ours.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


STAGES = ("generate", "score", "select")
SETTINGS_FILE = "rejection_sample.json"
FORMAT = 1  # of the shards; a folder of another format is refused

Settings = dict[str, dict[str, Any]]


class SampleFolder:
    """Shards of the three stages in a folder that belongs to one set of settings."""

    def __init__(self, root: str | Path, settings: Settings) -> None:
        self.root = Path(root)
        self.settings = {stage: {"format": FORMAT, **settings[stage]} for stage in STAGES}

    def claim(self) -> None:
        """Make the folder, or take up the unfinished work in it.

        Raises ValueError if it holds anything else, or shards that other settings made.
        """
        path = self.root / SETTINGS_FILE
        # Looked at before the settings: they appear first, so whatever is there besides them proves that they are.
        in_use = self.root.exists() and (not self.root.is_dir() or any(_strangers(self.root)))
        if in_use and not path.is_file():
            raise ValueError(
                f"--output_dir {str(self.root)!r} is not empty and this tool did not write it: name another folder."
            )
        self.root.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            self._require_same(json.loads(path.read_text(encoding="utf-8")))
        else:  # under a name of its own: the parts of a run may start at the same moment
            partial = self.root / f".{SETTINGS_FILE}.{uuid.uuid4().hex}"
            partial.write_text(json.dumps(self.settings, indent=1), encoding="utf-8")
            os.replace(partial, path)
        for stage in STAGES:
            (self.root / "stages" / stage).mkdir(parents=True, exist_ok=True)

    def _require_same(self, before: Settings) -> None:
        now = json.loads(json.dumps(self.settings))
        for number, stage in enumerate(STAGES):
            old, new = before.get(stage, {}), now[stage]
            changed = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
            if changed:
                name = changed[0]
                raise ValueError(
                    f"--output_dir {str(self.root)!r} was made with {name}={old.get(name)}, and now it is "
                    f"{new.get(name)}: name another folder{_remedy(self.root, number)}."
                )

    def fingerprint(self, stage: str) -> str:
        """8 hexadecimal digits of what made the shards of a stage."""
        past = STAGES[: STAGES.index(stage) + 1]
        text = json.dumps([self.settings[name] for name in past], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def shard(self, stage: str, number: int) -> Path:
        """Where a shard lies, or will lie."""
        return self.root / "stages" / stage / f"{number:05d}-{self.fingerprint(stage)}.jsonl"

    def missing(self, stage: str, numbers: Sequence[int]) -> list[int]:
        """Those of the shards that are not finished."""
        return [number for number in numbers if not self.shard(stage, number).is_file()]

    def write(self, stage: str, number: int, rows: Sequence[dict[str, Any]]) -> None:
        """Store a shard, whole or not at all."""
        path = self.shard(stage, number)
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def read(self, stage: str, number: int) -> list[dict[str, Any]]:
        """The rows of a finished shard."""
        with self.shard(stage, number).open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def _strangers(root: Path) -> Iterator[Path]:
    """What lies in a folder besides settings that are being written."""
    return (path for path in root.iterdir() if not path.name.startswith(f".{SETTINGS_FILE}"))


def _remedy(root: Path, first_changed: int) -> str:
    """What can be kept although a stage changed."""
    if STAGES[first_changed] == "generate":
        return ""
    kept = STAGES[first_changed - 1]
    reuse = f"--dataset_name {root / 'stages' / kept} --responses_column responses"
    return f" and reuse the work of this one with {reuse}" + (" --scores_column scores" if kept == "score" else "")
