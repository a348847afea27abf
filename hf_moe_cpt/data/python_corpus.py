"""Real text that every machine with this package has, a user's own in its place, and a tokenizer trained on either.

`build_python_corpus` makes two domains of a Python installation: prose is docstrings, help topics and package
descriptions; code is the sources without docstrings and comments. Files are visited in a pseudo-random order of their
names and the seed, so that any size limit takes a cross-section. A file is known by its path inside its root
("json/decoder.py", "torch/nn/functional.py"), never by where the root lies, so the same packages give the same order
and the same train and held-out sides on any machine. Prose is cleaned by paragraph: code, doctests, tables and
licences go, sentences and descriptions of parameters stay. `load_folder_corpus` makes two domains of a user's folder.

A cached corpus lies in <cache_dir>/<key>/<domain>/<side>.arrow beside a manifest.json with a checksum of every file.
The folder appears by one rename, so a killed run leaves nothing that looks finished; what was altered is not used.
Source: ours; the tokenizer is GPT-2's scheme, byte-level BPE.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import types
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from hf_moe_cpt.data.text import load_text_dataset


Corpus = dict[str, dict[str, Dataset]]
SIDES = ("train", "held_out")
CORPUS_VERSION = 1  # part of the cache key: raise it whenever the same files would give other text
MANIFEST = "manifest.json"

# Characters, unless something else is said.
MIN_LIMIT = 1_000  # of a domain of build_python_corpus
MIN_DOMAIN = 20_000  # of load_folder_corpus: less gives no held-out text worth measuring
MAX_DOCUMENT = 10_000  # of load_folder_corpus: a book in one file must still have train and held-out parts
MAX_PACKAGE_SHARE = 0.15  # of a domain: no package's voice may be the domain's
MAX_OVERLAP = 0.4  # of a document's shingles with all earlier ones of its domain
MAX_LEAK = 0.1  # of a held-out document's shingles with all of train
MIN_PROSE, MAX_PROSE = 300, 20_000  # of a file's docstrings; longer files are split between docstrings
MIN_UNIQUE_PARAGRAPH = 60  # shorter ones ("Parameters") may repeat
MIN_DOCSTRING = 40  # once cleaned
MIN_LETTERS_OF_PROSE = 0.82  # share of letters and spaces in a paragraph; English lies near 0.95
MIN_CODE = 300
MAX_CODE_LINE, MAX_MEAN_CODE_LINE = 400, 100
MIN_LETTERS_OF_CODE = 0.5  # share of the visible characters; tables of numbers and escapes lie below

EOS_TOKEN, PAD_TOKEN = "<|endoftext|>", "<|pad|>"
NUM_BYTES = 256
MIN_VOCABULARY = NUM_BYTES + 2  # every byte and the two special tokens
# Words with the space before them, up to three digits, runs of marks, runs of space: the cut of Llama 3 and GPT-4.
# Unlike GPT-2's it keeps a line break and the indentation after it in few pieces, which code is full of.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


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
    if max_characters_per_domain < MIN_LIMIT:
        raise ValueError(
            f"max_characters_per_domain={max_characters_per_domain} holds no document: pass at least {MIN_LIMIT}."
        )
    _check_fraction(held_out_fraction)
    for root in roots or ():
        if not Path(root).is_dir():
            raise ValueError(f"roots holds {str(root)!r}, which is no folder: pass folders with Python sources.")
    folders = installation_roots() if roots is None else list(map(Path, roots))
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


def _check_fraction(held_out_fraction: float) -> None:
    if not 0.0 < held_out_fraction < 1.0:
        raise ValueError(f"held_out_fraction={held_out_fraction} must lie between 0 and 1: pass for example 0.05.")


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


def load_folder_corpus(data_dir: str | Path, *, held_out_fraction: float = 0.05, seed: int = 0) -> Corpus:
    """Two domains from the two subfolders of a folder: {name: {"train": ..., "held_out": ...}}, the old domain first.

    data_dir: holds exactly two subfolders. They are taken in the order of their names (`1-english`, `2-python`), but
    `old` comes before `new`. Each holds .txt, .jsonl, .parquet or arrow files as `load_text_dataset` reads them.
    held_out_fraction: in (0, 1); a document's own text decides its side. Long ones are cut to pieces first, copies
    and near copies dropped.
    Raises ValueError for a folder that is missing, has other than two subfolders, or holds too little text.
    """
    _check_fraction(held_out_fraction)
    return {folder.name: _load_domain(folder, held_out_fraction, seed) for folder in _domain_folders(data_dir)}


def _domain_folders(data_dir: str | Path) -> list[Path]:
    """The two subfolders of a user's folder, the old domain first."""
    data_dir = Path(data_dir)
    remedy = "give a folder with two subfolders of text, the older first by name, for example 1-english and 2-python."
    if not data_dir.is_dir():
        raise ValueError(f"data_dir={str(data_dir)!r} is no folder: {remedy}")
    names = sorted(path.name for path in data_dir.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(names) != 2:
        raise ValueError(f"data_dir={str(data_dir)!r} has {len(names)} subfolders ({', '.join(names)}): {remedy}")
    names = ["old", "new"] if set(names) == {"old", "new"} else names
    return [data_dir / name for name in names]


def _load_domain(folder: Path, held_out_fraction: float, seed: int) -> dict[str, Dataset]:
    """One domain, split by the text of its documents so that their order and file names do not matter."""
    dataset = load_text_dataset(str(folder))
    if "text" not in dataset.column_names:
        raise ValueError(f"{str(folder)!r} holds tokens and not text: give the text, the tokenizer is trained on it.")
    pieces = (piece for text in dataset["text"] if text for piece in cut_to_pieces(text, MAX_DOCUMENT))
    texts = [piece for piece in pieces if piece.strip()]
    characters = sum(map(len, texts))
    if characters < MIN_DOMAIN:
        raise ValueError(
            f"{str(folder)!r} holds {characters} characters of text and a domain needs {MIN_DOMAIN}: add files."
        )
    texts.sort(key=lambda text: stable_fraction(content_key(text).hex(), seed, "side"))
    num_held_out = max(1, round(held_out_fraction * len(texts)))
    domain = Domain(limits=dict.fromkeys(SIDES, characters))
    for position, text in enumerate(texts):
        domain.add("held_out" if position < num_held_out else "train", folder.name, folder.name, text)
    domain.drop_leaked_documents()
    for side in SIDES:
        if not domain.documents[side]:
            raise ValueError(
                f"{str(folder)!r} leaves no text for {side} once copies are dropped: add text, or change "
                f"held_out_fraction={held_out_fraction}."
            )
    return {side: Dataset.from_list(domain.documents[side]) for side in SIDES}


def cut_to_pieces(text: str, longest: int) -> list[str]:
    """The text in pieces of at most `longest` characters, cut after a line break if possible; none is lost."""
    pieces, start = [], 0
    while len(text) - start > longest:
        end = text.rfind("\n", start, start + longest) + 1 or start + longest
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def train_byte_level_bpe(
    texts: Iterable[str], vocab_size: int, *, model_max_length: int = 2048, progress: bool = True
) -> PreTrainedTokenizerFast:
    """A fast tokenizer with exactly `vocab_size` entries, or fewer if the texts are too few to give that many.

    EOS is token 0 and PAD token 1; encoding adds neither, nor a space in front. The same texts in the same order give
    the same tokenizer. model_max_length: in tokens, stored for the models trained with it.
    Raises ValueError if vocab_size leaves no room for all bytes, or if there is no text.
    """
    if vocab_size < MIN_VOCABULARY:
        raise ValueError(
            f"vocab_size={vocab_size} has no room for {NUM_BYTES} bytes and 2 special tokens: "
            f"pass at least {MIN_VOCABULARY}."
        )
    if model_max_length < 1:
        raise ValueError(f"model_max_length={model_max_length} must be at least 1 token.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in (EOS_TOKEN, PAD_TOKEN)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(_non_empty(texts), trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def _non_empty(texts: Iterable[str]) -> Iterable[str]:
    """The texts as they are; refuses an iterable without a single character."""
    found = False
    for text in texts:
        found = found or bool(text)
        yield text
    if not found:
        raise ValueError("there is no text to train the tokenizer on: pass at least one non-empty string.")


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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
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


@dataclass
class Domain:
    """The documents of one domain, with what is still allowed; sizes in characters."""

    limits: dict[str, int]
    documents: dict[str, list[dict[str, str]]] = field(default_factory=lambda: {side: [] for side in SIDES})
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 0))
    package_sizes: Counter[tuple[str, str]] = field(default_factory=Counter)
    _marks: dict[str, list[np.ndarray]] = field(default_factory=lambda: {side: [] for side in SIDES})
    _keys: set[bytes] = field(default_factory=set)
    _shingles: set[int] = field(default_factory=set)

    def wants(self, side: str, package: str) -> bool:
        """Whether the side has room, and the package has not had its share of it."""
        quota = MAX_PACKAGE_SHARE * self.limits[side]
        return self.sizes[side] < self.limits[side] and self.package_sizes[side, package] < quota

    def add(self, side: str, package: str, name: str, text: str) -> int:
        """Add a document unless it is a copy or half a copy of an earlier one; returns the characters added."""
        marks, key = shingles(text), content_key(text)
        if key in self._keys:
            return 0
        self._keys.add(key)
        if overlap(marks, self._shingles) > MAX_OVERLAP:
            return 0
        self._shingles.update(marks.tolist())
        self._marks[side].append(marks)
        self.documents[side].append({"text": text, "path": name})
        self.sizes[side] += len(text)
        self.package_sizes[side, package] += len(text)
        return len(text)

    def drop_leaked_documents(self) -> None:
        """Drop held-out documents that share passages with train, all its documents together."""
        train = {mark for marks in self._marks["train"] for mark in marks.tolist()}
        held_out = zip(self.documents["held_out"], self._marks["held_out"], strict=True)
        self.documents["held_out"] = [row for row, marks in held_out if overlap(marks, train) <= MAX_LEAK]


