"""The quickstart's output folder: whose it is, what is finished in it, and files that appear whole. Source: ours.

Layout: quickstart.json (the plan), corpus/, tokenizer/, work/<stage>/ (the trainer's, until all is done),
models/<stage>/ (to be loaded), records/<stage>.json (a finished stage), results.json, report.html, routing/ (traces
of the mixtures and the page about them).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from hf_moe_cpt.trainers.instruments.checkpoints import last_whole_checkpoint


PLAN_FILE = "quickstart.json"


class QuickstartFolder:
    """Paths inside an output folder that belongs to one plan."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.results = self.root / "results.json"
        self.report = self.root / "report.html"
        self.tokenizer = self.root / "tokenizer"
        self.routing = self.root / "routing"

    def claim(self, settings: dict[str, Any]) -> None:
        """Make the folder, or take up the unfinished quickstart in it.

        Raises ValueError if it holds anything else, or a quickstart with other settings.
        """
        path = self.root / PLAN_FILE
        if path.is_file():
            self._require_same(json.loads(path.read_text(encoding="utf-8")), settings)
        elif self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise ValueError(
                f"--output-dir {str(self.root)!r} is not empty and no quickstart wrote it: name another folder."
            )
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)

    def _require_same(self, before: dict[str, Any], settings: dict[str, Any]) -> None:
        before, now = _flat(before), _flat(settings)
        changed = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
        if changed:
            name = changed[0]
            raise ValueError(
                f"--output-dir {str(self.root)!r} holds a quickstart with {name}={before.get(name)}, and now it is "
                f"{now.get(name)}: name another folder, or delete this one."
            )

    def work(self, stage: str) -> Path:
        """The trainer's folder of a stage."""
        return self.root / "work" / stage

    def model(self, stage: str) -> Path:
        """The folder that `from_pretrained` loads."""
        return self.root / "models" / stage

    def record(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage left, or None if it is not finished."""
        path = self._record_path(stage)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def finish(self, stage: str, record: dict[str, Any], keep_work: bool) -> None:
        """Mark a stage as finished, its model being saved; keep_work: another stage starts from its checkpoint."""
        self._record_path(stage).parent.mkdir(exist_ok=True)
        write_json(self._record_path(stage), record)
        if not keep_work:
            shutil.rmtree(self.work(stage))

    def conclude(self, results: dict[str, Any]) -> None:
        """Write the results of all stages; what only the trainer needed goes."""
        write_json(self.results, results)
        shutil.rmtree(self.root / "work", ignore_errors=True)

    def require_space(self, needed_bytes: int) -> None:
        """Raise ValueError if the disk under the folder cannot hold that much."""
        free = shutil.disk_usage(self.root).free
        if free < needed_bytes:
            raise ValueError(
                f"--output-dir {str(self.root)!r} has {free / 1e9:.1f} GB free and the checkpoints need about "
                f"{needed_bytes / 1e9:.1f} GB: free space, or name a folder on another disk."
            )

    def checkpoint_to_resume(self, stage: str) -> Path | None:
        """The last whole checkpoint of a stage that was killed; what a kill left without one is removed."""
        checkpoint = last_whole_checkpoint(self.work(stage))
        if checkpoint is None:
            shutil.rmtree(self.work(stage), ignore_errors=True)
        return checkpoint

    def _record_path(self, stage: str) -> Path:
        return self.root / "records" / f"{stage}.json"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(partial, path)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Nested settings by their inner names, which are unique."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat
