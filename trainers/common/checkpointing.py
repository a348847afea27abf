"""Checkpoints that are whole or not there at all, and a run that outlives a disk that is full.

The Trainer writes each checkpoint into `_unfinished` of the output folder. When all ranks are through, the list of its
files with sizes and checksums is written, and one rename makes it a checkpoint of the run; only then do old ones go,
in one rename each. What a killed process leaves lies in `_unfinished` and is never resumed from; pushes to the Hub
leave it out, since its name begins with an underscore. With `snapshot_dir` each host writes to a fast local folder,
and a thread brings it from there while training goes on. Nothing but what a run left unfinished, and old whole
checkpoints beyond save_total_limit, is ever deleted: a checkpoint with something wrong is moved to `_set_aside`, under
a name that says what.

A checkpoint is whole when every file of its list is there. One without a list, which others wrote, is whole when
`trainer_state.json`, the last file that the Trainer writes, parses and names the step of its folder, and every
safetensors file opens (its header is checked against the size of the file). Checksums are CRC-32: they find what a
disk or a copy did to a file, not what a person did.

Source: ours; `Trainer._save_checkpoint` of transformers 5.17 to 5.24 for the order of what it writes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, parse_flag_from_env
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed import broadcast_object_list
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import StateDictType
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from hf_moe_cpt.extras import require
from hf_moe_cpt.machine import inner_model
from hf_moe_cpt.reading import check_found, is_adapter, read_adapter, read_json, reading, require_finite
from hf_moe_cpt.trainers.common.distributed import (
    begin_to_save,
    is_sharded,
    load_shards,
    load_whole,
    named_as_before_sharding,
)


logger = logging.getLogger(__name__)

MANIFEST = "checkpoint_files.json"
SHARDS = "sharded_state"  # folder in a checkpoint: what each rank holds of weights and optimizer, by names of weights
CHECKPOINT_FOLDER = re.compile(r"^checkpoint-(\d+)$")
UNFINISHED = "_unfinished"  # folder in the output folder with what is being written or removed
HEARTBEATS = "_heartbeats"  # folder in the output folder where ranks tell that they live
SET_ASIDE = "_set_aside"  # folder in the output folder with checkpoints that something is wrong with
LOCK = "_run.lock"  # file in the output folder, of the process that trains
OURS = (UNFINISHED, HEARTBEATS, SET_ASIDE, LOCK)
WEIGHT_FILES = ("model*.safetensors", "adapter_model*.safetensors")
# without which a run goes on as another, in files of our engines, of accelerate's and of DeepSpeed
STATES = {"an optimizer": (SHARDS, "*optimizer*", "global_step*"), "random numbers": ("rng_state*",)}
NEWEST = ("last", "auto", "True", "true")
CHUNK_BYTES = 1 << 24
THREADS = 4  # zlib leaves the interpreter to others while it works
BYTES_PER_MOMENT_PAIR = 8  # Adam keeps two float32 numbers per trained parameter
# A full disk shows in many ways: also as RuntimeError of torch's zip writer and bare Exception of tokenizers.
WRITING_FAILED = (OSError, SafetensorError, CheckpointException)
TOLD_BY_TEXT = {
    RuntimeError: ("PytorchStreamWriter", "file write failed", "inline_container"),
    Exception: ("(os error",),
}
DONE = "copied-by-host-"  # beside the checkpoint in `_unfinished`: one mark for each host
POLL_SECONDS = 0.1


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
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_json(folder / MANIFEST, files=dict[str, dict[str, int]])
    if not all({"bytes", "crc32"} <= described.keys() for described in manifest.get("files", {"": {}}).values()):
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


def is_whole(checkpoint: Path) -> bool:
    """Whether all files of `checkpoint` are there, of the right size; their contents are not read."""
    return harm_of(checkpoint) is None


def harm_of(checkpoint: Path, read_back: bool = False) -> str | None:
    """What is wrong with a checkpoint, or None. read_back: also read its files and compare checksums."""
    match = CHECKPOINT_FOLDER.match(checkpoint.name)
    try:
        manifest = read_manifest(checkpoint)
        incomplete = None if manifest is None else incomplete_file(checkpoint, manifest)
        if incomplete is not None:
            return f"its file {incomplete} is missing or cut"
        state = read_json(checkpoint / TRAINER_STATE_NAME)
        for weights in checkpoint.glob("*.safetensors") if manifest is None else ():
            if not _opens(weights):
                return f"its file {weights.name} is cut"
        for kind, patterns in STATES.items() if manifest is None else ():
            if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
                return f"it holds no state of {kind}"
        damaged = damaged_file(checkpoint) if read_back else None
    except FileNotFoundError:
        return "it is missing or was not written to its end"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except ValueError:
        return "its list of files or its state is cut"
    if damaged is not None:
        return f"its file {damaged} is damaged (not what was written)"
    step = state.get("global_step")
    return None if match is None or step == int(match[1]) else f"its state is of step {step}"


def _opens(weights: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        with safe_open(weights, framework="pt"):
            return True
    except SafetensorError:
        return False


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint folder, or else in its state."""
    match = CHECKPOINT_FOLDER.match(checkpoint.name)
    return int(match[1]) if match else read_trainer_state(checkpoint).global_step


