"""Nothing but the documents gives an answer away: places, lengths and frequencies of options tell nothing."""

from collections import Counter, defaultdict

import pytest
from scipy.stats import binomtest, chisquare

from hf_moe_cpt.data.surgery_bench import SurgeryBench
from hf_moe_cpt.data.surgery_bench_questions import QUESTION_KINDS, QUIZ_TEMPLATE, as_completions
from hf_moe_cpt.data.surgery_bench_world import KINDS, SETS, World


LEAST_P = 1e-3  # the seed is fixed, so a test that passes always passes


@pytest.fixture(scope="module")
def bench() -> SurgeryBench:
    return SurgeryBench.generate(seed=3, num_subjects=480, forms=("quiz",))


@pytest.fixture(scope="module")
def rows(bench: SurgeryBench) -> list[dict]:
    return [row for part in bench.questions.values() for row in part]


@pytest.fixture(scope="module")
def one_per_fact(rows: list[dict]) -> list[dict]:
    """One question about each fact, so that a fact counts once, in sets whose facts are independent of each other."""
    return [row for row in rows if row["kind"] == "mcq" and row["split"] == "test" and row["set"] != "obsolete"]


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_the_answer_is_in_every_place_alike(rows, kind):
    places = Counter(row["answer"] for row in rows if row["kind"] == kind)
    assert sorted(places) == [0, 1, 2] and chisquare(list(places.values())).pvalue > LEAST_P


def test_so_is_the_old_answer(rows):
    both = Counter((row["answer"], row["old_answer"]) for row in rows if row["old_answer"] is not None)
    assert len(both) == 6 and chisquare(list(both.values())).pvalue > LEAST_P


def test_a_skewed_place_would_be_noticed(rows):
    places = Counter(min(row["answer"], 1) if index % 8 == 0 else row["answer"] for index, row in enumerate(rows))
    assert chisquare(list(places.values())).pvalue < LEAST_P


def _accuracy(rows: list[dict], score) -> float:
    """Expected share of right answers of the rule "take the option that scores most", ties broken evenly."""
    right = 0.0
    for row in rows:
        scores = [score(row, option) for option in row["options"]]
        best = [place for place, value in enumerate(scores) if value == max(scores)]
        right += (row["answer"] in best) / len(best)
    return right / len(rows)


RULES = {
    "longest": lambda row, option: len(option),
    "shortest": lambda row, option: -len(option),
    "most words": lambda row, option: len(option.split()),
    "first in the alphabet": lambda row, option: -sum(ord(c) * 256.0**-i for i, c in enumerate(option[:6])),
    "largest number": lambda row, option: float("".join(filter(str.isdigit, option)) or 0),
    "middle number": lambda row, option: (
        -abs(
            float("".join(filter(str.isdigit, option)) or 0)
            - sorted(float("".join(filter(str.isdigit, each)) or 0) for each in row["options"])[1]
        )
    ),
    "shares letters with the subject": lambda row, option: len(set(option.lower()) & set(row["subject"].lower())),
    "shares words with the question": lambda row, option: len(set(option.split()) & set(row["question"].split())),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules_that_read_only_the_options_are_at_chance(one_per_fact, rule):
    accuracy = _accuracy(one_per_fact, RULES[rule])
    count = len(one_per_fact)
    assert count > 3000 and binomtest(round(accuracy * count), count, 1 / 3).pvalue > LEAST_P, accuracy


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
        kind = KINDS.get(row["subject_kind"])
        (alone if kind and kind.attribute(row["attribute"]).hallmark else shared).append(row)
    for sign in (1, -1):
        accuracy = _accuracy(shared, lambda row, option, sign=sign: sign * elsewhere(row, option))
        assert binomtest(round(accuracy * len(shared)), len(shared), 1 / 3).pvalue > LEAST_P, accuracy
    for row in alone:
        key = f"{row['subject_kind']} {row['attribute']}"
        unchanged = [option for option in row["options"] if row["set"] != "update"]
        assert len({said[key][option] for option in unchanged}) <= 1


def test_a_rule_that_knows_a_little_would_be_noticed(one_per_fact):
    known = {row["id"] for row in one_per_fact[::9]}
    accuracy = _accuracy(one_per_fact, lambda row, option: option == row["answer_text"] and row["id"] in known)
    assert binomtest(round(accuracy * len(one_per_fact)), len(one_per_fact), 1 / 3).pvalue < LEAST_P


def test_one_hop_options_do_not_tell_either(rows):
    chosen = [
        row for row in rows if row["kind"] == "one_hop" and row["split"] == "validation" and row["set"] != "obsolete"
    ]
    for rule in ("longest", "first in the alphabet"):
        accuracy = _accuracy(chosen, RULES[rule])
        assert binomtest(round(accuracy * len(chosen)), len(chosen), 1 / 3).pvalue > LEAST_P, accuracy


def test_distractors_are_values_of_the_same_attribute(rows):
    for row in rows:
        if row["kind"] in ("mcq", "cloze", "paraphrase") and row["subject_kind"] in KINDS:
            attribute = KINDS[row["subject_kind"]].attribute(row["attribute"])
            assert attribute.hallmark or set(row["options"]) <= set(attribute.values)
        elif row["kind"] == "one_hop":
            assert len(set(row["options"])) == 3


def test_every_value_of_an_attribute_is_equally_likely():
    world = World(seed=9, changed_facts=4)
    for kind in KINDS.values():
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


def test_validation_and_test_ask_for_the_same_facts_in_other_words(rows):
    asked, texts = defaultdict(set), defaultdict(set)
    for row in rows:
        asked[row["split"]].add((row["set"], row["subject"], row["kind"], row["attribute"]))
        texts[row["split"]].add(row["question"])
    assert asked["validation"] == asked["test"]
    assert not texts["validation"] & texts["test"]
    assert len({row["id"] for row in rows}) == len(rows)


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
