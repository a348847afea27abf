"""The comparison of surgery methods: numbers of raw measurements made by hand, the whole in miniature, what its plan
asks for, what the models of a cell read; rows, claims, targets and the text of records made by hand."""

import csv
import io
import json
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from hf_moe_cpt.data.python_corpus import train_byte_level_bpe
from hf_moe_cpt.data.surgery_bench import BEFORE_SETS, RETRAINED_SETS, SETS
from hf_moe_cpt.scripts.replication import surgery_methods as methods
from hf_moe_cpt.trainers.surgery.surgery_config import SurgeryConfig


def asked(*questions: tuple[list[float], list[int], int, int | None]) -> dict:
    names = ("logp", "tokens", "answer", "old_answer")
    return dict(zip(names, map(list, zip(*questions, strict=True)), strict=True))


# the true option is 0
PLAIN = asked(([-1.0, -2.0, -3.0], [1, 1, 1], 0, None), ([-2.0, -1.0, -3.0], [1, 1, 1], 0, None))
UPDATED = asked(
    ([-4.0, -3.0, -2.0], [4, 2, 1], 0, None),
    ([-1.0, -2.0, -9.0], [1, 1, 1], 0, 1),
    ([-2.0, -1.0, -9.0], [1, 1, 1], 0, 1),
    ([-2.0, -3.0, -1.0], [1, 1, 1], 0, 1),
)


def test_measures_of_answers_texts_and_divergences():
    """Accuracies are of questions, losses weigh texts alike and divergences tokens."""
    raw = {
        "questions": {"unlearn": {"mcq": PLAIN, "paraphrase": PLAIN}, "update": {"mcq": UPDATED}},
        "texts": {"unlearn": {"logp": [[-4.0], [-1.0, -3.0]]}, "unseen": {"logp": [[-2.0, -2.0]]}},
        "divergence": {"retain": {"kl": [[0.3], [0.0, 0.0]], "agrees": [[False], [True, True]]}},
    }
    expected = {"accuracy/unlearn": 1 / 2, "accuracy/unlearn_paraphrase": 1 / 2, "accuracy/update": 2 / 4}
    expected |= {"accuracy/changed": 1 / 3, "old_answers": 1 / 3, "ce/unlearn": 3.0, "ce/unseen": 2.0, "gauge": 1.0}
    assert methods.measures_of(raw) == pytest.approx(expected | {"kl/retain": 0.1, "agreement/retain": 2 / 3})
    relearnt = {"steps": [0, 5, 10], "taught": [{"right": [0.0, 0.5]}, {"right": [1.0, 0.0]}, {"right": [1.0, 1.0]}]}
    assert methods.curve_of(relearnt) == {"steps": [0, 5, 10], "taught": [0.25, 0.5, 1.0]}


def test_score_is_the_harmonic_mean_of_forgotten_learnt_and_kept():
    measures = {"accuracy/unlearn": 0.2, "accuracy/unseen": 0.4, "accuracy/update": 0.5, "accuracy/retain": 1.0}
    assert methods.tuning_criterion(measures) == pytest.approx(3 / (1 / 0.8 + 1 / 0.5 + 1))
    assert methods.tuning_criterion(measures | {"accuracy/update": 0.0}) == 0.0


TINY = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
MINIATURE = replace(
    methods.SETTINGS["small"],
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
        patch.setitem(methods.SETTINGS, "small", MINIATURE)
        yield


def start(folder: Path, *words: str) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed):
        methods.main(["--output_dir", str(folder), "--workers", "1", "--architectures", "llama", *words])
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
    assert sorted(record["method"] for record in records.values()) == sorted([methods.BEFORE, methods.RETRAINED, *RUN])
    rate, strength = methods.CHOSEN["small"]["llama"]["safe"]
    safe = records[f"llama-seed1-test-safe-lr{rate:g}-strength{strength:g}"]
    assert safe["training"]["forget_target"] == pytest.approx(safe["measures"]["ce/unseen"], rel=0.2)
    assert safe["relearn"]["steps"] == [0, 1, 2] and len(safe["relearn"]["taught"]) == 3
    results = results_of(folder)
    assert [row["method"] for row in results["rows"]] == [methods.BEFORE, *RUN, methods.RETRAINED]
    assert results["rows"][1]["accuracy/unlearn"] == [safe["measures"]["accuracy/unlearn"], None]
    with (folder / "results.csv").open() as file:
        lines = {line["method"]: line for line in csv.DictReader(file)}
    assert float(lines["safe"]["kl/retain"]) == pytest.approx(safe["measures"]["kl/retain"], rel=1e-5)
    assert (folder / "comparison.png").stat().st_size > 10_000
    assert "Targets for the method safe" in printed and "no ascent leaves old answers" in printed
    for row in results["runs"]:
        assert all(0 <= row[f"accuracy/{name}"] <= 1 and row[f"ce/{name}"] > 0 for name in SETS)
        assert row["gauge"] == pytest.approx(row["ce/unlearn"] - row["ce/unseen"])
        assert (row["kl/retain"] == pytest.approx(0, abs=1e-6)) == (row["method"] == methods.BEFORE)
        assert ("relearn_steps" in row) == (row["method"] != methods.BEFORE) and row["seconds"] > 0


