"""The quickstart in miniature, end to end: two small folders of text, four steps, no network."""

import json
import random
import shutil
import socket
from html import unescape
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe_cpt import quickstart as quickstart_plan
from hf_moe_cpt.quickstart import BarCallback, Scale, table_rows
from hf_moe_cpt.reports.tables import format_cell
from hf_moe_cpt.scripts import analyze, quickstart


STAGES = ["moe-pretrained", "dense-pretrained", "moe-replay-30", "moe-no-replay", "dense-replay-30", "dense-no-replay"]
SMALL = Scale(steps=4, batch_size=4, max_length=32, learning_rate=3e-3, vocab_size=300, held_out_tokens=200)
CLOCKS = ("seconds", "tokens_per_second")


@pytest.fixture(scope="module", autouse=True)
def small_and_offline():
    """A small table of sizes, threads enough to disagree, and an error for whoever opens a connection."""

    def refuse(*_arguments):
        raise AssertionError("the quickstart opened a network connection")

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(quickstart_plan.SCALES, "tiny", SMALL)
        patch.setattr(socket.socket, "connect", refuse)
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """Two domains of forty documents."""
    root = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    for domain, letters in (("1-words", "abcdefgh"), ("2-numbers", "12345678")):
        (root / domain).mkdir()
        for number in range(40):
            words = ["".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(160)]
            (root / domain / f"{number}.txt").write_text(" ".join(words))
    return root


def start(data_dir: Path, output_dir: Path, *more: str) -> None:
    quickstart.main(["--device", "cpu", "--data-dir", str(data_dir), "--output-dir", str(output_dir), *more])


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("quickstart") / "output"
    start(data_dir, output_dir)
    return output_dir


def results_of(output_dir: Path) -> dict:
    return json.loads((output_dir / "results.json").read_text())


def without_clocks(results: dict) -> dict:
    rows = [{name: value for name, value in row.items() if name not in CLOCKS} for row in results["rows"]]
    return {**results, "rows": rows}


def test_rows_follow_from_the_logs(finished):
    rows = {row["run"]: row for row in results_of(finished)["rows"]}
    assert list(rows) == STAGES
    for name, row in rows.items():
        history = json.loads((finished / "records" / f"{name}.json").read_text())["history"]
        new = [entry["eval_new_loss"] for entry in history if "eval_new_loss" in entry]
        old = [entry["eval_replay_loss"] for entry in history if "eval_replay_loss" in entry]
        if name.endswith("pretrained"):
            assert row["1-words after"] == new[-1]
            continue
        assert (row["forgetting"], row["adaptation"]) == (old[-1] - old[0], new[0] - new[-1])
        assert old[0] == pytest.approx(rows[f"{name.split('-')[0]}-pretrained"]["1-words after"], rel=1e-6)
        assert ("MRI peak" in row) == name.startswith("moe")


def test_twins_have_the_same_active_size_and_see_the_same_tokens(finished):
    rows = {row["run"]: row for row in results_of(finished)["rows"]}
    moe, dense = rows["moe-pretrained"], rows["dense-pretrained"]
    assert moe["active_parameters"] == pytest.approx(dense["parameters"], rel=0.05) and dense["tokens"] == 4 * 4 * 32
    assert moe["tokens"] == dense["tokens"] == 2 * rows["moe-replay-30"]["tokens"]


def test_replay_is_in_the_batches_that_ask_for_it(finished):
    curves = results_of(finished)["curves"]
    assert len(curves["moe-replay-30"]["loss/old"]) == len(curves["moe-replay-30"]["loss/new"]) == 2
    assert "loss/old" not in curves["moe-no-replay"]
    assert curves["moe-replay-30"]["learning_rate"][0][1] == pytest.approx(
        curves["moe-pretrained"]["learning_rate"][-1][1]
    )


def test_report_shows_the_numbers_of_the_results(finished):
    results, page = results_of(finished), unescape((finished / "report.html").read_text())
    for row in table_rows(results):
        for value in row.values():
            assert f">{format_cell(value)}</td>" in page
    assert page.count("<svg") == 8 and "2-numbers begins" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    for item in results["samples"]:
        assert item["prompt"].split()[0] in page


