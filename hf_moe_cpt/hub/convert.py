"""Convert between `cpt_moe` and Mixtral, OLMoE, Qwen2-MoE or Qwen3-MoE: other names, the same numbers and logits.

Read and written shard by shard; what one side cannot express is refused before anything is written.
E experts, H hidden size, m width of an expert, S shared experts.
Source: names and configurations, `convert_families`; docs/convert.md lists what fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from hf_moe_cpt.hub.convert_families import FAMILIES, Family, config_from, config_to, lost_in_training
from hf_moe_cpt.hub.convert_skeleton import empty_model, write_config
from hf_moe_cpt.hub.streaming_output import (
    MAX_SHARD_SIZE,
    appearing_whole,
    check_disk_space,
    check_output,
    copy_companions,
    leftovers,
    write_weights,
)
from hf_moe_cpt.hub.streaming_plan import PlannedTensor, constant, copied, refuse_unused, skeleton
from hf_moe_cpt.hub.streaming_source import CheckpointReader
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig


MODEL_TYPES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "cpt_moe")


@dataclass(frozen=True)
class Converted:
    """What was made. notes: what training further will do otherwise than before."""

    folder: Path
    config: PreTrainedConfig
    notes: tuple[str, ...]
    leftovers: tuple[Path, ...]


def convert(
    source: str | Path,
    output_dir: str | Path,
    to: str,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    revision: str | None = None,
) -> Converted:
    """Write a checkpoint as one of another family, into a new folder.

    source: a folder or a Hub id, revision: of the latter. to: one of `MODEL_TYPES`; one side must be cpt_moe. Raises
    ValueError, in one line and before anything is written, for what the other family cannot compute.
    """
    if to not in MODEL_TYPES:
        raise ValueError(f"--to {to!r} is unknown: choose one of {', '.join(MODEL_TYPES)}.")
    reader = CheckpointReader(source, revision)
    output = check_output(output_dir, reader.folder)
    of = reader.config.model_type
    if of not in MODEL_TYPES or of == to:
        raise ValueError(f"{reader.name} is of type {of!r}: only {', '.join(MODEL_TYPES)} convert, to another.")
    if "cpt_moe" not in (of, to):
        raise ValueError(f"{of} to {to}: one side must be cpt_moe; convert to it first.")
    if to == "cpt_moe":
        config, plan, used = _plan_from(reader)
        notes = _notes_from(reader.config)
    else:
        config, plan, used = _plan_to(reader, to)
        notes = lost_in_training(reader.config)
    refuse_unused(reader, plan, used)
    check_disk_space(output, sum(tensor.num_bytes for tensor in plan))
    with appearing_whole(output) as folder:
        write_weights(folder, plan, max_shard_size)
        copy_companions(reader.folder, folder)
        write_config(empty_model(config), folder)
    return Converted(output, config, tuple(notes), tuple(leftovers(output)))


def _notes_from(config: PreTrainedConfig) -> list[str]:
    jitter = getattr(config, "router_jitter_noise", 0.0)
    return [f"router_jitter_noise={jitter} has no counterpart"] if jitter else []


def _plan_from(reader: CheckpointReader) -> tuple[CptMoeConfig, list[PlannedTensor], list[str]]:
    """Our configuration and tensors, and the names of tensors that were looked at and say nothing more."""
    family, theirs = FAMILIES[reader.config.model_type], reader.config
    config = config_from(theirs)
    used: list[str] = []
    if theirs.model_type == "qwen2_moe":
        used = _neutral_shared_gates(reader)
        if _is_dead_shared_expert(reader):
            config.num_shared_experts = 0
            used += [name for name in reader.shapes if ".shared_expert." in name]
        elif theirs.shared_expert_intermediate_size % config.moe_intermediate_size:
            raise ValueError(
                f"shared_expert_intermediate_size={theirs.shared_expert_intermediate_size} is no multiple of "
                f"moe_intermediate_size={config.moe_intermediate_size}: cpt_moe has shared experts of that width."
            )
    plan = skeleton(reader, empty_model(config))
    H, S_width = config.hidden_size, config.num_shared_experts * config.moe_intermediate_size
    for layer in range(config.num_hidden_layers):
        block, ours = f"model.layers.{layer}.{family.block}.", f"model.layers.{layer}.mlp."
        plan.append(copied(reader, f"{block}gate.weight", (config.num_experts, H), f"{ours}gate.weight"))
        plan += _fused_experts(reader, config, family, layer)
        shared = (("gate_proj", (S_width, H), 1.0), ("up_proj", (S_width, H), 1.0), ("down_proj", (H, S_width), 0.5))
        for matrix, shape, factor in shared if S_width else ():
            name = f"{block}shared_expert.{matrix}.weight"
            plan.append(copied(reader, name, shape, f"{ours}shared_experts.{matrix}.weight", factor))
    return config, plan, used


def _plan_to(reader: CheckpointReader, to: str) -> tuple[PreTrainedConfig, list[PlannedTensor], list[str]]:
    """The other family's configuration and tensors."""
    family, ours = FAMILIES[to], reader.config
    config = config_to(ours, to)
    plan = skeleton(reader, empty_model(ours))
    for layer in range(ours.num_hidden_layers):
        block, mlp = f"model.layers.{layer}.{family.block}.", f"model.layers.{layer}.mlp."
        router = copied(reader, f"{mlp}gate.weight", (ours.num_experts, ours.hidden_size), f"{block}gate.weight")
        plan.append(router)
        plan += _single_experts(reader, ours, family, layer)
        if to == "qwen2_moe":
            plan += _qwen2_shared_expert(reader, ours, config.shared_expert_intermediate_size, mlp, router.dtype)
    return config, plan, []


