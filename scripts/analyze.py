"""How robust is your router? Compare how checkpoints of any mixture of experts route the same text.

hf-moe-cpt analyze allenai/OLMoE-1B-7B-0924 german=runs/german code=runs/code \\
    --data english=fineweb.jsonl german=texts/de code=texts/code --output_dir routing

Tables in the terminal, and one page that opens offline with CSV, JSON and SVG beside it. A checkpoint is a Hub id, a
folder, or a finished trace; the first is what the others are compared with. `torchrun --nproc_per_node 8
scripts/analyze.py ...` shares the text among devices. docs/analyze.md explains the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.machine import check_names


DTYPES = ("auto", "float32", "bfloat16", "float16")
AVERAGES = ("occurrences", "ids")


class Gather(argparse.Action):
    """An option with several values that may be given several times: all of them count, over those of a file."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if before is self.default else before), *values])


@dataclass
class CheckpointArguments:
    """What is compared. Words before the first option are checkpoints too."""

    checkpoints: list[str] | None = field(
        default=None,
        metadata={
            "action": Gather,
            "help": "Hub ids, folders of models or of finished traces, each as PATH or NAME=PATH; the start first.",
        },
    )
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer, if not the first model's."})
    dtype: str = field(default="auto", metadata={"help": f"Type of the weights: {', '.join(DTYPES)}."})
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda."})
    device_map: str | None = field(
        default=None, metadata={"help": "Spread each model over devices, such as auto; one process only."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    experts_implementation: str | None = field(default=None, metadata={"help": "eager, grouped_mm, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code from the Hub repository."})

    def __post_init__(self) -> None:
        check_names("--dtype", [self.dtype], DTYPES)
        check_names("--device", [self.device], ("auto", "cpu", "cuda"))


@dataclass
class TextArguments:
    """What the models read; needed unless all checkpoints are traces."""

    data: list[str] | None = field(
        default=None,
        metadata={
            "action": Gather,
            "help": "Kinds of text as NAME=PATH: a .jsonl .json .parquet .arrow .txt .md file, a folder, a Hub id.",
        },
    )
    text_column: str = field(default="text", metadata={"help": "Column of the text; input_ids is read as tokens."})
    data_split: str = field(default="train", metadata={"help": "Split of folders and of data sets on the Hub."})
    tokens_per_domain: int = field(default=200_000, metadata={"help": "Read the first so many tokens of each kind."})
    max_length: int = field(default=1024, metadata={"help": "Longer texts are cut into sequences of so many tokens."})
    batch_size: int = field(default=8, metadata={"help": "Sequences side by side."})
    router_probabilities: bool = field(
        default=True, metadata={"help": "Record the router's distribution too, for its entropy and confidence."}
    )

    def __post_init__(self) -> None:
        for name in ("tokens_per_domain", "max_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1.")


@dataclass
class ReportArguments:
    """What is made of it, and where it goes."""

    output_dir: str = field(
        default="routing-analysis", metadata={"help": "Traces, report.html and tables; killed work goes on in it."}
    )
    title: str = field(default="How robust is the router?", metadata={"help": "Heading of the page."})
    log_history: list[str] | None = field(
        default=None,
        metadata={
            "action": Gather,
            "help": "Runs of ours whose logged MRI is shown by step, as NAME=RUN, or NAME=BEFORE,AFTER for a run that "
            "went on from another: the data changes between the two.",
        },
    )
    shift_step: int | None = field(
        default=None, metadata={"help": "First step on new data in the runs that are a single one."}
    )
    vocabulary_average: str = field(
        default="occurrences", metadata={"help": f"Of vocabulary specialisation: {', '.join(AVERAGES)}."}
    )
    top_tokens: int = field(default=8, metadata={"help": "Tokens to list for each expert."})
    min_occurrences: int = field(default=10, metadata={"help": "Rarer tokens are not listed."})
    num_ranks: int | None = field(
        default=None,
        metadata={"help": "Ranks of the estimate under expert parallelism; 8 if there are as many experts."},
    )

    def __post_init__(self) -> None:
        check_names("--vocabulary_average", [self.vocabulary_average], AVERAGES)
        for name in ("top_tokens", "min_occurrences", "num_ranks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} must be at least 1.")
        if self.shift_step is not None and not self.log_history:
            raise ValueError(f"--shift_step {self.shift_step} marks a step of --log_history, which is not given.")


ARGUMENTS = (CheckpointArguments, TextArguments, ReportArguments)


@dataclass
class Job:
    """All arguments of a run."""

    models: CheckpointArguments
    text: TextArguments
    report: ReportArguments


def run(job: Job) -> None:
    """Check everything, trace what is not traced yet, analyse, write, print."""
    from hf_moe_cpt.routing.compare import Tracing, analyse_traces, training_curves
    from hf_moe_cpt.routing.report import tables, write_routing_report
    from hf_moe_cpt.trainers.common.distributed import leave_process_group

    report = job.report
    training = training_curves(report.log_history or [], report.shift_step)
    work = Tracing(job.models, job.text, Path(report.output_dir))
    work.check_ranks(report.num_ranks)
    traces = work.traces()
    if work.is_main_process:
        analysis = analyse_traces(
            traces,
            tokenizer=work.tokenizer,
            training=training,
            average=report.vocabulary_average,
            num_top_tokens=report.top_tokens,
            min_occurrences=report.min_occurrences,
            num_ranks=report.num_ranks,
            progress=True,
        )
        page = write_routing_report(analysis, report.output_dir, report.title)
        print(tables(analysis))
        print(f"\nreport: {page}\nnumbers: analysis.json, layers.csv and others beside it")
    leave_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, trace, analyse, write."""
    words = list(sys.argv[1:] if argv is None else argv)
    first_option = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    checkpoints = ["--checkpoints", *words[:first_option]] if first_option else []
    arguments = parse_arguments(
        ARGUMENTS, checkpoints + words[first_option:], program="hf-moe-cpt analyze", description=__doc__
    )
    run(Job(*arguments))


if __name__ == "__main__":
    run_script(main)
