"""Every set goes through its rows again and again in an order of its own, the same for any split into batches."""

from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_moe_cpt.trainers.surgery.set_mixture import (
    WINNER,
    SurgeryMixture,
    collate_rows,
    collate_sets,
    eval_batches,
)


def _rows(count, start=0):
    lengths = [2 + number % 5 for number in range(count)]
    return Dataset.from_dict(
        {
            "input_ids": [[start + number] * length for number, length in enumerate(lengths)],
            "completion_mask": [[False] + [True] * (length - 1) for length in lengths],
        }
    )


@given(length=st.integers(1, 9), size=st.integers(1, 4), items=st.integers(1, 12), seed=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_each_epoch_of_a_set_is_a_permutation(length, size, items, seed):
    mixture = SurgeryMixture({"a": _rows(length)}, {"a": size}, items, seed)
    read = [place for item in range(items) for place in mixture.rows("a", item)]
    for begin in range(0, len(read) - length + 1, length):
        assert sorted(read[begin : begin + length]) == list(range(length))


def test_sets_do_not_depend_on_each_other_nor_on_the_size_of_micro_batches():
    sets = {"unlearn": _rows(7), "retain": _rows(11, 20)}
    small = SurgeryMixture(sets, {"unlearn": 1, "retain": 2}, 12, 5)
    large = SurgeryMixture({"retain": sets["retain"]}, {"retain": 8}, 3, 5)
    assert [p for i in range(12) for p in small.rows("retain", i)] == [
        p for i in range(3) for p in large.rows("retain", i)
    ]
    orders = [tuple(small.rows(name, item)[0] for item in range(6)) for name in sets]
    assert orders[0] != orders[1]
    with pytest.raises(IndexError, match="item 12 of 12"):
        small.rows("retain", 12)


def test_batches_are_padded_and_know_their_rows():
    mixture = SurgeryMixture({"unlearn": _rows(6), "retain": _rows(6, 20)}, {"unlearn": 2, "retain": 3}, 4, 0)
    batch = collate_sets([mixture[1]], pad_token_id=9)
    assert list(batch) == ["unlearn", "retain"] and len(batch["retain"]["row"]) == 3
    for name, place in (("unlearn", 0), ("retain", 2)):
        one, row = batch[name], mixture[1][name][place]
        length = len(row["input_ids"])
        assert one["row"][place] == row["row"]
        assert one["input_ids"][place, :length].tolist() == row["input_ids"]
        assert (one["input_ids"][place, length:] == 9).all()
        assert one["attention_mask"][place].tolist() == [1] * length + [0] * (one["input_ids"].shape[1] - length)
        assert one["completion_mask"][place, :length].tolist() == row["completion_mask"]
        assert not one["completion_mask"][place, length:].any()


def test_winners_are_a_batch_inside_the_batch():
    rows = [
        {"input_ids": [1, 2], "completion_mask": [True, True], "row": 4, "winner_input_ids": [5, 6, 7]}
        | {"winner_completion_mask": [False, True, True]}
    ]
    batch = collate_rows(rows, 0)
    assert batch[WINNER]["input_ids"].tolist() == [[5, 6, 7]] and batch[WINNER]["row"] == [4]


@pytest.mark.parametrize(("count", "max_rows", "world"), [(9, 64, 1), (9, 5, 2), (10, 64, 3), (2, 64, 3)])
def test_ranks_share_the_measured_rows_and_meet_in_every_batch(count, max_rows, world):
    shares = [
        list(
            eval_batches(
                _rows(count), batch_size=2, pad_token_id=0, max_rows=max_rows, seed=1, rank=rank, world_size=world
            )
        )
        for rank in range(world)
    ]
    assert len({len(share) for share in shares}) == 1
    counted = Counter(
        int(place)
        for share in shares
        for batch in share
        for place, mask in zip(batch["row"], batch["completion_mask"], strict=True)
        if mask.any()
    )
    assert len(counted) == min(count, max_rows) and set(counted.values()) == {1}
    whole = [
        batch["row"] for batch in eval_batches(_rows(count), batch_size=2, pad_token_id=0, max_rows=max_rows, seed=1)
    ]
    assert {place for rows in whole for place in rows} == set(counted)
