"""Judge a policy against a reference by a reward model, and by how it ranks the answers of preference pairs.

hf-moe-cpt eval-preference \\
    --model_name_or_path my-policy --ref_model_name_or_path my-start --reward_model_name_or_path my-reward-model \\
    --prompts prompts.jsonl --dataset_name my-preference-pairs --output_dir evaluation

Win rate with ties as halves, the same at equal lengths, rewards and lengths; and the accuracies of the policy's
log-probabilities on pairs. A run that was killed continues when it is started again. docs/eval_preference.md explains
the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.evaluation.preference import DataArguments, Job, OutputArguments, SidesArguments, run
from hf_moe_cpt.generation.sampling import RewardArguments


ARGUMENTS = (SidesArguments, DataArguments, RewardArguments, OutputArguments)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, respond, judge, score, write."""
    print(run(Job(*parse_arguments(ARGUMENTS, argv, program="hf-moe-cpt eval-preference", description=__doc__))))


if __name__ == "__main__":
    run_script(main)
