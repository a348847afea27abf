"""Named sources from the command line or a file to a mixture: weights, caps, copies, held-out text, new tokens."""

import json
from fractions import Fraction
from types import SimpleNamespace

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_moe_cpt.data.text import tokenize_documents
from hf_moe_cpt.trainers.cpt.cpt_data import (
    DataArguments,
    Source,
    build_train_dataset,
    describe_mixture,
    extend_vocabulary,
    load_data,
    mixture_law,
    warn_of_epochs,
)
from tests.helpers.cpt_runs import config
from tests.helpers.tiny_models import tiny_model, tokenized


def test_a_source_is_written_in_a_word_or_as_a_mapping():
    assert Source.of("de=texts/de:0.4") == Source("de", "texts/de", weight=0.4)
    assert Source.of("en=a:b/c.txt:2:replay") == Source("en", "a:b/c.txt", weight=2.0, role="replay")
    assert Source.of("en=held.txt:held_out") == Source("en", "held.txt", role="held_out")
    given = {"name": "x", "path": ["a", "b"], "weight": 1, "config": "c", "max_epochs": 4, "column": "content"}
    assert Source.of(given) == Source.of(json.dumps(given)) == Source(**given)


@pytest.mark.parametrize(
    "given, message",
    [
        ("texts/de", "write NAME=PATH:WEIGHT"),
        ("de=texts", "'de': text to train on needs a weight"),
        ("de=texts:0.3:held_out", "'de': text to train on needs a weight, held-out text has none"),
        ({"name": "de", "weight": 1}, "a source needs name and path"),
        ({"name": 5, "path": "x", "weight": 1}, "name=5 is no str"),
        ({"name": "de", "path": [1], "weight": 1}, "path=.1. is no str or list"),
        ({"name": "de", "path": "x", "weight": 1, "split": 5}, "split=5 is no str"),
        ('{"name": "de", "path": "x", "weight": 1, "weight": 2}', "the key 'weight' is given twice"),
        ("../de=texts:1", "'../de': a name is a word without slashes"),
        ("=texts:1", "'': a name is a word"),
        ('{"name": [' + "[" * 100_000, "^--sources '.*' cannot be used .RecursionError"),
        ({"name": "de", "path": "x", "wieght": 1}, "a source needs name and path, and may have config"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_in_a_line(given, message):
    with pytest.raises(ValueError, match=message):
        Source.of(given)


@pytest.mark.parametrize(
    "mixture, message",
    [
        ({"a": -1}, "source 'a': weight=-1 is no weight"),
        ({"a": {"weight": 1, "role": "old"}}, "role='old' is unknown: choose new or replay"),
        ({"a": {"role": "new"}}, "source 'a': give weight"),
        ({"a": {"weight": 1, "max_epochs": 0}}, "max_epochs=0 is no number > 0"),
        ({"a": {"weight": 1, "end_weight": 2}}, "weight_schedule='constant' and end_weight of a: set both"),
        ({}, "must name its sources"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused(tmp_path, mixture, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, replay_ratio=0.0, mixture=mixture)


def write_lines(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def five(tmp_path):
    """Five sources as a file has them: two columns, a list of paths, held-out text, roles."""
    texts = {name: [f"{name} text {i}" for i in range(30)] for name in ("de", "code", "law", "en", "old_code")}
    sources = [
        {"name": "de", "path": write_lines(tmp_path / "de.jsonl", texts["de"] + texts["de"][:4]), "weight": 0.4},
        {"name": "code", "path": write_lines(tmp_path / "c.jsonl", texts["code"], "content"), "weight": 0.2,
         "column": "content", "max_epochs": 2},
        {"name": "law", "path": [write_lines(tmp_path / "law.jsonl", texts["law"])], "weight": 0.1},
        {"name": "en", "path": write_lines(tmp_path / "en.jsonl", texts["en"]), "weight": 0.2, "role": "replay"},
        {"name": "old_code", "path": write_lines(tmp_path / "o.jsonl", texts["old_code"] + texts["en"][25:]),
         "weight": 0.1, "role": "replay"},
        {"name": "en", "path": write_lines(tmp_path / "h.jsonl", texts["en"][25:]), "role": "held_out"},
    ]  # fmt: skip
    return sources


def test_five_sources_are_loaded_and_held_out_text_is_kept_apart_from_its_copies(tmp_path, five, caplog):
    """Of 50 held-out documents 50 were also trained on: copies of a document were on both sides."""
    args = config(tmp_path / "run", replay_ratio=0.0)
    data = load_data(DataArguments(sources=five, held_out_fraction=0.5), args)
    train, held_out = data["train_dataset"], data["eval_dataset"]
    assert list(train) == ["de", "code", "law", "en", "old_code"] and set(held_out) == set(train)
    unseen = {text for rows in held_out.values() for text in rows["text"]}
    for rows in train.values():
        assert not unseen & set(rows["text"])
    assert len(train["en"]) == 25 and all(rows.column_names == ["text"] for rows in train.values())
    assert args.sources()["old_code"].role == "replay" and args.sources()["code"].max_epochs == 2
    kept = load_data(DataArguments(sources=five, held_out_fraction=0.5, keep_overlap=True), args)["train_dataset"]
    assert len(kept["en"]) == 30
    told = " ".join(caplog.messages)
    assert "en: 5 documents are held out too and are not trained on." in told
    assert "documents are copies of others in it" in told


def test_streams_are_kept_apart_too(five, tmp_path):
    args = config(tmp_path / "run", replay_ratio=0.0)
    capless = [{key: value for key, value in source.items() if key != "max_epochs"} for source in five]
    data = load_data(DataArguments(sources=capless, streaming=True), args)
    assert len(list(data["train_dataset"]["en"])) == 25 and len(data["eval_dataset"]["en"]) == 5


def test_all_text_held_out_is_refused(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["a", "b"])
    with pytest.raises(ValueError, match="new: all of its 2 documents are held out too"):
        load_data(DataArguments([path], eval_dataset_name=[path]), config(tmp_path / "run"))


def test_one_of_the_two_ways_to_name_text_is_taken():
    with pytest.raises(ValueError, match="--dataset_name is missing: name new text, or several"):
        DataArguments()
    with pytest.raises(ValueError, match="both name text"):
        DataArguments(["a"], sources=["a=b:1"])


def test_a_cap_on_epochs_lowers_a_weight_and_the_others_keep_their_proportions(tmp_path):
    """Against the shares in fractions: 10 blocks, read twice, are 20 of 120; 100 are left for 3 : 1."""
    mixture = {"a": {"weight": 0.6, "max_epochs": 2}, "b": 0.3, "c": 0.1}
    args = config(tmp_path, replay_ratio=0.0, mixture=mixture, max_steps=60)
    lengths = dict.fromkeys("abc", Fraction(10))
    law = mixture_law(args, "scratch", lengths)
    assert [law.count(name) for name in "abc"] == [20, 75, 25]
    with pytest.raises(ValueError, match="max_epochs of a: a stream does not say how long it is"):
        mixture_law(args, "scratch", None)
    everything = {name: {"weight": 1, "max_epochs": 1} for name in "abc"}
    with pytest.raises(ValueError, match="max_epochs leaves 30 of the 120 blocks"):
        mixture_law(config(tmp_path, replay_ratio=0.0, mixture=everything, max_steps=60), "scratch", lengths)


@pytest.mark.parametrize("schedule", ["linear", "anneal"])
def test_weights_change_over_the_run_as_asked(tmp_path, schedule):
    mixture = {"web": {"weight": 1, "end_weight": 0}, "math": {"weight": 0, "end_weight": 1}}
    fractions = {"warmup_fraction": 0.0, "cooldown_fraction": 0.0, "constant_fraction": 0.8, "anneal_fraction": 0.2}
    args = config(tmp_path, replay_ratio=0.0, mixture=mixture, max_steps=100, weight_schedule=schedule, **fractions)
    law = mixture_law(args, "constant", None)
    math = [law.composition(batch)[1] for batch in range(100)]
    if schedule == "anneal":
        assert math == [0] * 80 + [2] * 20
    else:
        assert sum(math) == 100 and sum(math[:50]) == pytest.approx(2 * sum(b / 99 for b in range(50)), abs=1)


def test_what_a_run_reads_is_told_before_it_begins(tmp_path, caplog):
    """160 epochs of replay went by without a message."""
    args = config(tmp_path, replay_ratio=0.5, max_steps=40)
    mixture = build_train_dataset(
        args, None, 48, {"new": tokenized(120, 1, 1, 24), "replay": tokenized(3, 2, 24, 48)}, "scratch"
    )
    warn_of_epochs(mixture)
    times = mixture.summary()["replay_epochs"]
    assert times > 4 and f"replay {times:.1f} times" in caplog.text and "new" not in caplog.messages[0].split(": ")[1]
    table = describe_mixture(SimpleNamespace(mixture=mixture, args=args))
    assert f"{times:.2f}" in table and "50.00 %" in table and len(table.splitlines()) == 3


def word_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_begin_as_the_mean_of_their_old_pieces(tied):
    """Against the means in float64, and the logits of old tokens, which stay."""
    model = tiny_model("llama", tie_word_embeddings=tied, vocab_size=8)
    old = word_tokenizer("<unk>", "<eos>", "a", "b", "c", "d", "e", "f")
    new = word_tokenizer("<unk>", "<eos>", "a", "b", "c", "d", "e", "f")
    new.add_tokens(["b c", "zzz"])
    ids = torch.tensor([[2, 3, 4, 7]])
    logits = model(ids).logits
    tables = [part.weight.detach().double() for part in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert extend_vocabulary(model, new, old) == 2
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    assert (parts[0].weight is parts[1].weight) == tied and model.config.vocab_size == 64
    for part, table in zip(parts, tables, strict=True):
        torch.testing.assert_close(part.weight[8].double(), (table[3] + table[4]) / 2, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(part.weight[9].double(), table[0], rtol=1e-6, atol=1e-7)  # <unk> is its piece
        torch.testing.assert_close(part.weight[10].double(), table.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(ids).logits[..., :8], logits)
    rows = datasets.Dataset.from_dict({"text": ["a b c zzz"]})
    assert tokenize_documents(rows, new, vocab_size=64)["input_ids"][:] == [[2, 8, 9, 1]]
    padded = tiny_model("llama", vocab_size=64)
    before = padded.get_input_embeddings().weight.clone()
    assert extend_vocabulary(padded, old, old) == 0 and torch.equal(padded.get_input_embeddings().weight, before)
    with pytest.raises(ValueError, match="gives 2 tokens of the model another id"):
        extend_vocabulary(model, word_tokenizer("<unk>", "<eos>", "b", "a", "c", "d", "e", "f"), old)
