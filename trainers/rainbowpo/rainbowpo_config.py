"""Arguments of RainbowPO: one field for each component of the objective. Defaults: Zhao et al. 2025 (RainbowPO)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from trl import DPOConfig

from hf_moe_cpt.trainers.instruments.fault_settings import FaultSettings
from hf_moe_cpt.trainers.rainbowpo.presets import Components, components_of, preset_settings
from hf_moe_cpt.trainers.rainbowpo.settings_checks import (
    CHOICES,
    check_objective,
    check_parent,
    checked_dispersion_scale,
    checked_home_advantage,
    doubts,
)


DEFAULT_HOME_ADVANTAGE = 0.1


@dataclass
class RainbowPOConfig(FaultSettings, DPOConfig):
    """Arguments of `RainbowPOTrainer`; everything that `trl.DPOConfig` and `FaultSettings` have, and the fields below.

    Other defaults than the parent's: beta 10, for log-probabilities per token. The parent's other losses (loss_type,
    loss_weights, ld_alpha, f_divergence_type, use_weighting, discopop_tau) are refused: the switches below replace
    them. Every contradiction raises ValueError before anything is loaded.
    """

    # --- the margin: what is compared ---
    beta: float = field(
        default=10.0,
        metadata={"help": "Inverse temperature: about 10 with length_normalization, about 0.1 without."},
    )
    length_normalization: bool = field(
        default=True, metadata={"help": "Compare log-probabilities per token instead of summed ones."}
    )
    mixing_alpha: float = field(
        default=0.25,
        metadata={"help": "Share of the reference model in [0, 1]: 1 as in DPO; 0 as in SimPO, without it."},
    )
    home_advantage: float | None = field(
        default=None,
        metadata={
            "help": "h: by how much the chosen completion must lead, in nats per token (summed nats without "
            f"length_normalization). Unset: simpo_gamma / beta if that is set, else {DEFAULT_HOME_ADVANTAGE}."
        },
    )
    simpo_gamma: float | None = field(
        default=None, metadata={"help": "SimPO's gamma, instead of home_advantage: h = simpo_gamma / beta."}
    )
    mix_home_advantage: bool = field(
        default=True,
        metadata={"help": "Weigh the home advantage by 1 - mixing_alpha, as part of the mixed reference."},
    )
    home_advantage_from: str = field(
        default="constant",
        metadata={
            "help": "constant: h for all pairs; score: h times the difference of the pair's scores (ODPO); length: h "
            "for every token by which the chosen completion is shorter (R-DPO).",
            "choices": list(CHOICES["home_advantage_from"]),
        },
    )
    score_transform: str = field(
        default="identity",
        metadata={"help": "What is taken of the difference of scores.", "choices": list(CHOICES["score_transform"])},
    )
    chosen_score_column: str = field(
        default="score_chosen", metadata={"help": "Column with the score of the chosen completion."}
    )
    rejected_score_column: str = field(
        default="score_rejected", metadata={"help": "Column with the score of the rejected completion."}
    )

    # --- the scale: how much a pair counts ---
    contextual_scaling: str = field(
        default="mallows",
        metadata={
            "help": "mallows: multiply the margin by phi, small where the reference is unsure; none: by 1.",
            "choices": list(CHOICES["contextual_scaling"]),
        },
    )
    # None is no value: with it in the type the parsers hand over text, and without it they take numbers alone.
    dispersion_scale: float | str | None = field(
        default="auto",
        metadata={"help": "Factor of phi = -factor * ln(entropy): a number, or auto for a mean phi of 1."},
    )
    calibration_pairs: int | None = field(
        default=1024,
        metadata={"help": "Training pairs on which dispersion_scale=auto is calibrated; unset (null): all of them."},
    )

    # --- the loss ---
    link: str = field(
        default="logistic",
        metadata={"help": "Function of the scaled margin that is minimised.", "choices": list(CHOICES["link"])},
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of labels, in [0, 0.5), that is taken to be wrong (cDPO)."}
    )
    sft_weight: float = field(
        default=0.0, metadata={"help": "Weight of the SFT loss of the chosen completion; 0 leaves it out."}
    )

    def __post_init__(self) -> None:
        """Fill what is unset and refuse contradictions, before anything is loaded."""
        check_parent(self, DPOConfig)
        check_objective(self)
        self.dispersion_scale = checked_dispersion_scale(self.dispersion_scale)
        self.home_advantage = checked_home_advantage(self, DEFAULT_HOME_ADVANTAGE)
        for doubt in doubts(self):
            warnings.warn(doubt, stacklevel=3)
        super().__post_init__()

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
