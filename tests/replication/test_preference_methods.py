"""The tiny policy and its examination against enumeration of all answers, scipy and cases made by hand; the comparison
in miniature, end to end; what its plan asks for; rows, choices and the table of records made by hand."""

import io
import itertools
import json
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe_cpt.data.preference_world import EOS_ID, PAD_ID, PreferenceWorld
from hf_moe_cpt.scripts.replication import preference_methods as methods
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_trainer import RainbowPOTrainer


@pytest.fixture(scope="module")
def policies(tmp_path_factory) -> tuple[PreferenceWorld, AutoModelForCausalLM, AutoModelForCausalLM]:
    """A world of five words and two different policies in it."""
    world = PreferenceWorld(num_requests=8, num_words=5, max_words=3)
    models = []
    for seed, steps in ((0, 60), (1, 10)):
        folder = tmp_path_factory.mktemp("policy")
        plan = methods.PolicyPlan(hidden_size=16, num_layers=1, steps=steps)
        losses = methods.train_policy(world, plan, folder, seed)
        models.append(AutoModelForCausalLM.from_pretrained(folder).eval())
    assert losses[-1] < losses[0]
    return world, *models


@pytest.mark.slow
def test_imitation_learns_the_base_policy(tmp_path):
    world = PreferenceWorld(num_requests=8, num_words=6, max_words=4)
    losses = methods.train_policy(world, methods.PolicyPlan(steps=150), tmp_path)
    answers = world.base_completions(range(3000))
    lengths = (answers >= world.first_word_id).sum(axis=1)
    inside = np.arange(answers.shape[1]) < lengths[:, None]
    words = np.where(inside, answers - world.first_word_id, 0)
    logs = np.take_along_axis(np.log(world.word_probabilities(world.prompts(range(3000)))), words, axis=1)[
        inside
    ].sum()
    logs += np.log1p(-world.stop_probability) * (lengths - 1).sum()
    logs += np.log(world.stop_probability) * (lengths < world.max_words).sum()
    entropy = -logs / (world.mean_base_tokens * 3000)  # of the base policy, in nats per token
    assert losses[0] > entropy + 1 and np.mean(losses[-20:]) < entropy + 0.1
    assert AutoTokenizer.from_pretrained(tmp_path).vocab_size == len(world.vocabulary)


@pytest.mark.parametrize("architecture", ["llama", "cpt_moe"])
def test_samples_follow_the_model_and_not_their_batch(architecture, tmp_path):
    world = PreferenceWorld(num_requests=8, num_words=5, max_words=3)
    methods.train_policy(world, methods.PolicyPlan(architecture, hidden_size=16, num_layers=1, steps=5), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompts = torch.from_numpy(world.distinct_prompts("test")[:1].repeat(3000, axis=0))
    answers = methods.sample_answers(model, prompts, methods.uniform_numbers(0, "test", 3000, 4))
    with torch.no_grad():
        first = model(prompts[:1]).logits[0, -1].double().softmax(-1).numpy()
    counts = np.bincount(answers[:, 0].numpy(), minlength=len(first))
    assert stats.chisquare(counts, first / first.sum() * 3000).pvalue > 1e-3
    again = methods.sample_answers(model, prompts[:700], methods.uniform_numbers(0, "test", 700, 4), batch_size=128)
    assert torch.equal(again, answers[:700])
    is_eos = (answers == EOS_ID).long()
    behind = is_eos.cumsum(dim=1) > is_eos
    assert behind.any() and (answers[behind] == PAD_ID).all() and not is_eos.any(dim=1).all()


def test_log_probabilities_of_answers_are_those_of_single_tokens(policies):
    world, model, _ = policies
    prompts = torch.from_numpy(world.prompts(range(6)))
    answers = torch.from_numpy(world.base_completions(range(6)))
    sums = methods.taken(methods.answer_log_probabilities(model, prompts, answers, batch_size=4), answers)
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
        methods.taken(methods.answer_log_probabilities(model, prompts, answers), answers).double()
        for model in (policy, reference)
    )
    assert log_policy.exp().sum().item() == pytest.approx(1, abs=1e-5)
    kl = (log_policy.exp() * (log_policy - log_reference)).sum().item()
    divergence = methods.sequence_divergence(policy, reference, prompts, answers)
    assert (log_policy.exp() * divergence).sum().item() == pytest.approx(kl, rel=1e-4) and kl > 0.05
    assert divergence.min() >= -1e-6


