"""A tokenizer trained on a few texts: nothing is lost, nothing is added, and it is the same on every run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_moe_cpt.data.tokenizer_training import train_byte_level_bpe


TEXTS = ["def area(width, height):\n    return width * height\n", "The area is the width times the height.\n"] * 20
SOME_VOCABULARY = 280


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_level_bpe(TEXTS, SOME_VOCABULARY, model_max_length=64, progress=False)


@given(st.text(max_size=60))
def test_every_text_comes_back(tokenizer, text: str):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_have_fixed_places_and_are_not_added(tokenizer):
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 1)
    assert tokenizer.convert_ids_to_tokens(tokenizer("area")["input_ids"]) == ["are", "a"]
    assert tokenizer("<|endoftext|>")["input_ids"] == [0]
    assert tokenizer.decode(tokenizer("area<|endoftext|>")["input_ids"], skip_special_tokens=True) == "area"


def test_words_numbers_and_indentation_are_cut_apart(tokenizer):
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("if x12345:\n        return it's")
    shown = [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece, _ in pieces]
    assert shown == ["if", " x", "123", "45", ":\n", "       ", " return", " it", "'s"]


def test_two_trainings_give_the_same_tokenizer(tokenizer):
    again = train_byte_level_bpe(iter(TEXTS), SOME_VOCABULARY, progress=False)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_vocabulary_is_as_large_as_asked_or_as_the_texts_allow(tokenizer):
    assert len(tokenizer) == SOME_VOCABULARY
    assert 258 < len(train_byte_level_bpe(TEXTS, 5000, progress=False)) < 5000


def test_saved_tokenizer_is_loaded_by_transformers(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "  The height,\n\n\twidth ² and 中文  \n"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.model_max_length, loaded.eos_token_id, loaded.pad_token_id) == (64, 0, 1)


@pytest.mark.parametrize(
    "texts, vocab_size, length, message",
    {
        "no room for bytes": (TEXTS, 257, 8, "vocab_size=257 has no room for 256 bytes and 2 special tokens"),
        "no text": (["", ""], 300, 8, "there is no text to train the tokenizer on"),
        "no length": (TEXTS, 300, 0, "model_max_length=0 must be at least 1 token"),
    }.values(),
)
def test_bad_arguments_are_refused(texts, vocab_size, length, message):
    with pytest.raises(ValueError, match=message):
        train_byte_level_bpe(texts, vocab_size, model_max_length=length, progress=False)
