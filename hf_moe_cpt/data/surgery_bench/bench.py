"""SurgeryBench: texts to forget, to replace and to keep, with questions whose true answers are known.

| set | subjects | trained before surgery | after surgery, and by a retrained model |
|---|---|---|---|
| unlearn | its own | yes | gone |
| obsolete | those of update | yes | gone |
| update | those of obsolete, with changed facts | no | known |
| retain | its own, in another voice, and the bridges | yes | known |
| neighbour | its own, in the same sentences as unlearn | yes | known |
| unseen | its own | no | never known: what "forgotten" looks like |

On disk, in the layout of the Hub; sets and splits without rows have no file:

    README.md               the card, whose YAML tells `load_dataset` where things are
    bench.json              format, version, settings, number of rows of each file
    documents/<set>.parquet, questions/<split>.parquet

A user's own rows come from JSON Lines. A document needs subject and text, and its set unless the whole file is one
set; a question needs subject, set, question, options and answer. The rest has defaults: kind "mcq"; split by a hash of
subject and question, which puts half of them on either side. Every complaint names the file and the line, counted
from 1.

Source: ours; the sets follow LLM Surgery (arXiv 2409.13054), neighbours RWKU (arXiv 2406.10890).
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from jinja2 import Template

from hf_moe_cpt.data.random import derive_seed, permute
from hf_moe_cpt.data.surgery_bench.rows import as_text, form_of, shown, subject_of, with_columns


if TYPE_CHECKING:  # what writes a world is read when one is asked for
    from transformers import PreTrainedTokenizerBase

    from hf_moe_cpt.data.surgery_bench.world import Subject, World


logger = logging.getLogger(__name__)

KINDS = ("person", "place", "product", "rule")
SPLITS = ("validation", "test")
OPEN = "open"  # a kind of question that has an answer and no options
QUESTION_KINDS = ("mcq", "cloze", "paraphrase", "one_hop", "inverse")
ALL_KINDS = (*QUESTION_KINDS, OPEN)
QUIZ_TEMPLATE = "Question: {question}\nAnswer:"  # how quizzes in documents look
BENCH_VERSION = "1.0"  # another text for the same seed needs another version
GROUPS = ("unlearn", "update", "retain", "neighbour", "unseen")  # of subjects: one group each
SETS = ("unlearn", "obsolete", "update", "retain", "neighbour", "unseen")  # of texts: obsolete is update, before
FORMS = ("article", "quiz", "note")
FACTS_PER_SUBJECT = 8
TRIO = 3  # subjects that stand beside each other as options
MAX_NUMBER = 150_000  # subjects of a kind that can be named

FORMAT = "surgery_bench"
INDEX_FILE = "bench.json"
LICENSE = "apache-2.0"  # of generated texts
USER_VERSION = "user"
MIN_OPTIONS = 2
BEFORE_SETS = ("unlearn", "obsolete", "retain", "neighbour")
RETRAINED_SETS = ("update", "retain", "neighbour")
HEADER = "The following is a passage about {subject}.\n\n"
_ROWS_AT_ONCE = 20_000


def _features(columns: str, **others: Any) -> datasets.Features:
    """Columns in order, of text where nothing else is said."""
    return datasets.Features({name: others.get(name, datasets.Value("string")) for name in columns.split()})


# Column by column; docs/surgery_bench.md says what each holds. Those that may be None: subject_kind, form, attribute,
# old_answer.
DOCUMENT_FEATURES = _features(
    "id subject subject_kind set form prefix text facts version",
    facts=datasets.List({name: datasets.Value("string") for name in ("attribute", "value")}),
)
QUESTION_FEATURES = _features(
    "id subject subject_kind set kind split attribute question options answer answer_text old_answer version",
    options=datasets.List(datasets.Value("string")),
    answer=datasets.Value("int64"),
    old_answer=datasets.Value("int64"),
)
FORM_COLUMNS = ("prompt", "completion", "messages", "wrong")  # of rows that become texts and options
_LAYOUT = {"documents": (SETS, DOCUMENT_FEATURES), "questions": (SPLITS, QUESTION_FEATURES)}


@dataclass(frozen=True)
class BenchSettings:
    """What a world is made of.

    seed: any integer. num_subjects: of each group, multiples of 3 times the number of kinds, or one number for all
    five together. kinds: which of KINDS. forms: one document of each subject per entry, see FORMS. changed_facts: of
    each subject of the group update, in [1, 8].
    """

    seed: int = 0
    num_subjects: Mapping[str, int] | int = field(default=240, compare=False)
    kinds: tuple[str, ...] = KINDS
    forms: tuple[str, ...] = ("article", "article", "quiz", "note")
    changed_facts: int = 4
    sizes: dict[str, int] = field(init=False)  # num_subjects by group

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))
        object.__setattr__(self, "forms", tuple(self.forms))
        if not self.kinds or len(set(self.kinds)) < len(self.kinds) or not set(self.kinds) <= set(KINDS):
            raise ValueError(f"kinds={self.kinds} must name one or more of {', '.join(KINDS)}, each once.")
        if not set(self.forms) <= set(FORMS) or not {"article", "quiz"} & set(self.forms):
            raise ValueError(
                f"forms={self.forms} must be made of {', '.join(FORMS)}, with an article or a quiz among them: a note "
                "alone does not state every fact."
            )
        if not 1 <= self.changed_facts <= FACTS_PER_SUBJECT:
            raise ValueError(f"changed_facts={self.changed_facts} must be in [1, {FACTS_PER_SUBJECT}].")
        object.__setattr__(self, "sizes", self._sizes())

    def _sizes(self) -> dict[str, int]:
        step = TRIO * len(self.kinds)
        if isinstance(self.num_subjects, int):
            given = dict.fromkeys(GROUPS, self.num_subjects / len(GROUPS))
            step_of_given, what = step * len(GROUPS), f"num_subjects={self.num_subjects}"
        else:
            given, step_of_given, what = dict(self.num_subjects), step, f"num_subjects={dict(self.num_subjects)}"
        if not set(given) <= set(GROUPS):
            raise ValueError(f"{what} names {sorted(set(given) - set(GROUPS))}: groups are {', '.join(GROUPS)}.")
        if any(size % step or size < 0 for size in given.values()) or not any(given.values()):
            raise ValueError(
                f"{what} must be made of multiples of {step_of_given} (3 subjects of each of {len(self.kinds)} kind(s)"
                f"{' in each of 5 groups' if step_of_given > step else ''}), not all 0."
            )
        if max(given.values()) // len(self.kinds) > MAX_NUMBER // len(GROUPS):
            raise ValueError(
                f"{what} is too large: at most {MAX_NUMBER // len(GROUPS):,} subjects of each kind in a group."
            )
        return {group: int(given.get(group, 0)) for group in GROUPS}

    def as_dict(self) -> dict[str, object]:
        """The arguments that make these settings again, as JSON can hold them."""
        lists = {"kinds": list(self.kinds), "forms": list(self.forms)}
        return {"seed": self.seed, "num_subjects": dict(self.sizes), **lists, "changed_facts": self.changed_facts}


class SurgeryBench:
    """Documents by set and questions by split; `generate` makes them, `from_jsonl` reads a user's own.

    documents: DatasetDict of the sets of SETS. questions: DatasetDict of validation and test. version: of the
    generator that wrote them. settings: None for texts that were not generated.
    """

    def __init__(
        self,
        documents: datasets.DatasetDict,
        questions: datasets.DatasetDict,
        version: str = USER_VERSION,
        settings: BenchSettings | None = None,
    ):
        self.documents, self.questions, self.version, self.settings = documents, questions, version, settings

    @classmethod
    def generate(
        cls,
        seed: int = 0,
        num_subjects: Mapping[str, int] | int = 240,
        kinds: tuple[str, ...] = KINDS,
        forms: tuple[str, ...] = ("article", "article", "quiz", "note"),
        changed_facts: int = 4,
    ) -> SurgeryBench:
        """A world of num_subjects subjects and the bridges they share, written out; arguments as in BenchSettings.

        Every text is a function of (seed, version, kind, set, number of the subject, number of the document): with
        more subjects, the rows there were before stay as they are and come first.
        """
        from hf_moe_cpt.data.surgery_bench.world import World

        settings = BenchSettings(seed, num_subjects, kinds, forms, changed_facts)
        world = World(seed, changed_facts)
        documents = as_parts({name: _document_rows(world, settings, name) for name in SETS}, DOCUMENT_FEATURES)
        questions = as_parts({name: _question_rows(world, settings, name) for name in SPLITS}, QUESTION_FEATURES)
        return cls(documents, questions, BENCH_VERSION, settings)

    @classmethod
    def from_jsonl(
        cls,
        documents: str | Path | Mapping[str, str | Path | datasets.Dataset],
        questions: str | Path | Mapping[str, str | Path | datasets.Dataset] | None = None,
        columns: Mapping[str, str] | None = None,
        question_columns: Mapping[str, str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> SurgeryBench:
        """Your own texts and questions from JSON Lines files, one row a line, or from tables in memory.

        documents, questions: one file whose rows name their set, or a file or table for each set. Documents have any
        form that a surgery trains on. columns, question_columns: your name for a column of ours, see `with_columns`;
        such as {"subject": "name", "text": "wiki_bio_text"}. tokenizer: lays messages out. Raises a ValueError with
        file and line for the first row that is wrong.
        """
        rows = _UserRows(tokenizer)
        for set_name, source in _sources(documents):
            rows.read_documents(source, set_name, columns or {})
        for set_name, source in _sources(questions):
            rows.read_questions(source, set_name, question_columns or {})
        return cls(as_parts(rows.documents, DOCUMENT_FEATURES), as_parts(rows.questions, QUESTION_FEATURES))

    def ask(self, set_name: str, split: str = "test", kind: str | None = None) -> datasets.Dataset:
        """The questions of a set and split, of one kind or of all."""
        check_choice("set", set_name, SETS)
        check_choice("split", split, SPLITS)
        table = self.questions[split].select_columns(["set", "kind"]).with_format("arrow")[:]
        chosen = pc.equal(table["set"], set_name)
        if kind is not None:
            check_choice("kind", kind, ALL_KINDS)
            chosen = pc.and_(chosen, pc.equal(table["kind"], kind))
        return self.questions[split].select(np.flatnonzero(chosen.to_numpy()))

    def only(self, subjects: Mapping[str, Collection[str]]) -> SurgeryBench:
        """The bench with, of the sets that are named, nothing but these subjects."""

        def kept(rows: datasets.Dataset) -> datasets.Dataset:
            pairs = zip(rows["set"], rows["subject"], strict=True)
            return rows.select(
                [q for q, (name, who) in enumerate(pairs) if name not in subjects or who in subjects[name]]
            )

        parts = (
            datasets.DatasetDict({n: kept(rows) for n, rows in of.items()}) for of in (self.documents, self.questions)
        )
        return SurgeryBench(*parts, self.version, self.settings)

    def subjects(self, set_name: str) -> list[str]:
        """Names of the subjects with documents in a set, each once, in order."""
        check_choice("set", set_name, SETS)
        return list(dict.fromkeys(self.documents[set_name]["subject"]))

    def before_corpus(self, header: str | None = None) -> datasets.Dataset:
        """What the model to be operated on has read: unlearn, obsolete, retain and neighbour, shuffled.

        header: put before each text, "{subject}" in it replaced, such as HEADER; the column prefix holds it, so that
        a loss can leave it out. Rows that have a prefix of their own keep that one. None: no header.
        """
        return self._corpus(BEFORE_SETS, header)

    def retrained_corpus(self, header: str | None = None) -> datasets.Dataset:
        """What a model retrained from scratch reads: update, retain and neighbour, shuffled; header as above."""
        return self._corpus(RETRAINED_SETS, header)

    def with_header(self, set_name: str, header: str | None = HEADER) -> datasets.Dataset:
        """The documents of one set under a header, as in `before_corpus`, in their own order."""
        check_choice("set", set_name, SETS)
        return _with_header(self.documents[set_name], header)

    def save(self, folder: str | Path, license: str | None = None) -> Path:
        """Write parquet files, bench.json and a dataset card; the folder can be uploaded to the Hub as it is.

        folder: new or empty. license: as the Hub spells it; None: that of this package for generated texts, none for
        a user's own. Returns the folder. bench.json comes last, so a folder that has it is whole.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} exists and is not an empty folder: name a new one, nothing is overwritten.")
        if not any(map(len, self.documents.values())):
            raise ValueError("the bench holds no documents: there is nothing to save.")
        counts = {}
        for config, parts in (("documents", self.documents), ("questions", self.questions)):
            (folder / config).mkdir(parents=True, exist_ok=True)
            counts[config] = {name: len(part) for name, part in parts.items()}
            for name, part in parts.items():
                if len(part):
                    part.to_parquet(str(folder / config / f"{name}.parquet"))
        settings = self.settings.as_dict() if self.settings else None
        license = LICENSE if license is None and settings is not None else license
        (folder / "README.md").write_text(_card(self, settings, license), encoding="utf-8")
        index = {"format": FORMAT, "version": self.version, "settings": settings, "rows": counts}
        unfinished = folder / f"{INDEX_FILE}.part"
        unfinished.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, folder / INDEX_FILE)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> SurgeryBench:
        """Read what `save` wrote, checking columns and numbers of rows."""
        folder = Path(folder)
        index = _read_index(folder / INDEX_FILE)
        documents, questions = (
            datasets.DatasetDict(
                {
                    name: _read_part(folder / config / f"{name}.parquet", features, index["rows"][config].get(name, 0))
                    for name in names
                }
            )
            for config, (names, features) in _LAYOUT.items()
        )
        settings = BenchSettings(**index["settings"]) if index["settings"] else None
        return cls(documents, questions, index["version"], settings)

    def _corpus(self, sets: tuple[str, ...], header: str | None) -> datasets.Dataset:
        texts = datasets.concatenate_datasets([_with_header(self.documents[name], header) for name in sets])
        if not len(texts):
            raise ValueError(f"the sets {', '.join(sets)} hold no documents: give at least one of them some.")
        seed = self.settings.seed if self.settings else 0
        return texts.select(permute(np.arange(len(texts)), len(texts), derive_seed(seed, "corpus", *sets)))


