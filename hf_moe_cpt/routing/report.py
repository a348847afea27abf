"""The report of a routing analysis: one HTML file that needs no network, its numbers beside it, tables for a terminal.

    report.html            questions, switches, and the data inside; what it leaves out it says
    analysis.json          the dictionary of `analyse_traces`, whole, but for co-activation of large models:
    coactivation.npz       for each checkpoint (layers, E, E) float32, where the JSON would be too long to read
    layers.csv             a row for each checkpoint, text and layer: every measure of that layer
    experts.csv            a row for each checkpoint, text, layer and expert: its load
    tokens.csv             a row for each token that is listed for an expert
    training.csv           a row for each run and step: MRI of every layer
    *.svg                  a chart for each question that one curve by layer or by step answers

The page stays small enough for a browser and a mail: with 64 layers of 256 experts the whole co-activation of one
checkpoint alone is four million numbers. page/sections.html is its text, page/*.js draw it: drawing.js curves, bars,
heat maps, tables and hover values; curves.js the state and what is shown by layer or step; maps.js single experts;
switches.js the switches, whose state stands in the address behind the # sign, so that a view can be sent on.

Letters: L MoE layers, E experts, K experts per token. Source: ours; the questions are those of arXiv 2503.05029.
"""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from hf_moe_cpt.reports import NUM_COLORS, Mark, Series, csv_cell, html_page, line_chart, text_table, thin, write_whole


DIGITS = 5
MAX_MATRIX_NUMBERS = 400_000  # of all co-activation matrices together
LEAST_MATRIX_EXPERTS, MOST_MATRIX_EXPERTS = 16, 64
MAX_TOKENS = 120_000  # entries of the lists of tokens, all experts together
MAX_STEPS = 500  # points of a training curve

_PAGE = Path(__file__).with_name("page")
PAGE_SCRIPTS = ("drawing.js", "curves.js", "maps.js", "switches.js")  # one script of the page, in this order

Analysis = Mapping[str, Any]


def page_data(analysis: Analysis) -> dict[str, Any]:
    """The analysis as the page embeds it: the same keys and nesting, but for what follows.

    coactivation: of each layer an (n, n) block, its experts in "coactivation_experts", (L, n) in ascending order.
    top_tokens: entries [place in "tokens", share, count]. training: points thinned. notes: sentences on what is not
    there. NaN becomes None.
    """
    notes: list[str] = []
    data = dict(analysis)
    data["coactivation_experts"], data["coactivation"] = _blocks(analysis, notes)
    data["tokens"], data["top_tokens"] = _tokens(analysis, notes)
    data["training"] = [_thinned(run, notes) for run in analysis.get("training") or []]
    return rounded(data) | {"notes": list(dict.fromkeys(notes))}


