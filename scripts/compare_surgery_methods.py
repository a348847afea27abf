"""Compare surgery methods on models that learnt a SurgeryBench: what is gone, what is new, what stayed.

For every seed and architecture a small model is trained from scratch on the texts before the change, another on those
after it; each method operates on the first, and all are asked the same questions. A killed comparison goes on in its
folder. `--setting gpu` does the same with models of 100 million parameters and real text among what they read. What
is measured and how: docs/surgery_comparison.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.scripts.benchmark_tools import check_names, choose_device, machine_facts
from hf_moe_cpt.scripts.compare_preference_methods import ComparisonFolder
from hf_moe_cpt.scripts.compare_preference_run import quiet_libraries
from hf_moe_cpt.scripts.compare_surgery_plan import (
    BEFORE,
    CHOSEN,
    METHODS,
    RETRAINED,
    SETTINGS,
    TUNING_SEED,
    Comparison,
    Run,
)
from hf_moe_cpt.scripts.compare_surgery_report import comparison_text, conclude, draw, write_runs
from hf_moe_cpt.scripts.compare_surgery_run import carry_out_here, open_workshop
from hf_moe_cpt.scripts.quickstart_folder import write_json


ARCHITECTURES = ("llama", "cpt_moe")
Records = dict[str, dict[str, Any]]
Choice = tuple[float, float]  # learning rate and strength


@dataclass
class CompareArguments:
    """What is compared and how much work to spend; the rest is in compare_surgery_plan.py."""

    setting: str = field(default="small", metadata={"help": f"Size of the comparison: {', '.join(SETTINGS)}."})
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Any of: {', '.join(METHODS)}."}
    )
    architectures: list[str] = field(
        default_factory=lambda: list(ARCHITECTURES), metadata={"help": f"Any of: {', '.join(ARCHITECTURES)}."}
    )
    seeds: int | None = field(
        default=None, metadata={"help": "Final runs of each method; the setting's own if unset. More can be added."}
    )
    first_seed: int = field(
        default=TUNING_SEED + 1, metadata={"help": "Seed of the first final run; the others follow it."}
    )
    tune: bool = field(
        default=False,
        metadata={"help": "Choose settings by the grid, on a seed of its own, instead of taking the stored choice."},
    )
    output_dir: str = field(
        default="runs/surgery-methods",
        metadata={"help": "Folder for models, a record of each run, results and plot; finished runs are kept."},
    )
    workers: int = field(default=2, metadata={"help": "Processes with one thread each; 1: this process does it all."})
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda; auto: cpu with the setting small."})


def main(argv: Sequence[str] | None = None) -> None:
    """Train the models before, operate on them, examine all; write and print what came out."""
    (args,) = parse_arguments(
        (CompareArguments,), argv, program="compare_surgery_methods.py", description=__doc__
    )
    comparison = make_comparison(args)
    folder = ComparisonFolder(args.output_dir)
    folder.claim(comparison.fingerprint())
    quiet_libraries()
    torch.set_num_threads(1)  # on matrices this small a second thread costs more than it brings
    results = compare(comparison, args, folder)
    write_json(folder.root / "results.json", results)
    write_runs(folder.root / "results.csv", results)
    draw(folder.root / "comparison.png", results)
    print(comparison_text(results))


def make_comparison(args: CompareArguments) -> Comparison:
    """What the arguments ask for. Raises ValueError for what cannot be run, before anything is."""
    check_names("--setting", [args.setting], SETTINGS)
    for option, names, known in (
        ("--methods", args.methods, METHODS),
        ("--architectures", args.architectures, ARCHITECTURES),
    ):
        if not names:
            raise ValueError(f"{option} is empty: choose from {', '.join(known)}.")
        check_names(option, names, known)
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: at least one process must do the work.")
    if args.first_seed <= TUNING_SEED:
        raise ValueError(
            f"--first_seed {args.first_seed}: settings were chosen on seed {TUNING_SEED}; take a later one."
        )
    scale = SETTINGS[args.setting]
    if args.seeds is not None:
        if args.seeds < 1:
            raise ValueError(f"--seeds {args.seeds}: every method needs at least one final run.")
        scale = replace(scale, seeds=dict.fromkeys(scale.seeds, args.seeds))
    is_small = args.setting == "small" and args.device == "auto"
    device = "cpu" if is_small else choose_device(args.device).type
    return Comparison(args.setting, scale, device, args.first_seed)


def compare(comparison: Comparison, args: CompareArguments, folder: ComparisonFolder) -> dict[str, Any]:
    """All runs that are not finished, then everything that is printed, as JSON can hold it."""
    pairs = [(name, method) for name in dict.fromkeys(args.architectures) for method in dict.fromkeys(args.methods)]
    grids = {pair: comparison.tuning_runs(*pair) if args.tune else [] for pair in pairs}
    final_models = [run for name in dict.fromkeys(args.architectures) for run in comparison.final_runs(name, BEFORE)]
    retrained = [replace(run, method=RETRAINED) for run in final_models]
    tuned_models = [Run(BEFORE, name, TUNING_SEED, "validation") for name in args.architectures if args.tune]
    num_runs = len(final_models) * (2 + len(set(args.methods))) + len(tuned_models) + sum(map(len, grids.values()))
    with Crew(comparison, folder, args.workers) as crew, tqdm(total=num_runs, unit="run", dynamic_ncols=True) as bar:
        records = crew.records([*tuned_models, *final_models], bar)
        records |= crew.records([*retrained, *(run for grid in grids.values() for run in grid)], bar)
        chosen = {pair: choice_of(comparison, *pair, grid, records) for pair, grid in grids.items()}
        final = [run for pair, choice in chosen.items() for run in comparison.final_runs(*pair, *choice)]
        records |= crew.records(final, bar)
        bar.set_description("done")
    shown = [*final_models, *final, *retrained]
    failed = [{"run": name, "error": record["error"]} for name, record in records.items() if "error" in record]
    return {
        "comparison": comparison.fingerprint(),
        "machine": machine_facts(torch.device(comparison.device), commit=None),
        **conclude([records[run.name] for run in shown if "error" not in records[run.name]], failed),
        "tuning": [
            {"architecture": run.architecture, "method": run.method, "learning_rate": run.learning_rate}
            | {"strength": run.strength, "score": records[run.name].get("score")}
            | records[run.name].get("measures", {})
            for grid in grids.values()
            for run in grid
        ],
    }


def choice_of(comparison: Comparison, architecture: str, method: str, grid: Sequence[Run], records: Records) -> Choice:
    """Learning rate and strength of the run of a grid with the largest score, the stored choice without a grid.

    Raises ValueError if every run of the grid failed.
    """
    if not grid:
        return CHOSEN[comparison.setting][architecture][method]
    finished = [run for run in grid if "score" in records[run.name]]
    if not finished:
        error = records[grid[0].name]["error"]
        raise ValueError(f"every run of the grid of {method} on {architecture} failed, the first with: {error}")
    best = max(finished, key=lambda run: records[run.name]["score"])
    return best.learning_rate, best.strength


class Crew:
    """Carries out runs, in this process or in several, and keeps each record as soon as it is there."""

    def __init__(self, comparison: Comparison, folder: ComparisonFolder, workers: int) -> None:
        self.start = (comparison, folder.root)
        self.folder, self.workers = folder, workers
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def records(self, runs: Sequence[Run], bar: tqdm) -> Records:
        """The record of each run by its name; what is finished in the folder is not done again."""
        found = {run.name: self.folder.record(run) for run in runs}
        missing = [run for run in runs if found[run.name] is None]
        bar.update(len(runs) - len(missing))
        for run, record in self._carry_out(missing):
            self.folder.keep(run, record)
            found[run.name] = record
            bar.set_description(run.method)
            bar.update(1)
        return found

    def _carry_out(self, runs: Sequence[Run]) -> Iterator[tuple[Run, dict[str, Any]]]:
        if self.workers == 1:
            if runs:
                open_workshop(*self.start)
            yield from map(carry_out_here, runs)
            return
        if self.pool is None and runs:
            self.pool = ProcessPoolExecutor(
                self.workers, mp_context=get_context("spawn"), initializer=open_workshop, initargs=self.start
            )
        for future in as_completed([self.pool.submit(carry_out_here, run) for run in runs]):
            yield future.result()


if __name__ == "__main__":
    run_script(main)
