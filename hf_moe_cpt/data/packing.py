"""Blocks of training: a corpus cut into blocks, blocks of any number of sources mixed by an exact law, batches.

Packing: documents are laid end to end and block k covers flat tokens [k * L, (k + 1) * L). With packing="document"
attention and loss stop at document boundaries (position_ids restart, the first label of a document is -100); with
"concat" both run across; with "padded" a row is one document, cut where it is longer and filled up where it is
shorter, for models whose layers read on. What is left behind the last full block begins the next epoch. Mixing: an
exact share of every source in every batch, in a stateless order; data that can only be read forwards obeys the same
law with a buffered shuffle.

Letters: L = max_length, tokens per block; B = global optimizer batch in blocks (all ranks, all accumulation steps),
S = sources, w = their weights, which add up to one, r = replay ratio, i = position in [0, B * num_batches), q =
ordinal of an item within its source, T = what a source should have had before a batch: B times the sum of its weights.
Source: ratio of new to old data per batch, Thérien et al. 2025 (arXiv 2503.05029), section on replay; counts of a
batch, R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980): no law comes nearer to all T than
1 - 1 / (2S - 2) blocks; the rest ours.
"""

import operator
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import count
from math import lcm
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch

from hf_moe_cpt.data.random import derive_seed, permute


PACKINGS = ("document", "concat", "padded")
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


def frame_row(ids: np.ndarray, max_length: int) -> dict[str, torch.Tensor]:
    """A document of at most L tokens as a row of its own; every value is an int64 tensor (L,).

    What fills it up is token 0, has the label -100 and is 0 in attention_mask.
    """
    missing = (0, max_length - len(ids))
    columns = {
        "input_ids": np.pad(ids, missing),
        "labels": np.pad(ids, missing, constant_values=IGNORED_LABEL),
        "attention_mask": np.pad(np.ones_like(ids), missing),
    }
    return {name: torch.from_numpy(values.astype(np.int64)) for name, values in columns.items()}


