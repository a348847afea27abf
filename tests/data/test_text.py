"""Every form in which users keep text is opened and tokenised; what cannot be is explained in one line.

Damage is found where it is, and nothing sound is called damaged. Documents become ids plus one EOS; caches are found
again by another process; every bad row is named.
"""

import bz2
import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_moe_cpt.data import text as text_module
from hf_moe_cpt.data.text import (
    check_file,
    check_utf8,
    load_text_dataset,
    processes_for,
    read_documents,
    tokenize_documents,
)


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
        assert list(read_documents(path, "text")) == ["a", "b"][: content.count(b"text")]


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
        assert list(read_documents(path, "text")) == ["a", "b"][: content.count(b"text")]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables(tmp_path, kind):
    path, table = tmp_path / f"a.{kind}", pa.table({"body": ["a", "b"] * 500})
    if kind == "parquet":
        pq.write_table(table, path, compression="none", use_dictionary=False)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    check_file(path, kind, "body")
    assert list(read_documents(path, "body")) == ["a", "b"] * 500
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
        list(read_documents(path, "text"))
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


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "zst": lambda data: pa.compress(data, "zstd", asbytes=True)}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.ndjson", "note.rst", "code.py", "main.CPP"])
def test_more_kinds_of_files(tmp_path, name, streaming):
    path = tmp_path / name
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if name == "a.tsv" else ",")
            writer.writerows([["n", "body"], *enumerate([*TEXTS, 'with "quotes", commas\tand\nlines'])])
        want = [*TEXTS, 'with "quotes", commas\tand\nlines']
    elif path.suffix == ".ndjson":
        write(tmp_path / "a.jsonl", column="body").rename(path)
        want = TEXTS
    else:
        path.write_text(TEXTS[0])
        want = TEXTS[:1]
    assert read(tmp_path, streaming=streaming, text_column="body") == want


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_files_lie_beside_plain_ones(tmp_path, ending, streaming):
    """open_lm #285: 1,000 of 1,006 documents were gone."""
    packed = write(tmp_path / "packed.jsonl", [f"text {i}" for i in range(1000)])
    content = packed.read_bytes()
    packed.unlink()
    half = len(content.splitlines(keepends=True)[0]) * 3
    members = [COMPRESS[ending](content[:half]), COMPRESS[ending](content[half:])]  # gzip and zstd files have many
    (tmp_path / f"deep.jsonl.{ending}").write_bytes(b"".join(members))
    (tmp_path / f"note.txt.{ending}").write_bytes(COMPRESS[ending](b"one more"))
    write(tmp_path / "plain.jsonl", [f"plain {i}" for i in range(6)])
    found = read(tmp_path, streaming=streaming)
    assert len(found) == 1007 and {"text 999", "plain 5", "one more"} <= set(found)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_other_columns_may_differ_from_file_to_file(tmp_path, kind, streaming):
    """OLMoE #21 and datasets #5596: OLMoE's own mix has files with one more column, and of another type."""
    for number, more in enumerate(({}, {"meta": "x"}, {"meta": {"a": 1}, "id": "y"})):
        rows = [{"text": f"text {number}", "id": number, **more}]
        path = tmp_path / f"{number}.{kind}"
        path.write_text(json.dumps(rows[0])) if kind == "jsonl" else pq.write_table(pa.Table.from_pylist(rows), path)
    assert read(tmp_path, streaming=streaming) == ["text 0", "text 1", "text 2"]


def test_what_a_folder_holds_and_is_not_read_is_listed_with_reasons(tmp_path, caplog):
    for name, content in {"a.txt": b"a", "b.txt": b"", "c.png": b"x", "d.pdf": b"y", "e.md": b"ab\xff"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "f.jsonl").write_bytes(b"\n\n")
    assert read(tmp_path) == ["a"]
    assert caplog.messages == [
        f"{tmp_path}: 1 of 6 files are read. Left out: 1 empty (b.txt); 2 of a kind that is not read (c.png, d.pdf); "
        "1 not UTF-8 (e.md); 1 without rows (f.jsonl)."
    ]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match="holds no text that can be read: 1 empty"):
        load_text_dataset(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"a.jsonl, line 2 has no 'text' but \['body'\]"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 5}\n', "a.jsonl, line 3: column 'text' holds 5, a int and not a str"),
        ("a.jsonl", b'{"input_ids": [1]}\n{"input_ids": [0.5]}\n', r"line 2: column 'input_ids' holds \[0.5\]"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "a.jsonl, line 2 is not UTF-8 text"),
        ("a.csv", b"n,text\n1,a\n2\n", "a.csv, line 3 has 1 of 2 columns"),
        ("a.csv", b"n,text\n1,a\n2,\xe9\n", r"a.csv is not UTF-8 text \(byte 13\)"),
        ("a.csv", b"n,body\n1,a\n", "a.csv has neither 'text' nor 'input_ids'"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz is a damaged .gz file"),
    ],
)
def test_a_bad_row_is_told_with_file_and_place_before_anything_is_read(tmp_path, name, content, message, streaming):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        load_text_dataset(tmp_path / name, streaming=streaming)
    assert "\n" not in str(refused.value)


