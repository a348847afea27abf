"""Continue pre-training any causal LM on new text with replay of the old, or pre-train one of our presets.

accelerate launch scripts/cpt.py \\
    --model_name_or_path allenai/OLMoE-1B-7B-0924 --dataset_name my_texts/ \\
    --replay_dataset_name allenai/dolma_sample.jsonl --replay_ratio 0.3 \\
    --max_steps 2000 --max_length 2048 --output_dir olmoe-on-my-texts

The same job is `hf-moe-cpt cpt ...`; `--config recipe:NAME` reads arguments from a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_moe_cpt.arguments import ParallelArguments, parallel_options, parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.data.random import derive_seed
from hf_moe_cpt.data.text import load_text_dataset
from hf_moe_cpt.extras import require
from hf_moe_cpt.machine import leave_process_group
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.optim.schedules import describe_schedule
from hf_moe_cpt.trainers.common.checkpointing import require_unused, resolve_resume
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer


@dataclass
class ModelArguments:
    """Which model, and how it is loaded."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the model to continue; or use --preset."}
    )
    preset: str | None = field(
        default=None, metadata={"help": "Pre-train this preset of cpt_moe from scratch, e.g. pb-granular-2b."}
    )
    preset_overrides: str | None = field(
        default=None,
        metadata={"help": "Configuration fields to change in the preset, as JSON: '{\"num_hidden_layers\": 4}'."},
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer, if it is not the model's; needed with --preset."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    dtype: str = field(
        default="float32", metadata={"help": "Type of the weights: float32, bfloat16, float16 or auto."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    experts_implementation: str | None = field(default=None, metadata={"help": "eager, grouped_mm, ..."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that lies in the Hub repository."}
    )


@dataclass
class DataArguments:
    """Which text is new and which is replayed; a name is a Hub id, a folder, or a .jsonl .parquet .arrow .txt file."""

    dataset_name: list[str] = field(metadata={"help": "New text: one or more names."})
    replay_dataset_name: list[str] | None = field(default=None, metadata={"help": "Old text, for --replay_ratio."})
    eval_dataset_name: list[str] | None = field(default=None, metadata={"help": "Held-out new text."})
    replay_eval_dataset_name: list[str] | None = field(default=None, metadata={"help": "Held-out old text."})
    dataset_split: str = field(default="train", metadata={"help": "Split of data sets on the Hub."})
    held_out_fraction: float = field(
        default=0.0, metadata={"help": "Share of the documents to hold out where no held-out text is named."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read while training instead of tokenising first."})


ARGUMENTS = (ModelArguments, DataArguments, CPTConfig, ParallelArguments)


def load_model(
    args: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    parallel: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The named model, or a fresh one of the preset with the tokenizer's vocabulary and special tokens.

    parallel: of `parallel_options`; the named model is cut while it is read.
    """
    chosen = {"attn_implementation": args.attn_implementation, "experts_implementation": args.experts_implementation}
    options: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    if args.model_name_or_path is not None:
        return AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path,
            revision=args.model_revision,
            dtype=args.dtype,
            trust_remote_code=args.trust_remote_code,
            **options,
            **(parallel or {}),
        )
    fitting = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CptMoeConfig.from_preset(args.preset, **{**fitting, **_overrides(args)})
    set_seed(seed)
    return AutoModelForCausalLM.from_config(config, **options)


def _overrides(args: ModelArguments) -> dict[str, Any]:
    try:
        values = json.loads(args.preset_overrides or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"--preset_overrides {args.preset_overrides!r} is no JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"--preset_overrides {args.preset_overrides!r} must be a JSON object of field: value.")
    return values


def load_tokenizer(args: ModelArguments) -> PreTrainedTokenizerBase:
    """The named tokenizer, or the model's."""
    name = args.tokenizer_name_or_path or args.model_name_or_path
    return AutoTokenizer.from_pretrained(name, revision=args.model_revision, trust_remote_code=args.trust_remote_code)


def load_data(args: DataArguments, training: CPTConfig) -> dict[str, Dataset | IterableDataset | None]:
    """The trainer's four data sets by its argument names; documents are held out by hash of seed where asked."""
    pairs = {
        ("train_dataset", "eval_dataset"): (args.dataset_name, args.eval_dataset_name),
        ("replay_dataset", "replay_eval_dataset"): (args.replay_dataset_name, args.replay_eval_dataset_name),
    }
    loaded: dict[str, Dataset | IterableDataset | None] = {}
    for (train_key, eval_key), (train_name, eval_name) in pairs.items():
        train = None if train_name is None else _load(train_name, args, training, args.streaming)
        held_out = None if eval_name is None else _load(eval_name, args, training, streaming=False)
        if train is not None and held_out is None and args.held_out_fraction > 0:
            train, held_out = _hold_out(train, args.held_out_fraction, training.seed)
        loaded[train_key], loaded[eval_key] = train, held_out
    if training.replay_ratio == 0:  # old text without replay is there to measure forgetting
        loaded["replay_dataset"] = None
    return loaded


def _load(names: list[str], args: DataArguments, training: CPTConfig, streaming: bool) -> Dataset | IterableDataset:
    source = names[0] if len(names) == 1 else names
    return load_text_dataset(source, split=args.dataset_split, streaming=streaming, text_column=training.text_column)


def _hold_out(data: Dataset | IterableDataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    if isinstance(data, IterableDataset):
        raise ValueError("held_out_fraction cannot split a stream: name held-out text with --eval_dataset_name.")
    if not 0 < fraction < 1 or len(data) < 2:
        raise ValueError(
            f"held_out_fraction={fraction} of {len(data)} document(s) leaves one side empty: give a share in (0, 1) "
            "and at least two documents, or name held-out text with --eval_dataset_name."
        )
    parts = data.train_test_split(test_size=fraction, seed=derive_seed(seed, "held out") % 2**32)
    return parts["train"], parts["test"]


def check_arguments(model: ModelArguments, training: CPTConfig, parallel: Mapping[str, Any] | None = None) -> None:
    """Refuse what cannot work before anything is loaded."""
    if parallel and model.preset is not None:
        raise ValueError(
            f"--preset {model.preset} makes a whole model on every rank, and parts are wanted: save it first, "
            "AutoModelForCausalLM.from_config(config).save_pretrained(folder), and name it with --model_name_or_path."
        )
    if (model.model_name_or_path is None) == (model.preset is None):
        raise ValueError(
            f"Give one of --model_name_or_path ({model.model_name_or_path}) and --preset ({model.preset}): the first "
            "continues a model, the second starts one."
        )
    if training.use_liger_kernel:
        require("liger_kernel", needed_by="--use_liger_kernel")
    if model.preset is not None and model.tokenizer_name_or_path is None:
        raise ValueError("--preset needs --tokenizer_name_or_path: a fresh model has no tokenizer of its own.")
    if resolve_resume(training.output_dir, training.resume_from_checkpoint) is None and training.process_index == 0:
        require_unused(training.output_dir)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, train, evaluate, save."""
    model_args, data_args, training, parallel_args = parse_arguments(
        ARGUMENTS, argv, program="hf-moe-cpt cpt", description=__doc__
    )
    parallel = parallel_options(parallel_args, training)
    check_arguments(model_args, training, parallel)
    run(model_args, data_args, training, parallel)
    leave_process_group()


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    training: CPTConfig,
    parallel: Mapping[str, Any] | None = None,
) -> None:
    """Everything after the arguments; nothing of it is alive afterwards."""
    data = load_data(data_args, training)
    tokenizer = load_tokenizer(model_args)
    trainer = CPTTrainer(
        load_model(model_args, tokenizer, training.seed, parallel), training, **data, processing_class=tokenizer
    )
    if trainer.is_world_process_zero():
        settings = training.schedule_settings(trainer.starting_phase)
        print(describe_schedule(**settings, tokens_per_step=trainer.throughput.tokens_per_step))
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
