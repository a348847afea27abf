"""Arguments of RainbowPO: a field for each component of the objective, and what is refused before anything is loaded.

Published methods are presets of it: they set every switch, and beta and the learning rate to a value for models of
about 8B; any of them can be overridden. Methods that the objective cannot express are refused by name, with reason.

Defaults: Zhao et al. 2025 (RainbowPO). Presets: derived from each method's loss; docs/rainbowpo.md says where each
number comes from. Limits: ours, from runs that the authors recorded (the same page, "Units of the home advantage").
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.hf_argparser import HfArg
from trl import DPOConfig

from hf_moe_cpt.settings import check_settings
from hf_moe_cpt.trainers.common.arguments import FLAGS_OF_SCRIPTS, SharedArguments, refuse_unread
from hf_moe_cpt.trainers.rainbowpo.losses import LINKS, SCORE_TRANSFORMS


_DATA = yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8"))
SWITCHES: dict[str, Any] = _DATA["switches"]
PRESETS: dict[str, dict[str, Any]] = _DATA["presets"]
ALIASES: dict[str, str] = _DATA["aliases"]
REFUSED: dict[str, str] = _DATA["refused"]


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


CHOICES = {
    "link": tuple(LINKS),
    "contextual_scaling": ("none", "mallows"),
    "home_advantage_from": ("constant", "score", "length"),
    "score_transform": tuple(SCORE_TRANSFORMS),
}
RANGES = {  # field -> whether a value is in its range, and what is said of one that is not
    "mixing_alpha": (
        lambda value: 0.0 <= value <= 1.0,
        "is outside [0, 1]: it is the reference's share, 1 for a full reference as in DPO, 0 for none as in SimPO.",
    ),
    "beta": (
        lambda value: 0.0 < value < math.inf,
        "must be a finite number above 0: about 10 with length_normalization, about 0.1 without.",
    ),
    "label_smoothing": (
        lambda value: 0.0 <= value < 0.5,
        "is outside [0, 0.5): it is the share of wrong labels, and at a half the labels say nothing.",
    ),
    "sft_weight": (
        lambda value: 0.0 <= value < math.inf,
        "must be a finite number, at least 0: 0 leaves the SFT loss out.",
    ),
    "calibration_pairs": (
        lambda value: value is None or value >= 1,
        "leaves nothing to calibrate on: give at least 1, or None for the whole training set.",
    ),
    "router_probe_pairs": (lambda value: value >= 0, "must be at least 0, which probes nothing."),
}
DEFAULT_HOME_ADVANTAGE = 0.1
# |h| in nats per token. 1 asks that the chosen completion be e times as probable as the rejected one at every token,
# while a trained model's own answers cost about 0.4 nats a token in all; the largest h of any recorded run is 0.5.
MAX_CONSTANT = 1.0
MAX_PER_TOKEN_OF_LENGTH = 0.01  # completions often differ by 100 tokens, which this turns into the limit above

OPTIONS_OF_DPO = {
    "loss_type": "use trl.DPOTrainer for it, or choose link, length_normalization and sft_weight",
    "label_smoothing_factor": "set label_smoothing, the share of pairs whose label is taken to be wrong",
    "loss_weights": "the only second term is the SFT loss, weighed by sft_weight",
    "ld_alpha": "length is dealt with by length_normalization, or by home_advantage_from='length'",
    "f_divergence_type": "the objective is written in log-ratios, which is reverse_kl; use trl.DPOTrainer for others",
    "f_alpha_divergence_coef": "there is no alpha-divergence here; use trl.DPOTrainer",
    "use_weighting": "WPO weighs the loss outside of the link; use trl.DPOTrainer, or contextual_scaling='mallows'",
    "discopop_tau": "DiscoPOP blends two links; use trl.DPOTrainer",
}
LOSSES_OF_DPO = {  # loss_type -> what does that here
    "sigmoid_norm": "leave it out and set mixing_alpha=1, home_advantage=0, contextual_scaling='none' (preset ln-dpo)",
    "hinge": "set link='hinge' (preset hinge-dpo)",
    "ipo": "set link='square' (preset ipo)",
    "sft": "set sft_weight",
}


@dataclass
class RainbowPOConfig(SharedArguments, DPOConfig):
    """Arguments of `RainbowPOTrainer`: those of `trl.DPOConfig` and of its other bases, and:

    Other defaults than the parent's: beta 10, for log-probabilities per token. The parent's other losses (loss_type,
    loss_weights, ld_alpha, f_divergence_type, use_weighting, discopop_tau) are refused: the switches below replace
    them. Every contradiction raises ValueError before anything is loaded.
    """

    # --- the margin: what is compared ---
    beta: float = HfArg(
        default=10.0, help="Inverse temperature: about 10 with length_normalization, about 0.1 without."
    )
    length_normalization: bool = HfArg(
        default=True, help="Compare log-probabilities per token instead of summed ones."
    )
    mixing_alpha: float = HfArg(
        default=0.25, help="Share of the reference model in [0, 1]: 1 as in DPO; 0 as in SimPO, without it."
    )
    home_advantage: float | None = HfArg(
        default=None,
        help="h: by how much the chosen completion must lead, in nats per token (summed nats without "
        f"length_normalization). Unset: simpo_gamma / beta if that is set, else {DEFAULT_HOME_ADVANTAGE}.",
    )
    simpo_gamma: float | None = HfArg(
        default=None, help="SimPO's gamma, instead of home_advantage: h = simpo_gamma / beta."
    )
    mix_home_advantage: bool = HfArg(
        default=True, help="Weigh the home advantage by 1 - mixing_alpha, as part of the mixed reference."
    )
    home_advantage_from: str = HfArg(
        default="constant",
        metadata={"choices": list(CHOICES["home_advantage_from"])},
        help="constant: h for all pairs; score: h times the difference of the pair's scores (ODPO); length: h "
        "for every token by which the chosen completion is shorter (R-DPO).",
    )
    score_transform: str = HfArg(
        default="identity",
        metadata={"choices": list(CHOICES["score_transform"])},
        help="What is taken of the difference of scores.",
    )
    chosen_score_column: str = HfArg(default="score_chosen", help="Column with the score of the chosen completion.")
    rejected_score_column: str = HfArg(
        default="score_rejected", help="Column with the score of the rejected completion."
    )

    # --- the scale: how much a pair counts ---
    contextual_scaling: str = HfArg(
        default="mallows",
        metadata={"choices": list(CHOICES["contextual_scaling"])},
        help="mallows: multiply the margin by phi, small where the reference is unsure; none: by 1.",
    )
    # None is no value: with it in the type the parsers hand over text, and without it they take numbers alone.
    dispersion_scale: float | str | None = HfArg(
        default="auto", help="Factor of phi = -factor * ln(entropy): a number, or auto for a mean phi of 1."
    )
    calibration_pairs: int | None = HfArg(
        default=1024, help="Training pairs on which dispersion_scale=auto is calibrated; unset (null): all of them."
    )

    # --- the loss ---
    link: str = HfArg(
        default="logistic",
        metadata={"choices": list(CHOICES["link"])},
        help="Function of the scaled margin that is minimised.",
    )
    label_smoothing: float = HfArg(default=0.0, help="Share of labels, in [0, 0.5), that is taken to be wrong (cDPO).")
    sft_weight: float = HfArg(default=0.0, help="Weight of the SFT loss of the chosen completion; 0 leaves it out.")

    # --- mixtures of experts ---
    router_probe_pairs: int = HfArg(
        default=0,
        help="Training pairs on which router_saturation is logged: the share of a token's experts chosen at the start "
        "too, at one forward pass a log; 0: none.",
    )

    def __post_init__(self) -> None:
        """Fill what is unset and refuse contradictions, before anything is loaded."""
        refuse_unread(self, DPOConfig, FLAGS_OF_SCRIPTS)
        losses = self.loss_type if isinstance(self.loss_type, list | tuple) else [self.loss_type]
        told = "; ".join(LOSSES_OF_DPO[name] for name in losses if name in LOSSES_OF_DPO)
        refuse_unread(self, DPOConfig, OPTIONS_OF_DPO | ({"loss_type": told} if told else {}), part_of="objective")
        check_settings(self)
        if self.padding_free and self.pad_to_multiple_of not in (None, "auto"):
            raise ValueError(
                f"padding_free=True pads nothing, and pad_to_multiple_of={self.pad_to_multiple_of} asks for padding: "
                "leave one of them out."
            )
        if self.activation_offloading and not torch.accelerator.is_available():
            raise ValueError("activation_offloading=True moves activations from a GPU, and there is none.")
        self._check_ranges()
        self.dispersion_scale = self._checked_dispersion_scale()
        self.home_advantage = self._checked_home_advantage()
        for warning in self._warnings():
            warnings.warn(warning, stacklevel=3)
        super().__post_init__()
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:  # a number by now
            raise ValueError(f"pad_to_multiple_of={self.pad_to_multiple_of} must be at least 1, or auto, or none.")

    def _check_ranges(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}.")
        for name, (is_in_range, message) in RANGES.items():
            if not is_in_range(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} {message}")

    def _checked_dispersion_scale(self) -> float | str:
        """The number above 0 that `dispersion_scale` is or spells, or "auto"."""
        if self.dispersion_scale == "auto":
            return "auto"
        try:
            number = float(self.dispersion_scale)
        except (TypeError, ValueError):
            number = math.nan
        if not 0.0 < number < math.inf:
            raise ValueError(
                f"dispersion_scale={self.dispersion_scale!r} is neither a number above 0 nor 'auto': 'auto' gives phi "
                "the mean 1 on the training set; the paper's number is 0.29, for its model and data."
            )
        return number

    def _checked_home_advantage(self) -> float:
        """The home advantage h that is meant: `home_advantage`, or `simpo_gamma / beta`, or the default."""
        h, gamma, source = self.home_advantage, self.simpo_gamma, self.home_advantage_from
        if gamma is not None:
            if source != "constant":
                raise ValueError(
                    f"simpo_gamma={gamma} is a constant, home_advantage_from={source!r} is not: set home_advantage, "
                    "the factor of that difference, instead."
                )
            from_gamma = gamma / self.beta
            if h is not None and not math.isclose(h, from_gamma, rel_tol=1e-9, abs_tol=1e-12):
                raise ValueError(
                    f"home_advantage={h} and simpo_gamma={gamma} are both set and differ: simpo_gamma means "
                    f"home_advantage={from_gamma:g} (gamma / beta); set one of them."
                )
            h = from_gamma
        h = DEFAULT_HOME_ADVANTAGE if h is None else h
        if not math.isfinite(h):
            raise ValueError(f"home_advantage={h} must be a finite number: 0 leaves it out.")
        if self.length_normalization:
            self._check_unit(h)
        if source != "constant" and h and self.mix_home_advantage and self.mixing_alpha == 1.0:
            raise ValueError(
                f"home_advantage_from={source!r} has no effect: mix_home_advantage weighs it by 1 - mixing_alpha, "
                "which is 0; set mix_home_advantage=False."
            )
        if self.score_transform != "identity" and source != "score":
            raise ValueError(
                f"score_transform={self.score_transform!r} has no scores to work on: set home_advantage_from='score'."
            )
        return h

    def _check_unit(self, h: float) -> None:
        """Refuse an h (in nats per token) whose unit cannot be the one that was meant."""
        if self.simpo_gamma is not None and abs(h) >= MAX_CONSTANT:
            raise ValueError(
                f"simpo_gamma={self.simpo_gamma:g} at beta={self.beta:g} asks for {h:g} nats per token and must stay "
                "below beta in size: lower simpo_gamma or raise beta."
            )
        if self.home_advantage_from == "constant" and abs(h) >= MAX_CONSTANT:
            raise ValueError(
                f"home_advantage={h:g} is in nats per token under length_normalization and must stay below "
                f"{MAX_CONSTANT:g} in size: for SimPO's gamma set simpo_gamma={h:g} (beta times home_advantage); for "
                "summed log-probabilities set length_normalization=False."
            )
        if self.home_advantage_from == "length" and abs(h) > MAX_PER_TOKEN_OF_LENGTH:
            raise ValueError(
                f"home_advantage={h:g} nats per token for every token of difference in length must stay within "
                f"{MAX_PER_TOKEN_OF_LENGTH:g} under length_normalization: 100 tokens would be worth {abs(h) * 100:g} "
                "nats per token; set a smaller home_advantage, or length_normalization=False as in R-DPO."
            )

    def _warnings(self) -> Iterator[str]:
        """What is allowed and probably not meant, one line each."""
        if self.length_normalization and self.beta < 1.0:
            yield (
                f"beta={self.beta:g} is of the scale of summed log-probabilities, and length_normalization compares "
                "them per token, so completions may grow without end: set beta to about 10, or "
                "length_normalization=False."
            )
        # The hinge is exempt: there 1 / beta is the margin delta that is asked for, and may be small.
        if not self.length_normalization and self.beta > 1.0 and self.link != "hinge":
            yield (
                f"beta={self.beta:g} is of the scale of log-probabilities per token, and without length_normalization "
                "they are summed: set beta to about 0.1, or length_normalization=True."
            )
        if self.sync_ref_model and self.contextual_scaling == "mallows":
            yield (
                "sync_ref_model moves the reference whose entropy phi is made of, so the mean of phi drifts away from "
                "its calibration: watch phi/mean, or set contextual_scaling='none'."
            )

    @property
    def needs_reference_logps(self) -> bool:
        """Whether the loss reads the reference's log-probabilities."""
        return self.mixing_alpha > 0.0

    @property
    def needs_reference_entropy(self) -> bool:
        """Whether the loss reads the reference's entropies."""
        return self.contextual_scaling == "mallows"

    @property
    def needs_reference(self) -> bool:
        """Whether the loss needs a forward pass of the reference at all."""
        return self.needs_reference_logps or self.needs_reference_entropy

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> RainbowPOConfig:
        """The settings of a published method, such as "simpo"; `overrides` are any fields, and win.

        Raises ValueError for a name that is unknown, or known but not expressible, with the reason.
        """
        settings = preset_settings(name)
        if overrides.get("simpo_gamma") is not None:
            settings.pop("home_advantage", None)
        return cls(**{**settings, **overrides})

    def components(self) -> Components:
        """The row of the table of methods that this configuration is; `print` shows it under a header."""
        return components_of(self)
