"""Notice that no rank gets on any more, say which one is to blame, and end the run instead of waiting for hours.

Every rank has a thread that writes a line into `_heartbeats` of the output folder: a counter, which grows as long as
the process runs, how many things the rank has done, its step, and what it does. When a rank has done nothing for
`timeout` seconds its thread reads the lines of all: a counter that stands still belongs to a process that is stopped
or dead; otherwise the ranks that have done least are the ones that the others wait for. Source: ours.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_moe_cpt.trainers.instruments.checkpoints import HEARTBEATS


logger = logging.getLogger(__name__)

EXIT_CODE = 1


@dataclass(frozen=True)
class Heartbeat:
    """One line of a rank."""

    beats: int
    events: int
    step: int
    doing: str

    def __str__(self) -> str:
        return f"{self.beats} {self.events} {self.step} {self.doing}"

    @classmethod
    def read(cls, path: Path) -> Heartbeat | None:
        """The line in a file, or None if there is none or it is being written."""
        try:
            beats, events, step, doing = path.read_text().split(" ", 3)
            return cls(int(beats), int(events), int(step), doing)
        except (OSError, ValueError):
            return None


def blame(before: list[Heartbeat | None], now: list[Heartbeat | None], waited: float) -> str:
    """What holds the run up, from the lines of all ranks at two times `waited` seconds apart.

    Ranks without a sign of life come first, then those that are behind.
    """
    unseen = [rank for rank, beat in enumerate(now) if beat is None]
    stopped = [
        rank for rank, beat in enumerate(now) if beat is not None and before[rank] and beat.beats == before[rank].beats
    ]
    if stopped or unseen:
        told = [f"rank {rank} is stopped or dead (no sign of life for {waited:.0f} s)" for rank in stopped]
        told += [
            f"of rank {rank} nothing is seen (has it ended, or is output_dir not shared by all hosts?)"
            for rank in unseen
        ]
        return "; ".join(told)
    least = min(beat.events for beat in now)
    behind = [rank for rank, beat in enumerate(now) if beat.events == least]
    if len(behind) == len(now):
        return f"all ranks are alive and none moves, at step {now[0].step} ({now[0].doing})"
    return "; ".join(f"rank {rank} is behind, at step {now[rank].step} ({now[rank].doing})" for rank in behind)


class HangWatch(TrainerCallback):
    """Ends this process with EXIT_CODE and a message when it has done nothing for `timeout` seconds.

    timeout: seconds; longer than the longest save and the longest evaluation of other trainers, which do not tell how
    far they are. end: what is called with the message, for tests.
    """

    def __init__(self, output_dir: str | Path, timeout: float, rank: int, world_size: int) -> None:
        self.folder = Path(output_dir) / HEARTBEATS
        self.timeout, self.rank, self.world_size = timeout, rank, world_size
        self.interval = min(5.0, timeout / 5)
        self.end: Callable[[str], None] = self._end_process
        self._events, self._step, self._doing = 0, 0, "starting"
        self._beats, self._seen_events, self._since = 0, -1, 0.0
        self._earlier, self._earlier_at = None, 0.0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to watch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            (self.folder / f"rank-{self.rank}").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others are still there
                self.folder.rmdir()

    def did(self, step: int, doing: str) -> None:
        """The rank got on: it is at `step` and begins what `doing` says."""
        self._step, self._doing = step, doing
        self._events += 1

    # ---- the thread ----

    def _watch(self) -> None:
        while not self._over.wait(self.interval):
            message = self.beat(time.monotonic())
            if message is not None:
                self.end(message)
                return

    def beat(self, now: float) -> str | None:
        """One round at `now` seconds: write the line of this rank; returns why the run is to end, or None."""
        self._beats += 1
        self._write(Heartbeat(self._beats, self._events, self._step, self._doing))
        if self._events != self._seen_events:
            self._seen_events, self._since, self._earlier = self._events, now, None
            return None
        waited = now - self._since
        if self._earlier is None and waited > self.timeout / 2:
            self._earlier, self._earlier_at = self._read_all(), now
        if self._earlier is None or waited <= self.timeout:
            return None
        cause = blame(self._earlier, self._read_all(), now - self._earlier_at)
        return f"Nothing has moved on rank {self.rank} for {waited:.0f} s (hang_timeout): {cause}."

    def _write(self, beat: Heartbeat) -> None:
        path = self.folder / f"rank-{self.rank}"
        try:
            path.with_suffix(".new").write_text(str(beat))
            path.with_suffix(".new").replace(path)
        except OSError as error:  # a full disk must not end the watch
            logger.debug("%s: %s", path, error)

    def _read_all(self) -> list[Heartbeat | None]:
        return [Heartbeat.read(self.folder / f"rank-{rank}") for rank in range(self.world_size)]

    def _end_process(self, message: str) -> None:
        logger.critical("%s The process ends; start again with resume_from_checkpoint='last'.", message)
        logging.shutdown()
        os._exit(EXIT_CODE)  # the main thread waits in a collective and cannot be told

    # ---- what a rank does ----

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell that training begins."""
        self.did(state.global_step, "before the first step")

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell that the batch is there."""
        self.did(state.global_step, "in the step")

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell that a micro-batch is through."""
        self.did(state.global_step, "in the step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell that the step is through, and what comes now."""
        doing = "logging or saving" if control.should_log or control.should_save else "waiting for data"
        self.did(state.global_step, "measuring" if control.should_evaluate else doing)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tell that a batch is measured."""
        self.did(state.global_step, "measuring")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell that something was logged."""
        self.did(state.global_step, "after a log")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell that a checkpoint is saved."""
        self.did(state.global_step, "waiting for data")
