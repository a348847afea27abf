"""The output folder of a surgery evaluation: the settings it belongs to, and each finished part of each model.

Layout: eval_surgery.json (settings), work/<model>/<part>.json (raw measurements), then results.json, results.csv and
report.html. A part appears whole or not at all, so a run that was killed goes on after its last one. Source: ours.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hf_moe_cpt.scripts.quickstart_folder import write_json


SETTINGS_FILE = "eval_surgery.json"
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.json")


class SurgeryEvalFolder:
    """Finished parts in a folder that belongs to one set of settings. Only one process may write."""

    def __init__(self, root: str | Path, settings: dict[str, Any]) -> None:
        self.root, self.settings = Path(root), json.loads(json.dumps(settings))

    def check(self) -> None:
        """Raise ValueError if the folder holds anything but unfinished or finished work with these settings."""
        path = self.root / SETTINGS_FILE
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            for name in sorted(before | self.settings):
                if before.get(name) != self.settings.get(name):
                    raise ValueError(
                        f"--output_dir {str(self.root)!r} was made with {name}={before.get(name)}, and now it is "
                        f"{self.settings.get(name)}: name another folder."
                    )
        elif self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise ValueError(
                f"--output_dir {str(self.root)!r} is not empty and this tool did not write it: name another folder."
            )

    def claim(self) -> None:
        """Make the folder, which `check` found free."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_json(self.root / SETTINGS_FILE, self.settings)

    def read(self, model: str, part: str) -> Any:
        """The measurements of a finished part, None if it is not finished."""
        path = self._path(model, part)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write(self, model: str, part: str, measurements: Any) -> None:
        """Keep a finished part."""
        path = self._path(model, part)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, measurements)

    def _path(self, model: str, part: str) -> Path:
        return self.root / "work" / model / f"{part}.json"


def checksum_of_files(name: str) -> str | None:
    """What the files of a model's folder look like by name, size and date; None for a model on the Hub."""
    folder = Path(name)
    if not folder.is_dir():
        return None
    files = sorted({path for pattern in WEIGHT_FILES for path in folder.glob(pattern)})
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()