def read_beside(checkpoint: Path | None, name: str, **fields: Any) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint, as `read_json`; empty without a checkpoint or that file."""
    path = None if checkpoint is None else checkpoint / name
    return read_json(path, **fields) if path is not None and path.is_file() else {}


def read_trainer_state(checkpoint: Path) -> TrainerState:
    """The state of transformers' Trainer in a checkpoint. Raises ValueError for one that no run could go on from."""
    path, counts = checkpoint / TRAINER_STATE_NAME, ("global_step", "max_steps", "logging_steps", "eval_steps")
    with reading(path):
        told = {"epoch": float | None, "log_history": list[dict], "best_metric": float | None}
        read_json(path, **dict.fromkeys(counts, int | float | None), **told)
        return TrainerState.load_from_json(str(path))


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders of a run, whole or not, oldest step first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if CHECKPOINT_FOLDER.match(path.name)]
    return sorted(folders, key=step_of)


def last_whole_checkpoint(output_dir: str | Path, before: float = math.inf, read_back: bool = False) -> Path | None:
    """The newest checkpoint, of a step below `before`, that was written to its end, or None.

    read_back: also read it and compare checksums. What is passed over is said in one line each.
    """
    for path in reversed(checkpoints_in(output_dir)):
        if step_of(path) >= before:
            continue
        harm = harm_of(path, read_back)
        if harm is None:
            return path
        logger.warning("Passing over %s: %s.", path, harm)
    return None


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
                "Name the folder of a checkpoint, or give auto, which begins anew where there is none."
            )
        return found
    checkpoint = Path(resume)
    harm = harm_of(checkpoint, read_back)
    if harm is not None:
        whole = last_whole_checkpoint(checkpoint.parent, read_back=read_back)
        remedy = f"use {whole}" if whole else "start the run anew"
        raise ValueError(f"resume_from_checkpoint={resume!r} cannot be used, {harm}: {remedy}.")
    return checkpoint


def tidy_up(output_dir: str | Path, resumed: Path | None) -> list[Path]:
    """Leave no checkpoint in a run's folder that a run from `resumed` could take for its own; returns where they went.

    What a killed process was writing is deleted. Set aside is what something is wrong with, and what is later than
    `resumed`: the past of another run from here on.
    """
    shutil.rmtree(Path(output_dir) / UNFINISHED, ignore_errors=True)
    newest, aside = -1 if resumed is None else step_of(resumed), []
    for path in checkpoints_in(output_dir):
        is_later = step_of(path) > newest
        harm = harm_of(path, read_back=is_later)
        if harm is None and is_later:
            harm = "it is later than " + ("the start" if resumed is None else resumed.name)
        if harm is not None:
            aside.append(set_aside(path, harm))
    return aside


def set_aside(checkpoint: Path, harm: str) -> Path:
    """Move a checkpoint out of the run, under a name that says why, and say so; returns where it lies."""
    home = checkpoint.parent / SET_ASIDE
    home.mkdir(exist_ok=True)
    name = f"{checkpoint.name}-{re.sub('[^A-Za-z0-9._]+', '-', harm.removeprefix('it ')).strip('-')[:80]}"
    place = next(path for n in count(1) if not (path := home / (name if n == 1 else f"{name}-{n}")).exists())
    checkpoint.rename(place)
    logger.warning("%s is set aside as %s: %s.", checkpoint, place, harm)
    return place


