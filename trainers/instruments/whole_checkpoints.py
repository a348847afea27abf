"""Checkpoints that are whole or not there at all, and a run that outlives a disk that is full.

The Trainer writes each checkpoint into `_unfinished` of the output folder. When all ranks are through, the list of its
files is written (checkpoint_manifest.py), and one rename makes it a checkpoint of the run; only then do old ones go.
Source: ours; `Trainer._save_checkpoint` of transformers 5.17 to 5.23 for the order of what it writes.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from torch.distributed import broadcast_object_list
from transformers.trainer import TRAINER_STATE_NAME

from hf_moe_cpt.trainers.instruments.background_copy import BackgroundCopy, bring_host_part, wait_for_hosts
from hf_moe_cpt.trainers.instruments.checkpoint_folders import publish, remove_old
from hf_moe_cpt.trainers.instruments.checkpoint_manifest import write_manifest
from hf_moe_cpt.trainers.instruments.checkpoints import UNFINISHED, is_whole, last_whole_checkpoint, resolve_resume
from hf_moe_cpt.trainers.instruments.stored_weights import ReadsStoredWeights
from hf_moe_cpt.trainers.instruments.write_failures import WriteFailures, free_space


logger = logging.getLogger(__name__)


class WholeCheckpoints(ReadsStoredWeights):
    """Mixin in front of `Trainer` and of every mixin that saves.

    Overrides `_save_checkpoint` (write apart, then rename), `_get_output_dir` (where the parent writes meanwhile),
    `_push_from_checkpoint` and `_load_best_model` (after the rename), and, to note failures, the writing methods.
    """

    _written_to: Path | None = None  # the folder that the parent writes into, during a save
    _failures: WriteFailures | None = None  # of the save in progress
    _push_waits = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._copy = BackgroundCopy()
        super().__init__(*args, **kwargs)

    # ---- resuming ----

    def checkpoint_to_resume(self, asked: str | bool | None) -> Path | None:
        """What `resolve_resume` finds, with checksums compared, the same on all ranks. A collective."""
        asked = asked or self.args.resume_from_checkpoint
        found: list[Any] = [None]
        if self.is_world_process_zero():
            try:
                found = [resolve_resume(self.args.output_dir, asked, read_back=True)]
            except ValueError as error:
                found = [error]
        return self._from_first_rank(found)

    def whole_checkpoint_before(self, step: int) -> Path | None:
        """The newest whole checkpoint of a step before `step`, the same on all ranks, or None. A collective."""
        self.wait_for_checkpoint()
        found = [None]
        if self.is_world_process_zero():
            found = [last_whole_checkpoint(self.args.output_dir, before=step)]
        return self._from_first_rank(found)

    def _from_first_rank(self, found: list[Any]) -> Path | None:
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
        written_to = self._folder_to_write_into(run_dir)
        self._written_to = written_to
        try:
            with self._failures.kept():
                super()._save_checkpoint(model, trial)
        finally:
            self._written_to = None
        self._failures.call(self._finish_state, written_to / final.name, final)
        failure, self._failures = self._failures.of_any_rank(self.args.world_size), None
        if failure is None and self.args.snapshot_dir is not None:
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
        folder = run_dir / UNFINISHED if snapshot_dir is None else Path(snapshot_dir) / f"{UNFINISHED}-{run_dir.name}"
        is_first_of_host = self.args.local_process_index == 0 if snapshot_dir else self.args.should_save
        if is_first_of_host:
            self._failures.call(_make_empty, folder)
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
        if self.args.local_process_index != 0:
            return
        host, is_main, patience = sum(firsts[: self.args.process_index]), self.args.should_save, self.args.ddp_timeout
        limit, best, unfinished = self.args.save_total_limit, self.state.best_model_checkpoint, run_dir / UNFINISHED

        def job() -> None:
            bring_host_part(written, unfinished, host)
            if is_main:
                wait_for_hosts(unfinished, sum(firsts), patience)
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

    def _load_best_model(self) -> None:
        self.wait_for_checkpoint()
        self.accelerator.wait_for_everyone()
        super()._load_best_model()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the parent's; inside a checkpoint a failure to write is noted and the run goes on."""
        self._noting(super().save_model, output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._noting(super()._save_optimizer_and_scheduler, output_dir)

    def _save_scaler(self, output_dir: str) -> None:
        self._noting(super()._save_scaler, output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        self._noting(super()._save_rng_state, output_dir)

    def _noting(self, write: Any, *args: Any) -> None:
        write(*args) if self._failures is None else self._failures.call(write, *args)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def _publish(written: Path, run_dir: Path, limit: int | None, best: str | None) -> None:
    """Complete a written checkpoint, make it one of the run, and let old ones go."""
    write_manifest(written, int(written.name.rpartition("-")[2]))
    final = publish(written, run_dir)
    remove_old(run_dir, limit, [final, *([] if best is None else [Path(best)])])
    shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)
