"""What sharing a mixture over GPUs costs: MoE layers alone, and training steps of whole models. Runs unattended.

torchrun --standalone --nproc_per_node 2 scripts/benchmarks/ranks.py                         # 2, 4 or 8 GPUs
torchrun --standalone --nproc_per_node 8 scripts/benchmarks/ranks.py --parts model --model qwen3-30b-a3b
torchrun --standalone --nproc_per_node 2 scripts/benchmarks/ranks.py --device cpu --tiny     # on CPU ranks

layers: a stack of routers and experts, forward and backward, choices fixed in advance so that rounding flips none.
    single    every expert on every rank, no traffic: the limit in time, and the numbers to agree with
    fsdp2     experts sharded, gathered in bfloat16
    ep        experts dealt to all ranks, tokens exchanged by ep_implementation="hf_moe_cpt"
    ep+fsdp2  experts dealt to half of the ranks, each part shared by two; on 4 ranks or more
model: steps of CPTTrainer, AdamW and all, of a model with random weights; ways single (on one rank), ddp, fsdp2, ep,
    ep+fsdp2. Tokens per second are of each GPU.
Bars on 2 ranks: ep at most 108 ms and 40 GiB; on 4 at least 0.80 of single's speed, on 8 0.72. Writes ranks.csv after
each way, so that what was measured stays when a later way fails. Source: ours.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig
from transformers.hf_argparser import HfArg
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_moe_cpt.arguments import ParallelArguments, parallel_options, parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.kernels.expert_parallel import DeduplicatedEP
from hf_moe_cpt.machine import check_names, leave_process_group, machine_facts, release_memory, synchronize
from hf_moe_cpt.planning.plan import config_of
from hf_moe_cpt.reports import write_csv
from hf_moe_cpt.scripts.benchmarks.report import GIBIBYTE, Attempt, BenchmarkArguments, StepClock
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer


WAYS = ("single", "ddp", "fsdp2", "ep", "ep+fsdp2")
QWEN3_30B = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "vocab_size": 151936, "norm_topk_prob": True, "tie_word_embeddings": False,
}  # fmt: skip
TINY = {"layers": 2, "hidden": 32, "width": 16, "experts": 8, "choices": 3, "tokens": 64, "steps": 2, "warmup": 1}
TINY_MODEL = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
    "vocab_size": 256,
}  # fmt: skip


@dataclass
class RanksArguments(BenchmarkArguments):
    """Sizes of the stack and of the model."""

    parts: list[str] = HfArg(default_factory=lambda: ["layers"], help="Of layers, model.")
    ways: list[str] | None = HfArg(default=None, help=f"Of {', '.join(WAYS)}; unset: all that fit the ranks.")
    layers: int = HfArg(default=8, help="Of the stack.")
    hidden: int = HfArg(default=2048, help="Hidden size of the stack.")
    width: int = HfArg(default=768, help="Width of an expert of the stack.")
    experts: int = HfArg(default=128, help="Experts of a layer of the stack; the ranks must divide it.")
    choices: int = HfArg(default=8, help="Experts per token of the stack.")
    tokens: int = HfArg(default=16384, help="Tokens of each rank and step of the stack.")
    skew: float = HfArg(default=0.5, help="Standard deviation of the experts' log popularity.")
    steps: int = HfArg(default=8, help="Steps that are timed.")
    warmup: int = HfArg(default=3, help="Steps before them.")
    model: str = HfArg(default="pb-granular-2b", help="qwen3-30b-a3b, or a name or folder as plan takes it.")
    num_layers: int | None = HfArg(default=None, help="Layers of the model, in place of its own.")
    batch_size: int = HfArg(default=8, help="Sequences of a rank and step of the model.")
    length: int = HfArg(default=2048, help="Tokens of a sequence.")
    gradient_checkpointing: bool = HfArg(default=False, help="Recompute the model's layers.")
    tiny: bool = HfArg(default=False, help="Sizes that CPU ranks manage.")

    def __post_init__(self) -> None:
        """Take the tiny sizes, refuse unknown names."""
        check_names("--parts", self.parts, ("layers", "model"))
        check_names("--ways", self.ways, WAYS)
        for name, value in TINY.items() if self.tiny else ():
            setattr(self, name, value)
        self.batch_size, self.length = (2, 16) if self.tiny else (self.batch_size, self.length)


class Layer(nn.Module):
    """x + experts(norm(x)); choices come from outside."""

    def __init__(self, args: RanksArguments, number: int, way: str, device: torch.device) -> None:
        super().__init__()
        ranks, rank = dist.get_world_size(), dist.get_rank()
        group = {"ep": ranks, "ep+fsdp2": ranks // 2}.get(way, 1)
        mesh = dist.init_device_mesh(device.type, (ranks // group, group, 1), mesh_dim_names=("efsdp", "ep", "tp"))
        config = Qwen3MoeConfig(
            hidden_size=args.hidden, moe_intermediate_size=args.width, num_experts=args.experts // group
        )
        config._experts_implementation = "hf_moe_cpt" if device.type == "cuda" else "grouped_mm"
        self.experts = Qwen3MoeExperts(config).to(device)
        first = rank % group * (args.experts // group)
        with torch.no_grad():
            self.router = nn.Parameter(_weight(args, number, 0, device, args.experts, args.hidden))
            for kind, weight in enumerate((self.experts.gate_up_proj, self.experts.down_proj), 1):
                whole = _weight(args, number, kind, device, args.experts, *weight.shape[1:])
                weight.copy_(whole[first : first + args.experts // group])
        policy = MixedPrecisionPolicy(torch.bfloat16 if device.type == "cuda" else None, torch.float32)
        if group > 1:
            self.experts._is_expert_parallel = True
            exchange = DeduplicatedEP(self.experts, mesh["ep"], mesh["tp"])
            self.experts.forward = exchange.__call__
        if way == "fsdp2":
            fully_shard(self, mesh=mesh["efsdp"], mp_policy=policy)
        elif way == "ep+fsdp2":
            fully_shard(self.experts, mesh=mesh["efsdp"], mp_policy=policy)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """(T, H), (T, K) -> (T, H)."""
        tokens = F.rms_norm(x, x.shape[-1:])
        gates = F.linear(tokens.float(), self.router.float()).softmax(-1).gather(1, index)
        return x + self.experts(tokens, index, gates / gates.sum(-1, keepdim=True)).to(x.dtype)


def _weight(args: RanksArguments, number: int, kind: int, device: torch.device, *shape: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(10 * number + kind)
    return torch.randn(*shape, generator=generator, device=device) / shape[-1] ** 0.5


def batch(args: RanksArguments, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of this rank, choices of every layer (layers, T, K) with popular experts, and weights of the output."""
    generator = torch.Generator(device).manual_seed(7 + dist.get_rank())
    common = torch.Generator(device).manual_seed(3)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, pull = torch.randn(2, args.tokens, args.hidden, generator=generator, device=device).to(dtype)
    popularity = torch.randn(args.layers, 1, args.experts, generator=common, device=device) * args.skew
    choices = []
    for layer in popularity:  # the noise of one layer at a time
        noise = torch.rand(args.tokens, args.experts, generator=generator, device=device)
        choices.append((layer - noise.clamp_min(1e-9).log().neg().log()).topk(args.choices, -1).indices)
    return x, torch.stack(choices), pull


