"""Write scripts/plan_speeds.py, the measured training steps that `hf-moe-cpt plan` goes by, from docs/benchmarks.

python scripts/plan_table.py

The installed package has no documents, so the numbers travel as Python. A test holds that the file is what this script
writes.
"""

from __future__ import annotations

import csv
import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_moe_cpt.analysis.training_memory import ModelSize
from hf_moe_cpt.analysis.training_time import flops_per_token
from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.scripts.bench_step_models import config_of
from hf_moe_cpt.scripts.plan_model import measure_size


BENCHMARKS = Path("docs/benchmarks")
STEPS = "h200/step.csv"
COMPARED = ("h100/preference_full.csv", "h200/preference_full.csv")  # the same steps on two devices
OPENING = '''"""Training steps measured on one GPU. Written by `python scripts/plan_table.py`: do not edit."""

from hf_moe_cpt.analysis.training_time import MeasuredStep


'''


@functools.cache
def size_of(model: str) -> ModelSize:
    """The size of a model that benchmarks name, counted once."""
    return measure_size(config_of(model), model)


def kernels_of(run: str) -> str:
    """What a run of step.csv computes with, in the words of analysis/training_memory.py."""
    if ":fused" in run:
        return "fused"
    return "experts" if run.endswith(":hf_moe_cpt") else "plain"


def step_lines(path: Path) -> list[str]:
    """One `MeasuredStep(...)` for each run that went well."""
    lines = []
    for row in csv.DictReader(path.open()):
        if row["status"] != "ok":
            continue
        size = size_of(row["model"])
        length = int(row["seq_length"])
        fields = {
            "model": row["model"],
            "kernels": kernels_of(row["run"]),
            "is_mixture": size.num_experts > 0,
            "sequence_length": length,
            "tokens_per_second": float(row["tokens_per_second"]),
            "flops_per_token": flops_per_token(size, length, 4.0 if row["checkpointing"] == "True" else 3.0),
            "device": row["device"],
            "date": row["date"][:10],
            "commit": row["commit"],
        }
        body = [f"        {name}={_literal(value)}," for name, value in fields.items()]
        lines += ["    MeasuredStep(", *body, "    ),"]
    return lines


def device_ratio(folder: Path, numerator: str, denominator: str) -> float:
    """Speed of one device over another's: the median over contenders that both timed."""
    times = [
        {row["contender"]: float(row["total_ms"]) for row in csv.DictReader((folder / name).open())}
        for name in (numerator, denominator)
    ]
    return statistics.median(times[1][name] / times[0][name] for name in times[0].keys() & times[1].keys())


def table(folder: Path) -> str:
    """The text of the module."""
    steps = "\n".join(["STEPS = (", *step_lines(folder / STEPS), ")"])
    ratio = device_ratio(folder, *COMPARED)
    speeds = (
        "# Speed of a GPU over that of the steps above. h100: the same preference steps on both devices, median.\n"
        f'SPEED_OF_GPU = {{"h200": 1.0, "h100": {ratio:.4f}}}\n'
    )
    return f"{OPENING}# From docs/benchmarks/{STEPS}.\n{steps}\n\n{speeds}"


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


@dataclass
class TableArguments:
    """What the table is made of."""

    benchmarks: str = field(default=str(BENCHMARKS), metadata={"help": "Folder of the committed results."})


def main(argv: Sequence[str] | None = None) -> None:
    """Write the module beside this script."""
    (args,) = parse_arguments((TableArguments,), argv, program="plan_table.py", description=__doc__)
    path = Path(__file__).with_name("plan_speeds.py")
    path.write_text(table(Path(args.benchmarks)))
    print(f"written: {path}")


if __name__ == "__main__":
    run_script(main)
