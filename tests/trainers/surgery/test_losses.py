"""Means over counted tokens against plain loops in float64; padding may hold anything; parts of a batch add up.

Both directions of KL against torch.distributions and closed gradients in float64; words that are ruled out.

Forget losses against the formulas of their papers, written out token by token; gradients by autograd in float64.

The whole objective against the printed one and the authors' code, in float64 on tiny models; names and weights.

Pair losses against DPO written out, their gradient weights by autograd in float64, and npo as a special case.
"""

import math
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM

from hf_moe_cpt.trainers.surgery.chunked import chunked_kl
from hf_moe_cpt.trainers.surgery.losses import (
    DEFAULT_BETA,
    FORGET_LOSSES,
    KL_DIRECTIONS,
    NORMALISATIONS,
    PAIR_LOSSES,
    PAPER_WEIGHTS,
    TERMS,
    ForgetLoss,
    ForgetSettings,
    ScoredText,
    aim,
    cap,
    check_direction,
    check_weights,
    counted,
    expcap,
    forget_loss_of,
    forward_kl,
    ga,
    idk_dpo,
    mean_over_tokens,
    npo,
    num_units,
    preference_margin,
    reduce_sequences,
    reduce_tokens,
    reverse_kl,
    satimp,
    seqcap,
    sequence_cross_entropy,
    sequence_weights,
    simnpo,
    surgery_objective,
    token_weights,
    unlikelihood,
    wga,
)
from hf_moe_cpt.trainers.surgery.losses import kl_divergence as divergence
from tests.helpers.source_tree import PROJECT
from tests.helpers.tiny_models import CONFIGS, VOCABULARY
from tests.helpers.tolerances import assert_matches


def _batch(num_sequences: int, num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (B, S) in float64 that are NaN, inf or -inf wherever they do not count; some sequences may be empty."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_sequences, num_tokens, generator=generator, dtype=torch.float64)
    mask = torch.rand(num_sequences, num_tokens, generator=generator) < 0.6
    rubbish = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
    kind = torch.randint(3, values.shape, generator=generator)
    return torch.where(mask, values, rubbish[kind]), mask


def _means(values: torch.Tensor, mask: torch.Tensor) -> list[float | None]:
    rows = [[v for v, m in zip(*pair, strict=True) if m] for pair in zip(values.tolist(), mask.tolist(), strict=True)]
    return [sum(row) / len(row) if row else None for row in rows]


@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_means_are_those_of_plain_loops(num_sequences, num_tokens, seed):
    values, mask = _batch(num_sequences, num_tokens, seed)
    means = _means(values, mask)
    want = torch.tensor([mean or 0.0 for mean in means], dtype=torch.float64)
    assert_matches("means", mean_over_tokens(values, mask), want)
    kept = [mean for mean in means if mean is not None]
    by_sequence = sum(kept) / max(len(kept), 1)
    by_token = sum(values[mask].tolist()) / max(int(mask.sum()), 1)
    for normalisation, mean in (("sequence", by_sequence), ("token", by_token)):
        assert reduce_tokens(values, mask, normalisation).item() == pytest.approx(mean, rel=1e-12, abs=1e-12)
        assert reduce_sequences(want, mask, normalisation).item() == pytest.approx(mean, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("as_number", [False, True])
def test_parts_of_a_batch_add_up_to_it(normalisation, as_number):
    values, mask = _batch(6, 9, seed=1)
    mask[2] = False
    losses = mean_over_tokens(values, mask)
    total = num_units(mask, normalisation)
    total = int(total) if as_number else total
    parts = [slice(0, 1), slice(1, 3), slice(3, 6)]
    for whole, pieces in (
        (
            reduce_tokens(values, mask, normalisation),
            [reduce_tokens(values[part], mask[part], normalisation, total) for part in parts],
        ),
        (
            reduce_sequences(losses, mask, normalisation),
            [reduce_sequences(losses[part], mask[part], normalisation, total) for part in parts],
        ),
    ):
        assert_matches("sum of parts", torch.stack(pieces).sum(), whole)


def test_a_long_text_counts_once_by_sequence_and_by_its_length_by_token():
    mask = torch.tensor([[True, False, False], [True, True, True], [False, False, False]])
    losses = torch.tensor([1.0, 5.0, 0.0])
    assert reduce_sequences(losses, mask, "sequence").item() == 3.0
    assert reduce_sequences(losses, mask, "token").item() == 4.0
    assert sequence_weights(mask, "token").tolist() == [0.25, 0.75, 0.0]
    assert sequence_weights(mask, "sequence").tolist() == [0.5, 0.5, 0.0]
    assert token_weights(mask, "sequence").sum(1).tolist() == pytest.approx([0.5, 0.5, 0.0])
    assert [int(num_units(mask, name)) for name in NORMALISATIONS] == [2, 4]


def test_nothing_counts_without_a_nan():
    values, mask = torch.full((2, 3), torch.nan), torch.zeros(2, 3, dtype=torch.bool)
    for normalisation in NORMALISATIONS:
        assert reduce_tokens(values, mask, normalisation).item() == 0.0
        assert reduce_tokens(values, mask, normalisation, 0).item() == 0.0
    assert mean_over_tokens(values, mask).tolist() == [0.0, 0.0]


def test_no_gradient_reaches_what_does_not_count():
    values, mask = _batch(3, 5, seed=2)
    values.requires_grad_()
    mean_over_tokens(values, mask).sum().backward()
    want = torch.where(mask, 1.0 / mask.sum(1, keepdim=True).clamp(min=1).double(), 0.0)
    assert_matches("gradient", values.grad, want)


def test_half_precision_is_summed_in_float32():
    values, mask = torch.full((1, 4096), 0.1, dtype=torch.bfloat16), torch.ones(1, 4096, dtype=torch.bool)
    mean = mean_over_tokens(values, mask)
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(values[0, 0].item(), rel=1e-6)


def test_refusals():
    values, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for one, other in ((values[0], mask[0]), (values, mask[:, :2]), (values, mask.long())):
        with pytest.raises(ValueError, match=r"values .* and mask .* must both be \(sequences, tokens\), the mask"):
            counted(one, other)
    with pytest.raises(ValueError, match="normalisation='batch' is unknown: choose one of sequence, token"):
        reduce_tokens(values, mask, "batch")
    with pytest.raises(ValueError, match=r"losses \(3,\) must be one per sequence of the mask, \(2,\)"):
        reduce_sequences(torch.zeros(3), mask, "token")


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


def test_refusals__divergence():
    with pytest.raises(ValueError, match="kl_direction='both' is unknown: choose one of forward, reverse"):
        check_direction("both")
    with pytest.raises(ValueError, match="kl_direction='js' is unknown"):
        divergence(torch.zeros(3), torch.zeros(3), "js")
    with pytest.raises(ValueError, match=r"logp \(2, 3\) and ref_logp \(2, 4\) must have one shape: .*vocabulary"):
        divergence(torch.zeros(2, 3), torch.zeros(2, 4))


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


LENGTHS_OBJECTIVE = {"unlearn": (6, 9), "obsolete": (5, 5), "update": (9, 4), "retain": (8, 3)}


def _model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS["llama"](initializer_range=0.3)).double().eval()


@pytest.fixture(scope="module")
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    return _model(1), _model(2).requires_grad_(False)


@pytest.fixture(scope="module")
def batches() -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]
        for name, lengths in LENGTHS_OBJECTIVE.items()
    }