def require_unused(output_dir: str | Path, besides: Collection[str] = (), asked: str | bool | None = None) -> None:
    """Refuse a folder that already holds something, so that no run overwrites the result of another.

    besides: names that may be there; what a killed process left unfinished may always. asked: how to resume. "auto"
    may begin anew where one of our runs began and left no whole model and no whole checkpoint.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        return
    found = next((path for path in sorted(folder.iterdir()) if path.name not in (*besides, *OURS)), None)
    if found is None:
        return
    whole = any(is_whole(path) for path in checkpoints_in(folder))
    began = (folder / LOCK).is_file() and (folder / LOCK).stat().st_size > 0
    may_begin_anew = began and not whole and not _holds_model(folder)
    if may_begin_anew and asked == "auto":
        return
    remedy = "."
    if whole or may_begin_anew:
        remedy = f", or go on with the run in it with resume_from_checkpoint={'last' if whole else 'auto'!r}."
    raise ValueError(
        f"output_dir={str(output_dir)!r} is not empty (it holds {found.name!r}): name another folder{remedy}"
    )


def _holds_model(folder: Path) -> bool:
    """Whether the weights of a model lie in `folder` that were written to their end: shards have an index."""
    found = _weights_in(folder)
    has_index = any(folder.glob("*.index.json")) or not any("-of-" in path.name for path in found)
    return bool(found) and has_index and all(map(_opens, found))


def _weights_in(folder: Path) -> list[Path]:
    return [path for pattern in WEIGHT_FILES for path in folder.glob(pattern)]


def require_free_space(output_dir: str | Path, weight_bytes: int, trained_parameters: int, copies: int) -> None:
    """Refuse to start when the disk cannot hold `copies` more checkpoints and the final model.

    weight_bytes: size of the weights that are saved. trained_parameters: number of parameters with Adam moments.
    """
    folder = Path(output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    needed = copies * (weight_bytes + BYTES_PER_MOMENT_PAIR * trained_parameters) + weight_bytes
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"output_dir={str(output_dir)!r} has {free / 1e9:.2f} GB free, but {copies} checkpoint(s) and the final "
            f"model need about {needed / 1e9:.2f} GB: free space, name another folder, lower save_total_limit, or set "
            "save_only_model."
        )


def publish(written: Path, run_dir: Path) -> Path:
    """Rename a finished checkpoint from `_unfinished` into the run's folder, in the place of one of the same step."""
    final = run_dir / written.name
    if final.exists():
        _remove(final)
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
    stay = {os.path.realpath(path) for path in (*kept, *([newest_whole] if newest_whole else []))}
    removable = [path for path in folders if os.path.realpath(path) not in stay]
    gone = removable[: max(0, len(folders) - max(limit, len(stay)))]
    for path in gone:
        _remove(path)
    return gone


def _remove(folder: Path) -> None:
    """Take a checkpoint out of the run in one rename, then delete it; a process killed meanwhile leaves no half.

    One with something wrong, which somebody may want to look at, is set aside.
    """
    harm = harm_of(folder)
    if harm is not None:
        set_aside(folder, harm)
        return
    bin_folder = folder.parent / UNFINISHED / "removed"
    bin_folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(bin_folder / folder.name, ignore_errors=True)
    folder.rename(bin_folder / folder.name)
    shutil.rmtree(bin_folder, ignore_errors=True)


class WriteFailures:
    """Keeps this rank's first failure to write, so that it takes part in what all ranks do together until the end."""

    def __init__(self) -> None:
        self.first: str | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A failure to write inside is noted and ends the block; other errors are raised."""
        try:
            yield
        except WRITING_FAILED as error:
            self._note(error)
        except Exception as error:
            if not any(words in str(error) for words in TOLD_BY_TEXT.get(type(error), ())):
                raise
            self._note(error)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)`, or None if it fails to write."""
        with self.kept():
            return function(*args, **kwargs)

    def _note(self, error: BaseException) -> None:
        if self.first is None:
            line = next((line for line in _text_of(error).splitlines() if line.strip()), "")
            self.first = f"{type(error).__name__}: {line.strip()[:200]}"

    def of_any_rank(self, world_size: int) -> str | None:
        """The first failure among all ranks, with the rank's number if there are several. A collective."""
        if world_size == 1:
            return self.first
        failures = gather_object([self.first])
        return next((f"rank {rank}: {text}" for rank, text in enumerate(failures) if text is not None), None)


