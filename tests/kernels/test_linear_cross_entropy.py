"""Fused head and loss against cross entropy in float64: losses, gradients, chunks, ignored labels and odd sizes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_moe_cpt.kernels.linear_cross_entropy as module
from hf_moe_cpt.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    plain_linear_cross_entropy,
    tokens_per_chunk,
)
from tests.helpers.kernel_device import DEVICE, FLOAT_DTYPES
from tests.helpers.tolerances import assert_matches


# N, H, V, bytes of logits: rows of 48 float32 logits are 192 bytes each
SHAPES = {
    "one chunk": (9, 16, 37, 2**20),
    "three chunks, the last one short": (8, 16, 37, 3 * 148),
    "a chunk for every token": (5, 8, 37, 1),
    "one token": (1, 8, 37, 2**20),
    "power of two": (6, 16, 64, 2 * 256),
    "two words": (6, 3, 2, 2**20),
    "one word": (4, 3, 1, 2**20),
    "blocks of logits": (3, 8, 131, 2**20),
}
UPSTREAM = -0.37


def case(N, H, V, dtype=torch.float32, seed=0, ignored=0.3, size=1.0):
    """Hidden states, weight and targets, some of them ignored; the first one never is."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator) * size
    weight = torch.randn(V, H, generator=generator)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[1:][torch.rand(N - 1, generator=generator) < ignored] = -100
    return [tensor.to(DEVICE).requires_grad_() for tensor in (hidden.to(dtype), weight.to(dtype))] + [
        targets.to(DEVICE)
    ]


