"""Activations of gated experts against PyTorch's, values and derivatives."""

import pytest
import torch
import triton
import triton.language as tl

from hf_moe_cpt.kernels.activations import ACTIVATIONS, activate, activate_with_derivative
from tests.helpers.kernel_device import DEVICE


@triton.jit
def _apply(x, value, value_again, slope, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    point = tl.load(x + at)
    tl.store(value + at, activate(point, ACTIVATION))
    again, derivative = activate_with_derivative(point, ACTIVATION)
    tl.store(value_again + at, again)
    tl.store(slope + at, derivative)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_and_derivative(name):
    x = torch.cat([torch.linspace(-12, 12, 253), torch.tensor([0.0, 60.0, -60.0])]).to(DEVICE)
    value, again, slope = torch.full((3, 256), float("nan"), device=DEVICE)
    _apply[(1,)](x, value, again, slope, ACTIVATION=name, BLOCK=256)
    exact = x.double().requires_grad_()
    wanted = ACTIVATIONS[name](exact)
    wanted.sum().backward()
    for got, want in ((value, wanted), (again, wanted), (slope, exact.grad)):
        torch.testing.assert_close(got.double(), want.detach(), rtol=2e-6, atol=5e-6)
