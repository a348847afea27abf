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
from hf_moe_cpt.scripts.replication.factbook import TOPICS
from hf_moe_cpt.trainers.surgery.surgery_config import SurgeryConfig
from tests.replication.test_factbook import bench_of, make_countries


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
    expected |= {
        "accuracy/changed": 1 / 3,
        "old_answers": 1 / 3,
        "ce/unlearn": 3.0,
        "ce/unseen": 2.0,
        "gauge": 1.0,
        "auc/min_k": 0.5,
    }
    assert methods.measures_of(raw) == pytest.approx(expected | {"kl/retain": 0.1, "agreement/retain": 2 / 3})


def test_criterion_is_the_harmonic_mean_of_forgotten_learnt_and_kept():
    measures = {"accuracy/unlearn": 0.2, "accuracy/obsolete": 0.5, "accuracy/unseen": 0.4, "accuracy/update": 0.5}
    measures |= {"accuracy/retain": 1.0, "accuracy/neighbour": 0.8, "gauge": -1.0, "ce/unseen": 2.0}
    parts = (0.8, 0.9, 0.5, 1.0, 0.8, np.exp(-1.0), np.exp(-0.5))
    assert methods.tuning_criterion(measures, {"ce/unseen": 1.5}) == pytest.approx(7 / sum(1 / part for part in parts))
    assert methods.tuning_criterion(measures | {"accuracy/update": 0.0}, {"ce/unseen": 1.5}) == 0.0


def test_drift_is_what_leaves_the_first_measurement():
    log = [
        {"step": 0, "eval_unseen_ce": 9.0, "eval_retain_kl": 0.0, "eval_surgery_gap": 1.0},
        {"step": 5, "loss": 1.0},
        {"step": 10, "eval_unseen_ce": 2.0, "eval_retain_kl": 0.2, "eval_surgery_gap": 1.0},
        {"step": 20, "eval_unseen_ce": 1.7, "eval_retain_kl": 0.1, "eval_surgery_gap": 1.0},
    ]
    assert methods.drifts(log) == pytest.approx({"drift/unseen_ce": 0.3, "drift/retain_kl": 0.0})


TINY = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
MINIATURE = replace(
    methods.SETTINGS["small"],
    subjects=dict.fromkeys(("unlearn", "update", "retain", "neighbour", "unseen"), 6),
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
    rounds={"llama": 1, "cpt_moe": 1},
    max_questions=3,
    max_documents=2,
    relearn_steps=2,
    relearn_every=1,
)
RUN = ["descent-kl", "safe"]


@pytest.fixture(scope="module", autouse=True)
def miniature():
    """The small setting in two steps a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods.SETTINGS, "small", MINIATURE)
        yield


def start(folder: Path, *words: str) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed):
        methods.main(["--output_dir", str(folder), "--workers", "1", *words])
    return printed.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A comparison of two methods on a mixture, one seed, and what it printed."""
    folder = tmp_path_factory.mktemp("comparison") / "out"
    return folder, start(folder, "--architectures", "cpt_moe", "--methods", *RUN)


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_every_run_left_a_record_and_the_results_are_theirs(finished):
    folder, printed = finished
    records = [json.loads(path.read_text()) for path in (folder / "runs").glob("*-test-*")]
    assert sorted(record["method"] for record in records) == sorted([methods.BEFORE, methods.RETRAINED, *RUN])
    (safe,) = (record for record in records if record["method"] == "safe")
    assert safe["training"]["settings"]["held_out_fraction"] == MINIATURE.held_out
    results = results_of(folder)
    assert [row["method"] for row in results["rows"]] == [methods.BEFORE, *RUN, methods.RETRAINED]
    assert results["rows"][2]["accuracy/unlearn"] == [safe["measures"]["accuracy/unlearn"], None]
    with (folder / "results.csv").open() as file:
        lines = {line["method"]: line for line in csv.DictReader(file)}
    assert float(lines["safe"]["kl/retain"]) == pytest.approx(safe["measures"]["kl/retain"], rel=1e-5)
    assert (folder / "comparison.png").stat().st_size > 10_000
    assert "Targets" in printed and "without ascent old answers survive" in printed and "Not finished" not in printed
    for row in results["runs"]:
        assert all(0 <= row[f"accuracy/{name}"] <= 1 and row[f"ce/{name}"] > 0 for name in SETS)
        assert row["gauge"] == pytest.approx(row["ce/unlearn"] - row["ce/unseen"])
        is_same = row["kl/retain"] == pytest.approx(0, abs=1e-6)  # also where no step was better than none
        assert is_same if row["method"] == methods.BEFORE else row["method"] == "safe" or not is_same
        is_after = row["method"] != methods.BEFORE
        assert ("relearn/untaught" in row) == ("accuracy/unlearn_old_routes" in row) == is_after
        assert ("cost" in row) == ("forget_quality" in row) == (row["method"] in methods.METHODS)
    assert {row["verdict"] for row in results["claims"]} <= {"undecided", "confirmed", "refuted"}


