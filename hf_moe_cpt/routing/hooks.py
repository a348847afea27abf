"""Find the routed experts of each layer of any mixture of experts, and the router that feeds them; count and listen.

Works on any mixture of transformers whose experts lie in one module, on ours, and through adapters and wrappers: a
router is what the model class records as `router_logits`, or, where it records none, the neighbour of the experts with
one row of weights for each. Shared experts belong to no layer.

Hooks on the experts see which experts were really run, whatever the router did to choose them; hooks on the routers
see the logits. The model is not edited, hooks live only inside a context, and nothing waits for the device.

Letters: B sequences, S tokens each, T tokens of a call, K experts per token, E routed experts. Source: ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_moe_cpt.machine import inner_model
from hf_moe_cpt.routing.metrics import router_distribution, router_entropy


# Parts of names by which PEFT hangs a module, or a trained copy of it, below its old place.
ADAPTER_LEVELS = ("base_layer", "original_module", "modules_to_save")
# Fields by which configurations of transformers tell E and K.
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k")


@dataclass(frozen=True)
class MoeLayer:
    """The routed experts of one layer and their router, with whatever an adapter has put around them."""

    name: str  # of the experts, as in named_modules
    experts: nn.Module
    num_experts: int  # E of this layer
    router_name: str
    router: nn.Module
    logits_index: int | None  # place of the logits in the router's output; None: the last tensor of width E


def find_experts(model: nn.Module) -> list[nn.Module]:
    """The experts module of each MoE layer in layer order; empty for a dense model."""
    return [module for module in model.modules() if _is_experts(module)]


def _is_experts(module: nn.Module) -> bool:
    if not hasattr(module, "num_experts"):
        return False
    return "top_k_index" in inspect.signature(type(module).forward).parameters or (
        getattr(module, "gate_up_proj", None) is not None and getattr(module, "down_proj", None) is not None
    )


def num_experts_of(experts: nn.Module) -> int:
    """E of an experts module, over all ranks.

    Under expert parallelism its `num_experts` is what the rank serves, because the implementations count by it; the
    sharded weights still know all of them.
    """
    if not getattr(experts, "_is_expert_parallel", False):
        return experts.num_experts
    return max(weight.shape[0] for weight in experts.parameters(recurse=False) if weight.ndim == 3)


def experts_per_token(config: PreTrainedConfig) -> int:
    """K of a MoE configuration, under whichever of the names in use; ValueError if there is none."""
    text_config = config.get_text_config()
    for name in EXPERTS_PER_TOKEN:
        if isinstance(value := getattr(text_config, name, None), int):
            return value
    raise ValueError(
        f"{type(config).__name__} names its experts per token by none of {', '.join(EXPERTS_PER_TOKEN)}: "
        "set `num_experts_per_tok` on the configuration."
    )


def active_parameters(model: nn.Module) -> int:
    """Parameters that one token multiplies with: no input embedding, and K of the E routed experts of each layer.

    A tied output head counts once, as the head. Positions in tables (embeddings) cost no multiplication.
    """
    experts = find_experts(model)
    inactive = 0
    if experts:
        chosen = experts_per_token(model.config)
        routed = [(sum(weight.numel() for weight in module.parameters()), module) for module in experts]
        inactive = sum(number * (1 - chosen / num_experts_of(module)) for number, module in routed)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    total = sum(parameter.numel() for parameter in model.parameters())
    return round(total - inactive) - (0 if tied else embedding.numel())


def moe_layers(model: nn.Module, lone_routers: bool = False) -> list[MoeLayer]:
    """Every MoE layer of a model, wrapped or not, in layer order; empty for a dense model.

    A router is what the model class records as `router_logits`, else the neighbour of the experts whose weight has one
    row for each of them. Shared experts belong to no layer. Raises ValueError for experts without a known router.
    lone_routers: also recorded routers whose experts are in no known form (JetMoE, LongCat): they are the `experts` of
    their layers, and are told by a `top_k` and one matrix, of E rows.
    """
    names = {id(module): name for name, module in model.named_modules()}
    num_experts = {_without_adapter(names[id(module)]): num_experts_of(module) for module in find_experts(model)}
    recorded = _recorded_routers(model, num_experts)
    layers = []
    for name, width in num_experts.items():
        router_name = _router_beside(name, recorded, num_experts) or _router_by_shape(model, name, width)
        experts, router = model.get_submodule(name), model.get_submodule(router_name)
        layers.append(MoeLayer(name, experts, width, router_name, router, recorded.get(router_name)))
    for name in recorded if lone_routers and not layers else ():
        router = model.get_submodule(name)
        rows = [weight.shape[0] for weight in router.parameters() if weight.ndim == 2]
        if hasattr(router, "top_k") and len(rows) == 1:
            layers.append(MoeLayer(name, router, rows[0], name, router, recorded[name]))
    return layers


@contextmanager
def listen(layers: Sequence[MoeLayer], hear: Callable[[int, Tensor, Tensor | None], None]) -> Iterator[None]:
    """Inside this context every call of a layer's experts is told to `hear(place, experts, logits)`.

    place: of the layer in `layers`. experts: (T, K) integers, those that were run. logits: (T, E) of the router's call
    since, with gradient if they have one; None if there was none.
    """
    logits_of: dict[int, Tensor] = {}

    def hear_router(place: int, module: nn.Module, args: tuple, output: Any) -> None:
        logits_of[place] = _logits_in(layers[place], output)

    def hear_experts(place: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        logits = logits_of.pop(place, None)
        hear(place, _experts_in(layers[place], args, kwargs, logits), logits)

    def hear_lone_router(place: int, module: nn.Module, args: tuple, output: Any) -> None:
        logits = _logits_in(layers[place], output)
        hear(place, _experts_in(layers[place], output, {}, logits), logits)

    with ExitStack() as hooks:
        for place, layer in enumerate(layers):
            if layer.experts is layer.router:
                hooks.callback(layer.router.register_forward_hook(partial(hear_lone_router, place)).remove)
                continue
            hooks.callback(layer.router.register_forward_hook(partial(hear_router, place)).remove)
            of_experts = layer.experts.register_forward_pre_hook(partial(hear_experts, place), with_kwargs=True)
            hooks.callback(of_experts.remove)
        yield


def _logits_in(layer: MoeLayer, output: Any) -> Tensor:
    """Logits (T, E) in what a layer's router returned, with gradient if it has one."""
    if isinstance(output, Tensor):
        found = output
    elif layer.logits_index is not None:
        found = output[layer.logits_index]
    else:
        found = [part for part in output if part.is_floating_point() and part.shape[-1] == layer.num_experts][-1]
    return found.flatten(0, -2)