def free_space(folder: Path) -> str:
    """How much room the disk of `folder` has, as text."""
    return f"{shutil.disk_usage(folder).free / 1e9:.2f} GB free"


def _text_of(error: BaseException) -> str:
    """The first of the failures that an error stands for."""
    if isinstance(error, shutil.Error):  # of many files
        return str(error.args[0][0][2])
    if isinstance(error, CheckpointException):  # of many ranks
        return next((f"{failure[0]!r} on rank {rank}" for rank, failure in sorted(error.failures.items())), "")
    return str(error)


class BackgroundCopy:
    """At most one copy at a time, in a thread; what it fails with is known after `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failures = WriteFailures()

    @property
    def is_started(self) -> bool:
        """Whether there is a copy that nobody has waited for yet."""
        return self._thread is not None

    def start(self, job: Callable[[], None]) -> None:
        """Run `job` in a thread."""
        self._failures = WriteFailures()
        self._thread = threading.Thread(target=self._failures.call, args=(job,), name="checkpoint copy")
        self._thread.start()

    def wait(self) -> str | None:
        """Wait for the copy in progress, if there is one; returns why it failed, or None."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        return self._failures.first


def bring_host_part(snapshot: Path, unfinished: Path, host: int) -> None:
    """Copy what this host wrote of a checkpoint into `unfinished` and leave a mark there, or one of failure."""
    target = unfinished / snapshot.name
    failures = WriteFailures()
    failures.call(shutil.copytree, snapshot, target, dirs_exist_ok=True)
    shutil.rmtree(snapshot, ignore_errors=True)
    failures.call((unfinished / f"{DONE}{host}").write_text, failures.first or "")
    if failures.first is not None:
        raise OSError(failures.first)


def wait_for_hosts(unfinished: Path, num_hosts: int, timeout: float) -> None:
    """Return when all hosts have brought their parts. Raises OSError if one could not, or not within `timeout` s."""
    deadline = time.monotonic() + timeout
    waiting_for = set(range(num_hosts))
    while waiting_for:
        for host in sorted(waiting_for):
            mark = unfinished / f"{DONE}{host}"
            if mark.exists():
                if text := mark.read_text():
                    raise OSError(f"host {host}: {text}")
                waiting_for.discard(host)
        if waiting_for and time.monotonic() > deadline:
            raise OSError(f"host {min(waiting_for)} did not bring its part of the checkpoint within {timeout:g} s")
        if waiting_for:
            time.sleep(POLL_SECONDS)


