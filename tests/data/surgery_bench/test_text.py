"""Nothing but the documents gives an answer away, and what can be checked of the English without reading it.

Places, lengths and frequencies of options against scipy's tests; lengths, articles, pronouns, repetition, names.
"""

import re
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare

from hf_moe_cpt.data.surgery_bench import QUESTION_KINDS, QUIZ_TEMPLATE, SETS, SurgeryBench, as_completions
from hf_moe_cpt.data.surgery_bench import world as names
from hf_moe_cpt.data.surgery_bench.bench import FACTS_PER_SUBJECT, KINDS, MAX_NUMBER
from hf_moe_cpt.data.surgery_bench.world import (
    BRIDGES,
    VOICES,
    World,
    attributes_of,
    kind_of,
    of_split,
    subject_slots_of,
    write_document,
)
from tests.helpers.surgery_bench_reader import sentences, wordings_of


ARTICLE_WORDS = (80, 300)
LEAST_P = 1e-3  # the seed is fixed, so a test that passes always passes


@pytest.fixture(scope="module")
def bench() -> SurgeryBench:
    return SurgeryBench.generate(seed=3, num_subjects=480, forms=("quiz",))


@pytest.fixture(scope="module")
def rows(bench: SurgeryBench) -> list[dict]:
    return [row for part in bench.questions.values() for row in part.to_list()]


@pytest.fixture(scope="module")
def one_per_fact(rows: list[dict]) -> list[dict]:
    """One question about each fact, so that a fact counts once, in sets whose facts are independent of each other."""
    return [row for row in rows if row["kind"] == "mcq" and row["split"] == "test" and row["set"] != "obsolete"]


@pytest.mark.slow
def test_the_answer_and_the_old_one_are_in_every_place_alike(rows):
    for kind in QUESTION_KINDS:
        places = Counter(row["answer"] for row in rows if row["kind"] == kind)
        assert sorted(places) == [0, 1, 2] and chisquare(list(places.values())).pvalue > LEAST_P, kind
    both = Counter((row["answer"], row["old_answer"]) for row in rows if row["old_answer"] is not None)
    assert len(both) == 6 and chisquare(list(both.values())).pvalue > LEAST_P


def _accuracy(rows: list[dict], score) -> float:
    """Expected share of right answers of the rule "take the option that scores most", ties broken evenly."""
    right = 0.0
    for row in rows:
        scores = [score(row, option) for option in row["options"]]
        best = [place for place, value in enumerate(scores) if value == max(scores)]
        right += (row["answer"] in best) / len(best)
    return right / len(rows)


def _at_chance(accuracy: float, rows: list[dict]) -> float:
    """The p-value of so many right answers where each has one chance in three."""
    return binomtest(round(accuracy * len(rows)), len(rows), 1 / 3).pvalue


def _number(option: str) -> float:
    return float("".join(filter(str.isdigit, option)) or 0)