@pytest.mark.slow
def test_grids_choose_by_validation_questions_of_another_world(finished):
    printed = start(finished[0], "--methods", "descent-kl", "--tune")
    results = results_of(finished[0])
    scores = {point["learning_rate"]: point["criterion"] for point in results["tuning"]}
    assert set(scores) == {1e-3, 2e-3} and "descent-kl" in printed
    row = next(row for row in results["rows"] if row["method"] == "descent-kl")
    assert scores[row["learning_rate"]] == max(scores.values())
    tuned = [json.loads(path.read_text()) for path in (finished[0] / "runs").glob("*validation*")]
    assert {(record["seed"], record["split"]) for record in tuned} == {(0, "validation")}
    assert all("accuracy/unlearn" in record["measures"] and "ce/unlearn" not in record["measures"] for record in tuned)
    start(finished[0], "--methods", *RUN)


def test_choice_takes_the_largest_score_and_refuses_a_grid_that_failed():
    comparison = methods.make_comparison(methods.CompareArguments())
    grid = comparison.tuning_runs("llama", "paper")
    records = {run.name: {"criterion": 0.1} for run in grid} | {grid[1].name: {"criterion": 0.2}}
    assert methods.choice_of(comparison, "llama", "paper", grid, records) == (grid[1].learning_rate, grid[1].strength)
    assert methods.choice_of(comparison, "llama", "paper", [], {}) == methods.CHOSEN["small"]["llama"]["paper"]
    with pytest.raises(ValueError, match="every run of the grid of paper on llama failed, the first with: no memory"):
        methods.choice_of(comparison, "llama", "paper", grid, {run.name: {"error": "no memory"} for run in grid})


@pytest.mark.parametrize("setting, method", zip(["small", "gpu"] * 3, methods.METHODS, strict=False))
def test_settings_make_the_method(setting, method, tmp_path):
    comparison = methods.Comparison(setting, methods.SETTINGS[setting], "cpu")
    run = methods.Run(method, "llama", 1, learning_rate=1e-3, strength=3.0)
    config = SurgeryConfig(output_dir=str(tmp_path), use_cpu=True, **comparison.surgery_settings(run))
    preset = SurgeryConfig.from_preset(methods.METHODS[method].preset, output_dir=str(tmp_path), use_cpu=True)
    assert config.learning_rate == (3e-3 if method == "ascent-only" else 1e-3)
    scale = comparison.scale
    assert (config.max_steps, config.update_batch_size) == (scale.steps, scale.rows)
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
    comparison = methods.make_comparison(methods.CompareArguments(seeds=3))
    grids = {method: comparison.tuning_runs("llama", method) for method in methods.METHODS}
    assert len({len(grid) for grid in grids.values()}) == 1
    final = comparison.final_runs("llama", "safe", 1e-3, 3.0)
    assert {run.seed for run in grids["safe"]} == {0} and [run.seed for run in final] == [1, 2, 3]
    assert {run.split for run in grids["safe"]} == {"validation"} and {run.split for run in final} == {"test"}
    assert all(
        set(methods.CHOSEN[name][architecture]) == set(methods.METHODS)
        for name in methods.SETTINGS
        for architecture in methods.CHOSEN[name]
    )


def test_models_of_the_gpu_setting_have_100_million_parameters():
    comparison = methods.Comparison("gpu", methods.SETTINGS["gpu"], "cuda")
    for architecture in methods.ARCHITECTURES:
        config = methods.model_config(comparison, architecture, methods.SETTINGS["gpu"].vocab_size)
        with torch.device("meta"):
            model = methods.AutoModelForCausalLM.from_config(config)
        assert 100e6 < sum(parameter.numel() for parameter in model.parameters()) < 250e6


