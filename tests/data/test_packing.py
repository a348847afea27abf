"""Blocks are the concatenated corpus cut at multiples of max_length, whatever the arrow layout underneath."""

import pickle

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_moe_cpt.data.packing import PACKINGS, PackedDataset, frame_block, pack_stream


def make_corpus(lengths: list[int], rows_per_chunk: int = 3) -> tuple[datasets.Dataset, list[list[int]]]:
    """Documents of given lengths in an arrow table of chunks; tokens are 0, 1, 2, ... through the whole corpus."""
    ends = np.cumsum([0, *lengths])
    documents = [list(range(begin, end)) for begin, end in zip(ends[:-1], ends[1:], strict=True)]
    kind = pa.list_(pa.int32())
    chunks = [pa.array(documents[i : i + rows_per_chunk], kind) for i in range(0, len(documents), rows_per_chunk)]
    table = pa.table({"input_ids": pa.chunked_array(chunks, kind)})
    return datasets.Dataset(datasets.table.InMemoryTable(table)), documents


def reference_blocks(documents: list[list[int]], length: int, packing: str) -> list[dict[str, list[int]]]:
    """The definition, token by token."""
    flat = [(token, place) for document in documents for place, token in enumerate(document)]
    blocks = []
    for start in range(0, len(flat) - length + 1, length):
        tokens, places = zip(*flat[start : start + length], strict=True)
        labels, positions, position = list(tokens), [], 0
        for t, place in enumerate(places):
            if place == 0 and t > 0:
                position = 0
                labels[t] = -100
            positions.append(position)
            position += 1
        if packing == "concat":
            blocks.append({"input_ids": list(tokens), "labels": list(tokens)})
        else:
            blocks.append({"input_ids": list(tokens), "labels": labels, "position_ids": positions})
    return blocks


def as_lists(blocks) -> list[dict[str, list[int]]]:
    return [{key: value.tolist() for key, value in block.items()} for block in blocks]


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=25).filter(lambda lengths: sum(lengths) >= 12)


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, length=st.integers(2, 12), packing=st.sampled_from(PACKINGS), chunk=st.integers(1, 9))
def test_view_stream_and_definition_agree(lengths, length, packing, chunk):
    corpus, documents = make_corpus(lengths, chunk)
    packed = PackedDataset(corpus, length, packing)
    want = reference_blocks(documents, length, packing)
    assert as_lists(packed[k] for k in range(len(packed))) == want
    assert as_lists(pack_stream(iter(documents), length, packing)) == want
    assert packed.num_tokens == sum(lengths)


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 99), data=st.data())
def test_select_and_shuffle_are_honoured(lengths, seed, data):
    corpus, documents = make_corpus(lengths)
    order = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=30))
    tail = range(len(lengths) // 2, len(lengths))
    for chosen in (corpus.select(order), corpus.shuffle(seed=seed), corpus.select(tail)):
        rows = chosen["input_ids"][:]
        if sum(map(len, rows)) >= 5:
            assert as_lists(PackedDataset(chosen, 5)) == reference_blocks(rows, 5, "document")


def test_sliced_and_concatenated_tables():
    corpus, _ = make_corpus([4, 9, 1, 30, 2, 7])
    joined = datasets.concatenate_datasets([corpus.select(range(1, 4)), corpus])
    assert as_lists(PackedDataset(joined, 6)) == reference_blocks(joined["input_ids"][:], 6, "document")


def test_values_shapes_and_types_of_a_block():
    block = PackedDataset(make_corpus([3, 5])[0], 8)[0]
    assert {key: (value.dtype, tuple(value.shape)) for key, value in block.items()} == dict.fromkeys(
        ["input_ids", "labels", "position_ids"], (torch.int64, (8,))
    )
    assert block["labels"].tolist() == [0, 1, 2, -100, 4, 5, 6, 7]
    assert block["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]


def test_a_continued_document_counts_from_the_start_of_the_block():
    assert PackedDataset(make_corpus([7, 3])[0], 5)[1]["position_ids"].tolist() == [0, 1, 0, 1, 2]


def test_a_block_does_not_alias_the_corpus_or_its_labels():
    packed = PackedDataset(make_corpus([10])[0], 5, "concat")
    block = packed[0]
    block["input_ids"].fill_(77)
    assert block["labels"].tolist() == packed[0]["input_ids"].tolist() == [0, 1, 2, 3, 4]


def test_a_memory_mapped_corpus_stays_on_disk(tmp_path):
    make_corpus([50_000, 3, 20_000])[0].save_to_disk(tmp_path / "corpus")
    packed = PackedDataset(datasets.load_from_disk(str(tmp_path / "corpus")), 1000)
    assert packed[50]["input_ids"].tolist() == list(range(50_000, 51_000))
    assert all(not values.flags.owndata and not values.flags.writeable for values in packed._values_of_chunk)
    assert len(pickle.dumps(packed)) < 20_000
    copy = pickle.loads(pickle.dumps(packed))
    assert torch.equal(copy[69]["input_ids"], packed[69]["input_ids"])


def test_data_loader_workers_read_the_same(tmp_path):
    make_corpus([40, 3, 57])[0].save_to_disk(tmp_path / "corpus")
    packed = PackedDataset(datasets.load_from_disk(str(tmp_path / "corpus")), 10)
    loader = torch.utils.data.DataLoader(packed, 2, num_workers=2)
    read = torch.cat([batch["input_ids"] for batch in loader])
    assert read.flatten().tolist() == list(range(100))


def test_indices_wrap_from_the_end_and_stop():
    packed = PackedDataset(make_corpus([10])[0], 5)
    assert packed[-1]["input_ids"].tolist() == packed[np.int64(1)]["input_ids"].tolist() == [5, 6, 7, 8, 9]
    for index in (2, -3):
        with pytest.raises(IndexError):
            packed[index]


def test_frame_block_of_one_document_masks_nothing():
    block = frame_block(np.arange(4), [], "document")
    assert block["labels"].tolist() == block["position_ids"].tolist() == [0, 1, 2, 3]


def test_too_few_tokens():
    with pytest.raises(ValueError, match=r"12 tokens in 3 documents, fewer than one block of max_length=13"):
        PackedDataset(make_corpus([4, 4, 4])[0], 13)
    with pytest.raises(ValueError, match="0 tokens in 0 documents"):
        PackedDataset(make_corpus([4])[0].select([]), 13)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"text": ["a"]}, r"columns \['text'\] and no input_ids: run tokenize_documents"),
        ({"input_ids": ["a"]}, "is string, not a list of integers"),
        ({"input_ids": [[0.5, 1.5]]}, "is list<.*double>, not a list of integers"),
        ({"input_ids": [[1, 2], None]}, "missing values"),
        ({"input_ids": [[1, None]]}, "missing values"),
    ],
)
def test_what_is_not_tokenised_is_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        PackedDataset(datasets.Dataset.from_dict(columns), 2)


def test_bad_options():
    with pytest.raises(ValueError, match="max_length is 1"):
        PackedDataset(make_corpus([9])[0], 1)
    with pytest.raises(ValueError, match="packing is 'bfd': choose one of 'document', 'concat'"):
        next(pack_stream([[1, 2, 3]], 2, "bfd"))
