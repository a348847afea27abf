"""One run of the comparison: pairs for a seed, training with `RainbowPOTrainer`, grades. Runs in worker processes.

What all runs of a process share (the reference, its samples, the pairs of a seed) is made once. Source: ours.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel, PrinterCallback
from transformers.utils import logging as transformers_logging

from hf_moe_cpt.scripts.benchmark_tools import Attempt
from hf_moe_cpt.scripts.compare_preference_evaluation import WorldExam
from hf_moe_cpt.scripts.compare_preference_plan import Comparison, Run
from hf_moe_cpt.scripts.compare_preference_policy import load_policy, sample_answers, uniform_numbers
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_trainer import RainbowPOTrainer


class Workshop:
    """Trains and grades the runs of one comparison, from the policy saved in `policy_folder`."""

    def __init__(self, comparison: Comparison, policy_folder: Path) -> None:
        self.comparison, self.policy_folder = comparison, policy_folder
        self.tokenizer = comparison.world.tokenizer()
        self._exams: dict[str, WorldExam] = {}
        self._pairs: dict[int, datasets.Dataset] = {}

    @cached_property
    def reference(self) -> PreTrainedModel:
        """The policy before any preference training."""
        return load_policy(self.policy_folder)

    def exam(self, split: str) -> WorldExam:
        """The examination on the prompts of a split."""
        if split not in self._exams:
            scale = self.comparison.scale
            samples = scale.tune_samples if split == "tune" else scale.test_samples
            limits = {"samples": samples, "max_tokens": scale.max_tokens, "num_pairs": scale.eval_pairs}
            self._exams[split] = WorldExam(self.comparison.world, self.reference, split, **limits)
        return self._exams[split]

    def training_pairs(self, seed: int) -> datasets.Dataset:
        """The labelled pairs of a seed, the same for all methods."""
        if seed not in self._pairs:
            world, scale = self.comparison.world, self.comparison.scale
            begin = self.comparison.first_pair(seed)
            indices = np.arange(begin, begin + scale.num_pairs)
            answers = None
            if self.comparison.pairs_from == "reference":
                prompts = torch.from_numpy(world.prompts(indices))
                shape = (len(indices), scale.max_tokens)
                first, second = (
                    sample_answers(self.reference, prompts, uniform_numbers(seed, side, *shape)).numpy()
                    for side in ("first answer", "second answer")
                )
                answers = first, second
            self._pairs[seed] = world.dataset(world.pairs(indices, completions=answers))
        return self._pairs[seed]

    def carry_out(self, run: Run) -> dict[str, Any]:
        """Train and grade; the record holds the settings, the grades, the last training metrics and seconds."""
        settings = self.comparison.trainer_settings(run)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of arguments that TRL sets by default
            warnings.filterwarnings("ignore", "beta=.* is of the scale of")  # of long answers
            trainer = RainbowPOTrainer(
                load_policy(self.policy_folder),
                args=_arguments(settings, folder),
                train_dataset=self.training_pairs(run.seed),
                processing_class=self.tokenizer,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        trained = time.perf_counter()
        grades = self.exam(run.split).grade(trainer.model.eval(), run.seed)
        return {
            "method": run.method,
            "split": run.split,
            "seed": run.seed,
            "strength": run.strength,
            "settings": settings,
            "grades": grades,
            "training": trainer.state.log_history[-1],
            "seconds": {"training": trained - started, "grading": time.perf_counter() - trained},
        }


def _arguments(settings: dict[str, Any], folder: str) -> RainbowPOConfig:
    """Plain single-precision training on the CPU that saves nothing; the schedule is the same for all."""
    return RainbowPOConfig(
        output_dir=folder,
        **settings,
        per_device_eval_batch_size=256,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


_workshop: Workshop | None = None


def open_workshop(comparison: Comparison, policy_folder: Path) -> None:
    """Make this process a worker: one thread, no bars of libraries, and the workshop for `carry_out_here`."""
    global _workshop
    torch.set_num_threads(1)
    quiet_libraries()
    _workshop = Workshop(comparison, policy_folder)


def quiet_libraries() -> None:
    """No progress bars of single runs and no advice of libraries in this process: one bar shows the whole job."""
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def carry_out_here(run: Run) -> tuple[Run, dict[str, Any]]:
    """The run's record from this process's workshop; of a run that failed, {"error": one line}."""
    with Attempt() as attempt:
        return run, _workshop.carry_out(run)
    return run, {"error": attempt.reason}
