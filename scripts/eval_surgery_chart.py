"""Values with their intervals as dots on whiskers, one line for each group, models below each other. Source: ours.

An `<svg>` in the colours and classes of the report's line charts; a dot tells its numbers when it is pointed at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from hf_moe_cpt.analysis.axes import format_tick, linear_ticks
from hf_moe_cpt.analysis.chart import CHAR_WIDTH, Mark
from hf_moe_cpt.analysis.page_assets import NUM_COLORS


Range = tuple[float, float, float]  # value, low, high

WIDTH, LINE, GAP, TOP, RIGHT, BOTTOM = 760, 15, 14, 56, 24, 48  # pixels


def interval_chart(
    groups: Sequence[str],
    models: Mapping[str, Sequence[Range | None]],
    *,
    title: str,
    x_label: str,
    vertical: Sequence[Mark] = (),
    x_range: tuple[float, float] | None = None,
) -> str:
    """Draw the values of each model, one for each group, None where there is none; infinite ones are left out.

    vertical: reference values, always inside the range. x_range: least and most that is shown, wider if need be.
    """
    shown = {name: [_finite(value) for value in values] for name, values in models.items()}
    low, high = _x_range([value for values in shown.values() for value in values if value], vertical, x_range)
    left = 24 + CHAR_WIDTH * max(map(len, groups), default=0)
    top = TOP + 20
    group_height = LINE * max(1, len(models)) + GAP
    bottom = top + group_height * len(groups)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - RIGHT - left)

    parts = [f'<text class="title" x="{left:g}" y="20">{escape(title)}</text>', *_keys(list(models), left)]
    for tick in linear_ticks(low, high):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="tick middle" x="{x(tick):.1f}" y="{bottom + 18}">{format_tick(tick)}</text>')
    for mark in vertical:
        parts.append(f'<line class="mark" x1="{x(mark.at):.1f}" x2="{x(mark.at):.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="note middle" x="{x(mark.at):.1f}" y="{top - 6}">{escape(mark.label)}</text>')
    for place, group in enumerate(groups):
        middle = top + group_height * (place + 0.5)
        parts.append(f'<text class="label end" x="{left - 10:g}" y="{middle + 4:.1f}">{escape(group)}</text>')
        for number, (name, values) in enumerate(shown.items()):
            if values[place] is not None:
                y = middle + LINE * (number - (len(models) - 1) / 2)
                parts.append(_dot(f"{group}, {name}", values[place], number, x, y))
    centre = (left + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label middle" x="{centre:g}" y="{bottom + 38}">{escape(x_label)}</text>')
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{top}" y2="{bottom}"/>')
    height = bottom + BOTTOM
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" aria-label="{escape(title)}" data-area="0 0 0 0" '
        f'data-x-label="{escape(x_label)}">{"".join(parts)}</svg>'
    )


def _finite(value: Range | None) -> Range | None:
    """The value with ends that can be drawn: its own where an end is missing; None if it is no number itself."""
    if value is None or not math.isfinite(value[0]):
        return None
    low, high = (end if end is not None and math.isfinite(end) else value[0] for end in value[1:])
    return value[0], low, high


def _x_range(
    values: Sequence[Range], vertical: Sequence[Mark], given: tuple[float, float] | None
) -> tuple[float, float]:
    numbers = [number for value in values for number in value] + [mark.at for mark in vertical] + list(given or ())
    low, high = min(numbers, default=0.0), max(numbers, default=1.0)
    margin = 0.03 * (high - low) or 0.05 * abs(high) or 0.5
    return low - margin, high + margin


def _keys(names: Sequence[str], left: float) -> list[str]:
    parts, x = [], left
    for number, name in enumerate(names):
        parts.append(
            f'<line class="c{number % NUM_COLORS}" stroke-width="6" x1="{x:g}" x2="{x + 12:g}" y1="36" y2="36"/>'
            f'<text class="label" x="{x + 18:g}" y="40">{escape(name)}</text>'
        )
        x += 34 + CHAR_WIDTH * len(name)
    return parts


def _dot(label: str, value: Range, number: int, x: Callable[[float], float], y: float) -> str:
    middle, low, high = value
    told = f"{label}: {middle:.4g} [{low:.4g}, {high:.4g}]"
    color = f"c{number % NUM_COLORS}"
    return (
        f"<g><title>{escape(told)}</title>"
        f'<line class="{color}" stroke-width="2" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<line class="{color}" stroke-width="9" stroke-linecap="round" x1="{x(middle):.1f}" x2="{x(middle):.1f}" '
        f'y1="{y:.1f}" y2="{y:.1f}"/></g>'
    )
