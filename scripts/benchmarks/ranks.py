"""What sharing a mixture over GPUs costs: MoE layers alone, and training steps of whole models. Runs unattended.

torchrun --standalone --nproc_per_node 2 scripts/benchmarks/ranks.py                         # 2, 4 or 8 GPUs
torchrun --standalone --nproc_per_node 8 scripts/benchmarks/ranks.py --parts model --model qwen3-30b-a3b
torchrun --standalone --nproc_per_node 2 scripts/benchmarks/ranks.py --device cpu --tiny     # on CPU ranks

layers: a stack of routers and experts, forward and backward, choices fixed in advance so that rounding flips none.
    single    every expert on every rank, no traffic: the limit in time, and the numbers to agree with
    fsdp2     experts sharded, gathered in bfloat16
    ep        experts dealt to all ranks, tokens exchanged by ep_implementation="hf_moe_cpt"
    ep-all-to-all  the same with transformers' own exchange, which sends a token once for each expert
    ep+fsdp2  experts dealt to half of the ranks, each part shared by two; on 4 ranks or more
model: steps of CPTTrainer, AdamW and all, of a model with random weights, with the weights, checkpointing and
    optimizer that the commands choose for the GPU; ways single (on one rank), ddp, fsdp2, ep, ep-all-to-all, ep+fsdp2.
Tokens and operations per second are of each GPU; operations are those of the model, without what is computed again.
Bars on 2 ranks: ep at most 108 ms and 40 GiB; on 4 at least 0.80 of single's speed, on 8 0.72. Ways are measured in
turn, in so many rounds. Writes ranks.csv after each, so that what was measured stays when a later way fails, and with
--profile a table of the operators of a step of each way. Source: ours.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig, TrainerCallback
from transformers.hf_argparser import HfArg
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_moe_cpt.arguments import ParallelArguments, parallel_options, parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.kernels.expert_parallel import DeduplicatedEP
from hf_moe_cpt.machine import check_names, leave_process_group, machine_facts, release_memory, synchronize
from hf_moe_cpt.planning.memory import TrainingSetup, measure_size
from hf_moe_cpt.planning.plan import Fit, choose_fit, config_of, flops_per_token, gpu_gib
from hf_moe_cpt.reports import write_csv
from hf_moe_cpt.scripts.benchmarks.report import GIBIBYTE, Attempt, BenchmarkArguments, StepClock
from hf_moe_cpt.trainers.common.distributed import keep_own_gradients
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer


WAYS = ("single", "ddp", "fsdp2", "ep", "ep-all-to-all", "ep+fsdp2")
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
SHAPES = {"qwen3-30b-a3b": QWEN3_30B, "tiny": TINY_MODEL}


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
    rounds: int = HfArg(default=1, help="How often each way is built anew and measured, in turn with the others.")
    steps: int = HfArg(default=8, help="Steps that are timed.")
    warmup: int = HfArg(default=3, help="Steps before them.")
    model: str = HfArg(default="pb-granular-2b", help="qwen3-30b-a3b, or a preset of hf-moe-cpt plan.")
    num_layers: int | None = HfArg(default=None, help="Layers of the model, in place of its own.")
    batch_size: int = HfArg(default=8, help="Sequences of a rank and step of the model.")
    length: int = HfArg(default=2048, help="Tokens of a sequence.")
    dtype: str | None = HfArg(default=None, help="Of the weights, float32 or bfloat16; unset: what fits the GPU.")
    gradient_checkpointing: bool | None = HfArg(default=None, help="Recompute layers; unset: where it must be.")
    profile: bool = HfArg(default=False, help="Profile one step more of each way, of the first round.")
    tiny: bool = HfArg(default=False, help="Sizes that CPU ranks manage.")

    def __post_init__(self) -> None:
        """Take the tiny sizes, refuse unknown names."""
        check_names("--parts", self.parts, ("layers", "model"))
        check_names("--ways", self.ways, WAYS)
        for name, value in TINY.items() if self.tiny else ():
            setattr(self, name, value)
        if self.tiny:
            self.model, self.batch_size, self.length = "tiny", 2, 16


class Layer(nn.Module):
    """x + experts(norm(x)); choices come from outside."""

    def __init__(self, args: RanksArguments, number: int, way: str, device: torch.device) -> None:
        super().__init__()
        ranks, rank = dist.get_world_size(), dist.get_rank()
        group = ep_size(way)
        mesh = _mesh(device.type, group)
        config = Qwen3MoeConfig(
            hidden_size=args.hidden, moe_intermediate_size=args.width, num_experts=args.experts // group
        )
        config._experts_implementation = "hf_moe_cpt" if device.type == "cuda" else "grouped_mm"
        with device:
            self.experts = Qwen3MoeExperts(config)
        first = rank % group * (args.experts // group)
        with torch.no_grad():
            self.router = nn.Parameter(_weight(args, number, 0, device, args.experts, args.hidden))
            for kind, weight in enumerate((self.experts.gate_up_proj, self.experts.down_proj), 1):
                whole = _weight(args, number, kind, device, args.experts, *weight.shape[1:])
                weight.copy_(whole[first : first + args.experts // group])
        policy = MixedPrecisionPolicy(torch.bfloat16 if device.type == "cuda" else None, torch.float32)
        if group > 1:
            self.experts._is_expert_parallel = True
            kind = DeduplicatedEP
            if way == "ep-all-to-all":
                from transformers.distributed.expert_parallel import AllToAllEP as kind  # not in older ones
            exchange = kind(self.experts, mesh["ep"], mesh["tp"])
            exchange.most_tokens = args.tokens  # as a trainer tells it
            self.experts.forward = exchange.__call__
            fully_shard(self.experts, mesh=mesh["efsdp"], mp_policy=policy)  # also of one rank, as transformers does
            self.experts.set_gradient_divide_factor(float(ranks))
            if ranks > group:
                self.experts.set_force_sum_reduction_for_comms(True)
            keep_own_gradients(self)
        elif way == "fsdp2":
            fully_shard(self, mesh=mesh["efsdp"], mp_policy=policy)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """(T, H), (T, K) -> (T, H)."""
        tokens = F.rms_norm(x, x.shape[-1:])
        gates = F.linear(tokens.float(), self.router.float()).softmax(-1).gather(1, index)
        return x + self.experts(tokens, index, gates / gates.sum(-1, keepdim=True)).to(x.dtype)


@cache
def _mesh(kind: str, group: int) -> dist.DeviceMesh:
    """One for all layers and rounds: each has groups of its own, whose end NCCL takes its time for."""
    sizes = dist.get_world_size() // group, group, 1
    return dist.init_device_mesh(kind, sizes, mesh_dim_names=("efsdp", "ep", "tp"))


def ep_size(way: str) -> int:
    """Ranks that experts are dealt to."""
    ranks = dist.get_world_size()
    return {"ep": ranks, "ep-all-to-all": ranks, "ep+fsdp2": ranks // 2}.get(way, 1)


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


@contextmanager
def profiled(args: RanksArguments, name: str, device: torch.device) -> Iterator[None]:
    """Write what the device, or the CPU, did meanwhile, by operator, on the first rank."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profile:
        yield
        synchronize(device)
    if dist.get_rank() == 0:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        table = profile.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=60)
        (Path(args.output_dir) / f"profile_{name.replace('+', '_')}.txt").write_text(table, encoding="utf-8")


