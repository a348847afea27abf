"""The gate of an expert: what it computes, in which order its columns lie, and how a kernel reads and writes them.

R rows sorted by expert, E experts, H hidden size, I width. Everything in an epilogue is in float32. Source: ours.
Activations: GELU, arXiv 1606.08415 (exact form by erf, and the tanh form); GLU, arXiv 2002.05202; the clamped gate:
transformers' GptOssExperts.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hf_moe_cpt.kernels.grouped_gemm import IS_INTERPRETED, Tile


# Whether a kernel may hold instructions of NVIDIA's GPUs.
_IS_PTX = tl.constexpr(not IS_INTERPRETED and torch.version.hip is None)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class Form(NamedTuple):
    """How experts compute and how their matrices lie in memory.

    activation: a key of ACTIVATIONS, whose value of the gate is multiplied by up, or "clamped", as gpt-oss has it:
    (clip(up, -limit, limit) + offset) g sigmoid(alpha g) with g = min(gate, limit).
    transposed: (E, H, 2I) and (E, I, H) instead of (E, 2I, H) and (E, H, I). interleaved: columns gate, up, gate, up
    instead of all gates before all ups; pre-activations lie as the matrix does.
    """

    activation: str = "silu"
    transposed: bool = False
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = math.inf
    offset: float = 0.0

    def split(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up of (..., 2I)."""
        return (pairs[..., ::2], pairs[..., 1::2]) if self.interleaved else pairs.chunk(2, dim=-1)

    def hidden(self, preactivation: Tensor) -> Tensor:
        """The definition of the gated activation: (..., 2I) -> (..., I).

        At a limit the gradient is that of what is kept, under every PyTorch: its clamp hands none on since 2.14.
        """
        gate, up = self.split(preactivation)
        if self.activation != "clamped":
            return ACTIVATIONS[self.activation](gate) * up
        gate = torch.where(gate > self.limit, self.limit, gate)
        up = torch.where(up.abs() > self.limit, self.limit * up.sign(), up)
        return (up + self.offset) * gate * torch.sigmoid(self.alpha * gate)

    def launch_options(self) -> dict[str, object]:
        """Keyword arguments of a launch."""
        gate = (self.activation, self.alpha, self.limit, self.offset)
        return {"GATE": gate, "TRANSPOSED": self.transposed, "INTERLEAVED": self.interleaved}


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of float32 within 4 units in the last place; results below 1.2e-38 are 0.

    In four instructions where `tl.sigmoid` takes sixteen, most of them for the digits of such small results. An
    epilogue of tens of thousands of elements is bound by them: a multiprocessor waits for its tensor cores no longer
    than for these.
    """
    if _IS_PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000; "
            "rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.sigmoid(x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x) for a float32 tile; ACTIVATION is a key of ACTIVATIONS."""
    if ACTIVATION == "silu":
        y = x * sigmoid(x)
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        y = x * _tanh_gate(x)
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def activate_with_derivative(x, ACTIVATION: tl.constexpr):
    """act(x) and act'(x) for a float32 tile; the derivative of ReLU at 0 is 0, as in PyTorch."""
    if ACTIVATION == "silu":
        gate = sigmoid(x)
        y = x * gate
        slope = gate + y - y * gate
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        y = x * cdf
        slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        gate = _tanh_gate(x)
        y = x * gate
        slope = gate + y * (1.0 - gate) * (1.5957691216057308 + 0.2140644488 * x * x)
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.maximum(x, 0.0)
        slope = tl.where(x > 0.0, 1.0, 0.0)
    return y, slope


@triton.jit
def _tanh_gate(x):
    """(1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, written as a sigmoid of twice the argument."""
    return sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def gated(gate, up, GATE: tl.constexpr):
    """The gated activation of float32 tiles; GATE: activation, alpha, limit, offset of a `Form`."""
    activation: tl.constexpr = GATE[0]
    if activation == "clamped":
        gate = tl.minimum(gate, GATE[2])
        hidden = gate * sigmoid(GATE[1] * gate) * (tl.clamp(up, -GATE[2], GATE[2]) + GATE[3])
    else:
        hidden = activate(gate, activation) * up
    return hidden


