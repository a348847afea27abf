"""Published methods as settings of one objective, and the row of the table of methods that a configuration is.

A preset sets every switch of the objective, and beta and the learning rate to a value for models of about 8B; any of
them can be overridden. Methods that the objective cannot express are refused by name, with the reason.
Source: ours, derived from each method's loss; docs/rainbowpo.md says where each number comes from.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import yaml


_DATA = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
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