READ = replace(MINIATURE, vocab_size=320, max_length=32, batch_size=16)


def test_every_row_is_read_in_every_epoch_and_real_text_once():
    scale = replace(READ, epochs=3, batch_size=4)
    rows = [[place] * (2 + place % 5) for place in range(10)]
    real = [[100 + place] * 3 for place in range(7)]
    batches = list(methods.reading_order(rows, real, scale, seed=1))
    read = Counter(row[0] for batch in batches for row in batch)
    assert read == Counter({place: 3 for place in range(10)} | {100 + place: 1 for place in range(7)})
    assert max(map(len, batches)) == 4 and batches != list(methods.reading_order(rows, real, scale, seed=2))
    assert list(methods.reading_order(rows, [], scale, seed=1)) == list(methods.reading_order(rows, [], scale, seed=1))


def test_texts_become_rows_with_an_end_and_batches_with_masked_padding():
    tokenizer = train_byte_level_bpe(["abcdefgh"], 258, progress=False)
    rows = methods.token_rows(tokenizer, ["abcde", "abc"], max_length=4)
    letters = tokenizer("abcde")["input_ids"]
    assert rows == [letters[:4], [letters[4], 0], [*letters[:3], 0]]
    assert methods.token_rows(tokenizer, ["abcd"], max_length=4) == [letters[:4]]  # the end alone teaches nothing
    batch = methods.padded([[5, 6, 7], [8, 0]], torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, 0, -100]]


