"""Rows, intervals, claims, targets and the text of records made by hand."""

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hf_moe_cpt.scripts.compare_surgery_plan import BEFORE, METHODS, RETRAINED
from hf_moe_cpt.scripts.compare_surgery_report import comparison_text, conclude, draw, write_runs
from hf_moe_cpt.scripts.compare_surgery_verdicts import CLAIMS, TARGETS, claims_of, targets_of


SETS = ("unlearn", "obsolete", "update", "retain", "neighbour", "unseen")
# accuracies of the sets in this order, CE unlearn, CE unseen, KL retain, accuracy of taught subjects at 0, 5, 10 steps
MODELS = {
    BEFORE: ((0.90, 0.85, 0.25, 0.90, 0.85, 0.35), 0.1, 2.0, 0.0, None),
    RETRAINED: ((0.30, 0.30, 0.85, 0.88, 0.85, 0.35), 2.1, 2.0, 0.1, (0.30, 0.50, 0.75)),
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
    results = conclude(records, [])
    assert [row["method"] for row in results["rows"]] == [BEFORE, *METHODS, RETRAINED]
    rows = {row["method"]: row for row in results["rows"]}
    half = stats.t.ppf(0.975, 1) * np.std([0.3, 0.2], ddof=1) / np.sqrt(2)
    assert rows["paper"]["accuracy/unlearn"] == pytest.approx((0.25, half))
    assert rows["paper"]["seconds"].mean == 11.5 and rows["paper"]["learning_rate"] == 1e-3
    goal = (1 / 3 + 0.9) / 2  # between chance and the model before
    assert rows["safe"]["relearn_steps"].mean == pytest.approx(5 * (goal - 0.31) / (0.70 - 0.31))
    assert rows["ascent-only"]["relearn_steps"].mean == 10 and rows["descent-kl"]["relearn_steps"].mean == 0
    assert "relearn_steps" not in rows[BEFORE] and "learning_rate" not in rows[RETRAINED]


def test_claims_are_confirmed_refuted_or_mixed():
    verdicts = {row["claim"]: row["verdict"] for row in claims_of("llama", all_records(1, 2))}
    assert list(verdicts) == [claim.text for claim in CLAIMS] and set(verdicts.values()) == {"confirmed"}
    changes = (
        ("paper", 0, {"ce/unlearn": 3.9}),
        ("ascent-only", 1, {"ce/unlearn": 3.9}),
        ("npo-retain", 2, {"ce/unlearn": 4.1}),
        ("safe", 3, {"accuracy/update": 0.79}),
        ("descent-kl", 4, {"accuracy/obsolete": 0.39}),
    )
    for method, place, change in changes:
        changed = [r | {"measures": r["measures"] | change} if r["method"] == method else r for r in all_records(1, 2)]
        verdicts = [row["verdict"] for row in claims_of("llama", changed)]
        assert verdicts[place] == "refuted" and verdicts.count("refuted") == 1, method
        mixed = claims_of("llama", [*all_records(3), *changed])[place]
        assert mixed["verdict"] == "mixed, 1 of 3 seeds" and mixed["in each seed"].count(";") == 2
    assert claims_of("llama", [record(name, 1) for name in (BEFORE, RETRAINED, "safe")]) == []


MISSED = {
    "unlearn": ("safe", {"accuracy/unlearn": 0.26}, 0, "-4.0 points"),
    "update gained": (BEFORE, {"accuracy/update": 0.44}, 1, "+39.0 points"),
    "update share": (RETRAINED, {"accuracy/update": 0.95}, 2, "87.4 %"),
    "retain": ("safe", {"accuracy/retain": 0.88}, 3, "+2.0 points"),
    "KL of paper": ("paper", {"kl/retain": 0.05}, 4, "0.400"),
    "KL of ascent": ("ascent-only", {"kl/retain": 0.08}, 5, "0.250"),
    "gauge": ("safe", {"gauge": -0.3}, 6, "15.0 %"),
}


@pytest.mark.parametrize("method, change, place, value", MISSED.values(), ids=MISSED)
def test_targets_are_met_or_missed(method, change, place, value):
    rows = targets_of("llama", all_records(1, 2))
    assert [row["target"] for row in rows] == [target.text for target in TARGETS]
    assert [row["met"] for row in rows] == ["yes"] * 7 + ["yes"]
    missed = [r | {"measures": r["measures"] | change} if r["method"] == method else r for r in all_records(1, 2)]
    rows = targets_of("llama", missed)
    assert (rows[place]["met"], rows[place]["value"]) == ("no", value)
    assert sum(row["met"] == "no" for row in rows) == 1


def test_relearning_is_compared_at_half_the_steps():
    rows = targets_of("llama", all_records(1, 2))
    assert rows[-1]["value"] == "-5.0 points"  # 0.70 after 5 steps, 0.75 of the retrained model after 10
    faster = all_records(1)
    next(r for r in faster if r["method"] == "safe")["relearn"]["taught"][1] = 0.76
    assert targets_of("llama", faster)[-1]["met"] == "no"


def test_targets_whose_models_are_missing_are_left_out():
    rows = targets_of("llama", [record(name, 1) for name in (BEFORE, "safe")])
    assert [row["target"] for row in rows] == [TARGETS[place].text for place in (1, 3, 6)]


def test_text_file_and_plot(tmp_path: Path):
    records = [*all_records(1, 2), *(record(method, 1, "cpt_moe") for method in MODELS)]
    results = conclude(records, [{"run": "llama-seed3-test-paper", "error": "the loss is no number"}])
    text = comparison_text(results)
    assert text.index("llama, 2 seeds") < text.index("cpt_moe, 1 seeds") < text.index("Claims") < text.index("Targets")
    assert text.splitlines()[-1] == "llama-seed3-test-paper failed: the loss is no number"
    (line,) = [line for line in text.split("cpt_moe")[0].splitlines() if line.startswith("safe")]
    assert "31.0 ± 0.0" in line and "0.020 ± 0.000" in line and "CE real" not in text
    write_runs(tmp_path / "results.csv", results)
    with (tmp_path / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 21 and {line["method"] for line in lines} == set(MODELS)
    assert float(lines[2]["ce/unlearn"]) == 2.1 and lines[-1]["architecture"] == "cpt_moe"
    draw(tmp_path / "plot.png", results)
    assert (tmp_path / "plot.png").stat().st_size > 20_000
