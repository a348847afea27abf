"""The page of a surgery evaluation: one HTML file with the table, plots, samples and formulas. Source: ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_moe_cpt.analysis.chart import Mark, Series, line_chart
from hf_moe_cpt.analysis.report import Section, write_report
from hf_moe_cpt.data.surgery_bench_world import SETS
from hf_moe_cpt.scripts.eval_surgery_chart import Range, interval_chart
from hf_moe_cpt.scripts.eval_surgery_definitions import METRICS
from hf_moe_cpt.scripts.eval_surgery_robustness import BITS, PREFIXES
from hf_moe_cpt.scripts.eval_surgery_table import (
    ALL_SETS,
    MEMBERSHIP,
    REMEMBERED,
    Summary,
    cell,
    found_measures,
    score_lines,
    table_blocks,
)


INTRODUCTION = """\
What surgery made a model forget, learn and keep, and whether that lasts. Forgotten means: as a model that never read \
the texts (the retrained one, or any model on the set unseen), neither better nor worse. Numbers in brackets, and the \
lines through the dots, are {percent} % intervals of a bootstrap over subjects."""
PREDICTS = "How well is each set predicted?"
NUM_SAMPLES, SAMPLE_LENGTH = 3, 240
UNIT = (0.0, 1.0)
AUCS = MEMBERSHIP[:-1]
EDITS = ("accuracy", "reliability", "generalisation", "portability_one_hop", "portability_inverse", "conflict")

Groups = Mapping[str, tuple[str, str]]  # label of a group: metric, set


def write_page(path: Path, summary: Summary, raws: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any]) -> Path:
    """Write the page; arguments as for `write_files`."""
    tables = dict(table_blocks(summary))
    score = [_narrow(row) for row in tables.pop("Score", [])]
    sections = [
        Section("In short", _in_short(summary), score, _charts(summary, [_score_chart])),
        *(
            Section(heading, "", [_narrow(row) for row in rows], _charts(summary, _CHARTS.get(heading, ())))
            for heading, rows in tables.items()
        ),
        Section("What the models write", _samples(raws)),
        Section("What was not measured", _lines(summary["missing"])),
        Section("Formulas and sources", _formulas(summary)),
        Section("Every number", _every_number(summary), _all_rows(summary)),
        Section("Where", "", [{"what": name, "value": _told(value)} for name, value in _settings(facts).items()]),
    ]
    shown = [section for section in sections if section.text or section.table or section.charts]
    return write_report(path, f"Surgery evaluation: {', '.join(summary['sides'])}", shown)


def _narrow(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its set in the first column, so that three models fit on the page."""
    rest = {name: value for name, value in row.items() if name not in ("measure", "set")}
    label = row["measure"].removeprefix("- ")
    return {"measure": label if row["set"] in ("", ALL_SETS) else f"{label} · {row['set']}", **rest}


def _in_short(summary: Summary) -> str:
    parts = [INTRODUCTION.format(percent=f"{100 * summary['confidence']:.4g}")]
    parts += [f"▲ {line}." for line in summary["warnings"]]
    parts += [f"{line[:1].upper()}{line[1:]}." for line in score_lines(summary)]
    return "\n\n".join(parts)


def _score_chart(summary: Summary) -> str | None:
    groups = {METRICS[name].label.removeprefix("- "): (name, ALL_SETS) for name in METRICS if name.startswith("score")}
    return _dots(summary, groups, "The score and its parts", "1 is best", x_range=UNIT)


def _accuracies(summary: Summary) -> str | None:
    chance = [] if summary["chance"] is None else [Mark(summary["chance"], "guessing")]
    groups = {name: ("accuracy", name) for name in SETS}
    return _dots(summary, groups, "Which set's questions are answered?", "MCQ accuracy", vertical=chance, x_range=UNIT)


def _losses(summary: Summary) -> str | None:
    return _dots(summary, {name: ("loss", name) for name in SETS}, PREDICTS, "loss (nats/token)")


def _remembered(summary: Summary) -> str | None:
    groups = {METRICS[name].label: (name, "unlearn") for name in REMEMBERED}
    return _dots(summary, groups, "How much of the forgotten texts is left, word by word?", "share", x_range=UNIT)


def _membership(summary: Summary) -> str | None:
    groups = {METRICS[name].label: (name, "unlearn") for name in AUCS}
    mark = [Mark(0.5, "as unseen")]
    title = "Can one tell that the forgotten texts were read?"
    return _dots(summary, groups, title, "AUC; left of 0.5 is over-forgotten", vertical=mark, x_range=UNIT)


