"""From text wherever it lies to token ids: read documents of files, tokenise them, say what is wrong and where.

`load_text_dataset` decides what a name means (a Hub id, a folder from save_to_disk, folders and files of text, source
code, JSON, CSV, parquet or arrow, compressed or not). Of a file only the useful column is read, so that files whose
other columns differ go together, streamed or not. What a folder holds and is not read is listed with reasons. Local
names never touch the network. `tokenize_documents` gives one row per document, each ending in EOS; nothing else
survives. `check_file` looks at the head of a file (for text, at all bytes). Source: ours.
"""

import codecs
import csv
import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns
from transformers import PreTrainedConfig, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

Source = str | PathLike[str]
AnyDataset = datasets.Dataset | datasets.IterableDataset

_CODE = ".py .pyi .c .h .cc .cpp .hpp .cu .cs .java .kt .scala .js .jsx .ts .tsx .go .rs .rb .php .pl .lua .swift .r"
_CODE += " .jl .hs .ml .clj .sql .sh .tex"
KIND_OF_EXTENSION = {
    ".txt": "text", ".md": "text", ".rst": "text", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv",
    ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow", **dict.fromkeys(_CODE.split(), "text"),
}  # fmt: skip
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
_EXTENSIONS = (
    f"{', '.join(dict.fromkeys(name for name in KIND_OF_EXTENSION if name not in _CODE.split()))}, source code, and "
    f"with {', '.join(_COMPRESSIONS)} behind it all but the tables of arrow"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_SPLIT_OF_NAME = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
                  "val": "validation", "dev": "validation", "test": "test", "eval": "test"}  # fmt: skip
_READ_BYTES = 1 << 20
_BYTES_IN_MEMORY = 1 << 28  # of documents that are held at once while they are written to the cache
_INT32_LIMIT = 1 << 31
_CHARACTERS_AT_ONCE = 1 << 20  # encodings take some 150 bytes a token until their ids are read


def load_text_dataset(
    name_or_path: Source | Sequence[Source],
    *,
    split: str = "train",
    streaming: bool = False,
    text_column: str = "text",
    config_name: str | None = None,
) -> AnyDataset:
    """Load documents as a dataset of one column: input_ids where the data has it, else `text_column`.

    name_or_path: what exists here is read from here, anything else must look like a Hub id; or a list of them, which
    are read one after the other and must all be text or all be tokenised. Folders are searched recursively, hidden
    files left out; each file of text or source code is one document.
    split: for the Hub and save_to_disk as usual, slices ("train[:1%]") included. In a folder, files called train,
    validation or test (train.jsonl, test-00000-of-00003.parquet, or below a folder of that name) belong to that split
    and all others to train; a file given by its own path is read whatever its name. config_name: a configuration of a
    data set on the Hub, or of a folder whose README.md names it as those of the Hub do.
    """
    names = [name_or_path] if isinstance(name_or_path, (str, PathLike)) else list(name_or_path)
    if not names:
        raise ValueError("the list of data sets is empty: name at least one file, folder or Hub id.")
    split_name, _, has_slice = split.partition("[")
    if has_slice and streaming:
        raise ValueError(f"split is {split!r}: a stream cannot be sliced, use {split_name!r} or streaming=False.")
    files: dict[Path, str | None] = {}  # with their column where it is known
    parts = []
    for name in map(str, names):
        path = Path(name).expanduser()
        if path.exists() and config_name is not None:
            files |= dict.fromkeys(_files_of_configuration(path, config_name, split_name))
        elif path.is_dir() and _is_saved_dataset(path):
            parts.append(_load_saved(path, split_name, streaming))
        elif path.is_dir():
            files |= _files_of_folder(path, split_name, text_column)
        elif path.exists():
            files.setdefault(path, None)
        else:
            parts.append(_load_from_hub(name, config_name, split_name, streaming))
    if files:
        parts.append(_load_files(files, text_column, streaming))
    return _slice(_join(parts, names, text_column), split)


_CARD_HEAD = re.compile(r"\s*---\s*\n(.*?\n)---\s*(?:\n|$)", re.DOTALL)  # what the Hub reads of a README.md


