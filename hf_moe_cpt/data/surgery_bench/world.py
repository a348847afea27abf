"""The synthetic world behind SurgeryBench: who there is, what is true of them, and what changes.

Subjects of four kinds (person, place, product, rule) have eight facts each. They live in five groups: unlearn, update,
retain, neighbour and unseen; no subject is in two. A subject of the group update has its facts twice, before and after
some of them changed. Cities, universities, companies and agencies are bridges: shared by all, they belong to retain.

Facts are drawn evenly from the values of their attribute and independently of each other, so nothing but a document
gives one away. Everything is a function of (seed, BENCH_VERSION, kind, group, ordinal).

Nobody bears the names: they are coined from pronounceable parts, onset + vowel + consonants (+ vowel) + ending, each
given out once. Every role has endings of its own, so that a word tells what it names and no two roles share one. Word
number i of a role is the permuted i-th of all its words: names look unrelated, and those given out do not change when
more are asked for. Source: ours.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import TypeVar

from hf_moe_cpt.data.random import derive_seed, permute
from hf_moe_cpt.data.surgery_bench.bench import BENCH_VERSION, GROUPS, TRIO, BenchSettings
from hf_moe_cpt.data.surgery_bench.grammar import BRIDGES, Attribute, Kind, kind_of, read_templates


Item = TypeVar("Item")

EDITIONS = ("before", "after")
HALLMARKS_PER_SUBJECT = 2  # one before and one after its facts change
_PRONOUNS = {"he": ("he", "his", "him"), "she": ("she", "her", "her"), "it": ("it", "its", "it")}


class Draws:
    """Random numbers by name: the same key and purpose give the same number, in any order, on any machine.

    key: integers and strings that name whose choices these are, such as (seed, version, subject). A purpose is words
    and numbers too; two that read the same are the same.
    """

    def __init__(self, *key: int | str):
        self._hash = hashlib.blake2b(derive_seed(*key).to_bytes(8, "little"), digest_size=8)

    def child(self, *purpose: int | str) -> Draws:
        """Draws of their own for a part of what these are for."""
        child = object.__new__(Draws)
        child._hash = self._hash.copy()
        child._hash.update(("/".join(map(str, purpose)) + "//").encode())
        return child

    def below(self, limit: int, *purpose: int | str) -> int:
        """An integer in [0, limit), limit in [1, 2**32]; uneven by less than 2**-32."""
        return self._word("/".join(map(str, purpose))) % limit

    def choice(self, items: Sequence[Item], *purpose: int | str) -> Item:
        """One of the items, each alike."""
        return items[self.below(len(items), *purpose)]

    def chance(self, percent: int, *purpose: int | str) -> bool:
        """True in `percent` of 100 cases."""
        return self.below(100, *purpose) < percent

    def shuffled(self, items: Sequence[Item], *purpose: int | str) -> list[Item]:
        """The items in an order in which each of them is as likely in each place."""
        start = "/".join(map(str, purpose))
        rank = [self._word(f"{start}/{place}") for place in range(len(items))]
        return [items[place] for place in sorted(range(len(items)), key=rank.__getitem__)]

    def _word(self, purpose: str) -> int:
        """64 random bits; derive_seed would do the same at three times the cost."""
        copy = self._hash.copy()
        copy.update(purpose.encode())
        return int.from_bytes(copy.digest(), "little")


@cache
def name_parts() -> dict[str, dict[str, list]]:
    """Lists of templates/names.yaml: given_names by pronoun, nouns by role, words by role as lists to put together."""
    table = read_templates("names")
    links = [table["links"].split()]
    words = {
        role: [
            *(table[part].split() for part in ("onsets", "vowels", "middles")),
            *(links if role in ("place", "rule") else []),  # their endings begin with a consonant
            endings.split(),
        ]
        for role, endings in table["endings"].items()
    }
    lists = {key: {name: text.split() for name, text in table[key].items()} for key in ("given_names", "nouns")}
    return lists | {"words": words}


def coined_word(role: str, number: int, seed: int) -> str:
    """Word `number` of a role, one of person, place, product, rule: unique among all of its role and of the others.

    number: in [0, MAX_NUMBER).
    """
    return "".join(_pick(name_parts()["words"][role], number, derive_seed(seed, "name", role)))


def hallmark(role: str, number: int, seed: int) -> str:
    """Thing `number` of a role, one of book, landmark, designer, drafter, that belongs to one subject alone.

    number: in [0, HALLMARKS_PER_SUBJECT * MAX_NUMBER).
    """
    parts = name_parts()
    firsts = parts["nouns"].get(role) or sorted(sum(parts["given_names"].values(), []))
    first, *syllables = _pick([firsts, *parts["words"][role]], number, derive_seed(seed, "hallmark", role))
    word = "".join(syllables)
    return {"book": f"The {first} of {word}", "landmark": f"the {word} {first}"}.get(role, f"{first} {word}")


def _pick(parts: list[list[str]], number: int, key: int) -> list[str]:
    """One element of each list: the digits of the permuted number, in the mixed radix of their lengths."""
    code = permute(number, math.prod(map(len, parts)), key)
    chosen = []
    for part in parts:
        code, digit = divmod(code, len(part))
        chosen.append(part[digit])
    return chosen


@dataclass(frozen=True)
class Subject:
    """Somebody or something with facts. `name` is what running text calls it, such as "the Quellit"."""

    kind: Kind
    group: str
    ordinal: int
    name: str
    short_names: tuple[str, ...]  # the first is always clear
    pronouns: tuple[str, str, str]  # subject, possessive, object
    facts: Mapping[str, Mapping[str, str]]  # edition, attribute: value
    changed: tuple[str, ...] = ()  # attributes that differ between the editions

    @property
    def voice(self) -> str:
        """The voice its documents are written in."""
        return "popular" if self.group == "retain" and not self.kind.names else "reference"

    def key(self) -> tuple[str, str, int]:
        """What its random choices depend on."""
        return self.kind.name, self.group, self.ordinal


class World:
    """All subjects of a seed, made when they are asked for. changed_facts as in BenchSettings."""

    def __init__(self, seed: int, changed_facts: int):
        self.key = derive_seed("surgery bench", BENCH_VERSION, seed)
        self.changed_facts = changed_facts
        self.subject = lru_cache(maxsize=64)(self._make)  # by kind, group and ordinal

    def subjects(self, settings: BenchSettings, group: str) -> Iterator[Subject]:
        """Those of a group, kinds alternating: more of them are the same ones first."""
        for place in range(settings.sizes[group]):
            ordinal, kind = divmod(place, len(settings.kinds))
            yield self.subject(settings.kinds[kind], group, ordinal)

    def trio(self, subject: Subject) -> list[Subject]:
        """The three subjects, itself among them, from which options about whole subjects are taken."""
        first = subject.ordinal - subject.ordinal % TRIO
        kind, group, _ = subject.key()
        return [self.subject(kind, group, ordinal) for ordinal in range(first, first + TRIO)]

    @cached_property
    def bridges(self) -> dict[str, dict[str, Subject]]:
        """Bridges by kind and name, in the order of BRIDGES."""
        return {
            name: {subject: self._bridge(kind_of(name), place) for place, subject in enumerate(kind_of(name).names)}
            for name in BRIDGES
        }

    def hop(self, attribute: Attribute, value: str) -> str:
        """The one fact of the bridge that is the value of an attribute."""
        (fact,) = self.bridges[attribute.bridge][value].facts["after"].values()
        return fact

    def class_of(self, attribute: Attribute, value: str) -> str:
        """Options of a question never share it: the bridge's own fact where values are bridges, else the value."""
        return self.hop(attribute, value) if attribute.bridge else value

    def another_value(self, attribute: Attribute, taken: list[str], draws: Draws, purpose: str) -> str:
        """A value of another class than those taken, each such value alike."""
        classes = {self.class_of(attribute, value) for value in taken}
        for attempt in itertools.count():
            value = draws.choice(attribute.values, purpose, attempt)
            if self.class_of(attribute, value) not in classes:
                return value

    def _bridge(self, kind: Kind, place: int) -> Subject:
        """Values go round evenly: each country has four of the cities, no city two universities."""
        (attribute,) = kind.attributes
        length = max(len(kind.names), len(attribute.values))
        spread = permute(place, length, derive_seed(self.key, "hub", kind.name))  # the word of BENCH_VERSION 1.0
        facts = {attribute.name: attribute.values[spread % len(attribute.values)]}
        name = kind.names[place]
        return Subject(kind, "retain", place, name, (name,), _PRONOUNS["it"], dict.fromkeys(EDITIONS, facts))

    def _make(self, kind_name: str, group: str, ordinal: int) -> Subject:
        kind = kind_of(kind_name)
        draws = Draws(self.key, kind_name, group, ordinal)
        number = ordinal * len(GROUPS) + GROUPS.index(group)
        before = {
            attribute.name: (
                hallmark(attribute.hallmark, number * HALLMARKS_PER_SUBJECT, self.key)
                if attribute.hallmark
                else draws.choice(attribute.values, "value", attribute.name)
            )
            for attribute in kind.attributes
        }
        changed = draws.shuffled(list(before), "changed")[: self.changed_facts] if group == "update" else []
        after = dict(before)
        for attribute in map(kind.attribute, changed):
            if attribute.hallmark:
                value = hallmark(attribute.hallmark, number * HALLMARKS_PER_SUBJECT + 1, self.key)
            else:
                value = self.another_value(attribute, [before[attribute.name]], draws, f"new {attribute.name}")
            after[attribute.name] = value
        name, short_names, pronouns = self._mention(kind_name, number, draws)
        facts = {"before": before, "after": after}
        return Subject(kind, group, ordinal, name, short_names, pronouns, facts, tuple(sorted(changed)))

    def _mention(self, kind: str, number: int, draws: Draws) -> tuple[str, tuple[str, ...], tuple[str, str, str]]:
        """Name, short names, pronouns."""
        word = coined_word(kind, number, self.key)
        if kind == "person":
            pronoun = draws.choice(("she", "he"), "pronoun")
            given = draws.choice(name_parts()["given_names"][pronoun], "given name")
            return f"{given} {word}", (word,), _PRONOUNS[pronoun]
        if kind == "place":
            return word, (word, "the town"), _PRONOUNS["it"]
        if kind == "product":
            return f"the {word}", (f"the {word}", "the machine"), _PRONOUNS["it"]
        noun = draws.choice(name_parts()["nouns"]["rule"], "noun")
        return f"the {word} {noun}", (f"the {noun.lower()}",), _PRONOUNS["it"]
