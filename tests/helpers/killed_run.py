"""A run that kills itself with SIGKILL: `python -m tests.helpers.killed_run FOLDER MOMENT STEP`, in its own process.

MOMENT is "step" (at the end of the step) or "saving" (in the middle of writing the checkpoint of that step).
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from tests.helpers.cpt_runs import AtStep, trainer


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


def die(*_: Any, **__: Any) -> None:
    """End this process at once: no cleanup, no flush."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(_: Any) -> None:
    """Let this step's save kill, when it comes to the optimizer's state: the model is written already."""
    torch.save = die


def main() -> None:
    folder, moment, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    run = trainer(folder, **settings())
    run.add_callback(AtStep(step, die if moment == "step" else arm))
    run.train()


if __name__ == "__main__":
    main()
