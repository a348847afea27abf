"""Compare preference methods in a world where the true reward of every answer is known.

A tiny policy is trained on the world's base policy; every preset of RainbowPO and a few ablations start from it, on
the same pairs, with the same budget and the same number of settings to choose from; the truth judges the results on
held-out prompts. A killed comparison goes on in its folder. What is measured and how: docs/preference_world.md.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.data.preference_world import PreferenceWorld
from hf_moe_cpt.scripts.benchmark_tools import machine_facts
from hf_moe_cpt.scripts.compare_preference_evaluation import best_frontier
from hf_moe_cpt.scripts.compare_preference_plan import (
    METHODS,
    POLICY_STEPS,
    SETTINGS,
    Comparison,
    Run,
    check_methods,
)
from hf_moe_cpt.scripts.compare_preference_policy import ARCHITECTURES, PolicyPlan, train_policy
from hf_moe_cpt.scripts.compare_preference_report import (
    choose,
    comparison_table,
    draw,
    method_rows,
    write_rows,
)
from hf_moe_cpt.scripts.compare_preference_run import Workshop, carry_out_here, open_workshop, quiet_libraries
from hf_moe_cpt.scripts.quickstart_folder import write_json


PAIRS_FROM = ("base", "reference")


@dataclass
class CompareArguments:
    """The world, the methods and how much work to spend; the rest is in compare_preference_plan.py."""

    setting: str = field(default="small", metadata={"help": f"Size of the comparison: {', '.join(SETTINGS)}."})
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Any of: {', '.join(METHODS)}."}
    )
    seeds: int | None = field(
        default=None,
        metadata={
            "help": "Final runs of each method; "
            + ", ".join(f"{scale.seeds} ({name})" for name, scale in SETTINGS.items())
            + " if unset. More can be added later."
        },
    )
    output_dir: str = field(
        default="runs/preference-methods",
        metadata={"help": "Folder for the policy, a record of each run, results and plot; finished runs are kept."},
    )
    workers: int = field(default=2, metadata={"help": "Processes with one thread each; 1: this process does it all."})
    architecture: str = field(default="llama", metadata={"help": f"Of the policy: {', '.join(ARCHITECTURES)}."})
    ambiguity: float = field(
        default=0.9, metadata={"help": "Of half of the prompts, in [0, 1]: by how much less their answers differ."}
    )
    length_bias: float = field(default=0.1, metadata={"help": "What the annotator's score gains by a token more."})
    label_temperature: float = field(default=1.0, metadata={"help": "Noise of the annotator's labels; 0: none."})
    pairs_from: str = field(
        default="base", metadata={"help": "Who wrote the answers of the pairs: base (policy) or reference (model)."}
    )
    world_seed: int = field(default=0, metadata={"help": "Another number, another world and another policy."})


def main(argv: Sequence[str] | None = None) -> None:
    """Train the policy, run the grids, run the choices with other seeds, write and print what came out."""
    (args,) = parse_arguments(
        (CompareArguments,), argv, program="compare_preference_methods.py", description=__doc__
    )
    comparison = make_comparison(args)
    folder = ComparisonFolder(args.output_dir)
    folder.claim(comparison.fingerprint())
    quiet_libraries()
    torch.set_num_threads(1)  # on matrices this small a second thread costs more than it brings
    if not folder.policy.is_dir():
        folder.make_policy(comparison)
    methods = list(dict.fromkeys(args.methods))
    results = compare(comparison, methods, folder, args.workers)
    write_json(folder.root / "results.json", results)
    write_rows(folder.root / "results.csv", results)
    draw(folder.root / "comparison.png", results)
    print(comparison_table(results))


def make_comparison(args: CompareArguments) -> Comparison:
    """What the arguments ask for. Raises ValueError for what cannot be run, before anything is."""
    if args.setting not in SETTINGS:
        raise ValueError(f"--setting {args.setting!r} is unknown: choose one of {', '.join(SETTINGS)}.")
    if not args.methods:
        raise ValueError(f"--methods is empty: choose from {', '.join(METHODS)}.")
    check_methods(args.methods)
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: at least one process must do the work.")
    if args.pairs_from not in PAIRS_FROM:
        raise ValueError(f"--pairs_from {args.pairs_from!r} is unknown: choose one of {', '.join(PAIRS_FROM)}.")
    scale = SETTINGS[args.setting]
    if args.seeds is not None:
        if args.seeds < 1:
            raise ValueError(f"--seeds {args.seeds}: every method needs at least one final run.")
        scale = replace(scale, seeds=args.seeds)
    world = PreferenceWorld(
        seed=args.world_seed,
        ambiguity_levels=(0.0, args.ambiguity),
        length_bias=args.length_bias,
        label_temperature=args.label_temperature,
    )
    policy = PolicyPlan(args.architecture, steps=POLICY_STEPS[args.setting])
    policy.config(world)
    return Comparison(world, policy, scale, args.pairs_from)


class ComparisonFolder:
    """comparison.json (what it compares), policy/, runs/<run>.json, results.json, results.csv, comparison.png."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.policy = self.root / "policy"

    def claim(self, fingerprint: dict[str, Any]) -> None:
        """Make the folder, or take up the comparison in it. Raises ValueError if it holds anything else."""
        path, name = self.root / "comparison.json", f"--output_dir {str(self.root)!r}"
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            for key in sorted(before.keys() | fingerprint.keys()):
                if before.get(key) != fingerprint.get(key):
                    raise ValueError(
                        f"{name} holds a comparison with {key}={before.get(key)}, and now it is "
                        f"{fingerprint.get(key)}: name another folder, or delete this one."
                    )
        elif self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise ValueError(f"{name} is not empty and no comparison wrote it: name another folder.")
        (self.root / "runs").mkdir(parents=True, exist_ok=True)
        write_json(path, fingerprint)

    def make_policy(self, comparison: Comparison) -> None:
        """Train the policy that all runs start from; it appears whole or not at all."""
        partial = self.root / ".policy.partial"
        shutil.rmtree(partial, ignore_errors=True)
        print(f"training the policy for {comparison.policy.steps} steps", flush=True)
        train_policy(comparison.world, comparison.policy, partial, seed=comparison.world.seed)
        os.replace(partial, self.policy)

    def record(self, run: Run) -> dict[str, Any] | None:
        """What a finished run left, None if it is not finished."""
        path = self._path(run)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def keep(self, run: Run, record: dict[str, Any]) -> None:
        """Keep the record of a finished run; a failed one is to be tried again."""
        if "error" not in record:
            write_json(self._path(run), record)

    def _path(self, run: Run) -> Path:
        return self.root / "runs" / f"{run.name}.json"


