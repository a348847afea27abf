"""Reports for people: charts as SVG text without a plotting library, tables, pages that open without a network.

A chart carries no colours of its own: CHART_CSS gives them for light and dark, CHART_JS adds hover values and a
legend that hides and shows curves; a standalone chart embeds the style. Colours of curves are Okabe and Ito's
colour-blind-safe set, lightened where the ground is dark. What the routing report redraws while somebody looks at it
is drawn by routing/page/drawing.js with the same classes. Source: ours.
"""

from __future__ import annotations

import csv
import json
import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any


__all__ = ["Mark", "Section", "Series", "interval_chart", "line_chart", "plot_schedule", "write_report"]

_PAGE = Path(__file__).with_name("page")
CHART_CSS, PAGE_CSS, CHART_JS = (
    (_PAGE / name).read_text(encoding="utf-8") for name in ("charts.css", "page.css", "charts.js")
)
NUM_COLORS = 7  # .c0 to .c6 of charts.css

WIDTH = 760  # pixels, of this and all that follows
LEFT, RIGHT, BOTTOM = 64, 20, 48
LINE, GAP = 15, 14  # of an interval chart: height of a model's dot, and of what parts two groups
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


Range = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class _Frame:
    """Plot area in pixels and the data ranges mapped onto it (y in log10 if log_y)."""

    left: float
    top: float
    right: float
    bottom: float
    x_range: tuple[float, float]
    y_range: tuple[float, float] = (0.0, 1.0)
    log_y: bool = False

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = (math.log10(edge) for edge in self.y_range) if self.log_y else self.y_range
        value = math.log10(value) if self.log_y else value
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def upright(self, kind: str, value: float, begin: float, end: float) -> str:
        """A vertical line at an x."""
        return f'<line class="{kind}" x1="{self.x(value):.1f}" x2="{self.x(value):.1f}" y1="{begin:g}" y2="{end:g}"/>'

    def x_axis(self, ticks: Sequence[float], x_label: str) -> list[str]:
        """Numbers below the plot, then the label of the axis."""
        centre = (self.left + self.right) / 2
        return [
            *(
                f'<text class="tick middle" x="{self.x(tick):.1f}" y="{self.bottom + 18:g}">{format_tick(tick)}</text>'
                for tick in ticks
            ),
            f'<text class="label middle" x="{centre:g}" y="{self.bottom + 38:g}">{escape(x_label)}</text>',
        ]

    def svg(self, parts: Sequence[str], title: str, x_label: str, *, hovers: bool, standalone: bool) -> str:
        """The whole picture; hovers: CHART_JS tells the numbers of the curves under the mouse."""
        width, height = self.right + RIGHT, self.bottom + BOTTOM
        area = f"{self.left:g} {self.top:g} {self.right:g} {self.bottom:g}" if hovers else "0 0 0 0"
        style = f'<style>{CHART_CSS}</style><rect class="paper" width="100%" height="100%"/>' if standalone else ""
        cursor = f'<line class="cursor" x1="0" x2="0" y1="{self.top:g}" y2="{self.bottom:g}"/>'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width:g} {height:g}" '
            f'width="{width:g}" height="{height:g}" role="img" aria-label="{escape(title)}" data-area="{area}" '
            f'data-x-label="{escape(x_label)}">{style}'
            f'<text class="title" x="{self.left:g}" y="20">{escape(title)}</text>{"".join(parts)}{cursor}</svg>'
        )


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
    max_points: int = 800,
    standalone: bool = False,
) -> str:
    """Draw curves over a common axis and return the `<svg>` element.

    title: the question the chart answers. Labels carry the unit, "loss (nats/token)". vertical: events on the x
    axis ("distribution shift"). horizontal: reference values ("ideal"), always inside the y range. log_y: base-10
    axis; values <= 0 become gaps. from_zero: include y = 0. max_points: longer curves are thinned, extremes kept.
    """
    curves = [_prepared(item, log_y, max_points) for item in series]
    horizontal = [mark for mark in horizontal if mark.at > 0 or not log_y]
    known = [value for _, y in curves for value in y if not math.isnan(value)]
    x_range = _x_range([value for x, _ in curves for value in x] + [mark.at for mark in vertical])
    y_range = _y_range(known + [mark.at for mark in horizontal], log_y, from_zero)
    names = [item.name for item in series] if len(series) > 1 else []
    styles = [_style(place, item) for place, item in enumerate(series)]
    keys, legend = _legend(names, styles, LEFT, switches=True)
    frame = _Frame(LEFT, 56 + legend, WIDTH - RIGHT, 380 + legend - BOTTOM, x_range, y_range, log_y)
    parts = [
        *keys,
        f'<text class="label" x="{LEFT}" y="{frame.top - 10:g}">{escape(y_label)}</text>',
        *_axes(frame, x_label),
        *[frame.upright("mark", mark.at, frame.top, frame.bottom) for mark in vertical],
        *[_level(frame, "mark", mark.at) for mark in horizontal],
        *[_curve(frame, i, series[i].name, styles[i], x, y) for i, (x, y) in enumerate(curves)],
        *_event_labels(frame, vertical),
        *_reference_labels(frame, horizontal, lowest=min(known, default=0.0)),
    ]
    return frame.svg(parts, title, x_label, hovers=True, standalone=standalone)


