"""Kill a training run with SIGKILL at random moments, resume it each time, and compare it with one never killed.

    python -m tests.faults.soak --kills 100 --ranks 2
    python -m tests.faults.soak --kills 60 --ranks 2 --experts
    python -m tests.faults.soak --trainer surgery --disks 100

A run of a tiny model in float32 on the CPU, of continual pre-training a mixture of experts with dropout and replay,
with a checkpoint every few steps. At every kill one rank, drawn at random, is killed, also before the first checkpoint
and in a run that is over; the others follow, as they would under torchrun. When the run has come to its end its log of
losses, its weights and the order of its rows must be those of the run that nobody killed, bit for bit; then it starts
anew, until there were enough kills. Exits with 1 if anything differs or is lost.

--disks: the run on file systems from empty to large enough, in steps of so many KiB. It must be refused before the
first step or come to its end with the reference's weights, and lie whole in its folder or where its error says.

With --rank this file serves one rank: it imports everything once, and forks a process for every start of the run. It
reads a line of JSON for each start, {"folder", "attempt", "max_steps", ...}, and writes one for each thing that
happens: {"pid"}, {"began"}, {"saved": step}, {"exit": code, negative for a signal}. Source: ours.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
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
import traceback
from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from transformers.distributed import DistributedConfig

from hf_moe_cpt.arguments import fsdp2_arguments
from hf_moe_cpt.data.random import derive_seed
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.trainers.common.checkpointing import (
    SET_ASIDE,
    UNFINISHED,
    checkpoints_in,
    is_whole,
    last_whole_checkpoint,
    step_of,
)
from hf_moe_cpt.trainers.common.distributed import is_sharded
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer
from tests.helpers.cpt_runs import without_clocks
from tests.helpers.faulty_hardware import small_disk
from tests.helpers.tiny_models import tiny_model


PATIENCE = 180.0  # seconds in which the processes must answer, also on a machine that is busy
GRACE = 3.0  # seconds that the other ranks have to end by themselves
EARLY_KILLS = 0.15  # share of kills before the first step: while resuming
VOCABULARY, LENGTH = 64, 16
ALL_THERE = "everything was written"
HELPERS = {"rainbowpo": "tests.helpers.preference_runs", "surgery": "tests.helpers.surgery_runs"}
LARGER = {"hidden_size": 64, "intermediate_size": 128}
SHARDED = {
    "accelerator_config": {"use_configured_state": True},
    **fsdp2_arguments("CptMoeDecoderLayer", state_dict_type="SHARDED_STATE_DICT"),
}


def record_rows(trainer: Trainer, path: Path) -> None:
    """Let a trainer write down which rows each step is given."""
    given = trainer.get_batch_samples

    def recording(*args: Any) -> Any:
        samples, num_items = given(*args)
        batches = [part for sample in samples for part in ([sample] if "input_ids" in sample else sample.values())]
        rows = [fingerprint(row) for batch in batches for row in batch["input_ids"]]
        with path.open("a") as file:
            file.write(json.dumps([trainer.state.global_step + 1, rows]) + "\n")
        return samples, num_items

    trainer.get_batch_samples = recording


class Tells(TrainerCallback):
    """Says on standard output how far the run is."""

    def __init__(self, output: int) -> None:
        self._output = output

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        tell(self._output, began=state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """A checkpoint is complete, unless it is being copied in the background."""
        if args.snapshot_dir is None and not is_sharded(model):
            tell(self._output, saved=state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """A checkpoint that was copied may have come to its place."""
        is_late = args.snapshot_dir is not None or is_sharded(model)
        found = checkpoints_in(args.output_dir) if is_late else []
        if found:
            tell(self._output, saved=step_of(found[-1]))


class FillsDisk(TrainerCallback):
    """Writes something else onto the disk of the run in step 1, so that `left` bytes are free."""

    def __init__(self, left: int) -> None:
        self._left = left

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            free = shutil.disk_usage(args.output_dir).free
            (Path(args.output_dir) / "_unrelated").write_bytes(bytes(max(0, free - self._left)))


def tell(output: int, **what: Any) -> None:
    os.write(output, (json.dumps(what) + "\n").encode())


def fingerprint(values: torch.Tensor) -> str:
    """Eleven bytes of the hash of a tensor's bits."""
    return hashlib.sha256(values.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:22]


