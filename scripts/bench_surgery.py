"""Time and memory of a step of SurgeryTrainer, a backward pass for each term, beside one backward of their sum.

python scripts/bench_surgery.py --model llama-570m --dtype mixed --batch_size 4 --length 1024 --preset safe

All contenders live in one process and take turns, a step each, round after round; memory is taken before, each
contender in a process of its own. Writes surgery_<preset>.csv and surgery_<preset>_ratios.csv and prints the tables
last. How and what is measured: docs/benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.scripts import benchmark_tools as tools
from hf_moe_cpt.scripts.bench_preference import (
    Comparison,
    Measurement,
    contender_table,
    ratio_rows,
    ratio_table,
    result_row,
    take_memory,
    take_times,
)
from hf_moe_cpt.scripts.bench_preference_contenders import DTYPES, check_model
from hf_moe_cpt.scripts.bench_step_models import MODELS
from hf_moe_cpt.scripts.bench_surgery_contenders import (
    CONTENDERS,
    PRESETS,
    SurgerySteps,
    SurgeryWorkload,
    chosen_contenders,
    peak_mebibytes,
    reference_mebibytes,
)
from hf_moe_cpt.scripts.quickstart_results import text_table


@dataclass
class SurgeryBenchArguments:
    """What steps, on what, and how often."""

    model: str = field(
        default="llama-tiny",
        metadata={"help": f"Random weights of {', '.join(MODELS)}; or the folder or Hub id of a causal LM."},
    )
    overrides: str | None = field(
        default=None,
        metadata={
            "help": "Fields to change in a model named above, as JSON: '{\"num_hidden_layers\": 2}'; the others stay."
        },
    )
    preset: str = field(
        default="safe",
        metadata={"help": "paper: four terms with plain ascent; safe: five, and a bounded forget loss."},
    )
    contenders: list[str] | None = field(
        default=None, metadata={"help": f"How a step is made: {', '.join(CONTENDERS)}; all if not given."}
    )
    batch_size: int = field(default=2, metadata={"help": "Rows of each set in a step."})
    length: int = field(default=128, metadata={"help": "Tokens of every row."})
    dtype: str = field(
        default="float32", metadata={"help": f"{', '.join(DTYPES)}; mixed: float32 weights, bfloat16 autocast."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute layers in the backward pass."})
    rounds: int = field(default=20, metadata={"help": "Timed rounds; in each, every contender makes one step."})
    warmup: int = field(default=3, metadata={"help": "Rounds before them."})
    logging_steps: int = field(default=10, metadata={"help": "A step's share of a log is 1 / this."})
    memory_steps: int = field(default=3, metadata={"help": "Steps whose peak memory is taken; 0 leaves memory out."})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda; auto takes cuda where there is one."})
    seed: int = field(default=0, metadata={"help": "Of weights and tokens."})
    output_dir: str = field(default="runs/surgery", metadata={"help": "Folder for the results."})
    commit: str | None = field(default=None, metadata={"help": "Written into the results in place of git's answer."})

    def __post_init__(self) -> None:
        tools.check_names("--dtype", [self.dtype], DTYPES)
        tools.check_names("--preset", [self.preset], PRESETS)
        chosen_contenders(self.contenders)
        least_of = {"batch_size": 1, "length": 8, "rounds": 1, "warmup": 1, "logging_steps": 1, "memory_steps": 0}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least {least}.")

    def workload(self, device: torch.device) -> SurgeryWorkload:
        """What is the same for all contenders."""
        names = ("model", "overrides", "dtype", "batch_size", "length", "gradient_checkpointing", "seed", "preset")
        return SurgeryWorkload(**{name: getattr(self, name) for name in names}, device=device.type)


# Logged steps hold the gradient of every term: what that costs has no bar.
COMPARISONS = (
    Comparison("by-term", "summed", time_bar=1.05, memory_bar=0.6),
    Comparison("by-term-copy", "summed-copy", time_bar=1.05, memory_bar=0.6),
    Comparison("by-term", "by-term-copy", time_bar=None, memory_bar=None),
    Comparison("by-term-logged", "by-term", time_bar=None, memory_bar=None),
)
KEPT = "kept of the reference"  # share of a whole reference model that a cached one still holds in memory
SLACK = 0.02  # of that share: buffers of a batch's states


def kept_rows(
    measurements: Sequence[Measurement], workload: SurgeryWorkload, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """A ratio line for what the cache leaves of the reference in memory; the bar is its head."""
    peaks = {m.contender: m.peak_mib for m in measurements if m.peak_mib}
    if not {"by-term", "by-term-copy"} <= peaks.keys():
        return []
    whole, head = reference_mebibytes(workload)
    kept, bar = 1.0 - (peaks["by-term-copy"] - peaks["by-term"]) / whole, head / whole + SLACK
    spread = dict.fromkeys(("ratio", "lower_quartile", "upper_quartile", "least", "most"), kept)
    names = {"contender": "by-term", "baseline": "by-term-copy", "quantity": KEPT}
    return [names | spread | {"bar": bar, "verdict": "met" if kept <= bar else "missed"} | facts]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure memory, then time; write after each."""
    (args,) = parse_arguments(
        (SurgeryBenchArguments,), argv, program="bench_surgery.py", description=__doc__
    )
    device = tools.choose_device(args.device)
    workload, folder = args.workload(device), Path(args.output_dir)
    check_model(workload)
    machine = tools.machine_facts(device, args.commit)
    facts = asdict(workload) | machine
    folder.mkdir(parents=True, exist_ok=True)
    measurements = [Measurement(name) for name in chosen_contenders(args.contenders)]

    def write() -> list[dict[str, Any]]:
        tools.write_csv(folder / f"surgery_{args.preset}.csv", [result_row(m, args, facts) for m in measurements])
        ratios = ratio_rows(measurements, args, facts, COMPARISONS) + kept_rows(measurements, workload, facts)
        tools.write_csv(folder / f"surgery_{args.preset}_ratios.csv", ratios)
        return ratios

    turns = len(measurements) * (2 if args.memory_steps else 1) + args.warmup + args.rounds
    with tqdm(total=turns, unit="turn", dynamic_ncols=True) as bar:
        if args.memory_steps:
            take_memory(measurements, workload, args.memory_steps, bar, peak_mebibytes)
            write()
        take_times(measurements, args, workload, bar, SurgerySteps)
        bar.set_description("done")
    ratios = write()
    for measurement in measurements:
        if measurement.reason or measurement.memory_reason:
            print(f"{measurement.contender}: {measurement.reason or measurement.memory_reason}")
    print(
        f"\n{machine['device']}, torch {machine['torch']}, {args.model}, {args.dtype}, {args.preset}: "
        f"{len(PRESETS[args.preset]['sets'])} sets of {args.batch_size} rows of {args.length} tokens, {args.rounds} "
        f"rounds; files: {folder}\n"
    )
    print(text_table(contender_table(measurements, args)))
    if ratios:
        print(f"\n{text_table(ratio_table(ratios))}")


if __name__ == "__main__":
    run_script(main)
