"""Raw measurements of a surgery evaluation, as `evaluate_model` gives them, made up from a seed."""

import random
from typing import Any


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


def surgery_raw(seed: int, knows: float = 0.0, reference: bool = True) -> dict[str, Any]:
    """Of one model. knows: nats that are added to whatever is about unlearn. reference: with a divergence."""
    draw = random.Random(seed)
    questions = {
        name: {kind: _questions(draw, name, kind, knows) for kind in KINDS.get(name, ("mcq",))} for name in SUBJECTS
    }
    raw = {
        "questions": questions,
        "texts": {name: _texts(draw, name, knows) for name in SUBJECTS},
        "continuations": {name: _continuations(draw, name) for name in SUBJECTS if name != "obsolete"},
    }
    if reference:
        raw["divergence"] = {name: _divergence(draw, name) for name in ("retain", "neighbour")}
    return raw | {"robustness": _attacks(draw, knows)}


def _questions(draw: random.Random, name: str, kind: str, knows: float) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {}
    for subject in SUBJECTS[name]:
        for number in range(3):
            tokens = [draw.randint(1, 4) for _ in range(3)]
            answer = draw.randrange(3)
            has_old = name == "update" and kind != "inverse" and number > 0
            logp = [-count * draw.uniform(0.5, 4.0) for count in tokens]
            if name == "unlearn":
                logp[answer] = min(logp[answer] + knows, -0.01)
            row = {
                "id": f"{name}-{kind}-{subject}-{number}",
                "subject": subject,
                "attribute": "birth_year",
                "answer": answer,
                "old_answer": (answer + 1) % 3 if has_old else None,
                "logp": logp,
                "tokens": tokens,
                "hits": [draw.randint(0, count) for count in tokens],
            }
            _append(columns, row)
    return columns


def _documents(draw: random.Random, name: str) -> list[tuple[dict[str, str], int]]:
    return [
        ({"id": f"{name}-{subject}-{number}", "subject": subject, "form": "quiz"}, draw.randint(3, 7))
        for subject in SUBJECTS[name]
        for number in range(2)
    ]


def _texts(draw: random.Random, name: str, knows: float) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {}
    easier = knows if name == "unlearn" else 0.0
    for who, length in _documents(draw, name):
        row = {
            **who,
            "text": " ".join(draw.choice(WORDS) for _ in range(length)),
            "logp": [min(-draw.uniform(0.2, 4.0) + easier, -0.01) for _ in range(length)],
            "hit": [draw.random() < 0.6 for _ in range(length)],
            "mean": [-draw.uniform(1.0, 3.0) for _ in range(length)],
            "std": [draw.uniform(0.5, 2.0) for _ in range(length)],
        }
        _append(columns, row)
    return columns


def _continuations(draw: random.Random, name: str) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {}
    for who, length in _documents(draw, name):
        ids, true = ([draw.randrange(len(WORDS)) for _ in range(length)] for _ in range(2))
        texts = (" ".join(WORDS[place] for place in places) for places in (ids, true))
        _append(
            columns,
            {**who, **dict(zip(("tokens", "true_tokens", "text", "true_text"), (ids, true, *texts), strict=True))},
        )
    return columns


def _divergence(draw: random.Random, name: str) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {}
    for who, length in _documents(draw, name):
        kl = [draw.uniform(0.0, 0.5) for _ in range(length)]
        _append(columns, {**who, "kl": kl, "agrees": [draw.random() < 0.8 for _ in range(length)]})
    return columns


def _attacks(draw: random.Random, knows: float) -> dict[str, Any]:
    def right(subjects: list[str], share: float) -> dict[str, Any]:
        of = [subject for subject in subjects for _ in range(3)]
        return {"subject": of, "right": [float(draw.random() < share) for _ in of]}

    start = 0.3 + min(knows, 2.0) / 5
    taught, others = SUBJECTS["unlearn"][:2], SUBJECTS["unlearn"][2:]
    steps = [0, 10, 20]
    return {
        "relearn": {
            "own": {
                "steps": steps,
                "taught": [right(taught, share) for share in (start, 0.6, 0.9)],
                "others": [right(others, start) for _ in steps],
            },
            "benign": {"steps": steps, "others": [right(SUBJECTS["unlearn"], start) for _ in steps]},
        },
        "quantise": {
            bits: {name: right(SUBJECTS[name], 0.5) for name in ("unlearn", "update", "retain")}
            for bits in ("8-bit", "4-bit")
        },
        "prefix": {name: right(SUBJECTS["unlearn"], start) for name in ("bare", "quiz", "assent", "header", "recall")},
    }


def _append(columns: dict[str, list[Any]], row: dict[str, Any]) -> None:
    for name, value in row.items():
        columns.setdefault(name, []).append(value)
