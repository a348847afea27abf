"""The four products over rows sorted by expert, each against its definition in float64; activations against PyTorch's.

Tiles are small and of both kinds: pointers or tensor descriptors, one tile a program or persistent. Sizes are no
multiples of the tiles, experts are left without rows, and memory that is not written is NaN (conftest).
"""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_moe_cpt.kernels.grouped_gemm import (
    ACTIVATIONS,
    Tile,
    activate,
    activate_with_derivative,
    dot_precision,
    gated_backward,
    gated_up,
    grouped_product,
    plain_gated_backward,
    plain_gated_up,
    plain_grouped_product,
    plain_weight_gradient,
    weight_gradient,
)
from hf_moe_cpt.kernels.routing import RoutingTable, plain_permute_tokens, plain_routing_table
from tests.helpers.expert_layers import DEVICE, FLOAT_DTYPES, ExpertLayer, expert_layer
from tests.helpers.tolerances import assert_matches


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


TILES = {
    "pointers": Tile(16, 16, 16),
    "pointers, persistent": Tile(16, 16, 16, persistent=True),
    "descriptors": Tile(16, 16, 16, tma=True),
    "descriptors, persistent": Tile(16, 16, 16, tma=True, persistent=True),
    "wide": Tile(16, 64, 32, num_stages=2, group=2),
}
any_tile = pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
any_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)


def _problem(num_tokens=21, num_experts=3, top_k=2, hidden_size=40, width=24) -> tuple[ExpertLayer, RoutingTable]:
    layer = expert_layer(num_tokens, num_experts, top_k, hidden_size, width)
    return layer, _table(layer)


def _table(layer: ExpertLayer) -> RoutingTable:
    return plain_routing_table(layer.top_k_index, layer.top_k_weights.detach(), layer.down.shape[0], 16)


def _assert_rows_match(name, got, want, table):
    """Only rows of used tiles are specified."""
    used = int(table.group_start[-1])
    assert_matches(name, got[:used], want[:used])


@any_dtype
@any_tile
@pytest.mark.parametrize("contract_last", [True, False])
def test_grouped_product(tile, dtype, contract_last):
    layer, table = _problem()
    rows = plain_permute_tokens(layer.tokens.detach(), table).to(dtype)
    weight = layer.gate_up.detach().to(dtype)  # (E, 2I, H)
    weight = weight if contract_last else weight.transpose(1, 2).contiguous()
    got = grouped_product(rows, weight, table, contract_last, tile)
    want = plain_grouped_product(rows.double(), weight.double(), table, contract_last)
    _assert_rows_match("product", got, want, table)


