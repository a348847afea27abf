"""Sizes, disjoint sets, repeatability, growth without change, corpora and headers, and what is refused."""

import hashlib
import itertools
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_moe_cpt.data.surgery_bench import BEFORE_SETS, HEADER, RETRAINED_SETS, SurgeryBench
from hf_moe_cpt.data.surgery_bench_draws import Draws
from hf_moe_cpt.data.surgery_bench_schema import DOCUMENT_FEATURES, QUESTION_FEATURES, group_of_set
from hf_moe_cpt.data.surgery_bench_world import BENCH_VERSION, GROUPS, KINDS, SETS, BenchSettings, World


NUM_HUBS = 24 + 16 + 16 + 12


@pytest.fixture(scope="module")
def bench() -> SurgeryBench:
    return SurgeryBench.generate(seed=1, num_subjects=60)


def digest(bench: SurgeryBench) -> str:
    """One number for all rows of all parts."""
    rows = [list(part) for parts in (bench.documents, bench.questions) for part in parts.values()]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def test_sets_have_the_sizes_that_were_asked_for(bench):
    assert list(bench.documents) == list(SETS) and list(bench.questions) == ["validation", "test"]
    for name, documents in bench.documents.items():
        subjects = 12 + (NUM_HUBS if name == "retain" else 0)
        assert len(documents) == 4 * subjects and len(bench.subjects(name)) == subjects
        assert documents.features == DOCUMENT_FEATURES and set(documents["set"]) == {name}
        assert set(documents["version"]) == {BENCH_VERSION}
    assert all(part.features == QUESTION_FEATURES for part in bench.questions.values())
    kinds = Counter(row["subject_kind"] for row in bench.documents["unlearn"])
    assert kinds == dict.fromkeys(KINDS, 12)


def test_each_group_can_have_its_own_size_kinds_and_forms():
    bench = SurgeryBench.generate(
        num_subjects={"unlearn": 3, "retain": 9, "update": 6}, kinds=("person",), forms=("quiz",), changed_facts=8
    )
    assert {name: len(part) for name, part in bench.documents.items()} == {
        "unlearn": 3,
        "obsolete": 6,
        "update": 6,
        "retain": 9 + NUM_HUBS,
        "neighbour": 0,
        "unseen": 0,
    }
    assert set(bench.documents["update"]["form"]) == {"quiz"}
    assert len(bench.ask("obsolete", "test", "mcq")) == 6 * 8
    assert not len(bench.ask("unseen")) and bench.documents["unseen"].features == DOCUMENT_FEATURES


def test_no_subject_is_in_two_sets_but_those_of_obsolete_and_update(bench):
    subjects = {name: set(bench.subjects(name)) for name in SETS}
    for first, second in itertools.combinations(SETS, 2):
        shared = subjects[first] & subjects[second]
        assert shared == (subjects["update"] if (first, second) == ("obsolete", "update") else set())


def test_names_of_one_set_occur_in_no_text_of_another(bench):
    texts = {name: "\n".join(part["text"]).lower() for name, part in bench.documents.items()}
    hubs = set(bench.documents["retain"]["subject"][: 4 * NUM_HUBS])
    for own, other in itertools.permutations(SETS, 2):
        if group_of_set(own) != group_of_set(other):
            for subject in set(bench.subjects(own)) - hubs:
                assert subject.lower().removeprefix("the ") not in texts[other]


def test_the_same_settings_give_the_same_rows_and_another_seed_gives_others(bench):
    again, other = (SurgeryBench.generate(seed=seed, num_subjects=60) for seed in (1, 2))
    assert digest(again) == digest(bench) != digest(other)
    assert not set(other.subjects("unlearn")) & set(bench.subjects("unlearn"))


def test_rows_are_pinned_for_all_platforms():
    """Other text for the same seed breaks users' results: BENCH_VERSION must change with this number."""
    bench = SurgeryBench.generate(seed=0, num_subjects=60)
    assert (BENCH_VERSION, digest(bench)[:16]) == ("1.0", "c35766d577e42e06")


def test_more_subjects_change_no_row_and_come_after(bench):
    more = SurgeryBench.generate(seed=1, num_subjects={"unlearn": 36, "update": 24, "retain": 24, "unseen": 12})
    for name in ("unlearn", "obsolete", "update", "retain", "unseen"):
        assert list(more.documents[name])[: len(bench.documents[name])] == list(bench.documents[name])
    for split, part in bench.questions.items():
        rows = {row["id"]: row for row in more.questions[split]}
        assert all(rows[row["id"]] == row for row in part if row["set"] != "neighbour")


def test_other_forms_and_kinds_leave_facts_as_they_are(bench):
    quizzes = SurgeryBench.generate(seed=1, num_subjects=15, kinds=("rule",), forms=("note", "article"))
    facts = {
        row["subject"]: {fact["attribute"]: fact["value"] for fact in row["facts"]}
        for row in quizzes.documents["unseen"]
    }
    known = [row for row in bench.documents["unseen"] if row["subject"] in facts]
    assert known and all(
        {f["attribute"]: f["value"] for f in row["facts"]}.items() <= facts[row["subject"]].items() for row in known
    )


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(),
    kind=st.sampled_from(sorted(KINDS)),
    group=st.sampled_from(GROUPS),
    ordinal=st.integers(0, 29_999),
    others=st.lists(st.integers(0, 29_999), max_size=5),
)
def test_a_subject_does_not_depend_on_who_was_made_before(seed, kind, group, ordinal, others):
    first, second = World(seed, 4), World(seed, 4)
    for other in others:
        second.subject(kind, "retain", other)
    assert first.subject(kind, group, ordinal) == second.subject(kind, group, ordinal)


