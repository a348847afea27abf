"""Routers of any mixture of experts: found, frozen, listened to, and compared with what they were before surgery.

Forgetting has a short cut in such a model: the router sends tokens elsewhere, and the experts that knew keep what
they know. Selections drift even with frozen routers, because the layers below change what a router sees.

    g = softmax(z)                                     what every formula here calls the router's distribution
    router_kl          mean over layers and tokens of KL(g_before || g) = sum_e g_before (ln g_before - ln g)
    selection_overlap  mean over tokens of |A n B| / K

z are logits before any bias or group limit that a router chooses by. Where gates are sigmoids of z (DeepSeek-V3), g
has the same order of experts, and does not see a constant that is added to all logits of a token.

Letters: L MoE layers, T = B S tokens of a batch, E routed experts, K experts per token; A, B the experts that a token
chose. Source: Zhuang et al. 2025 (SEUF, arXiv 2411.18797) for the drift of selections; the KL is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_moe_cpt.analysis.moe_layers import MoeLayer, experts_in, is_below, logits_in, moe_layers
from hf_moe_cpt.trainers.instruments.ranks import has_process_group
from hf_moe_cpt.trainers.surgery.model_pass import run_model


def find_routers(model: nn.Module) -> list[nn.Module]:
    """The router of each MoE layer in layer order, with its adapter if it has one; empty for a dense model."""
    return [layer.router for layer in moe_layers(model)]


def freeze_routers(model: nn.Module) -> int:
    """Stop training every router, its adapter included; returns how many. Raises ValueError for a dense model."""
    layers = _layers_of_moe(model, "freeze_router")
    for layer in layers:
        for name, parameter in model.named_parameters():
            if is_below(name, layer.router_name):
                parameter.requires_grad_(False)
    return len(layers)


@dataclass
class Routing:
    """What the routers of one forward pass did, lists over the L layers in the order in which they ran."""

    logits: list[Tensor]  # (T, E), with gradient where the pass has one
    selected: list[Tensor]  # (T, K) int64, the experts that were run


class RouterTap:
    """Records the routing of a forward pass: `with tap.record() as routing: model(...)`.

    The model may be wrapped (DistributedDataParallel) or carry an adapter. Hooks live only inside the context, so that
    copies of the model stay untapped. Raises ValueError for a dense model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = _layers_of_moe(model, "A record of the routing")

    @contextmanager
    def record(self) -> Iterator[Routing]:
        """The routing of the first forward pass inside this context; later ones, recomputation too, are not seen.

        Raises ValueError if a layer did not run, and for reentrant gradient checkpointing, whose first pass builds no
        graph that a gradient could take from the logits to the router.
        """
        if torch.is_grad_enabled():
            _refuse_reentrant(self.model)
        routing = Routing([], [])
        handles: list[RemovableHandle] = []
        for place, layer in enumerate(self.layers):
            keep_logits = partial(_keep_logits, routing, place, layer)
            keep_selected = partial(_keep_selected, routing, place, layer)
            handles.append(layer.router.register_forward_hook(keep_logits))
            handles.append(layer.experts.register_forward_pre_hook(keep_selected, with_kwargs=True))
        try:
            yield routing
        finally:
            for handle in handles:
                handle.remove()
        if not len(routing.logits) == len(routing.selected) == len(self.layers):
            raise ValueError(
                f"{len(routing.selected)} of {len(self.layers)} MoE layers ran while their routing was recorded: run "
                "the whole model once inside record()."
            )


def router_probs(logits: Sequence[Tensor]) -> list[Tensor]:
    """g = softmax(z) of each layer, (T, E) in float32 at least."""
    return [torch.softmax(z, -1, dtype=torch.promote_types(z.dtype, torch.float32)) for z in logits]


