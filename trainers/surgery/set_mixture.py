"""Which rows of each set a step reads, and the batches that they make: endless, shuffled, the same for any ranks.

Item i of the mixture holds, of a set with N rows and size s in a micro-batch, its positions i s to i s + s - 1;
position q is row permute(q % N) of epoch q // N, with a seed of set and epoch. So a set starts anew whenever it is
through, none waits for another, and a resumed run needs no state. Items are dealt to micro-batches and ranks in
order. Letters: B rows, S tokens of the longest. Source: ours; independent endless loaders are arXiv 2409.13054's.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from hf_moe_cpt.data.permutation import derive_seed, permute


Row = dict[str, Any]
WINNER = "winner"  # the other text of a pair loss, inside the batch of the text that is to lose


class SurgeryMixture(torch.utils.data.Dataset):
    """Map-style: an item is {set: [rows]}, the rows of one micro-batch; read it in sequence.

    sets: tokenised rows by name. sizes: rows of each in an item. num_items: items of the whole run.
    """

    def __init__(self, sets: Mapping[str, Dataset], sizes: Mapping[str, int], num_items: int, seed: int) -> None:
        self.sets, self.sizes, self.num_items, self.seed = dict(sets), dict(sizes), num_items, seed

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, item: int) -> dict[str, list[Row]]:
        return {name: [row_of(self.sets[name], place) for place in self.rows(name, item)] for name in self.sets}

    def rows(self, name: str, item: int) -> list[int]:
        """Numbers of the rows of a set in an item, without reading them."""
        item, size, length = operator.index(item), self.sizes[name], len(self.sets[name])
        if not 0 <= item < self.num_items:
            raise IndexError(f"item {item} of {self.num_items}")
        places = []
        for position in range(item * size, (item + 1) * size):
            epoch, offset = divmod(position, length)
            places.append(permute(offset, length, derive_seed(self.seed, name, epoch)))
        return places


def row_of(rows: Dataset, place: int) -> Row:
    """A row with its number in the set as `row`."""
    return {**rows[place], "row": place}


def collate_sets(items: Sequence[Mapping[str, Sequence[Row]]], pad_token_id: int) -> dict[str, dict[str, Any]]:
    """{set: batch} of the rows of all items."""
    return {name: collate_rows([row for item in items for row in item[name]], pad_token_id) for name in items[0]}


def collate_rows(rows: Sequence[Row], pad_token_id: int) -> dict[str, Any]:
    """input_ids, attention_mask (B, S) int64, completion_mask (B, S) bool, and row, the rows' numbers.

    The numbers are a list: they are looked up on the host, which must not wait for a device. Padded on the right. Rows
    with a winner make a second batch of the winners, as WINNER.
    """
    batch: dict[str, Any] = _padded([(row["input_ids"], row["completion_mask"]) for row in rows], pad_token_id)
    batch["row"] = [row["row"] for row in rows]
    if "winner_input_ids" in rows[0]:
        winners = [(row["winner_input_ids"], row["winner_completion_mask"]) for row in rows]
        batch[WINNER] = {**_padded(winners, pad_token_id), "row": batch["row"]}
    return batch


def _padded(rows: Sequence[tuple[list[int], list[bool]]], pad_token_id: int) -> dict[str, Tensor]:
    shape = len(rows), max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": torch.full(shape, pad_token_id, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "completion_mask": torch.zeros(shape, dtype=torch.bool),
    }
    for place, (ids, mask) in enumerate(rows):
        batch["input_ids"][place, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][place, : len(ids)] = 1
        batch["completion_mask"][place, : len(ids)] = torch.tensor(mask)
    return batch


def eval_batches(
    rows: Dataset, *, batch_size: int, pad_token_id: int, max_rows: int, seed: int, rank: int = 0, world_size: int = 1
) -> Iterator[dict[str, Any]]:
    """This rank's share of the first max_rows rows of an order that depends on the seed alone.

    Every rank gets as many batches, since sharded models meet in each: one without rows of its own left repeats the
    first batch of all with nothing that counts.
    """
    places = [permute(q, len(rows), derive_seed(seed, "eval")) for q in range(min(max_rows, len(rows)))]
    batches = [places[begin : begin + batch_size] for begin in range(0, len(places), batch_size)]
    for begin in range(0, len(batches), world_size):
        is_own = begin + rank < len(batches)
        own = batches[begin + rank] if is_own else batches[0]
        batch = collate_rows([row_of(rows, place) for place in own], pad_token_id)
        if not is_own:
            batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
        yield batch