RULES = {
    "longest": lambda row, option: len(option),
    "shortest": lambda row, option: -len(option),
    "most words": lambda row, option: len(option.split()),
    "first in the alphabet": lambda row, option: -sum(ord(c) * 256.0**-i for i, c in enumerate(option[:6])),
    "largest number": lambda row, option: _number(option),
    "middle number": lambda row, option: -abs(_number(option) - sorted(map(_number, row["options"]))[1]),
    "shares letters with the subject": lambda row, option: len(set(option.lower()) & set(row["subject"].lower())),
    "shares words with the question": lambda row, option: len(set(option.split()) & set(row["question"].split())),
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_rules_that_read_only_the_options_are_at_chance(rows, one_per_fact, rule):
    accuracy = _accuracy(one_per_fact, RULES[rule])
    assert len(one_per_fact) > 3000 and _at_chance(accuracy, one_per_fact) > LEAST_P, accuracy
    if rule in ("longest", "first in the alphabet"):
        sides = ("one_hop", "validation")
        chosen = [row for row in rows if (row["kind"], row["split"]) == sides and row["set"] != "obsolete"]
        assert _at_chance(_accuracy(chosen, RULES[rule]), chosen) > LEAST_P


@pytest.mark.slow
def test_the_value_that_is_most_frequent_elsewhere_is_right_by_chance(bench, one_per_fact):
    """Elsewhere: in documents of other subjects. What one subject has alone is said as often as its distractors."""
    said: dict[str, Counter] = defaultdict(Counter)
    own: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for documents in bench.documents.values():
        for row in documents:
            for fact in row["facts"]:
                key = f"{row['subject_kind']} {fact['attribute']}"
                said[key][fact["value"]] += 1
                own[key, row["subject"]][fact["value"]] += 1

    def elsewhere(row: dict, option: str) -> int:
        key = f"{row['subject_kind']} {row['attribute']}"
        return said[key][option] - own[key, row["subject"]][option]

    shared, alone = [], []
    for row in one_per_fact:
        (alone if kind_of(row["subject_kind"]).attribute(row["attribute"]).hallmark else shared).append(row)
    for sign in (1, -1):
        accuracy = _accuracy(shared, lambda row, option, sign=sign: sign * elsewhere(row, option))
        assert _at_chance(accuracy, shared) > LEAST_P, accuracy
    for row in alone:
        key = f"{row['subject_kind']} {row['attribute']}"
        unchanged = [option for option in row["options"] if row["set"] != "update"]
        assert len({said[key][option] for option in unchanged}) <= 1


@pytest.mark.slow
def test_distractors_are_values_of_the_same_attribute(rows):
    for row in rows:
        if row["kind"] in ("mcq", "cloze", "paraphrase") and row["subject_kind"] in KINDS:
            attribute = kind_of(row["subject_kind"]).attribute(row["attribute"])
            assert attribute.hallmark or set(row["options"]) <= set(attribute.values)


def test_every_value_of_an_attribute_is_equally_likely():
    world = World(seed=9, changed_facts=4)
    for kind in map(kind_of, KINDS):
        subjects = [world.subject(kind.name, group, i) for group in ("unlearn", "update") for i in range(300)]
        for attribute in kind.attributes:
            if not attribute.hallmark and len(attribute.values) <= 60:
                for edition in ("before", "after"):
                    counts = Counter(subject.facts[edition][attribute.name] for subject in subjects)
                    observed = [counts[value] for value in attribute.values]
                    assert chisquare(observed).pvalue > LEAST_P, attribute.name


def test_which_facts_change_is_even_and_as_many_as_asked():
    world = World(seed=9, changed_facts=3)
    subjects = [world.subject("person", "update", i) for i in range(400)]
    counts = Counter(name for subject in subjects for name in subject.changed)
    assert sum(counts.values()) == 3 * 400 and len(counts) == 8
    assert chisquare(list(counts.values())).pvalue > LEAST_P
    for subject in subjects:
        differing = [name for name, old in subject.facts["before"].items() if subject.facts["after"][name] != old]
        assert sorted(differing) == list(subject.changed)


@pytest.mark.slow
def test_validation_and_test_ask_for_the_same_facts_in_other_words(rows):
    asked, texts = defaultdict(set), defaultdict(set)
    for row in rows:
        asked[row["split"]].add((row["set"], row["subject"], row["kind"], row["attribute"]))
        texts[row["split"]].add(row["question"])
    assert asked["validation"] == asked["test"]
    assert not texts["validation"] & texts["test"]
    assert len({row["id"] for row in rows}) == len(rows)


@pytest.mark.slow
def test_counts_of_questions_follow_from_the_facts(bench):
    for set_name in SETS:
        kinds = Counter(bench.ask(set_name, "test")["kind"])
        subjects = len(bench.subjects(set_name)) - (68 if set_name == "retain" else 0)
        facts = subjects * (4 if set_name == "obsolete" else 8) + (68 if set_name == "retain" else 0)
        assert kinds["mcq"] == kinds["cloze"] == kinds["paraphrase"] == facts
        if set_name != "obsolete":
            assert kinds["inverse"] == subjects
            assert kinds["one_hop"] == subjects * (3 + 1 + 1 + 1) / 4


def test_completions_go_on_from_the_prompt():
    prompt, endings = as_completions("Where was Ada born?", ["Velmora", "Orsgate"])
    assert prompt + endings[0] == "Where was Ada born? Velmora"
    prompt, endings = as_completions("Where was {x} born?", ["Velmora", "Orsgate"], QUIZ_TEMPLATE)
    assert prompt + endings[1] == "Question: Where was {x} born?\nAnswer: Orsgate"


@pytest.fixture(scope="module")
def written() -> SurgeryBench:
    return SurgeryBench.generate(seed=11, num_subjects=120)


@pytest.fixture(scope="module")
def documents(written: SurgeryBench) -> list[dict]:
    return [row for part in written.documents.values() for row in part.to_list()]


def test_lengths_are_those_of_short_encyclopaedia_entries(documents):
    words = defaultdict(list)
    for row in documents:
        words["bridge" if row["subject_kind"] in BRIDGES else row["form"]].append(len(row["text"].split()))
    low, high = ARTICLE_WORDS
    assert low <= min(words["article"]) and max(words["article"]) <= high
    assert max(words["article"]) > 1.4 * min(words["article"]), "lengths vary"
    assert 15 <= min(words["note"]) and max(words["note"]) <= 80
    assert 60 <= min(words["quiz"]) and max(words["quiz"]) <= 160
    assert 12 <= min(words["bridge"]) and max(words["bridge"]) <= 70


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(-(2**70), 2**70), ordinal=st.integers(0, 29_999), kind=st.sampled_from(sorted(KINDS)))
def test_an_article_of_any_subject_of_any_seed_has_a_fair_length_and_all_facts(seed, ordinal, kind):
    world = World(seed, changed_facts=3)
    subject = world.subject(kind, "update", ordinal)
    document = write_document(world, subject, "before", 0, "article")
    assert ARTICLE_WORDS[0] <= len(document.text.split()) <= ARTICLE_WORDS[1]
    assert dict(document.facts) == subject.facts["before"] and len(document.facts) == FACTS_PER_SUBJECT


