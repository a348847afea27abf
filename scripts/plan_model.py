"""What a plan needs to know of a model: its parameters by part, and what its layers keep, without any weights.

Source: ours. Both are counted on tensors without memory, as in analysis/kept_tensors.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from hf_moe_cpt.analysis.kept_tensors import KeptBytes, count_kept
from hf_moe_cpt.analysis.training_memory import ModelSize
from hf_moe_cpt.modeling.presets_cpt_moe import PRESETS
from hf_moe_cpt.scripts.bench_step_models import STOCK, config_of
from hf_moe_cpt.scripts.plan_counted import ATTENTION, EXPERTS_OF, fuse_counted, register_counted


def read_config(preset: str | None, model: str | None) -> PreTrainedConfig:
    """The configuration of a preset, or of a folder or name on the Hub. Raises ValueError for an unknown preset."""
    if preset is not None:
        if preset not in (*PRESETS, *STOCK):
            raise ValueError(f"--preset {preset!r} is unknown: choose from {', '.join((*PRESETS, *STOCK))}.")
        return config_of(preset)
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"--model {model!r} is a folder without config.json: give one that a model was saved in.")
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--model {model!r} has no configuration that can be read: {reason}") from error


def measure_size(config: PreTrainedConfig, name: str) -> ModelSize:
    """Count parameters on a model without weights. Raises ValueError for what is no causal language model."""
    text = config.get_text_config()
    if not getattr(text, "num_attention_heads", 0):
        raise ValueError(f"{name} ({config.model_type}) has no attention heads: only models with them are planned.")
    with FakeTensorMode():
        model = _from_config(config, **_experts_option(config, "grouped_mm"))
    layers = layers_of(model)
    experts = [part for layer in layers for part in _expert_modules(layer)]
    num_experts = max((_num_experts(part) for part in experts), default=0)
    chosen = getattr(text, "num_experts_per_tok", None) or 0
    in_experts = sum(_count(part) for part in experts)
    in_embedding, in_head = _count(model.get_input_embeddings()), _count(model.get_output_embeddings())
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    unlooked = model.num_parameters() - in_embedding + (in_head if is_tied else 0)
    idle = sum(_count(part) * (1 - chosen / _num_experts(part)) for part in experts) if chosen else 0
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelSize(
        name=name,
        total=model.num_parameters(),
        embedding=in_embedding,
        head=in_head,
        layers=tuple(_count(layer) for layer in layers),
        experts=in_experts,
        active=round(unlooked - idle),
        num_experts=num_experts,
        experts_per_token=chosen,
        vocab_size=model.get_output_embeddings().weight.shape[0],
        hidden_size=text.hidden_size,
        attention_width=text.num_attention_heads * head_dim,
        is_tied=is_tied,
    )


def measure_kept(config: PreTrainedConfig, sequence_length: int, precision: str, kernels: str) -> KeptBytes:
    """What the decoder keeps for the backward pass.

    precision: "mixed" (float32 weights under bfloat16 autocast) or "bfloat16". kernels: one of
    analysis/training_memory.py's.
    """
    register_counted()
    experts = EXPERTS_OF["grouped_mm" if kernels == "plain" else "hf_moe_cpt"]

    def build() -> nn.Module:
        dtype = torch.float32 if precision == "mixed" else torch.bfloat16
        model = _from_config(config, dtype=dtype, attn_implementation=ATTENTION, **_experts_option(config, experts))
        if kernels == "fused":
            fuse_counted(model)
        return model.base_model.train()

    try:
        return count_kept(build, layers_of, sequence_length, torch.bfloat16 if precision == "mixed" else None)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"What {config.model_type} keeps for its backward pass cannot be counted without running it "
            f"({type(error).__name__}: {reason}): measure a step of it instead."
        ) from error


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The repeated layers, in order: what is checkpointed, and what FSDP gathers at a time."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _from_config(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoModelForCausalLM.from_config(config, **options)
    finally:
        logging.set_verbosity(before)


def _experts_option(config: PreTrainedConfig, name: str) -> dict[str, str]:
    """Dense models refuse the option."""
    text = config.get_text_config()
    has_experts = any(getattr(text, field, 0) for field in ("num_experts", "num_local_experts", "n_routed_experts"))
    return {"experts_implementation": name} if has_experts else {}


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _expert_modules(layer: nn.Module) -> list[nn.Module]:
    """Modules that hold the routed experts of a layer as parameters with experts in front."""
    return [
        module
        for module in layer.modules()
        if hasattr(module, "gate_up_proj")
        and hasattr(module, "down_proj")
        and isinstance(module.gate_up_proj, nn.Parameter)
        and module.gate_up_proj.ndim == 3
    ]


def _num_experts(experts: nn.Module) -> int:
    return experts.gate_up_proj.shape[0]
