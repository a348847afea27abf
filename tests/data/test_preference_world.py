"""The preference world: its truth by hand, its base policy and annotator by statistics, its rows by index alone."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from trl import DPOConfig, DPOTrainer

from hf_moe_cpt.data import preference_world
from hf_moe_cpt.data.preference_world import EOS_ID, PAD_ID, PreferenceWorld, answer_lengths, token_counts
from tests.helpers.tiny_models import tiny_model


WORLD = PreferenceWorld()
PINNED = {"prompt": "<ambiguity_1> ask_09 ask_02 :", "chosen": "word_10 <eos>", "score": 0.036142840034300946}
SMALL = PreferenceWorld(num_requests=8, num_words=3, liked_words=1, disliked_words=1, max_words=2)


def reward(world: PreferenceWorld, prompt, completion) -> float:
    return float(world.rewards(np.reshape(prompt, (1, -1)), np.array([completion], dtype=np.int64))[0])


def reward_by_hand(world: PreferenceWorld, prompt: list[int], completion: list[int]) -> float:
    """The formula of the module's docstring, token by token."""
    finished = EOS_ID in completion
    answer = completion[: completion.index(EOS_ID)] if finished else completion
    total = 0.0
    for token in set(answer):
        if world.vocabulary[token].startswith("word_"):
            for request in prompt[1:-1]:
                total += world.quality[request - world.first_request_id, token - world.first_word_id]
    total -= world.word_cost * len(answer)
    level = world.ambiguity_levels[int(world.vocabulary[prompt[0]].strip("<>").split("_")[1])]
    return (1 - level) * total - (0 if finished else world.unfinished_cost)


@settings(max_examples=25, deadline=None)
@given(completion=st.lists(st.integers(0, len(WORLD.vocabulary) - 1), max_size=20), index=st.integers(0, 999))
def test_reward_of_any_tokens_is_the_formula(completion, index):
    prompt = WORLD.prompts([index])[0].tolist()
    assert reward(WORLD, prompt, completion) == pytest.approx(reward_by_hand(WORLD, prompt, completion), abs=1e-12)


def test_rewards_of_many_rows_are_those_of_each():
    pairs = WORLD.pairs(np.arange(50))
    ends = np.random.default_rng(0).integers(1, pairs.chosen.shape[1], 50)
    cut = [row[:end] for row, end in zip(pairs.chosen, ends, strict=True)]
    alone = [reward(WORLD, prompt, row) for prompt, row in zip(pairs.prompts, pairs.chosen, strict=True)]
    assert WORLD.rewards(pairs.prompts, pairs.chosen).tolist() == alone == pairs.reward_chosen.tolist()
    unfinished = [EOS_ID not in row for row in cut]
    assert any(unfinished) and not all(unfinished)
    for prompt, row in zip(pairs.prompts, cut, strict=True):
        assert reward(WORLD, prompt, row) == pytest.approx(reward_by_hand(WORLD, prompt.tolist(), row.tolist()))


def test_reward_repetition_order_and_what_follows_eos():
    prompt = WORLD.prompts([0])[0]
    good, other = WORLD.first_word_id + np.argsort(WORLD.word_values(prompt[None])[0])[[-1, 0]]
    once = reward(WORLD, prompt, [good, other, EOS_ID])
    assert reward(WORLD, prompt, [other, good, EOS_ID]) == once
    assert reward(WORLD, prompt, [good, other, EOS_ID, good, PAD_ID]) == once
    assert reward(WORLD, prompt, [good, good, other, EOS_ID]) == pytest.approx(
        once - (1 - WORLD.ambiguity(prompt[None])[0]) * WORLD.word_cost
    )
    assert reward(WORLD, prompt, [EOS_ID]) == 0


