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

Forgetting in a few experts: those that the text to be forgotten uses most, and their routers, are all that trains.

    attribution  s_(l, e) = mean over texts of the mean over their tokens of g_(l, e)
    choice       the M pairs (layer, expert) with the largest s, over all layers
    anchor       mean over target layers and tokens of sum_e (g_e - a_e)^2, a_e = 1 for a target and 0 for the others

The anchor keeps the tokens at the experts that are to forget: otherwise the router learns to avoid them, and the
knowledge stays. g = softmax of the router's logits. Shared experts have no gate and are never targets.

Letters: L MoE layers in layer order, T tokens, E routed experts. Source: Zhuang et al. 2025 (SEUF, arXiv 2411.18797);
layers are counted over MoE layers alone, so that a dense first layer has no number.

The experts of a surgery on a mixture: which of them train, and whether the routers still choose as before.

Source: Zhuang et al. 2025 (SEUF, arXiv 2411.18797) for both; expert_targets.py and routers.py have the formulas.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle

from hf_moe_cpt.routing.hooks import MoeLayer, is_below, listen, moe_layers
from hf_moe_cpt.routing.metrics import shared_experts
from hf_moe_cpt.trainers.common.distributed import has_process_group
from hf_moe_cpt.trainers.surgery.chunked import causal_lm_of, run_model


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

        def keep(place: int, experts: Tensor, logits: Tensor | None) -> None:
            if len(routing.selected) == place:  # a later pass finds more
                routing.logits.append(logits)
                routing.selected.append(experts.long())

        with listen(self.layers, keep):
            yield routing
        if len(routing.selected) != len(self.layers):
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
        kept = shared_experts(now, before.to(now.device)).double() / now.shape[1]
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


Expert = tuple[int, int]  # MoE layer and expert, both from 0