def rounded(value: Any, digits: int | None = DIGITS) -> Any:
    """Nested lists and dictionaries with floats to so many significant digits (None: all); NaN and infinity are None.

    Arrays and tensors become lists.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(value) if digits is None else float(f"{value:.{digits}g}")
    if isinstance(value, list | tuple):
        return [rounded(part, digits) for part in value]
    if isinstance(value, dict | Mapping):
        return {str(name): rounded(part, digits) for name, part in value.items()}
    return rounded(value.tolist(), digits) if hasattr(value, "tolist") else value


def _blocks(analysis: Analysis, notes: list[str]) -> tuple[list[list[int]] | None, dict[str, list[Any]] | None]:
    """For each layer the experts with the strongest ties in any checkpoint, and the matrices among them."""
    matrices = analysis.get("coactivation")
    if not matrices:
        return None, None
    num_layers = len(analysis["layers"])
    fitting = math.isqrt(MAX_MATRIX_NUMBERS // (num_layers * len(matrices)))
    size = min(MOST_MATRIX_EXPERTS, max(LEAST_MATRIX_EXPERTS, fitting))
    chosen: list[list[int]] = []
    blocks: dict[str, list[Any]] = {name: [] for name in matrices}
    for layer in range(num_layers):
        whole = {name: np.asarray(matrix[layer], dtype=float) for name, matrix in matrices.items()}
        experts = _strongest(list(whole.values()), size)
        chosen.append(experts.tolist())
        for name, matrix in whole.items():
            blocks[name].append([[float(f"{v:.3g}") for v in row] for row in matrix[np.ix_(experts, experts)]])
    widest = max(layer["num_experts"] for layer in analysis["layers"])
    if widest > size:
        notes.append(
            f"Of up to {widest} experts of a layer the co-activation maps show the {size} with the strongest ties; "
            "analysis.json or coactivation.npz hold all."
        )
    return chosen, blocks


def _strongest(matrices: Sequence[np.ndarray], size: int) -> np.ndarray:
    """The `size` experts with the greatest P(j | i) to or from another one in any of the matrices, ascending."""
    ties = np.zeros(matrices[0].shape[0])
    for matrix in matrices:
        others = np.where(np.eye(len(matrix), dtype=bool), 0.0, np.nan_to_num(matrix))
        ties = np.maximum(ties, np.maximum(others.max(0), others.max(1)))
    return np.sort(np.argsort(-ties, kind="stable")[:size])


def _tokens(analysis: Analysis, notes: list[str]) -> tuple[list[str], dict[str, list[Any]]]:
    """A list of all tokens that are named, and the lists of the experts with places in it."""
    named = analysis.get("top_tokens") or {}
    lists = [tokens for layers in named.values() for experts in layers for tokens in experts]
    longest = max(map(len, lists), default=0)
    kept = min(longest, max(1, MAX_TOKENS // max(1, len(lists))))
    if kept < longest:
        notes.append(f"Of each expert's {longest} tokens the page shows {kept}; tokens.csv holds all.")
    place: dict[str, int] = {}
    short = {
        name: [
            [
                [
                    [place.setdefault(entry["token"], len(place)), float(f"{entry['share']:.3g}"), entry["count"]]
                    for entry in tokens[:kept]
                ]
                for tokens in experts
            ]
            for experts in layers
        ]
        for name, layers in named.items()
    }
    return list(place), short


def _thinned(run: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """A training curve with the same points left in every layer: extremes of the mean in equal runs."""
    mean = run["mean"]
    if len(mean) <= MAX_STEPS:
        return dict(run)
    order = [int(place) for place in thin(range(len(mean)), mean, MAX_STEPS)[0]]
    notes.append(
        f"Of the {len(mean):,} points of {run['name']} the page shows {len(order)}, lowest and highest means among "
        "them; training.csv holds all."
    )
    return {
        **run,
        "steps": [run["steps"][i] for i in order],
        "mean": [mean[i] for i in order],
        "layers": [[layer[i] for i in order] for layer in run["layers"]],
    }


def routing_page(analysis: Mapping[str, Any], title: str) -> str:
    """The page as text. analysis: the dictionary of `analyse_traces`."""
    data = page_data(analysis)
    # "<!--" with "<script>" after it would swallow the end of the page, so no "<" is left
    embedded = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    style, sections, *scripts = (
        (_PAGE / name).read_text(encoding="utf-8") for name in ("page.css", "sections.html", *PAGE_SCRIPTS)
    )
    script = "\n".join(['"use strict";', f"const PALETTE = {NUM_COLORS};", *scripts])
    lead = f"<p class='lead'>{escape(_lead(analysis))}</p>"
    return html_page(
        title,
        f"{lead}\n{sections.format(average=_average(analysis))}{_left_out(analysis, data['notes'])}",
        f'\n<script type="application/json" id="routing-data">{embedded}</script>\n<script>{script}</script>',
        style=f"\n{style}",
    )


def _lead(analysis: Mapping[str, Any]) -> str:
    """What was compared, on what, and how to use the page."""
    checkpoints, layers = analysis["checkpoints"], analysis["layers"]
    shapes = sorted(
        {f"{layer['num_experts']} experts, {layer['experts_per_token']} for each token" for layer in layers}
    )
    tokens = min(checkpoint["num_tokens"] for checkpoint in checkpoints)
    what = f"{len(checkpoints)} checkpoints" if len(checkpoints) > 1 else "One checkpoint"
    texts = analysis["domains"]
    return (
        f"{what} of a mixture of experts ({len(layers)} MoE layers: {'; '.join(shapes)}) read the same "
        f"{tokens:,} tokens of {len(texts)} kind{'s' if len(texts) > 1 else ''} of text: {', '.join(texts)}. "
        f"Changes are told against the first, {checkpoints[0]['name']}. Point at a chart for its numbers; click on a "
        "checkpoint below to hide it."
    )


def _average(analysis: Mapping[str, Any]) -> str:
    """What vocabulary specialisation is averaged over, in words."""
    averages = {part["average"] for part in (analysis.get("vocabulary_specialization") or {}).values()}
    words = {"occurrences": "occurrences of tokens", "ids": "token ids"}
    return " and ".join(sorted(words.get(name, name) for name in averages)) or "token ids"


def _left_out(analysis: Mapping[str, Any], notes: Sequence[str]) -> str:
    left_out = [*notes, *(f"{part}: {why}" for part, why in (analysis.get("skipped") or {}).items())]
    items = "".join(f"<li>{escape(note)}</li>" for note in left_out) or "<li>Nothing.</li>"
    return f'<section><h2>What is not on this page?</h2><ul id="left-out">{items}</ul></section>'


CHARTS = (
    "mri_by_layer",
    "saturation_by_layer",
    "coactivation_change_by_layer",
    "vocabulary_input_by_layer",
    "vocabulary_output_by_layer",
    "mri_by_step",
)
MAX_JSON_NUMBERS = 2_000_000  # of co-activation; more go into a file of arrays

Row = Mapping[str, Any]


def write_routing_report(
    analysis: Analysis, folder: str | os.PathLike[str], title: str = "How robust is the router?"
) -> Path:
    """Write everything listed above into `folder`, replacing what is there; returns the path of report.html.

    analysis: the dictionary of `analyse_traces`; arrays may stand for lists. Raises ValueError if it is none.
    """
    _check(analysis)
    matrices = analysis.get("coactivation")
    analysis = rounded({**analysis, "coactivation": None}, digits=None) | {"coactivation": matrices}
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    _write_json(analysis, target)
    for name, rows in {
        "layers.csv": layer_rows(analysis),
        "experts.csv": expert_rows(analysis),
        "tokens.csv": token_rows(analysis),
        "training.csv": training_rows(analysis),
    }.items():
        _write_csv(target / name, rows)
    drawn = charts(analysis)
    for name in CHARTS:
        if name in drawn:
            write_whole(target / f"{name}.svg", drawn[name])
        else:  # of an earlier analysis
            (target / f"{name}.svg").unlink(missing_ok=True)
    write_whole(target / "report.html", routing_page(analysis, title))
    return target / "report.html"


def layer_rows(analysis: Analysis) -> Iterator[dict[str, Any]]:
    """Every measure of every layer, by checkpoint and text; empty where it was not measured for that text."""
    for name, texts in analysis["metrics"].items():
        vocabulary = (analysis.get("vocabulary_specialization") or {}).get(name) or {}
        change = (analysis.get("coactivation_change") or {}).get(name)
        for text, measures in texts.items():
            saturation = ((analysis.get("saturation") or {}).get(name) or {}).get(text)
            of_all = text == "all"
            for layer, shape in enumerate(analysis["layers"]):
                row = {"checkpoint": name, "text": text, "layer": layer, **shape}
                row |= {key: values and values[layer] for key, values in measures.items() if key != "load"}
                row["saturation"] = saturation and saturation[layer]
                for side in ("input", "output"):
                    values = vocabulary.get(side)
                    row[f"vocabulary_{side}"] = values[layer] if values and of_all else None
                row["coactivation_change"] = change[layer] if change and of_all else None
                yield row


def expert_rows(analysis: Analysis) -> Iterator[dict[str, Any]]:
    """Load of every expert: its share of the assignments of a text in a layer."""
    for name, texts in analysis["metrics"].items():
        for text, measures in texts.items():
            for layer, loads in enumerate(measures["load"]):
                for expert, load in enumerate(loads):
                    yield {"checkpoint": name, "text": text, "layer": layer, "expert": expert, "load": load}


def token_rows(analysis: Analysis) -> Iterator[dict[str, Any]]:
    """The tokens that are listed for each expert, the first one first."""
    for name, layers in (analysis.get("top_tokens") or {}).items():
        for layer, experts in enumerate(layers):
            for expert, tokens in enumerate(experts):
                for place, entry in enumerate(tokens):
                    yield {"checkpoint": name, "layer": layer, "expert": expert, "place": place, **entry}


def training_rows(analysis: Analysis) -> Iterator[dict[str, Any]]:
    """MRI of every layer at every logged step of every run; empty for layers that a run does not have."""
    deepest = max((len(run["layers"]) for run in analysis.get("training") or []), default=0)
    for run in analysis.get("training") or []:
        for point, step in enumerate(run["steps"]):
            of_layers = dict.fromkeys(f"mri/layer_{layer:02d}" for layer in range(deepest))
            of_layers |= {f"mri/layer_{layer:02d}": values[point] for layer, values in enumerate(run["layers"])}
            yield {"run": run["name"], "step": step, "mri": run["mean"][point], **of_layers}


def charts(analysis: Analysis) -> dict[str, str]:
    """Standalone SVG of each curve by layer or step, by file name; only those that there are numbers for."""
    ideals = {layer["experts_per_token"] / layer["num_experts"] for layer in analysis["layers"]}
    same = ideals if len(ideals) == 1 else ()
    chance, balance = [Mark(ideal, "chance") for ideal in same], [Mark(ideal, "perfect balance") for ideal in same]
    metrics = {name: texts["all"] for name, texts in analysis["metrics"].items()}
    vocabulary = analysis.get("vocabulary_specialization") or {}
    first = analysis["checkpoints"][0]["name"]
    drawn = {
        "mri_by_layer": _by_layer(
            {name: of_all["mri"] for name, of_all in metrics.items()},
            "How busy is the busiest expert of each layer?",
            "share of the tokens that visit it",
            balance,
        ),
        "saturation_by_layer": _by_layer(
            {name: texts["all"] for name, texts in (analysis.get("saturation") or {}).items()},
            "Do tokens still visit the same experts?",
            f"share of a token's experts that {first} chose too",
            [Mark(1.0, "unchanged"), *chance],
        ),
        "coactivation_change_by_layer": _by_layer(
            {name: values for name, values in (analysis.get("coactivation_change") or {}).items() if name != first},
            "Do the same experts still work together?",
            f"mean absolute change of P(j | i) since {first}",
            [Mark(0.0, "unchanged")],
        ),
        **{
            f"vocabulary_{side}_by_layer": _by_layer(
                {name: values[side] for name, values in vocabulary.items() if values.get(side)},
                f"Do {side} tokens keep to their experts?",
                "share of their visits to the usual expert",
                [Mark(1.0, "each token id has its experts"), *chance],
            )
            for side in ("input", "output")
        },
        "mri_by_step": _by_step(analysis),
    }
    return {name: chart for name, chart in drawn.items() if chart is not None}


def _by_layer(curves: Mapping[str, Any], title: str, y_label: str, horizontal: list[Mark]) -> str | None:
    if not curves:
        return None
    series = [
        Series(name, range(len(values)), [math.nan if value is None else value for value in values])
        for name, values in curves.items()
    ]
    return line_chart(
        series, title=title, x_label="MoE layer", y_label=y_label, horizontal=horizontal, standalone=True
    )


def _by_step(analysis: Analysis) -> str | None:
    runs = analysis.get("training") or []
    if not runs:
        return None
    shifts = {run["shift_step"] for run in runs} - {None}
    recovered = [run for run in runs if run["shift_step"] is not None and run["recovery_step"]]
    return line_chart(
        [Series(run["name"], run["steps"], run["mean"]) for run in runs],
        title="Did the router recover when the data changed?",
        x_label="training step",
        y_label="share of the tokens that visit the busiest expert, mean over layers",
        vertical=[
            *(Mark(step, "the data changes") for step in sorted(shifts)),
            *(Mark(r["shift_step"] + r["recovery_step"], f"{r['name']} has recovered") for r in recovered),
        ],
        horizontal=[Mark(ideal, "perfect balance") for ideal in sorted({run["ideal"] for run in runs})],
        standalone=True,
    )


def _check(analysis: Analysis) -> None:
    missing = [key for key in ("checkpoints", "domains", "layers", "metrics") if not analysis.get(key)]
    if missing:
        raise ValueError(
            f"This is no routing analysis, it has no {', '.join(missing)}: pass the dictionary of analyse_traces(...)."
        )


def _write_json(analysis: Analysis, folder: Path) -> None:
    matrices = analysis.get("coactivation") or {}
    arrays = {
        name: np.asarray(matrix, dtype=np.float32)
        for name, matrix in matrices.items()
        if len({len(layer) for layer in matrix}) == 1  # as many experts in every layer, so that one array holds them
    }
    whole = dict(analysis)
    if sum(array.size for array in arrays.values()) > MAX_JSON_NUMBERS:
        partial = folder / ".coactivation.partial.npz"
        np.savez(partial, **arrays)
        os.replace(partial, folder / "coactivation.npz")
        whole["coactivation"] = "coactivation.npz"
    else:
        whole["coactivation"] = rounded(analysis.get("coactivation"), digits=None)
        (folder / "coactivation.npz").unlink(missing_ok=True)
    write_whole(folder / "analysis.json", json.dumps(whole, ensure_ascii=False, allow_nan=False))


def _write_csv(path: Path, rows: Iterable[Row]) -> None:
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        path.unlink(missing_ok=True)
        return
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(first))
        writer.writerow({name: csv_cell(name) for name in first})
        for row in chain([first], rows):
            writer.writerow({name: csv_cell(value) for name, value in row.items()})
    os.replace(partial, path)


READING = """\
MRI: share of the tokens that visit the busiest expert; times E/K it is 1 in perfect balance. same experts: share of a
token's experts that {first} chose too, {chance:.3f} by chance. vocabulary: share of the visits of a token id to the
expert it visited most in {first}. co-activation: mean change of P(j | i). slowdown: an estimate for {ranks} ranks.
Means over layers."""


def tables(analysis: Mapping[str, Any]) -> str:
    """Both tables and how to read them."""
    shapes = analysis["layers"]
    chance = statistics.fmean(layer["experts_per_token"] / layer["num_experts"] for layer in shapes)
    first = analysis["checkpoints"][0]["name"]
    ranks = analysis["expert_parallel"][first]["num_ranks"]
    parts = ["", text_table(checkpoint_rows(analysis)), ""]
    if len(analysis["domains"]) > 1:
        parts += [text_table(text_rows(analysis)), ""]
    parts.append(READING.format(first=first, chance=chance, ranks=ranks))
    parts += [f"not there: {part}: {why}" for part, why in analysis["skipped"].items()]
    return "\n".join(parts)


def checkpoint_rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line for each checkpoint, on all text."""
    rows = []
    for checkpoint in analysis["checkpoints"]:
        name = checkpoint["name"]
        measures = analysis["metrics"][name]["all"]
        rows.append(
            {
                "checkpoint": name,
                "tokens": checkpoint["num_tokens"],
                "MRI": _mean(measures["mri"]),
                "MRI xE/K": _mean(measures["mri_normalized"]),
                "load entropy": _mean(measures["load_entropy"]),
                "dead experts": sum(measures["dead_experts"]),
                "router entropy": _mean(measures["router_entropy"]),
                "same experts": _mean(analysis["saturation"].get(name, {}).get("all")),
                "vocabulary input": _mean(analysis["vocabulary_specialization"][name]["input"]),
                "vocabulary output": _mean(analysis["vocabulary_specialization"][name]["output"]),
                "co-activation change": _mean((analysis["coactivation_change"] or {}).get(name)),
                "slowdown": _mean(analysis["expert_parallel"][name]["contiguous"]["slowdown"]),
            }
        )
    return rows


def text_rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line for each checkpoint and kind of text."""
    return [
        {
            "checkpoint": name,
            "text": text,
            "MRI": _mean(texts[text]["mri"]),
            "MRI xE/K": _mean(texts[text]["mri_normalized"]),
            "worst layer": max(range(len(texts[text]["mri"])), key=texts[text]["mri_normalized"].__getitem__),
            "dead experts": sum(texts[text]["dead_experts"]),
            "same experts": _mean(analysis["saturation"].get(name, {}).get(text)),
        }
        for name, texts in analysis["metrics"].items()
        for text in analysis["domains"]
    ]


def _mean(values: Sequence[float | None] | None) -> float | None:
    """Over the layers that have a value; None if none has."""
    known = [value for value in values or () if value is not None]
    return statistics.fmean(known) if known else None
