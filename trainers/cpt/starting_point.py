"""What a run starts from: the phase in which its checkpoint was saved, and that checkpoint's Adam moments.

Every model that `CPTTrainer` saves carries `cpt_state.json`, a few facts about where on its schedule it stood. A later
run reads them to decide whether to warm up again. Source: paper 1, sections 3.2 and 5.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers.utils import cached_file


STATE_FILE = "cpt_state.json"
OPTIMIZER_FILE = "optimizer.pt"
# Saved in this phase of a schedule -> the starting phase of a run that continues from it.
CONTINUES_AS = {"warmup": "constant", "cooldown": "constant", "constant": "constant", "anneal": "decayed"}

logger = logging.getLogger(__name__)


def write_state(folder: str | Path, state: dict[str, Any]) -> None:
    """Write `cpt_state.json` into a saved model."""
    (Path(folder) / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")


def read_state(name_or_path: str) -> dict[str, Any] | None:
    """The facts saved with a model, by folder or Hub id; None if it was not saved by `CPTTrainer`."""
    try:
        path = cached_file(
            name_or_path,
            STATE_FILE,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # a folder that is gone since the model was loaded
        return None
    return None if path is None else json.loads(Path(path).read_text())


def detect_starting_phase(name_or_path: str | None) -> str:
    """ "scratch" without a checkpoint; else "constant" or "decayed", as the checkpoint says ("decayed" if silent)."""
    if not name_or_path:
        return "scratch"
    state = read_state(name_or_path)
    if state is None:
        logger.info("%s does not say where its schedule stood: it counts as decayed and warms up again.", name_or_path)
        return "decayed"
    return CONTINUES_AS[state["phase"]]


def load_moments(optimizer: Optimizer, checkpoint: str | Path) -> None:
    """Give `optimizer` the moments saved in `checkpoint`; its learning rates and other settings stay as they are.

    Raises ValueError if there are none, or if they belong to other parameters.
    """
    path = Path(checkpoint) / OPTIMIZER_FILE
    if not path.is_file():
        raise ValueError(
            f"keep_optimizer_state: {str(checkpoint)!r} holds no {OPTIMIZER_FILE}. Start from a checkpoint-N folder "
            "that was saved without save_only_model, or set keep_optimizer_state=False."
        )
    saved = torch.load(path, map_location="cpu", weights_only=True)
    current = optimizer.state_dict()
    shapes_now = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    shapes_saved = {index: entry["exp_avg"].shape for index, entry in saved["state"].items() if "exp_avg" in entry}
    if len(shapes_saved) != len(shapes_now) or any(shapes_now[i] != shape for i, shape in shapes_saved.items()):
        raise ValueError(
            f"keep_optimizer_state: the moments in {str(path)!r} belong to other parameters ({len(shapes_saved)} "
            f"against {len(shapes_now)}): start from the checkpoint of this model, or set keep_optimizer_state=False."
        )
    optimizer.load_state_dict({"state": saved["state"], "param_groups": current["param_groups"]})
    logger.info("Adam moments of %d parameters carried over from %s.", len(shapes_now), path)
