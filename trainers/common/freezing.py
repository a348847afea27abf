"""What of a model is not trained: parts of any causal LM, found through an adapter and kept frozen. Source: ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from transformers.hf_argparser import HfArg

from hf_moe_cpt.machine import inner_model
from hf_moe_cpt.routing.hooks import is_below, moe_layers


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
