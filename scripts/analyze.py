"""How robust is your router? Compare how checkpoints of any mixture of experts route the same text.

hf-moe-cpt analyze allenai/OLMoE-1B-7B-0924 german=runs/german code=runs/code \\
    --data english=fineweb.jsonl german=texts/de code=texts/code --output_dir routing

Tables in the terminal, and one page that opens offline with CSV, JSON and SVG beside it. A checkpoint is a Hub id, a
folder, or a finished trace; the first is what the others are compared with. `torchrun --nproc_per_node 8
scripts/analyze.py ...` shares the text among devices. docs/analyze.md explains the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.machine import leave_process_group
from hf_moe_cpt.routing.analyze import CheckpointArguments, ReportArguments, TextArguments, analyze


ARGUMENTS = (CheckpointArguments, TextArguments, ReportArguments)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, trace, analyse, write."""
    words = list(sys.argv[1:] if argv is None else argv)
    first_option = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    checkpoints = ["--checkpoints", *words[:first_option]] if first_option else []
    arguments = parse_arguments(
        ARGUMENTS, checkpoints + words[first_option:], program="hf-moe-cpt analyze", description=__doc__
    )
    analyze(*arguments)
    leave_process_group()


if __name__ == "__main__":
    run_script(main)
