"""Open text wherever it lies: a Hub id, a folder from save_to_disk, folders and files of text, JSON, parquet or arrow.

Loading itself is done by `datasets` and cached by it; this module decides what a name means and, when something is
wrong, says so in one line. Local names never touch the network. Source: ours.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import datasets

from hf_moe_cpt.data.file_checks import check_file, find_damage
from hf_moe_cpt.data.tokenization import column_names


logger = logging.getLogger(__name__)

KIND_OF_EXTENSION = {
    ".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
_EXTENSIONS = ", ".join(KIND_OF_EXTENSION)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_SPLIT_OF_NAME = {"train": "train", "training": "train", "validation": "validation", "valid": "validation",
                  "val": "validation", "dev": "validation", "test": "test", "eval": "test"}  # fmt: skip

Source = str | PathLike[str]


def load_text_dataset(
    name_or_path: Source | Sequence[Source],
    *,
    split: str = "train",
    streaming: bool = False,
    text_column: str = "text",
    config_name: str | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
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


def _load_saved(folder: Path, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise ValueError(f"cannot read the saved dataset {folder}: {_first_line(error)}") from error
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


def _load_files(
    kind: str, paths: list[Path], text_column: str, streaming: bool
) -> datasets.Dataset | datasets.IterableDataset:
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
        raise ValueError(f"datasets cannot read {where} as {kind}: {_first_line(error)}") from error


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


def _load_from_hub(
    name: str, config_name: str | None, split: str, streaming: bool
) -> datasets.Dataset | datasets.IterableDataset:
    if not _HUB_ID.fullmatch(name) or Path(name).suffix.lower() in KIND_OF_EXTENSION:
        raise ValueError(
            f"{name!r} does not exist here and is no Hub id of the form 'owner/name': check the spelling."
        )
    try:
        return datasets.load_dataset(name, config_name, split=split, streaming=streaming)
    except Exception as error:
        raise ValueError(
            f"{name!r} does not exist here and could not be loaded from the Hub "
            f"(configuration {config_name!r}, split {split!r}): {_first_line(error)}"
        ) from error


def _join(
    parts: list[datasets.Dataset | datasets.IterableDataset], names: list[Source], text_column: str
) -> datasets.Dataset | datasets.IterableDataset:
    """Reduce every part to its one useful column and put them behind one another."""
    kept = []
    for part in parts:
        columns = column_names(part)
        column = "input_ids" if "input_ids" in columns else text_column
        if column not in columns:
            raise ValueError(
                f"{_listed(names)} has neither {text_column!r} nor 'input_ids' but {columns}: name its text column in "
                "text_column."
            )
        kept.append((column, part.select_columns([column])))
    if len({column for column, _ in kept}) > 1:
        raise ValueError(
            f"{_listed(names)} holds both text ({text_column!r}) and tokenised data ('input_ids'): load them apart, "
            "tokenise the text, then join."
        )
    joined = [part for _, part in kept]
    joined = joined[0] if len(joined) == 1 else datasets.concatenate_datasets(joined)
    if isinstance(joined, datasets.Dataset) and len(joined) == 0:
        raise ValueError(f"{_listed(names)} holds no rows: a data set needs at least one document.")
    return joined


def _slice(
    dataset: datasets.Dataset | datasets.IterableDataset, split: str
) -> datasets.Dataset | datasets.IterableDataset:
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


def _first_line(error: BaseException) -> str:
    """An error in one line; what `datasets` hides behind "An error occurred while generating" is its cause."""
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
