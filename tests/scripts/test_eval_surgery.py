"""The command on tiny models: its numbers against the models themselves, two models, killed runs, ranks, refusals."""

import csv
import io
import json
import shutil
import signal
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe_cpt.data.python_corpus import train_byte_level_bpe
from hf_moe_cpt.data.surgery_bench import QUIZ_TEMPLATE, SurgeryBench
from hf_moe_cpt.evaluation import surgery
from hf_moe_cpt.scripts.eval_surgery import main
from tests.helpers.fresh_process import TWO_RANKS, launch, run_python
from tests.helpers.tiny_models import tiny_model


SIDES = ("before", "after", "retrained")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Three models with one tokenizer, the smallest bench, and a user's own files."""
    folder = tmp_path_factory.mktemp("world")
    bench = SurgeryBench.generate(0, 15, kinds=("person",), forms=("quiz",))
    bench.save(folder / "bench")
    tokenizer = train_byte_level_bpe(bench.before_corpus()["text"], 400, progress=False)
    for number, side in enumerate(SIDES):
        model = tiny_model("llama", vocab_size=400, max_position_embeddings=512)
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02 * number)
            model.lm_head.weight.mul_(5)
        model.save_pretrained(folder / side)
        tokenizer.save_pretrained(folder / side)
    rows = {"unlearn": ["A is old.", "B is tall."], "unseen": ["C is new.", "D is wide."]}
    for name, texts in rows.items():
        lines = [json.dumps({"subject": text[0], "text": text}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def _arguments(world: Path, run: Path, **changes: object) -> list[str]:
    settings = {
        **{side: world / side for side in SIDES},
        "bench": world / "bench",
        "max_questions": 6,
        "max_documents": 3,
        "batch_size": 4,
        "new_tokens": 6,
        "relearn_steps": 4,
        "relearn_every": 2,
        "relearn_lr": 1e-3,
        "relearn_batch_size": 2,
        "resamples": 50,
        "device": "cpu",
        "commit": "abc1234",
        "output_dir": run,
        **changes,
    }
    words = []
    for name, value in settings.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def _rows(run: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    with (run / "results.csv").open() as file:
        return {(row["side"], row["set"], row["metric"]): row for row in csv.DictReader(file)}


def _measures(run: Path) -> list[dict]:
    return json.loads((run / "results.json").read_text())["measures"]


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> tuple[Path, str]:
    """The run that nobody disturbed, and what it printed."""
    run, printed = tmp_path_factory.mktemp("alone") / "run", io.StringIO()
    with redirect_stdout(printed):
        main(_arguments(world, run))
    return run, printed.getvalue()


def _logp(model, ids: list[int], start: int) -> torch.Tensor:
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return logp[torch.arange(start - 1, len(ids) - 1), torch.tensor(ids[start:])]


def test_accuracies_and_losses_are_those_of_the_models(alone, world):
    rows, bench = _rows(alone[0]), SurgeryBench.load(world / "bench")
    for side in SIDES:
        model = AutoModelForCausalLM.from_pretrained(world / side).eval()
        tokenizer = AutoTokenizer.from_pretrained(world / side)
        work = json.loads((alone[0] / "work" / side / "questions.json").read_text())
        asked = {row["id"]: row for row in bench.ask("retain", "test", "mcq")}
        right = []
        for name in work["retain"]["mcq"]["id"]:
            prompt = QUIZ_TEMPLATE.format(question=asked[name]["question"])
            start = len(tokenizer(prompt)["input_ids"])
            losses = [
                -float(_logp(model, tokenizer(f"{prompt} {option}")["input_ids"], start).mean())
                for option in asked[name]["options"]
            ]
            right.append(losses.index(min(losses)) == asked[name]["answer"])
        row = rows[side, "retain", "accuracy"]
        assert float(row["value"]) == pytest.approx(sum(right) / len(right), rel=1e-5) and int(row["n"]) == len(right)
        losses = [
            -float(_logp(model, tokenizer(text)["input_ids"], 1).mean()) for text in bench.documents["unseen"]["text"]
        ]
        row = rows[side, "unseen", "loss"]
        assert float(row["value"]) == pytest.approx(sum(losses) / len(losses), rel=1e-4) and int(row["n"]) == 3
        assert float(row["low"]) <= float(row["value"]) <= float(row["high"])


def test_every_part_is_there_for_every_model(alone):
    run, printed = alone
    assert {path.name for path in run.iterdir()} == {
        "eval_surgery.json", "work", "results.csv", "results.json", "report.html"
    }  # fmt: skip
    metrics = {side: {metric for who, _, metric in _rows(run) if who == side} for side in SIDES}
    assert {"kl", "agreement", "privacy_leakage"} & metrics["before"] == {"privacy_leakage"}
    assert metrics["after"] - metrics["before"] == {"kl", "agreement"}
    assert metrics["after"] - metrics["retrained"] == {"privacy_leakage"}
    for metric in ("conflict", "relearn_robustness", "quantisation_robustness_4bit", "prefix_recall", "score"):
        assert metric in metrics["after"]
    assert "relearn_own_taught_step_4" in metrics["after"]
    lines = printed.split("\n")
    assert lines[0] == f"files: {run}" and max(map(len, lines[1:])) <= 120
    assert "Does it last?" in lines and any(line.startswith("score ") for line in lines)
    results = json.loads((run / "results.json").read_text())
    assert results["machine"]["commit"] == "abc1234" and results["settings"]["max_questions"] == 6


@pytest.mark.slow
@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was_and_ends_the_same(alone, world, tmp_path):
    run = tmp_path / "run"
    program = (
        "import os, signal, sys\n"
        "from hf_moe_cpt.scripts.eval_surgery import main\n"
        "from hf_moe_cpt.evaluation.resumable import ResumableFolder\n"
        "write, count = ResumableFolder.write, []\n"
        "def killed(folder, name, measurements):\n"
        "    count.append(name)\n"
        "    if len(count) == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(folder, name, measurements)\n"
        "ResumableFolder.write = killed\n"
        "main(sys.argv[1:])\n"
    )
    short = [*_arguments(world, run), "--parts", "texts", "continuations"]
    assert run_python("-c", program, *short, check=False).returncode == -signal.SIGKILL
    finished = sorted((run / "work").rglob("*.json"))
    assert [path.name for path in finished] == ["continuations.json", "texts.json"]
    assert {path.parent.name for path in finished} == {"before"} and not (run / "results.json").exists()
    times = [path.stat().st_mtime_ns for path in finished]
    main(short)
    assert [path.stat().st_mtime_ns for path in finished] == times
    whole = {(row["side"], row["set"], row["metric"]): row for row in _measures(alone[0])}
    assert len(_measures(run)) > 60
    for row in _measures(run):
        assert row == whole[row["side"], row["set"], row["metric"]]


def test_a_finished_run_reads_no_weights_and_takes_another_confidence(alone, world, tmp_path, monkeypatch):
    shutil.copytree(alone[0], tmp_path / "run")
    monkeypatch.setattr(surgery, "load_policy", lambda *_: pytest.fail("weights were read"))
    main(_arguments(world, tmp_path / "run", confidence=0.5, batch_size=1))
    wide, narrow = _rows(alone[0])["after", "unlearn", "loss"], _rows(tmp_path / "run")["after", "unlearn", "loss"]
    assert wide["value"] == narrow["value"] and float(wide["low"]) < float(narrow["low"])


def test_two_models_some_parts_and_own_texts(world, tmp_path, capsys):
    own = {
        "bench": None,
        "retrained": None,
        "documents": [f"{name}={world / name}.jsonl" for name in ("unlearn", "unseen")],
        "parts": ["texts", "robustness"],
    }
    main(_arguments(world, tmp_path / "run", **own))
    printed = capsys.readouterr().out
    assert "no attack was made: there are no questions about unlearn" in printed
    assert "no retrained model: no privacy leakage" in printed and "nothing of the set update" in printed
    rows = _rows(tmp_path / "run")
    assert {set_name for _, set_name, _ in rows} == {"unlearn", "unseen"} and ("after", "unlearn", "auc_zlib") in rows
    assert not any(metric.startswith("score") for _, _, metric in rows)


def test_an_adapter_is_judged_as_the_model_it_makes(world, tmp_path):
    peft_model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(world / "before"), LoraConfig(target_modules="all-linear", r=4)
    )
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    tokenizer = AutoTokenizer.from_pretrained(world / "before")
    for folder in ("adapter", "merged"):
        tokenizer.save_pretrained(tmp_path / folder)
    peft_model.save_pretrained(tmp_path / "adapter")
    peft_model.merge_and_unload().save_pretrained(tmp_path / "merged")
    few = {"retrained": None, "sets": ["unlearn", "retain"], "kinds": ["mcq"], "dtype": "float32"}
    few |= {"parts": ["questions", "divergence", "robustness"]}
    runs = {}
    for name in ("adapter", "merged"):
        main(_arguments(world, tmp_path / f"run {name}", after=tmp_path / name, **few))
        runs[name] = {key: row["value"] for key, row in _rows(tmp_path / f"run {name}").items() if key[0] == "after"}
    assert runs["adapter"].keys() == runs["merged"].keys() and len(runs["merged"]) > 10
    for key, value in runs["merged"].items():
        assert float(runs["adapter"][key]) == pytest.approx(float(value), rel=1e-3, abs=1e-5), key
    assert float(runs["adapter"]["after", "retain", "kl"]) > 1e-3
    settings = json.loads((tmp_path / "run adapter" / "eval_surgery.json").read_text())
    assert settings["after_base_files"] == settings["before_files"]


def test_attacks_can_be_left_out(world, tmp_path, capsys):
    few = {"before": None, "retrained": None, "sets": ["unlearn"], "kinds": ["mcq"]}
    main(_arguments(world, tmp_path / "run", robustness="none", **few))
    assert {metric for _, _, metric in _rows(tmp_path / "run")} >= {"accuracy", "rouge_l"}
    assert not (tmp_path / "run" / "work" / "after" / "robustness.json").exists()
    assert "after: the part robustness was not measured" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_tell_what_one_tells(alone, world, tmp_path):
    launch(*TWO_RANKS, "-m", "hf_moe_cpt.scripts.eval_surgery", *_arguments(world, tmp_path / "run"))
    got, want = _measures(tmp_path / "run"), _measures(alone[0])
    assert [(row["side"], row["set"], row["metric"], row["n"]) for row in got] == [
        (row["side"], row["set"], row["metric"], row["n"]) for row in want
    ]
    for row, other in zip(got, want, strict=True):
        for name in ("value", "low", "high"):
            assert (row[name] is None) == (other[name] is None)
            assert row[name] is None or row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), row["metric"]


@pytest.mark.slow
def test_a_user_reads_one_line_and_the_exit_code_is_2(world, tmp_path):
    words = ("-m", "hf_moe_cpt.scripts.eval_surgery", "--output_dir", str(tmp_path / "run"), "--bench", "nowhere")
    done = run_python(*words, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: nothing to evaluate: give --before, --after or --retrained, best all three.\n"


NOBODY = dict.fromkeys(SIDES)
REFUSED = {
    "no model": (NOBODY, "nothing to evaluate: give --before, --after or --retrained"),
    "no texts": ({"bench": None}, "give one of --bench, --num_subjects and --documents, got none"),
    "two benches": ({"num_subjects": 15}, "and --documents, got bench, num_subjects: which texts?"),
    "questions alone": ({"questions": "q.jsonl"}, "--questions needs --documents: whom are they about?"),
    "no bench": ({"bench": "nowhere"}, "nowhere"),
    "none and more": ({"robustness": ["none", "prefix"]}, "--robustness none stands alone, got none prefix"),
    "dtype": ({"dtype": "int3"}, "--dtype 'int3' is unknown: choose from"),
    "device": ({"device": "tpu"}, "--device 'tpu' is unknown: choose from auto, cpu, cuda"),
    "confidence": ({"confidence": 95}, r"--confidence 95.0 must lie in \(0, 1\)"),
    "resamples": ({"resamples": 0}, "--resamples 0 must be at least 1; 2000 is usual"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused_with_one_line(world, tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        main(_arguments(world, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_folder_of_another_run_is_refused(alone, world, tmp_path):
    before = _measures(alone[0])
    with pytest.raises(ValueError, match="was made with max_questions=6, and now it is 5: name another folder"):
        main(_arguments(world, alone[0], max_questions=5))
    assert _measures(alone[0]) == before


def test_edited_texts_are_another_bench(world, tmp_path):
    arguments = _arguments(world, tmp_path / "run", bench=None, documents=[f"unlearn={tmp_path / 'unlearn.jsonl'}"])
    few = [*arguments, "--parts", "texts"]
    shutil.copy(world / "unlearn.jsonl", tmp_path)
    main(few)
    with (tmp_path / "unlearn.jsonl").open("r+") as file:
        text = file.read()
        file.seek(0)
        file.write(text.replace("old", "odd"))
    with pytest.raises(ValueError, match="was made with bench_content=[0-9a-f]{16}, and now it is [0-9a-f]{16}"):
        main(few)