def load_translated(model: nn.Module, checkpoint: str | Path) -> bool:
    """Load the weights of a checkpoint that needs translation into `model`; False, and nothing done, where none is.

    Mixtral, OLMoE, Qwen's mixtures and others keep the experts of a layer in one tensor and save each by itself, as
    they were published. `from_pretrained` translates between the two; `Trainer` (transformers 5.24), when it resumes
    or goes back to the best model, does not: it warns of missing keys and leaves every expert and router as it is.
    A copy of the weights is in the host's memory meanwhile. Raises ValueError if a weight is missing.
    """
    if not isinstance(model, PreTrainedModel) or stored_names(checkpoint) <= model.state_dict().keys():
        return False
    dtypes = {parameter.dtype for parameter in model.parameters()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # holds every shorter type exactly
    how = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    stored, found = type(model).from_pretrained(checkpoint, **how)
    check_found(found)
    model.load_state_dict(stored.state_dict())
    return True


def require_all_stored(model: nn.Module, checkpoint: str | Path) -> None:
    """Raise ValueError for a weight that a checkpoint lacks, of a whole model or an adapter; `Trainer` only warns."""
    if hasattr(model, "peft_config") and is_adapter(checkpoint):
        of_peft = require("peft", needed_by="the adapter that is trained")
        read_adapter(checkpoint, of_peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    stored = stored_names(checkpoint)
    if not stored or not isinstance(model, PreTrainedModel):
        return
    weights = model.state_dict()
    there = {value.data_ptr() for name, value in weights.items() if name in stored}  # a tied one is stored once
    missing = sorted(n for n, value in weights.items() if n not in stored and value.data_ptr() not in there)
    if missing:
        raise ValueError(f"{missing[0]} and {len(missing) - 1} more are not in them")


def stored_names(checkpoint: str | Path) -> set[str]:
    """Names of the weights in a model's safetensors files; empty for an adapter or a checkpoint of another kind."""
    names: set[str] = set()
    for path in sorted(Path(checkpoint).glob("model*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            names.update(weights.keys())
    return names


def by_names(saved: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The state of an optimizer of one process, whose weights are numbered, by their names, flat as torch flattens it.

    names: of the trained weights, in the optimizer's order. Raises ValueError if the optimizer had others.
    """
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    if len(numbers) != len(names):
        raise ValueError(f"it is of {len(numbers)} weights, and {len(names)} are trained.")
    name_of = dict(zip(numbers, names, strict=True))
    flat = {f"state.{name_of[n]}.{key}": value for n, kept in saved["state"].items() for key, value in kept.items()}
    for group in saved["param_groups"]:
        options = {key: value for key, value in group.items() if key != "params"}
        flat |= {f"param_groups.{name_of[n]}.{key}": value for n in group["params"] for key, value in options.items()}
    return flat


def _is_arguments(value: Any) -> bool:
    return isinstance(value, TrainingArguments)


@contextmanager
def _resumable(args: TrainingArguments | None) -> Iterator[None]:
    """Let `Trainer.__init__` take a model that `DistributedConfig` shards: its optimizer is saved, by us."""
    asked = None if args is None else args.save_only_model
    if args is not None and not (args.fsdp or args.deepspeed or parse_flag_from_env("ACCELERATE_USE_FSDP")):
        args.save_only_model = True
    try:
        yield
    finally:
        if args is not None:
            args.save_only_model = asked


class AtomicCheckpointMixin:
    """Mixin in front of `Trainer` and of every mixin that saves.

    Overrides `_save_checkpoint` (write apart, then rename), `_get_output_dir` (where the parent writes meanwhile),
    `_push_from_checkpoint` and `_load_best_model` (after the rename), `_load_from_checkpoint` (translated weights, as
    in `_load_best_model`; FSDP and DeepSpeed store in their own way), and, to note failures, the writing methods.
    """

    _written_to: Path | None = None  # the folder that the parent writes into, during a save
    _failures: WriteFailures | None = None  # of the save in progress
    _push_waits = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._copy = BackgroundCopy()
        self._writing: Callable[[], Any] | None = None  # writes the shards of the save in progress
        with _resumable(next((value for value in (*args, *kwargs.values()) if _is_arguments(value)), None)):
            super().__init__(*args, **kwargs)
        shards = self._saves_together() and not self.is_deepspeed_enabled
        self._shard_group = torch.distributed.new_group(backend="gloo") if shards else None  # of the writing threads
        self.add_callback(_AroundRuns(self))

    # ---- resuming ----

    def whole_checkpoint_before(self, step: int) -> Path | None:
        """The newest whole checkpoint of a step before `step`, the same on all ranks, or None. A collective."""
        self.wait_for_checkpoint()
        return self._of_first_rank(lambda: last_whole_checkpoint(self.args.output_dir, before=step))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder, into = Path(resume_from_checkpoint), self.model if model is None else model
        if (folder / SHARDS).is_dir():
            load_shards(into, None, folder / SHARDS)
        elif is_sharded(into) and stored_names(folder):  # of an engine that does not shard
            whole = type(inner_model(into)).__bases__[-1].from_pretrained(folder, dtype=torch.float32)
            load_whole(into, whole.state_dict(), None, None)
        elif self._saves_together():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            with reading(f"the weights in {folder}"):
                if not load_translated(into, folder):
                    super()._load_from_checkpoint(resume_from_checkpoint, model)
                    require_all_stored(into, folder)
                require_finite(into)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:  # no name of what is measured
            raise ValueError(" ".join(str(error.args[0]).split())) from error

    def _load_best_model(self) -> None:
        self.wait_for_checkpoint()
        self.accelerator.wait_for_everyone()
        best = Path(self.state.best_model_checkpoint)
        if (best / SHARDS).is_dir():
            load_shards(self.model, None, best / SHARDS)
        elif self._is_sharded() or not load_translated(self.model, best):
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(f"the optimizer's or schedule's state in {checkpoint}", keeps=(FloatingPointError,)):
            if checkpoint is None or not self._load_optimizer_by_names(Path(checkpoint)):
                super()._load_optimizer_and_scheduler(checkpoint)

    def _load_optimizer_by_names(self, checkpoint: Path) -> bool:
        """Take up optimizer and schedule, of any number of ranks; False where the parent's engine stores them."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # of accelerate's wrapper
        if (checkpoint / SHARDS).is_dir():
            load_shards(self.model, optimizer, checkpoint / SHARDS)
        elif (checkpoint / OPTIMIZER_NAME).is_file():  # transformers 5.17 cannot read it on CPU ranks
            saved = torch.load(checkpoint / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
            if is_sharded(self.model):
                load_whole(self.model, {}, optimizer, by_names(saved, self._names_as_stepped()))
            else:
                self.optimizer.load_state_dict(saved)
        else:
            return False
        self.lr_scheduler.load_state_dict(torch.load(checkpoint / SCHEDULER_NAME, weights_only=True))
        return True

    def _names_as_stepped(self) -> list[str]:
        """Names of the trained weights in the order in which Trainer hands them to an optimizer."""
        decays = set(self.get_decay_parameter_names(self.model))
        trained = [name for name, weight in self.model.named_parameters() if weight.requires_grad]
        return sorted(trained, key=lambda name: name not in decays)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(f"the state of random numbers (rng_state*.pth) in {checkpoint}"):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with reading(f"the state of the loss scale (scaler.pt) in {checkpoint}"):
            super()._load_scaler(checkpoint)

    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _saves_together(self) -> bool:
        """Whether all ranks meet while a model is saved."""
        return self._is_sharded() or getattr(self, "is_distributed_loading_by_transformers", False)

    def _of_first_rank(self, find: Callable[[], Any]) -> Any:
        found: list[Any] = [None]
        if self.is_world_process_zero():
            try:
                found = [find()]
            except (ValueError, OSError) as error:
                found = [error]
        if self.args.world_size > 1:
            broadcast_object_list(found)
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    # ---- saving ----

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._written_to is None else str(self._written_to)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.wait_for_checkpoint()
        run_dir = Path(self._get_output_dir(trial))
        final = run_dir / f"checkpoint-{self.state.global_step}"
        best_before, self._failures, self._push_waits = self.state.best_model_checkpoint, WriteFailures(), False
        self._writing = None
        written_to = self._folder_to_write_into(run_dir)
        self._written_to = written_to
        try:
            with self._failures.kept():
                super()._save_checkpoint(model, trial)
        finally:
            self._written_to = None
        self._failures.call(self._finish_state, written_to / final.name, final)
        if self._writing is not None and not self.args.save_in_background:
            self._failures.call(self._writing)
            self._writing = None
        failure, self._failures = self._failures.of_any_rank(self.args.world_size), None
        if failure is None and (self.args.snapshot_dir is not None or self._writing is not None):
            self._publish_in_background(written_to / final.name, run_dir)
            return
        if failure is None:
            failures = WriteFailures()
            if self.args.should_save:
                best = self.state.best_model_checkpoint
                failures.call(_publish, written_to / final.name, run_dir, self.args.save_total_limit, best)
            failure = failures.of_any_rank(self.args.world_size)
        if failure is not None:
            self.state.best_model_checkpoint = best_before
            self._say_that_it_failed(failure, final)
        elif self._push_waits:
            self._push_from_checkpoint(str(final))

    def _folder_to_write_into(self, run_dir: Path) -> Path:
        snapshot_dir = self.args.snapshot_dir
        folder = run_dir / UNFINISHED if snapshot_dir is None else snapshot_folder(snapshot_dir, run_dir)
        is_first_of_host = self.args.local_process_index == 0 if snapshot_dir else self.args.should_save
        if is_first_of_host:
            self._failures.call(_make_empty, folder, is_private=bool(snapshot_dir))
        if self.args.should_save and snapshot_dir:
            self._failures.call(_make_empty, run_dir / UNFINISHED)
        self.accelerator.wait_for_everyone()
        return folder

    def _finish_state(self, written: Path, final: Path) -> None:
        """Say where the best model will lie, and keep what else belongs to the state of the run."""
        run_dir, best_step = final.parent, self.state.best_global_step
        if best_step:
            best = run_dir / f"checkpoint-{best_step}"
            if best == final or best.exists():
                self.state.best_model_checkpoint = str(best)
        if self.args.should_save and written.is_dir():
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            self.save_beside_state(written)

    def save_beside_state(self, checkpoint: Path) -> None:
        """Write more files into a checkpoint, beside the trainer's state; called on the ranks that write it."""

    def read_beside_state(self, checkpoint: Path | None) -> None:
        """Take up the state of the run in a checkpoint, or of a new run: also when a run goes back."""

    def _say_that_it_failed(self, failure: str, final: Path) -> None:
        if not self.args.should_save:
            return
        shutil.rmtree(final.parent / UNFINISHED, ignore_errors=True)
        stands = last_whole_checkpoint(final.parent)
        logger.warning(
            "%s was not saved (%s; %s): training goes on, %s. Make room, or lower save_total_limit.",
            final,
            failure,
            free_space(final.parent),
            f"{stands.name} stands" if stands else "there is no checkpoint yet",
        )

    # ---- saving while training goes on ----

    def _publish_in_background(self, written: Path, run_dir: Path) -> None:
        firsts = gather_object([self.args.local_process_index == 0]) if self.args.world_size > 1 else [True]
        is_copied, write = self.args.snapshot_dir is not None and self.args.local_process_index == 0, self._writing
        if write is None and not is_copied:
            return
        host, is_main, patience = sum(firsts[: self.args.process_index]), self.args.should_save, self.args.ddp_timeout
        limit, best, unfinished = self.args.save_total_limit, self.state.best_model_checkpoint, run_dir / UNFINISHED

        def job() -> None:
            if write is not None:
                write()  # returns when all ranks are through
            if is_copied:
                bring_host_part(written, unfinished, host)
            if is_main and is_copied:
                wait_for_hosts(unfinished, sum(firsts), patience)
            if is_main:
                _publish(unfinished / written.name, run_dir, limit, best)

        self._copied = run_dir / written.name
        self._copy.start(job)

    def wait_for_checkpoint(self) -> None:
        """Return when the checkpoint that is copied in the background, if any, lies in the run's folder."""
        if not self._copy.is_started:
            return
        failure = self._copy.wait()
        if failure is not None:
            self._say_that_it_failed(failure, self._copied)
        elif self._push_waits and is_whole(self._copied):
            self._push_from_checkpoint(str(self._copied))

    # ---- what the parent does with a checkpoint, in its time ----

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._push_waits = self._written_to is not None
        if not self._push_waits:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the parent's; inside a checkpoint a failure to write is noted and the run goes on.

        Elsewhere the model goes to `rescue_dir` instead, and an OSError says where it is.
        """
        if self._failures is not None:
            is_apart = is_sharded(self.model) and not self._wants_whole_weights()
            write = self._save_without_weights if is_apart else self._save_whole
            self._failures.call(write, output_dir, super().save_model)
            return
        failure = self._failure_to_save(output_dir)
        if failure is not None:
            self._rescue(Path(output_dir or self.args.output_dir), failure)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _wants_whole_weights(self) -> bool:
        """Whether a checkpoint of a sharded model holds whole weights too, as `from_pretrained` reads them."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        is_whole = "FULL_STATE_DICT" in str(getattr(plugin, "state_dict_type", ""))
        is_adapter = hasattr(self.model, "peft_config")
        return self.args.save_only_model or self.args.save_whole_weights or is_whole or is_adapter

    def _save_whole(self, output_dir: str | None, save: Callable[..., None]) -> None:
        """Gather what is sharded, whatever type of checkpoint FSDP2 has: the parent leaves the weights out then."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        with named_as_before_sharding(inner_model(self.model)):
            if plugin is None or not is_sharded(self.model):
                save(output_dir, True)
                return
            asked, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
            try:
                save(output_dir, True)
            finally:
                plugin.state_dict_type = asked

    def _save_without_weights(self, output_dir: str, _: Callable[..., None]) -> None:
        if self.args.should_save:
            os.makedirs(output_dir, exist_ok=True)
            for part in (self.model.config, getattr(self.model, "generation_config", None), self.processing_class):
                if part is not None:
                    part.save_pretrained(output_dir)
            torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))

    def _failure_to_save(self, output_dir: str | None) -> str | None:
        failures = WriteFailures()
        failures.call(self._save_whole, output_dir, super().save_model)
        return failures.of_any_rank(self.args.world_size if self._saves_together() else 1)

    def _rescue(self, folder: Path, failure: str) -> None:
        room = free_space(folder)
        for path in _weights_in(folder) if self.args.should_save else ():
            if not _opens(path):
                path.unlink()  # what this save left unfinished
        if self._saves_together():
            place = self._of_first_rank(lambda: self._place_to_rescue_to(folder))
        else:
            place = self._place_to_rescue_to(folder)
        again = self._failure_to_save(str(place))
        what = f"the model was not saved to {str(folder)!r} ({failure}; {room})"
        if again is not None:
            raise OSError(f"{what}, nor to {str(place)!r} ({again}): make room and resume from the last checkpoint.")
        raise OSError(f"{what}: it is whole in {str(place)!r}. Make room and move it, nothing else is lost.")

    def _place_to_rescue_to(self, folder: Path) -> Path:
        home = Path(self.args.rescue_dir or tempfile.gettempdir())
        home.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{folder.absolute().name}-rescued-", dir=home))

    # ---- single files of a checkpoint ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        write = self._begin_to_save_shards if is_sharded(self.model) else super()._save_optimizer_and_scheduler
        self._noting(write, output_dir)

    def _begin_to_save_shards(self, output_dir: str) -> None:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        self._writing = begin_to_save(self.model, optimizer, Path(output_dir) / SHARDS, self._shard_group)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _save_scaler(self, output_dir: str) -> None:
        self._noting(super()._save_scaler, output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        self._noting(super()._save_rng_state, output_dir)

    def _noting(self, write: Any, *args: Any) -> None:
        write(*args) if self._failures is None else self._failures.call(write, *args)


class _AroundRuns(TrainerCallback):
    """A run that goes on logs, evaluates and saves as it is told now, and waits for its checkpoints at its end."""

    def __init__(self, trainer: AtomicCheckpointMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The parent takes the steps between logs, evaluations and checkpoints from the checkpoint's state."""
        state.compute_steps(args, state.max_steps)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Before the parent tidies its checkpoints up, the one in progress must be there."""
        self._trainer.wait_for_checkpoint()


def snapshot_folder(snapshot_dir: str | Path, run_dir: Path) -> Path:
    """Where a host writes the checkpoints of the run in `run_dir`: runs of the same name have different ones."""
    identity = hashlib.blake2b(os.path.realpath(run_dir).encode(), digest_size=4).hexdigest()
    return Path(snapshot_dir) / f"{UNFINISHED}-{run_dir.absolute().name}-{identity}"


def private_folder(folder: Path) -> None:
    """Make a folder that nobody else can write into. Raises PermissionError if it, or the one around it, is another's.

    The folder around it may be root's, such as /dev/shm.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # whose it is is looked at below; it may be a link to nowhere
        folder.mkdir(mode=0o700)
    if not hasattr(os, "getuid"):
        return
    for found, owners in ((folder.lstat(), {os.getuid()}), (folder.parent.stat(), {os.getuid(), 0})):
        if found.st_uid not in owners or not stat.S_ISDIR(found.st_mode):
            raise PermissionError(
                f"snapshot_dir: {str(folder)!r} or the folder around it is a link or belongs to another user: name "
                "a folder of your own."
            )


def _make_empty(folder: Path, is_private: bool = False) -> None:
    if is_private:
        private_folder(folder)  # nothing of another user is removed
    shutil.rmtree(folder, ignore_errors=True)
    private_folder(folder) if is_private else folder.mkdir(parents=True, exist_ok=True)


def _publish(written: Path, run_dir: Path, limit: int | None, best: str | None) -> None:
    """Complete a written checkpoint, make it one of the run, and let old ones go."""
    write_manifest(written, step_of(written))
    final = publish(written, run_dir)
    remove_old(run_dir, limit, [final, *([] if best is None else [Path(best)])])
    shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)