def _by_our_functions(
    models: tuple, batches: dict, weights: dict[str, float], direction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective with ga, from padded batches, and the retain KL in it."""
    model, reference = models
    terms = {}
    for name, texts in batches.items():
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        is_token = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS_OBJECTIVE[name])[:, None]
        hidden, ref_hidden = (one.model(ids, attention_mask=is_token).last_hidden_state for one in models)
        if name == "retain":
            heads = model.lm_head.weight, reference.lm_head.weight
            kl = chunked_kl(hidden.flatten(0, 1), heads[0], ref_hidden.flatten(0, 1), heads[1], direction, 5)
            terms[name] = reduce_tokens(kl.view(ids.shape), is_token, "sequence")
            continue
        logp = model.lm_head(hidden)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        mask = is_token[:, 1:]
        loss = sequence_cross_entropy if name == "update" else lambda *inputs: FORGET_LOSSES["ga"](*inputs, None)
        terms[name] = reduce_sequences(loss(logp, mask), mask, "sequence")
    return surgery_objective(terms, weights), terms["retain"]


def _cross_entropy(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Of one text alone, without padding."""
    return torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:])


def _mean(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(values).mean()


def _same_up_to(got: torch.Tensor, want: torch.Tensor, constant: float, model: torch.nn.Module) -> None:
    assert got.item() == pytest.approx(want.item() - constant, rel=1e-10)
    parameters = list(model.parameters())
    for index, pair in enumerate(
        zip(torch.autograd.grad(got, parameters), torch.autograd.grad(want, parameters), strict=True)
    ):
        assert_matches(f"gradient {index}", *pair, 1e-9)


def test_with_ga_and_the_papers_weights_it_is_the_authors_code(models, batches):
    """Theirs adds the entropy of the reference, a constant: same gradient, other value at the start."""
    model, reference = models
    got, _ = _by_our_functions(models, batches, PAPER_WEIGHTS, "forward")
    cross_entropy = {name: _mean([_cross_entropy(model, ids) for ids in batches[name]]) for name in LENGTHS_OBJECTIVE}
    anchors, entropies = [], []
    for ids in batches["retain"]:
        p, ref_p = model(ids[None]).logits[0].softmax(-1), reference(ids[None]).logits[0].softmax(-1)
        anchors.append(-(ref_p * p.log()).sum(-1).mean())
        entropies.append(-(ref_p * ref_p.log()).sum(-1).mean())
    want = -0.1 * cross_entropy["unlearn"] - 0.1 * cross_entropy["obsolete"] + 2.0 * cross_entropy["update"]
    _same_up_to(got, want + 0.5 * _mean(anchors), 0.5 * _mean(entropies).item(), model)


def test_with_ga_weights_of_one_and_reverse_kl_it_is_the_negative_of_the_printed_objective(models, batches):
    """J = CE(D_unl) - CE(D_upd) - KL(P || P_pre), to be maximised; the printed one has no set of old versions."""
    model, reference = models
    got, _ = _by_our_functions(models, batches, {"unlearn": 1.0, "update": 1.0, "retain": 1.0}, "reverse")
    cross_entropy = {name: _mean([_cross_entropy(model, ids) for ids in batches[name]]) for name in LENGTHS_OBJECTIVE}
    divergences = []
    for ids in batches["retain"]:
        p, ref_p = model(ids[None]).logits[0].softmax(-1), reference(ids[None]).logits[0].softmax(-1)
        divergences.append((p * (p / ref_p).log()).sum(-1).mean())
    printed = cross_entropy["unlearn"] - cross_entropy["update"] - _mean(divergences)
    _same_up_to(got, -printed, 0.0, model)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_anchor_is_zero_before_the_first_step(models, batches, direction):
    model = models[0]
    _, anchor = _by_our_functions((model, model), batches, PAPER_WEIGHTS, direction)
    assert anchor.item() == 0.0
    gradient = torch.autograd.grad(anchor, model.lm_head.weight)[0]
    assert gradient.abs().max() < 1e-15


def test_a_term_without_weight_is_neither_needed_nor_read():
    terms = {"update": torch.tensor(3.0), "unlearn": torch.tensor(math.nan)}
    weights = {"update": 2.0, "unlearn": 0.0, "retain": 0.0}
    assert surgery_objective(terms, weights).item() == 6.0


def test_weights_that_mean_nothing_are_refused():
    check_weights(PAPER_WEIGHTS)
    assert set(PAPER_WEIGHTS) == set(TERMS)
    for weights, message in (
        ({"unlearn": -0.1}, r"unlearn_weight=-0.1 must be a finite number, at least 0: a forget loss already has the"),
        ({"update": math.inf}, "update_weight=inf must be a finite number"),
        ({"forget": 1.0}, "'forget' is no term of the objective: choose among unlearn, obsolete, update, retain, nei"),
        ({"update": 0.0}, "all weights are 0: give at least one set a weight above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            surgery_objective({"update": torch.zeros(())}, weights)
    with pytest.raises(ValueError, match="no term for unlearn, retain: compute it, or set its weight to 0"):
        surgery_objective({"update": torch.zeros(())}, PAPER_WEIGHTS | {"obsolete": 0.0})


def test_a_name_a_record_or_a_function_is_a_forget_loss():
    for name, record in (FORGET_LOSSES | PAIR_LOSSES).items():
        assert forget_loss_of(name) is record is forget_loss_of(record)

    def halved(logp, mask, settings, ref_logp):
        return wga(logp, mask, settings, ref_logp) / 2

    loss = forget_loss_of(halved)
    assert (loss.name, loss.is_bounded, loss.needs_reference) == ("halved", False, False)
    logp, mask = -torch.rand(2, 4), torch.ones(2, 4, dtype=torch.bool)
    assert torch.equal(2 * loss(logp, mask, ForgetSettings()), wga(logp, mask, ForgetSettings()))
    bounded = ForgetLoss("mine", halved, is_bounded=True)
    assert forget_loss_of(bounded).is_bounded


@pytest.mark.parametrize("loss", ["gradient_ascent", None, 3])
def test_what_is_no_forget_loss_is_refused(loss):
    with pytest.raises(ValueError, match=r"forget_loss=.* is unknown: choose one of ga, cap, .*, pair_dpo, or give a"):
        forget_loss_of(loss)


def test_cross_entropy_of_a_sequence_is_that_of_transformers(models, batches):
    model, ids = models[0], batches["unlearn"][0]
    logp = model(ids[None]).logits[:, :-1].log_softmax(-1).gather(-1, ids[None, 1:, None]).squeeze(-1)
    got = sequence_cross_entropy(logp, torch.ones_like(logp, dtype=torch.bool))
    assert_matches("cross entropy", got, _cross_entropy(model, ids)[None])
    assert got.item() == pytest.approx(model(ids[None], labels=ids[None]).loss.item(), rel=1e-6)  # in float32


def test_the_page_has_the_row_of_every_loss():
    """docs/surgery_objective.md repeats the records; a loss that changes must change there too."""
    text = (PROJECT / "docs" / "surgery_objective.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` (\|.*)$", text, re.MULTILINE))
    for name, record in (FORGET_LOSSES | PAIR_LOSSES).items():
        cells = [cell.strip().replace("`", "") for cell in rows[name].strip("|").split("|")]
        assert cells[:3] == [record.formula, record.bound, record.gradient_weight]
        assert cells[4].startswith(record.source)
        assert name not in DEFAULT_BETA or f"b {DEFAULT_BETA[name]:g}" in cells[3]


BETA_PAIR_LOSSES = 0.7
SETTINGS_PAIR_LOSSES = ForgetSettings(beta=BETA_PAIR_LOSSES)


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
    losses = PAIR_LOSSES[name](winner, loser, SETTINGS_PAIR_LOSSES)
    gradients = torch.autograd.grad(losses.sum(), [winner.logp, loser.logp])
    for row, n in enumerate((6, 1, 4)):
        gains = [(text.logp[row][text.mask[row]] - text.ref_logp[row][text.mask[row]]).sum().item() for text in pair]
        margin = gains[0] - gains[1]
        pull = 2.0 / (1.0 + math.exp(BETA_PAIR_LOSSES * margin)) / n
        assert losses[row].item() == pytest.approx(
            2.0 / (BETA_PAIR_LOSSES * n) * math.log1p(math.exp(-BETA_PAIR_LOSSES * margin)), rel=1e-12
        )
        assert preference_margin(winner, loser)[row].item() == pytest.approx(margin)
        for gradient, text, sign in zip(gradients, pair, (-1.0, 1.0), strict=True):
            assert_matches("gradient", gradient[row], sign * pull * text.mask[row].double())


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_with_a_winner_that_stands_still_it_is_npo(name, pair):
    winner, loser = pair
    winner = winner._replace(ref_logp=winner.logp.detach())
    assert_matches(
        "loss",
        PAIR_LOSSES[name](winner, loser, SETTINGS_PAIR_LOSSES),
        npo(loser.logp, loser.mask, SETTINGS_PAIR_LOSSES, loser.ref_logp),
    )


def test_they_are_bounded_and_come_to_rest():
    """However far the loser falls and however sure the winner becomes, the loss stays above 0."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    start = torch.full((1, 3), -2.0)
    lost = torch.full((1, 3), -1000.0, requires_grad=True)
    sure = torch.zeros(1, 3, requires_grad=True)
    loss = idk_dpo(ScoredText(sure, mask, start), ScoredText(lost, mask, start), SETTINGS_PAIR_LOSSES)
    loss.sum().backward()
    assert 0.0 <= loss.item() < 1e-12
    assert lost.grad.abs().max() < 1e-12 and sure.grad.abs().max() < 1e-12
    assert all(record.is_bounded and record.needs_reference for record in PAIR_LOSSES.values())


def test_impossible_tokens_on_both_sides_give_no_nan():
    mask = torch.ones(1, 2, dtype=torch.bool)
    gone = torch.full((1, 2), -math.inf, requires_grad=True)
    text = ScoredText(gone, mask, gone.detach())
    loss = idk_dpo(text, text, SETTINGS_PAIR_LOSSES)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(gone.grad).all()


def test_a_loser_without_tokens_costs_nothing(pair):
    winner, loser = pair
    loser = loser._replace(mask=torch.zeros_like(loser.mask))
    losses = idk_dpo(winner, loser, SETTINGS_PAIR_LOSSES)
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
        idk_dpo(ScoredText(*(tensor[:2] for tensor in winner)), loser, SETTINGS_PAIR_LOSSES)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_nothing_asks_for_a_value__pair_losses(name):
    logp, mask = (
        torch.empty(2, 4, device="meta", requires_grad=True),
        torch.empty(2, 4, dtype=torch.bool, device="meta"),
    )
    text = ScoredText(logp, mask, logp.detach())
    PAIR_LOSSES[name](text, text, SETTINGS_PAIR_LOSSES).sum().backward()
    assert logp.grad.shape == (2, 4)