@triton.jit
def gated_with_derivatives(gate, up, GATE: tl.constexpr):
    """The gated activation and its derivatives by gate and up; at a limit as `Form.hidden`."""
    activation: tl.constexpr = GATE[0]
    if activation == "clamped":
        kept = gate <= GATE[2]
        gate = tl.minimum(gate, GATE[2])
        opened = sigmoid(GATE[1] * gate)
        activated = gate * opened
        slope = tl.where(kept, opened + GATE[1] * activated * (1.0 - opened), 0.0)
        by_up = tl.where(tl.abs(up) <= GATE[2], activated, 0.0)
        factor = tl.clamp(up, -GATE[2], GATE[2]) + GATE[3]
    else:
        activated, slope = activate_with_derivative(gate, activation)
        by_up = activated
        factor = up
    return activated * factor, slope * factor, by_up


def matrix_of_form(gate_up: Tensor, form: Form, tile: Tile) -> tuple[Tensor, list[int]]:
    """The view of [gate; up] that `load_both_halves` reads, and the box of it that a descriptor moves."""
    num_experts, double_width, hidden_size = gate_up.shape
    if form.transposed:
        hidden_size, double_width = double_width, hidden_size
    halves = [double_width] if form.interleaved else [2, double_width // 2]
    pairs = [2 * tile.block_n] if form.interleaved else [2, tile.block_n]
    if form.transposed:
        return gate_up.view(num_experts, hidden_size, *halves), [1, tile.block_k, *pairs]
    return gate_up.view(num_experts, *halves, hidden_size), [1, *pairs, tile.block_k]


@triton.jit
def pair_columns(column, width, COLUMNS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where gate and up of COLUMNS columns lie in a row of 2I, and which of them exist."""
    line = tl.arange(0, 2 * COLUMNS)
    if INTERLEAVED:
        position = 2 * column + line
        inside = position < 2 * width
    else:
        within = column + line % COLUMNS
        position = line // COLUMNS * width + within
        inside = within < width
    return position, inside


@triton.jit
def split_pairs(pairs, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Gate and up, (ROWS, COLUMNS) each, of a (ROWS, 2 COLUMNS) tile."""
    if INTERLEAVED:
        gate, up = pairs.reshape(ROWS, COLUMNS, 2).split()
    else:
        gate, up = pairs.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1).split()
    return gate, up


@triton.jit
def load_both_halves(
    gate_up, expert, column, k, width, hidden_size, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr, INTERLEAVED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of the gate matrix and the same of the up matrix: (BLOCK_K, 2 BLOCK_N)."""
    if TMA:
        if TRANSPOSED:
            if INTERLEAVED:
                both = gate_up.load([expert, k, 2 * column]).reshape(BLOCK_K, 2 * BLOCK_N)
            else:
                both = gate_up.load([expert, k, 0, column]).reshape(BLOCK_K, 2 * BLOCK_N)
        elif INTERLEAVED:
            both = gate_up.load([expert, 2 * column, k]).reshape(2 * BLOCK_N, BLOCK_K).T
        else:
            both = gate_up.load([expert, 0, column, k]).reshape(2 * BLOCK_N, BLOCK_K).T
    else:
        position, inside = pair_columns(column, width, BLOCK_N, INTERLEAVED)
        ks = k + tl.arange(0, BLOCK_K)
        first = expert.to(tl.int64) * 2 * width * hidden_size
        if TRANSPOSED:
            offset = ks.to(tl.int64)[:, None] * 2 * width + position[None, :]
            both = tl.load(gate_up + first + offset, mask=(ks < hidden_size)[:, None] & inside[None, :], other=0.0)
        else:
            offset = position.to(tl.int64)[:, None] * hidden_size + ks[None, :]
            both = tl.load(gate_up + first + offset, mask=inside[:, None] & (ks < hidden_size)[None, :], other=0.0).T
    return both