def test_best_reward_is_that_of_the_best_of_all_answers():
    prompts = SMALL.distinct_prompts("test")
    words = range(SMALL.first_word_id, len(SMALL.vocabulary))
    for prompt, best in zip(prompts, SMALL.best_rewards(prompts), strict=True):
        answers = [[*answer, EOS_ID] for length in range(5) for answer in itertools.product(words, repeat=length)]
        assert max(reward(SMALL, prompt, answer) for answer in answers) == pytest.approx(best, abs=1e-12)


def test_quality_has_so_many_words_of_each_kind_and_size():
    quality = WORLD.quality
    assert ((quality > 0).sum(axis=1) == WORLD.liked_words).all()
    assert ((quality < 0).sum(axis=1) == WORLD.disliked_words).all()
    sizes = np.abs(quality[quality != 0])
    assert sizes.min() >= preference_world.QUALITY_RANGE[0] and sizes.max() <= preference_world.QUALITY_RANGE[1]
    assert not np.array_equal(quality, PreferenceWorld(seed=1).quality)


def test_base_policy_is_a_distribution_and_is_sampled_as_such():
    """All answers of a world with three words and at most two of them: 12, with probabilities that sum to one."""
    words = range(SMALL.first_word_id, len(SMALL.vocabulary))
    answers = [[a, EOS_ID, PAD_ID] for a in words] + [[a, b, EOS_ID] for a in words for b in words]
    prompt = SMALL.distinct_prompts("train")[:1]
    word, stop = SMALL.word_probabilities(prompt)[0], SMALL.stop_probability
    chances = np.concatenate([word * stop, np.outer(word, word).ravel() * (1 - stop)])  # the second word is the last
    assert chances.sum() == pytest.approx(1, abs=1e-12)
    same = np.flatnonzero((SMALL.prompts(np.arange(20_000)) == prompt).all(axis=1))
    drawn = np.concatenate([SMALL.base_completions(same, "train", draw) for draw in range(2)])
    counts = [(drawn == answer).all(axis=1).sum() for answer in answers]
    assert sum(counts) == len(drawn) > 300
    assert stats.chisquare(counts, chances * len(drawn)).pvalue > 1e-3
    tokens = token_counts(WORLD.base_completions(np.arange(5_000)))
    assert abs(tokens.mean() - WORLD.mean_base_tokens) < 4 * tokens.std() / math.sqrt(len(tokens))


