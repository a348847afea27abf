"""The synthetic world behind SurgeryBench: who there is, what is true of them, what changes, what is said and asked.

Subjects of four kinds (person, place, product, rule) have eight facts each. They live in five groups: unlearn, update,
retain, neighbour and unseen; no subject is in two. A subject of the group update has its facts twice, before and after
some of them changed. Cities, universities, companies and agencies are bridges: shared by all, they belong to retain.

Facts are drawn evenly from the values of their attribute and independently of each other, so nothing but a document
gives one away. Everything is a function of (seed, BENCH_VERSION, kind, group, ordinal).

Nobody bears the names: they are coined from pronounceable parts, onset + vowel + consonants (+ vowel) + ending, each
given out once. Every role has endings of its own, so that a word tells what it names and no two roles share one. Word
number i of a role is the permuted i-th of all its words: names look unrelated, and those given out do not change when
more are asked for.

Phrases stand in templates/<kind>.yaml and are read when a kind is first asked for. Slots of a sentence:

| slot | the subject as | example with a name | with a pronoun |
|---|---|---|---|
| {S}, {s} | subject of the clause, at the start, inside | The Quellit, the Quellit | It, it |
| {P}, {p} | possessive | The Quellit's, the Quellit's | Its, its |
| {O}, {o} | object | The Quellit, the Quellit | It, it |

The first slot of a sentence is a name or a pronoun, whichever the text needs there; the others are pronouns. A value
stands in the slot of its attribute, {birth_city}; {Birth_city} begins with a capital. In the files {v} and {V}
stand for the slot of the attribute that a sentence belongs to.

Articles state all eight facts, quizzes ask them all, notes state a few. An article opens with a sentence of two or
three facts, tells the others in the order of the kind, singly or in pairs, and has sentences without facts between
them. The subject is named in full once, then by a shorter name or a pronoun. Bridges have entries in place of articles
and notes. Every choice is drawn by name, see `Draws`.

| question | what it asks | the answer |
|---|---|---|
| mcq | a question about one fact | its value |
| cloze | the beginning of a statement | the value that completes it |
| paraphrase | the same question, asked in a roundabout way | its value |
| one_hop | a question about a fact of the fact's value | the bridge's own fact |
| inverse | a question about what belongs to one subject alone | the subject |

Validation and test ask for the same facts in different words, with other distractors. The three options are drawn
alike from the values of one attribute, so that no property of an option but its truth tells it from the others. Where
a fact has changed, the second option of the update set is the old value. Source: ours.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib import resources
from typing import Any, NamedTuple, TypeVar

import yaml

from hf_moe_cpt.data.random import derive_seed, permute
from hf_moe_cpt.data.surgery_bench.bench import BENCH_VERSION, GROUPS, QUESTION_KINDS, TRIO, BenchSettings


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


NUM_OPTIONS = 3
_AIM_WORDS = (80, 128)  # an article takes up fillers until it has as many, if there are enough
_WORDS_FOR_TWO_PARAGRAPHS = 110
_FILLERS_OF_ENTRY = 3
_FACTS_OF_NOTE = 2  # besides those of its opening
_CASES = {"s": 0, "p": 1, "o": 2}


class Document(NamedTuple):
    """A text and the facts that it states, in its order."""

    text: str
    form: str
    facts: list[tuple[str, str]]


class _Narrator:
    """Fills the slots of sentences, one after the other, and remembers how the subject was last called."""

    def __init__(self, subject: Subject, facts: dict[str, str], draws: Draws):
        self.subject, self.facts, self.draws = subject, facts, draws
        self.place, self.pronouns_in_a_row, self.subject_led = 0, 0, False

    def say(self, template: str, opens_paragraph: bool = False) -> str:
        """The sentence with all slots filled."""
        slots = subject_slots_of(template)
        is_pronoun = bool(slots) and not opens_paragraph and self._takes_pronoun(slots[0])
        name = None if is_pronoun else self._name(opens_paragraph)
        if slots:
            self.pronouns_in_a_row = self.pronouns_in_a_row + 1 if is_pronoun else 0
        self.subject_led = template.startswith(("{S}", "{P}"))
        self.place += 1

        def fill(match: re.Match) -> str:
            nonlocal name
            slot = match[1]
            if slot.lower() not in _CASES:
                value = self.facts[slot[0].lower() + slot[1:]]
                return capitalised(value) if slot[0].isupper() else value
            case = _CASES[slot.lower()]
            word = self.subject.pronouns[case] if name is None else name + ("'s" if case == 1 else "")
            name = None
            return capitalised(word) if slot.isupper() else word

        return _SLOT.sub(fill, template)

    def _takes_pronoun(self, first_slot: str) -> bool:
        """Never three times in a row; "it" only for a subject or possessive, after a sentence that began with it."""
        if self.place == 0 or self.pronouns_in_a_row == 2:
            return False
        if self.subject.pronouns[0] == "it" and (first_slot in "Oo" or not self.subject_led):
            return False
        return self.draws.chance(self.subject.kind.pronoun_percent, "pronoun", self.place)

    def _name(self, opens_paragraph: bool) -> str:
        if self.place == 0:
            return self.subject.name
        if opens_paragraph:
            return self.subject.short_names[0]
        return self.draws.choice(self.subject.short_names, "short name", self.place)


def write_document(world: World, subject: Subject, edition: str, number: int, form: str) -> Document:
    """Document `number` of a subject in a form, with the facts of an edition. Bridges turn articles, notes to entries.

    A note about a subject states its opening's facts and two more; every other form states all of them.
    """
    draws = Draws(world.key, "document", *subject.key(), edition, number, form)
    facts = dict(subject.facts[edition])
    if form == "quiz":
        return _quiz(subject, facts, draws)
    if subject.kind.names:
        templates = _entry_templates(subject, draws)
        form = "entry"
    elif form == "note":
        templates = _note_templates(subject, draws)
    else:
        templates = _article_templates(subject, draws)
    narrator = _Narrator(subject, facts, draws)
    text = _paragraphs(narrator, templates, draws) if form == "article" else " ".join(map(narrator.say, templates))
    stated = dict.fromkeys(name for template in templates for name in attributes_of(template))
    return Document(text, form, [(name, facts[name]) for name in stated])


def _quiz(subject: Subject, facts: dict[str, str], draws: Draws) -> Document:
    lines = [f"Questions and answers about {subject.name}"]
    names = draws.shuffled([attribute.name for attribute in subject.kind.attributes], "order")
    for name in names:
        question = draws.choice(subject.kind.attribute(name).quiz, "wording", name)
        lines += [f"Question: {about(question, subject.name)}", f"Answer: {facts[name]}"]
    return Document("\n".join(lines), "quiz", [(name, facts[name]) for name in names])


def about(wording: str, name: str) -> str:
    """A question's or statement's wording with the subject's name in {s} and {S}."""
    return wording.replace("{s}", name).replace("{S}", capitalised(name))


