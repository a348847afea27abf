"""Blocks are the corpus cut at multiples of max_length; mixtures hold their share; batches are stacked blocks.

Packing against the definition, token by token, whatever the arrow layout underneath. Every batch of a mixture holds
its share, every epoch its own order, and a consumer sees the same sequence with any number of workers.
"""

import itertools
import pickle
from fractions import Fraction

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_moe_cpt.data import packing
from hf_moe_cpt.data.packing import (
    PACKINGS,
    LawInParts,
    Mixture,
    MixtureLaw,
    PackedDataset,
    StreamingMixture,
    changing_shares,
    exact_ratio,
    exact_shares,
    pack_stream,
    stack_blocks,
)


@pytest.mark.parametrize(
    "first, second, message",
    [
        ({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, r"'a' has the shapes \[\(2,\), \(3,\)\] in one batch"),
        ({"a": 0, "b": 0}, {"a": 0}, "'b': pack all sources in the same way"),
        ({"a": 0}, {"a": 0, "b": 0}, "'b': pack all sources in the same way"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(first, second, message):
    with pytest.raises(ValueError, match=message):
        stack_blocks([first, second])


def make_corpus(lengths: list[int], rows_per_chunk: int = 3) -> tuple[datasets.Dataset, list[list[int]]]:
    """Documents of given lengths in an arrow table of chunks; tokens are 0, 1, 2, ... through the whole corpus."""
    ends = np.cumsum([0, *lengths])
    documents = [list(range(begin, end)) for begin, end in zip(ends[:-1], ends[1:], strict=True)]
    kind = pa.list_(pa.int32())
    chunks = [pa.array(documents[i : i + rows_per_chunk], kind) for i in range(0, len(documents), rows_per_chunk)]
    table = pa.table({"input_ids": pa.chunked_array(chunks, kind)})
    return datasets.Dataset(datasets.table.InMemoryTable(table)), documents


def filled_up(ids: list[int], missing: int) -> dict[str, list[int]]:
    mask = [1] * len(ids) + [0] * missing
    return {"input_ids": ids + [0] * missing, "labels": ids + [-100] * missing, "attention_mask": mask}


def reference_blocks(documents: list[list[int]], length: int, packing: str) -> list[dict[str, list[int]]]:
    """The definition, token by token."""
    if packing == "padded":
        pieces = [ids[start : start + length] for ids in documents for start in range(0, len(ids), length)]
        return [filled_up(ids, length - len(ids)) for ids in pieces if len(ids) > 1]
    flat = [(token, place) for document in documents for place, token in enumerate(document)]
    blocks = []
    for start in range(0, len(flat) - length + 1, length):
        tokens, places = zip(*flat[start : start + length], strict=True)
        blocks.append({"input_ids": list(tokens), "labels": list(tokens)})
        if packing == "document":
            blocks[-1]["position_ids"] = list(range(length))
            for t, place in enumerate(places):
                if place == 0 and t > 0:
                    blocks[-1]["labels"][t] = -100
                    blocks[-1]["position_ids"][t:] = range(length - t)
    return blocks


def as_lists(blocks) -> list[dict[str, list[int]]]:
    return [{key: value.tolist() for key, value in block.items()} for block in blocks]


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=25).filter(lambda lengths: sum(lengths) >= 12)


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, length=st.integers(2, 12), packing=st.sampled_from(PACKINGS), chunk=st.integers(1, 9))
def test_view_stream_and_definition_agree(lengths, length, packing, chunk):
    corpus, documents = make_corpus(lengths, chunk)
    want = reference_blocks(documents, length, packing)
    assume(want)
    packed = PackedDataset(corpus, length, packing)
    assert as_lists(packed[k] for k in range(len(packed))) == want
    assert as_lists(pack_stream(iter(documents), length, packing)) == want
    assert packed.num_tokens == sum(lengths)


@settings(max_examples=15, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 99), data=st.data())
def test_select_and_shuffle_are_honoured(lengths, seed, data):
    corpus, documents = make_corpus(lengths)
    order = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=30))
    tail = range(len(lengths) // 2, len(lengths))
    for chosen in (corpus.select(order), corpus.shuffle(seed=seed), corpus.select(tail)):
        rows = chosen["input_ids"][:]
        if sum(map(len, rows)) >= 5:
            assert as_lists(PackedDataset(chosen, 5)) == reference_blocks(rows, 5, "document")


def test_a_block_is_of_int64_and_aliases_neither_the_corpus_nor_its_labels():
    packed = PackedDataset(make_corpus([10])[0], 5, "concat")
    block = packed[0]
    assert {value.dtype for value in PackedDataset(make_corpus([9])[0], 5)[0].values()} == {torch.int64}
    block["input_ids"].fill_(77)
    assert block["labels"].tolist() == packed[0]["input_ids"].tolist() == [0, 1, 2, 3, 4]
    assert packed[-1]["input_ids"].tolist() == packed[np.int64(1)]["input_ids"].tolist() == [5, 6, 7, 8, 9]
    for index in (2, -3):
        with pytest.raises(IndexError):
            packed[index]


def test_a_memory_mapped_corpus_stays_on_disk(tmp_path):
    make_corpus([50_000, 3, 20_000])[0].save_to_disk(tmp_path / "corpus")
    packed = PackedDataset(datasets.load_from_disk(str(tmp_path / "corpus")), 1000)
    assert packed[50]["input_ids"].tolist() == list(range(50_000, 51_000))
    assert all(not part.flags.owndata and not part.flags.writeable for chunk in packed._chunks for part in chunk)
    assert len(pickle.dumps(packed)) < 20_000
    copy = pickle.loads(pickle.dumps(packed))
    assert torch.equal(copy[69]["input_ids"], packed[69]["input_ids"])


def test_the_index_holds_nothing_for_each_document_and_pieces_join(tmp_path, monkeypatch):
    """It held 16 bytes of each in every process; against the reference with pieces of two documents."""
    make_corpus([1] * 50_000)[0].save_to_disk(tmp_path / "corpus")
    packed = PackedDataset(datasets.load_from_disk(str(tmp_path / "corpus")), 100)
    held = (packed._first_token, packed._first_block)
    assert sum(part.nbytes for part in held) < 5_000 and len(packed._place_of_piece) < 100
    monkeypatch.setattr(packing, "_ROWS_OF_PIECE", 2)
    corpus, _ = make_corpus([3, 0, 0, 0, 7, 1, 12, 0, 4, 5, 0, 0])
    for kind in ("document", "padded"):
        want = list(pack_stream(corpus["input_ids"][:], 4, kind))
        got = PackedDataset(corpus, 4, kind)
        assert len(got) == len(want) == {"document": 8, "padded": 8}[kind]
        for block, expected in zip(got, want, strict=True):
            assert block.keys() == expected.keys()
            assert all(torch.equal(block[name], expected[name]) for name in block)


def of_columns(**columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize(
    "documents, options, message",
    [
        (make_corpus([4, 4, 4])[0], (13,), "12 tokens in 3 documents, fewer than one block of max_length=13"),
        (make_corpus([4])[0].select([]), (13,), "0 tokens in 0 documents"),
        (make_corpus([9])[0], (1,), "max_length is 1"),
        (make_corpus([9])[0], (2, "bfd"), "packing is 'bfd': choose one of 'document', 'concat'"),
        (of_columns(text=["a"]), (2,), r"columns \['text'\] and no input_ids: run tokenize_documents"),
        (of_columns(input_ids=["a"]), (2,), "is string, not a list of integers"),
        (of_columns(input_ids=[[0.5, 1.5]]), (2,), "is list<.*double>, not a list of integers"),
        (of_columns(input_ids=[[1, 2], None]), (2,), "missing values"),
        (of_columns(input_ids=[[1, None]]), (2,), "missing values"),
    ],
)
def test_what_cannot_be_packed_is_refused(documents, options, message):
    with pytest.raises(ValueError, match=message):
        PackedDataset(documents, *options)


RATIOS = st.sampled_from([0.05, 0.1, 0.3, 0.4, 1 / 3, 0.999, Fraction(2, 7)])


def numbered(length: int) -> list[dict[str, int]]:
    """Blocks that carry their own number."""
    return [{"number": number} for number in range(length)]


def replay_law(ratio: float | Fraction, batch: int, batches: int) -> MixtureLaw:
    return MixtureLaw({"new": 1 - exact_ratio(ratio), "replay": exact_ratio(ratio)}, batch, batches)


def make_mixture(ratio: float = 0.3, new: int = 7, replay: int = 5, batch: int = 8, batches: int = 20, seed: int = 0):
    return Mixture({"new": numbered(new), "replay": numbered(replay)}, replay_law(ratio, batch, batches), seed)


@settings(max_examples=15, deadline=None)
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


@settings(max_examples=20, deadline=None)
@given(ratio=RATIOS, window=st.integers(1, 16), start=st.integers(0, 10**5), batch=st.integers(1, 50))
def test_any_run_of_positions_holds_its_share(ratio, window, start, batch):
    """Micro-batches and ranks see contiguous runs: none of them may differ from the ratio by more than one block."""
    law = replay_law(ratio, batch, (start + window) // batch + 1)
    num_replay = sum(law.assign(i)[0] == "replay" for i in range(start, start + window))
    assert abs(num_replay - window * exact_ratio(ratio)) < 1


@settings(max_examples=15, deadline=None)
@given(ratio=RATIOS, batch=st.integers(1, 40), batches=st.integers(1, 20))
def test_two_sources_of_constant_weight_follow_the_law_of_replay(ratio, batch, batches):
    """Against its closed form: replay items among positions [0, i) are floor(i * r + 1/2), in exact arithmetic."""
    law, exact = replay_law(ratio, batch, batches), exact_ratio(ratio)
    before = [(i * exact + Fraction(1, 2)).__floor__() for i in range(batch * batches + 1)]
    for i in range(batch * batches):
        want = ("replay", before[i]) if before[i + 1] > before[i] else ("new", i - before[i])
        assert law.assign(i) == want


def read_by_ranks(mixture: Mixture, start: int, micro: int, ranks: int) -> list[dict]:
    """Items from a position on as accelerate deals micro-batches to ranks, in the order of the positions."""
    rest = range(start, len(mixture))
    shares = []
    for rank in range(ranks):
        loader = torch.utils.data.DataLoader(mixture, micro, sampler=rest, collate_fn=list)
        dealt = prepare_data_loader(loader, None, ranks, rank, put_on_device=False)
        shares.append([item for items in dealt for item in items])
    assert sum(map(len, shares)) == len(rest)
    return [
        shares[place // micro % ranks][place // (micro * ranks) * micro + place % micro] for place in range(len(rest))
    ]


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.integers(0, 1000), min_size=1, max_size=8).filter(any),
    micro=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    ranks=st.integers(1, 4),
    batches=st.integers(1, 8),
    sizes=st.lists(st.integers(1, 30), min_size=8, max_size=8),
)
def test_two_hundred_mixtures_hold_every_share_and_go_on_anywhere(weights, micro, accumulation, ranks, batches, sizes):
    """Up to eight sources, read with any micro-batches on any ranks, from any batch on; tests/trainers has runs of it.

    No law comes nearer to all shares after every batch than 1 - 1 / (2S - 2) blocks (Tijdeman 1980): half a block for
    two sources, and more than half for more.
    """
    names, batch = [f"source {place}" for place in range(len(weights))], micro * accumulation * ranks
    law = MixtureLaw(dict(zip(names, weights, strict=True)), batch, batches)
    bound = 1 - Fraction(1, max(2, 2 * len(weights) - 2))
    seen = dict.fromkeys(names, 0)
    for i in range(batch * batches):
        source, ordinal = law.assign(i)
        assert ordinal == seen[source]  # each block of a source in its turn, none twice
        seen[source] += 1
        if (i + 1) % batch == 0:
            for name, weight in zip(names, weights, strict=True):
                assert abs(seen[name] - (i + 1) * Fraction(weight, sum(weights))) <= bound
    assert [law.count(name) for name in names] == list(seen.values())
    blocks = {name: numbered(size) for name, size in zip(names, sizes, strict=False)}
    whole = [Mixture(blocks, law, 7)[i] for i in range(batch * batches)]
    resumed, start = pickle.loads(pickle.dumps(Mixture(blocks, law, 7))), batches // 2 * batch
    assert read_by_ranks(resumed, start, micro, ranks) == whole[start:]
    shorter = MixtureLaw(dict(zip(names, weights, strict=True)), batch, max(1, batches // 2))
    assert [shorter.assign(i) for i in range(start)] == [law.assign(i) for i in range(start)]


def test_half_a_block_cannot_hold_for_three_sources():
    """Any order of three equal sources, one block a batch, leaves one of them 2/3 of a block off; ours no more."""
    equal = Fraction(1, 3)
    for order in itertools.product(range(3), repeat=3):
        counts = [[order[:n].count(source) for source in range(3)] for n in (1, 2, 3)]
        assert max(abs(c - n * equal) for n, row in enumerate(counts, 1) for c in row) >= Fraction(2, 3)
    law = MixtureLaw(dict.fromkeys("abc", 1), 1, 300)
    worst = max(abs(law.count(name, n) - n * equal) for n in range(301) for name in "abc")
    assert worst == Fraction(2, 3) <= 1 - Fraction(1, 4)


@settings(max_examples=10, deadline=None)
@given(data=st.data(), batch=st.integers(1, 16), batches=st.integers(2, 30), count=st.integers(2, 6))
def test_weights_that_change_are_held_too(data, batch, batches, count):
    """Against the sum of the straight line between both mixtures, or of the step, in fractions."""
    begin, end = (data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count)) for _ in range(2))
    at = data.draw(st.none() | st.integers(0, batches))
    shares = changing_shares(begin, end, batches, at)
    assert shares.sum(axis=1).tolist() == [10**6] * batches and shares.min() >= 0
    law = MixtureLaw(dict.fromkeys(map(str, range(count))), batch, batches, shares)
    seen, wanted = [0] * count, [Fraction(0)] * count
    for b in range(batches):
        t = Fraction(b, batches - 1) if at is None else Fraction(int(b >= at))
        for place, number in enumerate(law.composition(b)):
            seen[place] += number
            wanted[place] += batch * (
                (1 - t) * Fraction(begin[place], sum(begin)) + t * Fraction(end[place], sum(end))
            )
            assert abs(seen[place] - wanted[place]) < 1 + Fraction(batch * batches, 10**6)


def test_weights_are_read_as_people_write_them():
    assert exact_shares([0.5, 0.3, 0.2]) == ([5, 3, 2], 10) and exact_shares([2, 1, 1]) == ([2, 1, 1], 4)
    assert sum(exact_shares([0.1234567890123, 1 / 7, 1 / 11])[0]) == 10**6
    for weights, message in (([0.5, -1], "at least 0"), ([0, 0], "at least one"), ([float("nan"), 1], "finite")):
        with pytest.raises(ValueError, match=message):
            exact_shares(weights)


@pytest.mark.parametrize("packing", ["document", "concat"])
def test_no_token_is_lost_behind_the_last_full_block(packing):
    """93 tokens in blocks of 60: 33 of them were never read. Against the documents laid end to end again and again."""
    corpus, documents = make_corpus([50, 30, 13])
    packed = PackedDataset(corpus, 60, packing)
    mixture = Mixture({"new": packed}, MixtureLaw({"new": 1}, 1, 31), 0)
    blocks = sorted((mixture[i] for i in range(31)), key=lambda block: block["input_ids"].tolist())
    want = reference_blocks(documents * 20, 60, packing)
    assert as_lists({key: block[key] for key in want[0]} for block in blocks) == sorted(
        want, key=lambda block: block["input_ids"]
    )
    assert mixture.summary() == {"new_blocks": 31, "new_epochs": 20.0}
    assert as_lists([packed.block(0)]) == as_lists([packed[0]]) and len(packed) == 1


@settings(max_examples=12, deadline=None)
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
    long = make_mixture(batches=300)
    for other in (make_mixture(batches=3), make_mixture(batch=24, batches=1)):
        assert [other.locate(i) for i in range(24)] == [long.locate(i) for i in range(24)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_loader_reads_it_in_sequence(num_workers):
    mixture = make_mixture()
    loader = torch.utils.data.DataLoader(mixture, batch_size=4, num_workers=num_workers)
    read = torch.cat([batch["number"] for batch in loader]).tolist()
    assert read == [mixture.locate(i)[2] for i in range(len(mixture))]


def test_summary_counts_what_is_read():
    mixture = Mixture({"new": numbered(7)}, MixtureLaw({"new": 1}, 4, 5), seed=0)
    assert {mixture.locate(i)[0] for i in range(20)} == {"new"}
    assert mixture.summary() == {"new_blocks": 20, "new_epochs": pytest.approx(20 / 7)}
    mixture = make_mixture(0.3, new=100, replay=12, batch=8, batches=25)
    assert mixture.summary() == {"new_blocks": 140, "new_epochs": 1.4, "replay_blocks": 60, "replay_epochs": 5.0}


NO_RATIOS = dict.fromkeys([-0.1, 1, 30, float("nan"), float("inf")], r"replay_ratio is .* must lie in \[0, 1\)")
NO_RATIOS |= {"0.3": "a number", 1e-12: "closer than 1e-9"}


def test_ratio_is_read_as_people_write_it():
    assert [exact_ratio(r) for r in (0.3, 1 / 3, 0, 1e-8)] == [Fraction(3, 10), Fraction(1, 3), 0, Fraction(1, 10**8)]
    for ratio, message in [*NO_RATIOS.items(), (True, "a number")]:
        with pytest.raises(ValueError, match=message):
            exact_ratio(ratio)


@pytest.mark.parametrize(
    "new, replay, batch, batches, message",
    [
        (0, 3, 4, 5, "the new source is empty"),
        (3, 0, 4, 5, "the replay source is empty"),
        (3, 3, 0, 5, "batch_size is 0"),
        (3, 3, 4, 0, "num_batches is 0"),
    ],
)
def test_bad_mixtures_are_refused(new, replay, batch, batches, message):
    with pytest.raises(ValueError, match=message):
        make_mixture(0.3, new, replay, batch, batches)


def test_positions_end_with_the_budget():
    mixture = make_mixture(batch=4, batches=2)
    assert len(mixture) == 8 and mixture.locate(np.int64(7)) == mixture.locate(7)
    for position in (-1, 8):
        with pytest.raises(IndexError):
            mixture[position]


LENGTH = 8


def make_documents(count: int, first_token: int, num_shards: int = 3) -> datasets.IterableDataset:
    """Documents of 3 to 13 tokens; the tokens of document d are all first_token + d."""
    rows = [[first_token + d] * (3 + d * 7 % 11) for d in range(count)]
    return datasets.Dataset.from_dict({"input_ids": rows}).to_iterable_dataset(num_shards=num_shards)


def make_mixture_streaming(micro: int = 2, seed: int = 0, **options) -> StreamingMixture:
    options = {"max_length": LENGTH, "shuffle_buffer": 10, "micro_batch_size": micro, **options}
    documents = {"new": make_documents(30, 0), "replay": make_documents(20, 1000)}
    return StreamingMixture(documents, replay_law(0.3, 6, 9), seed, **options)


def read(mixture: StreamingMixture, num_workers: int, micro: int) -> dict[str, torch.Tensor]:
    loader = torch.utils.data.DataLoader(mixture, micro, num_workers=num_workers, collate_fn=stack_blocks)
    batches = list(loader)
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


@pytest.mark.parametrize("num_workers, micro", [(1, 2), (2, 5)])
def test_workers_do_not_change_the_sequence(num_workers, micro):
    want, got = read(make_mixture_streaming(micro), 0, micro), read(make_mixture_streaming(micro), num_workers, micro)
    assert len(got["source"]) == 54
    for key, value in want.items():
        assert torch.equal(got[key], value), key


def test_positions_take_their_source_from_the_law():
    law = replay_law(0.3, 6, 9)
    items = list(make_mixture_streaming())
    assert len(items) == len(make_mixture_streaming()) == 54
    for position, item in enumerate(items):
        assert item["source"] == (law.assign(position)[0] == "replay")
        assert bool((item["input_ids"] >= 1000).all()) == bool(item["source"])
    assert sum(item["source"] for item in items[:6]) == make_mixture_streaming().law.composition(0)[1] == 2


def test_each_epoch_reads_all_documents_in_an_order_of_its_own():
    stream = make_mixture_streaming()._read("new")
    epochs = [[next(stream)[0] for _ in range(30)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_blocks_run_on_across_documents_and_epochs_without_loss():
    mixture = make_mixture_streaming(packing="concat")
    flat = torch.cat([item["input_ids"] for item in mixture if item["source"] == 0]).tolist()
    documents = mixture._read("new")
    want: list[int] = []
    while len(want) < len(flat):
        want += next(documents)
    assert flat == want[: len(flat)] and "position_ids" not in next(iter(mixture))


def test_a_map_style_replay_set_accompanies_a_stream():
    replay = datasets.Dataset.from_dict({"input_ids": [[1000 + d] * 5 for d in range(20)]})
    documents = {"new": make_documents(30, 0), "replay": replay}
    mixture = StreamingMixture(documents, replay_law(0.5, 4, 5), 0, max_length=LENGTH)
    assert {int(item["input_ids"][0]) >= 1000 for item in mixture if item["source"] == 1} == {True}


def test_accelerate_dispatch_keeps_the_sequence():
    loader = torch.utils.data.DataLoader(make_mixture_streaming(), 2, collate_fn=stack_blocks)
    dispatched = prepare_data_loader(loader, torch.device("cpu"), 1, 0, put_on_device=True, dispatch_batches=True)
    got = torch.cat([batch["input_ids"] for batch in dispatched])
    want, other = (read(make_mixture_streaming(seed=seed), 0, 2)["input_ids"] for seed in (0, 1))
    assert torch.equal(got, want) and not torch.equal(want, other)


@pytest.mark.parametrize("count, tokens", [(1, 3), (2, 13)])
def test_a_stream_shorter_than_a_block_stops_instead_of_spinning(count, tokens):
    mixture = StreamingMixture({"new": make_documents(count, 0, 1)}, MixtureLaw({"new": 1}, 1, 1), 0, max_length=64)
    with pytest.raises(ValueError, match=f"new stream ended after {tokens} tokens, fewer than one block"):
        next(iter(mixture))


SOME = make_documents(3, 0)


@pytest.mark.parametrize(
    "new, options, message",
    [
        ([[1, 2]], {}, "the new source is a list: give a datasets.IterableDataset"),
        (of_columns(input_ids=[]), {}, "the new source is empty"),
        (of_columns(text=["a"]), {}, r"columns \['text'\] and no input_ids"),
        (SOME, {"shuffle_buffer": 0}, "shuffle_buffer is 0"),
        (SOME, {"micro_batch_size": 0}, "micro_batch_size is 0"),
        (SOME, {"packing": "bfd"}, "packing is 'bfd'"),
    ],
)
def test_bad_streams_are_refused_before_reading(new, options, message):
    with pytest.raises(ValueError, match=message):
        StreamingMixture({"new": new}, MixtureLaw({"new": 1}, 1, 1), 0, **{"max_length": LENGTH, **options})


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_law_in_parts_counts_on_from_what_was_read(count):
    """Against the counts of the law that begins there; behind its own past, another one, batches of another size."""
    names, at = "abcde"[:count], 20
    first = MixtureLaw(dict.fromkeys(names, 1), 7, 30)
    then = MixtureLaw({name: count - place for place, name in enumerate(names)}, 7, 10)
    own = {name: first.count(name, at) for name in names}
    other = {name: place for place, name in enumerate(names)}
    other[names[0]] = at * 7 - sum(other.values())
    for read in (own, other, {name: 11 * place + 3 for place, name in enumerate(names)}):
        law, seen = LawInParts(first, at, then, read), dict(read)
        assert law.num_batches == 30 and all(law.count(name, at) == read[name] for name in names)
        for position in range(at * 7, law.num_positions):
            name, item = law.assign(position)
            assert item == seen[name]
            seen[name] += 1
        assert [law.composition(at + batch) for batch in range(10)] == [then.composition(b) for b in range(10)]
        assert law.weights(at) == then.weights(0) and seen == {name: law.count(name) for name in names}
        before = [law.assign(position) for position in range(at * 7)]
        if read == own:
            assert before == [first.assign(position) for position in range(at * 7)]
        elif sum(read.values()) == at * 7:
            assert {name: sum(name == source for source, _ in before) for name in names} == read


def test_streams_go_on_under_another_law_where_each_stood():
    """Against the blocks of each stream alone: what is skipped is what was read, however it was mixed."""
    mixture, read = make_mixture_streaming(), {"new": 20, "replay": 4}
    mixture.law = LawInParts(mixture.law, 4, MixtureLaw({"new": 1, "replay": 3}, 6, 5), read)
    later = list(mixture)[24:]
    for place, (name, begin) in enumerate(read.items()):
        got = [item["input_ids"].tolist() for item in later if item["source"] == place]
        alone = itertools.islice(pack_stream(mixture._read(name), LENGTH, "document"), begin, begin + len(got))
        assert got == [block["input_ids"].tolist() for block in alone] and len(got) > 5
