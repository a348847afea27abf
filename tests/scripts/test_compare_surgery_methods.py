"""The comparison in miniature, end to end: files, resuming, tuning, failures, refusals; and what its plan asks for."""

import csv
import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

from hf_moe_cpt.scripts import compare_surgery_methods, compare_surgery_run
from hf_moe_cpt.scripts.compare_surgery_methods import CompareArguments, choice_of, main, make_comparison
from hf_moe_cpt.scripts.compare_surgery_plan import (
    BEFORE,
    CHOSEN,
    METHODS,
    RETRAINED,
    SETTINGS,
    Comparison,
    Run,
    model_config,
)
from hf_moe_cpt.trainers.surgery.surgery_config import SurgeryConfig


TINY = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
MINIATURE = replace(
    SETTINGS["small"],
    subjects=3,
    forms=("quiz",),
    vocab_size=300,
    max_length=24,
    epochs=1,
    models={"llama": TINY, "cpt_moe": TINY | {"num_experts": 2, "num_experts_per_tok": 1, "num_shared_experts": 0}},
    seeds={"llama": 1, "cpt_moe": 1},
    steps=2,
    rows=1,
    eval_steps=1,
    eval_rows=4,
    learning_rates=(1e-3, 2e-3),
    strengths=(1.0,),
    max_questions=3,
    max_documents=2,
    relearn_steps=2,
    relearn_every=1,
)
RUN = ["safe", "descent-kl"]


@pytest.fixture(scope="module", autouse=True)
def miniature():
    """The small setting in two steps a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SETTINGS, "small", MINIATURE)
        yield


def start(folder: Path, *words: str) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed):
        main(["--output_dir", str(folder), "--workers", "1", "--architectures", "llama", *words])
    return printed.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A comparison of two methods, one seed, and what it printed."""
    folder = tmp_path_factory.mktemp("comparison") / "out"
    return folder, start(folder, "--methods", *RUN)


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_every_run_left_a_record_and_the_results_are_theirs(finished):
    folder, printed = finished
    records = {path.stem: json.loads(path.read_text()) for path in (folder / "runs").iterdir()}
    assert sorted(record["method"] for record in records.values()) == sorted([BEFORE, RETRAINED, *RUN])
    rate, strength = CHOSEN["small"]["llama"]["safe"]
    safe = records[f"llama-seed1-test-safe-lr{rate:g}-strength{strength:g}"]
    assert safe["training"]["forget_target"] == pytest.approx(safe["measures"]["ce/unseen"], rel=0.2)
    assert safe["relearn"]["steps"] == [0, 1, 2] and len(safe["relearn"]["taught"]) == 3
    results = results_of(folder)
    assert [row["method"] for row in results["rows"]] == [BEFORE, *RUN, RETRAINED]
    assert results["rows"][1]["accuracy/unlearn"] == [safe["measures"]["accuracy/unlearn"], None]
    with (folder / "results.csv").open() as file:
        lines = {line["method"]: line for line in csv.DictReader(file)}
    assert float(lines["safe"]["kl/retain"]) == pytest.approx(safe["measures"]["kl/retain"], rel=1e-5)
    assert (folder / "comparison.png").stat().st_size > 10_000
    assert "Targets for the method safe" in printed and "no ascent leaves old answers" in printed


@pytest.mark.slow
def test_measures_are_those_of_the_contract(finished):
    sets = ("unlearn", "obsolete", "update", "retain", "neighbour", "unseen")
    for row in results_of(finished[0])["runs"]:
        assert all(0 <= row[f"accuracy/{name}"] <= 1 and row[f"ce/{name}"] > 0 for name in sets)
        assert row["gauge"] == pytest.approx(row["ce/unlearn"] - row["ce/unseen"])
        assert (row["kl/retain"] == pytest.approx(0, abs=1e-6)) == (row["method"] == BEFORE)
        assert ("relearn_steps" in row) == (row["method"] != BEFORE) and row["seconds"] > 0


@pytest.mark.slow
def test_what_is_finished_is_not_run_again(finished, monkeypatch):
    made = []
    carry_out = compare_surgery_run.Workshop.carry_out
    monkeypatch.setattr(
        compare_surgery_run.Workshop, "carry_out", lambda self, run: made.append(run) or carry_out(self, run)
    )
    before = results_of(finished[0])
    start(finished[0], "--methods", *RUN)
    assert made == [] and results_of(finished[0])["rows"] == before["rows"]
    start(finished[0], "--methods", "safe", "--seeds", "2")
    assert [(run.method, run.seed) for run in made] == [(BEFORE, 2), (RETRAINED, 2), ("safe", 2)]
    assert results_of(finished[0])["rows"][1]["seeds"] == 2
    start(finished[0], "--methods", *RUN)


@pytest.mark.slow
def test_grids_choose_by_validation_questions_of_another_world(finished):
    printed = start(finished[0], "--methods", "descent-kl", "--tune")
    results = results_of(finished[0])
    scores = {point["learning_rate"]: point["score"] for point in results["tuning"]}
    assert set(scores) == {1e-3, 2e-3} and "descent-kl" in printed
    row = next(row for row in results["rows"] if row["method"] == "descent-kl")
    assert scores[row["learning_rate"]] == max(scores.values())
    tuned = [json.loads(path.read_text()) for path in (finished[0] / "runs").glob("*validation*")]
    assert {(record["seed"], record["split"]) for record in tuned} == {(0, "validation")}
    assert all("accuracy/unlearn" in record["measures"] and "ce/unlearn" not in record["measures"] for record in tuned)
    start(finished[0], "--methods", *RUN)


