"""Convert between `cpt_moe` and Mixtral, OLMoE, Qwen2-MoE or Qwen3-MoE, and to GLM-4-MoE and dense families.

Other names, the same numbers and logits.

Read and written shard by shard; what one side cannot express is refused before anything is written. The skeleton of a
decoder (embeddings, attention, norms, head, sizes, rotary positions) is what upcycling leaves alone as well. Names are
those of files (one matrix per expert), which other tools read too; a test compares them with what transformers writes.

E experts, K per token, S shared ones, L layers, H hidden size, m width of an expert, D size of a head, of which R
dimensions are rotated. Source: transformers'
configurations, modelling code and conversion mappings; docs/convert.md lists what fits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
    scaled,
    shapes_of,
    skeleton,
    write_weights,
)
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM
from hf_moe_cpt.reading import reading


MODEL_TYPES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "cpt_moe")  # both ways
DENSE = ("llama", "mistral", "qwen2", "qwen3")  # what a dense model can become; all names are ours
TARGETS = (*MODEL_TYPES, "glm4_moe", *DENSE)
SHARED_FIELDS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
    "max_position_embeddings rms_norm_eps attention_dropout tie_word_embeddings initializer_range use_cache "
    "pad_token_id bos_token_id eos_token_id dtype"
).split()
STILL = 1e30  # a factor of "longrope" that leaves a dimension unrotated: no angle is above 1e-24
# Of the gate on Qwen2-MoE's shared expert. Its sigmoid is 1/2 to the last bit of float32; llama.cpp's, silu(x) / x,
# has no value at 0. float16 knows no smaller ones.
FAINT_GATE, FAINT_GATE_FLOAT16 = 1e-9, 1e-6
DEAD_SHARED_WIDTH = 64  # at most; Qwen2-MoE always has a shared expert, and zeros of this width stand for none
_IS_ROTATED = re.compile(r"\.self_attn\.[qk]_(proj|norm)\.")
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
    "glm4_moe": Attention(),  # it could have biases and norms of heads; no model of ours with sigmoid gates has them
}
LLAMA_CPP_NORMALISES = {"qwen2_moe": False, "olmoe": False, "qwen3_moe": True}  # whatever norm_topk_prob says
HAS_HEAD_DIM = ("llama", "mistral", "mixtral", "qwen3", "qwen3_moe")  # others: hidden_size / num_attention_heads


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
    "glm4_moe": Family("mlp", "gate_proj", "up_proj", "down_proj"),
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
    if model_type == "qwen2" and not config.qkv_bias:
        raise ValueError("qkv_bias=False: qwen2 always has these biases; try llama.")
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

    Raises ValueError for LayerNorm, for sizes of heads and for attention that the family lacks.
    """
    if config.norm_type != "rmsnorm":
        raise ValueError(f"norm_type={config.norm_type!r}: {model_type} has RMSNorm and no biases.")
    if model_type not in HAS_HEAD_DIM and config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"head_dim={config.head_dim}: {model_type} has heads of hidden_size / num_attention_heads = "
            f"{config.hidden_size / config.num_attention_heads:g}."
        )
    rope = dict(config.rope_parameters) if model_type == "glm4_moe" else whole_head_rope(config, model_type)
    fields = {name: getattr(config, name) for name in SHARED_FIELDS} | {"rope_parameters": rope}
    fields |= {"head_dim": config.head_dim} if model_type in HAS_HEAD_DIM else {}
    fields |= foreign_attention_fields(config, model_type)
    if fields["initializer_range"] is None:  # our own initialisation, which no number stands for
        del fields["initializer_range"]
    return fields


def rotated_dimensions(config: CptMoeConfig) -> int:
    """R of the D dimensions of a head, the first ones."""
    return int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))


