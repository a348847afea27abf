"""What was done to a model, kept beside its weights: surgery.json, and a section of its card.

A model of which something was cut out looks like any other. The record says what was aimed at and how near the saved
weights came: the objective with its weights and losses, the size of each set, the target of forgetting, the gap (see
surgery_probe.py) at the start, at the end and of the best model, and what ended the run. Source: ours.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.trainer_utils import TrainOutput

from hf_moe_cpt.trainers.instruments.published_run import PublishedRun
from hf_moe_cpt.trainers.surgery.settings_checks import ANCHOR_SETS, FORGET_SETS, UNSEEN, losses_of_sets
from hf_moe_cpt.trainers.surgery.surgery_config import SurgeryConfig
from hf_moe_cpt.trainers.surgery.surgery_probe import GAP_FORMULA, UNSEEN_LOSS


logger = logging.getLogger(__name__)

RECORD_FILE = "surgery.json"
GAP = "eval_surgery_gap"
NOT_SO = "This model was trained from scratch on an unknown dataset."  # said of every model from a folder
PLACES = ("reference_cache_dir", "model_init_kwargs", "dataset_num_proc")  # of the machine, not of the run


class KeepsRecord(PublishedRun):
    """Mixin in front of `Trainer`: every model that it saves has its record, and the card tells it."""

    run_method = "surgery"
    stop_reason: str | None = None  # why it stopped before max_steps
    holds_best = False  # whether the weights are those of the best model again

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """The parent's, and a word of warning if there was no model to go back to."""
        output = super().train(*args, **kwargs)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is None:
            logger.warning(
                "No measured model had a finite gap, so the one of step %d stays, whatever it is: lower the "
                "learning_rate, measure more often (eval_steps), or raise max_retain_kl=%s.",
                self.state.global_step,
                self.args.max_retain_kl,
            )
        return output

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.holds_best = True

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        with _losses_by_name(self.args):  # a function of the caller may have no way into training_args.bin
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            write_record(output_dir or self.args.output_dir, record_of(self))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The parent's card with what was done and how far it got."""
        super().create_model_card(*args, **kwargs)
        path = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero() and path.exists():
            text = path.read_text(encoding="utf-8").replace(NOT_SO, "Something was cut out of this model; see below.")
            path.write_text(f"{text.rstrip()}\n\n{card_section(record_of(self))}", encoding="utf-8")


def record_of(trainer: Any) -> dict[str, Any]:
    """The record of the weights that a `SurgeryTrainer` holds, for JSON; docs/surgery.md explains its keys."""
    args, state, target = trainer.args, trainer.state, trainer.forget_target
    gaps = [(entry["step"], entry[GAP]) for entry in state.log_history if GAP in entry]
    at_the_end = f"max_steps={args.max_steps}" if state.global_step >= args.max_steps else None
    step = state.best_global_step if trainer.holds_best else state.global_step
    measured = next((entry for entry in reversed(state.log_history) if GAP in entry and entry["step"] == step), {})
    return {
        "source": "LLM Surgery, arXiv 2409.13054",
        "objective": objective_text(args, list(trainer.sets)),
        "rows": {name: len(rows) for name, rows in (trainer.measured_sets | trainer.sets).items()},
        "forget_target": _as_json(measured.get(UNSEEN_LOSS, target) if args.follows_unseen else target),
        "forget_target_is": UNSEEN if args.forget_target == UNSEEN else "given",
        "step": step,
        "steps_made": state.global_step,
        "stopped_by": trainer.stop_reason or at_the_end,
        "gap": {
            "formula": GAP_FORMULA,
            "start": _as_json(gaps[0][1]) if gaps and gaps[0][0] == 0 else None,
            "last": _as_json(gaps[-1][1]) if gaps else None,
            "best": None if state.best_global_step is None else _as_json(state.best_metric),
        },
        "measured": {
            name.removeprefix("eval_"): _as_json(value) for name, value in measured.items() if name.startswith("eval_")
        },
        "target_experts": [] if trainer.targets is None else list(trainer.targets.names),
        "settings": {
            name: _as_json(getattr(args, name)) for name in SurgeryConfig.__annotations__ if name not in PLACES
        },
    }


def objective_text(args: SurgeryConfig, sets: list[str]) -> str:
    """The objective in force as one line, with the name of each loss."""
    losses = losses_of_sets(args)
    kl = "KL(before || now)" if args.kl_direction == "forward" else "KL(now || before)"
    names = {name: losses[name].name for name in FORGET_SETS} | dict.fromkeys(ANCHOR_SETS, kl) | {"update": "CE"}
    return " + ".join(f"{args.weights[name]:g} * {names[name]}[{name}]" for name in sets)


@contextmanager
def _losses_by_name(args: SurgeryConfig) -> Iterator[None]:
    given = {name: getattr(args, name) for name in ("forget_loss", "obsolete_loss")}
    try:
        for name, loss in given.items():
            setattr(args, name, _as_json(loss))
        yield
    finally:
        for name, loss in given.items():
            setattr(args, name, loss)


def write_record(folder: str | Path, record: dict[str, Any]) -> None:
    """Keep a record with a model."""
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    (Path(folder) / RECORD_FILE).write_text(f"{text}\n", encoding="utf-8")


def card_section(record: dict[str, Any]) -> str:
    """A record as a section of a model card."""
    target, gap = record["forget_target"], record["gap"]
    shown = "none" if target is None else f"{target:.4g} nats per token ({record['forget_target_is']})"
    numbers = ", ".join(f"{name} {_shown(gap[name])}" for name in ("start", "last", "best"))
    stopped_by = record["stopped_by"] or "not yet"
    rows = ", ".join(f"{name} {count}" for name, count in record["rows"].items())
    return (
        "## What was done\n\n"
        f"[LLM Surgery](https://arxiv.org/abs/2409.13054): texts were unlearnt, replaced and kept. `{RECORD_FILE}` "
        "holds all settings.\n\n"
        f"- objective, minimised: `{record['objective']}`\n"
        f"- rows: {rows}\n"
        f"- forgetting aims at: {shown}\n"
        f"- weights of step {record['step']} of {record['steps_made']}; stopped by: {stopped_by}\n"
        f"- gap in nats per token, 0 is perfect: {numbers}\n"
    )


def _shown(value: float | str | None) -> str:
    return "not measured" if value is None else f"{value:.4g}" if isinstance(value, float) else value


def _as_json(value: Any) -> Any:
    """Numbers that JSON has not, and functions, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str | list | dict):
        return value
    return getattr(value, "name", None) or getattr(value, "__name__", None) or str(value)