def configurations_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Configurations that the card of a data set, its README.md, names; none for a file and for any other folder."""
    try:
        head = _CARD_HEAD.match((folder / "README.md").read_text(encoding="utf-8-sig"))
        known = yaml.safe_load(head[1]).get("configs") or ()
        return {str(config["config_name"]): config for config in known if "config_name" in config}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):  # about something else
        return {}


def _files_of_configuration(folder: Path, name: str, split: str) -> list[Path]:
    """The files that a card gives a configuration, as `datasets` reads its patterns."""
    known = configurations_of(folder)
    if name not in known:
        has = f"has the configurations {', '.join(known)}" if known else "has no configurations in a README.md"
        raise ValueError(f"{folder} {has}, not {name!r}: " + ("choose one of them." if known else "leave it out."))
    base, given = str(folder / (known[name].get("data_dir") or "")), known[name].get("data_files")
    try:
        patterns = get_data_patterns(base) if given is None else sanitize_patterns(given)
        found = DataFilesDict.from_patterns(patterns, base_path=base)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder}, configuration {name}: {first_line_of(error)}") from error
    if not found.get(split):
        has = ", ".join(split for split, files in found.items() if files) or "none that has files"
        raise ValueError(f"{folder}, configuration {name}: of its splits choose {has}, not {split!r}.")
    inside = os.path.abspath(folder)  # links are followed: a snapshot of the Hub is made of them
    if outside := [file for file in found[split] if not Path(os.path.abspath(file)).is_relative_to(inside)]:
        raise ValueError(f"{folder}, configuration {name} names {outside[0]!r}, which lies outside of the folder.")
    return [Path(file) for file in found[split]]


def _is_card(path: Path) -> bool:
    """Whether a file is the README.md of a data set or model, which begins with what the Hub reads."""
    if path.name.lower() != "readme.md":
        return False
    with path.open("rb") as file:
        return file.readline().strip() == b"---"


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _load_saved(folder: Path, split: str, streaming: bool) -> AnyDataset:
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise ValueError(f"cannot read the saved dataset {folder}: {first_line_of(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(
                f"the saved dataset {folder} has the splits {list(saved)}, not {split!r}: choose one of them."
            )
        saved = saved[split]
    return saved.to_iterable_dataset() if streaming else saved


class UnreadFileError(ValueError):
    """A file without anything to read: refused where it is named itself, listed where its folder is.

    reason: in a word or two, for the list.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def kind_of(path: Path) -> str | None:
    """How a file is read, by its name: text, json, csv, parquet or arrow; None for a name that says nothing."""
    if path.suffix.lower() not in _COMPRESSIONS:
        return KIND_OF_EXTENSION.get(path.suffix.lower())
    kind = KIND_OF_EXTENSION.get(path.with_suffix("").suffix.lower())
    return None if kind in ("parquet", "arrow") else kind


def _files_of_folder(folder: Path, split: str, text_column: str) -> dict[Path, str]:
    """Readable files below a folder that belong to a split, in a fixed order, with their column; says what is not."""
    found = sorted(_files_below(folder))
    if not any(map(kind_of, found)):
        raise ValueError(f"the folder {folder} holds no data: looked for {_EXTENSIONS}, also in its subfolders.")
    split_of_file = {path: _split_of(path.relative_to(folder)) for path in found if kind_of(path)}
    wanted = _SPLIT_OF_NAME.get(split, split)
    if wanted not in split_of_file.values():
        raise ValueError(f"the folder {folder} has the splits {sorted(set(split_of_file.values()))}, not {split!r}.")
    chosen, left_out = {}, {}
    for path in found:
        reason = None
        if path not in split_of_file:
            reason = "of a kind that is not read"
        elif split_of_file[path] != wanted:
            reason = f"of the split {split_of_file[path]}"
        elif _is_card(path):
            reason = "the card of a data set"
        else:
            try:
                chosen[path] = check_file(path, kind_of(path), text_column)
            except UnreadFileError as error:
                reason = error.reason
        if reason is not None:
            left_out.setdefault(reason, []).append(str(path.relative_to(folder)))
    listed = "; ".join(
        f"{len(names)} {reason} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for reason, names in left_out.items()
    )
    if not chosen:
        raise ValueError(f"the folder {folder} holds no text that can be read: {listed}.")
    if left_out:
        logger.warning("%s: %d of %d files are read. Left out: %s.", folder, len(chosen), len(found), listed)
    return chosen