def test_rate_goes_up_and_down():
    shares = [methods.rate_share(step, 100) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and max(shares) == shares[10] == 1.0
    assert shares[-1] == 0.02 and shares[55] == pytest.approx(0.5)


def test_hubs_can_be_left_out():
    bench = methods.make_bench(READ, seed=1)
    assert set(bench.documents["retain"]["subject_kind"]) == {"person"} and len(bench.documents["retain"]) == 3
    assert set(bench.ask("retain")["subject_kind"]) == {"person"} and len(bench.ask("retain", kind="mcq")) == 24
    assert "city" in methods.make_bench(replace(READ, keep_hubs=True), seed=1).documents["retain"]["subject_kind"]


def test_training_can_be_repeated_and_reads_the_sets_of_each_model(tmp_path, monkeypatch):
    material = methods.make_material(READ, 1, tmp_path)
    comparison = methods.Comparison("small", READ, "cpu")
    read = {methods.RETRAINED: [], methods.BEFORE: []}
    models, padded = {}, methods.padded
    for name, rows_read in read.items():
        monkeypatch.setattr(
            methods, "padded", lambda rows, device, into=rows_read: into.extend(rows) or padded(rows, device)
        )
        models[name] = methods.train_model(comparison, methods.Run(name, "cpt_moe", 1), material)
    for name, sets in ((methods.RETRAINED, RETRAINED_SETS), (methods.BEFORE, BEFORE_SETS)):
        assert sorted(read[name]) == sorted(row for of_set in sets for row in _rows_of(material, of_set))
    again = methods.train_model(comparison, methods.Run(methods.BEFORE, "cpt_moe", 1), material)
    for (name, weight), other in zip(models[methods.BEFORE].named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, other), name
    assert not torch.equal(models[methods.BEFORE].lm_head.weight, models[methods.RETRAINED].lm_head.weight)


def _rows_of(material, name: str) -> list[list[int]]:
    return methods.token_rows(material.tokenizer, list(material.bench.documents[name]["text"]), READ.max_length)


def test_real_text_is_kept_beside_the_retain_set(tmp_path, monkeypatch):
    assert methods.make_material(READ, 1, tmp_path).retained() is not None
    rows = [{"text": f"real text number {place}"} for place in range(3)]
    table = methods.datasets.Dataset.from_list(rows)
    monkeypatch.setattr(
        methods,
        "build_python_corpus",
        lambda **options: {"prose": {"train": table, "held_out": table}} if options["cache_dir"] == tmp_path else None,
    )
    material = methods.make_material(replace(READ, real_characters=100), 1, tmp_path)
    retained = material.retained()
    assert list(retained["text"])[-3:] == [row["text"] for row in rows] and len(retained) == 6


# accuracies of the sets in this order, CE unlearn, CE unseen, KL retain, accuracy of taught subjects at 0, 5, 10 steps
MODELS = {
    methods.BEFORE: ((0.90, 0.85, 0.25, 0.90, 0.85, 0.35), 0.1, 2.0, 0.0, None),
    methods.RETRAINED: ((0.30, 0.30, 0.85, 0.88, 0.85, 0.35), 2.1, 2.0, 0.1, (0.30, 0.50, 0.75)),
    "safe": ((0.31, 0.30, 0.83, 0.895, 0.85, 0.35), 2.1, 2.0, 0.02, (0.31, 0.70, 0.80)),
    "paper": ((0.20, 0.25, 0.85, 0.80, 0.60, 0.35), 6.0, 3.0, 0.2, (0.20, 0.60, 0.85)),
    "descent-kl": ((0.70, 0.45, 0.84, 0.89, 0.80, 0.35), 0.4, 2.1, 0.03, (0.70, 0.80, 0.90)),
    "ascent-only": ((0.30, 0.30, 0.33, 0.30, 0.30, 0.30), 30.0, 29.0, 20.0, (0.30, 0.40, 0.50)),
    "npo-retain": ((0.50, 0.45, 0.82, 0.88, 0.80, 0.35), 0.9, 2.2, 0.04, (0.50, 0.60, 0.70)),
}


def record(method: str, seed: int, architecture: str = "llama", **changes: float) -> dict:
    accuracies, unlearn, unseen, kl, taught = MODELS[method]
    measures = {f"accuracy/{name}": value for name, value in zip(SETS, accuracies, strict=True)}
    measures |= {"ce/unlearn": unlearn, "ce/unseen": unseen, "gauge": unlearn - unseen, "kl/retain": kl}
    measures |= {"kl/neighbour": 2 * kl} | changes
    made = {"method": method, "architecture": architecture, "seed": seed, "learning_rate": 1e-3, "strength": 3.0}
    made |= {"measures": measures, "seconds": {"training": 10.0 + seed}}
    return made | ({"relearn": {"steps": [0, 5, 10], "taught": list(taught)}} if taught else {})


def all_records(*seeds: int) -> list[dict]:
    return [record(method, seed) for seed in seeds for method in MODELS]


def test_rows_hold_means_and_intervals_and_steps_of_relearning():
    records = all_records(1, 2)
    records[3]["measures"]["accuracy/unlearn"] = 0.30  # paper, seed 1
    results = methods.conclude(records, [])
    assert [row["method"] for row in results["rows"]] == [methods.BEFORE, *methods.METHODS, methods.RETRAINED]
    rows = {row["method"]: row for row in results["rows"]}
    half = stats.t.ppf(0.975, 1) * np.std([0.3, 0.2], ddof=1) / np.sqrt(2)
    assert rows["paper"]["accuracy/unlearn"] == pytest.approx((0.25, half))
    assert rows["paper"]["seconds"].mean == 11.5 and rows["paper"]["learning_rate"] == 1e-3
    goal = (1 / 3 + 0.9) / 2  # between chance and the model before
    assert rows["safe"]["relearn_steps"].mean == pytest.approx(5 * (goal - 0.31) / (0.70 - 0.31))
    assert rows["ascent-only"]["relearn_steps"].mean == 10 and rows["descent-kl"]["relearn_steps"].mean == 0
    assert "relearn_steps" not in rows[methods.BEFORE] and "learning_rate" not in rows[methods.RETRAINED]


def test_claims_are_confirmed_refuted_or_mixed():
    verdicts = {row["claim"]: row["verdict"] for row in methods.claims_of("llama", all_records(1, 2))}
    assert list(verdicts) == [claim.text for claim in methods.CLAIMS] and set(verdicts.values()) == {"confirmed"}
    changes = (
        ("paper", 0, {"ce/unlearn": 3.9}),
        ("ascent-only", 1, {"ce/unlearn": 3.9}),
        ("npo-retain", 2, {"ce/unlearn": 4.1}),
        ("safe", 3, {"accuracy/update": 0.79}),
        ("descent-kl", 4, {"accuracy/obsolete": 0.39}),
    )
    for method, place, change in changes:
        changed = [r | {"measures": r["measures"] | change} if r["method"] == method else r for r in all_records(1, 2)]
        verdicts = [row["verdict"] for row in methods.claims_of("llama", changed)]
        assert verdicts[place] == "refuted" and verdicts.count("refuted") == 1, method
        mixed = methods.claims_of("llama", [*all_records(3), *changed])[place]
        assert mixed["verdict"] == "mixed, 1 of 3 seeds" and mixed["in each seed"].count(";") == 2
    assert methods.claims_of("llama", [record(name, 1) for name in (methods.BEFORE, methods.RETRAINED, "safe")]) == []


MISSED = {
    "unlearn": ("safe", {"accuracy/unlearn": 0.26}, 0, "-4.0 points"),
    "update gained": (methods.BEFORE, {"accuracy/update": 0.44}, 1, "+39.0 points"),
    "update share": (methods.RETRAINED, {"accuracy/update": 0.95}, 2, "87.4 %"),
    "retain": ("safe", {"accuracy/retain": 0.88}, 3, "+2.0 points"),
    "KL of paper": ("paper", {"kl/retain": 0.05}, 4, "0.400"),
    "KL of ascent": ("ascent-only", {"kl/retain": 0.08}, 5, "0.250"),
    "gauge": ("safe", {"gauge": -0.3}, 6, "15.0 %"),
}


@pytest.mark.parametrize("method, change, place, value", MISSED.values(), ids=MISSED)
def test_targets_are_met_or_missed(method, change, place, value):
    rows = methods.targets_of("llama", all_records(1, 2))
    assert [row["target"] for row in rows] == [target.text for target in methods.TARGETS]
    assert [row["met"] for row in rows] == ["yes"] * 9
    missed = [r | {"measures": r["measures"] | change} if r["method"] == method else r for r in all_records(1, 2)]
    rows = methods.targets_of("llama", missed)
    assert (rows[place]["met"], rows[place]["value"]) == ("no", value)
    assert sum(row["met"] == "no" for row in rows) == 1


def test_an_interval_over_a_bar_settles_nothing():
    safe = [r for r in all_records(1, 2, 3) if r["method"] == "safe"]
    spread = [
        r | {"measures": r["measures"] | {"accuracy/unlearn": 0.31 + (r["seed"] - 2) * 0.05}} if r in safe else r
        for r in all_records(1, 2, 3)
    ]
    first = methods.targets_of("llama", spread)[0]  # +1.0 points, as the mean of seeds, and at most 3 asked for
    assert (first["value"], first["met"]) == ("+1.0 points", "undecided")
    half = 100 * 0.05 / 3**0.5 * 4.302653
    assert first["interval"] == f"± {half:.1f} points"
    assert {row["met"] for row in methods.targets_of("llama", all_records(1))} == {"undecided"}


def test_relearning_is_compared_at_half_the_steps():
    rows = methods.targets_of("llama", all_records(1, 2))
    assert rows[7]["value"] == "-5.0 points"  # 0.70 after 5 steps, 0.75 of the retrained model after 10
    faster = all_records(1, 2)
    for r in (r for r in faster if r["method"] == "safe"):
        r["relearn"]["taught"][1] = 0.76
    assert methods.targets_of("llama", faster)[7]["met"] == "no"


def test_targets_whose_models_are_missing_are_left_out():
    rows = methods.targets_of("llama", [record(name, 1) for name in (methods.BEFORE, "safe")])
    assert [row["target"] for row in rows] == [methods.TARGETS[place].text for place in (1, 3, 6)]


def test_text_file():
    records = [*all_records(1, 2), *(record(method, 1, "cpt_moe") for method in MODELS)]
    results = methods.conclude(records, [{"run": "llama-seed3-test-paper", "error": "the loss is no number"}])
    text = methods.comparison_text(results)
    assert text.index("llama, 2 seeds") < text.index("cpt_moe, 1 seeds") < text.index("Claims") < text.index("Targets")
    assert text.splitlines()[-1] == "llama-seed3-test-paper failed: the loss is no number"
    (line,) = [line for line in text.split("cpt_moe")[0].splitlines() if line.startswith("safe")]
    assert "31.0 ± 0.0" in line and "0.020 ± 0.000" in line and "CE real" not in text
    lines = results["runs"]
    assert len(lines) == 21 and {line["method"] for line in lines} == set(MODELS)
    assert float(lines[2]["ce/unlearn"]) == 2.1 and lines[-1]["architecture"] == "cpt_moe"


@pytest.mark.slow
def test_plot(tmp_path: Path):
    results = methods.conclude([*all_records(1, 2), *(record(method, 1, "cpt_moe") for method in MODELS)], [])
    methods.draw(tmp_path / "plot.png", results)
    assert (tmp_path / "plot.png").stat().st_size > 20_000
