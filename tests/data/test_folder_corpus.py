"""A user's own two folders of text."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_moe_cpt.data.folder_corpus import cut_to_pieces, load_folder_corpus


def text_of(seed: int, characters: int = 30_000) -> str:
    rng = random.Random(seed)
    lines = (" ".join("".join(rng.choices("abcdefgh", k=5)) for _ in range(10)) for _ in range(characters // 60 + 1))
    return "\n".join(lines)


def write(root, folder: str, *texts: str) -> None:
    (root / folder).mkdir(parents=True)
    for number, text in enumerate(texts):
        (root / folder / f"{number}.txt").write_text(text)


def test_two_folders_become_two_domains_in_the_order_of_their_names(tmp_path):
    write(tmp_path, "2-code", *(text_of(seed, 9_000) for seed in range(10)))
    (tmp_path / "1-wiki").mkdir()
    rows = [json.dumps({"text": text_of(seed, 9_000)}) for seed in range(20, 30)]
    (tmp_path / "1-wiki/wiki.jsonl").write_text("\n".join(rows) + "\n")
    corpus = load_folder_corpus(tmp_path, held_out_fraction=0.2)
    assert list(corpus) == ["1-wiki", "2-code"]
    for sides in corpus.values():
        assert (len(sides["train"]), len(sides["held_out"])) == (8, 2)
        assert not set(sides["train"]["text"]) & set(sides["held_out"]["text"])


def test_old_comes_before_new(tmp_path):
    write(tmp_path, "new", text_of(1))
    write(tmp_path, "old", text_of(2))
    assert list(load_folder_corpus(tmp_path, held_out_fraction=0.3)) == ["old", "new"]


def test_split_does_not_depend_on_file_names(tmp_path):
    texts = [text_of(seed, 5_000) for seed in range(10)]
    sides = []
    for root, order in ((tmp_path / "a", texts), (tmp_path / "b", texts[::-1])):
        write(root, "1", *order)
        write(root, "2", text_of(77))
        sides.append(set(load_folder_corpus(root, held_out_fraction=0.3)["1"]["held_out"]["text"]))
    assert sides[0] == sides[1]


def test_copies_count_once(tmp_path):
    texts = [text_of(seed, 5_000) for seed in range(10)]
    write(tmp_path, "1", *texts, *(text + "\nend" for text in texts))
    write(tmp_path, "2", text_of(77))
    corpus = load_folder_corpus(tmp_path, held_out_fraction=0.3)["1"]
    assert len(corpus["train"]) + len(corpus["held_out"]) <= 10


@given(st.text(alphabet="ab\n", max_size=80), st.integers(1, 20))
def test_pieces_are_short_and_lose_nothing(text: str, longest: int):
    pieces = cut_to_pieces(text, longest)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= longest


@pytest.mark.parametrize(
    "folders, message",
    {
        "none": ((), r"has 0 subfolders .*the older first by name"),
        "three": (("a", "b", "c"), r"has 3 subfolders \(a, b, c\)"),
    }.values(),
)
def test_other_than_two_folders_are_refused(tmp_path, folders, message):
    for folder in folders:
        (tmp_path / folder).mkdir()
    with pytest.raises(ValueError, match=message):
        load_folder_corpus(tmp_path)


def test_missing_and_small_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is no folder: give a folder with two subfolders"):
        load_folder_corpus(tmp_path / "absent")
    with pytest.raises(ValueError, match="held_out_fraction=0.0 must lie between 0 and 1"):
        load_folder_corpus(tmp_path, held_out_fraction=0.0)
    write(tmp_path, "1", "too short")
    write(tmp_path, "2", text_of(2))
    with pytest.raises(ValueError, match="holds 9 characters of text and a domain needs 20000: add files"):
        load_folder_corpus(tmp_path)


def test_folders_of_tokens_or_of_copies_are_refused(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1/tokens.jsonl").write_text('{"input_ids": [1, 2, 3]}\n')
    write(tmp_path, "2", text_of(2))
    with pytest.raises(ValueError, match="holds tokens and not text"):
        load_folder_corpus(tmp_path)
    write(tmp_path / "other", "1", text_of(1, 9_900), text_of(1, 9_900), text_of(1, 9_900))
    write(tmp_path / "other", "2", text_of(2))
    with pytest.raises(ValueError, match="leaves no text for train once copies are dropped"):
        load_folder_corpus(tmp_path / "other")
