"""Make the example cards of docs/cards/: four tiny runs on generated text, their folders, their cards.

python -m tests.helpers.example_cards example-runs docs/cards

Runs that are finished in example-runs are not made again. The models are far too small to be of use: they show what a
card says, and every number in it is from its run.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from hf_moe_cpt import cli
from hf_moe_cpt.data.python_corpus import train_byte_level_bpe
from hf_moe_cpt.data.surgery_bench import SurgeryBench
from hf_moe_cpt.hub.cards import CardOverrides, build_card
from tests.helpers.fresh_process import command_words


OVERRIDES = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
DATASET = "SurgeryBench (generated)"
RUNS = {"pretrained": "cpt", "continued": "cpt", "preferred": "rainbowpo", "operated": "surgery"}
EVERY_RUN = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 0, "logging_steps": 5}


def main() -> None:
    """Run what is missing in the first folder of the command line, write the cards into the second."""
    work, output = map(Path, sys.argv[1:])
    make_data(work)
    for name in RUNS:
        if not (work / name / "all_results.json").is_file():
            shutil.rmtree(work / name, ignore_errors=True)
            make_run(name, work)
    for name, method in RUNS.items():
        write_example(work / name, output / name, method)
    shutil.copy(work / "bench" / "README.md", _made(output / "data") / "README.md")


def make_data(root: Path) -> None:
    """A small SurgeryBench, its texts before and after an update, pairs of true and false answers, a tokenizer."""
    if (root / "tokenizer").is_dir():
        return
    bench = SurgeryBench.generate(num_subjects=60)
    bench.save(_made(root) / "bench")
    texts = {"old": ("retain", "neighbour", "unlearn", "obsolete"), "new": ("update", "unseen")}
    for name, sets in texts.items():
        rows = concatenate_datasets([bench.documents[part].select_columns(["text"]) for part in sets])
        rows.to_json(root / f"{name}.jsonl")
    for split, name in (("validation", "pairs"), ("test", "held_out_pairs")):
        rows = [_pair(row) for row in bench.questions[split] if row["kind"] == "mcq"][:200]
        Dataset.from_list(rows).to_json(root / f"{name}.jsonl")
    lines = [json.loads(line)["text"] for name in texts for line in (root / f"{name}.jsonl").open(encoding="utf-8")]
    train_byte_level_bpe(lines, 1000, progress=False).save_pretrained(root / "tokenizer")


def _pair(question: dict[str, Any]) -> dict[str, str]:
    wrong = next(text for place, text in enumerate(question["options"]) if place != question["answer"])
    prompt = f"{question['question']} "
    return {"prompt": prompt, "chosen": question["answer_text"], "rejected": wrong}


def make_run(name: str, root: Path) -> None:
    """Train one of RUNS with the command that users call."""
    measured = {"eval_strategy": "steps", "eval_steps": 10, "eval_on_start": True, "save_strategy": "no"}
    measured |= {"per_device_train_batch_size": 8}
    training = {"max_steps": 60, "max_length": 128, "held_out_fraction": 0.1, **measured}
    old, new = root / "old.jsonl", root / "new.jsonl"
    if name == "pretrained":
        shape = {"preset": "pb-granular-tiny", "preset_overrides": json.dumps(OVERRIDES)}
        shape |= {"tokenizer_name_or_path": root / "tokenizer", "learning_rate": 3e-3}
        arguments = {"dataset_name": old, **shape, **training}
    elif name == "continued":
        start = {"model_name_or_path": root / "pretrained", "learning_rate": 1e-3, "replay_ratio": 0.25}
        arguments = {"dataset_name": new, "replay_dataset_name": old, **start, **training}
    elif name == "preferred":
        pairs = {"dataset_name": root / "pairs.jsonl", "eval_dataset_name": root / "held_out_pairs.jsonl"}
        pace = {"max_steps": 30, "learning_rate": 1e-4, "bf16": False, "gradient_checkpointing": False}
        arguments = {"model_name_or_path": root / "continued", **pairs, **pace, **measured}
    else:
        pace = {"max_steps": 30, "max_length": 128, "learning_rate": 5e-4, "eval_steps": 5}
        arguments = {"model_name_or_path": root / "pretrained", "bench": root / "bench", **pace}
    words = [RUNS[name], *command_words({**EVERY_RUN, **arguments, "output_dir": root / name})]
    if cli.main(words) != 0:
        raise SystemExit(f"hf-moe-cpt {' '.join(words)} failed.")


def write_example(run: Path, folder: Path, method: str) -> None:
    """The card of a run with its plots, in a folder of its own."""
    told = CardOverrides(repository=f"your-name/{run.name}", datasets=[DATASET], license="apache-2.0", language=["en"])
    card = build_card(run, told, method)
    shutil.rmtree(folder, ignore_errors=True)
    for path, text in {"README.md": card.text, **card.plots}.items():
        _made((folder / path).parent)
        (folder / path).write_text(text, encoding="utf-8")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    main()
