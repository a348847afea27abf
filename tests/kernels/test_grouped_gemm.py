"""The four products over rows sorted by expert, each against its definition in float64; activations against PyTorch's.

Tiles are small and of both kinds: pointers or tensor descriptors, one tile a program or persistent. Sizes are no
multiples of the tiles, experts are left without rows, and memory that is not written is NaN (conftest).
"""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from hf_moe_cpt.kernels.gated import gated_backward, gated_up, plain_gated_backward, plain_gated_up
from hf_moe_cpt.kernels.gates import ACTIVATIONS, Form, activate, activate_with_derivative, gated_with_derivatives
from hf_moe_cpt.kernels.grouped_gemm import (
    Tile,
    bias_gradient,
    dot_precision,
    grouped_product,
    plain_bias_gradient,
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


@triton.jit
def _apply_gate(gate, up, hidden, by_gate, by_up, GATE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    found = gated_with_derivatives(tl.load(gate + at), tl.load(up + at), GATE)
    tl.store(hidden + at, found[0])
    tl.store(by_gate + at, found[1])
    tl.store(by_up + at, found[2])


def test_derivatives_of_a_clamped_gate():
    """At its limits too, where PyTorch's clamp handed the gradient on before 2.14 and does no longer."""
    pairs = torch.tensor([-9.0, -7.0, -1.5, 0.0, 0.3, 6.99, 7.0, 7.01], device=DEVICE)
    gate, up = (side.reshape(-1).contiguous() for side in torch.meshgrid(pairs, pairs, indexing="ij"))
    form = Form("clamped", alpha=1.702, limit=7.0, offset=1.0)
    found = torch.full((3, 64), float("nan"), device=DEVICE)
    _apply_gate[(1,)](gate, up, *found, GATE=form.launch_options()["GATE"], BLOCK=64)
    exact = torch.cat((gate, up)).double().requires_grad_()
    wanted = form.hidden(exact)
    wanted.sum().backward()
    for got, want in zip(found, (wanted, *exact.grad.chunk(2)), strict=True):
        torch.testing.assert_close(got.double(), want.detach(), rtol=2e-6, atol=5e-6)


PERSISTENT = Tile(16, 16, 16, persistent=True)
HALF = FLOAT_DTYPES[-1]
TILES = {
    "pointers": (Tile(16, 16, 16), HALF),
    "pointers, persistent": (PERSISTENT, torch.float32),
    "descriptors": (Tile(16, 16, 16, tma=True), torch.float32),
    "descriptors, persistent": (replace(PERSISTENT, tma=True), HALF),
    "wide": (Tile(16, 64, 32, num_stages=2, group=2), torch.float32),
}


def _problem(num_tokens=21, num_experts=3, top_k=2, hidden_size=40, width=24) -> tuple[ExpertLayer, RoutingTable]:
    """Sizes are no multiples of the tiles, which would hide missing masks."""
    layer = expert_layer(num_tokens, num_experts, top_k, hidden_size, width)
    return layer, plain_routing_table(layer.top_k_index, layer.top_k_weights.detach(), num_experts, 16)


def _assert_rows_match(name, got, want, table):
    """Only rows of used tiles are specified."""
    used = int(table.group_start[-1])
    assert_matches(name, got[:used], want[:used])


QUICK = ("pointers, persistent", "descriptors", None)  # every way of reading and of walking once


def _with_tile(which, *values):
    """Parameters of a test; slow with the other tiles."""
    return pytest.param(*values, which, marks=[] if which in QUICK else pytest.mark.slow)


SIDES = {"pointers": (True, False), "pointers, persistent": (True,), "descriptors": (True, False)}
SIDES |= {"descriptors, persistent": (False,), "wide": (False,)}


@pytest.mark.parametrize(
    "contract_last, which", [_with_tile(one, side) for one, sides in SIDES.items() for side in sides]
)
def test_grouped_product(contract_last, which):
    tile, dtype = TILES[which]
    layer, table = _problem()
    rows = plain_permute_tokens(layer.tokens.detach(), table).to(dtype)
    weight = layer.gate_up.detach().to(dtype)  # (E, 2I, H)
    weight = weight if contract_last else weight.transpose(1, 2).contiguous()
    bias = torch.randn(3, 48, device=DEVICE).to(dtype) if tile.persistent else None
    got = grouped_product(rows, weight, table, contract_last, tile, bias)
    exact = None if bias is None else bias.double()
    want = plain_grouped_product(rows.double(), weight.double(), table, contract_last, exact)
    _assert_rows_match("product", got, want, table)


CLAMPED = Form("clamped", alpha=1.7, limit=0.5, offset=1.0)
FORMS = {
    **{name: Form(name) for name in ACTIVATIONS},
    "of gpt-oss": CLAMPED._replace(transposed=True, interleaved=True),
    "transposed": Form(transposed=True),
    "interleaved": CLAMPED._replace(interleaved=True),
}
GATED = [*zip(ACTIVATIONS, TILES, strict=False), ("silu", "wide"), ("relu", None)]
GATED += [(form, which) for form in list(FORMS)[-3:] for which in ("descriptors", "pointers")]
QUICK_FORMS = (("of gpt-oss", "descriptors"), ("transposed", "pointers"))


def _of_form(form: Form, layer: ExpertLayer, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Both matrices as the form wants them."""
    gate_up, down = layer.gate_up.detach().to(dtype), layer.down.detach().to(dtype)
    if form.interleaved:
        gate_up = gate_up.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return tuple(x.transpose(1, 2).contiguous() if form.transposed else x.contiguous() for x in (gate_up, down))


@pytest.mark.parametrize(
    "name, which",
    [
        pytest.param(
            *one, marks=[] if one in QUICK_FORMS or (one[0] in ACTIVATIONS and one[1] in QUICK) else pytest.mark.slow
        )
        for one in GATED
    ],
)
def test_gated_up(name, which):
    """A width of 3 elements is no whole number of 16 bytes: asking for descriptors must not fail."""
    tile, dtype = TILES[which or "descriptors"]
    form = FORMS[name]
    layer, table = _problem() if which else _problem(hidden_size=7, width=3)
    rows = plain_permute_tokens(layer.tokens.detach(), table).to(dtype)
    gate_up, _ = _of_form(form, layer, dtype)
    bias = torch.randn(3, 2 * layer.down.shape[2], device=DEVICE).to(dtype) if form.activation == "clamped" else None
    exact = None if bias is None else bias.double()
    hidden, preactivation = gated_up(rows, gate_up, table, form, save=True, tile=tile, bias=bias)
    want_hidden, want_preactivation = plain_gated_up(
        rows.double(), gate_up.double(), table, form, save=True, bias=exact
    )
    _assert_rows_match("hidden", hidden, want_hidden, table)
    _assert_rows_match("preactivation", preactivation, want_preactivation, table)

    alone, nothing = gated_up(rows, gate_up, table, form, save=False, tile=tile, bias=bias)
    used = int(table.group_start[-1])
    assert nothing.numel() == 0 and torch.equal(alone[:used], hidden[:used])


@pytest.mark.parametrize(
    "columns, tma, dtype, name, width",
    [
        pytest.param(16, True, HALF, "silu", 24, marks=pytest.mark.slow),
        (128, True, torch.float32, "gelu_tanh", 136),
        pytest.param(256, False, HALF, "relu", 136, marks=pytest.mark.slow),
        (128, True, torch.float32, "of gpt-oss", 136),
        pytest.param(16, False, HALF, "of gpt-oss", 24, marks=pytest.mark.slow),
        pytest.param(256, True, HALF, "interleaved", 136, marks=pytest.mark.slow),
    ],
)
def test_gated_backward(columns, tma, dtype, name, width):
    """With one warp, 128 columns are worked on in two parts and 256 in four."""
    form = FORMS[name]
    layer, table = _problem(width=width)
    grad_rows = plain_permute_tokens(torch.randn_like(layer.tokens), table).to(dtype)
    gate_up, down = _of_form(form, layer, dtype)
    _, preactivation = plain_gated_up(
        plain_permute_tokens(layer.tokens.detach(), table), gate_up.double(), table, form, save=True
    )
    preactivation = preactivation.to(dtype)
    tile = Tile(16, columns, 16, num_warps=1, tma=tma)
    want = plain_gated_backward(grad_rows.double(), down.double(), preactivation.double(), table, form)
    got = gated_backward(grad_rows, down, preactivation, table, form, tile)
    _assert_rows_match("gradient of the pre-activations", got[0], want[0], table)
    _assert_rows_match("weighted hidden", got[1], want[1], table)
    partials = got[2].sum(0).to(dtype)  # float32 sums of products with h', which is rounded
    _assert_rows_match("gradient of the gate weights", partials, want[2].sum(0), table)

    kept = preactivation.clone()
    over, _, _ = gated_backward(grad_rows, down, preactivation, table, form, tile, in_place=True)
    used = int(table.group_start[-1])
    assert over.data_ptr() == preactivation.data_ptr() and not torch.equal(kept, preactivation)
    assert torch.equal(over[:used], got[0][:used])


def test_products_that_cannot_be_persistent_ignore_it():
    """One tile a program, however the tile is marked: fewer programs would leave tiles out."""
    layer, table = _problem(num_tokens=12, num_experts=2, hidden_size=24, width=24)
    grad_rows = plain_permute_tokens(torch.randn_like(layer.tokens), table)
    preactivation = torch.randn(grad_rows.shape[0], 48, dtype=grad_rows.dtype, device=DEVICE)
    inputs = (grad_rows, layer.down.detach(), preactivation)
    got = gated_backward(*(tensor.float() for tensor in inputs), table, Form(), PERSISTENT)
    want = plain_gated_backward(*inputs, table, Form())
    _assert_rows_match("gradient of the pre-activations", got[0], want[0], table)
    gradient = weight_gradient(grad_rows.float(), got[1], table, PERSISTENT)
    assert_matches("gradient", gradient, plain_weight_gradient(grad_rows, want[1], table))


@pytest.mark.parametrize("which", [_with_tile(name) for name in TILES])
def test_weight_gradient(which):
    tile, dtype = TILES[which]
    layer, table = _problem(num_experts=5)
    left = plain_permute_tokens(torch.randn_like(layer.tokens), table).to(dtype)
    right = plain_permute_tokens(layer.tokens.detach(), table).to(dtype)[:, :24].contiguous()
    got = weight_gradient(left, right, table, replace(tile, block_k=16))
    assert_matches("gradient", got, plain_weight_gradient(left.double(), right.double(), table))


@pytest.mark.parametrize("weighted", [True, False])
def test_bias_gradient(weighted):
    layer, table = _problem(num_experts=5, hidden_size=136)
    rows = plain_permute_tokens(layer.tokens.detach(), table).float()
    bias = torch.randn(5, 136, device=DEVICE) if weighted else None
    got, partials = bias_gradient(rows, table, bias)
    want, want_partials = plain_bias_gradient(rows.double(), table, bias if bias is None else bias.double())
    assert_matches("gradient", got, want)
    if weighted:
        _assert_rows_match("bias' part of the gradient of w", partials.sum(0), want_partials[0], table)
    twice, _ = bias_gradient(rows, table, bias, total=got.clone())
    assert_matches("sum", twice, 2 * want)


def test_experts_without_rows_get_zero_gradients():
    layer, _ = _problem(num_experts=4, top_k=1)
    table = plain_routing_table(torch.full_like(layer.top_k_index, 2), layer.top_k_weights.detach(), 4, 16)
    rows = plain_permute_tokens(layer.tokens.detach().float(), table)
    gradient = weight_gradient(rows, rows, table, Tile(16, 16, 16))
    assert gradient[[0, 1, 3]].eq(0).all() and gradient[2].ne(0).any()


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