def _experts_in(layer: MoeLayer, args: tuple, kwargs: dict[str, Any], logits: Tensor | None) -> Tensor:
    """The experts (T, K), integers, in what a layer's experts were called with. logits: those of its router before."""
    tensors = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)]
    given = [part for part in tensors if not part.is_floating_point() and part.ndim > 1]  # lists are sorted tokens
    if given:
        return given[0].detach().flatten(0, -2)
    # Llama 4: every expert gets every token, times a score that is 0 for all but the largest logits
    top_k = next(part.top_k for part in layer.router.modules() if hasattr(part, "top_k"))
    return logits.detach().topk(top_k).indices


def _recorded_routers(model: nn.Module, experts: Iterable[str]) -> dict[str, int]:
    """Name of each module that the model classes record as router -> place of the logits in its output.

    A recorded module with experts inside is a block, not a router.
    """
    records = [record for module in model.modules() for record in _records_of(module)]
    found = {}
    for name, module in model.named_modules():
        root = _without_adapter(name)
        if any(is_below(inner, root) for inner in experts):
            continue
        for target_class, index, layer_name in records:
            is_named = layer_name is None or f".{layer_name.strip('.')}." in f".{root}."
            if isinstance(module, target_class) and is_named:
                found[root] = index
    return found


def _records_of(module: nn.Module) -> list[tuple[type[nn.Module], int, str | None]]:
    """Where transformers says that router logits come from: class, place in its output, part of its name."""
    recorded = getattr(type(module), "_can_record_outputs", None)  # of the models of transformers
    specs = (recorded or {}).get("router_logits", [])
    specs = specs if isinstance(specs, list) else [specs]
    # a bare class stands for the second output of its modules
    records = [
        (getattr(spec, "target_class", spec), getattr(spec, "index", 1), getattr(spec, "layer_name", None))
        for spec in specs
    ]
    return [record for record in records if isinstance(record[0], type)]


