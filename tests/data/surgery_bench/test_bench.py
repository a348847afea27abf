"""SurgeryBench as a whole: its sets, its texts read back into facts, its files, and a user's own rows.

Every question is answered from what the documents say, parsed by another reader, not from the world that wrote them.
What is saved loads with `datasets` alone, through the card; what is wrong with a user's row is named with its line.
"""

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_moe_cpt.data.surgery_bench import BEFORE_SETS, HEADER, RETRAINED_SETS, SETS, SurgeryBench
from hf_moe_cpt.data.surgery_bench.bench import (
    BENCH_VERSION,
    DOCUMENT_FEATURES,
    FACTS_PER_SUBJECT,
    GROUPS,
    KINDS,
    QUESTION_FEATURES,
    BenchSettings,
    as_parts,
    group_of_set,
)
from hf_moe_cpt.data.surgery_bench.world import BRIDGES, World
from tests.helpers.source_tree import PROJECT
from tests.helpers.surgery_bench_reader import read_document, read_question


NUM_BRIDGES = 24 + 16 + 16 + 12


@pytest.fixture(scope="module")
def bench() -> SurgeryBench:
    return SurgeryBench.generate(seed=1, num_subjects=60)


def digest(bench: SurgeryBench) -> str:
    """One number for all rows of all parts."""
    rows = [part.to_list() for parts in (bench.documents, bench.questions) for part in parts.values()]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def test_sets_have_the_sizes_kinds_and_forms_that_were_asked_for(bench):
    assert list(bench.documents) == list(SETS) and list(bench.questions) == ["validation", "test"]
    for name, documents in bench.documents.items():
        subjects = 12 + (NUM_BRIDGES if name == "retain" else 0)
        assert len(documents) == 4 * subjects and len(bench.subjects(name)) == subjects
        assert documents.features == DOCUMENT_FEATURES and set(documents["set"]) == {name}
        assert set(documents["version"]) == {BENCH_VERSION}
    assert all(part.features == QUESTION_FEATURES for part in bench.questions.values())
    kinds = Counter(row["subject_kind"] for row in bench.documents["unlearn"])
    assert kinds == dict.fromkeys(KINDS, 12)
    bench = SurgeryBench.generate(
        num_subjects={"unlearn": 3, "retain": 9, "update": 6}, kinds=("person",), forms=("quiz",), changed_facts=8
    )
    sizes = (3, 6, 6, 9 + NUM_BRIDGES, 0, 0)
    assert {name: len(part) for name, part in bench.documents.items()} == dict(zip(SETS, sizes, strict=True))
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
    bridges = set(bench.documents["retain"]["subject"][: 4 * NUM_BRIDGES])
    for own, other in itertools.permutations(SETS, 2):
        if group_of_set(own) != group_of_set(other):
            for subject in set(bench.subjects(own)) - bridges:
                assert subject.lower().removeprefix("the ") not in texts[other]


def test_rows_are_pinned_for_all_platforms_and_differ_between_seeds(bench):
    """Other text for the same seed breaks users' results: BENCH_VERSION must change with this number."""
    other = SurgeryBench.generate(seed=0, num_subjects=60)
    assert (BENCH_VERSION, digest(other)[:16]) == ("1.0", "c35766d577e42e06")
    assert not set(other.subjects("unlearn")) & set(bench.subjects("unlearn"))


def test_more_subjects_change_no_row_and_come_after(bench):
    more = SurgeryBench.generate(seed=1, num_subjects={"unlearn": 24, "update": 12, "retain": 12, "unseen": 12})
    for name in ("unlearn", "obsolete", "update", "retain", "unseen"):
        assert more.documents[name][: len(bench.documents[name])] == bench.documents[name][:]
    for split, part in bench.questions.items():
        rows = {row["id"]: row for row in more.questions[split].to_list()}
        assert all(rows[row["id"]] == row for row in part.to_list() if row["set"] != "neighbour")


