"""Kill a training run with SIGKILL at random moments, resume it each time, and compare it with one never killed.

python scripts/soak_checkpoints.py --kills 100 --ranks 2

A run of a tiny mixture of experts in float32 on the CPU, with dropout, replay, and a checkpoint every few steps. At
every kill one rank, drawn at random, is killed; the others follow, as they would under torchrun. When the run has
come to its end its log of losses, its weights and the order of its rows must be those of the run that nobody killed,
bit for bit; then it starts anew, until there were enough kills. Exits with 1 if anything differs or is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.trainers.instruments.checkpoints import UNFINISHED, last_whole_checkpoint


PATIENCE = 180.0  # seconds in which the processes must answer, also on a machine that is busy
GRACE = 3.0  # seconds that the other ranks have to end by themselves
EARLY_KILLS = 0.15  # share of kills before the first step: while resuming


class Rank:
    """A process that starts one rank of the run again and again (scripts/soak_run.py).

    on: words in front of its command, such as those that start it on another host. settings: environment of the run.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        port: int,
        on: Sequence[str] = (),
        settings: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        command = [sys.executable, "-m", "hf_moe_cpt.scripts.soak_run", f"--rank={rank}", f"--world_size={world_size}"]
        settings = {"OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": "", **settings}
        if world_size > 1:
            settings |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
            settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        changed = [f"{name}={value}" for name, value in settings.items()]
        self.server = subprocess.Popen([*on, "env", *changed, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid: int | None = None
        self.exit_code: int | None = None
        self.saved = 0
        self._rest = b""

    def start(self, order: dict[str, Any]) -> None:
        """Start the run once more."""
        self.exit_code, self.saved = None, 0
        self.server.stdin.write((json.dumps(order) + "\n").encode())
        self.server.stdin.flush()
        self.pid = self.wait_for("pid", PATIENCE)["pid"]

    def wait_for(self, what: str, seconds: float) -> dict[str, Any] | None:
        """The next line with the key `what`, or with "exit"; None if it does not come within `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            line = self._line(max(0.0, deadline - time.monotonic()))
            if line is None:
                return None
            if what in line or "exit" in line:
                return line

    def _line(self, seconds: float) -> dict[str, Any] | None:
        while b"\n" not in self._rest:
            if not select.select([self.server.stdout], [], [], seconds)[0]:
                return None
            read = os.read(self.server.stdout.fileno(), 1 << 16)
            if not read:
                raise RuntimeError(f"A rank's server ended with exit code {self.server.wait()}.")
            self._rest += read
        text, self._rest = self._rest.split(b"\n", 1)
        line = json.loads(text)
        self.exit_code = line.get("exit", self.exit_code)
        self.saved = line.get("saved", self.saved)
        return line

    def kill(self) -> None:
        """End the run's process at once: no cleanup, no flush."""
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and the line that says so is not read yet
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the server, which has nothing to tidy up, and the run."""
        if self.pid is not None:
            self.kill()
        self.server.kill()
        self.server.wait()
        self.server.stdin.close()
        self.server.stdout.close()


@dataclass
class Tally:
    """What happened so far; kills count once, whatever they ended."""

    kills: int = 0
    while_resuming: int = 0
    while_saving: int = 0
    checkpoints_lost: int = 0
    rows_repeated: int = 0
    rows_out_of_order: int = 0
    most_steps_again: int = 0
    different_results: int = 0
    rounds: int = 0
    seconds_to_start: list[float] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing was lost, repeated or changed."""
        faults = (self.checkpoints_lost, self.rows_repeated, self.rows_out_of_order, self.different_results)
        return not any(faults)

    def table(self) -> str:
        """One line for each count."""
        starts = sorted(self.seconds_to_start)
        rows = {
            "kills": self.kills,
            "of these before the first step": self.while_resuming,
            "of these during a save": self.while_saving,
            "runs brought to their end": self.rounds,
            "checkpoints lost": self.checkpoints_lost,
            "rows repeated": self.rows_repeated,
            "steps with other rows": self.rows_out_of_order,
            "runs with other losses or weights": self.different_results,
            "most steps done again after a kill": self.most_steps_again,
            "seconds to start again, median": f"{starts[len(starts) // 2]:.2f}" if starts else "none",
        }
        return "\n".join(f"{name:36} {value}" for name, value in rows.items())


class Soak:
    """Starts, kills and compares; the ranks' servers live as long as it does."""

    def __init__(self, folder: Path, ranks: int, seed: int, settings: dict[str, Any]) -> None:
        self.folder, self.settings, self.random = folder, settings, random.Random(seed)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.ranks = [Rank(rank, ranks, port) for rank in range(ranks)]
        self.tally = Tally()
        self.seconds_to_begin, self.seconds_of_save_interval = 1.0, 1.0

    def close(self) -> None:
        """End the servers."""
        for rank in self.ranks:
            rank.close()

    def reference(self) -> Path:
        """Train once without a kill, and learn how long things take."""
        folder = self._new_folder("reference")
        for rank in self.ranks:
            self._expect(rank.wait_for("ready", PATIENCE), "ready", folder)
        began = time.monotonic()
        self._start(folder, 0)
        self._expect(self.ranks[0].wait_for("began", PATIENCE), "began", folder)
        self.seconds_to_begin, began = time.monotonic() - began, time.monotonic()
        self._wait_for_end(folder)
        intervals = self.settings["max_steps"] / self.settings["save_steps"]
        self.seconds_of_save_interval = (time.monotonic() - began) / intervals
        return folder

    def round(self, reference: Path, kills: int) -> None:
        """One run to its end with at most `kills` kills, compared with the reference."""
        folder = self._new_folder(f"round-{self.tally.rounds}")
        for attempt in range(kills):
            if not self._start_and_kill(folder, attempt):
                break
        else:
            self._start(folder, kills)
            self._wait_for_end(folder)
        self._compare(folder, reference)
        self.tally.rounds += 1
        shutil.rmtree(folder)

    def _new_folder(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True)
        return folder

    def _start(self, folder: Path, attempt: int) -> None:
        for rank in self.ranks:
            rank.start({"folder": str(folder), "attempt": attempt, **self.settings})

    def _start_and_kill(self, folder: Path, attempt: int) -> bool:
        """Start, and kill a rank at a random moment; False if the run ended before that."""
        began = time.monotonic()
        self._start(folder, attempt)
        is_early = self.random.random() < EARLY_KILLS
        if is_early:
            self.ranks[0].wait_for("began", self.random.uniform(0, self.seconds_to_begin))
        else:
            self._expect(self.ranks[0].wait_for("began", PATIENCE), "began", folder)
            self.tally.seconds_to_start.append(time.monotonic() - began)
            self.ranks[0].wait_for("exit", self.random.uniform(0, 2 * self.seconds_of_save_interval))
        victim = self.random.choice(self.ranks)
        if self.ranks[0].exit_code is not None:
            self._wait_for_end(folder)
            return False
        victim.kill()
        for rank in self.ranks:
            if rank.wait_for("exit", GRACE) is None:
                rank.kill()
                rank.wait_for("exit", PATIENCE)
        if victim.exit_code != -signal.SIGKILL:  # it was faster than the signal
            self._wait_for_end(folder)
            return False
        self._count_kill(folder, attempt, is_early)
        return True

    def _count_kill(self, folder: Path, attempt: int, is_early: bool) -> None:
        run, tally = folder / "run", self.tally
        tally.kills += 1
        tally.while_resuming += is_early
        tally.while_saving += not is_early and (run / UNFINISHED).exists()  # a resumed run tidies it up first
        whole = last_whole_checkpoint(run, read_back=True)
        whole_step = 0 if whole is None else int(whole.name.rpartition("-")[2])
        announced = max(self.ranks[0].saved, self._announced_before(folder))
        (folder / "announced").write_text(str(announced))
        tally.checkpoints_lost += whole_step < announced
        done = [step for step, _ in _rows(folder, attempt, 0)]
        tally.most_steps_again = max(tally.most_steps_again, max(done, default=whole_step) - whole_step)

    def _announced_before(self, folder: Path) -> int:
        path = folder / "announced"
        return int(path.read_text()) if path.exists() else 0

    def _wait_for_end(self, folder: Path) -> None:
        for number, rank in enumerate(self.ranks):
            if rank.exit_code is None:
                rank.wait_for("exit", PATIENCE + 10 * self.settings["max_steps"])
            if rank.exit_code != 0:
                raise RuntimeError(f"Rank {number} ended with {rank.exit_code}: see {_newest_log(folder, number)}.")

    def _expect(self, line: dict[str, Any] | None, what: str, folder: Path) -> None:
        if line is None or what not in line:
            raise RuntimeError(f"The run did not start ({line}): see {_newest_log(folder, 0)}.")

    def _compare(self, folder: Path, reference: Path) -> None:
        found, wanted = (json.loads((path / "result.json").read_text()) for path in (folder, reference))
        self.tally.different_results += found != wanted
        for number in range(len(self.ranks)):
            steps, want = _lineage(folder, number), _lineage(reference, number)
            self.tally.rows_out_of_order += sum(steps.get(step) != rows for step, rows in want.items())
        rows = [row for number in range(len(self.ranks)) for rows in _lineage(folder, number).values() for row in rows]
        self.tally.rows_repeated += len(rows) - len(set(rows))


def _rows(folder: Path, attempt: int | str, rank: int) -> list[tuple[int, list[str]]]:
    """What a start was given, in order; a line that a kill cut short counts for nothing."""
    found = []
    name = f"rows-{attempt:05d}-{rank}.jsonl" if isinstance(attempt, int) else f"rows-{attempt}-{rank}.jsonl"
    for path in sorted(folder.glob(name)):
        for line in path.read_text().splitlines():
            if line.endswith("]]"):
                found.append(tuple(json.loads(line)))
    return found


def _lineage(folder: Path, rank: int) -> dict[int, list[str]]:
    """Rows of each step in the history that the final weights have: of the last start that came by."""
    return dict(_rows(folder, "*", rank))


def _newest_log(folder: Path, rank: int) -> Path:
    return max(folder.glob(f"log-*-{rank}"), default=folder)


@dataclass
class SoakArguments:
    """How long, and what is killed."""

    kills: int = field(default=100, metadata={"help": "How many."})
    ranks: int = field(default=1, metadata={"help": "Processes of the run, with gloo."})
    seed: int = field(default=0, metadata={"help": "Of the moments."})
    steps: int = field(default=40, metadata={"help": "Optimizer steps of the run."})
    save_steps: int = field(default=4, metadata={"help": "Steps from checkpoint to checkpoint."})
    sharded: bool = field(default=False, metadata={"help": "FSDP2 with sharded checkpoints; needs several ranks."})
    snapshots: bool = field(default=False, metadata={"help": "Save in the background (snapshot_dir)."})
    folder: str | None = field(
        default=None, metadata={"help": "Where to work, on the disk that is to be tried; unset: a temporary one."}
    )

    def __post_init__(self) -> None:
        for name in ("kills", "ranks", "steps", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1.")
        if self.sharded and self.ranks < 2:
            raise ValueError("--sharded cuts weights over ranks: give --ranks 2 or more.")


def main(argv: Sequence[str] | None = None) -> None:
    """Soak, print the table, and exit with 1 unless it is clean."""
    (args,) = parse_arguments((SoakArguments,), argv, program="soak_checkpoints.py", description=__doc__)
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir=args.folder))
    settings = {"max_steps": args.steps, "save_steps": args.save_steps}
    if args.sharded:
        settings["is_sharded"] = True
    if args.snapshots:
        settings["snapshot_dir"] = str(folder / "snapshots")
    began = time.monotonic()
    soak = Soak(folder, args.ranks, args.seed, settings)
    try:
        reference = soak.reference()
        while soak.tally.kills < args.kills:
            soak.round(reference, args.kills - soak.tally.kills)
    finally:
        soak.close()
    print(f"{soak.tally.table()}\n{'seconds in all':36} {time.monotonic() - began:.0f}")
    if not soak.tally.is_clean:
        raise SystemExit(f"The soak failed; {folder} holds the reference.")
    shutil.rmtree(folder)


if __name__ == "__main__":
    run_script(main)
