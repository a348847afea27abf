"""The replay mixture for data that can only be read forwards: same law, buffered shuffle. Source: ours."""

from collections.abc import Iterator
from fractions import Fraction
from itertools import count
from typing import Any

import datasets
import torch

from hf_moe_cpt.data.packing import check_packing, pack_stream
from hf_moe_cpt.data.permutation import derive_seed
from hf_moe_cpt.data.replay import SOURCES, ReplayLaw, check_replay, exact_ratio


_ROWS_PER_READ = 64
_SHARDS_OF_A_MAP_STYLE_SOURCE = 64  # shards are visited in a new order each epoch; only the buffer mixes within one


class StreamingReplayMixture(torch.utils.data.IterableDataset):
    """Epochs of two document streams, packed and mixed by the law of ReplayMixture; batch_size * num_batches blocks.

    new, replay: tokenised (column input_ids). An IterableDataset is shuffled by shard and by a buffer of
    `shuffle_buffer` documents under a seed of its own per epoch; a map-style Dataset is streamed likewise, so that a
    small replay set on disk can accompany a streamed corpus. Blocks run on from one epoch into the next.

    What comes out depends on (seed, position) only. DataLoader takes batch k from worker k % W, so worker w yields the
    micro-batches k % W == w: micro_batch_size must equal the DataLoader's batch_size (per device when accelerate
    dispatches batches from rank 0, its default for iterable data). Every worker reads the whole stream, hence more
    than one of them helps against latency, not against work. Resuming reads the skipped part again.
    """

    def __init__(
        self,
        new: datasets.IterableDataset | datasets.Dataset,
        replay: datasets.IterableDataset | datasets.Dataset | None,
        replay_ratio: float | Fraction,
        batch_size: int,
        num_batches: int,
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
        self.law = ReplayLaw(exact_ratio(replay_ratio), batch_size, num_batches)
        check_replay(replay, self.law.ratio)
        self.documents = {"new": _as_stream(new, "new")}
        if replay is not None:
            self.documents["replay"] = _as_stream(replay, "replay")
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
                yield {**block, "source": SOURCES.index(source)}

    def composition(self, batch: int) -> tuple[int, int]:
        """(new blocks, replay blocks) of optimizer batch `batch`."""
        return self.law.composition(batch)

    def _read(self, source: str) -> Iterator[list[int]]:
        """Documents of one source, epoch after epoch, without end."""
        for epoch in count():
            shuffled = self.documents[source].shuffle(
                seed=derive_seed(self.seed, source, epoch), buffer_size=self.shuffle_buffer
            )
            num_tokens = 0
            # `iter` and not `for row in`: the latter gives each DataLoader worker other shards, and another order.
            for rows in shuffled.iter(batch_size=_ROWS_PER_READ):
                for ids in rows["input_ids"]:
                    num_tokens += len(ids)
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