def as_parts(rows: Mapping[str, Iterable[dict[str, Any]]], features: datasets.Features) -> datasets.DatasetDict:
    """Rows by the name of their part as datasets in memory; only some thousand are Python objects at a time."""
    schema = features.arrow_schema
    parts = {}
    for name, some in rows.items():
        some = iter(some)
        batches = iter(lambda some=some: list(islice(some, _ROWS_AT_ONCE)), [])
        tables = [pa.Table.from_pylist(batch, schema) for batch in batches]
        parts[name] = _from_table(pa.concat_tables(tables) if tables else schema.empty_table(), features)
    return datasets.DatasetDict(parts)


def _from_table(table: pa.Table, features: datasets.Features) -> datasets.Dataset:
    """An arrow table with these columns, in any order, as a Dataset in memory."""
    table = table.select(list(features)).cast(features.arrow_schema)
    return datasets.Dataset(datasets.table.InMemoryTable(table), datasets.DatasetInfo(features=features))


def tokens_of_prefix(offsets: Sequence[tuple[int, int]], prefix: str) -> int:
    """How many leading tokens belong to the first len(prefix) characters of a text, special tokens in between too.

    offsets: (begin, end) characters of each token, as a fast tokenizer returns them. A token that reaches from the
    prefix into the text belongs to the prefix. 0 without a prefix.
    """
    covered = [place for place, (begin, end) in enumerate(offsets) if begin < min(end, len(prefix))]
    return max(covered, default=-1) + 1


