"""Make preference pairs: sample N responses to each prompt, score them, keep some by rejection sampling, pair these.

hf-moe-cpt rejection-sample \\
    --dataset_name my_prompts.jsonl --model_name_or_path my-policy --reward_model_name_or_path my-reward-model \\
    --num_samples 8 --num_accepted 4 --rewards percentile --tau 0.5 --output_dir pairs

The output folder holds data/train.parquet (prompt, chosen, rejected, score_chosen, score_rejected), its card and
summary.json. A run that was killed continues when it is started again. docs/rejection_sampling.md explains the rest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import datasets

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.generation.pairs import (
    DATA_FILE,
    TEXTS,
    DataArguments,
    Job,
    OutputArguments,
    SamplingArguments,
    SelectionArguments,
    run,
)
from hf_moe_cpt.generation.sampling import RewardArguments
from hf_moe_cpt.hub.contents import refuse_secrets
from hf_moe_cpt.hub.publishing import plan_files, publish, require_place


ARGUMENTS = (DataArguments, SamplingArguments, RewardArguments, SelectionArguments, OutputArguments)


def publish_pairs(root: Path, repository: str, private: bool) -> str:
    """Upload data, card and summary, each looked through, as a data set; returns the commit's address."""
    upload = plan_files(root, [DATA_FILE], TEXTS)
    rows = datasets.load_dataset("parquet", data_files=str(root / DATA_FILE), split="train", streaming=True)
    for number, row in enumerate(rows):
        refuse_secrets(root / DATA_FILE, json.dumps(row, ensure_ascii=False), is_vocabulary=True, row=number)
    message = "Preference pairs by rejection sampling"
    return publish(upload, repository, private=private, message=message, kind="dataset")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, sample, score, select, write, publish."""
    job = Job(*parse_arguments(ARGUMENTS, argv, program="hf-moe-cpt rejection-sample", description=__doc__))
    output = job.output
    if output.push_to_hub is not None:
        require_place(output.push_to_hub, kind="dataset")
    print(run(job))
    if output.push_to_hub is not None and output.part is None and output.stop_after is None:
        address = publish_pairs(Path(output.output_dir), output.push_to_hub, output.hub_private)
        print(f"published at {address}")


if __name__ == "__main__":
    run_script(main)
