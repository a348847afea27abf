"""Say what is wrong with a data file, and where: cheap checks before loading, a full search after a failure.

Source: ours. `check_file` looks at the head (for text, at all bytes); `find_damage` reads a whole file, after
`datasets` refused it or before it is streamed, and raises for the first damaged place.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


_READ_BYTES = 1 << 20


def check_file(path: Path, kind: str, text_column: str) -> None:
    """Refuse a file that is unreadable, empty, damaged at its head or lacks both text_column and input_ids.

    kind: text, json, parquet or arrow. Time does not grow with the size of the file, except for text.
    """
    try:
        with path.open("rb") as file:
            is_empty = not file.read(1)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}; check its permissions.") from error
    if is_empty:
        raise ValueError(f"{path} is empty: remove it or put text into it.")
    if kind == "text":
        check_utf8(path)
        return
    columns = _json_columns(path) if kind == "json" else _arrow_schema(path, kind).names
    if columns is not None and text_column not in columns and "input_ids" not in columns:
        raise ValueError(
            f"{path} has neither {text_column!r} nor 'input_ids' but {sorted(columns)}: "
            "name its text column in text_column."
        )
    if kind == "parquet" and pq.read_metadata(path).num_rows == 0:  # the loader fails on such a file
        raise ValueError(f"{path} holds no rows: remove it or put text into it.")


def check_utf8(path: Path) -> None:
    """Refuse a file with bytes that are not UTF-8, naming the first one's offset."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while True:
            piece = file.read(_READ_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not UTF-8 text (byte {offset - pending + error.start}): convert or remove it."
                ) from None
            if not piece:
                return
            offset += len(piece)


def find_damage(path: Path, kind: str) -> None:
    """Raise for the first damaged place of a file, with its line (counted from 1) in JSON; return if there is none."""
    if kind == "text":
        check_utf8(path)
    elif kind != "json":
        _read_arrow(path, kind)
    elif _is_one_document(path):
        _parse_document(path)
    else:
        for _ in json_lines(path):
            pass


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of each line of a JSON Lines file that is not blank; lines are counted from 1.

    Raises ValueError that names file and line for what is no object or no UTF-8, and for a file that cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                row = _parse_line(path, number, line)
                if row is not None:
                    yield number, row
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}; check the path.") from error


def _json_columns(path: Path) -> list[str] | None:
    """Keys of the first object; None for one document over many lines, whose head cannot be parsed alone."""
    if _is_one_document(path):
        return None
    for _, row in json_lines(path):
        return list(row)
    raise ValueError(f"{path} holds only blank lines: remove it or put text into it.")


def _is_one_document(path: Path) -> bool:
    """Whether a JSON file is an array or one object spread over lines, not an object per line."""
    with path.open("rb") as file:
        head = file.read(_READ_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    return head[:1] == b"[" or head.split(b"\n", 1)[0].strip() == b"{"


def _parse_line(path: Path, number: int, line: bytes) -> dict | None:
    if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise ValueError(f"{path}, line {number} is not UTF-8 text: convert the file to UTF-8.") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {number} is not valid JSON ({error.msg} at column {error.colno}): "
            "repair or remove that line, and put one whole object on each line."
        ) from None
    if not isinstance(row, dict):
        raise ValueError(
            f'{path}, line {number} is a JSON {type(row).__name__}, not an object such as {{"text": "..."}}.'
        )
    return row


def _parse_document(path: Path) -> None:
    try:
        json.loads(path.read_bytes())
    except UnicodeDecodeError:
        check_utf8(path)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno} is not valid JSON ({error.msg}): repair it.") from None


def _arrow_schema(path: Path, kind: str) -> pa.Schema:
    try:
        if kind == "parquet":
            return pq.read_schema(path)
        with pa.memory_map(str(path)) as source:
            try:
                return pa.ipc.open_stream(source).schema
            except pa.ArrowInvalid:
                return pa.ipc.open_file(source).schema
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no readable {kind} file: {str(error).splitlines()[0]}") from error


def _read_arrow(path: Path, kind: str) -> None:
    schema = _arrow_schema(path, kind)
    if kind == "parquet":
        try:
            for _ in pq.ParquetFile(path).iter_batches(columns=schema.names[:1]):
                pass
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is a damaged parquet file: {str(error).splitlines()[0]}") from error
