"""Judge a surgery: what was forgotten, learnt and kept, and whether it stays so under attack.

hf-moe-cpt surgery-eval --before my-model --after my-model-operated --retrained my-model-retrained \\
    --bench my-surgery-bench --output_dir evaluation

The model before surgery, the one after it and, if there is one, a model that was trained from scratch on what was to
remain, side by side, with intervals, as a table, CSV, JSON and one HTML page. `torchrun --nproc_per_node 2` shares the
rows. A run that was killed continues when it is started again. docs/surgery_eval.md explains the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.machine import check_names
from hf_moe_cpt.scripts.rejection_sample import DTYPES


SIDES = ("before", "after", "retrained")
NO_ATTACKS = "none"


@dataclass
class ModelArguments:
    """The models, folders or Hub ids; at least one."""

    before: str | None = field(default=None, metadata={"help": "The model that surgery started from."})
    after: str | None = field(default=None, metadata={"help": "The model that surgery made."})
    retrained: str | None = field(
        default=None, metadata={"help": "A model that never read what was to be forgotten: the yardstick."}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Default: that of the first model given."})
    dtype: str = field(default="auto", metadata={"help": f"Type of the weights: {', '.join(DTYPES)}."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code from the Hub."})
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda."})

    def __post_init__(self) -> None:
        check_names("--dtype", [self.dtype], DTYPES)
        check_names("--device", [self.device], ("auto", "cpu", "cuda"))
        if not self.given:
            raise ValueError("nothing to evaluate: give --before, --after or --retrained, best all three.")

    @property
    def given(self) -> dict[str, str]:
        """Names of the models by side."""
        return {side: name for side in SIDES if (name := getattr(self, side)) is not None}


@dataclass
class BenchArguments:
    """Documents and questions: a saved bench, a generated one, or your own JSON Lines."""

    bench: str | None = field(default=None, metadata={"help": "Folder that SurgeryBench.save wrote."})
    bench_seed: int = field(default=0, metadata={"help": "Of the bench that is generated where none is named."})
    num_subjects: int | None = field(default=None, metadata={"help": "Size of the bench that is to be generated."})
    documents: list[str] | None = field(
        default=None, metadata={"help": "One .jsonl whose rows name their set, or several as unlearn=a.jsonl."}
    )
    questions: str | None = field(default=None, metadata={"help": "A .jsonl of questions about --documents."})
    split: str = field(default="test", metadata={"help": "Of the questions: validation to choose by, test to report."})
    sets: list[str] | None = field(default=None, metadata={"help": "Only these sets."})
    kinds: list[str] | None = field(default=None, metadata={"help": "Only questions of these kinds."})
    header: str | None = field(
        default=None, metadata={"help": "Put before each document and not counted; {subject} is replaced."}
    )

    def __post_init__(self) -> None:
        given = [name for name in ("bench", "num_subjects", "documents") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give one of --bench, --num_subjects and --documents, got {', '.join(given) or 'none'}: which texts?"
            )
        if self.questions is not None and self.documents is None:
            raise ValueError("--questions needs --documents: whom are they about?")


@dataclass
class MeasureArguments:
    """What is measured, on how many rows."""

    parts: list[str] = field(
        default_factory=lambda: ["questions", "texts", "continuations", "divergence", "robustness"],
        metadata={"help": "Leave out what you do not need."},
    )
    robustness: list[str] = field(
        default_factory=lambda: ["relearn", "quantise", "prefix"], metadata={"help": f"Attacks, or {NO_ATTACKS}."}
    )
    max_questions: int = field(default=200, metadata={"help": "Most questions of each set and kind."})
    max_documents: int = field(default=200, metadata={"help": "Most documents of each set."})
    batch_size: int = field(default=16, metadata={"help": "Documents, or questions with all options, side by side."})
    question_template: str = field(
        default="Question: {question}\nAnswer:", metadata={"help": "Before the options; the paper's is {question}."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a text. Default: the model's."})
    new_tokens: int = field(default=64, metadata={"help": "Of a continuation, at most."})
    relearn_steps: int = field(default=60, metadata={"help": "Of the relearning attack."})
    relearn_every: int = field(default=10, metadata={"help": "Steps between two points of its curve."})
    relearn_lr: float = field(default=1e-5, metadata={"help": "Its learning rate; small models need more."})
    relearn_batch_size: int = field(default=8, metadata={"help": "Its documents a step."})
    seed: int = field(default=0, metadata={"help": "Of the rows that are drawn, of relearning and of the bootstrap."})
    confidence: float = field(default=0.95, metadata={"help": "Of the intervals."})
    resamples: int = field(default=2000, metadata={"help": "Of the bootstrap."})

    def __post_init__(self) -> None:
        if NO_ATTACKS in self.robustness:
            if len(self.robustness) > 1:
                raise ValueError(f"--robustness {NO_ATTACKS} stands alone, got {' '.join(self.robustness)}.")
            self.robustness = []
        if not 0 < self.confidence < 1:
            raise ValueError(f"--confidence {self.confidence} must lie in (0, 1), such as 0.95.")
        if self.resamples < 1:
            raise ValueError(f"--resamples {self.resamples} must be at least 1; 2000 is usual.")


@dataclass
class OutputArguments:
    """Where it goes."""

    output_dir: str = field(metadata={"help": "A new folder, or one in which this very run was interrupted."})
    commit: str | None = field(default=None, metadata={"help": "Written into the results in place of git's answer."})


ARGUMENTS = (ModelArguments, BenchArguments, MeasureArguments, OutputArguments)


@dataclass
class Job:
    """All arguments of a run."""

    models: ModelArguments
    bench: BenchArguments
    measure: MeasureArguments
    output: OutputArguments

    def settings(self) -> dict[str, Any]:
        """Arguments of EvalSettings."""
        measure, bench = asdict(self.measure), self.bench
        attacks = tuple(measure.pop("robustness"))
        parts = tuple(part for part in measure.pop("parts") if part != "robustness" or attacks)
        del measure["confidence"], measure["resamples"]
        return {
            **measure,
            "parts": parts,
            "attacks": attacks,
            "split": bench.split,
            "sets": bench.sets and tuple(bench.sets),
            "kinds": bench.kinds and tuple(bench.kinds),
            "header": bench.header,
        }


def run(job: Job) -> None:
    """Check everything, measure what is missing, write, and print the table."""
    from hf_moe_cpt.evaluation.surgery import SurgeryEvaluation, summarise
    from hf_moe_cpt.evaluation.surgery_report import text_report, write_files
    from hf_moe_cpt.machine import machine_facts
    from hf_moe_cpt.trainers.common.distributed import leave_process_group

    work = SurgeryEvaluation(job)
    raws = work.measurements()
    if work.state.is_main_process:
        measure = job.measure
        summary = summarise(**raws, confidence=measure.confidence, seed=measure.seed, resamples=measure.resamples)
        facts = {"settings": work.folder.settings, "machine": machine_facts(work.device, job.output.commit)}
        write_files(work.folder.root, summary, raws, facts)
        print(f"files: {job.output.output_dir}\n\n{text_report(summary)}")
    leave_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, measure, write."""
    run(Job(*parse_arguments(ARGUMENTS, argv, program="hf-moe-cpt surgery-eval", description=__doc__)))


if __name__ == "__main__":
    run_script(main)
