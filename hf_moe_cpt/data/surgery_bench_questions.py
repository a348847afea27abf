"""Questions about the world, each with three options of which one is true, and none that a text alone gives away.

| kind | the question | the answer |
|---|---|---|
| mcq | a question about one fact | its value |
| cloze | the beginning of a statement | the value that completes it |
| paraphrase | the same question, asked in a roundabout way | its value |
| one_hop | a question about a fact of the fact's value | the hub's own fact |
| inverse | a question about what belongs to one subject alone | the subject |

Validation and test ask for the same facts in different words, with other distractors. The three options are drawn
alike from the values of one attribute, so that no property of an option but its truth tells it from the others. Where
a fact has changed, the second option of the update set is the old value. Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from hf_moe_cpt.data.surgery_bench_draws import Draws
from hf_moe_cpt.data.surgery_bench_grammar import Attribute, capitalised, of_split
from hf_moe_cpt.data.surgery_bench_text import about
from hf_moe_cpt.data.surgery_bench_world import Subject, World


QUESTION_KINDS = ("mcq", "cloze", "paraphrase", "one_hop", "inverse")
NUM_OPTIONS = 3
_DIRECT = ("mcq", "cloze", "paraphrase")  # their answer is the fact itself


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
        if set_name == "obsolete" and attribute.name not in subject.changed:
            continue
        has_old = set_name == "update" and attribute.name in subject.changed
        for kind in (*_DIRECT, "one_hop") if attribute.one_hop else _DIRECT:
            draws = all_draws.child(kind, attribute.name)
            yield _about_value(world, subject, attribute, edition, kind, split, has_old, draws)
        if attribute.inverse:
            draws = all_draws.child("inverse", attribute.name)
            yield _about_subject(world, subject, attribute, edition, split, draws)


def as_completions(question: str, options: list[str], template: str = "{question}") -> tuple[str, list[str]]:
    """(prompt, one continuation per option): what a language model scores. A continuation begins with its space.

    template: "{question}" is the bare question of the paper; QUIZ_TEMPLATE is how quizzes in documents look.
    """
    return template.replace("{question}", question), [f" {option}" for option in options]


QUIZ_TEMPLATE = "Question: {question}\nAnswer:"


def _about_value(
    world: World,
    subject: Subject,
    attribute: Attribute,
    edition: str,
    kind: str,
    split: str,
    has_old: bool,
    draws: Draws,
) -> Question:
    values = _three_values(world, subject, attribute, edition, has_old, draws)
    name = attribute.name
    if kind == "one_hop":
        values = [world.hop(attribute, value) for value in values]
        (hub_attribute,) = next(iter(world.hubs[attribute.hub].values())).facts[edition]
        name = f"{name}.{hub_attribute}"
    wording = draws.choice(of_split(getattr(attribute, kind), split), "wording")
    return _shuffled(kind, split, name, about(wording, subject.name), values, has_old, draws)


def _about_subject(
    world: World, subject: Subject, attribute: Attribute, edition: str, split: str, draws: Draws
) -> Question:
    names = [other.name for other in world.trio(subject)]
    names.sort(key=lambda name: name != subject.name)  # the answer first
    value = subject.facts[edition][attribute.name]
    wording = draws.choice(of_split(attribute.inverse, split), "wording").replace("{v}", value)
    return _shuffled("inverse", split, attribute.name, capitalised(wording), names, False, draws)


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


def _shuffled(
    kind: str, split: str, attribute: str, question: str, values: list[str], has_old: bool, draws: Draws
) -> Question:
    """Options in an order of their own; the first of the values is the answer, the second the old one."""
    order = draws.shuffled(range(len(values)), "order")
    options = [values[place] for place in order]
    return Question(kind, split, attribute, question, options, order.index(0), order.index(1) if has_old else None)
