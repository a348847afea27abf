"""One rank of the soak: imports everything once, and forks a process for every start of the run.

Reads a line of JSON for each start from standard input: {"folder", "attempt", "max_steps", ...}; writes a line for
each thing that happens: {"pid"}, {"began"}, {"saved": step}, {"exit": code, negative for a signal}. Source: ours.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import hf_moe_cpt.trainers.cpt.cpt_trainer
from hf_moe_cpt.arguments import fsdp2_arguments, parse_arguments
from hf_moe_cpt.data.permutation import derive_seed
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.instruments.checkpoints import checkpoints_in


VOCABULARY, LENGTH = 64, 16
SHARDED = {
    "accelerator_config": {"use_configured_state": True},
    **fsdp2_arguments("CptMoeDecoderLayer", state_dict_type="SHARDED_STATE_DICT"),
}
CLOCKS = ("runtime", "per_second", "tflops", "train_loss")  # of which two runs may differ


class Recorded(hf_moe_cpt.trainers.cpt.cpt_trainer.CPTTrainer):
    """Writes down which rows each step is given."""

    rows_file: Path

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The parent's; a line with the step and a fingerprint of each row."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = [fingerprint(row) for sample in samples for row in sample["input_ids"]]
        with self.rows_file.open("a") as file:
            file.write(json.dumps([self.state.global_step + 1, rows]) + "\n")
        return samples, num_items


class Tells(TrainerCallback):
    """Says on standard output how far the run is."""

    def __init__(self, output: int) -> None:
        self._output = output

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The first step is next."""
        tell(self._output, began=state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A checkpoint is complete, unless it is being copied in the background."""
        if args.snapshot_dir is None:
            tell(self._output, saved=state.global_step)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A checkpoint that was copied may have come to its place."""
        found = checkpoints_in(args.output_dir) if args.snapshot_dir is not None else []
        if found:
            tell(self._output, saved=int(found[-1].name.rpartition("-")[2]))


def tell(output: int, **what: Any) -> None:
    """Write one line, in one piece."""
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
    save_total_limit: int | None = 2,
    **changes: Any,
) -> Recorded:
    """The run: a mixture of experts in float32 with dropout, on new and replayed text, that saves every few steps."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "attention_dropout": dropout}
    tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(
        CptMoeConfig(**sizes, **heads, **tokens, num_experts=7, num_experts_per_tok=3, max_position_embeddings=64)
    )
    args = CPTConfig(
        output_dir=str(folder / "run"),
        max_steps=max_steps,
        max_length=LENGTH,
        per_device_train_batch_size=4 // world_size,
        replay_ratio=0.25,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="steps",
        save_total_limit=save_total_limit,
        eval_on_start=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **changes,
    )
    needed = max_steps * 4 * LENGTH // 20
    return Recorded(model, args, documents(needed, 1), documents(needed, 2))


def run(rank: int, world_size: int, output: int, order: dict[str, Any]) -> None:
    """Train to the end, from the newest whole checkpoint if there is one, and write what came out."""
    folder, attempt = Path(order.pop("folder")), order.pop("attempt")
    if world_size > 1:
        meeting = f"file://{(folder / f'meeting-{attempt}').resolve()}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    if order.pop("is_sharded", False):
        shard_on_the_cpu()
        order |= SHARDED
    trainer = build(folder, world_size, **order)
    trainer.rows_file = folder / f"rows-{attempt:05d}-{rank}.jsonl"
    if rank == 0:
        trainer.add_callback(Tells(output))
    trainer.train(resume_from_checkpoint="auto")
    weights = {name: fingerprint(whole(value)) for name, value in trainer.model.state_dict().items()}
    if rank == 0:
        history = [
            {k: v for k, v in entry.items() if not any(clock in k for clock in CLOCKS)}
            for entry in trainer.state.log_history[:-1]  # the last is a summary of this start
        ]
        (folder / "result.json").write_text(json.dumps({"history": history, "weights": weights}))


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


@dataclass
class RankArguments:
    """Which rank this is."""

    rank: int = field(default=0, metadata={"help": "Counted from 0."})
    world_size: int = field(default=1, metadata={"help": "Of how many."})


def main() -> None:
    """Serve orders until standard input ends."""
    (args,) = parse_arguments((RankArguments,), None, program="soak_run.py", description=__doc__)
    torch.set_num_threads(1)
    tell(1, ready=args.rank)
    for line in sys.stdin:
        pid = start(args.rank, args.world_size, json.loads(line))
        tell(1, pid=pid)
        _, status = os.waitpid(pid, 0)
        tell(1, exit=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
