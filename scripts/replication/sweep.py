"""What the comparisons of methods share: runs that workers carry out and a folder keeps, seeds, plots, a page.

A comparison makes runs, each with a `name` and a `method`. Its folder holds comparison.json (everything that decides
the numbers), runs/<name>.json (a record of each finished run), results.json, results.csv and comparison.png, so that a
killed comparison goes on and methods or seeds can be added later. Settings come from walks through grids without end.

Intervals are Student's t over the seeds of the final runs. Source: ours.
"""

from __future__ import annotations

import bisect
import importlib
import itertools
import json
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import datasets
import torch
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg
from transformers.utils import logging as transformers_logging

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.evaluation.resumable import ResumableFolder, write_json
from hf_moe_cpt.machine import check_names
from hf_moe_cpt.reports import write_csv


CONFIDENCE = 0.95
LEAST_SEEDS = 3  # that decide anything: two may agree by chance, and their interval is then no width

# Of a method or a library; memory that a device lacks is a RuntimeError
FAILURES = (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError)

Records = dict[str, dict[str, Any]]  # of runs by their names; {"error": one line} for a failed one
Column = tuple[str, str, float, int]  # heading, name of the number, factor, digits


def open_folder(root: str, fingerprint: Mapping[str, Any]) -> ResumableFolder:
    """Make the folder, or take up the comparison in it. Raises ValueError if it holds anything else."""
    folder = ResumableFolder(root, "comparison.json", fingerprint)
    folder.claim()
    return folder


def check_request(args: Any, settings: Collection[str], methods: Collection[str]) -> None:
    """Raise ValueError for what cannot be run of --setting, --methods, --workers, --seeds and --minutes."""
    check_names("--setting", [args.setting], settings)
    check_choice("--methods", args.methods, methods)
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: at least one process must do the work.")
    if args.seeds is not None and args.seeds < 1:
        raise ValueError(f"--seeds {args.seeds}: every method needs at least one final run.")
    if args.minutes is not None and args.minutes < 0:
        raise ValueError(f"--minutes {args.minutes:g}: at least 0, at which only what is there is told.")


def end_of(minutes: float | None) -> float:
    """The `until` of a crew that is to begin no run after so many minutes; None: it has no end."""
    return math.inf if minutes is None else time.monotonic() + 60 * minutes


def tell_rest(args: Any, is_all: bool) -> None:
    """Print that --minutes left something to be done."""
    if not is_all:
        print(f"Not finished after {args.minutes:g} minutes: the same command goes on.")


def check_choice(option: str, names: Sequence[str], known: Collection[str]) -> None:
    """Raise ValueError for no name and for the first that is not known."""
    if not names:
        raise ValueError(f"{option} is empty: choose from {', '.join(known)}.")
    check_names(option, names, known)


def quiet_process() -> None:
    """One thread in this process, and no bars or advice of libraries: one bar shows the whole job."""
    torch.set_num_threads(1)  # on matrices this small a second thread costs more than it brings
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


_worker: Any = None


def start_worker(make: Callable[..., Any], *given: Any) -> None:
    """Make this process a quiet worker."""
    global _worker
    quiet_process()
    _worker = make(*given)


