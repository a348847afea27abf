"""The metric as evaluate loads it, from a copy in its cache and without a network, against the pure functions.

The routing metrics as evaluate loads them, from copies in its cache and without a network, against loops.

The metrics of a surgery as evaluate loads them, against the pure functions; their examples, cards and refusals.
"""

import doctest
import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from hf_moe_cpt.evaluation import text_metrics as continuation_overlap
from hf_moe_cpt.evaluation import text_metrics as editing
from hf_moe_cpt.evaluation import text_metrics as membership
from hf_moe_cpt.evaluation import text_metrics as memorisation
from hf_moe_cpt.evaluation import text_metrics as multiple_choice
from hf_moe_cpt.evaluation import text_metrics as retained_behaviour
from hf_moe_cpt.evaluation.statistics import (
    METRIC_FOLDER,
    bootstrap_interval,
    bootstrap_two_samples,
    preference_accuracy,
    ratio_of_sums,
)
from hf_moe_cpt.metrics.base import (
    EXPERT_COACTIVATION_FOLDER,
    ROUTER_SATURATION_FOLDER,
    ROUTING_IMBALANCE_FOLDER,
    VOCABULARY_SPECIALIZATION_FOLDER,
)
from tests.helpers.fresh_process import run_python
from tests.helpers.offline_metrics import PRELUDE
from tests.helpers.source_tree import PROJECT


evaluate = pytest.importorskip("evaluate")

LOADED_ELSEWHERE = (
    PRELUDE
    + """
from hf_moe_cpt.evaluation.statistics import METRIC_FOLDER

metric = evaluate.load(METRIC_FOLDER, sys.argv[1])
print(json.dumps({"file": sys.modules[type(metric).__module__].__file__, **metric.compute(**json.loads(sys.argv[2]))}))
"""
)


def _columns(num: int = 60, reference: bool = False) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    logps = ("chosen_logps", "rejected_logps", *(("ref_chosen_logps", "ref_rejected_logps") if reference else ()))
    columns = {name: np.round(-20 * generator.random(num), 1) for name in logps}
    return columns | {name: generator.integers(1, 30, num) for name in ("chosen_lengths", "rejected_lengths")}


@pytest.mark.parametrize("config_name", ["default", "reference"])
def test_a_process_without_network_gets_the_numbers_of_the_pure_functions(tmp_path, monkeypatch, config_name):
    for name, value in {"HF_HOME": tmp_path, "HF_MODULES_CACHE": tmp_path / "modules"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    columns = {name: column.tolist() for name, column in _columns(reference=config_name == "reference").items()}
    got = json.loads(run_python("-c", LOADED_ELSEWHERE, config_name, json.dumps(columns)).stdout)
    assert Path(got.pop("file")).is_relative_to(tmp_path / "modules")  # the copy, not the file in the package
    assert got == pytest.approx(preference_accuracy(**columns).as_dict(), rel=1e-12)


def test_batches_add_up_and_options_are_handed_on(tmp_path):
    metric = evaluate.load(METRIC_FOLDER, cache_dir=str(tmp_path))
    columns = _columns()
    for part in np.array_split(np.arange(60), 4):
        metric.add_batch(**{name: column[part] for name, column in columns.items()})
    got = metric.compute(confidence=0.5, prior_scale=0.1)
    assert got == pytest.approx(preference_accuracy(**columns, confidence=0.5, prior_scale=0.1).as_dict())
    assert got["num_pairs"] == 60 and got["length_effect"] != preference_accuracy(**columns).as_dict()["length_effect"]


def test_the_example_in_the_description_is_right(tmp_path):
    metric = evaluate.load(METRIC_FOLDER, cache_dir=str(tmp_path))
    assert metric.name == "preference_accuracy" and "dubois2024" in metric.citation
    example = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, "description", None, 0)
    assert len(example.examples) == 5
    assert doctest.DocTestRunner().run(example).failed == 0


