"""Forget losses against the formulas of their papers, written out token by token; gradients by autograd in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_moe_cpt.trainers.surgery.forget_losses import (
    DEFAULT_BETA,
    FORGET_LOSSES,
    ForgetLoss,
    ForgetSettings,
    aim,
    cap,
    expcap,
    ga,
    npo,
    satimp,
    seqcap,
    simnpo,
    unlikelihood,
    wga,
)
from tests.helpers.tolerances import assert_matches


NAMES = tuple(FORGET_LOSSES)
TAU, BETA, BETA2, MOST = 2.5, 1.7, 0.6, 6.0
SETTINGS = ForgetSettings(target=TAU, beta=BETA, satimp_beta2=BETA2, max_weight=MOST)
LENGTHS = (7, 1, 4)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def _capped_unlikelihood(p: float) -> float:
    knee = MOST / (1.0 + MOST)
    return -math.log(1.0 - p) if p <= knee else math.log(1.0 + MOST) + MOST * math.log(p / knee)


# By name: (loss of a sequence, weights of its tokens against plain ascent), both from its p_t and the reference's p_t.
DEFINITIONS: dict[str, tuple[Callable, Callable]] = {
    "ga": (
        lambda p, r: sum(math.log(x) for x in p) / len(p),
        lambda p, r: [1.0 for _ in p],
    ),
    "cap": (
        lambda p, r: -sum(min(-math.log(x), TAU) for x in p) / len(p),
        lambda p, r: [float(-math.log(x) < TAU) for x in p],
    ),
    "seqcap": (
        lambda p, r: -min(-math.log(math.prod(p)) / len(p), TAU),
        lambda p, r: [float(-math.log(math.prod(p)) / len(p) < TAU) for _ in p],
    ),
    "aim": (
        lambda p, r: (
            (d := abs(math.log(math.prod(p)) / len(p) + TAU)) and (d * d / (2.0 * TAU) if d < TAU else d - TAU / 2.0)
        ),
        lambda p, r: [max(1.0 + math.log(math.prod(p)) / (len(p) * TAU), -1.0) for _ in p],
    ),
    "expcap": (
        lambda p, r: -TAU * sum(1.0 - math.exp(math.log(x) / TAU) for x in p) / len(p),
        lambda p, r: [x ** (1.0 / TAU) for x in p],
    ),
    "npo": (
        lambda p, r: -2.0 / BETA * math.log(_sigmoid(-BETA * math.log(math.prod(p) / math.prod(r)))) / len(p),
        lambda p, r: [2.0 * math.prod(p) ** BETA / (math.prod(p) ** BETA + math.prod(r) ** BETA) for _ in p],
    ),
    "simnpo": (
        lambda p, r: -2.0 / BETA * math.log(_sigmoid(BETA * (-math.log(math.prod(p)) / len(p) - TAU))),
        lambda p, r: [2.0 * (q := math.exp(-BETA * (-math.log(math.prod(p)) / len(p) - TAU))) / (1.0 + q) for _ in p],
    ),
    "wga": (
        lambda p, r: sum(x**BETA * math.log(x) for x in p) / len(p),
        lambda p, r: [x**BETA for x in p],
    ),
    "satimp": (
        lambda p, r: sum(x**BETA * (1.0 - x) ** BETA2 * math.log(x) for x in p) / len(p),
        lambda p, r: [x**BETA * (1.0 - x) ** BETA2 for x in p],
    ),
    "unlikelihood": (
        lambda p, r: sum(_capped_unlikelihood(x) for x in p) / len(p),
        lambda p, r: [min(x / (1.0 - x), MOST) for x in p],
    ),
}


@pytest.fixture
def texts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logp, mask and ref_logp of three texts, p from 1e-4 to nearly 1; what does not count is NaN."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    logp, ref_logp = (
        -torch.empty(mask.shape, dtype=torch.float64).uniform_(-8.0, 2.2, generator=generator).exp() for _ in range(2)
    )
    logp[0, 0], logp[0, 1] = math.log(0.999), math.log(0.9)  # known by heart, beyond the knee of unlikelihood
    return logp.masked_fill(~mask, math.nan), mask, ref_logp.masked_fill(~mask, math.nan)


def _rows(logp: torch.Tensor) -> list[list[float]]:
    return [[math.exp(x) for x in row[:n].tolist()] for row, n in zip(logp, LENGTHS, strict=True)]


def test_every_loss_has_a_definition_here_and_the_texts_reach_both_sides_of_each_kink(texts):
    assert set(DEFINITIONS) == set(NAMES)
    loss = -texts[0][texts[1]]
    assert loss.min() < -math.log(MOST / (1 + MOST)) < TAU < loss.max()


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_the_definition(name, texts):
    logp, mask, ref_logp = texts
    logp.requires_grad_()
    losses = FORGET_LOSSES[name](logp, mask, SETTINGS, ref_logp)
    value, weights = DEFINITIONS[name]
    pairs = list(zip(_rows(logp.detach()), _rows(ref_logp), strict=True))
    assert_matches("loss", losses, torch.tensor([value(*pair) for pair in pairs], dtype=torch.float64), 1e-11)
    (gradient,) = torch.autograd.grad(losses.sum(), logp)
    want = torch.zeros_like(gradient)
    for row, (pair, n) in enumerate(zip(pairs, LENGTHS, strict=True)):
        want[row, :n] = torch.tensor(weights(*pair), dtype=torch.float64) / n
    assert_matches("gradient", gradient, want, 1e-11)
    assert (gradient[~mask] == 0).all()


DETACHED = ("wga", "satimp")  # the gradient is on purpose not that of the value


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DETACHED])
def test_gradient_is_that_of_the_value_by_differences(name, texts):
    logp, mask, ref_logp = (tensor[:1] for tensor in texts)
    function = lambda x: FORGET_LOSSES[name](x, mask, SETTINGS, ref_logp)  # noqa: E731
    assert torch.autograd.gradcheck(function, logp.detach().clone().requires_grad_())


def test_seqcap_lets_single_tokens_pass_the_target_and_stops_whole_texts():
    logp = torch.tensor([[-0.1, -4.0], [-2.0, -4.0]], dtype=torch.float64, requires_grad=True)  # means 2.05 and 3
    loss = seqcap(logp, torch.ones(2, 2, dtype=torch.bool), SETTINGS)
    (got,) = torch.autograd.grad(loss.sum(), logp)
    assert loss.tolist() == pytest.approx([-2.05, -TAU]) and got.tolist() == [[0.5, 0.5], [0.0, 0.0]]


def test_aim_pulls_a_text_to_the_target_from_either_side():
    logp = torch.tensor([[-0.1, -4.0], [-2.5, -2.5], [-2.0, -4.0]], dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(aim(logp, torch.ones(3, 2, dtype=torch.bool), SETTINGS).sum(), logp)
    assert TAU == 2.5  # means of the texts: 2.05, 2.5 and 3
    assert_matches("gradient", got, torch.tensor([[0.09, 0.09], [0.0, 0.0], [-0.1, -0.1]], dtype=torch.float64))


def test_wga_descends_the_mean_probability():
    logp = torch.tensor([[-0.01, -0.7, -3.0, -9.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 4, dtype=torch.bool)
    (got,) = torch.autograd.grad(wga(logp, mask, SETTINGS).sum(), logp)
    (want,) = torch.autograd.grad((BETA * logp).exp().mean() / BETA, logp)
    assert_matches("gradient", got, want)


BOUND = {
    "cap": -TAU,
    "seqcap": -TAU,
    "aim": 0.0,
    "expcap": -TAU,
    "npo": 0.0,
    "simnpo": 0.0,
    "wga": -1.0 / (math.e * BETA),
    "satimp": -1.0 / (math.e * BETA),
    "unlikelihood": 0.0,
}


@given(st.sampled_from(sorted(BOUND)), st.lists(st.floats(-1000.0, 0.0), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_bounded_losses_stay_above_their_bound(name, values):
    logp = torch.tensor([values], dtype=torch.float64)
    reference = torch.full_like(logp, -0.2)
    loss = FORGET_LOSSES[name](logp, torch.ones_like(logp, dtype=torch.bool), SETTINGS, reference)
    assert loss.item() >= BOUND[name] - 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_far_out_only_ga_keeps_pulling(name, dtype):
    """At p = e^-1000 the bounded ones have no pull left, or pull back; plain ascent pulls as on the first step."""
    mask = torch.ones(1, 5, dtype=torch.bool)
    logp = torch.full((1, 5), -1000.0, dtype=dtype, requires_grad=True)
    loss = FORGET_LOSSES[name](logp, mask, SETTINGS, torch.full((1, 5), -0.1, dtype=dtype))
    loss.sum().backward()
    assert FORGET_LOSSES[name].is_bounded == (name != "ga")
    if name == "ga":
        assert loss.item() == pytest.approx(-1000.0) and logp.grad.tolist() == [pytest.approx([0.2] * 5)]
    elif name == "aim":
        assert loss.item() == pytest.approx(1000 - 1.5 * TAU) and logp.grad.tolist() == [pytest.approx([-0.2] * 5)]
    else:
        assert abs(loss.item()) <= TAU + 1e-6 and logp.grad.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_impossible_and_certain_tokens_give_no_nan(name, dtype):
    """p = 0, p = 1, and a p that rounding made larger than 1, under the model, the reference or both."""
    edge = [-math.inf, 0.0, 2.0**-20]
    logp = torch.tensor([[a] for a in edge for _ in edge], dtype=dtype, requires_grad=True)
    reference = torch.tensor([[b] for _ in edge for b in edge], dtype=dtype)
    for settings_ in (SETTINGS, ForgetSettings(target=1.0), ForgetSettings(target=1.0, satimp_beta2=0.0)):
        losses = FORGET_LOSSES[name](logp, torch.ones_like(logp, dtype=torch.bool), settings_, reference)
        (gradient,) = torch.autograd.grad(losses.sum(), logp)
        assert not losses.isnan().any() and torch.isfinite(gradient).all()
        assert torch.isfinite(losses[3:]).all() and (name == "ga" or torch.isfinite(losses[:3]).all())


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_that_counts_is_not_hidden(name):
    logp = torch.tensor([[-1.0, math.nan], [-1.0, -2.0]])
    losses = FORGET_LOSSES[name](logp, torch.ones(2, 2, dtype=torch.bool), SETTINGS, torch.full((2, 2), -0.5))
    assert losses.isnan().tolist() == [True, False]


def test_what_is_known_by_heart_has_a_finite_pull_in_unlikelihood():
    logp = torch.zeros(1, 1, requires_grad=True)
    loss = unlikelihood(logp, torch.ones(1, 1, dtype=torch.bool), ForgetSettings())
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(11.0) + 10.0 * math.log(11.0 / 10.0))
    assert logp.grad.item() == pytest.approx(10.0)


def test_unlikelihood_without_a_clamp_is_the_published_one(texts):
    logp, mask, _ = texts
    got = unlikelihood(logp, mask, ForgetSettings(max_weight=1e9))
    want = [sum(-math.log1p(-p) for p in row) / len(row) for row in _rows(logp)]
    assert_matches("loss", got, torch.tensor(want, dtype=torch.float64), 1e-11)


@pytest.mark.parametrize("length", [1, 10, 1000])
def test_at_the_start_npo_pulls_as_ascent_does_whatever_the_length(length):
    """The published sum weighs n times as much: under the weights of the paper 0.1 would act like 0.1 n."""
    logp = torch.full((1, length), -0.3, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, length, dtype=torch.bool)
    (by_npo,) = torch.autograd.grad(npo(logp, mask, ForgetSettings(), logp.detach()).sum(), logp)
    (by_ascent,) = torch.autograd.grad(ga(logp, mask, ForgetSettings()).sum(), logp)
    assert_matches("gradient", by_npo, by_ascent)
    published = -2.0 / 0.1 * math.log(0.5)
    assert npo(logp, mask, ForgetSettings(), logp.detach()).item() == pytest.approx(published / length)


def test_limits_are_plain_ascent(texts):
    logp, mask, _ = texts
    want = ga(logp, mask, SETTINGS)
    assert_matches("cap", cap(logp, mask, ForgetSettings(target=1e6)), want)
    assert_matches("expcap", expcap(logp, mask, ForgetSettings(target=1e9)), want, 1e-8)
    assert_matches("satimp", satimp(logp, mask, ForgetSettings(beta=1.5, satimp_beta2=0.0)),
                   wga(logp, mask, ForgetSettings(beta=1.5)))  # fmt: skip


def test_cap_stops_at_its_target_and_not_before():
    logp = -TAU * torch.tensor([[0.5, 0.99, 1.0, 1.01, 1.9]], dtype=torch.float64)
    logp.requires_grad_()
    loss = cap(logp, torch.ones(1, 5, dtype=torch.bool), SETTINGS)
    loss.sum().backward()
    assert loss.item() == pytest.approx(-TAU * (0.5 + 0.99 + 3.0) / 5)
    assert logp.grad.tolist() == [[0.2, 0.2, 0.0, 0.0, 0.0]]


def test_simnpo_turns_at_its_target():
    """Weight 1 where the mean loss is d, nearly 2 below and nearly 0 above; d is 0 if no target is given."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for target, d in ((3.0, 3.0), (None, 0.0)):
        for offset, weight in ((0.0, 1.0), (3.0, 0.0), (-3.0, 2.0)):
            logp = torch.tensor([[-(d + offset)]], dtype=torch.float64, requires_grad=True)
            simnpo(logp, mask, ForgetSettings(target=target)).sum().backward()
            assert logp.grad.item() == pytest.approx(weight, abs=1e-5)


