"""Defaults of the paper, every contradiction refused in one line before anything is loaded, parsers and JSON."""

import json
import warnings

import pytest
from transformers import HfArgumentParser
from trl import DPOConfig, TrlParser

from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import OPTIONS_OF_DPO, PRESETS, SWITCHES, RainbowPOConfig


ON_CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}
ON_CPU_WORDS = ["--use_cpu", "--bf16", "false", "--report_to", "none"]


def _home(tmp_path) -> dict:
    return {"output_dir": str(tmp_path / "run"), **ON_CPU}


def _config(tmp_path, **changes) -> RainbowPOConfig:
    return RainbowPOConfig(**{**_home(tmp_path), **changes})


def test_defaults_are_the_papers_and_simpo_gamma_is_beta_times_the_home_advantage(tmp_path):
    config = _config(tmp_path)
    assert {name: getattr(config, name) for name in SWITCHES} == SWITCHES
    assert (config.beta, config.learning_rate, config.calibration_pairs) == (10.0, 1e-6, 1024)
    for gamma, beta, want in ((1.0, 10.0, 0.1), (1.0, 2.0, 0.5), (0.0, 10.0, 0.0)):
        assert _config(tmp_path, simpo_gamma=gamma, beta=beta).home_advantage == pytest.approx(want)
    assert _config(tmp_path, simpo_gamma=3.0, home_advantage=0.3).home_advantage == pytest.approx(0.3)


@pytest.mark.parametrize("alpha, logps", [(0.25, True), (1.0, True), (0.0, False)])
@pytest.mark.parametrize("scaling, entropy", [("mallows", True), ("none", False)])
def test_a_reference_is_needed_for_alpha_or_phi(tmp_path, alpha, logps, scaling, entropy):
    config = _config(tmp_path, mixing_alpha=alpha, contextual_scaling=scaling)
    assert (config.needs_reference_logps, config.needs_reference_entropy) == (logps, entropy)
    assert config.needs_reference == (logps or entropy)


REFUSED = {
    "alpha in percent": ({"mixing_alpha": 25}, r"mixing_alpha=25 is outside \[0, 1\]: it is the reference's share"),
    "alpha that is no number": ({"mixing_alpha": float("nan")}, "mixing_alpha=nan is no finite number"),
    "beta in quotes": ({"beta": "10"}, "beta='10' is no float"),
    "no beta": ({"beta": None}, "beta=None is no float"),
    "gamma in words": ({"simpo_gamma": "3"}, "simpo_gamma='3' is no float"),
    "beta of 0": ({"beta": 0.0}, "beta=0.0 must be a finite number above 0: about 10 with length_normalization"),
    "endless beta": ({"beta": float("inf")}, "beta=inf is no finite number"),
    "labels at random": ({"label_smoothing": 0.5}, r"label_smoothing=0.5 is outside \[0, 0.5\)"),
    "negative SFT": ({"sft_weight": -1.0}, "sft_weight=-1.0 must be a finite number, at least 0"),
    "unknown link": ({"link": "sigmoid"}, "link='sigmoid' is unknown: choose one of logistic, hinge, square, square_"),
    "unknown scaling": ({"contextual_scaling": "phi"}, "contextual_scaling='phi' is unknown: choose one of none, mal"),
    "unknown source of h": ({"home_advantage_from": "margin"}, "home_advantage_from='margin' is unknown: choose one"),
    "unknown transform": ({"score_transform": "exp"}, "score_transform='exp' is unknown: choose one of identity, log"),
    "scale of 0": ({"dispersion_scale": 0.0}, "dispersion_scale=0.0 is neither a number above 0 nor 'auto'"),
    "negative scale": ({"dispersion_scale": "-0.29"}, "dispersion_scale='-0.29' is neither a number above 0 nor"),
    "no scale": ({"dispersion_scale": None}, "dispersion_scale=None is neither a number above 0 nor 'auto'"),
    "nothing to calibrate on": ({"calibration_pairs": 0}, "calibration_pairs=0 leaves nothing to calibrate on"),
    "gamma given as h": ({"home_advantage": 1.0}, "home_advantage=1 is in nats per token .*set simpo_gamma=1 "),
    "summed h": ({"home_advantage": -40.0}, "must stay below 1 in size: .* set length_normalization=False"),
    "huge gamma": ({"simpo_gamma": 30.0}, "at beta=10 asks for 3 nats per token and must stay below beta"),
    "h that is no number": ({"home_advantage": float("nan")}, "home_advantage=nan is no finite number"),
    "h per token of length": (
        {"home_advantage_from": "length"},
        "home_advantage=0.1 nats per token for every token .* 100 tokens would be worth 10 nats per token",
    ),
    "gamma and h": (
        {"simpo_gamma": 3.0, "home_advantage": 0.1},
        r"home_advantage=0.1 and simpo_gamma=3.0 are both set and differ: simpo_gamma means home_advantage=0.3 \(gam",
    ),
    "gamma for scores": (
        {"simpo_gamma": 1.0, "home_advantage_from": "score"},
        "simpo_gamma=1.0 is a constant, home_advantage_from='score' is not: set home_advantage, the factor",
    ),
    "transform without scores": ({"score_transform": "log"}, "has no scores to work on: set home_advantage_from='sco"),
    "scores that are mixed away": (
        {"home_advantage_from": "score", "mixing_alpha": 1.0},
        "home_advantage_from='score' has no effect: .* set mix_home_advantage=False",
    ),
}
OF_THE_PARENT = {
    "loss_type": (["hinge"], r"set link='hinge' \(preset hinge-dpo\)"),
    "label_smoothing_factor": (0.1, "set label_smoothing, the share of pairs"),
    "loss_weights": ([2.0], "the only second term is the SFT"),
    "ld_alpha": (0.5, "length is dealt with by length_normalization"),
    "f_divergence_type": ("js_divergence", ".* which is reverse"),
    "f_alpha_divergence_coef": (0.3, "there is no alpha-divergence here"),
    "use_weighting": (True, "WPO weighs the loss outside"),
    "discopop_tau": (0.1, "DiscoPOP blends two links"),
}
REFUSED |= {
    name: ({name: value}, rf"{name}=.* is not part of this objective: {remedy}")
    for name, (value, remedy) in OF_THE_PARENT.items()
}


