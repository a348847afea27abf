"""Preference optimisation in rounds: sample from the policy, score, pair, train on the pairs, evaluate, again.

hf-moe-cpt iterate --model_name_or_path my-policy --rounds 3 --output_dir rounds \\
    --sample '{"dataset_name": "prompts.jsonl", "reward_model_name_or_path": "my-reward", "rewards": "percentile"}' \\
    --train '{"preset": "rainbowpo", "learning_rate": 1e-6, "num_train_epochs": 1}' \\
    --evaluate '{"prompts": "held_out.jsonl"}'

The three hold what `rejection-sample`, `rainbowpo` and `eval-preference` take, as JSON or as a YAML file. Round k lies
in round-k: pairs/, policy/ and evaluation/. What is finished is not done again, so a run that was killed anywhere goes
on with the same command; more rounds can be added later. report.json and report.csv hold a row for each round.
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.rounds import IterateArguments, run


ARGUMENTS = (IterateArguments,)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, run what is missing, print the report."""
    (args,) = parse_arguments(ARGUMENTS, argv, program="hf-moe-cpt iterate", description=__doc__)
    print(run(args))


if __name__ == "__main__":
    run_script(main)