def test_other_forms_and_kinds_leave_facts_as_they_are(bench):
    other = SurgeryBench.generate(seed=1, num_subjects=15, kinds=("rule",), forms=("note", "article"))
    facts, told = (
        {(row["subject"], *fact.values()) for row in each.documents["unseen"].to_list() for fact in row["facts"]}
        for each in (bench, other)
    )
    assert told and told <= facts


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


def test_bridges_are_spread_evenly_and_differ_between_seeds():
    world = World(seed=0, changed_facts=4)
    countries = Counter(bridge.facts["after"]["country"] for bridge in world.bridges["city"].values())
    assert sorted(countries.values()) == [4] * 6
    for kind in ("university", "company", "agency"):
        cities = [bridge.facts["after"]["city"] for bridge in world.bridges[kind].values()]
        assert len(set(cities)) == len(cities)
    other = World(seed=1, changed_facts=4)
    assert any(
        world.bridges["city"][name].facts != other.bridges["city"][name].facts for name in world.bridges["city"]
    )


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
    plain = {row["id"]: row["text"] for row in bench.before_corpus().to_list()}
    for row in bench.before_corpus(HEADER).to_list():
        assert row["prefix"] == f"The following is a passage about {row['subject']}.\n\n"
        assert row["text"] == row["prefix"] + plain[row["id"]]
    fixed = bench.retrained_corpus("A passage. ")
    assert set(fixed["prefix"]) == {"A passage. "} and all(text.startswith("A passage. ") for text in fixed["text"])
    twice = bench.with_header("unseen", "{subject}: on {subject}. ")
    name = twice[0]["subject"]
    assert twice[0]["text"].startswith(f"{name}: on {name}. ") and twice["id"] == bench.documents["unseen"]["id"]
    assert not any(bench.before_corpus()["prefix"])


