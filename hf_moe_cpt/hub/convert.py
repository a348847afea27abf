"""Convert between `cpt_moe` and Mixtral, OLMoE, Qwen2-MoE or Qwen3-MoE: other names, the same numbers and logits.

Read and written shard by shard; what one side cannot express is refused before anything is written. The skeleton of a
decoder (embeddings, attention, norms, head, sizes, rotary positions) is what upcycling leaves alone as well. Names are
those of files (one matrix per expert), which other tools read too; a test compares them with what transformers writes.

E experts, K per token, S shared ones, L layers, H hidden size, m width of an expert. Source: transformers'
configurations, modelling code and conversion mappings; docs/convert.md lists what fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from hf_moe_cpt.hub.checkpoint_io import (
    MAX_SHARD_SIZE,
    CheckpointReader,
    PlannedTensor,
    appearing_whole,
    check_disk_space,
    check_output,
    constant,
    copied,
    copy_companions,
    leftovers,
    refuse_unused,
    skeleton,
    write_weights,
)
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM
from hf_moe_cpt.reading import reading


MODEL_TYPES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "cpt_moe")
SHARED_FIELDS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings rms_norm_eps attention_dropout tie_word_embeddings initializer_range use_cache "
    "pad_token_id bos_token_id eos_token_id dtype"
).split()
DEAD_SHARED_WIDTH = 64  # at most; Qwen2-MoE always has a shared expert, and zeros of this width stand for none
_SHARED_OUTPUT = ".shared_expert.down_proj.weight"  # zero in all layers: the shared experts add nothing
BIASES = ("attention_bias", "qkv_bias")  # of all four projections; of queries, keys and values
ATTENTION_FIELDS = (*BIASES, "qk_norm", "sliding_window")
_WHAT_IS_NORMALISED = {
    "head": "each head of queries and keys",
    "projection": "all heads of queries and keys together",
    None: "neither queries nor keys",
}


@dataclass(frozen=True)
class Attention:
    """bias: the one of `BIASES` that the family can have. qk_norm: our field's value. has_window: for all layers."""

    bias: str | None = None
    qk_norm: str | None = None
    has_window: bool = False


ATTENTION = {
    "llama": Attention("attention_bias"),
    "mistral": Attention(has_window=True),
    "mixtral": Attention(has_window=True),
    "qwen2": Attention("qkv_bias"),
    "qwen2_moe": Attention("qkv_bias"),
    "qwen3": Attention("attention_bias", "head"),
    "qwen3_moe": Attention("attention_bias", "head", has_window=True),
    "olmoe": Attention("attention_bias", "projection"),
}


@dataclass(frozen=True)
class Family:
    """Names in files, after `model.layers.<layer>.`: block holds the mixture, the others name matrices in it."""

    block: str
    gate: str
    up: str
    down: str


