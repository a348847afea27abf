"""MRI by training step from the logs of our trainers and of RouterMonitorCallback: trainer_state.json in, curves out.

Source: ours; what recovery means is said in `hf_moe_cpt.analysis.imbalance_curve`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_moe_cpt.analysis.imbalance_curve import imbalance_curve


STATE_FILE = "trainer_state.json"
_LAYER = re.compile(r"mri/layer_(\d+)")


def training_curves(runs: Sequence[str], shift_step: int | None) -> list[dict[str, Any]]:
    """An entry of "training" for each of `runs`, which are RUN, NAME=RUN or NAME=BEFORE,AFTER.

    RUN: a folder with trainer_state.json, in it or in its newest checkpoint, or such a file. Steps of AFTER count on
    from the end of BEFORE, where the data changes; shift_step is for runs that are a single one. Raises ValueError
    for a log without MRI of layers.
    """
    curves = []
    for run in runs:
        name, _, paths = run.rpartition("=")
        parts = [_imbalance_of(path) for path in paths.split(",")]
        if len({len(layers) for _, layers, _ in parts}) > 1:
            raise ValueError(f"--log_history {run!r} joins runs of models with different numbers of MoE layers.")
        steps, layers = [], [[] for _ in parts[0][1]]
        shift, offset = shift_step, 0
        for place, (own_steps, own_layers, _) in enumerate(parts):
            if place == 1:
                shift = offset + 1
            steps += [offset + step for step in own_steps]
            for layer, values in zip(layers, own_layers, strict=True):
                layer += values
            offset = steps[-1]
        label = name or Path(paths.split(",")[-1]).name
        curves.append(imbalance_curve(label, steps, layers, ideal=parts[0][2], shift_step=shift))
    return curves


def _imbalance_of(run: str) -> tuple[list[int], list[list[float]], float]:
    """Steps, MRI of each layer at each of them, and the ideal K/E as the mean over layers."""
    path = _state_of(run)
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--log_history: {path} is no state of a trainer: {error}.") from error
    entries = {entry["step"]: entry for entry in history if "mri/layer_00" in entry}  # the last one of a step
    if not entries:
        raise ValueError(
            f"--log_history: {path} holds no MRI of layers: train with CPTTrainer, or add RouterMonitorCallback."
        )
    steps = sorted(entries)
    first = entries[steps[0]]
    keys = sorted((key for key in first if _LAYER.fullmatch(key)), key=lambda key: int(_LAYER.fullmatch(key)[1]))
    ideals = [first[key] / first[key.replace("mri/", "mri_normalized/")] for key in keys]
    return steps, [[entries[step][key] for step in steps] for key in keys], round(sum(ideals) / len(ideals), 9)


def _state_of(run: str) -> Path:
    folder = Path(run).expanduser()
    if folder.is_file():
        return folder
    found = [path for path in folder.glob(f"checkpoint-*/{STATE_FILE}") if path.parent.name[11:].isdigit()]
    newest = sorted(found, key=lambda path: int(path.parent.name[11:]))[-1:]
    path = next((path for path in (folder / STATE_FILE, *newest) if path.is_file()), None)
    if path is None:
        raise ValueError(f"--log_history {run!r} has no {STATE_FILE}: name the output folder of a trainer.")
    return path