@pytest.mark.slow
def test_walks_are_judged_by_validation_questions_of_another_world_and_go_on(finished):
    folder, _ = finished
    tuned = [json.loads(path.read_text()) for path in (folder / "runs").glob("*validation*")]
    assert {(record["seed"], record["split"]) for record in tuned} == {(0, "validation")}
    assert all("ce/unseen" in record["measures"] and "kl/retain" not in record["measures"] for record in tuned)
    tuning = [row for row in results_of(folder)["tuning"] if row["method"] == "safe"]
    assert len(tuning) == 6  # the middle, two along rate and strength each, and one level more of copies
    assert [row["criterion"] for row in tuning if row["best"]] == [max(row["criterion"] for row in tuning)]
    stopped = start(folder, "--architectures", "cpt_moe", "--methods", *RUN, "--seeds", "2", "--minutes", "0")
    assert "Not finished after 0 minutes" in stopped
    assert json.loads((folder / "results.json").read_text())["rows"]  # the first seed is judged
    again = start(folder, "--architectures", "cpt_moe", "--methods", *RUN, "--minutes", "0")
    assert "Not finished" not in again


def test_a_walk_ends_where_its_best_lies_inside_and_keeps_to_the_levels_there_are():
    search = methods.Search("safe", "llama", {"ce/unseen": 2.0}, {"rate": -1})
    assert search.best == (-1, 0, 0) and set(search.wanted()) == {
        (-1, 0, 0), (-2, 0, 0), (0, 0, 0), (-1, -1, 0), (-1, 1, 0), (-1, 0, 1),
    }  # fmt: skip

    def record(place):
        good = 0.9 - 0.1 * abs(place[0] - 1) - 0.1 * abs(place[1] + 1) - 0.05 * (1 - place[2])
        measures = {f"accuracy/{name}": good for name in ("update", "retain", "neighbour")}
        same = {f"accuracy/{name}": 1 / 3 for name in ("unlearn", "obsolete", "unseen")}
        return {"measures": measures | same | {"gauge": 0.0, "ce/unseen": 2.0}}

    def carry_out(runs):
        return {run.name: record([step for _, step in run.place]) for run in runs}

    methods.walk([search], 10, carry_out)
    assert search.best == (1, -1, 1) and search.is_inside
    early = methods.Search("safe", "llama", {"ce/unseen": 2.0}, {})
    methods.walk([early], 1, carry_out)
    assert not early.is_inside
    assert early.score_of((0, 0, 0), {"error": "no memory"}) < 0


@pytest.mark.parametrize("method", methods.METHODS)
def test_settings_make_the_method(method, tmp_path):
    comparison = methods.Comparison("small", methods.SETTINGS["small"], "cpu")
    run = methods.Run(method, "llama", 1, place=(("rate", -1), ("strength", 1), ("counterfactuals", 1)))
    config = SurgeryConfig(output_dir=str(tmp_path), use_cpu=True, **comparison.surgery_settings(run))
    preset = SurgeryConfig.from_preset(methods.METHODS[method].preset, output_dir=str(tmp_path), use_cpu=True)
    scale, own = comparison.scale, methods.METHODS[method]
    assert config.learning_rate == pytest.approx(scale.rate / 2)
    assert (config.max_steps, config.update_batch_size) == (own.steps or scale.steps, scale.rows)
    changed = {name: own.changes.get(f"{name}_weight", weight) for name, weight in preset.weights.items()}
    scaled = {name: 3 * changed[name] for name in changed if f"{name}_weight" in own.scaled}
    assert config.weights == pytest.approx(changed | scaled) and config.negation == (3 if method == "negation" else 0)
    assert config.forget_loss == own.changes.get("forget_loss", preset.forget_loss)
    assert config.counterfactuals == 2 and config.load_best_model_at_end == (own.preset == "safe" and not own.steps)


