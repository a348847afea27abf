"""Pair losses against DPO written out, their gradient weights by autograd in float64, and npo as a special case."""

import math

import pytest
import torch

from hf_moe_cpt.trainers.surgery.forget_losses import ForgetSettings, npo
from hf_moe_cpt.trainers.surgery.pair_losses import PAIR_LOSSES, ScoredText, idk_dpo, preference_margin
from tests.helpers.tolerances import assert_matches


BETA = 0.7
SETTINGS = ForgetSettings(beta=BETA)


def _text(lengths: tuple[int, ...], seed: int) -> ScoredText:
    """Texts of these lengths, padded on the left with NaN, under two models."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    logp, ref_logp = (
        (-torch.rand(mask.shape, generator=generator).double()).masked_fill(~mask, math.nan) for _ in range(2)
    )
    return ScoredText(logp.requires_grad_(), mask, ref_logp)


@pytest.fixture
def pair() -> tuple[ScoredText, ScoredText]:
    return _text((3, 5, 2), seed=1), _text((6, 1, 4), seed=2)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_value_and_gradients_are_those_of_dpo_per_token_of_the_loser(name, pair):
    winner, loser = pair
    losses = PAIR_LOSSES[name](winner, loser, SETTINGS)
    gradients = torch.autograd.grad(losses.sum(), [winner.logp, loser.logp])
    for row, n in enumerate((6, 1, 4)):
        gains = [(text.logp[row][text.mask[row]] - text.ref_logp[row][text.mask[row]]).sum().item() for text in pair]
        margin = gains[0] - gains[1]
        pull = 2.0 / (1.0 + math.exp(BETA * margin)) / n
        assert losses[row].item() == pytest.approx(2.0 / (BETA * n) * math.log1p(math.exp(-BETA * margin)), rel=1e-12)
        assert preference_margin(winner, loser)[row].item() == pytest.approx(margin)
        for gradient, text, sign in zip(gradients, pair, (-1.0, 1.0), strict=True):
            assert_matches("gradient", gradient[row], sign * pull * text.mask[row].double())


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_with_a_winner_that_stands_still_it_is_npo(name, pair):
    winner, loser = pair
    winner = winner._replace(ref_logp=winner.logp.detach())
    assert_matches(
        "loss", PAIR_LOSSES[name](winner, loser, SETTINGS), npo(loser.logp, loser.mask, SETTINGS, loser.ref_logp)
    )


def test_they_are_bounded_and_come_to_rest():
    """However far the loser falls and however sure the winner becomes, the loss stays above 0."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    start = torch.full((1, 3), -2.0)
    lost = torch.full((1, 3), -1000.0, requires_grad=True)
    sure = torch.zeros(1, 3, requires_grad=True)
    loss = idk_dpo(ScoredText(sure, mask, start), ScoredText(lost, mask, start), SETTINGS)
    loss.sum().backward()
    assert 0.0 <= loss.item() < 1e-12
    assert lost.grad.abs().max() < 1e-12 and sure.grad.abs().max() < 1e-12
    assert all(record.is_bounded and record.needs_reference for record in PAIR_LOSSES.values())


def test_impossible_tokens_on_both_sides_give_no_nan():
    mask = torch.ones(1, 2, dtype=torch.bool)
    gone = torch.full((1, 2), -math.inf, requires_grad=True)
    text = ScoredText(gone, mask, gone.detach())
    loss = idk_dpo(text, text, SETTINGS)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(gone.grad).all()


def test_a_loser_without_tokens_costs_nothing(pair):
    winner, loser = pair
    loser = loser._replace(mask=torch.zeros_like(loser.mask))
    losses = idk_dpo(winner, loser, SETTINGS)
    assert losses.tolist() == [0.0, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(losses.sum(), winner.logp)
    assert (gradient == 0).all()


def test_defaults_and_refusals(pair):
    winner, loser = pair
    for name, record in PAIR_LOSSES.items():
        assert record.name == name
        assert_matches(
            "beta", record(winner, loser, ForgetSettings()), record(winner, loser, ForgetSettings(beta=0.1))
        )
    with pytest.raises(ValueError, match="2 winners and 3 losers are no pairs: give one winner per loser"):
        idk_dpo(ScoredText(*(tensor[:2] for tensor in winner)), loser, SETTINGS)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_nothing_asks_for_a_value(name):
    logp, mask = (
        torch.empty(2, 4, device="meta", requires_grad=True),
        torch.empty(2, 4, dtype=torch.bool, device="meta"),
    )
    text = ScoredText(logp, mask, logp.detach())
    PAIR_LOSSES[name](text, text, SETTINGS).sum().backward()
    assert logp.grad.shape == (2, 4)
