"""Try a few learning rates for a few steps each, before a run: what is learnt against what is forgotten.

hf-moe-cpt rewarm --config five.yaml --trial_steps 50 --rates 1e-5 3e-5 1e-4 3e-4

Options are those of cpt, so that one file serves both. Every trial starts from the same weights, warms up over a tenth
of its steps, stays at its rate, and reads the same first batches of the run; nothing of it is kept. Held-out text is
needed: of replayed sources too, or forgetting is not seen. --max_forgetting is the budget within which to choose.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PrinterCallback
from transformers.hf_argparser import HfArg
from transformers.utils import logging as transformers_logging

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.continual import START, StartArguments, fitted, load_model
from hf_moe_cpt.machine import leave_process_group
from hf_moe_cpt.optim.schedules import RateTrial, recommended_rate
from hf_moe_cpt.reports import aligned
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_data import load_data, named_eval_sets
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer


@dataclass
class TrialArguments:
    """The trials"""

    rates: list[float] | None = HfArg(
        default=None, help="Learning rates to try; unset: a tenth, a third, once and three times --learning_rate."
    )
    trial_steps: int = HfArg(default=50, metadata={"range": "[2, inf)"}, help="Optimizer steps of each.")


ARGUMENTS = (TrialArguments, *START)
_QUIET = {"save_strategy": "no", "report_to": [], "push_to_hub": False, "eval_strategy": "no", "disable_tqdm": True}
_QUIET["log_level"] = "error"


def main(argv: Sequence[str] | None = None) -> None:
    """Try, tabulate, recommend."""
    trial, model_args, data_args, training, parallel_args = parse_arguments(
        ARGUMENTS, argv, program="hf-moe-cpt rewarm", description=__doc__
    )
    rates = trial.rates or [training.learning_rate * factor for factor in (0.1, 1 / 3, 1, 3)]
    if min(rates) <= 0:
        raise ValueError(f"--rates {min(rates)}: a learning rate is above 0.")
    budget = training.max_forgetting
    training, parallel = fitted(argv, model_args, training, parallel_args)
    data = load_data(data_args, training)
    held_out, sources = named_eval_sets(data["eval_dataset"], None), training.sources()
    if not any(name in sources and sources[name].role == "new" for name in held_out):
        raise ValueError(
            "no held-out text of a new source shows what is learnt: name some, or give --held_out_fraction."
        )
    trials = []
    for number, rate in enumerate(sorted(rates), start=1):
        begin = time.monotonic()
        with _quiet(is_first=number == 1):
            trials.append(_tried(rate, trial.trial_steps, model_args, training, data, parallel))
        if training.process_index == 0:
            seconds = time.monotonic() - begin
            told = ", ".join(map(" ".join, zip(_MEASURES, _told(trials[-1]), strict=True)))
            print(f"trial {number} of {len(rates)}: {told}; {seconds:.1f} s", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if training.process_index == 0:
        print(*aligned([_MEASURES, *map(_told, trials)]), sep="\n")
        chosen, why = recommended_rate(trials, budget)
        print(f"no recommendation: {why}" if chosen is None else f"--learning_rate {chosen.rate:g}: {why}")
    leave_process_group()


_MEASURES = ("rate", "adaptation", "forgetting")


def _told(trial: RateTrial) -> tuple[str, ...]:
    return (f"{trial.rate:.3g}", *("?" if value is None else f"{value:.4f}" for value in trial[1:]))


@contextmanager
def _quiet(is_first: bool) -> Iterator[None]:
    """Without bars and logs of steps; what is said of the data is said at the first trial."""
    had_bars = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    if not is_first:
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        transformers_logging.set_verbosity(level)
        if had_bars:
            transformers_logging.enable_progress_bar()


def _tried(
    rate: float, steps: int, model: StartArguments, training: CPTConfig, data: dict[str, Any], parallel: dict[str, Any]
) -> RateTrial:
    """Nats per token of a few steps at a rate; not a number where they diverged."""
    args, tokenizer = copy(training), model.tokenizer()
    phases = {"warmup_fraction": 0.1, "cooldown_fraction": 0.0, "constant_fraction": 0.9, "anneal_fraction": 0.0}
    rates = {"learning_rate": rate, "constant_learning_rate": rate, "min_learning_rate": 0.0}
    kept = {"cpt_schedule": "wsd", "starting_phase": "decayed", "weight_schedule": "constant"}
    off = {
        "max_forgetting": None,
        "on_forgetting": "stop",
        "resume_from_checkpoint": None,
        "load_best_model_at_end": False,
    }
    for name, value in {**_QUIET, **phases, **rates, **kept, **off, "max_steps": steps}.items():
        setattr(args, name, value)
    args.mixture = training.mixture and {
        name: {key: value for key, value in source.items() if key != "end_weight"}
        for name, source in training.mixture.items()
    }
    with TemporaryDirectory() as folder:
        args.output_dir = str(Path(folder) / "trial")
        trainer = CPTTrainer(load_model(model, tokenizer, args, parallel), args, **data, processing_class=tokenizer)
        trainer.pop_callback(PrinterCallback)
        try:
            trainer.train()
            metrics = trainer.evaluate()
        except FloatingPointError:
            metrics = {}
    return RateTrial(rate, metrics.get("adaptation", float("nan")), metrics.get("forgetting"))


if __name__ == "__main__":
    run_script(main)
