"""The objective against the definition, written out token by token on the full logits of tiny models, in float64."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_expit
from scipy.stats import cauchy
from torch.distributions import Categorical
from transformers import AutoModelForCausalLM

from hf_moe_cpt.trainers.rainbowpo.losses import (
    ENTROPY_FLOOR,
    LEAST_DISPERSION,
    LINKS,
    Pair,
    PreferenceTerms,
    check_scores,
    dispersion_scale_of,
    length_advantage,
    link_loss,
    mallows_phi,
    normalized_entropy,
    per_token,
    preference_terms,
    score_advantage,
)
from tests.helpers.tiny_models import CONFIGS, VOCABULARY
from tests.helpers.tolerances import assert_matches


PROMPT = 4
LENGTHS = Pair(torch.tensor([5, 9, 1, 7]), torch.tensor([8, 2, 6, 7]))  # tokens of each completion
BETA = {True: 5.0, False: 0.3}  # per token, summed
ADVANTAGE, SCALE, SFT_WEIGHT = 0.2, 1.3, 0.4


def _logits(seed: int, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](initializer_range=0.4)).double().eval()
    return model(ids).logits[:, :-1], list(model.parameters())


@pytest.fixture(scope="module")
def batch() -> dict:
    """4 pairs, [chosen, rejected] stacked and padded, and the logits of two models that predict their next tokens."""
    rows = torch.cat(LENGTHS)
    ids = torch.randint(1, VOCABULARY, (8, PROMPT + int(rows.max())), generator=torch.Generator().manual_seed(5))
    ids[4:, :PROMPT] = ids[:4, :PROMPT]
    position = torch.arange(ids.shape[1])[1:]
    mask = (position >= PROMPT) & (position < PROMPT + rows[:, None])
    policy, parameters = _logits(1, ids)
    reference = _logits(2, ids)[0].detach()
    return {"next": ids[:, 1:], "mask": mask, "policy": policy, "parameters": parameters, "reference": reference}


def _sums(values: torch.Tensor, mask: torch.Tensor) -> Pair:
    return Pair(*(values * mask).sum(1).chunk(2))


def _by_objective(batch: dict, ln: bool, alpha: float, phi: str, **switches: object) -> PreferenceTerms:
    mask, following = batch["mask"], batch["next"]
    of = {name: Categorical(logits=batch[name]).log_prob(following) for name in ("policy", "reference")}
    logps, ref_logps = (_sums(values, mask) for values in of.values())
    entropy = normalized_entropy(_sums(Categorical(logits=batch["reference"]).entropy(), mask), LENGTHS, VOCABULARY)
    phi = mallows_phi(entropy, SCALE) if phi == "mallows" else 1.0
    switches |= {"beta": BETA[ln], "mixing_alpha": alpha, "length_normalization": ln}
    return preference_terms(logps, LENGTHS, ref_logps if alpha else None, ADVANTAGE, phi, **switches)


def _by_definition(
    batch: dict, ln: bool, alpha: float, phi: str, mix: bool, link: str, smoothing: float
) -> list[dict[str, torch.Tensor]]:
    """One dict a pair, from softmax on, in plain loops over tokens."""

    def walk(logits: torch.Tensor, row: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        logp = entropy = torch.zeros((), dtype=torch.float64)
        for t in range(PROMPT - 1, PROMPT - 1 + length):
            p = logits[row, t].exp() / logits[row, t].exp().sum()
            logp = logp + p[batch["next"][row, t]].log()
            entropy = entropy - (p * p.log()).sum()
        return (logp / length if ln else logp), entropy / length

    pairs = []
    for pair in range(4):
        n_w, n_l = int(LENGTHS.chosen[pair]), int(LENGTHS.rejected[pair])
        l_w, l_l = walk(batch["policy"], pair, n_w)[0], walk(batch["policy"], pair + 4, n_l)[0]
        (r_w, h_w), (r_l, h_l) = walk(batch["reference"], pair, n_w), walk(batch["reference"], pair + 4, n_l)
        scale = torch.ones((), dtype=torch.float64)
        if phi == "mallows":
            scale = -SCALE * torch.log((h_w + h_l) / 2 / math.log(VOCABULARY))
        margin = (l_w - l_l) - alpha * (r_w - r_l) - ((1 - alpha) * ADVANTAGE if mix else ADVANTAGE)
        z = BETA[ln] * scale * margin
        f = LINKS[link]  # which are scipy's, below
        preference = (1 - smoothing) * f(z) + smoothing * f(-z) if smoothing else f(z)
        loss = preference - SFT_WEIGHT * l_w
        pairs.append(
            {"loss": loss, "preference": preference, "sft": -l_w, "phi": scale, "margin": margin, "logits": z}
        )
    return pairs


CASES = list(product(LINKS, (True, False), (0.0, 0.25, 1.0), ("none", "mallows")))


@pytest.mark.parametrize("link, ln, alpha, phi", CASES)
def test_loss_and_gradients_are_those_of_the_definition(batch, link, ln, alpha, phi):
    mix, smoothing = alpha == 0.25, 0.1 if phi == "none" else 0.0
    terms = _by_objective(
        batch, ln, alpha, phi, mix_home_advantage=mix, link=link, label_smoothing=smoothing, sft_weight=SFT_WEIGHT
    )
    pairs = _by_definition(batch, ln, alpha, phi, mix, link, smoothing)
    for name, got in terms._asdict().items():
        assert_matches(name, got, torch.stack([pair[name].double() for pair in pairs]))
    leaves = [batch["policy"], *batch["parameters"]]
    got = torch.autograd.grad(terms.loss.mean(), leaves, retain_graph=True)
    want = torch.autograd.grad(sum(pair["loss"] for pair in pairs) / 4, leaves, retain_graph=True)
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        assert_matches(f"gradient {index}", one, other, 1e-10)


@pytest.mark.parametrize("ln", [True, False])
def test_the_batch_has_margins_on_both_sides_of_every_kink(batch, ln):
    z = torch.stack([pair["logits"] for pair in _by_definition(batch, ln, 0.25, "mallows", True, "hinge", 0.0)])
    assert z.min() < -1.0 and z.max() > 1.0


Z = np.array([-1e12, -1e4, -30.0, -2.0, -0.5, -1e-9, 0.0, 0.3, 0.5, 1.0, 7.0, 40.0, 1e4])
BY_SCIPY = {
    "logistic": lambda z: -log_expit(z),
    "hinge": lambda z: np.maximum(1 - z, 0),
    "square": lambda z: (z - 0.5) ** 2,
    "square_hinge": lambda z: np.maximum(0.5 - z, 0) ** 2,
    "cauchy": lambda z: -cauchy.logcdf(z),
}


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-13), (torch.float32, 3e-7)])
@pytest.mark.parametrize("link", LINKS)
def test_links_are_scipys_and_stay_finite_far_out(link, dtype, limit):
    z = torch.tensor(Z, dtype=dtype, requires_grad=True)
    loss = link_loss(z, link)
    np.testing.assert_allclose(
        loss.detach().numpy(), BY_SCIPY[link](z.detach().double().numpy()), rtol=limit, atol=limit / 2
    )
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert torch.isfinite(gradient).all()
    assert (gradient[:6] < 0).all(), "a pair in the wrong order must be pushed apart"


def test_smoothed_logistic_is_the_cross_entropy_with_soft_labels():
    z = torch.linspace(-5, 5, 11, dtype=torch.float64)
    want = torch.nn.functional.binary_cross_entropy_with_logits(z, torch.full_like(z, 0.9), reduction="none")
    assert_matches("loss", link_loss(z, "logistic", 0.1), want)


def _terms(margin: torch.Tensor, alpha: float, link: str = "logistic", **changes: object) -> PreferenceTerms:
    """Pairs of one token whose policy margin is given, with a reference margin of 0.3."""
    ones, zeros = torch.ones_like(margin), torch.zeros_like(margin)
    arguments = {"beta": 2.0, "mix_home_advantage": True, "length_normalization": True, "label_smoothing": 0.0}
    arguments |= {"sft_weight": 0.0} | changes
    arguments |= {"mixing_alpha": alpha, "link": link}
    return preference_terms(Pair(margin, zeros), Pair(ones, ones), Pair(0.3 * ones, zeros), 0.2, 1.0, **arguments)


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=5), st.floats(0.01, 0.99), st.sampled_from(list(LINKS)))
@settings(max_examples=25, deadline=None)
def test_a_mixed_reference_costs_at_most_the_mixture_of_its_ends(margins, alpha, link):
    """Jensen's inequality for a convex link, which all but the Cauchy link are (Zhao et al. 2025, equation 8)."""
    margin = torch.tensor(margins, dtype=torch.float64)
    ends = alpha * _terms(margin, 1.0, link).loss + (1 - alpha) * _terms(margin, 0.0, link).loss
    if link != "cauchy":
        assert (_terms(margin, alpha, link).loss <= ends + 1e-9).all()
    assert_matches("margin", _terms(margin, alpha, link).margin, margin - alpha * 0.3 - (1 - alpha) * 0.2, 1e-9)


