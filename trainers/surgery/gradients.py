"""The gradient of every term by itself, until they are added up into one step: how much they conflict, and without it.

Between steps nothing is held. Inside a step the gradients of T terms cost T times the memory of one; where nobody asks
for them apart, backward passes add up in `.grad` by themselves and this file is not needed.

Letters: T terms; g_i the gradient of term i, a list with one tensor per parameter, None where a parameter has no
gradient; G (T, T) their inner products. Norms, cosines and every projection follow from G alone: a projected gradient
is a combination of the given ones, whose coefficients are found on T x T numbers without touching the parameters
again. Gradients that are sharded over ranks need nothing but the sum of G over the ranks.
Every term is one that is minimised, so two terms conflict where <g_i, g_j> < 0. Nothing here waits for the device.
Source: GRU, as in the code of tmlr-group/GRU; the rest is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe_cpt.trainers.surgery.surgery_config import ANCHOR_SETS, FORGET_SETS


Gradient = Sequence[Tensor | None]
ROUNDINGS = 8  # in a gradient that would be 0 without them, in eps of a likelihood's


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
        self, mode: str = "none", weights: Mapping[str, float] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Put the step into `.grad`, forget the terms, and return their norms and cosines, and which cosines exist.

        mode: "none": the plain sum; "project": see `step_coefficients`. weights: of the terms, to tell what is noise:
        there is no cosine with it.
        """
        names = list(self._of_term)
        gradients = list(self._of_term.values())
        self._of_term = {}
        products = inner_products(gradients)
        lengths = products.diagonal().sqrt()
        units = None if weights is None else lengths.new_tensor([weights[name] for name in names])
        noise = is_noise(lengths, self.rounding, units)
        self._set(combine(gradients, step_coefficients(names, products, mode, noise)))
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


def step_coefficients(names: list[str], products: Tensor, mode: str, noise: Tensor) -> Tensor:
    """Factors (T,) of the terms' gradients in the step, from their inner products (T, T).

    mode "none": 1. "project": what is forgotten gives way to the anchors (retain, neighbour, unseen) where their sums
    conflict. noise: (T,) bool, terms without a direction: nothing gives way to them nor they to anything.
    """
    if mode == "none":
        return torch.ones_like(products[0])
    giving = [place for place, name in enumerate(names) if name in FORGET_SETS]
    anchors = [place for place, name in enumerate(names) if name in ANCHOR_SETS]
    return projection_coefficients(products.masked_fill(noise | noise[:, None], 0.0), giving, anchors)


def projection_coefficients(products: Tensor, giving: Sequence[int], anchors: Sequence[int]) -> Tensor:
    """Factors (T,) of a step in which the sum of some gradients loses its component against the sum of others (GRU).

    With f the sum of the gradients at `giving` and a that at `anchors`, the step is the sum of all T less
    min(<f, a>, 0) / |a|^2 a.
    """
    unit, none = torch.eye(len(products), dtype=products.dtype, device=products.device), torch.zeros_like(products[0])
    given, held = (sum((unit[place] for place in places), none) for places in (giving, anchors))
    share = _ratio((given @ products @ held).clamp(max=0.0), held @ products @ held)
    return 1.0 - share * held


def inner_products(gradients: Sequence[Gradient]) -> Tensor:
    """G (T, T), symmetric, in float32 or float64; a gradient that is None counts as 0."""
    present = [tensor for gradient in gradients for tensor in gradient if tensor is not None]
    dtype = torch.promote_types(present[0].dtype, torch.float32) if present else torch.float32
    zero = torch.zeros((), dtype=dtype, device=present[0].device if present else None)
    products: dict[tuple[int, int], Tensor] = {}
    for i, left in enumerate(gradients):
        for j, right in enumerate(gradients[i:], start=i):
            pairs = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
            products[i, j] = products[j, i] = _sum_over_meshes([_inner_product(a, b) for a, b in pairs], zero)
    places = range(len(gradients))
    return torch.stack([torch.stack([products[i, j] for j in places]) for i in places])


def is_noise(lengths: Tensor, rounding: float, weights: Tensor | None = None) -> Tensor:
    """Which gradients (T,) of these norms have no direction: they are 0, or what rounding left of 0.

    |g_i| / w_i <= ROUNDINGS * rounding * max_j |g_j| / w_j. rounding: eps of the type that the passes compute in;
    weights: (T,) of the terms, above 0; None: 1. The bound: a pass leaves a logit z wrong by some eps |z| / 2, so the
    gradient of a divergence that is 0 holds p times that in place of p - p, where a likelihood's holds p - 1, of order
    1; tokens err with random signs, so over n of them the two compare as eps |z| / (2 sqrt(n)), which is within 8 eps
    for |z| <= 64 and n >= 16. Measured where model and reference are the same: 0.01 to 1.04 eps in float32, 0.001 to
    0.03 in bfloat16; in float32 one step at a rate of 1e-5 later 130 eps and more. With a NaN none is noise, so that
    nothing is hidden.
    """
    sizes = lengths if weights is None else lengths / weights
    return sizes <= ROUNDINGS * rounding * sizes.max()


def cosines(products: Tensor, noise: Tensor) -> Tensor:
    """Cosines (T, T) in [-1, 1] up to rounding; NaN with a gradient that is 0 or `noise` (T,): it has no direction."""
    lengths = products.diagonal().sqrt()
    absent = noise | (lengths == 0)
    return (products / (lengths[:, None] * lengths)).masked_fill(absent | absent[:, None], math.nan)


def combine(gradients: Sequence[Gradient], coefficients: Tensor) -> list[Tensor | None]:
    """sum_i coefficients[i] g_i, with coefficients (T,).

    Each parameter is added up in float32 at least. A parameter without any gradient keeps None.
    """
    return [_weighted_sum(column, coefficients) for column in zip(*gradients, strict=True)]


def _inner_product(left: Tensor, right: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    return (left.to(wide) * right.to(wide)).sum()


def _sum_over_meshes(values: Sequence[Tensor], zero: Tensor) -> Tensor:
    """The sum of scalars, a plain one also where they are of sharded tensors: ranks meet once for each mesh."""
    by_mesh: dict[Any, Tensor] = {}
    for value in values:
        mesh = getattr(value, "device_mesh", None)
        by_mesh[mesh] = by_mesh[mesh] + value if mesh in by_mesh else value
    return sum((total if mesh is None else total.full_tensor() for mesh, total in by_mesh.items()), zero)


def _weighted_sum(column: Sequence[Tensor | None], coefficients: Tensor) -> Tensor | None:
    present = [(tensor, factor) for tensor, factor in zip(column, coefficients, strict=True) if tensor is not None]
    if not present:
        return None
    dtype = present[0][0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    return sum(tensor.to(wide) * factor.to(tensor.device, wide) for tensor, factor in present).to(dtype)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 where the denominator is 0."""
    is_zero = denominator == 0
    return (numerator / denominator.masked_fill(is_zero, 1.0)).masked_fill(is_zero, 0.0)
