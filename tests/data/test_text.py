"""Every form in which users keep text is opened and tokenised; what cannot be is explained in one line.

Damage is found where it is, and nothing sound is called damaged. Documents become ids plus one EOS; caches are found
again by another process; every bad row is named.
"""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_moe_cpt.data.text import check_file, check_utf8, find_damage, load_text_dataset, tokenize_documents


@pytest.mark.parametrize("offset", [0, 7, 2**20 - 1, 2**20, 2**20 + 5])
def test_first_byte_that_is_not_utf8(tmp_path, offset):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * offset + b"\xff" + b"y" * 10)
    with pytest.raises(ValueError, match=rf"a.txt is not UTF-8 text \(byte {offset}\)"):
        check_utf8(path)


def test_characters_across_read_borders_are_sound_and_one_cut_off_at_the_end_is_not(tmp_path):
    for shift in range(4):
        (tmp_path / "a.txt").write_bytes(b"x" * (2**20 - shift) + "€𝄞".encode())
        check_utf8(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes("ab€".encode()[:-1])
    with pytest.raises(ValueError, match=r"not UTF-8 text \(byte 2\)"):
        check_file(tmp_path / "a.txt", "text", "text")


def test_sound_json(tmp_path):
    lines = (b'{"text": "a"}\n\n{"text": "b"}', b'\xef\xbb\xbf{"text": "a"}\r\n')
    path = tmp_path / "a.json"
    for content in (*lines, b' \n[{"text": "a"},\n{"text": "b"}]', b'{\n"text": "a"}'):
        path.write_bytes(content)
        check_file(path, "json", "text")
        find_damage(path, "json")


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"text": "a"}\n{"text": b}\n', r"line 2 is not valid JSON \(.* at column 10\)"),
        (b'{"text": "a"}\n"b"\n', "line 2 is a JSON str, not an object"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not UTF-8 text"),
        (b'[{"text": "a"},\n{"text": "b"\n', "line 3 is not valid JSON"),
        (b'[{"text": "a"},\n{"text": "\xff"}]', r"not UTF-8 text \(byte 26\)"),
        (b"", "a.jsonl is empty"),
        (b"\n \n", "only blank lines"),
        (b"nonsense", "line 1 is not valid JSON"),
        (b'{"body": "a"}', r"neither 'text' nor 'input_ids' but \['body'\]: name its text column"),
    ],
)
def test_damaged_json(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check_file(path, "json", "text")
        find_damage(path, "json")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables(tmp_path, kind):
    path, table = tmp_path / f"a.{kind}", pa.table({"body": ["a", "b"] * 500})
    if kind == "parquet":
        pq.write_table(table, path, compression="none", use_dictionary=False)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    check_file(path, kind, "body")
    find_damage(path, kind)
    with pytest.raises(ValueError, match=r"neither 'text' nor 'input_ids' but \['body'\]"):
        check_file(path, kind, "text")
    path.write_bytes(b"nonsense" * 9)
    with pytest.raises(ValueError, match=f"a.{kind} is no readable {kind} file"):
        check_file(path, kind, "body")


def test_a_file_damaged_inside_or_gone(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(5000)]}), path)
    content = bytearray(path.read_bytes())
    content[4:2000] = b"\x00" * 1996
    path.write_bytes(content)
    check_file(path, "parquet", "text")
    with pytest.raises(ValueError, match="a.parquet is a damaged parquet file"):
        find_damage(path, "parquet")
    with pytest.raises(ValueError, match="cannot read .*: No such file or directory; check its permissions"):
        check_file(tmp_path / "gone.txt", "text", "text")


TEXTS = ["first\nline two", "second", "drittes – ü"]