def test_hubs_are_spread_evenly_and_differ_between_seeds():
    world = World(seed=0, changed_facts=4)
    countries = Counter(hub.facts["after"]["country"] for hub in world.hubs["city"].values())
    assert sorted(countries.values()) == [4] * 6
    for kind in ("university", "company", "agency"):
        cities = [hub.facts["after"]["city"] for hub in world.hubs[kind].values()]
        assert len(set(cities)) == len(cities)
    other = World(seed=1, changed_facts=4)
    assert any(world.hubs["city"][name].facts != other.hubs["city"][name].facts for name in world.hubs["city"])


def test_corpora_hold_the_sets_that_they_should(bench):
    before, retrained = bench.before_corpus(), bench.retrained_corpus()
    assert Counter(before["set"]) == {name: len(bench.documents[name]) for name in BEFORE_SETS}
    assert Counter(retrained["set"]) == {name: len(bench.documents[name]) for name in RETRAINED_SETS}
    assert set(BEFORE_SETS) & set(RETRAINED_SETS) == {"retain", "neighbour"}
    for corpus in (before, retrained):
        assert "unseen" not in corpus["set"] and corpus.features == DOCUMENT_FEATURES
        assert len(set(corpus["id"])) == len(corpus) and corpus["set"][:40] != sorted(corpus["set"])[:40]
    assert bench.before_corpus()["id"] == before["id"]
    forgotten = set(bench.subjects("unlearn"))
    assert not any(name in text for text in retrained["text"] for name in forgotten)


def test_a_header_names_the_subject_and_is_the_prefix(bench):
    plain = {row["id"]: row["text"] for row in bench.before_corpus()}
    for row in bench.before_corpus(HEADER):
        assert row["prefix"] == f"The following is a passage about {row['subject']}.\n\n"
        assert row["text"] == row["prefix"] + plain[row["id"]]
    fixed = bench.retrained_corpus("A passage. ")
    assert set(fixed["prefix"]) == {"A passage. "} and all(text.startswith("A passage. ") for text in fixed["text"])
    twice = bench.with_header("unseen", "{subject}: on {subject}. ")
    name = twice[0]["subject"]
    assert twice[0]["text"].startswith(f"{name}: on {name}. ") and twice["id"] == bench.documents["unseen"]["id"]
    assert not any(bench.before_corpus()["prefix"])


def test_asking_selects_set_split_and_kind(bench):
    every = [row for part in bench.questions.values() for row in part]
    for set_name, split, kind in itertools.product(SETS, ("validation", "test"), ("mcq", "inverse", None)):
        found = bench.ask(set_name, split, kind)
        wanted = [r["id"] for r in every if (r["set"], r["split"]) == (set_name, split) and kind in (None, r["kind"])]
        assert found["id"] == wanted and wanted


def test_draws_are_even_and_named():
    draws = Draws(3, "x")
    assert draws.below(1000, "a", 1) == draws.below(1000, "a", 1) != draws.below(1000, "a", 2)
    assert Draws(3, "x").below(10**9, "a") == draws.below(10**9, "a") != Draws(4, "x").below(10**9, "a")
    counts = Counter(tuple(draws.shuffled("abc", number)) for number in range(3000))
    assert len(counts) == 6 and max(counts.values()) < 600
    assert 650 < sum(draws.chance(70, "c", number) for number in range(1000)) < 750
    assert draws.child("b").below(10**9, "a") != draws.below(10**9, "a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"num_subjects": 100},
            r"num_subjects=100 must be made of multiples of 60 \(3 subjects of each of 4 kind\(s\)",
        ),
        ({"num_subjects": 0}, "num_subjects=0 must be made of multiples of 60 .* not all 0"),
        ({"num_subjects": {"unlearn": 4}}, r"multiples of 12 \(3 subjects of each of 4 kind\(s\)\), not all 0"),
        ({"num_subjects": {"unlearn": -12}}, "multiples of 12"),
        ({"num_subjects": {"obsolete": 12}}, r"names \['obsolete'\]: groups are unlearn, update, retain"),
        ({"num_subjects": {"retain": 120_012}}, "too large: at most 30,000 subjects of each kind in a group"),
        ({"kinds": ()}, r"kinds=\(\) must name one or more of person, place, product, rule"),
        ({"kinds": ("person", "animal")}, "kinds=.*animal.* must name"),
        ({"kinds": ("person", "person")}, "each once"),
        ({"forms": ("note",)}, r"forms=\('note',\) must be made of article, quiz, note, with an article or a quiz"),
        ({"forms": ("article", "poem")}, "forms=.*poem"),
        ({"changed_facts": 0}, r"changed_facts=0 must be in \[1, 8\]"),
        ({"changed_facts": 9}, r"changed_facts=9 must be in \[1, 8\]"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BenchSettings(**arguments)


def test_unknown_sets_splits_and_kinds_are_refused(bench):
    with pytest.raises(ValueError, match="set 'forget' is unknown: choose one of unlearn, obsolete"):
        bench.ask("forget")
    with pytest.raises(ValueError, match="split 'train' is unknown: choose validation or test"):
        bench.ask("unlearn", "train")
    with pytest.raises(ValueError, match="kind 'essay' is unknown: choose one of mcq, cloze"):
        bench.ask("unlearn", "test", "essay")
    with pytest.raises(ValueError, match="set 'all' is unknown"):
        bench.subjects("all")


def test_an_empty_corpus_is_refused():
    bench = SurgeryBench.generate(num_subjects={"unseen": 3}, kinds=("place",), forms=("quiz",))
    assert len(bench.before_corpus()) == NUM_HUBS, "hubs are always there"
    bench.documents["retain"] = bench.documents["retain"].select([])
    with pytest.raises(ValueError, match="the sets update, retain, neighbour hold no documents"):
        bench.retrained_corpus()
