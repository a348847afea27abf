"""Vocabulary specialisation: how far the token alone, without its context, says which expert it goes to.

    n(v, e)   tokens with id v that visit expert e         occ(v)   tokens with id v
    e*(v)     the expert that v visits most, at a reference checkpoint (its own, or the one before continual training)
    VS = mean over ids v of n(v, e*(v)) / occ(v)                       average = "ids"
       = sum over v of n(v, e*(v)) / sum over v of occ(v)              average = "occurrences"

The id is that of the router's input token, or of the token that follows it in the text ("output"). Letters: T tokens,
K experts per token, E routed experts, V vocabulary. Source: Muennighoff et al. 2024 (OLMoE, arXiv 2409.02060), whose
code averages over ids; with e* of the checkpoint before: Thérien et al. 2025 (arXiv 2503.05029). Which of the two
averages that paper uses is not known.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hf_moe_cpt.analysis.top_k_index import check_same_tokens, check_top_k_index, chunks


Average = Literal["occurrences", "ids"]
AVERAGES = ("occurrences", "ids")
UNSEEN = -1  # favourite of an id that did not occur


class VocabularyCounter:
    """Experts of each token id in a stream; holds `counts` (V, E) int32 and `occurrences` (V,) int64."""

    def __init__(self, vocab_size: int, num_experts: int) -> None:
        if (vocab_size + 1) * num_experts >= 1 << 31:
            raise ValueError(f"A table of {vocab_size} x {num_experts} passes 2^31 cells: count a part of the ids.")
        self._table = torch.zeros(vocab_size + 1, num_experts, dtype=torch.int32)  # row 0 takes tokens without an id
        self.counts = self._table[1:]
        self.occurrences = torch.zeros(vocab_size, dtype=torch.int64)

    def add(self, token_ids: Tensor, top_k_index: Tensor) -> None:
        """token_ids: (T,) integers below V; negative ones do not count, as for a last token, which none follows.

        top_k_index: (T, K) integers in [0, E), the K of a token distinct.
        """
        vocab_size, num_experts = self.counts.shape
        check_top_k_index(top_k_index, num_experts)
        check_same_tokens("token_ids", token_ids, top_k_index)
        if token_ids.numel() and int(token_ids.max()) >= vocab_size:
            raise ValueError(
                f"token_ids holds {int(token_ids.max())}, outside the vocabulary of {vocab_size}: pass the number of "
                "rows of the model's embedding."
            )
        for part in chunks(len(token_ids)):
            rows = token_ids[part].cpu().to(torch.int32).clamp(min=-1) + 1
            first_cell, ones = rows * num_experts, torch.ones_like(rows)
            for expert in top_k_index[part].cpu().T:
                self._table.view(-1).index_add_(0, first_cell + expert, ones)
            self.occurrences += torch.bincount(rows, minlength=vocab_size + 1)[1:]


def favourite_experts(counts: Tensor) -> Tensor:
    """e*(v): (V, E) -> (V,) int64, the expert that each id visits most, the lowest of equals, -1 for unseen ids."""
    most, favourite = counts.max(dim=-1)
    lowest = (counts == most[:, None]).to(torch.uint8).argmax(dim=-1)  # the first 1: max promises no order of equals
    return torch.where(most > 0, lowest, torch.full_like(favourite, UNSEEN))


def vocabulary_specialization(
    token_ids: Tensor,
    top_k_index: Tensor,
    vocab_size: int,
    num_experts: int,
    *,
    favourite: Tensor | None = None,
    average: Average = "occurrences",
    min_occurrences: int = 1,
) -> float:
    """VS of one layer, in [0, 1]; at least K/E with its own favourites; NaN if no id counts.

    token_ids: (T,), negative ones do not count. top_k_index: (T, K) integers in [0, E). favourite: (V,) e*(v) of the
    reference checkpoint from `favourite_experts`, ids with -1 do not count; None takes the data's own.
    min_occurrences: ids that occur less often do not count; rare ids push VS up, since one token always agrees with
    itself.
    """
    counter = VocabularyCounter(vocab_size, num_experts)
    counter.add(token_ids, top_k_index)
    return vocabulary_specialization_from_counts(
        counter.counts, counter.occurrences, favourite=favourite, average=average, min_occurrences=min_occurrences
    )


def vocabulary_specialization_from_counts(
    counts: Tensor,
    occurrences: Tensor,
    *,
    favourite: Tensor | None = None,
    average: Average = "occurrences",
    min_occurrences: int = 1,
) -> float:
    """VS from the tables of `VocabularyCounter`: counts (V, E), occurrences (V,); the rest as above."""
    if average not in AVERAGES:
        raise ValueError(f"average={average!r} is unknown: choose from {', '.join(AVERAGES)}.")
    if min_occurrences < 1:
        raise ValueError(
            f"min_occurrences={min_occurrences} must be at least 1: an id that never occurs has no share."
        )
    favourite = favourite_experts(counts) if favourite is None else favourite
    if favourite.shape != occurrences.shape:
        raise ValueError(
            f"favourite is {tuple(favourite.shape)} and the vocabulary has {len(occurrences)} ids: both checkpoints "
            "must share a tokenizer."
        )
    counted = (favourite >= 0) & (occurrences >= min_occurrences)
    if not bool(counted.any()):
        return float("nan")
    loyal = counts[counted].gather(1, favourite[counted].long()[:, None]).squeeze(1).double()
    total = occurrences[counted].double()
    return float((loyal / total).mean() if average == "ids" else loyal.sum() / total.sum())


def specialized_tokens(
    counts: Tensor, occurrences: Tensor, num_tokens: int, min_occurrences: int = 10
) -> list[list[tuple[int, float, int]]]:
    """The ids that go to each expert most reliably: for each of the E experts at most num_tokens (id, share, occ).

    share: n(v, e) / occ(v) in (0, 1], falling; of equal shares the id that occurs more often comes first. Only ids
    with at least min_occurrences tokens.
    """
    ids = (occurrences >= min_occurrences).nonzero().squeeze(1)
    visits, total = counts[ids].long(), occurrences[ids]
    # one sortable integer: 30 bits of the share above 31 bits of the occurrences
    key = ((visits << 30) // total[:, None].clamp(min=1) << 31) + total[:, None].clamp(max=(1 << 31) - 1)
    best = key.topk(min(num_tokens, len(ids)), dim=0).indices
    found = []
    for expert, rows in enumerate(best.T):
        triples = [(int(ids[row]), int(visits[row, expert]), int(total[row])) for row in rows]
        found.append([(token, times / occ, occ) for token, times, occ in triples if times])
    return found
