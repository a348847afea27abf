"""The command analyze on tiny models: numbers against recorded router logits, two processes, logs, and refusals."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe_cpt.routing.analyze import named_checkpoints, named_texts, training_curves
from hf_moe_cpt.scripts.analyze import main
from tests.helpers.cpt_runs import trainer
from tests.helpers.fresh_process import TWO_RANKS, launch
from tests.helpers.tiny_models import tiny_model


TOKENS, LENGTH = 300, 32


def _save(folder: Path, tokenizer: Path, kind: str, noise: float = 0.0, **changes: object) -> Path:
    model = tiny_model(kind, vocab_size=len(AutoTokenizer.from_pretrained(tokenizer)), **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def models(texts, tmp_path_factory) -> Path:
    """A folder with start/ and later/, mixtures of one shape; dense/, wide/ and foreign/ do not fit."""
    folder = tmp_path_factory.mktemp("models")
    _save(folder / "start", texts / "tokenizer", "mixtral")
    _save(folder / "later", texts / "tokenizer", "mixtral", noise=0.05)
    _save(folder / "dense", texts / "tokenizer", "llama")
    _save(folder / "wide", texts / "tokenizer", "mixtral", num_local_experts=5)
    _save(folder / "foreign", texts / "tokenizer", "mixtral")
    tokenizer = AutoTokenizer.from_pretrained(texts / "tokenizer")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder / "foreign")
    return folder


def _arguments(models: Path, texts: Path, output: Path, *more: object) -> list[str]:
    words = [models / "start", f"german={models / 'later'}", "--data", f"code={texts / 'new.jsonl'}"]
    words += [f"tales={texts / 'old'}", "--tokens_per_domain", TOKENS, "--max_length", LENGTH, "--device", "cpu"]
    return [str(word) for word in (*words, "--min_occurrences", 1, "--output_dir", output, *more)]


@pytest.fixture(scope="module")
def alone(models, texts, tmp_path_factory) -> Path:
    """The output of one process."""
    output = tmp_path_factory.mktemp("alone") / "out"
    main(_arguments(models, texts, output))
    return output


def _analysis(output: Path) -> dict:
    return json.loads((output / "analysis.json").read_text(encoding="utf-8"))


def _experts(model: Path, documents: list[str]) -> list[list[list[int]]]:
    """For each layer the experts of the first TOKENS tokens, in sequences of LENGTH, from recorded logits."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    model = AutoModelForCausalLM.from_pretrained(model).eval()
    layers, left = [[], []], TOKENS
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        for begin in range(0, len(ids), LENGTH):
            piece = ids[begin : begin + LENGTH][:left]
            left -= len(piece)
            if piece:
                with torch.no_grad():
                    logits = model(torch.tensor([piece]), output_router_logits=True).router_logits
                for layer, of_layer in zip(layers, logits, strict=True):
                    layer += of_layer.topk(2).indices.tolist()
    return layers


def test_the_numbers_are_those_of_recorded_logits(alone, models, texts):
    analysis = _analysis(alone)
    assert [c["name"] for c in analysis["checkpoints"]] == ["start", "german"]
    assert [c["num_tokens"] for c in analysis["checkpoints"]] == [2 * TOKENS] * 2
    documents = [json.loads(line)["text"] for line in (texts / "new.jsonl").read_text().splitlines()]
    start, later = _experts(models / "start", documents), _experts(models / "later", documents)
    for layer in range(2):
        load = [sum(expert in row for row in later[layer]) for expert in range(4)]
        assert analysis["metrics"]["german"]["code"]["mri"][layer] == pytest.approx(max(load) / TOKENS)
        kept = sum(len(set(a) & set(b)) for a, b in zip(start[layer], later[layer], strict=True)) / (2 * TOKENS)
        assert analysis["saturation"]["german"]["code"][layer] == pytest.approx(kept)
        assert kept < 1
    assert any(" " in entry["token"] for entry in analysis["top_tokens"]["start"][0][0])  # text, not ids


def test_tables_are_printed_and_finished_work_is_not_done_again(alone, models, texts, capsys, monkeypatch):
    before = _analysis(alone)
    module = importlib.import_module("hf_moe_cpt.routing.trace")  # the package has its function by that name
    monkeypatch.setattr(module, "_trace_shard", None)  # would be called to trace anything
    main(_arguments(models, texts, alone))
    assert _analysis(alone) == before
    lines = capsys.readouterr().out.splitlines()
    german = next(line for line in lines if line.startswith("german  "))
    assert german.split()[1] == "600"
    assert float(german.split()[2]) == pytest.approx(sum(before["metrics"]["german"]["all"]["mri"]) / 2, abs=6e-4)
    assert any(line.startswith("start") and "tales" in line for line in lines)
    assert lines[-2] == f"report: {alone / 'report.html'}"


def test_finished_traces_stand_for_their_models(alone, tmp_path):
    words = [f"{name}={alone / 'traces' / name}" for name in ("start", "german")]
    main([*words, "--output_dir", str(tmp_path / "out"), "--min_occurrences", "1"])
    again, want = _analysis(tmp_path / "out"), _analysis(alone)
    for part in ("metrics", "saturation", "coactivation", "vocabulary_specialization", "checkpoints"):
        assert again[part] == want[part]


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(alone, models, texts, tmp_path):
    launch(*TWO_RANKS, "scripts/analyze.py", *_arguments(models, texts, tmp_path / "two"))
    two, one = _analysis(tmp_path / "two"), _analysis(alone)
    for part in ("metrics", "saturation", "top_tokens"):
        assert two[part] == one[part], part


