"""What `hf-moe-cpt plan` takes from docs/benchmarks, and how far its memory estimates are from the peaks there.

python scripts/benchmarks/planner.py speeds    # writes hf_moe_cpt/planning/speeds.csv: the documents are not installed
python scripts/benchmarks/planner.py errors    # prints the table of docs/scaling.md

Peaks of step benchmarks that train all weights are compared, but for TRL's own trainer and for surgeries that keep all
terms at once, which ours does not. The layers of the measured models are equal, so two of them are counted.
Source: ours.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

import hf_moe_cpt.planning
from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_program, run_script
from hf_moe_cpt.planning.memory import KeptBytes, ModelSize, TrainingSetup, measure_kept, measure_size, training_memory
from hf_moe_cpt.planning.plan import GIBIBYTE, MeasuredStep, config_of, flops_per_token
from hf_moe_cpt.scripts.benchmarks.jobs import MODELS as OF_OTHERS
from hf_moe_cpt.scripts.benchmarks.jobs import JobArguments, read_config
from hf_moe_cpt.scripts.benchmarks.report import rows_of


STEPS = "h200/step.csv"
JOBS = "h200/jobs.csv"
KERNELS_OF_WAY = {"stock": "plain", "auto": "fused"}
PREFERENCES = ("h200/preference_full.csv", "h100/preference_full.csv")  # the same steps on two devices
REFERENCE_OF = {"rainbowpo": "copy", "rainbowpo-no-reference": "none", "by-term": "cache", "by-term-copy": "copy"}
TERMS_OF_PRESET = {"paper": 4, "safe": 5}


@dataclass(frozen=True)
class MeasuredPeak:
    """A committed peak, in GiB, and the setup it was measured with."""

    source: str
    run: str
    model: str
    setup: TrainingSetup
    gib: float


def done_rows(folder: Path, name: str) -> list[dict[str, str]]:
    """The runs of a file that went well."""
    return [row for row in rows_of(folder / name) if row["status"] == "ok"]


@functools.cache
def size_of(model: str) -> ModelSize:
    """The size of a model that benchmarks name, counted once."""
    return measure_size(config_of(model), model)


@functools.cache
def kept_by(model: str, length: int, precision: str, kernels: str) -> KeptBytes:
    """As `measure_kept`, two layers standing for all. Raises ValueError where they differ."""
    config = config_of(model)
    num_layers, config.num_hidden_layers = config.num_hidden_layers, 2
    two = measure_kept(config, length, precision, kernels)
    if two.layers[0] != two.layers[1]:
        raise ValueError(f"The layers of {model} differ: {two.layers} bytes; count them all.")
    return dataclasses.replace(two, layers=two.layers[:1] * num_layers, fixed=two.fixed * num_layers // 2)


def kernels_of(run: str) -> str:
    """What a run of step.csv computes with, as `TrainingSetup` calls it."""
    if ":fused" in run:
        return "fused"
    return "experts" if run.endswith(":hf_moe_cpt") else "plain"


def measured_steps(folder: Path) -> list[MeasuredStep]:
    """The lines of speeds.csv."""
    steps = []
    for row in done_rows(folder, STEPS):
        size, length = size_of(row["model"]), int(row["seq_length"])
        steps.append(
            MeasuredStep(
                model=row["model"],
                kernels=kernels_of(row["run"]),
                is_mixture=size.num_experts > 0,
                sequence_length=length,
                tokens_per_second=float(row["tokens_per_second"]),
                flops_per_token=flops_per_token(size, length, 4.0 if row["checkpointing"] == "True" else 3.0),
                device=row["device"],
                date=row["date"][:10],
                commit=row["commit"],
            )
        )
    return steps + [step for step in map(step_of_job, done_rows(folder, JOBS)) if step]


def step_of_job(row: dict[str, str]) -> MeasuredStep | None:
    """The line of a run of jobs.py on a model that others published, by stock `Trainer` or ours; None of any other."""
    model, _, way = row["run"].partition(":")
    if model not in OF_OTHERS or way not in KERNELS_OF_WAY:
        return None
    arguments = JobArguments(runs=[row["run"]])
    size = measure_size(read_config(model, arguments), model)
    return MeasuredStep(
        model=model,
        kernels=KERNELS_OF_WAY[way],
        is_mixture=size.num_experts > 0,
        sequence_length=arguments.length,
        tokens_per_second=float(row["tokens_per_second"]),
        flops_per_token=flops_per_token(size, arguments.length),
        device=row["device"],
        date=row["date"][:10],
        commit=row["commit"],
    )


def device_ratio(folder: Path) -> float:
    """Speed of an H100 over an H200's: the median over trainers that both timed."""
    h200, h100 = (
        {row["contender"]: float(row["total_ms"]) for row in done_rows(folder, name) if row["total_ms"]}
        for name in PREFERENCES
    )
    return statistics.median(h200[name] / h100[name] for name in h200.keys() & h100.keys())


