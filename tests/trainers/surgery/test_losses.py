"""Masked means against plain loops in float64; padding may hold anything; parts of a batch add up.

Forget losses against the formulas of their papers, written out token by token, and pair losses against DPO; gradients
by autograd in float64.
"""

import math
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_moe_cpt.trainers.surgery.chunked import LanguageHead
from hf_moe_cpt.trainers.surgery.losses import (
    DEFAULT_BETA,
    FORGET_LOSSES,
    NORMALIZATIONS,
    PAIR_LOSSES,
    STATE_LOSSES,
    ForgetLoss,
    ForgetSettings,
    ScoredText,
    States,
    forget_loss_of,
    masked,
    masked_mean,
    num_units,
    reduce_sequences,
    reduce_tokens,
    simnpo,
    wga,
)
from tests.helpers.source_tree import PROJECT
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
    assert_matches("means", masked_mean(values, mask), want)
    kept = [mean for mean in means if mean is not None]
    by_sequence = sum(kept) / max(len(kept), 1)
    by_token = sum(values[mask].tolist()) / max(int(mask.sum()), 1)
    for normalization, mean in (("sequence", by_sequence), ("token", by_token)):
        assert reduce_tokens(values, mask, normalization).item() == pytest.approx(mean, rel=1e-12, abs=1e-12)
        assert reduce_sequences(want, mask, normalization).item() == pytest.approx(mean, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("as_number", [False, True])
def test_parts_of_a_batch_add_up_to_it(normalization, as_number):
    values, mask = _batch(6, 9, seed=1)
    mask[2] = False
    losses = masked_mean(values, mask)
    total = num_units(mask, normalization)
    total = int(total) if as_number else total
    parts = [slice(0, 1), slice(1, 3), slice(3, 6)]
    for reduce, each in ((reduce_tokens, values), (reduce_sequences, losses)):
        pieces = [reduce(each[part], mask[part], normalization, total) for part in parts]
        assert_matches("sum of parts", torch.stack(pieces).sum(), reduce(each, mask, normalization))


def test_what_does_not_count_gives_neither_nan_nor_gradient():
    values, mask = torch.full((2, 3), torch.nan), torch.zeros(2, 3, dtype=torch.bool)
    for normalization in NORMALIZATIONS:
        assert reduce_tokens(values, mask, normalization).item() == 0.0
        assert reduce_tokens(values, mask, normalization, 0).item() == 0.0
    assert masked_mean(values, mask).tolist() == [0.0, 0.0]
    values, mask = _batch(3, 5, seed=2)
    values.requires_grad_()
    masked_mean(values, mask).sum().backward()
    want = torch.where(mask, 1.0 / mask.sum(1, keepdim=True).clamp(min=1).double(), 0.0)
    assert_matches("gradient", values.grad, want)


def test_half_precision_is_summed_in_float32_and_masks_are_of_one_kind():
    values, mask = torch.full((1, 4096), 0.1, dtype=torch.bfloat16), torch.ones(1, 4096, dtype=torch.bool)
    mean = masked_mean(values, mask)
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(values[0, 0].item(), rel=1e-6)
    values, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for one, other in ((values[0], mask[0]), (values, mask[:, :2]), (values, mask.long())):
        with pytest.raises(ValueError, match=r"values .* and mask .* must both be \(sequences, tokens\), the mask"):
            masked(one, other)


NAMES = tuple(FORGET_LOSSES)
TAU, BETA, BETA2 = 2.5, 1.7, 0.6
SETTINGS = ForgetSettings(target=TAU, beta=BETA, satimp_beta2=BETA2)
LENGTHS = (7, 1, 4)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


# By name: (loss of a sequence, weights of its tokens against plain ascent), both from its p_t and the reference's p_t.
DEFINITIONS: dict[str, tuple[Callable, Callable]] = {
    "ga": (lambda p, r: sum(math.log(x) for x in p) / len(p), lambda p, r: [1.0 for _ in p]),
    "aim": (
        lambda p, r: (
            (d := abs(math.log(math.prod(p)) / len(p) + TAU)) and (d * d / (2.0 * TAU) if d < TAU else d - TAU / 2.0)
        ),
        lambda p, r: [max(1.0 + math.log(math.prod(p)) / (len(p) * TAU), -1.0) for _ in p],
    ),
    "npo": (
        lambda p, r: -2.0 / BETA * math.log(_sigmoid(-BETA * math.log(math.prod(p) / math.prod(r)))) / len(p),
        lambda p, r: [2.0 * math.prod(p) ** BETA / (math.prod(p) ** BETA + math.prod(r) ** BETA) for _ in p],
    ),
    "simnpo": (
        lambda p, r: -2.0 / BETA * math.log(_sigmoid(BETA * (-math.log(math.prod(p)) / len(p) - TAU))),
        lambda p, r: [2.0 * (q := math.exp(-BETA * (-math.log(math.prod(p)) / len(p) - TAU))) / (1.0 + q) for _ in p],
    ),
    "wga": (lambda p, r: sum(x**BETA * math.log(x) for x in p) / len(p), lambda p, r: [x**BETA for x in p]),
    "satimp": (
        lambda p, r: sum(x**BETA * (1.0 - x) ** BETA2 * math.log(x) for x in p) / len(p),
        lambda p, r: [x**BETA * (1.0 - x) ** BETA2 for x in p],
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
    logp[0, 0], logp[0, 1] = math.log(0.999), math.log(0.9)  # known by heart
    return logp.masked_fill(~mask, math.nan), mask, ref_logp.masked_fill(~mask, math.nan)


def _rows(logp: torch.Tensor) -> list[list[float]]:
    return [[math.exp(x) for x in row[:n].tolist()] for row, n in zip(logp, LENGTHS, strict=True)]


def test_every_loss_has_a_definition_here_and_the_texts_reach_both_sides_of_each_kink(texts):
    assert set(DEFINITIONS) == set(NAMES)
    loss = -texts[0][texts[1]]
    assert loss.min() < TAU < loss.max()


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


def test_simnpo_without_a_target_turns_at_0_and_betas_have_defaults(pair):
    logp, mask = torch.tensor([[-0.7, -0.1]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    want = -2.0 / 4.5 * math.log(_sigmoid(4.5 * 0.4))
    assert simnpo(logp, mask, ForgetSettings()).item() == pytest.approx(want, rel=1e-12)
    assert ForgetSettings(beta=3.0).beta_of("npo") == 3.0 and ForgetSettings().beta_of("npo") == 0.1
    for name, record in PAIR_LOSSES.items():
        assert record.name == name
        assert torch.equal(record(*pair, ForgetSettings()), record(*pair, ForgetSettings(beta=0.1)))


@given(st.sampled_from(NAMES), st.integers(1, 4), st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_sequences_do_not_see_each_other_or_their_padding(name, num_sequences, num_tokens, padding):
    generator = torch.Generator().manual_seed(num_sequences * 100 + num_tokens)
    logp, ref_logp = (-torch.rand(num_sequences, num_tokens, generator=generator).double() * 5 for _ in range(2))
    mask = torch.rand(num_sequences, num_tokens, generator=generator) < 0.7
    whole = FORGET_LOSSES[name](logp, mask, SETTINGS, ref_logp)
    wider = [torch.nn.functional.pad(tensor, (padding, padding), value=math.nan) for tensor in (logp, ref_logp)]
    for row in range(num_sequences):
        one = slice(row, row + 1)
        counts = torch.nn.functional.pad(mask[one], (padding, padding))
        alone = FORGET_LOSSES[name](wider[0][one], counts, SETTINGS, wider[1][one])
        assert_matches(name, whole[one], alone)
        assert mask[row].any() or whole[row] == 0.0


def _on(device):
    """Every loss on three texts of one device, forward and backward; the gradient (3, 5)."""
    mask = torch.ones(3, 5, dtype=torch.bool, device=device)
    for loss in (FORGET_LOSSES | PAIR_LOSSES).values():
        logp = torch.full((3, 5), -1.0, device=device, requires_grad=True)
        text = ScoredText(logp, mask, logp.detach())
        yield loss, (logp, mask, SETTINGS, logp.detach()) if loss.name in NAMES else (text, text, SETTINGS)


def test_nothing_asks_for_a_value():
    """Tensors of the meta device have none: `.item()`, a branch on a value or a shape made of values would raise."""
    for loss, inputs in _on("meta"):
        values = loss(*inputs)
        values.sum().backward()
        logp = inputs[0] if loss.name in NAMES else inputs[0].logp
        assert values.shape == (3,) and logp.grad.shape == (3, 5)


@pytest.mark.gpu
def test_no_loss_waits_for_the_gpu():
    for loss, inputs in list(_on("cuda")):
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss(*inputs).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_records_say_what_the_functions_need():
    logp, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    for name, loss in FORGET_LOSSES.items():
        assert loss.name == name == loss.function.__name__
        if loss.needs_target:
            with pytest.raises(ValueError, match=rf"{name} needs a target in nats per token: give ForgetSettings\("):
                loss(logp, mask, ForgetSettings(), logp)
        if loss.needs_reference:
            with pytest.raises(ValueError, match="npo compares with a reference: give ref_logp, or choose simnpo"):
                loss(logp, mask, SETTINGS)
        loss(logp, mask, SETTINGS, logp if loss.needs_reference else None)
    assert {loss.name for loss in FORGET_LOSSES.values() if loss.needs_reference} == {"npo"}
    assert {loss.name for loss in FORGET_LOSSES.values() if loss.needs_target} == {"aim"}


@pytest.mark.parametrize(("value", "found"), [(torch.tensor(0.0), r"\(\)"), (0.0, "float")])
def test_a_function_that_forgets_the_batch_is_refused(value, found):
    loss = ForgetLoss("mine", lambda logp, mask, settings, ref_logp: value)
    with pytest.raises(ValueError, match=rf"forget loss mine returned {found}, not one loss per sequence, \(2,\)"):
        loss(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), ForgetSettings())


def test_a_name_a_record_or_a_function_is_a_forget_loss():
    for name, record in (FORGET_LOSSES | STATE_LOSSES | PAIR_LOSSES).items():
        assert forget_loss_of(name) is record is forget_loss_of(record)

    def halved(logp, mask, settings, ref_logp):
        return wga(logp, mask, settings, ref_logp) / 2

    loss = forget_loss_of(halved)
    assert (loss.name, loss.is_bounded, loss.needs_reference) == ("halved", False, False)
    logp, mask = -torch.rand(2, 4), torch.ones(2, 4, dtype=torch.bool)
    assert torch.equal(2 * loss(logp, mask, ForgetSettings()), wga(logp, mask, ForgetSettings()))
    bounded = ForgetLoss("mine", halved, is_bounded=True)
    assert forget_loss_of(bounded).is_bounded


def _softmax(row):
    weights = [math.exp(value - max(row)) for value in row]
    return [weight / sum(weights) for weight in weights]


def _undial(y, z, ref, h):
    taught = _softmax([value - BETA * (v == y) for v, value in enumerate(ref)])
    return -sum(q * math.log(p) for q, p in zip(taught, _softmax(z), strict=True))


def _ceu(y, z, ref, h):
    p = _softmax(z)
    return -sum(x / (1 - p[y]) * math.log(x) for v, x in enumerate(p) if v != y)


def _rmu(y, z, ref, h):
    drawn = torch.rand(len(h), generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    length = math.sqrt(sum(x * x for x in drawn))
    return sum((x - BETA * u / length) ** 2 for x, u in zip(h, drawn, strict=True)) / len(h)


# of a token: its place in the vocabulary, logits, the reference's, and the layer's output
OF_STATES = {
    "undial": _undial,
    "ceu": _ceu,
    "flat_logits": lambda y, z, ref, h: (max(z) - sum(z) / len(z)) ** 2,
    "rmu": _rmu,
}


@pytest.mark.parametrize("name", OF_STATES)
def test_losses_of_distributions_and_states_are_their_definitions_token_by_token(name, texts):
    _, mask, _ = texts
    generator = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight, bias, ref_weight = draw(6, 5), draw(6), draw(6, 5)
    hidden, ref_hidden, layer = (draw(*mask.shape, 5) for _ in range(3))
    hidden[~mask], layer[~mask] = math.nan, math.nan  # what does not count is not looked at
    targets = torch.randint(6, mask.shape, generator=generator)
    hidden.requires_grad_(), layer.requires_grad_()
    pairs = (hidden, LanguageHead(weight, bias)), (ref_hidden, LanguageHead(ref_weight))
    states = States(targets, *pairs, layer, chunk_tokens=4)
    losses = STATE_LOSSES[name](torch.zeros(mask.shape), mask, SETTINGS, None, states)
    logits, ref_logits = hidden @ weight.T + bias, ref_hidden @ ref_weight.T
    for row, counts in enumerate(mask):
        values = [
            OF_STATES[name](int(targets[row, t]), *(part[row, t].tolist() for part in (logits, ref_logits, layer)))
            for t in counts.nonzero().flatten().tolist()
        ]
        assert losses[row].item() == pytest.approx(sum(values) / len(values), rel=1e-10)
    learnt = layer if name == "rmu" else hidden
    (gradient,) = torch.autograd.grad(losses.sum(), learnt)
    step = 1e-6 * draw(*learnt.shape).masked_fill(~mask[..., None], 0.0)
    moved = [learnt.detach() + sign * step for sign in (1, -1)]
    ends = [
        STATE_LOSSES[name](
            torch.zeros(mask.shape),
            mask,
            SETTINGS,
            None,
            states._replace(layer=one) if name == "rmu" else states._replace(model=(one, pairs[0][1])),
        ).sum()
        for one in moved
    ]
    if name == "ceu":  # its target has no gradient: held still while the model moves
        p = logits.detach().softmax(-1)
        taught = p.scatter(-1, targets[..., None], 0.0)
        want = ((p - taught / taught.sum(-1, keepdim=True)) @ weight) / mask.sum(1)[:, None, None]
        assert_matches("gradient", gradient[mask], want[mask], 1e-9)
    else:
        slope = float((gradient.nan_to_num() * step).sum())
        assert slope == pytest.approx(float(ends[0] - ends[1]) / 2, rel=1e-5)
    assert (gradient[~mask].nan_to_num() == 0).all()
    with pytest.raises(ValueError, match=f"{name} is a loss of distributions or hidden states: give `states`"):
        STATE_LOSSES[name](torch.zeros(mask.shape), mask, SETTINGS)


def test_value_aim_rests_each_token_at_its_loss_without_the_name(texts):
    """Token by token in float64; what anybody guesses, what the copy lacks and what does not count rests."""
    logp, mask, ref_logp = texts
    renamed = (ref_logp - 3.0 * torch.rand(mask.shape, generator=torch.Generator().manual_seed(5)).double()).clone()
    renamed[0, 2], renamed[0, 3], renamed[0, 4] = math.nan, ref_logp[0, 3] + 0.5, -50.0
    logp.requires_grad_()
    head = LanguageHead(torch.zeros(9, 2, dtype=torch.float64))
    states = States(mask.long(), (torch.zeros(*mask.shape, 2), head), renamed_logp=renamed)
    losses = STATE_LOSSES["value_aim"](logp, mask, SETTINGS, ref_logp, states)
    (gradient,) = torch.autograd.grad(losses.sum(), logp)
    for row, n in enumerate(LENGTHS):
        value, shares, slopes = 0.0, [], []
        for now, before, other in zip(*(part[row, :n].tolist() for part in (logp, ref_logp, renamed)), strict=True):
            tau = min(-other, math.log(9))
            known = 0.0 if math.isnan(other) else max(0.0, 1.0 - math.exp(-tau) / math.exp(before))
            away = 0.0 if math.isnan(other) else -now - tau
            value += known * (away**2 / (2 * tau) if abs(away) <= tau else abs(away) - tau / 2) if known else 0.0
            shares.append(known)
            slopes.append(known * min(max(-away / tau, -1.0), 1.0) if known else 0.0)
        most = max(sum(shares), 1.0)
        assert losses[row].item() == pytest.approx(value / most, rel=1e-10)
        assert gradient[row, :n].tolist() == pytest.approx([slope / most for slope in slopes], rel=1e-10)
    assert (gradient[~mask] == 0).all() and gradient[0, 2] == 0 == gradient[0, 3]


def test_the_page_has_the_row_of_every_loss():
    """docs/surgery_objective.md repeats what docstrings say; a loss that changes must change there too."""
    text = (PROJECT / "docs" / "surgery_objective.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` (\|.*)$", text, re.MULTILINE))
    for name in STATE_LOSSES:
        formula, bound, source = (cell.strip().replace("`", "") for cell in rows[name].strip("|").split("|"))
        said = " ".join(STATE_LOSSES[name].function.__doc__.split())
        assert f"{formula} (B,), at least {bound}" in said and f"Source: {source}" in said, name
    for name, record in (FORGET_LOSSES | PAIR_LOSSES).items():
        formula, bound, weight, default, source = (
            cell.strip().replace("`", "") for cell in rows[name].strip("|").split("|")
        )
        said = " ".join((record.function if name in FORGET_LOSSES else type(record)).__doc__.split())
        for part in (f"{formula} (B,)" if name in FORGET_LOSSES else formula, f"w = {weight}", f"Source: {source}"):
            assert part in said, (name, part)
        assert name == "ga" or (f"[{bound}, 0]" if bound != "0" else "at least 0") in said
        assert name not in DEFAULT_BETA or f"b {DEFAULT_BETA[name]:g}" in default


def _text(lengths: tuple[int, ...], seed: int) -> ScoredText:
    """Texts of these lengths, padded on the left with NaN, under two models."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    logp, ref_logp = (-torch.rand(mask.shape, generator=generator).double().masked_fill(~mask, math.nan) for _ in "ab")
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
        for gradient, text, sign in zip(gradients, pair, (-1.0, 1.0), strict=True):
            assert_matches("gradient", gradient[row], sign * pull * text.mask[row].double())


def test_impossible_tokens_and_a_loser_without_any_give_no_nan(pair):
    mask = torch.ones(1, 2, dtype=torch.bool)
    gone = torch.full((1, 2), -math.inf, requires_grad=True)
    text = ScoredText(gone, mask, gone.detach())
    loss = PAIR_LOSSES["idk_dpo"](text, text, SETTINGS)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(gone.grad).all()
    winner, loser = pair
    loser = loser._replace(mask=torch.zeros_like(loser.mask))
    losses = PAIR_LOSSES["idk_dpo"](winner, loser, SETTINGS)
    assert losses.tolist() == [0.0, 0.0, 0.0]
    (gradient,) = torch.autograd.grad(losses.sum(), winner.logp)
    assert (gradient == 0).all()
