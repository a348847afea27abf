"""Documents are parsed back into facts, and every question is answered from what was parsed, not from the world."""

from collections import defaultdict

import pytest

from hf_moe_cpt.data.surgery_bench import SurgeryBench
from hf_moe_cpt.data.surgery_bench_schema import group_of_set
from hf_moe_cpt.data.surgery_bench_world import FACTS_PER_SUBJECT, HUB_KINDS, KINDS
from tests.helpers.surgery_bench_reader import read_document, read_question, read_sentence


@pytest.fixture(scope="module")
def bench() -> SurgeryBench:
    return SurgeryBench.generate(seed=5, num_subjects=60, forms=("article", "note", "quiz", "article"))


@pytest.fixture(scope="module")
def readings(bench: SurgeryBench) -> list[tuple[dict, list[tuple[str, str]]]]:
    """Each document with the facts that its text states."""
    return [(row, read_document(row)) for documents in bench.documents.values() for row in documents]


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
    return [row for part in bench.questions.values() for row in part]


def test_documents_say_what_their_column_of_facts_says(readings):
    for row, facts in readings:
        assert facts == [(fact["attribute"], fact["value"]) for fact in row["facts"]], row["id"]


def test_every_article_and_quiz_states_all_facts_of_its_subject(readings):
    for row, facts in readings:
        whole = 1 if row["subject_kind"] in HUB_KINDS else FACTS_PER_SUBJECT
        assert len(facts) == whole if row["form"] != "note" else 3 <= len(facts) <= 5, row["id"]


def test_direct_questions_have_one_true_option_in_the_documents(questions, parsed):
    count = 0
    for row in questions:
        if row["kind"] in ("mcq", "cloze", "paraphrase"):
            attribute, _ = read_question(row)
            truth = parsed[row["set"]][row["subject"]][attribute]
            assert row["options"].index(truth) == row["answer"], row["id"]
            assert len(set(row["options"])) == 3 and row["answer_text"] == truth and row["attribute"] == attribute
            count += 1
    assert count > 2000


def test_one_hop_questions_need_the_documents_of_the_subject_and_of_a_hub(questions, parsed):
    count = 0
    for row in questions:
        if row["kind"] == "one_hop":
            attribute, _ = read_question(row)
            hub = parsed[row["set"]][row["subject"]][attribute]
            ((hub_attribute, truth),) = parsed["retain"][hub].items()
            assert row["attribute"] == f"{attribute}.{hub_attribute}"
            assert row["options"].index(truth) == row["answer"] and len(set(row["options"])) == 3, row["id"]
            count += 1
    assert count > 150


def test_inverse_questions_have_one_subject_in_the_whole_world(questions, parsed):
    owners = defaultdict(set)
    for set_name, subjects in parsed.items():
        for subject, facts in subjects.items():
            for name, value in facts.items():
                owners[name, value].add((group_of_set(set_name), subject))
    count = 0
    for row in questions:
        if row["kind"] == "inverse":
            ((_, owner),) = owners[read_question(row)]
            assert row["options"][row["answer"]] == owner == row["subject"], row["id"]
            assert all(option in parsed[row["set"]] for option in row["options"]), "options are trained on alike"
            count += 1
    assert count > 100


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


def test_the_reader_refuses_what_it_should():
    """Otherwise the tests above could not fail."""
    person = KINDS["person"]
    assert read_sentence("Norvald Brellow studied at Halvern College.", person, "Norvald Brellow") == (
        ("university", "Halvern College"),
    )
    for wrong in (
        "Norvald Brellow studied at Hogwarts.",
        "Somebody Else studied at Halvern College.",
        "Norvald Brellow liked Halvern College.",
    ):
        with pytest.raises(ValueError, match="0 readings"):
            read_sentence(wrong, person, "Norvald Brellow")
