"""Show a surgery evaluation: the table for a terminal, results.csv, results.json and the page report.html.

All of it is made of what `surgery.summarise` gives. Source: ours.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from hf_moe_cpt.data.surgery_bench import SETS
from hf_moe_cpt.evaluation.resumable import write_json
from hf_moe_cpt.evaluation.scoring import ALL_SETS
from hf_moe_cpt.evaluation.surgery import METRICS
from hf_moe_cpt.reports import (
    Mark,
    Range,
    Section,
    Series,
    aligned,
    interval_chart,
    line_chart,
    write_csv,
    write_report,
)


NOTHING = "–"
_SHOWN = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
TABLE = [(heading, list(part["table"].items())) for heading, part in _SHOWN.items()]  # heading, (metric, sets)

Summary = Mapping[str, Any]
Found = Mapping[tuple[str, str, str], Mapping[str, Any]]  # a row of measures by side, set and metric


def table_blocks(summary: Summary) -> list[tuple[str, list[dict[str, str]]]]:
    """Heading and rows of measure, set, and a cell for each side; rows of which no side has anything are left out."""
    found = found_measures(summary)
    blocks = []
    for heading, entries in TABLE:
        rows = [
            {
                "measure": METRICS[metric].label,
                "set": set_name,
                **{side: cell(found.get((side, set_name, metric))) for side in summary["sides"]},
            }
            for metric, sets in entries
            for set_name in sets
        ]
        rows = [row for row in rows if any(row[side] != NOTHING for side in summary["sides"])]
        if rows:
            blocks.append((heading, rows))
    return blocks or [
        ("nothing was measured", [{"measure": "", "set": "", **dict.fromkeys(summary["sides"], NOTHING)}])
    ]


def found_measures(summary: Summary) -> Found:
    """The rows of measures by side, set and metric."""
    return {(row["side"], row["set"], row["metric"]): row for row in summary["measures"]}


def cell(row: Mapping[str, Any] | None) -> str:
    """ "0.412 [0.380, 0.450]", without an interval where there is none, a dash without a value."""
    if row is None or row["value"] is None:
        return NOTHING
    if row["low"] is None or row["high"] is None:
        return number(row["value"])
    return f"{number(row['value'])} [{number(row['low'])}, {number(row['high'])}]"


def number(value: float) -> str:
    """Three decimals below 1, two below 10, one below 1000, three digits above."""
    size = abs(value)
    decimals = 3 if size < 1 else 2 if size < 10 else 1
    return f"{value:.{decimals}f}" if size < 1000 else f"{value:.3g}"


def score_lines(summary: Summary) -> list[str]:
    """What the score is made of, a line for all models of which it is the same."""
    sides_of: dict[str, list[str]] = {}
    for side, told in summary["score"].items():
        sides_of.setdefault(told["formula"], []).append(side)
    return [f"score of {', '.join(sides)}: {formula}" for formula, sides in sides_of.items()]


INTRODUCTION = """\
What surgery made a model forget, learn and keep, and whether that lasts. Forgotten means: as a model that never read \
the texts (the retrained one, or any model on the set unseen), neither better nor worse. Numbers in brackets, and the \
lines through the dots, are {percent} % intervals of a bootstrap over subjects, Wilson's of shares."""
EVERY_NUMBER = "All sets; n is the number of questions or texts. The same is in results.csv."
NUM_SAMPLES, SAMPLE_LENGTH = 3, 240


