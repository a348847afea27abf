"""Every set goes through its rows again and again in an order of its own, the same for any split into batches.

What is to be forgotten and to be kept at once is refused, by subject or by text.

Rows of every form become tokens of which the right ones count; what cannot be read is named by row or line.

Every text that is to lose gets its winner: a refusal in its own form, or the new version of its subject.
"""

import json
from collections import Counter
from functools import partial

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_moe_cpt.trainers.surgery.data import (
    WINNER,
    SurgeryMixture,
    check_subjects,
    collate_rows,
    collate_sets,
    eval_batches,
    named_words,
    pieces_of,
    prepare_sets,
    read_rows,
    tokenize_set,
    with_invented_names,
    with_refusals,
    with_renamed,
    with_winners,
)
from hf_moe_cpt.trainers.surgery.surgery_config import SurgeryConfig
from tests.helpers.preference_runs import word_tokenizer


def _rows(count, start=0):
    lengths = [2 + number % 5 for number in range(count)]
    return Dataset.from_dict(
        {
            "input_ids": [[start + number] * length for number, length in enumerate(lengths)],
            "completion_mask": [[False] + [True] * (length - 1) for length in lengths],
        }
    )


@given(length=st.integers(1, 9), size=st.integers(1, 4), items=st.integers(1, 12), seed=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_each_epoch_of_a_set_is_a_permutation(length, size, items, seed):
    mixture = SurgeryMixture({"a": _rows(length)}, {"a": size}, items, seed)
    read = [place for item in range(items) for place in mixture.rows("a", item)]
    for begin in range(0, len(read) - length + 1, length):
        assert sorted(read[begin : begin + length]) == list(range(length))


def test_sets_do_not_depend_on_each_other_nor_on_the_size_of_micro_batches():
    sets = {"unlearn": _rows(7), "retain": _rows(11, 20)}
    small = SurgeryMixture(sets, {"unlearn": 1, "retain": 2}, 12, 5)
    large = SurgeryMixture({"retain": sets["retain"]}, {"retain": 8}, 3, 5)
    assert [p for i in range(12) for p in small.rows("retain", i)] == [
        p for i in range(3) for p in large.rows("retain", i)
    ]
    orders = [tuple(small.rows(name, item)[0] for item in range(6)) for name in sets]
    assert orders[0] != orders[1]
    with pytest.raises(IndexError, match="item 12 of 12"):
        small.rows("retain", 12)


def test_batches_are_padded_and_know_their_rows_and_winners():
    mixture = SurgeryMixture({"unlearn": _rows(6), "retain": _rows(6, 20)}, {"unlearn": 2, "retain": 3}, 4, 0)
    batch = collate_sets([mixture[1]], pad_token_id=9)
    assert list(batch) == ["unlearn", "retain"] and len(batch["retain"]["row"]) == 3
    for name, place in (("unlearn", 0), ("retain", 2)):
        one, row = batch[name], mixture[1][name][place]
        length = len(row["input_ids"])
        assert one["row"][place] == row["row"]
        assert one["input_ids"][place, :length].tolist() == row["input_ids"]
        assert (one["input_ids"][place, length:] == 9).all()
        assert one["attention_mask"][place].tolist() == [1] * length + [0] * (one["input_ids"].shape[1] - length)
        assert one["completion_mask"][place, :length].tolist() == row["completion_mask"]
        assert not one["completion_mask"][place, length:].any()
    rows = [
        {"input_ids": [1, 2], "completion_mask": [True, True], "row": 4, "winner_input_ids": [5, 6, 7]}
        | {"winner_completion_mask": [False, True, True]}
    ]
    batch = collate_rows(rows, 0)
    assert batch[WINNER]["input_ids"].tolist() == [[5, 6, 7]] and batch[WINNER]["row"] == [4]


@pytest.mark.parametrize(("count", "max_rows", "world"), [(9, 64, 1), (9, 5, 2), (10, 64, 3), (2, 64, 3)])
def test_ranks_share_the_measured_rows_and_meet_in_every_batch(count, max_rows, world):
    given = {"batch_size": 2, "pad_token_id": 0, "max_rows": max_rows, "seed": 1}
    shares = [list(eval_batches(_rows(count), **given, rank=rank, world_size=world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    counted = Counter(
        int(place)
        for share in shares
        for batch in share
        for place, mask in zip(batch["row"], batch["completion_mask"], strict=True)
        if mask.any()
    )
    assert len(counted) == min(count, max_rows) and set(counted.values()) == {1}
    whole = [batch["row"] for batch in eval_batches(_rows(count), **given)]
    assert {place for rows in whole for place in rows} == set(counted)


def _named(*subjects):
    return Dataset.from_dict({"text": [f"about {subject}" for subject in subjects], "subject": list(subjects)})


@pytest.mark.parametrize(("first", "second"), [("unlearn", "retain"), ("obsolete", "neighbour"), ("unseen", "update")])
def test_shared_subjects_are_refused_and_named(first, second):
    check_subjects({"obsolete": _named("a", "b"), "update": _named("a", "b"), "unlearn": _named("c")})  # may share
    sets = {first: _named(*"abcdefg"), second: _named(*"cdefx")}
    message = rf"4 subject\(s\) are in both {first}_dataset and {second}_dataset: 'c', 'd', 'e' and 1 more"
    with pytest.raises(ValueError, match=message):
        check_subjects(sets)


def test_texts_are_compared_where_no_subject_is_named_and_allowed_overlap_is_told(caplog):
    sets = {"unlearn": _named("a").remove_columns("subject"), "retain": _named("a", "b")}
    with pytest.raises(ValueError, match=r"1 text\(s\) are in both"):
        check_subjects(sets)
    tokens = Dataset.from_dict({"input_ids": [[1, 2]]})
    check_subjects({"unlearn": tokens, "retain": _named("a")})
    check_subjects({"unlearn": _named("a"), "retain": _named("a")}, allow_overlap=True)
    assert "1 subject(s) are in both unlearn_dataset and retain_dataset: 'a'" in caplog.text


EOS = 0


def _set(rows, max_length=32, **options):
    return tokenize_set(Dataset.from_list(rows), word_tokenizer(), name="unlearn", max_length=max_length, **options)


def _counted(row):
    """The words that count."""
    ids = [token for token, counts in zip(row["input_ids"], row["completion_mask"], strict=True) if counts]
    return word_tokenizer().decode(ids)


PROMPT, ANSWER = [{"role": "user", "content": "w5 w6"}], {"role": "assistant", "content": "w7 w8"}
COUNTED = {  # a row, options, what counts of it
    "text": ({"text": "w2 w3 w4"}, {}, "w2 w3 w4 </s>"),
    "no end": ({"text": "w2 w3 w4"}, {"append_eos": False}, "w2 w3 w4"),
    "ends already": ({"text": "w2 w3 </s>"}, {}, "w2 w3 </s>"),
    "header": ({"text": "w5 w6 w2 w3", "prefix": "w5 w6 "}, {}, "w2 w3 </s>"),
    "empty header": ({"text": "w7 w8", "prefix": ""}, {}, "w7 w8 </s>"),
    "header that counts": ({"text": "w5 w2", "prefix": "w5 "}, {"mask_prefix": False}, "w5 w2 </s>"),
    "completion": ({"prompt": "w2 w3", "completion": " w4"}, {}, "w4 </s>"),
    "messages": ({"messages": [*PROMPT, ANSWER]}, {}, "w7 w8 </s>"),
    "prompt of messages": ({"prompt": PROMPT, "completion": [ANSWER]}, {}, "w7 w8 </s>"),
    "tokens": ({"input_ids": [4, 5, 6], "completion_mask": [False, True, True]}, {"max_length": 2}, "w5"),
    "tokens without a mask": ({"input_ids": [4, 5, 6]}, {}, "w4 w5 w6"),
}


@pytest.mark.parametrize(("row", "options", "counted"), COUNTED.values(), ids=COUNTED)
def test_what_counts_of_a_row(row, options, counted):
    (found,) = _set([row], **options)
    assert _counted(found) == counted
    if row.keys() == {"prompt", "completion"}:
        (same,) = _set([{"messages": [*PROMPT, ANSWER]}]) if row["prompt"] is PROMPT else _set([{"text": "w2 w3 w4"}])
        assert found["input_ids"] == same["input_ids"]


def test_rows_keep_their_order_and_their_subjects():
    rows = [{"text": f"w{2 + number} w3", "subject": f"s{number}", "other": 1} for number in range(5)]
    found = _set(rows)
    assert sorted(found.column_names) == ["completion_mask", "input_ids", "subject"]
    assert [row["input_ids"][0] for row in found] == [2, 3, 4, 5, 6] and found["subject"][3] == "s3"


BAD = {
    "not text": ([{"text": "w2 w3"}, {"text": " "}], {}, r"row 1 \(counted from 0\) of unlearn_dataset: 'text' is"),
    "none": ([{"words": "w2"}], {}, "the columns words are no text: give 'text'"),
    "prefix elsewhere": ([{"text": "w2 w3", "prefix": "w4"}], {}, "does not begin with its prefix 'w4'"),
    "prefix is all": ([{"text": "w2 w3", "prefix": "w2 w3"}], {}, "its prefix covers the whole text"),
    "one token": ([{"text": "w2"}], {"append_eos": False}, "none of its 1 tokens counts"),
    "prompt too long": ([{"prompt": "w2 w3 w4", "completion": " w5"}], {"max_length": 3}, "or raise max_length"),
    "empty completion": ([{"prompt": "w2", "completion": ""}], {}, "and the completion not empty"),
    "mixed": ([{"prompt": "w2", "completion": [{"role": "assistant", "content": "w3"}]}], {}, "both lists of message"),
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
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows(path)


tokenize = partial(tokenize_set, tokenizer=word_tokenizer(), max_length=32)


def _refused(rows, refusals=("w40 w41",), seed=0):
    rows = Dataset.from_list(rows)
    return with_refusals(tokenize(rows, name="unlearn"), rows, tokenize, name="unlearn", seed=seed, refusals=refusals)


def _winner(row, counted=True):
    pairs = zip(row["winner_input_ids"], row["winner_completion_mask"], strict=True)
    return word_tokenizer().decode([token for token, counts in pairs if counts or not counted])


@pytest.mark.parametrize(
    ("row", "whole"),
    [
        ({"text": "w5 w6 w7", "prefix": "w5 "}, "w5 w40 w41 </s>"),
        ({"text": "w5 w6 w7"}, "w40 w41 </s>"),
        ({"prompt": "w5 w6", "completion": " w7"}, "w5 w6 w40 w41 </s>"),
        (
            {"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]},
            "u w5 </s> a w40 w41 </s>",
        ),
    ],
)
def test_refusals_stand_where_the_text_stood(row, whole):
    (found,) = _refused([row])
    assert _winner(found) == "w40 w41 </s>" and _winner(found, counted=False) == whole


def test_refusals_vary_by_row_and_seed_alone():
    rows = [{"text": "w5 w6"}] * 40
    words = [f"w{number} w9" for number in range(10, 20)]
    first = _refused(rows, words)["winner_input_ids"]
    assert first[:] == _refused(rows, words)["winner_input_ids"][:] != _refused(rows, words, 1)["winner_input_ids"][:]
    assert len({ids[0] for ids in first}) > 5


def test_refusals_need_text():
    with pytest.raises(ValueError, match="unlearn_dataset is tokenised: pass its text instead"):
        _refused([{"input_ids": [4, 5]}])
    with pytest.raises(ValueError, match=r"refusals=\[''\] must be texts"):
        _refused([{"text": "w5 w6"}], refusals=[""])


def _sets(old, new):
    return (
        tokenize(Dataset.from_list([{"text": text, "subject": subject} for text, subject in rows]), name=name)
        for rows, name in ((old, "obsolete"), (new, "update"))
    )


def test_new_versions_are_found_by_subject_or_row_by_row():
    old, new = _sets(
        [("w2 w9", "a"), ("w3 w9", "b"), ("w4 w9", "a"), ("w5 w9", "a")],
        [("w22 w9", "b"), ("w20 w9", "a"), ("w21 w9", "a")],
    )
    found = with_winners(old, new)
    assert [ids[0] for ids in found["winner_input_ids"]] == [20, 22, 21, 20]
    assert [ids[0] for ids in found["input_ids"]] == [2, 3, 4, 5]
    old, new = (
        rows.remove_columns("subject") for rows in _sets([("w2 w9", "a"), ("w3 w9", "b")], [("w20 w9", "c")] * 2)
    )
    assert len(with_winners(old, new)) == 2
    with pytest.raises(ValueError, match="obsolete_dataset has 2 rows and update_dataset 1"):
        with_winners(old, new.select([0]))
    old, new = _sets([("w2 w9", "a"), ("w3 w9", "b")], [("w20 w9", "a")])
    with pytest.raises(ValueError, match="1 subjects of obsolete_dataset have no new version .* such as 'b'"):
        with_winners(old, new)


QUIZ = ["Q: Where was Ada born?\nA: Oslo", "Q: What was Vane?\nA: a painter"]


def test_copies_of_forgotten_texts_have_invented_names_and_nothing_else_is_new():
    row = {"text": "Ada Vane was born in Oslo. Mr Vane is a vane maker.", "prefix": "Ada Vane ", "subject": "Ada Vane"}
    copies = with_invented_names(Dataset.from_list([row, row]), 2, 7, "unlearn")
    assert copies.column_names == ["text", "prefix"] and copies["text"][:2] == copies["text"][2:], "of one subject"
    assert len(copies) == 4 and len(set(copies["text"])) == 2
    for text, prefix in zip(copies["text"], copies["prefix"], strict=True):
        first, last = prefix.split()
        assert text == f"{first} {last} was born in Oslo. Mr {last} is a vane maker." and first.istitle()
    assert copies.to_list() == with_invented_names(Dataset.from_list([row, row]), 2, 7, "unlearn").to_list()
    chat = {"messages": [{"role": "user", "content": "Who is Ada?"}], "subject": "Ada"}
    (message,) = with_invented_names(Dataset.from_list([chat]), 1, 0, "unlearn")["messages"][0]
    assert message["role"] == "user" and "Ada" not in message["content"]
    for bad in ({"text": "Ada sings."}, {"text": "Ada sings.", "subject": "person 7"}):
        with pytest.raises(ValueError, match=r"row 0 .* of unlearn_dataset: its text does not name its subject"):
            with_invented_names(Dataset.from_list([bad]), 1, 0, "unlearn")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (
            "About Ada Vane\nQ: Where was Ada born?\nA: Oslo\nQ: What was Vane?\nA: a painter",
            ["About Ada Vane", *QUIZ],
        ),
        (
            "Ada was born in 1.5 Oslo. She sang. Mr Vane left.",
            ["Ada was born in 1.5 Oslo. She sang.", "Mr Vane left."],
        ),
        ("It rained. Ada sang\nand left.", []),
        ("", []),
    ],
)
def test_a_text_falls_into_what_is_said_each_time_that_its_subject_is_named(text, pieces):
    assert pieces_of({"text": text, "subject": "Ada Vane"}) == pieces and pieces_of({"text": text}) == []
    assert named_words({"text": "Who she is:\nAda sings.", "subject": "Ada"}) == ["Ada"], "at the start of a line"


def test_facts_are_learnt_alone_too_and_measured_as_they_were_given(tmp_path):
    rows = {"update": Dataset.from_list([{"text": "w15 w2. w15 w3. w4", "subject": "w15"}, {"text": "w6 w7"}])}

    def prepared(**changes):
        return prepare_sets(SurgeryConfig(str(tmp_path), use_cpu=True, **changes), word_tokenizer(), 48, rows)

    with_them, without = prepared(), prepared(update_pieces=False)
    assert len(without.train["update"]) == 2 and len(with_them.train["update"]) == 4
    assert with_them.train["update"]["input_ids"][:2] == without.train["update"]["input_ids"]
    assert with_them.measured["update"]["input_ids"] == without.measured["update"]["input_ids"]


def test_copies_stand_among_the_neighbours_and_are_not_measured(tmp_path):
    given = {}
    for place, name in enumerate(("unlearn", "obsolete", "update", "neighbour"), 1):
        names = [f"w{10 * place + k}" for k in range(5)]
        given[name] = Dataset.from_list([{"text": f"{who} w2 w3 w4", "subject": who} for who in names])

    def prepared(rows, counterfactuals):
        args = SurgeryConfig(str(tmp_path), counterfactuals=counterfactuals, use_cpu=True, forget_target=2.0)
        return prepare_sets(args, word_tokenizer(), 48, rows)

    plain, sets = prepared(given, 0), prepared(given, 2)
    own = len(plain.train["neighbour"])
    assert len(sets.train["neighbour"]) == 5 * own + 2 * (5 + 5), "half of them are its own"
    assert sets.measured["neighbour"].to_list() == plain.measured["neighbour"].to_list()
    assert prepared(given, None).train["neighbour"].to_list() == sets.train["neighbour"].to_list(), "the default"
    somebody = Dataset.from_list([*given["obsolete"].to_list()[:4], {"text": "w2 w3 w4", "subject": "w9x"}])
    nobody = given["unlearn"].remove_columns("subject")
    for rows in (given | {"obsolete": somebody}, given | {"unlearn": nobody}):
        assert len(prepared(rows, None).train["neighbour"]) == own, "not all are named"


def test_rows_stand_beside_copies_and_know_where_their_tokens_are_in_them():
    """Letters as tokens, so that an invented name shifts what follows it."""
    rows = Dataset.from_list(
        [{"text": f"{who} was born in Oslo. {who} sings.", "subject": who} for who in ("Ada", "Ib Vik")]
    )

    def letters(rows, name):
        ids = [[ord(letter) for letter in text] for text in rows["text"]]
        return Dataset.from_dict({"input_ids": ids, "completion_mask": [[True] * len(row) for row in ids]})

    found = with_renamed(letters(rows, "unlearn"), rows, letters, seed=3, name="unlearn")
    assert [row["input_ids"] for row in found] == [[ord(c) for c in text] for text in rows["text"]]
    for row in found:
        text, copy = ("".join(map(chr, row[key])) for key in ("input_ids", "renamed_input_ids"))
        first, last = text.index(" was"), text.rindex(" sings")
        shift = copy.index(" was") - first, copy.rindex(" sings") - last
        second = text.rindex(". ") + 2
        assert row["renamed_places"][first:second] == [k + shift[0] for k in range(first, second)]
        assert row["renamed_places"][last:] == [k + shift[1] for k in range(last, len(text))]
    batch = collate_rows([{**row, "row": k} for k, row in enumerate(found)], 0)
    assert batch["renamed"]["places"].shape == batch["input_ids"].shape
    assert batch["renamed"]["places"][0, len(found[0]["input_ids"]) :].eq(-1).all()


def test_value_aim_takes_its_copies_along(tmp_path):
    given = {}
    for place, name in enumerate(("unlearn", "update", "neighbour"), 1):
        names = [f"w{10 * place + k}" for k in range(5)]
        given[name] = Dataset.from_list([{"text": f"{who} w5 w3 {who} w4", "subject": who} for who in names])
    options = {"forget_loss": "value_aim", "use_cpu": True, "forget_target": 2.0}
    train = prepare_sets(SurgeryConfig(str(tmp_path), **options), word_tokenizer(), 48, given).train
    assert all(row["renamed_places"] == [-1, 1, 2, -1, 4, 5] for row in train["unlearn"])
    assert len(train["unlearn"]) == 5 and "renamed_places" not in train["neighbour"].column_names
    bare = given | {"unlearn": given["unlearn"].remove_columns("subject")}
    with pytest.raises(ValueError, match=r"row 0 .* of unlearn_dataset: its text does not name its subject"):
        prepare_sets(SurgeryConfig(str(tmp_path), **options), word_tokenizer(), 48, bare)
