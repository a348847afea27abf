"""One rank of one engine of `bench_sharding.py`: train, time the steps, let the first rank report. Source: ours."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback, TrainerCallback

from hf_moe_cpt.arguments import fsdp2_arguments
from hf_moe_cpt.scripts.bench_step_models import config_of
from hf_moe_cpt.scripts.benchmark_tools import GIBIBYTE, synchronize
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer
from hf_moe_cpt.trainers.instruments.ranks import leave_process_group


KINDS = ("single", "ddp", "fsdp2")
SEED = 0


@dataclass(frozen=True)
class ShardingJob:
    """What every rank of an engine does. rows: blocks of a rank in a step."""

    model: str
    kind: str
    device: str
    layers: int | None
    rows: int
    length: int
    warmup: int
    steps: int


class StepClock(TrainerCallback):
    """Seconds of each step after the warm-up, with an idle device before and after."""

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


def layer_class(model: str) -> str:
    """Name of the class whose modules are sharded one by one."""
    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(config_of(model)).model.layers[0]).__name__


def build_model(job: ShardingJob, device: torch.device) -> PreTrainedModel:
    """Fresh weights in float32, the same on every rank and under every engine."""
    config = config_of(job.model)
    if job.layers is not None:
        config.num_hidden_layers = job.layers
    torch.manual_seed(SEED)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def random_blocks(job: ShardingJob, ranks: int, vocab_size: int) -> Dataset:
    """Blocks for all steps of all ranks, in the order of the steps."""
    count = (job.warmup + job.steps) * job.rows * ranks
    tokens = torch.randint(0, vocab_size, (count, job.length), generator=torch.Generator().manual_seed(SEED))
    return Dataset.from_dict({"input_ids": tokens.tolist()})


def train(job: ShardingJob, layer: str, folder: str) -> dict[str, Any]:
    """Seconds of the steps, peak memory of the fullest rank in GiB (None on a CPU), losses of two steps."""
    on_gpu = job.device == "cuda"
    args = CPTConfig(
        output_dir=folder,
        max_steps=job.warmup + job.steps,
        per_device_train_batch_size=job.rows,
        max_length=job.length,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="no",
        eval_on_start=False,
        report_to="none",
        disable_tqdm=True,
        starting_phase="scratch",
        **(fsdp2_arguments(layer) if job.kind == "fsdp2" else {}),
    )
    model = build_model(job, args.device)
    clock = StepClock(args.device, job.warmup)
    blocks = random_blocks(job, args.world_size, model.config.vocab_size)
    trainer = CPTTrainer(model, args, blocks, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = torch.tensor(torch.cuda.max_memory_allocated() / GIBIBYTE if on_gpu else 0.0, device=args.device)
    if dist.is_initialized():
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return {
        "seconds": clock.seconds,
        "peak GiB": peak.item() if on_gpu else None,
        "first loss": losses[0],
        "last loss": losses[-1],
    }


def main() -> None:
    """Do what the argument, JSON, asks for."""
    asked = json.loads(sys.argv[1])
    layer, folder = asked.pop("layer"), asked.pop("folder")
    report = train(ShardingJob(**asked), layer, folder)
    if not dist.is_initialized() or dist.get_rank() == 0:
        (Path(folder) / "report.json").write_text(json.dumps(report), encoding="utf-8")
    if dist.is_initialized():
        leave_process_group()


if __name__ == "__main__":
    main()
