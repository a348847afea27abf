"""The comparison in miniature, end to end: its files, resuming, failures and refusals; and what its plan asks for."""

import csv
import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_moe_cpt.data.preference_world import PAD_ID
from hf_moe_cpt.scripts import compare_preference_methods, compare_preference_run
from hf_moe_cpt.scripts.compare_preference_methods import CompareArguments, Crew, main, make_comparison
from hf_moe_cpt.scripts.compare_preference_plan import (
    ABLATIONS,
    METHODS,
    POLICY_STEPS,
    SETTINGS,
    Scale,
    method_settings,
)
from hf_moe_cpt.scripts.compare_preference_policy import sample_answers, uniform_numbers
from hf_moe_cpt.trainers.rainbowpo.presets import PRESETS
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig


MINIATURE = Scale(16, 1, 8, (1e-3, 3e-3), (1.0,), 1, 2, 3, 64, 40, max_tokens=6)
METHODS_RUN = ["dpo", "rainbowpo"]


@pytest.fixture(scope="module", autouse=True)
def miniature():
    """The small setting in two steps a run, the policy in three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SETTINGS, "small", MINIATURE)
        patch.setitem(POLICY_STEPS, "small", 3)
        yield


def start(folder: Path, *words: str) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed):
        main(["--output_dir", str(folder), "--workers", "1", *words])
    return printed.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A comparison of two methods, one seed, and what it printed."""
    folder = tmp_path_factory.mktemp("comparison") / "out"
    return folder, start(folder, "--methods", *METHODS_RUN)


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_every_run_left_a_record_and_the_best_of_the_grid_was_run_again(finished):
    records = {path.stem: json.loads(path.read_text()) for path in (finished[0] / "runs").iterdir()}
    assert len(records) == 2 * (2 + 1)
    for method in METHODS_RUN:
        of_method = [record for record in records.values() if record["method"] == method]
        tuned = {r["settings"]["learning_rate"]: r["grades"]["reward"] for r in of_method if r["split"] == "tune"}
        (final,) = [record for record in of_method if record["split"] == "test"]
        assert tuned[final["settings"]["learning_rate"]] == max(tuned.values()) and len(tuned) == 2
        assert final["seed"] == 1 and final["training"]["step"] == 2


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


def test_what_is_finished_is_not_run_again(finished, tmp_path, monkeypatch):
    made = []
    carry_out = compare_preference_run.Workshop.carry_out
    monkeypatch.setattr(
        compare_preference_run.Workshop, "carry_out", lambda self, run: made.append(run.name) or carry_out(self, run)
    )
    monkeypatch.setattr(compare_preference_methods, "train_policy", None)
    before = results_of(finished[0])
    start(finished[0], "--methods", *METHODS_RUN)
    assert made == [] and results_of(finished[0])["rows"] == before["rows"]
    start(finished[0], "--methods", "dpo", "--seeds", "2")
    assert [name.rpartition("-")[2] for name in made] == ["seed2"]
    assert results_of(finished[0])["rows"][0]["reward"][1] > 0
    start(finished[0], "--methods", *METHODS_RUN)


@pytest.mark.slow
def test_killed_comparison_goes_on_and_gives_the_same_numbers(finished, tmp_path, monkeypatch):
    keep, kept = compare_preference_methods.ComparisonFolder.keep, []

    def die_at_fourth(self, run, record):
        if len(kept) == 3:
            raise KeyboardInterrupt
        kept.append(run.name)
        keep(self, run, record)

    with monkeypatch.context() as patch:
        patch.setattr(compare_preference_methods.ComparisonFolder, "keep", die_at_fourth)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "out", "--methods", *METHODS_RUN)
    assert not (tmp_path / "out/results.json").exists()
    start(tmp_path / "out", "--methods", *METHODS_RUN)

    def without_clocks(results):
        return [{**row, "seconds": None} for row in results["rows"]]

    assert without_clocks(results_of(tmp_path / "out")) == without_clocks(results_of(finished[0]))


@pytest.mark.slow
def test_two_processes_give_what_one_gives(finished):
    comparison = make_comparison(CompareArguments())
    folder = compare_preference_methods.ComparisonFolder(finished[0])
    runs = [run for method in METHODS_RUN for run in comparison.tuning_runs(method)[:1]]

    class Elsewhere:
        policy = folder.policy
        record = staticmethod(lambda run: None)
        keep = staticmethod(lambda run, record: None)

    bar = compare_preference_methods.tqdm(total=len(runs), disable=True)
    with Crew(comparison, Elsewhere(), workers=2) as crew:
        records = crew.records(runs, bar)
    for run in runs:
        assert records[run.name]["grades"] == pytest.approx(folder.record(run)["grades"], rel=1e-6)


