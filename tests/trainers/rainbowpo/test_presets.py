"""Each preset's loss against the method's published formula, written with its own letters; refusals; the table's row.

Letters of the formulas: L and R log-probability under policy and reference, summed over tokens; n tokens; s score.
"""

from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu, softplus

from hf_moe_cpt.trainers.rainbowpo.losses import Pair, length_advantage, mallows_phi, preference_terms, score_advantage
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import (
    ALIASES,
    PRESETS,
    REFUSED,
    SWITCHES,
    RainbowPOConfig,
    components_of,
    components_table,
    preset_settings,
)
from tests.helpers.tolerances import assert_matches


PAGE = (Path(__file__).parents[3] / "docs" / "rainbowpo.md").read_text(encoding="utf-8")
OF_THE_OBJECTIVE = ("beta", "mixing_alpha", "mix_home_advantage", "length_normalization", "link", "label_smoothing")
n = Pair(torch.tensor([30, 12, 70, 5, 41]).double(), torch.tensor([22, 44, 68, 5, 90]).double())
s = Pair(torch.tensor([4.0, 1.5, 0.3, 2.0, 9.0]).double(), torch.tensor([1.0, 1.0, 0.2, -1.0, 8.5]).double())
H = torch.tensor([0.02, 0.3, 0.05, 0.9, 0.001]).double()


def _sums(seed: int) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return Pair(*(-length * (0.4 + 0.2 * torch.rand(5, generator=generator, dtype=torch.float64)) for length in n))


L, R = _sums(1), _sums(2)
SCALE = 1 / (-H.log()).mean()  # phi has mean 1
phi = -SCALE * H.log()
D = (L.chosen - R.chosen) - (L.rejected - R.rejected)
LN_D = (L.chosen - R.chosen) / n.chosen - (L.rejected - R.rejected) / n.rejected
LN_M = L.chosen / n.chosen - L.rejected / n.rejected


def _loss(settings: dict) -> Tensor:
    """The loss of the five pairs as the trainer computes it from a preset."""
    h, source = settings["home_advantage"], settings["home_advantage_from"]
    by_score = score_advantage(s, h, settings["score_transform"])
    advantage = {"constant": h, "score": by_score, "length": length_advantage(n, h)}[source]
    scale = mallows_phi(H, float(SCALE)) if settings["contextual_scaling"] == "mallows" else 1.0
    chosen = {name: settings[name] for name in OF_THE_OBJECTIVE}
    return preference_terms(L, n, R, advantage, scale, **chosen, sft_weight=settings["sft_weight"]).loss


# The published loss with its usual letters, and the factor by which ours is larger.
FORMULAS: dict[str, tuple[Callable[[float], Tensor], float]] = {
    "rainbowpo": (lambda b: softplus(-b * phi * (LN_M - 0.25 * (LN_M - LN_D) - 0.75 * 0.1)), 1),
    "dpo": (lambda b: -logsigmoid(b * D), 1),
    "ln-dpo": (lambda b: -logsigmoid(b * LN_D), 1),
    "cdpo": (lambda b: -0.9 * logsigmoid(b * D) - 0.1 * logsigmoid(-b * D), 1),
    "hinge-dpo": (lambda b: relu(1 - b * D), 1),
    "ipo": (lambda b: (LN_D - 1 / (2 * b)) ** 2, 10.0**2),
    "ipo-sums": (lambda b: (D - 1 / (2 * b)) ** 2, 0.005**2),
    "slic-hf": (lambda b: relu(1 / b - (L.chosen - L.rejected)) - 0.1 / b * L.chosen, 1),
    "cpo": (lambda b: -logsigmoid(b * (L.chosen - L.rejected)) - L.chosen, 1),
    "simpo": (lambda b: -logsigmoid(b / n.chosen * L.chosen - b / n.rejected * L.rejected - 3.0), 1),
    "odpo": (lambda b: -logsigmoid(b * D - 1.0 * torch.log(s.chosen - s.rejected)), 1),
    "r-dpo": (lambda b: -logsigmoid(b * D + 0.01 * (n.chosen - n.rejected)), 1),
    "mallows-dpo": (lambda b: -logsigmoid(phi * b * D), 1),
    "mallows-ipo": (lambda b: (b * phi * D - 0.5) ** 2, 1),
}


def test_every_exact_preset_has_a_formula_and_names_do_not_overlap():
    assert set(FORMULAS) == set(PRESETS) - {"orpo-like"}
    assert not set(PRESETS) & set(REFUSED) and not set(ALIASES) & (set(PRESETS) | set(REFUSED))
    assert set(ALIASES.values()) <= set(PRESETS) | set(REFUSED)


@pytest.mark.parametrize("name", FORMULAS)
def test_an_exact_preset_is_the_published_loss(name):
    settings = preset_settings(name)
    formula, factor = FORMULAS[name]
    assert_matches(name, _loss(settings), factor * formula(settings["beta"]))
    assert _loss(settings).std() > 0


def test_slic_with_another_delta_is_delta_times_ours():
    delta, weight = 4.0, 0.5
    want = relu(delta - (L.chosen - L.rejected)) - weight * L.chosen
    settings = {**preset_settings("slic-hf"), "beta": 1 / delta, "sft_weight": weight / delta}
    assert_matches("loss", delta * _loss(settings), want)


