"""Both directions of KL against torch.distributions and closed gradients in float64; words that are ruled out."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from hf_moe_cpt.trainers.surgery.divergence import KL_DIRECTIONS, check_direction, forward_kl, reverse_kl
from hf_moe_cpt.trainers.surgery.divergence import kl_divergence as divergence
from tests.helpers.tolerances import assert_matches


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    z, ref_z = (3 * torch.randn(2, 5, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    return z.requires_grad_(), ref_z


def test_values_are_those_of_torch(logits):
    (z, ref_z), (p, ref_p) = logits, (Categorical(logits=tensor) for tensor in logits)
    logp, ref_logp = z.log_softmax(-1), ref_z.log_softmax(-1)
    assert_matches("forward", divergence(logp, ref_logp), kl_divergence(ref_p, p))
    assert_matches("reverse", divergence(logp, ref_logp, "reverse"), kl_divergence(p, ref_p))


def test_gradients_over_logits_have_their_closed_form(logits):
    z, ref_z = logits
    p, ref_p = z.detach().softmax(-1), ref_z.softmax(-1)
    (forward,) = torch.autograd.grad(forward_kl(z.log_softmax(-1), ref_z.log_softmax(-1)).sum(), z)
    assert_matches("forward", forward, p - ref_p)
    gap = p.log() - ref_p.log()
    (reverse,) = torch.autograd.grad(reverse_kl(z.log_softmax(-1), ref_z.log_softmax(-1)).sum(), z)
    assert_matches("reverse", reverse, p * (gap - (p * gap).sum(-1, keepdim=True)))


@pytest.mark.parametrize("direction", KL_DIRECTIONS)
def test_equal_models_are_exactly_zero_apart(direction, logits):
    logp = logits[0].log_softmax(-1)
    kl = divergence(logp, logp.detach().clone(), direction)
    assert (kl == 0).all()
    (gradient,) = torch.autograd.grad(kl.sum(), logits[0])
    assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize("direction", KL_DIRECTIONS)
def test_the_reference_gets_no_gradient(direction, logits):
    z, ref_z = logits[0], logits[1].requires_grad_()
    divergence(z.log_softmax(-1), ref_z.log_softmax(-1), direction).sum().backward()
    assert ref_z.grad is None and z.grad is not None


def test_the_authors_term_is_forward_kl_plus_the_reference_entropy(logits):
    """Their cross entropy has the same gradient, but starts at the entropy of the reference."""
    z, ref_z = logits
    logp, ref_logp = z.log_softmax(-1), ref_z.log_softmax(-1)
    cross_entropy = -(ref_logp.exp() * logp).sum(-1)
    assert_matches("value", forward_kl(logp, ref_logp) + Categorical(logits=ref_z).entropy(), cross_entropy)
    (got,) = torch.autograd.grad(forward_kl(logp, ref_logp).sum(), z, retain_graph=True)
    (want,) = torch.autograd.grad(cross_entropy.sum(), z)
    assert_matches("gradient", got, want)


def test_a_word_that_the_model_has_lost_is_pulled_back():
    """The authors' log(P + 1e-12) has next to no gradient where P is far below its floor; ours has all of it."""
    z = torch.tensor([0.0, -60.0], dtype=torch.float64, requires_grad=True)
    ref_logp = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    (ours,) = torch.autograd.grad(forward_kl(z.log_softmax(-1), ref_logp), z)
    assert ours[1].item() == pytest.approx(-0.5)
    (floored,) = torch.autograd.grad(-(0.5 * (z.softmax(-1) + 1e-12).log()).sum(), z)
    assert abs(floored[1].item()) < 1e-12


@pytest.mark.parametrize("direction", KL_DIRECTIONS)
def test_words_that_both_rule_out_do_not_matter(direction, logits):
    z, ref_z = logits
    ruled_out = torch.full((2, 5, 1), -math.inf, dtype=torch.float64)
    wide, ref_wide = torch.cat([z, ruled_out], -1), torch.cat([ref_z, ruled_out], -1)
    logp = wide.log_softmax(-1)
    kl = divergence(logp, ref_wide.log_softmax(-1), direction)
    assert_matches("kl", kl, divergence(z.log_softmax(-1), ref_z.log_softmax(-1), direction))
    (gradient,) = torch.autograd.grad(kl.sum(), logp)
    assert torch.isfinite(gradient).all()


def test_a_word_that_one_side_rules_out():
    half, sure = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    assert forward_kl(half, sure).item() == pytest.approx(math.log(2))
    assert reverse_kl(sure, half).item() == pytest.approx(math.log(2))
    assert forward_kl(sure, half).item() == math.inf
    assert reverse_kl(half, sure).item() == math.inf


def test_refusals():
    with pytest.raises(ValueError, match="kl_direction='both' is unknown: choose one of forward, reverse"):
        check_direction("both")
    with pytest.raises(ValueError, match="kl_direction='js' is unknown"):
        divergence(torch.zeros(3), torch.zeros(3), "js")
    with pytest.raises(ValueError, match=r"logp \(2, 3\) and ref_logp \(2, 4\) must have one shape: .*vocabulary"):
        divergence(torch.zeros(2, 3), torch.zeros(2, 4))