def test_logs_become_curves_with_the_shift_where_runs_meet(tmp_path):
    for name in ("before", "after"):
        run = trainer(tmp_path / name, max_steps=4)
        run.train()
        run.save_state()
    (joined,) = training_curves([f"continued={tmp_path / 'before'},{tmp_path / 'after'}"], None)
    logs = [json.loads((tmp_path / n / "trainer_state.json").read_text())["log_history"] for n in ("before", "after")]
    want = [entry["mri/layer_01"] for log in logs for entry in log if "mri/layer_01" in entry]
    assert joined["layers"][1] == want and joined["steps"] == list(range(1, 9))
    assert joined["name"] == "continued" and joined["shift_step"] == 5
    assert joined["ideal"] == pytest.approx(3 / 7)
    (single,) = training_curves([str(tmp_path / "after")], 3)
    assert single["name"] == "after" and single["shift_step"] == 3 and single["layers"][1] == want[4:]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 2.0}]}))
    with pytest.raises(ValueError, match="holds no MRI of layers: train with CPTTrainer, or add Router"):
        training_curves([str(tmp_path)], None)


def test_an_option_given_twice_counts_twice_and_wins_over_the_file(models, texts, tmp_path):
    (tmp_path / "config.yaml").write_text("data: [other=nowhere.jsonl]\ntokens_per_domain: 40\n")
    words = [str(models / "start"), "--config", str(tmp_path / "config.yaml"), "--device", "cpu"]
    words += ["--data", f"code={texts / 'new.jsonl'}", "--data", f"tales={texts / 'old'}"]
    main([*words, "--checkpoints", str(models / "later"), "--output_dir", str(tmp_path / "out")])
    analysis = _analysis(tmp_path / "out")
    assert analysis["domains"] == ["code", "tales"]
    assert [checkpoint["name"] for checkpoint in analysis["checkpoints"]] == ["start", "later"]


TRACES = {
    "damaged": "is damaged, its checksum differs from the index's",
    "of another shape": "wide has 2 MoE layers of 5 experts, 2 a token, trace has 2 MoE layers of 4 experts",
    "of another tokenizer": "The trace trace has another tokenizer than .*foreign",
}


@pytest.mark.parametrize("kind", TRACES)
def test_traces_that_do_not_fit_are_refused_before_a_model_runs(alone, models, texts, tmp_path, kind):
    trace = shutil.copytree(alone / "traces" / "start", tmp_path / "trace")
    shard = trace / "shard_00001.safetensors"
    if kind == "damaged":
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    model = models / {"of another shape": "wide", "of another tokenizer": "foreign"}.get(kind, "later")
    words = [f"trace={trace}", str(model), "--data", f"code={texts / 'new.jsonl'}", "--device", "cpu"]
    with pytest.raises(ValueError, match=TRACES[kind]):
        main([*words, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_names_are_as_long_as_they_must_be():
    names = [checkpoint.name for checkpoint in named_checkpoints(["a/run/last", "b/run/last", "x=c/last", "o/m"])]
    assert names == ["a/run/last", "b/run/last", "x", "o/m"]
    assert [c.name for c in named_checkpoints(["hub/model", "runs/other"])] == ["model", "other"]
    assert named_texts(["a=1.txt", "b=2.txt", "a=3.txt"]) == {"a": ["1.txt", "3.txt"], "b": ["2.txt"]}


REFUSED = {
    "a dense model": (["dense"], [], "dense: LlamaForCausalLM is a dense model"),
    "another shape": (["start", "wide"], [], "wide has 2 MoE layers of 5 experts, 2 a token, start has 2 MoE layers"),
    "no checkpoint": ([], [], "No checkpoint was given: hf-moe-cpt analyze CHECKPOINT"),
    "no such model": (["start", "nowhere"], [], "nowhere' is neither a finished trace nor a model"),
    "too many ranks": (["start"], ["--num_ranks", "5"], r"--num_ranks 5 must lie in \[1, 4\]"),
    "no tokens to list": (["start"], ["--top_tokens", "-1"], "--top_tokens -1 must be at least 1"),
    "a shift of nothing": (["start"], ["--shift_step", "3"], "--shift_step 3 marks a step of --log_history, which"),
    "another tokenizer": (["start", "foreign"], [], "foreign has another tokenizer than start"),
    "the same name": (["start", "start"], [], "Two checkpoints are called .*start"),
    "no text": (["start"], ["--data"], "expected|--data is needed"),
    "text without a name": (["start"], ["--data", "some.txt"], "--data 'some.txt' has no name: give NAME=PATH"),
    "a taken name": (["start"], ["--data", "all=some.txt"], "the name 'all' stands for all kinds together"),
    "text that is not there": (["start"], ["--data", "a=nowhere.jsonl"], "nowhere.jsonl"),
    "no such type": (["start"], ["--dtype", "int3"], "--dtype 'int3' is unknown"),
    "no log": (["start"], ["--log_history", "nowhere"], "--log_history 'nowhere' has no trainer_state.json"),
}


@pytest.mark.parametrize("names, more, text", REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_in_one_line_before_anything_runs(models, texts, tmp_path, names, more, text):
    words = [str(models / name) for name in names]
    if "--data" not in more:
        more = ["--data", f"code={texts / 'new.jsonl'}", *more]
    more = [word for word in more if word != "--data" or len(more) > 1]
    with pytest.raises(ValueError, match=text) as caught:
        main([*words, *more, "--device", "cpu", "--output_dir", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