def interval_chart(
    groups: Sequence[str],
    models: Mapping[str, Sequence[Range | None]],
    *,
    title: str,
    x_label: str,
    vertical: Sequence[Mark] = (),
    x_range: tuple[float, float] | None = None,
) -> str:
    """Draw the values of each model as dots on whiskers, one for each group; a dot tells its numbers.

    models: None where there is no value; infinite ones are left out. vertical: reference values, always inside the
    range. x_range: least and most that is shown, wider if need be.
    """
    shown = {name: [_finite(value) for value in values] for name, values in models.items()}
    ends = [end for values in shown.values() for value in values if value for end in value]
    low, high = _x_range([*ends, *(mark.at for mark in vertical), *(x_range or ())])
    margin = 0.03 * (high - low)
    left = 24 + CHAR_WIDTH * max(map(len, groups), default=0)
    keys, legend = _legend(list(models), [f"c{i % NUM_COLORS}" for i in range(len(models))], left, switches=False)
    top, group_height = 56 + legend, LINE * max(1, len(models)) + GAP
    frame = _Frame(left, top, WIDTH - RIGHT, top + group_height * len(groups), (low - margin, high + margin))
    ticks = linear_ticks(*frame.x_range)
    parts = [*keys, *[frame.upright("grid", tick, top, frame.bottom) for tick in ticks], *frame.x_axis(ticks, x_label)]
    for mark in vertical:
        parts.append(frame.upright("mark", mark.at, top, frame.bottom))
        parts.append(f'<text class="note middle" x="{frame.x(mark.at):.1f}" y="{top - 6}">{escape(mark.label)}</text>')
    for place, group in enumerate(groups):
        middle = top + group_height * (place + 0.5)
        parts.append(f'<text class="label end" x="{left - 10:g}" y="{middle + 4:.1f}">{escape(group)}</text>')
        for number, (name, values) in enumerate(shown.items()):
            if values[place] is not None:
                y = middle + LINE * (number - (len(models) - 1) / 2)
                parts.append(_dot(frame, f"{group}, {name}", values[place], f"c{number % NUM_COLORS}", y))
    return frame.svg(parts, title, x_label, hovers=False, standalone=False)


