"""Unlearn, update and retain in one operation, for any causal LM.

accelerate launch scripts/surgery.py --model_name_or_path my-model --bench my-surgery-bench --output_dir operated

accelerate launch scripts/surgery.py --model_name_or_path Qwen/Qwen3-1.7B \\
    --unlearn_dataset_name gone.jsonl --obsolete_dataset_name old.jsonl --update_dataset_name new.jsonl \\
    --retain_dataset_name kept.jsonl --unseen_dataset_name never_read.jsonl --use_peft --output_dir qwen3-operated

The same job is `hf-moe-cpt surgery ...`; `--config recipe:NAME` reads arguments from a file, `--use_peft` trains an
adapter. `--preset paper` sets what the authors' code does; what the file or the command line say wins over it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import ParallelArguments, given_values, parallel_options, parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.data.surgery_bench import SETS, SurgeryBench
from hf_moe_cpt.data.surgery_bench.rows import read_columns, with_columns
from hf_moe_cpt.generation.pairs import load_table
from hf_moe_cpt.machine import leave_process_group
from hf_moe_cpt.model_arguments import ModelArguments
from hf_moe_cpt.planning.plan import ASKED, fit_to_gpu
from hf_moe_cpt.reading import read_tokenizer
from hf_moe_cpt.trainers.surgery.data import read_rows
from hf_moe_cpt.trainers.surgery.surgery_config import PRESETS, SurgeryConfig, preset_settings
from hf_moe_cpt.trainers.surgery.surgery_trainer import REFERENCE_FOLDER, SurgeryTrainer
from hf_moe_cpt.trainers.surgery.verdict import GAP_FORMULA


@dataclass
class SurgeryArguments:
    """Which texts; a name is a .jsonl, .json or .parquet file, a folder, a Hub id, or ID:CONFIGURATION:SPLIT."""

    preset: str | None = HfArg(
        default=None, help=f"Whole settings: {', '.join(PRESETS)}. Other arguments win over it."
    )
    bench: str | None = HfArg(
        default=None, help="Folder of a SurgeryBench, whose sets are taken where none is named below."
    )
    unlearn_dataset_name: str | None = HfArg(default=None, help="What is to be forgotten.")
    obsolete_dataset_name: str | None = HfArg(default=None, help="Old versions of what is updated.")
    update_dataset_name: str | None = HfArg(default=None, help="What is to be learnt.")
    retain_dataset_name: str | None = HfArg(default=None, help="On what the model must stay as it is.")
    neighbour_dataset_name: str | None = HfArg(
        default=None, help="Texts like the unlearned ones about other subjects, a second anchor."
    )
    unseen_dataset_name: str | None = HfArg(
        default=None, help="Texts of that kind that the model never read: how far to forget."
    )
    dataset_split: str = HfArg(default="train", help="Split of data sets on the Hub.")
    eval_dataset_names: list[str] | None = HfArg(
        default=None, help="Held-out rows that no term sees, as retain=a.jsonl neighbour=b.jsonl."
    )
    columns: list[str] | None = HfArg(
        default=None, help="Your names of our columns, as text=article, or prompt='Question: {question}\nAnswer:'."
    )
    tokenizer_name_or_path: str | None = HfArg(default=None, help="Tokenizer, if it is not the model's.")
    trust_remote_code: bool = HfArg(default=False, help="Run model code from the Hub.")


ARGUMENTS = (ModelArguments, SurgeryArguments, SurgeryConfig, ParallelArguments)


def load_sets(args: SurgeryArguments) -> dict[str, Dataset | None]:
    """The rows of each set by name, None for those that nothing names."""
    bench = None if args.bench is None else SurgeryBench.load(args.bench)
    found: dict[str, Dataset | None] = {}
    for name in SETS:
        source = getattr(args, f"{name}_dataset_name")
        if source is None:
            found[name] = (bench.documents.get(name) or None) if bench else None
        else:
            found[name] = _load(source, args)
    return found


def _load(source: str, args: SurgeryArguments) -> Dataset:
    columns = read_columns(args.columns)
    if Path(source).suffix == ".jsonl":
        return read_rows(source, columns)
    rows = load_table(source, args.dataset_split)
    return rows.map(lambda row: with_columns(row, columns), desc="Naming columns") if columns else rows


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, operate, measure, save."""
    preset = given_values(argv, "preset")["preset"]
    defaults = {} if preset is None else preset_settings(preset)
    model, surgery, training, parallel = parse_arguments(
        ARGUMENTS, argv, program="hf-moe-cpt surgery", description=__doc__, defaults=defaults
    )
    model.check(training, besides=(REFERENCE_FOLDER,))
    dealt = parallel_options(parallel, training)
    used = [name for name, weight in training.weights.items() if weight > 0]
    setup = {
        "trainer": "surgery",
        "batch_size": max(getattr(training, f"{name}_batch_size") for name in used),
        "sequence_length": training.max_length,
        "reference": "copy" if training.reference == "copy" else "cache",
        "terms": len(used),
    }
    asked, trusts = given_values(argv, *ASKED), surgery.trust_remote_code
    batch = "--<set>_batch_size"
    training = fit_to_gpu(model, training, asked, setup, dealt, trust_remote_code=trusts, batch_option=batch)
    training.model_init_kwargs = {**dealt, **(training.model_init_kwargs or {})}
    run(surgery, model, training)
    leave_process_group()


def run(surgery: SurgeryArguments, model: ModelArguments, training: SurgeryConfig) -> None:
    """Everything after the arguments; nothing of it is alive afterwards."""
    sets = load_sets(surgery)
    named = read_columns(surgery.eval_dataset_names, "--eval_dataset_names", "retain=kept.jsonl")
    training.sets_in_force(sets)
    trainer = SurgeryTrainer(  # given a name, it looks at every row before it reads weights
        model.model_name_or_path,
        args=model.given_to(training, trust_remote_code=surgery.trust_remote_code or None),
        **{f"{name}_dataset": rows for name, rows in sets.items()},
        eval_dataset={name: _load(source, surgery) for name, source in named.items()},
        processing_class=read_tokenizer(
            surgery.tokenizer_name_or_path or model.model_name_or_path, trust_remote_code=surgery.trust_remote_code
        ),
        peft_config=model.peft_config(trust_remote_code=surgery.trust_remote_code),
    )
    if trainer.is_world_process_zero() and training.metric_for_best_model:
        print(f"best model by {GAP_FORMULA}")
    trainer.train()
    if trainer.is_world_process_zero():
        print(f"verdict: {trainer.verdict}")
    trainer.save_model()
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.create_model_card(tags=list(trainer.model.model_tags))
    if training.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    run_script(main)
