"""What is to be forgotten and to be kept at once is refused, by subject or by text."""

import pytest
from datasets import Dataset

from hf_moe_cpt.trainers.surgery.subject_overlap import check_subjects


def _rows(*subjects):
    return Dataset.from_dict({"text": [f"about {subject}" for subject in subjects], "subject": list(subjects)})


def test_obsolete_and_update_share_their_subjects():
    check_subjects(
        {"obsolete": _rows("a", "b"), "update": _rows("a", "b"), "unlearn": _rows("c"), "retain": _rows("d")}
    )


@pytest.mark.parametrize(("first", "second"), [("unlearn", "retain"), ("obsolete", "neighbour"), ("unseen", "update")])
def test_shared_subjects_are_refused_and_named(first, second):
    sets = {first: _rows(*"abcdefg"), second: _rows(*"cdefx")}
    message = rf"4 subject\(s\) are in both {first}_dataset and {second}_dataset: 'c', 'd', 'e' and 1 more"
    with pytest.raises(ValueError, match=message):
        check_subjects(sets)


def test_overlap_that_is_allowed_is_told(caplog):
    check_subjects({"unlearn": _rows("a"), "retain": _rows("a")}, allow_overlap=True)
    assert "1 subject(s) are in both unlearn_dataset and retain_dataset: 'a'" in caplog.text


def test_texts_are_compared_where_no_subject_is_named():
    sets = {"unlearn": _rows("a").remove_columns("subject"), "retain": _rows("a", "b")}
    with pytest.raises(ValueError, match=r"1 text\(s\) are in both"):
        check_subjects(sets)
    tokens = Dataset.from_dict({"input_ids": [[1, 2]]})
    check_subjects({"unlearn": tokens, "retain": _rows("a")})
