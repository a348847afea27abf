"""The activations that a gated expert can have, in Triton and in PyTorch, with their derivatives.

A gated expert computes act(gate) * up. Everything here is in float32. Sources: GELU, arXiv 1606.08415 (exact form by
erf, and the tanh form); GLU variants, arXiv 2002.05202.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x) for a float32 tile; ACTIVATION is a key of ACTIVATIONS."""
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
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
        gate = tl.sigmoid(x)
        y = x * gate
        slope = gate * (1.0 + x * (1.0 - gate))
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
    return tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