def test_a_file_that_changed_is_read_again(tmp_path):
    path = write(tmp_path / "a.jsonl", ["old"])
    assert read(path) == ["old"]
    write(path, ["new, and longer"])
    assert read(path) == ["new, and longer"]


def test_documents_of_white_space_are_counted(caplog):
    tokenize_documents(make_texts("a b", " \n ", "", "c"), make_tokenizer())
    assert caplog.messages == ["2 of 4 documents hold no text and are left out."]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_byte_order_mark_and_the_line_ends_of_other_systems_are_no_text(tmp_path, streaming):
    """A file of text is read as Python reads one: its copies are copies, whatever system wrote them."""
    for name, content in (("a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n"), ("b.py", b"one\ntwo\n"), ("c.md", b"one\rtwo\r")):
        (tmp_path / name).write_bytes(content)
    with gzip.open(tmp_path / "d.rst.gz", "wb") as file:
        file.write(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (tmp_path / "e.csv").write_bytes(b"\xef\xbb\xbftext,n\r\none,1\r\n")
    (tmp_path / "f.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    assert read(tmp_path, streaming=streaming) == [*["one\ntwo\n"] * 4, "one", "one", "two"]


def test_several_paths_become_one(tmp_path):
    paths = [write(tmp_path / "a.jsonl"), str(write(tmp_path / "b.txt", ["b"]))]
    assert sorted(read([*paths, write(tmp_path / "f/c.jsonl", ["c"]).parent])) == sorted([*TEXTS, "b", "c"])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_configuration_of_a_folder_laid_out_like_a_data_set_of_the_hub(tmp_path, streaming, caplog):
    """It was left unread without a word: all files were read, the card among them."""
    for name, split in (("de", "train"), ("de", "test"), ("en", "train")):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        write(tmp_path / "data" / name / f"{split}.jsonl", [f"{name} {split}"])
    card = "configs:\n- {config_name: deu, data_files: [{split: train, path: data/de/train*}, "
    card += "{split: test, path: data/de/test*}]}\n- {config_name: eng, data_files: 'data/en/*.jsonl'}\n"
    card += "- {config_name: all, data_dir: data}\n- {config_name: gone, data_files: x/*}\n"
    card += "- {config_name: out, data_files: ../outside.jsonl}\n"
    write(tmp_path.parent / "outside.jsonl", ["of another folder"])
    (tmp_path / "README.md").write_text(f"---\n{card}---\n# Texts\n")
    options = {"streaming": streaming}
    assert read(tmp_path, config_name="deu", **options) == ["de train"]
    assert read(tmp_path, config_name="deu", split="test", **options) == ["de test"]
    assert read(tmp_path, config_name="eng", **options) == ["en train"]
    assert sorted(read(tmp_path, config_name="all", **options)) == ["de train", "en train"]
    assert sorted(read(tmp_path, **options)) == ["de train", "en train"]
    assert "1 the card of a data set (README.md)" in caplog.text
    for name, split, message in (
        ("fra", "train", "has the configurations deu, eng, all, gone, out, not 'fra': choose one of them"),
        ("eng", "test", "configuration eng: of its splits choose train, not 'test'"),
        ("out", "train", "configuration out names '.*outside.jsonl', which lies outside of the folder"),
        ("gone", "train", "configuration gone: of its splits choose none that has files"),
    ):
        with pytest.raises(ValueError, match=message):
            read(tmp_path, config_name=name, split=split, **options)
    with pytest.raises(ValueError, match="has no configurations in a README.md, not 'deu': leave it out"):
        read(tmp_path / "data", config_name="deu", **options)


def test_tokenised_data_is_recognised(tmp_path):
    path = tmp_path / "ids.jsonl"
    path.write_text('{"text": "a", "input_ids": [1, 2]}\n{"text": "b", "input_ids": [3]}\n')
    assert read(path) == [[1, 2], [3]]
    with pytest.raises(ValueError, match=r"holds both text \('text'\) and tokenised data"):
        load_text_dataset([path, write(tmp_path / "a.txt")])


@pytest.mark.parametrize("streaming", [False, True])
def test_links_are_followed_once_and_those_to_nothing_are_listed(tmp_path, streaming, caplog):
    """What lay behind a link to a folder was dropped without a word."""
    (tmp_path / "data" / "more").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere" / "a.jsonl", ["far"])
    write(tmp_path / "data" / "b.jsonl", ["near"])
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "more" / "round").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "gone.jsonl").symlink_to(tmp_path / "nothing.jsonl")
    assert read(tmp_path / "data", streaming=streaming) == ["near", "far"]
    assert "2 of 3 files are read. Left out: 1 that cannot be opened (gone.jsonl)." in caplog.text


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "shut").mkdir()
    write(tmp_path / "a.jsonl")
    scandir = os.scandir

    def of_a_stranger(place):
        if str(place).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", of_a_stranger)
    with pytest.raises(ValueError, match="cannot read the folder .*shut: Permission denied; check its permissions"):
        read(tmp_path)


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
    (tmp_path / "none/readme.odt").write_text("text")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/state.json").write_text("{}")
    neither = r" has neither 'text' nor 'input_ids' but \['body', 'number'\]"
    refused = {
        write(tmp_path / "a.odt"): r"a.odt has the extension '.odt': known are .txt, .md, .rst, .jsonl",
        write(tmp_path / "a.jsonl", column="body"): "a.jsonl" + neither,
        write(tmp_path / "b.json", column="body"): "b.json" + neither,
        tmp_path / "c.parquet": "c.parquet holds no rows",
        tmp_path / "empty.txt": "empty.txt is empty",
        tmp_path / "none": "holds no data: looked for .txt, .md, .rst, .jsonl, .ndjson, .json, .csv, .tsv, ",
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
    start = [] if "input_ids" in source.column_names else [1]  # what the tokenizer puts there by itself
    want = [[*start, *ids] for ids in ([3, 4, EOS], [5, EOS], [3, EOS])]
    assert [list(row["input_ids"]) for row in got] == want
    assert got.features == datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})


