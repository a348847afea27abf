"""Vocabulary specialisation against dictionaries in a double loop: both averages, own and other favourites."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_moe_cpt.analysis.vocabulary import (
    VocabularyCounter,
    favourite_experts,
    specialized_tokens,
    vocabulary_specialization,
    vocabulary_specialization_from_counts,
)
from tests.helpers.routings import random_routing, routings


V = 6


def counted_by_hand(ids: list[int], index: torch.Tensor) -> tuple[Counter, Counter]:
    visits, occurrences = Counter(), Counter()
    for token, row in zip(ids, index.tolist(), strict=True):
        if token >= 0:
            occurrences[token] += 1
            visits.update((token, expert) for expert in row)
    return visits, occurrences


def by_hand(ids, index, num_experts, average, reference=None, least=1):
    visits, occurrences = counted_by_hand(ids, index)
    known = counted_by_hand(ids, index if reference is None else reference)[0]
    shares, loyal, total = [], 0, 0
    for token, occ in occurrences.items():
        if occ >= least:
            favourite = max(range(num_experts), key=lambda e, token=token: (known[token, e], -e))
            shares.append(visits[token, favourite] / occ)
            loyal, total = loyal + visits[token, favourite], total + occ
    if not shares:
        return math.nan
    return sum(shares) / len(shares) if average == "ids" else loyal / total


@given(routings(), st.integers(0, 99), st.sampled_from(["ids", "occurrences"]), st.integers(1, 4))
def test_equals_counting_by_hand(routing, seed, average, least):
    index, num_experts = routing
    ids = torch.randint(-1, V, (len(index),), generator=torch.Generator().manual_seed(seed))
    got = vocabulary_specialization(ids, index, V, num_experts, average=average, min_occurrences=least)
    want = by_hand(ids.tolist(), index, num_experts, average, least=least)
    assert got == pytest.approx(want, rel=1e-12, nan_ok=True)
    if not math.isnan(got):
        assert index.shape[1] / num_experts - 1e-12 <= got <= 1


@given(routings(), st.integers(0, 99), st.sampled_from(["ids", "occurrences"]), st.integers(0, 40))
def test_favourites_of_another_checkpoint_and_splits(routing, seed, average, cut):
    index, num_experts = routing
    ids = torch.randint(0, V, (len(index),), generator=torch.Generator().manual_seed(seed))
    reference = random_routing(len(index), num_experts, index.shape[1], seed + 5000)
    start, counter = VocabularyCounter(V, num_experts), VocabularyCounter(V, num_experts)
    start.add(ids, reference)
    counter.add(ids[:cut].int(), index[:cut].to(torch.uint8))
    counter.add(ids[cut:], index[cut:])
    assert int(counter.occurrences.sum()) == len(index)
    got = vocabulary_specialization_from_counts(
        counter.counts, counter.occurrences, favourite=favourite_experts(start.counts), average=average
    )
    assert got == pytest.approx(by_hand(ids.tolist(), index, num_experts, average, reference), rel=1e-12)


def test_the_two_averages_differ_as_they_should():
    """Id 0 nine times always to expert 0, id 1 twice to experts 1 and 2."""
    ids = torch.tensor([0] * 9 + [1, 1])
    index = torch.tensor([[0]] * 9 + [[1], [2]])
    assert vocabulary_specialization(ids, index, 2, 3, average="ids") == pytest.approx((1 + 0.5) / 2)
    assert vocabulary_specialization(ids, index, 2, 3, average="occurrences") == pytest.approx(10 / 11)
    assert vocabulary_specialization(ids, index, 2, 3, average="ids", min_occurrences=3) == 1.0


def test_favourites_are_the_lowest_of_equals_and_none_for_unseen_ids():
    counts = torch.tensor([[0, 2, 2], [0, 0, 0], [5, 1, 0]], dtype=torch.int32)
    assert favourite_experts(counts).tolist() == [1, -1, 0]


def test_specialised_tokens_are_sorted_by_share_then_occurrences():
    counter = VocabularyCounter(4, 2)
    ids = torch.tensor([0] * 4 + [1] * 8 + [2] * 10 + [3])
    index = torch.tensor([[0]] * 4 + [[0]] * 8 + [[0]] * 5 + [[1]] * 5 + [[1]])
    counter.add(ids, index)
    got = specialized_tokens(counter.counts, counter.occurrences, num_tokens=5, min_occurrences=2)
    assert got == [[(1, 1.0, 8), (0, 1.0, 4), (2, 0.5, 10)], [(2, 0.5, 10)]]
    assert specialized_tokens(counter.counts, counter.occurrences, 1, 2)[0] == [(1, 1.0, 8)]
    assert specialized_tokens(counter.counts, counter.occurrences, 3, 99) == [[], []]


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"average": "mean"}, "average='mean' is unknown: choose from occurrences, ids"),
        ({"min_occurrences": 0}, "min_occurrences=0 must be at least 1"),
        ({"token_ids": torch.tensor([0, 9])}, "token_ids holds 9, outside the vocabulary of 6"),
        ({"token_ids": torch.tensor([0])}, r"token_ids must be \(2,\) like the tokens, got \(1,\)"),
        ({"favourite": torch.zeros(3)}, "both checkpoints must share a tokenizer"),
        ({"vocab_size": 1 << 30}, "passes 2\\^31 cells"),
    ],
)
def test_refusals(changes, text):
    settings = {"token_ids": torch.tensor([0, 1]), "top_k_index": torch.tensor([[0], [1]]), "vocab_size": 6} | changes
    with pytest.raises(ValueError, match=text):
        vocabulary_specialization(num_experts=2, **settings)
