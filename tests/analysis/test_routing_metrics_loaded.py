"""The routing metrics as evaluate loads them, from copies in its cache and without a network, against loops."""

import doctest
import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from hf_moe_cpt.analysis.routing_metrics import (
    EXPERT_COACTIVATION_FOLDER,
    ROUTER_SATURATION_FOLDER,
    ROUTING_IMBALANCE_FOLDER,
    VOCABULARY_SPECIALIZATION_FOLDER,
)
from tests.helpers.fresh_process import run_python
from tests.helpers.offline_metrics import PRELUDE


evaluate = pytest.importorskip("evaluate")

FOLDERS = [
    ROUTING_IMBALANCE_FOLDER,
    ROUTER_SATURATION_FOLDER,
    VOCABULARY_SPECIALIZATION_FOLDER,
    EXPERT_COACTIVATION_FOLDER,
]
LOADED_ELSEWHERE = (
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
    lines = run_python("-c", LOADED_ELSEWHERE, json.dumps(list(INPUTS.items()))).stdout.splitlines()
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


REFUSED = {
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


@pytest.mark.parametrize("folder, changes, text", REFUSED.values(), ids=REFUSED)
def test_refusals(tmp_path, folder, changes, text):
    with pytest.raises(ValueError, match=text):
        _load(folder, tmp_path).compute(**INPUTS[folder] | changes)
