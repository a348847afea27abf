"""What sharding costs: whole CPT steps of one model under several engines, one after the other.

python scripts/bench_sharding.py --model pb-granular-570m --engines single fsdp2-1 ddp-2 fsdp2-2

An engine is written `name-ranks`. Every engine starts processes of its own, trains the same fresh weights on the same
random blocks with the same global batch, and reports time, peak memory of the fullest rank, and the loss, which must
agree. Writes sharding.csv and prints the table last. How to read the numbers: docs/scaling.md.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.scripts import benchmark_tools as tools
from hf_moe_cpt.scripts.bench_sharding_rank import KINDS, ShardingJob, layer_class
from hf_moe_cpt.scripts.bench_step_models import MODELS
from hf_moe_cpt.scripts.quickstart_results import text_table


@dataclass
class BenchArguments:
    """What is timed and for how long."""

    model: str = field(default="pb-granular-tiny", metadata={"help": f"Any of: {', '.join(MODELS)}."})
    engines: list[str] = field(
        default_factory=lambda: ["single", "fsdp2-1"],
        metadata={"help": f"Engines as name-ranks; names: {', '.join(KINDS)}. single is one process without any."},
    )
    layers: int | None = field(default=None, metadata={"help": "Layers of the model; its own if unset."})
    rows: int = field(default=16, metadata={"help": "Blocks of an optimizer step, shared out over the ranks."})
    length: int = field(default=2048, metadata={"help": "Tokens of a block."})
    steps: int = field(default=20, metadata={"help": "Timed steps."})
    warmup: int = field(default=5, metadata={"help": "Steps before them."})
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda."})
    timeout: float = field(default=600.0, metadata={"help": "Seconds that one engine may take."})
    output_dir: str = field(default="runs/bench_sharding", metadata={"help": "Folder of sharding.csv."})


def main(argv: Sequence[str] | None = None) -> None:
    """Time every engine that can run here; write and print the rows."""
    (args,) = parse_arguments(
        (BenchArguments,), argv, program="bench_sharding.py", description=__doc__
    )
    jobs = make_jobs(args)
    rows = []
    for name, (job, ranks) in tqdm(jobs.items(), unit="engine"):
        with tools.Attempt() as attempt:
            rows.append({"engine": name, "ranks": ranks, **run_engine(job, ranks, args.timeout), "status": "ok"})
        if attempt.reason is not None:
            rows.append({"engine": name, "ranks": ranks, "status": attempt.reason})
    facts = tools.machine_facts(tools.choose_device(args.device), commit=None)
    settings = {"model": args.model, "layers": args.layers, "rows": args.rows, "length": args.length}
    tools.write_csv(Path(args.output_dir) / "sharding.csv", [row | settings | facts for row in rows])
    work = f"{args.model}, {args.rows} blocks of {args.length} tokens a step"
    print(f"\n{facts['device']}, torch {facts['torch']}: {work}\n")
    print(text_table([shown(row, rows) for row in rows]))


def make_jobs(args: BenchArguments) -> dict[str, tuple[ShardingJob, int]]:
    """A job and its number of ranks by engine. Raises ValueError for what cannot be run, before anything is."""
    tools.check_names("--model", [args.model], MODELS)
    device = tools.choose_device(args.device).type
    jobs = {}
    for name in args.engines:
        kind, _, ranks = name.partition("-")
        if (
            kind not in KINDS
            or not (ranks or "1").isdigit()
            or int(ranks or 1) < 1
            or (kind == "single") == bool(ranks)
        ):
            raise ValueError(
                f"--engines {name!r}: write single, or one of {', '.join(KINDS[1:])} with its ranks: fsdp2-2."
            )
        count = int(ranks or 1)
        if args.rows % count:
            raise ValueError(f"--rows {args.rows} do not fall evenly to the {count} ranks of {name}.")
        jobs[name] = (
            ShardingJob(
                args.model, kind, device, args.layers, args.rows // count, args.length, args.warmup, args.steps
            ),
            count,
        )
    return jobs


def run_engine(job: ShardingJob, ranks: int, timeout: float) -> dict[str, Any]:
    """What the first rank reports. Raises RuntimeError with the last line of what the processes said if they fail."""
    with tempfile.TemporaryDirectory() as folder:
        asked = json.dumps(asdict(job) | {"folder": folder, "layer": layer_class(job.model)})
        program = ["-m", "hf_moe_cpt.scripts.bench_sharding_rank", asked]
        start = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
            if job.kind != "single"
            else []
        )
        try:
            done = subprocess.run([sys.executable, *start, *program], capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise tools.Unavailable(f"it had not ended after {timeout:g} seconds: raise --timeout") from None
        report = Path(folder) / "report.json"
        if done.returncode or not report.exists():
            lines = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines() or [""]
            raise RuntimeError(f"exit code {done.returncode}: {lines[-1].strip()}")
        found = json.loads(report.read_text(encoding="utf-8"))
    seconds = found.pop("seconds")
    return {
        "step ms": 1000 * statistics.median(seconds),
        "least ms": 1000 * min(seconds),
        "most ms": 1000 * max(seconds),
        **found,
    }


def shown(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table: time beside that of the first engine, memory, loss."""
    base = next((other["step ms"] for other in rows if "step ms" in other), None)
    step = row.get("step ms")
    return {
        "engine": row["engine"],
        "step ms": None if step is None else f"{step:.1f} ({row['least ms']:.1f}-{row['most ms']:.1f})",
        "of first": None if step is None or base is None else f"{step / base:.3f}",
        "peak GiB": None if row.get("peak GiB") is None else f"{row['peak GiB']:.2f}",
        "first loss": None if step is None else f"{row['first loss']:.6f}",
        "last loss": None if step is None else f"{row['last loss']:.6f}",
        "status": row["status"],
    }


if __name__ == "__main__":
    run_script(main)