def test_every_method_but_the_published_ones_has_all_aids_and_no_choice_has_seen_a_final_world():
    comparison = methods.make_comparison(methods.CompareArguments(seeds=3))
    aided = [
        method for method in methods.METHODS.values() if method.preset == "safe" and "negation" not in method.changes
    ]
    assert all("counterfactuals" in (*method.axes, *method.changes) for method in aided) and len(aided) > 5
    final = comparison.final_runs("llama", "safe", (("rate", 0),))
    assert [run.seed for run in final] == [1, 2, 3] and {run.split for run in final} == {"test"}
    assert methods.Search("safe", "llama", {}, {}).run_at((0, 0, 0)).seed == 0
    assert len(comparison.final_runs("llama", "safe-long")) == methods.METHODS["safe-long"].seeds


def test_a_surgery_gets_a_part_of_the_anchors_and_is_asked_about_the_rest():
    material = methods.make_material(methods.Comparison("small", READ, "cpu"), "llama", 1)
    for name in SETS:
        given, asked = (set(part.subjects(name)) for part in (material.operated, material.examined))
        if name in ("retain", "neighbour", "unseen"):
            assert len(given) == len(asked) == 3 and not given & asked
        else:
            assert given == asked == set(material.bench.subjects(name))
    assert set(material.bench.documents["retain"]["subject_kind"]) == {"person"}  # no texts about cities and firms


READ = replace(MINIATURE, vocab_size=320, max_length=32, batch_size=16)


def test_every_row_is_read_in_every_epoch():
    scale = replace(READ, epochs=3, batch_size=4)
    rows = [[place] * (2 + place % 5) for place in range(10)]
    batches = list(methods.reading_order(rows, scale, seed=1))
    assert Counter(row[0] for batch in batches for row in batch) == Counter({place: 3 for place in range(10)})
    assert max(map(len, batches)) == 4 and batches != list(methods.reading_order(rows, scale, seed=2))
    assert list(methods.reading_order(rows, scale, seed=1)) == batches


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


def test_training_can_be_repeated_and_reads_the_sets_of_each_model(monkeypatch):
    comparison = methods.Comparison("small", READ, "cpu")
    material = methods.make_material(comparison, "cpt_moe", 1)
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


# accuracies of the sets in this order, CE unlearn, CE unseen, KL retain, untaught, seconds
MODELS = {
    methods.BEFORE: ((0.90, 0.85, 0.25, 0.90, 0.85, 0.35), 0.1, 2.0, 0.0, None, 40.0),
    methods.RETRAINED: ((0.30, 0.30, 0.85, 0.88, 0.85, 0.35), 2.1, 2.0, 0.1, 0.45, 100.0),
    "safe": ((0.31, 0.30, 0.83, 0.89, 0.84, 0.35), 2.1, 2.02, 0.02, 0.46, 19.0),
    "paper": ((0.28, 0.31, 0.85, 0.88, 0.83, 0.35), 3.0, 3.0, 0.2, 0.60, 15.0),
    "ga": ((0.28, 0.31, 0.85, 0.88, 0.83, 0.35), 3.0, 3.0, 0.2, 0.60, 15.0),
    "descent-kl": ((0.70, 0.45, 0.84, 0.89, 0.80, 0.35), 0.4, 2.1, 0.03, 0.80, 10.0),
    "safe-long": ((0.31, 0.30, 0.83, 0.89, 0.84, 0.35), 2.1, 2.02, 0.02, 0.46, 300.0),
}


