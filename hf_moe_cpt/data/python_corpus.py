"""Real text that every machine with this package has: English and code of its Python installation. Source: ours.

Prose is docstrings, help topics and package descriptions; code is the sources without docstrings and comments. Files
are visited in a pseudo-random order of their names and the seed, so that any size limit takes a cross-section.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from tqdm.auto import tqdm

from hf_moe_cpt.data.corpus_builder import SIDES, CorpusBuilder
from hf_moe_cpt.data.corpus_cache import Corpus, load_corpus, save_corpus
from hf_moe_cpt.data.python_files import PythonFile, installation_roots, list_files, stable_fraction


CORPUS_VERSION = 1  # part of the cache key: raise it whenever the same files would give other text
SMALLEST_LIMIT = 1_000  # characters


def build_python_corpus(
    *,
    max_characters_per_domain: int = 8_000_000,
    held_out_fraction: float = 0.05,
    seed: int = 0,
    roots: Sequence[str | Path] | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Corpus:
    """Two domains of text, each split by file: {"prose": {"train": ..., "held_out": ...}, "code": {...}}.

    max_characters_per_domain: train and held-out together; a side ends with the document that fills it.
    held_out_fraction: in (0, 1), of the files and of the characters; a file's prose and code lie on the same side.
    roots: folders to read instead of this Python's; cache_dir: where to keep the result (None: nowhere).
    Returns datasets with columns `text` and `path` (the file's name inside its root); no text is in two of them.
    Raises ValueError for limits out of range, roots that are no folders, and roots without prose or code on some side.
    """
    if max_characters_per_domain < SMALLEST_LIMIT:
        raise ValueError(
            f"max_characters_per_domain={max_characters_per_domain} holds no document: pass at least {SMALLEST_LIMIT}."
        )
    if not 0.0 < held_out_fraction < 1.0:
        raise ValueError(f"held_out_fraction={held_out_fraction} must lie between 0 and 1: pass for example 0.05.")
    folders = installation_roots() if roots is None else [_existing_folder(root) for root in roots]
    files = list_files(folders)
    key = _cache_key(files, max_characters_per_domain, held_out_fraction, seed)
    cached = None if cache_dir is None else load_corpus(Path(cache_dir), key)
    if cached is not None:
        return cached
    builder = CorpusBuilder(max_characters_per_domain, held_out_fraction, seed)
    _fill(builder, sorted(files, key=lambda file: stable_fraction(file.name, seed, "order")), progress)
    corpus = _to_datasets(builder, folders)
    if cache_dir is not None:
        save_corpus(corpus, Path(cache_dir), key)
    return corpus


def _existing_folder(root: str | Path) -> Path:
    if not Path(root).is_dir():
        raise ValueError(f"roots holds {str(root)!r}, which is no folder: pass folders with Python sources.")
    return Path(root)


def _cache_key(files: list[PythonFile], limit: int, held_out_fraction: float, seed: int) -> str:
    """Name of the cache folder: changes with a file's name or size, an argument, or the Python version."""
    digest = hashlib.sha256(f"{CORPUS_VERSION} {limit} {held_out_fraction} {seed} {sys.version_info[:2]}\n".encode())
    for file in files:
        digest.update(f"{file.name}\0{file.size}\n".encode())
    return f"python-corpus-{digest.hexdigest()[:16]}"


def _fill(builder: CorpusBuilder, files: list[PythonFile], progress: bool) -> None:
    """Visit files until every side of every domain is full, then drop what leaked into held-out."""
    total = sum(sum(domain.limits.values()) for domain in (builder.prose, builder.code))
    title = "reading the Python installation"
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=not progress) as bar:
        for file in files:
            bar.update(min(builder.add_file(file), total - bar.n))
            if builder.is_full():
                break
    for domain in (builder.prose, builder.code):
        domain.drop_leaked_documents()


def _to_datasets(builder: CorpusBuilder, folders: list[Path]) -> Corpus:
    """The builder's documents as datasets; refuses a side that stayed empty."""
    corpus: Corpus = {}
    for name, domain in (("prose", builder.prose), ("code", builder.code)):
        for side in SIDES:
            if not domain.documents[side]:
                where = ", ".join(map(str, folders)) or "no folder"
                raise ValueError(f"no {name} for {side} found in {where}: give larger roots.")
        corpus[name] = {side: Dataset.from_list(domain.documents[side]) for side in SIDES}
    return corpus
