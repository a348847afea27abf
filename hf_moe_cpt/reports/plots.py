"""Plots as files, for whoever has matplotlib. Source: ours."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


def plotting(path: Path) -> ModuleType | None:
    """matplotlib.pyplot set up to write files, or None after a line that says why `path` will not be written."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        print(f"no plot {path}: it needs matplotlib (pip install matplotlib); {error}")
        return None


def grouped_bars(axes: Any, groups: Sequence[str], bars: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Bars of medians with whiskers from least to most, side by side in each group.

    axes: of matplotlib. bars: for each label the values of each group; a group that is missing leaves a gap.
    """
    width = 0.8 / max(1, len(bars))
    for number, (label, values_of_group) in enumerate(bars.items()):
        present = [(place, values_of_group[group]) for place, group in enumerate(groups) if values_of_group.get(group)]
        centers = [place + (number - (len(bars) - 1) / 2) * width for place, _ in present]
        medians = [statistics.median(values) for _, values in present]
        below = [median - min(values) for median, (_, values) in zip(medians, present, strict=True)]
        above = [max(values) - median for median, (_, values) in zip(medians, present, strict=True)]
        axes.bar(centers, medians, width, yerr=[below, above], label=label, error_kw={"elinewidth": 0.8})
    axes.set_xticks(range(len(groups)), groups)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
