"""Axis arithmetic of the charts: round tick values, their labels, and thinning of long curves. Source: ours.

Style and script shared by charts and reports: light and dark colours, hover values, legend switches.

Curve colours are Okabe and Ito's colour-blind-safe set, lightened where the ground is dark. Source: ours.

Line charts as SVG text, without a plotting library: for reports, cards and terminals without a display.

A chart carries no colours of its own: `page_assets.CHART_CSS` gives them for light and dark, `CHART_JS` adds hover
values and a legend that hides and shows series. A standalone chart embeds the style. Source: ours.

Draw a learning-rate schedule as a standalone SVG before it is run. Source: ours.

Values with their intervals as dots on whiskers, one line for each group, models below each other. Source: ours.

An `<svg>` in the colours and classes of the report's line charts; a dot tells its numbers when it is pointed at.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


def linear_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that lie in [low, high], about `count` of them."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(factor * power for factor in (1, 2, 5, 10) if raw <= factor * power * (1 + 1e-9))
    first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
    digits = 1 - math.floor(math.log10(size))  # 0.1 * 3 is not 0.3
    return [round(i * size, digits) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Decades in [low, high], with their doubles and fives below three decades; linear ticks within one decade."""
    decades = math.log10(high / low)
    if decades < 1:
        return [tick for tick in linear_ticks(low, high) if tick > 0]
    factors = (1, 2, 5) if decades < 3 else (1,)
    stride = max(1, math.ceil(decades / 8))
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**e for e in exponents if e % stride == 0 for factor in factors]
    return [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def format_tick(value: float) -> str:
    """Short label: 1.5M, 20k, 0.25, 1.5e-4."""
    size = abs(value)
    if size == 0:
        return "0"
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= unit and (letter != "k" or size >= 1e4):
            return f"{value / unit:.6g}{letter}"
    if size < 1e-3:
        mantissa, exponent = f"{value:.5e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.6g}"


def thin(x: Sequence[float], y: Sequence[float], max_points: int) -> tuple[list[float], list[float]]:
    """Keep at most about max_points of a curve: first, lowest, highest and last of equal runs, so spikes survive.

    A run that is all NaN leaves one NaN, so wide gaps survive too.
    """
    if len(x) <= max_points:
        return list(x), list(y)
    num_runs = max(1, max_points // 4)
    kept: list[int] = []
    for run in range(num_runs):
        indices = range(run * len(x) // num_runs, (run + 1) * len(x) // num_runs)
        finite = [i for i in indices if math.isfinite(y[i])]
        if not finite:
            kept.extend(indices[:1])
            continue
        extremes = {finite[0], finite[-1], min(finite, key=y.__getitem__), max(finite, key=y.__getitem__)}
        kept.extend(sorted(extremes))
    return [x[i] for i in kept], [y[i] for i in kept]


LIGHT_COLORS = ("#0072b2", "#d55e00", "#009e73", "#b0558a", "#b07d00", "#3a9bd9", "#4d4d4d")
DARK_COLORS = ("#58a9e0", "#f28a4b", "#3cc79a", "#dd92bb", "#e0b03f", "#8fd0f5", "#b8b8b8")
NUM_COLORS = len(LIGHT_COLORS)


def _variables(colors: tuple[str, ...], paper: str, ink: str, faint: str, grid: str) -> str:
    palette = "".join(f"--c{i}:{color};" for i, color in enumerate(colors))
    return f"{palette}--paper:{paper};--ink:{ink};--faint:{faint};--grid:{grid};"


_LIGHT = _variables(LIGHT_COLORS, "#ffffff", "#1c2128", "#5b6570", "#e3e6ea")
_DARK = _variables(DARK_COLORS, "#16191e", "#e6e9ed", "#9aa4af", "#2c323a")

CHART_CSS = (
    f":root{{{_LIGHT}}}@media(prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    + """
.chart{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;max-width:100%;height:auto;display:block}
.chart .paper{fill:var(--paper)}
.chart text{fill:var(--faint)}
.chart .title{fill:var(--ink);font-size:15px;font-weight:600}
.chart .label,.chart .note{fill:var(--ink)}
.chart .tick{font-variant-numeric:tabular-nums}
.chart .end{text-anchor:end}
.chart .middle{text-anchor:middle}
.chart .grid{stroke:var(--grid)}
.chart .axis{stroke:var(--faint)}
.chart .mark{stroke:var(--faint);stroke-dasharray:5 4}
.chart .note{font-size:11px;paint-order:stroke;stroke:var(--paper);stroke-width:3px}
.chart .curve{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.chart .dashed{stroke-dasharray:6 5}
.chart .key{cursor:pointer}
.chart .hit{fill:transparent}
.chart .key.off{opacity:.35}
.chart .curve.off{display:none}
.chart .cursor{stroke:var(--faint);visibility:hidden}
"""
    + "".join(f".chart .c{i}{{stroke:var(--c{i})}}\n" for i in range(NUM_COLORS))
)

PAGE_CSS = """
:root{color-scheme:light dark}
body{margin:0;background:var(--paper);color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:800px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .6em}
h2{font-size:1.2rem;margin:2.2em 0 .5em;padding-top:.9em;border-top:1px solid var(--grid)}
p{margin:.6em 0;max-width:68ch}
figure{margin:1.4em 0}
.table{overflow-x:auto;margin:1em 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:5px 12px;text-align:left;border-bottom:1px solid var(--grid);white-space:nowrap}
th{color:var(--faint);font-weight:600;border-bottom:2px solid var(--grid)}
th.number,td.number{text-align:right}
#tip{position:fixed;display:none;pointer-events:none;background:var(--paper);color:var(--ink);font-size:12px;
  border:1px solid var(--grid);border-radius:6px;padding:6px 9px;box-shadow:0 2px 10px #0004;white-space:nowrap}
#tip td{border:0;padding:1px 6px}
#tip i{display:inline-block;width:10px;height:10px;border-radius:50%}
"""

CHART_JS = """
(() => {
  const tip = document.createElement("div"); tip.id = "tip"; document.body.append(tip);
  const show = v => Math.abs(v) >= 1e5 || (v && Math.abs(v) < 1e-3) ? v.toExponential(3) : String(+v.toPrecision(5));
  const cell = (row, text) => { const td = row.insertCell(); td.textContent = text; return td; };
  for (const svg of document.querySelectorAll("svg.chart")) {
    const [left, top, right, bottom] = svg.dataset.area.split(" ").map(Number);
    const cursor = svg.querySelector(".cursor");
    const curves = [...svg.querySelectorAll("path.curve")].map(path => ({path, ...JSON.parse(path.dataset.points)}));
    const hide = () => { tip.style.display = "none"; cursor.style.visibility = "hidden"; };
    svg.addEventListener("mouseleave", hide);
    svg.addEventListener("mousemove", event => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      if (at.x < left || at.x > right || at.y < top || at.y > bottom) return hide();
      const hits = [];
      for (const c of curves) {
        if (c.path.classList.contains("off")) continue;
        let best = -1;
        c.px.forEach((p, i) => {
          if (c.y[i] !== null && (best < 0 || Math.abs(p - at.x) < Math.abs(c.px[best] - at.x))) best = i;
        });
        if (best >= 0 && Math.abs(c.px[best] - at.x) < 40) hits.push({c, i: best, d: Math.abs(c.px[best] - at.x)});
      }
      if (!hits.length) return hide();
      const near = hits.reduce((a, b) => b.d < a.d ? b : a);
      const table = document.createElement("table");
      const head = cell(table.insertRow(), svg.dataset.xLabel + " " + near.c.x[near.i].toLocaleString());
      head.colSpan = 3;
      for (const {c, i} of hits) {
        const row = table.insertRow(), dot = document.createElement("i");
        dot.style.background = getComputedStyle(c.path).stroke;
        cell(row, "").append(dot); cell(row, c.name); cell(row, show(c.y[i])).className = "number";
      }
      tip.replaceChildren(table);
      tip.style.display = "block";
      const flip = event.clientX + tip.offsetWidth + 30 > innerWidth;
      tip.style.left = event.clientX + (flip ? -tip.offsetWidth - 14 : 14) + "px";
      tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
      const x = near.c.px[near.i];
      cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.style.visibility = "visible";
    });
    for (const key of svg.querySelectorAll(".key")) {
      const toggle = () => {
        const off = key.classList.toggle("off");
        svg.querySelector(`path[data-series="${key.dataset.series}"]`).classList.toggle("off", off);
      };
      key.addEventListener("click", toggle);
      key.addEventListener("keydown", event => {
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); toggle(); }
      });
    }
  }
})();
"""


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


def plot_schedule(
    path: str | os.PathLike[str],
    *,
    steps: Sequence[int],
    rates: Sequence[float],
    phase_starts: Mapping[str, int] | None = None,
    title: str = "How does the learning rate move over the run?",
) -> Path:
    """Write steps against rates, with the first step of each named phase marked; returns the path.

    The three arguments are the fields of `hf_moe_cpt.optim.schedule_curve(...)`: pass `**vars(curve)`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    chart = line_chart(
        [Series("learning rate", steps, rates)],
        title=title,
        x_label="optimizer step",
        y_label="learning rate",
        vertical=[Mark(step, name) for name, step in (phase_starts or {}).items()],
        from_zero=True,
        max_points=max(800, len(steps)),
        standalone=True,
    )
    target.write_text(chart, encoding="utf-8")
    return target


Range = tuple[float, float, float]  # value, low, high

WIDTH, LINE, GAP, TOP, RIGHT_EVAL_SURGERY_CHART, BOTTOM_EVAL_SURGERY_CHART = 760, 15, 14, 56, 24, 48  # pixels


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
    low, high = _x_range_eval_surgery_chart(
        [value for values in shown.values() for value in values if value], vertical, x_range
    )
    left = 24 + CHAR_WIDTH * max(map(len, groups), default=0)
    top = TOP + 20
    group_height = LINE * max(1, len(models)) + GAP
    bottom = top + group_height * len(groups)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - RIGHT_EVAL_SURGERY_CHART - left)

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
    centre = (left + WIDTH - RIGHT_EVAL_SURGERY_CHART) / 2
    parts.append(f'<text class="label middle" x="{centre:g}" y="{bottom + 38}">{escape(x_label)}</text>')
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{top}" y2="{bottom}"/>')
    height = bottom + BOTTOM_EVAL_SURGERY_CHART
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


def _x_range_eval_surgery_chart(
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
