"""Small surgeries: sets of tokens, settings, trainers."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from hf_moe_cpt.data.surgery_bench import SETS
from hf_moe_cpt.trainers.surgery.surgery_config import SurgeryConfig
from hf_moe_cpt.trainers.surgery.surgery_trainer import SurgeryTrainer
from tests.helpers.cpt_runs import without_clocks
from tests.helpers.tiny_models import CONFIGS, QUICK, tiny_model, tokenized


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
BEST = {**EVALUATED, "save_strategy": "best", "metric_for_best_model": "surgery_gap", "greater_is_better": False}
BEST |= {"load_best_model_at_end": True}


def token_sets(*names: str, rows: int = 12) -> dict[str, Dataset]:
    """Tokenised documents of 5 to 40 tokens for each set, others for each."""
    return {f"{name}_dataset": tokenized(rows, 10 + SETS.index(name)) for name in names or SETS}


SUBJECTS = {"unlearn": range(10), "obsolete": range(10, 20), "update": range(10, 20), "retain": range(20, 40)}
SUBJECTS |= {"unseen": range(40, 50)}


@cache
def known_texts() -> dict[str, Dataset]:
    """Ten texts to forget, ten to replace, twenty to keep and ten that nobody read: three values of each subject."""
    draw, sets = random.Random(0), {}
    for name, subjects in SUBJECTS.items():
        rows = [
            [1, 2 + who % 8, 10 + who // 8, *(token for k in (40, 41, 42) for token in (k, draw.randrange(20, 40))), 0]
            for who in subjects
        ]
        sets[f"{name}_dataset"] = Dataset.from_dict({"input_ids": rows, "subject": [f"{who}" for who in subjects]})
    return sets


@cache
def _weights_that_know() -> dict[str, torch.Tensor]:
    model = tiny_model("llama", hidden_size=32)
    texts = known_texts()
    ids = torch.tensor(
        [row for name in ("unlearn", "obsolete", "retain") for row in texts[f"{name}_dataset"]["input_ids"]]
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(90):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def knowing_model() -> PreTrainedModel:
    """A tiny model that knows the texts to forget, the old versions and those to keep of `known_texts` by heart."""
    model = tiny_model("llama", hidden_size=32)
    model.load_state_dict(_weights_that_know())
    return model


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Four steps at one rate, two rows of each set, float32 on the CPU; all is logged, nothing measured or saved."""
    pace = {"max_steps": 4, "max_length": 16, "learning_rate": 1e-2, **{f"{name}_batch_size": 2 for name in SETS}}
    pace |= {"lr_scheduler_type": "constant", "warmup_steps": 0}
    unmeasured = {"eval_strategy": "no", "eval_on_start": False, "eval_rows": 6, "eval_batch_size": 4}
    unmeasured |= {"load_best_model_at_end": False, "metric_for_best_model": None, "log_term_gradients": False}
    return {"output_dir": str(folder), **QUICK, **pace, **unmeasured, **changes}


def trainer(
    folder: Path,
    model: str | PreTrainedModel = "llama",
    sets: dict[str, Dataset] | None = None,
    preset: str = "safe",
    **changes: Any,
) -> SurgeryTrainer:
    """A surgery on a tiny model; arguments of the trainer itself are told by their names."""
    of_trainer = {
        name: changes.pop(name)
        for name in ("ref_model", "peft_config", "processing_class", "callbacks", "eval_dataset")
        if name in changes
    }
    given = settings(folder, **changes)
    if preset == "paper":  # its own numbers unless they were asked for
        given = {name: value for name, value in given.items() if name in changes or name not in PAPERS_OWN}
    return SurgeryTrainer(
        tiny_model(model) if model in CONFIGS else model,
        SurgeryConfig.from_preset(preset, **given),
        **(token_sets() if sets is None else sets),
        **of_trainer,
    )


PAPERS_OWN = ("learning_rate", "max_steps", "eval_strategy", "save_strategy", *(f"{s}_batch_size" for s in SETS))


def history(run: SurgeryTrainer) -> list[dict[str, float]]:
    """The log without clocks."""
    return without_clocks(run.state.log_history)
