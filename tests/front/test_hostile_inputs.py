"""Hostile inputs to every command: refused in one line, never a traceback, a hang, or exit code 0 with a wrong number.

What went wrong once is a table; the fuzzer draws from every option and every file that a command reads.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_moe_cpt.cli import COMMANDS
from hf_moe_cpt.evaluation.surgery import base_of_adapter, without_anchored
from hf_moe_cpt.hub.checkpoint_io import merge
from hf_moe_cpt.reading import (
    read_adapter,
    read_config,
    read_generation_config,
    read_json,
    read_model,
    reading,
    shards_of,
)
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_data import read_state
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer
from tests.helpers import cpt_runs
from tests.helpers.hostile_inputs import (
    DAMAGE,
    GONE_ON,
    STAGE_OPTIONS,
    STAGES,
    VALUES,
    WEIGHTS,
    WORKING,
    Case,
    Trials,
    damages_of,
    files_read,
    is_no_value,
    make_material,
    numbers_of,
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
    "an adapter, trained": (Case("cpt", {"model_name_or_path": "adapter"}), "merge it into its base"),
    "empty pairs": (Case("rainbowpo", file="pairs.jsonl", damage=DAMAGE["empty"]), "pairs.jsonl"),
    "lost tensor, told": (Case("card", file="run/model.safetensors", damage=WEIGHTS["lost"]), "be random"),
    "no mode": (Case("cpt", {"torch_compile_mode": "fast"}), "'fast' is unknown: choose from default,"),
    "another's record": (
        Case("surgery-eval/resume", file="begun-surgery-eval/work/after/texts.json", damage=VALUES["features", None]),
        "begun-surgery-eval/work cannot be used",
    ),
    "another's data": (
        Case("cpt/tokenized", file="tokenized/train/words/state.json", damage=VALUES["_data_files", "[1]"]),
        "tokenized/train/words cannot be used",
    ),
    "a tokenizer of words": (
        Case("quickstart/resume", file="begun-quickstart/tokenizer/tokenizer.json", damage=VALUES["model", "words"]),
        "the tokenizer of 'begun-quickstart/tokenizer' cannot be used",
    ),
    "lost tensor, adapter": (
        Case("surgery-eval/adapter", file="adapter/adapter_model.safetensors", damage=WEIGHTS["lost"]),
        "would be random",
    ),
    "no measure": (Case("surgery", {"metric_for_best_model": "-1"}), "metric_for_best_model"),
    "no data": (
        Case("rejection-sample/resume", {"dataset_name": None}, settings="dataset_name: null\n"),
        "--dataset_name is missing",
    ),
    "no sizes": (
        Case("cpt/shards", {"parallelism_config": None}, settings="parallelism_config: {a: 1}\n"),
        "is no ParallelismConfig",
    ),
    "no drawing": (Case("schedule", {"plot": "-1"}), "--plot"),
    "noise": (Case("upcycle", {"expert_noise": "99999999999999999999"}), "must lie in [0, 1]"),
    "no GPU": (
        Case("rainbowpo/resume", {"activation_offloading": None}, settings="activation_offloading: true\n"),
        "moves activations from a GPU",
    ),
    "no labels": (Case("rewarm", {"label_names": "99999999999999999999"}), "labels are made of the tokens"),
    "no batch": (
        Case("cpt/tokenized", {"dataloader_drop_last": None}, settings="dataloader_drop_last: true\n"),
        "no batch was evaluated",
    ),
    "no option of a model": (
        Case("rainbowpo/resume", {"model_init_kwargs": None}, settings="model_init_kwargs: {a: 1}\n"),
        "unexpected keyword argument 'a'",
    ),
    "no stage": (Case("iterate", {"sample": None}, settings="sample: null\n"), "--sample is missing"),
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


@pytest.mark.parametrize("damage", ["empty", "no text", "list", "word", "deep", "half"])
def test_how_a_model_generates_is_read_by_name_and_may_be_missing(damage: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    DAMAGE[damage](tmp_path / "generation_config.json")
    with pytest.raises(ValueError, match="^the generation configuration of '.*' cannot be used .*: save it again, or"):
        read_model(AutoModelForCausalLM, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1.5}')
    with pytest.raises(ValueError, match="eos_token_id=1.5 is no int or list of them"):
        read_model(AutoModelForCausalLM, tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert read_generation_config(tmp_path) is None
    read_model(AutoModelForCausalLM, tmp_path)


def test_an_adapter_is_no_model_to_start_from(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for read in (
        read_config,
        lambda name: CPTTrainer(str(name), CPTConfig(str(tmp_path), max_steps=1, use_cpu=True), []),
    ):
        with pytest.raises(ValueError, match="is an adapter, and a whole model is wanted: merge it into its base"):
            read(tmp_path)


@pytest.mark.parametrize("damage", ["lost", "renamed", "NaN", "half"])
def test_the_weights_of_an_adapter_are_checked_when_they_are_read(damage: str, tmp_path: Path) -> None:
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name in ("one", "other"):
        adapted.save_pretrained(tmp_path / name)
    read_adapter(tmp_path / "one")
    {**DAMAGE, **WEIGHTS}[damage](tmp_path / "one" / "adapter_model.safetensors")
    said = READ[damage] if damage in ("NaN", "half") else "is not in its weights, and would be random"
    for read in (read_adapter, lambda _: merge([tmp_path / "one", tmp_path / "other"], tmp_path / "out", [1, 1])):
        with pytest.raises(ValueError, match=f"one/adapter_model.safetensors cannot be used .*({said}).*: save it"):
            read(tmp_path / "one")
    assert not (tmp_path / "out").exists()


STATE = {  # file of a checkpoint -> what is written into it, and what is said
    "trainer_state.json": ({"log_history": 7}, "log_history=7 is no list.dict"),
    "run_state.json": ({"tokens_seen": "many"}, "tokens_seen='many' is no int"),
    "bad_steps.json": ({"losses": [1.0, "x"]}, r"losses=.1.0, 'x'. is no list.float"),
    "rng_state.pth": (None, "rng_state.*.pth. in .*cannot be used"),
    "scheduler.pt": (None, "schedule's state in .*cannot be used"),
}


TWO_STEPS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was cut after the first of two steps, with a checkpoint of which no list says what was written."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    cpt_runs.trainer(folder, "llama", **TWO_STEPS).train()
    shutil.rmtree(folder / "checkpoint-2")
    (folder / "checkpoint-1" / "checkpoint_files.json").unlink()
    return folder


@pytest.mark.parametrize(
    "file", [pytest.param(f, marks=[pytest.mark.slow] if f in list(STATE)[1:4] else []) for f in STATE]
)
def test_the_state_of_a_run_is_read_by_file_and_field(begun: Path, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(begun, tmp_path / "run"))
    path, (value, said) = folder / "checkpoint-1" / file, STATE[file]
    if value is None:
        torch.save({"last_epoch": "words", "python": 1}, path)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | value))
    with pytest.raises(ValueError, match=said) as refused:
        run = cpt_runs.trainer(folder, "llama", **TWO_STEPS)
        run.train(resume_from_checkpoint="last")
    assert "\n" not in str(refused.value) and str(folder / "checkpoint-1") in str(refused.value)


@pytest.mark.parametrize(
    ("damage", "said"), [("lost", "not in them"), ("renamed", "would be random"), ("narrow", "size mismatch")]
)
def test_the_weights_of_a_checkpoint_are_checked_when_a_run_goes_on(begun, tmp_path, damage, said):
    folder = Path(shutil.copytree(begun, tmp_path / "run"))
    WEIGHTS[damage](folder / "checkpoint-1" / "model.safetensors")
    run = cpt_runs.trainer(folder, "llama", **TWO_STEPS)
    with pytest.raises(ValueError, match=f"^the weights in .*checkpoint-1 cannot be used .*{said}") as refused:
        run.train(resume_from_checkpoint="last")
    assert "\n" not in str(refused.value)


FACTS = {
    "cpt_state.json": (
        lambda path: read_state(str(path.parent)),
        {"phase": 7},
        "phase=7 is no 'warmup' or 'cooldown'",
    ),
    "rainbowpo.json": (
        lambda path: read_json(path, dispersion_scale=float | None),
        {"dispersion_scale": float("inf")},
        "dispersion_scale=inf is no float",
    ),
    "surgery.json": (lambda path: without_anchored(None, path.parent), {"anchored": "x"}, "anchored='x' is no list"),
    "adapter_config.json": (
        lambda path: base_of_adapter(path.parent),
        {"base_model_name_or_path": [1]},
        "base_model_name_or_path=.1. is no str",
    ),
    "model.safetensors.index.json": (shards_of, {"weight_map": {"a": "../b.safetensors"}}, "allowed are safetensors"),
}


@pytest.mark.parametrize("file", FACTS)
def test_facts_are_read_by_file_and_field(file: str, tmp_path: Path) -> None:
    read, value, said = FACTS[file]
    (tmp_path / file).write_text(json.dumps(value))
    with pytest.raises(ValueError, match=f"{file}.*{said}"):
        read(tmp_path / file)
    for text in ("{", "[1]", "[" * 100_000):
        (tmp_path / file).write_text(text)
        with pytest.raises(ValueError, match=file) as refused:
            read(tmp_path / file)
        assert "\n" not in str(refused.value)


def test_memory_and_network_are_no_fault_of_a_file() -> None:
    for error in (MemoryError(), ConnectionError("down"), ImportError("no peft")):
        with pytest.raises(type(error)), reading("a file"):
            raise error


@pytest.mark.slow
@pytest.mark.parametrize("command", WORKING)
def test_the_cases_differ_from_runs_that_work(command: str, trials: Trials) -> None:
    outcome = trials.run(Case(command))
    assert (outcome.code, outcome.fault) == (0, None), outcome.said


BELOW_ZERO = {  # what -1 means there
    "max_steps": "no limit, of transformers",
    "local_rank": "no rank, of transformers",
    "simpo_gamma": "a margin that the rejected one may have",
    "forget_layer": "the last layer",
    "bench_seed": "any whole number is a seed",
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_number_of_any_command_is_below_zero_unless_that_means_something(trials: Trials) -> None:
    taken, seen = {}, set()
    for command in COMMANDS:
        for kind in import_module(COMMANDS[command].module).ARGUMENTS:
            for option in {*numbers_of(kind)} & {*options_of(command)}:
                if (kind, option) not in seen:
                    seen.add((kind, option))  # one command that has it stands for the others
                    outcome = trials.run(Case(command, {option: -1}))
                    if outcome.code == 0 or outcome.fault is not None:
                        taken[option] = (command, outcome.code, outcome.fault)
    assert set(taken) <= set(BELOW_ZERO), taken
    assert all((code, fault) == (0, None) for _, code, fault in taken.values()), taken


VALUES_OF_YAML = st.sampled_from("true|null|.nan|-.inf|-1|1.5|[1, 2]|{a: 1}|2001-01-01".split("|"))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """One setting of a command by flag or file, or one damaged file that it reads."""
    command = draw(st.sampled_from(sorted(WORKING)))
    kind = draw(st.sampled_from(("flag", "file of settings", "file")))
    if command == "iterate" and kind == "file of settings":
        stage = draw(st.sampled_from(sorted(STAGES)))
        option, value = draw(st.sampled_from(options_of(STAGES[stage]))), yaml.safe_load(draw(VALUES_OF_YAML))
        told = json.dumps({**STAGE_OPTIONS[stage], option: value}, default=str)
        return Case(command, {stage: told}, option=option, value=value, owner=STAGES[stage])
    if kind != "file":
        option = draw(st.sampled_from(options_of(command)))
        if kind == "flag":
            word = draw(st.sampled_from(("nan", "inf", "-1", "0", "1e400", "", "9" * 20, "[1]", "\u2603")) | st.text())
            word = word.replace("\0", "")
            return Case(command, {option: word}, option=option, value=word)
        value = draw(VALUES_OF_YAML)
        return Case(
            command, {option: None}, settings=f"{option}: {value}\n", option=option, value=yaml.safe_load(value)
        )
    file = draw(st.sampled_from(files_read(command)))
    known = damages_of(file)
    name = draw(st.sampled_from(sorted(known, key=str)))
    return Case(command, file=file, name=name, damage=known[name])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_input_ends_in_a_traceback_a_hang_or_a_wrong_number(trials: Trials) -> None:
    found, clean = [], {}

    @seed(int(os.environ.get("FUZZ_SEED", 0)))  # another one holds out what was mended with this
    @settings(
        max_examples=int(os.environ.get("FUZZ_CASES", 1000)),
        database=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases())
    def every(case: Case) -> None:
        outcome = trials.run(case)
        is_finished = case.command.partition("/")[0] in GONE_ON and case.command.endswith(
            "/resume"
        )  # reads no weights
        quotes = outcome.fault == "no number" and case.command.partition("/")[0] in (
            "card",
            "push",
        )  # their options are all text
        if outcome.fault is not None and not (quotes and case.options):
            found.append((outcome.fault, outcome.code, case, outcome.said[-300:]))
            print("FOUND", *found[-1], sep=" | ", flush=True)
        if outcome.code == 0 and case.name in DAMAGE and case.name != "flipped":
            if case.command not in clean:
                clean[case.command] = trials.run(Case(case.command)).numbers
            if outcome.numbers != clean[case.command]:
                found.append(("other numbers", case))
                print("FOUND", *found[-1], outcome.shown[-1500:], sep=" | ", flush=True)
        if outcome.code == 0 and (
            (case.name in WEIGHTS and not is_finished)
            or (case.option and is_no_value(case.owner or case.command, case.option, case.value))
        ):
            found.append(("taken", case))
            print("FOUND", *found[-1], sep=" | ", flush=True)
        if trials.count % 20 == 0:
            print(trials.count, time.strftime("%H:%M:%S"), flush=True)

    every()
    assert not found, f"{len(found)} of {trials.count}:\n" + "\n".join(map(str, found))
