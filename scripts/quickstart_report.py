"""The quickstart's HTML page, made of results.json and nothing else. Source: ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_moe_cpt.analysis.chart import Mark, Series, line_chart
from hf_moe_cpt.analysis.report import Section, write_report
from hf_moe_cpt.scripts.quickstart_results import RECOVERY, table_rows


ROUTING = ("MRI before", "MRI peak", "MRI after", "recovery step")
SPEED = ("seconds", "tokens/s")
INTRODUCTION = """\
A mixture of experts and a dense model with the same active parameters learn {old} from scratch. Each is then \
continued on {new} twice: with {percent} % of every batch replayed from {old}, and with none. The learning rate runs \
into its constant phase and goes on from there, without a new warm-up.

Losses are held-out, in nats per token. Forgetting is the rise of the loss on {old}, adaptation its fall on {new}. \
MRI is the share of tokens that visit the busiest expert, averaged over layers; {ideal:.3f} is balance. Recovery \
step: {recovery}."""

LAYERS = """\
On held-out text, against the model that had read {old} only. Router saturation is the share of a token's experts \
that it had then; vocabulary specialisation the share of the visits of a token id to the expert it visited most \
then. Dashed: without replay. More, expert by expert, is in routing/report.html."""


def write_quickstart_report(results: dict[str, Any], path: str | Path) -> Path:
    """Write the page and return its path."""
    old, new = results["domains"].values()
    table = table_rows(results)
    losses = _columns(table, *(name for name in table[0] if name not in ROUTING + SPEED))
    sections = [
        Section("What was forgotten, what was learned?", _introduction(results), losses),
        Section(
            "Loss on held-out text",
            "Dashed: without replay.",
            charts=[_held_out(results, name) for name in ("old", "new")],
        ),
        Section(
            "Loss while training, by source", "", charts=[_training_loss(results, name) for name in ("old", "new")]
        ),
        Section("Learning rate", "", charts=[_learning_rate(results)]),
        Section("Routing", "", _columns(table, "run", *ROUTING), charts=[_imbalance(results)]),
        *_routing_by_layer(results),
        Section("What a model writes", _samples(results)),
        Section("What ran", "", _sizes(results)),
        Section("How fast", "", _columns(table, "run", *SPEED)),
        Section("Text", "", [{"domain": name} | facts for name, facts in results["corpus"].items()]),
        Section("Where", "", [{"what": name, "value": value} for name, value in _settings(results).items()]),
    ]
    return write_report(path, f"hf-moe-cpt quickstart: from {old} to {new}", sections)


def _columns(rows: Sequence[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    """The rows that have any of the columns after the first, with these columns only."""
    return [{name: row[name] for name in names} for row in rows if any(row[name] is not None for name in names[1:])]


def _introduction(results: dict[str, Any]) -> str:
    ratio = max(row["replay_ratio"] or 0.0 for row in results["rows"])
    return INTRODUCTION.format(
        **results["domains"], percent=round(100 * ratio), ideal=results["ideal_mri"], recovery=RECOVERY
    )


def _shift(results: dict[str, Any]) -> int:
    return results["settings"]["scale"]["steps"]


def _curve(results: dict[str, Any], run: str, name: str) -> Series | None:
    """A run's curve on the axis of the whole experiment, where continued runs begin at the shift."""
    points = results["curves"][run].get(name)
    if not points:
        return None
    begin = 0 if run.endswith("pretrained") else _shift(results)
    is_dense = run.startswith("dense")
    return Series(
        run, [begin + step for step, _ in points], [value for _, value in points], 1 if is_dense else 0, "no-" in run
    )


def _chart(
    results: dict[str, Any], name: str, title: str, y_label: str, runs: Sequence[str] | None = None, **options: Any
) -> str:
    """One curve a run, of all runs that have it or of those named; the shift is marked. options: of `line_chart`."""
    curves = [_curve(results, run, name) for run in runs or results["curves"]]
    shift = Mark(_shift(results), f"{results['domains']['new']} begins")
    return line_chart(
        [curve for curve in curves if curve is not None],
        title=title,
        x_label="optimizer step",
        y_label=y_label,
        vertical=[shift],
        **options,
    )


def _held_out(results: dict[str, Any], which: str) -> str:
    domain = results["domains"][which]
    return _chart(results, f"held_out/{which}", f"How well do they predict {domain}?", "held-out loss (nats/token)")


def _training_loss(results: dict[str, Any], which: str) -> str:
    domain = results["domains"][which]
    return _chart(results, f"loss/{which}", f"Loss on {domain} in the training batches", "loss (nats/token)")


def _learning_rate(results: dict[str, Any]) -> str:
    """One pre-training and one continued run: the rate is the same for all."""
    runs = [row["run"] for row in results["rows"] if row["model"] == results["settings"]["preset"]][:2]
    return _chart(results, "learning_rate", "How does the rate go on?", "learning rate", runs=runs, from_zero=True)


def _imbalance(results: dict[str, Any]) -> str:
    ideal = Mark(results["ideal_mri"], "perfect balance")
    return _chart(results, "mri", "How busy is the busiest expert?", "MRI, mean over layers", horizontal=[ideal])


def _routing_by_layer(results: dict[str, Any]) -> list[Section]:
    """Saturation and vocabulary specialisation of the mixtures; nothing for results of before they were compared."""
    routing = results.get("routing")
    if routing is None:
        return []
    old, ideal = results["domains"]["old"], results["ideal_mri"]
    saturation = {
        f"{run}, {text}": routing["saturation"][run][text]
        for run in routing["saturation"]
        for text in results["domains"].values()
    }
    vocabulary = {run: values["input"] for run, values in routing["vocabulary_specialization"].items()}
    charts = [
        _by_layer(
            saturation, f"Do tokens visit the experts that they visited after {old}?", "router saturation", ideal
        ),
        _by_layer(vocabulary, "Do token ids keep to their experts?", "vocabulary specialisation", ideal),
    ]
    return [Section("Routing, layer by layer", LAYERS.format(old=old), charts=charts)]


def _by_layer(curves: dict[str, Any], title: str, y_label: str, ideal: float) -> str:
    series = [Series(name, range(len(values)), values, dashed="no-" in name) for name, values in curves.items()]
    marks = [Mark(1.0, "unchanged"), Mark(ideal, "chance")]
    return line_chart(series, title=title, x_label="MoE layer", y_label=y_label, horizontal=marks)


def _samples(results: dict[str, Any]) -> str:
    """A paragraph for each sample, line breaks as signs."""
    lines = (f"{item['model']}, given: {item['prompt']} ▸ {item['continuation']}" for item in results["samples"])
    return "\n\n".join(line.replace("\n", " ⏎ ") for line in lines)


def _sizes(results: dict[str, Any]) -> list[dict[str, Any]]:
    names = ("run", "model", "parameters", "active_parameters", "steps", "tokens", "replay_ratio")
    return [{name.replace("_", " "): row[name] for name in names} for row in results["rows"]]


def _settings(results: dict[str, Any]) -> dict[str, Any]:
    settings = dict(results["settings"])
    return results["environment"] | settings.pop("scale") | settings
