"""The smallest bench with its tokenizer, and made-up measurements of three models."""

import random
from typing import Any

import pytest

from hf_moe_cpt.data.python_corpus import train_byte_level_bpe
from hf_moe_cpt.data.surgery_bench import SurgeryBench


@pytest.fixture(scope="package")
def bench() -> SurgeryBench:
    return SurgeryBench.generate(0, 15, kinds=("person",), forms=("quiz",))


@pytest.fixture(scope="package")
def tokenizer(bench):
    return train_byte_level_bpe(bench.before_corpus()["text"], 400, progress=False)


@pytest.fixture(scope="package")
def raws() -> dict:
    return {"before": _raw(0, 2.0, False), "after": _raw(1, 0.4), "retrained": _raw(2)}


SUBJECTS = {
    "unlearn": ["U1", "U2", "U3", "U4"],
    "obsolete": ["C1", "C2", "C3"],
    "update": ["C1", "C2", "C3"],
    "retain": ["R1", "R2", "R3"],
    "neighbour": ["N1", "N2", "N3"],
    "unseen": ["S1", "S2", "S3"],
}
KINDS = {"unlearn": ("mcq", "cloze", "paraphrase"), "update": ("mcq", "cloze", "paraphrase", "one_hop", "inverse")}
WORDS = "the potter of Yarrowin read a letter and wrote to his sister about fencing in March".split()


def _raw(seed: int, knows: float = 0.0, reference: bool = True) -> dict[str, Any]:
    """Of one model. knows: nats that are added to whatever is about unlearn. reference: with a divergence."""
    draw = random.Random(seed)
    raw = {
        "questions": {
            name: {kind: _questions(draw, name, kind, knows) for kind in KINDS.get(name, ("mcq",))}
            for name in SUBJECTS
        },
        "texts": {name: _documents(draw, name, _text, knows) for name in SUBJECTS},
        "continuations": {name: _documents(draw, name, _continuation) for name in SUBJECTS if name != "obsolete"},
    }
    if reference:
        raw["divergence"] = {name: _documents(draw, name, _divergence) for name in ("retain", "neighbour")}
    answers = {name: {"mcq": _documents(random.Random(seed), name, _continuation)} for name in SUBJECTS}
    return raw | {"answers": answers, "robustness": _attacks(draw, knows)}


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _questions(draw: random.Random, name: str, kind: str, knows: float) -> dict[str, Any]:
    rows = []
    for who, number in ((who, number) for who in SUBJECTS[name] for number in range(3)):
        tokens, answer = [draw.randint(1, 4) for _ in range(3)], draw.randrange(3)
        has_old = name == "update" and kind != "inverse" and number > 0
        row = {"id": f"{name}-{kind}-{who}-{number}", "subject": who, "attribute": "birth_year", "answer": answer}
        row |= {"old_answer": (answer + 1) % 3 if has_old else None, "tokens": tokens}
        row["logp"] = [-count * draw.uniform(0.5, 4.0) for count in tokens]
        if name == "unlearn":
            row["logp"][answer] = min(row["logp"][answer] + knows, -0.01)
        rows.append(row | {"hits": [draw.randint(0, count) for count in tokens]})
    return _columns(rows)


def _documents(draw: random.Random, name: str, columns_of, knows: float = 0.0) -> dict[str, Any]:
    easier = knows if name == "unlearn" else 0.0
    return _columns(
        [
            {"id": f"{name}-{who}-{number}", "subject": who, "form": "quiz"}
            | columns_of(draw, draw.randint(3, 7), easier)
            for who in SUBJECTS[name]
            for number in range(2)
        ]
    )


def _text(draw: random.Random, length: int, easier: float) -> dict[str, Any]:
    return {
        "text": " ".join(draw.choice(WORDS) for _ in range(length)),
        "logp": [min(-draw.uniform(0.2, 4.0) + easier, -0.01) for _ in range(length)],
        "hit": [draw.random() < 0.6 for _ in range(length)],
        "mean": [-draw.uniform(1.0, 3.0) for _ in range(length)],
        "std": [draw.uniform(0.5, 2.0) for _ in range(length)],
    }


def _continuation(draw: random.Random, length: int, _: float) -> dict[str, Any]:
    ids, true = ([draw.randrange(len(WORDS)) for _ in range(length)] for _ in range(2))
    text, true_text = (" ".join(WORDS[place] for place in places) for places in (ids, true))
    return {"tokens": ids, "true_tokens": true, "text": text, "true_text": true_text}


def _divergence(draw: random.Random, length: int, _: float) -> dict[str, Any]:
    kl = [draw.uniform(0.0, 0.5) for _ in range(length)]
    return {"kl": kl, "agrees": [draw.random() < 0.8 for _ in range(length)]}


def _attacks(draw: random.Random, knows: float) -> dict[str, Any]:
    def right(subjects: list[str], share: float) -> dict[str, Any]:
        of = [subject for subject in subjects for _ in range(3)]
        return {"subject": of, "right": [float(draw.random() < share) for _ in of]}

    start, steps, subjects = 0.3 + min(knows, 2.0) / 5, [0, 10, 20], SUBJECTS["unlearn"]
    taught = [right(subjects[:2], share) for share in (start, 0.6, 0.9)]
    others = [right(subjects[2:], start) for _ in steps]
    benign = [right(subjects, start) for _ in steps]
    return {
        "relearn": {
            "own": {"steps": steps, "taught": taught, "others": others},
            "facts": {"steps": steps, "untaught": benign},
            "benign": {"steps": steps, "others": benign},
        },
        "quantise": {
            bits: {name: right(SUBJECTS[name], 0.5) for name in ("unlearn", "update", "retain")}
            for bits in ("8-bit", "4-bit")
        },
        "prefix": {name: right(subjects, start) for name in ("bare", "quiz", "assent", "header", "recall")},
    }
