"""The metric as evaluate loads it, from a copy in its cache and without a network, against the pure functions."""

import doctest
import json
from pathlib import Path

import numpy as np
import pytest

from hf_moe_cpt.analysis.preference_accuracy import METRIC_FOLDER, preference_accuracy
from tests.helpers.fresh_process import run_python
from tests.helpers.offline_metrics import PRELUDE


evaluate = pytest.importorskip("evaluate")

LOADED_ELSEWHERE = (
    PRELUDE
    + """
from hf_moe_cpt.analysis.preference_accuracy import METRIC_FOLDER

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