def test_articles_and_repetition_are_right(written, documents):
    """In everything that a model could read."""
    questions = [text for part in written.questions.values() for text in part["question"]]
    for text in [row["text"] for row in documents] + questions:
        assert not re.search(r"[{}@]|  |\s[.,;?]|\.\.|'s's|\b(a|an|the) (a|an|the)\b", text), text
        assert not re.search(r"\b[Aa]n (?=[^aeiou])(?!hour)|\b[Aa] (?=[aeiou])(?!un|use|one)", text), text
        assert not re.search(r"\b(\w+) \1\b", text, re.IGNORECASE), text


def test_pronouns_agree_with_the_person(documents):
    wrong_for = {"she": r"\b(he|his|him|it is he)\b", "he": r"\b(she|her|hers)\b"}
    seen = Counter()
    texts_of = defaultdict(str)
    for row in documents:
        if row["subject_kind"] == "person" and row["form"] != "quiz":
            texts_of[row["subject"]] += f" {row['text']}"
    for subject, text in texts_of.items():
        pronoun = next(key for key, given in names.name_parts()["given_names"].items() if subject.split()[0] in given)
        assert not re.search(wrong_for[pronoun], text, re.IGNORECASE), text
        seen[pronoun] += bool(re.search(rf"\b{pronoun}\b", text, re.IGNORECASE))
    assert min(seen["she"], seen["he"]) > 10


def test_a_pronoun_never_comes_before_the_name_nor_four_times_in_a_row(documents):
    pronoun = re.compile(r"\b(she|he|it|her|his|its|him)\b", re.IGNORECASE)
    for row in documents:
        if row["form"] not in ("article", "note"):
            continue
        in_a_row = 0
        short = {row["subject"].lower(), row["subject"].split()[-1].lower(), "the town", "the machine"}
        for number, sentence in enumerate(sentences(row["text"])):
            named = any(name in sentence.lower() for name in short)
            assert named or number, row["text"]
            in_a_row = 0 if named else in_a_row + bool(pronoun.match(sentence))
            assert in_a_row <= 3, row["text"]


