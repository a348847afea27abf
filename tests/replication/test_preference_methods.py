"""The tiny policy and its examination against enumeration of all answers, scipy and cases made by hand; the comparison
in miniature, end to end; what its plan asks for; rows, choices and the table of records made by hand."""

import csv
import io
import json
import math
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe_cpt.data.preference_world import EOS_ID, PAD_ID, PreferenceWorld
from hf_moe_cpt.scripts.replication import preference_methods as methods
from hf_moe_cpt.scripts.replication.sweep import Crew, open_folder, t_interval
from hf_moe_cpt.trainers.rainbowpo.presets import PRESETS
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig


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


def test_win_rate_counts_pairs_of_the_same_prompt():
    ours = methods.JudgedSamples(np.zeros((4, 4)), torch.zeros(4, 1), np.array([1.0, 2.0, 5.0, 5.0]), 2)
    theirs = methods.JudgedSamples(np.zeros((6, 4)), torch.zeros(6, 1), np.array([0.0, 1.0, 3.0, 5.0, 6.0, 4.0]), 3)
    assert methods.win_rate(ours, theirs) == pytest.approx((1 + 0.5 + 2 + 2 * 1.5) / 12)


def test_exam_of_the_reference_itself(policies):
    world, model, other = policies
    exam = methods.WorldExam(world, model, "test", samples=50, max_tokens=5, num_pairs=200)
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
    exam = methods.WorldExam(world, model, "test", samples=2, max_tokens=5, num_pairs=200)
    truth = torch.from_numpy(exam.pairs.reward_chosen), torch.from_numpy(exam.pairs.reward_rejected)
    reference = exam.reference_sums
    knowing = tuple(2 * reward + part for reward, part in zip(truth, reference, strict=True))
    monkeypatch.setattr(methods.WorldExam, "_pair_sums", lambda self, model: knowing)
    assert exam.accuracies(other)["accuracy_of_ratio"] == 1


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


MINIATURE = methods.Scale(16, 1, 8, (1e-3, 3e-3), (1.0,), 1, 2, 3, 64, 40, max_tokens=6)
METHODS_RUN = ["dpo", "rainbowpo"]


@pytest.fixture(scope="module", autouse=True)
def miniature():
    """The small setting in two steps a run, the policy in three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods.SETTINGS, "small", MINIATURE)
        patch.setitem(methods.POLICY_STEPS, "small", 3)
        yield


def start(folder: Path, *words: str) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed):
        methods.main(["--output_dir", str(folder), "--workers", "1", *words])
    return printed.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A comparison of two methods, one seed, and what it printed."""
    folder = tmp_path_factory.mktemp("comparison") / "out"
    return folder, start(folder, "--methods", *METHODS_RUN)


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_every_run_left_a_record_and_the_best_of_the_grid_was_run_again(finished):
    records = {path.stem: json.loads(path.read_text()) for path in (finished[0] / "runs").iterdir()}
    assert len(records) == 2 * (2 + 1)
    for method in METHODS_RUN:
        of_method = [record for record in records.values() if record["method"] == method]
        tuned = {r["settings"]["learning_rate"]: r["grades"]["reward"] for r in of_method if r["split"] == "tune"}
        (final,) = [record for record in of_method if record["split"] == "test"]
        assert tuned[final["settings"]["learning_rate"]] == max(tuned.values()) and len(tuned) == 2
        assert final["seed"] == 1 and final["training"]["step"] == 2


