"""Hostile inputs to every command: refused in one line, never a traceback, a hang, or exit code 0 with a wrong number.

What went wrong once is a table; the fuzzer draws from every option and every file that a command reads.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from hf_moe_cpt.reading import read_config, read_model, reading
from tests.helpers.hostile_inputs import (
    DAMAGE,
    ROWS,
    VALUES,
    WEIGHTS,
    WORKING,
    Case,
    Trials,
    files_read,
    make_material,
    options_of,
)
from tests.helpers.source_tree import PROJECT
from tests.helpers.tiny_models import CONFIGS, tiny_model


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trials]:
    material = make_material(tmp_path_factory.mktemp("material"))
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    running = Trials(material, tmp_path_factory.mktemp("cases"), environment)
    yield running
    running.close()


REFUSED = {  # case, and what is said of it
    "lost tensor, trained": (Case("cpt", file="moe/model.safetensors", damage=WEIGHTS["lost"]), "would be random"),
    "lost tensor, aligned": (Case("rainbowpo", file="dense/model.safetensors", damage=WEIGHTS["lost"]), "be random"),
    "lost tensor, operated": (Case("surgery", file="dense/model.safetensors", damage=WEIGHTS["lost"]), "be random"),
    "NaN gates, analysed": (Case("analyze", file="moe/model.safetensors", damage=WEIGHTS["NaN"]), "no finite numbers"),
    "NaN weights, upcycled": (
        Case("upcycle", file="dense/model.safetensors", damage=WEIGHTS["NaN"]),
        "no finite numbers",
    ),
    "shape": (Case("cpt", file="moe/model.safetensors", damage=WEIGHTS["narrow"]), "its configuration says"),
    "cut weights": (Case("analyze", file="moe/model.safetensors", damage=DAMAGE["half"]), "SafetensorError"),
    "no configuration": (Case("plan", file="moe/config.json", damage=DAMAGE["number"]), "the configuration of 'moe'"),
    "deep rows": (Case("analyze", file="text.jsonl", damage=DAMAGE["deep"]), "text.jsonl"),
    "empty pairs": (Case("rainbowpo", file="pairs.jsonl", damage=DAMAGE["empty"]), "pairs.jsonl"),
    "a billion layers": (Case("plan", file="moe/config.json", damage=VALUES["num_hidden_layers", 10**9]), "outside"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_went_wrong_once_is_refused(name: str, trials: Trials) -> None:
    case, message = REFUSED[name]
    outcome = trials.run(case)
    assert (outcome.code, outcome.fault) == (2, None) and message in outcome.said


READ = {  # damage -> what is said
    "lost": "model.layers.1.*is not in its weights, and would be random|more are not in its weights",
    "NaN": "holds values that are no finite numbers",
    "narrow": r"has the shape \(15,\), its configuration says \(16,\)",
    "half": "SafetensorError",
}


@pytest.mark.parametrize("damage", READ)
def test_weights_are_checked_when_they_are_read(damage: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    {**DAMAGE, **WEIGHTS}[damage](tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"^the model '.*' cannot be used .*({READ[damage]}).*: save it again, or"):
        read_model(AutoModelForCausalLM, tmp_path)


@pytest.mark.parametrize("damage", ["empty", "no text", "list", "number", "null", "word", "deep", "half"])
def test_a_configuration_of_any_form_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    CONFIGS["llama"]().save_pretrained(tmp_path)
    DAMAGE[damage](tmp_path / "config.json")
    with pytest.raises(ValueError, match="^the configuration of '.*' cannot be used .*: save it again, or fetch it"):
        read_config(tmp_path)


def test_memory_and_network_are_no_fault_of_a_file() -> None:
    for error in (MemoryError(), ConnectionError("down"), ImportError("no peft")):
        with pytest.raises(type(error)), reading("a file"):
            raise error


@pytest.mark.slow
@pytest.mark.parametrize("command", WORKING)
def test_the_cases_differ_from_runs_that_work(command: str, trials: Trials) -> None:
    outcome = trials.run(Case(command))
    assert (outcome.code, outcome.fault) == (0, None), outcome.said


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """One setting of a command by flag or file, or one damaged file that it reads."""
    command = draw(st.sampled_from(sorted(WORKING)))
    kind = draw(st.sampled_from(("flag", "file of settings", "file")))
    if kind != "file":
        option = draw(st.sampled_from(options_of(command)))
        if kind == "flag":
            word = draw(st.sampled_from(("nan", "inf", "-1", "0", "1e400", "", "9" * 20, "[1]", "\u2603")) | st.text())
            return Case(command, {option: word.replace("\0", "")})
        value = draw(st.sampled_from(("true", "null", ".nan", "-.inf", "-1", "1.5", "[1, 2]", "{a: 1}", "2001-01-01")))
        return Case(command, {option: None}, settings=f"{option}: {value}\n")
    file = draw(st.sampled_from(files_read(command)))
    known = {**DAMAGE, **(WEIGHTS if file.endswith("safetensors") else ROWS if file.endswith("jsonl") else VALUES)}
    name = draw(st.sampled_from(sorted(known, key=str)))
    return Case(command, file=file, name=name, damage=known[name])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_input_ends_in_a_traceback_a_hang_or_a_wrong_number(trials: Trials) -> None:
    found = []

    @settings(max_examples=1000, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases())
    def every(case: Case) -> None:
        outcome = trials.run(case)
        quotes = outcome.fault == "no number" and case.command in ("card", "push")  # their options are all text
        if outcome.fault is not None and not (quotes and case.options):
            found.append((outcome.fault, outcome.code, case, outcome.said[-300:]))

    every()
    assert not found, f"{len(found)} of {trials.count}:\n" + "\n".join(map(str, found))