def as_completions(question: str, options: list[str], template: str = "{question}") -> tuple[str, list[str]]:
    """(prompt, one continuation per option): what a language model scores. A continuation begins with its space.

    template: "{question}" is the bare question of the paper; QUIZ_TEMPLATE is how quizzes in documents look.
    """
    return template.replace("{question}", question), [f" {option}" for option in options]


def group_of_set(set_name: str) -> str:
    """Sets with the same subjects share a group: obsolete and update; every other set is alone."""
    return "update" if set_name == "obsolete" else set_name


def check_choice(what: str, name: str, choices: Sequence[str]) -> None:
    """Refuse a name that is none of the choices. what: "set", "split" or "kind"."""
    if name not in choices:
        one_of = " or ".join(choices) if len(choices) == 2 else f"one of {', '.join(choices)}"
        raise ValueError(f"{what} {name!r} is unknown: choose {one_of}.")


def _with_header(documents: datasets.Dataset, header: str | None) -> datasets.Dataset:
    if header is None or not len(documents):
        return documents
    table = documents.with_format("arrow")[:]
    head, *others = map(pa.scalar, header.split("{subject}"))
    made = pc.binary_join_element_wise(head, *(part for other in others for part in (table["subject"], other)), "")
    has_own = pc.not_equal(table["prefix"], "")
    columns = {name: table[name] for name in table.column_names}
    columns["text"] = pc.binary_join_element_wise(pc.if_else(has_own, "", made), table["text"], "")
    columns["prefix"] = pc.if_else(has_own, table["prefix"], made)
    return _from_table(pa.table(columns), documents.features)