def write(path: Path, texts: list[str] = TEXTS, column: str = "text") -> Path:
    """A file of the kind that its name says, with the texts and a number beside them; .txt takes the first text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{column: text, "number": i} for i, text in enumerate(texts)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text(texts[0], encoding="utf-8")
    return path


def read(*arguments, **options) -> list[str]:
    dataset = load_text_dataset(*arguments, **options)
    assert isinstance(dataset, datasets.IterableDataset if options.get("streaming") else datasets.Dataset)
    (column,) = next(iter(dataset))
    return [row[column] for row in dataset]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.arrow", "note.txt", "note.md", "NOTE.TXT"])
def test_files_of_rows_and_texts_that_are_one_document(tmp_path, name, streaming):
    path = write(tmp_path / name, column="body")
    assert read(str(path), streaming=streaming, text_column="body") == TEXTS[: 3 if name.startswith("a") else 1]
    assert load_text_dataset(path, text_column="body").column_names[0] == "body"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_is_read_recursively_and_kinds_mix(tmp_path, streaming):
    for name in ("a.jsonl", "deep/er/b.parquet", "c.txt", "d.md", ".hidden/e.txt", "picture.png"):
        write(tmp_path / name, [f"text of {name}"])
    want = sorted(f"text of {name}" for name in ("a.jsonl", "deep/er/b.parquet", "c.txt", "d.md"))
    assert sorted(read(tmp_path, streaming=streaming)) == want


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_dataset(tmp_path, streaming):
    rows = datasets.Dataset.from_dict({"text": TEXTS, "number": [1, 2, 3]})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "two")
    assert read(tmp_path / "one", streaming=streaming) == TEXTS
    assert read(tmp_path / "two", streaming=streaming, split="test") == TEXTS[1:2]
    with pytest.raises(ValueError, match=r"two has the splits \['train', 'test'\], not 'dev'"):
        load_text_dataset(tmp_path / "two", split="dev")


def test_several_paths_become_one(tmp_path):
    paths = [write(tmp_path / "a.jsonl"), str(write(tmp_path / "b.txt", ["b"]))]
    assert sorted(read([*paths, write(tmp_path / "f/c.jsonl", ["c"]).parent])) == sorted([*TEXTS, "b", "c"])


def test_tokenised_data_is_recognised(tmp_path):
    path = tmp_path / "ids.jsonl"
    path.write_text('{"text": "a", "input_ids": [1, 2]}\n{"text": "b", "input_ids": [3]}\n')
    assert read(path) == [[1, 2], [3]]
    with pytest.raises(ValueError, match=r"holds both text \('text'\) and tokenised data"):
        load_text_dataset([path, write(tmp_path / "a.txt")])


def test_split_names_in_a_folder_keep_held_out_files_out(tmp_path):
    for name in ("train-00000-of-00002.jsonl", "validation.jsonl", "test/deep.jsonl", "my test of time.jsonl"):
        write(tmp_path / name, [name])
    assert sorted(read(tmp_path)) == ["my test of time.jsonl", "train-00000-of-00002.jsonl"]
    assert read(tmp_path, split="dev") == ["validation.jsonl"] and read(tmp_path, split="test") == ["test/deep.jsonl"]
    assert read(tmp_path / "validation.jsonl") == ["validation.jsonl"]
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train', 'validation'\], not 'odd'"):
        load_text_dataset(tmp_path, split="odd")


def test_slices(tmp_path):
    path = write(tmp_path / "a.jsonl", [str(i) for i in range(10)])
    assert read(path, split="train[:30%]") == ["0", "1", "2"] and read(path, split="train[-2:]") == ["8", "9"]
    with pytest.raises(ValueError, match=r"split is 'train\[x\]', which names no slice"):
        load_text_dataset(path, split="train[x]")
    with pytest.raises(ValueError, match="a stream cannot be sliced"):
        load_text_dataset(path, split="train[:3]", streaming=True)


@pytest.mark.parametrize("name", ["no/such/file.jsonl", "missing.txt", "./corpus", "/nowhere/corpus", "a b"])
def test_missing_paths_never_touch_the_network(name):
    with pytest.raises(ValueError, match="does not exist here and is no Hub id of the form 'owner/name'"):
        load_text_dataset(name)


def test_a_hub_failure_is_one_line():
    with pytest.raises(ValueError, match="'owner/corpus' does not exist here and could not be loaded") as refused:
        load_text_dataset("owner/corpus", config_name="en")
    assert "configuration 'en', split 'train'" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_malformed_line_is_named(tmp_path, streaming, capfd):
    path = write(tmp_path / "a.jsonl", TEXTS * 20)
    path.write_text(path.read_text() + '\n{"text": "cut off', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a.jsonl, line 62 is not valid JSON \(.* at column 10\): repair") as bad:
        load_text_dataset([write(tmp_path / "good.jsonl"), path], streaming=streaming)
    assert "\n" not in str(bad.value) and "Failed to load JSON" not in capfd.readouterr().err


def test_files_that_are_refused(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "c.parquet")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "none").mkdir()
    (tmp_path / "none/readme.rst").write_text("text")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/state.json").write_text("{}")
    neither = r" has neither 'text' nor 'input_ids' but \['body', 'number'\]"
    refused = {
        write(tmp_path / "a.csv"): r"a.csv has the extension '.csv': known are .txt, .md, .jsonl",
        write(tmp_path / "a.jsonl", column="body"): "a.jsonl" + neither,
        write(tmp_path / "b.json", column="body"): "b.json" + neither,
        tmp_path / "c.parquet": "c.parquet holds no rows",
        tmp_path / "empty.txt": "empty.txt is empty",
        tmp_path / "none": "holds no data: looked for .txt, .md, .jsonl, .json, .parquet, .arrow files",
        tmp_path / "broken": "cannot read the saved dataset",
        (): "the list of data sets is empty",
    }
    for name, message in refused.items():
        with pytest.raises(ValueError, match=message):
            load_text_dataset(name)


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
@pytest.mark.parametrize(
    "source", [make_texts("a b", "", "   ", "c", "a <eos>"), make_ids([3, 4], [5, EOS], [], [EOS], [3])]
)
def test_documents_of_text_or_ids_end_in_eos_and_empty_ones_go(source, is_stream):
    got = tokenize_documents(source.to_iterable_dataset() if is_stream else source, make_tokenizer(), vocab_size=6)
    assert list(got) == [{"input_ids": ids} for ids in ([3, 4, EOS], [5, EOS], [3, EOS])]
    assert got.features == datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})


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


@pytest.mark.slow  # it imports everything once more
def test_the_cache_is_found_by_another_process(tmp_path):
    """The fingerprint must not depend on object identity, on the process, or on whether the tokenizer was used."""
    make_texts("a b", "c").save_to_disk(tmp_path / "texts")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    code = (
        "import sys, datasets; from transformers import AutoTokenizer\n"
        "from hf_moe_cpt.data.text import tokenize_documents\n"
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
        (make_texts("a", column="body"), {}, r"neither 'text' nor 'input_ids' but \['id', 'body'\]: name its te"),
        (make_texts("a", None), {}, "row 1 .* of column 'text' is None, a NoneType and not a string"),
        (make_texts("a"), {"vocab_size": 3}, r"token id 3 in row 0 .* outside \[0, 3\): tokenizer and model disagree"),
        (make_ids([3], [4, 7, 8]), {"vocab_size": 6}, r"token id 7 in row 1 .* outside \[0, 6\)"),
        (make_ids([3], [-1]), {}, r"token id -1 in row 1 .* outside \[0, 2147483648\)"),
        (make_ids([1]), {"vocab_size": 2}, r"EOS is id 2, outside \[0, 2\)"),
        (make_ids([3.5]), {}, r"row 0 .* is \[3.5\], not a list of integers"),
        (make_ids("3 4"), {}, "row 0 .* is '3 4', not a list of integers"),
        (make_ids([3], None), {}, "row 1 .* is None, not a list of integers"),
        (make_ids([3, None]), {}, "rows 0 to 0 of input_ids hold something that is no integer"),
        (make_texts(*["a"] * 30, None), {"num_proc": 2}, "row 30 "),
        (datasets.IterableDataset.from_generator(lambda: iter(())), {}, "streamed dataset is empty"),
    ],
)
def test_bad_rows_are_named(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        tokenize_documents(dataset, make_tokenizer(), **options)


def test_tokenizers_that_cannot_serve():
    with pytest.raises(ValueError, match="PreTrainedTokenizerFast|TokenizersBackend") as refused:
        tokenize_documents(make_texts("a"), make_tokenizer(eos_token=None))
    assert "has no EOS token to end documents: set tokenizer.eos_token" in str(refused.value)
    for dataset, add_eos in ((make_texts("a"), False), (make_ids([3]), True)):
        with pytest.raises(ValueError, match="tokenizer is None"):
            tokenize_documents(dataset, None, add_eos=add_eos)
