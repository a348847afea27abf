"""Prepared pairs against what a chat template, a tokenizer and the pairs themselves say; which rows are refused."""

import logging

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hf_moe_cpt.trainers.rainbowpo.data import PreferenceCollator, ends_of, shown
from tests.helpers.preference_runs import pairs, trainer, word_tokenizer
from tests.helpers.tiny_models import TEMPLATE


def _prepared(folder, rows, tokenizer=None, **changes):
    return trainer(
        folder, data=Dataset.from_list(rows), processing_class=tokenizer or word_tokenizer(), preset="simpo", **changes
    )


def _words(run, column, row=0):
    return run.processing_class.decode(run.train_dataset[row][column]).split()


def _begins_and_ends():
    """A tokenizer that writes a start and an end of text itself, as some do."""
    tokenizer = word_tokenizer()
    tokenizer.bos_token = "w2"
    special = [("w2", 2), ("</s>", 0)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="w2 $A </s>", special_tokens=special)
    return tokenizer


TEXTS = {  # prompt, chosen -> prompt and chosen as they are trained on
    "bare": (("w3 ", "w4 w5"), (["w2", "w3"], ["w4", "w5", "</s>"])),
    "templated already": (("w2 w3 ", "w4 w5 </s>"), (["w2", "w3"], ["w4", "w5", "</s>"])),
    "ended, then a line break": (("w3 ", "w4 </s> \n"), (["w2", "w3"], ["w4", "</s>"])),
}


@pytest.mark.parametrize("given, wanted", TEXTS.values(), ids=TEXTS)
def test_text_begins_and_ends_once(tmp_path, given, wanted):
    run = _prepared(tmp_path, [{"prompt": given[0], "chosen": given[1], "rejected": "w9 w9 w9"}], _begins_and_ends())
    assert (_words(run, "prompt_ids"), _words(run, "chosen_ids")) == wanted


CONVERSATION = {
    "prompt": [{"role": "user", "content": "w3"}],
    "chosen": [{"role": "assistant", "content": "w4"}],
    "rejected": [{"role": "assistant", "content": "w5"}],
}
ENDINGS = {"none": "", "one": "</s>", "two": "</s> </s>", "more after it": "</s> w6"}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_a_completion_ends_once_whatever_the_template_writes(tmp_path, caplog, ending):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("</s>", ending)
    with caplog.at_level(logging.WARNING):
        run = _prepared(tmp_path, [CONVERSATION], tokenizer)
    assert _words(run, "chosen_ids") == ["w4", "</s>"] and _words(run, "rejected_ids") == ["w5", "</s>"]
    assert ("2 were given an end of text" in caplog.text) == (ending == "")


def test_the_end_of_a_turn_at_which_generation_stops_is_an_end():
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<pad>"]})
    assert ends_of(tokenizer, [0, 1]) == (0, 1)
    assert ends_of(tokenizer, 2) == (0,)  # a word of a model whose configuration is of another tokenizer