def test_without_its_share_the_reference_is_not_read():
    nothing = Pair(torch.full((2,), torch.nan), torch.full((2,), torch.nan))
    logps, lengths = Pair(torch.randn(2), torch.randn(2)), Pair(torch.tensor([3, 4]), torch.tensor([5, 6]))
    switches = {"beta": 1.0, "mix_home_advantage": True, "length_normalization": True, "link": "logistic"}
    switches |= {"label_smoothing": 0.0, "sft_weight": 0.0}
    found = [preference_terms(logps, lengths, ref, 0.1, 1.0, mixing_alpha=0.0, **switches) for ref in (nothing, None)]
    assert torch.equal(found[0].loss, found[1].loss) and torch.isfinite(found[1].loss).all()
    with pytest.raises(ValueError, match="mixing_alpha=0.5 needs ref_logps: give them, or set mixing_alpha=0"):
        preference_terms(logps, lengths, None, 0.1, 1.0, mixing_alpha=0.5, **switches)
    with pytest.raises(ValueError, match="link='probit' is unknown: choose one of logistic, hinge, square"):
        link_loss(torch.zeros(1), "probit")


def test_empty_completions_do_not_divide_by_zero():
    result = per_token(Pair(torch.tensor([0.0]), torch.tensor([-6.0])), Pair(torch.tensor([0]), torch.tensor([3])))
    assert (result.chosen.item(), result.rejected.item()) == (0.0, -2.0)


