"""The ways to step that a benchmark of surgery compares, each with a model of its own and equal weights and batches.

A step is what `Trainer` does for a batch: `training_step` (copy to the device, forward passes, reference, loss,
metrics, backward), gradient clipping, the optimizer. Source: ours.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback

from hf_moe_cpt.scripts import benchmark_tools as tools
from hf_moe_cpt.scripts.bench_preference_contenders import NUM_BATCHES, Workload, build_model
from hf_moe_cpt.scripts.bench_preference_memory import peak_of_steps
from hf_moe_cpt.trainers.surgery.set_mixture import collate_sets
from hf_moe_cpt.trainers.surgery.surgery_config import SurgeryConfig
from hf_moe_cpt.trainers.surgery.surgery_trainer import SurgeryTrainer
from hf_moe_cpt.trainers.surgery.term_gradients import TermGradients


TARGET = 5.0  # nats per token, in place of what unseen text would say
NO_EVALUATION = {
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
}
# Sets and settings of a preset: four terms as in the paper, or five.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"sets": ("unlearn", "obsolete", "update", "retain"), "settings": {}},
    "safe": {
        "sets": ("unlearn", "obsolete", "update", "retain", "neighbour"),
        "settings": {"forget_target": TARGET},
    },
}


@dataclass(frozen=True)
class Contender:
    """How a step is made. by_term: a backward pass for each term, else one of their sum. logs: at a logging step."""

    by_term: bool
    reference: str
    logs: bool = False


CONTENDERS: Mapping[str, Contender] = {
    "by-term": Contender(True, "cache"),
    "summed": Contender(False, "cache"),
    "by-term-copy": Contender(True, "copy"),
    "summed-copy": Contender(False, "copy"),
    "by-term-logged": Contender(True, "cache", logs=True),
}


@dataclass(frozen=True)
class SurgeryWorkload(Workload):
    """Which model steps on which rows. batch_size: rows of each set in a step. length: tokens of every row."""

    preset: str = "safe"


class SurgerySteps:
    """One contender ready to step: model and reference on the device, optimizer, the batches of the workload."""

    def __init__(self, name: str, workload: SurgeryWorkload) -> None:
        self.contender = CONTENDERS[name]
        self._folder = tempfile.TemporaryDirectory(prefix="bench_surgery_")  # the cache; gone with the steps
        self.trainer = _trainer(self.contender, workload, Path(self._folder.name))
        trainer = self.trainer
        trainer._prepare()
        trainer.create_optimizer()
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        # the training loop sets these
        trainer.term_gradients = TermGradients(trainer.model.parameters())
        trainer.current_gradient_accumulation_steps = 1
        trainer.state.logging_steps = 1
        if workload.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        items = [trainer.train_dataset[place] for place in range(NUM_BATCHES)]
        self.batches = [collate_sets([item], trainer.pad_token_id) for item in items]
        self.num_done = 0
        self.loss: torch.Tensor | None = None  # of the last step, on the device

    def step(self) -> None:
        """Train on the next batch."""
        trainer, batch = self.trainer, self.batches[self.num_done % NUM_BATCHES]
        if self.contender.by_term:
            self.loss = trainer.training_step(self.model, batch)
        else:
            self.model.train()
            with trainer.accelerator.autocast():
                loss = trainer.compute_loss(self.model, trainer._prepare_inputs(batch))
            trainer.accelerator.backward(loss)
            self.loss = loss.detach()
            del loss
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_done += 1

    def log(self) -> None:
        """What `Trainer` does every `logging_steps`: the metrics collected since the last time become numbers."""
        self.trainer.log({"loss": float(self.loss)})


def peak_mebibytes(name: str, workload: SurgeryWorkload, num_steps: int) -> float:
    """Most memory that a contender holds in steps after the first two; call it in a process of its own."""
    return peak_of_steps(SurgerySteps(name, workload), torch.device(workload.device), num_steps)


def reference_mebibytes(workload: SurgeryWorkload) -> tuple[float, float]:
    """Size of the whole model before surgery, and of its head alone, which a cache keeps."""
    with torch.device("meta"):
        model = build_model(dataclasses.replace(workload, device="meta"))
    parameters = sum(weight.nbytes for weight in model.parameters())
    head = model.get_output_embeddings()
    return parameters / tools.MEBIBYTE, sum(weight.nbytes for weight in head.parameters()) / tools.MEBIBYTE


def chosen_contenders(names: Sequence[str] | None) -> list[str]:
    """The named contenders, all if None, in the order of the table. Raises ValueError for a name it does not have."""
    tools.check_names("--contenders", names, CONTENDERS)
    return [name for name in CONTENDERS if names is None or name in names]


def random_rows(workload: SurgeryWorkload, vocabulary_size: int) -> dict[str, Dataset]:
    """NUM_BATCHES batches of tokenised rows of each set, all of full length, so that nothing is padding."""
    generator = torch.Generator().manual_seed(workload.seed)
    shape = NUM_BATCHES * workload.batch_size, workload.length
    return {
        name: Dataset.from_dict({"input_ids": torch.randint(3, vocabulary_size, shape, generator=generator).tolist()})
        for name in PRESETS[workload.preset]["sets"]
    }


def _trainer(contender: Contender, workload: SurgeryWorkload, folder: Path) -> SurgeryTrainer:
    """The trainer, set up but for what only its training loop does."""
    sets = PRESETS[workload.preset]["sets"]
    settings = {
        **PRESETS[workload.preset]["settings"],
        **NO_EVALUATION,
        **{f"{name}_batch_size": workload.batch_size for name in sets},
        "output_dir": str(folder / "run"),
        "max_length": workload.length,
        "reference": contender.reference,
        "log_term_gradients": contender.logs,
        "bf16": workload.dtype == "mixed",
        "gradient_checkpointing": workload.gradient_checkpointing,
        "use_cpu": workload.device == "cpu",
        "seed": workload.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 1_000_000,  # never reached
    }
    model = build_model(workload)
    rows = random_rows(workload, model.config.get_text_config().vocab_size)
    trainer = SurgeryTrainer(
        model,
        SurgeryConfig.from_preset(workload.preset, **settings),
        **{f"{name}_dataset": data for name, data in rows.items()},
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
