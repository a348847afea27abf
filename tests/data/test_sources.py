"""Every form in which users keep text is opened, streamed or not; what cannot be opened is explained in one line."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_moe_cpt.data.sources import load_text_dataset


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
@pytest.mark.parametrize("extension", ["jsonl", "json", "parquet", "arrow"])
def test_files_of_rows(tmp_path, extension, streaming):
    path = write(tmp_path / f"data.{extension}", column="body")
    assert read(path, streaming=streaming, text_column="body") == TEXTS


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["note.txt", "note.md", "NOTE.TXT"])
def test_a_text_file_is_one_document(tmp_path, name, streaming):
    path = write(tmp_path / name)
    assert read(str(path), streaming=streaming) == TEXTS[:1]
    assert load_text_dataset(path, text_column="body").column_names == ["body"]


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
    paths = [
        write(tmp_path / "a.jsonl"),
        str(write(tmp_path / "b.txt", ["b"])),
        write(tmp_path / "f/c.jsonl", ["c"]).parent,
    ]
    assert sorted(read(paths)) == sorted([*TEXTS, "b", "c"])


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
    with pytest.raises(
        ValueError, match="'owner/corpus' does not exist here and could not be loaded from the Hub"
    ) as refused:
        load_text_dataset("owner/corpus", config_name="en")
    assert "configuration 'en', split 'train'" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_malformed_line_is_named(tmp_path, streaming, capfd):
    path = write(tmp_path / "a.jsonl", TEXTS * 20)
    path.write_text(path.read_text() + '\n{"text": "cut off', encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"a.jsonl, line 62 is not valid JSON \(.* at column 10\): repair or remove"
    ) as bad:
        load_text_dataset([write(tmp_path / "good.jsonl"), path], streaming=streaming)
    assert "\n" not in str(bad.value) and "Failed to load JSON" not in capfd.readouterr().err


def test_a_folder_without_data_and_no_names(tmp_path):
    (tmp_path / "readme.rst").write_text("text")
    with pytest.raises(ValueError, match="holds no data: looked for .txt, .md, .jsonl, .json, .parquet, .arrow files"):
        load_text_dataset(tmp_path)
    with pytest.raises(ValueError, match="the list of data sets is empty"):
        load_text_dataset([])


def test_files_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a.csv has the extension '.csv': known are .txt, .md, .jsonl"):
        load_text_dataset(write(tmp_path / "a.csv"))
    with pytest.raises(ValueError, match=r"a.jsonl has neither 'text' nor 'input_ids' but \['body', 'number'\]"):
        load_text_dataset(write(tmp_path / "a.jsonl", column="body"))
    with pytest.raises(ValueError, match=r"b.json has neither 'text' nor 'input_ids' but \['body', 'number'\]"):
        load_text_dataset(write(tmp_path / "b.json", column="body"))
    with pytest.raises(ValueError, match="c.parquet holds no rows"):
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "c.parquet")
        load_text_dataset(tmp_path / "c.parquet")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="empty.txt is empty"):
        load_text_dataset(tmp_path / "empty.txt")


def test_a_broken_saved_dataset(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot read the saved dataset"):
        load_text_dataset(tmp_path)