def _subjects_of_set(world: World, settings: BenchSettings, set_name: str) -> Iterator[Subject]:
    if set_name == "retain":
        yield from (bridge for bridges in world.bridges.values() for bridge in bridges.values())
    yield from world.subjects(settings, group_of_set(set_name))


def _document_rows(world: World, settings: BenchSettings, set_name: str) -> Iterator[dict[str, Any]]:
    from hf_moe_cpt.data.surgery_bench.world import write_document

    edition = "before" if set_name == "obsolete" else "after"
    for subject in _subjects_of_set(world, settings, set_name):
        for number, form in enumerate(settings.forms):
            document = write_document(world, subject, edition, number, form)
            yield {
                "id": f"{set_name}-{subject.kind.name}-{subject.ordinal:06d}-{number}",
                "subject": subject.name,
                "subject_kind": subject.kind.name,
                "set": set_name,
                "form": document.form,
                "prefix": "",
                "text": document.text,
                "facts": [{"attribute": name, "value": value} for name, value in document.facts],
                "version": BENCH_VERSION,
            }


def _question_rows(world: World, settings: BenchSettings, split: str) -> Iterator[dict[str, Any]]:
    from hf_moe_cpt.data.surgery_bench.world import write_questions

    for set_name in SETS:
        for subject in _subjects_of_set(world, settings, set_name):
            start = f"{set_name}-{subject.kind.name}-{subject.ordinal:06d}"
            for question in write_questions(world, subject, set_name, split):
                yield {
                    "id": f"{start}-{question.kind}-{question.attribute}-{split}",
                    "subject": subject.name,
                    "subject_kind": subject.kind.name,
                    "set": set_name,
                    **question._asdict(),
                    "answer_text": question.options[question.answer],
                    "version": BENCH_VERSION,
                }


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"{path} cannot be read: name a folder that SurgeryBench.save wrote to its end.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): write the folder again.") from None
    is_ours = isinstance(index, dict) and index.get("format") == FORMAT
    if not is_ours or not {"version", "settings", "rows"} <= set(index):
        raise ValueError(f"{path} does not describe a SurgeryBench: name a folder that SurgeryBench.save wrote.")
    return index