def long_and_short(world: PreferenceWorld, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each index, its prompt's best word with two of its worst, and its worst word alone: two tokens apart."""
    values = world.word_values(world.prompts(indices))
    best, worst = (world.first_word_id + order for order in (values.argmax(axis=1), values.argmin(axis=1)))
    ends = np.full(len(indices), EOS_ID)
    return np.stack([best, worst, worst, ends], axis=1), np.stack([worst, ends, ends, ends], axis=1)


ANNOTATORS = [(1.0, 0.0), (0.4, 0.0), (1.0, 0.3)]


@pytest.mark.parametrize("temperature, bias", ANNOTATORS)
def test_labels_follow_bradley_terry_at_every_difference(temperature, bias):
    world, indices = PreferenceWorld(label_temperature=temperature, length_bias=bias), np.arange(4000)
    long, short = long_and_short(world, indices)
    won = (world.pairs(indices, completions=(long, short)).chosen == long).all(axis=1)
    prompts = world.prompts(indices)
    difference = world.rewards(prompts, long) - world.rewards(prompts, short) + 2 * bias
    probability = 1 / (1 + np.exp(-difference / temperature))
    for rows in np.array_split(np.argsort(probability), 6):
        spread = np.sqrt((probability * (1 - probability))[rows].sum())
        assert abs(won[rows].sum() - probability[rows].sum()) < 4 * spread + 1
    assert probability.min() < 0.7 and probability.max() > 0.9


def test_scores_belong_to_their_answers():
    """The chosen one has the higher score; noise and bias are all that is between a score and the truth."""
    world = PreferenceWorld(length_bias=0.2, label_temperature=0.5)
    pairs = world.pairs(np.arange(3000))
    assert (pairs.score_chosen > pairs.score_rejected).all()
    assert np.allclose(pairs.reward_rejected, world.rewards(pairs.prompts, pairs.rejected))
    sides = [[getattr(pairs, f"{kind}_{side}") for kind in ("score", "reward")] for side in ("chosen", "rejected")]
    noise = [
        (score - reward - 0.2 * token_counts(answers)) / 0.5
        for (score, reward), answers in zip(sides, (pairs.chosen, pairs.rejected), strict=True)
    ]
    assert stats.kstest(np.concatenate(noise), stats.gumbel_r(loc=-np.euler_gamma).cdf).pvalue > 1e-3


def test_clean_annotator_never_errs():
    pairs = PreferenceWorld(length_bias=0.5).clean().pairs(np.arange(1000), "test")
    assert (pairs.reward_chosen >= pairs.reward_rejected).all()
    assert np.array_equal(pairs.score_chosen, pairs.reward_chosen)
    noisy = PreferenceWorld(length_bias=0.5).pairs(np.arange(1000), "test")
    assert (noisy.reward_chosen < noisy.reward_rejected).mean() > 0.1


def test_ambiguity_raises_the_entropy_and_makes_labels_coin_flips():
    prompts = WORLD.distinct_prompts("train")
    probabilities, ambiguous = WORLD.word_probabilities(prompts), WORLD.ambiguity(prompts) == 0.9
    entropies = stats.entropy(probabilities, axis=1)
    assert probabilities.sum(axis=1) == pytest.approx(1)
    assert entropies[ambiguous].min() > entropies[~ambiguous].max() + 0.5
    assert entropies[ambiguous].min() > 0.95 * math.log(WORLD.num_words)
    pairs = WORLD.pairs(np.arange(4000))
    right, ambiguous = pairs.reward_chosen > pairs.reward_rejected, WORLD.ambiguity(pairs.prompts) == 0.9
    assert right[~ambiguous].mean() > 0.72 and right[ambiguous].mean() < 0.57
    levels = PreferenceWorld(ambiguity_levels=(0.0, 0.5, 1.0))
    assert set(levels.ambiguity(levels.distinct_prompts("test"))) == {0.0, 0.5, 1.0}
    certain = levels.distinct_prompts("test")[levels.ambiguity(levels.distinct_prompts("test")) == 1.0]
    assert (levels.best_rewards(certain) == 0).all()


def test_rows_depend_on_their_index_alone():
    order = np.random.default_rng(0).permutation(300)
    whole, shuffled = WORLD.pairs(np.arange(300)), WORLD.pairs(order)
    for name, column in whole._asdict().items():
        assert np.array_equal(column[order], getattr(shuffled, name)), name
    one = WORLD.pairs([order[0]])
    assert all(np.array_equal(column[order[:1]], part) for column, part in zip(whole, one, strict=True))
    assert not np.array_equal(whole.chosen, WORLD.pairs(np.arange(300, 600)).chosen)
    pairs = WORLD.pairs([0, 10**9])  # pinned for all platforms
    assert WORLD.text(pairs.prompts[0]) == PINNED["prompt"]
    assert WORLD.text(pairs.chosen[1]) == PINNED["chosen"]
    assert pairs.score_rejected[0] == pytest.approx(PINNED["score"], rel=1e-12)


def test_pairs_have_two_different_answers_that_end():
    world = PreferenceWorld(num_words=4, stop_probability=0.9, max_words=2)
    pairs = world.pairs(np.arange(2000))
    assert (pairs.chosen != pairs.rejected).any(axis=1).all()
    assert all(answer_lengths(side)[1].all() for side in (pairs.chosen, pairs.rejected))


def test_splits_share_no_set_of_requests_and_every_prompt_comes_in_turn():
    sets = {
        split: {frozenset(row) for row in WORLD.distinct_prompts(split)[:, 1:-1].tolist()}
        for split in preference_world.SPLITS
    }
    assert sum(map(len, sets.values())) == len(set().union(*sets.values())) == math.comb(WORLD.num_requests, 2)
    distinct = WORLD.distinct_prompts("test")
    for turn in range(2):
        drawn = WORLD.prompts(np.arange(turn * len(distinct), (turn + 1) * len(distinct)), "test")
        assert sorted(drawn.tolist()) == sorted(distinct.tolist())
        assert drawn.tolist() != distinct.tolist()


def test_text_goes_through_the_tokenizer_unchanged():
    tokenizer, pairs = WORLD.tokenizer(), WORLD.pairs(np.arange(100))
    for row, prompt, chosen in zip(WORLD.dataset(pairs), pairs.prompts, pairs.chosen, strict=True):
        answer = chosen[: token_counts(chosen[None])[0]]
        assert tokenizer(row["prompt"])["input_ids"] == prompt.tolist()
        assert tokenizer(row["prompt"] + row["chosen"])["input_ids"] == [*prompt, *answer]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (EOS_ID, PAD_ID, len(WORLD.vocabulary))


def test_dataset_goes_straight_into_trl(tmp_path):
    pairs = WORLD.pairs(np.arange(8))
    arguments = DPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, bf16=False, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    models = (tiny_model("llama", vocab_size=len(WORLD.vocabulary), eos_token_id=EOS_ID) for _ in range(2))
    data, tokenizer = WORLD.dataset(pairs), WORLD.tokenizer()
    trainer = DPOTrainer(*models, arguments, train_dataset=data, processing_class=tokenizer)
    assert trainer.train_dataset["prompt_ids"][:] == pairs.prompts.tolist()
    for side, answers in (("chosen", pairs.chosen), ("rejected", pairs.rejected)):
        tokens = [row[:count].tolist() for row, count in zip(answers, token_counts(answers), strict=True)]
        assert trainer.train_dataset[f"{side}_ids"][:] == tokens
    assert math.isfinite(trainer.train().training_loss)


REFUSED = {
    "too many words": ({"num_words": 3}, r"liked_words=2 and disliked_words=2 must fit into num_words=3"),
    "no liked word": ({"liked_words": 0}, "with at least one liked word"),
    "more requests than there are": ({"requests_per_prompt": 13}, r"requests_per_prompt=13 must be in \[1, 10\]"),
    "ambiguity": ({"ambiguity_levels": (0.0, 1.5)}, r"ambiguity_levels=\(0.0, 1.5\) must hold .* in \[0, 1\]"),
    "no end": ({"stop_probability": 0.0}, r"stop_probability=0.0 must be in \(0, 1\] .* must come to an end"),
    "temperature": ({"label_temperature": -1.0}, "label_temperature=-1.0 must be a finite number of at least 0"),
    "few prompts": ({"num_requests": 3}, "make 3 sets of requests and 12 prompts: a world needs at least 7 sets"),
    "many prompts": ({"num_requests": 40, "requests_per_prompt": 5}, "prompts: .* at most 1000000 prompts"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_worlds_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        PreferenceWorld(**changes)
    assert "\n" not in str(caught.value)


def test_foreign_prompts_splits_and_indices_are_refused():
    prompt = WORLD.prompts([0])[0]
    with pytest.raises(ValueError, match=r"prompts have the shape \(1, 2\): each is a level, 2 requests and ':'"):
        reward(WORLD, prompt[:2], [EOS_ID])
    with pytest.raises(ValueError, match=r"prompt \[0, .* is none of this world"):
        reward(WORLD, [0, *prompt[1:]], [EOS_ID])
    with pytest.raises(ValueError, match="split 'valid' is unknown: choose one of train, tune, test"):
        WORLD.prompts([0], "valid")
    with pytest.raises(ValueError, match="index -1 is negative"):
        WORLD.pairs([-1])
    mute = PreferenceWorld(num_words=1, liked_words=1, disliked_words=0, stop_probability=1.0)
    with pytest.raises(ValueError, match="the base policy gave the same answer 100 times: lower focus"):
        mute.pairs([0])
