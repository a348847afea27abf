"""The fused router tail against its float64 definition, autograd, gradcheck and the model's router and losses."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_moe_cpt.kernels import logit_blocks
from hf_moe_cpt.kernels import router_tail as tail_module
from hf_moe_cpt.kernels.router_tail import (
    RouterTail,
    plain_router_tail,
    plain_router_tail_backward,
    router_tail,
    router_tail_backward_operator,
    router_tail_operator,
)
from hf_moe_cpt.modeling import losses_cpt_moe
from tests.helpers.kernel_device import DEVICE, FLOAT_DTYPES
from tests.helpers.tolerances import assert_matches


WITH_GRADIENT = ("gates", "probability_sum", "z_square_sum")
WITHOUT_GRADIENT = ("index", "counts")


def mask_of(tokens: int) -> torch.Tensor:
    """About a quarter is padding; the first token never is."""
    mask = torch.rand(tokens, device=DEVICE) < 0.75
    mask[0] = True
    return mask


def upstream(tokens: int, experts: int, top_k: int) -> tuple[torch.Tensor, ...]:
    """Gradients of gates, probability_sum and z_square_sum, of about the size of each other's effect."""
    shapes = ((tokens, top_k), (experts,), ())
    return tuple(scale * torch.randn(shape, device=DEVICE) for scale, shape in zip((1, 1, 0.1), shapes, strict=True))


def gradient(tail: RouterTail, logits: torch.Tensor, upstream: tuple[torch.Tensor, ...]) -> torch.Tensor:
    outputs = [getattr(tail, name) for name in WITH_GRADIENT]
    (grad,) = torch.autograd.grad(outputs, logits, [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)])
    return grad


def assert_equals_definition(logits: torch.Tensor, top_k: int, normalize: bool, mask: torch.Tensor | None) -> None:
    """Every output, and the gradient of the logits from random gradients of all three outputs that carry one."""
    logits = logits.requires_grad_()
    exact = logits.detach().double().requires_grad_()
    got, want = router_tail(logits, top_k, normalize, mask), plain_router_tail(exact, top_k, normalize, mask)
    for name in WITHOUT_GRADIENT:
        assert torch.equal(getattr(got, name), getattr(want, name)) and getattr(got, name).dtype == torch.int64, name
    for name in WITH_GRADIENT:
        assert getattr(got, name).dtype == torch.float32
        assert_matches(name, getattr(got, name), getattr(want, name))
    upstream_gradients = upstream(*logits.shape, top_k)
    got_grad, want_grad = gradient(got, logits, upstream_gradients), gradient(want, exact, upstream_gradients)
    assert got_grad.dtype == logits.dtype
    assert_matches("gradient of the logits", got_grad, want_grad)


@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 33),
    share=st.floats(0.0, 0.5),
    normalize=st.booleans(),
    masked=st.booleans(),
)
@example(tokens=1, experts=2, share=0.0, normalize=False, masked=False)
@example(tokens=5, experts=3, share=1.0, normalize=True, masked=True)
@example(tokens=19, experts=256, share=0.03, normalize=True, masked=False)
@example(tokens=5, experts=17, share=0.95, normalize=False, masked=True)
@settings(max_examples=8, deadline=None)
def test_tail_equals_the_definition(tokens: int, experts: int, share: float, normalize: bool, masked: bool) -> None:
    """share: which part of the experts, up to the 16 of the kernels, a token chooses."""
    top_k = min(max(1, round(share * experts)), tail_module.MAX_TOP_K)
    logits = 2 * torch.randn(tokens, experts, device=DEVICE)
    assert_equals_definition(logits, top_k, normalize, mask_of(tokens) if masked else None)


