"""A run that kills itself with SIGKILL: `python -m tests.helpers.killed_run FOLDER MOMENT STEP`, in its own process.

MOMENT is "step" (at the end of the step) or "saving" (in the middle of writing the checkpoint of that step).
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tests.helpers.cpt_runs import trainer


# Dropout draws random numbers, so the states of the generators count as well.
SETTINGS = {
    "evaluated": True,
    "max_steps": 9,
    "save_strategy": "steps",
    "save_steps": 3,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "gradient_accumulation_steps": 2,
}


def settings() -> dict[str, Any]:
    """Arguments of `trainer` for the killed run, the resumed one and the one never killed."""
    from tests.helpers.tiny_models import tiny_model

    return {"model": tiny_model("cpt_moe", attention_dropout=0.2), **SETTINGS}


def die() -> None:
    """End this process at once: no cleanup, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)


class DieAtStep(TrainerCallback):
    """Kills at the end of a step, before it is logged and saved; or arms `torch.save` to kill in that step's save."""

    def __init__(self, moment: str, step: int) -> None:
        self.moment, self.step = moment, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            if self.moment == "step":
                die()
            torch.save = lambda *args, **kwargs: die()  # the optimizer's state: the model is written already


def main() -> None:
    folder, moment, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    run = trainer(folder, **settings())
    run.add_callback(DieAtStep(moment, step))
    run.train()


if __name__ == "__main__":
    main()