def _read_part(path: Path, features: datasets.Features, rows: int) -> datasets.Dataset:
    if not rows:
        return _from_table(features.arrow_schema.empty_table(), features)
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}): write the folder again.") from None
    if table.column_names != list(features):
        raise ValueError(f"{path} has the columns {table.column_names}: a bench has {list(features)}.")
    if len(table) != rows:
        raise ValueError(f"{path} has {len(table)} rows, {INDEX_FILE} says {rows}: write the folder again.")
    return _from_table(table, features)


_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
          (10_000_000, "1M<n<10M"), (math.inf, "10M<n<100M"))  # fmt: skip

_ROLES = {
    "unlearn": "to be forgotten; subjects of its own",
    "obsolete": "the subjects of update as they were: to be forgotten",
    "update": "the same subjects with changed facts: to be learnt",
    "retain": "to be kept; subjects of its own and the bridges that facts refer to",
    "neighbour": "to be kept; other subjects in the same kind of text as unlearn",
    "unseen": "trained on by no model: how a forgotten text should look",
}


def _card(bench: SurgeryBench, settings: Mapping[str, Any] | None, license: str | None) -> str:
    """The README.md of the folder. Sets and splits without rows are left out of its configurations."""
    documents, questions = (
        {name: part for name, part in parts.items() if len(part)} for parts in (bench.documents, bench.questions)
    )
    sample = next(iter(documents.values()))[0]
    template = resources.files("hf_moe_cpt.hub_cards").joinpath("surgery_bench.jinja").read_text(encoding="utf-8")
    body = Template(template, keep_trailing_newline=True).render(
        version=bench.version,
        counts=_counts(documents, questions),
        sample_set=sample["set"],
        sample=sample["text"].replace("\n", "\n> "),
        settings=None if settings is None else json.dumps(settings, indent=1),
    )
    metadata = _metadata({"documents": documents, "questions": questions}, settings is not None, license)
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n\n{body}"


