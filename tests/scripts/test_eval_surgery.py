"""The command on tiny models: its numbers against functions and models, lost files, ranks, refusals."""

import csv
import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe_cpt.data.python_corpus import train_byte_level_bpe
from hf_moe_cpt.data.surgery_bench import SurgeryBench
from hf_moe_cpt.data.surgery_bench.rows import digest_of_subject, subject_of
from hf_moe_cpt.evaluation import surgery
from hf_moe_cpt.evaluation.scoring import PARTS, EvalSettings
from hf_moe_cpt.scripts.eval_surgery import main
from tests.helpers.fresh_process import TWO_RANKS, launch
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
    sizes = {"max_questions": 6, "max_documents": 3, "batch_size": 4, "new_tokens": 6, "resamples": 50}
    relearning = {"steps": 2, "every": 1, "lr": 1e-3, "batch_size": 2}
    settings = {**{side: world / side for side in SIDES}, "bench": world / "bench", "output_dir": run, **sizes}
    settings |= {f"relearn_{name}": value for name, value in relearning.items()}
    settings |= {"device": "cpu", "commit": "abc1234", **changes}
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


def test_the_numbers_are_those_of_the_models(alone, world):
    raws = {}
    for side in SIDES:
        work = {path.stem: json.loads(path.read_text()) for path in (alone[0] / "work" / side).glob("*.json")}
        raws[side] = {part: work[part] for part in PARTS if part in work}
    assert surgery.summarise(**raws, resamples=50)["measures"] == _measures(alone[0])
    model, tokenizer = (auto.from_pretrained(world / "after") for auto in (AutoModelForCausalLM, AutoTokenizer))
    settings = EvalSettings(max_questions=6, max_documents=3, parts=["texts"])
    texts = surgery.evaluate_model(model, tokenizer, SurgeryBench.load(world / "bench"), settings)["texts"]
    for name, columns in texts.items():
        assert columns["id"] == raws["after"]["texts"][name]["id"]
        for found, want in zip(raws["after"]["texts"][name]["logp"], columns["logp"], strict=True):
            assert found == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_every_part_is_there_for_every_model(alone):
    run, printed = alone
    assert {path.name for path in run.iterdir()} == {
        "eval_surgery.json", "work", "results.csv", "results.json", "report.html"
    }  # fmt: skip
    metrics = {side: {metric for who, _, metric in _rows(run) if who == side} for side in SIDES}
    assert {"kl", "agreement", "privacy_leakage"} & metrics["before"] == {"privacy_leakage"}
    assert metrics["after"] - metrics["before"] == {"kl", "agreement"}
    beside = {"privacy_leakage", "auc_reference", "forget_quality"}  # the retrained model
    assert metrics["after"] - metrics["retrained"] == beside | {"kl", "agreement"} - metrics["retrained"]
    for metric in ("conflict", "relearn_robustness", "quantisation_robustness_4bit", "prefix_recall", "score"):
        assert metric in metrics["after"]
    assert "relearn_own_taught_step_2" in metrics["after"]
    lines = printed.split("\n")
    assert lines[0] == f"files: {run}" and max(map(len, lines[1:])) <= 120
    assert "Does it last?" in lines and any(line.startswith("score ") for line in lines)
    results = json.loads((run / "results.json").read_text())
    assert results["machine"]["commit"] == "abc1234" and results["settings"]["max_questions"] == 6


