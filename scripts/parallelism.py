"""Arguments of scripts for what accelerate has no flags for: experts and tensors that are dealt to ranks.

transformers cuts such a model while it reads it (`DistributedConfig`); accelerate or torchrun start the processes.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments


@dataclass
class ParallelArguments:
    """How a model is dealt to the ranks that were started; with none of these, accelerate decides."""

    ep_size: int | None = field(
        default=None, metadata={"help": "Expert parallelism: the experts of a layer are dealt to so many ranks."}
    )
    tp_size: int | None = field(
        default=None, metadata={"help": "Tensor parallelism: so many ranks share every matrix and the same rows."}
    )
    dp_replicate_size: int | None = field(
        default=None, metadata={"help": "Copies of the model, for several machines; inside of one it is sharded."}
    )


def fsdp2_arguments(layer_class: str, **more: Any) -> dict[str, Any]:
    """Fields of `TrainingArguments` that shard a model by FSDP2, layer by layer; `more` goes into `fsdp_config`."""
    wrapped = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": [layer_class]}
    return {"fsdp": True, "fsdp_config": {"version": 2, **wrapped, **more}}


def parallel_options(
    args: ParallelArguments, training: TrainingArguments, num_ranks: int | None = None
) -> dict[str, Any]:
    """The argument of `from_pretrained` that deals a model to all ranks; empty where nothing is asked for.

    Ranks that neither tensors nor copies take share the model by FSDP2, which is data parallelism. num_ranks: those
    that were started if None. Raises ValueError for sizes that do not fit them, for two engines at once, and for
    checkpoints that cannot be written.
    """
    sizes = {name: value for name, value in vars(args).items() if value is not None}
    if not sizes:
        return {}
    asked = ", ".join(f"--{name} {value}" for name, value in sizes.items())
    num_ranks = training.world_size if num_ranks is None else num_ranks
    taken = sizes.get("tp_size", 1) * sizes.get("dp_replicate_size", 1)
    if min(sizes.values()) < 1 or num_ranks % taken:
        raise ValueError(f"{asked} does not fit {num_ranks} rank(s): their product must divide the number of ranks.")
    if training.fsdp or training.deepspeed or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError(f"{asked} and FSDP or DeepSpeed both shard the model: start with scripts/accelerate/ep.yaml.")
    is_saved = str(getattr(training.save_strategy, "value", training.save_strategy)) != "no"
    if is_saved and not training.save_only_model:
        raise ValueError(
            f"{asked}: transformers does not save the optimizer of such a model: set --save_only_model or "
            "--save_strategy no, or train with FSDP2 (scripts/accelerate/fsdp2_8gpu.yaml), which resumes."
        )
    return {"distributed_config": _distributed_config(sizes, num_ranks // taken, asked)}


def _distributed_config(sizes: dict[str, int], fsdp_size: int, asked: str) -> Any:
    from transformers.distributed import DistributedConfig

    unknown = [name for name in sizes if name not in inspect.signature(DistributedConfig).parameters]
    if unknown:
        raise ValueError(f"--{unknown[0]} needs transformers 5.23 or newer.")
    try:
        return DistributedConfig(fsdp_size=fsdp_size, **sizes)
    except ValueError as error:
        raise ValueError(f"{asked} on {fsdp_size} data parallel rank(s): {error}") from error
