"""Preference optimisation of any causal LM, with RainbowPO's objective or any method that it contains.

accelerate launch scripts/rainbowpo.py \\
    --model_name_or_path meta-llama/Meta-Llama-3-8B-Instruct \\
    --dataset_name princeton-nlp/llama3-ultrafeedback-armorm --dataset_test_split test \\
    --preset rainbowpo --per_device_train_batch_size 2 --gradient_accumulation_steps 16 --output_dir llama-rainbowpo

The same job is `hf-moe-cpt rainbowpo ...`; `--config recipe:NAME` reads arguments from a file, `--use_peft` trains
an adapter. `--preset` sets the switches of a method; what the file or the command line say wins over it. Several data
sets are mixed: `--dataset_name ours.jsonl theirs --dataset_weights 3 1`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import ParallelArguments, given_values, parallel_options, parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.generation.pairs import load_table
from hf_moe_cpt.machine import leave_process_group
from hf_moe_cpt.model_arguments import ModelArguments
from hf_moe_cpt.planning.plan import ASKED, fit_to_gpu
from hf_moe_cpt.trainers.rainbowpo.data import mixed
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import PRESETS, RainbowPOConfig, preset_settings
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_trainer import RainbowPOTrainer, completions_logged


@dataclass
class PreferenceArguments:
    """Which pairs, and which method's switches."""

    dataset_name: list[str] = HfArg(
        help="Preference pairs: a Hub id, a folder, or a .jsonl, .json, .parquet or .arrow file; or several."
    )
    dataset_weights: list[float] | None = HfArg(
        default=None,
        help="Shares of several data sets, in proportion: pairs are drawn until one of them is used up, none "
        "twice. Unset: all pairs of all.",
    )
    preset: str | None = HfArg(
        default=None, help=f"Switches of a method: {', '.join(PRESETS)}. Other arguments win over it."
    )
    dataset_config: str | None = HfArg(default=None, help="Configuration of a data set on the Hub.")
    dataset_train_split: str = HfArg(default="train", help="Split to train on.")
    dataset_test_split: str | None = HfArg(default=None, help="Split to evaluate on.")
    eval_dataset_name: str | None = HfArg(
        default=None, help="Held-out pairs from elsewhere; their split is the train split if not named."
    )
    max_train_pairs: int | None = HfArg(default=None, help="Take the first pairs only.")
    log_completions: int = HfArg(
        default=0,
        metadata={"range": "[0, inf)"},
        help="Answers to so many held-out prompts go to W&B or Comet as a table, at every evaluation or log.",
    )
    dry_run: bool = HfArg(
        default=False, help="Show the objective and the first pairs as the model sees them, and stop."
    )


ARGUMENTS = (ModelArguments, PreferenceArguments, RainbowPOConfig, ParallelArguments)
LONGEST = 2048  # tokens that are planned for where sequences are not cut


def load_pairs(args: PreferenceArguments, seed: int = 0) -> dict[str, Dataset | dict[str, Dataset] | None]:
    """The trainer's data sets by its argument names."""
    names, weights = args.dataset_name, args.dataset_weights
    tables = [load_table(name, args.dataset_train_split, args.dataset_config) for name in names]
    train = tables[0] if len(tables) == 1 and weights is None else mixed(tables, names, weights, seed)
    if args.max_train_pairs is not None:
        if args.max_train_pairs < 1:
            raise ValueError(f"--max_train_pairs {args.max_train_pairs} leaves nothing to train on: give at least 1.")
        train = train.select(range(min(args.max_train_pairs, len(train))))
    held_out = None
    if args.eval_dataset_name is not None:
        held_out = load_table(args.eval_dataset_name, args.dataset_test_split or args.dataset_train_split)
    elif args.dataset_test_split is not None:
        tests = {name: load_table(name, args.dataset_test_split, args.dataset_config) for name in names}
        held_out = tests[names[0]] if len(tests) == 1 else tests
    return {"train_dataset": train, "eval_dataset": held_out}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, train, evaluate, save."""
    given = given_values(argv, "preset", "simpo_gamma")
    defaults = {} if given["preset"] is None else preset_settings(given["preset"])
    if given["simpo_gamma"] is not None:
        defaults.pop("home_advantage", None)
    model, preferences, training, parallel = parse_arguments(
        ARGUMENTS, argv, program="hf-moe-cpt rainbowpo", description=__doc__, defaults=defaults
    )
    model.check(training)
    dealt = parallel_options(parallel, training)
    setup = {
        "trainer": "rainbowpo",
        "batch_size": training.per_device_train_batch_size,
        "sequence_length": training.max_length or LONGEST,
        "reference": "copy" if training.needs_reference and not training.precompute_ref_log_probs else "none",
    }
    asked, trusts = given_values(argv, *ASKED), training.trust_remote_code
    training = fit_to_gpu(model, training, asked, setup, dealt, trust_remote_code=trusts)
    training.model_init_kwargs = {**dealt, **(training.model_init_kwargs or {})}
    run(preferences, model, training)
    leave_process_group()


def run(preferences: PreferenceArguments, model: ModelArguments, training: RainbowPOConfig) -> None:
    """Everything after the arguments; nothing of it is alive afterwards."""
    trainer = RainbowPOTrainer(
        model.model_name_or_path,
        args=model.given_to(training),
        **load_pairs(preferences, training.seed),
        peft_config=model.peft_config(trust_remote_code=training.trust_remote_code),
    )
    if trainer.is_world_process_zero():
        print(training.components(), trainer.first_pairs(), sep="\n")
    if preferences.dry_run:
        return
    if preferences.log_completions:
        trainer.add_callback(completions_logged(trainer, preferences.log_completions))
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()  # also where no checkpoint was written, which brings one
    trainer.save_state()
    if trainer.eval_dataset:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=preferences.dataset_name)


if __name__ == "__main__":
    run_script(main)