def plot_schedule(
    path: str | os.PathLike[str],
    *,
    steps: Sequence[int],
    rates: Sequence[float],
    phase_starts: Mapping[str, int] | None = None,
    title: str = "How does the learning rate move over the run?",
) -> Path:
    """Write a learning-rate schedule as a picture: steps against rates, the first step of each named phase marked.

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


def _prepared(item: Series, log_y: bool, max_points: int) -> tuple[list[float], list[float]]:
    if len(item.x) != len(item.y):
        raise ValueError(f"series {item.name!r} has {len(item.x)} x and {len(item.y)} y values: give as many of each.")
    y = [float(value) if math.isfinite(value) and (value > 0 or not log_y) else math.nan for value in item.y]
    return thin([float(value) for value in item.x], y, max_points)


def _finite(value: Range | None) -> Range | None:
    """The value with ends that can be drawn: its own where an end is missing; None if it is no number itself."""
    if value is None or not math.isfinite(value[0]):
        return None
    low, high = (end if end is not None and math.isfinite(end) else value[0] for end in value[1:])
    return value[0], low, high


def _x_range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _y_range(values: Sequence[float], log_y: bool, from_zero: bool) -> tuple[float, float]:
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


def _legend(names: Sequence[str], styles: Sequence[str], left: float, switches: bool) -> tuple[list[str], int]:
    """Keys in rows below the title, and the height of the rows in pixels; switches: a click hides the curve."""
    parts, x, row = [], float(left), 0
    for i, (name, style) in enumerate(zip(names, styles, strict=False)):
        size = 34 + CHAR_WIDTH * len(name)
        if x + size > WIDTH - RIGHT and x > left:
            x, row = float(left), row + 1
        y = 40 + 20 * row
        line, label = f'x1="{x:g}" x2="{x + 18:g}" y1="{y - 4}" y2="{y - 4}"/>', f'y="{y}">{escape(name)}</text>'
        if switches:
            parts.append(
                f'<g class="key" data-series="{i}" role="button" tabindex="0">'
                f'<rect class="hit" x="{x - 4:g}" y="{y - 14}" width="{size - 6:g}" height="20"/>'
                f'<line class="{style}" {line}<text class="label" x="{x + 24:g}" {label}</g>'
            )
        else:
            parts.append(f'<line class="{style}" stroke-width="6" {line}<text class="label" x="{x + 24:g}" {label}')
        x += size
    return parts, 20 * (row + 1) if names else 0


def _style(position: int, item: Series) -> str:
    color = (position if item.color is None else item.color) % NUM_COLORS
    return f"curve c{color}" + (" dashed" if item.dashed else "")


def _axes(frame: _Frame, x_label: str) -> list[str]:
    """Grid lines, tick labels, the base line and the x label."""
    low, high = frame.y_range
    parts = []
    for value in log_ticks(low, high) if frame.log_y else linear_ticks(low, high):
        tick = (
            f'<text class="tick end" x="{frame.left - 8:g}" y="{frame.y(value) + 4:.1f}">{format_tick(value)}</text>'
        )
        parts += [_level(frame, "grid", value), tick]
    ticks = linear_ticks(*frame.x_range, count=8)
    parts += [frame.upright("axis", value, frame.bottom, frame.bottom + 4) for value in ticks]
    base = f'x1="{frame.left:g}" x2="{frame.right:g}" y1="{frame.bottom:g}" y2="{frame.bottom:g}"'
    return [*parts, f'<line class="axis" {base}/>', *frame.x_axis(ticks, x_label)]


def _level(frame: _Frame, kind: str, value: float) -> str:
    """A line from left to right at a y."""
    y = frame.y(value)
    return f'<line class="{kind}" x1="{frame.left:g}" x2="{frame.right:g}" y1="{y:.1f}" y2="{y:.1f}"/>'


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
    for mark in horizontal:
        y = frame.y(mark.at) + (13 if mark.at <= lowest else -5)
        parts.append(f'<text class="note end" x="{frame.right - 4:g}" y="{y:.1f}">{escape(mark.label)}</text>')
    return parts


def _curve(frame: _Frame, position: int, name: str, style: str, x: list[float], y: list[float]) -> str:
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
            "name": name,
            "x": [_short(value) for value in x],
            "y": [_short(value) for value in y],
            "px": [round(frame.x(value), 1) for value in x],
        },
        separators=(",", ":"),
    )
    return f'<path class="{style}" data-series="{position}" data-points="{escape(data)}" d="{"".join(commands)}"/>'


def _dot(frame: _Frame, label: str, value: Range, color: str, y: float) -> str:
    """A whisker with its dot; the browser shows the label and the numbers."""
    middle, low, high = value
    told = f"{label}: {middle:.4g} [{low:.4g}, {high:.4g}]"
    at, begin, end = (f"{frame.x(place):.1f}" for place in value)
    return (
        f"<g><title>{escape(told)}</title>"
        f'<line class="{color}" stroke-width="2" x1="{begin}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<line class="{color}" stroke-width="9" stroke-linecap="round" x1="{at}" x2="{at}" '
        f'y1="{y:.1f}" y2="{y:.1f}"/></g>'
    )


def _short(value: float) -> float | int | None:
    """Six significant digits for the hover text, whole numbers whole; None is JSON for a gap."""
    if math.isnan(value):
        return None
    return int(value) if value == int(value) else float(f"{value:.6g}")


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


# ---- tables and pages ----


Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Section:
    """One part of a report: a question, text (blank lines part paragraphs), rows and charts (from `line_chart`)."""

    heading: str
    text: str = ""
    table: Sequence[Mapping[str, Cell]] = ()
    charts: Sequence[str] = ()


def write_report(
    path: str | os.PathLike[str], title: str, sections: Sequence[Section], contents: bool = False
) -> Path:
    """Write the page, whole or not at all, making its folder; returns the path. contents: with a table of them."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    body = "".join(_section(section, number) for number, section in enumerate(sections))
    if contents:
        links = (f'<li><a href="#s{number}">{escape(part.heading)}</a></li>' for number, part in enumerate(sections))
        body = f"<nav><ul>{''.join(links)}</ul></nav>{body}"
    write_whole(target, html_page(title, body, f"<script>\n{CHART_JS}</script>"))
    return target


