"""The problem that expert layers are measured on: shapes, random routing, what it costs, the exact result.

T tokens, H hidden size, I expert width, E experts, K experts per token, n = T K rows (pairs of token and expert). An
expert is W_down (act(W_gate x) * W_up x), W_up of all experts and W_gate kept as one (E, 2I, H) [gate; up], W_down as
(E, H, I). Source: ours; the shapes are those of the paper's models and of three public ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.activations import ACT2FN


GRADIENTS = ("dx", "dw1", "dw2", "dgate")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Above this relative error a result counts as wrong; float32 leaves room for tensor cores in tf32.
ERROR_LIMITS = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 5e-3}


@dataclass(frozen=True)
class Shape:
    """Sizes of one expert layer, under a name."""

    name: str
    T: int
    H: int
    I: int  # noqa: E741
    E: int
    K: int

    @property
    def rows(self) -> int:
        return self.T * self.K

    @property
    def forward_flops(self) -> int:
        """Multiplications and additions of the three products n x H x I: gate, up, down."""
        return 6 * self.rows * self.H * self.I

    @property
    def training_flops(self) -> int:
        """Forward and backward: each product has two gradients of its own size."""
        return 3 * self.forward_flops


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("granular", 32_768, 1024, 704, 31, 3),
        Shape("switch", 32_768, 1024, 2816, 8, 1),
        Shape("olmoe", 32_768, 2048, 1024, 64, 8),
        Shape("qwen3-30b", 16_384, 2048, 768, 128, 8),
        Shape("mixtral", 16_384, 4096, 14_336, 8, 2),
    )
}


def parse_shape(text: str) -> Shape:
    """ "name=T,H,I,E,K" as a shape; raises ValueError with what is wrong with it."""
    name, _, sizes = text.partition("=")
    try:
        numbers = [int(size) for size in sizes.split(",")]
    except ValueError:
        numbers = []
    if not name or len(numbers) != 5 or min(numbers) < 1:
        raise ValueError(f"--shape {text!r} must read name=T,H,I,E,K with five positive integers.")
    shape = Shape(name, *numbers)
    if shape.K > shape.E:
        raise ValueError(f"--shape {text!r}: a token cannot choose K={shape.K} of E={shape.E} experts.")
    return shape


def chosen_shapes(names: list[str] | None, own: list[str] | None, default: Sequence[str]) -> list[Shape]:
    """The named shapes (`default` where nothing is given), then a user's own, each as "name=T,H,I,E,K"."""
    parsed = [parse_shape(text) for text in own or ()]
    names = names if names is not None or parsed else default
    return [SHAPES[name] for name in names or ()] + parsed


@dataclass(frozen=True)
class Case:
    """Inputs of one layer, the gradient of its output, and how to compute it."""

    shape: Shape
    activation: str
    tokens: Tensor  # (T, H)
    index: Tensor  # (T, K) int64
    gates: Tensor  # (T, K)
    gate_up: Tensor  # (E, 2I, H)
    down: Tensor  # (E, H, I)
    output_gradient: Tensor  # (T, H)

    @property
    def dtype(self) -> torch.dtype:
        return self.tokens.dtype

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def first_tokens(self, count: int) -> Case:
        """The same layer on its first `count` tokens, or on all if it has fewer."""
        parts = {name: getattr(self, name)[:count] for name in ("tokens", "index", "gates", "output_gradient")}
        return dataclasses.replace(self, shape=dataclasses.replace(self.shape, T=min(count, self.shape.T)), **parts)


def make_case(
    shape: Shape, dtype: torch.dtype, activation: str, skew: float, device: torch.device, seed: int = 0
) -> Case:
    """Random tokens, weights that keep the output near size 1, and a random top-k whose load follows a power law.

    skew: expert number r in a random order is drawn with weight r^-skew; 0 draws all alike.
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    weight_of_expert = (torch.randperm(shape.E, generator=generator, device=device) + 1.0) ** -skew
    uniform = torch.rand(shape.T, shape.E, generator=generator, device=device).clamp_(1e-20, 1 - 1e-7)
    scores = weight_of_expert.log() - (-uniform.log()).log()  # Gumbel noise: top-k draws without replacement
    gates = 0.1 + 0.9 * torch.rand(shape.T, shape.K, generator=generator, device=device)
    return Case(
        shape=shape,
        activation=activation,
        tokens=normal(shape.T, shape.H),
        index=scores.topk(shape.K, dim=-1).indices,
        gates=gates.to(dtype),
        gate_up=normal(shape.E, 2 * shape.I, shape.H).mul_(shape.H**-0.5),
        down=normal(shape.E, shape.H, shape.I).mul_(shape.I**-0.5),
        output_gradient=normal(shape.T, shape.H),
    )


def exact_results(case: Case) -> dict[str, Tensor]:
    """Output and the gradients of tokens, [gate; up], down and gates in float64, one expert at a time."""
    leaves = [getattr(case, name).double().requires_grad_() for name in ("tokens", "gate_up", "down", "gates")]
    tokens, gate_up, down, gates = leaves
    output = torch.zeros_like(tokens)
    for expert, (up_weight, down_weight) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        token, slot = torch.where(case.index == expert)
        gate, up = (tokens[token] @ up_weight.T).chunk(2, dim=-1)
        rows = (ACT2FN[case.activation](gate) * up) @ down_weight.T
        output = output.index_add(0, token, rows * gates[token, slot, None])
    gradients = torch.autograd.grad(output, leaves, case.output_gradient.double())
    return {"out": output.detach(), **dict(zip(GRADIENTS, gradients, strict=True))}


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; NaN wherever `got` holds one. Goes over the first dimension in parts."""
    if got.shape != want.shape:
        raise ValueError(f"a result has shape {tuple(got.shape)}, {tuple(want.shape)} is right.")
    pairs = zip(got.detach().split(8), want.split(8), strict=True)
    difference = sum((part.double() - exact).square().sum() for part, exact in pairs)
    return float((difference / want.square().sum()).sqrt())
