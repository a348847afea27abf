"""Preference pairs as the evaluation reads and scores them: TRL's rule for prompts, full logits, what is refused."""

import json

import pytest
import torch

from hf_moe_cpt.scripts.eval_preference_inputs import read_pairs
from hf_moe_cpt.scripts.eval_preference_logps import answer_scores, is_readable, tokenize_answers
from tests.helpers.preference_runs import word_tokenizer
from tests.helpers.tiny_models import EOS, tiny_model


CHAT = {"role": "user", "content": "hi"}
YES, NO = ({"role": "assistant", "content": text} for text in ("yes", "no"))


def test_scores_do_not_depend_on_the_batch_and_equal_full_logits():
    model, tokenizer = tiny_model("llama").eval(), word_tokenizer()
    model.lm_head.weight.data *= 20
    texts = [
        (f"w{2 + i} w5 ", [" ".join(["w9", f"w{7 + i}"] * length) for length in (1 + i % 4, 2)]) for i in range(9)
    ]
    answers = [answer for prompt, pair in texts for answer in tokenize_answers(prompt, pair, tokenizer, None)]
    assert is_readable(answers) and all(answer.ids[-1] == EOS for answer in answers)
    one_by_one, batched = answer_scores(model, answers, 1), answer_scores(model, answers, 7)
    assert [score.logp for score in batched] == pytest.approx([score.logp for score in one_by_one], rel=1e-5)
    for answer, score in zip(answers, one_by_one, strict=True):
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([answer.ids])).logits[0].double().log_softmax(-1)
        places = range(answer.start, len(answer.ids))
        want = sum(float(logps[place - 1, answer.ids[place]]) for place in places)
        assert (score.logp, score.num_tokens) == (pytest.approx(want, rel=1e-5), len(places))


def test_an_answer_without_a_token_before_it_or_of_its_own_is_not_read():
    tokenizer = word_tokenizer()
    (whole,), (cut,) = (tokenize_answers("w3 w4 ", ["w5"], tokenizer, limit) for limit in (None, 2))
    assert (whole.start, len(whole.ids), whole.was_cut) == (2, 4, False)
    assert cut.was_cut and is_readable([whole]) and not is_readable([whole, cut])
    assert not is_readable([whole._replace(start=0)])


ROWS = {
    "text": {"prompt": "a b ", "chosen": "c", "rejected": "d"},
    "text without a prompt": {"chosen": "Human: hi Assistant: yes", "rejected": "Human: hi Assistant: you"},
    "one text begins the other": {"chosen": "so", "rejected": "so it is"},
    "messages": {"chosen": [CHAT, YES], "rejected": [CHAT, NO]},
    "two rounds": {"chosen": [CHAT, YES, CHAT, YES], "rejected": [CHAT, YES, CHAT, NO]},
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_prompts_are_found_as_trl_finds_them(tmp_path, row):
    trl = pytest.importorskip("trl")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    (got,) = read_pairs(str(tmp_path / "pairs.jsonl"), None, "test", None)
    want = row if "prompt" in row else trl.extract_prompt(row)
    assert {"prompt": got.prompt, "chosen": got.chosen, "rejected": got.rejected} == want


def test_a_text_beside_messages_is_no_prompt(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "hi", "chosen": [CHAT, YES], "rejected": [CHAT, NO]}))
    (got,) = read_pairs(str(tmp_path / "pairs.jsonl"), None, "test", None)
    assert (got.prompt, got.chosen, got.rejected) == ([CHAT], [YES], [NO])


@pytest.mark.parametrize(
    "row, message",
    [
        ({"chosen": [CHAT, YES], "rejected": "no"}, "row 0 .* is no preference pair: give chosen and rejected as"),
        ({"chosen": "yes", "rejected": "no"}, "row 0 .* lacks a prompt or an answer: both answers must begin alike"),
        ({"chosen": [{"role": "user"}], "rejected": [{"role": "user"}]}, "row 0 .* is no preference pair"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(tmp_path, row, message):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        read_pairs(str(tmp_path / "pairs.jsonl"), None, "test", None)
