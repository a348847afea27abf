"""The streaming mixture obeys the same law, and a consumer sees the same sequence for any number of workers."""

import datasets
import pytest
import torch
from accelerate.data_loader import prepare_data_loader

from hf_moe_cpt.data.collate import stack_blocks
from hf_moe_cpt.data.replay import ReplayLaw, exact_ratio
from hf_moe_cpt.data.streaming import StreamingReplayMixture


LENGTH = 8


def make_documents(count: int, first_token: int, num_shards: int = 3) -> datasets.IterableDataset:
    """Documents of 3 to 13 tokens; the tokens of document d are all first_token + d."""
    rows = [[first_token + d] * (3 + d * 7 % 11) for d in range(count)]
    return datasets.Dataset.from_dict({"input_ids": rows}).to_iterable_dataset(num_shards=num_shards)


def make_mixture(micro: int = 2, seed: int = 0, **options) -> StreamingReplayMixture:
    options = {"batch_size": 6, "num_batches": 9, "max_length": LENGTH, "shuffle_buffer": 10, **options}
    return StreamingReplayMixture(
        make_documents(30, 0), make_documents(20, 1000), 0.3, seed=seed, micro_batch_size=micro, **options
    )


def read(mixture: StreamingReplayMixture, num_workers: int, micro: int) -> dict[str, torch.Tensor]:
    loader = torch.utils.data.DataLoader(mixture, micro, num_workers=num_workers, collate_fn=stack_blocks)
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


@pytest.mark.parametrize("num_workers, micro", [(1, 2), (2, 2), (2, 5)])
def test_workers_do_not_change_the_sequence(num_workers, micro):
    want, got = read(make_mixture(micro), 0, micro), read(make_mixture(micro), num_workers, micro)
    assert len(got["source"]) == 54
    for key, value in want.items():
        assert torch.equal(got[key], value), key


def test_positions_take_their_source_from_the_law():
    law = ReplayLaw(exact_ratio(0.3), 6, 9)
    items = list(make_mixture())
    assert len(items) == len(make_mixture()) == 54
    for position, item in enumerate(items):
        assert item["source"] == (law.assign(position)[0] == "replay")
        assert bool((item["input_ids"] >= 1000).all()) == bool(item["source"])
    assert sum(item["source"] for item in items[:6]) == make_mixture().composition(0)[1] == 2


def test_each_epoch_reads_all_documents_in_an_order_of_its_own():
    mixture = make_mixture()
    stream, epochs = mixture._read("new"), []
    for _ in range(3):
        epochs.append([next(stream)[0] for _ in range(30)])
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_same_seed_same_stream_other_seed_another():
    first, again, other = (read(make_mixture(seed=seed), 0, 2)["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_blocks_run_on_across_documents_and_epochs_without_loss():
    mixture = make_mixture(packing="concat")
    flat = torch.cat([item["input_ids"] for item in mixture if item["source"] == 0]).tolist()
    documents = mixture._read("new")
    want: list[int] = []
    while len(want) < len(flat):
        want += next(documents)
    assert flat == want[: len(flat)] and "position_ids" not in next(iter(mixture))


def test_a_map_style_replay_set_accompanies_a_stream():
    replay = datasets.Dataset.from_dict({"input_ids": [[1000 + d] * 5 for d in range(20)]})
    mixture = StreamingReplayMixture(make_documents(30, 0), replay, 0.5, 4, 5, 0, max_length=LENGTH)
    assert {int(item["input_ids"][0]) >= 1000 for item in mixture if item["source"] == 1} == {True}


def test_accelerate_dispatch_keeps_the_sequence():
    loader = torch.utils.data.DataLoader(make_mixture(), 2, collate_fn=stack_blocks)
    dispatched = prepare_data_loader(loader, torch.device("cpu"), 1, 0, put_on_device=True, dispatch_batches=True)
    got = torch.cat([batch["input_ids"] for batch in dispatched])
    assert torch.equal(got, read(make_mixture(), 0, 2)["input_ids"])


@pytest.mark.parametrize("count, tokens", [(1, 3), (2, 13)])
def test_a_stream_shorter_than_a_block_stops_instead_of_spinning(count, tokens):
    mixture = StreamingReplayMixture(make_documents(count, 0, 1), None, 0.0, 1, 1, 0, max_length=64)
    with pytest.raises(ValueError, match=f"new stream ended after {tokens} tokens, fewer than one block"):
        next(iter(mixture))


@pytest.mark.parametrize(
    "new, options, message",
    [
        ([[1, 2]], {}, "the new source is a list: give a datasets.IterableDataset"),
        (datasets.Dataset.from_dict({"input_ids": []}), {}, "the new source is empty"),
        (datasets.Dataset.from_dict({"text": ["a"]}), {}, r"columns \['text'\] and no input_ids"),
        (make_documents(3, 0), {"shuffle_buffer": 0}, "shuffle_buffer is 0"),
        (make_documents(3, 0), {"micro_batch_size": 0}, "micro_batch_size is 0"),
        (make_documents(3, 0), {"packing": "bfd"}, "packing is 'bfd'"),
    ],
    ids=["list", "empty", "text", "buffer", "micro", "packing"],
)
def test_bad_streams_are_refused_before_reading(new, options, message):
    with pytest.raises(ValueError, match=message):
        StreamingReplayMixture(new, None, 0.0, 1, 1, 0, max_length=LENGTH, **options)


def test_replay_and_ratio_go_together():
    with pytest.raises(ValueError, match="replay_ratio is 0.3 but there is no replay data"):
        StreamingReplayMixture(make_documents(3, 0), None, 0.3, 1, 1, 0, max_length=LENGTH)