def measure_layers(args: RanksArguments, way: str, device: torch.device, truth: dict[str, Tensor]) -> dict[str, Any]:
    """Median milliseconds of forward and backward of the slowest rank, peak of the fullest, errors beside `single`."""
    stack = nn.ModuleList(Layer(args, number, way, device) for number in range(args.layers))
    x, choices, pull = batch(args, device)
    seconds: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(args.warmup + args.steps):
        stack.zero_grad(set_to_none=True)
        given = x.clone().requires_grad_()
        synchronize(device)
        dist.barrier()
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            y = given
            for layer, index in zip(stack, choices, strict=True):
                y = layer(y, index)
        ((y * pull).float().sum() / args.tokens).backward()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / GIBIBYTE if device.type == "cuda" else 0.0
    found = {"y": y.detach(), "dx": given.grad, "dw": _expert_gradient(stack[0], way)}
    if way == "single":
        truth.update(found)
    errors = [_error(found[name], truth.get(name)) for name in ("y", "dx", "dw")]
    worst = torch.tensor([statistics.median(seconds[args.warmup :]), peak, *errors], device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    step, peak, *errors = worst.tolist()
    return {"ms": 1e3 * step, "tokens_per_second": args.tokens / step, "peak_gib": peak or None} | dict(
        zip(("error_y", "error_dx", "error_dw"), errors, strict=True)
    )


def _expert_gradient(layer: Layer, way: str) -> Tensor:
    """The whole gradient (E, 2I, H) of the first layer's experts, as the sum over ranks' batches."""
    grad, ranks = layer.experts.gate_up_proj.grad, dist.get_world_size()
    if way == "single":
        dist.all_reduce(grad)
        return grad
    if isinstance(grad, DTensor):
        shared = grad.device_mesh.size()  # whose mean FSDP2 has taken
        grad = shared * grad.full_tensor()
    parts = [torch.empty_like(grad) for _ in range(ranks)]
    dist.all_gather(parts, grad.contiguous())
    return torch.cat(parts[: {"ep": ranks, "ep+fsdp2": ranks // 2}.get(way, 1)])


def _error(found: Tensor, want: Tensor | None) -> float:
    if want is None:
        return float("nan")
    return float((found.float() - want.float()).norm() / want.float().norm())


def model_config(args: RanksArguments) -> PreTrainedConfig:
    """Of the model that is asked for, with its number of layers."""
    if args.tiny or args.model == "qwen3-30b-a3b":
        config = Qwen3MoeConfig(**(TINY_MODEL if args.tiny else QWEN3_30B))
    else:
        config = config_of(args.model)
    config.num_hidden_layers = args.num_layers or config.num_hidden_layers
    return config


def build_model(config: PreTrainedConfig, parallel: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """Random weights, of each rank only what it holds."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    kind = type(model)
    distributed, _, meshes = kind.prepare_distribute_model(parallel.get("distributed_config"))
    model = kind.maybe_distribute_model(model, distributed, meshes).to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        model.initialize_weights()
    return model


def measure_model(args: RanksArguments, way: str, device: torch.device, _: dict[str, Tensor]) -> dict[str, Any]:
    """Median milliseconds of a whole training step, peak of the fullest rank, model FLOP/s of a GPU."""
    ranks = dist.get_world_size()
    rows = torch.randint(
        3, 200, (args.batch_size * ranks * 2, args.length), generator=torch.Generator().manual_seed(1)
    )
    data, clock = Dataset.from_dict({"input_ids": rows.tolist()}), StepClock(device, args.warmup)
    with tempfile.TemporaryDirectory() as folder:
        training = CPTConfig(
            output_dir=folder, max_steps=args.warmup + args.steps, per_device_train_batch_size=args.batch_size,
            max_length=args.length, bf16=device.type == "cuda", use_cpu=device.type == "cpu", save_strategy="no",
            report_to="none", disable_tqdm=True, logging_steps=args.warmup + args.steps, hang_timeout=0,
            gradient_checkpointing=args.gradient_checkpointing,
        )  # fmt: skip
        asked = {"ep": {"ep_size": ranks}, "ep+fsdp2": {"ep_size": ranks // 2}, "fsdp2": {"dp_replicate_size": 1}}
        parallel = parallel_options(ParallelArguments(**asked[way]), training) if way in asked else {}
        trainer = CPTTrainer(build_model(model_config(args), parallel, device), training, data)
        trainer.add_callback(clock)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    peak = torch.cuda.max_memory_allocated() / GIBIBYTE if device.type == "cuda" else 0.0
    worst = torch.tensor([statistics.median(clock.seconds), peak], device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    step, peak = worst.tolist()
    logged = next((entry for entry in reversed(trainer.state.log_history) if "model_tflops" in entry), {})
    rate = args.batch_size * args.length / step
    told = {"loss": logged.get("loss"), "model_tflops_last_log": logged.get("model_tflops")}
    return {"ms": 1e3 * step, "tokens_per_second": rate, "peak_gib": peak or None} | told


def ways_of(args: RanksArguments, part: str) -> list[str]:
    """What the ranks that are there can do."""
    ranks = dist.get_world_size()
    left_out = {"ddp"} if part == "layers" else {"single"} if ranks > 1 else set()
    left_out |= {"ep+fsdp2"} if ranks < 4 else set()
    left_out |= {"ddp", "fsdp2", "ep"} if ranks == 1 else set()
    return [way for way in args.ways or WAYS if way not in left_out]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure way after way, write ranks.csv from the first rank, print each row."""
    (args,) = parse_arguments((RanksArguments,), argv, program="ranks.py", description=__doc__)
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", dist.get_node_local_rank()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=300))
    facts, rows = machine_facts(device, args.commit) | {"ranks": dist.get_world_size()}, []
    measures: dict[str, Callable[..., dict[str, Any]]] = {"layers": measure_layers, "model": measure_model}
    for part in args.parts:
        truth: dict[str, Tensor] = {}
        for way in ways_of(args, part):
            found: dict[str, Any] = {}
            with Attempt() as attempt:
                found = measures[part](args, way, device, truth)
            release_memory(device)
            sizes = f"{args.layers} x {args.tokens}" if part == "layers" else f"{args.batch_size} x {args.length}"
            name = "tiny" if args.tiny else args.model
            of = {"part": part, "what": sizes if part == "layers" else f"{name}, {sizes}", "way": way}
            rows.append(of | found | {"note": attempt.reason or ""} | facts)
            if dist.get_rank() == 0:
                write_csv(Path(args.output_dir) / "ranks.csv", rows)
                print({name: value for name, value in rows[-1].items() if name not in facts}, flush=True)
    leave_process_group()


if __name__ == "__main__":
    run_script(main)
