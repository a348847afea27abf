"""Model cards from the templates in hub_cards/: every number comes from a file of the run. See hub_cards/facts.md.

Facts of a run become Markdown tables and SVG curves, and nothing where facts are missing. The metadata carries the
evaluated numbers as `model-index`, which the Hub validates. Source: ours; the mechanism is that of
`huggingface_hub.ModelCard`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from transformers.hf_argparser import HfArg

from hf_moe_cpt.hub.contents import (
    ADAPTER_WEIGHTS,
    CARD,
    HUB_ID,
    INDEX,
    METHODS,
    RunFacts,
    read_facts,
    require_no_link,
    weight_files,
)
from hf_moe_cpt.reading import reading
from hf_moe_cpt.reports import Series, line_chart


@dataclass(frozen=True)
class Measure:
    """An evaluated number: its key in the log, how people call it, and the data that it is measured on."""

    key: str
    label: str
    data: str


_SURGERY_KEY = re.compile(r"eval_(\w+)_(ce|kl)")
TEMPLATES = "hf_moe_cpt.hub_cards"
_SHOWN = yaml.safe_load(resources.files(TEMPLATES).joinpath("runs.yaml").read_text(encoding="utf-8"))
_ROLES = _SHOWN["roles"]


@dataclass(frozen=True)
class CardOverrides:
    """What no file of a run tells and its owner may: names of data sets, licence, languages, parent, title."""

    repository: str | None = None
    datasets: Sequence[str] = ()
    license: str | None = None
    language: Sequence[str] = ()
    base_model: str | None = None
    title: str | None = None
    tags: Sequence[str] = ()


@dataclass
class CardArguments:
    """The run, and what no file of it tells"""

    folder: str = HfArg(metadata={"positional": True}, help="Folder of a saved model.")
    method: str | None = HfArg(
        default=None, metadata={"choices": list(METHODS)}, help="What made the model, if the folder does not say."
    )
    dataset_name: list[str] = HfArg(default_factory=list, help="What it was trained on: Hub ids, or names.")
    base_model: str | None = HfArg(
        default=None, help="Hub id of the model that it was made from, if the run had a copy on disk."
    )
    license: str | None = HfArg(default=None, help="Identifier of the licence, such as apache-2.0.")
    language: list[str] = HfArg(default_factory=list, help="Codes of languages, such as en de.")
    title: str | None = HfArg(default=None, help="Title; unset: the name of the repository or folder.")

    def told(self, repository: str | None) -> CardOverrides:
        """The same for `build_card`, with the name that people load."""
        told = {name: getattr(self, name) for name in ("license", "language", "base_model", "title")}
        return CardOverrides(repository=repository, datasets=self.dataset_name, **told)


@dataclass(frozen=True)
class Card:
    """The text of README.md and the plots that it shows, by their path in the repository."""

    text: str
    plots: dict[str, str]


def build_card(folder: str | Path, told: CardOverrides | None = None, method: str | None = None) -> Card:
    """The card of a finished folder.

    told: what the owner adds. method: "cpt", "rainbowpo" or "surgery", if the folder does not say. Raises ValueError
    for a folder without a model or a method, and for files that cannot be read.
    """
    told = told or CardOverrides()
    facts = read_facts(folder, method)
    plots, replayed = curves(facts), facts.arguments.get("replay_ratio")
    parent = told.base_model or facts.parent
    title = told.title or (told.repository or Path(folder).resolve().name).rpartition("/")[2]
    files = (resources.files(TEMPLATES).joinpath(name) for name in ("sections.jinja", f"{facts.method}.jinja"))
    card = ModelCard.from_template(
        _metadata(facts, told, parent, title),
        template_str="\n".join(file.read_text(encoding="utf-8") for file in files),
        title=plain(title),
        repository=re.sub(r"[^\w./-]", "-", told.repository or title),  # it stands in Python
        parent=_linked(parent, "", sure=bool(told.base_model)) or (parent and code(Path(parent).name)),
        datasets=", ".join(_linked(name, "datasets/") or plain(name) for name in told.datasets),
        replay_percent=f"{100 * replayed:g}" if replayed else None,
        architecture=_architecture(facts),
        is_adapter=bool(facts.adapter),
        has_code=bool(facts.config.get("auto_map")),
        results=results_table(facts),
        training=training_table(facts),
        components=components_table(facts),
        experts=experts_table(facts),
        sizes=sizes_table(facts.config, count_parameters(folder)),
        machine=machine_table(facts),
        plots="\n\n".join(f"![{Path(path).stem.replace('_', ' ')}]({path})" for path in plots),
        bibtex=_bibtex(facts),
    )
    return Card(str(card.content).strip() + "\n", plots)


def write_card(folder: str | Path, told: CardOverrides | None = None, method: str | None = None) -> Path:
    """Write README.md and its plots into a finished folder, over what is there; returns the card's path.

    Each file is replaced whole or not at all; OSError says in one line that the disk took no more.
    """
    card = build_card(folder, told, method)
    for path, text in {**card.plots, CARD: card.text}.items():
        _replace(Path(folder) / path, text)
    return Path(folder) / CARD


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            f"{str(path)!r} cannot be written ({error.strerror or error}): make room or allow writing; the file that "
            "was there stands."
        ) from error


def check_metadata(text: str) -> None:
    """Raise ValueError if a card lacks the metadata without which the Hub cannot place the model."""
    try:
        data = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"README.md has a head that cannot be read ({' '.join(str(error).split())}).") from error
    missing = [name for name in ("library_name", "pipeline_tag") if not data.get(name)]
    if missing:
        raise ValueError(
            f"README.md lacks {' and '.join(missing)} in its head: add it, or make the card anew with "
            "`hf-moe-cpt card --overwrite`."
        )


def card_of_a_person(folder: str | Path) -> str | None:
    """The folder's README.md, if somebody wrote it: it is published as it is and not written over."""
    path = Path(folder) / CARD
    require_no_link(path)
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    return None if text is None or is_generated(text) else text


