"""Stack blocks of equal length into a batch. Source: ours."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def stack_blocks(items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack each key of the items along a new first dimension: tensors (L,) give (items, L), integers int64 (items,).

    Every item must have the same keys, and tensors of one key the same length: blocks are packed, nothing is padded.
    """
    batch: dict[str, torch.Tensor] = {}
    for item in items:
        if item.keys() != items[0].keys():
            odd = ", ".join(map(repr, sorted(item.keys() ^ items[0].keys())))
            raise ValueError(f"only some blocks of the batch have {odd}: pack new and replay data in the same way.")
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