def expert_affinity(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """How much each expert is used by the texts of `batches`, s: (L, E) float64 on the CPU, rows summing to 1.

    batches: as the trainer makes them; every token that counts in the losses counts here (without a completion_mask:
    every one that is no padding), and every text the same whatever its length. The model runs in eval mode. Layers
    with fewer experts are filled with 0. Adds over ranks where a process group exists, so that all ranks choose the
    same. Raises ValueError for a dense model and without any text.
    """
    layers = RouterTap(model).layers
    device = next(model.parameters()).device
    sums = torch.zeros(len(layers), max(layer.num_experts for layer in layers), dtype=torch.float64, device=device)
    num_texts = torch.zeros((), dtype=torch.float64, device=device)
    for batch, routing in routings(model, batches):
        mask = tokens_that_count(batch).to(torch.float64)
        shares = mask / mask.sum(1, keepdim=True).clamp(min=1)  # (B, S), of a token in the mean of its text
        used = [torch.einsum("te,t->e", g.double(), shares.flatten()) for g in router_probs(routing.logits)]
        sums += pad_sequence([*used, sums[0]], batch_first=True)[:-1]
        num_texts += mask.any(1).sum()
    if has_process_group():
        dist.all_reduce(sums)
        dist.all_reduce(num_texts)
    if num_texts == 0:
        raise ValueError("No text came to find the experts that are used for it: pass batches with tokens.")
    return (sums / num_texts).cpu()


def choose_experts(affinity: Tensor, num: int, per_layer: bool = False) -> list[Expert]:
    """The `num` experts with the largest affinity (L, E), best first, as (layer, expert); of equal ones the earlier.

    per_layer: `num` of every layer instead of in all. Raises ValueError unless 1 <= num <= experts to choose from.
    """
    num_layers, num_experts = affinity.shape
    available = num_experts if per_layer else num_layers * num_experts
    if not 1 <= num <= available:
        raise ValueError(
            f"target_experts={num} must lie in [1, {available}], the experts of "
            f"{'a layer' if per_layer else 'all layers'}: choose fewer."
        )
    if per_layer:
        best = affinity.argsort(dim=1, descending=True, stable=True)[:, :num]
        return [(layer, expert) for layer, row in enumerate(best.tolist()) for expert in row]
    best = affinity.flatten().argsort(descending=True, stable=True)[:num]
    return [divmod(place, num_experts) for place in best.tolist()]


@dataclass
class ExpertTargets:
    """What `train_only_experts` made of a model."""

    chosen: list[Expert]
    names: list[str]  # of the chosen experts, such as model.layers.3.mlp.experts[5]
    no_decay: list[str]  # parameters that weight decay must leave alone: other experts' weights lie in them too
    num_trained: int  # weights that can change
    _model: nn.Module
    _was_trained: dict[str, bool]
    _handles: list[RemovableHandle]

    def close(self) -> None:
        """Let everything train that did before."""
        for handle in self._handles:
            handle.remove()
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(self._was_trained[name])


def train_only_experts(model: nn.Module, chosen: Sequence[Expert]) -> ExpertTargets:
    """Freeze all of `model` but the chosen experts and the routers of their layers; call it before it is wrapped.

    The experts of a layer lie in one tensor: gradients of the others are set to 0 as they arrive, and an optimizer
    that moves no weight without a gradient (AdamW, SGD, Adafactor; not Muon) leaves them bit for bit as they are,
    provided that the parameters in `no_decay` have no weight decay. What was frozen before stays frozen. Not for FSDP,
    whose shards no hook of this kind sees. Raises ValueError for a dense model, an adapter, an expert that does not
    exist, and weights that are not stored as one tensor of E rows.
    """
    if getattr(causal_lm_of(model), "peft_config", None) or hasattr(model, "peft_config"):
        raise ValueError(
            "target_experts trains rows of the model's own tensors, and this model trains an adapter: leave "
            "peft_config out, or set target_experts=0."
        )
    layers = moe_layers(model)
    _check_chosen(chosen, layers)
    was_trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    handles, no_decay, num_trained = [], [], 0
    for place in sorted({place for place, _ in chosen}):
        layer = layers[place]
        targets = sorted({expert for other, expert in chosen if other == place})
        for name, weight in layer.experts.named_parameters(prefix=layer.name):
            if was_trained[name]:
                weight.requires_grad_(True)
                handles.append(weight.register_hook(_OnlyRows(targets, weight.shape)))
                no_decay.append(name)
                num_trained += weight.numel() // layer.num_experts * len(targets)
        for name, weight in layer.router.named_parameters(prefix=layer.router_name):
            weight.requires_grad_(was_trained[name])
            num_trained += was_trained[name] * weight.numel()
    names = [f"{layers[place].name}[{expert}]" for place, expert in chosen]
    return ExpertTargets(list(chosen), names, no_decay, num_trained, model, was_trained, handles)


def expert_anchor(
    logits: Sequence[Tensor], chosen: Sequence[Expert], mask: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Mean over target layers and tokens of ||g - a||^2, a scalar with gradient, at least 0.

    One target in a layer: at most 2, and 0 when every token goes there entirely. logits: of all L layers (T, E).
    chosen: the targets. mask: (T,) or (B, S) bool, tokens that count; what the others hold is never looked at.
    weights: of the same shape, the share of each token in the mean; None: 1 / (tokens that count).
    """
    counts = mask.flatten()[:, None]
    distances = []
    for place in sorted({place for place, _ in chosen}):
        (g,) = router_probs([torch.where(counts, logits[place], 0.0)])
        is_target = torch.zeros_like(g[0])
        for other, expert in chosen:
            if other == place:
                is_target[expert : expert + 1].fill_(1.0)
        distances.append((g - is_target).square().sum(-1))
    return mean_over_layers(distances, mask, weights)


class _OnlyRows:
    """Sets the gradient of all rows but some to 0, whatever it is, on the device where it arrives."""

    def __init__(self, rows: Sequence[int], shape: torch.Size) -> None:
        is_other = torch.ones(shape[0], *(1 for _ in shape[1:]), dtype=torch.bool)
        is_other[list(rows)] = False
        self.is_other = {is_other.device: is_other}

    def __call__(self, gradient: Tensor) -> Tensor:
        if gradient.device not in self.is_other:  # once: a copy from the host waits for the device
            self.is_other[gradient.device] = next(iter(self.is_other.values())).to(gradient.device)
        return gradient.masked_fill(self.is_other[gradient.device], 0.0)


def _check_chosen(chosen: Sequence[Expert], layers: Sequence[MoeLayer]) -> None:
    if not layers:
        raise ValueError("target_experts needs a mixture of experts with fused weights, and found none: set it to 0.")
    if not chosen:
        raise ValueError("No expert is chosen: pass (layer, expert) pairs, as choose_experts returns them.")
    for place, expert in chosen:
        if not (0 <= place < len(layers) and 0 <= expert < layers[place].num_experts):
            raise ValueError(
                f"Expert {expert} of MoE layer {place} does not exist: the model has {len(layers)} MoE layers with "
                f"{', '.join(sorted({str(layer.num_experts) for layer in layers}))} experts each, counted from 0."
            )
        layer = layers[place]
        for name, weight in layer.experts.named_parameters(prefix=layer.name):
            if weight.shape[0] != layer.num_experts:
                raise ValueError(
                    f"{name} is {tuple(weight.shape)}, not one row for each of {layer.num_experts} experts: only "
                    "weights of all experts in one tensor can be trained for some of them."
                )


logger = logging.getLogger(__name__)

WATCHED_SETS = ("unlearn", "retain")
Batches = Callable[[str], Iterable[Mapping[str, Tensor]]]


def check_expert_settings(model: nn.Module, args: Any) -> None:
    """Raise ValueError for what needs a mixture of experts where there is none, or contradicts itself."""
    wanted = [name for name in ("freeze_router", "router_anchor", "target_experts") if getattr(args, name)]
    if not wanted:
        return
    layers = moe_layers(model)
    if not layers:
        raise ValueError(
            f"{wanted[0]}={getattr(args, wanted[0])} is for mixtures of experts, and {type(model).__name__} has none: "
            "leave it off."
        )
    if args.target_experts and args.unlearn_weight == 0:
        raise ValueError("target_experts are found by what the unlearn set uses: give unlearn_weight a value above 0.")
    available = sum(layer.num_experts for layer in layers)
    if args.target_experts > available:
        raise ValueError(f"target_experts={args.target_experts} must be at most {available}, all experts.")
    if args.freeze_router:
        freeze_routers(model)


def target_experts(model: nn.Module, batches: Iterable[Mapping[str, Tensor]], num: int) -> ExpertTargets:
    """Make the `num` experts that the batches use most, and their routers, all that trains."""
    targets = train_only_experts(model, choose_experts(expert_affinity(model, batches), num))
    logger.info("%d weights of %d experts are trained: %s.", targets.num_trained, num, ", ".join(targets.names))
    return targets


class SelectionWatch:
    """What the experts of each token were before surgery, for the overlap with what they are now."""

    def __init__(self, model: nn.Module, batches: Batches, sets: Iterable[str]) -> None:
        watched = [name for name in WATCHED_SETS if name in sets] if moe_layers(model) else []
        self._batches = batches
        self._before = {name: expert_selections(model, batches(name)) for name in watched}

    def measure(self, model: nn.Module) -> dict[str, float]:
        """`<set>_expert_overlap` in [0, 1], the mean over layers, and `<set>_expert_overlap_min`, the least."""
        found = {}
        for name, before in self._before.items():
            overlap = overlap_with(model, self._batches(name), before)
            found[f"{name}_expert_overlap"] = float(overlap.mean())
            found[f"{name}_expert_overlap_min"] = float(overlap.min())
        return found
