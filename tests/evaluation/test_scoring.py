"""Scores of texts against full logits, whatever the batch; greedy continuations against an argmax loop; which rows of
a bench are drawn, where a header ends, where an option begins.
"""

import json

import numpy as np
import pytest
import torch

from hf_moe_cpt.data.surgery_bench import HEADER
from hf_moe_cpt.evaluation import scoring
from hf_moe_cpt.evaluation.surgery import BenchArguments
from tests.helpers.forked_ranks import on_ranks
from tests.helpers.tiny_models import VOCABULARY, tiny_model


def _model(kind: str = "llama", factor: float = 20.0, **changes: object):
    model = tiny_model(kind, **changes).double().eval()
    if kind != "llama":
        model.set_experts_implementation("eager")  # in float64
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)
    return model


def _texts(count: int) -> list[scoring.CountedText]:
    generator = torch.Generator().manual_seed(1)
    return [
        scoring.CountedText(torch.randint(VOCABULARY, (3 + 7 * i % 23,), generator=generator).tolist(), 1 + i % 2)
        for i in range(count)
    ]


def _log_softmax(model, text: scoring.CountedText) -> torch.Tensor:
    """(n, V): what the model says of each token that counts, alone in its batch."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([text.ids])).logits[0]
    return logits[text.start - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "cpt_moe"])
def test_scores_are_those_of_full_logits_in_any_batch(kind, monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 5 * VOCABULARY)  # many chunks in a batch
    model, texts = _model(kind), _texts(11)
    assert all(len(score.mean) == len(score.std) == 0 for score in scoring.score_tokens(model, texts, 4))
    for batch_size in (1, 4, 16):
        for text, score in zip(texts, scoring.score_tokens(model, texts, batch_size, with_moments=True), strict=True):
            logp, targets = _log_softmax(model, text), torch.tensor(text.ids[text.start :])
            mean = (logp.exp() * logp).sum(-1)
            variance = (logp.exp() * logp.square()).sum(-1) - mean.square()
            np.testing.assert_allclose(score.logp, logp[torch.arange(len(targets)), targets], atol=1e-10)
            np.testing.assert_array_equal(score.hit, logp.argmax(-1) == targets)
            np.testing.assert_allclose(score.mean, mean, atol=1e-10)
            np.testing.assert_allclose(score.std, variance.sqrt(), atol=1e-8)


def test_words_of_probability_zero_leave_the_moments_finite_and_no_rows_are_no_results():
    model = _model()
    with torch.no_grad():
        model.get_output_embeddings().weight[7:] *= 1e8
    for score in scoring.score_tokens(model, _texts(5), 2, with_moments=True):
        assert np.isfinite(score.mean).all() and np.isfinite(score.std).all()
    assert scoring.score_tokens(_model(), [], 4) == [] and scoring.continue_greedily(_model(), [], 4, 4, stop=[]) == []


def test_distances_are_the_divergence_of_the_reference_and_equal_first_choices():
    model, reference, texts = _model(), _model(factor=8.0), _texts(9)
    with torch.no_grad():
        reference.get_output_embeddings().weight.add_(torch.randn(VOCABULARY, 16, dtype=torch.float64) / 3)
    found = scoring.score_distances(model, reference, texts, 4)
    for text, distance in zip(texts, found, strict=True):
        ours, theirs = _log_softmax(model, text), _log_softmax(reference, text)
        np.testing.assert_allclose(distance.kl, (theirs.exp() * (theirs - ours)).sum(-1), atol=1e-10)
        np.testing.assert_array_equal(distance.agrees, ours.argmax(-1) == theirs.argmax(-1))
    agrees = np.concatenate([distance.agrees for distance in found])
    assert 0 < agrees.mean() < 1
    assert max(distance.kl.max() for distance in scoring.score_distances(model, model, texts, 4)) < 1e-12
    with pytest.raises(ValueError, match="has 48 words and the one before 50: their KL is defined for one vocabulary"):
        scoring.score_distances(_model(), _model(vocab_size=50), _texts(1), 1)


def test_continuations_are_greedy_and_end_before_a_stop_token():
    model = _model()
    model.generation_config.repetition_penalty = 5.0  # the model's own settings must not matter
    prompts = [text.ids for text in _texts(5)]
    free = scoring.continue_greedily(model, prompts, 6, 2, stop=[])
    assert model.generation_config.repetition_penalty == 5.0
    for prompt, written in zip(prompts, free, strict=True):
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert written == ids[len(prompt) :]
    stop = free[0][2]
    stopped = scoring.continue_greedily(model, prompts, 6, 2, stop=[stop])
    for written, whole in zip(stopped, free, strict=True):
        assert written == (whole[: whole.index(stop)] if stop in whole else whole)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", max_position_embeddings=2048)


def rows_of_rank() -> tuple[list[int], int]:
    """What a rank gets for five rows, one at a time, and how many passes it took part in."""
    passes = []

    def run(batch: list[list[int]]) -> list[int]:
        passes.append(batch)
        return [len(row) for row in batch]

    return scoring.over_rows([[0] * length for length in (3, 1, 5, 4, 2)], len, run, batch_size=1), len(passes)


@pytest.mark.parametrize("ranks, passes", [(1, 5), (2, 3), (4, 2)])
def test_ranks_share_rows_in_equal_numbers_of_passes(ranks, passes, tmp_path):
    """A pass of a model whose weights are spread over ranks needs all of them: one without a row must not leave."""
    assert on_ranks(ranks, tmp_path / "ranks", rows_of_rank) == [([3, 1, 5, 4, 2], passes)] * ranks


def test_rows_are_drawn_once_by_seed_and_name(bench):
    rows = bench.ask("unlearn", "test", "mcq")
    drawn = [row["id"] for row in scoring.chosen_rows(rows, 5, 0, "a")]
    assert len(set(drawn)) == 5 < len(rows) and drawn == [row["id"] for row in scoring.chosen_rows(rows, 5, 0, "a")]
    assert drawn == sorted(drawn, key=rows["id"].index)
    assert any(
        drawn != [row["id"] for row in scoring.chosen_rows(rows, 5, seed, name)] for seed, name in ((1, "a"), (0, "b"))
    )
    assert [row["id"] for row in scoring.chosen_rows(rows, 99, 0, "a")] == rows["id"]


def test_old_and_new_documents_are_drawn_of_the_same_subjects(bench, tokenizer, model):
    settings = scoring.EvalSettings(max_documents=2)
    old, new = (scoring.documents_of(bench, name, tokenizer, model, settings) for name in ("obsolete", "update"))
    assert [(d.row["subject"], d.row["form"]) for d in old] == [(d.row["subject"], d.row["form"]) for d in new]
    assert len(old) == 2 and [document.row["text"] for document in old] != [document.row["text"] for document in new]


def test_a_header_does_not_count(bench, tokenizer, model):
    with_header = scoring.documents_of(bench, "unlearn", tokenizer, model, scoring.EvalSettings(header=HEADER))
    bare = scoring.documents_of(bench, "unlearn", tokenizer, model, scoring.EvalSettings())
    for headed, plain in zip(with_header, bare, strict=True):
        assert headed.tokens.ends and headed.tokens.ids[-1] == tokenizer.eos_token_id
        counted = tokenizer.decode(headed.tokens.ids[headed.tokens.start : -1])
        assert plain.row["text"].endswith(counted) and len(plain.row["text"]) - len(counted) <= 12
        assert plain.tokens.start == 1


def test_a_token_across_the_end_of_a_header_belongs_to_it(tokenizer):
    ids = tokenizer("Oren was born")["input_ids"]
    offsets = tokenizer("Oren was born", return_offsets_mapping=True)["offset_mapping"]
    place = next(number for number, (begin, end) in enumerate(offsets) if number > 0 and end - begin > 1)
    middle = offsets[place][0] + 1
    row = {"text": "Oren was born", "prefix": "Oren was born"[:middle]}
    ((_, tokens),) = scoring.read_documents([row], tokenizer, None)
    assert tokens == (ids, place + 1, False)
    assert scoring.read_documents([{**row, "prefix": row["text"]}], tokenizer, None) == []
    assert len(scoring.read_documents([{**row, "prefix": ""}], tokenizer, 3)[0].tokens.ids) == 3


def test_options_begin_where_the_question_ends(bench, tokenizer, model):
    settings = scoring.EvalSettings(max_questions=7)
    asked = scoring.questions_of(bench, "update", tokenizer, model, settings)
    kinds = [question.row["kind"] for question in asked]
    assert {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)} == {
        "mcq": 7, "cloze": 7, "paraphrase": 7, "one_hop": 7, "inverse": 3
    }  # fmt: skip
    for row, options in asked:
        start = row["question"] if row["kind"] == "cloze" else f"Question: {row['question']}\nAnswer:"
        for option, text in zip(options, row["options"], strict=True):
            assert tokenizer.decode(option.ids) == f"{start} {text}"
            assert tokenizer.decode(option.ids[option.start :]).strip() == text
    only = scoring.questions_of(bench, "update", tokenizer, model, scoring.EvalSettings(kinds=("mcq",)))
    assert {question.row["kind"] for question in only} == {"mcq"}


def test_a_long_question_loses_its_beginning_and_one_without_tokens_is_refused(tokenizer):
    row = {"id": "q", "kind": "mcq", "question": "Who " * 50, "options": ["Ada Lovelace", "Bo"], "subject": "s"}
    (question,) = scoring.ask([row], tokenizer, 20, "{question}")
    whole = tokenizer(row["question"] + " Ada Lovelace")["input_ids"]
    assert question.options[0].ids == whole[-20:]
    assert tokenizer.decode(question.options[1].ids[question.options[1].start :]) == " Bo"
    (named,) = scoring.ask([row], tokenizer, None, "About {subject}: {question}")
    assert tokenizer.decode(named.options[1].ids).startswith("About s: Who Who")
    row = {"id": "q 7", "kind": "mcq", "question": "", "options": ["a", "b"], "subject": "s"}
    with pytest.raises(ValueError, match="question 'q 7' cannot be scored: the tokenizer"):
        scoring.ask([row], tokenizer, None, "{question}")


def test_own_files_are_read_as_one_or_by_set(tmp_path):
    rows = {"unlearn": {"subject": "A", "text": "A is old."}, "retain": {"subject": "B", "text": "B is new."}}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    (tmp_path / "all.jsonl").write_text("\n".join(json.dumps({**row, "set": name}) for name, row in rows.items()))
    for files in ([f"{name}={tmp_path / name}.jsonl" for name in rows], [str(tmp_path / "all.jsonl")]):
        assert scoring.sets_of(BenchArguments(documents=files).load(), scoring.EvalSettings()) == ("unlearn", "retain")
    with pytest.raises(ValueError, match="--documents a.jsonl must give our name and yours, as unlearn="):
        BenchArguments(documents=["a.jsonl", "b.jsonl"]).load()


REFUSED = {
    "set": ({"sets": ("lost",)}, "sets has 'lost', which is unknown: choose from unlearn"),
    "part": ({"parts": ("lunch",)}, "parts has 'lunch', which is unknown: choose from questions"),
    "kind": ({"kinds": ("essay",)}, "kinds has 'essay', which is unknown: choose from mcq"),
    "attack": ({"robustness": ("bribe",)}, "robustness has 'bribe', which is unknown: choose from relearn"),
    "split": ({"split": "train"}, "split 'train' is unknown: choose"),
    "count": ({"max_questions": 0}, "max_questions=0 must be at least 1"),
    "rate": ({"relearn_lr": 0.0}, "relearn_lr=0.0 must be above 0"),
    "template": ({"question_template": "Why?"}, "question_template 'Why.' must contain {question}"),
    "length": ({"max_length": 1}, "max_length=1 must be at least 2"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_bad_settings_are_refused_with_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        scoring.EvalSettings(**changes)
    assert "\n" not in str(caught.value)


def test_gibberish_is_what_the_model_before_finds_unlikely_or_what_repeats_itself():
    plain = "one two three four five six seven eight nine ten"
    columns = {
        "text": [plain, plain, "ha " * 10, ""],
        "true_text": [plain] * 4,
        "loss_before": [2.0, 3.1, 0.1, None],
    }
    ordinary = [1.0 + 2.0 * place / 100 for place in range(101)]  # 95 % of it is at most 2.9
    assert scoring.gibberish(columns, ordinary).tolist() == [0.0, 1.0, 1.0, 1.0]
    raw = {
        "continuations": {
            name: {"id": list("abcd"), "subject": list("abcd")} | columns for name in ("retain", "unseen")
        }
    }
    assert ("gibberish", "retain") not in scoring.values_of(raw)[0]  # nothing says what is ordinary
    raw["continuations"]["unseen"]["true_loss_before"] = [*ordinary, None]
    assert scoring.values_of(raw)[0]["gibberish", "retain"].values.mean() == 0.75
