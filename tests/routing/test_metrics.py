"""Routing metrics against counting by hand in loops and sets, numpy, scipy, closed forms, and what they refuse."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy, variation

from hf_moe_cpt.routing import metrics
from tests.helpers.routings import random_routing, routings


def pairs_by_hand(index: torch.Tensor, num_experts: int) -> list[list[float]]:
    tokens = [set(row) for row in index.tolist()]
    rows = []
    for i in range(num_experts):
        mine = [token for token in tokens if i in token]
        rows.append([sum(j in token for token in mine) / len(mine) if mine else 0.0 for j in range(num_experts)])
    return rows


@given(routings(least_k=2), st.integers(0, 40))
def test_coactivation_is_that_of_all_pairs_whatever_their_order_and_split(routing, cut):
    index, num_experts = routing
    got = metrics.expert_coactivation(index, num_experts)
    assert torch.equal(got, torch.tensor(pairs_by_hand(index, num_experts), dtype=torch.float64))
    assert torch.equal(metrics.expert_coactivation(index[torch.randperm(len(index))].flip(1), num_experts), got)
    counter = metrics.CoactivationCounter(num_experts)
    counter.add(index[:cut].to(torch.uint8))
    counter.add(index[cut:].to(torch.int16))
    assert torch.equal(counter.conditional(), got)
    names = torch.randperm(num_experts)
    renamed = metrics.expert_coactivation(names[index], num_experts)
    assert torch.equal(renamed[names][:, names], got)


def test_pairs_of_many_experts_and_their_change():
    index = random_routing(200, 300, 4)
    assert torch.equal(
        metrics.expert_coactivation(index, 300), torch.tensor(pairs_by_hand(index, 300), dtype=torch.float64)
    )
    before, after = (metrics.expert_coactivation(random_routing(300, 6, 2, seed), 6) for seed in (1, 2))
    pairs = [abs(float(after[i, j] - before[i, j])) for i in range(6) for j in range(6) if i != j]
    assert metrics.coactivation_change(before, after) == pytest.approx(sum(pairs) / 30, rel=1e-12)
    assert metrics.coactivation_change(before, before) == 0.0
    together, apart = metrics.expert_coactivation(torch.tensor([[0, 1], [2, 3]]), 4), torch.eye(4, dtype=torch.float64)
    assert metrics.coactivation_change(together, apart) == pytest.approx(4 / 12)


def test_placement_by_hand():
    assert metrics.contiguous_placement(8, 4) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(metrics.contiguous_placement(31, 8).count(rank) for rank in range(8)) == [3] + [4] * 7
    got = metrics.estimate_placement([0.5, 0.1, 0.2, 0.2], [0, 0, 1, 1], 2)
    assert got.max_load == pytest.approx(0.6) and got.slowdown == pytest.approx(1.2)
    better = metrics.estimate_placement([0.5, 0.1, 0.2, 0.2], metrics.suggested_placement([0.5, 0.1, 0.2, 0.2], 2), 2)
    assert better.slowdown == pytest.approx(1.2)  # two experts a rank: 0.5 and 0.1 is the best there is
    assert metrics.suggested_placement([9, 8, 1, 2], 2) == [0, 1, 0, 1]
    assert metrics.estimate_placement([5, 5, 5, 5], [0, 1, 2, 3], 4).slowdown == 1.0


@given(st.lists(st.integers(0, 99), min_size=1, max_size=24), st.data())
def test_suggestion_is_legal_and_never_worse_than_contiguous(load, data):
    num_ranks = data.draw(st.integers(1, len(load)))
    placement = metrics.suggested_placement(load, num_ranks)
    assert set(placement) <= set(range(num_ranks))
    assert max(placement.count(rank) for rank in range(num_ranks)) <= -(-len(load) // num_ranks)
    suggested = max(metrics.rank_loads(load, placement, num_ranks))
    assert suggested <= max(metrics.rank_loads(load, metrics.contiguous_placement(len(load), num_ranks), num_ranks))
    if sum(load):
        found = metrics.estimate_placement(load, placement, num_ranks)
        assert 1 - 1e-9 <= found.slowdown <= num_ranks + 1e-9
        assert found.max_load * num_ranks == pytest.approx(found.slowdown)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=6))
def test_suggestion_is_within_grahams_bound_of_the_best(load):
    """Longest first is at most 4/3 of the best without the limit of experts a rank; with it 2 is what we ask."""
    best = min(
        max(metrics.rank_loads(load, placement, 2)) for placement in itertools.product((0, 1), repeat=len(load))
    )
    assert max(metrics.rank_loads(load, metrics.suggested_placement(load, 2), 2)) <= 2 * best


def test_curves_have_their_mean_their_recovery_and_a_summary_around_the_shift():
    steps = list(range(0, 200, 10))
    layer = [0.2] * 10 + [0.6, 0.4] + [0.2] * 8
    curve = metrics.imbalance_curve("run", steps, [layer, [0.2] * 20], ideal=0.1, shift_step=100)
    assert curve["mean"] == pytest.approx([(a + 0.2) / 2 for a in layer])
    # smoothed over 5 points, the last loud one is gone 6 points after the shift
    assert curve["recovery_step"] == 60 and curve["ideal"] == 0.1 and curve["layers"][1] == [0.2] * 20
    layers = [[0.2, 0.3, 0.2]]
    assert metrics.imbalance_curve("run", [1, 2, 3], layers, ideal=0.1)["recovery_step"] is None
    assert metrics.imbalance_curve("run", [1, 2, 3], layers, ideal=0.1, shift_step=1)["recovery_step"] is None
    assert (
        metrics.imbalance_curve("run", [1, 2, 3], [[0.2, 0.9, 0.9]], ideal=0.1, shift_step=2)["recovery_step"] is None
    )
    mri = [0.1, 0.9, 0.3, math.nan, 0.2, 0.2]
    assert metrics.recovery_step(mri, 1, [0.1, 0.3, 0.3, 0.3, 0.25, 0.2]) == 3
    assert metrics.recovery_step([*mri, math.nan], 1, 0.9) is None
    before = [0.9] * 10 + [0.1] * 20
    after = [0.5, 0.3, 0.2] + [0.104] * 40
    got = metrics.imbalance_around_shift(before, after, smooth=1)
    assert (got.before, got.peak, got.after) == pytest.approx((0.1, 0.5, 0.104))
    assert got.recovery_step == 3
    smoothed = metrics.imbalance_around_shift(before, after, smooth=4)
    assert smoothed.peak == 0.5 and smoothed.recovery_step == 6  # 3 + the memory of a mean over 4 points
    assert metrics.imbalance_around_shift(before, [0.5] * 9).recovery_step is None


@given(routings())
def test_cv_equals_scipy_and_lies_in_its_range(routing):
    index, num_experts = routing
    load = metrics.expert_load(index, num_experts)
    assert float(metrics.load_cv(load)) == pytest.approx(variation(load.numpy()), rel=1e-12)
    assert 0 <= float(metrics.load_cv(load)) <= math.sqrt(num_experts / index.shape[1] - 1) + 1e-12
    assert float(metrics.load_cv(load[torch.randperm(num_experts)])) == pytest.approx(
        float(metrics.load_cv(load)), rel=1e-12
    )


@given(st.integers(1, 9), st.integers(2, 9), st.integers(0, 99))
def test_entropy_and_confidence_equal_scipy(tokens, num_experts, seed):
    logits = torch.randn(tokens, num_experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 5
    probs = metrics.router_distribution(logits)
    want = [entropy(row) / math.log(num_experts) for row in np.exp(logits.numpy())]  # scipy makes them sum to 1
    assert metrics.router_entropy(probs).tolist() == pytest.approx(want, rel=1e-9)
    chosen = probs.topk(min(2, num_experts)).values
    assert torch.equal(metrics.router_confidence(chosen), metrics.router_confidence(probs))
    assert (metrics.router_confidence(probs) >= 1 / num_experts - 1e-12).all()


def test_certain_and_undecided_routers_and_recorded_probabilities():
    probs = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    assert metrics.router_entropy(probs).tolist() == [0.0, 1.0]
    assert metrics.router_confidence(probs).tolist() == [1.0, 0.25]
    assert metrics.router_entropy(torch.ones(3, 1)).tolist() == [0.0, 0.0, 0.0]
    probs = torch.softmax(torch.randn(6, 5), -1)
    assert torch.equal(metrics.router_distribution(probs), probs)
    assert torch.equal(metrics.router_distribution(probs.bfloat16()), probs.bfloat16().float())
    positive = torch.rand(6, 5) + 1  # not negative, but no distribution either
    torch.testing.assert_close(metrics.router_distribution(positive), positive.softmax(-1))


def test_domain_specialization_equals_counting():
    routings_of = [random_routing(20, 6, 2, seed=1), random_routing(7, 6, 2, seed=2)]
    load = torch.stack([metrics.expert_load(index, 6) for index in routings_of])
    got = metrics.domain_specialization(load, torch.tensor([20, 7]))
    for row, index in zip(got.tolist(), routings_of, strict=True):
        want = [sum(expert in token for token in index.tolist()) / len(index) for expert in range(6)]
        assert row == pytest.approx(want) and sum(row) == pytest.approx(2)


@given(routings(), st.integers(0, 99))
def test_load_and_mri_equal_counting_by_hand(routing, seed):
    index, num_experts = routing
    mask = torch.rand(len(index), generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[0] = True
    kept = [row for row, keep in zip(index.tolist(), mask.tolist(), strict=True) if keep]
    counts = [sum(expert in row for row in kept) for expert in range(num_experts)]
    assert metrics.expert_load(index, num_experts, mask).tolist() == counts
    assert float(metrics.max_routing_imbalance(index, num_experts, mask)) == pytest.approx(
        max(counts) / len(kept), rel=1e-12
    )


def test_perfect_worst_and_dead_loads():
    granular = torch.stack([torch.arange(31).roll(-i) for i in range(31)])[:, :3]
    assert float(metrics.max_routing_imbalance(granular, 31)) == pytest.approx(3 / 31)
    assert float(metrics.normalized_imbalance(metrics.max_routing_imbalance(granular, 31), 31, 3)) == pytest.approx(
        1.0
    )
    collapsed = torch.zeros(50, 1, dtype=torch.int32)
    assert float(metrics.max_routing_imbalance(collapsed, 8)) == 1.0
    assert metrics.normalized_imbalance(1.0, 8, 1) == 8.0
    load = torch.tensor([[3, 1, 4, 1], [1, 0, 0, 0], [7, 7, 7, 7]])
    want = [entropy(row) / math.log(4) for row in load.numpy()]
    assert metrics.load_entropy(load).tolist() == pytest.approx(want, rel=1e-12)
    assert metrics.load_entropy(torch.tensor([6])).item() == 1.0
    loads = torch.tensor([[0, 5, 0, 5], [1, 99, 100, 200], [3, 3, 3, 3]])
    assert metrics.dead_experts(loads).tolist() == [2, 0, 0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0, 1), st.data())
def test_recovery_step_is_the_first_quiet_tail(mri, level, data):
    shift = data.draw(st.integers(0, len(mri) - 1))
    tails = [i - shift for i in range(shift, len(mri)) if all(value <= level for value in mri[i:])]
    assert metrics.recovery_step(mri, shift, level) == (tails[0] if tails else None)


@given(routings(), st.integers(0, 99), st.integers(0, 40))
def test_saturation_is_that_of_sets_whatever_their_names_order_and_split(routing, seed, cut):
    before, num_experts = routing
    after = random_routing(len(before), num_experts, before.shape[1], seed + 1000)
    want = sum(
        len(set(old) & set(new)) / len(old) for old, new in zip(before.tolist(), after.tolist(), strict=True)
    ) / len(before)
    assert metrics.router_saturation(before, after) == pytest.approx(want, rel=1e-12)
    names = torch.randperm(num_experts)
    assert metrics.router_saturation(names[before], names[after].flip(1)) == metrics.router_saturation(before, after)
    counter = metrics.SaturationCounter(before.shape[1])
    counter.add(before[:cut].to(torch.uint8), after[:cut].to(torch.uint8))
    counter.add(before[cut:].short(), after[cut:].short())
    assert counter.saturation() == metrics.router_saturation(before, after)


def test_ends_of_saturation_its_random_floor_and_padding():
    index = random_routing(20_000, 16, 4, seed=1)
    assert metrics.router_saturation(index, index) == 1.0
    assert metrics.router_saturation(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1, dtype=torch.int64)) == 0.0
    assert metrics.router_saturation(index, random_routing(20_000, 16, 4, seed=2)) == pytest.approx(4 / 16, abs=0.01)
    assert math.isnan(metrics.SaturationCounter(4).saturation())
    before, after = random_routing(10, 6, 2, seed=1), random_routing(10, 6, 2, seed=2)
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1, 0])
    kept = mask.bool()
    assert metrics.router_saturation(before, after, mask) == metrics.router_saturation(before[kept], after[kept])


V = 6


def counted_by_hand(ids: list[int], index: torch.Tensor) -> tuple[Counter, Counter]:
    visits, occurrences = Counter(), Counter()
    for token, row in zip(ids, index.tolist(), strict=True):
        if token >= 0:
            occurrences[token] += 1
            visits.update((token, expert) for expert in row)
    return visits, occurrences


def vocabulary_by_hand(ids, index, num_experts, average, reference=None, least=1):
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
def test_vocabulary_is_that_of_counting(routing, seed, average, least):
    index, num_experts = routing
    ids = torch.randint(-1, V, (len(index),), generator=torch.Generator().manual_seed(seed))
    got = metrics.vocabulary_specialization(ids, index, V, num_experts, average=average, min_occurrences=least)
    want = vocabulary_by_hand(ids.tolist(), index, num_experts, average, least=least)
    assert got == pytest.approx(want, rel=1e-12, nan_ok=True)
    if not math.isnan(got):
        assert index.shape[1] / num_experts - 1e-12 <= got <= 1


@given(routings(), st.integers(0, 99), st.sampled_from(["ids", "occurrences"]), st.integers(0, 40))
def test_favourites_of_another_checkpoint_and_splits(routing, seed, average, cut):
    index, num_experts = routing
    ids = torch.randint(0, V, (len(index),), generator=torch.Generator().manual_seed(seed))
    reference = random_routing(len(index), num_experts, index.shape[1], seed + 5000)
    start, counter = metrics.VocabularyCounter(V, num_experts), metrics.VocabularyCounter(V, num_experts)
    start.add(ids, reference)
    counter.add(ids[:cut].int(), index[:cut].to(torch.uint8))
    counter.add(ids[cut:], index[cut:])
    assert int(counter.occurrences.sum()) == len(index)
    got = metrics.vocabulary_specialization_from_counts(
        counter.counts, counter.occurrences, favourite=metrics.favourite_experts(start.counts), average=average
    )
    assert got == pytest.approx(vocabulary_by_hand(ids.tolist(), index, num_experts, average, reference), rel=1e-12)


def test_favourites_and_specialised_tokens_are_sorted():
    counts = torch.tensor([[0, 2, 2], [0, 0, 0], [5, 1, 0]], dtype=torch.int32)
    assert metrics.favourite_experts(counts).tolist() == [1, -1, 0]
    counter = metrics.VocabularyCounter(4, 2)
    ids = torch.tensor([0] * 4 + [1] * 8 + [2] * 10 + [3])
    index = torch.tensor([[0]] * 4 + [[0]] * 8 + [[0]] * 5 + [[1]] * 5 + [[1]])
    counter.add(ids, index)
    got = metrics.specialized_tokens(counter.counts, counter.occurrences, num_tokens=5, min_occurrences=2)
    assert got == [[(1, 1.0, 8), (0, 1.0, 4), (2, 0.5, 10)], [(2, 0.5, 10)]]
    assert metrics.specialized_tokens(counter.counts, counter.occurrences, 1, 2)[0] == [(1, 1.0, 8)]
    assert metrics.specialized_tokens(counter.counts, counter.occurrences, 3, 99) == [[], []]


def test_forgetting_is_a_rise_and_adaptation_a_fall():
    outcome = metrics.ContinualOutcome(old_before=2.0, old_after=2.25, new_before=4.0, new_after=3.0)
    assert (outcome.forgetting, outcome.adaptation) == pytest.approx((0.25, 1.0))
    assert (metrics.forgetting(2.0, 2.25), metrics.adaptation(4.0, 3.0)) == pytest.approx((0.25, 1.0))


ONE, TWO = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)


def _vocabulary(**changes):
    settings = {"token_ids": torch.tensor([0, 1]), "top_k_index": torch.tensor([[0], [1]]), "vocab_size": 6}
    return metrics.vocabulary_specialization(num_experts=2, **settings | changes)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: metrics.expert_load(torch.zeros(2, 3, 4, dtype=torch.long), 4), r"must be \(T, K\), got \(2, 3, 4\)"),
        (lambda: metrics.expert_load(torch.zeros(2, 3), 4), r"must hold integers, got torch.float32"),
        (lambda: metrics.expert_load(TWO, 4, torch.ones(3)), r"token_mask must be \(2,\) like the tokens, got \(3,\)"),
        (lambda: metrics.normalized_imbalance(0.5, 4, 5), r"num_experts_per_tok=5"),
        (lambda: metrics.domain_specialization(torch.ones(2, 6), torch.ones(1)), r"they must be \(D, E\) and \(D,\)"),
        (lambda: metrics.recovery_step([0.1], 1, 0.2), r"shift_step=1 is outside the 1 points"),
        (lambda: metrics.recovery_step([0.1], 0, [0.2, 0.3]), r"level has 2 points and mri 1"),
        (lambda: metrics.imbalance_around_shift([], [0.1]), r"mri_before has no points"),
        (lambda: metrics.imbalance_around_shift([0.1], [0.1], smooth=0), r"smooth=0"),
        (
            lambda: metrics.imbalance_curve("run", [1, 2], [[0.1]], ideal=0.1),
            r"run: 2 steps and layers of \[1\] values",
        ),
        (lambda: metrics.imbalance_curve("run", [2, 1], [[0.1, 0.1]], ideal=0.1), "run: steps must rise"),
        (lambda: metrics.router_saturation(ONE, ONE[:1]), r"before is \(2, 1\) and after \(1, 1\)"),
        (lambda: metrics.router_saturation(ONE, TWO), "as many experts each"),
        (lambda: metrics.router_saturation(ONE[:, 0], ONE[:, 0]), r"must be \(T, K\), got \(2,\)"),
        (
            lambda: metrics.router_saturation(ONE, ONE, torch.ones(3)),
            r"token_mask must be \(2,\) like the tokens, got",
        ),
        (
            lambda: metrics.expert_coactivation(ONE, 3),
            "needs at least two experts per token, and K is 1: with a single exp",
        ),
        (
            lambda: metrics.expert_coactivation(torch.tensor([[0, 5]]), 4),
            r"top_k_index holds 5, outside \[0, num_experts=4\)",
        ),
        (lambda: metrics.expert_coactivation(torch.tensor([[0, -1]]), 4), r"top_k_index holds -1, outside"),
        (lambda: metrics.coactivation_change(torch.eye(3), torch.eye(4)), r"both must be \(E, E\) of one layer"),
        (lambda: _vocabulary(average="mean"), "average='mean' is unknown: choose from occurrences, ids"),
        (lambda: _vocabulary(min_occurrences=0), "min_occurrences=0 must be at least 1"),
        (lambda: _vocabulary(token_ids=torch.tensor([0, 9])), "token_ids holds 9, outside the vocabulary of 6"),
        (lambda: _vocabulary(token_ids=torch.tensor([0])), r"token_ids must be \(2,\) like the tokens, got \(1,\)"),
        (lambda: _vocabulary(favourite=torch.zeros(3)), "both checkpoints must share a tokenizer"),
        (lambda: _vocabulary(vocab_size=1 << 30), r"passes 2\^31 cells"),
        (lambda: metrics.contiguous_placement(4, 5), r"num_ranks=5 must lie in \[1, 4\]"),
        (lambda: metrics.suggested_placement([1.0], 0), r"num_ranks=0 must lie in \[1, 1\]"),
        (lambda: metrics.rank_loads([1.0, 2.0], [0], 1), "placement has 1 experts and load 2"),
        (lambda: metrics.rank_loads([1.0], [3], 2), "placement names rank 3"),
        (lambda: metrics.estimate_placement([0.0, 0.0], [0, 1], 2), "load is 0 for every expert"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()
