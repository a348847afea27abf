"""The dataset card of a saved SurgeryBench: YAML that the Hub reads, then what people need to know.

The text is `hub_cards/surgery_bench.jinja`. Source: ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import datasets
from jinja2 import Template

from hf_moe_cpt.data.surgery_bench_questions import QUESTION_KINDS


_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))

_ROLES = {
    "unlearn": "to be forgotten; subjects of its own",
    "obsolete": "the subjects of update as they were: to be forgotten",
    "update": "the same subjects with changed facts: to be learnt",
    "retain": "to be kept; subjects of its own and the hubs that facts refer to",
    "neighbour": "to be kept; other subjects in the same kind of text as unlearn",
    "unseen": "trained on by no model: how a forgotten text should look",
}

_TEMPLATE = ("hf_moe_cpt.hub_cards", "surgery_bench.jinja")


def write_card(
    documents: datasets.DatasetDict,
    questions: datasets.DatasetDict,
    version: str,
    settings: Mapping[str, Any] | None,
    license: str | None,
) -> str:
    """The README.md of the folder. Sets and splits without rows are left out of its configurations."""
    filled = {name: part for name, part in documents.items() if len(part)}
    asked = {name: part for name, part in questions.items() if len(part)}
    is_generated = settings is not None
    sample = next(iter(filled.values()))[0]
    template = resources.files(_TEMPLATE[0]).joinpath(_TEMPLATE[1]).read_text(encoding="utf-8")
    body = Template(template, keep_trailing_newline=True).render(
        version=version,
        counts=_counts(filled, asked),
        sample_set=sample["set"],
        sample=sample["text"].replace("\n", "\n> "),
        settings=json.dumps(settings, indent=1) if is_generated else None,
    )
    return f"{_front_matter(filled, asked, is_generated, license)}\n{body}"


def _front_matter(
    documents: Mapping[str, datasets.Dataset],
    questions: Mapping[str, datasets.Dataset],
    is_generated: bool,
    license: str | None,
) -> str:
    rows = sum(map(len, (*documents.values(), *questions.values())))
    size = next((name for limit, name in _SIZES if rows < limit), "1M<n<10M" if rows < 10_000_000 else "10M<n<100M")
    lines = ["---", "pretty_name: SurgeryBench"]
    lines += [f"license: {license}"] if license else []
    lines += ["language:", "- en"] if is_generated else []
    lines += ["task_categories:", "- text-generation", "- multiple-choice"]
    lines += ["tags:", "- machine-unlearning", "- knowledge-editing", "- hf_moe_cpt"]
    lines += ["- synthetic"] if is_generated else []
    lines += ["size_categories:", f"- {size}", "configs:"]
    for config, parts in (("documents", documents), ("questions", questions)):
        if parts:
            lines += [f"- config_name: {config}"] + (["  default: true"] if config == "documents" else [])
            lines += ["  data_files:"]
        for name in parts:
            lines += [f"  - split: {name}", f"    path: {config}/{name}.parquet"]
    return "\n".join([*lines, "---", ""])


def _counts(documents: Mapping[str, datasets.Dataset], questions: Mapping[str, datasets.Dataset]) -> str:
    asked = {name: [part.select_columns(["set", "kind"]).with_format("arrow")[:] for part in questions.values()]
             for name in documents}  # fmt: skip
    lines = [
        "| set | what it is | documents | subjects | questions: " + ", ".join(QUESTION_KINDS) + " |",
        "|---|---|---|---|---|",
    ]
    for name, part in documents.items():
        kinds = [
            kind
            for table in asked[name]
            for set_name, kind in zip(table["set"].to_pylist(), table["kind"].to_pylist(), strict=True)
            if set_name == name
        ]
        counts = ", ".join(str(kinds.count(kind)) for kind in QUESTION_KINDS)
        lines.append(f"| {name} | {_ROLES[name]} | {len(part)} | {len(set(part['subject']))} | {counts} |")
    return "\n".join([*lines, ""])