def measure_layers(args: RanksArguments, way: str, device: torch.device, truth: dict[str, Tensor]) -> dict[str, Any]:
    """Median milliseconds of forward and backward of the slowest rank, peak of the fullest, errors beside `single`."""
    stack = nn.ModuleList(Layer(args, number, way, device) for number in range(args.layers))
    x, choices, pull = batch(args, device)
    seconds: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step() -> tuple[Tensor, Tensor | None]:
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
        return y.detach(), given.grad

    for _ in range(args.warmup + args.steps):
        y, dx = step()
    peak = torch.cuda.max_memory_allocated() / GIBIBYTE if device.type == "cuda" else 0.0
    found = {"y": y, "dx": dx, "dw": _expert_gradient(stack[0], way)}
    if way == "single" and not truth:
        truth.update(found)
    errors = [_error(found[name], truth.get(name)) for name in ("y", "dx", "dw")]
    worst = torch.tensor([statistics.median(seconds[args.warmup :]), peak, *errors], device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if args.profile:
        with profiled(args, f"layers_{way}", device):
            step()
    taken, peak, *errors = worst.tolist()
    return {"ms": 1e3 * taken, "tokens_per_second": args.tokens / taken, "peak_gib": peak or None} | dict(
        zip(("error_y", "error_dx", "error_dw"), errors, strict=True)
    )


def _expert_gradient(layer: Layer, way: str) -> Tensor:
    """The whole gradient (E, 2I, H) of the first layer's experts, as the sum over ranks' batches."""
    grad, ranks = layer.experts.gate_up_proj.grad, dist.get_world_size()
    if way == "single":
        dist.all_reduce(grad)
        return grad
    grad = ranks * grad.full_tensor()  # FSDP2 has taken the mean
    parts = [torch.empty_like(grad) for _ in range(ranks)]
    dist.all_gather(parts, grad.contiguous())
    return torch.cat(parts[: ep_size(way)])


def _error(found: Tensor, want: Tensor | None) -> float:
    if want is None:
        return float("nan")
    return float((found.float() - want.float()).norm() / want.float().norm())


def shape_of(model: str, num_layers: int | None) -> PreTrainedConfig:
    """The configuration of a model of these benchmarks, or of `hf-moe-cpt plan`, with so many layers."""
    config = Qwen3MoeConfig(**SHAPES[model]) if model in SHAPES else config_of(model)
    config.num_hidden_layers = num_layers or config.num_hidden_layers
    return config


def build_model(
    config: PreTrainedConfig, dtype: str, parallel: dict[str, Any], device: torch.device
) -> PreTrainedModel:
    """Random weights, of each rank only what it holds."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    kind = type(model)
    distributed, _, meshes = kind.prepare_distribute_model(parallel.get("distributed_config"))
    model = kind.maybe_distribute_model(model, distributed, meshes).to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        model.initialize_weights()
    return model


class ProfileStep(TrainerCallback):
    """Profiles one step of a `Trainer`, the last."""

    def __init__(self, args: RanksArguments, way: str, device: torch.device) -> None:
        self.args, self.way, self.device = args, way, device
        self._at_work = ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, in the last step."""
        if state.global_step == state.max_steps - 1:
            self._at_work.enter_context(profiled(self.args, f"model_{self.way}", self.device))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the table."""
        self._at_work.close()


def measure_model(args: RanksArguments, way: str, device: torch.device, _: dict[str, Tensor]) -> dict[str, Any]:
    """Median milliseconds of a whole training step, peak of the fullest rank, model FLOP/s of a GPU."""
    ranks, config = dist.get_world_size(), shape_of(args.model, args.num_layers)
    shape = args.batch_size * ranks * 2, args.length
    rows = torch.randint(3, config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    data, clock = Dataset.from_dict({"input_ids": rows.tolist()}), StepClock(device, args.warmup)
    how = chosen(args, config, way, device)
    steps = args.warmup + args.steps
    with tempfile.TemporaryDirectory() as folder:
        training = CPTConfig(
            output_dir=folder, max_steps=steps + args.profile, per_device_train_batch_size=args.batch_size,
            max_length=args.length, bf16=device.type == "cuda" and how.dtype == "float32",
            use_cpu=device.type == "cpu", save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1,
            hang_timeout=0, optim=how.optim, gradient_checkpointing=how.checkpointing,
        )  # fmt: skip
        asked = {"fsdp2": {"dp_replicate_size": 1}}.get(way, {"ep_size": ep_size(way)} if ep_size(way) > 1 else None)
        parallel = parallel_options(ParallelArguments(**asked), training) if asked else {}
        if way == "ep-all-to-all":
            parallel["distributed_config"].ep_implementation = "all_to_all"
        began = time.perf_counter()
        model = build_model(config, how.dtype, parallel, device)
        synchronize(device)
        built = time.perf_counter() - began
        trainer = CPTTrainer(model, training, data, callbacks=[clock])
        if args.profile:
            trainer.add_callback(ProfileStep(args, way, device))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    peak = torch.cuda.max_memory_allocated() / GIBIBYTE if device.type == "cuda" else 0.0
    worst = torch.tensor([statistics.median(clock.seconds[: args.steps]), peak], device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    step, peak = worst.tolist()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    rate = args.batch_size * args.length / step
    per_token = flops_per_token(measure_size(config, args.model), args.length)
    told = {"model_tflops": rate * per_token / 1e12, "first_loss": losses[0], "loss": losses[steps - 1]}
    told |= {"model": args.model, "num_layers": config.num_hidden_layers, "batch_size": args.batch_size}
    told |= {
        "length": args.length,
        "weights": how.dtype,
        "optim": training.optim,
        "checkpointing": how.checkpointing,
        "build_s": built,
    }
    return {"ms": 1e3 * step, "tokens_per_second": rate, "peak_gib": peak or None} | told


def chosen(args: RanksArguments, config: PreTrainedConfig, way: str, device: torch.device) -> Fit:
    """Weights, optimizer and checkpointing as the commands choose them for the memory of this GPU."""
    is_asked = args.dtype is not None and args.gradient_checkpointing is not None
    if device.type != "cuda" or is_asked:
        return Fit(args.dtype or "float32", bool(args.gradient_checkpointing), "", "auto")
    engine = "ep" if ep_size(way) > 1 else way
    setup = TrainingSetup(
        engine=engine, gpus=dist.get_world_size(), gpus_per_node=torch.cuda.device_count(), kernels="fused",
        batch_size=args.batch_size, sequence_length=args.length,
    )  # fmt: skip
    fit = choose_fit(
        config, setup, args.model, gpu_gib(device), dtype=args.dtype, checkpointing=args.gradient_checkpointing
    )
    if dist.get_rank() == 0:
        print(fit.told, flush=True)
    return fit


def what(args: RanksArguments, part: str) -> str:
    """The sizes of a part, in words."""
    if part == "layers":
        return f"{args.layers} x {args.tokens}"
    return f"{args.model}, {args.num_layers or 'all'} layers, {args.batch_size} x {args.length}"


def ways_of(args: RanksArguments, part: str) -> list[str]:
    """What the ranks that are there can do."""
    ranks = dist.get_world_size()
    left_out = {"ddp"} if part == "layers" else {"single"} if ranks > 1 else set()
    left_out |= {"ep+fsdp2"} if ranks < 4 else set()
    left_out |= set(WAYS) - {"single"} if ranks == 1 else set()
    return [way for way in args.ways or WAYS if way not in left_out]


def run(args: RanksArguments, device: torch.device) -> list[dict[str, Any]]:
    """Measure way after way in the group that there is; the first process writes ranks.csv and prints each row."""
    facts, rows = machine_facts(device, args.commit) | {"ranks": dist.get_world_size()}, []
    measures: dict[str, Callable[..., dict[str, Any]]] = {"layers": measure_layers, "model": measure_model}
    for part in args.parts:
        truth: dict[str, Tensor] = {}
        for number, way in itertools.product(range(args.rounds), ways_of(args, part)):
            found: dict[str, Any] = {}
            with Attempt() as attempt:
                found = measures[part](replace(args, profile=args.profile and not number), way, device, truth)
            release_memory(device)
            of = {"part": part, "what": what(args, part), "way": way, "round": number}
            rows.append(of | found | {"note": attempt.reason or ""} | facts)
            if dist.get_rank() == 0:
                write_csv(Path(args.output_dir) / "ranks.csv", rows)
                print({name: value for name, value in rows[-1].items() if name not in facts}, flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Join the processes that torchrun started, measure, leave."""
    (args,) = parse_arguments((RanksArguments,), argv, program="ranks.py", description=__doc__)
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", dist.get_node_local_rank()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=300))
    run(args, device)
    leave_process_group()


if __name__ == "__main__":
    run_script(main)
