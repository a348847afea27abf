"""Every text that is to lose gets its winner: a refusal in its own form, or the new version of its subject."""

from functools import partial

import pytest
from datasets import Dataset

from hf_moe_cpt.trainers.surgery.surgery_data import tokenize_set
from hf_moe_cpt.trainers.surgery.text_pairs import with_refusals, with_winners
from tests.helpers.preference_runs import word_tokenizer


tokenize = partial(tokenize_set, tokenizer=word_tokenizer(), max_length=32)


def _refused(rows, refusals=("w40 w41",), seed=0):
    rows = Dataset.from_list(rows)
    return with_refusals(tokenize(rows, name="unlearn"), rows, tokenize, name="unlearn", seed=seed, refusals=refusals)


def _winner(row, counted=True):
    pairs = zip(row["winner_input_ids"], row["winner_completion_mask"], strict=True)
    return word_tokenizer().decode([token for token, counts in pairs if counts or not counted])


@pytest.mark.parametrize(
    ("row", "whole"),
    [
        ({"text": "w5 w6 w7", "prefix": "w5 "}, "w5 w40 w41 </s>"),
        ({"text": "w5 w6 w7"}, "w40 w41 </s>"),
        ({"prompt": "w5 w6", "completion": " w7"}, "w5 w6 w40 w41 </s>"),
        (
            {"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]},
            "u w5 </s> a w40 w41 </s>",
        ),
    ],
)
def test_refusals_stand_where_the_text_stood(row, whole):
    (found,) = _refused([row])
    assert _winner(found) == "w40 w41 </s>" and _winner(found, counted=False) == whole


def test_refusals_vary_by_row_and_seed_alone():
    rows = [{"text": "w5 w6"}] * 40
    words = [f"w{number} w9" for number in range(10, 20)]
    first = _refused(rows, words)["winner_input_ids"]
    assert (
        first[:]
        == _refused(rows, words)["winner_input_ids"][:]
        != _refused(rows, words, seed=1)["winner_input_ids"][:]
    )
    assert len({ids[0] for ids in first}) > 5


def test_refusals_need_text():
    with pytest.raises(ValueError, match="unlearn_dataset is tokenised: pass its text instead"):
        _refused([{"input_ids": [4, 5]}])
    with pytest.raises(ValueError, match=r"refusals=\[''\] must be texts"):
        _refused([{"text": "w5 w6"}], refusals=[""])


def _sets(old, new):
    return (
        tokenize(Dataset.from_list([{"text": text, "subject": subject} for text, subject in rows]), name=name)
        for rows, name in ((old, "obsolete"), (new, "update"))
    )


def test_new_versions_are_found_by_subject():
    old, new = _sets(
        [("w2 w9", "a"), ("w3 w9", "b"), ("w4 w9", "a"), ("w5 w9", "a")],
        [("w22 w9", "b"), ("w20 w9", "a"), ("w21 w9", "a")],
    )
    found = with_winners(old, new)
    assert [ids[0] for ids in found["winner_input_ids"]] == [20, 22, 21, 20]
    assert [ids[0] for ids in found["input_ids"]] == [2, 3, 4, 5]


def test_new_versions_are_found_row_by_row_without_subjects():
    old, new = (
        rows.remove_columns("subject") for rows in _sets([("w2 w9", "a"), ("w3 w9", "b")], [("w20 w9", "c")] * 2)
    )
    assert len(with_winners(old, new)) == 2
    with pytest.raises(ValueError, match="obsolete_dataset has 2 rows and update_dataset 1"):
        with_winners(old, new.select([0]))


def test_a_subject_without_a_new_version_is_named():
    old, new = _sets([("w2 w9", "a"), ("w3 w9", "b")], [("w20 w9", "a")])
    with pytest.raises(ValueError, match="1 subjects of obsolete_dataset have no new version .* such as 'b'"):
        with_winners(old, new)
