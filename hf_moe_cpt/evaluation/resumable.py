"""The quickstart's output folder: whose it is, what is finished in it, and files that appear whole. Source: ours.

Layout: quickstart.json (the plan), corpus/, tokenizer/, work/<stage>/ (the trainer's, until all is done),
models/<stage>/ (to be loaded), records/<stage>.json (a finished stage), results.json, report.html, routing/ (traces
of the mixtures and the page about them).

The output folder of the rejection sampling: whose it is, which shards are finished, files that appear whole.

Layout: rejection_sample.json (the settings of each stage), stages/<stage>/<number>-<fingerprint>.jsonl (one line for
each prompt), then data/, README.md and summary.json. A fingerprint is a hash of the settings of a stage and of all
stages before it, so a shard cannot be taken for one made otherwise. Source: ours.

The output folder of an evaluation: the settings it belongs to, and the finished shards of each stage.

Layout: eval_preference.json (the settings), work/<stage>/<number>.jsonl (a line for each row of a shard), then the
results. A shard appears whole or not at all, so a killed run goes on after its last one. Source: ours.

The output folder of a surgery evaluation: the settings it belongs to, and each finished part of each model.

Layout: eval_surgery.json (settings), work/<model>/<part>.json (raw measurements), then results.json, results.csv and
report.html. A part appears whole or not at all, so a run that was killed goes on after its last one. Source: ours.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_moe_cpt.trainers.common.checkpointing import last_whole_checkpoint


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


SETTINGS_FILE_EVAL_PREFERENCE_FOLDER = "eval_preference.json"

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
        path = self.root / SETTINGS_FILE_EVAL_PREFERENCE_FOLDER
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


SETTINGS_FILE_EVAL_SURGERY_FOLDER = "eval_surgery.json"
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.json")


class SurgeryEvalFolder:
    """Finished parts in a folder that belongs to one set of settings. Only one process may write."""

    def __init__(self, root: str | Path, settings: dict[str, Any]) -> None:
        self.root, self.settings = Path(root), json.loads(json.dumps(settings))

    def check(self) -> None:
        """Raise ValueError if the folder holds anything but unfinished or finished work with these settings."""
        path = self.root / SETTINGS_FILE_EVAL_SURGERY_FOLDER
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
        write_json(self.root / SETTINGS_FILE_EVAL_SURGERY_FOLDER, self.settings)

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
