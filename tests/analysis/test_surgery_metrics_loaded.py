"""The metrics of a surgery as evaluate loads them, against the pure functions; their examples, cards and refusals."""

import doctest
import json
from pathlib import Path

import numpy as np
import pytest

from hf_moe_cpt.analysis import (
    continuation_overlap,
    editing,
    membership,
    memorisation,
    multiple_choice,
    retained_behaviour,
)
from hf_moe_cpt.analysis.bootstrap import bootstrap_interval, bootstrap_two_samples, ratio_of_sums
from tests.helpers.fresh_process import run_python
from tests.helpers.offline_metrics import PRELUDE
from tests.helpers.source_tree import PROJECT


evaluate = pytest.importorskip("evaluate")

FOLDERS = {
    "mcq_accuracy": multiple_choice.METRIC_FOLDER,
    "memorisation": memorisation.METRIC_FOLDER,
    "continuation_overlap": continuation_overlap.METRIC_FOLDER,
    "fluency": continuation_overlap.FLUENCY_METRIC_FOLDER,
    "membership_inference": membership.METRIC_FOLDER,
    "edit_success": editing.METRIC_FOLDER,
    "retained_behaviour": retained_behaviour.METRIC_FOLDER,
}
CONFIGURATIONS = {"edit_success": "conflict"}
ROWS = 24
GROUPS = [f"subject {row % 7}" for row in range(ROWS)]
OPTIONS = {"groups": GROUPS, "confidence": 0.8, "resamples": 200, "seed": 3}