REFUSED["another loss"] = ({"loss_type": ["robust"]}, "use trl.DPOTrainer for it, or choose link")
REFUSED["padding to a multiple of nothing"] = ({"padding_free": True, "pad_to_multiple_of": 8}, "pads nothing, and")
REFUSED["multiples of less than one"] = ({"pad_to_multiple_of": "-1"}, "pad_to_multiple_of=-1 must be at least 1")


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_contradictions_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        _config(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_options_of_the_parent_are_known_and_its_defaults_taken(tmp_path):
    assert set(OPTIONS_OF_DPO) == set(OF_THE_PARENT)
    assert set(OPTIONS_OF_DPO) <= set(DPOConfig.__dataclass_fields__)
    assert _config(tmp_path, loss_type="sigmoid", f_divergence_type="reverse_kl").loss_type == ["sigmoid"]
    sums = {"length_normalization": False, "beta": 0.1}
    assert _config(tmp_path, **sums, home_advantage=40.0).home_advantage == 40.0
    assert _config(tmp_path, **sums, home_advantage_from="length").home_advantage == 0.1
    assert _config(tmp_path, home_advantage_from="length", home_advantage=0.001).home_advantage == 0.001
    assert _config(tmp_path, home_advantage_from="score", home_advantage=2.0).home_advantage == 2.0


WARNINGS = {
    "summed beta": ({"beta": 0.1}, "beta=0.1 is of the scale of summed log-probabilities"),
    "beta per token": ({"beta": 10.0, "length_normalization": False}, "beta=10 is of the scale .* per token, and wi"),
    "moving reference": ({"sync_ref_model": True}, "sync_ref_model moves the reference .* watch phi/mean"),
}


@pytest.mark.parametrize("changes, message", WARNINGS.values(), ids=WARNINGS)
def test_what_is_probably_not_meant_is_warned_of_and_allowed(tmp_path, changes, message):
    with pytest.warns(UserWarning, match=message) as caught:
        _config(tmp_path, **changes)
    assert [warning.filename for warning in caught if warning.category is UserWarning] == [__file__]


@pytest.mark.parametrize("name, changes", [*((name, {}) for name in PRESETS), ("slic-hf", {"beta": 10.0})])
def test_presets_warn_of_nothing(tmp_path, name, changes):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RainbowPOConfig.from_preset(name, output_dir=str(tmp_path), **ON_CPU, **changes)
    assert not [warning for warning in caught if warning.category is UserWarning]


def _parse(tmp_path, words: list[str], parser_class: type = HfArgumentParser) -> RainbowPOConfig:
    words = ["--output_dir", str(tmp_path / "run"), *ON_CPU_WORDS, *words]
    parser = parser_class(RainbowPOConfig)
    read = parser.parse_args_and_config if parser_class is TrlParser else parser.parse_args_into_dataclasses
    return read(args=words)[0]


@pytest.mark.parametrize("parser_class", [HfArgumentParser, TrlParser])
def test_command_line(tmp_path, parser_class):
    assert _parse(tmp_path, [], parser_class).dispersion_scale == "auto"
    assert _parse(tmp_path, ["--dispersion_scale", "auto"], parser_class).dispersion_scale == "auto"
    words = "--dispersion_scale 0.29 --simpo_gamma 2 --no_mix_home_advantage --link cauchy --calibration_pairs 64"
    config = _parse(tmp_path, words.split(), parser_class)
    assert (config.dispersion_scale, config.home_advantage, config.mix_home_advantage) == (0.29, 0.2, False)
    assert (config.link, config.calibration_pairs) == ("cauchy", 64)
    assert _parse(tmp_path, ["--length_normalization", "false", "--beta", "0.1"], parser_class).beta == 0.1
    with pytest.raises(ValueError, match="dispersion_scale='mean' is neither a number above 0 nor 'auto'"):
        _parse(tmp_path, ["--dispersion_scale", "mean"], parser_class)
    with pytest.raises(SystemExit):
        _parse(tmp_path, ["--link", "probit"], parser_class)


@pytest.mark.parametrize("text, value", [("auto", "auto"), ("0.29", 0.29), ("'0.29'", 0.29), ("1", 1.0)])
def test_yaml(tmp_path, text, value):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"dispersion_scale: {text}\ncalibration_pairs: null\nmixing_alpha: 0.5\nhome_advantage: 0.3\n")
    config = _parse(tmp_path, ["--config", str(recipe), "--mixing_alpha", "0.75"], TrlParser)
    assert (config.dispersion_scale, config.calibration_pairs) == (value, None)
    assert (config.mixing_alpha, config.home_advantage) == (0.75, 0.3)


