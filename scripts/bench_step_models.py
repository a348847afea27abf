"""The models whose training steps are compared: our presets and stock models of transformers at the same sizes.

A run is written `model:switch:switch`, such as `pb-granular-2b:fused:hf_moe_cpt`; a word that is no switch names an
experts implementation. Source: ours.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe_cpt.extras import require
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.presets_cpt_moe import PRESETS
from hf_moe_cpt.scripts.benchmark_tools import Unavailable


SWITCHES = {
    "fused": ("fused", True),
    "plain": ("fused", False),
    "compile": ("compile", True),
    "checkpointing": ("checkpointing", True),
}


@dataclass(frozen=True)
class StepRun:
    """One model and how it computes. experts: the experts implementation, "" in a dense model."""

    name: str
    model: str
    experts: str
    fused: bool
    compile: bool
    checkpointing: bool


def parse_run(text: str, default: StepRun) -> StepRun:
    """A run from `model:switch:switch`; what it does not say is as in `default`. Raises ValueError."""
    model, *words = text.split(":")
    if model not in MODELS:
        raise ValueError(f"--runs {text!r}: no model {model!r}; choose from {', '.join(MODELS)}.")
    run = replace(default, name=text, model=model)
    for word in words:
        if word in SWITCHES:
            run = replace(run, **dict([SWITCHES[word]]))
        else:
            check_experts(f"--runs {text!r}", word)
            run = replace(run, experts=word)
    is_dense = not getattr(config_of(model), "num_experts", getattr(config_of(model), "num_local_experts", 0))
    return replace(run, experts="") if is_dense else run


def check_experts(option: str, name: str) -> None:
    """Raise ValueError unless an experts implementation of this name could exist.

    Ours is checked when the run is made: where it is not registered the run fails and the others go on.
    """
    known = ["eager", *ALL_EXPERTS_FUNCTIONS.keys()]
    if name not in known and not name.startswith("hf_moe_cpt"):
        raise ValueError(
            f"{option}: {name!r} is neither a switch ({', '.join(SWITCHES)}) nor an experts implementation "
            f"({', '.join(known)})."
        )


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


STOCK: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama-570m": lambda: _llama("dense-570m"),
    "qwen2-moe-granular-2b": lambda: _qwen2_moe("pb-granular-2b"),
    "mixtral-switch-2b": lambda: _mixtral("pb-switch-2b"),
    "llama-tiny": lambda: _llama("dense-tiny"),
    "qwen2-moe-granular-tiny": lambda: _qwen2_moe("pb-granular-tiny"),
    "mixtral-switch-tiny": lambda: _mixtral("pb-switch-tiny"),
}
MODELS = (*PRESETS, *STOCK)


def config_of(model: str) -> PreTrainedConfig:
    """A fresh configuration of a model named in `MODELS`."""
    return STOCK[model]() if model in STOCK else CptMoeConfig.from_preset(model)


def build_model(run: StepRun, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Fresh weights of one run on the device, ready to train."""
    if run.experts.startswith("hf_moe_cpt"):
        _require_our_experts(run.experts)
    experts = {"experts_implementation": run.experts} if run.experts else {}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config_of(run.model), dtype=dtype, attn_implementation="sdpa", **experts
        )
    model.train()
    if run.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if run.fused:
        fuse(model, device)
    return model


def _require_our_experts(name: str) -> None:
    if name not in ALL_EXPERTS_FUNCTIONS:
        raise Unavailable(f"{name!r} is not registered with transformers' experts interface")


def our_experts_fall_back(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why our experts implementation would hand this model to grouped_mm, whose time is not ours; None if it runs."""
    implementation = importlib.import_module("hf_moe_cpt.kernels.experts_implementation")
    modules = [module for module in model.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "has_gate")]
    reasons = (implementation.why_unsupported(module, device, dtype) for module in modules)
    return next((reason for reason in reasons if reason is not None), None)


def fuse(model: PreTrainedModel, device: torch.device) -> None:
    """Our models: Liger's norms and rotation with our fused head. Others: what Liger does to them by default.

    Liger puts experts of its own into Mixtral, whatever the experts implementation.
    """
    if device.type != "cuda":
        raise Unavailable("fused kernels need a CUDA device")
    model_type = model.config.model_type
    if model_type == "cpt_moe":
        importlib.import_module("hf_moe_cpt.kernels.liger").apply_liger_kernel_to_cpt_moe(model=model)
        return
    require("liger_kernel", needed_by="fused")
    table = importlib.import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    if model_type not in table:
        raise Unavailable(f"Liger has no kernels for the model type {model_type}")
    table[model_type](model=model)


@contextmanager
def classes_kept(model: str) -> Iterator[None]:
    """Undo on leaving what Liger changed in the module of a stock model, for the sake of the runs after it."""
    if model not in STOCK:
        yield
        return
    model_type = config_of(model).model_type
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)