class CorpusBuilder:
    """Reads files one by one in the order given and adds their prose and code to the side their name decides."""

    def __init__(self, max_characters_per_domain: int, held_out_fraction: float, seed: int) -> None:
        self.held_out_fraction, self.seed = held_out_fraction, seed
        held_out = int(max_characters_per_domain * held_out_fraction)
        limits = {"train": max_characters_per_domain - held_out, "held_out": held_out}
        self.prose, self.code = Domain(dict(limits)), Domain(dict(limits))
        self._paragraphs: set[bytes] = set()

    def side_of(self, name: str) -> str:
        """The side of a file, from its name and the seed alone."""
        return "held_out" if stable_fraction(name, self.seed, "side") < self.held_out_fraction else "train"

    def is_full(self) -> bool:
        """Whether no side of no domain has room left."""
        domains = (self.prose, self.code)
        return all(domain.sizes[side] >= domain.limits[side] for domain in domains for side in SIDES)

    def add_file(self, file: PythonFile) -> int:
        """Add what a file has to give; returns the characters added, 0 for one unreadable, unparsable or unwanted."""
        side = self.side_of(file.name)
        wants_prose, wants_code = self.prose.wants(side, file.package), self.code.wants(side, file.package)
        if not (wants_prose or wants_code):
            return 0
        try:
            source = file.location.read_bytes().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        except (OSError, UnicodeDecodeError):
            return 0
        if file.name.endswith("METADATA"):
            return self._add_prose(side, file, file.name, [source.partition("\n\n")[2]]) if wants_prose else 0
        if file.name == _TOPICS:
            return self._add_topics(file, source) if wants_prose else 0
        tree = _compiled(source, ast.PyCF_ONLY_AST) if wants_code and not is_generated(source) else None
        added = self._add_prose(side, file, file.name, docstrings(source)) if wants_prose else 0
        return added + (self._add_code(side, file, source, tree) if tree is not None else 0)

    def _add_topics(self, file: PythonFile, source: str) -> int:
        """Every topic counts as a file of its own; together they would be a tenth of the prose on one side."""
        tree, added = _compiled(source, ast.PyCF_ONLY_AST), 0
        topics = {} if tree is None else topic_texts(tree)
        for topic, text in sorted(topics.items()):
            name = f"{file.name}#{topic}"
            added += self._add_prose(self.side_of(name), file, name, [text])
        return added

    def _add_prose(self, side: str, file: PythonFile, name: str, texts: list[str]) -> int:
        """Clean the texts, drop paragraphs that stood in an earlier file, and join the rest to documents."""
        added, waiting, size = 0, [], 0
        for text in [*texts, None]:
            if text is None or size > MAX_PROSE:
                document = "\n\n".join(waiting)
                if len(document) >= MIN_PROSE:
                    added += self.prose.add(side, file.package, name, document + "\n")
                waiting, size = [], 0
            paragraphs = [] if text is None else [p for p in clean_paragraphs(text) if self._is_new_paragraph(p)]
            waiting += paragraphs
            size += sum(map(len, paragraphs))
        return added

    def _is_new_paragraph(self, paragraph: str) -> bool:
        key = content_key(paragraph)
        is_new = len(paragraph) < MIN_UNIQUE_PARAGRAPH or key not in self._paragraphs
        self._paragraphs.add(key)
        return is_new

    def _add_code(self, side: str, file: PythonFile, source: str, tree: ast.Module) -> int:
        code = strip_docstrings_and_comments(source, tree)
        if code is None or not is_worth_learning(code) or contains_licence_text(code):
            return 0
        return self.code.add(side, file.package, file.name, code)


