"""Line charts as SVG text, without a plotting library: for reports, cards and terminals without a display.

A chart carries no colours of its own: `page_assets.CHART_CSS` gives them for light and dark, `CHART_JS` adds hover
values and a legend that hides and shows series. A standalone chart embeds the style. Source: ours.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from hf_moe_cpt.analysis.axes import format_tick, linear_ticks, log_ticks, thin
from hf_moe_cpt.analysis.page_assets import CHART_CSS, NUM_COLORS


LEFT, RIGHT, BOTTOM = 64, 20, 48
CHAR_WIDTH = 6.7  # mean advance of the 12 px label font, for the legend's line breaks


@dataclass(frozen=True)
class Series:
    """One curve: x ascending, y as long as x (NaN leaves a gap); color: index into the palette, None for the next."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """A labelled straight line across the plot: at an x (an event) or at a y (a reference)."""

    at: float
    label: str


@dataclass(frozen=True)
class _Frame:
    """Plot area in pixels and the data ranges mapped onto it (y in log10 if log_y)."""

    left: float
    top: float
    right: float
    bottom: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log_y: bool

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = (math.log10(edge) for edge in self.y_range) if self.log_y else self.y_range
        value = math.log10(value) if self.log_y else value
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    vertical: Sequence[Mark] = (),
    horizontal: Sequence[Mark] = (),
    log_y: bool = False,
    from_zero: bool = False,
    width: int = 760,
    height: int = 380,
    max_points: int = 800,
    standalone: bool = False,
) -> str:
    """Draw curves over a common axis and return the `<svg>` element.

    title: the question the chart answers. Labels carry the unit, "loss (nats/token)". vertical: events on the x
    axis ("distribution shift"). horizontal: reference values ("ideal"), always inside the y range. log_y: base-10
    axis; values <= 0 become gaps. from_zero: include y = 0. max_points: longer curves are thinned, extremes kept.
    """
    curves = [_prepared(item, log_y, max_points) for item in series]
    x_range = _x_range(curves, vertical)
    y_range = _y_range(curves, horizontal, log_y, from_zero)
    keys, legend_height = _legend(series, width)
    frame = _Frame(LEFT, 56 + legend_height, width - RIGHT, height + legend_height - BOTTOM, x_range, y_range, log_y)
    parts = [
        f'<text class="title" x="{LEFT}" y="20">{escape(title)}</text>',
        *keys,
        f'<text class="label" x="{LEFT}" y="{frame.top - 10:g}">{escape(y_label)}</text>',
        *_axes(frame, x_label),
        *_mark_lines(frame, vertical, horizontal),
        *[_curve(frame, i, item, x, y) for i, (item, (x, y)) in enumerate(zip(series, curves, strict=True))],
        *_event_labels(frame, vertical),
        *_reference_labels(frame, horizontal, lowest=min((v for _, y in curves for v in y if v == v), default=0.0)),
        f'<line class="cursor" x1="0" x2="0" y1="{frame.top:g}" y2="{frame.bottom:g}"/>',
    ]
    full_height = height + legend_height
    area = f"{frame.left:g} {frame.top:g} {frame.right:g} {frame.bottom:g}"
    style = f"<style>{CHART_CSS}</style>" if standalone else ""
    background = '<rect class="paper" width="100%" height="100%"/>' if standalone else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width} {full_height}" width="{width}" '
        f'height="{full_height}" role="img" aria-label="{escape(title)}" data-area="{area}" '
        f'data-x-label="{escape(x_label)}">{style}{background}{"".join(parts)}</svg>'
    )


def _prepared(item: Series, log_y: bool, max_points: int) -> tuple[list[float], list[float]]:
    if len(item.x) != len(item.y):
        raise ValueError(f"series {item.name!r} has {len(item.x)} x and {len(item.y)} y values: give as many of each.")
    y = [float(value) if math.isfinite(value) and (value > 0 or not log_y) else math.nan for value in item.y]
    return thin([float(value) for value in item.x], y, max_points)


def _x_range(curves: list[tuple[list[float], list[float]]], vertical: Sequence[Mark]) -> tuple[float, float]:
    values = [value for x, _ in curves for value in x] + [mark.at for mark in vertical]
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _y_range(
    curves: list[tuple[list[float], list[float]]], horizontal: Sequence[Mark], log_y: bool, from_zero: bool
) -> tuple[float, float]:
    values = [value for _, y in curves for value in y if not math.isnan(value)]
    values += [mark.at for mark in horizontal if mark.at > 0 or not log_y]
    if not values:
        return (0.1, 1.0) if log_y else (0.0, 1.0)
    low, high = min(values), max(values)
    if log_y:
        margin = max(1.05, (high / low) ** 0.05)
        return low / margin, high * margin
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return (low if from_zero and low == 0 else low - margin), (high if from_zero and high == 0 else high + margin)


def _legend(series: Sequence[Series], width: int) -> tuple[list[str], int]:
    """Keys in rows below the title, and the height of the rows in pixels; none for a single series."""
    if len(series) < 2:
        return [], 0
    parts, x, row = [], float(LEFT), 0
    for i, item in enumerate(series):
        size = 34 + CHAR_WIDTH * len(item.name)
        if x + size > width - RIGHT and x > LEFT:
            x, row = float(LEFT), row + 1
        y = 40 + 20 * row
        parts.append(
            f'<g class="key" data-series="{i}" role="button" tabindex="0">'
            f'<rect class="hit" x="{x - 4:g}" y="{y - 14}" width="{size - 6:g}" height="20"/>'
            f'<line class="{_classes(i, item)}" x1="{x:g}" x2="{x + 18:g}" y1="{y - 4}" y2="{y - 4}"/>'
            f'<text class="label" x="{x + 24:g}" y="{y}">{escape(item.name)}</text></g>'
        )
        x += size
    return parts, 20 * (row + 1)


def _classes(position: int, item: Series) -> str:
    color = (position if item.color is None else item.color) % NUM_COLORS
    return f"curve c{color}" + (" dashed" if item.dashed else "")


def _axes(frame: _Frame, x_label: str) -> list[str]:
    """Grid lines, tick labels, the base line and the x label."""
    low, high = frame.y_range
    parts = []
    for value in log_ticks(low, high) if frame.log_y else linear_ticks(low, high):
        y = frame.y(value)
        parts.append(f'<line class="grid" x1="{frame.left:g}" x2="{frame.right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{frame.left - 8:g}" y="{y + 4:.1f}">{format_tick(value)}</text>')
    for value in linear_ticks(*frame.x_range, count=8):
        x = frame.x(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{frame.bottom:g}" y2="{frame.bottom + 4:g}"/>')
        parts.append(f'<text class="tick middle" x="{x:.1f}" y="{frame.bottom + 18:g}">{format_tick(value)}</text>')
    base = f'x1="{frame.left:g}" x2="{frame.right:g}" y1="{frame.bottom:g}" y2="{frame.bottom:g}"'
    parts.append(f'<line class="axis" {base}/>')
    centre = (frame.left + frame.right) / 2
    parts.append(f'<text class="label middle" x="{centre:g}" y="{frame.bottom + 38:g}">{escape(x_label)}</text>')
    return parts


def _mark_lines(frame: _Frame, vertical: Sequence[Mark], horizontal: Sequence[Mark]) -> list[str]:
    lines = [(frame.x(mark.at), frame.top, frame.x(mark.at), frame.bottom) for mark in vertical]
    heights = [frame.y(mark.at) for mark in _drawable(frame, horizontal)]
    lines += [(frame.left, y, frame.right, y) for y in heights]
    return [f'<line class="mark" x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}"/>' for a, b, c, d in lines]


def _event_labels(frame: _Frame, vertical: Sequence[Mark]) -> list[str]:
    """Labels beside their lines, to the left near the right edge, a row lower where one would cover another."""
    parts: list[str] = []
    row_ends: list[float] = []
    for mark in sorted(vertical, key=lambda mark: mark.at):
        x, size = frame.x(mark.at), CHAR_WIDTH * len(mark.label)
        fits = x + 8 + size < frame.right
        begin = x + 6 if fits else x - 6 - size
        row = next((i for i, end in enumerate(row_ends) if end < begin), len(row_ends))
        row_ends[row : row + 1] = [begin + size]
        place = f'class="note" x="{x + 6:.1f}"' if fits else f'class="note end" x="{x - 6:.1f}"'
        parts.append(f'<text {place} y="{frame.top + 12 + 14 * row:g}">{escape(mark.label)}</text>')
    return parts


def _reference_labels(frame: _Frame, horizontal: Sequence[Mark], lowest: float) -> list[str]:
    """Labels at the right end of their lines, below those that lie below every curve."""
    parts = []
    for mark in _drawable(frame, horizontal):
        y = frame.y(mark.at) + (13 if mark.at <= lowest else -5)
        parts.append(f'<text class="note end" x="{frame.right - 4:g}" y="{y:.1f}">{escape(mark.label)}</text>')
    return parts


def _drawable(frame: _Frame, horizontal: Sequence[Mark]) -> list[Mark]:
    return [mark for mark in horizontal if mark.at > 0 or not frame.log_y]


def _curve(frame: _Frame, position: int, item: Series, x: list[float], y: list[float]) -> str:
    """One path with a pen-up at each NaN; a point between two gaps becomes a dot by its round cap."""
    commands, pen_down = [], False
    for value_x, value_y in zip(x, y, strict=True):
        if math.isnan(value_y):
            pen_down = False
            continue
        point = f"{frame.x(value_x):.1f} {frame.y(value_y):.1f}"
        commands.append(f"L{point}" if pen_down else f"M{point}l0 0")
        pen_down = True
    data = json.dumps(
        {
            "name": item.name,
            "x": [_short(value) for value in x],
            "y": [_short(value) for value in y],
            "px": [round(frame.x(value), 1) for value in x],
        },
        separators=(",", ":"),
    )
    return (
        f'<path class="{_classes(position, item)}" data-series="{position}" data-points="{escape(data)}" '
        f'd="{"".join(commands)}"/>'
    )


def _short(value: float) -> float | int | None:
    """Six significant digits for the hover text, whole numbers whole; None is JSON for a gap."""
    if math.isnan(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.6g}")