def test_the_card_names_every_result_and_input(tmp_path):
    card = (Path(METRIC_FOLDER) / "README.md").read_text()
    metric = evaluate.load(METRIC_FOLDER, "reference", cache_dir=str(tmp_path))
    assert card.startswith("---\ntitle: preference_accuracy\n")
    results = preference_accuracy(**_columns()).as_dict()
    shown = [name for name in results if not name.endswith(("_low", "_high"))] + ["_low", "_high"]
    for name in (*metric.features, *shown, "confidence", "prior_scale"):
        assert f"`{name}`" in card, name


REFUSED = {
    "a reference without its configuration": (
        "default",
        {"ref_chosen_logps": [0.0], "ref_rejected_logps": [0.0]},
        r"evaluate.load\(..., config_name='reference'\)",
    ),
    "an unknown input": ("default", {"temperature": 2}, "temperature: no such input; there are chosen_logps"),
    "an unknown configuration": ("ratio", {}, "config_name='ratio' is unknown: choose from default, reference"),
    "no tokens": ("default", {"chosen_lengths": [0]}, "chosen_lengths holds 0: an answer has at least 1 token"),
}


@pytest.mark.parametrize("config_name, changes, text", REFUSED.values(), ids=REFUSED)
def test_refusals(tmp_path, config_name, changes, text):
    with pytest.raises(ValueError, match=text):
        evaluate.load(METRIC_FOLDER, config_name, cache_dir=str(tmp_path)).compute(**_columns(1) | changes)


FOLDERS = [
    ROUTING_IMBALANCE_FOLDER,
    ROUTER_SATURATION_FOLDER,
    VOCABULARY_SPECIALIZATION_FOLDER,
    EXPERT_COACTIVATION_FOLDER,
]
LOADED_ELSEWHERE_ROUTING_METRICS_LOADED = (
    PRELUDE
    + """
for folder, inputs in json.loads(sys.argv[1]):
    metric = evaluate.load(folder)
    print(json.dumps({"file": sys.modules[type(metric).__module__].__file__, **metric.compute(**inputs)}))
"""
)
E, K, T = 5, 2, 40


def _index(seed: int, num_tokens: int = T) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.permutation(E - 1)[:K].tolist() for _ in range(num_tokens)]  # the last expert is dead


def _ids(num_tokens: int = T) -> list[int]:
    return np.random.default_rng(9).integers(0, 6, num_tokens).tolist()


INPUTS = {
    ROUTING_IMBALANCE_FOLDER: {"top_k_index": _index(0), "num_experts": E},
    ROUTER_SATURATION_FOLDER: {"before": _index(0), "after": _index(1)},
    VOCABULARY_SPECIALIZATION_FOLDER: {"token_ids": _ids(), "top_k_index": _index(0), "num_experts": E},
    EXPERT_COACTIVATION_FOLDER: {"top_k_index": _index(0), "num_experts": E},
}


def _load(folder: str, tmp_path: Path):
    return evaluate.load(folder, cache_dir=str(tmp_path))