def whole_head_rope(config: CptMoeConfig, model_type: str) -> dict[str, Any]:
    """Rotary positions of a family that rotates whole heads, which stand still where ours rotate nothing.

    A part of each head is written as "longrope": D / 2 factors on the frequencies, `STILL` for what is not rotated.
    `head_order` puts the dimensions in the place that it means. Raises ValueError for a part under another rope_type.
    """
    rope, D, R = dict(config.rope_parameters), config.head_dim, rotated_dimensions(config)
    part = rope.pop("partial_rotary_factor", 1.0)
    if R == D:
        return rope
    if rope["rope_type"] != "default":
        raise ValueError(
            f"partial_rotary_factor={part} with rope_type={rope['rope_type']!r}: {model_type} rotates whole heads, "
            "and its longrope can stand for a part only of rope_type='default'; train with partial_rotary_factor 1.0."
        )
    theta, context = rope["rope_theta"], config.max_position_embeddings
    factors = [theta ** (2 * i / R - 2 * i / D) for i in range(R // 2)] + [STILL] * ((D - R) // 2)
    rope |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
    return rope | {"factor": 1.0, "attention_factor": 1.0, "original_max_position_embeddings": context}


def head_order(config: CptMoeConfig, model_type: str) -> torch.Tensor | None:
    """(D,) which of our dimensions of a head stands where under `whole_head_rope`; None if all stay.

    Partners of a rotation lie R / 2 apart in ours and D / 2 apart there.
    """
    D, R = config.head_dim, rotated_dimensions(config)
    if R == D or model_type == "glm4_moe":
        return None
    first, second, kept = torch.arange(D).split((R // 2, R // 2, D - R))
    return torch.cat((first, kept[: (D - R) // 2], second, kept[(D - R) // 2 :]))


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
    if config.is_moe and model_type in DENSE:
        raise ValueError(f"num_experts={config.num_experts}: {model_type} is dense; choose another family.")
    if not config.is_moe and model_type not in DENSE:
        raise ValueError(
            f"num_experts=0: a dense model has no place in {model_type}; choose one of {', '.join(DENSE)}, or upcycle "
            "it first."
        )
    if config.is_moe and config.has_sigmoid_gates != (model_type == "glm4_moe"):
        gates, other = ("sigmoid", "glm4_moe") if config.has_sigmoid_gates else ("softmax", "qwen2_moe")
        raise ValueError(
            f"router_type={config.router_type!r} with num_experts_per_tok={config.num_experts_per_tok}: {model_type} "
            f"has no {gates} gates; try {other}."
        )
    fields = foreign_fields(config, model_type)
    if not config.is_moe:
        return AutoConfig.for_model(model_type, **fields, intermediate_size=config.intermediate_size)
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


def serving_obstacles(config: CptMoeConfig, model_type: str) -> list[str]:
    """What keeps servers other than transformers from running a converted model right; docs/serving.md.

    Raises ValueError for a model that does not convert.
    """
    config_to(config, model_type)
    obstacles = []
    if config.hidden_act not in ("silu", "swish"):
        obstacles.append(
            f"hidden_act={config.hidden_act!r}: llama.cpp and vLLM's models run SiLU without a word; train with "
            "hidden_act='silu', as the presets that end in -silu do"
        )
    if head_order(config, model_type) is not None:
        part = config.rope_parameters["partial_rotary_factor"]
        obstacles.append(
            f"partial_rotary_factor={part}: llama.cpp does not read the longrope factors that stand for it in "
            f"{model_type}; train with 1.0, as the presets that end in -silu do"
        )
    if config.tie_word_embeddings and model_type in ("qwen2_moe", "olmoe"):
        obstacles.append(
            f"tie_word_embeddings=True: llama.cpp loads no {model_type} without an output matrix of its own"
        )
    if config.norm_topk_prob != LLAMA_CPP_NORMALISES.get(model_type, config.norm_topk_prob):
        obstacles.append(
            f"norm_topk_prob={config.norm_topk_prob}: llama.cpp runs every {model_type} as if it were "
            f"{not config.norm_topk_prob}; train with that, or for another family"
        )
    return obstacles


def check_servable(config: PreTrainedConfig, model_type: str) -> None:
    """Raise ValueError, in one line, for a setting that would keep a model of ours from being served as a family."""
    if not isinstance(config, CptMoeConfig):
        raise ValueError(f"--serve_as is for cpt_moe, and this is {config.model_type!r}: leave it out.")
    if obstacles := serving_obstacles(config, model_type):
        raise ValueError(f"--serve_as {model_type}: {'; '.join(obstacles)}.")


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
    if model_type == "glm4_moe":
        # vLLM asks for head_dim
        names = "intermediate_size moe_intermediate_size norm_topk_prob routed_scaling_factor head_dim".split()
        fields = {name: getattr(config, name) for name in names}
        fields |= {"n_routed_experts": config.num_experts, "n_shared_experts": config.num_shared_experts or 1}
        return fields | {"first_k_dense_replace": 0, "num_mtp_layers": 0, "use_qk_norm": False}
    if config.num_shared_experts and model_type != "qwen2_moe":
        raise ValueError(f"num_shared_experts={config.num_shared_experts}: {model_type} has none; try qwen2_moe.")
    if model_type == "mixtral" and not config.norm_topk_prob:
        raise ValueError("norm_topk_prob=False: mixtral divides gates by their sum; try qwen2_moe.")
    has_one_width, width = model_type in ("mixtral", "olmoe"), config.moe_intermediate_size
    fields = {"num_local_experts" if model_type == "mixtral" else "num_experts": config.num_experts}
    fields |= {"intermediate_size": width if has_one_width else config.intermediate_size}
    fields |= {} if has_one_width else {"moe_intermediate_size": width}
    fields |= {} if model_type == "mixtral" else {"norm_topk_prob": config.norm_topk_prob}
    if model_type == "qwen2_moe":
        fields["shared_expert_intermediate_size"] = config.num_shared_experts * width or min(DEAD_SHARED_WIDTH, width)
    return fields


@dataclass(frozen=True)
class Converted:
    """What was made. notes: what training further will do otherwise than before. obstacles: `serving_obstacles`."""

    folder: Path
    config: PreTrainedConfig
    notes: tuple[str, ...]
    obstacles: tuple[str, ...]
    leftovers: tuple[Path, ...]


def convert(
    source: str | Path,
    output_dir: str | Path,
    to: str,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    revision: str | None = None,
) -> Converted:
    """Write a checkpoint as one of another family, into a new folder.

    source: a folder or a Hub id, revision: of the latter. to: one of `TARGETS`; one side must be cpt_moe. Raises
    ValueError, in one line and before anything is written, for what the other family cannot compute.
    """
    if to not in TARGETS:
        raise ValueError(f"--to {to!r} is unknown: choose one of {', '.join(TARGETS)}.")
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
            notes, obstacles = [f"router_jitter_noise={jitter} has no counterpart"] if jitter else [], []
        else:
            config, plan, used = _plan_to(reader, to)
            notes, obstacles = lost_in_training(reader.config), serving_obstacles(reader.config, to)
            factor = reader.config.routed_scaling_factor
            if to != "glm4_moe" and math.frexp(factor)[0] != 0.5:  # a power of two rounds nothing
                obstacles.append(f"routed_scaling_factor={factor} is written into weights, which rounds them once")
        refuse_unused(reader, plan, used)
        model = empty_model(config)
    write_checkpoint(reader, plan, model, output, max_shard_size)
    return Converted(output, config, tuple(notes), tuple(obstacles), tuple(leftovers(output)))


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
    ours = reader.config
    config, model, order = config_to(ours, to), empty_model(ours), head_order(ours, to)
    plan = skeleton(reader, model)
    if order is not None:
        plan = [_reordered(tensor, order) if _IS_ROTATED.search(tensor.name) else tensor for tensor in plan]
    if to in DENSE:
        return config, plan + [copied(reader, *item) for item in shapes_of(model).items() if ".mlp." in item[0]], []
    family = FAMILIES[to]
    for layer in range(ours.num_hidden_layers):
        block, mlp = f"model.layers.{layer}.{family.block}.", f"model.layers.{layer}.mlp."
        router = copied(reader, f"{mlp}gate.weight", (ours.num_experts, ours.hidden_size), f"{block}gate.weight")
        plan.append(router)
        factor = 1.0 if to == "glm4_moe" else ours.routed_scaling_factor
        plan += _single_experts(reader, ours, family, layer, factor)
        if to == "qwen2_moe":
            plan += _qwen2_shared_expert(reader, ours, config.shared_expert_intermediate_size, mlp, router.dtype)
        elif to == "glm4_moe":
            plan += _glm4_router_and_shared_experts(reader, ours, mlp, router.dtype)
    return config, plan, []


def _reordered(planned: PlannedTensor, order: torch.Tensor) -> PlannedTensor:
    """A tensor whose first dimension is heads x D, with the dimensions of each head in another order."""

    def pieces() -> Iterator[torch.Tensor]:
        return (piece.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1) for piece in planned.pieces())

    return replace(planned, pieces=pieces)


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


def _single_experts(
    reader: CheckpointReader, config: CptMoeConfig, family: Family, layer: int, factor: float
) -> list[PlannedTensor]:
    """(E, 2m, H) and (E, H, m) -> (m, H), (m, H) and, times the factor, (H, m) of each expert."""
    E, H, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
    gate_up, down = (f"model.layers.{layer}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
    dtype = reader.require(gate_up, (E, 2 * width, H))
    reader.require(down, (E, H, width))

    def half(expert: int, which: int) -> Iterator[torch.Tensor]:
        yield reader.row(gate_up, expert).chunk(2)[which]

    def out(expert: int) -> Iterator[torch.Tensor]:
        yield scaled(reader.row(down, expert), factor)

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
    """Qwen2-MoE's shared expert under its sigmoid gate: a faint gate is the constant 1/2, undone by a factor of 2.

    Without shared experts it is zeros, which stay zero in training too.
    """
    H = config.hidden_size
    faint = FAINT_GATE_FLOAT16 if dtype == torch.float16 else FAINT_GATE
    plan = [constant(f"{mlp}shared_expert_gate.weight", (1, H), dtype, faint)]
    for matrix, shape, factor in _shared_matrices(width, H, 2.0):
        name = f"{mlp}shared_expert.{matrix}.weight"
        if config.num_shared_experts:
            plan.append(copied(reader, f"{mlp}shared_experts.{matrix}.weight", shape, name, factor))
        else:
            plan.append(constant(name, shape, dtype))
    return plan


def _glm4_router_and_shared_experts(
    reader: CheckpointReader, config: CptMoeConfig, mlp: str, dtype: torch.dtype
) -> list[PlannedTensor]:
    """The bias on the choice of experts, zeros where ours has none, and the shared experts; none are one of zeros."""
    bias, shape = f"{mlp}gate.e_score_correction_bias", (config.num_experts,)
    has_bias, has_shared = config.router_type == "bias_topk", config.num_shared_experts > 0
    plan = [copied(reader, bias, shape) if has_bias else constant(bias, shape, torch.float32)]
    width = max(config.num_shared_experts, 1) * config.moe_intermediate_size
    for matrix, shape, _ in _shared_matrices(width, config.hidden_size, 1.0):
        name = f"{mlp}shared_experts.{matrix}.weight"
        plan.append(copied(reader, name, shape) if has_shared else constant(name, shape, dtype))
    return plan


def _shared_gates(reader: CheckpointReader, must_be_zero: bool) -> list[str]:
    """Names of the gates on Qwen2-MoE's shared experts; raises ValueError if one is not zero and must be."""
    names = [name for name in reader.shapes if name.endswith("shared_expert_gate.weight")]
    for name in names:
        if must_be_zero and reader.tensor(name).abs().max() > 1.1 * FAINT_GATE_FLOAT16:
            raise ValueError(
                f"{reader.name}: {name} weighs the shared expert by the token, and cpt_moe adds it with weight 1: "
                "only models whose gate is 0 can be converted."
            )
    return names