# Test code repeats itself, and vendored packages repeat others.
_SKIPPED_FOLDERS = frozenset(
    "__pycache__ site-packages dist-packages test tests testing _testing idle_test _vendor vendor _vendored vendored "
    "_distutils node_modules hf_moe_cpt".split()
)
_SKIPPED_FILES = re.compile(r"^(test_.*|.*_test|conftest|_sysconfigdata_.*)\.py$")
MAX_FILE_BYTES = 300_000  # bytes; beyond it a source is nearly always a table
_DEPENDENCIES = ("torch", "transformers", "datasets", "accelerate", "numpy")  # installed wherever this package is


@dataclass(frozen=True)
class PythonFile:
    """One file of the installation: where it is, its name inside its root, its size in bytes."""

    location: Path
    name: str
    size: int

    @property
    def package(self) -> str:
        """First part of the name: the unit that the quota per package counts."""
        return self.name.split("/", 1)[0]


def installation_roots() -> list[Path]:
    """Standard library first, then the folders of installed packages: the interpreter's and our dependencies'."""
    candidates = [sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    specs = (importlib.util.find_spec(name) for name in _DEPENDENCIES)
    candidates += [str(Path(spec.origin).parent.parent) for spec in specs if spec is not None and spec.origin]
    return list(dict.fromkeys(Path(path).resolve() for path in candidates if os.path.isdir(path)))


def list_files(roots: Iterable[Path]) -> list[PythonFile]:
    """Sources and package descriptions below the roots, sorted by name; the first root that has a name wins."""
    found: dict[str, PythonFile] = {}
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS)
            inside = os.path.relpath(folder, root).replace(os.sep, "/").removeprefix(".").removeprefix("/")
            for name in names:
                label = _label(inside, name)
                location = os.path.join(folder, name)
                if label is not None and label not in found and os.path.isfile(location):
                    size = os.path.getsize(location)
                    if 0 < size <= MAX_FILE_BYTES:
                        found[label] = PythonFile(Path(location), label, size)
    return [found[name] for name in sorted(found)]


