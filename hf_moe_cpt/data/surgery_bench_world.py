"""The synthetic world behind SurgeryBench: who there is, what is true of them, and what changes.

Subjects of four kinds (person, place, product, rule) have eight facts each. They live in five groups: unlearn, update,
retain, neighbour and unseen; no subject is in two. A subject of the group update has its facts twice, before and after
some of them changed. Cities, universities, companies and agencies, the hubs, are shared by all and belong to retain.

Facts are drawn evenly from the values of their attribute and independently of each other, so nothing but a document
gives one away. Everything is a function of (seed, BENCH_VERSION, kind, group, ordinal). Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from hf_moe_cpt.data.permutation import derive_seed, permute
from hf_moe_cpt.data.surgery_bench_draws import Draws
from hf_moe_cpt.data.surgery_bench_grammar import Attribute, Kind
from hf_moe_cpt.data.surgery_bench_hubs import HUBS
from hf_moe_cpt.data.surgery_bench_names import (
    GIVEN_NAMES,
    HALLMARKS_PER_SUBJECT,
    MAX_NUMBER,
    coined_word,
    hallmark,
)
from hf_moe_cpt.data.surgery_bench_person import PERSON
from hf_moe_cpt.data.surgery_bench_place import PLACE
from hf_moe_cpt.data.surgery_bench_product import PRODUCT
from hf_moe_cpt.data.surgery_bench_rule import RULE


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
