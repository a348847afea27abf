"""A stored corpus comes back as it was, or not at all."""

import json

import pytest
from datasets import Dataset

from hf_moe_cpt.data.corpus_cache import load_corpus, save_corpus


def rows_of(text: str) -> Dataset:
    return Dataset.from_list([{"text": f"{text} ä", "path": "a.py"}] * 3)


CORPUS = {
    domain: {side: rows_of(f"{domain} {side}") for side in ("train", "held_out")} for domain in ("prose", "code")
}


def as_lists(corpus):
    return {domain: {side: rows.to_list() for side, rows in sides.items()} for domain, sides in corpus.items()}


def test_saved_corpus_comes_back(tmp_path):
    save_corpus(CORPUS, tmp_path, "key")
    loaded = load_corpus(tmp_path, "key")
    assert as_lists(loaded) == as_lists(CORPUS)
    assert list(loaded) == ["prose", "code"]
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_tokenised_copies_that_datasets_keeps_beside_the_text_do_no_harm(tmp_path):
    save_corpus(CORPUS, tmp_path, "key")
    load_corpus(tmp_path, "key")["code"]["train"].map(lambda row: {"length": len(row["text"])})
    assert len(list((tmp_path / "key/code").iterdir())) == 3
    assert as_lists(load_corpus(tmp_path, "key")) == as_lists(CORPUS)


def test_unknown_key_gives_nothing(tmp_path):
    assert load_corpus(tmp_path, "key") is None


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "manifest", "no manifest"])
def test_damaged_corpus_is_not_used_and_can_be_replaced(tmp_path, damage):
    save_corpus(CORPUS, tmp_path, "key")
    file, manifest = tmp_path / "key/code/train.arrow", tmp_path / "key/manifest.json"
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-10])
    elif damage == "flip":
        file.write_bytes(content.replace(b"code train", b"code trairn"[:10]))
    elif damage == "missing":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text(json.dumps([1]))
    else:
        manifest.unlink()
    assert load_corpus(tmp_path, "key") is None
    save_corpus(CORPUS, tmp_path, "key")
    assert as_lists(load_corpus(tmp_path, "key")) == as_lists(CORPUS)


def test_failed_saving_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_moe_cpt.data.corpus_cache._write_arrow", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_corpus(CORPUS, tmp_path, "key")
    assert list(tmp_path.iterdir()) == []
