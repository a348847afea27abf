"""Rows of every form become tokens of which the right ones count; what cannot be read is named by row or line."""

import json

import pytest
from datasets import Dataset

from hf_moe_cpt.trainers.surgery.surgery_data import form_of, prompt_and_completion, read_rows, tokenize_set
from tests.helpers.preference_runs import word_tokenizer


EOS = 0


def _set(rows, max_length=32, **options):
    return tokenize_set(Dataset.from_list(rows), word_tokenizer(), name="unlearn", max_length=max_length, **options)


def _counted(row):
    """The words that count."""
    ids = [token for token, counts in zip(row["input_ids"], row["completion_mask"], strict=True) if counts]
    return word_tokenizer().decode(ids)


def test_text_counts_throughout_and_ends():
    (row,) = _set([{"text": "w2 w3 w4"}])
    assert row["input_ids"] == [2, 3, 4, EOS] and row["completion_mask"] == [True] * 4
    (row,) = _set([{"text": "w2 w3 w4"}], append_eos=False)
    assert row["input_ids"] == [2, 3, 4]
    (row,) = _set([{"text": "w2 w3 </s>"}])
    assert row["input_ids"] == [2, 3, EOS]


def test_a_header_counts_only_if_it_is_not_masked():
    rows = [{"text": "w5 w6 w2 w3", "prefix": "w5 w6 "}, {"text": "w7 w8", "prefix": ""}]
    masked, plain = _set(rows)
    assert _counted(masked) == "w2 w3 </s>" and _counted(plain) == "w7 w8 </s>"
    whole = _set(rows, mask_prefix=False)
    assert _counted(whole[0]) == "w5 w6 w2 w3 </s>"


def test_only_completions_count():
    prompt, answer = [{"role": "user", "content": "w5 w6"}], {"role": "assistant", "content": "w7 w8"}
    (row,) = _set([{"prompt": "w2 w3", "completion": " w4"}])
    assert _counted(row) == "w4 </s>" and row["input_ids"] == [2, 3, 4, EOS]
    (row,) = _set([{"messages": [*prompt, answer]}])
    assert _counted(row) == "w7 w8 </s>"
    (pair,) = _set([{"prompt": prompt, "completion": [answer]}])
    assert pair == row
    assert prompt_and_completion({"messages": [*prompt, answer]}) == (prompt, [answer])


def test_tokenised_rows_pass_and_are_cut():
    (row,) = _set([{"input_ids": [4, 5, 6, 7], "completion_mask": [False, False, True, True]}], max_length=3)
    assert row["input_ids"] == [4, 5, 6] and row["completion_mask"] == [False, False, True]
    (row,) = _set([{"input_ids": [4, 5, 6, 7]}])
    assert row["completion_mask"] == [True] * 4


def test_rows_keep_their_order_and_their_subjects():
    rows = [{"text": f"w{2 + number} w3", "subject": f"s{number}", "other": 1} for number in range(5)]
    found = _set(rows)
    assert sorted(found.column_names) == ["completion_mask", "input_ids", "subject"]
    assert [row["input_ids"][0] for row in found] == [2, 3, 4, 5, 6] and found["subject"][3] == "s3"


BAD = {
    "not text": (
        [{"text": "w2 w3"}, {"text": " "}],
        {},
        r"row 1 \(counted from 0\) of unlearn_dataset: 'text' is ' '",
    ),
    "none": ([{"words": "w2"}], {}, "the columns words are no text: give 'text'"),
    "prefix elsewhere": ([{"text": "w2 w3", "prefix": "w4"}], {}, "does not begin with its prefix 'w4'"),
    "prefix is all": ([{"text": "w2 w3", "prefix": "w2 w3"}], {}, "its prefix covers the whole text"),
    "one token": ([{"text": "w2"}], {"append_eos": False}, "none of its 1 tokens counts"),
    "prompt too long": ([{"prompt": "w2 w3 w4", "completion": " w5"}], {"max_length": 3}, "or raise max_length"),
    "empty completion": ([{"prompt": "w2", "completion": ""}], {}, "and the completion not empty"),
    "mixed": (
        [{"prompt": "w2", "completion": [{"role": "assistant", "content": "w3"}]}],
        {},
        "both lists of messages",
    ),
    "user last": ([{"messages": [{"role": "user", "content": "w2"}]}], {}, "that the assistant ends"),
    "ids outside": ([{"input_ids": [4, 99]}], {"vocab_size": 48}, r"token id 99 is outside \[0, 48\)"),
    "mask too short": ([{"input_ids": [4, 5], "completion_mask": [True]}], {}, "has 1 entries for 2 tokens"),
}


@pytest.mark.parametrize(("rows", "options", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_refused(rows, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        _set(rows, **options)
    assert "\n" not in str(caught.value)


def test_text_needs_a_tokenizer_and_an_end_needs_a_token():
    rows = Dataset.from_list([{"text": "w2 w3"}])
    with pytest.raises(ValueError, match="unlearn_dataset is text and there is no tokenizer"):
        tokenize_set(rows, None, name="unlearn", max_length=8)
    endless = word_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="has no EOS token to end texts"):
        tokenize_set(rows, endless, name="unlearn", max_length=8)


def test_files_are_read_line_by_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "w2", "subject": "a"}\n\n{"text": "w3"}\n')
    assert read_rows(path).to_list() == [{"text": "w2", "subject": "a"}, {"text": "w3", "subject": None}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "line 2 is not valid JSON"),
        ('{"body": "w2"}', "line 2: the columns body are no text"),
        ('{"text": 5}', "line 2: 'text' is 5"),
        (
            '{"prompt": "w2", "completion": "w3"}',
            "line 2: rows of the forms prompt and text: put each form into its own",
        ),
        ('["w2"]', "line 2 is a JSON list"),
    ],
)
def test_the_first_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "w2"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows(path)
    with pytest.raises(ValueError, match="cannot read"):
        read_rows(tmp_path / "none.jsonl")


def test_forms_are_told_by_columns():
    forms = [("input_ids",), ("messages",), ("prompt", "completion"), ("text", "prefix")]
    assert [form_of(dict.fromkeys(columns)) for columns in forms] == ["input_ids", "messages", "prompt", "text"]