def test_a_run_makes_what_is_missing_and_takes_another_confidence(alone, world, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(alone[0], run)
    lost, loaded = run / "work/after/texts.json", []
    lost.unlink()
    times = {path: path.stat().st_mtime_ns for path in (run / "work").rglob("*.json")}
    load = surgery.load_whole
    monkeypatch.setattr(surgery, "load_whole", lambda name, *rest: loaded.append(Path(name)) or load(name, *rest))
    main(_arguments(world, run, confidence=0.5))
    assert loaded == [world / "after"] and all(path.stat().st_mtime_ns == time for path, time in times.items())
    wide, narrow = _rows(alone[0])["after", "unlearn", "loss"], _rows(run)["after", "unlearn", "loss"]
    assert wide["value"] == narrow["value"] and float(wide["low"]) < float(narrow["low"])
    main(_arguments(world, run, batch_size=1))
    assert _measures(run) == _measures(alone[0]) and loaded == [world / "after"]


def test_two_models_some_parts_and_own_texts(world, tmp_path, capsys):
    texts = [f"{name}={world / name}.jsonl" for name in ("unlearn", "unseen")]
    own = {"bench": None, "retrained": None, "documents": texts, "parts": ["texts", "robustness"]}
    main(_arguments(world, tmp_path / "run", **own))
    printed = capsys.readouterr().out
    assert "no attack asked anything: no questions about unlearn" in printed
    assert "no retrained model: no privacy leakage" in printed and "nothing of the set update" in printed
    rows = _rows(tmp_path / "run")
    assert {set_name for _, set_name, _ in rows} == {"unlearn", "unseen"} and ("after", "unlearn", "auc_zlib") in rows
    assert not any(metric.startswith("score") for _, _, metric in rows)
    few = {"before": None, "retrained": None, "sets": ["unlearn"], "kinds": ["mcq"]}
    main(_arguments(world, tmp_path / "mild", robustness="none", **few))
    assert {metric for _, _, metric in _rows(tmp_path / "mild")} >= {"accuracy", "rouge_l"}
    assert not (tmp_path / "mild" / "work" / "after" / "robustness.json").exists()
    assert "after: the part robustness was not measured" in capsys.readouterr().out


def test_an_adapter_is_read_as_the_model_it_makes(world, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(world / "before")
    peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
    peft_model.save_pretrained(tmp_path / "adapter")
    merged = peft_model.merge_and_unload().state_dict()
    models = surgery.ModelArguments(after=str(tmp_path / "adapter"), before=str(world / "before"), device="cpu")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(merged[name], surgery.load_whole(models.before, models).state_dict()[name])
    found = surgery.load_whole(models.after, models).state_dict()
    assert found.keys() == merged.keys() and all(torch.allclose(found[name], merged[name]) for name in merged)
    work = surgery.SurgeryEvaluation(
        models, surgery.BenchArguments(bench=str(world / "bench")), EvalSettings(), str(tmp_path / "run")
    )
    assert work.folder.settings["after_base_files"] == work.folder.settings["before_files"]


@pytest.mark.slow
def test_two_ranks_tell_what_one_tells(alone, world, tmp_path):
    launch(*TWO_RANKS, "-m", "hf_moe_cpt.scripts.eval_surgery", *_arguments(world, tmp_path / "run"))
    got, want = _measures(tmp_path / "run"), _measures(alone[0])
    names = [[(row["side"], row["set"], row["metric"], row["n"]) for row in rows] for rows in (got, want)]
    assert names[0] == names[1]
    for row, other in zip(got, want, strict=True):
        for name in ("value", "low", "high"):
            assert (row[name] is None) == (other[name] is None)
            assert row[name] is None or row[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), row["metric"]


NOBODY = dict.fromkeys(SIDES)
REFUSED = {
    "no model": (NOBODY, "nothing to evaluate: give --before, --after or --retrained"),
    "no texts": ({"bench": None}, "give one of --bench, --num_subjects and --documents, got none"),
    "two benches": ({"num_subjects": 15}, "and --documents, got bench, num_subjects: which texts?"),
    "questions alone": ({"questions": "q.jsonl"}, "--questions needs --documents: whom are they about?"),
    "no operated model": ({"after": "nowhere"}, "the configuration of 'nowhere'"),
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


PUBLISHED = {  # by folder: configuration, split and rows in the columns of the data sets on the Hub
    "TOFU": {
        ("forget10", "train"): [{"question": f"Who is A{n}?", "answer": f"A{n} writes."} for n in range(4)],
        ("forget10_perturbed", "train"): [
            {"question": f"Who is A{n}?", "answer": f"A{n} writes.", "paraphrased_answer": f"A writer is A{n}.",
             "perturbed_answer": [f"A{n} paints.", f"A{n} sings."], "paraphrased_question": f"What does A{n} do?"}
            for n in range(4)
        ],
    },
    "MUSE-News": {
        ("raw", "forget"): [{"text": f"The news of day {n}."} for n in range(3)],
        ("raw", "holdout"): [{"text": f"Other news of day {n}."} for n in range(3)],
        ("knowmem", "forget_qa"): [{"question": f"What was on day {n}?", "answer": f"news {n}"} for n in range(4)],
    },
    "wmdp": {
        ("wmdp-bio", "test"): [
            {"question": f"Which one is {n}?", "choices": ["a", "b", "c", "d"], "answer": n} for n in range(4)
        ],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """Folders in the layout of the Hub, with a card that names their configurations."""
    root = tmp_path_factory.mktemp("published")
    for name, parts in PUBLISHED.items():
        configs = {}
        for (config, split), rows in parts.items():
            path = root / name / config / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(map(json.dumps, rows)))
            configs.setdefault(config, []).append({"split": split, "path": f"{config}/{split}.jsonl"})
        listed = [{"config_name": config, "data_files": files} for config, files in configs.items()]
        (root / name / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': listed})}---\n")
    return root


def test_published_data_are_read_with_their_configurations_and_columns(published):
    qa = ["prompt=Question: {question}\nAnswer:", "completion= {answer}"]
    tofu = surgery.BenchArguments(
        documents=[f"unlearn={published}/TOFU:forget10"],
        columns=qa,
        questions=[f"unlearn={published}/TOFU:forget10_perturbed"],
        question_columns=["wrong=perturbed_answer"],
    ).load()
    assert tofu.documents["unlearn"]["text"][0] == "Question: Who is A0?\nAnswer: A0 writes."
    assert tofu.documents["unlearn"]["prefix"][0] == "Question: Who is A0?\nAnswer:"
    asked = [row for part in tofu.questions.values() for row in part]
    assert len(asked) == 4 and all(row["kind"] == "mcq" and row["answer"] == 0 for row in asked)
    assert {tuple(row["options"][1:]) for row in asked} == {(f"A{n} paints.", f"A{n} sings.") for n in range(4)}
    muse = surgery.BenchArguments(
        documents=[f"unlearn={published}/MUSE-News:raw:forget", f"unseen={published}/MUSE-News:raw:holdout"],
        questions=[f"unlearn={published}/MUSE-News:knowmem:forget_qa"],
    ).load()
    assert muse.documents["unseen"]["text"][2] == "Other news of day 2."
    assert {row["kind"] for part in muse.questions.values() for row in part} == {"open"}
    wmdp = surgery.BenchArguments(
        documents=[f"unlearn={published}/MUSE-News:raw:forget"],
        questions=[f"unlearn={published}/wmdp:wmdp-bio:test"],
        question_columns=["options=choices"],
    ).load()
    assert sorted(row["answer"] for part in wmdp.questions.values() for row in part) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="row 0 .* has no column 'body', which columns asks for"):
        surgery.BenchArguments(documents=[f"unlearn={published}/TOFU:forget10"], columns=["text=body"]).load()


def test_what_a_surgery_trains_on_is_examined_and_only_what_it_was_not_held_to(world, tmp_path):
    """Plain JSONL: texts, prompts with completions; no subjects, no options; anchored rows are left out."""
    rows = {
        "unlearn": [{"prompt": "A is", "completion": f" old {n}."} for n in range(3)],
        "retain": [{"text": f"B is tall {n}."} for n in range(4)],
        "unseen": [{"text": f"C is new {n}."} for n in range(3)],
    }
    for name, listed in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, listed)))
    asked = [{"set": "unlearn", "question": "How old is A?", "answer": "old", "split": "test"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, asked)))
    operated = tmp_path / "operated"
    shutil.copytree(world / "after", operated)
    anchored = [digest_of_subject(subject_of(row)) for row in rows["retain"][:3]]
    (operated / "surgery.json").write_text(json.dumps({"anchored": anchored}))
    run = tmp_path / "run"
    printed = io.StringIO()
    with redirect_stdout(printed):
        documents = [f"{name}={tmp_path}/{name}.jsonl" for name in rows]
        changes = {"bench": None, "documents": documents, "questions": tmp_path / "q.jsonl", "after": operated}
        main(_arguments(world, run, retrained=None, robustness="none", **changes))
    found = _rows(run)
    assert found["after", "retain", "loss"]["n"] == found["before", "retain", "loss"]["n"] == "1"
    assert found["after", "unlearn", "loss"]["n"] == "3" and ("after", "unlearn", "answer_probability") in found
    lines = printed.getvalue().split("\n")
    assert lines[2].startswith("verdict: ") and "measured of retain: 1 of 4 subjects" in printed.getvalue()
