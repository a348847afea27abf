"""Statistical rejection sampling against closed forms, scipy and its two limits; pairs, drops, and what seeds them."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, rankdata

from hf_moe_cpt.data.rejection_sampling import (
    PAIRINGS,
    PreferencePair,
    SelectionRule,
    acceptance_probabilities,
    distinct_places,
    make_pairs,
    percentile_rewards,
    prompt_generator,
    rejection_sample,
    select_pairs,
)


REWARDS = np.array([0.3, 1.0, -0.4])
NUM_SEEDS = 3000
LEAST_P = 1e-3  # seeds are fixed, so a test that passes always passes


OTHER_ORDERS = [one for one in itertools.product([0.3, 1.0, 5.0], [1, 2, 3]) if one != (1.0, 3)]


def _orders(tau: float, num_accepted: int, rewards: np.ndarray = REWARDS) -> Counter:
    """How often each order of acceptance came, over many prompts of one seed."""
    return Counter(
        tuple(rejection_sample(rewards, num_accepted, tau, prompt_generator(0, index))) for index in range(NUM_SEEDS)
    )


def _chance(order: tuple[int, ...], weights: np.ndarray) -> float:
    """Closed form: drawn one after the other, each in proportion to its weight among those left."""
    chance, left = 1.0, list(range(len(weights)))
    for place in order:
        chance *= weights[place] / weights[left].sum()
        left.remove(place)
    return chance


@pytest.mark.parametrize(
    "tau, num_accepted", [(1.0, 3), *(pytest.param(*one, marks=pytest.mark.slow) for one in OTHER_ORDERS)]
)
def test_orders_of_acceptance_follow_the_closed_form(tau, num_accepted):
    counts = _orders(tau, num_accepted)
    weights = np.exp(REWARDS / tau)
    orders = list(itertools.permutations(range(3), num_accepted))
    expected = [NUM_SEEDS * _chance(order, weights) for order in orders]
    assert sum(expected) == pytest.approx(NUM_SEEDS)
    assert chisquare([counts[order] for order in orders], expected).pvalue > LEAST_P


def test_small_tau_is_best_of_n_in_order():
    for tau in (1e-3, 1e-300, 5e-324):
        assert {tuple(rejection_sample(REWARDS, 3, tau, prompt_generator(0, i))) for i in range(200)} == {(1, 0, 2)}


@pytest.mark.parametrize(
    "tau, rewards", [(math.inf, REWARDS), (1e-6, np.full(3, 2.5)), pytest.param(1e9, REWARDS, marks=pytest.mark.slow)]
)
def test_large_tau_and_equal_rewards_take_any(tau, rewards):
    counts = _orders(tau, 2, rewards)
    assert len(counts) == 6
    assert chisquare(list(counts.values())).pvalue > LEAST_P


def test_acceptance_probabilities_are_the_share_of_accepted_first_draws():
    chances = acceptance_probabilities(REWARDS, 0.7)
    assert chances == pytest.approx([math.exp(-0.7 / 0.7), 1.0, math.exp(-1.4 / 0.7)])
    assert acceptance_probabilities(REWARDS, math.inf) == pytest.approx(np.ones(3))


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=12))
@settings(max_examples=25, deadline=None)
def test_percentiles_are_scipys_ranks_and_do_not_see_the_scale(rewards):
    expected = (rankdata(rewards) - 1) / (len(rewards) - 1)
    assert percentile_rewards(rewards) == pytest.approx(expected)
    assert np.array_equal(percentile_rewards(rewards), percentile_rewards(np.exp(rewards) * 1e6))
    assert percentile_rewards([3.0]) == 0.5


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.floats(0.01, 100), st.integers(0, 2**31), st.data())
@settings(max_examples=25, deadline=None)
def test_any_number_is_accepted_once_each(rewards, tau, index, data):
    count = data.draw(st.integers(1, len(rewards)))
    accepted = rejection_sample(rewards, count, tau, prompt_generator(3, index))
    assert len(accepted) == count == len(set(accepted)) and set(accepted) <= set(range(len(rewards)))
    assert accepted == rejection_sample(rewards, count, tau, prompt_generator(3, index))


SCORES = np.array([5.0, 1.0, 4.0, 2.0, 3.0, 0.0, 9.0])  # the last two are never accepted here
ACCEPTED = [3, 0, 1, 4, 2]


@pytest.mark.parametrize("how, count", [("first_round", lambda k: k // 2), ("tournament", lambda k: k - 1)])
@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_numbers_of_pairs_and_who_wins(how, count, k):
    for index in range(20):
        pairs = make_pairs(ACCEPTED[:k], SCORES, how, generator=prompt_generator(0, index))
        assert len(pairs) == count(k) == len(set(pairs))
        assert all(SCORES[pair.chosen] > SCORES[pair.rejected] for pair in pairs)
        assert {place for pair in pairs for place in pair} <= set(ACCEPTED[:k])


def test_a_tournament_ends_with_the_best_and_everyone_else_loses_once():
    for index in range(50):
        pairs = make_pairs(ACCEPTED, SCORES, "tournament", generator=prompt_generator(1, index))
        assert pairs[-1].chosen == 0
        assert sorted(pair.rejected for pair in pairs) == sorted(set(ACCEPTED) - {0})


def test_first_round_partners_are_drawn_evenly():
    met = Counter()
    for index in range(3000):
        (pair,) = make_pairs([0, 1, 2], SCORES, "first_round", generator=prompt_generator(2, index))
        met[frozenset(pair)] += 1
    assert len(met) == 3 and chisquare(list(met.values())).pvalue > LEAST_P


def test_a_margin_leaves_pairs_out_and_a_tournament_goes_on():
    assert make_pairs(ACCEPTED, SCORES, min_margin=4.0) == [(0, 1)]  # the best and the worst accepted
    assert make_pairs([2, 3], SCORES) == [(2, 3)]
    assert make_pairs(ACCEPTED, SCORES, min_margin=4.1) == []
    for index in range(20):
        every = make_pairs(ACCEPTED, SCORES, "tournament", generator=prompt_generator(0, index))
        wide = make_pairs(ACCEPTED, SCORES, "tournament", 2.0, prompt_generator(0, index))
        assert wide == [pair for pair in every if SCORES[pair.chosen] - SCORES[pair.rejected] >= 2.0]


@pytest.mark.parametrize("how", PAIRINGS)
def test_equal_rewards_make_no_pair(how):
    assert make_pairs([0, 1, 2, 3], np.ones(4), how, generator=prompt_generator(0, 0)) == []


def test_identical_and_empty_texts_are_dropped():
    assert distinct_places(["a", " a\n", "", "b", "  ", "a", "c"]) == [0, 3, 6]


def test_selection_is_made_of_its_pieces():
    texts = ["x", "same", "same", "", "y", "z"]
    scores = [0.0, 3.0, -9.0, 50.0, 1.0, 2.0]
    rule = SelectionRule(rewards="percentile", tau=0.4, num_accepted=3, pairs="tournament", seed=7)
    got = select_pairs(texts, scores, 11, rule)
    kept = [0, 1, 4, 5]
    generator = prompt_generator(7, 11)
    ranks = [0.0, 1.0, 1 / 3, 2 / 3]
    accepted = rejection_sample(ranks, 3, 0.4, generator)
    pairs = make_pairs(accepted, [scores[place] for place in kept], "tournament", generator=generator)
    assert got.distinct == kept and got.accepted == [kept[place] for place in accepted]
    assert got.pairs == [PreferencePair(kept[a], kept[b]) for a, b in pairs]
    assert got.acceptance == pytest.approx(np.exp((np.array(ranks) - 1) / 0.4).mean())


def test_raw_rewards_keep_their_scale():
    texts, rule = ["a", "b", "c"], {"tau": 1.0, "num_accepted": 2, "pairs": "max_min"}
    scores = [0.0, 100.0, 200.0]
    for index in range(50):  # a gap of 100 tau is never bridged, a rank of 1/2 is
        assert select_pairs(texts, scores, index, SelectionRule(rewards="raw", **rule)).accepted == [2, 1]
    ranked = {tuple(select_pairs(texts, scores, index, SelectionRule(**rule)).accepted) for index in range(50)}
    assert len(ranked) > 3


def test_all_are_accepted_where_fewer_are_left_than_asked_for():
    got = select_pairs(["a", "b", "a", ""], [1.0, 2.0, 3.0, 4.0], 0, SelectionRule(num_accepted=4))
    assert sorted(got.accepted) == [0, 1] and got.pairs == [(1, 0)]


@pytest.mark.parametrize("texts", [[], ["a"], ["a", "a "], ["", ""]])
def test_prompts_with_one_distinct_response_make_no_pair(texts):
    got = select_pairs(texts, [1.0] * len(texts), 0, SelectionRule())
    assert got.pairs == got.accepted == [] and got.acceptance is None


def test_choices_depend_on_seed_and_prompt_index_only():
    texts, scores = [str(i) for i in range(10)], list(range(10))

    def accepted(seed: int, index: int) -> tuple[int, ...]:
        return tuple(select_pairs(texts, scores, index, SelectionRule(tau=3.0, num_accepted=5, seed=seed)).accepted)

    forwards = {index: accepted(0, index) for index in range(40)}
    backwards = {index: accepted(0, index) for index in reversed(range(40))}
    assert forwards == backwards
    assert len(set(forwards.values())) > 30 and len({accepted(seed, 0) for seed in range(40)}) > 30


REFUSED = {
    "tau 0": (lambda: rejection_sample([1, 2], 1, 0.0, prompt_generator(0, 0)), r"tau=0.0 must be above 0"),
    "tau nan": (lambda: acceptance_probabilities([1.0], math.nan), r"tau=nan must be above 0"),
    "too many": (lambda: rejection_sample([1, 2], 3, 1.0, prompt_generator(0, 0)), r"num_accepted=3 of 2 response"),
    "none": (lambda: rejection_sample([1, 2], 0, 1.0, prompt_generator(0, 0)), r"num_accepted=0 of 2 response"),
    "nan reward": (lambda: percentile_rewards([0.0, math.nan]), r"reward 1 is nan"),
    "no reward": (lambda: percentile_rewards([]), r"rewards have shape \(0,\)"),
    "matrix": (lambda: percentile_rewards(np.ones((2, 2))), r"rewards have shape \(2, 2\)"),
    "pairing": (lambda: make_pairs([0, 1], [1, 2], "best"), r"how='best' is no way to make pairs: choose from max"),
    "one accepted": (lambda: make_pairs([0], [1, 2]), r"1 accepted response\(s\) make no pair"),
    "no generator": (lambda: make_pairs([0, 1], [1, 2], "tournament"), r"pass a generator"),
    "margin": (lambda: make_pairs([0, 1], [1, 2], min_margin=-1), r"min_margin=-1 must be at least 0"),
    "lengths": (lambda: select_pairs(["a", "b"], [1.0], 4, SelectionRule()), r"prompt 4 has 2 responses and 1 scores"),
    "rule rewards": (lambda: SelectionRule(rewards="rank"), r"rewards='rank' is unknown: choose from raw, percentile"),
    "rule pairs": (lambda: SelectionRule(pairs="all"), r"pairs='all' is unknown: choose from max_min, first_round"),
    "rule count": (lambda: SelectionRule(num_accepted=1), r"num_accepted=1 makes no pair"),
    "rule tau": (lambda: SelectionRule(tau=-1), r"tau=-1 must be above 0"),
    "rule margin": (lambda: SelectionRule(min_margin=math.nan), r"min_margin=nan must be at least 0"),
}


@pytest.mark.parametrize("call, message", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_with_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