def compare(comparison: Comparison, methods: Sequence[str], folder: ComparisonFolder, workers: int) -> dict[str, Any]:
    """All runs that are not finished, then everything that is printed, as JSON can hold it."""
    grids = {method: comparison.tuning_runs(method) for method in methods}
    total = sum(len(grid) + comparison.scale.seeds for grid in grids.values())
    with Crew(comparison, folder, workers) as crew, tqdm(total=total, unit="run", dynamic_ncols=True) as bar:
        records = crew.records([run for grid in grids.values() for run in grid], bar)
        chosen = {method: choose(grid, records) for method, grid in grids.items()}
        final = {method: comparison.final_runs(run) if run else [] for method, run in chosen.items()}
        records |= crew.records([run for runs in final.values() for run in runs], bar)
        bar.set_description("done")
    exam = Workshop(comparison, folder.policy).exam("test")
    samples = comparison.scale.frontier_samples
    judged = exam.sample(exam.reference, samples, "frontier", seed=0)
    graded = {run.name: run for grid in grids.values() for run in grid if "grades" in records[run.name]}
    return {
        "comparison": comparison.fingerprint(),
        "machine": machine_facts(torch.device("cpu"), commit=None),
        "rows": method_rows(methods, final, records),
        "reference": exam.grade(exam.reference, seed=0),
        "best_reward": float(comparison.world.best_rewards(judged.prompts).mean()),
        "frontier": best_frontier(judged.rewards.reshape(-1, samples)),
        "tuning": [
            {"method": run.method, "learning_rate": run.learning_rate, "strength": run.strength}
            | records[name]["grades"]
            for name, run in graded.items()
        ],
    }


class Crew:
    """Carries out runs, in this process or in several, and keeps each record as soon as it is there."""

    def __init__(self, comparison: Comparison, folder: ComparisonFolder, workers: int) -> None:
        self.comparison, self.folder, self.workers = comparison, folder, workers
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def records(self, runs: Sequence[Run], bar: tqdm) -> dict[str, dict[str, Any]]:
        """The record of each run by its name; what is finished in the folder is not done again."""
        found = {run.name: self.folder.record(run) for run in runs}
        missing = [run for run in runs if found[run.name] is None]
        bar.total -= len(runs) - len(missing)
        bar.refresh()
        for run, record in self._carry_out(missing):
            self.folder.keep(run, record)
            found[run.name] = record
            bar.set_description(run.method)
            bar.update(1)
        return found

    def _carry_out(self, runs: Sequence[Run]) -> Iterator[tuple[Run, dict[str, Any]]]:
        start = (self.comparison, self.folder.policy)
        if not runs:
            return
        if self.workers == 1:
            open_workshop(*start)
            yield from map(carry_out_here, runs)
            return
        if self.pool is None:
            self.pool = ProcessPoolExecutor(
                self.workers, mp_context=get_context("spawn"), initializer=open_workshop, initargs=start
            )
        for future in as_completed([self.pool.submit(carry_out_here, run) for run in runs]):
            yield future.result()


if __name__ == "__main__":
    run_script(main)
