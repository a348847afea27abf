"""How a run fits the GPU at hand, decided from the configuration, before any weight is read.

Of the ways to hold a model the first that the estimate of `memory` lets through is taken, what was asked for fixed:

    float32 weights under bfloat16 autocast; the same with checkpointing
    bfloat16 weights and moments, rounded at random (`optim.adamw`); the same with moments of 8 bits; both again with
    checkpointing

A run that not even the last lets through is refused, with the options that make it fit. Source: ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from accelerate.utils import parse_flag_from_env
from transformers import PreTrainedConfig, TrainingArguments

from hf_moe_cpt.planning.memory import KeptBytes, ModelSize, TrainingSetup, measure_kept, measure_size, training_memory
from hf_moe_cpt.planning.plan import GIBIBYTE, largest_batch, usable_bytes
from hf_moe_cpt.reading import read_config


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
        config = read_config(model.model_name_or_path, **options)
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
