"""The metrics as evaluate loads them, with their examples and cards, against the functions and loops."""

import doctest
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_moe_cpt.evaluation import text_metrics
from hf_moe_cpt.evaluation.statistics import (
    bootstrap_interval,
    bootstrap_two_samples,
    preference_accuracy,
    ratio_of_sums,
)
from hf_moe_cpt.metrics import metric_folder
from hf_moe_cpt.routing import metrics as routing


evaluate = pytest.importorskip("evaluate")

E, K, T = 5, 2, 40
ROWS = 24
GROUPS = [f"subject {row % 7}" for row in range(ROWS)]
OPTIONS = {"groups": GROUPS, "confidence": 0.8, "resamples": 200, "seed": 3}
CONFIGURATIONS = {"edit_success": "conflict", "preference_accuracy": "reference"}


def _index(seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.permutation(E - 1)[:K].tolist() for _ in range(T)]  # the last expert is dead


def _pairs() -> dict[str, list]:
    generator = np.random.default_rng(0)
    logps = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    columns = {name: np.round(-20 * generator.random(60), 1).tolist() for name in logps}
    return columns | {name: generator.integers(1, 30, 60).tolist() for name in ("chosen_lengths", "rejected_lengths")}


@cache
def inputs_of() -> dict[str, dict[str, Any]]:
    """Inputs of each metric; rows with tokens differ in length."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 9, ROWS)
    logps = [np.round(-4 * generator.random(length), 3).tolist() for length in lengths]
    bits = [generator.integers(0, 2, length).tolist() for length in lengths]
    words = [" ".join(generator.choice(["a", "b,", "C", "dog"], 9)) for _ in range(2 * ROWS)]
    tokens, ids = generator.integers(1, 6, ROWS), np.random.default_rng(9).integers(0, 6, T)
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
        "preference_accuracy": _pairs(),
        "routing_imbalance": {"top_k_index": _index(0), "num_experts": E},
        "router_saturation": {"before": _index(0), "after": _index(1)},
        "vocabulary_specialization": {"token_ids": ids.tolist(), "top_k_index": _index(0), "num_experts": E},
        "expert_coactivation": {"top_k_index": _index(0), "num_experts": E},
    }


METRICS = sorted(inputs_of())


def load(name: str, folder: Path, config_name: str | None = None) -> Any:
    return evaluate.load(metric_folder(name), config_name or CONFIGURATIONS.get(name), cache_dir=str(folder))


@pytest.mark.parametrize("name", METRICS)
def test_examples_run_and_cards_name_every_input_and_result(tmp_path, name):
    metric, card = load(name, tmp_path), (Path(metric_folder(name)) / "README.md").read_text(encoding="utf-8")
    assert metric.name == name and metric.citation.startswith("@") and card.startswith(f"---\ntitle: {name}\n")
    example = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, "description", None, 0)
    assert len(example.examples) >= 4 and doctest.DocTestRunner().run(example).failed == 0
    options = {"retrained_aucs": {"loss_auc": 0.5}} if name == "membership_inference" else {}
    results = metric.compute(**inputs_of()[name], **options)
    endings = ("_low", "_high", "_over_forgotten", "_privacy_leakage")
    shown = {result for result in results if not result.endswith(endings)}
    shown |= {ending for ending in endings if any(result.endswith(ending) for result in results)}
    for word in (*metric.features, *shown, *metric.OPTIONS):
        assert f"`{word}`" in card or (word in ("_low", "_high") and f"{word}`" in card), word


@pytest.mark.parametrize("config_name", ["default", "reference"])
def test_preferences_in_batches_are_those_of_the_function(tmp_path, config_name):
    columns = {name: column for name, column in _pairs().items() if config_name == "reference" or "ref_" not in name}
    metric = load("preference_accuracy", tmp_path, config_name)
    for part in np.array_split(np.arange(60), 4):
        metric.add_batch(**{name: [column[row] for row in part] for name, column in columns.items()})
    got = metric.compute(confidence=0.5, prior_scale=0.1)
    assert got == pytest.approx(preference_accuracy(**columns, confidence=0.5, prior_scale=0.1).as_dict())
    assert got["num_pairs"] == 60 and got["length_effect"] != preference_accuracy(**columns).as_dict()["length_effect"]


def test_routing_metrics_in_batches_are_those_of_the_functions(tmp_path):
    inputs, index = inputs_of(), torch.tensor(_index(0))
    metric, load_of = load("routing_imbalance", tmp_path), routing.expert_load(index, E)
    for begin in range(0, T, 16):
        metric.add_batch(top_k_index=_index(0)[begin : begin + 16])
    mri = float(routing.max_routing_imbalance(index, E))
    assert metric.compute(num_experts=E) == {
        "mri": pytest.approx(mri),
        "mri_normalized": pytest.approx(mri * E / K),
        "load_entropy": pytest.approx(float(routing.load_entropy(load_of))),
        "load_cv": pytest.approx(float(routing.load_cv(load_of))),
        "dead_experts": 1,
        "num_tokens": T,
    }
    kept = routing.router_saturation(index, torch.tensor(_index(1)))
    got = load("router_saturation", tmp_path).compute(**inputs["router_saturation"])
    assert got == {"router_saturation": pytest.approx(kept), "num_tokens": T}
    got = load("expert_coactivation", tmp_path).compute(**inputs["expert_coactivation"])
    want = routing.expert_coactivation(index, E)
    assert np.array(got["expert_coactivation"]) == pytest.approx(want.numpy()) and got["if_independent"] == 0.25
    assert got["strongest"] == pytest.approx(float((want - want.diag().diag()).max()))
    metric, asked = load("vocabulary_specialization", tmp_path), inputs["vocabulary_specialization"]
    favourite, ids = metric.compute(**asked)["favourite"], torch.tensor(asked["token_ids"])
    counter = routing.VocabularyCounter(int(ids.max()) + 1, E)
    counter.add(ids, index)
    assert favourite == routing.favourite_experts(counter.counts).tolist()
    for average in ("occurrences", "ids"):
        got = metric.compute(**{**asked, "top_k_index": _index(3), "favourite": favourite, "average": average})
        settings = {"average": average, "favourite": torch.tensor(favourite)}
        want = routing.vocabulary_specialization(ids, torch.tensor(_index(3)), len(favourite), E, **settings)
        assert got["vocabulary_specialization"] == pytest.approx(want)


def _expected_means(name: str, columns: dict[str, list]) -> dict[str, np.ndarray]:
    """The rows whose mean a result is."""
    if name == "mcq_accuracy":
        return {"accuracy": text_metrics.mcq_correct(columns["option_losses"], columns["answers"])}
    if name == "memorisation":
        return {
            "probability": text_metrics.probability(columns["logps"]),
            "exact_memorisation": text_metrics.exact_memorisation(columns["hits"]),
            "extraction_strength": text_metrics.extraction_strength(columns["hits"]),
        }
    if name == "fluency":
        return {"ngram_entropy": text_metrics.ngram_entropy(columns["predictions"])}
    overlap = text_metrics.rouge_l(**columns)
    return {f"rouge_l_{field}": column for field, column in overlap._asdict().items()}


@pytest.mark.parametrize("name", ["mcq_accuracy", "memorisation", "continuation_overlap", "fluency"])
def test_means_and_intervals_are_those_of_the_functions(tmp_path, name):
    columns, metric = inputs_of()[name], load(name, tmp_path)
    for part in np.array_split(np.arange(ROWS), 3):
        metric.add_batch(**{key: [column[row] for row in part] for key, column in columns.items()})
    got = metric.compute(**OPTIONS)
    expected = {"num_questions" if name == "mcq_accuracy" else "num_texts": ROWS}
    for result, rows in _expected_means(name, columns).items():
        interval = bootstrap_interval(rows, **OPTIONS, is_share=name != "fluency")
        expected |= zip((result, f"{result}_low", f"{result}_high"), interval, strict=True)
    assert got == pytest.approx(expected, rel=1e-12)


def test_membership_inference(tmp_path):
    columns = inputs_of()["membership_inference"]
    got = load("membership_inference", tmp_path).compute(**columns, **OPTIONS, retrained_aucs={"min_k_auc": 0.5})
    inside = np.array(columns["is_member"])
    scores = {
        "loss": text_metrics.loss_score(columns["logps"]),
        "zlib": text_metrics.zlib_score(-text_metrics.loss_score(columns["logps"]), columns["texts"]),
        "min_k": text_metrics.min_k(columns["logps"]),
        "min_k_plus_plus": text_metrics.min_k_plus_plus(columns["logps"], columns["means"], columns["stds"]),
    }
    groups = [np.array(GROUPS)[inside == side].tolist() for side in (True, False)]
    for attack, score in scores.items():
        interval = bootstrap_two_samples(
            score[inside], score[~inside], text_metrics.auc, *groups, 0.8, 200, 3, is_share=True
        )
        assert tuple(got[f"{attack}_auc{end}"] for end in ("", "_low", "_high")) == interval
        assert got[f"{attack}_over_forgotten"] is (interval.high < 0.5)
        assert (f"{attack}_privacy_leakage" in got) == (attack == "min_k")
    assert got["min_k_privacy_leakage"] == text_metrics.privacy_leakage(got["min_k_auc"], 0.5)
    assert (got["num_members"], got["num_others"]) == (16, 8)


def test_forgetting_too_much_is_flagged(tmp_path):
    columns = {"logps": [[-9.0 - row] for row in range(9)] + [[-1.0 - row / 9] for row in range(9)]}
    columns |= {"means": [[-2.0]] * 18, "stds": [[1.0]] * 18, "texts": ["a text"] * 18}
    columns["is_member"], few = [True] * 9 + [False] * 9, {"resamples": 50}
    got = load("membership_inference", tmp_path).compute(**columns, **few)
    assert got["loss_auc"] == 0 and got["loss_over_forgotten"] is True
    columns["is_member"] = [not member for member in columns["is_member"]]
    got = load("membership_inference", tmp_path).compute(**columns, **few)
    assert got["loss_auc"] == 1 and got["loss_over_forgotten"] is False


def test_edit_success(tmp_path):
    columns = inputs_of()["edit_success"]
    got = load("edit_success", tmp_path).compute(**columns, **OPTIONS)
    accuracy = np.array(columns["hits"]) / np.array(columns["tokens"])
    for place, kind in enumerate(("reliability", "generalisation", "portability")):
        options = {**OPTIONS, "groups": GROUPS[place::3], "is_share": True}
        expected = bootstrap_interval(accuracy[place::3], **options)
        assert (got[kind], got[f"{kind}_low"], got[f"{kind}_high"]) == pytest.approx(tuple(expected))
        assert got[f"num_{kind}"] == 8
    old, new = np.exp(columns["old_logps"][::4]), np.exp(columns["new_logps"][::4])
    expected = bootstrap_interval(old / (old + new), **{**OPTIONS, "groups": GROUPS[::4], "is_share": True})
    assert (got["conflict_score"], got["conflict_score_low"], got["conflict_score_high"]) == pytest.approx(expected)
    assert got["num_conflict_score"] == 6
    plain = load("edit_success", tmp_path, "default")
    got = plain.compute(kinds=["portability"], hits=[1], tokens=[2])
    assert got["portability"] == 0.5 and got.keys().isdisjoint({"reliability", "conflict_score"})


def test_retained_behaviour(tmp_path):
    columns = inputs_of()["retained_behaviour"]
    got = load("retained_behaviour", tmp_path).compute(**columns, **OPTIONS)
    for neighbours, names in ((False, ("kl", "top1_agreement")), (True, ("neighbour_kl", "locality"))):
        rows = [row for row in range(ROWS) if columns["is_neighbour"][row] == neighbours]
        for name, key in zip(names, ("kl", "agrees"), strict=True):
            texts = [columns[key][row] for row in rows]
            totals = np.array([(sum(text), len(text)) for text in texts])
            settings = {**OPTIONS, "groups": [GROUPS[row] for row in rows]}
            expected = bootstrap_interval(totals, **settings, statistic=ratio_of_sums, is_share=key == "agrees")
            assert got[name] == pytest.approx(np.concatenate(texts).mean())
            assert (got[name], got[f"{name}_low"], got[f"{name}_high"]) == pytest.approx(expected)
    assert (got["num_texts"], got["num_neighbours"]) == (12, 12)
    got = load("retained_behaviour", tmp_path).compute(**columns | {"is_neighbour": [True] * ROWS})
    assert got["num_texts"] == 0 and "kl" not in got and "locality" in got


ONE_TEXT = {"logps": [[-1.0]], "means": [[-1.0]], "stds": [[1.0]], "texts": ["a"], "is_member": [True]}
ONE_PAIR = {"chosen_logps": [-1.0], "rejected_logps": [-2.0], "chosen_lengths": [1], "rejected_lengths": [1]}
ONE_EDIT = {"kinds": ["reliability"], "hits": [1], "tokens": [1]}
REFERENCE = {"ref_chosen_logps": [0.0], "ref_rejected_logps": [0.0]}
ANSWERS = {"old_logps": [-1.0], "new_logps": [-1.0]}
ONE_ROW = {"kl": [[0.1]], "agrees": [[1]], "is_neighbour": [False]}
TOKENS = {"top_k_index": _index(0), "num_experts": E}
VOCABULARY = TOKENS | {"token_ids": [0] * T, "average": "tokens"}
REFUSED = [
    ("preference_accuracy", "default", ONE_PAIR | REFERENCE, r"evaluate.load\(..., config_name='reference'\)"),
    ("preference_accuracy", "default", ONE_PAIR | {"heat": 2}, "heat: no such input; there are chosen_logps"),
    ("preference_accuracy", "default", ONE_PAIR | {"chosen_lengths": [0]}, "chosen_lengths holds 0: an answer has"),
    ("routing_imbalance", None, TOKENS | {"num_experts": None}, "num_experts=None must be given"),
    ("routing_imbalance", None, TOKENS | {"num_experts": 2}, r"top_k_index holds 3, outside \[0, num_exp"),
    ("routing_imbalance", None, TOKENS | {"top_k_index": [[0, 1], [2]]}, "top_k_index has rows of 1, 2 experts: give"),
    ("routing_imbalance", None, TOKENS | {"top_k_index": [[0, 1], [2, 2]]}, r"has \[2, 2\] in row 1: .* distinct"),
    ("router_saturation", None, {"before": [[-1, 0]], "after": [[1, 0]]}, r"has \[-1, 0\] in row 0: .* at least 0"),
    ("router_saturation", None, {"before": [[0]], "after": [[0]], "top": 4}, "top: no such input; there are before"),
    ("router_saturation", None, {"before": _index(0), "after": _index(0)[:9]}, "Mismatch|same tokens"),
    ("expert_coactivation", None, TOKENS | {"top_k_index": [[0], [1]]}, "at least two experts per token, and K is 1"),
    ("vocabulary_specialization", None, VOCABULARY, "average='tokens' is unknown: choose from occurrences, ids"),
    ("fluency", None, {"predictions": ["a"], "top_k": 2}, "top_k: no such input; there are predictions, gr"),
    ("mcq_accuracy", None, {"option_losses": [[1.0, 2.0]]}, "answers: input missing; give all of option_l"),
    ("continuation_overlap", None, {"predictions": ["a"]}, "references: input missing"),
    ("mcq_accuracy", None, {"option_losses": [[1.0, 2.0], [1.0]], "answers": [0, 0]}, "option_losses must be numbers"),
    ("memorisation", None, {"logps": [[-1.0]], "hits": [[2]]}, r"hits\[0\] holds 2: for each token it is 1"),
    ("membership_inference", None, ONE_TEXT, "is_member is True for all 1 texts: give members and others"),
    ("membership_inference", None, ONE_TEXT | {"retrained_aucs": {"auc": 0.5}}, "auc: no such input; there are loss"),
    ("edit_success", "conflict", ONE_EDIT | ANSWERS | {"kinds": ["locality"]}, "kinds holds 'locality' at question 0"),
    ("edit_success", "default", ONE_EDIT | ANSWERS, r"evaluate.load\(..., config_name='conflict'\)"),
    ("retained_behaviour", None, ONE_ROW | {"groups": ["a", "b"]}, "groups has 2 entries for 1 rows"),
]


@pytest.mark.parametrize("name, config_name, inputs, text", REFUSED)
def test_refusals_are_one_line(tmp_path, name, config_name, inputs, text):
    with pytest.raises(ValueError, match=text) as caught:
        load(name, tmp_path, config_name).compute(**inputs)
    assert "\n" not in str(caught.value) or text.startswith("Mismatch")  # evaluate's own


@pytest.mark.parametrize("name", METRICS)
def test_an_unknown_configuration_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="config_name='ratio' is unknown: choose from default"):
        load(name, tmp_path, "ratio")
    with pytest.raises(ValueError, match="'rouge' is no metric: choose from continuation_overlap, edit_success"):
        metric_folder("rouge")
