"""Projections against PCGrad and GRU written as their papers have them, on flat float64 gradients; forms and types.

Terms kept apart add up to the step, and projections on inner products are those on the gradients themselves.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_moe_cpt.trainers.surgery.gradients import (
    TermGradients,
    clip_coefficients,
    combine,
    conflict_coefficients,
    cosines,
    inner_products,
    is_noise,
    norms,
    pass_rounding,
    project_away,
    project_conflicts,
    projection_coefficients,
    projection_order,
    smoothed,
)
from tests.helpers.tolerances import assert_matches


def _gradients(num_terms: int, size: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(num_terms)]


def _pcgrad(gradients: list[torch.Tensor], order: list[list[int]]) -> list[torch.Tensor]:
    """As published: on the parameters themselves, one projection after the other."""
    projected = []
    for i, g in enumerate(gradients):
        for j in order[i]:
            product = torch.dot(g, gradients[j])
            if product < 0:
                g = g - product / torch.dot(gradients[j], gradients[j]) * gradients[j]
        projected.append(g)
    return projected


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_conflicts_are_projected_as_published(num_terms, size, seed):
    gradients, order = _gradients(num_terms, size, seed), projection_order(num_terms, seed, step=3)
    for got, want in zip(project_conflicts(gradients, order), _pcgrad(gradients, order), strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-11)
    step = combine(gradients, conflict_coefficients(inner_products(gradients), order).sum(0))
    assert torch.allclose(step, sum(_pcgrad(gradients, order)), rtol=1e-9, atol=1e-11)


def test_two_terms_in_conflict_end_at_right_angles():
    left, right = torch.tensor([1.0, 0.0]).double(), torch.tensor([-1.0, 2.0]).double()
    one, other = project_conflicts([left, right])
    assert_matches("left", one, torch.tensor([0.8, 0.4], dtype=torch.float64))
    assert_matches("right", other, torch.tensor([0.0, 2.0]).double())
    assert abs(torch.dot(one, right)) < 1e-14 and abs(torch.dot(other, left)) < 1e-14


def test_terms_that_agree_stay_as_they_are_to_the_bit():
    gradients = [torch.tensor([1.0, 2.0, 0.1]), torch.tensor([0.3, 1.0, 0.0]), torch.zeros(3)]
    for got, want in zip(project_conflicts(gradients), gradients, strict=True):
        assert torch.equal(got, want)
    assert torch.equal(project_away(gradients[0], gradients[1]), gradients[0])
    assert torch.equal(project_away(gradients[0], gradients[2]), gradients[0]), "an anchor of 0"


@given(st.integers(2, 6), st.integers(0, 10_000), st.sampled_from([-1.0, -0.5, -0.2, 0.0]))
@settings(max_examples=25, deadline=None)
def test_projecting_away_takes_out_what_points_against_the_anchor(size, seed, min_cosine):
    gradient, anchor = _gradients(2, size, seed)
    got = project_away(gradient, anchor, min_cosine)
    cosine = torch.nn.functional.cosine_similarity(gradient, anchor, dim=0)
    taken = cosine.clamp(min_cosine, 0.0) * gradient.norm() * anchor / anchor.norm()
    assert_matches("projected", got, gradient - taken, 1e-10)
    if cosine < 0 and min_cosine == -1.0:
        assert abs(torch.dot(got, anchor)) < 1e-10
    assert torch.dot(got, anchor) >= min(torch.dot(gradient, anchor).item(), 0.0) - 1e-10


def test_lists_of_parameters_are_one_long_gradient():
    """Shapes do not matter, None counts as zeros and stays None where no term has a gradient."""
    flat = _gradients(3, 10, seed=4)
    parts = [[g[:4].view(2, 2), g[4:5].view(()), None, g[5:].view(5, 1)] for g in flat]
    assert_matches("products", inner_products(parts), inner_products(flat))
    for got, want in zip(project_conflicts(parts), project_conflicts(flat), strict=True):
        assert got[2] is None and [part.shape for part in got if part is not None] == [(2, 2), (), (5, 1)]
        assert_matches("projected", torch.cat([part.flatten() for part in got if part is not None]), want)
    without = [part if index else None for index, part in enumerate(parts[0])]
    zeroed = torch.cat([torch.zeros(4).double(), flat[0][4:]])
    assert_matches("products with None", inner_products([without, parts[1]]), inner_products([zeroed, flat[1]]))
    first = project_away(without, parts[1])[0]
    want = project_away(zeroed, flat[1])[:4].view(2, 2)
    assert torch.equal(want, torch.zeros(2, 2).double()) or first is not None
    assert first is None or torch.allclose(first, want)


def test_products_of_shards_add_up():
    gradients = _gradients(3, 12, seed=5)
    shards = [[g[part] for g in gradients] for part in (slice(0, 5), slice(5, 12))]
    total = sum(inner_products(shard) for shard in shards)
    assert_matches("products", total, inner_products(gradients))
    coefficients = conflict_coefficients(total)
    whole = project_conflicts(gradients)
    for index in range(3):
        got = torch.cat([combine(shard, coefficients[index]) for shard in shards])
        assert_matches("projected", got, whole[index], 1e-11)


def test_norms_and_cosines():
    gradients = [*_gradients(3, 7, seed=6), torch.zeros(7).double()]
    products = inner_products(gradients)
    assert_matches("norms", norms(products), torch.stack([g.norm() for g in gradients]))
    want = [[torch.nn.functional.cosine_similarity(a, b, dim=0) for b in gradients[:3]] for a in gradients[:3]]
    assert_matches("cosines", cosines(products)[:3, :3], torch.tensor(want, dtype=torch.float64))
    assert cosines(products)[3].isnan().all(), "0 has no direction"
    without = cosines(products, torch.tensor([False, True, False, False]))
    assert without[1].isnan().all() and without[0, 2] == cosines(products)[0, 2]


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
    lengths = norms(inner_products([likelihood, noise, moved, torch.zeros_like(noise)]))
    assert 0 < lengths[1] and is_noise(lengths, eps).tolist() == [False, True, False, True]
    weights = torch.tensor([1.0, 1e4, 1e4, 1.0])
    assert is_noise(lengths * weights, eps, weights).tolist() == [False, True, False, True]
    assert not is_noise(torch.tensor([math.nan, 1.0, 0.0]), eps).any(), "nothing is hidden by a NaN"


def test_half_precision_is_added_up_in_float32():
    """4,096 products of about 1e-4: a sum in bfloat16 stops growing long before the end."""
    gradient = torch.full((64, 64), 0.01, dtype=torch.bfloat16)
    products = inner_products([[gradient], [gradient]])
    assert products.dtype == torch.float32
    assert products[0, 1].item() == pytest.approx(4096 * gradient[0, 0].double().item() ** 2, rel=1e-5)
    projected = project_away([gradient], [-2 * gradient])[0]
    assert projected.dtype == torch.bfloat16 and projected.abs().max() < 1e-6


def test_the_order_is_a_function_of_seed_and_step_and_every_order_comes_up():
    assert projection_order(4, 1, 2) == projection_order(4, 1, 2)
    seen = [{tuple(projection_order(4, 0, step)[i]) for step in range(200)} for i in range(4)]
    for i, orders in enumerate(seen):
        assert orders == set(itertools.permutations(j for j in range(4) if j != i))
    assert projection_order(1, 0, 0) == [[]]


def test_smoothed_anchor():
    old, new = _gradients(2, 5, seed=8)
    assert smoothed(None, new) is new
    assert_matches("smoothed", smoothed(old, new), 0.8 * new + 0.2 * old)
    assert_matches("share", smoothed([old], [new], 0.5)[0], (new + old) / 2)


def test_every_term_is_clipped_for_itself():
    gradients = [torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4]), torch.zeros(2)]
    factors = clip_coefficients(norms(inner_products(gradients)), max_norm=1.0)
    assert factors.tolist() == pytest.approx([0.2, 1.0, 1.0])
    assert_matches("sum", combine(gradients, factors), torch.tensor([0.9, 1.2]))


def test_a_gradient_that_is_no_number_is_not_hidden():
    bad, good = torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 1.0])
    assert project_away(good, bad).isnan().any() and project_away(bad, good).isnan().any()
    assert all(g.isnan().any() for g in project_conflicts([good, bad]))


def test_nothing_asks_for_a_value():
    gradients = [[torch.empty(3, 2, device="meta"), torch.empty(4, device="meta")] for _ in range(3)]
    assert [part.shape for part in project_conflicts(gradients)[0]] == [(3, 2), (4,)]
    assert project_away(*gradients[:2], min_cosine=-0.5)[0].shape == (3, 2)
    products = inner_products(gradients)
    assert cosines(products).shape == (3, 3)
    assert combine(gradients, clip_coefficients(norms(products), 1.0))[1].shape == (4,)
    assert smoothed(gradients[0], gradients[1])[0].shape == (3, 2)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    gradients = [[torch.randn(30, 20, device="cuda"), torch.randn(4, device="cuda")] for _ in range(4)]
    project_conflicts(gradients)
    torch.cuda.set_sync_debug_mode("error")
    try:
        project_conflicts(gradients, projection_order(4, 0, 1))
        smoothed(gradients[0], project_away(*gradients[:2]))
        combine(gradients, clip_coefficients(norms(inner_products(gradients)), 1.0))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_refusals():
    one, two = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ValueError, match="there are no gradients to compare: give at least one"):
        inner_products([])
    with pytest.raises(ValueError, match="gradient 1 has 2 parameters and gradient 0 has 1: give every term's"):
        inner_products([[one], [one, two]])
    with pytest.raises(ValueError, match=r"parameter 0 has gradients of shapes \[\(2,\), \(3,\)\]: they must"):
        inner_products([one, two])
    with pytest.raises(ValueError, match="3 coefficients for 2 gradients: give one for each"):
        combine([one, one], torch.ones(3))
    with pytest.raises(ValueError, match=r"min_cosine=0.5 is outside \[-1, 0\]: -1 takes the whole conflict out"):
        project_away(one, one, min_cosine=0.5)
    with pytest.raises(ValueError, match=r"share_of_new=0.0 is outside \(0, 1\]: 1 forgets what was before"):
        smoothed(one, one, share_of_new=0.0)
    with pytest.raises(ValueError, match="max_norm=0.0 must be above 0: leave clipping out"):
        clip_coefficients(torch.ones(2), 0.0)
    with pytest.raises(ValueError, match=r"order=\[\[1\], \[1\]\] must name for each of 2 terms every other one once"):
        project_conflicts([one, one], [[1], [1]])


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


def _gradients_term_gradients():
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
    first, second, third = _gradients_term_gradients()
    assert torch.allclose(facts["grad_norm/unlearn"], first.norm(), rtol=1e-12)
    cosine = torch.nn.functional.cosine_similarity(first, third, dim=0)
    assert cosine < 0 and torch.allclose(facts["grad_cosine/unlearn_retain"], cosine, rtol=1e-12)
    assert len(facts) == 6


def test_forgetting_gives_way_to_the_anchor():
    first, second, third = _gradients_term_gradients()
    step, _ = _merged(mode="project")
    assert torch.allclose(step, project_away(first, third) + second + third, rtol=1e-12)


def test_terms_are_clipped_before_they_are_added():
    step, _ = _merged(max_norm=1.5)
    want = sum(g * min(1.0, 1.5 / float(g.norm())) for g in _gradients_term_gradients())
    assert torch.allclose(step, want, rtol=1e-12)


def test_conflicts_of_all_terms_are_taken_out():
    step, _ = _merged(mode="pcgrad", seed=4, step=7)
    want = sum(project_conflicts(_gradients_term_gradients(), projection_order(3, 4, 7)))
    assert torch.allclose(step, want, rtol=1e-12)


def test_two_sums_are_projected_as_two_gradients():
    torch.manual_seed(2)
    gradients = [torch.randn(5).double() for _ in range(4)]
    anchor = gradients[2] + gradients[3]
    forgotten = gradients[0] - 3.0 * anchor
    gradients[0] = forgotten
    coefficients = projection_coefficients(inner_products(gradients), [0], [2, 3])
    got = combine(gradients, coefficients)
    assert torch.allclose(got, project_away(forgotten, anchor) + gradients[1] + anchor, rtol=1e-10)
    assert projection_coefficients(inner_products(gradients), [1], []).tolist() == [1.0] * 4


@pytest.mark.parametrize("options", [{"mode": "project"}, {"mode": "pcgrad", "seed": 4}, {"max_norm": 1e-18}, {}])
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


def test_the_rounding_is_that_of_the_coarsest_type():
    assert pass_rounding("bf16") == 2**-7 and pass_rounding("fp16") == 2**-10 and pass_rounding("no") == 2**-52
    assert TermGradients([nn.Parameter(torch.zeros(1))], pass_rounding("no")).rounding == 2**-23
    assert TermGradients([nn.Parameter(torch.zeros(1))], pass_rounding("bf16")).rounding == 2**-7
    assert TermGradients([nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))]).rounding == 2**-7