def record(method: str, seed: int, architecture: str = "llama", **changes: float) -> dict:
    accuracies, unlearn, unseen, kl, untaught, seconds = MODELS[method]
    measures = {f"accuracy/{name}": value for name, value in zip(SETS, accuracies, strict=True)}
    measures |= {"accuracy/retain_anchored": accuracies[3], "accuracy/unlearn_4bit": accuracies[0] + 0.01}
    measures |= {"accuracy/unlearn_old_routes": accuracies[0] + 0.02} if architecture == "cpt_moe" else {}
    measures |= {"ce/unlearn": unlearn, "ce/unseen": unseen, "gauge": unlearn - unseen, "kl/retain": kl}
    measures |= {"kl/neighbour": 2 * kl, "seconds": seconds, "ce/prose": 3.0} | (
        {} if untaught is None else {"relearn/untaught": untaught}
    )
    if method == "safe-long":
        names = ("unseen_ce", "unlearn_ce", "retain_kl", "neighbour_kl")
        measures |= dict.fromkeys((f"drift/{name}" for name in names), 0.04)
    made = {"method": method, "architecture": architecture, "seed": seed, "place": {"rate": 1}}
    ratios = (
        [0.1 * place for place in range(1, 9)] if method == methods.BEFORE else [0.5 + place for place in range(8)]
    )
    return made | {"measures": measures | changes, "truth_ratios": ratios}


def all_records(*seeds: int, architecture: str = "llama") -> list[dict]:
    return [record(method, seed, architecture) for seed in seeds for method in MODELS]


def changed(records: list[dict], method: str, change: dict) -> list[dict]:
    return [r | {"measures": r["measures"] | change} if r["method"] == method else r for r in records]


def test_rows_hold_means_intervals_cost_and_quality():
    records = all_records(1, 2)
    records[3]["measures"]["accuracy/unlearn"] = 0.30  # paper, seed 1
    results = methods.conclude(records, [])
    shown = ["paper", "descent-kl", "safe", "ga", "safe-long"]
    assert [row["method"] for row in results["rows"]] == [methods.BEFORE, *shown, methods.RETRAINED]
    rows = {row["method"]: row for row in results["rows"]}
    half = stats.t.ppf(0.975, 1) * np.std([0.3, 0.28], ddof=1) / np.sqrt(2)
    assert rows["paper"]["accuracy/unlearn"] == pytest.approx((0.29, half))
    assert rows["safe"]["cost"].mean == pytest.approx(0.19) and "cost" not in rows[methods.RETRAINED]
    assert rows["safe"]["forget_quality"].mean == 1.0 and rows["safe"]["rate"] == 1
    assert "relearn/untaught" not in rows[methods.BEFORE]
    beside = {row["method"]: row for row in results["paired"]}
    assert set(beside) == {*shown, methods.RETRAINED} - {"safe"}
    assert beside["paper"]["accuracy/unlearn"] == pytest.approx((-0.02, half))  # 0.30 - 0.31 and 0.28 - 0.31
    assert beside[methods.RETRAINED]["accuracy/update"] == pytest.approx((0.02, 0.0))
    forced = [record("safe", 1) | {"truth_ratios": [0.01] * 8}, record(methods.RETRAINED, 1)]
    assert methods.flat_rows(forced)[0]["forget_quality"] == pytest.approx(stats.ks_2samp(
        forced[0]["truth_ratios"], forced[1]["truth_ratios"], method="exact").pvalue)  # fmt: skip


