"""What the phrases of the benchmark are made of: attributes, their values, and sentences with slots.

Slots of a sentence, the subject first:

| slot | the subject as | example with a name | with a pronoun |
|---|---|---|---|
| {S}, {s} | subject of the clause, at the start, inside | The Quellit, the Quellit | It, it |
| {P}, {p} | possessive | The Quellit's, the Quellit's | Its, its |
| {O}, {o} | object | The Quellit, the Quellit | It, it |

The first slot of a sentence is a name or a pronoun, whichever the text needs there; the others are pronouns. A value
stands in the slot of its attribute, {birth_city}; {Birth_city} begins with a capital. {v} and {V} are short for the
attribute that a phrase belongs to. Source: ours.
"""

import re
from dataclasses import dataclass
from functools import lru_cache


VOICES = ("reference", "popular")  # an encyclopaedia; a newspaper column
SPLITS = ("validation", "test")
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
    reference: tuple[str, ...] = ()  # sentences that state it, by voice
    popular: tuple[str, ...] = ()
    mcq: tuple[str, ...] = ()
    quiz: tuple[str, ...] = ()  # asked in documents, never in the benchmark
    cloze: tuple[str, ...] = ()  # statements that the value completes
    paraphrase: tuple[str, ...] = ()
    one_hop: tuple[str, ...] = ()  # asks for the value's own attribute
    inverse: tuple[str, ...] = ()
    hub: str | None = None  # kind of which the values are subjects themselves
    hallmark: str | None = None  # role of its name, see names

    def sentences(self, voice: str) -> tuple[str, ...]:
        """Its sentences in a voice, with the attribute's own slot."""
        return tuple(own_slot(text, self.name) for text in getattr(self, voice))


@dataclass(frozen=True)
class Voice:
    """How documents of a kind are written: openings and compounds state two or three facts, fillers none."""

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
    hub_names: tuple[str, ...] = ()  # not empty: all its subjects, named by hand

    def voice(self, name: str) -> Voice:
        """Its openings, pairs and fillers in a voice."""
        return self.reference if name == "reference" else self.popular

    def attribute(self, name: str) -> Attribute:
        """The attribute of that name."""
        return next(attribute for attribute in self.attributes if attribute.name == name)


def listed(text: str) -> tuple[str, ...]:
    """Values written in one string, divided by semicolons."""
    return tuple(text.split("; "))


def own_slot(text: str, attribute: str) -> str:
    """{v} and {V} written out as the attribute's slot."""
    return text.replace("{v}", f"{{{attribute}}}").replace("{V}", f"{{{capitalised(attribute)}}}")


@lru_cache(maxsize=4096)
def slots_of(text: str) -> tuple[str, ...]:
    """Slots of a sentence in order."""
    return tuple(_SLOT.findall(text))


@lru_cache(maxsize=4096)
def attributes_of(text: str) -> tuple[str, ...]:
    """Attributes that a sentence states, in order."""
    return tuple(slot[0].lower() + slot[1:] for slot in slots_of(text) if slot not in _SUBJECT_SLOTS)


@lru_cache(maxsize=4096)
def subject_slots_of(text: str) -> tuple[str, ...]:
    """Slots of the subject in a sentence, in order."""
    return tuple(slot for slot in slots_of(text) if slot in _SUBJECT_SLOTS)


def of_split(wordings: tuple[str, ...], split: str) -> tuple[str, ...]:
    """The half of the wordings that belongs to validation or to test."""
    half = len(wordings) // 2
    return wordings[:half] if split == "validation" else wordings[half:]


def capitalised(text: str) -> str:
    """The text with a capital at its beginning, the rest as it is."""
    return text[:1].upper() + text[1:]
