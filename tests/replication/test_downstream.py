"""Tasks: the right choice is what comes next, and a model's accuracy is the one that lm-eval finds."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_moe_cpt.data.python_corpus import train_byte_level_bpe
from hf_moe_cpt.scripts.replication import downstream
from tests.replication.test_factbook import make_countries


TEXTS = [" ".join(f"w{(7 * number + place) % 97}" for place in range(300)) for number in range(8)]


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
    rows = downstream.continuations([*TEXTS, "too short"], 5)
    assert len(rows) == 5 and len({row["answer"] for row in rows}) > 1
    for row, text in zip(rows, TEXTS, strict=False):
        assert text.startswith(f"{row['question']} {row['choices'][row['answer']]}")
        assert len(set(row["choices"])) == downstream.CHOICES and all(choice in text for choice in row["choices"])
    assert downstream.continuations(TEXTS, 0) == []


def test_facts_are_asked_with_values_of_other_countries(tmp_path: Path, capsys) -> None:
    make_countries(tmp_path / "countries", 20)
    downstream.make(["--countries", str(tmp_path / "countries"), "--output_dir", str(tmp_path / "tasks")])
    rows = read(tmp_path / "tasks", "capitals")
    assert "capitals.yaml" in capsys.readouterr().out and len(rows) >= 15
    assert all(row["question"].startswith("Question: ") and len(set(row["choices"])) == 4 for row in rows)


@torch.no_grad()
def test_an_accuracy_is_the_share_of_most_likely_right_choices(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(tmp_path / "model")
    downstream.write_task(downstream.continuations(TEXTS, 6), "continue_w", tmp_path / "tasks")
    right = []
    for row in read(tmp_path / "tasks", "continue_w"):
        start, logp = len(tokenizer(row["question"]).input_ids), []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(f"{row['question']} {choice}").input_ids])
            told = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            logp.append(float(told[start - 1 :].sum()))
        right.append(max(range(len(logp)), key=logp.__getitem__) == row["answer"])
    found = downstream.accuracies(model, tokenizer, tmp_path / "tasks", 4)
    assert found == {"continue_w": pytest.approx(sum(right) / len(right))}
    assert downstream.accuracies(model, tokenizer, tmp_path / "nothing", 4) == {}


@pytest.mark.slow
def test_lm_eval_reads_the_tasks_and_finds_the_same(tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    tasks = pytest.importorskip("lm_eval.tasks")
    model, tokenizer = tiny_model(tmp_path / "model")
    downstream.write_task(downstream.continuations(TEXTS, 8), "continue_w", tmp_path / "tasks")
    found = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(tmp_path / "model"), "dtype": "float32"},
        tasks=["continue_w"],
        task_manager=tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
    )
    ours = downstream.accuracies(model, tokenizer, tmp_path / "tasks", 4)
    assert ours["continue_w"] == pytest.approx(found["results"]["continue_w"]["acc,none"])