def test_choice_takes_the_largest_score_and_refuses_a_grid_that_failed():
    comparison = make_comparison(CompareArguments())
    grid = comparison.tuning_runs("llama", "paper")
    records = {run.name: {"score": 0.1} for run in grid} | {grid[1].name: {"score": 0.2}}
    assert choice_of(comparison, "llama", "paper", grid, records) == (grid[1].learning_rate, grid[1].strength)
    assert choice_of(comparison, "llama", "paper", [], {}) == CHOSEN["small"]["llama"]["paper"]
    with pytest.raises(ValueError, match="every run of the grid of paper on llama failed, the first with: no memory"):
        choice_of(comparison, "llama", "paper", grid, {run.name: {"error": "no memory"} for run in grid})


@pytest.mark.slow
def test_failed_run_is_reported_and_tried_again(finished, tmp_path, monkeypatch):
    def fail(self, run):
        if run.method == "safe":
            raise FloatingPointError("the loss of step 1\nis not a number")
        return json.loads(next((finished[0] / "runs").glob(f"*test-{run.method}*")).read_text())

    monkeypatch.setattr(compare_surgery_run.Workshop, "carry_out", fail)
    printed = start(tmp_path / "out", "--methods", *RUN)
    assert printed.splitlines()[-1].endswith("failed: FloatingPointError: the loss of step 1 is not a number")
    assert not list((tmp_path / "out/runs").glob("*safe*"))
    assert "safe" not in [row["method"] for row in results_of(tmp_path / "out")["rows"]]


@pytest.mark.slow
def test_other_settings_and_foreign_folders_are_refused(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, "small", replace(MINIATURE, steps=3))
    with pytest.raises(ValueError, match="holds a comparison with steps=2, and now it is 3: name"):
        start(finished[0], "--methods", "safe")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and no comparison wrote it: name another folder"):
        start(tmp_path, "--methods", "safe")


REFUSED = {
    "setting": (("--setting", "huge"), "--setting 'huge' is unknown: choose from small, gpu"),
    "method": (("--methods", "safe", "rmu"), "--methods 'rmu' is unknown: choose from paper, safe"),
    "architecture": (("--architectures", "rnn"), "--architectures 'rnn' is unknown: choose from llama, cpt_moe"),
    "seeds": (("--seeds", "0"), "--seeds 0: every method needs at least one final run"),
    "workers": (("--workers", "0"), "--workers 0: at least one process"),
    "device": (("--device", "abacus"), "--device 'abacus' is unknown: choose one of auto, cpu, cuda"),
}


@pytest.mark.parametrize("words, message", REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused_with_one_line_before_anything_is_written(tmp_path, words, message):
    with pytest.raises(ValueError, match=message) as caught:
        start(tmp_path / "out", *words)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", ["small", "gpu"])
@pytest.mark.parametrize("method", METHODS)
def test_settings_make_the_method(setting, method, tmp_path):
    comparison = Comparison(setting, SETTINGS[setting], "cpu")
    run = Run(method, "llama", 1, learning_rate=1e-3, strength=3.0)
    config = SurgeryConfig(output_dir=str(tmp_path), use_cpu=True, **comparison.surgery_settings(run))
    preset = SurgeryConfig.from_preset(METHODS[method].preset, output_dir=str(tmp_path), use_cpu=True)
    assert config.learning_rate == (3e-3 if method == "ascent-only" else 1e-3)
    assert config.max_steps == SETTINGS[setting].steps and config.update_batch_size == SETTINGS[setting].rows
    expected = dict(preset.weights) | {
        "paper": {"unlearn": 0.3, "obsolete": 0.3},
        "safe": {name: 3 * preset.weights[name] for name in ("unlearn", "obsolete")},
        "descent-kl": {"unlearn": 0, "obsolete": 0, "retain": 1.5},
        "ascent-only": {"update": 0, "retain": 0},
        "npo-retain": {"unlearn": 0.3, "obsolete": 0.3},
    }.get(method, {})
    assert config.weights == pytest.approx(expected)
    assert config.forget_loss == {"safe": preset.forget_loss, "npo-retain": "npo"}.get(method, "ga")
    assert (config.max_grad_norm, config.adam_beta2) == (preset.max_grad_norm, preset.adam_beta2)


def test_budgets_are_equal_and_no_choice_has_seen_a_final_world():
    comparison = make_comparison(CompareArguments(seeds=3))
    grids = {method: comparison.tuning_runs("llama", method) for method in METHODS}
    assert len({len(grid) for grid in grids.values()}) == 1
    final = comparison.final_runs("llama", "safe", 1e-3, 3.0)
    assert {run.seed for run in grids["safe"]} == {0} and [run.seed for run in final] == [1, 2, 3]
    assert {run.split for run in grids["safe"]} == {"validation"} and {run.split for run in final} == {"test"}
    assert all(set(CHOSEN[name][architecture]) == set(METHODS) for name in SETTINGS for architecture in CHOSEN[name])


def test_models_of_the_gpu_setting_have_100_million_parameters():
    comparison = Comparison("gpu", SETTINGS["gpu"], "cuda")
    for architecture in compare_surgery_methods.ARCHITECTURES:
        config = model_config(comparison, architecture, SETTINGS["gpu"].vocab_size)
        with compare_surgery_run.torch.device("meta"):
            model = compare_surgery_run.AutoModelForCausalLM.from_config(config)
        assert 100e6 < sum(parameter.numel() for parameter in model.parameters()) < 250e6
