"""Whose an output folder is, and with what settings its run goes on.

A process that trains locks `_run.lock` in its output folder, and writes into it who it is once it may use the folder:
a lock file with something in it says that a run of ours began here. The lock goes with its process, however that
ends; forked data loaders let go of it at once.

Beside every checkpoint lies `run_state.json`: the settings that decide about numbers, and what was counted so far. A
run that goes on with other settings says which differ; a change that would make numbers lie (a loss per source of
another mixture, a rate of another schedule, tokens of another length) is refused unless `allow_changes` names it.
Three kinds of settings are known by name or by how the name begins: of the machine, which are not compared; of speed,
precision, logging and saving, which are told; all others, also those that a later version brings, are refused.

Source: ours.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
import socket
import time
import weakref
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_moe_cpt.reports import aligned
from hf_moe_cpt.trainers.common.checkpointing import LOCK, read_beside, require_unused, resolve_resume


try:
    import fcntl
except ImportError:  # a system without it locks nothing
    fcntl = None


logger = logging.getLogger(__name__)

STATE_FILE = "run_state.json"  # in a checkpoint
ROWS_COMPARED = 32  # of each data set, evenly spaced
OPTIMIZER_STATE = "optimizer_state"
# Names of settings, or how they begin.
_OF_THE_MACHINE = """
output_dir run_name project trackio_ hub_ push_to_hub report_to log_level log_on_each_node disable_tqdm debug ddp_ do_
resume_from_checkpoint allow_changes rescue_dir snapshot_dir reference_cache_dir local_rank model_init_kwargs fsdp
trust_remote_code dataset_num_proc deepspeed parallelism_config accelerator_config use_cpu skip_memory_metrics
eval_on_start dataloader_num dataloader_p dataloader_m torch_empty_cache_steps enable_jit restore_callback
per_device_train_batch_size gradient_accumulation_steps
""".split()  # of the last two the product is compared
_TOLD = """
logging_ log_ include_ eval_strategy eval_steps eval_delay eval_accumulation_steps eval_batch_size save_ bf16 fp16 tf32
per_device_eval_batch_size prediction_loss_only batch_eval_metrics dtype activation_ gradient_checkpointing
torch_compile use_liger liger_ kernels use_cache load_best_model_at_end hang_timeout bad_step_ spike_ chunk_tokens
max_forgetting on_forgetting full_determinism precompute_ref_ pad_to_multiple_of
""".split()


class RunLock:
    """The lock of an output folder, held as long as this object lives. One process has one for each folder.

    Raises ValueError if another process holds it. Where the file system has no locks that is said, and nothing held.
    """

    _of_this_process: weakref.WeakValueDictionary[str, RunLock] = weakref.WeakValueDictionary()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a+")
        try:
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = path.read_text().strip() or "another process"
            raise ValueError(
                f"output_dir={str(path.parent)!r} is in use by {holder}: wait for it, end it, or name another folder."
            ) from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): see to it that one run at a time uses the folder.", path, error)

    @classmethod
    def of(cls, output_dir: str | Path) -> RunLock:
        """The lock of a folder, which is made if it is missing."""
        path = Path(os.path.realpath(output_dir)) / LOCK
        held = cls._of_this_process.get(str(path))
        if held is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            held = cls._of_this_process[str(path)] = cls(path)
        return held

    @classmethod
    def forget(cls) -> None:
        """Let go of the locks of the process that this one was forked from, which keeps them."""
        for lock in list(cls._of_this_process.values()):
            lock._file.close()
        cls._of_this_process.clear()

    def sign(self) -> None:
        """Say who holds it: from now on the folder is that of a run. A disk without room for a line says so later."""
        try:
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%F %T')}\n")
            self._file.flush()
        except OSError as error:
            logger.debug("%s: %s", self.path, error)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=RunLock.forget)


def check_output_dir(args: TrainingArguments, besides: Collection[str] = ()) -> None:
    """Raise ValueError, on the first rank, for a folder that a run with these arguments could not use.

    besides: what may lie in the folder of a run that starts anew. For commands, before anything is loaded.
    """
    if args.process_index:
        return
    if (Path(args.output_dir) / LOCK).exists():
        RunLock.of(args.output_dir)
    resumed = resolve_resume(args.output_dir, args.resume_from_checkpoint)
    if resumed is None or not is_inside(resumed, args.output_dir):
        require_unused(args.output_dir, besides, args.resume_from_checkpoint)


def is_inside(checkpoint: Path, output_dir: str | Path) -> bool:
    """Whether a checkpoint is one of the run in `output_dir`."""
    return os.path.realpath(checkpoint.parent) == os.path.realpath(output_dir)


def settings_of(args: TrainingArguments, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What decides about the numbers of a run, as JSON has it: its settings but those of the machine, and `facts`."""
    given = {name: value for name, value in args.to_dict().items() if not name.startswith(tuple(_OF_THE_MACHINE))}
    return json.loads(json.dumps(given | dict(facts), default=_named))


