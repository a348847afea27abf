"""Downstream tasks that need no hub: which passage goes on a held-out text, capitals and facts of the factbook.

    python scripts/replication/downstream.py --countries real/countries --output_dir tasks
    lm_eval --model hf --model_args pretrained=MODEL,trust_remote_code=True --include_path tasks --tasks capitals,facts

A task is a .yaml that lm-eval reads and the .jsonl of its rows: question, choices, answer (a number), by a choice of
four. router_robustness.py writes continue_<text> into tasks/ of its folder and asks every run all that lie there;
`--include_path FOLDER/tasks` asks the same of any other model. Who can fetch public tasks names them in the same
command: `--tasks hellaswag,arc_easy,continue_english`. factbook.py brings the countries. Source: ours; a choice is the
option of the highest log-probability, as in lm-eval.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.evaluation.scoring import AskedQuestion, CountedText, score_options
from hf_moe_cpt.scripts.replication.factbook import TOPICS, read_countries
from hf_moe_cpt.trainers.common.updates import modes_kept


GIVEN, PASSAGE = 60, 20  # words that are given and of each choice
CHOICES = 4
# The format of lm-eval 0.4.
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""
Row = dict[str, Any]


@dataclass
class TaskArguments:
    """Where they go, and what they are about."""

    countries: str = HfArg(help="The folder countries/ that factbook.py makes.")
    output_dir: str = HfArg(help="Folder for capitals and facts.")


def make(argv: Sequence[str] | None = None) -> None:
    """Write the tasks of the factbook."""
    (args,) = parse_arguments((TaskArguments,), argv, program="downstream.py", description=__doc__)
    for topic in TOPICS:
        rows = list(_questions(args.countries, topic))
        write_task(rows, topic, Path(args.output_dir))
        print(f"{Path(args.output_dir) / topic}.yaml: {len(rows)} questions")


def _questions(countries: str, topic: str) -> Iterator[Row]:
    """One of each country, about an attribute in turn; the other choices are the values of other countries."""
    known = read_countries(countries, topic)
    draw, keys = np.random.default_rng(0), list(TOPICS[topic])
    for number, (name, values) in enumerate(known.items()):
        key = keys[number % len(keys)]
        others = sorted({of[key] for of in known.values()} - {values[key]})
        question = TOPICS[topic][key]["asked"][0].format(c=name)
        yield _row(f"Question: {question}\nAnswer:", values[key], draw.permutation(others)[: CHOICES - 1], draw)


def _row(question: str, right: str, wrong: Sequence[str], draw: np.random.Generator) -> Row:
    choices = [str(choice) for choice in draw.permutation([right, *wrong])]
    return {"question": question, "choices": choices, "answer": choices.index(right)}


def continuations(texts: Sequence[str], count: int) -> list[Row]:
    """At most so many rows: after the beginning of a document, its next passage or one from further on."""
    draw, rows = np.random.default_rng(0), []
    for text in texts if count else ():
        words = [match.span() for match in re.finditer(r"\S+", text)]
        starts = np.arange(GIVEN + 2 * PASSAGE, len(words) - PASSAGE, PASSAGE)
        if len(starts) < CHOICES or len(rows) == count:
            continue
        begins = [GIVEN, *draw.choice(starts, CHOICES - 1, replace=False)]
        right, *wrong = [text[words[begin][0] : words[begin + PASSAGE - 1][1]] for begin in begins]
        rows.append(_row(text[: words[GIVEN - 1][1]], right, wrong, draw))
    return rows


def write_task(rows: Sequence[Row], name: str, folder: Path) -> None:
    """A .yaml and a .jsonl; nothing without rows."""
    if not rows:
        return
    folder.mkdir(parents=True, exist_ok=True)
    data = folder.resolve() / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, rows=json.dumps(str(data))), encoding="utf-8")


def accuracies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, batch_size: int
) -> dict[str, float]:
    """The share of right choices, in [0, 1], by task of a folder; in bfloat16 on a GPU. batch_size: of questions."""
    found = {}
    with modes_kept(model), torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        model.eval()
        for path in sorted(folder.glob("*.jsonl")):
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            scores = score_options(model, [_asked(row, tokenizer) for row in rows], batch_size)
            right = [int(np.argmax(score["logp"])) == row["answer"] for score, row in zip(scores, rows, strict=True)]
            found[path.stem] = float(np.mean(right))
    return found


def _asked(row: Row, tokenizer: PreTrainedTokenizerBase) -> AskedQuestion:
    """As lm-eval splits it: what comes behind the tokens of the question alone."""
    start = len(tokenizer(row["question"])["input_ids"])
    wholes = tokenizer([f"{row['question']} {choice}" for choice in row["choices"]])["input_ids"]
    return AskedQuestion(row, [CountedText(ids, start) for ids in wholes])


if __name__ == "__main__":
    run_script(make)