def html_page(title: str, body: str, scripts: str, style: str = "") -> str:
    """A page that needs no network. body: HTML below the heading. scripts: elements after it. style: more CSS."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CHART_CSS}\n{PAGE_CSS}{style}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>{body}</main>{scripts}</body></html>\n"
    )


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def format_cell(value: Cell) -> str:
    """Text of a table cell: four significant digits for floats, thousands separators, an en dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


def _column_cells(values: Sequence[Cell]) -> list[str]:
    """Text of the cells of a column, as `format_cell` has it; decimals of small numbers stand under each other."""
    cells = [format_cell(value) for value in values]
    decimals = max((len(cell.partition(".")[2]) for cell in cells), default=0)
    if decimals > 4 or any("e" in cell for cell in cells) or not all(map(_is_number, values)):
        return cells
    return [
        f"{value:.{decimals}f}" if isinstance(value, float) and abs(value) < 1000 else cell
        for value, cell in zip(values, cells, strict=True)
    ]


def _section(section: Section, number: int) -> str:
    paragraphs = [part.strip() for part in section.text.split("\n\n") if part.strip()]
    parts = [f"<p>{escape(part)}</p>" for part in paragraphs]
    if section.table:
        parts.append(_table(section.table))
    parts += [f"<figure>{chart}</figure>" for chart in section.charts]
    return f'<section id="s{number}"><h2>{escape(section.heading)}</h2>{"".join(parts)}</section>\n'


def _table(rows: Sequence[Mapping[str, Cell]]) -> str:
    """Columns are all keys in order of appearance; a column of numbers only is set right."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {name for name in columns if all(_is_number(row.get(name)) for row in rows)}
    tags = {name: ' class="number"' if name in numeric else "" for name in columns}
    head = "".join(f"<th{tags[name]}>{escape(name)}</th>" for name in columns)
    cells = {name: _column_cells([row.get(name) for row in rows]) for name in columns}
    lines = zip(*([f"<td{tags[name]}>{escape(cell)}</td>" for cell in cells[name]] for name in columns), strict=True)
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _is_number(value: Cell) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line for each row; columns are the keys of all rows in order of appearance, floats have 6 digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writerow({name: csv_cell(name) for name in columns})
        for row in rows:
            short = {
                key: f"{value:.6g}" if isinstance(value, float) else csv_cell(value) for key, value in row.items()
            }
            writer.writerow(short)


_OF_FORMULAS = ("=", "+", "-", "@", "\t")


def csv_cell(value: Any) -> Any:
    """A value as a cell: a text that a spreadsheet would take for a formula gets an apostrophe in front.

    A carriage return, which csv leaves bare and others take for the end of a row, becomes a line feed.
    """
    if not isinstance(value, str):
        return value
    text = value.replace("\r\n", "\n").replace("\r", "\n")
    begins = unicodedata.normalize("NFKC", text).lstrip("\n\ufeff\u200b ")
    return f"'{text}" if begins.startswith(_OF_FORMULAS) else text


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a terminal: two lines of headings, numbers right, three decimals for losses and shares."""
    columns = list(rows[0])
    cells = [[_text(row[column]) for column in columns] for row in rows]
    headings = [column.rpartition(" ") for column in columns]
    upper, lower = [first for first, _, _ in headings], [last for _, _, last in headings]
    lines = aligned([upper, lower, *cells])
    return "\n".join([*lines[:2], "-" * max(map(len, lines)), *lines[2:]])


def aligned(rows: Sequence[Sequence[str]], num_left: int = 1) -> list[str]:
    """A line for each row, columns two spaces apart: the first so many begin where theirs do, the others end there."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    placed = [
        [cell.ljust(width) for cell, width in zip(row[:num_left], widths, strict=False)]
        + [cell.rjust(width) for cell, width in zip(row[num_left:], widths[num_left:], strict=True)]
        for row in rows
    ]
    return ["  ".join(cells).rstrip() for cells in placed]


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else format_cell(value)
