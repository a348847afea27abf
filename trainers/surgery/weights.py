"""What a surgery does to weights besides descending on its terms: noise before it, a worse place for a pass, negation.

    add_noise       theta <- (1 - a) theta + a b noise    before step 1 (UNDO)
    worst_nearby    theta + r g / |g|    while a term's gradient is taken (SAM)
    Negation        theta_0 - a (theta - theta_0)    what is measured, saved and left (task vectors)

Weights may be sharded by FSDP2 and ranks may hold other rows: all see the numbers of one process.
Sources: UNDO, Lee et al. 2025 (arXiv 2506.06278), a and b its alpha and beta; SAM on the forget term, Fan et al. 2025
(arXiv 2502.05374); negation, Ilharco et al. 2022 (arXiv 2212.04089), of LoRA Zhang et al. 2023 (arXiv 2306.14870).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_moe_cpt.machine import has_process_group
from hf_moe_cpt.trainers.surgery.gradients import inner_products


@torch.no_grad()
def add_noise(model: nn.Module, share: float, scale: float, seed: int) -> None:
    """theta <- (1 - share) theta + share scale noise, of trained weights of two axes or more.

    The noise is Xavier's of the last two axes: each expert of a stack is a matrix of its own. Vectors, such as those
    of norms, stay. The same on every rank, however the weights are sharded.
    """
    generator = torch.Generator().manual_seed(seed)
    for weight in (weight for weight in model.parameters() if weight.requires_grad and weight.ndim > 1):
        deviation = math.sqrt(2.0 / sum(weight.shape[-2:]))
        noise = torch.empty(weight.shape).normal_(0.0, deviation, generator=generator).to(weight.device, weight.dtype)
        if isinstance(weight, DTensor):
            noise = distribute_tensor(noise, weight.device_mesh, weight.placements)
        weight.mul_(1 - share).add_(share * scale * noise)


@contextmanager
def worst_nearby(weights: list[nn.Parameter], radius: float, loss: Callable[[], Tensor]) -> Iterator[None]:
    """Inside, the weights lie `radius` further up the gradient of `loss()`, that of the rows of all ranks.

    Gradients that the weights hold already are not touched. A pass of FSDP2 must reduce its gradients at once. A
    collective where a process group exists.
    """
    held = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    loss().backward()
    slopes = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    for weight, before in zip(weights, held, strict=True):
        weight.grad = before
    for slope in slopes:
        if has_process_group() and not isinstance(slope, DTensor):
            dist.all_reduce(slope)
    norm = inner_products([slopes])[0, 0].sqrt().clamp(min=1e-12)
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, slope in zip(weights, slopes, strict=True):
            weight.add_(slope * (radius / norm).to(slope.dtype))
    try:
        yield
    finally:
        _put_back(weights, kept)


class Negation:
    """What training adds to trained weights, to be taken `factor` times from where they started.

    A LoRA adds B A, which is negated in B alone. Raises ValueError for an adapter that is no new LoRA.
    """

    def __init__(self, model: nn.Module, factor: float) -> None:
        self.factor, self.weights, self.start = factor, [], []
        for name, weight in model.named_parameters():
            is_kept = "lora_A" in name or "lora_embedding_A" in name
            is_other = "lora_B" in name and bool(weight.any())
            if is_other or "lora_magnitude" in name:
                raise ValueError("negation takes away what a new LoRA learns: pass a LoraConfig without use_dora.")
            if weight.requires_grad and not is_kept:
                self.weights.append(weight)
                self.start.append(weight.detach().clone())

    @torch.no_grad()
    def apply(self) -> None:
        """theta <- theta_0 - factor (theta - theta_0)."""
        for weight, start in zip(self.weights, self.start, strict=True):
            weight.copy_(start - self.factor * (weight - start))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The same, undone afterwards."""
        kept = [weight.detach().clone() for weight in self.weights]
        self.apply()
        try:
            yield
        finally:
            _put_back(self.weights, kept)


@torch.no_grad()
def _put_back(weights: list[nn.Parameter], kept: list[Tensor]) -> None:
    for weight, before in zip(weights, kept, strict=True):
        weight.copy_(before)
