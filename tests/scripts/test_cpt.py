"""The cpt script from the command line: one process, two processes, accelerate, YAML, and what it refuses."""

import json
import math
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe_cpt.scripts.cpt import main
from tests.helpers.cpt_runs import logged, saved_history, without_clocks
from tests.helpers.fresh_process import TWO_RANKS, command_words, launch
from tests.helpers.tiny_models import QUICK


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def _arguments(texts: Path, run: Path, **changes: object) -> list[str]:
    data = {"dataset_name": texts / "new.jsonl", "replay_dataset_name": texts / "old", "held_out_fraction": 0.2}
    model = {"preset": "pb-granular-tiny", "preset_overrides": json.dumps(SMALL), "max_length": 32}
    pace = {"replay_ratio": 0.25, "max_steps": 5, "per_device_train_batch_size": 4, "save_strategy": None}
    settings = {"tokenizer_name_or_path": texts / "tokenizer", **data, **model, **QUICK, **pace, "output_dir": run}
    return command_words({**settings, **changes})


@pytest.fixture(scope="module")
def alone(texts, tmp_path_factory) -> Path:
    """The run in one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    main(_arguments(texts, run))
    return run


def test_a_preset_is_trained_evaluated_and_saved(alone):
    model = AutoModelForCausalLM.from_pretrained(alone)
    tokenizer = AutoTokenizer.from_pretrained(alone)
    assert model.config.vocab_size == len(tokenizer) and model.config.eos_token_id == tokenizer.eos_token_id
    assert len(logged(saved_history(alone), "lm_loss/replay")) == 5
    metrics = json.loads((alone / "eval_results.json").read_text())
    assert {"eval_new_loss", "eval_replay_loss", "forgetting", "adaptation"} <= set(metrics)
    prompt = tokenizer("def f_1", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.slow
def test_two_processes_give_the_same_curve_as_one(alone, texts, tmp_path):
    run = tmp_path / "two"
    launch(*TWO_RANKS, "scripts/cpt.py", *_arguments(texts, run, per_device_train_batch_size=2))
    for key in ("loss", "lm_loss", "lm_loss/new", "lm_loss/replay", "aux_loss", "z_loss", "mri", "eval_new_loss"):
        one, two = logged(saved_history(alone), key), logged(saved_history(run), key)
        assert two == pytest.approx(one, rel=2e-6), key


@pytest.mark.slow
def test_accelerate_launches_it(alone, texts, tmp_path):
    run = tmp_path / "accelerate"
    one = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch("accelerate.commands.launch", *one, "scripts/cpt.py", *_arguments(texts, run))
    assert without_clocks(saved_history(run)) == without_clocks(saved_history(alone))


def test_a_checkpoint_is_continued_from_a_yaml_file_that_the_command_line_overrides(alone, texts, tmp_path):
    words = _arguments(texts, tmp_path, max_steps=3, preset=None, preset_overrides=None, output_dir=None)
    settings = zip(words[::2], words[1::2], strict=True)
    lines = [f"{name[2:]}: {value}" for name, value in settings if name != "--dataset_name"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("\n".join([*lines, f"dataset_name: [{texts / 'new.jsonl'}]", f"model_name_or_path: {alone}"]))
    run = tmp_path / "continued"
    main(["--config", str(recipe), "--output_dir", str(run), "--max_steps", "2"])
    assert len(logged(saved_history(run), "loss")) == 2
    assert json.loads((run / "cpt_state.json").read_text())["starting_phase"] == "decayed"


@pytest.mark.parametrize("from_file", [False, True])
def test_named_sources_come_from_words_or_from_a_file(texts, tmp_path, from_file, capsys):
    run, old = tmp_path / "run", texts / "old"
    words = _arguments(texts, run, dataset_name=None, replay_dataset_name=None, replay_ratio=None, max_steps=2)
    if from_file:
        named = {"name": "code", "path": str(texts / "new.jsonl"), "weight": 3, "max_epochs": 50}
        more = {"name": "tales", "path": [str(old)], "weight": 1, "role": "replay"}
        (tmp_path / "sources.yaml").write_text(json.dumps({"sources": [named, more]}))  # which is YAML too
        words += ["--config", str(tmp_path / "sources.yaml")]
    else:
        words += ["--sources", f"code={texts / 'new.jsonl'}:3", f"tales={old}:1:replay"]
    main(words)
    assert len(logged(saved_history(run), "lm_loss/tales")) == 2
    metrics = json.loads((run / "eval_results.json").read_text())
    assert {"eval_code_loss", "eval_tales_loss", "forgetting/tales", "adaptation/code"} <= set(metrics)
    assert metrics["eval_code_perplexity"] == pytest.approx(math.exp(metrics["eval_code_loss"]))
    tokenizer = AutoTokenizer.from_pretrained(texts / "tokenizer")
    every = [json.loads(line)["text"] for line in (texts / "new.jsonl").read_text().splitlines()]
    tokens_per_byte = sum(len(tokenizer(text)["input_ids"]) + 1 for text in every) / sum(map(len, every))
    bits = metrics["eval_code_loss"] / math.log(2) * tokens_per_byte  # held-out texts are as long as the others
    assert metrics["eval_code_bits_per_byte"] == pytest.approx(bits, rel=0.02)
    shares = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("code ", "tales "))]
    assert [(words[1], words[2]) for words in shares] == [("new", "75.00"), ("replay", "25.00")]


def test_streaming_reads_the_same_share_of_each_source(texts, tmp_path):
    run = tmp_path / "run"
    main(_arguments(texts, run, streaming=True, held_out_fraction=0, max_steps=2))
    assert len(logged(saved_history(run), "lm_loss/replay")) == 2


REFUSED = {
    "no model": ({"preset": None}, "Give one of --model_name_or_path"),
    "preset without tokenizer": ({"tokenizer_name_or_path": None}, "--preset needs --tokenizer_name_or_path"),
    "served otherwise": (
        {"serve_as": "qwen2_moe"},
        "--serve_as qwen2_moe: hidden_act='gelu': llama.cpp and",
    ),
    "unknown preset": ({"preset": "pb-granular-9b"}, "preset='pb-granular-9b' is unknown: choose one of"),
    "overrides that are no JSON": ({"preset_overrides": "{"}, "--preset_overrides '{' is no JSON"),
    "missing file": ({"dataset_name": "nowhere.jsonl"}, "nowhere.jsonl"),
    "folder in use, before all else": ({"dataset_name": "nowhere.jsonl", "output_dir": "."}, "is not empty .it holds"),
    "all held out": ({"held_out_fraction": 1.5}, r"--held_out_fraction 1.5 is outside \[0, 1\)"),
    "held out of a stream": ({"streaming": True}, "held_out_fraction cannot split a stream"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused_with_one_line(texts, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        main(_arguments(texts, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_its_extra(texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # as where it is not installed
    (tmp_path / "liger.yaml").write_text(
        "use_liger_kernel: true\nliger_kernel_config: {fused_linear_cross_entropy: false}"
    )
    with pytest.raises(ImportError, match=r"use_liger_kernel needs .* pip install 'hf_moe_cpt\[liger\]'"):
        main(["--config", str(tmp_path / "liger.yaml"), *_arguments(texts, tmp_path / "run")])