def measured_peaks(folder: Path) -> Iterator[MeasuredPeak]:
    """Those of docs/benchmarks, in the order of the files."""
    for row in done_rows(folder, STEPS):
        setup = TrainingSetup(
            batch_size=int(row["batch_size"]),
            sequence_length=int(row["seq_length"]),
            precision={"float32": "mixed", "bfloat16": "bfloat16"}[row["weights"]],
            kernels=kernels_of(row["run"]),
        )
        if row["peak_gib"]:
            yield MeasuredPeak(STEPS, row["run"], row["model"], setup, float(row["peak_gib"]))
    for name, trainer in (*((name, "rainbowpo") for name in PREFERENCES), ("h100/surgery_safe.csv", "surgery")):
        for row in done_rows(folder, name):
            if row["contender"] in REFERENCE_OF and row["peak_mib"]:
                setup = TrainingSetup(
                    batch_size=int(row["batch_size"]),
                    sequence_length=int(row["length"]),
                    precision=row["dtype"],
                    kernels="plain",
                    trainer=trainer,
                    reference=REFERENCE_OF[row["contender"]],
                    terms=TERMS_OF_PRESET[row["preset"]] if trainer == "surgery" else 1,
                )
                yield MeasuredPeak(name, row["contender"], row["model"], setup, float(row["peak_mib"]) / 1024)


def estimated_gib(peak: MeasuredPeak) -> float:
    """What the arithmetic says for the same setup."""
    setup = peak.setup
    kept = kept_by(peak.model, setup.sequence_length, setup.precision, setup.kernels)
    return training_memory(size_of(peak.model), kept, setup).total / GIBIBYTE


def error_table(folder: Path) -> str:
    """Markdown: measured, estimated, and the error as a share of the measured peak."""
    lines = ["| file | run | measured GiB | estimated GiB | error |", "|---|---|---|---|---|"]
    for peak in measured_peaks(folder):
        estimate = estimated_gib(peak)
        error = f"{estimate / peak.gib - 1:+.1%}"
        lines.append(f"| {peak.source} | {peak.run} | {peak.gib:.2f} | {estimate:.2f} | {error} |")
    return "\n".join(lines)


@dataclass
class PlannerArguments:
    """Where the results are and the speeds go."""

    benchmarks: str = HfArg(default="docs/benchmarks", help="Folder of the committed results.")
    output: str = HfArg(default=str(Path(hf_moe_cpt.planning.__file__).with_name("speeds.csv")), help="For `speeds`.")


def write_speeds(argv: Sequence[str]) -> None:
    """Write speeds.csv with all digits."""
    (args,) = parse_arguments((PlannerArguments,), argv, program="planner.py speeds", description=__doc__)
    steps = measured_steps(Path(args.benchmarks))
    with Path(args.output).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [entry.name for entry in dataclasses.fields(MeasuredStep)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, steps))
    print(f"written: {args.output}; SPEED_OF_GPU['h100'] is {device_ratio(Path(args.benchmarks)):.4f}")


def print_errors(argv: Sequence[str]) -> None:
    """Print the table."""
    (args,) = parse_arguments((PlannerArguments,), argv, program="planner.py errors", description=__doc__)
    print(error_table(Path(args.benchmarks)))


PROGRAMS = {"speeds": write_speeds, "errors": print_errors}


def main(argv: Sequence[str] | None = None) -> None:
    """The program that the first word names."""
    run_program(PROGRAMS, argv)


if __name__ == "__main__":
    run_script(main)