def test_failed_run_is_reported_and_tried_again(finished, tmp_path, monkeypatch):
    def fail(self, run):
        if run.method == "rainbowpo":
            raise RuntimeError("the loss of step 1\nis not a number")
        return json.loads(next((finished[0] / "runs").glob(f"{run.method}-{run.split}-*")).read_text())

    monkeypatch.setattr(compare_preference_run.Workshop, "carry_out", fail)
    printed = start(tmp_path / "out", "--methods", *METHODS_RUN)
    assert printed.splitlines()[-1] == "rainbowpo failed: every run of its grid failed"
    assert not list((tmp_path / "out/runs").glob("rainbowpo*"))
    assert [row["method"] for row in results_of(tmp_path / "out")["rows"]] == METHODS_RUN


def test_pairs_can_come_from_the_reference(finished, tmp_path):
    """Then both answers are samples of the model, which the base policy may find impossible."""
    comparison = make_comparison(CompareArguments(pairs_from="reference"))
    workshop = compare_preference_run.Workshop(comparison, finished[0] / "policy")
    rows, world = workshop.training_pairs(1), comparison.world
    tokenizer = world.tokenizer()
    begin = comparison.first_pair(1)
    prompts = torch.from_numpy(world.prompts(np.arange(begin, begin + 16)))
    numbers = (uniform_numbers(1, f"{side} answer", 16, 6) for side in ("first", "second"))
    sides = [sample_answers(workshop.reference, prompts, uniforms) for uniforms in numbers]
    for number, row in enumerate(rows):
        expected = {tokenizer.decode(side[number][side[number] != PAD_ID]) for side in sides}
        assert {row["chosen"].strip(), row["rejected"].strip()} == expected


def test_other_settings_and_foreign_folders_are_refused(finished, tmp_path):
    with pytest.raises(ValueError, match="holds a comparison with world.length_bias=0.1, and now it is 0.5: name"):
        start(finished[0], "--methods", "dpo", "--length_bias", "0.5")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and no comparison wrote it: name another folder"):
        start(tmp_path, "--methods", "dpo")


REFUSED = {
    "setting": (("--setting", "huge"), "--setting 'huge' is unknown: choose one of small, normal"),
    "method": (("--methods", "dpo", "ppo"), "--methods 'ppo' is unknown: choose from rainbowpo, dpo"),
    "seeds": (("--seeds", "0"), "--seeds 0: every method needs at least one final run"),
    "workers": (("--workers", "0"), "--workers 0: at least one process"),
    "pairs": (("--pairs_from", "people"), "--pairs_from 'people' is unknown: choose one of base, reference"),
    "architecture": (("--architecture", "rnn"), "--architecture 'rnn' is unknown: choose one of llama, cpt_moe"),
    "ambiguity": (("--ambiguity", "2"), r"ambiguity_levels=\(0.0, 2.0\) must hold"),
}


@pytest.mark.parametrize("words, message", REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused_with_one_line_before_anything_is_written(tmp_path, words, message):
    with pytest.raises(ValueError, match=message) as caught:
        start(tmp_path / "out", *words)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_config_file(tmp_path):
    (tmp_path / "run.yaml").write_text("setting: tiny\n")
    with pytest.raises(ValueError, match="--setting 'tiny' is unknown"):
        start(tmp_path / "out", "--config", str(tmp_path / "run.yaml"))


@pytest.mark.parametrize("method", METHODS)
def test_settings_make_the_method(method, tmp_path):
    settings = method_settings(method, strength=0.5, mean_tokens=5.0)
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
        assert all(getattr(config, name) == value != getattr(full, name) for name, value in ABLATIONS[method].items())


def test_home_advantages_keep_their_meaning():
    assert method_settings("simpo", 2.0, 5.0)["home_advantage"] == PRESETS["simpo"].settings["home_advantage"]
    assert method_settings("rainbowpo-no-ln", 2.0, 5.0)["home_advantage"] == pytest.approx(0.1 * 5)
    for method, logit in (("odpo", 1.0), ("r-dpo", 0.1)):
        settings = method_settings(method, 2.0, 5.0)
        assert settings["home_advantage"] * settings["beta"] == pytest.approx(logit)


def test_seeds_share_no_pairs_and_choices_are_not_judged_on_their_own_prompts():
    comparison = make_comparison(CompareArguments())
    runs = comparison.tuning_runs("dpo")
    final = comparison.final_runs(runs[1])
    assert {run.split for run in runs} == {"tune"} and {run.split for run in final} == {"test"}
    assert {run.seed for run in runs}.isdisjoint(run.seed for run in final)
    assert comparison.first_pair(1) - comparison.first_pair(0) >= comparison.scale.num_pairs
    assert (final[0].learning_rate, final[0].strength) == (runs[1].learning_rate, runs[1].strength)


def test_scale_says_how_long_a_run_is():
    assert replace(MINIATURE, num_pairs=100, epochs=3, batch_size=8).steps == 3 * 12
