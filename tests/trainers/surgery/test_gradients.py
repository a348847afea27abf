"""Terms kept apart add up to the step; the projection against GRU as published, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_moe_cpt.trainers.surgery.gradients import (
    TermGradients,
    combine,
    cosines,
    inner_products,
    is_noise,
    pass_rounding,
    projection_coefficients,
)
from tests.helpers.tolerances import assert_matches


def _gradients(num_terms: int, size: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(num_terms)]


def _products(gradients: list[torch.Tensor]) -> torch.Tensor:
    return inner_products([[gradient] for gradient in gradients])


def _norms(products: torch.Tensor) -> torch.Tensor:
    return products.diagonal().sqrt()


def _gru(gradient: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    """As in the authors' code: without the component that points against the anchor."""
    return gradient - torch.dot(gradient, anchor).clamp(max=0.0) / torch.dot(anchor, anchor) * anchor


@given(st.integers(2, 6), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_two_sums_are_projected_as_gru_projects_two_gradients(size, seed):
    gradients = _gradients(5, size, seed)
    anchor = gradients[2] + gradients[3]
    coefficients = projection_coefficients(_products(gradients), [0, 1], [2, 3])
    (got,) = combine([[gradient] for gradient in gradients], coefficients)
    want = _gru(gradients[0] + gradients[1], anchor) + anchor + gradients[4]
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-11)
    assert projection_coefficients(_products(gradients), [1], []).tolist() == [1.0] * 5


def test_terms_that_agree_stay_to_the_bit_and_what_is_no_number_is_not_hidden():
    gradients = [torch.tensor([1.0, 2.0, 0.1]), torch.tensor([0.3, 1.0, 0.0]), torch.zeros(3)]
    products = _products(gradients)
    assert projection_coefficients(products, [0], [1]).tolist() == [1.0] * 3
    assert projection_coefficients(products, [0], [2]).tolist() == [1.0] * 3, "an anchor of 0"
    products = _products([torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 1.0])])
    assert projection_coefficients(products, [0], [1]).isnan().any()
    assert projection_coefficients(products, [1], [0]).isnan().any()


def test_lists_of_parameters_are_one_long_gradient_and_shards_add_up():
    """Shapes do not matter, None counts as zeros and stays None where no term has a gradient."""
    flat = _gradients(3, 10, seed=4)
    parts = [[g[:4].view(2, 2), g[4:5].view(()), None, g[5:].view(5, 1)] for g in flat]
    assert_matches("products", inner_products(parts), _products(flat))
    factors = torch.tensor([1.0, -2.0, 0.5])
    got = combine(parts, factors)
    assert got[2] is None and [part.shape for part in got if part is not None] == [(2, 2), (), (5, 1)]
    whole = torch.cat([part.flatten() for part in got if part is not None])
    assert_matches("combined", whole, combine([[g] for g in flat], factors)[0])
    without = [part if index else None for index, part in enumerate(parts[0])]
    zeroed = torch.cat([torch.zeros(4).double(), flat[0][4:]])
    assert_matches("products with None", inner_products([without, parts[1]]), _products([zeroed, flat[1]]))
    gradients = _gradients(3, 12, seed=5)
    shards = [[g[part] for g in gradients] for part in (slice(0, 5), slice(5, 12))]
    assert_matches("products", sum(_products(shard) for shard in shards), _products(gradients))


def test_norms_and_cosines():
    gradients = [*_gradients(3, 7, seed=6), torch.zeros(7).double()]
    products, nothing = _products(gradients), torch.zeros(4, dtype=torch.bool)
    assert_matches("norms", _norms(products), torch.stack([g.norm() for g in gradients]))
    want = [[torch.nn.functional.cosine_similarity(a, b, dim=0) for b in gradients[:3]] for a in gradients[:3]]
    found = cosines(products, nothing)
    assert_matches("cosines", found[:3, :3], torch.tensor(want, dtype=torch.float64))
    assert found[3].isnan().all(), "0 has no direction"
    without = cosines(products, torch.tensor([False, True, False, False]))
    assert without[1].isnan().all() and without[0, 2] == found[0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rounding_leaves_of_a_divergence_that_is_zero_is_noise_and_a_small_one_is_not(dtype):
    """Of logits (64, 100): p - p where p is computed twice from rounded logits, against likelihood, p - 1."""
    generator, eps = torch.Generator().manual_seed(0), torch.finfo(dtype).eps
    logits = 2.0 * torch.randn(64, 100, generator=generator, dtype=torch.float64)
    exact = logits.softmax(-1)
    likelihood = exact - torch.nn.functional.one_hot(torch.arange(64), 100)
    rounded = [(scale * logits).to(dtype).double() / scale for scale in (1.0, 1.1)]
    noise = rounded[0].softmax(-1) - rounded[1].softmax(-1)
    moved = (logits + 100 * eps * torch.randn(64, 100, generator=generator, dtype=torch.float64)).softmax(-1) - exact
    lengths = _norms(_products([likelihood, noise, moved, torch.zeros_like(noise)]))
    assert 0 < lengths[1] and is_noise(lengths, eps).tolist() == [False, True, False, True]
    weights = torch.tensor([1.0, 1e4, 1e4, 1.0])
    assert is_noise(lengths * weights, eps, weights).tolist() == [False, True, False, True]
    assert not is_noise(torch.tensor([math.nan, 1.0, 0.0]), eps).any(), "nothing is hidden by a NaN"


def test_half_precision_is_added_up_in_float32_and_rounds_as_the_coarsest_type():
    """4,096 products of about 1e-4: a sum in bfloat16 stops growing long before the end."""
    gradient = torch.full((64, 64), 0.01, dtype=torch.bfloat16)
    products = inner_products([[gradient], [gradient]])
    assert products.dtype == torch.float32
    assert products[0, 1].item() == pytest.approx(4096 * gradient[0, 0].double().item() ** 2, rel=1e-5)
    (half,) = combine([[gradient], [gradient]], torch.tensor([0.25, 0.25]))
    assert half.dtype == torch.bfloat16 and torch.equal(half, 0.5 * gradient)
    assert pass_rounding("bf16") == 2**-7 and pass_rounding("fp16") == 2**-10 and pass_rounding("no") == 2**-52
    assert TermGradients([nn.Parameter(torch.zeros(1))], pass_rounding("no")).rounding == 2**-23
    assert TermGradients([nn.Parameter(torch.zeros(1))], pass_rounding("bf16")).rounding == 2**-7
    assert TermGradients([nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))]).rounding == 2**-7