@pytest.mark.parametrize("kind", [*map(kind_of, KINDS + BRIDGES)], ids=KINDS + BRIDGES)
def test_every_fact_can_be_said_and_asked_in_several_ways(kind):
    for attribute in kind.attributes:
        for voice in VOICES if not kind.names else VOICES[:1]:
            wordings = getattr(attribute, voice)
            assert len(set(wordings)) == len(wordings) >= (5 if voice == "reference" else 3)
            assert all(attributes_of(wording) == (attribute.name,) for wording in wordings)
        for group, least in (("mcq", 4), ("cloze", 2), ("paraphrase", 2)):
            assert len(set(getattr(attribute, group))) >= least
        assert bool(attribute.one_hop) == bool(attribute.bridge and not kind.names)
        asked = [*attribute.mcq, *attribute.quiz, *attribute.cloze, *attribute.paraphrase, *attribute.one_hop]
        assert len(set(asked)) == len(asked) and all("{s}" in text or "{S}" in text for text in asked)
        assert all(text.endswith("?") != (text in attribute.cloze) for text in asked)
        assert not set(of_split(attribute.mcq, "validation")) & set(of_split(attribute.mcq, "test"))


@pytest.mark.parametrize("kind", [*map(kind_of, KINDS)], ids=KINDS)
def test_openings_and_pairs_use_the_attributes_of_their_kind(kind):
    known = {attribute.name for attribute in kind.attributes}
    assert len(known) == FACTS_PER_SUBJECT
    for voice in (kind.reference, kind.popular):
        for text in voice.openings:
            assert subject_slots_of(text) and 1 <= len(attributes_of(text)) <= 3
        assert all(len(attributes_of(text)) == 2 for text in voice.pairs)
        assert all(set(attributes_of(text)) <= known for text in (*voice.openings, *voice.pairs))
        assert not any(attributes_of(text) for text in voice.fillers) and len(set(voice.fillers)) >= 12


def test_quizzes_in_documents_share_no_question_with_the_benchmark(written, documents):
    asked = {text for part in written.questions.values() for text in part["question"]}
    in_texts = {
        line.removeprefix("Question: ")
        for row in documents
        if row["form"] == "quiz"
        for line in row["text"].split("\n")
    }
    assert not asked & in_texts and len(in_texts) > 700


@pytest.mark.parametrize("group", ["unlearn", "retain"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_sentence_stands_in_every_other_article(kind, group):
    world, used = World(seed=2, changed_facts=4), Counter()
    for ordinal in range(60):
        subject = world.subject(kind, group, ordinal)
        found = sentences(write_document(world, subject, "after", 0, "article").text)
        used.update({next(iter(wordings_of(sentence, kind_of(kind), subject.name))) for sentence in found})
    assert used.most_common(1)[0][1] <= 30, used.most_common(1)
    assert len(used) >= 35


def test_two_articles_of_a_subject_differ_in_wording(written):
    articles = defaultdict(list)
    for row in written.documents["unlearn"]:
        if row["form"] == "article":
            articles[row["subject"]].append(set(sentences(row["text"])))
    shared = [len(first & second) / len(first | second) for first, second in articles.values()]
    assert max(shared) < 0.8 and sum(shared) / len(shared) < 0.35


def test_names_are_unique_coined_told_apart_by_role_and_last_as_long_as_subjects_do():
    words = {
        role: {names.coined_word(role, i, seed=1) for i in range(1000)}
        for role in ("person", "place", "product", "rule")
    }
    assert all(len(found) == 1000 for found in words.values())
    assert len(set.union(*words.values())) == 4000
    assert all(re.fullmatch(r"[A-Z][a-z]{4,14}", word) for found in words.values() for word in found)
    for role in ("book", "landmark", "designer", "drafter"):
        assert len({names.hallmark(role, i, seed=1) for i in range(1000)}) == 1000
        names.hallmark(role, names.HALLMARKS_PER_SUBJECT * MAX_NUMBER - 1, seed=0)
    for role in words:
        names.coined_word(role, MAX_NUMBER - 1, seed=0)


def test_no_coined_word_can_be_had_by_two_roles():
    """Middles and endings decide, so all of them are compared under one onset and vowel."""
    owner: dict[str, str] = {}
    for role in ("person", "place", "product", "rule", "designer", "drafter"):
        parts = names.name_parts()["words"][role]
        onset, vowel = parts[0][0], parts[1][0]
        tails = [""]
        for part in parts[2:]:
            tails = [tail + piece for tail in tails for piece in part]
        for tail in tails:
            assert owner.setdefault(onset + vowel + tail, role) == role
    assert len(owner) > 4000