def test_programs_add_up_to_the_same_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five programs of five tiles of two tokens, and a gradient in several programs."""
    monkeypatch.setattr(logit_blocks, "MAX_PROGRAMS", 5)
    monkeypatch.setattr(logit_blocks, "MIN_TILE", 16)
    monkeypatch.setattr(tail_module, "MAX_TILE", 16)
    monkeypatch.setattr(tail_module, "MAX_BACKWARD_TILE", 128)
    assert logit_blocks.token_blocks(47, 7, 16)[:3] == (2, 5, 5)
    assert_equals_definition(torch.randn(47, 7, device=DEVICE), 2, True, mask_of(47))


@pytest.mark.gpu
@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (31, 3), (128, 8)])
def test_tail_of_a_large_batch_is_accurate(experts: int, top_k: int) -> None:
    assert_equals_definition(torch.randn(32768, experts, device=DEVICE), top_k, top_k > 1, mask_of(32768))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_dtype_is_computed_in_fp32(dtype: torch.dtype) -> None:
    order = torch.stack([torch.randperm(9, device=DEVICE) for _ in range(20)])  # distinct in every dtype
    assert_equals_definition((order / 4).to(dtype), 3, True, None)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_logits_overflow_nowhere(offset: float) -> None:
    assert_equals_definition(30 * torch.randn(20, 7, device=DEVICE) + offset, 3, True, None)


def test_first_of_equal_logits_wins() -> None:
    logits = torch.tensor([[1.0, 2, 2, 1, 2], [0, 0, 0, 0, 0], [3, -0.0, 0.0, 3, 0]], device=DEVICE)
    want = torch.tensor([[1, 2, 4, 0], [0, 1, 2, 3], [0, 3, 1, 2]], device=DEVICE)
    assert torch.equal(router_tail(logits, 4).index, want)
    assert torch.equal(plain_router_tail(logits, 4).index, want)


def test_ids_stay_valid_and_distinct_whatever_the_logits_hold() -> None:
    """Wrong ids would make the experts read foreign memory; NaN gates remain visible."""
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[0, nan, 1, nan, 0], [0, -inf, -inf, -inf, 1], [inf, 0, 0, 2, inf]], device=DEVICE)
    tail = router_tail(logits, 3)
    assert torch.equal(tail.index, torch.tensor([[1, 3, 2], [4, 0, 1], [0, 4, 3]], device=DEVICE))
    assert torch.equal(tail.index, plain_router_tail(logits, 3).index)
    assert tail.gates.isnan().any(dim=1).tolist() == [True, False, True]


def test_tail_says_what_the_models_router_and_losses_say() -> None:
    logits, mask = 2 * torch.randn(60, 6, dtype=torch.float64, device=DEVICE), mask_of(60)
    tail = router_tail(logits, 2, False, mask)
    scores = logits.softmax(dim=-1)
    assert torch.equal(tail.index, scores.topk(2, dim=-1).indices)
    torch.testing.assert_close(tail.gates, scores.gather(1, tail.index))
    assert torch.equal(tail.counts, losses_cpt_moe.expert_counts(tail.index, 6, mask))
    balance = 6 * (tail.counts / tail.counts.sum() * tail.probability_sum / mask.sum()).sum()
    torch.testing.assert_close(balance, losses_cpt_moe.load_balancing_loss(logits, tail.counts, mask))
    torch.testing.assert_close(tail.z_square_sum / mask.sum(), losses_cpt_moe.router_z_loss(logits, mask))


def test_padding_is_routed_but_counts_nowhere() -> None:
    logits, mask = torch.randn(33, 6, device=DEVICE), mask_of(33)
    mask[5] = False
    alone, routed = router_tail(logits[mask], 2), router_tail(logits, 2)
    logits[~mask, 3] = float("nan")
    tail = router_tail(logits, 2, False, mask)
    assert torch.equal(tail.counts, alone.counts)
    assert_matches("probability_sum", tail.probability_sum, alone.probability_sum)
    assert_matches("z_square_sum", tail.z_square_sum, alone.z_square_sum)
    assert torch.equal(tail.index[mask], routed.index[mask]) and (tail.index[~mask, 0] == 3).all()


@pytest.mark.parametrize("name", WITH_GRADIENT)
@pytest.mark.parametrize("normalize", [False, True])
def test_each_output_has_its_own_gradient(name: str, normalize: bool) -> None:
    """The other two are unused."""
    mask = mask_of(11)
    logits = torch.randn(11, 5, device=DEVICE, requires_grad=True)
    exact = logits.detach().double().requires_grad_()
    for z, tail in ((logits, router_tail), (exact, plain_router_tail)):
        getattr(tail(z, 2, normalize, mask), name).square().sum().backward()
    assert_matches(name, logits.grad, exact.grad)


def test_gradients_without_strides_are_read_right() -> None:
    """A sum sends back one value for all elements. That of all probabilities is constant: it adds no gradient."""
    logits = torch.randn(11, 5, device=DEVICE, requires_grad=True)
    exact = logits.detach().double().requires_grad_()
    tail = router_tail(logits, 2)
    (tail.gates.sum() + tail.probability_sum.sum()).backward()
    plain_router_tail(exact, 2).gates.sum().backward()
    assert_matches("gradient of the logits", logits.grad, exact.grad)


def test_padding_gets_the_gradient_of_its_gates_only() -> None:
    mask = torch.tensor([True, False], device=DEVICE)
    logits = torch.randn(2, 5, device=DEVICE, requires_grad=True)
    tail = router_tail(logits, 2, False, mask)
    (tail.probability_sum.square().sum() + tail.z_square_sum).backward(retain_graph=True)
    assert (logits.grad[1] == 0).all() and (logits.grad[0] != 0).all()
    tail.gates.sum().backward()
    assert (logits.grad[1] != 0).all()


@pytest.mark.parametrize("normalize", [False, True])
def test_backward_formula_passes_gradcheck(normalize: bool) -> None:
    """In float64, where the operator is the definition forwards and the formula backwards."""
    mask = mask_of(6)

    def outputs(logits: torch.Tensor) -> list[torch.Tensor]:
        tail = router_tail(logits, 3, normalize, mask)
        return [getattr(tail, name) for name in WITH_GRADIENT]

    assert torch.autograd.gradcheck(outputs, torch.randn(6, 5, dtype=torch.float64, device=DEVICE, requires_grad=True))


@pytest.mark.parametrize(("experts", "top_k"), [(tail_module.MAX_EXPERTS + 1, 2), (20, tail_module.MAX_TOP_K + 1)])
def test_what_the_kernels_do_not_serve_is_computed_plainly(experts: int, top_k: int) -> None:
    logits = torch.randn(4, experts, device=DEVICE, requires_grad=True)
    tail, want = router_tail(logits, top_k), plain_router_tail(logits.detach(), top_k)
    assert all(torch.equal(got, expected) for got, expected in zip(tail, want, strict=True))
    upstream_gradients = upstream(4, experts, top_k)
    want = plain_router_tail_backward(logits.detach(), tail.index, None, False, *upstream_gradients)
    assert torch.equal(gradient(tail, logits, upstream_gradients), want)


def test_no_tokens_give_empty_choices_and_zero_sums() -> None:
    logits = torch.empty(0, 5, device=DEVICE, requires_grad=True)
    tail = router_tail(logits, 2)
    assert tail.gates.shape == tail.index.shape == (0, 2)
    assert (tail.probability_sum == 0).all() and tail.z_square_sum == 0 and (tail.counts == 0).all()
    tail.probability_sum.sum().backward()
    assert logits.grad.shape == (0, 5)


def test_memory_layout_does_not_matter_and_runs_agree_bit_for_bit() -> None:
    logits, mask = torch.randn(5, 24, device=DEVICE).t().requires_grad_(), mask_of(48)[::2]
    dense, upstream_gradients = logits.detach().contiguous().requires_grad_(), upstream(24, 5, 2)
    tail, again = router_tail(logits, 2, True, mask), router_tail(dense, 2, True, mask.clone())
    assert all(torch.equal(got, expected) for got, expected in zip(tail, again, strict=True))
    assert torch.equal(gradient(tail, logits, upstream_gradients), gradient(again, dense, upstream_gradients))


@pytest.mark.parametrize(("top_k", "message"), [(0, "between 1 and the 4 experts, got 0"), (5, "got 5")])
def test_impossible_numbers_of_experts_are_refused(top_k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router_tail(torch.zeros(3, 4), top_k)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(tokens, experts\), got \(3,\)"):
        router_tail(torch.zeros(3), 1)
    with pytest.raises(ValueError, match=r"token_mask must be \(3,\)"):
        router_tail(torch.zeros(3, 4), 1, False, torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize("masked", [False, True])
def test_operators_keep_the_rules_of_operators(masked: bool) -> None:
    logits, mask = torch.randn(6, 5, device=DEVICE, requires_grad=True), mask_of(6) if masked else None
    torch.library.opcheck(router_tail_operator, (logits, 2, True, mask))
    index = router_tail(logits, 2).index
    arguments = (logits.detach(), index, mask, True, *upstream(6, 5, 2))
    torch.library.opcheck(router_tail_backward_operator, arguments)


@pytest.mark.compiles
def test_tail_compiles_into_one_graph_with_its_gradient() -> None:
    def penalised(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        tail = router_tail(2 * logits, 2, True, mask)
        balance = (tail.counts * tail.probability_sum).sum() / tail.counts.sum()
        return tail.gates.square().sum() + balance + tail.z_square_sum + 0 * tail.index.sum()

    logits, mask = torch.randn(17, 5, device=DEVICE, requires_grad=True), mask_of(17)
    compiled = torch.compile(penalised, fullgraph=True, backend="aot_eager")(logits, mask)
    eager = penalised(logits, mask)
    assert torch.equal(compiled, eager)
    assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in (compiled, eager)))