def card_to_publish(folder: str | Path, told: CardOverrides | None = None, method: str | None = None) -> Card:
    """The README.md of the folder if a person wrote it, else that of `build_card`. Raises ValueError as it does, and
    for a head that the Hub would not take.
    """
    text = card_of_a_person(folder)
    if text is None:
        return build_card(folder, told, method)
    check_metadata(text)
    return Card(text, {})


def is_generated(text: str) -> bool:
    """Whether a card was written by a Trainer, PEFT or us and by no person, so that another may take its place."""
    if "# Model Card for Model ID" in text:  # PEFT's form, not filled in
        return True
    try:
        tags = ModelCard(text, ignore_metadata_errors=True).data.get("tags") or []
    except (ValueError, yaml.YAMLError):  # a head that is no YAML was written by a person
        return False
    return "generated_from_trainer" in tags


def number(value: Any) -> str:
    """A value as people read it: four digits of a float, thousands of an integer separated."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else plain(value)


def plain(text: Any) -> str:
    """What somebody else wrote as a part of one line: no markup, no HTML."""
    line = " ".join(str(text).split()).replace("\\", "\\\\")
    return re.sub(r"([`*\[\]<>#~])|(&(?=#?\w+;))", lambda m: f"\\{m[0]}", line)


def code(text: Any) -> str:
    """The same as code: in it only the backtick means anything."""
    return f"`{' '.join(str(text).split()).replace('`', chr(39))}`"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table without the columns that are empty in every row; "" without rows."""
    listed = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    kept = [i for i in range(len(columns)) if any(row[i] for row in listed)]
    lines = [[columns[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in listed)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if listed else ""


def measures_of(facts: RunFacts) -> list[Measure]:
    """The evaluated numbers that a folder holds, in the order of the card."""
    if facts.method != "surgery":
        found = [m for row in _SHOWN["measures"][facts.method] if (m := Measure(*row)).key in facts.final]
        of_sources = {"eval_new_loss", "eval_replay_loss"} & facts.final.keys()
        return [m for m in found if not (m.key == "eval_loss" and facts.method == "cpt" and of_sources)]
    names = [match[1] for key in facts.final if (match := _SURGERY_KEY.fullmatch(key)) and match[1] in _ROLES]
    found = []
    for name in sorted(set(names), key=list(_ROLES).index):
        for kind, label in (("ce", "cross entropy, nats per token"), ("kl", "KL from before, nats per token")):
            if f"eval_{name}_{kind}" in facts.final:
                found.append(Measure(f"eval_{name}_{kind}", label, f"{name}: {_ROLES[name]}"))
    if "eval_surgery_gap" in facts.final:
        found.append(Measure("eval_surgery_gap", "surgery gap, nats per token", "all sets"))
    return found


def results_table(facts: RunFacts) -> str:
    """Each evaluated number at step 0 and at the end, and when it was measured."""
    rows = [
        (m.label, m.data, number(facts.start[m.key]) if m.key in facts.start else "", number(facts.final[m.key]))
        for m in measures_of(facts)
    ]
    before = "Before is step 0; after" if facts.start else "After"
    note = f"\n\n{before} is the last evaluation, by the trainer itself."
    return table(("measure", "data", "before", "after"), rows) + note if rows else ""


def training_table(facts: RunFacts) -> str:
    """Steps, tokens, time and the settings that matter to the method, as far as the folder tells them."""
    rows = _operation(facts.kept) if facts.method == "surgery" else []
    rows += [("optimizer steps", number(facts.steps)), ("tokens", number(facts.tokens))]
    rows += [("wall clock", f"{number(facts.seconds)} s" if facts.seconds is not None else "None")]
    if facts.method == "cpt":
        rows += [("phase of the schedule when saved", plain(facts.kept.get("phase")))]
        rows += [("learning rate when saved", number(facts.kept.get("learning_rate")))]
    names = [name for part in (facts.method, "all") for name in _SHOWN["settings"][part].split()]
    if (facts.arguments.get("max_steps") or 0) <= 0:
        names.append("num_train_epochs")
    rows += [(f"`{name}`", number(facts.arguments.get(name))) for name in names]
    return table(("setting", "value"), [row for row in rows if row[1] not in ("None", "")])


def _operation(kept: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What surgery.json says was done: rows without a value are dropped by the caller."""
    gap = kept.get("gap") or {}
    rows = [("objective, minimised", code(kept["objective"]) if kept.get("objective") else "")]
    rows += [("rows", ", ".join(plain(f"{name} {count}") for name, count in (kept.get("rows") or {}).items()))]
    rows += [("forgetting aims at, nats per token", number(kept.get("forget_target")))]
    rows += [("weights are those of step", number(kept.get("step"))), ("stopped by", plain(kept.get("stopped_by")))]
    return [*rows, *((f"gap: {name}", number(gap.get(name))) for name in ("start", "last", "best"))]


def components_table(facts: RunFacts) -> str:
    """The switches of RainbowPO's objective, and the scale of phi where phi is in use."""
    rows = [
        (f"`{name}`", number(facts.arguments[name]))
        for name in _SHOWN["components"].split()
        if name in facts.arguments
    ]
    scale = facts.kept.get("dispersion_scale")
    text = table(("component", "value"), rows)
    if facts.run.get("components"):
        text = f"```\n{str(facts.run['components']).replace('```', '')}\n```\n\n{text}"
    return "\n\n".join(part for part in (text, f"Scale of phi: {scale:.4g}." if scale is not None else "") if part)


def experts_table(facts: RunFacts) -> str:
    """Imbalance of the routers in training: at the first and the last logged step."""
    labels = {"mri": "share of the busiest expert (MRI)", "mri_normalized": "the same over that of balance"}
    rows = []
    for key, label in labels.items():
        values = [entry[key] for entry in facts.log if key in entry]
        if values:
            rows.append((label, number(values[0]), number(values[-1])))
    return table(("mean over layers", "first logged step", "last logged step"), rows)


def sizes_table(config: Mapping[str, Any], parameters: int | None) -> str:
    """Sizes of the model, from its configuration and the headers of its weights."""
    rows = [("parameters", number(parameters) if parameters else "")]
    rows += [(f"`{name}`", number(config[name])) for name in _SHOWN["sizes"].split() if config.get(name) is not None]
    return table(("size", "value"), [row for row in rows if row[1]]) if config else ""


def machine_table(facts: RunFacts) -> str:
    """Devices and library versions of the process that trained."""
    rows = [(name, number(facts.run.get(name))) for name in ("device", "processes") if facts.run.get(name)]
    rows += [(plain(name), plain(version)) for name, version in (facts.run.get("versions") or {}).items()]
    return table(("part", "value"), rows)


def curves(facts: RunFacts) -> dict[str, str]:
    """SVG charts of the log by file name; a curve needs two points."""
    charts = {}
    for title, unit, keys in _SHOWN["curves"][facts.method]:
        series = []
        for key, name in keys.items():
            points = [(e["step"], e[key]) for e in facts.log if key in e and "step" in e and math.isfinite(e[key])]
            if len({step for step, _ in points}) > 1:
                series.append(Series(name, [float(x) for x, _ in points], [float(y) for _, y in points]))
        if series:
            file = "plots/" + re.sub(r"\W+", "_", title.lower()).strip("_") + ".svg"
            charts[file] = line_chart(series, title=title, x_label="step", y_label=unit, standalone=True)
    return charts


def count_parameters(folder: str | Path) -> int | None:
    """Numbers in the weights, from the headers of the safetensors files; None without such files."""
    total = 0
    root = Path(folder)
    for name in weight_files(root) - {INDEX, ADAPTER_WEIGHTS}:
        if not (root / name).is_file():
            continue
        with reading(root / name), safe_open(root / name, framework="numpy") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total or None


def _metadata(facts: RunFacts, told: CardOverrides, parent: str | None, title: str) -> ModelCardData:
    results = _eval_results(facts, told)
    tags = ["hf_moe_cpt", *_SHOWN["tags"][facts.method], *(["moe"] if _num_experts(facts) else [])]
    tags += ["arxiv:2503.05029"] if facts.method == "cpt" else []
    values: dict[str, Any] = {
        "license": told.license,
        "language": list(told.language) or None,
        "library_name": "peft" if facts.adapter else "transformers",
        "pipeline_tag": "text-generation",
        "datasets": [name for name in told.datasets if HUB_ID.fullmatch(name)] or None,
        "tags": [*dict.fromkeys([*tags, *told.tags, "generated_from_trainer"])],
    }
    if parent is not None and (told.base_model or HUB_ID.fullmatch(parent)):
        values |= {"base_model": parent, "base_model_relation": "adapter" if facts.adapter else "finetune"}
    if results:
        values |= {"model_name": title, "eval_results": results}
    return ModelCardData(**values)


def _eval_results(facts: RunFacts, told: CardOverrides) -> list[EvalResult]:
    name = told.datasets[0] if len(told.datasets) == 1 else None
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name if name and HUB_ID.fullmatch(name) else "held-out",
            dataset_name=f"{name}, {measure.data}" if name else measure.data,
            metric_type=measure.key.removeprefix("eval_"),
            metric_name=measure.label,
            metric_value=float(f"{facts.final[measure.key]:.6g}"),
        )
        for measure in measures_of(facts)
        if math.isfinite(facts.final[measure.key])
    ]


def _linked(name: str | None, kind: str, sure: bool = False) -> str | None:
    """A link to a repository of the Hub; None for what is no id of one. sure: also of one without an owner."""
    is_id = name is not None and (HUB_ID.fullmatch(name) or (sure and re.fullmatch(r"[\w.-]+", name)))
    return f"[{name}](https://huggingface.co/{kind}{name})" if is_id else None


def _num_experts(facts: RunFacts) -> int:
    return next((facts.config[k] for k in ("num_experts", "num_local_experts") if facts.config.get(k)), 0)


def _architecture(facts: RunFacts) -> str:
    if facts.adapter:
        return f"{plain(facts.adapter.get('peft_type', 'PEFT'))} adapter for a language model"
    experts = _num_experts(facts)
    if not experts:
        return f"dense language model of the type {code(facts.config.get('model_type', 'unknown'))}"
    chosen = facts.config.get("num_experts_per_tok")
    of = f", {number(chosen)} of {number(experts)} experts for a token" if chosen else ""
    return f"mixture of experts of the type {code(facts.config.get('model_type'))}{of}"


def _bibtex(facts: RunFacts) -> str:
    key, title, number, year, authors = _SHOWN["citations"][facts.method]
    lines = {"title": f"{{{title}}}", "author": authors, "year": year, "journal": f"arXiv preprint arXiv:{number}"}
    return "\n".join([f"@article{{{key},", *(f"    {name:<8}= {{{text}}}," for name, text in lines.items()), "}"])