def test_routing_of_the_mixtures_is_what_the_command_analyze_finds(finished, tmp_path):
    names = [name for name in STAGES if name.startswith("moe")]
    kept = json.loads((finished / "routing" / "analysis.json").read_text())
    traces = [f"{name}={finished / 'routing' / 'traces' / name}" for name in names]
    analyze.main([*traces, "--output_dir", str(tmp_path), "--min_occurrences", "5"])
    again = json.loads((tmp_path / "analysis.json").read_text())
    assert again["metrics"] == kept["metrics"] and again["saturation"] == kept["saturation"]
    assert results_of(finished)["routing"]["saturation"] == kept["saturation"]
    assert list(kept["saturation"]) == names[1:] and kept["domains"] == ["1-words", "2-numbers"]
    for curve in kept["training"]:
        assert curve["shift_step"] == 5 and curve["steps"] == [1, 2, 3, 4, 5, 6]
    page = (finished / "routing" / "report.html").read_text()
    assert "Routing before and after 2-numbers" in page


@pytest.mark.parametrize("name", STAGES)
def test_models_load_and_go_on_with_text(finished, name):
    path = finished / "models" / name
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    prompt = tokenizer("abc 123", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=5, do_sample=False, eos_token_id=-1)
    assert output.shape[1] == prompt["input_ids"].shape[1] + 5
    assert isinstance(tokenizer.decode(output[0]), str)


def test_finished_quickstart_is_shown_and_not_run_again(finished, data_dir, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "run", None)
    (finished / "report.html").unlink()
    start(data_dir, finished)
    shown = capsys.readouterr().out
    assert all(name in shown for name in STAGES) and str(finished / "report.html") in shown
    assert (finished / "report.html").is_file()


@pytest.mark.slow
def test_killed_quickstart_goes_on_and_gives_the_same_numbers(finished, data_dir, tmp_path, monkeypatch):
    def kill_in_third_stage(self, args, state, control, **_):
        if self.stage.name == STAGES[2] and state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BarCallback, "on_step_end", kill_in_third_stage)
        with pytest.raises(KeyboardInterrupt):
            start(data_dir, tmp_path / "output")
    assert not (tmp_path / "output/results.json").exists()
    run_stage, made = quickstart.run_stage, []
    monkeypatch.setattr(
        quickstart, "run_stage", lambda stage, *rest: made.append(stage.name) or run_stage(stage, *rest)
    )
    start(data_dir, tmp_path / "output")
    assert made == STAGES[2:]
    assert without_clocks(results_of(tmp_path / "output")) == without_clocks(results_of(finished))


def test_other_settings_and_foreign_folders_are_refused(finished, data_dir, tmp_path):
    with pytest.raises(ValueError, match="was made with seed=0, and now it is 1: name another folder"):
        start(data_dir, finished, "--seed", "1")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and this tool did not write it: name another folder"):
        start(data_dir, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_only_what_is_of_use_stays(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        "corpus", "models", "quickstart.json", "records", "report.html", "results.json", "routing",
        "tokenizer",
    ]  # fmt: skip


def test_full_disk_is_refused_before_training(data_dir, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=100_000_000))
    with pytest.raises(ValueError, match=r"has 0\.1 GB free and the checkpoints need about 0\.\d GB: free"):
        start(data_dir, tmp_path / "output")
    assert not (tmp_path / "output/work").exists()


REFUSED = {
    "dense preset": (("--preset", "dense-tiny"), "--preset 'dense-tiny' is no mixture of experts: choose one of pb-"),
    "too few steps": (("--steps", "3"), "--steps 3 leaves nothing to continue from: give at least 4"),
    "unknown device": (("--device", "tpu"), "--device 'tpu' is unknown: choose one of auto, cpu, cuda, mps"),
    "no text": (("--data-dir", "/no/such/folder"), "data_dir='/no/such/folder' is no folder"),
}


@pytest.mark.parametrize("words, message", REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused_with_one_line(tmp_path, words, message):
    with pytest.raises(ValueError, match=message) as caught:
        quickstart.main(["--output-dir", str(tmp_path / "output"), *words])
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_missing_device_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--device 'cuda': torch finds no such device here; use --device cpu"):
        quickstart.main(["--output-dir", str(tmp_path / "output"), "--device", "cuda"])