FAMILIES = {
    "mixtral": Family("block_sparse_moe", "w1", "w3", "w2"),
    "olmoe": Family("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen2_moe": Family("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": Family("mlp", "gate_proj", "up_proj", "down_proj"),
}


def attention_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """`ATTENTION_FIELDS` of another family's model, or of one of ours.

    Raises ValueError for clipped queries, keys and values, and for a window that only some layers have.
    """
    if isinstance(config, CptMoeConfig):
        return {name: getattr(config, name) for name in ATTENTION_FIELDS}
    if (limit := getattr(config, "clip_qkv", None)) is not None:
        raise ValueError(
            f"clip_qkv={limit}: {config.model_type} clips queries, keys and values, and cpt_moe does not; "
            "only models with clip_qkv=None can be carried over."
        )
    family = ATTENTION[config.model_type]
    fields = dict.fromkeys(BIASES, False) | {"qk_norm": family.qk_norm, "sliding_window": _window_of(config)}
    if family.bias is not None:
        fields[family.bias] = getattr(config, family.bias, True)  # Qwen2 has no switch for it: always
    return fields


def foreign_attention_fields(config: CptMoeConfig, model_type: str) -> dict[str, Any]:
    """Fields of another family that give the attention of a model of ours. Raises ValueError for what it lacks."""
    family = ATTENTION[model_type]
    for name in BIASES:
        if getattr(config, name) and name != family.bias:
            has = f"those of {family.bias} alone" if family.bias else "none"
            raise ValueError(f"{name}=True: of biases, the attention of {model_type} can have {has}.")
    if config.qk_norm != family.qk_norm:
        raise ValueError(
            f"qk_norm={config.qk_norm!r} normalises {_WHAT_IS_NORMALISED[config.qk_norm]}, {model_type} "
            f"{_WHAT_IS_NORMALISED[family.qk_norm]}: no weights make the two equal."
        )
    if config.sliding_window is not None and not family.has_window:
        raise ValueError(f"sliding_window={config.sliding_window}: {model_type} has no window for all layers.")
    fields: dict[str, Any] = {} if family.bias is None else {family.bias: getattr(config, family.bias)}
    if family.has_window:
        has_window = config.sliding_window is not None
        fields |= {"sliding_window": config.sliding_window}
        fields |= {"use_sliding_window": has_window} if model_type == "qwen3_moe" else {}
    return fields


def _window_of(config: PreTrainedConfig) -> int | None:
    """Tokens that a token sees; None for all. Raises ValueError if layers differ within the context."""
    window = getattr(config, "sliding_window", None) or None
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    if ATTENTION[config.model_type].has_window:
        return window
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds == {"sliding_attention"}:
        return window
    if "sliding_attention" in kinds and window < config.max_position_embeddings:
        raise ValueError(
            f"{config.model_type} attends in some layers to the last {window} of {config.max_position_embeddings} "
            "tokens and in others to all, and cpt_moe is the same in all layers: set max_position_embeddings to "
            f"{window} in its config.json, and keep texts within that."
        )
    return None


def skeleton_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Fields of `CptMoeConfig` that give the skeleton of another family's model, or of one of ours.

    Raises ValueError for what `attention_fields` refuses, and for a head of which only a part is rotated although the
    family rotates all of it.
    """
    fields = {name: getattr(config, name) for name in SHARED_FIELDS}
    fields["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields["rope_parameters"] = dict(config.rope_parameters)
    fields |= attention_fields(config)
    if isinstance(config, CptMoeConfig):
        return fields | {"norm_type": config.norm_type}
    if fields["rope_parameters"].setdefault("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{config.model_type} with partial_rotary_factor below 1 is unknown: set it to 1.0.")
    return fields


def foreign_fields(config: CptMoeConfig, model_type: str) -> dict[str, Any]:
    """Fields of a Llama-like family's configuration that give the skeleton of one of ours.

    Raises ValueError for LayerNorm, for rotation of a part of each head and for attention that the family lacks.
    """
    if config.norm_type != "rmsnorm":
        raise ValueError(f"norm_type={config.norm_type!r}: {model_type} has RMSNorm and no biases.")
    rope = dict(config.rope_parameters)
    if (factor := rope.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(
            f"partial_rotary_factor={factor}: {model_type} rotates whole heads; only models that were trained with "
            "1.0 can become one."
        )
    fields = {name: getattr(config, name) for name in SHARED_FIELDS} | {"rope_parameters": rope}
    fields |= foreign_attention_fields(config, model_type)
    if fields["initializer_range"] is None:  # our own initialisation, which no number stands for
        del fields["initializer_range"]
    return fields


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A causal language model without memory, to ask for names and shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def write_checkpoint(
    reader: CheckpointReader,
    plan: Sequence[PlannedTensor],
    model: PreTrainedModel,
    output: Path,
    max_shard_size: int | str,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write planned weights, the source's tokenizer and what else `save_pretrained` writes; the output appears whole.

    model: of the target, on the meta device; the code of a model of ours lies beside it. texts: more files by name.
    Raises ValueError if the disk is too small.
    """
    check_disk_space(output, sum(tensor.num_bytes for tensor in plan))
    with appearing_whole(output) as folder:
        write_weights(folder, plan, max_shard_size)
        copy_companions(reader.folder, folder)
        model.config.architectures = [type(model).__name__]
        if isinstance(model, CptMoeForCausalLM):
            custom_object_save(model, folder, config=model.config)
        model.config.save_pretrained(folder)
        for name, text in (texts or {}).items():
            (folder / name).write_text(text, encoding="utf-8")


def config_from(config: PreTrainedConfig) -> CptMoeConfig:
    """Our configuration of a model of another family. Raises ValueError for what we cannot express."""
    fields = skeleton_fields(config) | {"router_type": "softmax_topk", "router_z_loss_coef": 0.0}
    fields |= _mixture_from(config)
    fields["num_experts_per_tok"] = config.num_experts_per_tok
    # Theirs is K if uniform, over all layers at once; ours is 1 per layer, summed over layers.
    scale = config.num_experts_per_tok / config.num_hidden_layers
    fields["router_aux_loss_coef"] = config.router_aux_loss_coef * scale
    fields["output_router_logits"] = config.output_router_logits
    if fields["norm_topk_prob"] and config.num_experts_per_tok == 1:
        raise ValueError(
            f"{config.model_type} with num_experts_per_tok=1 and normalised gates: every gate is 1 whatever the "
            "router says, which cpt_moe refuses."
        )
    return CptMoeConfig(**fields)


def config_to(config: CptMoeConfig, model_type: str) -> PreTrainedConfig:
    """Another family's configuration of a model of ours. Raises ValueError for what it cannot express."""
    if not config.is_moe:
        raise ValueError(f"num_experts=0: a dense model has no place in {model_type}; upcycle it first.")
    if config.has_sigmoid_gates:
        raise ValueError(
            f"router_type={config.router_type!r} with num_experts_per_tok={config.num_experts_per_tok}: {model_type} "
            "has no sigmoid gates."
        )
    fields = foreign_fields(config, model_type)
    fields |= {"num_experts_per_tok": config.num_experts_per_tok, "output_router_logits": config.output_router_logits}
    fields["router_aux_loss_coef"] = (
        config.router_aux_loss_coef * config.num_hidden_layers / config.num_experts_per_tok
    )
    fields |= _mixture_to(config, model_type)
    return AutoConfig.for_model(model_type, **fields)


def lost_in_training(config: CptMoeConfig) -> list[str]:
    """What of a model of ours another family does not do when it is trained further; logits do not depend on it."""
    lost = []
    if config.router_type == "sinkhorn":
        lost.append("experts are no longer chosen by a Sinkhorn plan")
    if config.router_z_loss_coef > 0:
        lost.append(f"router_z_loss_coef={config.router_z_loss_coef} has no counterpart")
    return lost


def _mixture_from(config: PreTrainedConfig) -> dict[str, Any]:
    """Our fields of the mixture of another family's model. Raises ValueError if its layers are not alike."""
    if config.model_type in ("mixtral", "olmoe"):  # `intermediate_size` is the width of an expert, and none is shared
        is_mixtral, width = config.model_type == "mixtral", config.intermediate_size
        return {
            "num_experts": config.num_local_experts if is_mixtral else config.num_experts,
            "num_shared_experts": 0,
            "intermediate_size": width * config.num_experts_per_tok,
            "moe_intermediate_size": width,
            "norm_topk_prob": is_mixtral or config.norm_topk_prob,
        }
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise ValueError(
            f"{config.model_type} with mlp_only_layers={config.mlp_only_layers} and decoder_sparse_step="
            f"{config.decoder_sparse_step} mixes dense layers and mixtures: in cpt_moe all layers are alike."
        )
    shared_width = getattr(config, "shared_expert_intermediate_size", 0)  # only Qwen2-MoE has shared experts
    copied_fields = ("num_experts", "intermediate_size", "moe_intermediate_size", "norm_topk_prob")
    fields = {name: getattr(config, name) for name in copied_fields}
    return fields | {"num_shared_experts": shared_width // config.moe_intermediate_size}


def _mixture_to(config: CptMoeConfig, model_type: str) -> dict[str, Any]:
    """Another family's fields of our mixture. Raises ValueError for what it cannot express."""
    if config.num_shared_experts and model_type != "qwen2_moe":
        raise ValueError(f"num_shared_experts={config.num_shared_experts}: {model_type} has none; try qwen2_moe.")
    if model_type == "mixtral" and not config.norm_topk_prob:
        raise ValueError("norm_topk_prob=False: mixtral divides gates by their sum; try qwen2_moe.")
    has_head_dim, has_one_width = model_type in ("mixtral", "qwen3_moe"), model_type in ("mixtral", "olmoe")
    if not has_head_dim and config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"head_dim={config.head_dim}: {model_type} has heads of hidden_size / num_attention_heads = "
            f"{config.hidden_size / config.num_attention_heads:g}."
        )
    width = config.moe_intermediate_size
    fields = {"num_local_experts" if model_type == "mixtral" else "num_experts": config.num_experts}
    fields |= {"intermediate_size": width if has_one_width else config.intermediate_size}
    fields |= {} if has_one_width else {"moe_intermediate_size": width}
    fields |= {} if model_type == "mixtral" else {"norm_topk_prob": config.norm_topk_prob}
    fields |= {"head_dim": config.head_dim} if has_head_dim else {}
    if model_type == "qwen2_moe":
        fields["shared_expert_intermediate_size"] = config.num_shared_experts * width or min(DEAD_SHARED_WIDTH, width)
    return fields


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
    with reading(f"the checkpoint {str(source)!r}", keeps=(ValueError,)):
        if to == "cpt_moe":
            config, plan, used = _plan_from(reader)
            jitter = getattr(reader.config, "router_jitter_noise", 0.0)
            notes = [f"router_jitter_noise={jitter} has no counterpart"] if jitter else []
        else:
            config, plan, used = _plan_to(reader, to)
            notes = lost_in_training(reader.config)
        refuse_unused(reader, plan, used)
        model = empty_model(config)
    write_checkpoint(reader, plan, model, output, max_shard_size)
    return Converted(output, config, tuple(notes), tuple(leftovers(output)))


def _plan_from(reader: CheckpointReader) -> tuple[CptMoeConfig, list[PlannedTensor], list[str]]:
    """Our configuration and tensors, and the names of tensors that were looked at and say nothing more."""
    family, theirs = FAMILIES[reader.config.model_type], reader.config
    config = config_from(theirs)
    used: list[str] = []
    if theirs.model_type == "qwen2_moe":
        is_dead = not any(reader.tensor(name).any() for name in reader.shapes if name.endswith(_SHARED_OUTPUT))
        used = _shared_gates(reader, must_be_zero=not is_dead)
        if is_dead:
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
        for matrix, shape, factor in _shared_matrices(S_width, H, 0.5) if S_width else ():
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


def _shared_matrices(width: int, hidden_size: int, factor: float) -> Iterator[tuple[str, tuple[int, int], float]]:
    """Name, shape and factor of the matrices of a shared expert; only the last one is scaled."""
    yield from ((name, (width, hidden_size), 1.0) for name in ("gate_proj", "up_proj"))
    yield "down_proj", (hidden_size, width), factor


def _qwen2_shared_expert(
    reader: CheckpointReader, config: CptMoeConfig, width: int, mlp: str, dtype: torch.dtype
) -> list[PlannedTensor]:
    """Qwen2-MoE's shared expert under its sigmoid gate: a gate of zeros is the constant 1/2, undone by a factor of 2.

    Without shared experts it is zeros, which stay zero in training too.
    """
    H = config.hidden_size
    plan = [constant(f"{mlp}shared_expert_gate.weight", (1, H), dtype)]
    for matrix, shape, factor in _shared_matrices(width, H, 2.0):
        name = f"{mlp}shared_expert.{matrix}.weight"
        if config.num_shared_experts:
            plan.append(copied(reader, f"{mlp}shared_experts.{matrix}.weight", shape, name, factor))
        else:
            plan.append(constant(name, shape, dtype))
    return plan


def _shared_gates(reader: CheckpointReader, must_be_zero: bool) -> list[str]:
    """Names of the gates on Qwen2-MoE's shared experts; raises ValueError if one is not zero and must be."""
    names = [name for name in reader.shapes if name.endswith("shared_expert_gate.weight")]
    for name in names:
        if must_be_zero and reader.tensor(name).any():
            raise ValueError(
                f"{reader.name}: {name} weighs the shared expert by the token, and cpt_moe adds it with weight 1: "
                "only models whose gate is 0 can be converted."
            )
    return names
