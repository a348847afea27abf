"""A user's own rows: the examples of the documentation run, and whatever is wrong is named with its line."""

import json
import logging
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_moe_cpt.data.surgery_bench import HEADER, SurgeryBench
from tests.helpers.source_tree import PROJECT


DOCUMENT = {"subject": "Ada Quill", "set": "unlearn", "text": "Ada Quill was born in Orsgate."}
QUESTION = {
    "subject": "Ada Quill",
    "set": "unlearn",
    "question": "Where was Ada Quill born?",
    "options": ["Velmora", "Orsgate", "Tornaby"],
    "answer": 1,
}


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_the_worked_example_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (PROJECT / "docs" / "surgery_bench.md").read_text(encoding="utf-8")
    section = page[page.index("## Your own texts") :]
    for name, content in re.findall(r"```json\n// (\S+)\n(.*?)```", section, re.DOTALL):
        Path(name).write_text(content, encoding="utf-8")
    variables: dict = {}
    exec(compile(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], "surgery_bench.md", "exec"), variables)
    bench = variables["bench"]
    assert {name: len(part) for name, part in bench.documents.items() if len(part)} == {
        "unlearn": 1,
        "obsolete": 1,
        "update": 1,
        "retain": 1,
    }
    assert bench.documents["unlearn"][0]["subject"] == "Wilmot Arven"
    old = bench.ask("update", "test")[0]
    assert old["options"][old["old_answer"]] != old["answer_text"] and len(bench.ask("unlearn", "validation")) == 1
    assert all(row["prefix"] and row["text"].startswith(row["prefix"]) for row in variables["corpus"])
    assert SurgeryBench.load("my-bench").before_corpus()["text"] == bench.before_corpus()["text"]
    card = Path("my-bench/README.md").read_text(encoding="utf-8")
    assert "given by a user" in card and "license:" not in card and "- synthetic" not in card


def test_the_first_example_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (PROJECT / "docs" / "surgery_bench.md").read_text(encoding="utf-8")
    exec(compile(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], "surgery_bench.md", "exec"), {})
    assert (tmp_path / "my-surgery-bench" / "README.md").is_file()


def test_one_file_with_sets_and_all_columns(tmp_path):
    full = DOCUMENT | {
        "id": "a",
        "subject_kind": "person",
        "form": "note",
        "prefix": "Ada ",
        "facts": [{"attribute": "birth_city", "value": "Orsgate"}],
    }
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


def test_a_byte_order_mark_and_no_questions_are_fine(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(DOCUMENT).encode())
    bench = SurgeryBench.from_jsonl(path)
    assert len(bench.documents["unlearn"]) == 1 and not any(map(len, bench.questions.values()))


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
    "no subject": ({"set": "unlearn", "text": "x"}, r"line 2 has no 'subject': it has \['set', 'text'\]"),
    "no text": ({"set": "unlearn", "subject": "x"}, r"line 2 has no 'text'"),
    "null text": (DOCUMENT | {"text": None}, r"line 2 has no 'text'"),
    "empty text": (DOCUMENT | {"text": "  "}, r"line 2 has an empty 'text': fill it or remove the row"),
    "number": (DOCUMENT | {"text": 5}, r"line 2 has 5 as 'text', a int: it must be a string"),
    "no set": ({"subject": "B", "text": "x"}, r"line 2 has no 'set'"),
    "wrong set": (DOCUMENT | {"set": "forget"}, r"line 2: set 'forget' is unknown: choose one of unlearn, obsolete"),
    "two sets": (
        DOCUMENT | {"set": "retain"},
        r"line 2 puts the subject 'Ada Quill' into retain, but .*d\.jsonl, line 1 has it in unlearn: a subject",
    ),
    "same id": (DOCUMENT | {"id": "unlearn-d-1"}, r"line 2 has the id 'unlearn-d-1', which .*line 1 has too"),
    "prefix": (DOCUMENT | {"prefix": "Bea"}, r"line 2 has a prefix, 'Bea', that its text does not begin with"),
    "all prefix": (DOCUMENT | {"prefix": DOCUMENT["text"]}, r"line 2 has a prefix, .* and go on from"),
    "facts": (DOCUMENT | {"facts": ["x"]}, r"line 2 has \['x'\] as 'facts': it must be a list of"),
    "fact keys": (DOCUMENT | {"facts": [{"attribute": "a"}]}, r"line 2 has .* as 'facts'"),
    "fact types": (DOCUMENT | {"facts": [{"attribute": "a", "value": 1}]}, r"line 2 has .* as 'facts'"),
    "empty fact": (DOCUMENT | {"facts": [{}]}, r"line 2 has \[{}\] as 'facts'"),
}


@pytest.mark.parametrize("case", DOCUMENT_ERRORS)
def test_a_wrong_document_is_named_with_file_and_line(tmp_path, case):
    row, message = DOCUMENT_ERRORS[case]
    path = write(tmp_path / "d.jsonl", [DOCUMENT, row])
    with pytest.raises(ValueError, match=r"^\S*d\.jsonl, " + message) as caught:
        SurgeryBench.from_jsonl(path)
    assert "\n" not in str(caught.value)