def test_frontier_is_the_largest_reward_at_its_divergence():
    """Against scipy, which maximises the reward of one prompt's weights under a bound on their KL."""
    rewards = np.random.default_rng(0).normal(size=(1, 40))
    points = methods.best_frontier(rewards, slopes=[0.0, 0.3, 0.6])
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
    assert len(methods.best_frontier(rewards, slopes=[0.0, 0.3, 50.0])) == 2


def test_cells_keep_what_a_number_says_in_the_logit():
    """Logit margins of the papers: RainbowPO's 0.75 after mixing, SimPO's 3, ODPO's 1; R-DPO's is the tuned one."""
    for strength in (1 / 3, 2.0):
        for name, advantage in ((methods.RAINBOW, 0.75), ("simpo", 3.0), ("odpo", 1.0), ("r-dpo", 0.02)):
            found = methods.switches_of(methods.CELLS[name], strength, 0.02, 6.0, 1.0)
            share = 1.0 - found["mixing_alpha"] if found["mix_home_advantage"] else 1.0
            assert found["beta"] * found["home_advantage"] * share == pytest.approx(advantage), name
            assert found["beta"] == pytest.approx(strength / (1.0 if found["length_normalization"] else 6.0))
    sft = [methods.switches_of(methods.CELLS["ln-dpo, SFT"], s, 0.0, 6.0, 10.0) for s in (0.1, 1.0)]
    assert sft[0]["sft_weight"] / sft[0]["beta"] == pytest.approx(sft[1]["sft_weight"] / sft[1]["beta"])
    plain = methods.switches_of(methods.CELLS[methods.RAINBOW], 1.0, 0.0, 100.0, 10.0)
    assert plain["beta"] == 10.0 and plain["home_advantage"] == pytest.approx(0.1 * 0.75)
    assert not plain["mix_home_advantage"]  # so that the margin stays where nothing is mixed


def test_effects_are_differences_of_means_over_the_factorial():
    truth = {"LN": 0.5, "mixing": 0.1, "margin": -0.2, "phi": 0.0}
    rewards = {}
    for levels in itertools.product((False, True), repeat=4):
        value = sum(truth[name] for name, level in zip(methods.FACTORS, levels, strict=True) if level)
        rewards[methods.factorial_name(levels)] = value + 0.4 * (levels[0] and levels[1])

    def value(weights):
        return sum(weight * rewards[name] for name, weight in weights.items())

    assert value(methods.effect("LN")) == pytest.approx(0.5 + 0.2)
    assert value(methods.effect("margin")) == pytest.approx(-0.2)
    assert value(methods.effect("LN", "mixing")) == pytest.approx(0.2)
    assert value(methods.effect("mixing", where={"LN": True})) == pytest.approx(0.5)
    assert value(methods.effect("mixing", where={"LN": False})) == pytest.approx(0.1)
    assert all(abs(sum(claim.weights.values())) < 1e-12 for claim in methods.CLAIMS)
    assert {name for claim in methods.CLAIMS for name in claim.weights} <= methods.CELLS.keys()


def test_rewards_are_read_where_the_curve_crosses_a_divergence():
    curve = [{"kl": kl, "rewards": np.array([kl, 10 * kl**2])} for kl in (0.0, 1.5, 3.0, 2.0)]
    assert methods.reward_at(curve, 1.0) == [1.0, 15.0] and methods.reward_at(curve, 1.5) == [1.5, 22.5]
    assert methods.reward_at(curve, 2.0) == pytest.approx([2.0, 45.0], abs=1e-4)
    assert methods.reward_at(curve, 4.0) is None