def test_without_eos_nothing_is_appended():
    assert tokenize_documents(make_ids([3, 4], []), None, document_end="none")["input_ids"][:] == [[3, 4]]
    assert tokenize_documents(make_texts("a b"), make_tokenizer(), document_end="none")["input_ids"][:] == [[1, 3, 4]]


@pytest.mark.parametrize(
    "start, end, want",
    [
        ("auto", "auto", [1, 3, 4, 2]),
        ("none", "auto", [3, 4, 2]),
        ("<eos>", "none", [2, 3, 4]),
        ("none", "c c", [3, 4, 5, 5]),
    ],
)
def test_a_document_begins_and_ends_as_chosen(start, end, want):
    edges = {"document_start": start, "document_end": end}
    assert tokenize_documents(make_texts("a b"), make_tokenizer(), **edges)["input_ids"][:] == [want]
    both = make_ids(want, [5])  # what is there is not put there again
    added = tokenize_documents(both, make_tokenizer(), **(edges if start != "auto" else {}))["input_ids"][:]
    assert added[0] == want and len(added[1]) > 1
    with pytest.raises(ValueError, match="document_end='  ' is no token"):
        tokenize_documents(make_texts("a b"), make_tokenizer(), document_end="  ")


def trained_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Tokenizers of the kinds that models have, with vocabularies learnt from the test's own words."""
    llama = kind in ("llama", "gemma")
    special = ["<s>", "</s>", "<unk>", "<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=llama, unk_token="<unk>" if llama else None))
    if kind == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif kind == "qwen":
        words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Without the pieces that a pre-tokenizer makes, training would learn across words: it is given words.
    words = [*(f"▁{word}" for word in WORDS_OF_ALL), *WORDS_OF_ALL] if llama else [" ".join(WORDS_OF_ALL)] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, show_progress=False, initial_alphabet=[*"▁ .,\n0123456789"] if llama
        else pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    normalizer, tokenizer.normalizer = tokenizer.normalizer, normalizers.Sequence([])
    tokenizer.train_from_iterator(words * 5, trainer)
    tokenizer.normalizer = normalizer
    if llama:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>", "eos_token": "</s>"} if llama else {"eos_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


WORDS_OF_ALL = (
    "the quick brown fox jumps over a lazy dog while nobody looks at all these words of an old river".split()
)


@pytest.mark.parametrize("kind", ["llama", "gemma", "qwen", "gpt_neox"])
def test_a_long_document_has_the_tokens_of_the_whole_and_the_start_of_its_tokenizer(kind):
    """Against the tokenizer itself, given the whole text."""
    tokenizer = trained_tokenizer(kind)
    text = "\n".join(
        " ".join(WORDS_OF_ALL[(i * 7 + j * j) % len(WORDS_OF_ALL)] for j in range(9 + i % 5)) + f", {i}. And  so"
        for i in range(900)
    )
    got = tokenize_documents(make_texts(text, "the fox"), tokenizer)["input_ids"]
    assert len(text) > 3 * 2**14
    for ids, whole in zip(got, (text, "the fox"), strict=True):
        assert ids == [*tokenizer(whole)["input_ids"], tokenizer.eos_token_id]
        assert (ids[0] == tokenizer.bos_token_id) == (kind in ("llama", "gemma"))


def test_processes_give_the_same_rows_in_the_same_order(monkeypatch):
    """A small set is not worth their start: the ten of a mixture took two minutes in four processes, 19 s in one."""
    assert processes_for(make_texts("a", "b"), 4) is None
    monkeypatch.setattr(text_module, "_BYTES_OF_A_PROCESS", 64)
    texts = make_texts(*["a b c"[: 1 + 2 * (i % 3)] for i in range(40)], column="body")
    assert processes_for(texts, 2) == 2 and processes_for(texts, 99) < 40 and processes_for(texts, None) is None
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
        (make_ids([1]), {"vocab_size": 2}, r"the end of documents is \[2\], outside \[0, 2\)"),
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
    for dataset, end in ((make_texts("a"), "none"), (make_ids([3]), "auto")):
        with pytest.raises(ValueError, match="tokenizer is None"):
            tokenize_documents(dataset, None, document_end=end)
