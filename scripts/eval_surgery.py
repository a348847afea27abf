"""Judge a surgery: what was forgotten, learnt and kept, and whether it stays so under attack.

hf-moe-cpt surgery-eval --before my-model --after my-model-operated --retrained my-model-retrained \\
    --bench my-surgery-bench --output_dir evaluation

The model before surgery, the one after it and, if there is one, a model that was trained from scratch on what was to
remain, side by side, with intervals, as a table, CSV, JSON and one HTML page. `torchrun --nproc_per_node 2` shares the
rows. A run that was killed continues when it is started again. docs/surgery_eval.md explains the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.evaluation.scoring import EvalSettings
from hf_moe_cpt.evaluation.surgery import BenchArguments, ModelArguments, OutputArguments, run
from hf_moe_cpt.machine import leave_process_group


ARGUMENTS = (ModelArguments, BenchArguments, EvalSettings, OutputArguments)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, measure, write."""
    told = run(*parse_arguments(ARGUMENTS, argv, program="hf-moe-cpt surgery-eval", description=__doc__))
    if told is not None:
        print(told)
    leave_process_group()


if __name__ == "__main__":
    run_script(main)
