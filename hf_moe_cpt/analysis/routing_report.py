"""Write the routing report of an analysis: one page, and beside it the numbers as JSON and CSV and charts as SVG.

    report.html            opens without a network; what it leaves out it says
    analysis.json          the dictionary of `analyse_traces`, whole, but for co-activation of large models:
    coactivation.npz       for each checkpoint (layers, E, E) float32, where the JSON would be too long to read
    layers.csv             a row for each checkpoint, text and layer: every measure of that layer
    experts.csv            a row for each checkpoint, text, layer and expert: its load
    tokens.csv             a row for each token that is listed for an expert
    training.csv           a row for each run and step: MRI of every layer
    *.svg                  a chart for each question that one curve by layer or by step answers

Letters: L MoE layers, E experts, K experts per token. Source: ours.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hf_moe_cpt.analysis.chart import Mark, Series, line_chart
from hf_moe_cpt.analysis.routing_page import routing_page
from hf_moe_cpt.analysis.routing_page_data import rounded


CHARTS = (
    "mri_by_layer",
    "saturation_by_layer",
    "coactivation_change_by_layer",
    "vocabulary_input_by_layer",
    "vocabulary_output_by_layer",
    "mri_by_step",
)
MAX_JSON_NUMBERS = 2_000_000  # of co-activation; more go into a file of arrays
Analysis = Mapping[str, Any]
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
            _replace(target / f"{name}.svg", drawn[name])
        else:  # of an earlier analysis
            (target / f"{name}.svg").unlink(missing_ok=True)
    _replace(target / "report.html", routing_page(analysis, title))
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
    ideal = _common([layer["experts_per_token"] / layer["num_experts"] for layer in analysis["layers"]])
    chance = [] if ideal is None else [Mark(ideal, "chance")]
    balance = [] if ideal is None else [Mark(ideal, "perfect balance")]
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


def _common(values: list[float]) -> float | None:
    return values[0] if len(set(values)) == 1 else None


def _check(analysis: Analysis) -> None:
    missing = [key for key in ("checkpoints", "domains", "layers", "metrics") if not analysis.get(key)]
    if missing:
        raise ValueError(
            f"This is no routing analysis, it has no {', '.join(missing)}: pass the dictionary of analyse_traces(...)."
        )


def _write_json(analysis: Analysis, folder: Path) -> None:
    matrices = analysis.get("coactivation") or {}
    arrays = {name: np.asarray(matrix, dtype=np.float32) for name, matrix in matrices.items() if _is_even(matrix)}
    whole = dict(analysis)
    if sum(array.size for array in arrays.values()) > MAX_JSON_NUMBERS:
        partial = folder / ".coactivation.partial.npz"
        np.savez(partial, **arrays)
        os.replace(partial, folder / "coactivation.npz")
        whole["coactivation"] = "coactivation.npz"
    else:
        whole["coactivation"] = rounded(analysis.get("coactivation"), digits=None)
        (folder / "coactivation.npz").unlink(missing_ok=True)
    _replace(folder / "analysis.json", json.dumps(whole, ensure_ascii=False, allow_nan=False))


def _is_even(matrix: Any) -> bool:
    """Whether all layers have as many experts, so that one array holds them."""
    return len({len(layer) for layer in matrix}) == 1


def _write_csv(path: Path, rows: Iterable[Row]) -> None:
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        path.unlink(missing_ok=True)
        return
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(first))
        writer.writeheader()
        writer.writerow(first)
        writer.writerows(rows)
    os.replace(partial, path)


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