def documents(count: int, seed: int) -> Dataset:
    """Random tokens, so that no two rows of the run are alike."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "soak") % 2**63)
    lengths = torch.randint(5, 40, (count,), generator=generator).tolist()
    return Dataset.from_dict(
        {"input_ids": [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]}
    )


def shard_on_the_cpu() -> None:
    """accelerate leaves FSDP out, without a word, where its processes have no GPU: tell it that they have one."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor, put together if it is in parts. A collective then."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def build(
    folder: Path,
    world_size: int,
    max_steps: int,
    dropout: float = 0.1,
    kind: str = "cpt",
    width: int = 16,
    is_dealt: bool = False,
    **changes: Any,
) -> Trainer:
    """The run: a mixture of experts in float32 with dropout, on new and replayed text, that saves every few steps.

    kind: or a preference optimisation, or a surgery with its reference on disk, of a dense model. width: of the
    mixture. is_dealt: its experts are dealt to the ranks.
    """
    if kind != "cpt":
        helper = importlib.import_module(HELPERS[kind])
        changes |= {"max_steps": max_steps, "save_strategy": "steps"}
        if kind == "rainbowpo":
            changes["per_device_train_batch_size"] = 4 // world_size
        if kind == "surgery":
            changes["gradient_accumulation_steps"] = 2 // world_size  # its micro-batches are the same on any ranks
            model = tiny_model("llama", **LARGER)
            return helper.trainer(folder / "run", model, reference="cache", **changes)
        return helper.trainer(folder, str(folder.parent / "model llama"), helper.pairs(4 * max_steps), **changes)
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None, "attention_dropout": dropout}
    model = AutoModelForCausalLM.from_config(CptMoeConfig(**sizes, **tokens, num_experts=7, num_experts_per_tok=3))
    if is_dealt:
        path = folder.parent / "model"
        model.save_pretrained(path)  # of the first rank
        dist.barrier()
        sizes = DistributedConfig(fsdp_size=world_size, ep_size=world_size, ep_implementation="hf_moe_cpt")
        model = AutoModelForCausalLM.from_pretrained(path, distributed_config=sizes)
    settings = {"replay_ratio": 0.25, "learning_rate": 1e-3, "logging_steps": 1, "eval_on_start": False}
    settings |= {"max_length": LENGTH, "save_strategy": "steps", "save_total_limit": 2, **changes}
    settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": max_steps}
    rows = 4 // world_size
    args = CPTConfig(output_dir=str(folder / "run"), per_device_train_batch_size=rows, **settings)
    needed = max_steps * 4 * LENGTH // 20
    return CPTTrainer(model, args, documents(needed, 1), documents(needed, 2))


def run(rank: int, world_size: int, output: int, order: dict[str, Any]) -> None:
    """Train to the end, from the newest whole checkpoint if there is one, and write what came out."""
    folder, attempt, left = Path(order.pop("folder")), order.pop("attempt"), order.pop("left", None)
    if world_size > 1:
        meeting = f"file://{(folder / f'meeting-{attempt}').resolve()}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    if order.pop("is_sharded", False):
        shard_on_the_cpu()
        order |= SHARDED
    trainer = build(folder, world_size, **order)
    record_rows(trainer, folder / f"rows-{attempt:05d}-{rank}.jsonl")
    if rank == 0:
        trainer.add_callback(Tells(output))
    if left is not None:
        trainer.add_callback(FillsDisk(left))
    trainer.train(resume_from_checkpoint="auto")
    weights = {name: fingerprint(whole(value)) for name, value in trainer.model.state_dict().items()}
    if rank == 0:
        history = without_clocks(trainer.state.log_history[:-1])  # the last is a summary of this start
        (folder / "result.json").write_text(json.dumps({"history": history, "weights": weights}))
    trainer.save_model()


