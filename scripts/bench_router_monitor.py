"""What RouterMonitorCallback costs a training step: the same steps with and without it, in turns.

python scripts/bench_router_monitor.py --device cuda --hidden_size 1024 --num_layers 16

Two figures. The difference of the median step, with and without in alternating blocks: the whole truth, but blurred by
whatever else the machine does. And the share of a step that the host spends inside the monitor's hooks: exact on the
CPU, where hooks do their work themselves, and on a GPU the time to launch it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM
from hf_moe_cpt.scripts.benchmark_tools import choose_device, machine_facts, synchronize
from hf_moe_cpt.trainers.instruments.router_monitor import RouterMonitorCallback


WARM_UP_STEPS = 3  # of each block, not counted
LIMIT = 0.01  # of a step, what the monitor may cost


@dataclass
class BenchArguments:
    """Size of the model and of the measurement."""

    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the model."})
    num_layers: int = field(default=8, metadata={"help": "All of them MoE layers."})
    num_experts: int = field(default=31, metadata={"help": "Routed experts of a layer."})
    experts_per_token: int = field(default=3, metadata={"help": "K."})
    batch_size: int = field(default=8, metadata={"help": "Sequences of a step."})
    length: int = field(default=256, metadata={"help": "Tokens of a sequence."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between two logs, where the monitor waits."})
    steps: int = field(default=20, metadata={"help": "Steps of a block that count."})
    blocks: int = field(default=4, metadata={"help": "Blocks with the monitor, and as many without."})
    commit: str | None = field(default=None, metadata={"help": "Written into the result in place of git's answer."})


class StepClock(TrainerCallback):
    """Seconds of every step, the device being waited for at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self._begin = device, [], 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start."""
        synchronize(self.device)
        self._begin = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop."""
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - self._begin)


class TimedMonitor(RouterMonitorCallback):
    """The monitor, with the host's time inside its counting."""

    inside = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """As the monitor's; then its counting is timed."""
        super().on_train_begin(*args, **kwargs)
        for name in ("_count_pending", "_chosen", "end_step", "pop"):
            setattr(self.meter, name, self._timed(getattr(self.meter, name)))

    def _timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            result = work(*args)
            self.inside += time.perf_counter() - begin
            return result

        return timed


def measure(args: BenchArguments) -> dict[str, Any]:
    """Median seconds of a step without and with the monitor, their relation, and the share of the host's time."""
    device = choose_device(args.device)
    set_seed(0)
    model = CptMoeForCausalLM(
        CptMoeConfig(
            vocab_size=1024,
            hidden_size=args.hidden_size,
            intermediate_size=2 * args.hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            num_experts=args.num_experts,
            num_experts_per_tok=args.experts_per_token,
            max_position_embeddings=args.length,
        )
    )
    rows = torch.randint(1024, (args.batch_size * (args.steps + WARM_UP_STEPS), args.length))
    data = [{"input_ids": row, "labels": row} for row in rows]
    plain, watched, shares = [], [], []
    for _ in range(args.blocks):
        plain += _block(args, model, data, device, [])
        monitor = TimedMonitor()
        seconds = _block(args, model, data, device, [monitor])
        watched += seconds
        shares.append(monitor.inside / (args.steps + WARM_UP_STEPS) / statistics.median(seconds))
    before, after = statistics.median(plain), statistics.median(watched)
    return {
        "seconds_without": before,
        "seconds_with": after,
        "added": after / before - 1,
        "inside_the_monitor": statistics.median(shares),
        "limit": LIMIT,
    }


def _block(
    args: BenchArguments,
    model: nn.Module,
    data: list[dict[str, torch.Tensor]],
    device: torch.device,
    callbacks: list[TrainerCallback],
) -> list[float]:
    clock = StepClock(device)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=args.steps + WARM_UP_STEPS,
            per_device_train_batch_size=args.batch_size,
            logging_steps=args.logging_steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            bf16=device.type == "cuda",
        )
        trainer = Trainer(model, settings, train_dataset=data, callbacks=[*callbacks, clock])
        trainer.train()
    return clock.seconds[WARM_UP_STEPS:]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print one JSON object."""
    (args,) = parse_arguments(
        (BenchArguments,), argv, program="bench_router_monitor", description="What RouterMonitorCallback costs a step."
    )
    facts = machine_facts(choose_device(args.device), args.commit)
    print(json.dumps({"settings": vars(args), "machine": facts, **measure(args)}, indent=1))


if __name__ == "__main__":
    run_script(main)
