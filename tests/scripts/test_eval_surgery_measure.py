"""Raw measurements of a model: each number against the model itself, asked alone."""

import json

import pytest
import torch

from hf_moe_cpt.data.surgery_bench import HEADER, SurgeryBench
from hf_moe_cpt.data.surgery_bench_questions import QUIZ_TEMPLATE
from hf_moe_cpt.data.tokenizer_training import train_byte_level_bpe
from hf_moe_cpt.scripts.eval_surgery_measure import evaluate_model
from hf_moe_cpt.scripts.eval_surgery_sets import EvalSettings
from tests.helpers.tiny_models import tiny_model


@pytest.fixture(scope="module")
def bench() -> SurgeryBench:
    return SurgeryBench.generate(0, 15, kinds=("person",), forms=("quiz",))


@pytest.fixture(scope="module")
def tokenizer(bench):
    return train_byte_level_bpe(bench.before_corpus()["text"], 400, progress=False)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=400, max_position_embeddings=512).double()


SMALL = {"max_questions": 4, "max_documents": 2, "batch_size": 3, "new_tokens": 5}


def _logp(model, ids: list[int]) -> list[float]:
    """Log-probability of every token but the first."""
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logp[place - 1, ids[place]]) for place in range(1, len(ids))]


def test_options_are_scored_after_their_question(bench, tokenizer, model):
    raw = evaluate_model(model, tokenizer, bench, EvalSettings(**SMALL, parts=("questions",)))
    assert set(raw) == {"questions"} and set(raw["questions"]) == set(bench.documents)
    columns = raw["questions"]["update"]["mcq"]
    asked = {row["id"]: row for row in bench.ask("update", "test", "mcq")}
    assert len(set(columns["id"])) == 4
    for place, name in enumerate(columns["id"]):
        row = asked[name]
        assert all(columns[key][place] == row[key] for key in ("subject", "attribute", "answer", "old_answer"))
        start = len(tokenizer(QUIZ_TEMPLATE.format(question=row["question"]))["input_ids"])
        for number, option in enumerate(row["options"]):
            ids = tokenizer(QUIZ_TEMPLATE.format(question=row["question"]) + f" {option}")["input_ids"]
            want = _logp(model, ids)[start - 1 :]
            assert columns["tokens"][place][number] == len(want)
            assert columns["logp"][place][number] == pytest.approx(sum(want), abs=1e-9)


def test_texts_are_scored_token_by_token_after_their_header(bench, tokenizer, model):
    settings = EvalSettings(**SMALL, parts=("texts",), header=HEADER, sets=("unlearn",))
    columns = evaluate_model(model, tokenizer, bench, settings)["texts"]["unlearn"]
    text_of = dict(zip(bench.documents["unlearn"]["id"], bench.documents["unlearn"]["text"], strict=True))
    headed = {row["id"]: row["text"] for row in bench.with_header("unlearn", HEADER)}
    assert len(columns["id"]) == 2
    for place, name in enumerate(columns["id"]):
        assert columns["text"][place] == text_of[name]
        count = len(columns["logp"][place])
        assert columns["logp"][place] == pytest.approx(_logp(model, tokenizer(headed[name])["input_ids"])[-count:])
        assert len(columns["hit"][place]) == len(columns["mean"][place]) == len(columns["std"][place]) == count


def test_continuations_follow_the_first_half(bench, tokenizer, model):
    settings = EvalSettings(**SMALL, parts=("continuations",), sets=("retain", "obsolete"))
    found = evaluate_model(model, tokenizer, bench, settings)["continuations"]
    assert set(found) == {"retain"}  # nobody asks how a model goes on with what is obsolete
    text_of = dict(zip(bench.documents["retain"]["id"], bench.documents["retain"]["text"], strict=True))
    for place, name in enumerate(found["retain"]["id"]):
        ids = tokenizer(text_of[name])["input_ids"]
        half = (len(ids) + 1) // 2
        assert found["retain"]["true_tokens"][place] == ids[half : half + 5]
        assert found["retain"]["true_text"][place] in text_of[name]
        with torch.no_grad():
            first = int(model(input_ids=torch.tensor([ids[:half]])).logits[0, -1].argmax())
        assert (found["retain"]["tokens"][place] or [tokenizer.eos_token_id])[0] == first


def test_divergence_needs_the_model_before_and_is_zero_from_itself(bench, tokenizer, model):
    settings = EvalSettings(**SMALL, parts=("divergence",))
    assert evaluate_model(model, tokenizer, bench, settings) == {}
    found = evaluate_model(model, tokenizer, bench, settings, model)["divergence"]
    assert set(found) == {"retain", "neighbour"}
    assert max(max(kl) for columns in found.values() for kl in columns["kl"]) < 1e-12
    assert all(all(agrees) for columns in found.values() for agrees in columns["agrees"])
    other = tiny_model("llama", vocab_size=400, max_position_embeddings=512, hidden_size=32).double()
    apart = evaluate_model(model, tokenizer, bench, settings, other)["divergence"]
    assert min(min(kl) for kl in apart["retain"]["kl"]) > 1e-6


def test_the_measurements_are_json_and_the_model_trains_on(bench, tokenizer, model):
    model.train()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    settings = EvalSettings(**SMALL, relearn_steps=2, relearn_every=1)
    raw = evaluate_model(model, tokenizer, bench, settings, model)
    assert list(raw) == ["questions", "texts", "continuations", "divergence", "robustness"]
    assert json.loads(json.dumps(raw)) == raw
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
