"""The gradient of every term of an objective, each by itself, until they are added up into one step.

Between steps nothing is held. Inside a step the gradients of T terms cost T times the memory of one; where nobody asks
for them apart, backward passes add up in `.grad` by themselves and this file is not needed. Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_moe_cpt.trainers.surgery.gradient_surgery import (
    clip_coefficients,
    combine,
    conflict_coefficients,
    cosines,
    inner_products,
    norms,
    projection_coefficients,
    projection_order,
)
from hf_moe_cpt.trainers.surgery.settings_checks import ANCHOR_SETS, FORGET_SETS


class TermGradients:
    """Collects `.grad` by term over the micro-batches of a step; `merge` writes the step's gradient."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._of_term: dict[str, list[Tensor | None]] = {}

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer) -> TermGradients:
        """Of the tensors that an optimizer steps: those of a model are other ones once FSDP has sharded it."""
        return cls(parameter for group in optimizer.param_groups for parameter in group["params"])

    @contextmanager
    def collect(self, term: str) -> Iterator[None]:
        """Backward passes in here add to the gradient of `term` and to no other."""
        self._set(self._of_term.get(term) or [None] * len(self.parameters))
        yield
        self._of_term[term] = [parameter.grad for parameter in self.parameters]
        self._set([None] * len(self.parameters))

    def merge(
        self, mode: str = "none", max_norm: float | None = None, seed: int = 0, step: int = 0
    ) -> dict[str, Tensor]:
        """Put the step into `.grad`, forget the terms, and return their norms and cosines by name.

        mode: "none": the plain sum; "project", "pcgrad": see `step_coefficients`. max_norm: clips each term first.
        """
        names = list(self._of_term)
        gradients = list(self._of_term.values())
        self._of_term = {}
        products = inner_products(gradients)
        coefficients = step_coefficients(names, products, mode, max_norm, projection_order(len(names), seed, step))
        self._set(combine(gradients, coefficients))
        lengths, angles = norms(products), cosines(products)
        pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
        return {
            **{f"grad_norm/{name}": lengths[i] for i, name in enumerate(names)},
            **{f"grad_cosine/{names[i]}_{names[j]}": angles[i, j] for i, j in pairs},
        }

    def _set(self, gradients: Iterable[Tensor | None]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient


def step_coefficients(
    names: list[str], products: Tensor, mode: str, max_norm: float | None, order: list[list[int]]
) -> Tensor:
    """Factors (T,) of the terms' gradients in the step, from their inner products (T, T).

    mode "none": 1. "project": what is forgotten gives way to the anchors (retain, neighbour) where their sums
    conflict. "pcgrad": every term gives way to every other, in the order given. max_norm clips every term before that.
    """
    clip = torch.ones_like(products[0]) if max_norm is None else clip_coefficients(norms(products), max_norm)
    clipped = products * clip * clip[:, None]
    if mode == "pcgrad":
        return clip * conflict_coefficients(clipped, order).sum(0)
    if mode == "project":
        giving = [place for place, name in enumerate(names) if name in FORGET_SETS]
        anchors = [place for place, name in enumerate(names) if name in ANCHOR_SETS]
        return clip * projection_coefficients(clipped, giving, anchors)
    return clip