def test_a_process_without_network_loads_copies(tmp_path, monkeypatch):
    for name, value in {"HF_HOME": tmp_path, "HF_MODULES_CACHE": tmp_path / "modules"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    lines = run_python(
        "-c", LOADED_ELSEWHERE_ROUTING_METRICS_LOADED, json.dumps(list(INPUTS.items()))
    ).stdout.splitlines()
    for line, (folder, inputs) in zip(lines, INPUTS.items(), strict=True):
        got = json.loads(line)
        assert Path(got.pop("file")).is_relative_to(tmp_path / "modules")
        assert got == _load(folder, tmp_path).compute(**inputs)


def test_imbalance_is_what_a_loop_counts(tmp_path):
    metric = _load(ROUTING_IMBALANCE_FOLDER, tmp_path)
    index = _index(0)
    for begin in range(0, T, 16):
        metric.add_batch(top_k_index=index[begin : begin + 16])
    got = metric.compute(num_experts=E)
    load = [sum(expert in row for row in index) for expert in range(E)]
    shares = [count / (K * T) for count in load]
    assert got == {
        "mri": pytest.approx(max(load) / T),
        "mri_normalized": pytest.approx(max(load) / T * E / K),
        "load_entropy": pytest.approx(-sum(s * math.log(s) for s in shares if s) / math.log(E)),
        "load_cv": pytest.approx(np.std(load) / np.mean(load)),
        "dead_experts": load.count(0),
        "num_tokens": T,
    }
    assert got["dead_experts"] == 1


def test_saturation_is_what_a_loop_counts(tmp_path):
    inputs = INPUTS[ROUTER_SATURATION_FOLDER]
    kept = [len(set(a) & set(b)) / K for a, b in zip(inputs["before"], inputs["after"], strict=True)]
    got = _load(ROUTER_SATURATION_FOLDER, tmp_path).compute(**inputs)
    assert got == {"router_saturation": pytest.approx(sum(kept) / T), "num_tokens": T}


@pytest.mark.parametrize("average", ["occurrences", "ids"])
def test_specialization_is_what_a_loop_counts(tmp_path, average):
    metric = _load(VOCABULARY_SPECIALIZATION_FOLDER, tmp_path)
    inputs = INPUTS[VOCABULARY_SPECIALIZATION_FOLDER]
    before = metric.compute(**inputs)
    later = {**inputs, "top_k_index": _index(3), "favourite": before["favourite"], "average": average}
    got = metric.compute(**later)["vocabulary_specialization"]
    shares, visits = [], 0
    for token in set(inputs["token_ids"]):
        rows = [row for row, other in zip(inputs["top_k_index"], inputs["token_ids"], strict=True) if other == token]
        best = max(range(E), key=lambda expert: sum(expert in row for row in rows))
        assert before["favourite"][token] == best
        rows = [row for row, other in zip(later["top_k_index"], inputs["token_ids"], strict=True) if other == token]
        visits += sum(best in row for row in rows)
        shares.append(sum(best in row for row in rows) / len(rows))
    assert got == pytest.approx(visits / T if average == "occurrences" else sum(shares) / len(shares))


def test_coactivation_is_what_a_loop_counts(tmp_path):
    inputs = INPUTS[EXPERT_COACTIVATION_FOLDER]
    got = _load(EXPERT_COACTIVATION_FOLDER, tmp_path).compute(**inputs)
    pairs, load = np.zeros((E, E)), np.zeros(E)
    for row in inputs["top_k_index"]:
        load[row] += 1
        for i, j in combinations(row, 2):
            pairs[i, j] += 1
            pairs[j, i] += 1
    want = (pairs + np.diag(load)) / np.maximum(load, 1)[:, None]
    assert np.array(got["expert_coactivation"]) == pytest.approx(want)
    assert got["strongest"] == pytest.approx((want - np.diag(np.diag(want))).max())
    assert got["if_independent"] == 0.25


@pytest.mark.parametrize("folder", FOLDERS, ids=[Path(folder).name for folder in FOLDERS])
def test_examples_run_and_cards_name_everything(tmp_path, folder):
    metric = _load(folder, tmp_path)
    name, card = Path(folder).name, (Path(folder) / "README.md").read_text()
    assert metric.name == name and card.startswith(f"---\ntitle: {name}\n") and "2503.05029" in card
    example = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, "description", None, 0)
    assert len(example.examples) >= 4 and doctest.DocTestRunner().run(example).failed == 0
    results = metric.compute(**INPUTS[folder])
    for word in (*metric.features, *results, *INPUTS[folder]):
        assert f"`{word}`" in card, word