def _named(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return getattr(value, "name", None) or getattr(value, "__name__", None) or type(value).__name__


def describe_rows(rows: Any) -> str:
    """Number of rows of a data set and a checksum of the token ids of some; "a stream" where rows have no number."""
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        return "a stream"
    total, checksum = len(rows), 0
    for place in sorted({place * total // ROWS_COMPARED for place in range(ROWS_COMPARED)} if total else ()):
        ids = {name: value for name, value in rows[place].items() if name.endswith("ids")}
        checksum = zlib.crc32(json.dumps(ids, sort_keys=True, default=_named).encode(), checksum)
    return f"{total} rows, checksum {checksum:08x}"


def compare_settings(checkpoint: Path, now: Mapping[str, Any], allowed: Collection[str]) -> list[str]:
    """Say which settings a run goes on with that are not the checkpoint's; returns the names of those that matter.

    allowed: those that may differ although numbers depend on them. Raises ValueError if another one does, or if a
    name is unknown.
    """
    known = [*now, OPTIMIZER_STATE]
    for name in allowed:
        if name not in known:
            near = difflib.get_close_matches(name, known)
            hint = f"did you mean {near[0]}?" if near else "name settings as the command line does."
            raise ValueError(f"allow_changes: {name!r} is no setting that is compared: {hint}")
    saved = read_beside(checkpoint, STATE_FILE, settings=dict | None).get("settings")
    if saved is None:
        logger.warning("%s does not say with which settings it was made: nothing is compared.", checkpoint)
        saved = {}
    differ = {name: (saved[name], value) for name, value in now.items() if name in saved and saved[name] != value}
    if not (checkpoint / "scheduler.pt").is_file() and not any(checkpoint.glob("global_step*")):
        differ[OPTIMIZER_STATE] = ("not saved", "begins anew")
    if not differ:
        return []
    matter = [name for name in differ if not name.startswith(tuple(_TOLD))]
    refused = [name for name in matter if name not in allowed]
    logger.warning("%s", _table(checkpoint, differ, matter, refused))
    if refused:
        shown = ", ".join(f"{name} was {differ[name][0]!r} and is {differ[name][1]!r}" for name in refused[:3])
        more = f", and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise ValueError(
            f"{checkpoint.name} was made with other settings, on which its numbers depend ({shown}{more}): set them "
            f"back, start a new run from its weights, or go on with --allow_changes {','.join(matter)}."
        )
    return matter


def _table(checkpoint: Path, differ: Mapping[str, Any], matter: list[str], refused: list[str]) -> str:
    rows = [("setting", checkpoint.name, "now", "")]
    for name, (before, now) in differ.items():
        verdict = "refused" if name in refused else "allowed" if name in matter else ""
        rows.append((name, str(before), str(now), verdict))
    return "What differs from the settings of the checkpoint:\n" + "\n".join(aligned(rows, num_left=4))
