"""Continue pre-training any causal LM on new text with replay of the old, or pre-train one of our presets.

accelerate launch scripts/cpt.py \\
    --model_name_or_path allenai/OLMoE-1B-7B-0924 --dataset_name my_texts/ \\
    --replay_dataset_name allenai/dolma_sample.jsonl --replay_ratio 0.3 \\
    --max_steps 2000 --max_length 2048 --output_dir olmoe-on-my-texts

The same job is `hf-moe-cpt cpt ...`; `--config recipe:NAME` reads arguments from a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.continual import START, StartArguments, fitted, load_model
from hf_moe_cpt.machine import leave_process_group
from hf_moe_cpt.optim.schedules import describe_schedule
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_data import DataArguments, describe_mixture, load_data
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer


ARGUMENTS = START


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, train, evaluate, save."""
    model_args, data_args, training, parallel_args = parse_arguments(
        ARGUMENTS, argv, program="hf-moe-cpt cpt", description=__doc__
    )
    training, parallel = fitted(argv, model_args, training, parallel_args)
    run(model_args, data_args, training, parallel)
    leave_process_group()


class Told(TrainerCallback):
    """Says what the run will do when that is decided: after a checkpoint was read, and again where it changes."""

    def __init__(self, trainer: CPTTrainer) -> None:
        self.trainer, self.told = trainer, ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Before the first step, and before the evaluation in front of it."""
        schedule = self.trainer.schedule_settings()
        text = "\n".join((
            describe_schedule(**schedule, tokens_per_step=self.trainer.throughput.tokens_per_step),
            str(self.trainer.isolation or f"Packing: {args.packing}."),
            describe_mixture(self.trainer),
        ))  # fmt: skip
        if state.is_world_process_zero and text != self.told:
            print(text)
        self.told = text


def run(model_args: StartArguments, data_args: DataArguments, training: CPTConfig, parallel: dict[str, Any]) -> None:
    """Everything after the arguments; nothing of it is alive afterwards."""
    data = load_data(data_args, training)
    tokenizer = model_args.tokenizer()
    model = load_model(model_args, tokenizer, training, parallel)
    trainer = CPTTrainer(model, training, **data, processing_class=tokenizer)
    trainer.add_callback(Told(trainer))
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    if trainer.eval_dataset:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    run_script(main)