REFUSED_ROUTING_METRICS_LOADED = {
    "no number of experts": (ROUTING_IMBALANCE_FOLDER, {"num_experts": None}, "num_experts=None must be given"),
    "too few experts": (ROUTING_IMBALANCE_FOLDER, {"num_experts": 2}, r"top_k_index holds 3, outside \[0, num_exp"),
    "rows of two lengths": (
        ROUTING_IMBALANCE_FOLDER,
        {"top_k_index": [[0, 1], [2]]},
        "top_k_index has rows of 1, 2 experts: give at least one token",
    ),
    "an expert twice": (
        ROUTING_IMBALANCE_FOLDER,
        {"top_k_index": [[0, 1], [2, 2]]},
        r"top_k_index has \[2, 2\] in row 1: the experts of a token are distinct",
    ),
    "a negative expert": (
        ROUTER_SATURATION_FOLDER,
        {"before": [[-1, 0]], "after": [[1, 0]]},
        r"before has \[-1, 0\] in row 0: .* at least 0",
    ),
    "an unknown input": (ROUTER_SATURATION_FOLDER, {"num_experts": 4}, "num_experts: no such input; there are before"),
    "other tokens": (ROUTER_SATURATION_FOLDER, {"before": _index(0), "after": _index(0)[:9]}, "Mismatch|same tokens"),
    "one expert a token": (
        EXPERT_COACTIVATION_FOLDER,
        {"top_k_index": [[0], [1]]},
        "Co-activation needs at least two experts per token, and K is 1",
    ),
    "an unknown average": (
        VOCABULARY_SPECIALIZATION_FOLDER,
        {"average": "tokens"},
        "average='tokens' is unknown: choose from occurrences, ids",
    ),
}


@pytest.mark.parametrize(
    "folder, changes, text", REFUSED_ROUTING_METRICS_LOADED.values(), ids=REFUSED_ROUTING_METRICS_LOADED
)
def test_refusals__routing_metrics_loaded(tmp_path, folder, changes, text):
    with pytest.raises(ValueError, match=text):
        _load(folder, tmp_path).compute(**INPUTS[folder] | changes)


