"""How far the memory estimates of `hf-moe-cpt plan` are from the peaks in docs/benchmarks, as a table for the docs.

python scripts/plan_errors.py

Peaks of step benchmarks that train all weights are there, but for TRL's own trainer and for surgeries that keep all
terms at once, which ours does not. The layers of the measured models are equal, so two of them are counted.
Source: ours.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_moe_cpt.analysis.kept_tensors import KeptBytes
from hf_moe_cpt.analysis.training_memory import TrainingSetup, training_memory
from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.scripts.bench_step_models import config_of
from hf_moe_cpt.scripts.plan_model import measure_kept
from hf_moe_cpt.scripts.plan_search import GIBIBYTE
from hf_moe_cpt.scripts.plan_table import TableArguments, kernels_of, size_of


PREFERENCES = ("h200/preference_full.csv", "h100/preference_full.csv")
REFERENCE_OF_CONTENDER = {
    "rainbowpo": "copy",
    "rainbowpo-no-reference": "none",
    "by-term": "cache",
    "by-term-copy": "copy",
}
TERMS_OF_PRESET = {"paper": 4, "safe": 5}


@dataclass(frozen=True)
class MeasuredPeak:
    """A committed peak, in GiB, and the setup it was measured with."""

    source: str
    run: str
    model: str
    setup: TrainingSetup
    gib: float


def measured_peaks(folder: Path) -> Iterator[MeasuredPeak]:
    """Those of docs/benchmarks, in the order of the files."""
    for row in _rows(folder, "h200/step.csv"):
        setup = TrainingSetup(
            batch_size=int(row["batch_size"]),
            sequence_length=int(row["seq_length"]),
            precision={"float32": "mixed", "bfloat16": "bfloat16"}[row["weights"]],
            kernels=kernels_of(row["run"]),
        )
        yield MeasuredPeak("h200/step.csv", row["run"], row["model"], setup, float(row["peak_gib"]))
    for name, trainer in (*((name, "rainbowpo") for name in PREFERENCES), ("h100/surgery_safe.csv", "surgery")):
        for row in _rows(folder, name):
            if row["contender"] not in REFERENCE_OF_CONTENDER:
                continue
            setup = TrainingSetup(
                batch_size=int(row["batch_size"]),
                sequence_length=int(row["length"]),
                precision=row["dtype"],
                kernels="plain",
                trainer=trainer,
                reference=REFERENCE_OF_CONTENDER[row["contender"]],
                terms=TERMS_OF_PRESET[row["preset"]] if trainer == "surgery" else 1,
            )
            yield MeasuredPeak(name, row["contender"], row["model"], setup, float(row["peak_mib"]) / 1024)


def estimated_gib(peak: MeasuredPeak) -> float:
    """What the arithmetic says for the same setup."""
    size = size_of(peak.model)
    kept = _kept(peak.model, peak.setup.sequence_length, peak.setup.precision, peak.setup.kernels)
    return training_memory(size, kept, peak.setup).total / GIBIBYTE


def error_table(folder: Path) -> str:
    """Markdown: measured, estimated, and the error as a share of the measured peak."""
    lines = ["| file | run | measured GiB | estimated GiB | error |", "|---|---|---|---|---|"]
    for peak in measured_peaks(folder):
        estimate = estimated_gib(peak)
        error = f"{estimate / peak.gib - 1:+.1%}"
        lines.append(f"| {peak.source} | {peak.run} | {peak.gib:.2f} | {estimate:.2f} | {error} |")
    return "\n".join(lines)


def _rows(folder: Path, name: str) -> list[dict[str, str]]:
    rows = csv.DictReader((folder / name).open())
    return [row for row in rows if row["status"] == "ok" and (row.get("peak_gib") or row.get("peak_mib"))]


@functools.cache
def _kept(model: str, length: int, precision: str, kernels: str) -> KeptBytes:
    config = config_of(model)
    num_layers, config.num_hidden_layers = config.num_hidden_layers, 2
    two = measure_kept(config, length, precision, kernels)
    if two.layers[0] != two.layers[1]:
        raise ValueError(f"The layers of {model} differ: {two.layers} bytes; count them all.")
    fixed = two.fixed * num_layers // 2
    return dataclasses.replace(two, layers=two.layers[:1] * num_layers, fixed=fixed)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    (args,) = parse_arguments((TableArguments,), argv, program="plan_errors.py", description=__doc__)
    print(error_table(Path(args.benchmarks)))


if __name__ == "__main__":
    run_script(main)