def run_one(run: Any) -> tuple[Any, dict[str, Any]]:
    """The run's record from this process's worker; of a run that failed, {"error": one line}."""
    try:
        return run, _worker.carry_out(run)
    except FAILURES as error:  # the other runs go on
        return run, {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


class Crew:
    """Carries out runs, in this process or in several, and keeps each record as soon as it is there.

    Runs have a `name`, also that of their file, and a `method`. make: the worker of a process, called with `given`,
    both picklable; its `carry_out(run)` gives a record. A failed run is kept nowhere: it is to be tried again.
    until: of time.monotonic(), in seconds, when no further run begins.
    """

    def __init__(
        self, folder: ResumableFolder, workers: int, make: Callable[..., Any], *given: Any, until: float = math.inf
    ) -> None:
        self.folder, self.workers, self.start, self.until = folder, workers, (make, *given), until
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def records(self, runs: Sequence[Any], bar: tqdm) -> Records:
        """The record of each run by its name; what is finished in the folder is not done again.

        Raises TimeoutError if time was up before the last one; what was done by then is kept.
        """
        found = {run.name: self.folder.read(f"runs/{run.name}.json") for run in runs}
        missing = [run for run in runs if found[run.name] is None]
        bar.update(len(runs) - len(missing))
        for run, record in self._carry_out(missing):
            if "error" not in record:
                self.folder.write(f"runs/{run.name}.json", record)
            found[run.name] = record
            bar.set_description(run.method)
            bar.update(1)
        if None in found.values():
            raise TimeoutError("no time is left for all runs")
        return found

    def _carry_out(self, runs: Sequence[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
        if not runs:
            return
        if self.workers == 1:
            start_worker(*self.start)
            yield from map(run_one, itertools.takewhile(lambda _: time.monotonic() < self.until, runs))
            return
        if self.pool is None:
            self.pool = ProcessPoolExecutor(
                self.workers, mp_context=get_context("spawn"), initializer=start_worker, initargs=self.start
            )
        futures = [self.pool.submit(run_one, run) for run in runs if time.monotonic() < self.until]
        for future in as_completed(futures):
            if not future.cancelled():
                yield future.result()
            if time.monotonic() >= self.until:
                for waiting in futures:
                    waiting.cancel()


Place = tuple[int, ...]  # whole steps from the middle of a grid, one for each axis


class Walk(ABC):
    """A way through a grid without end: from the best place to its best neighbour until the best lies inside.

    best: the best place so far, at first where the way begins. limits: of each axis the first and the last step there
    is, None where it has no end. A place without a score was not measured.
    """

    def __init__(self, best: Place, limits: Sequence[tuple[int, int] | None] = ()) -> None:
        self.best, self.limits = best, tuple(limits) or (None,) * len(best)
        self.is_inside = False
        self.scores: dict[Place, float] = {}

    @abstractmethod
    def run_at(self, place: Place) -> Any:
        """The run of a place in the grid, on data for tuning."""

    @abstractmethod
    def score_of(self, place: Place, record: Mapping[str, Any]) -> float:
        """What a place is worth by the record of its run, which holds `error` if it failed."""

    def wanted(self) -> list[Place]:
        """The best place and its neighbours along every axis, as far as they are not known."""
        places = [self.best]
        for axis in range(len(self.best)):
            places += [tuple(v + sign * (n == axis) for n, v in enumerate(self.best)) for sign in (-1, 1)]
        return [place for place in places if place not in self.scores and self._exists(place)]

    def _exists(self, place: Place) -> bool:
        return all(end is None or end[0] <= step <= end[1] for step, end in zip(place, self.limits, strict=True))

    def learn(self, records: Records) -> None:
        """Read the records of the wanted places, and move to the best one; of equal ones to the one in the middle."""
        for place in self.wanted():
            self.scores[place] = self.score_of(place, records[self.run_at(place).name])
        best = max(self.scores, key=lambda place: (self.scores[place], [-abs(step) for step in place]))
        self.is_inside, self.best = best == self.best, best


def walk(walks: Sequence[Walk], rounds: int, carry_out: Callable[[list[Any]], Records]) -> None:
    """Let every grid grow until its best lies inside, at most `rounds` times. carry_out: gives the records of runs."""
    for _ in range(rounds):
        going = [one for one in walks if not one.is_inside]
        records = carry_out([one.run_at(place) for one in going for place in one.wanted()])
        for one in going:
            one.learn(records)


class Estimate(NamedTuple):
    """A mean over seeds and half the width of its interval; None where there are fewer than two."""

    mean: float
    half_width: float | None

    def text(self, factor: float, digits: int) -> str:
        """ "mean ± half width", both times a factor."""
        half = "" if self.half_width is None else f" ± {self.half_width * factor:.{digits}f}"
        return f"{self.mean * factor:.{digits}f}{half}"


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """Mean of independent values with Student's t-interval."""
    if not values:
        raise ValueError("an interval needs at least one value.")
    if len(values) == 1:
        return Estimate(values[0], None)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), t_quantile((1 + confidence) / 2, len(values) - 1) * error)


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution. probability: in [1/2, 1). degrees: of freedom, an integer >= 1."""
    low, high = 0.0, math.pi / 2  # of the angle atan(t / sqrt(degrees)), in which the distribution has a closed form
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _share_within(middle, degrees) < 2 * probability - 1 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _share_within(angle: float, degrees: int) -> float:
    """P(|t| < sqrt(degrees) * tan(angle)); Abramowitz and Stegun 26.7.3 and 26.7.4."""
    cosine, odd = math.cos(angle), degrees % 2
    term = total = cosine if odd else 1.0
    for power in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if degrees > 1 else 0.0))


MANY = 1000  # seeds; more are not worth counting


def seeds_needed(spread: float, count: int, distance: float, confidence: float = CONFIDENCE) -> int | None:
    """About how many seeds make an interval half as wide as `distance`, which a mean has from what decides.

    spread: the standard deviation over `count` seeds, more than which are needed. None: more than MANY.
    """
    counts = range(max(3, count + 1), MANY + 1)
    place = bisect.bisect_left(
        counts, True, key=lambda n: t_quantile((1 + confidence) / 2, n - 1) * spread / math.sqrt(n) < distance
    )
    return counts[place] if place < len(counts) else None


def plotting(path: Path) -> ModuleType | None:
    """matplotlib.pyplot set up to write files, or None after a line that says why `path` will not be written."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        print(f"no plot {path}: it needs matplotlib (pip install matplotlib); {error}")
        return None


def grouped_bars(axes: Any, groups: Sequence[str], bars: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Bars of medians with whiskers from least to most, side by side in each group.

    axes: of matplotlib. bars: for each label the values of each group; a group that is missing leaves a gap.
    """
    width = 0.8 / max(1, len(bars))
    for number, (label, values_of_group) in enumerate(bars.items()):
        present = [(place, values_of_group[group]) for place, group in enumerate(groups) if values_of_group.get(group)]
        centers = [place + (number - (len(bars) - 1) / 2) * width for place, _ in present]
        medians = [statistics.median(values) for _, values in present]
        below = [median - min(values) for median, (_, values) in zip(medians, present, strict=True)]
        above = [max(values) - median for median, (_, values) in zip(medians, present, strict=True)]
        axes.bar(centers, medians, width, yerr=[below, above], label=label, error_kw={"elinewidth": 0.8})
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def table_row(row: Mapping[str, Any], columns: Sequence[Column], settings: Mapping[str, str]) -> dict[str, str]:
    """A method's line of a text table. columns: of estimates. settings: names of plain numbers by heading."""
    cells = {"method": row["method"]}
    for heading, name, factor, digits in columns:
        cells[heading] = Estimate(*row[name]).text(factor, digits) if name in row else ""
    return cells | {heading: f"{row[name]:.3g}" if name in row else "" for heading, name in settings.items()}


def write_results(
    folder: Path,
    results: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    draw: Callable[[Path, Mapping[str, Any]], None],
    text: Callable[[Mapping[str, Any]], str],
) -> None:
    """results.json, `rows` as results.csv, the plot; and what is to be read on the screen."""
    write_json(folder / "results.json", results)
    write_csv(folder / "results.csv", rows)
    draw(folder / "comparison.png", results)
    print(text(results))


@dataclass
class PageArguments:
    """What the page is about."""

    folder: str = HfArg(metadata={"positional": True}, help="Results, such as docs/benchmarks/surgery_small.")


def page_of(folder: Path, program: str, guide: str, text: Callable[[Mapping[str, Any]], str]) -> str:
    """What a comparison printed, with the machine and the plot. program: its file; guide: a link to what it means."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    made = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    table = "\n".join(line.rstrip() for line in text(results).splitlines())
    command = f"python scripts/replication/{program} page {folder.as_posix()}"
    head = f"# {folder.name}\n\nWritten by `{command}` from the files beside it; what is measured: {guide}."
    return f"{head}\n\n{made}.\n\n```text\n{table}\n```\n\n![](comparison.png)\n"


def write_page(argv: Sequence[str], program: str, guide: str, text: Callable[[Mapping[str, Any]], str]) -> None:
    """Write README.md into a folder of results; as `page_of`."""
    (args,) = parse_arguments((PageArguments,), argv, program=f"{program} page", description=write_page.__doc__)
    folder = Path(args.folder)
    (folder / "README.md").write_text(page_of(folder, program, guide, text), encoding="utf-8")
    print(f"wrote {folder / 'README.md'}")