def _every_step(device):
    for options in ({}, {"mode": "project"}):
        parameters = [nn.Parameter(torch.empty(3, 2, device=device)), nn.Parameter(torch.empty(4, device=device))]
        held = TermGradients(parameters)
        for name in ("unlearn", "update", "retain"):
            with held.collect(name):
                for parameter in parameters:
                    parameter.grad = torch.ones_like(parameter)
        yield held, options
        assert [parameter.grad.shape for parameter in parameters] == [(3, 2), (4,)]


def test_nothing_asks_for_a_value():
    for held, options in _every_step("meta"):
        held.merge(**options)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    for held, options in _every_step("cuda"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            held.merge(**options)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 2).double()), nn.Parameter(torch.randn(4).double())]


def _losses(parameters, retain: float = 1.0):
    """Three terms; the second does not touch the last parameter, the third pulls against the first."""
    first, second = parameters
    yield "unlearn", (first**2).sum() + (second * torch.arange(4.0)).sum()
    yield "update", first.sin().sum()
    yield "retain", retain * (-2.0 * (first**2).sum() + second.cos().sum())


def _flat(parameters):
    return torch.cat([p.grad.flatten() for p in parameters])


def _merged(micro_batches: int = 1, retain: float = 1.0, **options):
    parameters = _parameters()
    held = TermGradients(parameters)
    for _ in range(micro_batches):
        for name, loss in _losses(parameters, retain):
            with held.collect(name):
                (loss / micro_batches).backward()
        assert all(p.grad is None for p in parameters)
    facts, present = held.merge(**options)
    return _flat(parameters), {name: value for name, value in facts.items() if present.get(name, True)}


def _gradients_of_terms():
    found = []
    for name, _ in _losses(_parameters()):
        parameters = _parameters()
        dict(_losses(parameters))[name].backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        found.append(torch.cat([g.flatten() for g in grads]))
    return found


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_plain_step_is_the_gradient_of_the_sum(micro_batches):
    parameters = _parameters()
    sum(loss for _, loss in _losses(parameters)).backward()
    step, facts = _merged(micro_batches)
    assert torch.allclose(step, _flat(parameters), rtol=1e-12)
    first, second, third = _gradients_of_terms()
    assert torch.allclose(facts["grad_norm/unlearn"], first.norm(), rtol=1e-12)
    cosine = torch.nn.functional.cosine_similarity(first, third, dim=0)
    assert cosine < 0 and torch.allclose(facts["grad_cosine/unlearn_retain"], cosine, rtol=1e-12)
    assert len(facts) == 6


def test_steps_are_projected_as_published():
    first, second, third = _gradients_of_terms()
    step, _ = _merged(mode="project")
    assert torch.allclose(step, _gru(first, third) + second + third, rtol=1e-12)


@pytest.mark.parametrize("options", [{"mode": "project"}, {}])
def test_a_gradient_that_is_noise_has_no_direction(options):
    """A retain term at 1e-17 of the others: no cosine with it, and the step is the step without it."""
    step, facts = _merged(retain=1e-17, **options)
    without, _ = _merged(retain=0.0, **options)
    assert torch.allclose(step, without, rtol=1e-12)
    assert [name for name in facts if "cosine" in name] == ["grad_cosine/unlearn_update"]
    assert 0 < facts["grad_norm/retain"] < 1e-15
    _, found = _merged(retain=1e-14, weights={"unlearn": 1.0, "update": 1.0, "retain": 1.0})
    _, known = _merged(retain=1e-14, weights={"unlearn": 1.0, "update": 1.0, "retain": 1e3})
    assert "grad_cosine/unlearn_retain" in found and "grad_cosine/unlearn_retain" not in known
