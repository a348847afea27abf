"""Cut a corpus into blocks: documents are laid end to end and block k covers flat tokens [k * L, (k + 1) * L).

Letters: L = max_length, tokens per block. With packing="document" attention and loss stop at document boundaries
(position_ids restart, the first label of a document is -100); with "concat" both run across. Source: ours.
"""

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch


PACKINGS = ("document", "concat")
IGNORED_LABEL = -100


def check_packing(max_length: int, packing: str) -> None:
    """Refuse a block length below 2 (nothing to predict) or an unknown packing."""
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}: a block needs at least 2 tokens to predict one from another.")
    if packing not in PACKINGS:
        raise ValueError(f"packing is {packing!r}: choose one of {', '.join(map(repr, PACKINGS))}.")


def frame_block(tokens: np.ndarray, boundaries: Sequence[int], packing: str) -> dict[str, torch.Tensor]:
    """Turn the tokens of one block into model inputs; every value is an int64 tensor (L,).

    tokens: (L,) int64, kept as input_ids without a copy. boundaries: ascending positions in (0, L) where a document
    begins. labels are unshifted, as in transformers: labels[t] is predicted from tokens before t.
    """
    labels = tokens.copy()
    block = {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}
    if packing == "document":
        labels[boundaries] = IGNORED_LABEL
        begin = np.zeros(len(tokens), dtype=np.int64)
        begin[boundaries] = boundaries
        positions = np.arange(len(tokens), dtype=np.int64) - np.maximum.accumulate(begin)
        block["position_ids"] = torch.from_numpy(positions)
    return block


def pack_stream(
    documents: Iterable[Sequence[int]], max_length: int, packing: str
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the same blocks as PackedDataset from documents that come one by one; a last partial block is dropped."""
    check_packing(max_length, packing)
    tokens, filled, boundaries = np.empty(max_length, dtype=np.int64), 0, []
    for document in documents:
        ids, taken = np.asarray(document, dtype=np.int64), 0
        if filled and len(ids):
            boundaries.append(filled)
        while taken < len(ids):
            count = min(max_length - filled, len(ids) - taken)
            tokens[filled : filled + count] = ids[taken : taken + count]
            filled, taken = filled + count, taken + count
            if filled == max_length:
                yield frame_block(tokens, boundaries, packing)
                tokens, filled, boundaries = np.empty(max_length, dtype=np.int64), 0, []


class PackedDataset(torch.utils.data.Dataset):
    """Blocks of a tokenised `datasets.Dataset`, read straight from its memory-mapped arrow table.

    documents: column input_ids, a list of integers per row, each document already ending in EOS; `select` and
    `shuffle` are honoured. Holds 16 bytes of index per document and no tokens. The last partial block is dropped.
    Workers receive the file names, not the data.
    """

    def __init__(self, documents: datasets.Dataset, max_length: int, packing: str = "document"):
        check_packing(max_length, packing)
        if "input_ids" not in documents.column_names:
            raise ValueError(
                f"documents has the columns {documents.column_names} and no input_ids: run tokenize_documents on it."
            )
        self.documents, self.max_length, self.packing = documents, max_length, packing
        self._build_index()
        if len(self) == 0:
            raise ValueError(
                f"the dataset holds {self.num_tokens} tokens in {len(documents)} documents, fewer than one block of "
                f"max_length={max_length}: add text or lower max_length."
            )

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents, the dropped remainder after the last full block included."""
        return int(self._document_ends[-1]) if len(self._document_ends) else 0

    def __len__(self) -> int:
        return self.num_tokens // self.max_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Block `index` as frame_block gives it; negative indices count from the end."""
        index = operator.index(index)
        block = index + len(self) if index < 0 else index
        if not 0 <= block < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        tokens, boundaries = self._read(block * self.max_length)
        return frame_block(tokens, boundaries, self.packing)

    def _read(self, start: int) -> tuple[np.ndarray, list[int]]:
        """Copy max_length flat tokens from `start` on, and say where documents begin among them."""
        document = int(np.searchsorted(self._document_ends, start, side="right"))
        skip = start - (int(self._document_ends[document - 1]) if document else 0)
        tokens, filled, boundaries = np.empty(self.max_length, dtype=np.int64), 0, []
        while filled < self.max_length:
            ids = self._ids_of(document, skip, self.max_length - filled)
            if filled and len(ids):
                boundaries.append(filled)
            tokens[filled : filled + len(ids)] = ids
            filled, document, skip = filled + len(ids), document + 1, 0
        return tokens, boundaries

    def _ids_of(self, document: int, skip: int, limit: int) -> np.ndarray:
        """View at most `limit` ids of a document after its first `skip`."""
        end = int(self._document_ends[document])
        length = end - (int(self._document_ends[document - 1]) if document else 0)
        row = document if self._row_of_document is None else int(self._row_of_document[document])
        chunk = int(np.searchsorted(self._first_row_of_chunk, row, side="right")) - 1
        begin = int(self._start_of_row[row]) + skip
        return self._values_of_chunk[chunk][begin : begin + min(limit, length - skip)]

    def _build_index(self) -> None:
        """Lengths and places of all documents from arrow's own offsets, without touching the tokens."""
        column = self.documents.data.column("input_ids")
        values, starts, lengths, rows = [], [np.empty(0, np.int64)], [np.empty(0, np.int64)], []
        for chunk in column.chunks:
            if len(chunk) == 0:
                continue
            self._check_chunk(chunk)
            offsets = chunk.offsets.to_numpy()
            values.append(chunk.values.to_numpy(zero_copy_only=True))
            starts.append(offsets[:-1].astype(np.int64))
            lengths.append(np.diff(offsets).astype(np.int64))
            rows.append(len(chunk))
        self._values_of_chunk = values
        self._start_of_row = np.concatenate(starts)
        self._first_row_of_chunk = np.cumsum([0, *rows[:-1]], dtype=np.int64)
        length_of_row, mapping = np.concatenate(lengths), self.documents._indices
        self._row_of_document = None if mapping is None else mapping.column(0).to_numpy().astype(np.int64)
        ordered = length_of_row if mapping is None else length_of_row[self._row_of_document]
        self._document_ends = np.cumsum(ordered, dtype=np.int64)

    @staticmethod
    def _check_chunk(chunk: pa.Array) -> None:
        is_list = pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type)
        if not is_list or not pa.types.is_integer(chunk.type.value_type):
            raise ValueError(f"input_ids is {chunk.type}, not a list of integers: run tokenize_documents on it.")
        if chunk.null_count or chunk.values.null_count:
            raise ValueError("input_ids holds missing values: drop those rows.")

    def __getstate__(self) -> dict[str, Any]:
        return {"documents": self.documents, "max_length": self.max_length, "packing": self.packing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._build_index()