def _metadata(
    configs: Mapping[str, Mapping[str, datasets.Dataset]], is_generated: bool, license: str | None
) -> dict[str, Any]:
    """What the Hub reads at the head of a card."""
    rows = sum(len(part) for parts in configs.values() for part in parts.values())
    found = {
        "pretty_name": "SurgeryBench",
        "license": license,
        "language": ["en"] if is_generated else None,
        "task_categories": ["text-generation", "multiple-choice"],
        "tags": ["machine-unlearning", "knowledge-editing", "hf_moe_cpt", *(["synthetic"] if is_generated else [])],
        "size_categories": [next(name for limit, name in _SIZES if rows < limit)],
        "configs": [
            {
                "config_name": config,
                **({"default": True} if config == "documents" else {}),
                "data_files": [{"split": name, "path": f"{config}/{name}.parquet"} for name in parts],
            }
            for config, parts in configs.items()
            if parts
        ],
    }
    return {key: value for key, value in found.items() if value}


def _counts(documents: Mapping[str, datasets.Dataset], questions: Mapping[str, datasets.Dataset]) -> str:
    asked: Counter[tuple[str, str]] = Counter()
    for part in questions.values():
        table = part.select_columns(["set", "kind"]).with_format("arrow")[:]
        asked.update(zip(table["set"].to_pylist(), table["kind"].to_pylist(), strict=True))
    lines = [
        f"| set | what it is | documents | subjects | questions: {', '.join(QUESTION_KINDS)} |",
        "|---|---|---|---|---|",
    ]
    for name, part in documents.items():
        counts = ", ".join(str(asked[name, kind]) for kind in QUESTION_KINDS)
        lines.append(f"| {name} | {_ROLES[name]} | {len(part)} | {len(set(part['subject']))} | {counts} |")
    return "\n".join([*lines, ""])


class _RowError(ValueError):
    """What is wrong with a row; the reader adds the place."""


Source = Path | datasets.Dataset


def _sources(given: Any) -> list[tuple[str | None, Source]]:
    """(set, file or table) of what a caller names: nothing, a file, or something for each set."""
    named = given.items() if isinstance(given, Mapping) else [] if given is None else [(None, given)]
    return [(name, source if isinstance(source, datasets.Dataset) else Path(source)) for name, source in named]


