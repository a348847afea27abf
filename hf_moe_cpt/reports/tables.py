"""Rows as a page, a CSV file or text: a report is one HTML file that needs no network. Source: ours."""

import csv
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from hf_moe_cpt.reports.charts import CHART_CSS, CHART_JS, PAGE_CSS


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
    lines = ["".join(f"<td{tags[name]}>{escape(format_cell(row.get(name)))}</td>" for name in columns) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _is_number(value: Cell) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line for each row; columns are the keys of all rows in order of appearance, floats have 6 digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            short = {
                key: f"{value:.6g}" if isinstance(value, float) else csv_cell(value) for key, value in row.items()
            }
            writer.writerow(short)


def csv_cell(value: Any) -> Any:
    """A value as a cell: a text that a spreadsheet would take for a formula gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


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
