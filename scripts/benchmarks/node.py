"""What sharing a mixture over the GPUs of one machine costs and whether runs survive it: one command, no hand on it.

python scripts/benchmarks/node.py --output_dir runs/node                      # all GPUs of the machine
python scripts/benchmarks/node.py --gpus 2 --device cpu --tiny                # on CPU ranks

In stages, what fits beside one another at the same time: `ranks.py` on layers, on Qwen3-30B-A3B's shape and on 12
layers of pb-granular-2b, for 1, 2, 4 ... GPUs (ranks.csv); then a run of the command `cpt` whose experts are dealt to
half of the GPUs, a quarter, and all: stopped by SIGTERM, one rank killed with SIGKILL during a save, beside the same
run undisturbed on all of them (resume.csv). No stage begins after --seconds, and each ends there; what is done is
written after each. Source: ours.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.machine import choose_device, machine_facts
from hf_moe_cpt.reports import write_csv
from hf_moe_cpt.scripts.benchmarks.ranks import shape_of
from hf_moe_cpt.scripts.benchmarks.report import BenchmarkArguments, rows_of
from hf_moe_cpt.trainers.common.checkpointing import UNFINISHED, last_whole_checkpoint, step_of


PARTS = ("layers", "30b", "pb", "resume")
WORDS, BLOCKS, LENGTH = 200, 16, 512  # of the run that is resumed: vocabulary, sequences of a step, tokens of each
STEPS, SAVE_STEPS = 16, 2


@dataclass
class NodeArguments(BenchmarkArguments):
    """How much of the machine, for how long."""

    gpus: int | None = HfArg(default=None, help="A power of two; unset: all of the machine.")
    parts: list[str] = HfArg(default_factory=lambda: list(PARTS), help=f"Of {', '.join(PARTS)}.")
    seconds: float = HfArg(default=570.0, help="No stage begins later, and what runs then is ended.")
    tiny: bool = HfArg(default=False, help="Sizes that CPU ranks manage.")

    def __post_init__(self) -> None:
        """Count the GPUs."""
        self.gpus = self.gpus or torch.cuda.device_count()
        if self.gpus < 2 or self.gpus & (self.gpus - 1):
            raise ValueError(f"--gpus {self.gpus} must be a power of two, 2 or more: ranks are halved and quartered.")


@dataclass(frozen=True)
class Job:
    """A start of torchrun on some GPUs: name, ranks, words after `-m`."""

    name: str
    ranks: int
    words: tuple[str, ...]


def stages_of(args: NodeArguments) -> list[list[Job]]:
    """What runs at the same time, the most wanted first."""
    most = args.gpus
    fewer = [2**power for power in range(most.bit_length() - 1)]
    big = ("--parts", "model", "--model", "qwen3-30b-a3b", "--steps", "5")
    small = ("--parts", "model", "--model", "pb-granular-2b", "--num_layers", "12")
    stages = {
        "layers": [[Job(f"layers {most}", most, ("--rounds", "3"))]],
        "30b": [[Job(f"30b {most}", most, (*big, "--ways", "ep", "fsdp2"))]],
        "pb": [[Job(f"pb {most}", most, (*small, "--ways", "ddp", "fsdp2"))], []],
    }
    stages["pb"][1] = [
        Job(f"pb {ranks}", ranks, (*small, "--ways", *(("ddp", "fsdp2") if ranks > 1 else ("single",))))
        for ranks in fewer
    ]
    beside = [Job("30b 2", 2, (*big, "--ways", "ep"))] if most > 2 else []
    beside += [Job("layers 4", 4, ("--rounds", "3"))] if most > 4 else []
    stages["30b"] += [beside] if beside else []
    return [stage for part in PARTS if part in args.parts for stage in stages.get(part, [])]


class Node:
    """Starts jobs on GPUs of this machine and keeps what they leave."""

    def __init__(self, args: NodeArguments) -> None:
        self.args, self.folder = args, Path(args.output_dir)
        self.device, self.end = choose_device(args.device), time.monotonic() + args.seconds
        self.facts = machine_facts(self.device, args.commit)
        self.folder.mkdir(parents=True, exist_ok=True)

    def start(self, job: Job, first_gpu: int = 0) -> subprocess.Popen:
        """A job on the GPUs from the first one on; what it says goes into a file of its name."""
        seen = ",".join(str(first_gpu + rank) for rank in range(job.ranks)) if self.device.type == "cuda" else ""
        launch = ["env", f"CUDA_VISIBLE_DEVICES={seen}", "OMP_NUM_THREADS=1", sys.executable]
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={job.ranks}", "-m"]
        with (self.folder / f"{job.name.replace(' ', '_')}.txt").open("a") as log:
            return subprocess.Popen([*launch, *job.words], stdout=log, stderr=log)

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def wait(self, process: subprocess.Popen, until: Callable[[], bool] | None = None) -> int | None:
        """Its exit code; None where something came first: `until`, or the end of the time, which ends it."""
        while (code := process.poll()) is None:
            if self.left() < 0:
                process.terminate()
                process.wait()
            elif until is not None and until():
                return None
            time.sleep(0.05)
        return code

    def run_stage(self, jobs: Sequence[Job]) -> None:
        """All of `ranks.py` jobs beside one another."""
        running, first = [], 0
        for job in jobs:
            words = ["hf_moe_cpt.scripts.benchmarks.ranks", *job.words, "--device", self.device.type]
            words += ["--commit", self.facts["commit"], "--output_dir", str(self.folder / job.name)]
            words += ["--tiny"] if self.args.tiny else []
            running.append((job, self.start(Job(job.name, job.ranks, tuple(words)), first)))
            first += job.ranks
        for job, process in running:
            print(f"{job.name}: exit code {self.wait(process)}, {self.left():.0f} s left", flush=True)
        found = [row for path in sorted(self.folder.glob("*/ranks.csv")) for row in rows_of(path)]
        if found:
            write_csv(self.folder / "ranks.csv", found)

    # ---- a run that goes on on other ranks ----

    def prepare(self) -> None:
        """A small model with a tokenizer of words, and text, in a folder."""
        home = self.folder / "start"
        tokenizer = Tokenizer(WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", pad_token="w2").save_pretrained(home)
        config = shape_of("pb-granular-tiny", None) if self.args.tiny else shape_of("pb-granular-2b", 4)
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(home)
        words = torch.randint(3, WORDS, (STEPS * BLOCKS, self.length), generator=torch.Generator().manual_seed(1))
        lines = [json.dumps({"text": " ".join(f"w{word}" for word in row)}) for row in words.tolist()]
        (home / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return 32 if self.args.tiny else LENGTH

    def train(self, name: str, ranks: int) -> subprocess.Popen:
        """The run of this name, from its newest checkpoint on, its experts dealt to so many ranks."""
        home, run = self.folder / "start", self.folder / name
        settings = {
            "model_name_or_path": home, "dataset_name": home / "text.jsonl", "output_dir": run, "max_steps": STEPS,
            "max_length": self.length, "per_device_train_batch_size": BLOCKS // ranks, "save_steps": SAVE_STEPS,
            "logging_steps": 1, "report_to": "none", "dtype": "float32", "resume_from_checkpoint": "auto",
            **({"ep_size": ranks} if ranks > 1 else {}),
        }  # fmt: skip
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        words += ["--use_cpu"] if self.device.type == "cpu" else ["--bf16"]
        return self.start(Job(name, ranks, ("hf_moe_cpt.scripts.cpt", *words)))

    def resume(self) -> None:
        """Both runs, and resume.csv with the losses of each step."""
        self.prepare()
        most = self.args.gpus
        code = self.wait(self.train("undisturbed", most))
        events = [f"undisturbed on {most}: exit code {code}"]
        run = self.folder / "disturbed"
        for ranks, stop in ((max(most // 2, 2), 4), (max(most // 4, 1), 8)):
            process = self.train("disturbed", ranks)
            self.wait(process, lambda stop=stop: _step(run) >= stop)
            process.terminate()
            events.append(f"SIGTERM on {ranks} at step {_step(run)}: exit code {self.wait(process)}")
        process = self.train("disturbed", most)
        began = _step(run)
        if self.wait(process, lambda: any((run / UNFINISHED).glob("*")) and _step(run) >= began) is None:
            os.kill(_children(process.pid)[-1], signal.SIGKILL)
            events.append(
                f"SIGKILL of a rank of {most} in a save at step {_step(run)}: exit code {self.wait(process)}"
            )
        events.append(f"on {most} to the end: exit code {self.wait(self.train('disturbed', most))}")
        print("\n".join(events), flush=True)
        want, got = (_losses(self.folder / name) for name in ("undisturbed", "disturbed"))
        rows = [
            {
                "step": step,
                "undisturbed": want[step],
                "disturbed": got.get(step, math.nan),
                "events": "; ".join(events),
            }
            | self.facts
            for step in sorted(want)
        ]
        write_csv(self.folder / "resume.csv", rows)
        off = max((abs(row["disturbed"] / row["undisturbed"] - 1) for row in rows), default=math.nan)
        print(f"losses of {len(rows)} steps: {off:.1e} apart at most", flush=True)


def _step(run: Path) -> int:
    checkpoint = last_whole_checkpoint(run) if run.is_dir() else None
    return 0 if checkpoint is None else step_of(checkpoint)


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _losses(run: Path) -> dict[int, float]:
    """By step, of the newest checkpoint's log."""
    checkpoint = last_whole_checkpoint(run) if run.is_dir() else None
    if checkpoint is None:
        return {}
    log: list[dict[str, Any]] = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


def main(argv: Sequence[str] | None = None) -> None:
    """Stage after stage."""
    (args,) = parse_arguments((NodeArguments,), argv, program="node.py", description=__doc__)
    node = Node(args)
    for jobs in stages_of(args):
        if node.left() > 0:
            node.run_stage(jobs)
    if "resume" in args.parts and node.left() > 0:
        node.resume()


if __name__ == "__main__":
    run_script(main)
