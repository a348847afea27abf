"""Cut texts into batches and shards in an order that depends on the text alone: not on ranks, not on a kill.

A row is a mapping with input_ids, or with text if there is a tokenizer; a row that is a batch already, input_ids and
attention_mask (B, S), is taken apart. Sequences longer than the limit are cut; nothing is dropped or shuffled.

Letters: B sequences, S tokens of the longest of them. Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ShardOfText:
    """Sequences of one domain that go into one file."""

    number: int
    domain: str
    sequences: list[np.ndarray]  # each (T,) int32, T >= 1

    def token_ids(self) -> np.ndarray:
        """(T,) int32, in order."""
        return np.concatenate(self.sequences)

    def next_token_ids(self) -> np.ndarray:
        """(T,) int32, the token that follows in the same sequence, -1 after its last."""
        end = np.array([-1], np.int32)
        return np.concatenate([np.concatenate([sequence[1:], end]) for sequence in self.sequences])

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """input_ids and attention_mask (B, S) int64, padded on the right with 0."""
        for begin in range(0, len(self.sequences), batch_size):
            rows = self.sequences[begin : begin + batch_size]
            ids = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(rows):
                ids[place, : len(row)], mask[place, : len(row)] = torch.from_numpy(row), 1
            yield ids, mask


@dataclass(frozen=True)
class CutSettings:
    """How texts become shards."""

    max_length: int
    tokens_per_domain: int | None
    tokens_per_shard: int
    vocab_size: int

    def __post_init__(self) -> None:
        for name in ("max_length", "tokens_per_domain", "tokens_per_shard"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")


def shards_of_text(
    data: Mapping[str, Iterable[Any]], tokenizer: Callable[..., Any] | None, settings: CutSettings
) -> Iterator[ShardOfText]:
    """All shards in order. ValueError for a domain without tokens, rows without ids and ids outside the vocabulary."""
    number = 0
    for domain, rows in data.items():
        first, sequences, num_tokens = number, [], 0
        for sequence in _first_tokens(_pieces(domain, rows, tokenizer, settings), settings.tokens_per_domain):
            sequences.append(sequence)
            num_tokens += len(sequence)
            if num_tokens >= settings.tokens_per_shard:
                yield ShardOfText(number, domain, sequences)
                number, sequences, num_tokens = number + 1, [], 0
        if sequences:
            yield ShardOfText(number, domain, sequences)
            number += 1
        if number == first:
            raise ValueError(f"The domain {domain!r} holds no tokens: give it text, or leave it out.")


def _first_tokens(pieces: Iterator[np.ndarray], limit: int | None) -> Iterator[np.ndarray]:
    """The pieces up to so many tokens, the last one cut; None for all."""
    for piece in pieces:
        if limit is None:
            yield piece
            continue
        yield piece[:limit]
        limit -= len(piece)
        if limit <= 0:
            return


def _pieces(
    domain: str, rows: Iterable[Any], tokenizer: Callable[..., Any] | None, settings: CutSettings
) -> Iterator[np.ndarray]:
    """Sequences of 1 to max_length tokens."""
    for place, row in enumerate(rows):
        for sequence in _sequences_of_row(domain, place, row, tokenizer):
            if len(sequence) and not 0 <= sequence.min() <= sequence.max() < settings.vocab_size:
                wrong = sequence.min() if sequence.min() < 0 else sequence.max()
                raise ValueError(
                    f"Row {place} of {domain!r} holds token id {wrong}, outside [0, {settings.vocab_size}): tokenizer "
                    "and model disagree."
                )
            for begin in range(0, len(sequence), settings.max_length):
                yield sequence[begin : begin + settings.max_length].astype(np.int32)


def _sequences_of_row(domain: str, place: int, row: Any, tokenizer: Callable[..., Any] | None) -> Iterator[np.ndarray]:
    if isinstance(row, Mapping) and "input_ids" in row:
        ids, mask = np.asarray(row["input_ids"]), row.get("attention_mask")
    elif isinstance(row, Mapping) and "text" in row and tokenizer is not None:
        # a text longer than the model's context is cut afterwards, so its length is no warning
        quiet = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}
        ids, mask = np.asarray(tokenizer(row["text"], add_special_tokens=False, **quiet)["input_ids"]), None
    else:
        has = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(
            f"Row {place} of {domain!r} has {has}: it needs input_ids, or text together with tokenizer=..."
        )
    if ids.size == 0:
        return
    if ids.dtype.kind not in "iu" or ids.ndim > 2:
        raise ValueError(
            f"Row {place} of {domain!r} holds input_ids of type {ids.dtype} and shape {ids.shape}: give the integers "
            "of one sequence, or of a padded batch with attention_mask."
        )
    if mask is None:
        yield from np.atleast_2d(ids)
        return
    keep = np.atleast_2d(np.asarray(mask)).astype(bool)
    if keep.shape != np.atleast_2d(ids).shape:
        raise ValueError(f"Row {place} of {domain!r} has an attention_mask {keep.shape} for input_ids {ids.shape}.")
    yield from (sequence[kept] for sequence, kept in zip(np.atleast_2d(ids), keep, strict=True))
