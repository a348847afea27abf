"""SIGTERM, as schedulers send it before they take a machine back: save, and leave with an exit code that says so.

The step in progress is finished (with several ranks one more, in which they agree), a checkpoint is saved, and the
process ends with 143 = 128 + SIGTERM. A measurement that is due at that step is left out. Source: ours;
`enable_jit_checkpoint` of transformers does it for one rank, three seconds after the signal.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_moe_cpt.trainers.instruments.rank_agreement import RankAgreement


logger = logging.getLogger(__name__)

EXIT_CODE = 128 + signal.SIGTERM


class Preempted(SystemExit):
    """Ends the process with EXIT_CODE, unless it is caught; `step` is where the run stopped."""

    def __init__(self, step: int) -> None:
        super().__init__(EXIT_CODE)
        self.step = step


class PreemptionWatch(TrainerCallback):
    """Between steps, saves and stops if any rank was sent SIGTERM."""

    def __init__(self) -> None:
        self.agreement: RankAgreement | None = None
        self._is_signalled = False
        self._is_stopping = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM is noted instead of ending the process; only the main thread of a process can listen."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._is_signalled = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Let all ranks stop at the same step."""
        agreed = self._is_signalled if self.agreement is None else self.agreement.any_of(self._is_signalled)
        if agreed and state.global_step < state.max_steps:  # at the last step there is nothing to cut short
            self._is_stopping = True
            control.should_save = control.should_log = control.should_training_stop = True
            control.should_evaluate = False
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave, now that the checkpoint is written."""
        if not self._is_stopping:
            return
        if state.is_world_process_zero:
            logger.warning(
                "SIGTERM: stopped after step %d of %d and saved. Go on with resume_from_checkpoint='last'.",
                state.global_step,
                state.max_steps,
            )
        raise Preempted(state.global_step)