@pytest.mark.slow
def test_results_are_those_of_the_records(finished):
    folder, printed = finished
    results = results_of(folder)
    rows = {row["method"]: row for row in results["rows"]}
    with (folder / "results.csv").open() as file:
        lines = {line["method"]: line for line in csv.DictReader(file)}
    assert list(lines) == [*rows, "(reference)", "(best possible)"]
    for method, row in rows.items():
        (path,) = (folder / "runs").glob(f"{method}-test-*.json")
        grades = json.loads(path.read_text())["grades"]
        assert {name: row[name] for name in grades} == {name: [value, None] for name, value in grades.items()}
        assert float(lines[method]["reward"]) == pytest.approx(grades["reward"], rel=1e-5)
    difference = rows["dpo"]["reward"][0] - rows["rainbowpo"]["reward"][0]
    assert rows["dpo"]["reward_over_rainbowpo"] == [pytest.approx(difference), None]
    assert results["reference"]["kl"] == 0 and results["best_reward"] > results["frontier"][-1][1]
    assert (folder / "comparison.png").stat().st_size > 10_000
    printed_rows = [line.split()[0] for line in printed.splitlines()]
    assert printed_rows[-5:-1] == ["(reference)", *rows, "(best"] and "KL on prompts of" in printed.splitlines()[-1]


@pytest.mark.slow
def test_what_is_finished_is_not_run_again(finished, tmp_path, monkeypatch):
    made = []
    carry_out = methods.Worker.carry_out
    monkeypatch.setattr(methods.Worker, "carry_out", lambda self, run: made.append(run.name) or carry_out(self, run))
    monkeypatch.setattr(methods, "train_policy", None)
    before = results_of(finished[0])
    start(finished[0], "--methods", *METHODS_RUN)
    assert made == [] and results_of(finished[0])["rows"] == before["rows"]
    start(finished[0], "--methods", "dpo", "--seeds", "2")
    assert [name.rpartition("-")[2] for name in made] == ["seed2"]
    assert results_of(finished[0])["rows"][0]["reward"][1] > 0
    start(finished[0], "--methods", *METHODS_RUN)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(finished, tmp_path):
    comparison = methods.make_comparison(methods.CompareArguments())
    runs = [run for method in METHODS_RUN for run in comparison.tuning_runs(method)[:1]]
    bar = methods.tqdm(total=len(runs), disable=True)
    given = comparison, finished[0] / "policy"
    with Crew(open_folder(str(tmp_path / "out"), {}), 2, methods.Worker, *given) as crew:
        records = crew.records(runs, bar)
    for run in runs:
        alone = json.loads((finished[0] / "runs" / f"{run.name}.json").read_text())
        assert records[run.name]["grades"] == pytest.approx(alone["grades"], rel=1e-6)


@pytest.mark.slow
def test_pairs_can_come_from_the_reference(finished, tmp_path):
    """Then both answers are samples of the model, which the base policy may find impossible."""
    comparison = methods.make_comparison(methods.CompareArguments(pairs_from="reference"))
    workshop = methods.Worker(comparison, finished[0] / "policy")
    rows, world = workshop.training_pairs(1), comparison.world
    tokenizer = world.tokenizer()
    begin = comparison.first_pair(1)
    prompts = torch.from_numpy(world.prompts(np.arange(begin, begin + 16)))
    numbers = (methods.uniform_numbers(1, f"{side} answer", 16, 6) for side in ("first", "second"))
    sides = [methods.sample_answers(workshop.reference, prompts, uniforms) for uniforms in numbers]
    for number, row in enumerate(rows):
        expected = {tokenizer.decode(side[number][side[number] != PAD_ID]) for side in sides}
        assert {row["chosen"].strip(), row["rejected"].strip()} == expected


@pytest.mark.slow
def test_another_world_is_refused(finished):
    with pytest.raises(ValueError, match="was made with world.length_bias=0.1, and now it is 0.5: name"):
        start(finished[0], "--methods", "dpo", "--length_bias", "0.5")