def _files_below(folder: Path) -> Iterator[Path]:
    """Files that are not hidden, through links to folders too, each folder once; also links to nothing."""

    def refuse(error: OSError) -> None:
        message = f"cannot read the folder {error.filename}: {error.strerror or error}; check its permissions."
        raise ValueError(message) from error

    seen = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        is_known = (real := os.path.realpath(place)) in seen
        seen.add(real)
        folders[:] = [] if is_known else sorted(name for name in folders if not name.startswith("."))
        paths = (Path(place, name) for name in names if not is_known and not name.startswith("."))
        yield from (path for path in paths if path.is_file() or path.is_symlink())


def _split_of(relative: Path) -> str:
    """The split that a folder or file name stands for; "train" where no name says anything."""
    for name in (*relative.parts[:-1], relative.stem):
        plain = re.sub(r"-\d+-of-\d+.*$", "", name.lower())
        if plain in _SPLIT_OF_NAME:
            return _SPLIT_OF_NAME[plain]
    return "train"


def _load_files(files: dict[Path, str | None], text_column: str, streaming: bool) -> AnyDataset:
    columns, paths = set(), list(files)
    for path, column in files.items():
        kind = kind_of(path)
        if kind is None:
            raise ValueError(f"{path} has the extension {path.suffix!r}: known are {_EXTENSIONS}.")
        columns.add(column or check_file(path, kind, text_column))
    if len(columns) > 1:
        raise ValueError(_two_kinds(_listed(paths), text_column))
    column = columns.pop()
    if streaming:  # a bad row would stop a stream hours into training
        for path in paths:
            if kind_of(path) in ("json", "csv"):
                for _ in read_documents(path, column):
                    pass
    stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    value = datasets.Value("string") if column != "input_ids" else datasets.List(datasets.Value("int64"))
    options: dict[str, Any] = {"features": datasets.Features({column: value})}
    options["gen_kwargs"] = {"files": stamps, "column": column}
    if streaming:
        return datasets.IterableDataset.from_generator(_rows_of_files, **options)
    largest = max(size for _, size, _ in stamps) if kind_of(paths[0]) == "text" else 0
    options["writer_batch_size"] = max(1, min(1000, _BYTES_IN_MEMORY // max(1, largest)))
    try:
        return datasets.Dataset.from_generator(_rows_of_files, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(first_line_of(error)) from error


def _rows_of_files(files: Iterable[tuple[str, int, int]], column: str) -> Iterator[dict[str, Any]]:
    """Rows for `datasets`, which keeps them by name, size and time of the files."""
    for name, _, _ in files:
        for document in read_documents(Path(name), column):
            yield {column: document}


def read_documents(path: Path, column: str) -> Iterator[Any]:
    """What a file holds in one column, row by row; for text, the whole file.

    Raises ValueError that names file and place for a damaged file, and for a row whose value is no text or, if the
    column is input_ids, no list of integers.
    """
    kind = kind_of(path)
    if kind == "text":
        with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig") as file:
            yield file.read()  # lines end in \n, whatever system wrote them
        return
    rows = {"json": _json_rows, "csv": _csv_rows, "parquet": _arrow_rows, "arrow": _arrow_rows}[kind](path, column)
    for place, value in rows:
        if not (_is_list_of_ids(value) if column == "input_ids" else isinstance(value, str)):
            raise ValueError(
                f"{path}, {place}: column {column!r} holds {_shorten(value)}, a {type(value).__name__} and not "
                f"{'a list of integers' if column == 'input_ids' else 'a string'}: remove or repair that row."
            )
        yield value


def _is_list_of_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and abs(token) < _INT32_LIMIT for token in value)


def _json_rows(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    if _is_one_document(path):
        rows = enumerate(_parse_document(path))
        word = "element"
    else:
        rows, word = json_lines(path), "line"
    for number, row in rows:
        if not isinstance(row, dict) or column not in row:
            has = list(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{path}, {word} {number} has no {column!r} but {has}: remove or repair it.")
        yield f"{word} {number}", row[column]


def _csv_rows(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    rows, names = _csv_of(path)
    place = names.index(column)
    try:
        for row in rows:
            if row and len(row) <= place:
                raise ValueError(f"{path}, line {rows.line_num} has {len(row)} of {len(names)} columns: repair it.")
            if row:
                yield f"line {rows.line_num}", row[place] if column != "input_ids" else json.loads(row[place])
    except UnicodeDecodeError:
        check_utf8(path)
        raise
    except (csv.Error, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}, line {rows.line_num} is no valid row ({error}): repair or remove it.") from None


def _csv_of(path: Path) -> tuple[Any, list[str]]:
    """A reader of the rows below the head, and the names in the head."""
    csv.field_size_limit(_INT32_LIMIT - 1)
    lines = io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="")
    plain = path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path
    rows = csv.reader(lines, delimiter="\t" if plain.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        return rows, next(rows, [])
    except UnicodeDecodeError:
        check_utf8(path)
        raise
    except (csv.Error, OSError) as error:
        raise ValueError(f"{path}, line 1 is no head of a table ({error}): name the columns there.") from None


def _arrow_rows(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    row = 0
    try:
        if kind_of(path) == "parquet":
            batches = pq.ParquetFile(path, memory_map=True).iter_batches(columns=[column], batch_size=100)
        else:
            batches = _arrow_batches(path)
        for batch in batches:
            for value in batch.column(column).to_pylist():
                yield f"row {row} (counted from 0)", value
                row += 1
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is a damaged {kind_of(path)} file: {str(error).splitlines()[0]}") from error


def open_bytes(path: Path) -> BinaryIO:
    """A file to read from, decompressed if its name ends in .gz, .zst, .bz2 or .lz4."""
    compression = _COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    return io.BufferedReader(pa.input_stream(str(path), compression=compression), _READ_BYTES)


def _decompressed(path: Path) -> bytes:
    with open_bytes(path) as file:
        return file.read()


def _load_from_hub(name: str, config_name: str | None, split: str, streaming: bool) -> AnyDataset:
    if not _HUB_ID.fullmatch(name) or Path(name).suffix.lower() in KIND_OF_EXTENSION:
        raise ValueError(
            f"{name!r} does not exist here and is no Hub id of the form 'owner/name': check the spelling."
        )
    try:
        return datasets.load_dataset(name, config_name, split=split, streaming=streaming)
    except Exception as error:
        raise ValueError(
            f"{name!r} does not exist here and could not be loaded from the Hub "
            f"(configuration {config_name!r}, split {split!r}): {first_line_of(error)}"
        ) from error


def _join(parts: list[AnyDataset], names: list[Source], text_column: str) -> AnyDataset:
    """Reduce every part to its one useful column and put them behind one another."""
    columns = [_text_column_of(_listed(names), column_names(part), text_column) for part in parts]
    if len(set(columns)) > 1:
        raise ValueError(_two_kinds(_listed(names), text_column))
    parts = [part if part.column_names == columns[:1] else part.select_columns(columns[:1]) for part in parts]
    joined = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    if isinstance(joined, datasets.Dataset) and len(joined) == 0:
        raise ValueError(f"{_listed(names)} holds no rows: a data set needs at least one document.")
    return joined


def _two_kinds(what: str, text_column: str) -> str:
    return (
        f"{what} holds both text ({text_column!r}) and tokenised data ('input_ids'): load them apart, "
        "tokenise the text, then join."
    )


def _slice(dataset: AnyDataset, split: str) -> AnyDataset:
    """Apply the part of a split name in brackets, with the meaning that `datasets` gives it."""
    name, _, has_slice = split.partition("[")
    if not has_slice:
        return dataset
    try:
        (piece,) = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(dataset)})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"split is {split!r}, which names no slice: write for example 'train[:10%]'.") from error
    return dataset.select(range(piece.from_ or 0, len(dataset) if piece.to is None else piece.to))


def _listed(names: list[Source]) -> str:
    return str(names[0]) if len(names) == 1 else f"the list from {names[0]} to {names[-1]}"


def first_line_of(error: BaseException) -> str:
    """An error in one line; what `datasets` hides behind "An error occurred while generating" is its cause."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def tokenize_documents(
    dataset: AnyDataset,
    tokenizer: PreTrainedTokenizerBase | None,
    text_column: str = "text",
    num_proc: int | None = None,
    document_start: str = "auto",
    document_end: str = "auto",
    vocab_size: int | None = None,
) -> AnyDataset:
    """Return `dataset` with the single column input_ids (int32), one row per document that is more than white space.

    A Dataset is written to the datasets cache, memory-mapped, and found there again by the next run with the same
    data and tokenizer; an IterableDataset is tokenised as it is read. A dataset that has input_ids passes through,
    whatever else it holds; only then may tokenizer be None (with document_end="none"). What this function returned,
    saved and loaded again, passes as it is, without a copy, and is refused with another tokenizer.
    document_start: "auto" is what the tokenizer puts before a text by itself (BOS, or nothing; nothing before ids),
    "none", or text that becomes tokens, "<s>" for example. document_end: the same; "auto" is EOS. Both are added
    where they are absent. vocab_size: ids must lie in [0, vocab_size); None checks only for negative ids. num_proc:
    processes for a Dataset, fewer for a small one; ignored for an IterableDataset.
    """
    columns = column_names(dataset)
    source_column = _text_column_of("the dataset", columns, text_column)
    is_tokenised = source_column == "input_ids"
    if tokenizer is None and (document_end != "none" or not is_tokenised):
        raise ValueError(
            "tokenizer is None: it may be left out only for data that has input_ids, together with "
            "document_end='none'."
        )
    record = record_of(dataset) if is_tokenised else {}
    ids_of_tokenizer = None if tokenizer is None else _fingerprint(tokenizer)
    if record and ids_of_tokenizer not in (None, record["tokenizer"]):
        raise ValueError("the ids were made by another tokenizer than the one given: tokenise the text again.")
    start, end = _edges(tokenizer, document_start, document_end, is_tokenised and not record)
    made = {"tokenizer": ids_of_tokenizer, "start": start, "end": end}
    if record and tokenizer is not None:
        for edge in ("start", "end"):
            if record[edge] and record[edge] != made[edge]:
                raise ValueError(
                    f"the ids were made with {record[edge]} at the {edge} of documents, and document_{edge} now means "
                    f"{made[edge]}: set it back, or tokenise the text again."
                )
        is_whole = record["of"] == _extent(dataset) and (record["start"], record["end"]) == (start, end)
        if is_whole and record["vocab_size"] and record["vocab_size"] <= (vocab_size or _INT32_LIMIT):
            return dataset
    arguments: dict[str, Any] = {"start": start, "end": end, "vocab_size": vocab_size}
    if not is_tokenised:
        arguments |= {"tokenizer": tokenizer, "text_column": text_column}
    options: dict[str, Any] = {
        "batched": True,
        "with_indices": True,
        "remove_columns": [source_column],
        "fn_kwargs": arguments,
        "features": datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
    }
    if isinstance(dataset, datasets.Dataset):
        bytes_of_document = dataset.data.nbytes // max(1, dataset.data.num_rows)
        size = max(1, min(1000, _BYTES_IN_MEMORY // 16 // max(1, bytes_of_document)))
        options |= {"num_proc": processes_for(dataset, num_proc), "batch_size": size, "writer_batch_size": size}
        options["desc"] = "Checking token ids" if is_tokenised else "Tokenizing documents"
    finished = (
        dataset.select_columns([source_column])
        .with_format(None)
        .map(_finish_ids if is_tokenised else _tokenize_texts, **options)
    )
    if isinstance(dataset, datasets.Dataset) and len(finished) < len(dataset):
        empty = len(dataset) - len(finished)
        logger.warning("%d of %d documents hold no text and are left out.", empty, len(dataset))
    if isinstance(finished, datasets.Dataset) and (record or not is_tokenised):
        known = (record if tokenizer is None else made) | {"vocab_size": vocab_size, "of": _extent(finished)}
        finished.info.description = json.dumps({_RECORD: known})
    return finished


_BYTES_OF_A_PROCESS = 1 << 24  # some seconds of work: a process takes about one to start


def processes_for(dataset: datasets.Dataset, asked: int | None) -> int | None:
    """Processes that are worth starting for a data set, at most `asked`; None is this one alone."""
    worth = min(asked or 1, len(dataset), dataset.data.nbytes // _BYTES_OF_A_PROCESS)
    return worth if worth > 1 else None


_RECORD = "hf_moe_cpt.tokenized"  # in the description of a data set: how its ids were made


def record_of(dataset: AnyDataset) -> dict[str, Any]:
    """How `tokenize_documents` made a data set, nothing for one that it did not make.

    tokenizer: its fingerprint; start, end: ids around every document; vocab_size; of: its rows and tokens then;
    num_bytes: of the text in UTF-8, where `count_bytes` was told of it and rows and tokens are the same.
    """
    try:
        record = json.loads(dataset.info.description or "{}").get(_RECORD, {})
    except (ValueError, RecursionError, AttributeError):  # a description by somebody else
        return {}
    if record and record["of"] != _extent(dataset):
        record.pop("num_bytes", None)
    return record


def _extent(dataset: AnyDataset) -> list[int] | None:
    """Rows and tokens; loading gives a data set another fingerprint. None for a stream, and for a selection."""
    if not isinstance(dataset, datasets.Dataset) or dataset._indices is not None:
        return None
    chunks = [chunk for chunk in dataset.data.column("input_ids").chunks if len(chunk)]
    return [len(dataset), sum(chunk.offsets[-1].as_py() - chunk.offsets[0].as_py() for chunk in chunks)]


def count_bytes(text: datasets.Dataset, text_column: str, tokenised: datasets.Dataset | None = None) -> int:
    """Bytes of a column of text in UTF-8, also written down with what was made of it."""
    pieces = text.select_columns([text_column]).with_format("arrow").iter(1000)
    num_bytes = sum(pc.sum(pc.binary_length(piece.column(text_column))).as_py() or 0 for piece in pieces)
    if tokenised is not None:
        tokenised.info.description = json.dumps({_RECORD: record_of(tokenised) | {"num_bytes": num_bytes}})
    return num_bytes


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """The same for tokenizers that give the same ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        known = json.dumps(sorted(tokenizer.get_vocab().items()))
    else:
        backend.no_truncation()
        backend.no_padding()
        known = backend.to_str()
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def _edges(
    tokenizer: PreTrainedTokenizerBase | None, document_start: str, document_end: str, is_tokenised: bool
) -> tuple[list[int], list[int]]:
    """Ids that begin and end every document."""
    edges = []
    for name, text in (("document_start", document_start), ("document_end", document_end)):
        if text == "none" or tokenizer is None or (name == "document_start" and text == "auto" and is_tokenised):
            edges.append([])
        elif text != "auto":
            edges.append(tokenizer(text, add_special_tokens=False)["input_ids"])
            if not edges[-1]:
                raise ValueError(f"{name}={text!r} is no token: give auto, none, or text that has tokens.")
        elif name == "document_start":
            plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
            starts = range(len(whole) - len(plain) + 1)
            edges.append(whole[: next((at for at in starts if whole[at : at + len(plain)] == plain), 0)])
        elif tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {type(tokenizer).__name__} has no EOS token to end documents: set "
                "tokenizer.eos_token, or document_end to its token or none."
            )
        else:
            edges.append([tokenizer.eos_token_id])
    return edges[0], edges[1]


def check_context(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, max_length: int) -> None:
    """Raise ValueError for a tokenizer with more tokens than the model has, and for rows beyond its context."""
    config = config.get_text_config()
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {config.vocab_size}: use the tokenizer that "
            "belongs to the model, --vocabulary extend, or model.resize_token_embeddings(len(tokenizer))."
        )
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise ValueError(
            f"max_length={max_length} is longer than the model's context of {context} tokens: lower max_length."
        )


def column_names(dataset: AnyDataset) -> list[str]:
    """Columns of a dataset; reads one row of a stream that does not declare them."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the streamed dataset is empty: it needs at least one document.")
    return list(first)


def _text_column_of(what: str, columns: list[str], text_column: str) -> str:
    """input_ids where it is among the columns, else text_column; refuses columns without both."""
    if "input_ids" not in columns and text_column not in columns:
        raise ValueError(
            f"{what} has neither {text_column!r} nor 'input_ids' but {columns}: name its text column in text_column."
        )
    return "input_ids" if "input_ids" in columns else text_column


def _tokenize_texts(
    batch: dict[str, list],
    rows: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    start: list[int],
    end: list[int],
    vocab_size: int | None,
) -> dict[str, list]:
    texts = batch[text_column]
    for row, text in zip(rows, texts, strict=True):
        if not isinstance(text, str):
            raise ValueError(
                f"row {row} (counted from 0) of column {text_column!r} is {_shorten(text)}, a {type(text).__name__} "
                "and not a string: remove or repair that row."
            )
    joined, size = [[] for _ in texts], 0
    group: list[tuple[int, str]] = []
    keeps_space = _keeps_space(tokenizer)
    for row, text in enumerate(texts):
        for piece in () if text.isspace() else _pieces(text, keeps_space):
            group.append((row, piece))
            size += len(piece)
            if size >= _CHARACTERS_AT_ONCE:
                _encode_group(tokenizer, group, joined)
                size = 0
    _encode_group(tokenizer, group, joined)
    none = np.empty(0, dtype=np.int64)
    documents = [np.concatenate(parts) if parts else none for parts in joined]
    return _finish_ids({"input_ids": documents}, rows, start=start, end=end, vocab_size=vocab_size)


def _encode_group(
    tokenizer: PreTrainedTokenizerBase, group: list[tuple[int, str]], joined: list[list[np.ndarray]]
) -> None:
    """Put the ids of each piece behind those of its row, and empty the group: ids take less room than encodings."""
    for (row, _), ids in zip(group, _encode(tokenizer, [piece for _, piece in group]), strict=True):
        joined[row].append(ids)
    group.clear()


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not hasattr(backend, "encode_batch_fast"):  # a tokenizer in Python
        found = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [np.asarray(ids, dtype=np.int64) for ids in found]
    backend.no_truncation()  # as the tokenizer itself does at every call; and the lists it makes cost more than ids
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
    return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encoded]


def _keeps_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a word's space is its own; a tokenizer that puts one before every text gets a later piece without."""
    once, twice = _encode(tokenizer, ["a", "a a"])
    return twice.tolist() != [*once.tolist(), *once.tolist()]


def _pieces(text: str, keeps_space: bool, length: int = 1 << 14) -> Iterator[str]:
    """The text in pieces of at most `length` characters, cut between two words where there are any.

    The time of a tokenizer grows faster than its text; cut so, the tokens stay those of the whole.
    """
    start = 0
    while len(text) - start > length:
        first, cut = start + length // 2, start + length
        cut = text.rfind(" ", first, cut)
        while cut > 0 and not (text[cut - 1].isalpha() and text[cut + 1].isalpha()):
            cut = text.rfind(" ", first, cut)
        is_between = cut > 0
        cut = cut if is_between else start + length
        yield text[start:cut]
        start = cut + 1 if is_between and not keeps_space else cut
    if start < len(text):
        yield text[start:]


def _finish_ids(
    batch: dict[str, list], rows: list[int], *, start: list[int], end: list[int], vocab_size: int | None
) -> dict[str, list]:
    """Check ids, drop documents without content, give the others their start and end exactly once."""
    documents = batch["input_ids"]
    limit = _INT32_LIMIT if vocab_size is None else vocab_size
    _check_ids(documents, rows, limit)
    for name, edge in (("start", start), ("end", end)):
        if edge and not 0 <= min(edge) <= max(edge) < limit:
            raise ValueError(
                f"the {name} of documents is {edge}, outside [0, {limit}): tokenizer and model disagree, use the "
                "model's tokenizer or resize its embeddings."
            )
    finished = []
    for document in documents:
        ids = np.asarray(document, dtype=np.int32)
        begins, ends = (ids[: len(start)].tolist() == start, ids[len(ids) - len(end) :].tolist() == end)
        if len(ids) > len(start) * begins + len(end) * ends:
            finished.append(np.concatenate([[] if begins else start, ids, [] if ends else end]).astype(np.int32))
    return {"input_ids": finished}


def _check_ids(documents: list, rows: list[int], limit: int) -> None:
    if documents and isinstance(documents[0], np.ndarray):
        ids_of_batch = np.concatenate(documents)
    else:
        ids_of_batch = _flat_ids(documents, rows)
    if ids_of_batch.size and (ids_of_batch.min() < 0 or ids_of_batch.max() >= limit):
        place = int(np.flatnonzero((ids_of_batch < 0) | (ids_of_batch >= limit))[0])
        ends = np.cumsum([len(ids) for ids in documents])
        row = rows[int(np.searchsorted(ends, place, side="right"))]
        raise ValueError(
            f"token id {ids_of_batch[place]} in row {row} (counted from 0) is outside [0, {limit}): tokenizer and "
            "model disagree, use the model's tokenizer or resize its embeddings."
        )


def _flat_ids(documents: list, rows: list[int]) -> np.ndarray:
    for row, ids in zip(rows, documents, strict=True):
        if not isinstance(ids, list) or any(not isinstance(token, int) for token in ids[:1]):
            raise ValueError(f"row {row} (counted from 0) of input_ids is {_shorten(ids)}, not a list of integers.")
    try:
        return np.fromiter(chain.from_iterable(documents), dtype=np.int64)
    except TypeError as error:
        raise ValueError(
            f"rows {rows[0]} to {rows[-1]} of input_ids hold something that is no integer: {error}."
        ) from None


def _shorten(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def check_file(path: Path, kind: str, text_column: str) -> str:
    """The useful column of a file: input_ids where it has it, else text_column.

    kind: text, json, csv, parquet or arrow. Raises UnreadFileError for a file that cannot be opened, is empty or not
    UTF-8, or has no rows, and ValueError for one that is damaged at its head or has neither column. Time does not grow
    with the size of the file, except for text.
    """
    try:
        with path.open("rb") as file:
            is_empty = not file.read(1)
    except OSError as error:
        message = f"cannot read {path}: {error.strerror or error}; check its permissions."
        raise UnreadFileError(message, "that cannot be opened") from error
    if is_empty:
        raise UnreadFileError(f"{path} is empty: remove it or put text into it.", "empty")
    try:
        if kind == "text":
            check_utf8(path)
            return text_column
        if kind in ("json", "csv"):
            columns = json_columns(path) if kind == "json" else _csv_of(path)[1]
        else:
            columns = _arrow_schema(path, kind).names
            if kind == "parquet" and pq.read_metadata(path).num_rows == 0:
                raise UnreadFileError(f"{path} holds no rows: remove it or put text into it.", "without rows")
    except OSError as error:  # of what decompresses
        raise ValueError(f"{path} is a damaged {path.suffix} file: {error}.") from error
    return _text_column_of(str(path), sorted(columns), text_column)


def check_utf8(path: Path) -> None:
    """Refuse a file with bytes that are not UTF-8, naming the first one's offset."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    with open_bytes(path) as file:
        while True:
            piece = file.read(_READ_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                place = offset - pending + error.start
                message = f"{path} is not UTF-8 text (byte {place}): convert or remove it."
                raise UnreadFileError(message, "not UTF-8") from None
            if not piece:
                return
            offset += len(piece)


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of each line of a JSON Lines file that is not blank; lines are counted from 1.

    Raises ValueError that names file and line for what is no object or no UTF-8, and for a file that cannot be read.
    """
    try:
        with open_bytes(path) as file:
            for number, line in enumerate(file, start=1):
                row = _parse_line(path, number, line)
                if row is not None:
                    yield number, row
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}; check the path.") from error


def json_columns(path: Path) -> list[str]:
    """Keys of the first object. Raises UnreadFileError for a file without one."""
    if _is_one_document(path):
        rows = _parse_document(path)
        first = rows[0] if rows else None
    else:
        first = next((row for _, row in json_lines(path)), None)
    if first is None:
        raise UnreadFileError(f"{path} holds only blank lines: remove it or put text into it.", "without rows")
    if not isinstance(first, dict):
        raise ValueError(f'{path} holds a JSON {type(first).__name__}, not objects such as {{"text": "..."}}.')
    return list(first)


def _is_one_document(path: Path) -> bool:
    """Whether a JSON file is an array or one object spread over lines, not an object per line."""
    with open_bytes(path) as file:
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
    except RecursionError:
        raise ValueError(f"{path}, line {number} is nested too deeply: put text and plain values into it.") from None
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


def _parse_document(path: Path) -> list[Any]:
    """The elements of a JSON array, or the one object."""
    try:
        content = json.loads(_decompressed(path))
    except UnicodeDecodeError:
        check_utf8(path)
        raise
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply: put text and plain values into it.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno} is not valid JSON ({error.msg}): repair it.") from None
    return content if isinstance(content, list) else [content]


def _arrow_schema(path: Path, kind: str) -> pa.Schema:
    try:
        return pq.read_schema(path) if kind == "parquet" else _arrow_reader(path).schema
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no readable {kind} file: {str(error).splitlines()[0]}") from error


def _arrow_reader(path: Path) -> pa.ipc.RecordBatchStreamReader | pa.ipc.RecordBatchFileReader:
    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source)


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    reader = _arrow_reader(path)
    if isinstance(reader, pa.ipc.RecordBatchStreamReader):
        yield from reader
    else:
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
