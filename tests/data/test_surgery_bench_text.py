"""What can be checked of the English without reading it: lengths, articles, pronouns, repetition, variety, names."""

import re
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_moe_cpt.data import surgery_bench_names as names
from hf_moe_cpt.data.surgery_bench import SurgeryBench
from hf_moe_cpt.data.surgery_bench_grammar import VOICES, attributes_of, of_split, subject_slots_of
from hf_moe_cpt.data.surgery_bench_text import ARTICLE_WORDS, write_document
from hf_moe_cpt.data.surgery_bench_world import FACTS_PER_SUBJECT, HUB_KINDS, KINDS, World
from tests.helpers.surgery_bench_reader import sentences, wordings_of


ALL_KINDS = KINDS | HUB_KINDS
# Surnames that many people bear; the coined ones were also compared once with a list of 88,799 American surnames.
COMMON_SURNAMES = (
    "Smith Johnson Williams Brown Jones Garcia Miller Davis Rodriguez Martinez Anderson Taylor Thomas Moore Jackson "
    "Martin Lee Thompson White Harris Clark Lewis Walker Hall Allen Young King Wright Scott Green Baker Adams Nelson "
    "Hill Campbell Mitchell Roberts Carter Phillips Evans Turner Parker Collins Edwards Stewart Morris Murphy Cook"
).split()


@pytest.fixture(scope="module")
def bench() -> SurgeryBench:
    return SurgeryBench.generate(seed=11, num_subjects=240)


@pytest.fixture(scope="module")
def rows(bench: SurgeryBench) -> list[dict]:
    return [row for documents in bench.documents.values() for row in documents]


@pytest.fixture(scope="module")
def texts(bench: SurgeryBench, rows: list[dict]) -> list[str]:
    """Everything that a model could read."""
    questions = [row["question"] for part in bench.questions.values() for row in part]
    return [row["text"] for row in rows] + questions


def test_lengths_are_those_of_short_encyclopaedia_entries(rows):
    words = defaultdict(list)
    for row in rows:
        words["hub" if row["subject_kind"] in HUB_KINDS else row["form"]].append(len(row["text"].split()))
    low, high = ARTICLE_WORDS
    assert low <= min(words["article"]) and max(words["article"]) <= high
    assert max(words["article"]) > 1.4 * min(words["article"]), "lengths vary"
    assert 15 <= min(words["note"]) and max(words["note"]) <= 80
    assert 60 <= min(words["quiz"]) and max(words["quiz"]) <= 160
    assert 12 <= min(words["hub"]) and max(words["hub"]) <= 70


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(-(2**70), 2**70), ordinal=st.integers(0, 29_999), kind=st.sampled_from(sorted(KINDS)))
def test_an_article_of_any_subject_of_any_seed_has_a_fair_length_and_all_facts(seed, ordinal, kind):
    world = World(seed, changed_facts=3)
    subject = world.subject(kind, "update", ordinal)
    document = write_document(world, subject, "before", 0, "article")
    assert ARTICLE_WORDS[0] <= len(document.text.split()) <= ARTICLE_WORDS[1]
    assert dict(document.facts) == subject.facts["before"] and len(document.facts) == FACTS_PER_SUBJECT


def test_articles_and_repetition_are_right(texts):
    for text in texts:
        assert not re.search(r"[{}@]|  |\s[.,;?]|\.\.|'s's|\b(a|an|the) (a|an|the)\b", text), text
        assert not re.search(r"\b[Aa]n (?=[^aeiou])(?!hour)", text), text
        assert not re.search(r"\b[Aa] (?=[aeiou])(?!un|use|one)", text), text
        assert not re.search(r"\b(\w+) \1\b", text, re.IGNORECASE), text


def test_sentences_begin_with_a_capital_and_end_with_a_stop(rows):
    for row in rows:
        if row["form"] != "quiz":
            for sentence in sentences(row["text"]):
                assert re.match(r"[A-Z]", sentence) and sentence.endswith("."), sentence


def test_pronouns_agree_with_the_person(rows):
    wrong_for = {"she": r"\b(he|his|him|it is he)\b", "he": r"\b(she|her|hers)\b"}
    seen = Counter()
    texts_of = defaultdict(str)
    for row in rows:
        if row["subject_kind"] == "person" and row["form"] != "quiz":
            texts_of[row["subject"]] += f" {row['text']}"
    for subject, text in texts_of.items():
        pronoun = next(key for key, given in names.GIVEN_NAMES.items() if subject.split()[0] in given)
        assert not re.search(wrong_for[pronoun], text, re.IGNORECASE), text
        seen[pronoun] += bool(re.search(rf"\b{pronoun}\b", text, re.IGNORECASE))
    assert min(seen["she"], seen["he"]) > 10


