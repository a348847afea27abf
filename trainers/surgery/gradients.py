"""Terms that pull against each other: how much they do, and how to take the conflict out of their gradients.

Letters: T terms; g_i the gradient of term i, one flat tensor or a list with one tensor per parameter, None where a
parameter has no gradient; G (T, T) their inner products. Norms, cosines and every projection follow from G alone: a
projected gradient is a combination of the given ones, whose coefficients are found on T x T numbers without touching
the parameters again. Gradients that are sharded over ranks need nothing but the sum of G over the ranks.
Every term is one that is minimised, so two terms conflict where <g_i, g_j> < 0. Nothing here waits for the device.
Sources: Yu et al. 2020 (PCGrad, arXiv 2001.06782); GRU, as in the code of tmlr-group/GRU.

The gradient of every term of an objective, each by itself, until they are added up into one step.

Between steps nothing is held. Inside a step the gradients of T terms cost T times the memory of one; where nobody asks
for them apart, backward passes add up in `.grad` by themselves and this file is not needed. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe_cpt.data.random import derive_seed, permute
from hf_moe_cpt.trainers.surgery.surgery_config import ANCHOR_SETS, FORGET_SETS


Gradient = Tensor | Sequence[Tensor | None]
ROUNDINGS = 8  # in a gradient that would be 0 without them, in eps of a likelihood's


def inner_products(gradients: Sequence[Gradient]) -> Tensor:
    """G (T, T), symmetric, in float32 or float64; a gradient that is None counts as 0.

    Raises ValueError for no gradients, or for lists that belong to different parameters.
    """
    parts = _parts(gradients)
    products: dict[tuple[int, int], Tensor] = {}
    for i, left in enumerate(parts):
        for j in range(i, len(parts)):
            pairs = [(a, b) for a, b in zip(left, parts[j], strict=True) if a is not None and b is not None]
            products[i, j] = _sum_over_meshes([_inner_product(a, b) for a, b in pairs], _zero(parts))
    rows = [[products[min(i, j), max(i, j)] for j in range(len(parts))] for i in range(len(parts))]
    return torch.stack([torch.stack(row) for row in rows])


def norms(products: Tensor) -> Tensor:
    """Euclidean norms (T,) of the gradients with these inner products (T, T)."""
    return products.diagonal().sqrt()


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


def cosines(products: Tensor, noise: Tensor | None = None) -> Tensor:
    """Cosines (T, T) in [-1, 1] up to rounding; NaN with a gradient that is 0 or `noise` (T,): it has no direction."""
    lengths = norms(products)
    absent = lengths == 0 if noise is None else noise | (lengths == 0)
    return (products / (lengths[:, None] * lengths)).masked_fill(absent | absent[:, None], math.nan)


def combine(gradients: Sequence[Gradient], coefficients: Tensor | Sequence[float]) -> Gradient:
    """sum_i coefficients[i] g_i, a tensor if the first gradient is one, else a list; coefficients: T numbers or (T,).

    Each parameter is added up in float32 at least. A parameter without any gradient keeps None.
    """
    parts = _parts(gradients)
    if len(coefficients) != len(parts):
        raise ValueError(f"{len(coefficients)} coefficients for {len(parts)} gradients: give one for each.")
    sums = [_weighted_sum(column, coefficients) for column in zip(*parts, strict=True)]
    return sums[0] if isinstance(gradients[0], Tensor) else sums


def project_away(gradient: Gradient, anchor: Gradient, min_cosine: float = -1.0) -> Gradient:
    """`gradient` without its component along `anchor`, if that component points against it; else as it is (GRU).

    g - min(<g, a>, 0) / |a|^2 a. min_cosine in [-1, 0]: at most the share -min_cosine of |g| is taken out; the authors
    offer -0.5. An anchor of 0 changes nothing.
    """
    if not -1.0 <= min_cosine <= 0.0:
        raise ValueError(f"min_cosine={min_cosine} is outside [-1, 0]: -1 takes the whole conflict out, 0 nothing.")
    products = inner_products([gradient, anchor])
    lengths = norms(products)
    cosine = _ratio(products[0, 1], lengths.prod()).clamp(min_cosine, 0.0)
    share = _ratio(cosine * lengths[0], lengths[1])
    return combine([gradient, anchor], torch.stack([torch.ones_like(share), -share]))


def smoothed(previous: Gradient | None, new: Gradient, share_of_new: float = 0.8) -> Gradient:
    """share_of_new * new + (1 - share_of_new) * previous, GRU's anchor; `new` where there is no previous one."""
    if not 0.0 < share_of_new <= 1.0:
        raise ValueError(f"share_of_new={share_of_new} is outside (0, 1]: 1 forgets what was before.")
    if previous is None:
        return new
    return combine([new, previous], [share_of_new, 1.0 - share_of_new])


