"""Every batch holds its share, every epoch its own order, and nothing depends on how the positions are read."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_moe_cpt.data.replay import ReplayLaw, ReplayMixture, exact_ratio


RATIOS = st.sampled_from([0.05, 0.1, 0.3, 0.4, 1 / 3, 0.999, Fraction(2, 7)])


class Blocks(torch.utils.data.Dataset):
    """Blocks that carry their own number."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, int]:
        return {"number": index}


def make_mixture(ratio: float = 0.3, new: int = 7, replay: int = 5, batch: int = 8, batches: int = 20, seed: int = 0):
    return ReplayMixture(Blocks(new), Blocks(replay), ratio, batch, batches, seed)


@settings(max_examples=30, deadline=None)
@given(ratio=RATIOS, batch=st.integers(1, 64), batches=st.integers(1, 40))
def test_share_is_exact_with_the_error_carried_over(ratio, batch, batches):
    mixture = make_mixture(ratio, batch=batch, batches=batches)
    drawn = [mixture[i]["source"] for i in range(len(mixture))]
    exact = exact_ratio(ratio)
    for b in range(batches + 1):
        assert sum(drawn[: b * batch]) == (b * batch * exact + Fraction(1, 2)).__floor__()
    for b in range(batches):
        num_replay = sum(drawn[b * batch : (b + 1) * batch])
        assert mixture.composition(b) == (batch - num_replay, num_replay)
        assert abs(num_replay - batch * exact) <= 1


@settings(max_examples=40, deadline=None)
@given(ratio=RATIOS, window=st.integers(1, 16), start=st.integers(0, 10**15))
def test_any_run_of_positions_holds_its_share(ratio, window, start):
    """Micro-batches and ranks see contiguous runs: none of them may differ from the ratio by more than one block."""
    law = ReplayLaw(exact_ratio(ratio), batch_size=1, num_batches=1)
    num_replay = sum(law.assign(i)[0] == "replay" for i in range(start, start + window))
    assert abs(num_replay - window * law.ratio) < 1


def test_paper_batch_of_1024_with_40_percent():
    mixture = make_mixture(0.4, batch=1024, batches=5)
    assert [mixture.composition(b)[1] for b in range(5)] == [410, 409, 410, 409, 410]


@settings(max_examples=25, deadline=None)
@given(ratio=RATIOS, new=st.integers(1, 30), replay=st.integers(1, 30), seed=st.integers(0, 2**40))
def test_each_epoch_reads_every_block_once(ratio, new, replay, seed):
    mixture = make_mixture(ratio, new, replay, batch=10, batches=30, seed=seed)
    read: dict[str, list[tuple[int, int]]] = {"new": [], "replay": []}
    for position in range(len(mixture)):
        source, epoch, index = mixture.locate(position)
        read[source].append((epoch, index))
        assert mixture[position] == {"number": index, "source": int(source == "replay")}
    for source, length in (("new", new), ("replay", replay)):
        for q in range(0, len(read[source]) - length + 1, length):
            epochs, indices = zip(*read[source][q : q + length], strict=True)
            assert set(epochs) == {q // length} and sorted(indices) == list(range(length))


def test_no_epoch_source_or_seed_repeats_an_order():
    orders = []
    for seed in (0, 1):
        mixture = make_mixture(0.5, new=20, replay=20, batch=10, batches=40, seed=seed)
        read: dict[str, list[int]] = {"new": [], "replay": []}
        for position in range(len(mixture)):
            source, _, index = mixture.locate(position)
            read[source].append(index)
        orders += [tuple(items[e : e + 20]) for items in read.values() for e in range(0, 200, 20)]
    assert len(set(orders)) == len(orders) == 40


def test_order_is_a_function_of_seed_and_position_alone():
    short, long = make_mixture(batches=3), make_mixture(batches=300)
    assert [short.locate(i) for i in range(len(short))] == [long.locate(i) for i in range(len(short))]
    other_batch = make_mixture(batch=24, batches=1)
    assert [other_batch.locate(i) for i in range(24)] == [long.locate(i) for i in range(24)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_loader_reads_it_in_sequence(num_workers):
    mixture = make_mixture()
    loader = torch.utils.data.DataLoader(mixture, batch_size=4, num_workers=num_workers)
    read = torch.cat([batch["number"] for batch in loader]).tolist()
    assert read == [mixture.locate(i)[2] for i in range(len(mixture))]


def test_without_replay_all_is_new():
    mixture = ReplayMixture(Blocks(7), None, 0.0, 4, 5, seed=0)
    assert {mixture.locate(i)[0] for i in range(20)} == {"new"}
    assert mixture.summary() == {"new_blocks": 20, "new_epochs": pytest.approx(20 / 7)}


def test_summary_counts_what_is_read():
    mixture = make_mixture(0.3, new=100, replay=12, batch=8, batches=25)
    assert mixture.summary() == {"new_blocks": 140, "new_epochs": 1.4, "replay_blocks": 60, "replay_epochs": 5.0}


def test_ratio_is_read_as_people_write_it():
    assert [exact_ratio(r) for r in (0.3, 1 / 3, 0, 1e-8)] == [Fraction(3, 10), Fraction(1, 3), 0, Fraction(1, 10**8)]


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.0, 30, float("nan"), float("inf")])
def test_ratio_outside_is_refused(ratio):
    with pytest.raises(ValueError, match=r"replay_ratio is .* must lie in \[0, 1\)"):
        exact_ratio(ratio)


@pytest.mark.parametrize("ratio, message", [("0.3", "a number"), (True, "a number"), (1e-12, "closer than 1e-9")])
def test_ratio_that_is_no_plain_number_is_refused(ratio, message):
    with pytest.raises(ValueError, match=message):
        exact_ratio(ratio)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((Blocks(3), None, 0.3, 4, 5, 0), "replay_ratio is 0.3 but there is no replay data"),
        ((Blocks(3), Blocks(3), 0.0, 4, 5, 0), "replay data was given but replay_ratio is 0"),
        ((Blocks(0), Blocks(3), 0.3, 4, 5, 0), "the new source is empty"),
        ((Blocks(3), Blocks(0), 0.3, 4, 5, 0), "the replay source is empty"),
        ((Blocks(3), Blocks(3), 0.3, 0, 5, 0), "batch_size is 0"),
        ((Blocks(3), Blocks(3), 0.3, 4, 0, 0), "num_batches is 0"),
    ],
)
def test_bad_mixtures_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReplayMixture(*arguments)


def test_positions_end_with_the_budget():
    mixture = make_mixture(batch=4, batches=2)
    assert len(mixture) == 8 and mixture.locate(np.int64(7)) == mixture.locate(7)
    for position in (-1, 8):
        with pytest.raises(IndexError):
            mixture[position]