def router_kl(
    logits: Sequence[Tensor], ref_probs: Sequence[Tensor], mask: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Mean of KL(g_before || g) in nats over layers and tokens, a scalar with gradient, at least 0.

    logits: of each layer (T, E). ref_probs: g before surgery, of each layer (T, E); rows are scaled to sum to 1, so
    that half precision does not bias the value. mask: (T,) or (B, S) bool, tokens that count; what the others hold is
    never looked at. weights: of the same shape, the share of each token in the mean; None: 1 / (tokens that count).
    """
    _check_layers("ref_probs", logits, ref_probs)
    counts = mask.flatten()[:, None]
    values = []
    for z, ref in zip(logits, ref_probs, strict=True):
        wide = torch.promote_types(z.dtype, torch.float32)
        ref = torch.where(counts, ref.detach().to(wide), 1.0 / ref.shape[-1])
        ref = ref / ref.sum(-1, keepdim=True)
        logp = torch.log_softmax(torch.where(counts, z.to(wide), 0.0), -1)
        values.append((torch.xlogy(ref, ref) - ref * logp).sum(-1))
    return mean_over_layers(values, mask, weights)


def mean_over_layers(values: Sequence[Tensor], mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of values (T,) of each layer over layers and tokens that count; mask and weights as in `router_kl`."""
    counts = mask.flatten()
    values_of_tokens = torch.where(counts, torch.stack(list(values)).mean(0), 0.0)
    if weights is None:
        return values_of_tokens.sum() / counts.sum().clamp(min=1)
    return (values_of_tokens * weights.flatten()).sum()


def selection_overlap(selected: Sequence[Tensor], ref_selected: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Share of a token's experts that it chose before too, |A n B| / K, a mean over tokens: (L,) in [0, 1].

    selected, ref_selected: of each layer (T, K) integers, the K of a token distinct and in any order. mask: (T,) or
    (B, S) bool, tokens that count; 0 without any.
    """
    _check_layers("ref_selected", selected, ref_selected)
    counts = mask.flatten()
    means = []
    for now, before in zip(selected, ref_selected, strict=True):
        kept = (now[:, :, None] == before.to(now.device)[:, None, :]).any(-1).double().mean(-1)
        means.append((kept * counts).sum() / counts.sum().clamp(min=1))
    return torch.stack(means)


def expert_selections(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[list[Tensor]]:
    """The experts that every token chooses: for each batch and layer (T, K) int16 on the CPU.

    batches: as the trainer makes them, input_ids and attention_mask (B, S); the model runs in eval mode.
    """
    chosen = []
    for _, routing in routings(model, batches):
        chosen.append([index.to("cpu", torch.int16) for index in routing.selected])
    return chosen


def overlap_with(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], before: Sequence[Sequence[Tensor]]
) -> Tensor:
    """`selection_overlap` over the tokens that count of all batches and ranks: (L,) float64 on the CPU.

    before: `expert_selections` of the starting model on the same batches. Raises ValueError for another number of
    batches or of tokens. A collective where ranks share the batches.
    """
    shares, tokens, num_batches = None, 0.0, 0
    for batch, routing in routings(model, batches):
        if num_batches == len(before) or before[num_batches][0].shape != routing.selected[0].shape:
            raise ValueError(
                f"Batch {num_batches} is none of those whose selections were recorded before: pass the same batches "
                "in the same order."
            )
        mask = tokens_that_count(batch)
        overlap = selection_overlap(routing.selected, before[num_batches], mask) * mask.sum()
        shares = overlap if shares is None else shares + overlap
        tokens, num_batches = tokens + mask.sum(), num_batches + 1
    if num_batches != len(before):
        raise ValueError(f"{num_batches} batches came, and the selections of {len(before)} were recorded: pass all.")
    device = next(model.parameters()).device
    sums = torch.zeros(len(moe_layers(model)) + 1, dtype=torch.float64, device=device)
    if shares is not None:
        sums += torch.cat([shares, tokens[None].double()])
    if has_process_group():
        dist.all_reduce(sums)
    return (sums[:-1] / sums[-1].clamp(min=1)).cpu()


def routings(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]]
) -> Iterator[tuple[Mapping[str, Tensor], Routing]]:
    """Each batch with its routing, without gradient; the model is in eval mode while it runs and only then."""
    tap = RouterTap(model)
    for batch in batches:
        was_training = model.training
        model.eval()
        with torch.no_grad(), tap.record() as routing:
            run_model(model, batch)
        model.train(was_training)
        yield batch, routing


def tokens_that_count(batch: Mapping[str, Tensor]) -> Tensor:
    """Mask (B, S) of the tokens whose routing is looked at: those that count in the losses, or all without a mask."""
    return batch["completion_mask"] if "completion_mask" in batch else batch["attention_mask"].bool()


def _layers_of_moe(model: nn.Module, wanted_by: str) -> list[MoeLayer]:
    layers = moe_layers(model)
    if not layers:
        raise ValueError(
            f"{wanted_by} needs a mixture of experts, and no routed experts were found in {type(model).__name__}: "
            "leave it off for a dense model."
        )
    return layers


# ---- listening ----


def _keep_logits(routing: Routing, place: int, layer: MoeLayer, module: nn.Module, args: tuple, output: Any) -> None:
    if len(routing.logits) == place:  # a later pass finds more
        routing.logits.append(logits_in(layer, output))


def _keep_selected(
    routing: Routing, place: int, layer: MoeLayer, module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> None:
    if len(routing.selected) == place:
        routing.selected.append(experts_in(layer, args, kwargs, routing.logits[place]).long())


def _refuse_reentrant(model: nn.Module) -> None:
    for module in model.modules():
        settings = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and settings.get("use_reentrant"):
            raise ValueError(
                "Reentrant gradient checkpointing cuts the gradient of the routers: set "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )


def _check_layers(name: str, now: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    shapes, ref_shapes = [tuple(part.shape) for part in now], [tuple(part.shape) for part in before]
    if not shapes or shapes != ref_shapes:
        raise ValueError(
            f"The model has layers of the shapes {shapes}, and {name} of {ref_shapes}: pass the routing of the same "
            "tokens in the same layers."
        )