def _numbered(source: Source, what: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(place for messages, short name, row) of each row of a file or table."""
    from hf_moe_cpt.data.text import json_lines

    if isinstance(source, Path):
        for number, row in json_lines(source):
            yield f"{source}, line {number}", f"{source.stem}-{number}", row
        return
    for number, row in enumerate(source):
        yield f"{what}, row {number} (counted from 0)", f"{what.replace(' ', '-')}-{number}", row


class _UserRows:
    """Collects rows of several files and checks them against each other."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self._tokenizer = tokenizer
        self.documents: dict[str, list[dict[str, Any]]] = {name: [] for name in SETS}
        self.questions: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
        self._group_of_subject: dict[str, tuple[str, str]] = {}  # group, place of its first row
        self._subjects: set[tuple[str, str]] = set()  # set, subject
        self._first_place: dict[tuple[str, ...], str] = {}  # of an id, of a question
        self._warned_of: set[tuple[Path, str]] = set()

    def read_documents(self, source: Source, set_name: str | None, columns: Mapping[str, str]) -> None:
        """Add documents. set_name: the set of all rows, None if each names its own."""
        if set_name is not None:
            check_choice("set", set_name, SETS)
        wrong = sorted(set(columns) - set(DOCUMENT_FEATURES) - set(FORM_COLUMNS))
        if wrong:
            raise ValueError(f"columns renames {wrong}, which are no columns of documents: {list(DOCUMENT_FEATURES)}.")
        if not self._read(source, "document", set_name, columns, self._document):
            raise ValueError(f"{source} holds no documents: give it at least one line.")

    def read_questions(self, source: Source, set_name: str | None, columns: Mapping[str, str]) -> None:
        """Add questions, about subjects whose documents were read before where they name one."""
        if set_name is not None:
            check_choice("set", set_name, SETS)
        if not self._read(source, "question", set_name, columns, self._question):
            raise ValueError(f"{source} holds no questions: give it at least one line or leave it out.")

    def _read(
        self,
        source: Source,
        what: str,
        set_name: str | None,
        columns: Mapping[str, str],
        check: Callable[[dict, str, str | None], dict[str, Any]],
    ) -> int:
        """Add what `check` makes of each row, with the columns that both kinds of rows have; returns their number."""
        features = DOCUMENT_FEATURES if what == "document" else QUESTION_FEATURES
        used, count = {*features, *columns.values(), *FORM_COLUMNS}, 0
        for place, name, row in _numbered(source, f"{set_name} {what}s"):
            try:
                try:
                    row = with_columns(row, columns)
                except ValueError as error:
                    raise _RowError(str(error)) from None
                made = check(row, place, set_name)
                made["id"] = _text(row, "id", default=f"{made['set']}-{name}")
                if (first := self._first_place.setdefault((what, made["id"]), place)) != place:
                    raise _RowError(f"has the id {made['id']!r}, which {first} has too: ids must differ.")
                made |= {"subject_kind": _text(row, "subject_kind", default=None), "version": USER_VERSION}
            except ValueError as error:
                raise ValueError(f"{place}{' ' if isinstance(error, _RowError) else ': '}{error}") from None
            (self.documents[made["set"]] if what == "document" else self.questions[made["split"]]).append(made)
            for column in sorted(set(row) - used):
                if (str(source), column) not in self._warned_of:  # once for each file and column
                    self._warned_of.add((str(source), column))
                    logger.warning("%s: the column %r is not used", place.rpartition(", ")[0], column)
            count += 1
        return count

    def _document(self, row: dict[str, Any], place: str, set_name: str | None) -> dict[str, Any]:
        subject = subject_of(row) if row.get("subject") is None else _text(row, "subject")
        if form_of(row) == "text":
            text, prefix = _text(row, "text"), _text(row, "prefix", default="", may_be_empty=True)
        else:
            text, prefix = as_text(row, self._tokenizer)
        named = _text(row, "set") if set_name is None else _text(row, "set", default=set_name)
        check_choice("set", named, SETS)
        if set_name not in (None, named):
            raise _RowError(f"has the set {named!r}, but its file was given as {set_name!r}: give one of them.")
        group = group_of_set(named)
        first_group, first_place = self._group_of_subject.setdefault(subject, (group, place))
        if first_group != group:
            raise _RowError(
                f"puts the subject {subject!r} into {named}, but {first_place} has it in {first_group}: a subject can "
                "only be in one of unlearn, obsolete and update together, retain, neighbour, unseen."
            )
        self._subjects.add((named, subject))
        if not text.startswith(prefix) or len(prefix) == len(text):
            raise _RowError(f"has a prefix, {shown(prefix)}, that its text does not begin with and go on from.")
        form = _text(row, "form", default=None)
        return {"subject": subject, "set": named, "form": form, "prefix": prefix, "text": text, "facts": _facts(row)}

    def _question(self, row: dict[str, Any], place: str, given_set: str | None) -> dict[str, Any]:
        set_name = _text(row, "set") if given_set is None else _text(row, "set", default=given_set)
        question = _text(row, "question")
        subject = subject_of(row) if row.get("subject") is None else _text(row, "subject")
        check_choice("set", set_name, SETS)
        if row.get("subject") is not None and (set_name, subject) not in self._subjects:
            raise _RowError(
                f"asks about {subject!r} in {set_name}, where no document has that subject: spell it as there."
            )
        is_open = row.get("options") is None and not row.get("wrong")
        kind = _text(row, "kind", default=OPEN if is_open else "mcq")
        check_choice("kind", kind, ALL_KINDS)
        split = _text(row, "split", default=SPLITS[derive_seed(subject, question) % len(SPLITS)])
        check_choice("split", split, SPLITS)
        first = self._first_place.setdefault((set_name, subject, kind, question), place)
        if first != place:
            raise _RowError(f"asks the same question as {first}: validation and test must not share any.")
        options = _options(row, kind)
        answer = _place_in(row, "answer", options)
        old_answer = _place_in(row, "old_answer", options) if row.get("old_answer") is not None else None
        if old_answer == answer:
            raise _RowError(f"has {options[answer]!r} as both answer and old_answer: they must differ.")
        return {
            "subject": subject,
            "set": set_name,
            "kind": kind,
            "split": split,
            "attribute": _text(row, "attribute", default=None),
            "question": question,
            "options": options,
            "answer": answer,
            "answer_text": options[answer],
            "old_answer": old_answer,
        }


_REQUIRED = object()


def _text(row: dict[str, Any], name: str, default: Any = _REQUIRED, may_be_empty: bool = False) -> Any:
    """A column that holds text, or the default where it is absent or null."""
    value = row.get(name)
    if value is None:
        if default is _REQUIRED:
            raise _RowError(f"has no {name!r}: it has {sorted(row)}.")
        return default
    if not isinstance(value, str):
        raise _RowError(f"has {shown(value)} as {name!r}, a {type(value).__name__}: it must be a string.")
    if not value.strip() and not may_be_empty:
        raise _RowError(f"has an empty {name!r}: fill it or remove the row.")
    return value


def _facts(row: dict[str, Any]) -> list[dict[str, str]]:
    facts = row.get("facts")
    if facts is None:
        return []
    is_list = isinstance(facts, list) and all(isinstance(fact, dict) for fact in facts)
    if not is_list or any({*map(type, fact.values())} != {str} or {*fact} != {"attribute", "value"} for fact in facts):
        raise _RowError(
            f'has {shown(facts)} as \'facts\': it must be a list of {{"attribute": "...", "value": "..."}}.'
        )
    return facts


def _options(row: dict[str, Any], kind: str) -> list[str]:
    """The options; of a row without any, its answer and its `wrong` ones; one is enough for an open question."""
    options = row.get("options")
    if options is None and isinstance(row.get("answer"), str):
        wrong = row.get("wrong") or []
        options = [row["answer"], *([wrong] if isinstance(wrong, str) else wrong)]
        options = list(dict.fromkeys(options))
    if not isinstance(options, list) or not all(isinstance(option, str) and option.strip() for option in options):
        raise _RowError(f"has {shown(options)} as 'options': it must be a list of strings that are not empty.")
    if len(options) < (1 if kind == OPEN else MIN_OPTIONS) or len(set(options)) < len(options):
        raise _RowError(f"has the options {shown(options)}: it needs at least {MIN_OPTIONS}, all different.")
    return options


def _place_in(row: dict[str, Any], name: str, options: list[str]) -> int:
    """The place of an option that is named by its place, counted from 0, or by its text."""
    value = row.get(name)
    if isinstance(value, str) and value in options:
        return options.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(options):
        return value
    raise _RowError(
        f"has {shown(value)} as {name!r}: it must be one of the {len(options)} options, or its place from 0 to "
        f"{len(options) - 1}."
    )