def _updated(summary: Summary) -> str | None:
    groups = {METRICS[name].label: (name, "update") for name in EDITS}
    return _dots(summary, groups, "Did the new facts arrive?", "share", x_range=UNIT)


def _agreement(summary: Summary) -> str | None:
    groups = {name: ("agreement", name) for name in ("retain", "neighbour")}
    return _dots(summary, groups, "At how many tokens is the first choice as before?", "share of tokens", x_range=UNIT)


def _divergence(summary: Summary) -> str | None:
    groups = {name: ("kl", name) for name in ("retain", "neighbour")}
    return _dots(summary, groups, "How far have the predictions moved?", "KL(before || now), nats per token")


def _fluency(summary: Summary) -> str | None:
    groups = {name: ("fluency", name) for name in SETS}
    return _dots(summary, groups, "Is it still language?", "n-gram entropy (bits)")


def _relearning(training: str, title: str) -> Any:
    def draw(summary: Summary) -> str | None:
        curves = []
        for number, side in enumerate(summary["sides"]):
            points = [row for row in summary["curves"] if row["side"] == side and row["training"] == training]
            asked = list(dict.fromkeys(row["asked"] for row in points))
            for who in asked:
                own = [row for row in points if row["asked"] == who]
                name = side if training == "benign" else f"{side}, {who}"
                steps, values = ([row[column] for row in own] for column in ("step", "accuracy"))
                curves.append(Series(name, steps, values, number, training == "own" and who == "others"))
        if not curves:
            return None
        marks = [] if summary["chance"] is None else [Mark(summary["chance"], "guessing")]
        return line_chart(
            curves, title=title, x_label="step of relearning", y_label="MCQ accuracy on unlearn", horizontal=marks
        )

    return draw


def _rounding(summary: Summary) -> str | None:
    metrics = {"as it is": "accuracy"} | {f"{bits}-bit": f"accuracy_{bits}bit" for bits in BITS}
    groups = {
        f"{name}, {label}": (metric, name)
        for name in ("unlearn", "update", "retain")
        for label, metric in metrics.items()
    }
    if not any(row["metric"].endswith("bit") for row in summary["measures"]):
        return None
    return _dots(summary, groups, "What do rounded weights change?", "MCQ accuracy", x_range=UNIT)


def _prefixes(summary: Summary) -> str | None:
    groups = {name: (f"prefix_{name}", "unlearn") for name in PREFIXES}
    return _dots(summary, groups, "Do other words bring it back?", "MCQ accuracy on unlearn", x_range=UNIT)


_CHARTS = {
    "Forgotten?": (_accuracies, _losses, _remembered, _membership),
    "Learnt?": (_updated,),
    "Kept?": (_agreement, _divergence, _fluency),
    "Does it last?": (
        _relearning("own", "Does training on half of the forgotten texts bring it back?"),
        _relearning("benign", "Does training on harmless texts bring it back?"),
        _rounding,
        _prefixes,
    ),
}


def _charts(summary: Summary, drawers: Sequence[Any]) -> list[str]:
    return [chart for draw in drawers if (chart := draw(summary)) is not None]


def _dots(summary: Summary, groups: Groups, title: str, x_label: str, **options: Any) -> str | None:
    """The groups that a model has a value for; None if there are none. options: of `interval_chart`."""
    found = found_measures(summary)
    values = {
        label: [_range(found.get((side, set_name, metric))) for side in summary["sides"]]
        for label, (metric, set_name) in groups.items()
    }
    shown = {label: ranges for label, ranges in values.items() if any(ranges)}
    if not shown:
        return None
    models = {side: [ranges[place] for ranges in shown.values()] for place, side in enumerate(summary["sides"])}
    return interval_chart(list(shown), models, title=title, x_label=x_label, **options)


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


def _lines(lines: Sequence[str]) -> str:
    return "\n\n".join(f"– {line}" for line in lines)


def _formulas(summary: Summary) -> str:
    used = dict.fromkeys(row["metric"] for row in summary["measures"])
    told = (METRICS[name] for name in METRICS if name in used)
    return "\n\n".join(
        f"{m.label.removeprefix('- ')}: {m.formula}. Wanted: {m.goal}. Source: {m.source}." for m in told
    )


def _every_number(summary: Summary) -> str:
    return (
        "All sets; n is the number of questions or texts. The same is in results.csv." if summary["measures"] else ""
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


def _settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for group in facts.values() for name, value in group.items()}


def _told(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "–" if value is None else str(value)