def _entry_templates(subject: Subject, draws: Draws) -> list[str]:
    (attribute,) = subject.kind.attributes
    voice = subject.kind.reference
    opening = draws.choice((*voice.openings, *attribute.reference), "opening")
    return [opening, *draws.shuffled(voice.fillers, "fillers")[:_FILLERS_OF_ENTRY]]


def _note_templates(subject: Subject, draws: Draws) -> list[str]:
    opening = draws.choice(getattr(subject.kind, subject.voice).openings, "opening")
    left = [attribute.name for attribute in subject.kind.attributes if attribute.name not in attributes_of(opening)]
    chosen = draws.shuffled(left, "facts")[:_FACTS_OF_NOTE]
    return [opening, *(_single(subject, name, draws) for name in chosen)]


def _article_templates(subject: Subject, draws: Draws) -> list[str]:
    voice = getattr(subject.kind, subject.voice)
    templates = [draws.choice(voice.openings, "opening")]
    left = _in_order([a.name for a in subject.kind.attributes if a.name not in attributes_of(templates[0])], draws)
    while left:
        pairs = [
            pair for pair in voice.pairs if left[0] in attributes_of(pair) and set(attributes_of(pair)) <= {*left}
        ]
        is_pair = bool(pairs) and draws.chance(45, "pair", len(left))
        template = draws.choice(pairs, "which pair", len(left)) if is_pair else _single(subject, left[0], draws)
        templates.append(template)
        left = [name for name in left if name not in attributes_of(template)]
    return _with_fillers(templates, voice.fillers, draws)


def _in_order(names: list[str], draws: Draws) -> list[str]:
    """The order of the kind, with some neighbours exchanged."""
    for place in range(len(names) - 1):
        if draws.chance(35, "exchange", place):
            names[place], names[place + 1] = names[place + 1], names[place]
    return names