def write_page(path: Path, summary: Summary, raws: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> Path:
    """Write the page; arguments as for `write_files`."""
    tables = dict(table_blocks(summary))
    score = [_narrow(row) for row in tables.pop("Score", [])]
    sections = [
        Section("In short", _in_short(summary), score, _charts(summary, "Score")),
        *(
            Section(heading, "", [_narrow(row) for row in rows], _charts(summary, heading))
            for heading, rows in tables.items()
        ),
        Section("What the models write", _samples(raws)),
        Section("What was not measured", "\n\n".join(f"– {line}" for line in summary["missing"])),
        Section("Formulas and sources", _formulas(summary)),
        Section("Every number", EVERY_NUMBER if summary["measures"] else "", _all_rows(summary)),
        Section(
            "Where",
            "",
            [{"what": name, "value": _told(value)} for group in facts.values() for name, value in group.items()],
        ),
    ]
    shown = [section for section in sections if section.text or section.table or section.charts]
    return write_report(path, f"Surgery evaluation: {', '.join(summary['sides'])}", shown)


def _narrow(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its set in the first column, so that three models fit on the page."""
    rest = {name: value for name, value in row.items() if name not in ("measure", "set")}
    label = row["measure"].removeprefix("- ")
    return {"measure": label if row["set"] in ("", ALL_SETS) else f"{label} · {row['set']}", **rest}


def _in_short(summary: Summary) -> str:
    parts = [f"Verdict: {summary['verdict']}."]
    parts += [f"Measured of {line}." for line in summary["notes"]]
    parts += [INTRODUCTION.format(percent=f"{100 * summary['confidence']:.4g}")]
    parts += [f"▲ {line}." for line in summary["warnings"]]
    parts += [f"{line[:1].upper()}{line[1:]}." for line in score_lines(summary)]
    return "\n\n".join(parts)


class Dots(NamedTuple):
    """A chart of the intervals of every metric on every set; fields as in the YAML file."""

    title: str
    x_label: str
    metrics: Sequence[str]
    sets: Sequence[str]
    is_share: bool = True
    mark: str | tuple[float, str] | None = None
    needed: str | None = None

    def draw(self, summary: Summary) -> str | None:
        """What a model has a value for; None if there is none."""
        found, sides = found_measures(summary), summary["sides"]
        values = {
            self._label(metric, set_name): [_range(found.get((side, set_name, metric))) for side in sides]
            for set_name in self.sets
            for metric in self.metrics
        }
        shown = {label: ranges for label, ranges in values.items() if any(ranges)}
        if not shown or self.needed not in (None, *(metric for _, _, metric in found)):
            return None
        models = {side: [ranges[place] for ranges in shown.values()] for place, side in enumerate(sides)}
        mark = _guessing(summary) if self.mark == "guessing" else self.mark and Mark(*self.mark)
        options = {"vertical": [mark] if mark else [], "x_range": (0.0, 1.0) if self.is_share else None}
        return interval_chart(list(shown), models, title=self.title, x_label=self.x_label, **options)

    def _label(self, metric: str, set_name: str) -> str:
        label = METRICS[metric].label.removeprefix("- ")
        if len(self.metrics) == 1:
            return set_name
        return label if len(self.sets) == 1 else f"{set_name}, {label}"


class Curves(NamedTuple):
    """A chart of the accuracy by steps of relearning."""

    title: str
    training: str

    def draw(self, summary: Summary) -> str | None:
        """A curve for each model and whom it was asked about; None without any."""
        curves = []
        for number, side in enumerate(summary["sides"]):
            points = [row for row in summary["curves"] if (row["side"], row["training"]) == (side, self.training)]
            for who in dict.fromkeys(row["asked"] for row in points):
                steps, values = zip(
                    *((row["step"], row["accuracy"]) for row in points if row["asked"] == who), strict=True
                )
                is_own = self.training == "own"
                name = f"{side}, {who}" if is_own else side
                curves.append(Series(name, steps, values, number, is_own and who == "others"))
        if not curves:
            return None
        marks = [mark for mark in [_guessing(summary)] if mark]
        labels = {"x_label": "step of relearning", "y_label": "MCQ accuracy on unlearn"}
        return line_chart(curves, title=self.title, horizontal=marks, **labels)


def _guessing(summary: Summary) -> Mark | None:
    return None if summary["chance"] is None else Mark(summary["chance"], "guessing")


CHARTS = {
    heading: [(Curves if "training" in chart else Dots)(**chart) for chart in part["charts"]]
    for heading, part in _SHOWN.items()
}


def _charts(summary: Summary, heading: str) -> list[str]:
    return [chart for one in CHARTS.get(heading, ()) if (chart := one.draw(summary)) is not None]


def _range(row: Mapping[str, Any] | None) -> Range | None:
    if row is None or row["value"] is None:
        return None
    low, high = (math.nan if row[name] is None else row[name] for name in ("low", "high"))
    return row["value"], low, high


def _samples(raws: Mapping[str, Mapping[str, Any]]) -> str:
    """Of the first texts of unlearn how they go on, and how each model goes on after their first half."""
    written = {
        side: columns
        for side, raw in raws.items()
        if (columns := raw.get("continuations", {}).get("unlearn")) and columns["id"]
    }
    if not written:
        return ""
    first = next(iter(written.values()))
    parts = ["How texts of unlearn go on after their first half, and how each model goes on."]
    for text_id, true_text in list(zip(first["id"], first["true_text"], strict=True))[:NUM_SAMPLES]:
        parts.append(f"{text_id}, true: {_short(true_text)}")
        for side, columns in written.items():
            if text_id in columns["id"]:
                parts.append(f"{side}: {_short(columns['text'][columns['id'].index(text_id)])}")
    return "\n\n".join(parts)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SAMPLE_LENGTH else f"{line[:SAMPLE_LENGTH]} ..."


def _formulas(summary: Summary) -> str:
    used = dict.fromkeys(row["metric"] for row in summary["measures"])
    told = (METRICS[name] for name in METRICS if name in used)
    return "\n\n".join(
        f"{m.label.removeprefix('- ')}: {m.formula}. Wanted: {m.goal}. Source: {m.source}." for m in told
    )


def _all_rows(summary: Summary) -> list[dict[str, Any]]:
    found = found_measures(summary)
    keys = dict.fromkeys((row["metric"], row["set"]) for row in summary["measures"])
    rows = []
    for metric, set_name in sorted(
        keys, key=lambda key: (list(METRICS).index(key[0]), [*SETS, ALL_SETS].index(key[1]))
    ):
        of_side = {side: found.get((side, set_name, metric)) for side in summary["sides"]}
        counts = {row["n"] for row in of_side.values() if row is not None and row["n"] is not None}
        row = {"measure": METRICS[metric].label, "set": set_name, "n": max(counts, default=None)}
        rows.append(_narrow(row | {side: cell(found_row) for side, found_row in of_side.items()}))
    return rows


def _told(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)


TERMINAL_WIDTH = 120


def text_report(summary: Summary) -> str:
    """The table of the models side by side, at most 120 columns wide, how the score was made, and what is missing."""
    blocks = table_blocks(summary)
    sides = list(summary["sides"])
    cells = [[row["measure"], row["set"], *(row[side] for side in sides)] for _, rows in blocks for row in rows]
    head, *table = aligned([["", "", *sides], *cells], num_left=2)
    width = max(map(len, [head, *table]))
    lines = wrapped([f"verdict: {summary['verdict']}", *(f"measured of {line}" for line in summary["notes"])])
    lines += [f"{100 * summary['confidence']:.4g} % intervals of a bootstrap over subjects, Wilson's of shares", ""]
    lines += [head, "-" * width]
    for heading, rows in blocks:
        lines += [heading, *table[: len(rows)]]
        table = table[len(rows) :]
    lines += ["", *wrapped(score_lines(summary))]
    lines += wrapped([f"! {line}" for line in summary["warnings"]])
    if summary["missing"]:
        lines += ["", "not measured:", *wrapped([f"- {line}" for line in summary["missing"]])]
    return "\n".join(line.rstrip() for line in lines)


def wrapped(lines: Sequence[str], width: int = TERMINAL_WIDTH) -> list[str]:
    """Each line in pieces of at most `width` characters, those after the first indented."""
    return [piece for line in lines for piece in textwrap.wrap(line, width, subsequent_indent="  ")]


def write_files(root: Path, summary: Summary, raws: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """results.csv, results.json and report.html in a folder that is there.

    raws: measurements by side, of which the page shows what the models wrote. facts: settings and machine.
    """
    write_csv(root / "results.csv", long_rows(summary))
    definitions = {row["metric"]: METRICS[row["metric"]]._asdict() for row in summary["measures"]}
    write_json(root / "results.json", {**summary, "metrics": definitions, **facts})
    write_page(root / "report.html", summary, raws, facts)


def long_rows(summary: Summary) -> list[dict[str, Any]]:
    """side, set, metric, value, low, high, n: the measures, then every point of the relearning curves."""
    rows = [dict(row) for row in summary["measures"]]
    for point in summary["curves"]:
        metric = f"relearn_{point['training']}_{point['asked']}_step_{point['step']}"
        row = {"side": point["side"], "set": "unlearn", "metric": metric, "value": point["accuracy"]}
        rows.append(row | {name: point[name] for name in ("low", "high", "n")})
    return rows
