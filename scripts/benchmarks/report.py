"""Show benchmark results: the tables of their CSV files, for a terminal and as a folder's page.

python scripts/benchmarks/report.py docs/benchmarks/h200

Every number of a benchmark comes through here, so a page, a terminal and the files cannot disagree. Also what the
benchmarks share: a stopwatch, peak memory, failures as lines. Method: docs/benchmarks/README.md. Source: ours.
"""

from __future__ import annotations

import csv
import gc
import importlib
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.hf_argparser import HfArg
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.machine import synchronize
from hf_moe_cpt.reports import text_table


FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any GPU
MEBIBYTE, GIBIBYTE = 2**20, 2**30
MIN_REPEATS, MAX_REPEATS = 3, 500
_REASON_LENGTH = 300


class Unavailable(Exception):
    """What was asked for cannot be done here; the message says why."""


class Attempt:
    """`with Attempt() as attempt:` turns an error of the block into `attempt.reason`, one line, and goes on after it.

    For code that is other people's and fails in ways nobody can list: a missing package, memory, a compiler. Whoever
    interrupts the run ends it.
    """

    def __init__(self) -> None:
        self.reason: str | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self.reason = one_line(error)
        return True


def imported(module: str) -> ModuleType:
    """A module of a package to compare with. Raises Unavailable where it does not load."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{module.partition('.')[0]} cannot be imported: {error}") from error


def one_line(error: Exception) -> str:
    """The message as a short single line, led by the kind of error unless it is a plain refusal."""
    message = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        wanted = re.search(r"allocate [\d.]+ \w+", message)
        message = f"out of memory: tried to {wanted[0]}" if wanted else "out of memory"
    elif not (type(error) in (Unavailable, ValueError) and message):
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    return message if len(message) <= _REASON_LENGTH else f"{message[:_REASON_LENGTH]} ..."


@dataclass
class BenchmarkArguments:
    """What every benchmark is told."""

    device: str = HfArg(default="auto", help="auto, cpu, cuda; auto takes cuda where there is one.")
    output_dir: str = HfArg(default="runs/benchmark", help="Folder for the results.")
    commit: str | None = HfArg(default=None, help="Written into the results in place of git's answer.")

    def check_least(self, least_of: Mapping[str, float]) -> None:
        """Raise ValueError for the first number below its least."""
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least {least}.")


class Stopwatch:
    """Median milliseconds of a call that begins with a cold L2 cache: CUDA events, or the clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.flush = torch.zeros(FLUSH_BYTES, dtype=torch.uint8, device=device) if self.on_gpu else None

    def milliseconds(self, run: Callable[[], Any], seconds: float) -> float:
        """Time `run` as often as fits into about `seconds`, 3 to 500 times, after one call that does not count."""
        run()
        guess = self._times(run, 1)[0]
        budget = 1000 * seconds / max(guess, 1e-3)
        return statistics.median(self._times(run, max(MIN_REPEATS, min(MAX_REPEATS, round(budget)))))

    def _times(self, run: Callable[[], Any], repeats: int) -> list[float]:
        if not self.on_gpu:
            return [self.wall_seconds(run) * 1000 for _ in range(repeats)]
        begins, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
        for begin, end in zip(begins, ends, strict=True):
            self.flush.zero_()
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True)]

    def wall_seconds(self, run: Callable[[], Any]) -> float:
        """Seconds of one call as its caller waits for it."""
        synchronize(self.device)
        started = time.perf_counter()
        run()
        synchronize(self.device)
        return time.perf_counter() - started


def extra_peak_mebibytes(run: Callable[[], Any], device: torch.device) -> float | None:
    """Most memory that one call holds above what was held before it; None where it cannot be read, on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()  # what the collector finds during the call would count as memory that the call gave back
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MEBIBYTE


def graph_of(run: Callable[[], Any]) -> Callable[[], None]:
    """A call as a CUDA graph, to be replayed. Raises what the capture does, as where the call waits for the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # memory and handles are taken outside of the graph
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run, run()  # what the graph reads, too, else its memory would be another's
    return lambda kept=kept: graph.replay()


def check_registered(experts: str) -> None:
    """Raise Unavailable for an experts implementation that transformers does not know."""
    if experts != "eager" and experts not in ALL_EXPERTS_FUNCTIONS:
        raise Unavailable(f"{experts!r} is not registered with transformers' experts interface")


