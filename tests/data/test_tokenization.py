"""Documents become ids plus one EOS; caches are found again; every bad row is named."""

import subprocess
import sys

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_moe_cpt.data.tokenization import tokenize_documents


EOS = 2
WORDS = {"<unk>": 0, "<bos>": 1, "<eos>": 2, "a": 3, "b": 4, "c": 5}


def make_tokenizer(**options) -> PreTrainedTokenizerFast:
    """A word tokenizer that would add <bos> of its own accord and believes in a context of 4 tokens."""
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    options = {"eos_token": "<eos>", "model_max_length": 4, **options}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", **options)


def make_texts(*texts, column: str = "text") -> datasets.Dataset:
    return datasets.Dataset.from_dict({"id": list(range(len(texts))), column: list(texts)})


def make_ids(*documents) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": ["unused"] * len(documents), "input_ids": list(documents)})


@pytest.mark.parametrize("is_stream", [False, True])
def test_documents_end_in_eos_and_empty_ones_go(is_stream):
    texts = make_texts("a b", "", "   ", "c", "a <eos>")
    source = texts.to_iterable_dataset() if is_stream else texts
    got = tokenize_documents(source, make_tokenizer())
    assert list(got) == [{"input_ids": ids} for ids in ([3, 4, EOS], [5, EOS], [3, EOS])]
    assert got.features == datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})


@pytest.mark.parametrize("is_stream", [False, True])
def test_ids_pass_through(is_stream):
    ids = make_ids([3, 4], [5, EOS], [], [EOS], [3])
    got = tokenize_documents(ids.to_iterable_dataset() if is_stream else ids, make_tokenizer(), vocab_size=6)
    assert [row["input_ids"] for row in got] == [[3, 4, EOS], [5, EOS], [3, EOS]]


def test_without_eos_nothing_is_appended():
    assert tokenize_documents(make_ids([3, 4], []), None, add_eos=False)["input_ids"][:] == [[3, 4]]
    assert tokenize_documents(make_texts("a b"), make_tokenizer(), add_eos=False)["input_ids"][:] == [[3, 4]]


def test_processes_give_the_same_rows_in_the_same_order():
    texts = make_texts(*["a b c"[: 1 + 2 * (i % 3)] for i in range(40)], column="body")
    one, two = (tokenize_documents(texts, make_tokenizer(), "body", num_proc=n)["input_ids"][:] for n in (None, 2))
    assert one == two and len(one) == 40


def test_long_documents_do_not_warn(caplog, capsys):
    tokenize_documents(make_texts("a " * 50), make_tokenizer())
    assert "longer than" not in caplog.text + capsys.readouterr().err


def test_streams_are_lazy_and_may_hide_their_columns():
    def rows():
        yield {"text": "a"}
        yield {"text": 5}

    stream = tokenize_documents(datasets.IterableDataset.from_generator(rows), make_tokenizer())
    with pytest.raises(ValueError, match="row 1 .* is 5, a int and not a string"):
        list(stream)


def test_the_cache_is_found_by_another_process(tmp_path):
    """The fingerprint must not depend on object identity, on the process, or on whether the tokenizer was used."""
    make_texts("a b", "c").save_to_disk(tmp_path / "texts")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    code = (
        "import sys, datasets; from transformers import AutoTokenizer\n"
        "from hf_moe_cpt.data.tokenization import tokenize_documents\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])\n"
        "print(tokenize_documents(datasets.load_from_disk(sys.argv[1]), tokenizer).cache_files[0]['filename'])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "texts"), str(tmp_path / "tokenizer")]
    files = {subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for _ in range(2):
        done = tokenize_documents(datasets.load_from_disk(str(tmp_path / "texts")), tokenizer)
        files.add(done.cache_files[0]["filename"])
    assert len(files) == 1


@pytest.mark.parametrize(
    "dataset, options, message",
    [
        (
            make_texts("a", column="body"),
            {},
            r"neither 'text' nor 'input_ids' but \['id', 'body'\]: name its text column",
        ),
        (make_texts("a", None), {}, "row 1 .* of column 'text' is None, a NoneType and not a string"),
        (make_texts("a"), {"vocab_size": 3}, r"token id 3 in row 0 .* outside \[0, 3\): tokenizer and model disagree"),
        (make_ids([3], [4, 7, 8]), {"vocab_size": 6}, r"token id 7 in row 1 .* outside \[0, 6\)"),
        (make_ids([3], [-1]), {}, r"token id -1 in row 1 .* outside \[0, 2147483648\)"),
        (make_ids([1]), {"vocab_size": 2}, r"EOS is id 2, outside \[0, 2\)"),
        (make_ids([3.5]), {}, r"row 0 .* is \[3.5\], not a list of integers"),
        (make_ids("3 4"), {}, "row 0 .* is '3 4', not a list of integers"),
        (make_ids([3], None), {}, "row 1 .* is None, not a list of integers"),
        (make_ids([3, None]), {}, "rows 0 to 0 of input_ids hold something that is no integer"),
    ],
)
def test_bad_rows_are_named(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        tokenize_documents(dataset, make_tokenizer(), **options)


def test_bad_rows_are_named_from_a_worker_process():
    texts = make_texts(*["a"] * 30, None)
    with pytest.raises(ValueError, match="row 30 "):
        tokenize_documents(texts, make_tokenizer(), num_proc=2)


def test_tokenizers_that_cannot_serve():
    with pytest.raises(ValueError, match="PreTrainedTokenizerFast|TokenizersBackend") as refused:
        tokenize_documents(make_texts("a"), make_tokenizer(eos_token=None))
    assert "has no EOS token to end documents: set tokenizer.eos_token" in str(refused.value)
    for dataset, add_eos in ((make_texts("a"), False), (make_ids([3]), True)):
        with pytest.raises(ValueError, match="tokenizer is None"):
            tokenize_documents(dataset, None, add_eos=add_eos)


def test_an_empty_stream_without_declared_columns():
    empty = datasets.IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(ValueError, match="streamed dataset is empty"):
        tokenize_documents(empty, make_tokenizer())
