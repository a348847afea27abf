"""A small world in which the true reward of every answer is known, to see what preference optimisation really buys.

A prompt names requests. Each request likes a few words and dislikes a few; an answer is a sequence of words closed by
EOS. With prompt x, answer y (everything before its EOS), quality q of a word for a request:

    r*(x, y) = (1 - ambiguity(x)) * (sum over distinct words v of y, over requests a of x: q[a, v]  -  word_cost * |y|)
               - unfinished_cost, if y has no EOS

so repeating a word only costs, order does not matter, and the best answer is known: each word whose quality exceeds
its cost, once. An annotator sees score = r* + length_bias * (tokens of the answer) + label_temperature * Gumbel noise
and prefers the larger score, which is Bradley-Terry: P(first preferred) = sigma(difference / label_temperature).
On ambiguous prompts all answers are nearly equally good, labels are nearly coin flips, and the base policy, from
which answers are drawn, spreads over all words instead of those that matter.

Letters: N prompts or pairs, P tokens of a prompt, T tokens of the longest answer, V tokens of the vocabulary, W words.
Every draw is a function of (seed, purpose, index): nothing depends on order, batch or what was drawn before.
Source: ours; Bradley-Terry from Gumbel noise is Yellott (1977).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from hf_moe_cpt.data.random import derive_seed, permute


SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>", ":")
PAD_ID, EOS_ID, UNKNOWN_ID, COLON_ID = range(4)
SPLITS = {"train": (0.0, 0.7), "tune": (0.7, 0.85), "test": (0.85, 1.0)}  # shares of all sets of requests
MIN_REQUEST_SETS = 7  # so that no split is empty
QUALITY_RANGE = (1.0, 2.0)  # size of a word's quality for a request that cares about it
MAX_PROMPTS = 1_000_000
MAX_REDRAWS = 100


class PreferencePairs(NamedTuple):
    """Pairs as an annotator left them. Scores carry bias and noise, rewards are the truth; each (N,) float64."""

    prompts: np.ndarray  # (N, P)
    chosen: np.ndarray  # (N, T), ended by EOS, then padding
    rejected: np.ndarray  # (N, T)
    score_chosen: np.ndarray
    score_rejected: np.ndarray
    reward_chosen: np.ndarray
    reward_rejected: np.ndarray


@dataclass(frozen=True)
class PreferenceWorld:
    """Truth, base policy and annotator. Two worlds that differ in the annotator alone share prompts and answers."""

    seed: int = 0
    num_requests: int = 10
    requests_per_prompt: int = 2
    num_words: int = 24
    liked_words: int = 2  # of a request; as many others are disliked
    disliked_words: int = 2
    word_cost: float = 0.1
    unfinished_cost: float = 2.0
    ambiguity_levels: tuple[float, ...] = (0.0, 0.9)  # one token each opens a prompt: 0 clear, 1 all answers equal
    focus: float = 4.0  # log-odds of a word that matters against one that does not, in the base policy, if clear
    stop_probability: float = 0.2  # of the base policy after each word
    max_words: int = 12  # of the base policy
    label_temperature: float = 1.0  # 0: the annotator makes no error
    length_bias: float = 0.0  # score per token, EOS counted

    def __post_init__(self) -> None:
        if self.liked_words < 1 or self.disliked_words < 0 or self.liked_words + self.disliked_words > self.num_words:
            raise ValueError(
                f"liked_words={self.liked_words} and disliked_words={self.disliked_words} must fit into "
                f"num_words={self.num_words}, with at least one liked word."
            )
        if not 1 <= self.requests_per_prompt <= self.num_requests:
            raise ValueError(f"requests_per_prompt={self.requests_per_prompt} must be in [1, {self.num_requests}].")
        if not self.ambiguity_levels or not all(0 <= level <= 1 for level in self.ambiguity_levels):
            raise ValueError(f"ambiguity_levels={self.ambiguity_levels} must hold one or more values in [0, 1].")
        if not 0 < self.stop_probability <= 1 or self.max_words < 1:
            raise ValueError(
                f"stop_probability={self.stop_probability} must be in (0, 1] and max_words={self.max_words} at least "
                "1: the base policy must come to an end."
            )
        for name in ("label_temperature", "word_cost", "unfinished_cost"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number of at least 0.")
        sets = math.comb(self.num_requests, self.requests_per_prompt)
        kinds = sets * math.factorial(self.requests_per_prompt) * len(self.ambiguity_levels)
        if sets < MIN_REQUEST_SETS or kinds > MAX_PROMPTS:
            raise ValueError(
                f"num_requests={self.num_requests} and requests_per_prompt={self.requests_per_prompt} make {sets} "
                f"sets of requests and {kinds} prompts: a world needs at least {MIN_REQUEST_SETS} sets and at most "
                f"{MAX_PROMPTS} prompts."
            )

    @cached_property
    def vocabulary(self) -> list[str]:
        """The V tokens in order of their ids: special ones, one per ambiguity level, requests, words."""
        levels = [f"<ambiguity_{number}>" for number in range(len(self.ambiguity_levels))]
        requests = [f"ask_{number:02d}" for number in range(self.num_requests)]
        return [*SPECIAL_TOKENS, *levels, *requests, *(f"word_{number:02d}" for number in range(self.num_words))]

    @property
    def first_request_id(self) -> int:
        """Id of the first request; levels come before it."""
        return len(SPECIAL_TOKENS) + len(self.ambiguity_levels)

    @property
    def first_word_id(self) -> int:
        """Id of the first word; nothing comes after words."""
        return self.first_request_id + self.num_requests

    @property
    def prompt_length(self) -> int:
        """P: level, requests, colon."""
        return self.requests_per_prompt + 2

    @cached_property
    def quality(self) -> np.ndarray:
        """(requests, W) what a word is worth to a request: positive if liked, negative if disliked, mostly 0."""
        table = np.zeros((self.num_requests, self.num_words))
        draws = self._uniforms("quality", np.arange(self.num_requests), 0, 2 * self.num_words)
        low, high = QUALITY_RANGE
        for request, draw in enumerate(draws):
            order = np.argsort(draw[: self.num_words])
            sizes = low + (high - low) * draw[self.num_words :]
            liked, disliked = np.split(order[: self.liked_words + self.disliked_words], [self.liked_words])
            table[request, liked], table[request, disliked] = sizes[liked], -sizes[disliked]
        return table

    def distinct_prompts(self, split: str) -> np.ndarray:
        """(N, P) all prompts of a split, each once.

        No set of requests is in two splits; each comes in every order and at every level of ambiguity.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown: choose one of {', '.join(SPLITS)}.")
        sets = list(itertools.combinations(range(self.num_requests), self.requests_per_prompt))
        begin, end = (round(share * len(sets)) for share in SPLITS[split])
        own = permute(np.arange(begin, end), len(sets), derive_seed(self.seed, "split"))
        ordered = [order for number in own for order in itertools.permutations(sets[number])]
        levels = np.arange(len(self.ambiguity_levels))
        table = np.full((len(ordered) * len(levels), self.prompt_length), COLON_ID)
        table[:, 0] = len(SPECIAL_TOKENS) + np.tile(levels, len(ordered))
        table[:, 1:-1] = self.first_request_id + np.repeat(ordered, len(levels), axis=0)
        return table

    def prompts(self, indices: Sequence[int] | np.ndarray, split: str = "train") -> np.ndarray:
        """(N, P) the prompts of these indices; as indices count up, every prompt comes once before any comes again."""
        indices, distinct = _as_indices(indices), self.distinct_prompts(split)
        rounds, places = np.divmod(indices, len(distinct))
        rows = np.zeros(len(indices), dtype=np.int64)
        for turn in np.unique(rounds):
            seed = derive_seed(self.seed, "order", split, int(turn))
            rows[rounds == turn] = permute(places[rounds == turn], len(distinct), seed)
        return distinct[rows]

    def ambiguity(self, prompts: np.ndarray) -> np.ndarray:
        """(N,) in [0, 1], read from the first token of each prompt."""
        levels = self._checked(prompts)[:, 0] - len(SPECIAL_TOKENS)
        return np.asarray(self.ambiguity_levels, dtype=np.float64)[levels]

    def word_values(self, prompts: np.ndarray) -> np.ndarray:
        """(N, W) quality of each word for each prompt: the sum over its requests, before ambiguity."""
        return self.quality[self._checked(prompts)[:, 1:-1] - self.first_request_id].sum(axis=1)

    def rewards(self, prompts: np.ndarray, completions: np.ndarray) -> np.ndarray:
        """(N,) true reward of any token sequences.

        completions: (N, T) ids; what follows the first EOS of a row is ignored, a row without EOS is unfinished.
        Tokens that are no words cost what a word costs and are worth nothing.
        """
        completions = np.asarray(completions)
        lengths, finished = answer_lengths(completions)
        inside = np.arange(completions.shape[1]) < lengths[:, None]
        is_word = inside & (completions >= self.first_word_id) & (completions < len(self.vocabulary))
        present = np.zeros((len(completions), self.num_words), dtype=bool)
        rows, columns = np.nonzero(is_word)
        present[rows, completions[rows, columns] - self.first_word_id] = True
        worth = (self.word_values(prompts) * present).sum(axis=1) - self.word_cost * lengths
        return (1 - self.ambiguity(prompts)) * worth - self.unfinished_cost * ~finished

    def best_rewards(self, prompts: np.ndarray) -> np.ndarray:
        """(N,) the largest reward that any answer to each prompt can have."""
        gains = np.clip(self.word_values(prompts) - self.word_cost, 0, None).sum(axis=1)
        return (1 - self.ambiguity(prompts)) * gains

    def word_probabilities(self, prompts: np.ndarray) -> np.ndarray:
        """(N, W) the base policy's next word; the same at every position of an answer."""
        requests = self._checked(prompts)[:, 1:-1] - self.first_request_id
        matters = (self.quality != 0)[requests].any(axis=1)
        weights = np.exp(self.focus * (1 - self.ambiguity(prompts))[:, None] * matters)
        return weights / weights.sum(axis=1, keepdims=True)

    @property
    def mean_base_tokens(self) -> float:
        """Expected tokens of an answer of the base policy, EOS counted."""
        return (1 - (1 - self.stop_probability) ** self.max_words) / self.stop_probability + 1

    def base_completions(
        self, indices: Sequence[int] | np.ndarray, split: str = "train", draw: int | np.ndarray = 0
    ) -> np.ndarray:
        """(N, max_words + 1) answers of the base policy to the prompts of these indices, padded after EOS.

        draw: number of the answer, one for all or (N,); equal numbers give equal answers.
        """
        indices = _as_indices(indices)
        cumulative = np.cumsum(self.word_probabilities(self.prompts(indices, split)), axis=1)
        draws = self._uniforms(f"completion {split}", indices, draw, 2 * self.max_words)
        words = (draws[:, : self.max_words, None] >= cumulative[:, None, :-1]).sum(axis=2)
        stops = draws[:, self.max_words :] < self.stop_probability
        stops[:, -1] = True
        lengths = 1 + stops.argmax(axis=1)
        answers = np.full((len(indices), self.max_words + 1), PAD_ID)
        answers[:, :-1] = self.first_word_id + words
        answers[np.arange(answers.shape[1]) >= lengths[:, None]] = PAD_ID
        answers[np.arange(len(indices)), lengths] = EOS_ID
        return answers

    def pairs(
        self,
        indices: Sequence[int] | np.ndarray,
        split: str = "train",
        completions: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> PreferencePairs:
        """Two answers to the prompt of each index, ordered by the annotator's noisy score.

        completions: two (N, T) arrays of answers to `prompts(indices, split)`, such as a model's own samples; None for
        two different answers of the base policy.
        """
        indices = _as_indices(indices)
        prompts = self.prompts(indices, split)
        first, second = self._different_answers(indices, split) if completions is None else completions
        noise = self._uniforms(f"label {split}", indices, 0, 2)
        scores, rewards = [], []
        for answers, uniform in ((first, noise[:, 0]), (second, noise[:, 1])):
            rewards.append(self.rewards(prompts, answers))
            gumbel = -np.log(-np.log(uniform)) - np.euler_gamma  # of mean 0
            scores.append(rewards[-1] + self.length_bias * token_counts(answers) + self.label_temperature * gumbel)
        first_wins = scores[0] > scores[1]

        def ordered(of_first: np.ndarray, of_second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            wins = first_wins.reshape(-1, *[1] * (of_first.ndim - 1))
            return np.where(wins, of_first, of_second), np.where(wins, of_second, of_first)

        return PreferencePairs(prompts, *ordered(first, second), *ordered(*scores), *ordered(*rewards))

    def clean(self) -> PreferenceWorld:
        """The same world with an annotator who neither errs nor likes length."""
        return replace(self, label_temperature=0.0, length_bias=0.0)

    def _different_answers(self, indices: np.ndarray, split: str) -> tuple[np.ndarray, np.ndarray]:
        first = self.base_completions(indices, split)
        second = self.base_completions(indices, split, draw=1)
        for draw in range(2, MAX_REDRAWS):
            same = (first == second).all(axis=1)
            if not same.any():
                return first, second
            second[same] = self.base_completions(indices[same], split, draw)
        raise ValueError(
            f"the base policy gave the same answer {MAX_REDRAWS} times: lower focus ({self.focus}) or "
            f"stop_probability ({self.stop_probability})."
        )

    def _uniforms(self, purpose: str, indices: np.ndarray, draw: int | np.ndarray, count: int) -> np.ndarray:
        """(N, count) numbers in (0, 1), a function of (seed, purpose, index, draw) alone."""
        key = derive_seed(self.seed, purpose)
        draws = np.broadcast_to(draw, indices.shape)
        raw = [
            np.random.Philox(key=key, counter=[0, int(index), int(number), 0]).random_raw(count)
            for index, number in zip(indices, draws, strict=True)
        ]
        words = np.array(raw, dtype=np.uint64).reshape(len(indices), count)
        return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def _checked(self, prompts: np.ndarray) -> np.ndarray:
        prompts = np.asarray(prompts)
        wanted = f"a level, {self.requests_per_prompt} requests and ':'"
        if prompts.ndim != 2 or prompts.shape[1] != self.prompt_length:
            raise ValueError(f"prompts have the shape {prompts.shape}: each is {wanted}, (N, {self.prompt_length}).")
        levels, requests = prompts[:, 0], prompts[:, 1:-1]
        valid = (levels >= len(SPECIAL_TOKENS)) & (levels < self.first_request_id) & (prompts[:, -1] == COLON_ID)
        valid &= ((requests >= self.first_request_id) & (requests < self.first_word_id)).all(axis=1)
        if not valid.all():
            raise ValueError(f"prompt {prompts[~valid][0].tolist()} is none of this world: it must be {wanted}.")
        return prompts

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A tokenizer in which each token of the world is one word of text; it adds nothing by itself."""
        vocabulary = {token: number for number, token in enumerate(self.vocabulary)}
        model = Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL_TOKENS[UNKNOWN_ID]))
        model.pre_tokenizer = WhitespaceSplit()
        pad, eos, unknown = (SPECIAL_TOKENS[number] for number in (PAD_ID, EOS_ID, UNKNOWN_ID))
        return PreTrainedTokenizerFast(tokenizer_object=model, pad_token=pad, eos_token=eos, unk_token=unknown)

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens joined by spaces, without padding."""
        return " ".join(self.vocabulary[token] for token in tokens if token != PAD_ID)

    def dataset(self, pairs: PreferencePairs) -> Dataset:
        """Columns prompt, chosen, rejected (text, EOS included), scores, rewards, ambiguity: as trainers take it."""
        columns = {"prompt": [self.text(row) for row in pairs.prompts]}
        for name in ("chosen", "rejected"):
            columns[name] = [f" {self.text(row)}" for row in getattr(pairs, name)]
        for name in ("score_chosen", "score_rejected", "reward_chosen", "reward_rejected"):
            columns[name] = getattr(pairs, name).tolist()
        return Dataset.from_dict(columns | {"ambiguity": self.ambiguity(pairs.prompts).tolist()})


def answer_lengths(completions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) tokens before the first EOS of each row, all of them where there is none; and (N,) whether there is one."""
    is_eos = np.asarray(completions) == EOS_ID
    finished = is_eos.any(axis=1)
    first = is_eos.argmax(axis=1) if is_eos.shape[1] else np.zeros(len(is_eos), dtype=np.int64)
    return np.where(finished, first, is_eos.shape[1]), finished


def token_counts(completions: np.ndarray) -> np.ndarray:
    """(N,) tokens of each answer, EOS counted."""
    lengths, finished = answer_lengths(completions)
    return lengths + finished


def _as_indices(indices: Sequence[int] | np.ndarray) -> np.ndarray:
    indices = np.asarray(indices, dtype=np.int64).reshape(-1)
    if indices.size and indices.min() < 0:
        raise ValueError(f"index {indices.min()} is negative: indices count from 0.")
    return indices
