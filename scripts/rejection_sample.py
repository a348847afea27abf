"""Make preference pairs: sample N responses to each prompt, score them, keep some by rejection sampling, pair these.

hf-moe-cpt rejection-sample \\
    --dataset_name my_prompts.jsonl --model_name_or_path my-policy --reward_model_name_or_path my-reward-model \\
    --num_samples 8 --num_accepted 4 --rewards percentile --tau 0.5 --output_dir pairs

The output folder holds data/train.parquet (prompt, chosen, rejected, score_chosen, score_rejected), its card and
summary.json. A run that was killed continues when it is started again. docs/rejection_sampling.md explains the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.generation.pairs import DataArguments, Job, OutputArguments, SamplingArguments, SelectionArguments, run
from hf_moe_cpt.generation.sampling import RewardArguments


ARGUMENTS = (DataArguments, SamplingArguments, RewardArguments, SelectionArguments, OutputArguments)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, sample, score, select, write."""
    print(run(Job(*parse_arguments(ARGUMENTS, argv, program="hf-moe-cpt rejection-sample", description=__doc__))))


if __name__ == "__main__":
    run_script(main)