def start(rank: int, world_size: int, order: dict[str, Any]) -> int:
    """Fork the run; what it prints goes to log-<attempt>-<rank> in its folder. Returns the process id."""
    output = os.dup(1)
    pid = os.fork()
    if pid:
        os.close(output)
        return pid
    log = os.open(f"{order['folder']}/log-{order['attempt']:05d}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        run(rank, world_size, output, order)
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the parent's exit handlers are not ours


class Rank:
    """A process that starts one rank of the run again and again.

    on: words in front of its command, such as those that start it on another host. settings: environment of the run.
    """

    def __init__(
        self, rank: int, world_size: int, port: int, on: Sequence[str] = (), kind: str = "cpt", **settings: str
    ) -> None:
        command = [sys.executable, "-m", "tests.faults.soak", f"--rank={rank}", f"--ranks={world_size}"]
        command.append(f"--trainer={kind}")
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

    def end(self) -> int | None:
        """The exit code of the run, once it has ended."""
        if self.exit_code is None:
            self.wait_for("exit", PATIENCE)
        return self.exit_code

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


FAULTS = ("checkpoints_lost", "rows_repeated", "rows_out_of_order", "different_results")
COUNTS = {
    "kills": "kills",
    "while_resuming": "of these before the first step",
    "while_saving": "of these during a save",
    "before_first": "of these before there was a checkpoint",
    "when_over": "of these in a run that was over",
    "rounds": "runs brought to their end",
    "checkpoints_lost": "checkpoints lost",
    "rows_repeated": "rows repeated",
    "rows_out_of_order": "steps with other rows",
    "different_results": "runs with other losses or weights",
    "most_steps_again": "most steps done again after a kill",
}


class Tally(SimpleNamespace):
    """What happened so far, by the names in COUNTS; kills count once, whatever they ended."""

    def __init__(self) -> None:
        super().__init__(**dict.fromkeys(COUNTS, 0), seconds_to_start=[])

    @property
    def is_clean(self) -> bool:
        """Whether nothing was lost, repeated or changed."""
        return not any(getattr(self, name) for name in FAULTS)

    def table(self) -> str:
        starts = sorted(self.seconds_to_start)
        rows = {label: getattr(self, name) for name, label in COUNTS.items()}
        rows["seconds to start again, median"] = f"{starts[len(starts) // 2]:.2f}" if starts else "none"
        return "\n".join(f"{label:36} {value}" for label, value in rows.items())


class Soak:
    """Starts, kills and compares; the ranks' servers live as long as it does."""

    def __init__(self, folder: Path, ranks: int, seed: int, settings: dict[str, Any]) -> None:
        self.folder, self.settings, self.random = folder, settings, random.Random(seed)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.kind = settings.get("kind", "cpt")
        if self.kind == "rainbowpo":
            importlib.import_module(HELPERS[self.kind]).saved_model(folder, **LARGER)
        self.ranks = [Rank(rank, ranks, port, kind=self.kind) for rank in range(ranks)]
        self.tally = Tally()
        self.seconds_to_begin, self.seconds_of_save_interval = 1.0, 1.0

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()

    def reference(self) -> Path:
        """Train once without a kill, and learn how long things take."""
        folder = self.folder / "reference"
        for rank in self.ranks:
            self._expect(rank.wait_for("ready", PATIENCE), "ready", folder)
        began = time.monotonic()
        self.start(folder, 0)
        self._expect(self.ranks[0].wait_for("began", PATIENCE), "began", folder)
        self.seconds_to_begin, began = time.monotonic() - began, time.monotonic()
        self.wait_for_end(folder)
        intervals = self.settings["max_steps"] / self.settings["save_steps"]
        self.seconds_of_save_interval = (time.monotonic() - began) / intervals
        return folder

    def round(self, reference: Path, kills: int) -> None:
        """One run to its end with at most `kills` kills, compared with the reference."""
        folder, budget = self.folder / f"round-{self.tally.rounds}", self.tally.kills + kills
        for attempt in range(kills):
            if not self._start_and_kill(folder, attempt):
                break
        else:
            attempt = kills
            self.start(folder, kills)
            self.wait_for_end(folder)
        self._compare(folder, reference)
        if self.tally.kills < budget:
            self.tally.when_over += self._start_and_kill(folder, attempt + 1, is_over=True)
        self.start(folder, attempt + 2)
        self.wait_for_end(folder)
        self._compare(folder, reference)
        self.tally.rounds += 1
        shutil.rmtree(folder)

    def fill_disks(self, reference: Path, step: int) -> Counter[str]:
        """How many runs ended how, on disks of one step, two, ... bytes until nothing is said of one.

        Then on disks that are as large, twice, and that something else fills in step 1 up to as many bytes. Raises
        RuntimeError for one that ends otherwise than refused, or with the weights of the reference in a whole model
        and whole checkpoints.
        """
        ends: Counter[str] = Counter()
        for size in count(step, step):
            ends[end := self._fill_disk(reference, size)] += 1
            if end == ALL_THERE:
                break
        for left in count(0, step):
            ends[end := self._fill_disk(reference, 2 * size, left=left)] += 1
            if end == ALL_THERE:
                return ends

    def _fill_disk(self, reference: Path, size: int, **changes: Any) -> str:
        folder = self.folder / "disk"
        with small_disk(folder / "run", size):
            self.start(folder, rescue_dir=str(folder / "rescued"), **changes)
            self.ranks[0].end()
            log = "".join(path.read_text() for path in sorted(folder.glob("log-*")))
            end = self._end_of_disk(folder, log, reference)
        print(f"{size >> 10:6} KiB, {changes}: {end}", flush=True)
        shutil.rmtree(folder)
        return end

    def _end_of_disk(self, folder: Path, log: str, reference: Path) -> str:
        code, last = self.ranks[0].exit_code, (log.strip().splitlines() or [""])[-1]
        if code == 1 and "GB free" in last and "need about" in last or "cache needs" in last:
            if (folder / "rows-00000-0.jsonl").exists():
                raise RuntimeError(f"Refused after the first step: {log}")
            return "refused before the first step"
        model = folder / "run"
        if code == 1 and "it is whole in" in last:
            (model,) = (folder / "rescued").iterdir()
        elif code != 0:
            raise RuntimeError(f"Ended with {code}: {log}")
        broken = [path for path in checkpoints_in(folder / "run") if not is_whole(path)]
        found = json.loads((folder / "result.json").read_text())["weights"]
        wanted = json.loads((reference / "result.json").read_text())["weights"]
        with safe_open(model / "model.safetensors", framework="pt") as saved:
            differ = [name for name in saved.keys() if fingerprint(saved.get_tensor(name)) != wanted[name]]  # noqa: SIM118
        if broken or differ or found != wanted:
            raise RuntimeError(f"{broken} are broken, {differ} differ: {log}")
        lost = log.count("was not saved (")
        return "the model is elsewhere" if code else "checkpoints could not be written" if lost else ALL_THERE

    def start(self, folder: Path, attempt: int = 0, **changes: Any) -> None:
        """Start the run on all ranks."""
        folder.mkdir(exist_ok=True)
        for rank in self.ranks:
            rank.start({"folder": str(folder), "attempt": attempt, **self.settings, **changes})

    def _start_and_kill(self, folder: Path, attempt: int, is_over: bool = False) -> bool:
        """Start, and kill a rank at a random moment; False if the run ended before that."""
        began = time.monotonic()
        self.start(folder, attempt)
        is_early = is_over or self.random.random() < EARLY_KILLS
        if is_early:
            self.ranks[0].wait_for("began", self.random.uniform(0, self.seconds_to_begin))
        else:
            self._expect(self.ranks[0].wait_for("began", PATIENCE), "began", folder)
            self.tally.seconds_to_start.append(time.monotonic() - began)
            self.ranks[0].wait_for("exit", self.random.uniform(0, 2 * self.seconds_of_save_interval))
        victim = self.random.choice(self.ranks)
        if self.ranks[0].exit_code is not None:
            self.wait_for_end(folder)
            return False
        victim.kill()
        for rank in self.ranks:
            if rank.wait_for("exit", GRACE) is None:
                rank.kill()
                rank.wait_for("exit", PATIENCE)
        if victim.exit_code != -signal.SIGKILL:  # it was faster than the signal
            self.wait_for_end(folder)
            return False
        self._count_kill(folder, attempt, is_early)
        return True

    def _count_kill(self, folder: Path, attempt: int, is_early: bool) -> None:
        run, tally = folder / "run", self.tally
        tally.kills += 1
        tally.while_resuming += is_early
        tally.while_saving += not is_early and (run / UNFINISHED).exists()  # a resumed run tidies it up first
        whole = last_whole_checkpoint(run, read_back=True)
        tally.before_first += whole is None
        tally.checkpoints_lost += len(list((run / SET_ASIDE).glob("*")))
        whole_step = 0 if whole is None else step_of(whole)
        before = folder / "announced"
        announced = max(self.ranks[0].saved, int(before.read_text()) if before.exists() else 0)
        before.write_text(str(announced))
        tally.checkpoints_lost += whole_step < announced
        done = [step for step, _ in _rows(folder, f"{attempt:05d}", 0)]
        tally.most_steps_again = max(tally.most_steps_again, max(done, default=whole_step) - whole_step)

    def wait_for_end(self, folder: Path) -> None:
        """Return when all ranks are through; raises RuntimeError if one failed."""
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
        if self.kind == "cpt":  # the others see rows again
            self.tally.rows_repeated += len(rows) - len(set(rows))


def _rows(folder: Path, attempt: str, rank: int) -> list[tuple[int, list[str]]]:
    """What a start was given, in order; a line that a kill cut short counts for nothing."""
    paths = sorted(folder.glob(f"rows-{attempt}-{rank}.jsonl"))
    lines = [line for path in paths for line in path.read_text().splitlines()]
    return [tuple(json.loads(line)) for line in lines if line.endswith("]]")]


def _lineage(folder: Path, rank: int) -> dict[int, list[str]]:
    """Rows of each step in the history that the final weights have: of the last start that came by."""
    return dict(_rows(folder, "*", rank))


def _newest_log(folder: Path, rank: int) -> Path:
    return max(folder.glob(f"log-*-{rank}"), default=folder)


def serve(rank: int, world_size: int) -> None:
    """Serve the orders of a `Rank` until standard input ends."""
    torch.set_num_threads(1)
    tell(1, ready=rank)
    for line in sys.stdin:
        pid = start(rank, world_size, json.loads(line))
        tell(1, pid=pid)
        _, status = os.waitpid(pid, 0)
        tell(1, exit=os.waitstatus_to_exitcode(status))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)  # how a soak starts its ranks
    parser.add_argument("--trainer", choices=["cpt", *HELPERS], default="cpt", help="whose run")
    parser.add_argument("--disks", type=int, metavar="KIB", help="fill disks instead: KiB from one to the next")
    parser.add_argument("--kills", type=int, default=100, help="how many")
    parser.add_argument("--ranks", type=int, default=1, help="processes of the run, with gloo")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of the run")
    parser.add_argument(
        "--width", type=int, default=16, help="hidden size: a wide model's checkpoint fills more disks"
    )
    parser.add_argument("--save-steps", type=int, default=4, help="steps from checkpoint to checkpoint")
    parser.add_argument("--sharded", action="store_true", help="FSDP2 with sharded checkpoints; needs several ranks")
    parser.add_argument("--experts", action="store_true", help="expert parallelism; needs several ranks")
    parser.add_argument("--snapshots", action="store_true", help="save in the background (snapshot_dir)")
    parser.add_argument("--folder", help="where to work, on the disk that is to be tried; default: a temporary one")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Soak, print the table, and exit with 1 unless it is clean."""
    args = _parser().parse_args(argv)
    if args.rank is not None:
        if args.trainer != "cpt":
            importlib.import_module(HELPERS[args.trainer])
        serve(args.rank, args.ranks)
        return
    for name in ("kills", "ranks", "steps", "save_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1.")
    if (args.sharded or args.experts) and args.ranks < 2:
        raise ValueError("--sharded and --experts cut weights over ranks: give --ranks 2 or more.")
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir=args.folder))
    settings = {"max_steps": args.steps, "save_steps": args.save_steps, "is_sharded": args.sharded}
    settings |= {"width": args.width, "is_dealt": args.experts}
    settings["snapshot_dir"] = str(folder / "snapshots") if args.snapshots else None
    if args.trainer != "cpt":
        settings = {
            "kind": args.trainer,
            "max_steps": args.steps,
            "save_steps": args.save_steps,
            "save_total_limit": 2,
        }
    began = time.monotonic()
    soak = Soak(folder, args.ranks, args.seed, settings)
    try:
        reference = soak.reference()
        if args.disks:
            for end, number in soak.fill_disks(reference, args.disks << 10).items():
                print(f"{end:36} {number}")
        while not args.disks and soak.tally.kills < args.kills:
            soak.round(reference, args.kills - soak.tally.kills)
    finally:
        soak.close()
    print(f"{soak.tally.table()}\n{'seconds in all':36} {time.monotonic() - began:.0f}")
    if not soak.tally.is_clean:
        raise SystemExit(f"The soak failed; {folder} holds the reference.")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