@pytest.mark.parametrize("changes", [{}, {"dispersion_scale": 0.29, "simpo_gamma": 3.0, "calibration_pairs": None}])
def test_json_gives_the_same_configuration_again(tmp_path, changes):
    config, own = _config(tmp_path, **changes), list(RainbowPOConfig.__annotations__)
    restored = json.loads(config.to_json_string())
    again = RainbowPOConfig(**{name: restored[name] for name in own}, **_home(tmp_path))
    assert [getattr(again, name) for name in own] == [getattr(config, name) for name in own]
    assert restored["dispersion_scale"] == changes.get("dispersion_scale", "auto")


def test_presets_give_way_to_overrides_also_in_a_subclass(tmp_path):
    config = RainbowPOConfig.from_preset("SimPO", **_home(tmp_path), beta=2.5, learning_rate=3e-7, max_length=99)
    assert (config.beta, config.learning_rate, config.max_length, config.home_advantage) == (2.5, 3e-7, 99, 0.3)
    assert (config.mixing_alpha, config.contextual_scaling, config.needs_reference) == (0.0, "none", False)
    of_gamma = RainbowPOConfig.from_preset("simpo", **_home(tmp_path), simpo_gamma=1.0)
    assert of_gamma.home_advantage == pytest.approx(0.1)
    with pytest.raises(ValueError, match="are both set and differ"):
        RainbowPOConfig.from_preset("simpo", **_home(tmp_path), simpo_gamma=1.0, home_advantage=0.5)

    class Own(RainbowPOConfig):
        pass

    assert type(Own.from_preset("dpo", **_home(tmp_path))) is Own