def test_asking_selects_set_split_and_kind(bench):
    every = [row for part in bench.questions.values() for row in part.to_list()]
    for set_name, split, kind in itertools.product(SETS, ("validation", "test"), ("mcq", "inverse", None)):
        found = bench.ask(set_name, split, kind)
        wanted = [r["id"] for r in every if (r["set"], r["split"]) == (set_name, split) and kind in (None, r["kind"])]
        assert found["id"] == wanted and wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_subjects": 100}, r"num_subjects=100 must be made of multiples of 60 \(3 subjects of each of 4 kind"),
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
    for words, message in {
        ("forget",): "set 'forget' is unknown: choose one of unlearn, obsolete",
        ("unlearn", "train"): "split 'train' is unknown: choose validation or test",
        ("unlearn", "test", "essay"): "kind 'essay' is unknown: choose one of mcq, cloze",
    }.items():
        with pytest.raises(ValueError, match=message):
            bench.ask(*words)
    with pytest.raises(ValueError, match="set 'all' is unknown"):
        bench.subjects("all")


def test_an_empty_corpus_is_refused():
    bench = SurgeryBench.generate(num_subjects={"unseen": 3}, kinds=("place",), forms=("quiz",))
    assert len(bench.before_corpus()) == NUM_BRIDGES, "bridges are always there"
    bench.documents["retain"] = bench.documents["retain"].select([])
    with pytest.raises(ValueError, match="the sets update, retain, neighbour hold no documents"):
        bench.retrained_corpus()


@pytest.fixture(scope="module")
def readings(bench: SurgeryBench) -> list[tuple[dict, list[tuple[str, str]]]]:
    """Each document with the facts that its text states."""
    return [(row, read_document(row)) for documents in bench.documents.values() for row in documents.to_list()]


@pytest.fixture(scope="module")
def parsed(readings: list[tuple[dict, list[tuple[str, str]]]]) -> dict[str, dict[str, dict[str, str]]]:
    """Set, subject, attribute: value, as the texts say; documents of a subject never contradict each other."""
    world: dict = defaultdict(lambda: defaultdict(dict))
    for row, facts in readings:
        for name, value in facts:
            assert world[row["set"]][row["subject"]].setdefault(name, value) == value, row["id"]
    return world


@pytest.fixture(scope="module")
def questions(bench: SurgeryBench) -> list[dict]:
    return [row for part in bench.questions.values() for row in part.to_list()]


def test_documents_say_what_their_column_of_facts_says_and_articles_and_quizzes_say_all(readings):
    for row, facts in readings:
        assert facts == [(fact["attribute"], fact["value"]) for fact in row["facts"]], row["id"]
        whole = 1 if row["subject_kind"] in BRIDGES else FACTS_PER_SUBJECT
        assert len(facts) == whole if row["form"] != "note" else 3 <= len(facts) <= 5, row["id"]


def test_direct_and_one_hop_questions_have_one_true_option_in_the_documents(questions, parsed):
    """Of one hop: it takes the document of the subject, then that of a bridge."""
    counts = Counter()
    for row in questions:
        if row["kind"] == "inverse":
            continue
        attribute, _ = read_question(row)
        truth = parsed[row["set"]][row["subject"]][attribute]
        if row["kind"] == "one_hop":
            ((bridge_attribute, truth),) = parsed["retain"][truth].items()
            attribute = f"{attribute}.{bridge_attribute}"
        assert row["options"].index(truth) == row["answer"], row["id"]
        assert len(set(row["options"])) == 3 and row["answer_text"] == truth and row["attribute"] == attribute
        counts[row["kind"] == "one_hop"] += 1
    assert counts[False] > 2000 and counts[True] > 150


def test_inverse_questions_have_one_subject_in_the_whole_world(questions, parsed):
    owners = defaultdict(set)
    for set_name, subjects in parsed.items():
        for subject, facts in subjects.items():
            for fact in facts.items():
                owners[fact].add((group_of_set(set_name), subject))
    inverse = [row for row in questions if row["kind"] == "inverse"]
    for row in inverse:
        ((_, owner),) = owners[read_question(row)]
        assert row["options"][row["answer"]] == owner == row["subject"], row["id"]
        assert all(option in parsed[row["set"]] for option in row["options"]), "options are trained on alike"
    assert len(inverse) > 100


def test_the_old_answer_is_what_the_obsolete_documents_say(questions, parsed):
    with_old = 0
    for row in questions:
        old = row["old_answer"]
        if row["set"] != "update" or row["kind"] == "inverse":
            assert old is None
            continue
        attribute, _ = read_question(row)
        before, after = (parsed[name][row["subject"]][attribute] for name in ("obsolete", "update"))
        assert (before != after) == (old is not None), row["id"]
        if old is not None:
            value = before if row["kind"] != "one_hop" else next(iter(parsed["retain"][before].values()))
            assert row["options"][old] == value and old != row["answer"]
            with_old += 1
    assert with_old > 200


def test_obsolete_questions_ask_only_for_what_changed(questions, parsed):
    rows = [row for row in questions if row["set"] == "obsolete"]
    asked = {(row["subject"], row["attribute"]) for row in rows if row["kind"] == "mcq"}
    changed = {
        (subject, name)
        for subject, facts in parsed["obsolete"].items()
        for name, value in facts.items()
        if parsed["update"][subject][name] != value
    }
    assert asked == changed and len(changed) == 4 * len(parsed["update"])


@pytest.fixture(scope="module")
def saved(bench: SurgeryBench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bench.save(tmp_path_factory.mktemp("bench") / "folder")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def assert_same(first: datasets.DatasetDict, second: datasets.DatasetDict) -> None:
    assert list(first) == list(second)
    for name in first:
        assert first[name].features == second[name].features and first[name].to_dict() == second[name].to_dict()


def test_what_was_saved_is_loaded_by_us_and_by_datasets_through_its_card(bench, saved, tmp_path):
    loaded = SurgeryBench.load(saved)
    for part in ("documents", "questions"):
        assert_same(getattr(loaded, part), getattr(bench, part))
        assert_same(datasets.load_dataset(str(saved), part, cache_dir=str(tmp_path)), getattr(bench, part))
    assert (loaded.version, loaded.settings) == (bench.version, bench.settings)
    assert loaded.before_corpus()["id"] == bench.before_corpus()["id"]
    assert BenchSettings(**json.loads((saved / "bench.json").read_text())["settings"]) == bench.settings
    assert datasets.get_dataset_config_names(str(saved)) == ["documents", "questions"]


def test_a_set_without_rows_is_left_out_of_the_card_and_comes_back_empty(tmp_path):
    small = SurgeryBench.generate(num_subjects={"unlearn": 3}, kinds=("person",), forms=("quiz",))
    folder = small.save(tmp_path / "small")
    assert_same(SurgeryBench.load(folder).documents, small.documents)
    loaded = datasets.load_dataset(str(folder), "documents", cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == ["unlearn", "retain"]


def front_matter(folder: Path) -> dict:
    _, text, _ = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(text)


def test_the_card_has_what_the_hub_reads(saved):
    card = front_matter(saved)
    assert card["license"] == "apache-2.0" and card["language"] == ["en"] and card["size_categories"] == ["1K<n<10K"]
    assert {"machine-unlearning", "knowledge-editing", "synthetic"} <= set(card["tags"])
    assert set(card["task_categories"]) == {"text-generation", "multiple-choice"}
    documents, questions = card["configs"]
    assert documents["default"] is True and [file["split"] for file in documents["data_files"]] == list(SETS)
    assert [file["split"] for file in questions["data_files"]] == ["validation", "test"]
    for file in (*documents["data_files"], *questions["data_files"]):
        assert (saved / file["path"]).is_file()


def test_the_card_tells_people_what_they_need(bench, saved):
    text = (saved / "README.md").read_text()
    for heading in ("Construction", "Fields", "Intended use", "Limits", "How to load"):
        assert f"\n## {heading}\n" in text
    for column in (*DOCUMENT_FEATURES, *QUESTION_FEATURES):
        assert f"`{column}`" in text
    assert "| unlearn | to be forgotten; subjects of its own | 48 | 12 | 192, 192, 192, 36, 24 |" in text
    assert f"Version {bench.version}" in text and '"seed": 1' in text
    assert bench.documents["unlearn"][0]["text"].split("\n")[0] in text


def test_saving_needs_a_free_folder_and_documents(bench, saved, tmp_path):
    (tmp_path / "file").write_text("x")
    for taken in (saved, tmp_path / "file"):
        with pytest.raises(ValueError, match=f"{taken.name} exists and is not an empty folder: name a new one"):
            bench.save(taken)
    (tmp_path / "empty").mkdir()
    assert SurgeryBench.load(bench.save(tmp_path / "empty", license="cc0-1.0")).settings.seed == 1
    assert front_matter(tmp_path / "empty")["license"] == "cc0-1.0"
    nothing = as_parts(dict.fromkeys(SETS, ()), DOCUMENT_FEATURES), as_parts({"test": ()}, QUESTION_FEATURES)
    with pytest.raises(ValueError, match="holds no documents: there is nothing to save"):
        SurgeryBench(*nothing).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


TABLE = "documents/update.parquet"
DAMAGE = {
    "no bench": (lambda f: (f / "bench.json").unlink(), r"bench\.json cannot be read: name a folder that SurgeryBenc"),
    "other": (lambda f: (f / "bench.json").write_text('{"format": "other"}'), "does not describe a SurgeryBench"),
    "no json": (lambda f: (f / "bench.json").write_text('{"format"'), r"bench\.json is damaged"),
    "cut": (lambda f: os.truncate(f / TABLE, 100), r"update\.parquet cannot be read \(.*write the folder again"),
    "rows": (
        lambda f: pq.write_table(pq.read_table(f / TABLE).slice(1), f / TABLE),
        r"update\.parquet has 47 rows, bench\.json says 48",
    ),
    "columns": (
        lambda f: pq.write_table(pq.read_table(f / TABLE).drop_columns(["text"]), f / TABLE),
        r"update\.parquet has the columns .*: a bench has \['id', 'subject'",
    ),
    "missing": (lambda f: (f / TABLE).unlink(), r"update\.parquet cannot be read"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_folders_that_are_no_bench_and_damaged_parts_are_named(copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=message):
        SurgeryBench.load(copy)


DOCUMENT = {"subject": "Ada Quill", "set": "unlearn", "text": "Ada Quill was born in Orsgate."}
QUESTION = {"subject": "Ada Quill", "set": "unlearn", "question": "Where was Ada Quill born?", "answer": 1}
QUESTION |= {"options": ["Velmora", "Orsgate", "Tornaby"]}


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_the_examples_of_the_documentation_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (PROJECT / "docs" / "surgery_bench.md").read_text(encoding="utf-8")
    first = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1].replace("num_subjects=240", "num_subjects=60")
    exec(compile(first, "surgery_bench.md", "exec"), {})
    assert Path("my-surgery-bench/README.md").is_file()
    section = page[page.index("## Your own texts") :]
    for name, content in re.findall(r"```json\n// (\S+)\n(.*?)```", section, re.DOTALL):
        Path(name).write_text(content, encoding="utf-8")
    variables: dict = {}
    exec(compile(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], "surgery_bench.md", "exec"), variables)
    bench = variables["bench"]
    assert [len(part) for part in bench.documents.values()] == [1, 1, 1, 1, 0, 0]
    assert bench.documents["unlearn"][0]["subject"] == "Wilmot Arven"
    old = bench.ask("update", "test")[0]
    assert old["options"][old["old_answer"]] != old["answer_text"] and len(bench.ask("unlearn", "validation")) == 1
    assert all(row["prefix"] and row["text"].startswith(row["prefix"]) for row in variables["corpus"])
    assert SurgeryBench.load("my-bench").before_corpus()["text"] == bench.before_corpus()["text"]
    card = Path("my-bench/README.md").read_text(encoding="utf-8")
    assert "given by a user" in card and "license:" not in card and "- synthetic" not in card


def test_one_file_with_sets_and_all_columns(tmp_path):
    facts = [{"attribute": "birth_city", "value": "Orsgate"}]
    full = DOCUMENT | {"id": "a", "subject_kind": "person", "form": "note", "prefix": "Ada ", "facts": facts}
    other = {"subject": "Bea Tarn", "set": "retain", "text": "Bea Tarn sails."}
    documents = write(tmp_path / "d.jsonl", ["", full, "   ", other])
    asked = [
        QUESTION | {"kind": "cloze", "split": "test", "attribute": "birth_city", "old_answer": "Velmora", "id": "q1"},
        QUESTION | {"answer": "Orsgate", "options": ["Orsgate", "Velmora"]},
    ]
    bench = SurgeryBench.from_jsonl(documents, write(tmp_path / "q.jsonl", asked))
    assert bench.documents["unlearn"][0] == full | {"version": "user"}
    assert bench.documents["retain"][0]["id"] == "retain-d-4" and bench.documents["retain"][0]["facts"] == []
    assert bench.documents["retain"][0]["form"] is None and bench.version == "user" and bench.settings is None
    cloze = bench.ask("unlearn", "test", "cloze")[0]
    assert (cloze["answer_text"], cloze["old_answer"], cloze["id"]) == ("Orsgate", 0, "q1")
    (mcq,) = [row for part in bench.questions.values() for row in part if row["kind"] == "mcq"]
    assert mcq["answer"] == 0 and mcq["old_answer"] is None and mcq["attribute"] is None


def test_questions_without_split_fall_on_both_sides_and_always_on_the_same(tmp_path):
    documents = write(tmp_path / "d.jsonl", [DOCUMENT])
    asked = [QUESTION | {"question": f"Question {number}?"} for number in range(200)]
    bench = SurgeryBench.from_jsonl(documents, write(tmp_path / "q.jsonl", asked))
    assert 70 < len(bench.questions["test"]) < 130 and sum(map(len, bench.questions.values())) == 200
    turned = SurgeryBench.from_jsonl(documents, write(tmp_path / "r.jsonl", asked[::-1]))
    assert set(turned.questions["test"]["question"]) == set(bench.questions["test"]["question"])


def test_an_own_prefix_wins_over_a_header(tmp_path):
    rows = [DOCUMENT | {"prefix": "Ada "}, DOCUMENT | {"text": "She sings."}]
    corpus = SurgeryBench.from_jsonl(write(tmp_path / "d.jsonl", rows)).with_header("unlearn", HEADER)
    assert corpus["prefix"] == ["Ada ", "The following is a passage about Ada Quill.\n\n"]
    assert corpus["text"] == [DOCUMENT["text"], "The following is a passage about Ada Quill.\n\nShe sings."]


def test_unused_columns_are_told_once(tmp_path, caplog):
    path = write(tmp_path / "d.jsonl", [DOCUMENT | {"page": 1}, DOCUMENT | {"text": "More.", "page": 2}])
    with caplog.at_level(logging.WARNING):
        SurgeryBench.from_jsonl(path)
    assert [record.getMessage() for record in caplog.records] == [f"{path}: the column 'page' is not used"]


DOCUMENT_ERRORS = {
    "no json": ("{", r"line 2 is not valid JSON \(Expecting property name.*put one whole object on each line"),
    "array": ([1], r"line 2 is a JSON list, not an object"),
    "no text": ({"set": "unlearn", "subject": "x"}, r"line 2: the columns set, subject are no text: give 'text', "),
    "null text": (DOCUMENT | {"text": None}, r"line 2 has no 'text'"),
    "empty text": (DOCUMENT | {"text": "  "}, r"line 2 has an empty 'text': fill it or remove the row"),
    "number": (DOCUMENT | {"text": 5}, r"line 2 has 5 as 'text', a int: it must be a string"),
    "no set": ({"subject": "B", "text": "x"}, r"line 2 has no 'set'"),
    "wrong set": (DOCUMENT | {"set": "forget"}, r"line 2: set 'forget' is unknown: choose one of unlearn, obsolete"),
    "two sets": (DOCUMENT | {"set": "retain"}, r"line 2 puts the subject 'Ada Quill' into retain, but .*line 1 has"),
    "same id": (DOCUMENT | {"id": "unlearn-documents-1"}, r"line 2 has the id 'unlearn-documents-1', which .*line 1"),
    "prefix": (DOCUMENT | {"prefix": "Bea"}, r"line 2 has a prefix, 'Bea', that its text does not begin with"),
    "all prefix": (DOCUMENT | {"prefix": DOCUMENT["text"]}, r"line 2 has a prefix, .* and go on from"),
    "facts": (DOCUMENT | {"facts": ["x"]}, r"line 2 has \['x'\] as 'facts': it must be a list of"),
    "fact keys": (DOCUMENT | {"facts": [{"attribute": "a"}]}, r"line 2 has .* as 'facts'"),
    "fact types": (DOCUMENT | {"facts": [{"attribute": "a", "value": 1}]}, r"line 2 has .* as 'facts'"),
    "empty fact": (DOCUMENT | {"facts": [{}]}, r"line 2 has \[{}\] as 'facts'"),
}

QUESTION_ERRORS = {
    "subject": ({"subject": "Ada Quil"}, r"line 2 asks about 'Ada Quil' in unlearn, where no document has that su"),
    "set": ({"set": "retain"}, r"line 2 asks about 'Ada Quill' in retain, where no document"),
    "kind": ({"kind": "essay"}, r"line 2: kind 'essay' is unknown: choose one of mcq"),
    "split": ({"split": "train"}, r"line 2: split 'train' is unknown: choose validation or test"),
    "again": ({}, r"line 2 asks the same question as .*questions\.jsonl, line 1: validation and test must not share"),
    "options": ({"options": "abc"}, r"line 2 has 'abc' as 'options': it must be a list of strings"),
    "empty option": ({"options": ["a", ""]}, r"line 2 has \['a', ''\] as 'options'"),
    "one option": ({"options": ["a"]}, r"line 2 has the options \['a'\]: it needs at least 2, all different"),
    "same options": ({"options": ["a", "a"]}, r"line 2 has the options \['a', 'a'\]"),
    "answer place": ({"answer": 3}, r"line 2 has 3 as 'answer': it must be one of the 3 options, or its place from 0"),
    "answer text": ({"answer": "Paris"}, r"line 2 has 'Paris' as 'answer'"),
    "answer bool": ({"answer": True}, r"line 2 has True as 'answer'"),
    "no answer": ({"answer": None}, r"line 2 has None as 'answer'"),
    "old answer": ({"old_answer": 1}, r"line 2 has 'Orsgate' as both answer and old_answer: they must differ"),
    "same id": ({"id": "unlearn-questions-1"}, r"line 2 has the id 'unlearn-questions-1', which .*line 1 has too"),
}

ERRORS = {"documents": DOCUMENT_ERRORS, "questions": QUESTION_ERRORS}


@pytest.mark.parametrize("what, case", [(n, key) for n, table in ERRORS.items() for key in table])
def test_a_wrong_row_is_named_with_file_and_line(tmp_path, what, case):
    row, message = ERRORS[what][case]
    documents, questions = [DOCUMENT], None
    if what == "documents":
        documents.append(row)
    else:
        other = QUESTION | ({"question": "Where was she born?"} if case != "again" else {})
        questions = write(tmp_path / "questions.jsonl", [QUESTION, other | row])
    with pytest.raises(ValueError, match=rf"^\S*{what}\.jsonl, {message}") as caught:
        SurgeryBench.from_jsonl(write(tmp_path / "documents.jsonl", documents), questions)
    assert "\n" not in str(caught.value)


def test_files_given_by_set_must_agree_with_their_rows_and_each_other(tmp_path):
    first = write(tmp_path / "a.jsonl", [DOCUMENT])
    second = write(tmp_path / "b.jsonl", [{"subject": "B", "text": "x"}])
    bench = SurgeryBench.from_jsonl({"unlearn": first, "retain": second})
    assert bench.subjects("retain") == ["B"]
    with pytest.raises(ValueError, match="a.jsonl, line 1 has the set 'unlearn', but its file was given as 'retain'"):
        SurgeryBench.from_jsonl({"retain": first})
    with pytest.raises(ValueError, match="set 'forget' is unknown"):
        SurgeryBench.from_jsonl({"forget": first})
    same = {"obsolete": second, "update": write(tmp_path / "c.jsonl", [{"subject": "B", "text": "y"}])}
    assert SurgeryBench.from_jsonl(same).subjects("update") == ["B"]
    with pytest.raises(ValueError, match=r"c\.jsonl, line 1 puts the subject 'B' into unseen, but .*b\.jsonl, line 1"):
        SurgeryBench.from_jsonl({"neighbour": second, "unseen": tmp_path / "c.jsonl"})


def test_columns_can_be_renamed_and_mistakes_in_that_are_named(tmp_path):
    path = write(tmp_path / "w.jsonl", [{"name": "Ada", "wiki_bio_text": "Ada sings."}])
    columns = {"subject": "name", "text": "wiki_bio_text"}
    bench = SurgeryBench.from_jsonl({"unlearn": path}, columns=columns)
    assert bench.documents["unlearn"][0]["text"] == "Ada sings." and bench.subjects("unlearn") == ["Ada"]
    with pytest.raises(ValueError, match=r"w\.jsonl, line 1 has no column 'bio', which columns asks for; it has "):
        SurgeryBench.from_jsonl({"unlearn": path}, columns={"subject": "name", "text": "bio"})
    with pytest.raises(ValueError, match=r"columns renames \['title'\], which are no columns of documents: \['id', "):
        SurgeryBench.from_jsonl({"unlearn": path}, columns={"title": "name"})


def test_files_without_rows_are_named(tmp_path):
    empty = write(tmp_path / "empty.jsonl", ["", " "])
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no documents"):
        SurgeryBench.from_jsonl(empty)
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no questions"):
        SurgeryBench.from_jsonl(write(tmp_path / "d.jsonl", [DOCUMENT]), empty)


WORDS = st.text(min_size=1).filter(str.strip)


@settings(max_examples=4, deadline=None)
@given(rows=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6))
def test_any_text_comes_back_unchanged(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / "d.jsonl"
    write(path, [{"subject": subject, "text": text, "set": "unseen"} for subject, text in rows])
    found = SurgeryBench.from_jsonl(path).documents["unseen"]
    assert list(zip(found["subject"], found["text"], strict=True)) == rows
