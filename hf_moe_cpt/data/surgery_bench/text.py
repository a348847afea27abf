"""What SurgeryBench says and asks: documents about a subject, and questions that no text alone gives away.

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

import re
from collections.abc import Iterator
from typing import NamedTuple

from hf_moe_cpt.data.surgery_bench.bench import QUESTION_KINDS
from hf_moe_cpt.data.surgery_bench.grammar import (
    Attribute,
    attributes_of,
    capitalised,
    kind_of,
    of_split,
    subject_slots_of,
)
from hf_moe_cpt.data.surgery_bench.world import Draws, Subject, World


NUM_OPTIONS = 3
_AIM_WORDS = (80, 128)  # an article takes up fillers until it has as many, if there are enough
_WORDS_FOR_TWO_PARAGRAPHS = 110
_FILLERS_OF_ENTRY = 3
_FACTS_OF_NOTE = 2  # besides those of its opening
_SLOT = re.compile(r"\{(\w+)\}")
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
