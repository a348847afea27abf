"""The console shows the means; values of single layers go to the trackers and the log file only. Source: ours."""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments


PER_LAYER = "/layer_"


def _readable(logs: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (logs or {}).items() if PER_LAYER not in name}


class ShortProgress(ProgressCallback):
    """transformers' progress bar without the keys of single layers."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Print the short line."""
        super().on_log(args, state, control, logs=_readable(logs), **kwargs)


class ShortPrinter(PrinterCallback):
    """transformers' printed log without the keys of single layers."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Print the short line."""
        super().on_log(args, state, control, logs=_readable(logs), **kwargs)


def shorten_console(trainer: Trainer) -> None:
    """Put the short callbacks in the place of transformers' own, whichever of them the trainer has."""
    for ordinary, short in ((ProgressCallback, ShortProgress), (PrinterCallback, ShortPrinter)):
        if trainer.pop_callback(ordinary) is not None:
            trainer.add_callback(short)
