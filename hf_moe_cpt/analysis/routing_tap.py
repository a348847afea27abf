"""Listen to the routers of any mixture of experts while it runs: chosen experts, their probabilities, the entropy.

Hooks on the experts see which experts were really run, whatever the router did to choose them; hooks on the routers
see the logits. The model is not edited, and hooks live only inside the context. Nothing waits for the device.

Letters: B sequences, S tokens each, T tokens that count, K experts per token, E routed experts. Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_moe_cpt.analysis.moe_layers import MoeLayer, experts_in, logits_in, moe_layers
from hf_moe_cpt.analysis.router_certainty import router_distribution, router_entropy


# Fields by which configurations of transformers tell how many experts there are.
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")


@dataclass(frozen=True)
class LayerRouting:
    """What one layer did with a batch, on its device."""

    experts: Tensor  # (B S, K) int16
    probabilities: Tensor | None  # (B S, K) float16
    entropy: Tensor | None  # (B S,) float16, over log E


class RoutingTap:
    """Routing of every forward pass inside `listening`, taken away by `take`; with_probabilities costs a softmax."""

    def __init__(self, model: nn.Module, with_probabilities: bool = True) -> None:
        self.layers = layers_to_watch(model)
        self.with_probabilities = with_probabilities
        self._logits: dict[int, Tensor] = {}
        self._heard: dict[int, LayerRouting] = {}
        self._twice: set[int] = set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear the forward passes inside this context."""
        handles: list[RemovableHandle] = []
        for place, layer in enumerate(self.layers):
            handles.append(layer.router.register_forward_hook(partial(self._hear_router, place)))
            hook = partial(self._hear_experts, place)
            handles.append(layer.experts.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._logits, self._heard = {}, {}

    def take(self, num_tokens: int) -> list[LayerRouting]:
        """Routing of the one forward pass since the last call, of every layer over all num_tokens = B S positions.

        Raises ValueError if a layer did not run exactly once, or saw another number of tokens.
        """
        heard, self._heard, self._logits = self._heard, {}, {}
        twice, self._twice = self._twice, set()
        for place, layer in enumerate(self.layers):
            if place not in heard or place in twice:
                times = "not at all" if place not in heard else "more than once"
                raise ValueError(f"The MoE layer {layer.name} ran {times} in one pass: its routing cannot be traced.")
            if len(heard[place].experts) != num_tokens:
                raise ValueError(
                    f"The MoE layer {layer.name} saw {len(heard[place].experts)} tokens of a batch of {num_tokens}: "
                    "its routing cannot be told apart by token."
                )
            if self.with_probabilities and heard[place].entropy is None:
                raise ValueError(
                    f"The router {layer.router_name} did not run before its experts: trace without probabilities."
                )
        return [heard[place] for place in range(len(self.layers))]

    def _hear_router(self, place: int, module: nn.Module, args: tuple, output: Any) -> None:
        self._logits[place] = logits_in(self.layers[place], output).detach()

    def _hear_experts(self, place: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if place in self._heard:
            self._twice.add(place)
            return
        layer, logits = self.layers[place], self._logits.pop(place, None)
        index = experts_in(layer, args, kwargs, logits)
        if not self.with_probabilities or logits is None:
            self._heard[place] = LayerRouting(index.to(torch.int16), None, None)
            return
        g = router_distribution(logits)
        self._heard[place] = LayerRouting(
            index.to(torch.int16), g.gather(-1, index.long()).half(), router_entropy(g).half()
        )


def layers_to_watch(model: nn.Module) -> list[MoeLayer]:
    """`moe_layers`, or a ValueError that says why there are none: a dense model, or experts that are not known."""
    layers = moe_layers(model)
    if layers:
        return layers
    name, fields = type(inner_model(model)).__name__, _expert_fields(model)
    if not fields:
        raise ValueError(
            f"{name} is a dense model: routing needs a mixture of experts, and neither experts in its modules nor "
            f"a number of experts in its configuration ({', '.join(EXPERT_FIELDS)}) were found."
        )
    told = ", ".join(f"{field}={value}" for field, value in fields.items())
    raise ValueError(
        f"{name} says {told}, but its experts and routers were not found: looked for modules with num_experts whose "
        "forward takes top_k_index, or that have num_experts, gate_up_proj and down_proj. Load it with a version of "
        "transformers that has such modules for it."
    )


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers and adapters."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _expert_fields(model: nn.Module) -> dict[str, int]:
    config = getattr(inner_model(model), "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = {field: getattr(config, field, None) for field in EXPERT_FIELDS}
    return {field: value for field, value in values.items() if isinstance(value, int) and value > 1}