def projection_order(num_terms: int, seed: int, step: int) -> list[list[int]]:
    """For each term the others in an order of its own, random but a function of seed and step alone."""
    orders = []
    for i in range(num_terms):
        others = [j for j in range(num_terms) if j != i]
        key = derive_seed("projection", seed, step, i)
        orders.append([others[permute(k, len(others), key)] for k in range(len(others))])
    return orders


def conflict_coefficients(products: Tensor, order: Sequence[Sequence[int]] | None = None) -> Tensor:
    """C (T, T): row i are the coefficients with which PCGrad makes g_i' out of all g; their sum over i is the step.

    g_i' starts as g_i; for each j of order[i] in turn, g_i' -= min(<g_i', g_j>, 0) / |g_j|^2 g_j, with g_j as given.
    order: of `projection_order`; None: ascending.
    """
    num_terms = products.shape[0]
    order = order if order is not None else [[j for j in range(num_terms) if j != i] for i in range(num_terms)]
    if [sorted(others) for others in order] != [[j for j in range(num_terms) if j != i] for i in range(num_terms)]:
        raise ValueError(f"order={order!r} must name for each of {num_terms} terms every other one once.")
    unit = torch.eye(num_terms, dtype=products.dtype, device=products.device)
    rows = []
    for i, others in enumerate(order):
        row = unit[i]
        for j in others:
            row = row - _ratio((row @ products[:, j]).clamp(max=0.0), products[j, j]) * unit[j]
        rows.append(row)
    return torch.stack(rows)


def project_conflicts(gradients: Sequence[Gradient], order: Sequence[Sequence[int]] | None = None) -> list[Gradient]:
    """The T gradients, each without its components against the others (PCGrad); their sum is the step.

    For the sum alone, `combine(gradients, conflict_coefficients(inner_products(gradients), order).sum(0))` makes one
    new gradient instead of T.
    """
    return [combine(gradients, row) for row in conflict_coefficients(inner_products(gradients), order)]


def projection_coefficients(products: Tensor, giving: Sequence[int], anchors: Sequence[int]) -> Tensor:
    """Factors (T,) of a step in which the sum of some gradients loses its component against the sum of others.

    `project_away` on two sums, from inner products (T, T) alone: with f the sum of the gradients at `giving` and a
    that at `anchors`, the step is the sum of all T less min(<f, a>, 0) / |a|^2 a.
    """
    unit = torch.eye(products.shape[0], dtype=products.dtype, device=products.device)
    none = torch.zeros_like(products[0])
    given = sum((unit[i] for i in giving), none)
    held = sum((unit[j] for j in anchors), none)
    share = _ratio((given @ products @ held).clamp(max=0.0), held @ products @ held)
    return torch.ones_like(none) - share * held


def clip_coefficients(lengths: Tensor, max_norm: float) -> Tensor:
    """Factors (T,) in (0, 1] that bring gradients of these norms (T,) down to `max_norm`, each for itself."""
    if not max_norm > 0.0:
        raise ValueError(f"max_norm={max_norm} must be above 0: leave clipping out to clip nothing.")
    return torch.where(lengths > max_norm, max_norm / lengths, torch.ones_like(lengths))


def _parts(gradients: Sequence[Gradient]) -> list[list[Tensor | None]]:
    """Each gradient as a list; ValueError unless all have the same parameters."""
    if not gradients:
        raise ValueError("there are no gradients to compare: give at least one.")
    parts = [[gradient] if isinstance(gradient, Tensor) else list(gradient) for gradient in gradients]
    for index, part in enumerate(parts):
        if len(part) != len(parts[0]):
            raise ValueError(
                f"gradient {index} has {len(part)} parameters and gradient 0 has {len(parts[0])}: give every term's "
                "gradients for the same parameters, None where there is none."
            )
    for index, column in enumerate(zip(*parts, strict=True)):
        shapes = {tuple(tensor.shape) for tensor in column if tensor is not None}
        if len(shapes) > 1:
            raise ValueError(f"parameter {index} has gradients of shapes {sorted(shapes)}: they must be of one shape.")
    return parts


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


def _zero(parts: list[list[Tensor | None]]) -> Tensor:
    tensors = [tensor for part in parts for tensor in part if tensor is not None]
    if not tensors:
        return torch.zeros(())
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.zeros((), dtype=dtype, device=tensors[0].device)


def _weighted_sum(column: tuple[Tensor | None, ...], coefficients: Tensor | Sequence[float]) -> Tensor | None:
    present = [(tensor, factor) for tensor, factor in zip(column, coefficients, strict=True) if tensor is not None]
    if not present:
        return None
    dtype = present[0][0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    factors = [factor.to(tensor.device, wide) if isinstance(factor, Tensor) else factor for tensor, factor in present]
    return sum(tensor.to(wide) * factor for (tensor, _), factor in zip(present, factors, strict=True)).to(dtype)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 where the denominator is 0."""
    is_zero = denominator == 0
    return (numerator / denominator.masked_fill(is_zero, 1.0)).masked_fill(is_zero, 0.0)


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
