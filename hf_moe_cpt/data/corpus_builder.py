"""Fill two domains, prose and code, from Python files up to a size; train and held-out stay apart. Source: ours."""

import ast
import warnings
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from hf_moe_cpt.data.boilerplate import contains_licence_text
from hf_moe_cpt.data.deduplication import SeenTexts, positions_without_leaks, shingles
from hf_moe_cpt.data.python_code import is_generated, is_worth_learning, strip_docstrings_and_comments
from hf_moe_cpt.data.python_files import PythonFile, stable_fraction
from hf_moe_cpt.data.python_literals import docstrings
from hf_moe_cpt.data.python_prose import TOPICS, clean_paragraphs, description_body, topic_texts


SIDES = ("train", "held_out")
LARGEST_PACKAGE_SHARE = 0.15  # of a domain's characters: no package's voice may be the domain's
LARGEST_OVERLAP = 0.4  # of a document's shingles with all earlier ones of its domain
SHORTEST_PROSE = 300  # characters of a file's docstrings
LONGEST_PROSE = 20_000  # characters; longer files are split between docstrings
SHORTEST_PARAGRAPH_KEY = 60  # shorter paragraphs ("Parameters") may repeat


@dataclass
class Domain:
    """The documents of one domain, with what is still allowed; sizes in characters."""

    limits: dict[str, int]
    documents: dict[str, list[dict[str, str]]] = field(default_factory=lambda: {side: [] for side in SIDES})
    sizes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 0))
    package_sizes: Counter[tuple[str, str]] = field(default_factory=Counter)
    _marks: dict[str, list[np.ndarray]] = field(default_factory=lambda: {side: [] for side in SIDES})
    _seen: SeenTexts = field(default_factory=SeenTexts)

    def wants(self, side: str, package: str) -> bool:
        """Whether the side has room, and the package has not had its share of it."""
        quota = LARGEST_PACKAGE_SHARE * self.limits[side]
        return self.sizes[side] < self.limits[side] and self.package_sizes[side, package] < quota

    def add(self, side: str, package: str, name: str, text: str) -> int:
        """Add a document unless it is a copy or half a copy of an earlier one; returns the characters added."""
        marks = shingles(text)
        if not self._seen.add_exact(text) or self._seen.overlap(marks) > LARGEST_OVERLAP:
            return 0
        self._seen.add(marks)
        self._marks[side].append(marks)
        self.documents[side].append({"text": text, "path": name})
        self.sizes[side] += len(text)
        self.package_sizes[side, package] += len(text)
        return len(text)

    def drop_leaked_documents(self) -> None:
        """Drop held-out documents that share passages with train."""
        kept = positions_without_leaks(self._marks["held_out"], self._marks["train"])
        self.documents["held_out"] = [self.documents["held_out"][position] for position in kept]


class CorpusBuilder:
    """Reads files one by one in the order given and adds their prose and code to the side their name decides."""

    def __init__(self, max_characters_per_domain: int, held_out_fraction: float, seed: int) -> None:
        self.held_out_fraction, self.seed = held_out_fraction, seed
        held_out = int(max_characters_per_domain * held_out_fraction)
        limits = {"train": max_characters_per_domain - held_out, "held_out": held_out}
        self.prose, self.code = Domain(dict(limits)), Domain(dict(limits))
        self._paragraphs = SeenTexts()

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
        if file.is_description:
            return self._add_prose(side, file, file.name, [description_body(source)]) if wants_prose else 0
        if file.name == TOPICS:
            return self._add_topics(file, source) if wants_prose else 0
        tree = _parse(source) if wants_code and not is_generated(source) else None
        added = self._add_prose(side, file, file.name, docstrings(source)) if wants_prose else 0
        return added + (self._add_code(side, file, source, tree) if tree is not None else 0)

    def _add_topics(self, file: PythonFile, source: str) -> int:
        """Every topic counts as a file of its own; together they would be a tenth of the prose on one side."""
        tree, added = _parse(source), 0
        topics = {} if tree is None else topic_texts(tree)
        for topic, text in sorted(topics.items()):
            name = f"{file.name}#{topic}"
            added += self._add_prose(self.side_of(name), file, name, [text])
        return added

    def _add_prose(self, side: str, file: PythonFile, name: str, texts: list[str]) -> int:
        """Clean the texts, drop paragraphs that stood in an earlier file, and join the rest to documents."""
        added, waiting, size = 0, [], 0
        for text in [*texts, None]:
            if text is None or size > LONGEST_PROSE:
                document = "\n\n".join(waiting)
                if len(document) >= SHORTEST_PROSE:
                    added += self.prose.add(side, file.package, name, document + "\n")
                waiting, size = [], 0
            paragraphs = [] if text is None else [p for p in clean_paragraphs(text) if self._is_new_paragraph(p)]
            waiting += paragraphs
            size += sum(map(len, paragraphs))
        return added

    def _is_new_paragraph(self, paragraph: str) -> bool:
        return len(paragraph) < SHORTEST_PARAGRAPH_KEY or self._paragraphs.add_exact(paragraph)

    def _add_code(self, side: str, file: PythonFile, source: str, tree: ast.Module) -> int:
        code = strip_docstrings_and_comments(source, tree)
        if code is None or not is_worth_learning(code) or contains_licence_text(code):
            return 0
        return self.code.add(side, file.package, file.name, code)


def _parse(source: str) -> ast.Module | None:
    """The syntax tree, or None for what this Python cannot parse; other people's invalid escapes warn nobody."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
