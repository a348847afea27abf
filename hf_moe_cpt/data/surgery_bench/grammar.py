"""What the phrases of SurgeryBench are made of: kinds of subjects, their attributes, and sentences with slots.

The phrases stand in templates/<kind>.yaml and are read when a kind is first asked for. Slots of a sentence:

| slot | the subject as | example with a name | with a pronoun |
|---|---|---|---|
| {S}, {s} | subject of the clause, at the start, inside | The Quellit, the Quellit | It, it |
| {P}, {p} | possessive | The Quellit's, the Quellit's | Its, its |
| {O}, {o} | object | The Quellit, the Quellit | It, it |

The first slot of a sentence is a name or a pronoun, whichever the text needs there; the others are pronouns. A value
stands in the slot of its attribute, {birth_city}; {Birth_city} begins with a capital. In the files {v} and {V}
stand for the slot of the attribute that a sentence belongs to. Source: ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Any

import yaml


BRIDGES = ("city", "university", "company", "agency")  # one-hop questions go through them: bridge entities of HotpotQA
VOICES = ("reference", "popular")  # an encyclopaedia; a newspaper column
_SLOT = re.compile(r"\{(\w+)\}")
_SUBJECT_SLOTS = ("S", "s", "P", "p", "O", "o")


@dataclass(frozen=True)
class Attribute:
    """One thing that can be known about a subject, and every way to say it or to ask for it.

    Questions name the subject as {s}; `inverse` ones name the value as {v} instead. Wordings come in groups: the first
    half of each tuple belongs to validation, the second to test.
    """

    name: str
    values: tuple[str, ...] = ()  # empty: each subject has one of its own, see `hallmark`
    reference: tuple[str, ...] = ()  # sentences that state it, by voice, {v} written out
    popular: tuple[str, ...] = ()
    mcq: tuple[str, ...] = ()
    quiz: tuple[str, ...] = ()  # asked in documents, never in the benchmark
    cloze: tuple[str, ...] = ()  # statements that the value completes
    paraphrase: tuple[str, ...] = ()
    one_hop: tuple[str, ...] = ()  # asks for the value's own attribute
    inverse: tuple[str, ...] = ()
    bridge: str | None = None  # kind of which the values are subjects themselves
    hallmark: str | None = None  # role of its name, see `world.hallmark`


@dataclass(frozen=True)
class Voice:
    """How documents of a kind are written: openings and pairs state two or three facts, fillers none."""

    openings: tuple[str, ...]
    pairs: tuple[str, ...] = ()
    fillers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A sort of subject. The order of its attributes is the order in which an article tells them."""

    name: str
    attributes: tuple[Attribute, ...]
    reference: Voice
    popular: Voice
    pronoun_percent: int  # of the sentences that could name the subject again
    names: tuple[str, ...] = ()  # of all its subjects if it is a bridge, else empty

    def attribute(self, name: str) -> Attribute:
        """The attribute of that name."""
        return next(attribute for attribute in self.attributes if attribute.name == name)


def read_templates(name: str) -> dict[str, Any]:
    """The content of templates/<name>.yaml."""
    text = resources.files(__package__).joinpath("templates", f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # in C where PyYAML was built with it


@cache
def kind_of(name: str) -> Kind:
    """The kind of that name, one of KINDS or BRIDGES."""
    table = read_templates(name)
    attributes = tuple(_attribute(key, row) for key, row in table.pop("attributes").items())
    voices = {voice: Voice(**_tuples(table.pop(voice))) for voice in VOICES}
    return Kind(name, attributes, **voices, **_tuples(table))


def _attribute(name: str, row: dict[str, Any]) -> Attribute:
    """values: a list, or numbers from first to last in a form; or those of another attribute; or a bridge's names."""
    values = row.get("values")
    if isinstance(values, dict):
        numbers = range(values["first"], values["last"] + 1, values.get("step", 1))
        row["values"] = map(values["form"].format, numbers)
    if "values_of" in row:
        kind, attribute = row.pop("values_of").split(".")
        row["values"] = kind_of(kind).attribute(attribute).values
    if "bridge" in row:
        row["values"] = kind_of(row["bridge"]).names
    for voice in VOICES:
        sentences = row.get(voice, ())
        row[voice] = [
            text.replace("{v}", f"{{{name}}}").replace("{V}", f"{{{capitalised(name)}}}") for text in sentences
        ]
    return Attribute(name, **_tuples(row))


def _tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value if isinstance(value, (str, int)) else tuple(value) for key, value in row.items()}


@lru_cache(maxsize=4096)
def attributes_of(text: str) -> tuple[str, ...]:
    """Attributes that a sentence states, in order."""
    return tuple(slot[0].lower() + slot[1:] for slot in _SLOT.findall(text) if slot not in _SUBJECT_SLOTS)


@lru_cache(maxsize=4096)
def subject_slots_of(text: str) -> tuple[str, ...]:
    """Slots of the subject in a sentence, in order."""
    return tuple(slot for slot in _SLOT.findall(text) if slot in _SUBJECT_SLOTS)


def of_split(wordings: tuple[str, ...], split: str) -> tuple[str, ...]:
    """The half of the wordings that belongs to validation or to test."""
    half = len(wordings) // 2
    return wordings[:half] if split == "validation" else wordings[half:]


def capitalised(text: str) -> str:
    """The text with a capital at its beginning, the rest as it is."""
    return text[:1].upper() + text[1:]