@pytest.mark.parametrize("method", methods.METHODS)
def test_settings_make_the_method(method, tmp_path):
    settings = methods.method_settings(method, strength=0.5, mean_tokens=5.0)
    config = RainbowPOConfig(str(tmp_path), **settings, bf16=False)
    components = config.components()
    square = 1 / 3 if config.link == "square" else 1
    assert config.beta == pytest.approx(0.5 * square / (1 if config.length_normalization else 5))
    if method in PRESETS:
        assert components.method == method
    else:
        changed = {"rainbowpo-no-ln": "LN", "rainbowpo-no-phi": "contextual scaling"}.get(method)
        assert changed is None or components.method.endswith(changed) or components.method in PRESETS
        full = RainbowPOConfig.from_preset("rainbowpo", output_dir=str(tmp_path), bf16=False)
        assert all(
            getattr(config, name) == value != getattr(full, name) for name, value in methods.ABLATIONS[method].items()
        )


def test_home_advantages_keep_their_meaning():
    assert methods.method_settings("simpo", 2.0, 5.0)["home_advantage"] == PRESETS["simpo"]["home_advantage"]
    assert methods.method_settings("rainbowpo-no-ln", 2.0, 5.0)["home_advantage"] == pytest.approx(0.1 * 5)
    for method, logit in (("odpo", 1.0), ("r-dpo", 0.1)):
        settings = methods.method_settings(method, 2.0, 5.0)
        assert settings["home_advantage"] * settings["beta"] == pytest.approx(logit)


def test_seeds_share_no_pairs_and_choices_are_not_judged_on_their_own_prompts():
    comparison = methods.make_comparison(methods.CompareArguments())
    runs = comparison.tuning_runs("dpo")
    final = comparison.final_runs(runs[1])
    assert {run.split for run in runs} == {"tune"} and {run.split for run in final} == {"test"}
    assert {run.seed for run in runs}.isdisjoint(run.seed for run in final)
    assert comparison.first_pair(1) - comparison.first_pair(0) >= comparison.scale.num_pairs
    assert (final[0].learning_rate, final[0].strength) == (runs[1].learning_rate, runs[1].strength)


def record(reward: float) -> dict:
    return {"grades": {"reward": reward, "kl": 1.0}, "settings": {"beta": 2.0}, "seconds": {"training": 3.0}}


def test_rows_choices_and_table_of_hand_made_records():
    runs = {(method, seed): methods.Run(method, 1e-3, 1.0, seed, "test") for method in METHODS_RUN for seed in (1, 2)}
    rewards = {("dpo", 1): 0.5, ("dpo", 2): 0.7, ("rainbowpo", 1): 0.9, ("rainbowpo", 2): 1.2}
    records = {run.name: record(rewards[key]) for key, run in runs.items()}
    final = {method: [runs[method, 1], runs[method, 2]] for method in METHODS_RUN}
    rows = methods.method_rows(METHODS_RUN, final, records)
    assert [row["method"] for row in rows] == ["rainbowpo", "dpo"]
    assert rows[1]["reward_over_rainbowpo"] == t_interval([0.5 - 0.9, 0.7 - 1.2])
    assert methods.choose(final["dpo"], records) is runs["dpo", 2]
    records[runs["dpo", 2].name] = {"error": "out of memory"}
    assert methods.choose(final["dpo"], records) is runs["dpo", 1]
    assert methods.choose([runs["dpo", 2]], records) is None
    failed = methods.method_rows(["dpo", "simpo"], final | {"simpo": []}, records)
    assert failed == [
        {"method": "dpo", "error": "out of memory"},
        {"method": "simpo", "error": "every run of its grid failed"},
    ]
    reference = {"reward": -0.25, "kl/0.9": 0.125}
    table = methods.comparison_table({"rows": rows, "reference": reference, "best_reward": 2.0})
    told = methods.comparison_table({"rows": failed, "reference": reference, "best_reward": 2.0})
    assert told.splitlines()[-1] == "simpo failed: every run of its grid failed"
    half = stats.t.ppf(0.975, 1) * np.std([0.9, 1.2], ddof=1) / math.sqrt(2)
    assert f"1.05 ± {half:.2f}" in table and "2.00" in table.splitlines()[-2]
    assert "0.9*" in table.splitlines()[1] and all(cell in table.splitlines()[3] for cell in ("-0.25", "0.12"))
