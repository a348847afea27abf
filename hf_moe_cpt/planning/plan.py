"""How long training takes, which engine a plan takes and what would make a run fit; the answer as text or JSON. The
models that plans and benchmarks call by name: our presets, and transformers' at the same sizes.

Operations of a token, forward: 2 for each active parameter, and 2 x width x S in the causal attention of each layer;
a backward pass costs two forwards, recomputing one more, a reference model one more. A measured step (speeds.csv, from
docs/benchmarks) gives operations per second, which are taken to hold for the model asked about. What travels is
divided by a nominal bandwidth: the shorter time has all of it hidden behind the products, the longer one none. Nothing
here was measured on several GPUs. Sizes in GiB, times in seconds and days.

`choose_fit` decides from the configuration, before any weight is read, how a run fits the GPU at hand. Of the ways to
hold a model the first that the estimate of `memory` lets through is taken, what was asked for fixed:

    float32 weights under bfloat16 autocast; the same with checkpointing
    bfloat16 weights and moments, rounded at random (`optim.adamw`); the same with moments of 8 bits; both again with
    checkpointing

A run that not even the last lets through is refused, with the options that make it fit.

Letters: S sequence length, N GPUs, P parameters. Source: ours.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils import parse_flag_from_env
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig, Qwen2MoeConfig, TrainingArguments

from hf_moe_cpt.modeling.configuration_cpt_moe import PRESETS, CptMoeConfig
from hf_moe_cpt.planning.memory import (
    COMPUTED,
    PRECISIONS,
    KeptBytes,
    ModelSize,
    TrainingMemory,
    TrainingSetup,
    measure_kept,
    measure_size,
    training_memory,
)
from hf_moe_cpt.reading import read_config as config_at
from hf_moe_cpt.reports import aligned


SECONDS_OF_DAY = 86_400
# Speed of a GPU over that of the measured steps. h100: the same preference steps on both devices, median.
SPEED_OF_GPU = {"h200": 1.0, "h100": 0.8975}


@dataclass(frozen=True)
class MeasuredStep:
    """A committed benchmark of a training step on one GPU, with bfloat16 weights: a line of speeds.csv."""

    model: str
    kernels: str
    is_mixture: bool
    sequence_length: int
    tokens_per_second: float
    flops_per_token: float
    device: str
    date: str
    commit: str

    @property
    def flops_per_second(self) -> float:
        """Operations of the model, not of the hardware: nothing that is computed twice counts twice."""
        return self.tokens_per_second * self.flops_per_token


@dataclass(frozen=True)
class TrainingTime:
    """Seconds of an optimizer step: of one GPU's products, and of what it sends, if nothing hides that."""

    compute_seconds: float
    transfer_seconds: float
    tokens_per_step: int  # of all GPUs; both answers of a pair and all terms of a surgery count
    basis: MeasuredStep
    is_same_model: bool  # whether the basis was measured on this very model

    @property
    def step_seconds(self) -> tuple[float, float]:
        """Least and most: transfers hidden, and not hidden at all."""
        return self.compute_seconds, self.compute_seconds + self.transfer_seconds

    def days(self, tokens: float) -> tuple[float, float]:
        """Least and most for so many tokens."""
        steps = -(-tokens // self.tokens_per_step)
        least, most = self.step_seconds
        return steps * least / SECONDS_OF_DAY, steps * most / SECONDS_OF_DAY


@functools.cache
def measured_steps() -> tuple[MeasuredStep, ...]:
    """Those of speeds.csv, which travels with the package; scripts/benchmarks/jobs.py writes it."""
    text = resources.files(__package__).joinpath("speeds.csv").read_text(encoding="utf-8")
    read = {"is_mixture": lambda value: value == "True", "sequence_length": int}
    read |= {"tokens_per_second": float, "flops_per_token": float}
    rows = csv.DictReader(text.splitlines())
    return tuple(MeasuredStep(**{name: read.get(name, str)(value) for name, value in row.items()}) for row in rows)


def flops_per_token(size: ModelSize, sequence_length: int, forwards: float = 3.0) -> float:
    """Operations of a token of a training step; forwards: 3, 4 with recomputing, one more with a reference."""
    attention = 2 * len(size.layers) * size.attention_width * sequence_length
    return forwards * (2 * size.active + attention)


def forwards_of(setup: TrainingSetup) -> float:
    """Costs of a step in forward passes of its tokens. A cached reference runs once, before training."""
    return 3.0 + (1.0 if setup.checkpointing else 0.0) + (1.0 if setup.reference == "copy" else 0.0)


def nearest_step(size: ModelSize, kernels: str, steps: Sequence[MeasuredStep]) -> MeasuredStep:
    """The measured step to go by: the same model if there is, else a mixture for a mixture, of the nearest size in
    operations of a token; kernels count most.

    Of several that are equally near the slowest is taken. Raises ValueError without any.
    """
    if not steps:
        raise ValueError("No measured steps to go by: give those of hf_moe_cpt/planning/speeds.csv.")

    def distance(step: MeasuredStep) -> tuple[bool, bool, float, float]:
        is_mixture = size.num_experts > 0
        ratio = flops_per_token(size, step.sequence_length) / step.flops_per_token
        is_other = step.model != size.name, step.is_mixture != is_mixture
        return *is_other, round(abs(math.log2(ratio)), 1), step.flops_per_second

    same_kernels = [step for step in steps if step.kernels == kernels] or list(steps)
    return min(same_kernels, key=distance)


def training_time(
    size: ModelSize,
    setup: TrainingSetup,
    steps: Sequence[MeasuredStep],
    device_factor: float = 1.0,
    bandwidth: float = 450e9,
    network_bandwidth: float = 50e9,
) -> TrainingTime:
    """Estimate an optimizer step.

    device_factor: speed of the GPU over that of the measured ones. bandwidth, network_bandwidth: bytes per second and
    GPU that arrive from GPUs of its node and of other nodes.
    """
    basis = nearest_step(size, setup.kernels, steps)
    tokens_of_gpu = setup.sequences * setup.sequence_length * setup.passes
    work = tokens_of_gpu * flops_per_token(size, setup.sequence_length, forwards_of(setup))
    rate = bandwidth if setup.gpus <= setup.gpus_per_node else network_bandwidth
    inside, across = bytes_sent(size, setup)
    return TrainingTime(
        compute_seconds=work / (basis.flops_per_second * device_factor),
        transfer_seconds=inside / bandwidth + across / rate,
        tokens_per_step=tokens_of_gpu * setup.gpus,
        basis=basis,
        is_same_model=basis.model == size.name,
    )


def bytes_sent(size: ModelSize, setup: TrainingSetup) -> tuple[float, float]:
    """Bytes that one GPU sends in an optimizer step: inside its node whatever the number of nodes, and to all GPUs.

    A ring over N sends (N - 1) / N of what it reduces or gathers, and twice that to leave a sum everywhere. ddp: the
    gradients' sum. fsdp2, zero3: weights gathered forward and backward and gradients scattered in every pass. hsdp:
    the same inside a node, and the sum of a shard's gradients across. ep: fsdp2 for all but the experts, and inside a
    node each chosen token to its experts and back, forward and backward.
    """
    if setup.gpus == 1:
        return 0.0, 0.0
    share = (setup.gpus - 1) / setup.gpus
    if setup.engine in ("single", "ddp"):
        return 0.0, 2 * share * size.total * PRECISIONS[setup.precision]
    of_pass = 3 * COMPUTED * setup.passes
    ranks = setup.ranks_of_node
    share_of_node, nodes = (ranks - 1) / ranks, setup.gpus / ranks
    if setup.engine == "hsdp":
        return share_of_node * of_pass * size.total, 2 * (1 - 1 / nodes) * COMPUTED * size.total / ranks
    if setup.engine == "ep":
        tokens = setup.sequences * setup.sequence_length * setup.passes * len(size.layers)
        exchanged = 4 * COMPUTED * tokens * size.experts_per_token * size.hidden_size
        across = 2 * (1 - 1 / nodes) * COMPUTED * size.experts / ranks
        return share_of_node * exchanged, share * of_pass * (size.total - size.experts) + across
    return 0.0, share * of_pass * size.total


GIBIBYTE = 2**30
RESERVED = 0.06  # of a GPU: the driver, communication buffers, memory in pieces
LARGEST_BATCH = 4096


@dataclass(frozen=True)
class Plan:
    """An answer. memory_of: of each engine that can train this model, simplest first; setup: with the engine taken."""

    size: ModelSize
    setup: TrainingSetup
    gpu: str
    gpu_gib: float
    memory_of: dict[str, TrainingMemory]
    time: TrainingTime
    largest_batch: int  # with this engine; 0 if not even one sequence fits
    remedies: tuple[str, ...]  # options that make it fit, if it does not

    @property
    def memory(self) -> TrainingMemory:
        """Of the engine taken."""
        return self.memory_of[self.setup.engine]

    @property
    def usable(self) -> float:
        """Bytes of a GPU that a run may fill."""
        return usable_bytes(self.gpu_gib)

    @property
    def fits(self) -> bool:
        """Whether the estimate stays within `usable`."""
        return self.memory.total <= self.usable


def usable_bytes(gpu_gib: float) -> float:
    """What is left of a GPU of so many GiB."""
    return gpu_gib * GIBIBYTE * (1 - RESERVED)


def engines_for(size: ModelSize, setup: TrainingSetup) -> list[str]:
    """Engines that can train this model on these GPUs, the simplest first; DeepSpeed cannot run a surgery's terms."""
    if setup.gpus == 1:
        return ["single"]
    is_one_node = setup.gpus <= setup.gpus_per_node
    sharded = ["fsdp2"] if is_one_node else ["hsdp", "fsdp2"]
    expert_parallel = ["ep"] if size.num_experts >= setup.ranks_of_node else []
    deepspeed = [] if setup.trainer == "surgery" else ["zero3"]
    return ["ddp", *sharded, *deepspeed, *expert_parallel]


def make_plan(
    size: ModelSize,
    kept: KeptBytes,
    setup: TrainingSetup,
    *,
    engine: str | None,
    gpu_gib: float,
    gpu: str,
    bandwidths: tuple[float, float],
) -> Plan:
    """Choose the engine if none is given, and compute its memory and time.

    The first of `engines_for` that fits is taken, ZeRO-3 only if it is named; else the one that needs least. Raises
    ValueError for an engine that cannot train this model on these GPUs.
    """
    possible = engines_for(size, setup)
    if engine is not None and engine not in possible:
        raise ValueError(
            f"--engine {engine} cannot run {setup.trainer} of {size.name} on {setup.gpus} GPU(s), "
            f"{setup.gpus_per_node} a node: choose from {', '.join(possible)}."
        )
    memory_of = {name: training_memory(size, kept, replace(setup, engine=name)) for name in possible}
    usable = usable_bytes(gpu_gib)
    recommended = [name for name in possible if name != "zero3"]
    fitting = [name for name in recommended if memory_of[name].total <= usable]
    taken = engine or (fitting or sorted(recommended, key=lambda name: memory_of[name].total))[0]
    setup = replace(setup, engine=taken)
    return Plan(
        size=size,
        setup=setup,
        gpu=gpu,
        gpu_gib=gpu_gib,
        memory_of=memory_of,
        time=training_time(size, setup, measured_steps(), SPEED_OF_GPU[gpu], *bandwidths),
        largest_batch=largest_batch(size, kept, setup, usable),
        remedies=() if memory_of[taken].total <= usable else remedies(size, kept, setup, usable),
    )


def largest_batch(size: ModelSize, kept: KeptBytes, setup: TrainingSetup, usable: float) -> int:
    """Most sequences (pairs, rows) of a pass on one GPU that fit; memory grows with them, so halving finds it."""
    least, most = 0, LARGEST_BATCH
    while least < most:
        middle = (least + most + 1) // 2
        if training_memory(size, kept, replace(setup, batch_size=middle)).total <= usable:
            least = middle
        else:
            most = middle - 1
    return least


def remedies(size: ModelSize, kept: KeptBytes, setup: TrainingSetup, usable: float) -> tuple[str, ...]:
    """Options to change, each of which alone or as written makes the run fit."""
    found = []
    batch = largest_batch(size, kept, setup, usable)
    if batch:
        found.append(f"--batch_size {batch}")
    if not setup.checkpointing:
        recomputing = replace(setup, checkpointing=True)
        batch = largest_batch(size, kept, recomputing, usable)
        if batch:
            smaller = "" if batch >= setup.batch_size else f" --batch_size {batch}"
            found.append(f"--gradient_checkpointing{smaller}")
    for gpus in (setup.gpus * factor for factor in (2, 4, 8, 16, 32, 64)):
        wider = replace(setup, gpus=gpus, engine="fsdp2")
        if training_memory(size, kept, wider).total <= usable:
            found.append(f"--gpus {gpus} --engine fsdp2")
            break
    return tuple(found)


# Names of accelerate configurations in scripts/accelerate, by engine.
CONFIG_OF_ENGINE = {"single": "one_gpu", "fsdp2": "fsdp2_8gpu", "hsdp": "hsdp_2x8", "zero3": "zero3", "ep": "ep"}
NOTE = (
    "An estimate, no measurement: memory came within 3 % of the peaks it was compared with on one GPU and within 5 % "
    "on two, more were not measured; see docs/scaling.md."
)


def as_text(plan: Plan, tokens: float | None, price_per_gpu_hour: float | None) -> str:
    """Tables and sentences."""
    size, setup = plan.size, plan.setup
    verdict = "fits" if plan.fits else "does not fit"
    lines = [
        f"{size.name}: {size.total:,} parameters, {size.active:,} active for a token, {size.experts:,} in routed "
        "experts",
        f"{setup.trainer} on {setup.gpus} GPU(s) of {plan.gpu_gib:g} GiB, batch {setup.batch_size} x "
        f"{setup.sequence_length} a GPU and pass, {setup.accumulation} accumulated, {setup.precision}, "
        f"{setup.optimizer}, {setup.kernels} kernels{', checkpointing' if setup.checkpointing else ''}",
        "",
        f"{verdict} with {setup.engine}: {_gib(plan.memory.total)} of {_gib(plan.usable)} GiB usable "
        f"({RESERVED:.0%} of a GPU left to driver, communication and fragments)",
        f"largest batch that fits with {setup.engine}: {plan.largest_batch}",
    ]
    if plan.remedies:
        lines.append(f"it would fit with any of: {'; '.join(plan.remedies)}")
    elif not plan.fits:
        lines.append("no change of batch, checkpointing or number of GPUs that was tried makes it fit")
    lines += ["", "GiB on the fullest GPU", *_memory_table(plan), "", *_time_lines(plan, tokens, price_per_gpu_hour)]
    return "\n".join([*lines, "", NOTE])


def as_json(plan: Plan, tokens: float | None, price_per_gpu_hour: float | None) -> str:
    """All numbers; memory in bytes."""
    least, most = plan.time.step_seconds
    values: dict[str, Any] = {
        "estimate": NOTE,
        "model": asdict(plan.size) | {"layers": len(plan.size.layers)},
        "setup": asdict(plan.setup),
        "fits": plan.fits,
        "usable_bytes": int(plan.usable),
        "memory_bytes": {name: asdict(memory) | {"total": memory.total} for name, memory in plan.memory_of.items()},
        "largest_batch": plan.largest_batch,
        "remedies": list(plan.remedies),
        "step_seconds": [least, most],
        "tokens_per_step": plan.time.tokens_per_step,
        "tokens_per_second": [plan.time.tokens_per_step / most, plan.time.tokens_per_step / least],
        "speed_of": plan.gpu,
        "speed_from": asdict(plan.time.basis),
    }
    if tokens is not None:
        values["days"] = list(plan.time.days(tokens))
        if price_per_gpu_hour is not None:
            values["cost"] = [_cost(plan, days, price_per_gpu_hour) for days in plan.time.days(tokens)]
    return json.dumps(values, indent=2)


def start_command(setup: TrainingSetup) -> str:
    """How the run is started, on each node; `--config` and the rest of the trainer's options follow."""
    nodes = -(-setup.gpus // setup.gpus_per_node)
    script = f"scripts/{setup.trainer}.py"
    if setup.engine not in CONFIG_OF_ENGINE:
        machines = f"--nnodes {nodes} " if nodes > 1 else ""
        return f"torchrun {machines}--nproc_per_node {setup.ranks_of_node} {script}"
    launch = f"accelerate launch --config_file scripts/accelerate/{CONFIG_OF_ENGINE[setup.engine]}.yaml"
    if setup.engine == "single":
        return f"{launch} {script}"
    machines = f" --num_machines {nodes}" if nodes > 1 else ""
    return f"{launch} --num_processes {setup.gpus}{machines} {script}"


def _memory_table(plan: Plan) -> list[str]:
    parts = [entry.name for entry in fields(TrainingMemory) if entry.name != "moment"]
    rows = [["engine", *parts, "total", "fits", "fullest as backward"]]
    for name, memory in plan.memory_of.items():
        sizes = [_gib(getattr(memory, part)) for part in (*parts, "total")]
        when = {"begin": "begins", "end": "ends"}[memory.moment]
        rows.append([name, *sizes, "yes" if memory.total <= plan.usable else "no", when])
    return aligned(rows)


def _time_lines(plan: Plan, tokens: float | None, price_per_gpu_hour: float | None) -> list[str]:
    time, setup = plan.time, plan.setup
    least, most = time.step_seconds
    basis = time.basis
    origin = "measured for this model" if time.is_same_model else f"scaled by operations from {basis.model}"
    lines = [
        f"step: {_range(least, most, 's')} for {time.tokens_per_step:,} tokens, "
        f"{_range(time.tokens_per_step / most, time.tokens_per_step / least, 'tokens/s')}"
        f"{'; slower if no transfer between GPUs is hidden, faster if all are' if setup.gpus > 1 else ''}",
        f"speed: {origin} on {basis.device}, {basis.kernels} kernels, bfloat16 weights, {basis.date}, commit "
        f"{basis.commit}; taken for {plan.gpu}",
    ]
    lines.append(f"start: {start_command(setup)}")
    if tokens is None:
        return lines
    days = time.days(tokens)
    lines.append(f"{tokens:.4g} tokens: {-(-tokens // time.tokens_per_step):,.0f} steps, {_range(*days, 'days')}")
    if price_per_gpu_hour is not None:
        costs = [_cost(plan, value, price_per_gpu_hour) for value in days]
        lines.append(f"cost: {_range(*costs, 'at')} {price_per_gpu_hour:g} a GPU and hour")
    return lines


def _cost(plan: Plan, days: float, price_per_gpu_hour: float) -> float:
    return days * 24 * plan.setup.gpus * price_per_gpu_hour


def _range(least: float, most: float, unit: str) -> str:
    texts = [f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in (least, most)]
    return f"{texts[0] if texts[0] == texts[1] else ' to '.join(texts)} {unit}"


def _gib(size: float) -> str:
    return f"{size / GIBIBYTE:.2f}"


def _sizes(preset: str) -> dict[str, int]:
    """What every decoder of the preset's size shares."""
    config = CptMoeConfig.from_preset(preset)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {name: getattr(config, name) for name in (*names, "max_position_embeddings")}


def _llama(preset: str) -> LlamaConfig:
    return LlamaConfig(**_sizes(preset), intermediate_size=CptMoeConfig.from_preset(preset).intermediate_size)


def _qwen2_moe(preset: str) -> Qwen2MoeConfig:
    """Routed and one shared expert in every layer, as in our granular models, whose gates it has besides."""
    ours = CptMoeConfig.from_preset(preset)
    return Qwen2MoeConfig(
        **_sizes(preset),
        num_experts=ours.num_experts,
        num_experts_per_tok=ours.num_experts_per_tok,
        moe_intermediate_size=ours.moe_intermediate_size,
        shared_expert_intermediate_size=ours.num_shared_experts * ours.moe_intermediate_size,
        output_router_logits=True,
        router_aux_loss_coef=ours.router_aux_loss_coef,
    )


def _mixtral(preset: str) -> MixtralConfig:
    ours = CptMoeConfig.from_preset(preset)
    return MixtralConfig(
        **_sizes(preset),
        num_local_experts=ours.num_experts,
        num_experts_per_tok=ours.num_experts_per_tok,
        intermediate_size=ours.moe_intermediate_size,
        output_router_logits=True,
        router_aux_loss_coef=ours.router_aux_loss_coef,
    )


STOCK: dict[str, tuple[Callable[[str], PreTrainedConfig], str]] = {
    "llama-570m": (_llama, "dense-570m"),
    "qwen2-moe-granular-2b": (_qwen2_moe, "pb-granular-2b"),
    "mixtral-switch-2b": (_mixtral, "pb-switch-2b"),
    "llama-tiny": (_llama, "dense-tiny"),
    "qwen2-moe-granular-tiny": (_qwen2_moe, "pb-granular-tiny"),
    "mixtral-switch-tiny": (_mixtral, "pb-switch-tiny"),
}
MODELS = (*PRESETS, *STOCK)


def config_of(model: str) -> PreTrainedConfig:
    """A fresh configuration of a model named in `MODELS`."""
    if model not in STOCK:
        return CptMoeConfig.from_preset(model)
    build, preset = STOCK[model]
    return build(preset)


def read_config(preset: str | None, model: str | None) -> PreTrainedConfig:
    """The configuration of a name in `MODELS`, or of a folder or name on the Hub. Raises ValueError for neither."""
    if preset is not None:
        if preset not in MODELS:
            raise ValueError(f"--preset {preset!r} is unknown: choose from {', '.join(MODELS)}.")
        return config_of(preset)
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"--model {model!r} is a folder without config.json: give one that a model was saved in.")
    try:
        return config_at(model)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--model {model!r} has no configuration that can be read: {reason}") from error


Training = TypeVar("Training", bound=TrainingArguments)
EIGHT_BIT = "adamw_stochastic_8bit"
PRECISION_OF = {"float32": "mixed", "bfloat16": "bfloat16"}
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")  # the old name and the new one
RECURRENT = ("linear", "mamba", "conv", "recurrent")  # in names of kinds of layers
ASKED = (*CHECKPOINTING, "bf16", "fp16")  # arguments that the choice leaves alone where somebody gave them


@dataclass(frozen=True)
class Fit:
    """What was chosen, and the sentence that says so."""

    dtype: str
    checkpointing: bool
    told: str
    optim: str  # name of the trainers' optimizer


def choose_fit(
    config: PreTrainedConfig,
    setup: TrainingSetup,
    name: str,
    gpu_gib: float,
    *,
    dtype: str | None = None,
    checkpointing: bool | None = None,
    optim: str = "auto",
    batch_option: str = "--per_device_train_batch_size",
    refuses: bool = True,
) -> Fit:
    """The first way that fits `gpu_gib`; what is between the usable part of a GPU and all of it is tried.

    setup: precision, checkpointing and optimizer in it do not count. dtype, checkpointing: what was asked for, None
    for open. optim: of the trainers; "auto" is open to moments of 8 bits where weights are not shards.
    batch_option: the trainer's name for the sequences of a pass. Raises ValueError if the run cannot fit, unless
    `refuses` is off.
    """
    size = measure_size(config, name)
    kept = {}
    for one in (dtype,) if dtype else PRECISION_OF:
        kept[one] = _kept(config, size, replace(setup, precision=PRECISION_OF[one]))
    is_counted = all(any(found.layers) for found in kept.values())
    open_to = (False, True) if is_counted else (True,)  # what is not known is not kept, where that is open
    is_whole = setup.engine in ("single", "ddp")
    ways = [
        (one, replace(setup, precision=PRECISION_OF[one], checkpointing=is_on, optimizer=optimizer))
        for one in kept
        for is_on in (open_to if checkpointing is None else (checkpointing,))
        for optimizer in _optimizers(one, optim, is_whole)
    ]
    needed = [training_memory(size, kept[one], way).total for one, way in ways]
    fitting = [place for place, total in enumerate(needed) if total <= usable_bytes(gpu_gib)]
    taken = fitting[0] if fitting else needed.index(min(needed))
    one, way = ways[taken]
    if refuses and needed[taken] > gpu_gib * GIBIBYTE:
        freest = replace(way, optimizer=_optimizers("bfloat16", optim, is_whole)[-1])
        options = _remedies(config, size, kept, freest, gpu_gib, one, batch_option)
        raise ValueError(
            f"{name} needs about {needed[taken] / GIBIBYTE:.1f} GiB to be trained with {_words(one, way)}, and the "
            f"GPU has {gpu_gib:.1f}: it would fit with {' or '.join(options)}."
        )
    told = (
        f"{name}: {_words(one, way)}; about {needed[taken] / GIBIBYTE:.1f} of {gpu_gib:.1f} GiB"
        f"{'' if fitting else ', which is tight'}."
    )
    return Fit(one, way.checkpointing, told, EIGHT_BIT if optim == "auto" and way.optimizer == "adamw_8bit" else optim)


def _optimizers(dtype: str, optim: str, is_whole: bool) -> tuple[str, ...]:
    """Of `memory`, those that the trainers' `optim` may stand for, the faster first."""
    if dtype != "bfloat16" or not is_whole:
        return ("adamw",)
    return {"auto": ("adamw", "adamw_8bit"), EIGHT_BIT: ("adamw_8bit",)}.get(optim, ("adamw",))


def _kept(config: PreTrainedConfig, size: ModelSize, setup: TrainingSetup) -> KeptBytes:
    """What layers keep; nothing where it cannot be counted, or only in minutes as of recurrent layers."""
    text, nothing = config.get_text_config(), KeptBytes(0, 0, (0,) * len(size.layers), 0)
    kinds = {*(getattr(text, "layer_types", None) or ()), *(getattr(text, "layers_block_type", None) or ())}
    if any(word in kind for kind in kinds for word in RECURRENT):
        return nothing
    try:
        return measure_kept(config, setup.sequence_length, setup.precision, setup.kernels)
    except ValueError:
        return nothing


def _words(dtype: str, setup: TrainingSetup) -> str:
    how = "float32 weights under bfloat16 autocast" if dtype == "float32" else "bfloat16 weights"
    how += ", moments of 8 bits" if setup.optimizer == "adamw_8bit" else ""
    return f"{how}{', gradient checkpointing' if setup.checkpointing else ''}"


def _remedies(
    config: PreTrainedConfig,
    size: ModelSize,
    kept: Mapping[str, KeptBytes],
    way: TrainingSetup,
    gpu_gib: float,
    dtype: str,
    batch_option: str,
) -> list[str]:
    """Options of the command, each of which makes the run fit."""
    usable, found = usable_bytes(gpu_gib), []
    freest = replace(way, precision="bfloat16", checkpointing=True)
    of_freest = kept["bfloat16"] if "bfloat16" in kept else _kept(config, size, freest)
    batch = largest_batch(size, of_freest, freest, usable)
    more = [] if dtype == "bfloat16" else ["--dtype bfloat16"]
    more += [] if way.checkpointing else ["--gradient_checkpointing"]
    if batch and more and batch >= way.batch_size:
        found.append(" ".join(more))
    elif batch:
        steps = -(-way.accumulation * way.batch_size // batch)
        found.append(" ".join([*more, f"{batch_option} {batch} --gradient_accumulation_steps {steps}"]))
    for gpus in (way.gpus * factor for factor in (2, 4, 8, 16, 32, 64)):
        if training_memory(size, of_freest, replace(freest, gpus=gpus, engine="fsdp2")).total <= usable:
            found.append(f"{gpus} GPUs that share it (scripts/accelerate/fsdp2_8gpu.yaml)")
            break
    return [*found, "--use_peft"]


def engine_of(training: TrainingArguments, parallel: Mapping[str, Any]) -> str | None:
    """The engine by the names of plans, None for one whose memory is not planned: DeepSpeed, tensor parallelism.

    parallel: of `hf_moe_cpt.arguments.parallel_options`.
    """
    sizes = parallel.get("distributed_config")
    is_deepspeed = training.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if is_deepspeed or (getattr(sizes, "tp_size", None) or 1) > 1:
        return None
    if training.world_size == 1:
        return "single"
    if getattr(sizes, "ep_size", None):
        return "ep"
    is_sharded = sizes is not None or training.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")
    return "fsdp2" if is_sharded else "ddp"


def fit_to_gpu(
    model: Any,
    training: Training,
    asked: Mapping[str, Any],
    setup: Mapping[str, Any],
    parallel: Mapping[str, Any],
    *,
    config: PreTrainedConfig | None = None,
    trust_remote_code: bool = False,
    batch_option: str = "--per_device_train_batch_size",
) -> Training:
    """`training` with autocast and checkpointing as they fit the GPU of this rank; `model.dtype` is filled in.

    Without a GPU, and where memory is not planned, weights are float32 unless `model.dtype` is set. Under an adapter
    the weights are not trained, and are bfloat16 on a GPU.

    model: the arguments of a command that name it (`hf_moe_cpt.model_arguments`). asked: by the names of `ASKED`, None
    for what nobody gave. setup: fields of `TrainingSetup` that the trainer knows. config: of a model without a name.
    """
    is_auto, engine = model.dtype is None, engine_of(training, parallel)
    model.dtype = model.dtype or "float32"
    if training.device.type != "cuda" or engine is None or model.dtype not in PRECISION_OF:
        return training
    if model.use_peft:
        model.dtype = "bfloat16" if is_auto else model.dtype
        return _with_autocast(training, asked) if is_auto else training
    if config is None:
        options = {"revision": model.model_revision, "trust_remote_code": trust_remote_code}
        config = config_at(model.model_name_or_path, **options)
    kernels = "plain" if getattr(training, "kernels", "auto") == "plain" else "fused"
    known = TrainingSetup(
        engine=engine,
        gpus=training.world_size,
        gpus_per_node=torch.cuda.device_count(),
        accumulation=training.gradient_accumulation_steps,
        kernels=kernels,
        **setup,
    )
    is_open = not training.gradient_checkpointing and all(asked[option] is None for option in CHECKPOINTING)
    fit = choose_fit(
        config,
        known,
        model.model_name_or_path or model.preset,
        gpu_gib(training.device),
        dtype=None if is_auto else model.dtype,
        checkpointing=None if is_open else bool(training.gradient_checkpointing),
        optim=training.optim,
        batch_option=batch_option,
        refuses=not training.freeze,  # whose gradients and moments are not there
    )
    if training.process_index == 0:
        print(fit.told)
    model.dtype, training.optim = fit.dtype, fit.optim
    if fit.dtype == "float32":
        training = _with_autocast(training, asked)
    for option in CHECKPOINTING:
        if hasattr(training, option):
            setattr(training, option, fit.checkpointing)
    return training


def _with_autocast(training: Training, asked: Mapping[str, Any]) -> Training:
    is_open = asked["bf16"] is None and asked["fp16"] is None and not training.bf16
    return dataclasses.replace(training, bf16=True) if is_open and torch.cuda.is_bf16_supported() else training


def gpu_gib(device: torch.device) -> float:
    """What this process may fill of a GPU: what is free now, within the share that it was given."""
    free, total = torch.cuda.mem_get_info(device)
    return min(free, total * torch.cuda.get_per_process_memory_fraction(device)) / GIBIBYTE
