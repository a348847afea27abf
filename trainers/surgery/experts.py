"""The experts of a surgery on a mixture: which of them train, how their routers are held, and what became of choices.

Forgetting has a short cut in such a model: the router sends tokens elsewhere, and the experts that knew keep what
they know. Selections drift even with frozen routers, because the layers below change what a router sees.

    g = softmax(z)  what every formula here calls the router's distribution
    router_kl       mean over layers and tokens of KL(g_before || g) = sum_e g_before (ln g_before - ln g)
    affinity        s_(l, e) = mean over texts of the mean over their tokens of g_(l, e)
    targets         the M pairs (layer, expert) with the largest s: they and their routers are all that trains
    expert_anchor   mean over target layers and tokens of sum_e (g_e - a_e)^2, a_e = 1 for a target, else 0
    overlap         mean over tokens of |A n B| / K: `SaturationCounter` of hf_moe_cpt.routing.metrics
    calibration     f_(l, e) = share of a set's choices that fall on an expert; a token of an anchor weighs the mean
                    over its L K choices of c_(l, e) = max(f_forgotten / f_anchor, 1), over the anchor's mean of that
    projection      a router's step dW <- dW (1 - U U^T), U an orthonormal basis of its inputs of retained text

z are logits before any bias or group limit that a router chooses by. Where gates are sigmoids of z (DeepSeek-V3), g
has the same order of experts, and does not see a constant that is added to all logits of a token. The anchor keeps the
tokens at the experts that are to forget. Shared experts have no gate and are never targets. Calibration holds what the
forgotten text uses most as often as that does; projection leaves the logits of retained text as they were, of all
experts (theirs: of those that a token chose, with bounds on the others), while the layers below leave its inputs.

Letters: L MoE layers in layer order, T = B S tokens of a batch, E routed experts, K experts per token; A, B the
experts that a token chose then and now. Sources: Zhuang et al. 2025 (SEUF, arXiv 2411.18797), layers counted over MoE
layers alone; calibration: TRACE, arXiv 2606.10338, after its abstract, since no weights are in it; projection: GRIP,
Zhu et al. 2026, arXiv 2601.16905; the KL and the choice by contrast are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback

from hf_moe_cpt.machine import has_process_group, local_part, modes_kept
from hf_moe_cpt.routing.hooks import MoeLayer, RoutingTap, checkpoints_reentrantly, listen, moe_layers
from hf_moe_cpt.routing.metrics import SaturationCounter
from hf_moe_cpt.trainers.surgery.chunked import causal_lm_of, run_model


logger = logging.getLogger(__name__)

WATCHED_SETS = ("unlearn", "retain")
OF_MIXTURES = ("freeze_router", "router_anchor", "target_experts", "expert_calibration", "router_projection")
CALIBRATION_LIMIT = 10.0  # most that c may be: experts that an anchor never uses cannot be held by it
Batches = Callable[[str], Iterable[Mapping[str, Tensor]]]
Expert = tuple[int, int]  # MoE layer and expert, both from 0


def check_expert_settings(model: nn.Module, args: Any) -> None:
    """Raise ValueError for what needs a mixture of experts where there is none, or contradicts itself."""
    wanted = [name for name in OF_MIXTURES if getattr(args, name)]
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


class RouterTap:
    """Records the logits of the routers in a forward pass, with gradient: `with tap.record() as logits: model(...)`.

    The model may be wrapped (DistributedDataParallel) or carry an adapter. Hooks live only inside the context, so that
    copies of the model stay untapped.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = moe_layers(model)

    @contextmanager
    def record(self) -> Iterator[list[Tensor]]:
        """Logits (T, E) of each layer in the first forward pass inside this context.

        Later passes, recomputation too, are not seen. Raises ValueError if a layer did not run, and for reentrant
        gradient checkpointing, whose first pass builds no graph that a gradient could take from logits to router.
        """
        if torch.is_grad_enabled() and checkpoints_reentrantly(self.model):
            raise ValueError(
                "Reentrant gradient checkpointing cuts the gradient of the routers: set "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        logits: list[Tensor] = []

        def hear(place: int, experts: Tensor, heard: Tensor | None) -> None:
            if len(logits) == place:  # a later pass finds more
                logits.append(heard)

        with listen(self.layers, hear):
            yield logits
        if len(logits) != len(self.layers):
            raise ValueError(
                f"{len(logits)} of {len(self.layers)} MoE layers ran while their routing was recorded: run the whole "
                "model once inside record()."
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
    counts = mask.flatten()[:, None]
    values = []
    for z, ref in zip(logits, ref_probs, strict=True):
        wide = torch.promote_types(z.dtype, torch.float32)
        ref = torch.where(counts, ref.detach().to(wide), 1.0 / ref.shape[-1])
        ref = ref / ref.sum(-1, keepdim=True)
        logp = torch.log_softmax(torch.where(counts, z.to(wide), 0.0), -1)
        values.append((torch.xlogy(ref, ref) - ref * logp).sum(-1))
    return _mean_over_layers(values, mask, weights)


def expert_anchor(
    logits: Sequence[Tensor], chosen: Sequence[Expert], mask: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Mean over target layers and tokens of ||g - a||^2, a scalar with gradient, at least 0.

    One target in a layer: at most 2, and 0 when every token goes there entirely. logits: of all L layers (T, E).
    chosen: the targets. mask, weights: as in `router_kl`.
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
    return _mean_over_layers(distances, mask, weights)


def _mean_over_layers(values: Sequence[Tensor], mask: Tensor, weights: Tensor | None) -> Tensor:
    counts = mask.flatten()
    values_of_tokens = torch.where(counts, torch.stack(list(values)).mean(0), 0.0)
    if weights is None:
        return values_of_tokens.sum() / counts.sum().clamp(min=1)
    return (values_of_tokens * weights.flatten()).sum()


def _tokens_that_count(batch: Mapping[str, Tensor]) -> Tensor:
    """Mask (B, S) of the tokens whose routing is looked at: those that count in the losses, or all without a mask."""
    return batch["completion_mask"] if "completion_mask" in batch else batch["attention_mask"].bool()


class SelectionWatch:
    """What the experts of each token were before surgery, for the overlap with what they are now."""

    def __init__(self, model: nn.Module, batches: Batches, sets: Iterable[str]) -> None:
        watched = [name for name in WATCHED_SETS if name in sets] if moe_layers(model) else []
        self._batches = batches
        self._before = {name: list(self._selections(model, name)) for name in watched}

    def measure(self, model: nn.Module) -> dict[str, float]:
        """`<set>_expert_overlap` in [0, 1], the mean over layers, and `<set>_expert_overlap_min`, the least.

        Over the tokens that count of all batches and ranks: a collective where ranks share the batches.
        """
        found = {}
        for name, before in self._before.items():
            counters: list[SaturationCounter] = []
            for old, new in zip(before, self._selections(model, name), strict=True):
                counters = counters or [SaturationCounter(index.shape[1]) for index in new]
                for counter, *pair in zip(counters, old, new, strict=True):
                    counter.add(*pair)
            if has_process_group():
                self._add_ranks(counters, next(model.parameters()).device)
            overlaps = [counter.saturation() for counter in counters]
            found[f"{name}_expert_overlap"] = sum(overlaps) / len(overlaps)
            found[f"{name}_expert_overlap_min"] = min(overlaps)
        return found

    def _selections(self, model: nn.Module, name: str) -> Iterator[list[Tensor]]:
        """Of each batch and layer the experts (T, K) int16 of the tokens that count, on the CPU."""
        tap = RoutingTap(model, with_probabilities=False)
        for batch in self._batches(name):
            counts = _tokens_that_count(batch).flatten()
            with modes_kept(model), torch.no_grad(), tap.listening():
                run_model(model.eval(), batch)
                chosen = [layer.experts[counts].cpu() for layer in tap.take(counts.numel())]
            yield chosen

    def _add_ranks(self, counters: Sequence[SaturationCounter], device: torch.device) -> None:
        counts = torch.stack([counter.tokens_by_overlap for counter in counters]).to(device)
        dist.all_reduce(counts)
        for counter, row in zip(counters, counts.cpu(), strict=True):
            counter.tokens_by_overlap = row


def expert_affinity(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """How much each expert is used by the texts of `batches`, s: (L, E) float64 on the CPU, rows summing to 1.

    batches: as the trainer makes them; every token that counts in the losses counts here (without a completion_mask:
    every one that is no padding), and every text the same whatever its length. The model runs in eval mode. Layers
    with fewer experts are filled with 0. Adds over ranks where a process group exists, so that all ranks choose the
    same. Raises ValueError without any text.
    """
    tap = RouterTap(model)
    shape = len(tap.layers), max(layer.num_experts for layer in tap.layers)
    sums = torch.zeros(shape, dtype=torch.float64, device=next(model.parameters()).device)
    num_texts = sums.new_zeros(())
    for batch in batches:
        with modes_kept(model), torch.no_grad(), tap.record() as logits:
            run_model(model.eval(), batch)
        mask = _tokens_that_count(batch).to(torch.float64)
        shares = mask / mask.sum(1, keepdim=True).clamp(min=1)  # (B, S), of a token in the mean of its text
        used = [torch.einsum("te,t->e", g.double(), shares.flatten()) for g in router_probs(logits)]
        sums += pad_sequence([*used, sums[0]], batch_first=True)[:-1]
        num_texts += mask.any(1).sum()
    if has_process_group():
        dist.all_reduce(sums)
        dist.all_reduce(num_texts)
    if num_texts == 0:
        raise ValueError("No text came to find the experts that are used for it: pass batches with tokens.")
    return (sums / num_texts).cpu()


class ExpertCalibration:
    """How much each token of an anchor weighs, so that the experts of what is forgotten are held as often as used."""

    def __init__(self, model: nn.Module, batches: Batches, forgotten: Sequence[str], anchors: Sequence[str]) -> None:
        used = {name: expert_use(model, batches(name)) for name in (*forgotten, *anchors)}
        gone = torch.stack([used[name] for name in forgotten]).mean(0)
        device = next(model.parameters()).device
        self.factors = {name: calibration_factors(gone, used[name]).float().to(device) for name in anchors}
        self.tap = RoutingTap(model, with_probabilities=False)

    def shares(self, name: str, shape: torch.Size) -> Tensor:
        """(B, S) of the pass just made inside `tap.listening()`; at the start 1 on average over the anchor."""
        layers = self.tap.take(shape.numel())
        of_layers = [row[layer.experts.long()].mean(-1) for row, layer in zip(self.factors[name], layers, strict=True)]
        return torch.stack(of_layers).mean(0).view(shape)


def calibration_factors(gone: Tensor, kept: Tensor) -> Tensor:
    """c (L, E) over its mean over the anchor's choices. gone, kept: f (L, E) of forgotten and anchor text."""
    ratio = torch.where(gone > kept, gone / kept.clamp(min=1e-12), 1.0).clamp(max=CALIBRATION_LIMIT)
    return ratio / (ratio * kept).sum(1).mean()


def expert_use(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """f (L, E) float64 on the CPU: share of the choices of tokens that count; rows sum to 1. Adds over ranks."""
    tap = RoutingTap(model, with_probabilities=False)
    shape = len(tap.layers), max(layer.num_experts for layer in tap.layers)
    counts = torch.zeros(shape, dtype=torch.float64, device=next(model.parameters()).device)
    for batch in batches:
        mask = _tokens_that_count(batch).flatten()
        with modes_kept(model), torch.no_grad(), tap.listening():
            run_model(model.eval(), batch)
            chosen = [layer.experts[mask].long().flatten() for layer in tap.take(mask.numel())]
        counts += torch.stack([torch.bincount(index, minlength=shape[1]) for index in chosen])
    if has_process_group():
        dist.all_reduce(counts)
    return (counts / counts.sum(1, keepdim=True).clamp(min=1)).cpu()


class RouterProjection(TrainerCallback):
    """Takes out of every step of the routers what their inputs of retained text, before surgery, would notice."""

    def __init__(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], share: float) -> None:
        self.routers = [layer.router for layer in moe_layers(model)]
        moments = router_input_moments(model, self.routers, batches)
        self.bases = [principal_directions(moment, share) for moment in moments]
        self._before: list[list[Tensor]] = []

    @torch.no_grad()
    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Keep the routers as they are."""
        self._before = [[weight.clone() for weight in _parts(router)] for router in self.routers]

    @torch.no_grad()
    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Project what the step has added; a bias, which every input notices, goes back."""
        for router, basis, kept in zip(self.routers, self.bases, self._before, strict=True):
            for weight, before in zip(_parts(router), kept, strict=True):
                step = (weight - before).to(basis.dtype)
                seen = (step @ basis) @ basis.T if weight.ndim == 2 and weight.shape[1] == len(basis) else step
                weight.copy_(before + (step - seen).to(weight.dtype))


def _parts(router: nn.Module) -> list[Tensor]:
    """What this rank holds of a router's weights: rows of them, where they are sharded."""
    return [local_part(w) for w in router.parameters() if w.requires_grad]


def router_input_moments(
    model: nn.Module, routers: Sequence[nn.Module], batches: Iterable[Mapping[str, Tensor]]
) -> list[Tensor]:
    """Sum of x x^T (H, H), float64, of each router over its inputs x at tokens that are no padding; of all ranks."""
    sums: dict[int, Tensor] = {}
    for batch in batches:
        mask = batch["attention_mask"].bool()
        if "completion_mask" in batch:  # rows that only fill a rank's share have nothing that counts
            mask = mask & batch["completion_mask"].any(1, keepdim=True)
        mask = mask.flatten()

        def hear(place: int, _: nn.Module, args: tuple, mask: Tensor = mask) -> None:
            x = args[0].flatten(0, -2)[mask].double()
            sums[place] = sums.get(place, 0.0) + x.T @ x

        with modes_kept(model), torch.no_grad(), ExitStack() as hooks:
            for place, router in enumerate(routers):
                hooks.callback(router.register_forward_pre_hook(partial(hear, place)).remove)
            run_model(model.eval(), batch)
    if not sums:
        raise ValueError("router_projection keeps retained text: give retain_dataset or neighbour_dataset.")
    if has_process_group():
        for total in sums.values():
            dist.all_reduce(total)
    return [sums[place] for place in range(len(routers))]


def principal_directions(moment: Tensor, share: float) -> Tensor:
    """U (H, r), float32: the fewest eigenvectors of a moment (H, H) that hold `share` of its trace."""
    values, vectors = torch.linalg.eigh(moment)
    held = values.flip(0).clamp(min=0.0).cumsum(0) / values.clamp(min=0.0).sum()
    count = min(int((held < share).sum()) + 1, len(values))
    return vectors.flip(1)[:, :count].float()


def choose_experts(affinity: Tensor, num: int) -> list[Expert]:
    """The `num` experts with the largest affinity (L, E), best first; of equal ones the earlier."""
    best = affinity.flatten().argsort(descending=True, stable=True)[:num]
    return [divmod(place, affinity.shape[1]) for place in best.tolist()]


@dataclass
class ExpertTargets:
    """What `train_only_experts` made of a model."""

    chosen: list[Expert]
    names: list[str]  # of the chosen experts, such as model.layers.3.mlp.experts[5]
    no_decay: list[str]  # parameters that weight decay must leave alone: other experts' weights lie in them too
    num_trained: int  # weights that can change


def target_experts(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    num: int,
    kept: Iterable[Mapping[str, Tensor]] | None = None,
) -> ExpertTargets:
    """Make the `num` experts that the batches use most, or most beyond what `kept` text does, all that trains.

    Their routers train with them.
    """
    affinity = expert_affinity(model, batches) - (0.0 if kept is None else expert_affinity(model, kept))
    targets = train_only_experts(model, choose_experts(affinity, num))
    logger.info("%d weights of %d experts are trained: %s.", targets.num_trained, num, ", ".join(targets.names))
    return targets


def train_only_experts(model: nn.Module, chosen: Sequence[Expert]) -> ExpertTargets:
    """Freeze all of `model` but the chosen experts and the routers of their layers; call it before it is wrapped.

    The experts of a layer lie in one tensor: gradients of the others are set to 0 as they arrive, and an optimizer
    that moves no weight without a gradient (AdamW, SGD, Adafactor; not Muon) leaves them bit for bit as they are,
    provided that the parameters in `no_decay` have no weight decay. What was frozen before stays frozen. Not for FSDP,
    whose shards no hook of this kind sees. Raises ValueError for an adapter, and for weights that are not stored as
    one tensor of E rows.
    """
    if getattr(causal_lm_of(model), "peft_config", None) or hasattr(model, "peft_config"):
        raise ValueError(
            "target_experts trains rows of the model's own tensors, and this model trains an adapter: leave "
            "peft_config out, or set target_experts=0."
        )
    layers = moe_layers(model)
    _check_rows([layers[place] for place, _ in chosen])
    was_trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    no_decay, num_trained = [], 0
    for place in sorted({place for place, _ in chosen}):
        layer = layers[place]
        targets = sorted({expert for other, expert in chosen if other == place})
        for name, weight in layer.experts.named_parameters(prefix=layer.name):
            if was_trained[name]:
                weight.requires_grad_(True)
                weight.register_hook(_OnlyRows(targets, weight.shape))
                no_decay.append(name)
                num_trained += weight.numel() // layer.num_experts * len(targets)
        for name, weight in layer.router.named_parameters(prefix=layer.router_name):
            weight.requires_grad_(was_trained[name])
            num_trained += was_trained[name] * weight.numel()
    names = [f"{layers[place].name}[{expert}]" for place, expert in chosen]
    return ExpertTargets(list(chosen), names, no_decay, num_trained)


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


def _check_rows(layers: Iterable[MoeLayer]) -> None:
    for layer in layers:
        for name, weight in layer.experts.named_parameters(prefix=layer.name):
            if weight.shape[0] != layer.num_experts:
                raise ValueError(
                    f"{name} is {tuple(weight.shape)}, not one row for each of {layer.num_experts} experts: only "
                    "weights of all experts in one tensor can be trained for some of them."
                )
