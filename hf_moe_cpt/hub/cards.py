"""Model cards from the templates in hub_cards/: every number comes from a file of the run. See hub_cards/facts.md.

The metadata carries the evaluated numbers as `model-index`, which the Hub validates. Source: ours; the mechanism is
`huggingface_hub.ModelCard`.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_moe_cpt.hub import card_tables
from hf_moe_cpt.hub.folder_checks import HUB_ID
from hf_moe_cpt.hub.run_facts import METHODS, RunFacts, read_facts


TEMPLATES = "hf_moe_cpt.hub_cards"
_TAGS = {
    "cpt": ("continual-pre-training",),
    "rainbowpo": ("rainbowpo", "preference-optimization", "arxiv:2410.04203"),
    "surgery": ("llm-surgery", "unlearning", "knowledge-editing", "arxiv:2409.13054"),
}
_CITATIONS = {
    "cpt": ("therien2025continual", "Continual Pre-training of MoEs: How robust is your router?", "2503.05029", 2025,
            "Thérien, Benjamin and others"),
    "rainbowpo": ("zhao2024rainbowpo",
                  "RainbowPO: A Unified Framework for Combining Improvements in Preference Optimization",
                  "2410.04203", 2024, "Zhao, Hanyang and others"),
    "surgery": ("veldanda2024surgery",
                "LLM Surgery: Efficient Knowledge Unlearning and Editing in Large Language Models", "2409.13054", 2024,
                "Veldanda, Akshaj Kumar and others"),
}  # fmt: skip


@dataclass(frozen=True)
class Told:
    """What no file of a run tells and its owner may: names of data sets, licence, languages, parent, title."""

    repository: str | None = None
    datasets: Sequence[str] = ()
    license: str | None = None
    language: Sequence[str] = ()
    base_model: str | None = None
    title: str | None = None
    tags: Sequence[str] = field(default_factory=tuple)


@dataclass
class CardArguments:
    """The run, and what no file of it tells"""

    folder: str = field(metadata={"positional": True, "help": "Folder of a saved model."})
    method: str | None = field(
        default=None, metadata={"help": "What made the model, if the folder does not say.", "choices": list(METHODS)}
    )
    dataset_name: list[str] = field(
        default_factory=list, metadata={"help": "What it was trained on: Hub ids, or names."}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Hub id of the model that it was made from, if the run had a copy on disk."}
    )
    license: str | None = field(default=None, metadata={"help": "Identifier of the licence, such as apache-2.0."})
    language: list[str] = field(default_factory=list, metadata={"help": "Codes of languages, such as en de."})
    title: str | None = field(default=None, metadata={"help": "Title; unset: the name of the repository or folder."})

    def told(self, repository: str | None) -> Told:
        """The same for `build_card`, with the name that people load."""
        told = {name: getattr(self, name) for name in ("license", "language", "base_model", "title")}
        return Told(repository=repository, datasets=self.dataset_name, **told)


@dataclass(frozen=True)
class Card:
    """The text of README.md and the plots that it shows, by their path in the repository."""

    text: str
    plots: dict[str, str]


def build_card(folder: str | Path, told: Told | None = None, method: str | None = None) -> Card:
    """The card of a finished folder.

    told: what the owner adds. method: "cpt", "rainbowpo" or "surgery", if the folder does not say. Raises ValueError
    for a folder without a model or a method, and for files that cannot be read.
    """
    told = told or Told()
    facts = read_facts(folder, method)
    plots = card_tables.curves(facts)
    parent = told.base_model or facts.parent
    title = told.title or (told.repository or Path(folder).resolve().name).rpartition("/")[2]
    template = "\n".join(_template(name) for name in ("sections.jinja", f"{facts.method}.jinja"))
    card = ModelCard.from_template(
        _metadata(facts, told, parent, title),
        template_str=template,
        title=title,
        repository=told.repository or title,
        parent=_linked(parent, bool(told.base_model)),
        datasets=_listed(told.datasets),
        replay_percent=_percent(facts.arguments.get("replay_ratio")),
        architecture=_architecture(facts),
        is_adapter=bool(facts.adapter),
        has_code=_has_code(facts),
        results=_with_note(card_tables.results_table(facts), facts),
        training=card_tables.training_table(facts),
        components=card_tables.components_table(facts),
        experts=card_tables.experts_table(facts),
        sizes=card_tables.sizes_table(facts.config, count_parameters(folder)),
        machine=card_tables.machine_table(facts),
        plots="\n\n".join(f"![{_alt(path)}]({path})" for path in plots),
        bibtex=_bibtex(facts),
    )
    return Card(str(card.content).strip() + "\n", plots)


def write_card(folder: str | Path, told: Told | None = None, method: str | None = None) -> Path:
    """Write README.md and its plots into a finished folder, over what is there; returns the card's path.

    Each file is replaced whole or not at all; OSError says in one line that the disk took no more.
    """
    card = build_card(folder, told, method)
    for path, text in {**card.plots, "README.md": card.text}.items():
        _replace(Path(folder) / path, text)
    return Path(folder) / "README.md"


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


def is_generated(text: str) -> bool:
    """Whether a card was written by a Trainer, PEFT or us and by no person, so that another may take its place."""
    if "# Model Card for Model ID" in text:  # PEFT's form, not filled in
        return True
    try:
        tags = ModelCard(text, ignore_metadata_errors=True).data.get("tags") or []
    except (ValueError, yaml.YAMLError):  # a head that is no YAML was written by a person
        return False
    return "generated_from_trainer" in tags


def count_parameters(folder: str | Path) -> int | None:
    """Numbers in the weights, from the headers of the safetensors files; None without such files."""
    files = sorted(Path(folder).glob("model*.safetensors"))
    return sum(map(_numbers_in, files)) if files else None


def _numbers_in(path: Path) -> int:
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _template(name: str) -> str:
    return resources.files(TEMPLATES).joinpath(name).read_text(encoding="utf-8")


def _metadata(facts: RunFacts, told: Told, parent: str | None, title: str) -> ModelCardData:
    results = _eval_results(facts, told)
    values: dict[str, Any] = {
        "license": told.license,
        "language": list(told.language) or None,
        "library_name": "peft" if facts.adapter else "transformers",
        "pipeline_tag": "text-generation",
        "datasets": [name for name in told.datasets if HUB_ID.fullmatch(name)] or None,
        "tags": _tags(facts, told),
    }
    if parent is not None and (told.base_model or HUB_ID.fullmatch(parent)):
        values |= {"base_model": parent, "base_model_relation": "adapter" if facts.adapter else "finetune"}
    if results:
        values |= {"model_name": title, "eval_results": results}
    return ModelCardData(**values)


def _tags(facts: RunFacts, told: Told) -> list[str]:
    own = ["hf_moe_cpt", *_TAGS[facts.method]]
    own += ["moe"] if _num_experts(facts) else []
    own += ["arxiv:2503.05029"] if facts.method == "cpt" else []
    return [*dict.fromkeys([*own, *told.tags, "generated_from_trainer"])]


def _eval_results(facts: RunFacts, told: Told) -> list[EvalResult]:
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
        for measure in card_tables.measures_of(facts)
        if math.isfinite(facts.final[measure.key])
    ]


def _linked(parent: str | None, sure: bool) -> str | None:
    if parent is None:
        return None
    is_id = sure or HUB_ID.fullmatch(parent)
    return f"[{parent}](https://huggingface.co/{parent})" if is_id else f"`{Path(parent).name}`"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"[{n}](https://huggingface.co/datasets/{n})" if HUB_ID.fullmatch(n) else n for n in names)


def _percent(share: Any) -> str | None:
    return f"{100 * share:g}" if share else None


def _num_experts(facts: RunFacts) -> int:
    return next((facts.config[k] for k in ("num_experts", "num_local_experts") if facts.config.get(k)), 0)


def _architecture(facts: RunFacts) -> str:
    if facts.adapter:
        return f"{facts.adapter.get('peft_type', 'PEFT')} adapter for a language model"
    experts = _num_experts(facts)
    if not experts:
        return f"dense language model of the type `{facts.config.get('model_type', 'unknown')}`"
    chosen = facts.config.get("num_experts_per_tok")
    of = f", {chosen} of {experts} experts for a token" if chosen else ""
    return f"mixture of experts of the type `{facts.config.get('model_type')}`{of}"


def _has_code(facts: RunFacts) -> bool:
    return bool(facts.config.get("auto_map"))


def _with_note(results: str, facts: RunFacts) -> str:
    if not results:
        return ""
    before = "Before is step 0; after" if facts.start else "After"
    return f"{results}\n\n{before} is the last evaluation, by the trainer itself."


def _alt(path: str) -> str:
    return Path(path).stem.replace("_", " ")


def _bibtex(facts: RunFacts) -> str:
    key, title, number, year, authors = _CITATIONS[facts.method]
    lines = {"title": f"{{{title}}}", "author": authors, "year": year, "journal": f"arXiv preprint arXiv:{number}"}
    return "\n".join([f"@article{{{key},", *(f"    {name:<8}= {{{text}}}," for name, text in lines.items()), "}"])