def reference(hidden, weight, targets, upstream=UPSTREAM):
    """Losses and gradients by torch's own function in float64."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    losses = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    gradients = torch.autograd.grad(losses.sum() * upstream, (hidden, weight))
    return losses.sum(), losses, *gradients


def assert_all_match(got, want, dtype):
    limit = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    for name, left, right in zip(("sum", "losses", "hidden", "weight"), got, want, strict=True):
        assert_matches(name, left, right, limit)


def fused(hidden, weight, targets, max_logits_bytes=2**20, upstream=UPSTREAM):
    loss_sum, losses = linear_cross_entropy(hidden, weight, targets, max_logits_bytes)
    return loss_sum, losses, *torch.autograd.grad(loss_sum * upstream, (hidden, weight))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("N, H, V, max_logits_bytes", SHAPES.values(), ids=SHAPES)
def test_losses_and_gradients(monkeypatch, N, H, V, max_logits_bytes, dtype):
    monkeypatch.setattr(module, "MAX_BLOCK", 32)
    tensors = case(N, H, V, dtype)
    got = fused(*tensors, max_logits_bytes)
    assert_all_match(got, reference(*tensors), dtype)
    assert (got[0].dtype, got[1].dtype, got[2].dtype, got[3].dtype) == (torch.float32, torch.float32, dtype, dtype)
    assert not got[1].requires_grad


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 70), st.integers(1, 2000), st.integers(0, 99))
def test_any_shape(N, H, V, max_logits_bytes, seed):
    tensors = case(N, H, V, seed=seed)
    want = reference(*tensors)
    for name, left, right in zip(range(4), fused(*tensors, max_logits_bytes), want, strict=True):
        torch.testing.assert_close(left.double(), right, rtol=1e-4, atol=2e-5, msg=f"{name} of {N, H, V}")


def test_all_ignored_adds_nothing():
    hidden, weight, targets = case(5, 8, 37)
    loss_sum, losses, *gradients = fused(hidden, weight, torch.full_like(targets, -100))
    assert loss_sum.item() == 0.0
    for tensor in (losses, *gradients):
        assert torch.equal(tensor, torch.zeros_like(tensor))


def test_no_tokens():
    hidden, weight, targets = (tensor[:0] if index != 1 else tensor for index, tensor in enumerate(case(2, 8, 37)))
    loss_sum, losses = linear_cross_entropy(hidden, weight, targets)
    assert loss_sum.item() == 0.0
    assert losses.shape == (0,)
    assert torch.autograd.grad(loss_sum, weight)[0].eq(0).all()


@pytest.mark.parametrize("size", [1e3, 1e4])
def test_logits_whose_exponentials_overflow(size):
    tensors = case(6, 16, 37, size=size)
    assert_all_match(fused(*tensors), reference(*tensors), torch.float32)


def test_a_block_of_impossible_words(monkeypatch):
    monkeypatch.setattr(module, "MAX_BLOCK", 16)
    hidden, weight, targets = case(4, 8, 37, ignored=0.0)
    hidden, weight = hidden.detach().abs(), weight.detach()
    weight[:16] = float("-inf")
    targets = targets.clamp(min=16)
    want = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="none")
    assert_matches("losses", linear_cross_entropy(hidden, weight, targets)[1], want)


def test_a_target_outside_the_vocabulary_is_loud():
    hidden, weight, targets = case(4, 8, 37, ignored=0.0)
    for wrong in (37, -1, 2**33):
        targets[2] = wrong
        losses = linear_cross_entropy(hidden, weight, targets)[1]
        assert losses.isnan().tolist() == [False, False, True, False]


def test_gradients_come_only_where_they_are_needed():
    hidden, weight, targets = case(5, 8, 37)
    want = reference(hidden, weight, targets, upstream=1.0)
    for which, frozen in enumerate((weight, hidden)):
        frozen.requires_grad_(False)
        loss_sum, _ = linear_cross_entropy(hidden, weight, targets)
        (gradient,) = torch.autograd.grad(loss_sum, (hidden, weight)[which])
        assert_matches("gradient", gradient, want[2 + which])
        frozen.requires_grad_(True)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets)[0].requires_grad


def test_several_backward_passes():
    hidden, weight, targets = case(5, 8, 37)
    loss_sum, _ = linear_cross_entropy(hidden, weight, targets)
    (loss_sum * 2).backward(retain_graph=True)
    (loss_sum * -0.5).backward()
    linear_cross_entropy(hidden, weight, targets, 1)[0].backward()  # a second micro-batch
    want = reference(hidden, weight, targets, upstream=2.5)
    assert_matches("hidden", hidden.grad, want[2])
    assert_matches("weight", weight.grad, want[3])


def test_a_second_derivative_is_refused():
    hidden, weight, targets = case(5, 8, 37)
    loss_sum, _ = linear_cross_entropy(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(loss_sum**2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_the_same_bits_every_time():
    first, second = (fused(*case(7, 16, 37), 3 * 148) for _ in range(2))
    assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


def test_tensors_that_are_views():
    hidden, weight, targets = case(6, 16, 37)
    wide = torch.randn(6, 40, device=DEVICE)
    wide[:, 3:19] = hidden.detach()
    view = wide[:, 3:19].requires_grad_()
    turned = weight.detach().T.contiguous().T.requires_grad_()
    every_other = targets.repeat_interleave(2)[::2]
    assert_all_match(fused(view, turned, every_other, 296), reference(hidden, weight, targets), torch.float32)


def test_operator_contract():
    hidden, weight, targets = case(5, 8, 37)
    for needs in ((True, True), (True, False), (False, False)):
        torch.library.opcheck(module._linear_cross_entropy, (hidden, weight, targets, torch.float32, 296, *needs))


@pytest.mark.compiles
def test_one_graph():
    def loss(hidden, weight, targets):
        return linear_cross_entropy(hidden * 2, weight, targets, 296)[0] * UPSTREAM

    tensors = case(5, 8, 37)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*tensors), tensors[:2])
    want = torch.autograd.grad(loss(*tensors), tensors[:2])
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("max_logits_bytes", [2**20, 200])
def test_autocast_multiplies_in_its_type_and_adds_up_in_float32(max_logits_bytes):
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
    hidden, weight, targets = case(7, 16, 37)
    with torch.autocast(DEVICE.type, dtype):
        got = fused(hidden, weight, targets, max_logits_bytes)
        loss_sum, losses = plain_linear_cross_entropy(hidden, weight, targets)
        want = loss_sum, losses, *torch.autograd.grad(loss_sum * UPSTREAM, (hidden, weight))
    assert [tensor.dtype for tensor in got] == [torch.float32] * 4
    assert_all_match(got, want, dtype)
    rounded = [tensor.detach().to(dtype) for tensor in (hidden, weight)]
    assert_matches("losses", got[1], reference(*rounded, targets)[1], 3e-3)


def test_logits_of_all_tokens_are_never_held(monkeypatch):
    sizes = []
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, out: sizes.append(out.shape) or multiply(*args, out=out))
    fused(*case(8, 16, 37), 3 * 148)
    logits = [rows for rows, columns in sizes if columns == 37]
    assert logits == [3, 3, 2]


def test_float64_and_types_that_differ_go_to_the_definition():
    hidden, weight, targets = case(5, 8, 37, torch.float64)
    got = linear_cross_entropy(hidden, weight, targets)
    assert got[1].dtype == torch.float64
    assert_matches("losses", got[1], reference(hidden, weight, targets)[1])
    with pytest.raises(RuntimeError, match="dtype"):
        linear_cross_entropy(hidden.float(), weight, targets)


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, targets = case(5, 8, 37)
    for wrong in ((hidden[None], weight, targets), (hidden, weight[:, 1:], targets), (hidden, weight, targets[1:])):
        with pytest.raises(ValueError, match=r"must be \(N, H\), \(V, H\) and \(N,\)"):
            linear_cross_entropy(*wrong)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 10**6), st.integers(1, 300_000), st.sampled_from([2, 4]), st.integers(1, 2**31))
def test_chunks_fit_and_are_even(N, V, size, limit):
    rows = tokens_per_chunk(N, V, size, limit)
    assert rows == 1 or rows * V * size <= limit
    chunks = -(-N // rows)
    assert chunks * rows - N < chunks * 128  # the last chunk may be shorter, by less than the rounding of all
    assert tokens_per_chunk(32768, 128256, 2, module.MAX_LOGITS_BYTES) == 2048


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_synchronisation_and_little_memory_at_full_size(dtype):
    N, H, V = 6144, 512, 50257
    hidden = torch.randn(N, H, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, device=DEVICE, dtype=dtype).mul_(0.05).requires_grad_()
    targets = torch.randint(0, V, (N,), device=DEVICE)
    linear_cross_entropy(hidden, weight, targets)[0].backward()  # compiles
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (linear_cross_entropy(hidden, weight, targets, 128 * 2**20)[0] / N).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    held = torch.cuda.max_memory_allocated() - before
    assert held < 150 * 2**20 + 3 * (weight.nbytes + hidden.nbytes)
    loss_sum, _ = plain_linear_cross_entropy(hidden, weight, targets)
    want = torch.autograd.grad(loss_sum / N, (hidden, weight))
    assert_matches("hidden", hidden.grad, want[0], 2e-2 if dtype == torch.bfloat16 else 1e-4)
    assert_matches("weight", weight.grad, want[1], 2e-2 if dtype == torch.bfloat16 else 1e-4)