def _columns() -> dict[str, dict[str, list]]:
    """Inputs of each metric, ROWS rows; rows with tokens differ in length."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 9, ROWS)
    logps = [np.round(-4 * generator.random(length), 3).tolist() for length in lengths]
    bits = [generator.integers(0, 2, length).tolist() for length in lengths]
    words = [" ".join(generator.choice(["a", "b,", "C", "dog"], 9)) for _ in range(2 * ROWS)]
    tokens = generator.integers(1, 6, ROWS)
    return {
        "mcq_accuracy": {
            "option_losses": generator.integers(0, 4, (ROWS, 3)).astype(float).tolist(),
            "answers": generator.integers(0, 3, ROWS).tolist(),
        },
        "memorisation": {"logps": logps, "hits": bits},
        "continuation_overlap": {"predictions": words[:ROWS], "references": words[ROWS:]},
        "fluency": {"predictions": words[:ROWS]},
        "membership_inference": {
            "logps": logps,
            "means": [[-2.0] * length for length in lengths],
            "stds": [generator.random(length).tolist() for length in lengths],
            "texts": words[:ROWS],
            "is_member": [row % 3 > 0 for row in range(ROWS)],
        },
        "edit_success": {
            "kinds": [("reliability", "generalisation", "portability")[row % 3] for row in range(ROWS)],
            "hits": [int(generator.integers(0, size + 1)) for size in tokens],
            "tokens": tokens.tolist(),
            "old_logps": [float("nan") if row % 4 else -3 * row / ROWS for row in range(ROWS)],
            "new_logps": (-3 * generator.random(ROWS)).tolist(),
        },
        "retained_behaviour": {
            "kl": [np.abs(row).tolist() for row in logps],
            "agrees": bits,
            "is_neighbour": [row % 2 == 0 for row in range(ROWS)],
        },
    }


def _load(name: str, folder: Path):
    return evaluate.load(FOLDERS[name], CONFIGURATIONS.get(name), cache_dir=str(folder))


def _expected_means(name: str, columns: dict[str, list]) -> dict[str, np.ndarray]:
    """The rows whose mean a result is."""
    if name == "mcq_accuracy":
        return {"accuracy": multiple_choice.mcq_correct(columns["option_losses"], columns["answers"])}
    if name == "memorisation":
        return {
            "probability": memorisation.probability(columns["logps"]),
            "exact_memorisation": memorisation.exact_memorisation(columns["hits"]),
            "extraction_strength": memorisation.extraction_strength(columns["hits"]),
        }
    if name == "fluency":
        return {"ngram_entropy": continuation_overlap.ngram_entropy(columns["predictions"])}
    overlap = continuation_overlap.rouge_l(**columns)
    return {f"rouge_l_{field}": column for field, column in overlap._asdict().items()}


@pytest.mark.parametrize("name", ["mcq_accuracy", "memorisation", "continuation_overlap", "fluency"])
def test_means_and_intervals_are_those_of_the_functions(tmp_path, name):
    columns, metric = _columns()[name], _load(name, tmp_path)
    for part in np.array_split(np.arange(ROWS), 3):
        metric.add_batch(**{key: [column[row] for row in part] for key, column in columns.items()})
    got = metric.compute(**OPTIONS)
    expected = {"num_questions" if name == "mcq_accuracy" else "num_texts": ROWS}
    for result, rows in _expected_means(name, columns).items():
        expected |= zip((result, f"{result}_low", f"{result}_high"), bootstrap_interval(rows, **OPTIONS), strict=True)
    assert got == pytest.approx(expected, rel=1e-12)


def test_membership_inference(tmp_path):
    columns = _columns()["membership_inference"]
    got = _load("membership_inference", tmp_path).compute(**columns, **OPTIONS, retrained_aucs={"min_k_auc": 0.5})
    inside = np.array(columns["is_member"])
    scores = {
        "loss": membership.loss_score(columns["logps"]),
        "zlib": membership.zlib_score([-sum(row) for row in columns["logps"]], columns["texts"]),
        "min_k": membership.min_k(columns["logps"]),
        "min_k_plus_plus": membership.min_k_plus_plus(columns["logps"], columns["means"], columns["stds"]),
    }
    groups = [
        [group for group, member in zip(GROUPS, inside, strict=True) if member == side] for side in (True, False)
    ]
    for attack, score in scores.items():
        interval = bootstrap_two_samples(score[inside], score[~inside], membership.auc, *groups, 0.8, 200, 3)
        assert tuple(got[f"{attack}_auc{end}"] for end in ("", "_low", "_high")) == interval
        assert got[f"{attack}_over_forgotten"] is (interval.high < 0.5)
        assert (f"{attack}_privacy_leakage" in got) == (attack == "min_k")
    assert got["min_k_privacy_leakage"] == membership.privacy_leakage(got["min_k_auc"], 0.5)
    assert (got["num_members"], got["num_others"]) == (16, 8)


def test_forgetting_too_much_is_flagged(tmp_path):
    columns = {"logps": [[-9.0 - row] for row in range(9)] + [[-1.0 - row / 9] for row in range(9)]}
    columns |= {"means": [[-2.0]] * 18, "stds": [[1.0]] * 18, "texts": ["a text"] * 18}
    columns["is_member"] = [True] * 9 + [False] * 9
    got = _load("membership_inference", tmp_path).compute(**columns)
    assert got["loss_auc"] == 0 and got["loss_over_forgotten"] is True
    columns["is_member"] = [not member for member in columns["is_member"]]
    got = _load("membership_inference", tmp_path).compute(**columns)
    assert got["loss_auc"] == 1 and got["loss_over_forgotten"] is False


def test_edit_success(tmp_path):
    columns = _columns()["edit_success"]
    got = _load("edit_success", tmp_path).compute(**columns, **OPTIONS)
    accuracy = np.array(columns["hits"]) / np.array(columns["tokens"])
    for place, kind in enumerate(("reliability", "generalisation", "portability")):
        expected = bootstrap_interval(accuracy[place::3], **{**OPTIONS, "groups": GROUPS[place::3]})
        assert (got[kind], got[f"{kind}_low"], got[f"{kind}_high"]) == pytest.approx(tuple(expected))
        assert got[f"num_{kind}"] == 8
    old, new = np.exp(columns["old_logps"][::4]), np.exp(columns["new_logps"][::4])
    expected = bootstrap_interval(old / (old + new), **{**OPTIONS, "groups": GROUPS[::4]})
    assert (got["conflict_score"], got["conflict_score_low"], got["conflict_score_high"]) == pytest.approx(expected)
    assert got["num_conflict_score"] == 6
    plain = evaluate.load(FOLDERS["edit_success"], cache_dir=str(tmp_path))
    got = plain.compute(kinds=["portability"], hits=[1], tokens=[2])
    assert got["portability"] == 0.5 and got.keys().isdisjoint({"reliability", "conflict_score"})


def test_retained_behaviour(tmp_path):
    columns = _columns()["retained_behaviour"]
    got = _load("retained_behaviour", tmp_path).compute(**columns, **OPTIONS)
    for neighbours, names in ((False, ("kl", "top1_agreement")), (True, ("neighbour_kl", "locality"))):
        rows = [row for row in range(ROWS) if columns["is_neighbour"][row] == neighbours]
        for name, key in zip(names, ("kl", "agrees"), strict=True):
            texts = [columns[key][row] for row in rows]
            totals = np.array([(sum(text), len(text)) for text in texts])
            settings = {**OPTIONS, "groups": [GROUPS[row] for row in rows]}
            expected = bootstrap_interval(totals, **settings, statistic=ratio_of_sums)
            assert got[name] == pytest.approx(np.concatenate(texts).mean())
            assert (got[name], got[f"{name}_low"], got[f"{name}_high"]) == pytest.approx(expected)
    assert (got["num_texts"], got["num_neighbours"]) == (12, 12)
    columns["is_neighbour"] = [True] * ROWS
    got = _load("retained_behaviour", tmp_path).compute(**columns)
    assert got["num_texts"] == 0 and "kl" not in got and "locality" in got


LOADED_ELSEWHERE = (
    PRELUDE
    + """