FOLDERS_SURGERY_METRICS_LOADED = {
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


def _columns_surgery_metrics_loaded() -> dict[str, dict[str, list]]:
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


def _load_surgery_metrics_loaded(name: str, folder: Path):
    return evaluate.load(FOLDERS_SURGERY_METRICS_LOADED[name], CONFIGURATIONS.get(name), cache_dir=str(folder))


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
    columns, metric = _columns_surgery_metrics_loaded()[name], _load_surgery_metrics_loaded(name, tmp_path)
    for part in np.array_split(np.arange(ROWS), 3):
        metric.add_batch(**{key: [column[row] for row in part] for key, column in columns.items()})
    got = metric.compute(**OPTIONS)
    expected = {"num_questions" if name == "mcq_accuracy" else "num_texts": ROWS}
    for result, rows in _expected_means(name, columns).items():
        expected |= zip((result, f"{result}_low", f"{result}_high"), bootstrap_interval(rows, **OPTIONS), strict=True)
    assert got == pytest.approx(expected, rel=1e-12)


def test_membership_inference(tmp_path):
    columns = _columns_surgery_metrics_loaded()["membership_inference"]
    got = _load_surgery_metrics_loaded("membership_inference", tmp_path).compute(
        **columns, **OPTIONS, retrained_aucs={"min_k_auc": 0.5}
    )
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
    got = _load_surgery_metrics_loaded("membership_inference", tmp_path).compute(**columns)
    assert got["loss_auc"] == 0 and got["loss_over_forgotten"] is True
    columns["is_member"] = [not member for member in columns["is_member"]]
    got = _load_surgery_metrics_loaded("membership_inference", tmp_path).compute(**columns)
    assert got["loss_auc"] == 1 and got["loss_over_forgotten"] is False


def test_edit_success(tmp_path):
    columns = _columns_surgery_metrics_loaded()["edit_success"]
    got = _load_surgery_metrics_loaded("edit_success", tmp_path).compute(**columns, **OPTIONS)
    accuracy = np.array(columns["hits"]) / np.array(columns["tokens"])
    for place, kind in enumerate(("reliability", "generalisation", "portability")):
        expected = bootstrap_interval(accuracy[place::3], **{**OPTIONS, "groups": GROUPS[place::3]})
        assert (got[kind], got[f"{kind}_low"], got[f"{kind}_high"]) == pytest.approx(tuple(expected))
        assert got[f"num_{kind}"] == 8
    old, new = np.exp(columns["old_logps"][::4]), np.exp(columns["new_logps"][::4])
    expected = bootstrap_interval(old / (old + new), **{**OPTIONS, "groups": GROUPS[::4]})
    assert (got["conflict_score"], got["conflict_score_low"], got["conflict_score_high"]) == pytest.approx(expected)
    assert got["num_conflict_score"] == 6
    plain = evaluate.load(FOLDERS_SURGERY_METRICS_LOADED["edit_success"], cache_dir=str(tmp_path))
    got = plain.compute(kinds=["portability"], hits=[1], tokens=[2])
    assert got["portability"] == 0.5 and got.keys().isdisjoint({"reliability", "conflict_score"})


def test_retained_behaviour(tmp_path):
    columns = _columns_surgery_metrics_loaded()["retained_behaviour"]
    got = _load_surgery_metrics_loaded("retained_behaviour", tmp_path).compute(**columns, **OPTIONS)
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
    got = _load_surgery_metrics_loaded("retained_behaviour", tmp_path).compute(**columns)
    assert got["num_texts"] == 0 and "kl" not in got and "locality" in got


LOADED_ELSEWHERE_SURGERY_METRICS_LOADED = (
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
    asked = {
        name: (FOLDERS_SURGERY_METRICS_LOADED[name], CONFIGURATIONS.get(name), columns)
        for name, columns in _columns_surgery_metrics_loaded().items()
    }
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    found = json.loads(run_python("-c", LOADED_ELSEWHERE_SURGERY_METRICS_LOADED, str(tmp_path / "asked.json")).stdout)
    for name, columns in _columns_surgery_metrics_loaded().items():
        file = Path(found[name].pop("file"))
        assert "evaluate_modules" in file.parts and not file.is_relative_to(PROJECT)  # a copy, not the package's file
        assert found[name] == pytest.approx(
            _load_surgery_metrics_loaded(name, tmp_path / "here").compute(**columns), rel=1e-12, nan_ok=True
        )


@pytest.mark.parametrize("name", FOLDERS_SURGERY_METRICS_LOADED)
def test_the_example_in_the_description_is_right__surgery_metrics_loaded(tmp_path, name):
    metric = _load_surgery_metrics_loaded(name, tmp_path)
    assert metric.name == name and metric.citation.startswith("@")
    example = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, "description", None, 0)
    assert len(example.examples) >= 4
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("name", FOLDERS_SURGERY_METRICS_LOADED)
def test_the_card_names_every_input_and_result(tmp_path, name):
    card = (Path(FOLDERS_SURGERY_METRICS_LOADED[name]) / "README.md").read_text(encoding="utf-8")
    metric, columns = _load_surgery_metrics_loaded(name, tmp_path), _columns_surgery_metrics_loaded()[name]
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
REFUSED_SURGERY_METRICS_LOADED = {
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


@pytest.mark.parametrize(
    "name, columns, text", REFUSED_SURGERY_METRICS_LOADED.values(), ids=REFUSED_SURGERY_METRICS_LOADED
)
def test_refusals__surgery_metrics_loaded(tmp_path, name, columns, text):
    with pytest.raises(ValueError, match=text) as caught:
        _load_surgery_metrics_loaded(name, tmp_path).compute(**columns)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FOLDERS_SURGERY_METRICS_LOADED)
def test_an_unknown_configuration_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="config_name='ratio' is unknown: choose from default"):
        evaluate.load(FOLDERS_SURGERY_METRICS_LOADED[name], "ratio", cache_dir=str(tmp_path))


def test_two_answers_need_their_configuration(tmp_path):
    metric = evaluate.load(FOLDERS_SURGERY_METRICS_LOADED["edit_success"], cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"evaluate.load\(..., config_name='conflict'\)"):
        metric.compute(kinds=["reliability"], hits=[1], tokens=[1], old_logps=[-1.0], new_logps=[-1.0])
