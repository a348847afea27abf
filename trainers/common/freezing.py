"""What of a model is not trained: parts of any causal LM, found through an adapter, frozen or quantised.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import BitsAndBytesConfig
from transformers.hf_argparser import HfArg

from hf_moe_cpt.extras import require
from hf_moe_cpt.machine import inner_model
from hf_moe_cpt.modeling.modeling_cpt_moe import dtype_of_autocast
from hf_moe_cpt.routing.hooks import find_experts, is_below, moe_layers


PARTS = ("router", "experts", "embeddings", "head", "norms")


@dataclass
class FreezeArguments:
    """What is not trained. A mixin before `TrainingArguments`."""

    freeze: list[str] | None = HfArg(
        default=None, help=f"Parts that are not trained: {', '.join(PARTS)}, or names of modules such as self_attn."
    )


def freeze(model: nn.Module, parts: Iterable[str]) -> None:
    """Stop training parts of a model, adapters on them included.

    parts: of PARTS, or names of modules as they stand in the model, such as self_attn or layers.0.mlp. Raises
    ValueError for a part that the model does not have, and where nothing is left to train.
    """
    parts = list(parts)
    for part in parts:
        roots = _modules_of(model, part)
        if not roots:
            raise ValueError(
                f"{part!r} is no part of {type(inner_model(model)).__name__} that could be frozen: choose from "
                f"{', '.join(PARTS)}, or name its modules, such as self_attn."
            )
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if any(is_below(name, root) for root in roots):
                parameter.requires_grad_(False)
    if parts and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"Nothing is left to train when {', '.join(parts)} is frozen: freeze less.")


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Every parameter has its requires_grad again afterwards: PEFT trains all of an adapter that it switches on."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, was_trained in trained:
            parameter.requires_grad_(was_trained)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module has its mode, and every parameter its requires_grad, again after this context."""
    modes = [(module, module.training) for module in model.modules()]
    with gradients_kept(model):
        try:
            yield
        finally:
            for module, was_training in modes:
                module.training = was_training


def _modules_of(model: nn.Module, part: str) -> list[str]:
    """Names of the modules that make up a part."""
    if part in ("router", "experts"):
        return [layer.router_name if part == "router" else layer.name for layer in moe_layers(model)]
    if part in ("embeddings", "head"):
        module = model.get_input_embeddings() if part == "embeddings" else model.get_output_embeddings()
        return [name for name, other in model.named_modules() if other is module]
    if part == "norms":
        return [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    return [name for name, _ in model.named_modules() if f".{name}.".endswith(f".{part}.")]


def quantise_experts(model: nn.Module, config: BitsAndBytesConfig | None = None) -> None:
    """Quantise the fused experts (E, ...) of a mixture in place, which transformers' quantisers pass over.

    model: with its adapter, if it gets one. config: by default the one that the model was loaded with; without one, in
    a dense model, and where it was done already, nothing happens. Weights are frozen, and are whole, in the type that
    they had, only while their layer runs; with gradients that is until the backward pass unless layers are
    checkpointed. `save_pretrained` of the model writes them rounded, in that type; of an adapter, the adapter alone.
    Raises ValueError for experts that are dealt to ranks, ImportError without bitsandbytes.
    """
    config = config or getattr(getattr(inner_model(model), "config", None), "quantization_config", None)
    if not isinstance(config, BitsAndBytesConfig):
        return
    held: set[int] = set()
    for experts in find_experts(model):
        if getattr(experts, "_is_expert_parallel", False):
            raise ValueError("Experts that are dealt to ranks cannot be quantised: leave out one of the two.")
        if not isinstance(experts.forward, _QuantisedForward):
            experts.forward = _QuantisedForward(experts, config)
            experts.register_state_dict_post_hook(_write_whole)
        held |= {id(tensor) for tensor in experts.forward.tensors()}
    named = [*model.named_parameters(), *model.named_buffers()]
    model._ddp_params_and_buffers_to_ignore = [name for name, tensor in named if id(tensor) in held]


class _QuantisedForward:
    """Forward of experts whose weights lie in buffers, in bitsandbytes' blocks.

    In the place of each stands one number that is repeated without memory: who counts or adapts weights sees shape and
    type. What is written there (a merged adapter) would be lost, and is refused.
    """

    def __init__(self, experts: nn.Module, config: BitsAndBytesConfig) -> None:
        self.experts, self.plain_forward, self.config = experts, experts.forward, config
        functional = self._functional()
        self.states: dict[str, Any] = {}
        self.places: dict[str, nn.Parameter] = {}
        for name, weight in list(experts.named_parameters(recurse=False)):
            if weight.ndim != 3:
                continue
            flat = weight.data.flatten()  # on a CPU bitsandbytes undoes rows narrower than a block wrongly
            if config.load_in_4bit:
                options = {"quant_type": config.bnb_4bit_quant_type}
                options["compress_statistics"] = config.bnb_4bit_use_double_quant
                codes, state = functional.quantize_4bit(flat, **options)
            else:
                codes, state = functional.quantize_blockwise(flat)
            experts.register_buffer(f"{name}_quantised", codes, persistent=False)
            self.states[name], self.places[name] = state, weight.requires_grad_(False)
            weight.data = flat[:1].clone().view(1, 1, 1).expand(weight.shape)

    @staticmethod
    def _functional() -> Any:  # not kept: modules of Python are not copied
        return require("bitsandbytes", needed_by="quantised experts").functional

    def tensors(self) -> list[torch.Tensor]:
        """What stands for weights, and the codes."""
        return [*self.places.values(), *(getattr(self.experts, f"{name}_quantised") for name in self.states)]

    @torch.no_grad()
    def whole(self, name: str) -> torch.Tensor:
        """A weight (E, ...) in the type that it had."""
        codes, state = getattr(self.experts, f"{name}_quantised"), self.states[name]
        state.to(codes.device)
        functional = self._functional()
        undo = functional.dequantize_4bit if self.config.load_in_4bit else functional.dequantize_blockwise
        return undo(codes, state).to(state.dtype).view(self.places[name].shape)

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The experts' own forward, weights whole meanwhile, in autocast's type unless an adapter adds to them."""
        if any(place.stride(0) for place in self.places.values()):
            raise ValueError(
                "Something was written into quantised experts, such as a merged adapter, and is not computed with: "
                "merge it into the model loaded without quantisation."
            )
        given = {}
        for name in self.states:
            is_adapted = is_parametrized(self.experts, name)  # by peft, inside of its own forward
            holder, key = (self.experts.parametrizations[name], "original") if is_adapted else (self.experts, name)
            dtype = None if is_adapted else dtype_of_autocast(hidden_states.device.type)
            given[name] = (holder._parameters, key, holder._parameters[key])
            holder._parameters[key] = nn.Parameter(self.whole(name).to(dtype=dtype), requires_grad=False)
        try:
            return self.plain_forward(hidden_states, *args, **kwargs)
        finally:
            for parameters, key, place in given.values():
                parameters[key] = place


def _write_whole(experts: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """A hook on `state_dict`: what is saved is what is computed with. Of peft's models only the adapter is saved."""
    if not prefix.startswith("base_model."):
        state.update({f"{prefix}{name}": experts.forward.whole(name).cpu() for name in experts.forward.states})