def test_a_search_walks_until_its_best_lies_inside_and_tells_an_edge():
    def record(place):
        reward = -((place[0] - 2) ** 2) - (place[1] + 1) ** 2
        return {"at": {"2": [float(reward)]}, "curve": [{"kl": 3.0}]}

    search = methods.Search(methods.CELLS[methods.DPO])
    for _ in range(5):
        wanted = search.wanted()
        search.learn({search.run_at(place).name: record(place) for place in wanted})
        if search.is_inside:
            break
    assert search.best == (2, -1) and search.is_inside
    early = methods.Search(methods.CELLS[methods.DPO])
    early.learn({early.run_at(place).name: record(place) for place in early.wanted()})
    assert not early.is_inside
    lost = methods.Search(methods.CELLS[methods.DPO])
    far = {place: {"at": {"2": None}, "curve": [{"kl": float(place[0])}]} for place in lost.wanted()}
    lost.learn({lost.run_at(place).name: found for place, found in far.items()})
    assert lost.best == (1, 0)  # what goes furthest, where none gets there
    penalised = methods.Search(methods.CELLS["r-dpo"], best=(1, -1))
    assert penalised.axes == ("rate", "strength", "penalty") and penalised.best == (1, -1, 0)
    assert [len(names) for names in methods.stages(methods.CELLS)] == [16, 6, 18]


def test_intervals_cover_and_p_values_are_corrected(monkeypatch):
    monkeypatch.setattr(methods, "RESAMPLES", 300)
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(40):
        runs, prompts = generator.normal(size=(12, 1)), np.repeat(generator.normal(size=(3, 1, 60)), 4, 1)
        values = 0.3 + 0.3 * runs + prompts.reshape(12, 60) + 0.5 * generator.normal(size=(12, 60))
        low, high = np.quantile(methods.crossed_bootstrap(values, [0] * 4 + [1] * 4 + [2] * 4), [0.025, 0.975])
        hits += low < 0.3 < high
    assert hits >= 33  # of 40; a bootstrap over rows alone would hold about half
    assert methods.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # R's p.adjust
    found = {"a": {(0, 1): np.ones(4), (0, 2): np.ones(4)}, "b": {(0, 1): np.zeros(4), (0, 2): np.zeros(4)}}
    sure = methods.contrast({"a": 1.0, "b": -1.0}, found)
    assert (sure["value"], sure["low"], sure["high"], sure["runs"]) == (1.0, 1.0, 1.0, 2)
    assert methods.contrast({"a": 1.0, "c": -1.0}, found) is None


UP, DOWN = (0.2, 0.1, 0.3, 0.01), (-0.2, -0.3, -0.1, 0.01)
UNSURE, NONE = (0.1, -0.3, 0.5, 1.0), (0.0, -0.04, 0.04, 1.0)
VERDICTS = {  # value, low, high and adjusted p -> what follows
    "more": {UP: "confirmed", DOWN: "refuted", UNSURE: "undecided", NONE: "undecided"},
    "less": {UP: "refuted", DOWN: "confirmed", UNSURE: "undecided"},
    "nothing": {UP: "refuted", DOWN: "refuted", UNSURE: "undecided", NONE: "confirmed"},
    "no gain": {UP: "refuted", DOWN: "confirmed", UNSURE: "undecided", NONE: "confirmed"},
}


@pytest.mark.parametrize("kind", VERDICTS)
def test_verdicts_follow_from_intervals(kind):
    for numbers, wanted in VERDICTS[kind].items():
        found = dict(zip(("value", "low", "high", "adjusted"), numbers, strict=True))
        assert methods.verdict(kind, found, margin=0.05) == wanted, numbers


