"""Forgetting in a few experts: those that the text to be forgotten uses most, and their routers, are all that trains.

    attribution  s_(l, e) = mean over texts of the mean over their tokens of g_(l, e)
    choice       the M pairs (layer, expert) with the largest s, over all layers
    anchor       mean over target layers and tokens of sum_e (g_e - a_e)^2, a_e = 1 for a target and 0 for the others

The anchor keeps the tokens at the experts that are to forget: otherwise the router learns to avoid them, and the
knowledge stays. g = softmax of the router's logits. Shared experts have no gate and are never targets.

Letters: L MoE layers in layer order, T tokens, E routed experts. Source: Zhuang et al. 2025 (SEUF, arXiv 2411.18797);
layers are counted over MoE layers alone, so that a dense first layer has no number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle

from hf_moe_cpt.analysis.moe_layers import MoeLayer, moe_layers
from hf_moe_cpt.trainers.instruments.ranks import has_process_group
from hf_moe_cpt.trainers.surgery.model_pass import causal_lm_of
from hf_moe_cpt.trainers.surgery.routers import RouterTap, mean_over_layers, router_probs, routings, tokens_that_count


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
