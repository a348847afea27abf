"""What happens at the edges of an optimizer step: clocks, expert loads, and a log wherever a checkpoint is saved."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_moe_cpt.trainers.instruments.expert_load import ExpertLoadMeter
from hf_moe_cpt.trainers.instruments.throughput import ThroughputMeter


class StepCallback(TrainerCallback):
    """Tells the instruments where steps begin and end.

    It also logs at every step that is saved: means between logs are not part of a checkpoint, so a resumed run has the
    same log as an uninterrupted one only if no mean spans a checkpoint.
    """

    def __init__(self, throughput: ThroughputMeter, load_meter: ExpertLoadMeter | None) -> None:
        self.throughput = throughput
        self.load_meter = load_meter

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self.throughput.begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Close the step and log if it will be saved."""
        self.throughput.end_step()
        if self.load_meter is not None:
            self.load_meter.end_step()
        control.should_log = control.should_log or control.should_save
        return control