def _fused_experts(reader: CheckpointReader, config: CptMoeConfig, family: Family, layer: int) -> list[PlannedTensor]:
    """(m, H), (m, H) and (H, m) of each expert -> (E, 2m, H) and (E, H, m)."""
    E, H, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    block = f"model.layers.{layer}.{family.block}.experts."
    gates, ups, downs = (
        [f"{block}{expert}.{matrix}.weight" for expert in range(E)] for matrix in (family.gate, family.up, family.down)
    )
    for names, shape in ((gates, (width, H)), (ups, (width, H)), (downs, (H, width))):
        for name in names:
            dtype = reader.require(name, shape)

    def into() -> Iterator[torch.Tensor]:
        for gate, up in zip(gates, ups, strict=True):
            yield torch.cat((reader.tensor(gate), reader.tensor(up)))[None]

    def out() -> Iterator[torch.Tensor]:
        return (reader.tensor(name)[None] for name in downs)

    ours = f"model.layers.{layer}.mlp.experts."
    return [
        PlannedTensor(f"{ours}gate_up_proj", (E, 2 * width, H), dtype, into, (*gates, *ups)),
        PlannedTensor(f"{ours}down_proj", (E, H, width), dtype, out, tuple(downs)),
    ]


def _single_experts(reader: CheckpointReader, config: CptMoeConfig, family: Family, layer: int) -> list[PlannedTensor]:
    """(E, 2m, H) and (E, H, m) -> (m, H), (m, H) and (H, m) of each expert."""
    E, H, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    gate_up, down = (f"model.layers.{layer}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
    dtype = reader.require(gate_up, (E, 2 * width, H))
    reader.require(down, (E, H, width))

    def half(expert: int, which: int) -> Iterator[torch.Tensor]:
        yield reader.row(gate_up, expert).chunk(2)[which]

    def out(expert: int) -> Iterator[torch.Tensor]:
        yield reader.row(down, expert)

    plan = []
    for expert in range(E):
        name = f"model.layers.{layer}.{family.block}.experts.{expert}."
        for which, matrix in enumerate((family.gate, family.up)):
            pieces = partial(half, expert, which)
            plan.append(PlannedTensor(f"{name}{matrix}.weight", (width, H), dtype, pieces, (gate_up,)))
        plan.append(PlannedTensor(f"{name}{family.down}.weight", (H, width), dtype, partial(out, expert), (down,)))
    return plan


def _qwen2_shared_expert(
    reader: CheckpointReader, config: CptMoeConfig, width: int, mlp: str, dtype: torch.dtype
) -> list[PlannedTensor]:
    """Qwen2-MoE's shared expert under its sigmoid gate: a gate of zeros is the constant 1/2, undone by a factor of 2.

    Without shared experts it is zeros, which stay zero in training too.
    """
    H, block = config.hidden_size, f"{mlp}shared_expert."
    plan = [constant(f"{mlp}shared_expert_gate.weight", (1, H), dtype)]
    for matrix, shape, factor in (
        ("gate_proj", (width, H), 1.0),
        ("up_proj", (width, H), 1.0),
        ("down_proj", (H, width), 2.0),
    ):
        name = f"{block}{matrix}.weight"
        if config.num_shared_experts:
            plan.append(copied(reader, f"{mlp}shared_experts.{matrix}.weight", shape, name, factor))
        else:
            plan.append(constant(name, shape, dtype))
    return plan


def _neutral_shared_gates(reader: CheckpointReader) -> list[str]:
    """Names of the gates on Qwen2-MoE's shared experts; raises ValueError if one does anything and is not dead."""
    names = [name for name in reader.shapes if name.endswith("shared_expert_gate.weight")]
    if _is_dead_shared_expert(reader):
        return names
    for name in names:
        if reader.tensor(name).any():
            raise ValueError(
                f"{reader.name}: {name} weighs the shared expert by the token, and cpt_moe adds it with weight 1: "
                "only models whose gate is 0 can be converted."
            )
    return names


def _is_dead_shared_expert(reader: CheckpointReader) -> bool:
    """Whether the shared experts of all layers add nothing."""
    names = [name for name in reader.shapes if name.endswith(".shared_expert.down_proj.weight")]
    return not any(reader.tensor(name).any() for name in names)
