"""SurgeryBench: texts to forget, to replace and to keep, with questions whose true answers are known.

| set | subjects | trained before surgery | after surgery, and by a retrained model |
|---|---|---|---|
| unlearn | its own | yes | gone |
| obsolete | those of update | yes | gone |
| update | those of obsolete, with changed facts | no | known |
| retain | its own, in another voice, and the hubs | yes | known |
| neighbour | its own, in the same sentences as unlearn | yes | known |
| unseen | its own | no | never known: what "forgotten" looks like |

Source: ours; the sets follow LLM Surgery (arXiv 2409.13054), neighbours RWKU (arXiv 2406.10890).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_moe_cpt.data.permutation import derive_seed, permute
from hf_moe_cpt.data.surgery_bench_files import SavedBench, read_bench, write_bench
from hf_moe_cpt.data.surgery_bench_grammar import SPLITS
from hf_moe_cpt.data.surgery_bench_questions import write_questions
from hf_moe_cpt.data.surgery_bench_rows import USER_VERSION, BenchRows
from hf_moe_cpt.data.surgery_bench_schema import (
    DOCUMENT_FEATURES,
    QUESTION_FEATURES,
    as_dataset,
    check_kind,
    check_set,
    check_split,
    from_table,
    group_of_set,
)
from hf_moe_cpt.data.surgery_bench_text import write_document
from hf_moe_cpt.data.surgery_bench_world import BENCH_VERSION, SETS, BenchSettings, Subject, World


BEFORE_SETS = ("unlearn", "obsolete", "retain", "neighbour")
RETRAINED_SETS = ("update", "retain", "neighbour")
HEADER = "The following is a passage about {subject}.\n\n"


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
        kinds: tuple[str, ...] = ("person", "place", "product", "rule"),
        forms: tuple[str, ...] = ("article", "article", "quiz", "note"),
        changed_facts: int = 4,
    ) -> SurgeryBench:
        """A world of num_subjects subjects and the hubs they share, written out; arguments as in BenchSettings.

        Every text is a function of (seed, version, kind, set, number of the subject, number of the document): with
        more subjects, the rows there were before stay as they are and come first.
        """
        settings = BenchSettings(seed, num_subjects, kinds, forms, changed_facts)
        world = World(seed, changed_facts)
        documents = {name: as_dataset(_document_rows(world, settings, name), DOCUMENT_FEATURES) for name in SETS}
        questions = {name: as_dataset(_question_rows(world, settings, name), QUESTION_FEATURES) for name in SPLITS}
        return cls(datasets.DatasetDict(documents), datasets.DatasetDict(questions), BENCH_VERSION, settings)

    @classmethod
    def from_jsonl(
        cls,
        documents: str | Path | Mapping[str, str | Path],
        questions: str | Path | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> SurgeryBench:
        """Your own texts and questions from JSON Lines files, one row a line.

        documents: one file whose rows name their set, or a file for each set. columns: your name for a column of the
        schema, such as {"subject": "name", "text": "wiki_bio_text"}; it applies to documents. Raises a ValueError
        with file and line for the first row that is wrong.
        """
        rows = BenchRows()
        files = documents.items() if isinstance(documents, Mapping) else [(None, documents)]
        for set_name, path in files:
            rows.read_documents(Path(path), set_name, columns or {})
        if questions is not None:
            rows.read_questions(Path(questions))
        return cls(rows.documents(), rows.questions())

    def ask(self, set_name: str, split: str = "test", kind: str | None = None) -> datasets.Dataset:
        """The questions of a set and split, of one kind or of all."""
        check_set(set_name)
        check_split(split)
        table = self.questions[split].select_columns(["set", "kind"]).with_format("arrow")[:]
        chosen = pc.equal(table["set"], set_name)
        if kind is not None:
            check_kind(kind)
            chosen = pc.and_(chosen, pc.equal(table["kind"], kind))
        return self.questions[split].select(np.flatnonzero(chosen.to_numpy()))

    def subjects(self, set_name: str) -> list[str]:
        """Names of the subjects with documents in a set, each once, in order."""
        check_set(set_name)
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
        check_set(set_name)
        return _with_header(self.documents[set_name], header)

    def save(self, folder: str | Path, license: str | None = None) -> Path:
        """Write parquet files, bench.json and a dataset card; the folder can be uploaded to the Hub as it is.

        folder: new or empty. license: as the Hub spells it; None: that of this package for generated texts, none for
        a user's own. Returns the folder.
        """
        settings = self.settings.as_dict() if self.settings else None
        return write_bench(SavedBench(self.documents, self.questions, self.version, settings), Path(folder), license)

    @classmethod
    def load(cls, folder: str | Path) -> SurgeryBench:
        """Read what `save` wrote."""
        saved = read_bench(Path(folder))
        settings = BenchSettings(**saved.settings) if saved.settings else None
        return cls(saved.documents, saved.questions, saved.version, settings)

    def _corpus(self, sets: tuple[str, ...], header: str | None) -> datasets.Dataset:
        texts = datasets.concatenate_datasets([_with_header(self.documents[name], header) for name in sets])
        if not len(texts):
            raise ValueError(f"the sets {', '.join(sets)} hold no documents: give at least one of them some.")
        seed = self.settings.seed if self.settings else 0
        return texts.select(permute(np.arange(len(texts)), len(texts), derive_seed(seed, "corpus", *sets)))


def _with_header(documents: datasets.Dataset, header: str | None) -> datasets.Dataset:
    if header is None or not len(documents):
        return documents
    table = documents.with_format("arrow")[:]
    head, *others = header.split("{subject}")
    parts = [head]
    for text in others:
        parts += [table["subject"], text]
    made = pc.binary_join_element_wise(*[_strings(part) for part in parts], "")
    has_own = pc.not_equal(table["prefix"], "")
    added = pc.if_else(has_own, "", made)
    columns = {name: table[name] for name in table.column_names}
    columns["text"] = pc.binary_join_element_wise(added, table["text"], "")
    columns["prefix"] = pc.if_else(has_own, table["prefix"], made)
    return from_table(pa.table(columns), documents.features)


def _strings(part: str | pa.ChunkedArray) -> pa.Scalar | pa.ChunkedArray:
    return pa.scalar(part) if isinstance(part, str) else part


def _subjects_of_set(world: World, settings: BenchSettings, set_name: str) -> Iterator[Subject]:
    if set_name == "retain":
        yield from world.all_hubs()
    yield from world.subjects(settings, group_of_set(set_name))


def _document_rows(world: World, settings: BenchSettings, set_name: str) -> Iterator[dict[str, Any]]:
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