def _router_beside(experts_name: str, recorded: Iterable[str], experts: Iterable[str]) -> str | None:
    """The recorded router in the smallest part of the model that holds these experts, unless it holds others too."""
    part = experts_name
    while "." in part:
        part = part.rpartition(".")[0]
        if sum(is_below(name, part) for name in experts) > 1:
            return None
        inside = [name for name in recorded if is_below(name, part)]
        if inside:
            return inside[-1]
    return None


def _router_by_shape(model: nn.Module, experts_name: str, num_experts: int) -> str:
    block_name = experts_name.rpartition(".")[0]
    for name, module in model.get_submodule(block_name).named_children():
        rows = [weight.shape[0] for weight in module.parameters() if weight.ndim == 2]
        if rows == [num_experts]:
            return f"{block_name}.{name}".lstrip(".")
    raise ValueError(
        f"The router of {experts_name} is not known: the model class must record it as router_logits in "
        "_can_record_outputs, or keep it beside the experts with a weight of one row for each."
    )


def _without_adapter(name: str) -> str:
    """The name of a module before an adapter was put around it."""
    parts = name.split(".")
    cut = min((place for place, part in enumerate(parts) if part in ADAPTER_LEVELS), default=len(parts))
    return ".".join(parts[:cut])


def checkpoints_reentrantly(model: nn.Module) -> bool:
    """Whether some layer is checkpointed with use_reentrant=True, which cuts what is heard off from the weights."""
    return any(
        getattr(module, "gradient_checkpointing", False)
        and getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant", False)
        for module in model.modules()
    )


def is_below(name: str, part: str) -> bool:
    """Whether the module `name` is `part` or inside of it; "" is the whole model."""
    return part == "" or name == part or name.startswith(f"{part}.")


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
        self._heard: dict[int, LayerRouting] = {}
        self._twice: set[int] = set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear the forward passes inside this context."""
        try:
            with listen(self.layers, self._hear):
                yield
        finally:
            self._heard = {}

    def take(self, num_tokens: int) -> list[LayerRouting]:
        """Routing of the one forward pass since the last call, of every layer over all num_tokens = B S positions.

        Raises ValueError if a layer did not run exactly once, or saw another number of tokens.
        """
        heard, self._heard = self._heard, {}
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

    def _hear(self, place: int, experts: Tensor, logits: Tensor | None) -> None:
        if place in self._heard:
            self._twice.add(place)
            return
        probabilities = entropy = None
        if self.with_probabilities and logits is not None:
            g = router_distribution(logits.detach())
            probabilities, entropy = g.gather(-1, experts.long()).half(), router_entropy(g).half()
        self._heard[place] = LayerRouting(experts.to(torch.int16), probabilities, entropy)


def layers_to_watch(model: nn.Module, lone_routers: bool = False) -> list[MoeLayer]:
    """`moe_layers`, or a ValueError that says why there are none: a dense model, or experts that are not known."""
    layers = moe_layers(model, lone_routers)
    if layers:
        return layers
    name, fields = type(inner_model(model)).__name__, expert_fields(model)
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


def expert_fields(model: nn.Module) -> dict[str, int]:
    """The numbers of experts that a model's configuration tells, by field; empty for a dense model."""
    config = getattr(inner_model(model), "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = {field: getattr(config, field, None) for field in EXPERT_FIELDS}
    return {field: value for field, value in values.items() if isinstance(value, int) and value > 1}