PLAN = methods.PolicyPlan(hidden_size=16, num_layers=1, steps=4)
MINIATURE = methods.Scale(16, 2, 8, 2, 1, 1, 1, 2, PLAN, (("num_requests", 8),), frontier_samples=30, max_tokens=6)


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """A worker with the policy of the first world."""
    worker = methods.Worker(MINIATURE, tmp_path_factory.mktemp("worker"), "cpu")
    worker.carry_out(methods.PolicyRun(0, "main"))
    return worker


@pytest.mark.slow
@pytest.mark.parametrize("name", [methods.RAINBOW, "odpo", "r-dpo", "ln-dpo, SFT"])
def test_the_loop_is_that_of_the_trainer(worker, tmp_path, name):
    """The same pairs in the same order through `RainbowPOTrainer`, at a home advantage that it takes."""
    cell = methods.CELLS[name]
    run = methods.Run(cell, 0, 1, "test")
    world, batch = worker.world(0, "main"), worker.batch(run)
    switches = methods.switches_of(cell, 1.0, 0.05, world.mean_base_tokens, 1.0)
    if switches["home_advantage_from"] == "constant":
        switches["home_advantage"] /= 10
    folder = worker.root / "policy-0-main"
    looped = methods.load_policy(folder)
    list(methods.optimised(looped, batch, switches, 1e-3, 1, 16, 0))
    pairs = world.dataset(world.pairs(np.arange(16, 32)))
    args = {"learning_rate": 1e-3, "max_steps": 1, "per_device_train_batch_size": 16, "weight_decay": 0.0}
    args |= {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": "none"}
    args |= {"lr_scheduler_type": "constant", "optim": "adamw_torch", "save_strategy": "no"}
    config = RainbowPOConfig(str(tmp_path), **switches, **args)
    trainer = RainbowPOTrainer(
        methods.load_policy(folder), args=config, train_dataset=pairs, processing_class=world.tokenizer()
    )
    trainer.train()
    start, looped, trained = (
        torch.cat([weight.detach().flatten() for weight in model.parameters()])
        for model in (methods.load_policy(folder), looped, trainer.model)
    )
    assert (looped - trained).norm() < 0.02 * (trained - start).norm() > 0  # Adam makes steps of rounding, too


@pytest.mark.slow
def test_pairs_by_rejection_sampling_are_answers_of_the_reference_ordered_by_score(worker):
    for how in ("rs", "rs+"):
        run = methods.Run(methods.CELLS[f"{methods.DPO}, {how}"], 0, 1, "test")
        batch = worker.batch(run)
        assert len(batch.prompts) <= 16 and (batch.scores.chosen > batch.scores.rejected).all()
        assert not any(torch.equal(a, b) for a, b in zip(*batch.answers, strict=True))


@pytest.mark.slow
def test_a_comparison_ends_with_verdicts_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setitem(methods.SETTINGS, "small", MINIATURE)
    monkeypatch.setattr(methods, "NATS", (1e-4, 2e-4))
    monkeypatch.setattr(methods, "TARGET", 2e-4)
    words = ["--output_dir", str(tmp_path / "out"), "--workers", "1"]
    words += ["--methods", methods.DPO, methods.LN_DPO, "ln-dpo, SFT", f"{methods.DPO}, rs", "r-dpo"]
    methods.main([*words, "--minutes", "0"])
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == []
    printed = io.StringIO()
    with redirect_stdout(printed):
        methods.main(words)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {row["claim"] for row in results["claims"]} == {"no gain from SFT", "rejection sampling helps DPO"}
    assert all(row["verdict"] in ("confirmed", "refuted", "undecided") for row in results["claims"])
    assert [row["cell"] for row in results["rows"]] == [name for name in methods.CELLS if name in words]
    assert "no gain from SFT" in printed.getvalue() and (tmp_path / "out" / "comparison.png").stat().st_size > 10_000
    monkeypatch.setattr(methods.Worker, "carry_out", None)
    methods.main([*words, "--minutes", "0"])
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == results["rows"]