def _label(folder: str, name: str) -> str | None:
    """Name of a file in the listing, or None if it is of no use; descriptions lose their folder's version."""
    if folder.endswith(".dist-info"):
        return f"{folder.split('-', 1)[0].lower()}/METADATA" if name == "METADATA" else None
    if not name.endswith(".py") or _SKIPPED_FILES.match(name):
        return None
    return f"{folder}/{name}" if folder else name


def stable_fraction(name: str, seed: int, purpose: str) -> float:
    """Number in [0, 1) that depends on name, seed and purpose alone: no process, platform or listing enters."""
    digest = hashlib.blake2b(f"{purpose}:{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


LITERAL = (
    r'"""(?:[^"\\]|\\.|"(?!""))*"""'
    "|"
    r"'''(?:[^'\\]|\\.|'(?!''))*'''"
    "|"
    r'"(?:[^"\\\n]|\\.)*"'
    "|"
    r"'(?:[^'\\\n]|\\.)*'"
)
_BLANK_LINES = r"(?:[ \t]*(?:\#[^\n]*)?\n)*[ \t]*"
_DOCSTRING = re.compile(
    rf"(?:\A|:[ \t]*(?:\#[^\n]*)?\n){_BLANK_LINES}(?P<docstring>[rRuU]?(?:{LITERAL}))[ \t]*(?=[\n\#;]|\Z)"
    rf"|{LITERAL}|\#[^\n]*",
    re.DOTALL,
)


def docstrings(source: str) -> list[str]:
    """Docstrings of module, classes and functions in source order, dedented, read without parsing the source.

    Counted as one: a string statement that opens the file or follows a line that ends with a colon.
    """
    found = (match["docstring"] for match in _DOCSTRING.finditer(source))
    return [inspect.cleandoc(_value(literal)) for literal in found if literal]


def _value(literal: str) -> str:
    """What a literal stands for; plain ones are cut, the others evaluated."""
    quote = literal[:3] if literal[:3] in ('"""', "'''") else literal[0]
    if "\\" not in literal and quote[0] in "'\"":
        return literal[len(quote) : -len(quote)]
    try:
        return ast.literal_eval(literal)
    except (SyntaxError, ValueError):
        return ""


_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")


def _statement_blocks(tree: ast.Module) -> Iterator[tuple[ast.AST, list[ast.stmt]]]:
    """Every (owner, list of statements) of the tree in source order; exception handlers and match cases own theirs."""
    pending: list[ast.AST] = [tree]
    while pending:
        owner = pending.pop()
        inside: list[ast.AST] = []
        for name in _BLOCKS:
            block = getattr(owner, name, None)
            if not isinstance(block, list) or not block:
                continue
            if name not in ("handlers", "cases"):
                yield owner, block
            inside += block
        pending += reversed(inside)


_COMMENT = r"(?P<line>^[ \t]*\#[^\n]*\n?)|(?P<tail>[ \t]*\#[^\n]*)"
_LITERAL_OR_COMMENT = re.compile(f"{LITERAL}|{_COMMENT}", re.DOTALL | re.MULTILINE)
_LITERAL_OR_GAP = re.compile(rf"{LITERAL}|(?P<gap>\n(?:[ \t]*\n){{3,}})", re.DOTALL)
_GENERATED = re.compile(
    r"@generated|auto-?\s?generated|\bgenerated (?:by|from|automatically|with)\b|do not (?:edit|modify)", re.IGNORECASE
)


def is_generated(source: str) -> bool:
    """Whether the file says in its first lines that a program wrote it."""
    return _GENERATED.search(source, 0, 2_000) is not None


def is_worth_learning(code: str) -> bool:
    """Whether stripped code is neither a fragment, nor minified, nor a table of data."""
    if len(code) < MIN_CODE:
        return False
    lines = code.split("\n")
    if max(map(len, lines)) > MAX_CODE_LINE or len(code) / len(lines) > MAX_MEAN_CODE_LINE:
        return False
    visible = len(code) - sum(map(code.count, " \t\n"))
    return len(re.sub(r"[\W\d_]+", "", code)) >= MIN_LETTERS_OF_CODE * visible


def strip_docstrings_and_comments(source: str, tree: ast.Module) -> str | None:
    """The source without bare strings and comments, formatting kept; None if the result does not compile.

    tree: `ast.parse(source)`. A block that was nothing but a docstring becomes `pass`.
    """
    code = _without_comments(_without_bare_strings(source, tree))
    return None if _compiled(code) is None else code


def _compiled(source: str, flags: int = 0) -> types.CodeType | ast.Module | None:
    """What `compile` makes of a source, None where this Python refuses it; nothing runs, and warnings are not ours."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return compile(source, "<source>", "exec", flags, dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _without_comments(source: str) -> str:
    """Cut comments, with the line where nothing else stands on it; gaps shrink to two empty lines."""

    def cut(match: re.Match) -> str:
        return "" if match.lastgroup in ("line", "tail") else match.group()

    source = _LITERAL_OR_COMMENT.sub(cut, source)
    source = _LITERAL_OR_GAP.sub(lambda match: "\n\n\n" if match.lastgroup == "gap" else match.group(), source)
    return source.strip("\n") + "\n"


def _without_bare_strings(source: str, tree: ast.Module) -> str:
    """Cut bare string statements; `pass` takes the place of one that was a whole block or shares its line."""
    found: list[tuple[ast.stmt, bool]] = []
    for owner, block in _statement_blocks(tree):
        texts = [statement for statement in block if _is_text(statement)]
        is_whole_block = len(texts) == len(block) and not isinstance(owner, ast.Module)
        found += [(text, is_whole_block and text is texts[0]) for text in texts]
    lines = source.split("\n")
    # From the end of the file, so that lines and columns of those still to cut stay true.
    for text, must_fill in sorted(found, key=lambda pair: (pair[0].lineno, pair[0].col_offset), reverse=True):
        _cut(lines, text, must_fill)
    return "\n".join(lines)


def _is_text(statement: ast.stmt) -> bool:
    """Whether it is a bare string: a docstring, the note under a field, or a string used as a comment."""
    value = getattr(statement, "value", None)
    return isinstance(statement, ast.Expr) and isinstance(value, ast.Constant) and isinstance(value.value, str)


def _cut(lines: list[str], text: ast.stmt, must_fill: bool) -> None:
    """Remove one bare string from the lines in place; columns of the syntax tree count UTF-8 bytes."""
    first, last = text.lineno - 1, text.end_lineno - 1
    before = lines[first].encode()[: text.col_offset].decode()
    after = lines[last].encode()[text.end_col_offset :].decode()
    alone = not before.strip() and (not after.strip() or after.lstrip().startswith("#"))
    keeps_line = must_fill or not alone
    lines[first : last + 1] = [before + "pass" + ("" if alone else after)] if keeps_line else []


_PHRASES = (
    r"copyright\s*(?:\(c\)|©|\d{4}|notice|holder|owner)",
    r"all rights reserved",
    r"permission (?:is hereby granted|to use, copy)",
    r"without warranty of any kind|warranties or conditions of any kind",
    r"implied warrant(?:y|ies)|merchantability|fitness for a particular purpose",
    r"redistributions? (?:of|in) (?:source|binary)",
    r"licensed under the|under the terms of the|released under the|distributed under the",
    r"(?:apache|bsd|mit|gnu|psf|python software foundation) (?:[a-z0-9.-]+ ){0,3}licen[sc]e",
    r"spdx-license-identifier|apache\.org/licenses|see licen[sc]e",
)
_LICENCE = re.compile("|".join(_PHRASES))
_HINTS = ("licen", "copyright", "warrant", "merchantab", "rights reserved", "redistrib", "permission", "under the te")


def contains_licence_text(text: str) -> bool:
    """Whether a paragraph (or a file) speaks of its licence or copyright; wrapped lines count as one."""
    lowered = text.lower()
    return any(hint in lowered for hint in _HINTS) and _LICENCE.search(" ".join(lowered.split())) is not None


_TOPICS = "pydoc_data/topics.py"  # texts of `help("...")`: chapters of the language reference
_FENCED = re.compile(r"^[ \t]*(```|~~~).*?^[ \t]*\1[^\n]*$", re.DOTALL | re.MULTILINE)
_RULER = re.compile(r"^[ \t]*[-=~^*+#_|]{3,}[ \t]*\n?", re.MULTILINE)
_MARKUP = re.compile(r"<[^>]*>|!?\[!\[[^\n]*|^\.\. [^\n]*$|https?://\S+", re.MULTILINE)


def topic_texts(tree: ast.Module) -> dict[str, str]:
    """The dictionary `topics` of the help system's module: topic to text; empty if the module has none."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics = ast.literal_eval(statement.value)
            return {name: text for name, text in topics.items() if isinstance(text, str)}
    return {}


def clean_paragraphs(text: str) -> list[str]:
    """The paragraphs of a text that are English; empty if fewer than MIN_DOCSTRING characters of it are."""
    text = text.replace("\r\n", "\n").expandtabs()
    text = _RULER.sub("", _MARKUP.sub("", _FENCED.sub("", text)))
    kept, introduces_code = [], False
    for block in re.split(r"\n[ \t]*\n", text):
        paragraph = "\n".join(line.rstrip() for line in block.strip("\n").split("\n")).rstrip()
        is_literal = introduces_code and paragraph.startswith("   ")
        if paragraph and not is_literal:
            introduces_code = paragraph.endswith("::")
        if paragraph and not is_literal and is_english(paragraph):
            kept.append(paragraph)
    return kept if sum(map(len, kept)) >= MIN_DOCSTRING else []


def is_english(paragraph: str) -> bool:
    """Whether a paragraph is made of words: no doctest, code, table of figures, or licence."""
    visible = " ".join(paragraph.split())
    if visible.startswith((">>>", "...", "In [", "$ ", "@", "import ", "from ")) or ">>> " in visible:
        return False
    letters = len(re.sub(r"[^\w ]|[\d_]", "", visible))
    return letters >= MIN_LETTERS_OF_PROSE * len(visible) and not contains_licence_text(visible)


_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def content_key(text: str) -> bytes:
    """Hash of a text up to case and white space: equal for exact duplicates."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=12).digest()


def shingles(text: str, words_per_shingle: int = 10, keep_one_in: int = 4) -> np.ndarray:
    """Sorted, distinct 64-bit hashes of the text's word n-grams; a text too short for one gives none.

    Two texts overlap by the share of the shingles of one that the other has, so that a copy inside something longer is
    found as well. The same n-gram gives the same hash in every process, and thinning keeps it
    everywhere or nowhere.
    """
    words = np.fromiter((zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())), dtype=np.uint64)
    count = len(words) - words_per_shingle + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(words_per_shingle):  # a polynomial in the words, modulo 2**64
        hashes = hashes * _MULTIPLIER + words[offset : offset + count]
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(32)
    return np.unique(hashes[hashes % np.uint64(keep_one_in) == 0])


def overlap(marks: np.ndarray, seen: set[int]) -> float:
    """Share of the shingles in [0, 1] that were seen before; 0 for a text without any."""
    return sum(mark in seen for mark in marks.tolist()) / len(marks) if len(marks) else 0.0