def test_entropy_is_one_for_a_uniform_reference_and_zero_for_a_sure_one():
    lengths = Pair(torch.tensor([3, 2]), torch.tensor([5, 4]))
    uniform = Pair(*(length * math.log(64) for length in lengths))
    assert_matches("uniform", normalized_entropy(uniform, lengths, 64), torch.ones(2), 1e-6)
    sure = normalized_entropy(Pair(torch.zeros(2), torch.zeros(2)), lengths, 64)
    assert torch.equal(sure, torch.zeros(2))
    assert torch.equal(mallows_phi(torch.tensor([1.0, 1.0001]), 2.0).abs(), torch.zeros(2)), "rounding above 1 gives 0"
    assert mallows_phi(sure, 2.0).tolist() == pytest.approx([-2 * math.log(ENTROPY_FLOOR)] * 2)
    with pytest.raises(ValueError, match="vocabulary_size=1 has no entropy"):
        normalized_entropy(uniform, lengths, 1)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40))
@settings(max_examples=25, deadline=None)
def test_calibrated_phi_has_mean_one(values):
    entropy = torch.tensor(values, dtype=torch.float64)
    if not (ENTROPY_FLOOR < entropy.max() and mallows_phi(entropy, 1.0).mean() >= LEAST_DISPERSION):
        return
    phi = mallows_phi(entropy, dispersion_scale_of(entropy))
    assert phi.mean().item() == pytest.approx(1.0, rel=1e-9) and (phi >= 0).all()


DEGENERATE = {
    "no pairs": ([], "cannot be calibrated on no pairs"),
    "sure of nothing": ([1.0, 1.0], r"entropies in \[1, 1\] of ln V"),
    "sure of nothing but for rounding": ([1.0 - 1e-7, 1.0 - 1e-6], "the reference is sure of everything, of nothing"),
    "sure of everything": ([0.0, 0.0], r"entropies in \[0, 0\] of ln V"),
    "not a number": ([0.2, math.nan], r"entropies in \[nan, nan\] of ln V: .*; check the reference model, or give"),
}


@pytest.mark.parametrize("values, message", DEGENERATE.values(), ids=DEGENERATE)
def test_calibration_on_nothing_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        dispersion_scale_of(torch.tensor(values))


def test_advantages_per_pair_and_scores_that_give_none():
    scores = Pair(torch.tensor([3.0, 0.5]), torch.tensor([1.0, 0.25]))
    assert score_advantage(scores, 0.5, "identity").tolist() == [1.0, 0.125]
    assert score_advantage(scores, 0.5, "log").tolist() == pytest.approx([0.5 * math.log(2), 0.5 * math.log(0.25)])
    assert length_advantage(Pair(torch.tensor([7, 2]), torch.tensor([4, 6])), 0.5).tolist() == [-1.5, 2.0]
    check_scores(Pair(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])), "identity")
    with pytest.raises(ValueError, match=r"1 of 2 pairs .* the first 1 \(chosen\) and 2 \(rejected\): .*the higher"):
        check_scores(Pair(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])), "log")
    with pytest.raises(ValueError, match="with score_transform='identity' scores must be finite; drop those pairs"):
        check_scores(Pair(torch.tensor([math.nan]), torch.tensor([2.0])), "identity")
