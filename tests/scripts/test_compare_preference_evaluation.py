"""The tiny policy and its examination, against enumeration of all answers, scipy and hand-made cases."""

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe_cpt.data.preference_world import EOS_ID, PAD_ID, PreferenceWorld
from hf_moe_cpt.scripts.compare_preference_evaluation import (
    JudgedSamples,
    WorldExam,
    best_frontier,
    sequence_divergence,
    win_rate,
)
from hf_moe_cpt.scripts.compare_preference_policy import (
    PolicyPlan,
    answer_log_probabilities,
    sample_answers,
    taken,
    train_policy,
    uniform_numbers,
)


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> tuple[PreferenceWorld, AutoModelForCausalLM, AutoModelForCausalLM]:
    """A world of five words and two different policies in it."""
    world = PreferenceWorld(num_requests=8, num_words=5, max_words=3)
    models = []
    for seed, steps in ((0, 60), (1, 10)):
        folder = tmp_path_factory.mktemp("policy")
        losses = train_policy(world, PolicyPlan(hidden_size=16, num_layers=1, steps=steps), folder, seed)
        models.append(AutoModelForCausalLM.from_pretrained(folder).eval())
    assert losses[-1] < losses[0]
    return world, *models


def test_imitation_learns_the_base_policy(tmp_path):
    world = PreferenceWorld(num_requests=8, num_words=6, max_words=4)
    losses = train_policy(world, PolicyPlan(steps=150), tmp_path)
    logs = world.base_log_probabilities(world.prompts(range(3000)), world.base_completions(range(3000)))
    entropy = -logs.sum() / (world.mean_base_tokens * 3000)
    assert losses[0] > entropy + 1 and np.mean(losses[-20:]) < entropy + 0.1
    assert AutoTokenizer.from_pretrained(tmp_path).vocab_size == len(world.vocabulary)


@pytest.mark.parametrize("architecture", ["llama", "cpt_moe"])
def test_samples_follow_the_model_and_not_their_batch(architecture, tmp_path):
    world = PreferenceWorld(num_requests=8, num_words=5, max_words=3)
    train_policy(world, PolicyPlan(architecture, hidden_size=16, num_layers=1, steps=5), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompts = torch.from_numpy(world.distinct_prompts("test")[:1].repeat(3000, axis=0))
    answers = sample_answers(model, prompts, uniform_numbers(0, "test", 3000, 4))
    with torch.no_grad():
        first = model(prompts[:1]).logits[0, -1].double().softmax(-1).numpy()
    counts = np.bincount(answers[:, 0].numpy(), minlength=len(first))
    assert stats.chisquare(counts, first / first.sum() * 3000).pvalue > 1e-3
    again = sample_answers(model, prompts[:700], uniform_numbers(0, "test", 700, 4), batch_size=128)
    assert torch.equal(again, answers[:700])
    is_eos = (answers == EOS_ID).long()
    behind = is_eos.cumsum(dim=1) > is_eos
    assert behind.any() and (answers[behind] == PAD_ID).all() and not is_eos.any(dim=1).all()


def test_log_probabilities_of_answers_are_those_of_single_tokens(policies):
    world, model, _ = policies
    prompts = torch.from_numpy(world.prompts(range(6)))
    answers = torch.from_numpy(world.base_completions(range(6)))
    sums = taken(answer_log_probabilities(model, prompts, answers, batch_size=4), answers)
    for prompt, answer, value in zip(prompts.tolist(), answers.tolist(), sums, strict=True):
        total, tokens = 0.0, list(prompt)
        for token in answer[: answer.index(EOS_ID) + 1]:
            with torch.no_grad():
                total += model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)[token].item()
            tokens.append(token)
        assert value.item() == pytest.approx(total, rel=1e-4)