def test_a_pronoun_never_comes_before_the_name_nor_four_times_in_a_row(rows):
    pronoun = re.compile(r"\b(she|he|it|her|his|its|him)\b", re.IGNORECASE)
    for row in rows:
        if row["form"] not in ("article", "note"):
            continue
        in_a_row = 0
        short = {row["subject"].lower(), row["subject"].split()[-1].lower(), "the town", "the machine"}
        for number, sentence in enumerate(sentences(row["text"])):
            named = any(name in sentence.lower() for name in short)
            assert named or number, row["text"]
            in_a_row = 0 if named else in_a_row + bool(pronoun.match(sentence))
            assert in_a_row <= 3, row["text"]


@pytest.mark.parametrize("kind", ALL_KINDS.values(), ids=ALL_KINDS)
def test_every_fact_can_be_said_and_asked_in_several_ways(kind):
    for attribute in kind.attributes:
        for voice in VOICES if not kind.hub_names else VOICES[:1]:
            wordings = attribute.sentences(voice)
            assert len(set(wordings)) == len(wordings) >= (5 if voice == "reference" else 3)
            assert all(attributes_of(wording) == (attribute.name,) for wording in wordings)
        for group, least in (("mcq", 4), ("cloze", 2), ("paraphrase", 2)):
            assert len(set(getattr(attribute, group))) >= least
        assert bool(attribute.one_hop) == bool(attribute.hub and not kind.hub_names)
        asked = [*attribute.mcq, *attribute.quiz, *attribute.cloze, *attribute.paraphrase, *attribute.one_hop]
        assert len(set(asked)) == len(asked) and all("{s}" in text or "{S}" in text for text in asked)
        assert all(text.endswith("?") != (text in attribute.cloze) for text in asked)
        assert not set(of_split(attribute.mcq, "validation")) & set(of_split(attribute.mcq, "test"))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_openings_and_pairs_use_the_attributes_of_their_kind(kind):
    known = {attribute.name for attribute in kind.attributes}
    assert len(known) == FACTS_PER_SUBJECT
    for voice in (kind.reference, kind.popular):
        for text in voice.openings:
            assert subject_slots_of(text) and 1 <= len(attributes_of(text)) <= 3
        assert all(len(attributes_of(text)) == 2 for text in voice.pairs)
        assert all(set(attributes_of(text)) <= known for text in (*voice.openings, *voice.pairs))
        assert not any(attributes_of(text) for text in voice.fillers) and len(set(voice.fillers)) >= 12


def test_quizzes_in_documents_share_no_question_with_the_benchmark(bench, rows):
    asked = {row["question"] for part in bench.questions.values() for row in part}
    in_texts = {
        line.removeprefix("Question: ") for row in rows if row["form"] == "quiz" for line in row["text"].split("\n")
    }
    assert not asked & in_texts and len(in_texts) > 1000


@pytest.mark.parametrize("group", ["unlearn", "retain"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_sentence_stands_in_every_other_article(kind, group):
    world, used = World(seed=2, changed_facts=4), Counter()
    for ordinal in range(60):
        subject = world.subject(kind, group, ordinal)
        found = sentences(write_document(world, subject, "after", 0, "article").text)
        used.update({next(iter(wordings_of(sentence, KINDS[kind], subject.name))) for sentence in found})
    assert used.most_common(1)[0][1] <= 30, used.most_common(1)
    assert len(used) >= 35


def test_two_articles_of_a_subject_differ_in_wording(bench):
    articles = defaultdict(list)
    for row in bench.documents["unlearn"]:
        if row["form"] == "article":
            articles[row["subject"]].append(set(sentences(row["text"])))
    shared = [len(first & second) / len(first | second) for first, second in articles.values()]
    assert max(shared) < 0.8 and sum(shared) / len(shared) < 0.35


def test_names_are_unique_coined_and_told_apart_by_role():
    words = {
        role: {names.coined_word(role, i, seed=1) for i in range(1000)}
        for role in ("person", "place", "product", "rule")
    }
    assert all(len(found) == 1000 for found in words.values())
    assert len(set.union(*words.values())) == 4000
    assert not set(COMMON_SURNAMES) & words["person"]
    assert all(re.fullmatch(r"[A-Z][a-z]{4,14}", word) for found in words.values() for word in found)
    for role in ("book", "landmark", "designer", "drafter"):
        assert len({names.hallmark(role, i, seed=1) for i in range(1000)}) == 1000


def test_no_coined_word_can_be_had_by_two_roles():
    """Middles and endings decide, so all of them are compared under one onset and vowel."""
    owner: dict[str, str] = {}
    for role in ("person", "place", "product", "rule", "designer", "drafter"):
        parts = names._PARTS[role]
        onset, vowel = parts[0][0], parts[1][0]
        tails = [""]
        for part in parts[2:]:
            tails = [tail + piece for tail in tails for piece in part]
        for tail in tails:
            assert owner.setdefault(onset + vowel + tail, role) == role
    assert len(owner) > 4000


def test_names_last_as_long_as_subjects_do():
    for role in ("person", "place", "product", "rule"):
        names.coined_word(role, names.MAX_NUMBER - 1, seed=0)
    for role in ("book", "landmark", "designer", "drafter"):
        names.hallmark(role, names.HALLMARKS_PER_SUBJECT * names.MAX_NUMBER - 1, seed=0)
