"""Keep a built corpus on disk: complete and unchanged, or not used. Source: ours.

Layout: <cache_dir>/<key>/<domain>/<side>.arrow and manifest.json with a checksum of every file. The folder appears by
one rename, so a killed run leaves nothing that looks finished.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
from datasets import Dataset


Corpus = dict[str, dict[str, Dataset]]
MANIFEST = "manifest.json"


def load_corpus(cache_dir: Path, key: str) -> Corpus | None:
    """The corpus stored under the key, or None if there is none or any file of it is missing or altered."""
    folder = cache_dir / key
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not manifest["checksums"].items() <= _checksums(folder).items():  # `datasets` adds files of its own
            return None
        return {
            domain: {side: Dataset.from_file(str(folder / domain / f"{side}.arrow")) for side in sides}
            for domain, sides in manifest["domains"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def save_corpus(corpus: Corpus, cache_dir: Path, key: str) -> None:
    """Store a corpus under the key, in place of a damaged one; of two processes that do so the last one stays."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=cache_dir))
    try:
        for domain, sides in corpus.items():
            for side, dataset in sides.items():
                _write_arrow(dataset, unfinished / domain / f"{side}.arrow")
        domains = {domain: list(sides) for domain, sides in corpus.items()}
        manifest = {"domains": domains, "checksums": _checksums(unfinished)}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        shutil.rmtree(cache_dir / key, ignore_errors=True)
        os.replace(unfinished, cache_dir / key)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_arrow(dataset: Dataset, path: Path) -> None:
    """The dataset's table as an arrow stream, which `Dataset.from_file` maps into memory."""
    path.parent.mkdir(exist_ok=True)
    table = dataset.data.table
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below the folder except the manifest, by path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