@given(st.sampled_from(NAMES), st.integers(1, 4), st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_sequences_do_not_see_each_other_or_their_padding(name, num_sequences, num_tokens, padding):
    generator = torch.Generator().manual_seed(num_sequences * 100 + num_tokens)
    logp, ref_logp = (-torch.rand(num_sequences, num_tokens, generator=generator).double() * 5 for _ in range(2))
    mask = torch.rand(num_sequences, num_tokens, generator=generator) < 0.7
    whole = FORGET_LOSSES[name](logp, mask, SETTINGS, ref_logp)
    wider = [torch.nn.functional.pad(tensor, (padding, padding), value=math.nan) for tensor in (logp, ref_logp)]
    for row in range(num_sequences):
        alone = FORGET_LOSSES[name](
            wider[0][row : row + 1],
            torch.nn.functional.pad(mask[row : row + 1], (padding, padding)),
            SETTINGS,
            wider[1][row : row + 1],
        )
        assert_matches(name, whole[row : row + 1], alone)
        assert mask[row].any() or whole[row] == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_nothing_asks_for_a_value(name):
    """Tensors of the meta device have none: `.item()`, a branch on a value or a shape made of values would raise."""
    logp = torch.empty(3, 5, device="meta", requires_grad=True)
    loss = FORGET_LOSSES[name](logp, torch.empty(3, 5, dtype=torch.bool, device="meta"), SETTINGS, logp.detach())
    loss.sum().backward()
    assert loss.shape == (3,) and logp.grad.shape == (3, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_no_loss_waits_for_the_gpu(name):
    logp = torch.full((3, 5), -1.0, device="cuda", requires_grad=True)
    mask = torch.ones(3, 5, dtype=torch.bool, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        FORGET_LOSSES[name](logp, mask, SETTINGS, logp.detach()).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(logp.grad).all()


def test_records_say_what_the_functions_need():
    logp, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    for name, loss in FORGET_LOSSES.items():
        assert loss.name == name and loss.function is globals()[name]
        if loss.needs_target:
            with pytest.raises(ValueError, match=rf"{name} needs a target in nats per token: give ForgetSettings\("):
                loss(logp, mask, ForgetSettings(), logp)
        if loss.needs_reference:
            with pytest.raises(ValueError, match="npo compares with a reference: give ref_logp, or choose simnpo"):
                loss(logp, mask, SETTINGS)
        loss(logp, mask, SETTINGS, logp if loss.needs_reference else None)
    assert {loss.name for loss in FORGET_LOSSES.values() if loss.needs_reference} == {"npo"}
    assert {loss.name for loss in FORGET_LOSSES.values() if loss.needs_target} == {"aim", "cap", "seqcap", "expcap"}


def test_a_function_that_forgets_the_batch_is_refused():
    mean = ForgetLoss("mine", lambda logp, mask, settings, ref_logp: logp.mean())
    with pytest.raises(ValueError, match=r"forget loss mine returned \(\), not one loss per sequence, \(2,\)"):
        mean(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), ForgetSettings())
    number = ForgetLoss("mine", lambda logp, mask, settings, ref_logp: 0.0)
    with pytest.raises(ValueError, match="forget loss mine returned float, not one"):
        number(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), ForgetSettings())


REFUSED = {
    "target": (-1.0, "target=-1.0 must be a finite number above 0"),
    "beta": (0.0, "beta=0.0 must be a finite number above 0"),
    "max_weight": (math.inf, "max_weight=inf must be a finite number above 0"),
    "satimp_beta2": (math.nan, "satimp_beta2=nan must be a finite number, at least 0"),
}


@pytest.mark.parametrize("field", REFUSED)
def test_settings_that_mean_nothing_are_refused(field):
    value, message = REFUSED[field]
    with pytest.raises(ValueError, match=message):
        ForgetSettings(**{field: value})


def test_default_betas():
    assert ForgetSettings().beta_of("npo") == DEFAULT_BETA["npo"] == 0.1
    assert ForgetSettings(beta=3.0).beta_of("npo") == 3.0