def test_claims_are_confirmed_refuted_or_undecided():
    rows = methods.judged("claims", "llama", all_records(1, 2, 3))
    assert [row["claim"] for row in rows] == [claim.text for claim in methods.CLAIMS]
    assert {row["verdict"] for row in rows} == {"confirmed"} and {row["seeds"] for row in rows} == {"3"}
    for place, (method, change) in enumerate(
        (
            ("paper", {"accuracy/unlearn": 0.99}),
            ("paper", {"accuracy/unlearn": 0.40}),
            ("paper", {"accuracy/obsolete": 0.40}),
            ("paper", {"accuracy/update": 0.40}),
            ("paper", {"accuracy/retain_anchored": 0.80}),
            ("paper", {"accuracy/retain": 0.80}),
            ("paper", {"accuracy/neighbour": 0.80}),
            ("paper", {"ce/unlearn": 4.1}),
            ("ga", {"ce/unlearn": 4.1}),
            ("descent-kl", {"accuracy/obsolete": 0.34}),
            ("descent-kl", {"accuracy/unlearn": 0.34}),
            ("paper", {"seconds": 21.0}),
        )
    ):
        verdicts = [
            row["verdict"] for row in methods.judged("claims", "llama", changed(all_records(1, 2, 3), method, change))
        ]
        assert verdicts[place] == "refuted", methods.CLAIMS[place].text
        mixed = [*all_records(3), *changed(all_records(1, 2, 3), method, change)]
        assert methods.judged("claims", "llama", mixed)[place]["verdict"] in ("undecided", "refuted")
    assert methods.judged("claims", "llama", [record(name, 1) for name in (methods.BEFORE, "safe")]) == []


MISSED = {
    "unlearn": ("safe", {"accuracy/unlearn": 0.24}, 0, "-6.0 points"),
    "obsolete": ("safe", {"accuracy/obsolete": 0.36}, 2, "+6.0 points"),
    "update": (methods.RETRAINED, {"accuracy/update": 0.95}, 3, "87.4 %"),
    "retain": ("safe", {"accuracy/retain": 0.86}, 4, "-4.0 points"),
    "neighbour": ("safe", {"accuracy/neighbour": 0.80}, 5, "-5.0 points"),
    "unseen": ("safe", {"ce/unseen": 2.06}, 6, "+0.060 nats"),
    "prose": ("safe", {"ce/prose": 3.06}, 7, "+0.060 nats"),
    "untaught": ("safe", {"relearn/untaught": 0.49}, 8, "+4.0 points"),
    "4 bits": ("safe", {"accuracy/unlearn_4bit": 0.35}, 9, "+4.0 points"),
    "cost": ("safe", {"seconds": 21.0}, 10, "0.21"),
    "routes": ("safe", {"accuracy/unlearn_old_routes": 0.35}, 11, "+4.0 points"),
    "drift": ("safe-long", {"drift/retain_kl": 0.06}, 14, "0.060 nats"),
}


@pytest.mark.parametrize("method, change, place, value", MISSED.values(), ids=MISSED)
def test_targets_are_met_or_missed(method, change, place, value):
    records = all_records(1, 2, 3, architecture="cpt_moe")
    rows = methods.judged("targets", "cpt_moe", records)
    assert [row["target"] for row in rows] == [target.text for target in methods.TARGETS]
    assert {row["verdict"] for row in rows} == {"met"}
    rows = methods.judged("targets", "cpt_moe", changed(records, method, change))
    assert (rows[place]["verdict"], rows[place]["value"]) == ("missed", value)


def test_forget_quality_is_one_test_of_all_seeds():
    records = [r | {"truth_ratios": [0.01] * 8} if r["method"] == "safe" else r for r in all_records(1, 2, 3)]
    row = methods.judged("targets", "llama", records)[1]
    other = [ratio for r in records if r["method"] == methods.RETRAINED for ratio in r["truth_ratios"]]
    assert (row["verdict"], row["seeds"]) == ("missed", "3")
    assert float(row["value"]) == pytest.approx(stats.ks_2samp([0.01] * 24, other, method="exact").pvalue, rel=1e-2)


def test_an_interval_over_a_bar_settles_nothing():
    records = all_records(1, 2, 3)
    for r in (r for r in records if r["method"] == "safe"):
        r["measures"]["accuracy/unlearn"] = 0.31 + (r["seed"] - 2) * 0.05
    first = methods.judged("targets", "llama", records)[0]  # +1.0 points, at most 5 asked for
    assert (first["value"], first["verdict"]) == ("+1.0 points", "undecided")
    assert first["interval"] == f"± {100 * 0.05 / 3**0.5 * 4.302653:.1f} points"
    for seeds in ((1,), (1, 2)):  # two that agree to the last digit are no proof
        few = [row["verdict"] for row in methods.judged("targets", "llama", all_records(*seeds))]
        assert set(few[:1] + few[2:]) == {"undecided"}


