"""Damage is found where it is, and nothing sound is called damaged."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_moe_cpt.data.file_checks import check_file, check_utf8, find_damage


@pytest.mark.parametrize("offset", [0, 7, 2**20 - 1, 2**20, 2**20 + 5])
def test_first_byte_that_is_not_utf8(tmp_path, offset):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * offset + b"\xff" + b"y" * 10)
    with pytest.raises(ValueError, match=rf"a.txt is not UTF-8 text \(byte {offset}\)"):
        check_utf8(path)


def test_characters_across_read_borders_are_sound(tmp_path):
    for shift in range(4):
        (tmp_path / "a.txt").write_bytes(b"x" * (2**20 - shift) + "€𝄞".encode())
        check_utf8(tmp_path / "a.txt")


def test_a_character_cut_off_at_the_end(tmp_path):
    (tmp_path / "a.txt").write_bytes("ab€".encode()[:-1])
    with pytest.raises(ValueError, match=r"not UTF-8 text \(byte 2\)"):
        check_file(tmp_path / "a.txt", "text", "text")


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "a"}\n\n{"text": "b"}',
        b'\xef\xbb\xbf{"text": "a"}\r\n',
        b' \n[{"text": "a"},\n{"text": "b"}]',
        b'{\n"text": "a"}',
    ],
)
def test_sound_json(tmp_path, content):
    path = tmp_path / "a.json"
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
    ],
)
def test_damaged_json(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        find_damage(path, "json")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "a.jsonl is empty"),
        (b"\n \n", "only blank lines"),
        (b"nonsense", "line 1 is not valid JSON"),
        (b'{"body": "a"}', r"neither 'text' nor 'input_ids' but \['body'\]: name its text column"),
    ],
)
def test_heads_of_json_files(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check_file(path, "json", "text")


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


def test_a_parquet_file_damaged_inside(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(5000)]}), path)
    content = bytearray(path.read_bytes())
    content[4:2000] = b"\x00" * 1996
    path.write_bytes(content)
    check_file(path, "parquet", "text")
    with pytest.raises(ValueError, match="a.parquet is a damaged parquet file"):
        find_damage(path, "parquet")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind the administrator")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    path.chmod(0)
    with pytest.raises(ValueError, match="cannot read .*a.txt: Permission denied"):
        check_file(path, "text", "text")


def test_a_path_that_cannot_be_opened(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*: No such file"):
        check_file(tmp_path / "gone.txt", "text", "text")
