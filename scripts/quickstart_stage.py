"""Run one stage of the quickstart with `CPTTrainer`: make or continue a model, save it, keep its log. Source: ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.scripts.quickstart_data import QuickstartData
from hf_moe_cpt.scripts.quickstart_folder import QuickstartFolder
from hf_moe_cpt.scripts.quickstart_plan import EVALUATIONS, MOE, PRETRAINING_PHASES, Plan, Stage
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer
from hf_moe_cpt.trainers.instruments.checkpoints import BYTES_PER_MOMENT_PAIR
from hf_moe_cpt.trainers.instruments.progress import ShortPrinter


BYTES_PER_WEIGHT = 4  # float32


class BarCallback(TrainerCallback):
    """Moves the bar of the whole job; steps made before a resume count at once."""

    def __init__(self, bar: tqdm, stage: Stage) -> None:
        self.bar, self.stage = bar, stage

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Name the stage."""
        self.bar.set_description(self.stage.name)
        self.bar.update(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """One step further."""
        self.bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Show the latest training loss."""
        if logs and "lm_loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['lm_loss']:.2f}", refresh=False)


def run_stage(stage: Stage, plan: Plan, data: QuickstartData, folder: QuickstartFolder, bar: tqdm) -> dict[str, Any]:
    """Train, save to `models/`, and return the record: the trainer's log, sizes and where the model came from."""
    checkpoint = folder.checkpoint_to_resume(stage.name)
    start = None if stage.starts_from is None else last_checkpoint(folder, stage.starts_from, plan)
    trainer = CPTTrainer(
        _model(stage, plan, data.tokenizer, start),
        _arguments(stage, plan, folder),
        **_data_sets(stage, data),
        processing_class=data.tokenizer,
        callbacks=[BarCallback(bar, stage)],
    )
    trainer.remove_callback(ShortPrinter)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model(str(folder.model(stage.name)))
    model = trainer.model
    return {
        "parameters": model.num_parameters(),
        "active_parameters": model.num_parameters(only_active=True),
        "tokens_per_step": plan.tokens_per_step,
        "ideal_mri": model.config.num_experts_per_tok / model.config.num_experts if model.config.is_moe else None,
        "history": trainer.state.log_history,
    }


def last_checkpoint(folder: QuickstartFolder, stage: str, plan: Plan) -> Path:
    """The checkpoint at the end of a pre-training stage, with its Adam moments."""
    return folder.work(stage) / f"checkpoint-{plan.scale.steps}"


def checkpoint_bytes(plan: Plan, vocab_size: int) -> int:
    """Disk that a whole quickstart takes at its height.

    Of each model: three sets of weights, and three checkpoints with Adam moments (of pre-training, the last one of a
    continued run, and the one that takes its place).
    """
    parameters = 0
    for preset in (plan.preset, plan.dense_preset):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CptMoeConfig.from_preset(preset, vocab_size=vocab_size))
        parameters += model.num_parameters()
    return 3 * (BYTES_PER_WEIGHT + BYTES_PER_WEIGHT + BYTES_PER_MOMENT_PAIR) * parameters


def _model(stage: Stage, plan: Plan, tokenizer: PreTrainedTokenizerBase, start: Path | None) -> PreTrainedModel:
    if start is not None:
        return AutoModelForCausalLM.from_pretrained(start, local_files_only=True)
    config = CptMoeConfig.from_preset(
        plan.preset if stage.model == MOE else plan.dense_preset,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(plan.seed)
    return AutoModelForCausalLM.from_config(config)


def _data_sets(stage: Stage, data: QuickstartData) -> dict[str, Any]:
    """Pre-training learns the old domain as its "new" text; both domains are measured when a model is continued."""
    if stage.is_pretraining:
        return {"train_dataset": data.old.train, "eval_dataset": data.old.held_out}
    return {
        "train_dataset": data.new.train,
        "replay_dataset": data.old.train if stage.replay_ratio > 0 else None,
        "eval_dataset": data.new.held_out,
        "replay_eval_dataset": data.old.held_out,
    }


def _arguments(stage: Stage, plan: Plan, folder: QuickstartFolder) -> CPTConfig:
    scale = plan.scale
    args = CPTConfig(
        output_dir=str(folder.work(stage.name)),
        max_steps=stage.steps,
        per_device_train_batch_size=scale.batch_size,
        per_device_eval_batch_size=2 * scale.batch_size,
        max_length=scale.max_length,
        packing="concat",
        replay_ratio=stage.replay_ratio,
        learning_rate=scale.learning_rate,
        keep_optimizer_state=not stage.is_pretraining,
        eval_on_start=not stage.is_pretraining,
        eval_strategy="steps",
        eval_steps=max(1, -(-stage.steps // EVALUATIONS)),
        save_steps=max(1, -(-stage.steps // 2)),
        save_total_limit=1,
        logging_steps=1,
        seed=plan.seed,
        report_to="none",
        disable_tqdm=True,
        use_cpu=plan.device == "cpu",
        bf16=plan.device == "cuda",
        dataloader_pin_memory=plan.device == "cuda",
        **(PRETRAINING_PHASES if stage.is_pretraining else {}),
    )
    if args.n_gpu > 1:  # one device, so that the batch of the plan is the batch of a step
        args._n_gpu = 1
    return args
