"""Verdicts are those of scipy's tests, the prediction is scikit-learn's, and a chain of runs goes on where it was."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from transformers import AutoModelForCausalLM

from hf_moe_cpt.reading import read_json
from hf_moe_cpt.scripts.replication import router_robustness as robustness
from hf_moe_cpt.scripts.replication.router_robustness import Evidence, judged
from hf_moe_cpt.scripts.replication.sweep import page_of
from hf_moe_cpt.trainers.common.router_balance import RouterBalance
from tests.helpers.source_tree import PROJECT
from tests.helpers.tiny_models import tiny_model


SCALE = robustness.SETTINGS["small"]
COMMITTED = PROJECT / "docs" / "benchmarks" / "router_small"


@pytest.mark.parametrize("seed", range(8))
def test_verdicts_are_those_of_t_tests(seed: int) -> None:
    values = np.random.default_rng(seed).normal(0.1 * (seed - 3), 0.3, size=3 + seed)
    test = stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(0.95)
    more = judged(values.tolist(), "more")
    assert (more["low"], more["high"]) == pytest.approx((low, high))
    assert (more["verdict"] == "confirmed") == (test.statistic > 0 and test.pvalue < 0.05)
    assert (judged(values.tolist(), "less")["verdict"] == "refuted") == (more["verdict"] == "confirmed")
    sides = (
        stats.ttest_1samp(values, -0.4, alternative="greater").pvalue,
        stats.ttest_1samp(values, 0.4, alternative="less").pvalue,
    )
    assert (judged(values.tolist(), "within", 0.4)["verdict"] == "confirmed") == (max(sides) < 0.05)


def test_what_is_undecided_says_how_many_seeds_would_decide_it() -> None:
    few = judged([0.4, -0.2, 0.3, 0.1], "more")
    assert few["verdict"] == "undecided" and 4 < few["seeds_needed"] < 20
    assert judged([0.2], "more")["verdict"] == judged([0.2, 0.2001], "more")["verdict"] == "undecided"
    assert judged([0.2, 0.2001], "more")["seeds_needed"] == 3 and judged([0.2] * 2 + [0.21], "more")["low"] > 0


def chain(model: str, draw: np.random.Generator) -> dict[str, dict]:
    """Records of a chain with made-up numbers; runs of "code" without replay and with 0.3 of it."""

    def record(*texts: str) -> dict:
        return {
            "loss": {text: draw.uniform(2, 3) for text in texts},
            "loss_before": {text: draw.uniform(2, 3) for text in texts},
            "tasks": {"continue_prose": draw.uniform(0, 1), "continue_code": draw.uniform(0, 1)},
            "tasks_before": {"continue_prose": draw.uniform(0, 1), "continue_code": draw.uniform(0, 1)},
            "mri": draw.uniform(0.2, 0.4, size=30).tolist(),
            "routing": {
                "mri": {text: [0.3, 0.3] for text in SCALE.texts},
                "load": {text: draw.dirichlet([1.0] * 4, size=2).tolist() for text in SCALE.texts},
                "saturation": draw.uniform(0.3, 0.9, size=2).tolist(),
            },
        }

    old, both = record("prose"), ("code", "prose")
    names = ("code-0", "code-0.3", "code-0.3-decayed", "code-0.3-drift", "code-union")
    return {"pretrained": old, "decayed": record("prose")} | {name: record(*both) for name in names}


def test_forgetting_is_predicted_for_architectures_that_were_left_out() -> None:
    draw = np.random.default_rng(1)
    seeds = [{model: chain(model, draw) for model in robustness.MODELS} for _ in range(3)]
    seeds.append({"pb-granular": chain("pb-granular", draw)})  # cut off: nothing is known of its other runs
    evidence = Evidence(SCALE, seeds[0], "code", seeds=seeds)
    x, y, groups = [], [], []
    for chains in seeds[:3]:
        one = Evidence(SCALE, chains, "code")
        rows = [(model, run) for model in robustness.MIXTURES for run in ("code-0", "code-0.3")]
        x += [one.features(*row) for row in rows]
        y += [one.forgets(*row) for row in rows]
        groups += [model for model, _ in rows]
    told = cross_val_predict(LinearRegression(), x, y, groups=groups, cv=LeaveOneGroupOut())
    y, told = np.array(y[:10]), told[:10]
    assert evidence.prediction() == pytest.approx(1 - np.mean((y - told) ** 2) / np.var(y))


def test_every_claim_has_a_number_and_lacks_one_without_its_models() -> None:
    draw = np.random.default_rng(2)
    chains = {model: {seed: chain(model, draw) for seed in range(3)} for model in robustness.MODELS}
    for by_seed in chains.values():
        for runs in by_seed.values():
            for record in runs.values():
                record |= {"parameters": 1, "active_parameters": 1, "steps": 30}
    results = robustness.summary(SCALE, chains, {}, {"commit": "abc"})
    assert [claim["claim"] for claim in results["claims"]] == list(robustness.CLAIMS) == list(robustness.MEASURES)
    told = robustness.results_text(results)
    assert all(claim["says"] in told for claim in results["claims"])
    some = robustness.summary(SCALE, {name: chains[name] for name in ("pb-granular", "dense")}, {}, {})
    alone = {"union_new", "union_old", "drift_replay", "forgetting", "forgetting_replay", "first_layers"}
    alone |= {"downstream", "downstream_replay", "spike", "decayed_start", "decayed_forgetting", "decayed_new"}
    assert {claim["claim"] for claim in some["claims"]} == alone
    later = replace(SCALE, shifts={**SCALE.shifts, "german": {"ratios": [0.0]}})  # a shift that nothing has begun
    told = robustness.summary(later, chains, {}, {})
    assert {row["shift"] for key in ("claims", "models") for row in told[key]} == {"code"}
    spike = next(claim for claim in results["claims"] if claim["claim"] == "free_balance")
    want = [
        Evidence(SCALE, {model: chains[model][seed] for model in chains}, "code").spike("lf-granular")
        - Evidence(SCALE, {model: chains[model][seed] for model in chains}, "code").spike("pb-granular")
        for seed in range(3)
    ]
    assert spike["values"] == want and spike["mean"] == pytest.approx(np.mean(want))


def test_the_penalty_of_a_micro_batch_sees_its_load_alone() -> None:
    """And the log that of the batch, also after a step has ended."""
    whole, seen = [torch.zeros(2)], []
    meter = SimpleNamespace(
        load=lambda over_ranks=True: whole[0], restart=lambda: whole.__setitem__(0, torch.zeros(2))
    )
    balance = SimpleNamespace(meter=meter, added_to=lambda loss, scale=1.0: seen.append(meter.load().tolist()))
    robustness.balance_over_micro_batches(SimpleNamespace(balance=balance))
    for loads in ([[3.0, 1.0], [2.0, 2.0], [0.0, 4.0]], [[1.0, 3.0], [4.0, 0.0]]):
        meter.restart()
        for load in loads:
            whole[0] = whole[0] + torch.tensor(load)
            balance.added_to(0.0, 1.0)
        assert seen == loads and meter.load().tolist() == torch.tensor(loads).sum(0).tolist()
        seen.clear()


def test_a_spike_is_over_the_highest_before_and_a_return_below_the_twin() -> None:
    draw = np.random.default_rng(3)
    chains = {model: chain(model, draw) for model in robustness.MODELS}
    chains["pb-granular"]["pretrained"]["mri"] = [0.2] * 30
    chains["pb-granular"]["code-0"]["mri"] = [0.4] * 5 + [0.15] * 55
    chains["sb-granular"]["code-0"]["mri"] = [0.2] * 60
    evidence = Evidence(SCALE, chains, "code")
    assert evidence.spike("pb-granular") == pytest.approx(1.0)
    # 20 steps of which 4 are 0.4 and 16 are 0.15 have a mean of 0.2; the mean is begun anew at the shift.
    assert evidence.steps_to_return("pb-granular", "sb-granular") == 20
    chains["sb-granular"]["code-0"]["mri"] = [0.1] * 60
    assert evidence.steps_to_return("pb-granular", "sb-granular") is None


def test_a_return_is_awaited_in_the_arm_that_is_long_enough() -> None:
    draw = np.random.default_rng(4)
    arm = {"long": ["pb-granular", "pb-switch", "sb-granular", "sb-switch"], "ratios": [0.0, 0.3]}
    chains = {model: chain(model, draw) for model in robustness.MODELS}
    for model in arm["long"]:
        chains[model]["code-0"]["mri"] = [0.3 if model.startswith("sb") else 0.4] * 60
        high = 300 if model == "pb-granular" else 0 if model.startswith("sb") else 520
        chains[model]["code-0-long"] = {"mri": [0.4] * high + [0.3 if model.startswith("sb") else 0.1] * (520 - high)}
    alone = Evidence(SCALE, chains, "code")
    assert robustness.MEASURES["return_steps"](alone) == np.inf and robustness.MEASURES["return"](alone) > 0
    evidence = Evidence(replace(SCALE, shifts={"code": arm}), chains, "code")
    steps = evidence.steps_to_return("pb-granular", "sb-granular")
    assert 300 < steps < 320 and evidence.steps_to_return("pb-switch", "sb-switch") is None
    assert robustness.MEASURES["return_steps"](evidence) == (steps + robustness.NEVER) / 2


def test_what_cannot_be_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for words, message in (
        ("--setting huge", "--setting 'huge' is unknown"),
        ("--methods granular", "--methods 'granular' is unknown"),
        ("--minutes -1", "--minutes -1: at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            robustness.main([*words.split(), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="--text is missing: name a folder with the folders english, code, german"):
        robustness.main(["--setting", "s", "--output_dir", str(tmp_path / "out")])
    for words, message in (
        ("--setting smollm2", "--base is missing: name the folder of a dense model"),
        ("--base somewhere", "--base is nothing that small reads: drop the folder"),
    ):
        with pytest.raises(ValueError, match=message):
            robustness.main([*words.split(), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", robustness.SETTINGS)
def test_every_model_is_balanced_as_its_setting_says(setting: str, tmp_path: Path) -> None:
    """What a trainer refuses is refused here, and not on the device that the run was meant for."""
    scale = robustness.SETTINGS[setting]
    worker = robustness.Worker(scale, tmp_path, "cpu")
    for model in robustness.MODELS:
        chain = robustness.Chain(model, 0, scale.texts[-1])
        args = worker._arguments(chain, tmp_path / model, 8, 0.0, robustness.WARMUP, None, False)
        config = robustness.config_of(model, vocab_size=64, num_hidden_layers=1)
        balance = RouterBalance(args, AutoModelForCausalLM.from_config(config), log_load=True)
        if model == "lf-granular":
            assert (balance.decision.way, balance.rate) == ("bias", scale.router_bias_update_rate)


def test_an_upcycled_start_stays_its_base_while_its_routers_drift(tmp_path: Path) -> None:
    """Rows of a group drift apart by 0.01 in thirty steps; near ones mix then, and the start was broken."""
    base = tiny_model("llama").eval()
    base.save_pretrained(tmp_path / "base")
    worker = robustness.Worker(robustness.SETTINGS["smollm2"], tmp_path, "cpu", str(tmp_path / "base"))
    made = worker._upcycled(robustness.Chain("pb-granular", 0, "german"))
    model = AutoModelForCausalLM.from_pretrained(made, dtype="float32").eval()
    tokens, draw = torch.arange(48).view(1, -1), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight += 0.01 * torch.randn(layer.mlp.gate.weight.shape, generator=draw)
        theirs = base(tokens).logits
        assert (model(tokens).logits - theirs).norm() < 0.002 * theirs.norm()


@pytest.mark.slow
def test_two_models_are_run_judged_and_not_run_again(tmp_path, monkeypatch, capsys) -> None:
    tiny = replace(SCALE, steps=24, decay_steps=4, continued_steps=22, characters=400_000)
    monkeypatch.setitem(robustness.SETTINGS, "small", tiny)
    monkeypatch.setattr(robustness, "TRACED_TOKENS", 1024)
    words = ["--methods", "pb-granular", "lf-granular", "--seeds", "1", "--workers", "1"]
    robustness.main([*words, "--output_dir", str(tmp_path / "out")])
    first = capsys.readouterr().out
    assert "the loss-free router spikes less" in first and not list((tmp_path / "out/work").iterdir())
    monkeypatch.setattr(robustness.Worker, "_run", None)  # nothing is trained again
    robustness.main([*words, "--output_dir", str(tmp_path / "out"), "--minutes", "0"])
    assert capsys.readouterr().out == first
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"results.json", "results.csv", "comparison.png"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_small_setting_says_nothing_against_the_committed_verdicts(tmp_path: Path, monkeypatch) -> None:
    """Text, machine and seeds differ, so a verdict may be open here or there; none may turn round. 15 minutes."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # of tests: a worker's kernels would be interpreted
    robustness.main(["--workers", "2", "--output_dir", str(tmp_path / "out")])
    told = [read_json(folder / "results.json")["claims"] for folder in (tmp_path / "out", COMMITTED)]
    ours, theirs = ({claim["claim"]: claim["verdict"] for claim in claims} for claims in told)
    assert ours.keys() == theirs.keys() == robustness.CLAIMS.keys() - {"downstream", "downstream_replay"}
    assert not [name for name in ours if {ours[name], theirs[name]} == {"confirmed", "refuted"}]
    assert sum(ours[name] == theirs[name] != "undecided" for name in ours) >= 3


@pytest.mark.parametrize("folder", sorted(PROJECT.glob("docs/benchmarks/router_[sm]*")), ids=lambda path: path.name)
def test_committed_pages_are_those_of_their_files(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(PROJECT)
    path = folder.relative_to(PROJECT)
    page = page_of(path, robustness.PROGRAM, robustness.GUIDE, robustness.results_text)
    assert (path / "README.md").read_text(encoding="utf-8") == page
    rows = (path / "results.csv").read_text().splitlines()
    assert len(rows) == 1 + len(json.loads((path / "results.json").read_text())["runs"])
