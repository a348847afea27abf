"""From text wherever it lies to token ids: load documents, tokenise them, say what is wrong with a file and where.

Loading itself is done by `datasets` and cached by it; `load_text_dataset` decides what a name means (a Hub id, a
folder from save_to_disk, folders and files of text, JSON, parquet or arrow) and, when something is wrong, says so in
one line. Local names never touch the network. `tokenize_documents` gives one row per document, each ending in EOS;
nothing else survives. `check_file` looks at the head of a file (for text, at all bytes); `find_damage` reads a whole
file, after `datasets` refused it or before it is streamed, and raises for the first damaged place. Source: ours.
"""

import codecs
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedConfig, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

Source = str | PathLike[str]
AnyDataset = datasets.Dataset | datasets.IterableDataset

KIND_OF_EXTENSION = {
    ".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
_EXTENSIONS = ", ".join(KIND_OF_EXTENSION)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_SPLIT_OF_NAME = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
                  "val": "validation", "dev": "validation", "test": "test", "eval": "test"}  # fmt: skip
_READ_BYTES = 1 << 20
_INT32_LIMIT = 1 << 31


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
    files left out; each .txt and .md file is one document.
    split: for the Hub and save_to_disk as usual, slices ("train[:1%]") included. In a folder, files called train,
    validation or test (train.jsonl, test-00000-of-00003.parquet, or below a folder of that name) belong to that split
    and all others to train; a file given by its own path is read whatever its name. config_name: for the Hub.
    """
    names = [name_or_path] if isinstance(name_or_path, (str, PathLike)) else list(name_or_path)
    if not names:
        raise ValueError("the list of data sets is empty: name at least one file, folder or Hub id.")
    split_name, _, has_slice = split.partition("[")
    if has_slice and streaming:
        raise ValueError(f"split is {split!r}: a stream cannot be sliced, use {split_name!r} or streaming=False.")
    files, parts = [], []
    for name in map(str, names):
        path = Path(name).expanduser()
        if path.is_dir() and _is_saved_dataset(path):
            parts.append(_load_saved(path, split_name, streaming))
        elif path.is_dir():
            files += _files_of_folder(path, split_name)
        elif path.exists():
            files.append(path)
        else:
            parts.append(_load_from_hub(name, config_name, split_name, streaming))
    for kind, paths in _group_by_kind(files, text_column).items():
        parts.append(_load_files(kind, paths, text_column, streaming))
    return _slice(_join(parts, names, text_column), split)


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


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    """Readable files below a folder that belong to a split, in a fixed order."""
    found = sorted(
        path for path in folder.rglob("*")
        if path.suffix.lower() in KIND_OF_EXTENSION and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )  # fmt: skip
    if not found:
        raise ValueError(f"the folder {folder} holds no data: looked for {_EXTENSIONS} files, also in its subfolders.")
    split_of_file = {path: _split_of(path.relative_to(folder)) for path in found}
    wanted = _SPLIT_OF_NAME.get(split, split)
    chosen = [path for path in found if split_of_file[path] == wanted]
    if not chosen:
        raise ValueError(f"the folder {folder} has the splits {sorted(set(split_of_file.values()))}, not {split!r}.")
    if len(chosen) < len(found):
        others = sorted(set(split_of_file.values()) - {wanted})
        logger.info(
            "%s: %d of %d files belong to %s and are left out", folder, len(found) - len(chosen), len(found), others
        )
    return chosen


def _split_of(relative: Path) -> str:
    """The split that a folder or file name stands for; "train" where no name says anything."""
    for name in (*relative.parts[:-1], relative.stem):
        plain = re.sub(r"-\d+-of-\d+.*$", "", name.lower())
        if plain in _SPLIT_OF_NAME:
            return _SPLIT_OF_NAME[plain]
    return "train"


def _group_by_kind(files: list[Path], text_column: str) -> dict[str, list[Path]]:
    """Check every file without reading it whole, then group by the loader that reads it."""
    groups: dict[str, list[Path]] = {}
    for path in dict.fromkeys(files):
        kind = KIND_OF_EXTENSION.get(path.suffix.lower())
        if kind is None:
            raise ValueError(f"{path} has the extension {path.suffix!r}: known are {_EXTENSIONS}.")
        check_file(path, kind, text_column)
        groups.setdefault(kind, []).append(path)
    return groups


def _load_files(kind: str, paths: list[Path], text_column: str, streaming: bool) -> AnyDataset:
    options = {}
    if kind == "text":  # one document per file, under the column name that the caller works with
        features = datasets.Features({text_column: datasets.Value("string")})
        options = {"sample_by": "document", "features": features}
    if kind == "json" and streaming:  # a bad line would stop a stream hours into training
        for path in paths:
            find_damage(path, kind)
    data_files = {"train": [str(path.resolve()) for path in paths]}
    try:
        with _quiet_loader(kind):
            return datasets.load_dataset(kind, data_files=data_files, split="train", streaming=streaming, **options)
    except Exception as error:
        for path in paths:
            find_damage(path, kind)
        where = paths[0] if len(paths) == 1 else f"{len(paths)} files from {paths[0]} to {paths[-1]}"
        raise ValueError(f"datasets cannot read {where} as {kind}: {first_line_of(error)}") from error


@contextmanager
def _quiet_loader(kind: str) -> Iterator[None]:
    """Keep a loader from printing the error that we are about to raise with its file and line."""
    loader = logging.getLogger(f"datasets.packaged_modules.{kind}.{kind}")
    level = loader.level
    loader.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        loader.setLevel(level)


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
        raise ValueError(
            f"{_listed(names)} holds both text ({text_column!r}) and tokenised data ('input_ids'): load them apart, "
            "tokenise the text, then join."
        )
    parts = [part.select_columns([columns[0]]) for part in parts]
    joined = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    if isinstance(joined, datasets.Dataset) and len(joined) == 0:
        raise ValueError(f"{_listed(names)} holds no rows: a data set needs at least one document.")
    return joined


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
    add_eos: bool = True,
    vocab_size: int | None = None,
) -> AnyDataset:
    """Return `dataset` with the single column input_ids (int32), one row per non-empty document.

    A Dataset is written to the datasets cache, memory-mapped, and found there again by the next run with the same
    data and tokenizer; an IterableDataset is tokenised as it is read. A dataset that has input_ids passes through,
    whatever else it holds, with EOS appended where it is absent; only then may tokenizer be None (with add_eos=False).
    The tokenizer adds no special tokens; EOS comes from us. vocab_size: ids must lie in [0, vocab_size); None checks
    only for negative ids. num_proc: processes for a Dataset, ignored for an IterableDataset.
    """
    columns = column_names(dataset)
    source_column = _text_column_of("the dataset", columns, text_column)
    is_tokenised = source_column == "input_ids"
    if tokenizer is None and (add_eos or not is_tokenised):
        raise ValueError(
            "tokenizer is None: it may be left out only for data that has input_ids, together with add_eos=False."
        )
    eos_id = tokenizer.eos_token_id if add_eos else None
    if add_eos and eos_id is None:
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} has no EOS token to end documents: set tokenizer.eos_token."
        )
    arguments: dict[str, Any] = {"eos_id": eos_id, "vocab_size": vocab_size}
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
        options |= {"num_proc": num_proc, "desc": "Checking token ids" if is_tokenised else "Tokenizing documents"}
    return (
        dataset.select_columns([source_column])
        .with_format(None)
        .map(_finish_ids if is_tokenised else _tokenize_texts, **options)
    )


def check_context(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None, max_length: int) -> None:
    """Raise ValueError for a tokenizer with more tokens than the model has, and for rows beyond its context."""
    config = config.get_text_config()
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {config.vocab_size}: use the tokenizer that "
            "belongs to the model, or model.resize_token_embeddings(len(tokenizer))."
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
    eos_id: int | None,
    vocab_size: int | None,
) -> dict[str, list]:
    texts = batch[text_column]
    for row, text in zip(rows, texts, strict=True):
        if not isinstance(text, str):
            raise ValueError(
                f"row {row} (counted from 0) of column {text_column!r} is {_shorten(text)}, a {type(text).__name__} "
                "and not a string: remove or repair that row."
            )
    # verbose=False: a document longer than the model's context is cut into blocks later, so its length is no warning.
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return _finish_ids({"input_ids": encoded["input_ids"]}, rows, eos_id=eos_id, vocab_size=vocab_size)


def _finish_ids(
    batch: dict[str, list], rows: list[int], *, eos_id: int | None, vocab_size: int | None
) -> dict[str, list]:
    """Check ids, drop documents without content, end the others in EOS exactly once."""
    documents = batch["input_ids"]
    _check_ids(documents, rows, _INT32_LIMIT if vocab_size is None else vocab_size)
    if eos_id is None:
        return {"input_ids": [ids for ids in documents if len(ids)]}
    filled = [ids for ids in documents if len(ids) > 1 or (len(ids) == 1 and ids[0] != eos_id)]
    if filled and vocab_size is not None and not 0 <= eos_id < vocab_size:
        raise ValueError(
            f"the tokenizer's EOS is id {eos_id}, outside [0, {vocab_size}): tokenizer and model disagree, "
            "use the model's tokenizer or resize its embeddings."
        )
    return {"input_ids": [ids if ids[-1] == eos_id else [*ids, eos_id] for ids in filled]}


def _check_ids(documents: list, rows: list[int], limit: int) -> None:
    for row, ids in zip(rows, documents, strict=True):
        if not isinstance(ids, list) or any(not isinstance(token, int) for token in ids[:1]):
            raise ValueError(f"row {row} (counted from 0) of input_ids is {_shorten(ids)}, not a list of integers.")
    try:
        ids_of_batch = np.fromiter(chain.from_iterable(documents), dtype=np.int64)
    except TypeError as error:
        raise ValueError(
            f"rows {rows[0]} to {rows[-1]} of input_ids hold something that is no integer: {error}."
        ) from None
    if ids_of_batch.size and (ids_of_batch.min() < 0 or ids_of_batch.max() >= limit):
        place = int(np.flatnonzero((ids_of_batch < 0) | (ids_of_batch >= limit))[0])
        ends = np.cumsum([len(ids) for ids in documents])
        row = rows[int(np.searchsorted(ends, place, side="right"))]
        raise ValueError(
            f"token id {ids_of_batch[place]} in row {row} (counted from 0) is outside [0, {limit}): tokenizer and "
            "model disagree, use the model's tokenizer or resize its embeddings."
        )


def _shorten(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."


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
    columns = json_columns(path) if kind == "json" else _arrow_schema(path, kind).names
    if columns is not None:
        _text_column_of(str(path), sorted(columns), text_column)
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


def json_columns(path: Path) -> list[str] | None:
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


def _parse_document(path: Path) -> None:
    try:
        json.loads(path.read_bytes())
    except UnicodeDecodeError:
        check_utf8(path)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply: put text and plain values into it.") from None
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