def refuse_fallback(modules: Iterable[torch.nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Raise Unavailable where ours would run through grouped_mm, whose time must not stand under our name."""
    implementation = importlib.import_module("hf_moe_cpt.kernels.experts_interface")
    for module in modules:
        if (reason := implementation.why_unsupported(module, device, dtype)) is not None:
            raise Unavailable(f"our experts would fall back to grouped_mm: {reason}")


def middle(values: Sequence[float]) -> float | None:
    """Median, None for no values."""
    return statistics.median(values) if values else None


class StepClock(TrainerCallback):
    """Seconds of each step of a `Trainer` after so many that do not count, the device being idle at both ends."""

    def __init__(self, device: torch.device, warmup: int) -> None:
        self.device, self.warmup = device, warmup
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        synchronize(self.device)
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        synchronize(self.device)
        if state.global_step > self.warmup:
            self.seconds.append(time.perf_counter() - self._started)


# ---- tables ----


OURS = "hf_moe_cpt"
Row = dict[str, str]
Column = str | tuple[str | int, ...] | Callable[[Row], str]  # of a file: text, (name, digits), (three names, digits)


def rows_of(path: Path) -> list[Row]:
    """The lines of a CSV file by column name."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown_table(rows: Sequence[Row]) -> str:
    """Rows with the same keys as a table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def experts_rows(rows: Sequence[Row]) -> list[Row]:
    """Every peer, and how many times longer than ours it took; of one that failed what was measured is not shown."""
    ours = {row["shape"]: float(row["training_ms"]) for row in rows if row["peer"] == OURS and row["training_ms"]}
    shown = []
    for row in rows:
        if row["status"] == "failed":
            row = dict.fromkeys(row, "") | {name: row[name] for name in ("shape", "peer", "reason")}
        errors = [float(row[name]) for name in row if name.startswith("error_") and row[name]]
        times = float(row["training_ms"]) / ours[row["shape"]] if row["training_ms"] and row["shape"] in ours else None
        row |= {"times": "" if times is None else str(times)}
        row |= {"error": row["reason"] or (f"{max(errors):.1e}" if errors else "")}
        shown.append(row)
    return _shown(shown, EXPERTS)


def sharding_rows(rows: Sequence[Row]) -> list[Row]:
    """Every engine of a model, of jobs.py before it had engines."""
    done = [row for row in rows if row["status"] == "ok"]
    first = float(done[0]["step ms"]) if done else 1.0
    return _shown([row | {"times": str(float(row["step ms"]) / first)} for row in done], SHARDING)


def trainers_rows(rows: Sequence[Row]) -> list[Row]:
    """Every baseline's step, or, from a file of ratios, each ratio and its bar."""
    return _shown(rows, RATIOS if "ratio" in rows[0] else TRAINERS)


def done_rows(rows: Sequence[Row], columns: dict[str, Column]) -> list[Row]:
    """The columns of what went well."""
    return _shown([row for row in rows if row["status"] == "ok"], columns)


def ranks_rows(rows: Sequence[Row]) -> list[Row]:
    """Every way of a part, all rounds together: medians, the largest peak and error, least and most milliseconds."""
    rounds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        rounds.setdefault(tuple(row[name] for name in ("part", "what", "ranks", "way")), []).append(row)
    shown = []
    for of_way in rounds.values():
        row = dict.fromkeys(("loss", "weights", "checkpointing"), "") | of_way[-1]
        for name, choose in RANKS_OF_ROUNDS.items():
            values = [float(other[name]) for other in of_way if other.get(name)]
            row[name] = str(choose(values)) if values else ""
        times = [float(other["ms"]) for other in of_way if other["ms"]]
        row |= {"least": str(min(times, default="")), "most": str(max(times, default="")), "rounds": str(len(of_way))}
        errors = [float(row[name]) for name in ("error_y", "error_dx", "error_dw") if row.get(name)]
        row["error"] = "" if not errors or math.isnan(max(errors)) else str(max(errors))
        shown.append(row)
    return _shown(shown, RANKS)


def _shown(rows: Sequence[Row], columns: dict[str, Column]) -> list[Row]:
    return [{heading: _cell(row, column) for heading, column in columns.items()} for row in rows]


def _cell(row: Row, column: Column) -> str:
    """A number with so many digits, "middle (least to most)" of three, or what a function says; "" for nothing."""
    if isinstance(column, str):
        return row[column]
    if callable(column):
        return column(row)
    *names, digits = column
    values = [f"{float(row[name]):.{digits}f}" if row[name] else "" for name in names]
    if not all(values):
        return ""
    return values[0] if len(values) == 1 else "{} ({} to {})".format(*values)


def _or(column: Column, nothing: str = "not taken") -> Callable[[Row], str]:
    return lambda row: _cell(row, column) or nothing


def _tokens(row: Row) -> str:
    return f"{float(row['tokens_per_second']):,.0f}"


EXPERTS: dict[str, Column] = {
    "shape": "shape",
    "peer": "peer",
    "forward ms": ("forward_ms", 3),
    "forward + backward ms (range)": ("training_ms", "training_ms_min", "training_ms_max", 2),
    "TFLOP/s": ("training_tflops", 0),
    "x ours": ("times", 2),
    "extra MiB": ("extra_peak_mib", 0),
    "first call s": ("first_call_seconds", 1),
    "error": "error",
}
STEPS: dict[str, Column] = {
    "run": "run",
    "step ms (range)": ("step_ms", "step_ms_min", "step_ms_max", 1),
    "x first run": ("times_first_run", 2),
    "tokens/s": _tokens,
    "peak GiB": ("peak_gib", 1),
    "loss": ("loss", 3),
    "host syncs": "host_syncs",
    "dense product TFLOP/s": ("product_tflops", 0),
}
JOBS: dict[str, Column] = {
    "run": "run",
    "step ms (range)": ("step_ms", "step_ms_min", "step_ms_max", 1),
    "tokens/s": _tokens,
    "peak GiB": _or(("peak_gib", 1)),
    "first step s": ("first_step_s", 1),
    "loss": ("loss", 3),
}
SHARDING: dict[str, Column] = {
    "engine": "engine",
    "step ms (range)": ("step ms", "least ms", "most ms", 1),
    "x first": ("times", 3),
    "peak GiB": _or(("peak GiB", 1)),
    "first loss": "first loss",
    "last loss": "last loss",
    "model, layers": lambda row: f"{row['model']}, {row['layers']}",
    "blocks of a step x tokens": lambda row: f"{row['rows']} x {row['length']}",
}
RANKS_OF_ROUNDS: dict[str, Callable[[list[float]], float]] = {
    "ms": statistics.median, "tokens_per_second": statistics.median, "model_tflops": statistics.median,
    "peak_gib": max, "error_y": max, "error_dx": max, "error_dw": max,
}  # fmt: skip
RANKS: dict[str, Column] = {
    "part": "part",
    "what": "what",
    "ranks": "ranks",
    "way": "way",
    "ms (range of rounds)": ("ms", "least", "most", 1),
    "tokens/s a GPU": lambda row: _tokens(row) if row["tokens_per_second"] else row["note"],
    "model TFLOP/s a GPU": ("model_tflops", 0),
    "peak GiB": ("peak_gib", 1),
    "largest error": lambda row: f"{float(row['error']):.1e}" if row["error"] else "",
    "loss": ("loss", 3),
    "weights": lambda row: row["weights"] + (", recomputed" if row["checkpointing"] == "True" else ""),
}
TRAINERS: dict[str, Column] = {
    "contender": "contender",
    "step and log ms (range)": _or(("total_ms", "total_ms_min", "total_ms_max", 1)),
    "peak MiB": _or(("peak_mib", 0)),
    "model": "model",
    "rows x tokens": lambda row: f"{row['batch_size']} x {row['length']}",
    "LoRA rank": "lora_rank",
}
RATIOS: dict[str, Column] = {
    "contender": lambda row: f"{row['contender']} / {row['baseline']}",
    "of": "quantity",
    "ratio (quartiles)": ("ratio", "lower_quartile", "upper_quartile", 3),
    "bar": "bar",
    "verdict": "verdict",
}
TABLES: dict[str, Callable[[Sequence[Row]], list[Row]]] = {
    "experts*.csv": experts_rows,
    "jobs.csv": partial(done_rows, columns=JOBS),
    "preference*.csv": trainers_rows,
    "ranks*.csv": ranks_rows,
    "sharding.csv": sharding_rows,
    "step.csv": partial(done_rows, columns=STEPS),
    "surgery*.csv": trainers_rows,
}


def text_of(path: Path) -> str:
    """The table of a file of results for a terminal."""
    rows = rows_of(path)
    table = next(table for pattern, table in TABLES.items() if path.match(pattern))(rows)
    return text_table(table) if table else "nothing was measured"


def page_of(folder: Path) -> str:
    """The page: one section for each CSV that TABLES knows, in order of name."""
    found = sorted((path, table) for pattern, table in TABLES.items() for path in folder.glob(pattern))
    if not found:
        raise ValueError(f"{folder} holds none of {', '.join(TABLES)}: run the benchmarks first.")
    sections = []
    for path, table in found:
        rows = rows_of(path)
        facts = rows[0]
        made = f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, transformers "
        made += f"{facts['transformers']}, {facts['date']}, commit {facts['commit']}."
        sections.append(f"## {path.name}\n\n{made}\n\n{markdown_table(table(rows))}\n")
    written = f"Written by `python scripts/benchmarks/report.py {folder.as_posix()}` from the files beside it"
    head = f"# {folder.name}\n\n{written}; what is measured: [README](../README.md)."
    return f"{head}\n\n" + "\n".join(sections)


@dataclass
class PageArguments:
    """What the page is about."""

    folder: str = HfArg(metadata={"positional": True}, help="Results, such as docs/benchmarks/h200.")


def main(argv: Sequence[str] | None = None) -> None:
    """Write README.md into the folder that is named."""
    (args,) = parse_arguments((PageArguments,), argv, program="report.py", description=__doc__)
    folder = Path(args.folder)
    (folder / "README.md").write_text(page_of(folder), encoding="utf-8")
    print(f"wrote {folder / 'README.md'}")


if __name__ == "__main__":
    run_script(main)