def _turns(*said):
    roles = {"u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in said]


def test_of_a_completion_only_the_assistants_turns_are_scored(tmp_path):
    chosen = _turns("a w4 w5", "t w6 w7", "a w8", "u w9", "a w10")
    run = _prepared(tmp_path, [CONVERSATION | {"chosen": chosen}, CONVERSATION])
    row = run.train_dataset[0]
    words = zip(_words(run, "chosen_ids"), row["chosen_mask"], strict=True)
    assert [word for word, is_scored in words if is_scored] == ["w4", "w5", "</s>", "w8", "</s>", "w10", "</s>"]
    batch = run.data_collator([dict(row)])
    assert batch["completion_mask"].sum(1).tolist() == [7, 2]
    assert all(run.train_dataset[1]["chosen_mask"])


def test_a_template_that_rewrites_earlier_turns_is_refused_where_it_matters(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("message['role'][0]", "'u' if loop.last else message['role'][0]")
    with pytest.raises(ValueError, match="writes a conversation differently once it goes on"):
        _prepared(tmp_path, [CONVERSATION | {"chosen": _turns("a w4", "u w5", "a w6")}], tokenizer)


PROMPTS = {
    "beside the whole conversation": (_turns("u w3"), []),
    "beside answers alone": ([], _turns("u w3")),
}


@pytest.mark.parametrize("head, said", PROMPTS.values(), ids=PROMPTS)
def test_a_prompt_of_text_is_the_users_turn(tmp_path, head, said):
    row = {"prompt": "w3", "chosen": head + _turns("a w4"), "rejected": head + _turns("a w5")}
    run = _prepared(tmp_path, [row])
    assert _words(run, "prompt_ids") == ["u", "w3", "</s>", "a"] and _words(run, "chosen_ids") == ["w4", "</s>"]


def test_cut_completions_are_counted(tmp_path, caplog):
    rows = [{"prompt": "w3 ", "chosen": "w4 w5 w6 w7", "rejected": "w9"}]
    with caplog.at_level(logging.WARNING):
        _prepared(tmp_path, rows, max_length=4)
    assert "Of the 2 completions of the train data set 1 are cut by max_length=4 and never end" in caplog.text


SIX = pairs(6).to_list()
TALKS = [CONVERSATION | {"rejected": _turns(f"a w{number}")} for number in range(5, 11)]
BAD_ROWS = {
    "null": (SIX, {"chosen": None}, "Row 5 of the train data set has no chosen .null.: fill it in, or drop the row"),
    "null prompt": (SIX, {"prompt": None}, "Row 5 of the train data set has no prompt"),
    "no messages": (TALKS, {"rejected": None}, "Row 5 of the train data set has no rejected"),
    "no content": (TALKS, {"chosen": [{"role": "assistant", "content": None}]}, "Row 5 .* without role or content in"),
    "no tools": (
        [row | {"tools": "[]"} for row in TALKS],
        {"tools": "[" * 10**5},
        "^the tools in row 5 .* .Recursion",
    ),
    "no role": (TALKS, {"prompt": [{"role": None, "content": "w3"}]}, "Row 5 .* without role or content in prompt"),
}


QUICK = ("null", "no content")
CASES = [
    pytest.param(*case, is_stream, id=f"{name}, {'stream' if is_stream else 'rows'}", marks=marks)
    for name, case in BAD_ROWS.items()
    for is_stream in (False, True)
    for marks in [() if name in QUICK and not is_stream or name == QUICK[0] else pytest.mark.slow]
]


@pytest.mark.parametrize("rows, change, message, is_stream", CASES)
def test_a_bad_row_is_named_by_its_number(tmp_path, rows, change, message, is_stream):
    data = Dataset.from_list([*rows[:5], rows[5] | change])
    with pytest.raises(ValueError, match=message):
        run = trainer(tmp_path, data=data.to_iterable_dataset() if is_stream else data, preset="simpo")
        list(run.train_dataset)


def test_log_probabilities_that_come_with_the_data_are_left_out(tmp_path, caplog):
    """Scalars, as TRL's own, and pairs of numbers as ours but of another reference."""
    plain = trainer(tmp_path / "a", data=pairs(8))
    plain._calibrate()
    for value in (-3.0, [-3.0, 0.9995]):
        brought = pairs(8).map(lambda row: {"ref_chosen_logps": value, "ref_rejected_logps": value})  # noqa: B023
        with caplog.at_level(logging.WARNING):
            run = trainer(tmp_path / "b", data=brought)
        run._calibrate()
        assert run.dispersion_scale == pytest.approx(plain.dispersion_scale, rel=1e-6)
        assert "brings ref_chosen_logps and ref_rejected_logps, of a reference that is not known here" in caplog.text
        assert "ref_chosen_logps" not in run.train_dataset.column_names


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_padded_batches_are_trls(mode):
    rows = [
        {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
        {"prompt_ids": [7], "chosen_ids": [9, 8, 7, 6], "rejected_ids": [10, 11]},
    ]
    for multiple in (None, 4):
        options = {"pad_token_id": 0, "max_length": 4, "truncation_mode": mode, "pad_to_multiple_of": multiple}
        ours, theirs = PreferenceCollator(**options)(rows), DataCollatorForPreference(**options)(rows)
        assert ours.keys() == theirs.keys()
        theirs["completion_mask"][:, 0] = 0  # where a cut begins with a completion: nothing predicts that token
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name


def test_the_first_pairs_are_shown_as_the_model_sees_them(tmp_path):
    run = _prepared(tmp_path, [CONVERSATION | {"chosen": _turns("a w4", "t w6", "a w8")}], max_length=11)
    text = run.first_pairs()
    assert "pair 0, chosen, 11 tokens, 3 scored: 'u w3 </s> a«w4 </s>»w2 w6 </s> a«w8»'" in text
    assert "pair 0, rejected, 6 tokens, 2 scored: 'u w3 </s> a«w5 </s>»'" in text
    assert shown([], run.processing_class, run.data_collator).count("\n") == 0