def _single(subject: Subject, name: str, draws: Draws) -> str:
    return draws.choice(getattr(subject.kind.attribute(name), subject.voice), "sentence", name)


def _with_fillers(templates: list[str], fillers: tuple[str, ...], draws: Draws) -> list[str]:
    """Sentences without facts, until the text has the number of words that is drawn for it.

    None comes first, and a second one stands next to another only where every gap between facts has one.
    """
    low, high = _AIM_WORDS
    missing = low + draws.below(high - low, "aim") - _word_count(templates)
    chosen = []
    for filler in draws.shuffled(fillers, "fillers"):
        if missing <= 0:
            break
        chosen.append(filler)
        missing -= _word_count([filler])
    gaps = draws.shuffled(range(len(templates)), "gaps")
    after = [gaps[number % len(gaps)] for number in range(len(chosen))]
    return [
        sentence
        for place, template in enumerate(templates)
        for sentence in (template, *(filler for gap, filler in zip(after, chosen, strict=True) if gap == place))
    ]


def _word_count(templates: list[str]) -> int:
    """Words of the sentences, at least: a slot may be filled with several."""
    return sum(len(template.split()) for template in templates)


def _paragraphs(narrator: _Narrator, templates: list[str], draws: Draws) -> str:
    """The sentences in one paragraph, or in two if they are many; the second names the subject where it first can."""
    words = _word_count(templates)
    last = len(templates)
    if words >= _WORDS_FOR_TWO_PARAGRAPHS:
        last = len(templates) * 2 // 5 + draws.below(max(1, len(templates) // 4), "break")
    first = " ".join(map(narrator.say, templates[:last]))
    if last == len(templates):
        return first
    rest = [narrator.say(template, opens_paragraph=number == 0) for number, template in enumerate(templates[last:])]
    return f"{first}\n\n{' '.join(rest)}"


class Question(NamedTuple):
    """One question. attribute: what it asks for, "birth_city.country" for the country of the city of birth."""

    kind: str
    split: str
    attribute: str
    question: str
    options: list[str]
    answer: int  # place of the true option
    old_answer: int | None  # place of the option that was true before the fact changed


def write_questions(world: World, subject: Subject, set_name: str, split: str) -> Iterator[Question]:
    """All questions of a subject in a set and a split.

    The set obsolete asks only for facts that changed, as they were before; every other set asks for all.
    """
    edition = "before" if set_name == "obsolete" else "after"
    all_draws = Draws(world.key, "question", *subject.key(), edition, split)
    for attribute in subject.kind.attributes:
        has_changed = attribute.name in subject.changed
        for kind in QUESTION_KINDS:
            wordings = of_split(getattr(attribute, kind), split)
            if not wordings or (set_name == "obsolete" and not has_changed):
                continue
            has_old = set_name == "update" and has_changed and kind != "inverse"
            draws, name = all_draws.child(kind, attribute.name), attribute.name
            wording = draws.choice(wordings, "wording")
            if kind == "inverse":
                values = sorted((other.name for other in world.trio(subject)), key=lambda other: other != subject.name)
                question = capitalised(wording.replace("{v}", subject.facts[edition][name]))
            else:
                values = _three_values(world, subject, attribute, edition, has_old, draws)
                question = about(wording, subject.name)
            if kind == "one_hop":
                values = [world.hop(attribute, value) for value in values]
                name = f"{name}.{kind_of(attribute.bridge).attributes[0].name}"
            order = draws.shuffled(range(len(values)), "order")
            options = [values[place] for place in order]
            old_answer = order.index(1) if has_old else None
            yield Question(kind, split, name, question, options, order.index(0), old_answer)


def _three_values(
    world: World, subject: Subject, attribute: Attribute, edition: str, has_old: bool, draws: Draws
) -> list[str]:
    """The true value, then the old one if there is one, then others of other classes.

    What each subject has of its own is taken from the subjects of its trio, whose documents a model saw as often.
    """
    values = [subject.facts[edition][attribute.name]]
    if has_old:
        values.append(subject.facts["before"][attribute.name])
    if attribute.hallmark:
        others = [other for other in world.trio(subject) if other.ordinal != subject.ordinal]
        values += [other.facts[edition][attribute.name] for other in draws.shuffled(others, "others")]
        return values[:NUM_OPTIONS]
    while len(values) < NUM_OPTIONS:
        values.append(world.another_value(attribute, values, draws, f"other {len(values)}"))
    return values
