"""Read the documents of SurgeryBench back into facts, knowing its wordings but not how texts are put together.

Each sentence must be one that the tables of wordings have, with the subject called by its own name, a short form of it
or a pronoun, and with values that the attribute can take. What no table has, or what two tables read differently, is
an error: then a person could misread it too.
"""

import re
from functools import lru_cache

from hf_moe_cpt.data.surgery_bench.world import Attribute, Kind, kind_of


_PRONOUNS = {"person": ("he", "she", "his", "her", "him")}
_IT = ("it", "its")
_HALLMARK_SHAPES = {
    "book": r"The \w+ of \w+",
    "landmark": r"the \w+ \w+",
    "designer": r"\w+ \w+",
    "drafter": r"\w+ \w+",
}
_SLOT = re.compile(r"\{(\w+)\}")
_SUBJECT_SLOTS = ("S", "s", "P", "p", "O", "o")


def sentences(text: str) -> list[str]:
    """The sentences of a text; all of them end in a full stop, and no full stop stands elsewhere."""
    return [sentence for paragraph in text.split("\n\n") for sentence in re.split(r"(?<=\.) ", paragraph)]


def mentions(subject: str, kind: str) -> list[str]:
    """What a subject may be called, longest first, pronouns included."""
    names = [subject]
    if kind == "person":
        names.append(subject.split()[-1])
    names += {"place": ["the town"], "product": ["the machine"]}.get(kind, [])
    if kind == "rule":
        names.append(f"the {subject.split()[-1].lower()}")
    return names + [f"{name}'s" for name in names] + list(_PRONOUNS.get(kind, _IT))


def read_document(row: dict) -> list[tuple[str, str]]:
    """(attribute, value) in the order of the text, from the text alone."""
    kind = kind_of(row["subject_kind"])
    if row["form"] == "quiz":
        return _read_quiz(row, kind)
    facts: dict[str, str] = {}
    for number, sentence in enumerate(sentences(row["text"])):
        found = read_sentence(sentence, kind, row["subject"])
        if number == 0 and row["subject"].lower() not in sentence.lower():
            raise ValueError(f"the first sentence does not name {row['subject']}: {sentence}")
        for name, value in found:
            if facts.setdefault(name, value) != value:
                raise ValueError(f"{row['id']} says {name} twice and differently.")
    return list(facts.items())


def read_sentence(sentence: str, kind: Kind, subject: str) -> tuple[tuple[str, str], ...]:
    """The facts that a sentence states; none for a sentence without facts."""
    readings = set(wordings_of(sentence, kind, subject).values())
    if len(readings) != 1:
        raise ValueError(f"{len(readings)} readings of {sentence!r} about {subject}")
    return readings.pop()


def wordings_of(sentence: str, kind: Kind, subject: str) -> dict[str, tuple[tuple[str, str], ...]]:
    """The wordings that a sentence can be, with the facts that each would state."""
    called = {name.lower() for name in mentions(subject, kind.name)}
    found = {}
    for template, pattern, slots in _templates(kind.name):
        match = pattern.fullmatch(sentence)
        if not match:
            continue
        filled = list(zip(slots, match.groups(), strict=True))
        stated = [(slot[0].lower() + slot[1:], text) for slot, text in filled if slot not in _SUBJECT_SLOTS]
        facts = tuple((name, _value(kind.attribute(name), text)) for name, text in stated)
        names = [text.lower() for slot, text in filled if slot in _SUBJECT_SLOTS]
        if all(value is not None for _, value in facts) and called.issuperset(names):
            found[template] = facts
    return found


def read_question(row: dict) -> tuple[str, str | None]:
    """(attribute, value) that a question is about: the value only where it names one, in inverse questions."""
    kind = kind_of(row["subject_kind"])
    found = set()
    for attribute in kind.attributes:
        for wording in getattr(attribute, row["kind"]):
            if row["kind"] == "inverse":
                shape = re.escape(wording).replace(r"\{v\}", "(.+)")
                match = re.fullmatch(shape, row["question"])
                value = match and _value(attribute, match[1])
                if value:
                    found.add((attribute.name, value))
            elif row["question"].lower() == re.sub(r"\{[sS]\}", lambda _: row["subject"], wording).lower():
                found.add((attribute.name, None))
    if len(found) != 1:
        raise ValueError(f"{len(found)} readings of the question {row['question']!r}")
    return found.pop()


def _read_quiz(row: dict, kind: Kind) -> list[tuple[str, str]]:
    title, *lines = row["text"].split("\n")
    if title != f"Questions and answers about {row['subject']}":
        raise ValueError(f"unexpected title {title!r}")
    facts = []
    for asked, answered in zip(lines[::2], lines[1::2], strict=True):
        question, value = asked.removeprefix("Question: "), answered.removeprefix("Answer: ")
        (name,) = {
            attribute.name
            for attribute in kind.attributes
            for wording in attribute.quiz
            if wording.replace("{s}", row["subject"]) == question and _value(attribute, value) == value
        }
        facts.append((name, value))
    return facts


@lru_cache
def _templates(kind_name: str) -> tuple[tuple[str, re.Pattern, list[str]], ...]:
    """Each wording of a kind, a pattern with a group for each of its slots, and the slots."""
    kind = kind_of(kind_name)
    found = []
    for voice in (kind.reference, kind.popular):
        found += [*voice.openings, *voice.pairs, *voice.fillers]
    for attribute in kind.attributes:
        found += [*attribute.reference, *attribute.popular]
    return tuple(
        (text, re.compile("(.+?)".join(map(re.escape, _SLOT.split(text)[::2]))), _SLOT.findall(text)) for text in found
    )


def _value(attribute: Attribute, text: str) -> str | None:
    """The value as the table spells it, or None if the attribute cannot have it."""
    candidates = {text, text[:1].lower() + text[1:]}
    if attribute.hallmark:
        return next(
            (each for each in sorted(candidates) if re.fullmatch(_HALLMARK_SHAPES[attribute.hallmark], each)), None
        )
    return next((each for each in candidates if each in _value_set(attribute)), None)


@lru_cache(maxsize=64)
def _value_set(attribute: Attribute) -> frozenset[str]:
    return frozenset(attribute.values)
