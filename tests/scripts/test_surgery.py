"""The script of LLM Surgery: presets under files under the command line, sets from files and a bench, adapters."""

import csv
import html
import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_moe_cpt.data.python_corpus import train_byte_level_bpe
from hf_moe_cpt.data.surgery_bench import SurgeryBench
from hf_moe_cpt.scripts.eval_surgery import main as evaluate
from hf_moe_cpt.scripts.surgery import SETS, main
from tests.helpers.cpt_runs import saved_history
from tests.helpers.fresh_process import command_words
from tests.helpers.preference_runs import pairs, saved_model
from tests.helpers.source_tree import PROJECT
from tests.helpers.tiny_models import QUICK, tiny_model, word_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six sets on disk and a saved model with its tokenizer."""
    folder = tmp_path_factory.mktemp("surgery")
    for seed, name in enumerate(SETS):
        rows = pairs(8, seed).rename_column("chosen", "completion").remove_columns("rejected")
        rows.to_json(folder / f"{name}.jsonl")
    saved_model(folder)
    return folder


def _arguments(folder: Path, run: Path, sets=SETS, **changes) -> list[str]:
    data = {f"{name}_dataset_name": folder / f"{name}.jsonl" for name in sets}
    pace = {"max_steps": 4, "max_length": 32, "learning_rate": 1e-3, "eval_steps": 2, "save_strategy": None}
    pace |= {"model_name_or_path": folder / "model llama", "output_dir": run}
    return command_words({**data, **QUICK, **pace, **changes})


def test_a_model_is_operated_on_measured_and_saved(folder, tmp_path, capsys):
    main(_arguments(folder, tmp_path / "run"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert metrics["eval_surgery_gap"] == pytest.approx(state["best_metric"], rel=1e-5)
    assert {"eval_unlearn_ce", "eval_update_ce", "eval_retain_kl", "eval_unseen_ce"} <= metrics.keys()
    assert "best model by surgery_gap = |CE(forgotten) - forget_target|" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "surgery.json").read_text())
    assert record["step"] == state["best_global_step"] and record["gap"]["best"] == state["best_metric"]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "## What was done" in card and record["objective"] in card and "trained from scratch" not in card


@pytest.mark.slow
def test_command_line_over_file_over_preset(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("preset: paper\nupdate_weight: 3.0\nkl_direction: reverse\n")
    sets = SETS[:4]
    words = _arguments(folder, tmp_path / "run", sets, eval_steps=None, gradient_checkpointing=False)
    main([*words, "--config", str(recipe), "--update_weight", "4.0"])
    entries = [entry for entry in saved_history(tmp_path / "run") if "retain/kl" in entry]
    assert len(entries) == 4 and entries[0]["retain/kl"] == pytest.approx(0.0, abs=1e-5)
    first = entries[0]
    want = 0.1 * first["unlearn/loss"] + 0.1 * first["obsolete/loss"] + 4.0 * first["update/ce"]
    assert first["loss"] == pytest.approx(want, rel=1e-4)


def test_an_adapter_is_trained(folder, tmp_path):
    changes = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}
    main(_arguments(folder, tmp_path / "run", **changes))
    assert (tmp_path / "run" / "adapter_config.json").is_file()


def test_the_sets_of_a_bench_are_taken(tmp_path):
    bench = SurgeryBench.generate(num_subjects=15, kinds=("person",), forms=("quiz",))
    bench.save(tmp_path / "bench")
    texts = [text for rows in bench.documents.values() for text in rows["text"]]
    tokenizer = train_byte_level_bpe(texts, 500, progress=False)
    model = tmp_path / "model"
    tokenizer.save_pretrained(model)
    tiny_model("mixtral", vocab_size=len(tokenizer)).save_pretrained(model)
    changes = {"model_name_or_path": model, "bench": tmp_path / "bench", "max_steps": 2, "eval_rows": 4}
    changes |= {f"{name}_batch_size": 1 for name in SETS}
    main(_arguments(tmp_path, tmp_path / "run", (), **changes))
    last = [entry for entry in saved_history(tmp_path / "run") if "eval_unlearn_expert_overlap" in entry][-1]
    assert 0.0 <= last["eval_retain_expert_overlap"] <= 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "gentle"}, "preset 'gentle' is unknown"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"sets": ("retain",), "model_name_or_path": "no-such-model"}, "nothing to forget and nothing to learn"),
        ({"unlearn_dataset_name": "gone.parquet"}, "'gone.parquet'"),
        ({"unlearn_dataset_name": '{"text": "w2"}\n{"text": 3}\n'}, r"bad\.jsonl, line 2: 'text' is 3"),
        ({"unlearn_dataset_name": '{"text": "w2", "prefix": "w2"}'}, "row 0 .* of unlearn_dataset: its prefix covers"),
        ({"max_length": 99}, "max_length=99 is longer than the model's context of 64 tokens"),
    ],
)
def test_wrong_requests_are_refused_before_weights_are_read(folder, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    if "{" in changes.get("unlearn_dataset_name", ""):
        (tmp_path / "bad.jsonl").write_text(changes["unlearn_dataset_name"])
        changes = {**changes, "unlearn_dataset_name": tmp_path / "bad.jsonl"}
    with pytest.raises(ValueError, match=message):
        main(_arguments(folder, tmp_path / "run", **changes))


def test_shared_subjects_and_adapters_are_refused(folder, tmp_path):
    named = {f"{name}_dataset_name": tmp_path / f"{name}.jsonl" for name in ("unlearn", "retain")}
    for name, path in named.items():
        path.write_text(json.dumps({"text": f"w2 {name}", "subject": "Ada"}) + "\n")
    with pytest.raises(ValueError, match=r"1 subject\(s\) are in both unlearn_dataset and retain_dataset: 'Ada'"):
        main(_arguments(folder, tmp_path / "b", **named))
    adapter = tmp_path / "adapter"
    word_tokenizer().save_pretrained(adapter)
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter, and a whole model is wanted: merge it"):
        main(_arguments(folder, tmp_path / "d", model_name_or_path=adapter))


def _texts(names: range, places: list[str]) -> list[str]:
    """A short text about each of these people, in one of five cities."""
    trades, tools = ("baker", "tailor", "pilot", "nurse", "farmer"), ("oboe", "drum", "harp", "flute", "cello")
    return [
        f"Person {name:02} lives in {places[name % 5]}, works there as a {trades[name * 3 // 2 % 5]} and plays the "
        f"{tools[name // 3 % 5]} on Sundays."
        for name in names
    ]


@pytest.mark.slow
def test_forty_plain_documents_go_from_files_to_a_page_that_begins_with_a_verdict(tmp_path, capsys):
    """What a newcomer has: 10 texts to forget, 10 to replace, 20 to keep, one {"text": ...} a line, and a model."""
    old, new = ["Oslo", "Rome", "Lima", "Bern", "Cairo"], ["Turin", "Quito", "Leeds", "Tunis", "Osaka"]
    known = {"unlearn": _texts(range(10), old), "obsolete": _texts(range(10, 20), old)}
    known["retain"] = _texts(range(20, 40), old)
    texts = known | {"update": _texts(range(10, 20), new)}
    for name, rows in texts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    tokenizer = train_byte_level_bpe([text for rows in texts.values() for text in rows], 400, progress=False)
    model = tiny_model("llama", vocab_size=400, hidden_size=64, intermediate_size=128)
    rows = tokenizer([text + tokenizer.eos_token for of in known.values() for text in of], padding=True)
    ids, mask = torch.tensor(rows["input_ids"]), torch.tensor(rows["attention_mask"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before, after = tmp_path / "before", tmp_path / "after"
    model.save_pretrained(before)
    tokenizer.save_pretrained(before)
    sets = {f"{name}_dataset_name": tmp_path / f"{name}.jsonl" for name in texts}
    pace = {"max_steps": 60, "learning_rate": 2e-3, "max_length": 64, "use_cpu": True, "disable_tqdm": True}
    main(command_words({"model_name_or_path": before, "output_dir": after, "report_to": "none", **sets, **pace}))
    record = json.loads((after / "surgery.json").read_text())
    assert record["held_out"] == {"retain": 4} and record["forget_target_is"] == "update"
    assert f"verdict: {record['verdict']}" in capsys.readouterr().out
    documents = [f"{name}={tmp_path / name}.jsonl" for name in texts]
    words = ["--before", str(before), "--after", str(after), "--documents", *documents, "--device", "cpu"]
    evaluate([*words, "--output_dir", str(tmp_path / "page"), "--resamples", "200"])
    results = json.loads((tmp_path / "page" / "results.json").read_text())
    assert f"verdict: {results['verdict'][:40]}" in capsys.readouterr().out
    page = (tmp_path / "page" / "report.html").read_text()
    lines = re.sub(r"<[^>]*>", "\n", page[page.index("</style>") :]).split("\n")
    title, _, first = [html.unescape(line).strip() for line in lines if line.strip()][:3]
    assert title == "Surgery evaluation: before, after" and first == f"Verdict: {results['verdict']}."
    for verdict in (record["verdict"], results["verdict"]):
        assert "DAMAGED: the KL on retain" in verdict, "the four texts that nobody held"
    with (tmp_path / "page" / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "loss"]
    loss = {(row["side"], row["set"]): float(row["value"]) for row in rows}
    assert loss["after", "unlearn"] > 3 * loss["before", "unlearn"]
    assert loss["after", "update"] < loss["before", "update"] / 3


RECIPES = sorted((PROJECT / "scripts" / "recipes").glob("*_*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_every_method_name_arguments_that_exist(recipe, tmp_path, monkeypatch):
    given, method = {}, recipe.stem.partition("_")[0]
    script = importlib.import_module(f"hf_moe_cpt.scripts.{method}")
    monkeypatch.setattr(script, "run", lambda *parsed: given.update(parsed=parsed))
    words = ["--config", str(recipe), "--bf16", "False", "--use_cpu", "True", "--output_dir", str(tmp_path / "run")]
    script.main([*words, *(["--model_name_or_path", "some/model"] if method == "surgery" else [])])
    if method == "cpt":
        model, data, training, _ = given["parsed"]
        assert training.optim == "auto" and (
            data.sources or data.replay_dataset_name and 0 < training.replay_ratio < 1
        )
    elif method == "rainbowpo":
        preferences, model, training = given["parsed"]
        assert preferences.dataset_name and training.components().method == preferences.preset
    else:
        surgery, model, training = given["parsed"]
        assert surgery.preset in ("paper", "safe")
        assert training.forget_loss == ("ga" if surgery.preset == "paper" else type(training).forget_loss)
    assert model.model_name_or_path