QUESTION_ERRORS = {
    "subject": (
        {"subject": "Ada Quil"},
        r"line 2 asks about 'Ada Quil' in unlearn, where no document has that subject",
    ),
    "set": ({"set": "retain"}, r"line 2 asks about 'Ada Quill' in retain, where no document"),
    "kind": ({"kind": "essay"}, r"line 2: kind 'essay' is unknown: choose one of mcq"),
    "split": ({"split": "train"}, r"line 2: split 'train' is unknown: choose validation or test"),
    "again": ({}, r"line 2 asks the same question as .*q\.jsonl, line 1: validation and test must not share any"),
    "options": ({"options": "abc"}, r"line 2 has 'abc' as 'options': it must be a list of strings"),
    "empty option": ({"options": ["a", ""]}, r"line 2 has \['a', ''\] as 'options'"),
    "one option": ({"options": ["a"]}, r"line 2 has the options \['a'\]: it needs at least 2, all different"),
    "same options": ({"options": ["a", "a"]}, r"line 2 has the options \['a', 'a'\]"),
    "answer place": (
        {"answer": 3},
        r"line 2 has 3 as 'answer': it must be one of the 3 options, or its place from 0 to 2",
    ),
    "answer text": ({"answer": "Paris"}, r"line 2 has 'Paris' as 'answer'"),
    "answer bool": ({"answer": True}, r"line 2 has True as 'answer'"),
    "no answer": ({"answer": None}, r"line 2 has None as 'answer'"),
    "old answer": ({"old_answer": 1}, r"line 2 has 'Orsgate' as both answer and old_answer: they must differ"),
    "same id": ({"id": "unlearn-q-1"}, r"line 2 has the id 'unlearn-q-1', which .*line 1 has too"),
}


@pytest.mark.parametrize("case", QUESTION_ERRORS)
def test_a_wrong_question_is_named_with_file_and_line(tmp_path, case):
    change, message = QUESTION_ERRORS[case]
    other = QUESTION | ({"question": "Where was she born?"} if case != "again" else {})
    documents = write(tmp_path / "d.jsonl", [DOCUMENT])
    questions = write(tmp_path / "q.jsonl", [QUESTION, other | change])
    with pytest.raises(ValueError, match=r"^\S*q\.jsonl, " + message) as caught:
        SurgeryBench.from_jsonl(documents, questions)
    assert "\n" not in str(caught.value)


def test_files_given_by_set_must_agree_with_their_rows_and_each_other(tmp_path):
    first, second = (
        write(tmp_path / "a.jsonl", [DOCUMENT]),
        write(tmp_path / "b.jsonl", [{"subject": "B", "text": "x"}]),
    )
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
    with pytest.raises(
        ValueError, match=r"w\.jsonl, line 1 has no column 'bio', which columns asks for; it has \['wiki"
    ):
        SurgeryBench.from_jsonl({"unlearn": path}, columns={"subject": "name", "text": "bio"})
    with pytest.raises(ValueError, match=r"columns renames \['title'\], which are no columns of documents: \['id', "):
        SurgeryBench.from_jsonl({"unlearn": path}, columns={"title": "name"})


def test_files_that_are_missing_empty_or_not_utf8_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*none\.jsonl: No such file or directory; check the path"):
        SurgeryBench.from_jsonl(tmp_path / "none.jsonl")
    empty = write(tmp_path / "empty.jsonl", ["", " "])
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no documents"):
        SurgeryBench.from_jsonl(empty)
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no questions"):
        SurgeryBench.from_jsonl(write(tmp_path / "d.jsonl", [DOCUMENT]), empty)
    (tmp_path / "latin.jsonl").write_bytes(b'{"subject": "Caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl, line 1 is not UTF-8 text: convert"):
        SurgeryBench.from_jsonl(tmp_path / "latin.jsonl")


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip)), min_size=1, max_size=6
    )
)
def test_any_text_comes_back_unchanged(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / "d.jsonl"
    write(path, [{"subject": subject, "text": text, "set": "unseen"} for subject, text in rows])
    found = SurgeryBench.from_jsonl(path).documents["unseen"]
    assert list(zip(found["subject"], found["text"], strict=True)) == rows


def test_generated_rows_can_be_read_as_a_users_own(tmp_path):
    bench = SurgeryBench.generate(num_subjects=15, kinds=("product",), forms=("article",))
    for name in ("documents", "questions"):
        parts = getattr(bench, name).values()
        write(tmp_path / f"{name}.jsonl", [row for part in parts for row in part])
    again = SurgeryBench.from_jsonl(tmp_path / "documents.jsonl", tmp_path / "questions.jsonl")
    for name in ("documents", "questions"):
        for key, part in getattr(bench, name).items():
            found = [row | {"version": bench.version} for row in getattr(again, name)[key]]
            assert found == list(part)
