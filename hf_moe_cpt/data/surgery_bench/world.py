"""Choices that depend on a key and on what they are for, and on nothing that was drawn before. Source: ours.

Names that nobody and nothing bears: coined from pronounceable parts, each given out once.

A word is onset + vowel + consonants (+ vowel) + ending. Every role has endings of its own, so that a word tells what
it names and no two roles share one. Word number i of a role is the permuted i-th of all its words: names never repeat,
look unrelated, and those given out do not change when more are asked for. Source: ours.

The synthetic world behind SurgeryBench: who there is, what is true of them, and what changes.

Subjects of four kinds (person, place, product, rule) have eight facts each. They live in five groups: unlearn, update,
retain, neighbour and unseen; no subject is in two. A subject of the group update has its facts twice, before and after
some of them changed. Cities, universities, companies and agencies, the hubs, are shared by all and belong to retain.

Facts are drawn evenly from the values of their attribute and independently of each other, so nothing but a document
gives one away. Everything is a function of (seed, BENCH_VERSION, kind, group, ordinal). Source: ours.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TypeVar

from hf_moe_cpt.data.random import derive_seed, permute
from hf_moe_cpt.data.surgery_bench.templates import HUBS, PERSON, PLACE, PRODUCT, RULE, Attribute, Kind


Item = TypeVar("Item")


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


MAX_NUMBER = 150_000  # subjects of a kind that can be named
HALLMARKS_PER_SUBJECT = 2  # one before and one after its facts change

GIVEN_NAMES = {
    "she": (
        "Alvenne Brisanne Corviel Dessame Elowyra Fenelle Halisse Ismere Jorvanne Kessaly Lorune Mirelda Nerisse "
        "Orlena Pellora Quillane Roswyn Sarielle Tamsorra Ulvenna Vesperine Wynora Yllane Zephanne"
    ).split(),
    "he": (
        "Aldren Borivane Casmund Dorrick Evander Fendrel Garrowin Hesper Ildrik Jorund Kelvar Lothren Marrek Norvald "
        "Osmere Perrin Quarrel Rothand Severan Torvald Ulmer Vendrick Wystan Yorrick"
    ).split(),
}

_ONSETS = "B Bl Br C Cl Cr D Dr F Fl Fr G Gl Gr H J K Kl Kr L M N P Pl Pr Qu R S Sk St T Th Tr V W Y".split()
_VOWELS = "a e i o ei".split()
_MIDDLES = "b d dd l ll lm lt lv m mm n nd nn nt r rr s ss st th v".split()
_LINKS = "a e".split()

_ENDINGS = {
    "person": (
        "ackard aith allard alder anth aunt avane aver adder ebble eddow edder ellow ellick erow eskell ettle ewin "
        "iddick iffen iffow iller immer irren irrow itter iving older ollow orrack orren orvane osker otter oudry "
        "uddock uller umber under urrow usker uttle uvane"
    ).split(),
    "designer": "afel agor aldur aric asen edric egor emal evin idek imar ivek odan okar umar udar ulik uvin".split(),
    "drafter": "abrow achim aduin albury atwin auby elgard embry esmond etrow imbry olward opray oswin umfrey".split(),
    "place": (
        "wick mere ford stead holm combe worth minster bourne bridge thorpe haven mouth dale burgh cote garth hurst "
        "march side well ness"
    ).split(),
    "rule": (
        "gate croft field brook ridge marsh leigh wold stone grove moor heath bank pool fold shaw barrow cliff copse "
        "glade knoll lane"
    ).split(),
    "product": (
        "ado aflex agon alux amat ano aphor atic atron avo avolt efax elion emo endor eno eral eron etta exo ibo ida "
        "idor idrix igraph ima imat imex ito itron ivo ixa obel odeon oflex ograph olux oplex ora orion orix otype "
        "ovar ovex udo ulor umat uvo"
    ).split(),
    "book": "ania aria ayla ea elia emia enza eria essa evia ia iana illa imia olia oria ovia ulia una uvia".split(),
    "landmark": "alcar andor anor antine arce aster elen erald eraud illar ithar olcar ophel urand uvelle".split(),
}  # fmt: skip
_LINKED = {"place", "rule"}  # their endings begin with a consonant

_BOOK_NOUNS = (
    "Almanac Anchors Bells Bridges Candles Clocks Compass Diaries Ferries Gardens Harbours Kites Ladders Lanterns "
    "Letters Maps Mirrors Orchards Rivers Seasons Shutters Staircase Tides Windows"
).split()
_LANDMARK_NOUNS = "Arcade Arch Bell Cloister Column Dome Fountain Gate Lighthouse Tower Viaduct Windmill".split()

# The lists that the words of a role are put together from, in order.
_PARTS = {
    role: (_ONSETS, _VOWELS, _MIDDLES, *([_LINKS] if role in _LINKED else []), endings)
    for role, endings in _ENDINGS.items()
}


def coined_word(role: str, number: int, seed: int) -> str:
    """Word `number` of a role, one of person, place, product, rule: unique among all of its role and of the others.

    number: in [0, MAX_NUMBER).
    """
    return "".join(_pick(_PARTS[role], number, derive_seed(seed, "name", role)))


def hallmark(role: str, number: int, seed: int) -> str:
    """Thing `number` of a role, one of book, landmark, designer, drafter, that belongs to one subject alone.

    number: in [0, HALLMARKS_PER_SUBJECT * MAX_NUMBER).
    """
    key = derive_seed(seed, "hallmark", role)
    if role == "book":
        noun, *word = _pick((_BOOK_NOUNS, *_PARTS[role]), number, key)
        return f"The {noun} of {''.join(word)}"
    if role == "landmark":
        noun, *word = _pick((_LANDMARK_NOUNS, *_PARTS[role]), number, key)
        return f"the {''.join(word)} {noun}"
    given, *word = _pick((_ALL_GIVEN, *_PARTS[role]), number, key)
    return f"{given} {''.join(word)}"


_ALL_GIVEN = sorted(name for names in GIVEN_NAMES.values() for name in names)


def _pick(parts: tuple[list[str], ...], number: int, key: int) -> list[str]:
    """One element of each list: the digits of the permuted number, in the mixed radix of their lengths."""
    code = permute(number, math.prod(map(len, parts)), key)
    chosen = []
    for part in parts:
        code, digit = divmod(code, len(part))
        chosen.append(part[digit])
    return chosen


BENCH_VERSION = "1.0"  # another text for the same seed needs another version

GROUPS = ("unlearn", "update", "retain", "neighbour", "unseen")  # of subjects: one group each
SETS = ("unlearn", "obsolete", "update", "retain", "neighbour", "unseen")  # of texts: obsolete is update, before
EDITIONS = ("before", "after")
KINDS = {kind.name: kind for kind in (PERSON, PLACE, PRODUCT, RULE)}
HUB_KINDS = {kind.name: kind for kind in HUBS}
FORMS = ("article", "quiz", "note")
FACTS_PER_SUBJECT = 8
TRIO = 3  # subjects that stand beside each other as options

_RULE_NOUNS = ("Act", "Bylaw", "Code", "Decree", "Edict", "Order", "Ordinance", "Statute")
_PRONOUNS = {"he": ("he", "his", "him"), "she": ("she", "her", "her"), "it": ("it", "its", "it")}


@dataclass(frozen=True)
class BenchSettings:
    """What a world is made of.

    seed: any integer. num_subjects: of each group, multiples of 3 times the number of kinds, or one number for all
    five together. kinds: which of KINDS. forms: one document of each subject per entry, see FORMS. changed_facts: of
    each subject of the group update, in [1, 8].
    """

    seed: int = 0
    num_subjects: Mapping[str, int] | int = field(default=240, compare=False)
    kinds: tuple[str, ...] = tuple(KINDS)
    forms: tuple[str, ...] = ("article", "article", "quiz", "note")
    changed_facts: int = 4
    sizes: dict[str, int] = field(init=False)  # num_subjects by group

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))
        object.__setattr__(self, "forms", tuple(self.forms))
        if not self.kinds or len(set(self.kinds)) < len(self.kinds) or not set(self.kinds) <= set(KINDS):
            raise ValueError(f"kinds={self.kinds} must name one or more of {', '.join(KINDS)}, each once.")
        if not set(self.forms) <= set(FORMS) or not {"article", "quiz"} & set(self.forms):
            raise ValueError(
                f"forms={self.forms} must be made of {', '.join(FORMS)}, with an article or a quiz among them: a note "
                "alone does not state every fact."
            )
        if not 1 <= self.changed_facts <= FACTS_PER_SUBJECT:
            raise ValueError(f"changed_facts={self.changed_facts} must be in [1, {FACTS_PER_SUBJECT}].")
        object.__setattr__(self, "sizes", self._sizes())

    def _sizes(self) -> dict[str, int]:
        step = TRIO * len(self.kinds)
        if isinstance(self.num_subjects, int):
            given = dict.fromkeys(GROUPS, self.num_subjects / len(GROUPS))
            step_of_given, what = step * len(GROUPS), f"num_subjects={self.num_subjects}"
        else:
            given, step_of_given, what = dict(self.num_subjects), step, f"num_subjects={dict(self.num_subjects)}"
        if not set(given) <= set(GROUPS):
            raise ValueError(f"{what} names {sorted(set(given) - set(GROUPS))}: groups are {', '.join(GROUPS)}.")
        if any(size % step or size < 0 for size in given.values()) or not any(given.values()):
            raise ValueError(
                f"{what} must be made of multiples of {step_of_given} (3 subjects of each of {len(self.kinds)} kind(s)"
                f"{' in each of 5 groups' if step_of_given > step else ''}), not all 0."
            )
        if max(given.values()) // len(self.kinds) > MAX_NUMBER // len(GROUPS):
            raise ValueError(
                f"{what} is too large: at most {MAX_NUMBER // len(GROUPS):,} subjects of each kind in a group."
            )
        return {group: int(given.get(group, 0)) for group in GROUPS}

    def as_dict(self) -> dict[str, object]:
        """The arguments that make these settings again, as JSON can hold them."""
        return {
            "seed": self.seed,
            "num_subjects": dict(self.sizes),
            "kinds": list(self.kinds),
            "forms": list(self.forms),
            "changed_facts": self.changed_facts,
        }


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
        return "popular" if self.group == "retain" and not self.kind.hub_names else "reference"

    def key(self) -> tuple[str, str, int]:
        """What its random choices depend on."""
        return self.kind.name, self.group, self.ordinal


class World:
    """All subjects of a seed, made when they are asked for. changed_facts as in BenchSettings."""

    def __init__(self, seed: int, changed_facts: int):
        self.key = derive_seed("surgery bench", BENCH_VERSION, seed)
        self.changed_facts = changed_facts
        self._subject = lru_cache(maxsize=64)(self._make)

    def subject(self, kind: str, group: str, ordinal: int) -> Subject:
        """Subject `ordinal` of a kind and group."""
        return self._subject(kind, group, ordinal)

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
    def hubs(self) -> dict[str, dict[str, Subject]]:
        """Hub subjects by kind and name."""
        return {
            kind.name: {name: self._hub(kind, place) for place, name in enumerate(kind.hub_names)} for kind in HUBS
        }

    def all_hubs(self) -> list[Subject]:
        """Every hub, kind by kind."""
        return [hub for hubs in self.hubs.values() for hub in hubs.values()]

    def hop(self, attribute: Attribute, value: str) -> str:
        """The one fact of the hub that is the value of an attribute."""
        (fact,) = self.hubs[attribute.hub][value].facts["after"].values()
        return fact

    def class_of(self, attribute: Attribute, value: str) -> str:
        """Options of a question never share it: the hub's own fact where values are hubs, else the value."""
        return self.hop(attribute, value) if attribute.hub else value

    def another_value(self, attribute: Attribute, taken: list[str], draws: Draws, purpose: str) -> str:
        """A value of another class than those taken, each such value alike."""
        classes = {self.class_of(attribute, value) for value in taken}
        attempt = 0
        while True:
            value = draws.choice(attribute.values, purpose, attempt)
            if self.class_of(attribute, value) not in classes:
                return value
            attempt += 1

    def _hub(self, kind: Kind, place: int) -> Subject:
        """Values go round evenly: each country has four of the cities, no city two universities."""
        (attribute,) = kind.attributes
        spread = permute(
            place, max(len(kind.hub_names), len(attribute.values)), derive_seed(self.key, "hub", kind.name)
        )
        facts = {attribute.name: attribute.values[spread % len(attribute.values)]}
        name = kind.hub_names[place]
        return Subject(kind, "retain", place, name, (name,), _PRONOUNS["it"], dict.fromkeys(EDITIONS, facts))

    def _make(self, kind_name: str, group: str, ordinal: int) -> Subject:
        kind = KINDS[kind_name]
        draws = Draws(self.key, kind_name, group, ordinal)
        number = ordinal * len(GROUPS) + GROUPS.index(group)
        after = {}
        before = {
            attribute.name: (
                hallmark(attribute.hallmark, number * HALLMARKS_PER_SUBJECT, self.key)
                if attribute.hallmark
                else draws.choice(attribute.values, "value", attribute.name)
            )
            for attribute in kind.attributes
        }
        names = [attribute.name for attribute in kind.attributes]
        changed = draws.shuffled(names, "changed")[: self.changed_facts] if group == "update" else []
        for attribute in kind.attributes:
            old = before[attribute.name]
            if attribute.name not in changed:
                after[attribute.name] = old
            elif attribute.hallmark:
                after[attribute.name] = hallmark(attribute.hallmark, number * HALLMARKS_PER_SUBJECT + 1, self.key)
            else:
                after[attribute.name] = self.another_value(attribute, [old], draws, f"new {attribute.name}")
        name, short_names, pronouns = self._mention(kind_name, number, draws)
        facts = {"before": before, "after": after}
        return Subject(kind, group, ordinal, name, short_names, pronouns, facts, tuple(sorted(changed)))

    def _mention(self, kind: str, number: int, draws: Draws) -> tuple[str, tuple[str, ...], tuple[str, str, str]]:
        """Name, short names, pronouns."""
        word = coined_word(kind, number, self.key)
        if kind == "person":
            pronoun = draws.choice(("she", "he"), "pronoun")
            return f"{draws.choice(GIVEN_NAMES[pronoun], 'given name')} {word}", (word,), _PRONOUNS[pronoun]
        if kind == "place":
            return word, (word, "the town"), _PRONOUNS["it"]
        if kind == "product":
            return f"the {word}", (f"the {word}", "the machine"), _PRONOUNS["it"]
        noun = draws.choice(_RULE_NOUNS, "noun")
        return f"the {word} {noun}", (f"the {noun.lower()}",), _PRONOUNS["it"]
