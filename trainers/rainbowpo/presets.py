"""Published methods as settings of one objective, and the row of the table of methods that a configuration is.

A preset sets every switch of the objective, and beta and the learning rate to a value for models of about 8B; any of
them can be overridden. Methods that the objective cannot express are refused by name, with the reason.
Source: ours, derived from each method's loss; docs/rainbowpo.md says where each number comes from.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any


SWITCHES = {  # RainbowPO's; a preset names what it has otherwise
    "length_normalization": True,
    "mixing_alpha": 0.25,
    "home_advantage": 0.1,
    "mix_home_advantage": True,
    "home_advantage_from": "constant",
    "score_transform": "identity",
    "contextual_scaling": "mallows",
    "dispersion_scale": "auto",
    "link": "logistic",
    "label_smoothing": 0.0,
    "sft_weight": 0.0,
}
_PLAIN = {"home_advantage": 0.0, "mix_home_advantage": False, "contextual_scaling": "none"}
_NO_REFERENCE = {**_PLAIN, "mixing_alpha": 0.0}
_FULL_REFERENCE = {**_PLAIN, "mixing_alpha": 1.0}
_DPO = {**_FULL_REFERENCE, "length_normalization": False, "beta": 0.05, "learning_rate": 5e-7}
_CPO = {**_NO_REFERENCE, "length_normalization": False, "beta": 0.05, "learning_rate": 1e-6}

# Up to a constant factor each is the loss of the publication above it, but for orpo-like.
PRESETS: dict[str, dict[str, Any]] = {
    # Zhao et al. 2025, arXiv 2410.04203: the numbers are the defaults of the authors' code.
    "rainbowpo": {"beta": 10.0, "learning_rate": 1e-6},
    # Rafailov et al. 2023, arXiv 2305.18290: TRL's sigmoid.
    "dpo": _DPO,
    # Lambert et al. 2024 (Tulu 3), arXiv 2411.15124: TRL's sigmoid_norm.
    "ln-dpo": {**_FULL_REFERENCE, "beta": 10.0, "learning_rate": 1e-6},
    # Mitchell 2023, a note on conservative DPO. TRL's robust is another loss, which subtracts that share.
    "cdpo": {**_DPO, "label_smoothing": 0.1},
    # Liu et al. 2024 (RSO), arXiv 2309.06657: RSO's hinge loss, on the pairs that are given; TRL's hinge.
    "hinge-dpo": {**_DPO, "link": "hinge"},
    # Azar et al. 2023, arXiv 2310.12036, per token as its authors ran it. (beta m - 1/2)^2 is TRL's ipo times beta^2:
    # the margin m aims at 1 / (2 beta) nats per token.
    "ipo": {**_FULL_REFERENCE, "link": "square", "beta": 10.0, "learning_rate": 1e-6},
    # The same, equation 17 as printed: summed log-probabilities.
    "ipo-sums": {**_DPO, "link": "square", "beta": 0.005, "learning_rate": 1e-6},
    # Zhao et al. 2023, arXiv 2305.10425: max(0, delta - m) = delta max(0, 1 - m / delta), so beta = 1 / delta and
    # sft_weight = lambda / delta. The SFT loss is of the chosen completion; the paper may take another answer.
    "slic-hf": {**_CPO, "link": "hinge", "beta": 1.0, "sft_weight": 0.1},
    # Xu et al. 2024, arXiv 2401.08417, both terms summed over tokens. TRL's CPOTrainer averages the SFT loss over the
    # batch's tokens: divide sft_weight by the usual length of a completion for that balance.
    "cpo": {**_CPO, "sft_weight": 1.0},
    # Meng et al. 2024, arXiv 2405.14734: gamma is beta * home_advantage, here 3; simpo_gamma sets it instead.
    "simpo": {**_NO_REFERENCE, "home_advantage": 0.3, "beta": 10.0, "learning_rate": 1e-6},
    # Amini et al. 2024, arXiv 2402.10571: the offset alpha log(score_w - score_l), alpha = beta * home_advantage = 1.
    "odpo": {**_DPO, "home_advantage_from": "score", "home_advantage": 20.0, "score_transform": "log"},
    # Park et al. 2024, arXiv 2403.19159: the term alpha (|y_w| - |y_l|), alpha = beta * home_advantage = 0.01.
    "r-dpo": {**_DPO, "home_advantage_from": "length", "home_advantage": 0.2},
    # Chen et al. 2024, arXiv 2405.14953: phi inside the link, its scale calibrated to a mean of 1.
    "mallows-dpo": {**_DPO, "contextual_scaling": "mallows", "learning_rate": 1e-6},
    # The same, (beta phi m - 1/2)^2 as in the authors' later code; an earlier one does not scale by beta.
    "mallows-ipo": {**_DPO, "contextual_scaling": "mallows", "link": "square", "beta": 0.005, "learning_rate": 1e-6},
    # Hong et al. 2024, arXiv 2403.07691: ORPO without its odds, which add log(1 - p_l) - log(1 - p_w) to m, p the
    # probability per token: close only while p is small. sft_weight is 1 / lambda, the loss 1 / lambda times ORPO's.
    "orpo-like": {**_NO_REFERENCE, "beta": 1.0, "sft_weight": 10.0, "learning_rate": 1e-6},
}
ALIASES = {"ln-ipo": "ipo", "lr-dpo": "r-dpo", "iterative-rpo": "rpo", "exo-pair": "exo", "alphadpo": "alpha-dpo"}

_PER_SIDE = "its loss is a sum over both completions, not a function of their difference; use trl.DPOTrainer with"
REFUSED: dict[str, str] = {
    "orpo": "the odds in its logit are no difference of log-probabilities; the preset orpo-like leaves them out",
    "rso": "it is a way to make data; make pairs with hf_moe_cpt.data.rejection_sampling "
    "(scripts/rejection_sample.py), then train on them with the preset hinge-dpo or dpo",
    "wpo": "it weighs the loss outside of the link, by the policy's probabilities; use trl.DPOTrainer with "
    "use_weighting=True",
    "kto": "it learns from single completions, not from pairs; use trl.KTOTrainer",
    "bco": f"{_PER_SIDE} loss_type='bco_pair'",
    "nca": f"{_PER_SIDE} loss_type='nca_pair'",
    "sppo": f"{_PER_SIDE} loss_type='sppo_hard'",
    "apo": f"{_PER_SIDE} loss_type='apo_zero' or 'apo_down'",
    "exo": "its loss is a divergence of two distributions, none of the links; use trl.DPOTrainer with "
    "loss_type='exo_pair'",
    "aot": "it sorts the margins of a batch, so that a pair's loss is not a function of that pair; use "
    "trl.DPOTrainer with loss_type='aot'",
    "discopop": "it blends two links by the logit; use trl.DPOTrainer with loss_type='discopop'",
    "robust-dpo": "it subtracts the loss of the flipped labels; use trl.DPOTrainer with loss_type='robust', or the "
    "preset cdpo, which adds it",
    "f-dpo": "it puts another function of the ratio in the place of its logarithm; use trl.DPOTrainer with "
    "f_divergence_type",
    "ld-dpo": "it weighs the tokens beyond the shorter length; use trl.DPOTrainer with ld_alpha",
    "rpo": "its SFT loss is per token beside a summed margin; use trl.DPOTrainer with loss_type=['sigmoid', 'sft'], "
    "or set sft_weight on the preset dpo (both summed) or ln-dpo (both per token)",
    "mpo": "one of its losses is a sum over the completions; use trl.DPOTrainer with "
    "loss_type=['sigmoid', 'bco_pair', 'sft']",
    "tr-dpo": "it is a moving reference, not a loss; set sync_ref_model=True with the preset dpo",
    "sdpo": "it is DPO in stages; run the preset dpo on one part of the data after the other, each time with the "
    "policy of the stage before as ref_model",
    "dpop": "its penalty max(0, r_w - l_w) is for the chosen completion; sft_weight with the preset dpo holds "
    "that completion up too",
    "beta-dpo": "its beta follows the margins of a batch; contextual_scaling='mallows' scales each pair instead",
    "alpha-dpo": "its home advantage follows the policy's own ratio to the reference; mixing_alpha with the preset "
    "simpo gives the reference a fixed share instead",
    "alphapo": "it puts (1 - p^-a) / a in the place of log p; use trl.experimental.cpo with loss_type='alphapo'",
    "tpo": "it needs a third, gold completion for each prompt; use trl.experimental.tpo",
}


def preset_settings(name: str) -> dict[str, Any]:
    """A new dict of `RainbowPOConfig` fields for a method; case and underscores in the name do not matter.

    Raises ValueError for an unknown name, and for a method that the objective cannot express, with the reason.
    """
    key = str(name).lower().replace("_", "-")
    key = ALIASES.get(key, key)
    if key in REFUSED:
        raise ValueError(f"{name!r} is not a preset: {REFUSED[key]}.")
    if key not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown: choose one of {', '.join(PRESETS)}.")
    return {**SWITCHES, **PRESETS[key]}


@dataclass(frozen=True)
class Components:
    """A configuration as a row of the table of methods; every field is text, and `print` shows it under a header."""

    length_normalization: str
    link: str
    home_advantage: str
    reference: str
    contextual_scaling: str
    sft: str
    method: str  # the preset with the same switches, whatever its numbers, or the nearest one and what differs

    def __str__(self) -> str:
        return components_table([self])


_HEADER = ("LN", "link", "home advantage", "reference", "contextual scaling", "SFT", "method")


def components_table(rows: Iterable[Components]) -> str:
    """Several rows, aligned under one header."""
    cells = [_HEADER, *(astuple(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(" | ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def components_of(config: Any) -> Components:
    """The row that a `RainbowPOConfig` is."""
    smoothing = f", {config.label_smoothing:g} flipped" if config.label_smoothing else ""
    scale = config.dispersion_scale
    phi = "phi, mean 1" if scale == "auto" else f"phi, scale {scale:g}"
    return Components(
        length_normalization="yes" if config.length_normalization else "no",
        link=f"{config.link}{smoothing}",
        home_advantage=_advantage_text(config),
        reference={0.0: "none", 1.0: "pi_ref"}.get(config.mixing_alpha, f"{config.mixing_alpha:g} of pi_ref"),
        contextual_scaling="1" if config.contextual_scaling == "none" else phi,
        sft=f"{config.sft_weight:g}" if config.sft_weight else "no",
        method=_method(vars(config)),
    )


def _advantage_text(config: Any) -> str:
    share = 1.0 - config.mixing_alpha if config.mix_home_advantage else 1.0
    if config.home_advantage * share == 0.0:
        return "0"
    gap = {"identity": "(score_w - score_l)", "log": "log(score_w - score_l)"}[config.score_transform]
    of_what = {"constant": "", "score": f" {gap}", "length": " (|y_l| - |y_w|)"}[config.home_advantage_from]
    return f"{'' if share == 1.0 else f'{share:g} * '}{config.home_advantage:g}{of_what}"


def _switches(settings: dict[str, Any]) -> dict[str, Any]:
    """Which components are on and of which kind, without their numbers."""
    share = 1.0 - settings["mixing_alpha"] if settings["mix_home_advantage"] else 1.0
    return {
        "LN": settings["length_normalization"],
        "link": settings["link"],
        "label smoothing": settings["label_smoothing"] > 0.0,
        "home advantage": settings["home_advantage_from"] if settings["home_advantage"] * share else "none",
        "reference": {0.0: "none", 1.0: "full"}.get(settings["mixing_alpha"], "mixed"),
        "contextual scaling": settings["contextual_scaling"],
        "SFT": settings["sft_weight"] > 0.0,
    }


def _method(settings: dict[str, Any]) -> str:
    own = _switches(settings)
    differences = {
        name: [switch for switch, value in _switches(preset_settings(name)).items() if own[switch] != value]
        for name in PRESETS
    }
    nearest = min(differences, key=lambda name: len(differences[name]))
    return f"{nearest}, but for {' and '.join(differences[nearest])}" if differences[nearest] else nearest
