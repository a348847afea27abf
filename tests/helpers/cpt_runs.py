"""Start small runs of `CPTTrainer` in this process or in others, and read what they logged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl

from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer
from tests.helpers.tiny_models import QUICK, VOCABULARY, tiny_model, tokenized


HALF = VOCABULARY // 2
CLOCKS = ("runtime", "per_second", "tflops", "train_loss")


def config(folder: Path, **changes: Any) -> CPTConfig:
    """Six steps of two sequences of 16 tokens with 30 % replay, on the CPU."""
    pace = {"max_steps": 6, "max_length": 16, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    settings = {"output_dir": str(folder), **QUICK, **pace, "replay_ratio": 0.3}
    return CPTConfig(**{**settings, **changes})


def trainer(folder: Path, model: Any = "cpt_moe", evaluated: bool = False, **changes: Any) -> CPTTrainer:
    """A trainer whose new text uses the lower half of the vocabulary and whose old text the upper half."""
    args = config(folder, **changes)
    return CPTTrainer(
        tiny_model(model) if isinstance(model, str) else model,
        args,
        tokenized(120, 1, 1, HALF),
        tokenized(60, 2, HALF, VOCABULARY) if args.replay_ratio else None,
        tokenized(20, 3, 1, HALF) if evaluated else None,
        tokenized(20, 4, HALF, VOCABULARY) if evaluated else None,
    )


class AtStep(TrainerCallback):
    """Calls `action(control)` at the end of a step, before it is logged and saved."""

    def __init__(self, step: int, action: Callable[[TrainerControl], object]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.step:
            self.action(control)


def stop_at(step: int) -> AtStep:
    """A callback that ends training after a step."""
    return AtStep(step, lambda control: setattr(control, "should_training_stop", True))


def without_clocks(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """A log without the values that depend on how fast the machine was."""
    return [{k: v for k, v in entry.items() if not any(clock in k for clock in CLOCKS)} for entry in history]


def logged(history: list[dict[str, float]], key: str) -> list[float]:
    """The values of one key in the order of the log."""
    return [entry[key] for entry in history if key in entry]


def saved_history(checkpoint: Path) -> list[dict[str, float]]:
    """The log in a saved trainer state."""
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
