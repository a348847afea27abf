"""Terms kept apart add up to the step, and projections on inner products are those on the gradients themselves."""

import pytest
import torch
from torch import nn

from hf_moe_cpt.trainers.surgery.gradient_surgery import (
    combine,
    inner_products,
    project_away,
    project_conflicts,
    projection_coefficients,
    projection_order,
)
from hf_moe_cpt.trainers.surgery.term_gradients import TermGradients, pass_rounding


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


def _gradients():
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
    first, second, third = _gradients()
    assert torch.allclose(facts["grad_norm/unlearn"], first.norm(), rtol=1e-12)
    cosine = torch.nn.functional.cosine_similarity(first, third, dim=0)
    assert cosine < 0 and torch.allclose(facts["grad_cosine/unlearn_retain"], cosine, rtol=1e-12)
    assert len(facts) == 6


def test_forgetting_gives_way_to_the_anchor():
    first, second, third = _gradients()
    step, _ = _merged(mode="project")
    assert torch.allclose(step, project_away(first, third) + second + third, rtol=1e-12)


def test_terms_are_clipped_before_they_are_added():
    step, _ = _merged(max_norm=1.5)
    want = sum(g * min(1.0, 1.5 / float(g.norm())) for g in _gradients())
    assert torch.allclose(step, want, rtol=1e-12)


def test_conflicts_of_all_terms_are_taken_out():
    step, _ = _merged(mode="pcgrad", seed=4, step=7)
    want = sum(project_conflicts(_gradients(), projection_order(3, 4, 7)))
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