def rows_of(num_tokens: Any, max_length: int) -> Any:
    """Rows of a document of so many tokens, an int or an array of them; no row is for a single last token."""
    return -((1 - num_tokens) // max_length)


def pack_stream(
    documents: Iterable[Sequence[int]], max_length: int, packing: str
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the same blocks as PackedDataset from documents that come one by one; a last partial block is dropped."""
    check_packing(max_length, packing)
    tokens, filled, boundaries = np.empty(max_length, dtype=np.int64), 0, []
    for document in documents:
        ids, taken = np.asarray(document, dtype=np.int64), 0
        if packing == "padded":
            for row in range(rows_of(len(ids), max_length)):
                yield frame_row(ids[row * max_length : (row + 1) * max_length], max_length)
            continue
        if filled and len(ids):
            boundaries.append(filled)
        while taken < len(ids):
            take = min(max_length - filled, len(ids) - taken)
            tokens[filled : filled + take] = ids[taken : taken + take]
            filled, taken = filled + take, taken + take
            if filled == max_length:
                yield frame_block(tokens, boundaries, packing)
                tokens, filled, boundaries = np.empty(max_length, dtype=np.int64), 0, []


_ROWS_OF_PIECE = 4096


class PackedDataset(torch.utils.data.Dataset):
    """Blocks of a tokenised `datasets.Dataset`, read straight from its memory-mapped arrow table.

    documents: column input_ids, a list of integers per row, each document already ending in EOS; `select` and
    `shuffle` are honoured, once written out. The index is arrow's own offsets, memory-mapped like the tokens: what is
    held is a few numbers for every `_ROWS_OF_PIECE` documents. Blocks run on: behind the last document comes the first
    again, so that block `len` holds the remainder (`blocks_per_epoch`). Padded rows are all kept but those of a single
    token. Workers receive the file names, not the data.
    """

    def __init__(self, documents: datasets.Dataset, max_length: int, packing: str = "document"):
        check_packing(max_length, packing)
        if "input_ids" not in documents.column_names:
            raise ValueError(
                f"documents has the columns {documents.column_names} and no input_ids: run tokenize_documents on it."
            )
        if documents._indices is not None:  # a selection or another order
            documents = documents.flatten_indices()
        self.documents, self.max_length, self.packing = documents, max_length, packing
        self._build_index()
        if len(self) == 0:
            raise ValueError(
                f"the dataset holds {self.num_tokens} tokens in {len(documents)} documents, fewer than one block of "
                f"max_length={max_length}: add text or lower max_length."
            )

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents, the remainder after the last full block included."""
        return int(self._first_token[-1])

    @property
    def blocks_per_epoch(self) -> Fraction:
        """Blocks until every token was read once, a whole number only if none remains."""
        return Fraction(len(self)) if self.packing == "padded" else Fraction(self.num_tokens, self.max_length)

    def block(self, number: int) -> dict[str, torch.Tensor]:
        """Block `number` of the endless row of epochs; below `len` those of this data set."""
        if self.packing == "padded":
            return self[number % len(self)]
        tokens, boundaries = self._read(number * self.max_length % self.num_tokens)
        return frame_block(tokens, boundaries, self.packing)

    def __len__(self) -> int:
        if self.packing == "padded":
            return int(self._first_block[-1])
        return self.num_tokens // self.max_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Block `index` as frame_block or frame_row gives it; negative indices count from the end."""
        index = operator.index(index)
        block = index + len(self) if index < 0 else index
        if not 0 <= block < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        if self.packing == "padded":
            number = int(np.searchsorted(self._first_block, block, side="right")) - 1
            offsets, values = self._piece(number)
            ends, place = np.cumsum(rows_of(np.diff(offsets), self.max_length)), block - self._first_block[number]
            document = int(np.searchsorted(ends, place, side="right"))
            row = place - (ends[document - 1] if document else 0)
            begin, end = offsets[document] + row * self.max_length, offsets[document + 1]
            return frame_row(values[begin:end][: self.max_length], self.max_length)
        tokens, boundaries = self._read(block * self.max_length)
        return frame_block(tokens, boundaries, self.packing)

    def _read(self, start: int) -> tuple[np.ndarray, list[int]]:
        """Copy max_length flat tokens from `start` on, and say where documents begin among them."""
        tokens, filled, boundaries = np.empty(self.max_length, dtype=np.int64), 0, []
        while filled < self.max_length:
            number = int(np.searchsorted(self._first_token, start, side="right")) - 1
            offsets, values = self._piece(number)
            first = int(offsets[0]) + start - int(self._first_token[number])
            taken = min(self.max_length - filled, int(offsets[-1]) - first)
            tokens[filled : filled + taken] = values[first : first + taken]
            begins = offsets[np.searchsorted(offsets, first) : np.searchsorted(offsets, first + taken)]
            boundaries += [filled + begin - first for begin in np.unique(begins).tolist() if filled + begin > first]
            filled, start = filled + taken, (start + taken) % self.num_tokens
        return tokens, boundaries

    def _piece(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the documents of a piece begin among the values of its chunk, and where the last one ends."""
        chunk, row = self._place_of_piece[number]
        offsets, values = self._chunks[chunk]
        return offsets[row : row + _ROWS_OF_PIECE + 1], values

    def _build_index(self) -> None:
        """How many tokens (and padded rows) come before every piece; arrow knows the rest."""
        self._chunks, self._place_of_piece, tokens, blocks = [], [], [0], [0]
        for chunk in self.documents.data.column("input_ids").chunks:
            self._check_chunk(chunk)
            offsets = chunk.offsets.to_numpy(zero_copy_only=True)
            for row in range(0, len(chunk), _ROWS_OF_PIECE):
                piece = offsets[row : row + _ROWS_OF_PIECE + 1]
                self._place_of_piece.append((len(self._chunks), row))
                tokens.append(int(piece[-1]) - int(piece[0]))
                if self.packing == "padded":
                    blocks.append(int(rows_of(np.diff(piece), self.max_length).sum()))
            self._chunks.append((offsets, chunk.values.to_numpy(zero_copy_only=True)))
        self._first_token, self._first_block = np.cumsum(tokens), np.cumsum(blocks)

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


_MAX_DENOMINATOR = 10**9


def exact_ratio(replay_ratio: float | Fraction) -> Fraction:
    """The fraction a user means: 0.3 is 3/10, 1/3 is one third. Refuses anything outside [0, 1)."""
    if isinstance(replay_ratio, bool) or not isinstance(replay_ratio, (int, float, Fraction)):
        raise ValueError(f"replay_ratio is {replay_ratio!r}: give a number in [0, 1).")
    if not 0 <= replay_ratio < 1:  # also refuses nan
        raise ValueError(
            f"replay_ratio is {replay_ratio}: it is the share of replay in every batch and must lie in [0, 1); "
            "a percentage such as 30 is written 0.3."
        )
    ratio = Fraction(str(replay_ratio)).limit_denominator(_MAX_DENOMINATOR)
    if ratio == 1 or (ratio == 0 and replay_ratio > 0):
        raise ValueError(f"replay_ratio is {replay_ratio}: closer than 1e-9 to {ratio}, give a plainer number.")
    return ratio


def exact_shares(weights: Sequence[float | Fraction]) -> tuple[list[int], int]:
    """Weights as whole numbers and their sum, D: [0.5, 0.3, 0.2] is [5, 3, 2] of 10.

    Raises ValueError for a weight below 0 or not finite, and where none is above 0. Of weights whose common
    denominator is beyond 1e9 the millionths are kept.
    """
    if not all(isinstance(weight, (int, float, Fraction)) and 0 <= weight < float("inf") for weight in weights):
        raise ValueError(f"weights {list(weights)}: each must be a finite number of at least 0.")
    exact = [Fraction(str(weight)) for weight in weights]
    if not sum(exact) > 0:
        raise ValueError(f"weights {list(weights)}: at least one must be above 0.")
    exact = [weight / sum(exact) for weight in exact]
    whole = lcm(*(weight.denominator for weight in exact))
    if whole > _MAX_DENOMINATOR:
        return _millionths(exact), 10**6
    return [int(weight * whole) for weight in exact], whole


def _millionths(shares: Sequence[Fraction]) -> list[int]:
    ends = [round(10**6 * sum(shares[:place])) for place in range(len(shares) + 1)]
    return [end - begin for begin, end in zip(ends, ends[1:], strict=False)]


def changing_shares(
    weights: Sequence[float | Fraction],
    end_weights: Sequence[float | Fraction],
    num_batches: int,
    changes_at: int | None = None,
) -> np.ndarray:
    """Weights of every batch in millionths, (num_batches, S): linear from the first to the last batch, or a change.

    changes_at: the batch from which end_weights hold, all at once; None is linear.
    """
    begin, end = (
        np.array(_millionths([Fraction(share, whole) for share in shares]))
        for shares, whole in map(exact_shares, (weights, end_weights))
    )
    batch = np.arange(num_batches)[:, None]
    if changes_at is not None:
        return np.where(batch < changes_at, begin, end)
    last = max(1, num_batches - 1)
    ends = np.cumsum(begin * (last - batch) + end * batch, axis=1)
    return np.diff((2 * ends + last) // (2 * last), axis=1, prepend=0)


class MixtureLaw:
    """Assigns the positions of a run to sources by their weights; pure arithmetic, the same on every rank and worker.

    After every batch the blocks of a source differ from T, what its weights say, by at most 1 - 1 / (2S - 2): half a
    block for two sources. Within a batch the blocks of a source are spread evenly. Two sources of constant weight
    give the law of replay: replay items before position i number floor(i * r + 1/2).

    weights: by name of the source, in any unit. shares: instead of them for every batch, of `changing_shares`.
    """

    def __init__(
        self,
        weights: Mapping[str, float | Fraction],
        batch_size: int,
        num_batches: int,
        shares: np.ndarray | None = None,
    ):
        for name, value in (("batch_size", batch_size), ("num_batches", num_batches)):
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1.")
        self.names, self.batch_size, self.num_batches = tuple(weights), batch_size, num_batches
        if shares is None:
            constant, self._whole = exact_shares(list(weights.values()))
            shares = [constant]
        else:
            self._whole = 10**6
        is_large = self.num_positions * self._whole * 4 * len(weights) >= 2**62
        self._shares = np.array(shares, dtype=object if is_large else np.int64)
        blocks = self._shares * batch_size  # of a batch, in units of 1 / D, as T is
        if len(blocks) == 1:
            self._targets = np.arange(num_batches + 1, dtype=blocks.dtype)[:, None] * blocks
        else:
            self._targets = np.concatenate([np.zeros_like(blocks[:1]), np.cumsum(blocks, axis=0)])
        self._counts = self._count()
        self._order = lru_cache(maxsize=4)(self._order_of)

    def _count(self) -> np.ndarray:
        """Blocks of every source before every batch, (num_batches + 1, S): Tijdeman's rule with batches for steps.

        Item j of a source may come once T - (j - 1) is at least 1 / (2S - 2) and must have come before T - (j - 1)
        exceeds 1 - 1 / (2S - 2); the earliest deadline first, the last source where two are the same.
        """
        units = max(2, 2 * len(self.names) - 2)
        scaled, whole = self._targets * units, self._whole * units
        may = (scaled + (whole - self._whole)) // whole
        must = -((whole - self._whole - scaled) // whole)
        totals = self.batch_size * np.arange(self.num_batches + 1)
        if len(self.names) <= 2:
            counts = may.astype(np.int64)
            counts[:, 0] = totals - counts[:, 1:].sum(axis=1)
            return counts
        counts, now = [[0] * len(self.names)], [0] * len(self.names)
        due = [[int(value) for value in column] for column in scaled.T]
        rates = [max(1, step) for step in (scaled[-1] - scaled[-2]).tolist()]

        def deadline(source: int) -> float:
            needed = whole * (now[source] + 1) - self._whole + 1
            batch = bisect_left(due[source], needed)
            return batch if batch < len(due[source]) else batch + -(-(needed - due[source][-1]) // rates[source])

        for total, allowed, least in zip(totals[1:].tolist(), may[1:].tolist(), must[1:].tolist(), strict=True):
            now = [max(before, needed) for before, needed in zip(now, least, strict=True)]
            for _ in range(total - sum(now)):
                open_sources = [source for source in range(len(now)) if now[source] < allowed[source]]
                now[min(open_sources, key=lambda source: (deadline(source), -source))] += 1
            counts.append(list(now))
        return np.array(counts, dtype=np.int64)

    def _order_of(self, batch: int) -> tuple[list[int], list[int]]:
        """Source of each position of a batch, and how many items of the source came before it in the run.

        An item is due where its source should have had half of it; what is due first comes first.
        """
        shares = self._shares[batch if len(self._shares) > 1 else 0].tolist()
        targets, begins, ends = (table.tolist() for table in (
            self._targets[batch], self._counts[batch], self._counts[batch + 1]
        ))  # fmt: skip
        items = []
        for source, (share, target) in enumerate(zip(shares, targets, strict=True)):
            for item in range(begins[source], ends[source]):
                late = (2 * item + 1) * self._whole - 2 * target
                items.append((-(-late // (2 * share)) if share else 0, -source, item))
        items.sort()
        return [-source for _, source, _ in items], [item for _, _, item in items]

    @property
    def num_positions(self) -> int:
        """Blocks that the whole budget reads, from all sources together."""
        return self.batch_size * self.num_batches

    def assign(self, position: int) -> tuple[str, int]:
        """The source that serves a position, and how many items of that source came before it."""
        batch, place = divmod(position, self.batch_size)
        sources, ordinals = self._order(batch)
        return self.names[sources[place]], ordinals[place]

    def weights(self, batch: int) -> tuple[Fraction, ...]:
        """Shares of the sources in optimizer batch `batch`."""
        shares = self._shares[batch if len(self._shares) > 1 else 0].tolist()
        return tuple(Fraction(share, self._whole) for share in shares)

    def composition(self, batch: int) -> tuple[int, ...]:
        """Blocks of each source in optimizer batch `batch`; they add up to batch_size."""
        return tuple((self._counts[batch + 1] - self._counts[batch]).tolist())

    def count(self, source: str, before: int | None = None) -> int:
        """Blocks that the whole budget reads from a source, or all batches before one."""
        return int(self._counts[-1 if before is None else before][self.names.index(source)])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=4)(self._order_of)


class LawInParts:
    """A law from batch `at` on, under which blocks are counted on that were read before.

    Read as a `MixtureLaw` is. read: blocks of each source before `at`. first: the law of the batches before it; if it
    does not come to what was read, those are told as an even spread of it. The bounds are those of `then`, counted
    from where it begins.
    """

    def __init__(self, first: "MixtureLaw | LawInParts", at: int, then: MixtureLaw, read: Mapping[str, int]):
        self.names, self.batch_size, self.num_batches = then.names, then.batch_size, at + then.num_batches
        self._read, self._at, self._then = {name: read[name] for name in then.names}, at, then
        is_true = all(first.count(name, at) == read[name] for name in then.names)
        self._first = first if is_true else MixtureLaw(self._read, then.batch_size, at)

    @property
    def num_positions(self) -> int:
        """Blocks of the whole budget."""
        return self.batch_size * self.num_batches

    def assign(self, position: int) -> tuple[str, int]:
        """The source that serves a position, and how many items of the source came before it."""
        later = position - self._at * self.batch_size
        if later < 0:
            return self._first.assign(position)
        source, item = self._then.assign(later)
        return source, item + self._read[source]

    def weights(self, batch: int) -> tuple[Fraction, ...]:
        """Shares of the sources in optimizer batch `batch`."""
        return self._first.weights(batch) if batch < self._at else self._then.weights(batch - self._at)

    def composition(self, batch: int) -> tuple[int, ...]:
        """Blocks of each source in optimizer batch `batch`."""
        return self._first.composition(batch) if batch < self._at else self._then.composition(batch - self._at)

    def count(self, source: str, before: int | None = None) -> int:
        """Blocks that the whole budget reads from a source, or all batches before one."""
        later = self._then.num_batches if before is None else before - self._at
        return self._first.count(source, before) if later < 0 else self._read[source] + self._then.count(source, later)


class Mixture(torch.utils.data.Dataset):
    """Map-style mixture of blocks of several sources; position i belongs to optimizer batch i // batch_size.

    Read it in sequence: order, epochs and shares are functions of (seed, position), so a resumed run needs no saved
    state and skips in O(1). Blocks of a source are spread evenly, hence micro-batches and ranks are even too. Each
    epoch of each source is a permutation of its own, under a seed of its name; what remains behind the last full block
    of an epoch begins the next one.

    blocks: map-style datasets of dictionaries with the same keys, by the names of the law. An item is the source's
    dictionary plus "source", the place of its name.
    """

    def __init__(self, blocks: Mapping[str, torch.utils.data.Dataset], law: MixtureLaw, seed: int):
        for source in law.names:
            if len(blocks[source]) == 0:
                raise ValueError(f"the {source} source is empty: it needs at least one block of tokens.")
        self.law, self.blocks, self.seed = law, dict(blocks), seed

    def __len__(self) -> int:
        return self.law.num_positions

    def __getitem__(self, position: int) -> dict[str, Any]:
        source, first, place, _ = self._find(position)
        blocks = self.blocks[source]
        block = blocks.block(first + place) if isinstance(blocks, PackedDataset) else blocks[place]
        return {**block, "source": self.law.names.index(source)}

    def locate(self, position: int) -> tuple[str, int, int]:
        """(source, epoch of that source, place in that epoch) of a position, without reading any data."""
        source, _, place, epoch = self._find(position)
        return source, epoch, place

    def _find(self, position: int) -> tuple[str, int, int, int]:
        """Source, blocks of its earlier epochs, place in its epoch, epoch."""
        position = operator.index(position)
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of {len(self)}")
        source, ordinal = self.law.assign(position)
        length = blocks_per_epoch(self.blocks[source])
        epoch = -(-(ordinal + 1) // length) - 1
        first, end = epoch * length // 1, (epoch + 1) * length // 1
        place = permute(ordinal - first, end - first, derive_seed(self.seed, source, epoch))
        return source, first, place, epoch

    def composition(self, batch: int) -> tuple[int, ...]:
        """Blocks of each source in optimizer batch `batch`."""
        return self.law.composition(batch)

    def summary(self) -> dict[str, float]:
        """What the budget reads: <source>_blocks, and <source>_epochs = blocks read / blocks in the source."""
        figures: dict[str, float] = {}
        for source in self.law.names:
            figures[f"{source}_blocks"] = self.law.count(source)
            figures[f"{source}_epochs"] = float(self.law.count(source) / blocks_per_epoch(self.blocks[source]))
        return figures


def blocks_per_epoch(blocks: torch.utils.data.Dataset) -> Fraction:
    """Blocks of a source in one epoch, a fraction where its last one is not full."""
    return blocks.blocks_per_epoch if isinstance(blocks, PackedDataset) else Fraction(len(blocks))


_ROWS_PER_READ = 64
_SHARDS_OF_A_MAP_STYLE_SOURCE = 64  # shards are visited in a new order each epoch; only the buffer mixes within one


class StreamingMixture(torch.utils.data.IterableDataset):
    """Epochs of document streams, packed and mixed by the law of Mixture; batch_size * num_batches blocks.

    documents: tokenised (column input_ids), by the names of the law. An IterableDataset is shuffled by shard and by a
    buffer of `shuffle_buffer` documents under a seed of its own per epoch; a map-style Dataset is streamed likewise,
    so that a small replay set on disk can accompany a streamed corpus. Blocks run on from one epoch into the next.

    What comes out depends on (seed, position) only. DataLoader takes batch k from worker k % W, so worker w yields the
    micro-batches k % W == w: micro_batch_size must equal the DataLoader's batch_size (per device when accelerate
    dispatches batches from rank 0, its default for iterable data). Every worker reads the whole stream, hence more
    than one of them helps against latency, not against work. Resuming reads the skipped part again.
    """

    def __init__(
        self,
        documents: Mapping[str, datasets.IterableDataset | datasets.Dataset],
        law: MixtureLaw,
        seed: int,
        *,
        max_length: int,
        packing: str = "document",
        micro_batch_size: int = 1,
        shuffle_buffer: int = 1000,
    ):
        check_packing(max_length, packing)
        for name, value in (("micro_batch_size", micro_batch_size), ("shuffle_buffer", shuffle_buffer)):
            if value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1.")
        self.law = law
        self.documents = {name: _as_stream(documents[name], name) for name in law.names}
        self.seed, self.max_length, self.packing = seed, max_length, packing
        self.micro_batch_size, self.shuffle_buffer = micro_batch_size, shuffle_buffer

    def __len__(self) -> int:
        return self.law.num_positions

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker_info = torch.utils.data.get_worker_info()
        worker, num_workers = (0, 1) if worker_info is None else (worker_info.id, worker_info.num_workers)
        blocks = {name: pack_stream(self._read(name), self.max_length, self.packing) for name in self.documents}
        for position in range(len(self)):
            source, _ = self.law.assign(position)
            block = next(blocks[source])
            if (position // self.micro_batch_size) % num_workers == worker:
                yield {**block, "source": self.law.names.index(source)}

    def _read(self, source: str) -> Iterator[list[int]]:
        """Documents of one source, epoch after epoch, without end."""
        for epoch in count():
            shuffled = self.documents[source].shuffle(
                seed=derive_seed(self.seed, source, epoch), buffer_size=self.shuffle_buffer
            )
            num_tokens, padded = 0, self.packing == "padded"  # a row counts as a block
            # `iter` and not `for row in`: the latter gives each DataLoader worker other shards, and another order.
            for rows in shuffled.iter(batch_size=_ROWS_PER_READ):
                for ids in rows["input_ids"]:
                    num_tokens += self.max_length * rows_of(len(ids), self.max_length) if padded else len(ids)
                    yield ids
            if num_tokens < self.max_length:
                raise ValueError(
                    f"the {source} stream ended after {num_tokens} tokens, fewer than one block of "
                    f"max_length={self.max_length}: add text or lower max_length."
                )


def _as_stream(documents: datasets.IterableDataset | datasets.Dataset, source: str) -> datasets.IterableDataset:
    if isinstance(documents, datasets.Dataset):
        if len(documents) == 0:
            raise ValueError(f"the {source} source is empty: it needs at least one block of tokens.")
        documents = documents.to_iterable_dataset(num_shards=min(len(documents), _SHARDS_OF_A_MAP_STYLE_SOURCE))
    if not isinstance(documents, datasets.IterableDataset):
        raise ValueError(
            f"the {source} source is a {type(documents).__name__}: give a datasets.IterableDataset "
            "or datasets.Dataset from tokenize_documents."
        )
    if documents.column_names is not None and "input_ids" not in documents.column_names:
        raise ValueError(
            f"the {source} source has the columns {documents.column_names} and no input_ids: "
            "run tokenize_documents on it."
        )
    return documents


def stack_blocks(items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack each key of the items along a new first dimension: tensors (L,) give (items, L), integers int64 (items,).

    Every item must have the same keys, and tensors of one key the same length: blocks are packed, nothing is padded.
    """
    batch: dict[str, torch.Tensor] = {}
    for item in items:
        if item.keys() != items[0].keys():
            odd = ", ".join(map(repr, sorted(item.keys() ^ items[0].keys())))
            raise ValueError(f"only some blocks of the batch have {odd}: pack all sources in the same way.")
    for key in items[0]:
        values = [item[key] for item in items]
        if isinstance(values[0], int):
            batch[key] = torch.tensor(values, dtype=torch.int64)
            continue
        lengths = sorted({tuple(value.shape) for value in values})
        if len(lengths) > 1:
            raise ValueError(f"{key!r} has the shapes {lengths} in one batch: pack all data to one max_length.")
        batch[key] = torch.stack(values)
    return batch