found = {}
for name, (folder, config_name, columns) in json.load(open(sys.argv[1])).items():
    metric = evaluate.load(folder, config_name)
    found[name] = {"file": sys.modules[type(metric).__module__].__file__, **metric.compute(**columns)}
print(json.dumps(found))
"""
)


def test_a_process_without_network_gets_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    asked = {name: (FOLDERS[name], CONFIGURATIONS.get(name), columns) for name, columns in _columns().items()}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    found = json.loads(run_python("-c", LOADED_ELSEWHERE, str(tmp_path / "asked.json")).stdout)
    for name, columns in _columns().items():
        file = Path(found[name].pop("file"))
        assert "evaluate_modules" in file.parts and not file.is_relative_to(PROJECT)  # a copy, not the package's file
        assert found[name] == pytest.approx(_load(name, tmp_path / "here").compute(**columns), rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_example_in_the_description_is_right(tmp_path, name):
    metric = _load(name, tmp_path)
    assert metric.name == name and metric.citation.startswith("@")
    example = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, "description", None, 0)
    assert len(example.examples) >= 4
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("name", FOLDERS)
def test_the_card_names_every_input_and_result(tmp_path, name):
    card = (Path(FOLDERS[name]) / "README.md").read_text(encoding="utf-8")
    metric, columns = _load(name, tmp_path), _columns()[name]
    aucs = {"retrained_aucs": {"loss_auc": 0.5}} if name == "membership_inference" else {}
    results = set(metric.compute(**columns, **aucs))
    endings = ("_low", "_high", "_over_forgotten", "_privacy_leakage")
    shown = {result for result in results if not result.endswith(endings)}
    shown |= {ending for ending in endings if any(result.endswith(ending) for result in results)}
    assert card.startswith(f"---\ntitle: {name}\n")
    for word in (*columns, *shown, *aucs, "groups", "confidence", "resamples", "seed"):
        assert f"`{word}`" in card or (word in ("_low", "_high") and f"{word}`" in card), word
    code = (
        card.split("```python\n")[1]
        .split("```")[0]
        .replace("METRIC_FOLDER)", f"METRIC_FOLDER, cache_dir='{tmp_path}')")
    )
    exec(compile(code, f"{name}/README.md", "exec"), {})


ONE_TEXT = {"logps": [[-1.0]], "means": [[-1.0]], "stds": [[1.0]], "texts": ["a"], "is_member": [True]}
REFUSED = {
    "an unknown input": (
        "fluency",
        {"predictions": ["a"], "top_k": 2},
        "top_k: no such input; there are predictions, gr",
    ),
    "a missing input": (
        "mcq_accuracy",
        {"option_losses": [[1.0, 2.0]]},
        "answers: input missing; give all of option_l",
    ),
    "a missing reference": ("continuation_overlap", {"predictions": ["a"]}, "references: input missing"),
    "ragged options": (
        "mcq_accuracy",
        {"option_losses": [[1.0, 2.0], [1.0]], "answers": [0, 0]},
        "option_losses must be numbers in rows of one length",
    ),
    "a hit of 2": ("memorisation", {"logps": [[-1.0]], "hits": [[2]]}, r"hits\[0\] holds 2: for each token it is 1"),
    "members only": ("membership_inference", ONE_TEXT, "is_member is True for all 1 texts: give members and others"),
    "an unknown area": (
        "membership_inference",
        {**ONE_TEXT, "retrained_aucs": {"auc": 0.5}},
        "auc: no such input; there are loss_auc, zlib_auc",
    ),
    "an unknown kind": (
        "edit_success",
        {"kinds": ["locality"], "hits": [1], "tokens": [1], "old_logps": [-1.0], "new_logps": [-1.0]},
        "kinds holds 'locality' at question 0: choose from reliability, generalisation, portability",
    ),
    "groups of other rows": (
        "retained_behaviour",
        {"kl": [[0.1]], "agrees": [[1]], "is_neighbour": [False], "groups": ["a", "b"]},
        "groups has 2 entries for 1 rows",
    ),
}


@pytest.mark.parametrize("name, columns, text", REFUSED.values(), ids=REFUSED)
def test_refusals(tmp_path, name, columns, text):
    with pytest.raises(ValueError, match=text) as caught:
        _load(name, tmp_path).compute(**columns)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FOLDERS)
def test_an_unknown_configuration_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="config_name='ratio' is unknown: choose from default"):
        evaluate.load(FOLDERS[name], "ratio", cache_dir=str(tmp_path))


def test_two_answers_need_their_configuration(tmp_path):
    metric = evaluate.load(FOLDERS["edit_success"], cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"evaluate.load\(..., config_name='conflict'\)"):
        metric.compute(kinds=["reliability"], hits=[1], tokens=[1], old_logps=[-1.0], new_logps=[-1.0])
