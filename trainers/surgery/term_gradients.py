"""The gradient of every term of an objective, each by itself, until they are added up into one step.

Between steps nothing is held. Inside a step the gradients of T terms cost T times the memory of one; where nobody asks
for them apart, backward passes add up in `.grad` by themselves and this file is not needed. Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_moe_cpt.trainers.surgery.gradient_surgery import (
    clip_coefficients,
    combine,
    conflict_coefficients,
    cosines,
    inner_products,
    is_noise,
    norms,
    projection_coefficients,
    projection_order,
)
from hf_moe_cpt.trainers.surgery.settings_checks import ANCHOR_SETS, FORGET_SETS


class TermGradients:
    """Collects `.grad` by term over the micro-batches of a step; `merge` writes the step's gradient.

    rounding: eps of the type that passes compute in; None: of the coarsest type among the parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rounding: float | None = None) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        own = max((torch.finfo(parameter.dtype).eps for parameter in self.parameters), default=0.0)
        self.rounding = own if rounding is None else max(own, rounding)
        self._of_term: dict[str, list[Tensor | None]] = {}

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, mixed_precision: str = "no") -> TermGradients:
        """Of the tensors that an optimizer steps: those of a model are other ones once FSDP has sharded it.

        mixed_precision: accelerate's word for the type of the passes.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return cls(parameters, pass_rounding(mixed_precision, any(p.is_cuda for p in parameters)))

    @contextmanager
    def collect(self, term: str) -> Iterator[None]:
        """Backward passes in here add to the gradient of `term` and to no other."""
        self._set(self._of_term.get(term) or [None] * len(self.parameters))
        yield
        self._of_term[term] = [parameter.grad for parameter in self.parameters]
        self._set([None] * len(self.parameters))

    def merge(
        self,
        mode: str = "none",
        max_norm: float | None = None,
        seed: int = 0,
        step: int = 0,
        weights: Mapping[str, float] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Put the step into `.grad`, forget the terms, and return their norms and cosines, and which cosines exist.

        mode: "none": the plain sum; "project", "pcgrad": see `step_coefficients`. max_norm: clips each term first.
        weights: of the terms, to tell what is noise: there is no cosine with it.
        """
        names = list(self._of_term)
        gradients = list(self._of_term.values())
        self._of_term = {}
        products = inner_products(gradients)
        lengths = norms(products)
        units = None if weights is None else lengths.new_tensor([weights[name] for name in names])
        noise = is_noise(lengths, self.rounding, units)
        order = projection_order(len(names), seed, step)
        self._set(combine(gradients, step_coefficients(names, products, mode, max_norm, order, noise)))
        angles = cosines(products, noise)
        pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
        found = {f"grad_cosine/{names[i]}_{names[j]}": angles[i, j] for i, j in pairs}
        present = {name: ~angle.isnan() for name, angle in found.items()}
        return {f"grad_norm/{name}": lengths[i] for i, name in enumerate(names)} | found, present

    def _set(self, gradients: Iterable[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient


def pass_rounding(mixed_precision: str, on_cuda: bool = False) -> float:
    """eps of what `mixed_precision` ("no", "fp16", "bf16", "fp8") multiplies in: TF32 as fp16, fp8 taken as bf16."""
    if mixed_precision in ("bf16", "fp8"):
        return torch.finfo(torch.bfloat16).eps
    has_tf32 = on_cuda and torch.backends.cuda.matmul.allow_tf32
    return torch.finfo(torch.float16 if mixed_precision == "fp16" or has_tf32 else torch.float64).eps


def step_coefficients(
    names: list[str], products: Tensor, mode: str, max_norm: float | None, order: list[list[int]], noise: Tensor
) -> Tensor:
    """Factors (T,) of the terms' gradients in the step, from their inner products (T, T).

    mode "none": 1. "project": what is forgotten gives way to the anchors (retain, neighbour) where their sums
    conflict. "pcgrad": every term gives way to every other, in the order given. max_norm clips every term before that.
    noise: (T,) bool, terms without a direction: nothing gives way to them nor they to anything, and clipping makes
    none of them larger beside the others than it was.
    """
    clip = torch.ones_like(products[0]) if max_norm is None else clip_coefficients(norms(products), max_norm)
    clip = torch.where(noise, clip.min(), clip)
    told = clip.masked_fill(noise, 0.0)
    clipped = products * told * told[:, None]
    if mode == "pcgrad":
        return clip * conflict_coefficients(clipped, order).sum(0)
    if mode == "project":
        giving = [place for place, name in enumerate(names) if name in FORGET_SETS]
        anchors = [place for place, name in enumerate(names) if name in ANCHOR_SETS]
        return clip * projection_coefficients(clipped, giving, anchors)
    return clip