def test_divergence_has_the_expectation_of_the_kl_of_whole_answers(policies):
    """All answers of up to two tokens, weighed by their probabilities, against the definition of KL."""
    world, policy, reference = policies
    tokens = range(len(world.vocabulary))
    answers = [[EOS_ID, PAD_ID]] + [[a, b] for a in tokens if a != EOS_ID for b in tokens]
    answers = torch.tensor(answers)
    prompts = torch.from_numpy(world.prompts([0])).repeat(len(answers), 1)
    log_policy, log_reference = (
        taken(answer_log_probabilities(model, prompts, answers), answers).double() for model in (policy, reference)
    )
    assert log_policy.exp().sum().item() == pytest.approx(1, abs=1e-5)
    kl = (log_policy.exp() * (log_policy - log_reference)).sum().item()
    divergence = sequence_divergence(policy, reference, prompts, answers)
    assert (log_policy.exp() * divergence).sum().item() == pytest.approx(kl, rel=1e-4) and kl > 0.05
    assert divergence.min() >= -1e-6


def test_win_rate_counts_pairs_of_the_same_prompt():
    ours = JudgedSamples(np.zeros((4, 4)), torch.zeros(4, 1), np.array([1.0, 2.0, 5.0, 5.0]), 2)
    theirs = JudgedSamples(np.zeros((6, 4)), torch.zeros(6, 1), np.array([0.0, 1.0, 3.0, 5.0, 6.0, 4.0]), 3)
    assert win_rate(ours, theirs) == pytest.approx((1 + 0.5 + 2 + 2 * 1.5) / 12)


def test_exam_of_the_reference_itself(policies):
    world, model, other = policies
    exam = WorldExam(world, model, "test", samples=50, max_tokens=5, num_pairs=200)
    grades = exam.grade(model, seed=3)
    assert grades["kl"] == 0 and grades["accuracy_of_ratio"] == 0.5
    assert grades["win_rate"] == pytest.approx(0.5, abs=0.03)
    levels = [grades[f"reward/{level:g}"] for level in world.ambiguity_levels]
    assert grades["reward"] == pytest.approx(np.mean(levels))
    assert (exam.pairs.reward_chosen > exam.pairs.reward_rejected).all()
    assert exam.grade(other, seed=3)["kl"] > 0.05
    assert exam.grade(model, seed=4)["reward"] != grades["reward"]


def test_accuracy_is_that_of_a_policy_that_knows_the_truth(policies, monkeypatch):
    world, model, other = policies
    exam = WorldExam(world, model, "test", samples=2, max_tokens=5, num_pairs=200)
    truth = torch.from_numpy(exam.pairs.reward_chosen), torch.from_numpy(exam.pairs.reward_rejected)
    reference = exam.reference_sums
    knowing = tuple(2 * reward + part for reward, part in zip(truth, reference, strict=True))
    monkeypatch.setattr(WorldExam, "_pair_sums", lambda self, model: knowing)
    assert exam.accuracies(other)["accuracy_of_ratio"] == 1


def test_frontier_is_the_largest_reward_at_its_divergence():
    """Against scipy, which maximises the reward of one prompt's weights under a bound on their KL."""
    rewards = np.random.default_rng(0).normal(size=(1, 40))
    points = best_frontier(rewards, slopes=[0.0, 0.3, 0.6])
    assert points[0] == (0.0, pytest.approx(rewards.mean()))

    def kl(weights):
        return float((weights * np.log(np.clip(weights * 40, 1e-12, None))).sum())

    for bound, reward in points[1:]:
        start = np.exp(0.1 * rewards[0]) / np.exp(0.1 * rewards[0]).sum()
        limits = [
            {"type": "eq", "fun": lambda w: w.sum() - 1},
            {"type": "ineq", "fun": lambda w, bound=bound: bound - kl(w)},
        ]
        best = optimize.minimize(
            lambda w: -(w * rewards[0]).sum(), start, bounds=[(1e-6, 1)] * 40, constraints=limits, method="SLSQP"
        )
        assert reward == pytest.approx(-best.fun, abs=1e-3)
    assert len(best_frontier(rewards, slopes=[0.0, 0.3, 50.0])) == 2