def test_orpo_like_is_orpo_without_its_odds_and_tends_to_it_for_small_probabilities():
    settings = preset_settings("orpo-like")
    weight = 1 / settings["sft_weight"]  # ORPO's lambda

    def orpo(logps: Pair, with_odds: bool) -> Tensor:
        p = Pair(logps.chosen.exp(), logps.rejected.exp())
        odds = [side / (1 - side) if with_odds else side for side in p]
        return -logps.chosen - weight * logsigmoid(torch.log(odds[0] / odds[1]))

    def ours(logps: Pair) -> Tensor:
        ones = Pair(torch.ones_like(n.chosen), torch.ones_like(n.rejected))
        chosen = {name: settings[name] for name in OF_THE_OBJECTIVE}
        terms = preference_terms(logps, ones, None, 0.0, 1.0, **chosen, sft_weight=settings["sft_weight"])
        return weight * terms.loss

    mean_logps = Pair(L.chosen / n.chosen, L.rejected / n.rejected)
    assert_matches("without odds", ours(mean_logps), orpo(mean_logps, with_odds=False))
    improbable = Pair(mean_logps.chosen - 12, mean_logps.rejected - 12)
    assert_matches("improbable", ours(improbable), orpo(improbable, with_odds=True), 1e-6)
    gap = (ours(mean_logps) - orpo(mean_logps, with_odds=True)).abs()
    assert gap.max() > 1e-3, "at ordinary probabilities the two differ"


def test_settings_are_the_callers_own_and_an_unknown_name_lists_the_known_ones():
    preset_settings("dpo")["beta"] = 99.0
    assert preset_settings("dpo")["beta"] == 0.05
    assert set(SWITCHES) < set(preset_settings("rainbowpo"))
    assert preset_settings("LN_DPO") == preset_settings("ln-dpo") != preset_settings("dpo")
    with pytest.raises(ValueError, match="preset 'simpler' is unknown: choose one of rainbowpo, dpo, ln-dpo, cdpo"):
        preset_settings("simpler")


REASONS = {  # by what each tells to do instead; the others in the table are refused in the same way
    "rso": "hf_moe_cpt.data.rejection_sampling .* then train on them with the preset hinge-dpo or dpo",
    "KTO": "'KTO' is not a preset: it learns from single completions, not from pairs; use trl.KTOTrainer",
    "exo_pair": "loss_type='exo_pair'",
    "iterative-rpo": "'iterative-rpo' is not a preset: its SFT loss is per token beside a summed margin",
}


@pytest.mark.parametrize("name", [*REASONS, *REFUSED])
def test_what_cannot_be_expressed_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=REASONS.get(name, "is not a preset: .*")) as caught:
        RainbowPOConfig.from_preset(name, output_dir="never-made")
    assert "\n" not in str(caught.value) and str(caught.value).count(".") >= 1


def _row(name: str, **changes: object) -> tuple:
    return astuple(_config(name, **changes).components())


def _config(name: str, **changes: object) -> RainbowPOConfig:
    return RainbowPOConfig.from_preset(name, output_dir="unused", use_cpu=True, bf16=False, **changes)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_known_by_its_switches_whatever_its_numbers(name):
    settings = preset_settings(name)
    numbers = {field: settings[field] * 1.5 for field in ("beta", "home_advantage", "sft_weight", "label_smoothing")}
    assert _row(name)[-1] == name
    assert components_of(_config(name, **numbers)).method == name


def test_other_configurations_are_told_by_what_differs():
    assert _row("rainbowpo")[:-1] == ("yes", "logistic", "0.75 * 0.1", "0.25 of pi_ref", "phi, mean 1", "no")
    assert _row("cdpo")[:4] == ("no", "logistic, 0.1 flipped", "0", "pi_ref")
    assert _row("slic-hf")[3:6] == ("none", "1", "0.1") and _row("r-dpo")[2] == "0.2 (|y_l| - |y_w|)"
    assert _row("ln-dpo", link="cauchy")[-1] == "ln-dpo, but for link"
    assert _row("rainbowpo", contextual_scaling="none")[-1] == "rainbowpo, but for contextual scaling"
    assert _row("dpo", home_advantage=1.0, sft_weight=0.1)[-1] == "dpo, but for home advantage and SFT"
    assert _row("rainbowpo", mixing_alpha=1.0, contextual_scaling="none")[-1] == "ln-dpo", "h counts 1 - alpha = 0"
    assert _row("mallows-dpo", dispersion_scale=0.29)[4] == "phi, scale 0.29"
    raw = {"score_transform": "identity", "home_advantage": 0.5, "mixing_alpha": 0.5, "mix_home_advantage": True}
    assert _row("odpo", **raw)[2:4] == ("0.5 * 0.5 (score_w - score_l)", "0.5 of pi_ref")


def test_configurations_print_as_aligned_rows_under_a_header():
    header, *rows = components_table(_config(name).components() for name in ("simpo", "rainbowpo")).splitlines()
    assert [cell.strip() for cell in header.split("|")] == [
        "LN", "link", "home advantage", "reference", "contextual scaling", "SFT", "method",
    ]  # fmt: skip
    places = [[index for index, letter in enumerate(line) if letter == "|"] for line in (header, *rows)]
    assert len(rows) == 2 and places == [places[0]] * 3


def test_the_page_names_every_preset_with_its_numbers_and_every_refusal():
    for name, settings in PRESETS.items():
        (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
        exact, _, beta, learning_rate, _ = (cell.strip() for cell in line.split("|")[2:-1])
        assert (float(beta), float(learning_rate)) == (settings["beta"], settings["learning_rate"]), name
        assert exact.startswith("yes") == (name in FORMULAS), name
    for name in [*REFUSED, *ALIASES]:
        assert f"`{name}`" in PAGE, name