def test_text_and_plot(tmp_path: Path):
    records = [*all_records(1, 2), *all_records(1, architecture="cpt_moe")]
    results = methods.conclude(records, [{"run": "llama-seed3-test-paper", "error": "the loss is no number"}])
    results["tuning"] = [{"architecture": "llama", "method": "safe", "edge": True}]
    text = methods.comparison_text(results)
    assert text.index("llama, 2 seeds") < text.index("cpt_moe, 1 seeds") < text.index("Claims") < text.index("Targets")
    assert text.splitlines()[-1] == "llama-seed3-test-paper failed: the loss is no number"
    lines = [line for line in text.split("cpt_moe")[0].splitlines() if line.startswith("safe ")]
    assert (
        "less safe, within a seed" in text
        and len(lines) == 3
        and "31.0 ± 0.0" in lines[0]
        and lines[0].rstrip().endswith("edge")
        and "46.0" in lines[2]
    )
    assert "old routes" in text.split("cpt_moe, 1")[1] and "old routes" not in text.split("cpt_moe, 1")[0]
    methods.draw(tmp_path / "plot.png", results)
    assert (tmp_path / "plot.png").stat().st_size > 20_000


@pytest.mark.slow
def test_real_models_are_taught_facts_or_know_capitals_already_and_are_made_mixtures(tmp_path: Path, monkeypatch):
    """The setting smollm2 in miniature: a small Llama for the model, made-up countries for the facts."""
    real = tmp_path / "real"
    make_countries(real / "countries", 40)
    texts = [text for topic in TOPICS for text in bench_of(real / "countries", topic).documents["retain"]["text"]]
    tokenizer = train_byte_level_bpe(texts, 400, progress=False)
    tokenizer.save_pretrained(real / "smollm2")
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    ends = {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None, "max_position_embeddings": 256}
    model = methods.LlamaConfig(**sizes, **ends, vocab_size=len(tokenizer), head_dim=8, num_key_value_heads=2)
    methods.AutoModelForCausalLM.from_config(model).save_pretrained(real / "smollm2")
    whole = methods.SETTINGS["smollm2"]
    small = {name: getattr(MINIATURE, name) for name in ("epochs", "steps", "rows", "eval_steps", "eval_rows")}
    small |= {
        name: getattr(MINIATURE, name) for name in ("max_questions", "max_documents", "relearn_steps", "relearn_every")
    }
    small |= {"subjects": MINIATURE.subjects, "seeds": dict.fromkeys(whole.models, 1), "max_length": 64}
    small |= {"rounds": dict.fromkeys(whole.models, 0)}
    monkeypatch.setitem(methods.SETTINGS, "smollm2", replace(whole, **small))
    monkeypatch.setattr(methods, "PROSE_ROWS", 3)
    words = ["--setting", "smollm2", "--real", str(real), "--device", "cpu", "--methods", "safe", "experts"]
    printed = start(tmp_path / "out", *words, "--architectures", "dense", "upcycled", "dense-capitals")
    rows = {(row["architecture"], row["method"]): row for row in results_of(tmp_path / "out")["runs"]}
    assert set(rows) == {
        *((name, method) for name in ("dense", "upcycled") for method in ("before", "safe", "retrained")),
        ("upcycled", "experts"), ("dense-capitals", "before"), ("dense-capitals", "safe"),
    }  # fmt: skip
    assert "accuracy/unlearn_old_routes" in rows["upcycled", "safe"] and "CE" in printed and "failed" not in printed
    assert all(row["ce/prose"] > 0 for row in rows.values())
    # what is known beforehand is not trained: it costs nothing but reading
    assert rows["dense-capitals", "before"]["ce/unlearn"] == pytest.approx(np.log(len(tokenizer)), rel=0.2)
    with pytest.raises(
        ValueError, match="needs a folder with countries and smollm2, which scripts/replication/factbook.py"
    ):
        start(tmp_path / "other", "--setting", "smollm2")
