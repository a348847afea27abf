"""What a policy is worth in the preference world, by its own samples: true reward, wins, KL, length, accuracy.

Letters: N prompts, S samples of each, T tokens of the longest sample, R rows = N * S, V vocabulary. KL is that of
whole answers, policy against reference, in nats: a Monte Carlo mean over the policy's samples of the sum over their
tokens of the exact divergence between the two next-token distributions. It has the same expectation as the sum of
log-ratios and varies less. Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_moe_cpt.analysis.preference_accuracy import preference_accuracy
from hf_moe_cpt.data.preference_world import PreferencePairs, PreferenceWorld, answer_lengths, token_counts
from hf_moe_cpt.scripts.compare_preference_policy import (
    answer_log_probabilities,
    answer_mask,
    sample_answers,
    taken,
    uniform_numbers,
)


MIN_EFFECTIVE_SAMPLES = 20  # below it the best policy is not estimated any more but guessed
FRONTIER_SLOPES = np.concatenate([[0.0], np.geomspace(0.05, 20.0, 60)])  # nats per unit of reward


@dataclass(frozen=True)
class JudgedSamples:
    """Answers of one model with their true rewards, `samples` rows for each prompt, one prompt after the other."""

    prompts: np.ndarray  # (R, P)
    answers: Tensor  # (R, T)
    rewards: np.ndarray  # (R,)
    samples: int


class WorldExam:
    """Held-out prompts, the reference's samples on them and clean pairs: what every policy is measured against."""

    def __init__(
        self,
        world: PreferenceWorld,
        reference: PreTrainedModel,
        split: str,
        *,
        samples: int,
        max_tokens: int,
        num_pairs: int,
    ) -> None:
        self.world, self.reference, self.split = world, reference, split
        self.samples, self.max_tokens, self.num_pairs = samples, max_tokens, num_pairs

    @cached_property
    def reference_samples(self) -> JudgedSamples:
        """Independent of the samples of any policy."""
        return self.sample(self.reference, self.samples, "reference", seed=0)

    @cached_property
    def pairs(self) -> PreferencePairs:
        """Pairs of base answers ordered by the truth, without those that are equally good."""
        pairs = self.world.clean().pairs(np.arange(self.num_pairs), self.split)
        apart = pairs.reward_chosen > pairs.reward_rejected
        return PreferencePairs(*(column[apart] for column in pairs))

    @cached_property
    def reference_sums(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the clean pairs' answers under the reference."""
        return self._pair_sums(self.reference)

    def sample(self, model: PreTrainedModel, samples: int, purpose: str, seed: int) -> JudgedSamples:
        """`samples` answers to each prompt of the split, judged; drawn with the numbers of (purpose, seed)."""
        prompts = np.repeat(self.world.distinct_prompts(self.split), samples, axis=0)
        uniforms = uniform_numbers(seed, purpose, len(prompts), self.max_tokens)
        answers = sample_answers(model, torch.from_numpy(prompts), uniforms)
        return JudgedSamples(prompts, answers, self.world.rewards(prompts, answers.numpy()), samples)

    def grade(self, model: PreTrainedModel, seed: int) -> dict[str, float]:
        """Every measure of a policy, means over prompts and samples; of one ambiguity level with `/level` behind.

        seed: of the policy's samples; those of the reference are always the same.
        """
        judged = self.sample(model, self.samples, "policy", seed)
        divergence = sequence_divergence(model, self.reference, torch.from_numpy(judged.prompts), judged.answers)
        levels = self.world.ambiguity(judged.prompts)
        grades = {
            "reward": float(judged.rewards.mean()),
            "win_rate": win_rate(judged, self.reference_samples),
            "kl": float(divergence.mean()),
            "length": float(token_counts(judged.answers.numpy()).mean()),
            "unfinished": float(1 - answer_lengths(judged.answers.numpy())[1].mean()),
        }
        for level in sorted(set(self.world.ambiguity_levels)):
            rows = levels == level
            if rows.any():
                grades |= {
                    f"reward/{level:g}": float(judged.rewards[rows].mean()),
                    f"kl/{level:g}": float(divergence.numpy()[rows].mean()),
                }
        return grades | self.accuracies(model)

    def accuracies(self, model: PreTrainedModel) -> dict[str, float]:
        """Share of clean pairs that the policy orders rightly: by its probability, per token, by its log-ratio."""
        chosen, rejected = self._pair_sums(model)
        lengths = token_counts(self.pairs.chosen), token_counts(self.pairs.rejected)
        plain = preference_accuracy(chosen, rejected, *lengths)
        ratio = preference_accuracy(chosen, rejected, *lengths, *self.reference_sums)
        return {
            "accuracy": plain.plain.value,
            "accuracy_per_token": plain.length_normalized.value,
            "accuracy_of_ratio": ratio.plain.value,
        }

    def _pair_sums(self, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        prompts = torch.from_numpy(self.pairs.prompts)
        sides = (torch.from_numpy(side) for side in (self.pairs.chosen, self.pairs.rejected))
        first, second = (taken(answer_log_probabilities(model, prompts, side), side) for side in sides)
        return first, second


def sequence_divergence(
    policy: PreTrainedModel, reference: PreTrainedModel, prompts: Tensor, answers: Tensor
) -> Tensor:
    """(R,) sum over an answer's tokens of KL(policy || reference) of the next token, in nats, at least 0.

    answers: (R, T) samples of the policy; then the mean over rows estimates the KL of whole answers of up to T tokens.
    """
    log_policy = answer_log_probabilities(policy, prompts, answers)
    log_reference = answer_log_probabilities(reference, prompts, answers)
    per_token = (log_policy.exp() * (log_policy - log_reference)).sum(dim=-1)
    return (per_token * answer_mask(answers)).sum(dim=1)


def win_rate(policy: JudgedSamples, reference: JudgedSamples) -> float:
    """Share of (policy sample, reference sample) pairs of the same prompt that the policy wins, ties as halves."""
    ours = policy.rewards.reshape(-1, policy.samples, 1)
    theirs = reference.rewards.reshape(-1, 1, reference.samples)
    return float(((ours > theirs) + 0.5 * (ours == theirs)).mean())


def best_frontier(rewards: np.ndarray, slopes: Sequence[float] = FRONTIER_SLOPES) -> list[tuple[float, float]]:
    """(KL in nats, reward) of the best policies there are, one for each slope, both means over prompts.

    rewards: (N, S) true rewards of the reference's samples. Among all policies with the same mean KL to the reference,
    weights proportional to reference * exp(slope * reward) have the largest mean reward. Slopes at which fewer than
    MIN_EFFECTIVE_SAMPLES of a prompt's samples carry the weight, on average over prompts, are left out.
    """
    points = []
    for slope in slopes:
        tilted = slope * (rewards - rewards.max(axis=1, keepdims=True))
        weights = np.exp(tilted)
        weights /= weights.sum(axis=1, keepdims=True)
        if (1 / np.square(weights).sum(axis=1)).min() < MIN_EFFECTIVE_SAMPLES:
            break
        kl = (weights * np.log(np.clip(weights * rewards.shape[1], 1e-300, None))).sum(axis=1)
        points.append((float(kl.mean()), float((weights * rewards).sum(axis=1).mean())))
    return points