@any_dtype
@any_tile
def test_gated_up(tile, dtype):
    _check_gated_up(tile, dtype, "silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_up_with_every_activation(activation):
    _check_gated_up(TILES["wide"], torch.float32, activation)


def _check_gated_up(tile, dtype, activation):
    layer, table = _problem()
    rows = plain_permute_tokens(layer.tokens.detach(), table).to(dtype)
    gate_up = layer.gate_up.detach().to(dtype)
    hidden, preactivation = gated_up(rows, gate_up, table, activation, save=True, tile=tile)
    want_hidden, want_preactivation = plain_gated_up(rows.double(), gate_up.double(), table, activation, save=True)
    _assert_rows_match("hidden", hidden, want_hidden, table)
    _assert_rows_match("preactivation", preactivation, want_preactivation, table)

    alone, nothing = gated_up(rows, gate_up, table, activation, save=False, tile=tile)
    used = int(table.group_start[-1])
    assert nothing.numel() == 0 and torch.equal(alone[:used], hidden[:used])


@any_dtype
@pytest.mark.parametrize("columns", [16, 128, 256], ids="columns {}".format)
@pytest.mark.parametrize("tma", [False, True])
def test_gated_backward(columns, tma, dtype):
    """With one warp, 128 columns are worked on in two parts and 256 in four."""
    _check_gated_backward(columns, tma, dtype, "silu", width=24 if columns == 16 else 136)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_backward_with_every_activation(activation):
    _check_gated_backward(64, True, torch.float32, activation, width=24)


def _check_gated_backward(columns, tma, dtype, activation, width):
    layer, table = _problem(width=width)
    grad_rows = plain_permute_tokens(torch.randn_like(layer.tokens), table).to(dtype)
    down = layer.down.detach().to(dtype)
    _, preactivation = plain_gated_up(
        plain_permute_tokens(layer.tokens.detach(), table), layer.gate_up.detach(), table, activation, save=True
    )
    preactivation = preactivation.to(dtype)
    tile = Tile(16, columns, 16, num_warps=1, tma=tma)
    want = plain_gated_backward(grad_rows.double(), down.double(), preactivation.double(), table, activation)
    got = gated_backward(grad_rows, down, preactivation, table, activation, tile)
    _assert_rows_match("gradient of the pre-activations", got[0], want[0], table)
    _assert_rows_match("weighted hidden", got[1], want[1], table)
    _assert_rows_match("gradient of the gate weights", got[2].sum(0), want[2].sum(0), table)

    kept = preactivation.clone()
    over, _, _ = gated_backward(grad_rows, down, preactivation, table, activation, tile, in_place=True)
    used = int(table.group_start[-1])
    assert over.data_ptr() == preactivation.data_ptr() and not torch.equal(kept, preactivation)
    assert torch.equal(over[:used], got[0][:used])


def test_products_that_cannot_be_persistent_ignore_it():
    """One tile a program, however the tile is marked: fewer programs would leave tiles out."""
    layer, table = _problem(num_tokens=80, width=40)
    grad_rows = plain_permute_tokens(torch.randn_like(layer.tokens), table)
    preactivation = torch.randn(grad_rows.shape[0], 80, dtype=grad_rows.dtype, device=DEVICE)
    inputs = (grad_rows, layer.down.detach(), preactivation)
    tile = TILES["pointers, persistent"]
    got = gated_backward(*(tensor.float() for tensor in inputs), table, "silu", tile)
    want = plain_gated_backward(*inputs, table, "silu")
    _assert_rows_match("gradient of the pre-activations", got[0], want[0], table)
    gradient = weight_gradient(grad_rows.float(), got[1], table, tile)
    assert_matches("gradient", gradient, plain_weight_gradient(grad_rows, want[1], table))


@any_dtype
@any_tile
def test_weight_gradient(tile, dtype):
    layer, table = _problem(num_experts=5)
    left = plain_permute_tokens(torch.randn_like(layer.tokens), table).to(dtype)
    right = plain_permute_tokens(layer.tokens.detach(), table).to(dtype)[:, :24].contiguous()
    got = weight_gradient(left, right, table, replace(tile, block_k=16))
    assert_matches("gradient", got, plain_weight_gradient(left.double(), right.double(), table))


def test_experts_without_rows_get_zero_gradients():
    layer, _ = _problem(num_experts=4, top_k=1)
    table = plain_routing_table(torch.full_like(layer.top_k_index, 2), layer.top_k_weights.detach(), 4, 16)
    rows = plain_permute_tokens(layer.tokens.detach().float(), table)
    gradient = weight_gradient(rows, rows, table, Tile(16, 16, 16))
    assert gradient[[0, 1, 3]].eq(0).all() and gradient[2].ne(0).any()


@settings(max_examples=12, deadline=None)
@given(
    num_tokens=st.integers(1, 40),
    num_experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    hidden_size=st.integers(1, 9),
    width=st.integers(1, 9),
    tma=st.booleans(),
)
def test_any_shape(num_tokens, num_experts, top_k, hidden_size, width, tma):
    """Widths in units of 4: descriptors need whole 16 bytes in float32, and odd tails are what tiles get wrong."""
    layer = expert_layer(num_tokens, num_experts, top_k, 4 * hidden_size, 4 * width)
    table = _table(layer)
    rows = plain_permute_tokens(layer.tokens.detach(), table).float()
    tile = Tile(16, 16, 16, tma=tma)
    gate_up, down = layer.gate_up.detach(), layer.down.detach()
    hidden, preactivation = gated_up(rows, gate_up.float(), table, "silu", save=True, tile=tile)
    want_hidden, want_preactivation = plain_gated_up(rows.double(), gate_up, table, "silu", save=True)
    _assert_rows_match("hidden", hidden, want_hidden, table)
    _assert_rows_match("preactivation", preactivation, want_preactivation, table)
    out = grouped_product(hidden, down.float(), table, contract_last=True, tile=tile)
    _assert_rows_match("down", out, plain_grouped_product(hidden.double(), down, table, contract_last=True), table)


def test_unaligned_tensors_are_read_through_pointers():
    """A width of 3 elements is no whole number of 16 bytes: asking for descriptors must not fail."""
    layer, table = _problem(hidden_size=7, width=3)
    rows = plain_permute_tokens(layer.tokens.detach(), table).float()
    got, _ = gated_up(rows, layer.gate_up.detach().float(), table, "relu", save=False, tile=TILES["descriptors"])
    want, _ = plain_gated_up(rows.double(), layer.gate_up.detach(), table, "relu", save=False)
    _assert_rows_match("hidden", got, want, table)


def test_float32_follows_torchs_matmul_precision():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert dot_precision(torch.float32) == "tf32"
        torch.set_float32_matmul_precision("highest")
        assert dot_precision(torch.float32) == "ieee"
        assert dot_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_problem_has_empty_tails():
    """Guards the tests above: sizes that were multiples of the tiles would hide missing masks."""
    layer, table = _problem()
    assert layer.tokens.shape[1] % 16 and layer.down.shape[2] % 16
    assert (table.group_size.to(DEVICE) % 16).any()
