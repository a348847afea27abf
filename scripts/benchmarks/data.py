"""What reading, tokenising and mixing text cost: beside tokenizers itself, and beside a step of one source.

python scripts/benchmarks/data.py --text corpus.txt --tokenizer my-bpe-32k

document: a file of one line of 30 million characters, in a process of its own, with its largest resident memory.
tokens: documents of 1,000 characters through `tokenize_documents`, beside `encode_batch_fast` of tokenizers alone.
step: a training step and the batch that it waits for, of eight sources and of one, in turns.
Where others use the machine, processor seconds (of all threads) say more than the clock; both are written to data.csv.
Bars: 20 s and 1 GB; 1 million tokens/s on two cores and 0.8 of tokenizers; 1.01. Source: ours.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.data.packing import Mixture, MixtureLaw, PackedDataset, stack_blocks
from hf_moe_cpt.data.text import load_text_dataset, tokenize_documents
from hf_moe_cpt.machine import check_names, machine_facts
from hf_moe_cpt.reports import write_csv
from hf_moe_cpt.scripts.benchmarks.report import BenchmarkArguments


PARTS = ("document", "tokens", "step")
SECONDS_BAR, GIGABYTES_BAR, TOKENS_BAR, LIMIT_BAR, STEP_BAR = 20.0, 1.0, 1e6, 0.8, 1.01


@dataclass
class DataArguments(BenchmarkArguments):
    """Text, tokenizer, sizes."""

    text: str | None = HfArg(default=None, help="A file of text, as long as is tokenised; for document and tokens.")
    tokenizer: str | None = HfArg(default=None, help="Folder of a tokenizer, for the same.")
    parts: list[str] = HfArg(default_factory=lambda: list(PARTS), help=f"Of {', '.join(PARTS)}.")
    characters: int = HfArg(default=30_000_000, help="Of the document, and of all short ones together.")
    rounds: int = HfArg(default=20, help="Turns of the step, of five steps each way.")

    def __post_init__(self) -> None:
        check_names("--parts", self.parts, PARTS)
        self.check_least({"characters": 1000, "rounds": 1})
        if self.parts != ["step"] and (self.text is None or self.tokenizer is None):
            raise ValueError("--text and --tokenizer are missing: name both, or --parts step.")


ARGUMENTS = (DataArguments,)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the parts and write data.csv."""
    (args,) = parse_arguments(ARGUMENTS, argv, program="data.py", description=__doc__)
    parts = {"document": _document, "tokens": _tokens, "step": _step}
    datasets.disable_progress_bars()
    rows = []
    for part in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            # a process of its own: its largest resident memory is that of the part
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(parts[part], args, Path(folder)).result()
        rows += [{"part": part, "measure": name, "value": f"{value:.6g}", "bar": bar} for name, value, bar in found]
    facts = machine_facts(torch.device("cpu"), args.commit)
    path = Path(args.output_dir) / "data.csv"
    write_csv(path, [row | facts for row in rows])
    for row in rows:
        print(f"{row['part']:10}{row['measure']:44}{row['value']:>12}  {row['bar']}")
    print(f"rows in {path}")


def _timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds by the clock, and of the processor in all threads."""
    begin, used = time.perf_counter(), time.process_time()
    result = call()
    return time.perf_counter() - begin, time.process_time() - used, result


def _document(args: DataArguments, folder: Path) -> list[tuple[str, float, str]]:
    datasets.disable_caching()
    tokenizer, path = AutoTokenizer.from_pretrained(args.tokenizer), folder / "one.txt"
    with open(args.text, encoding="utf-8") as file:
        path.write_text(" ".join(file.read(args.characters).split()), encoding="utf-8")
    wall, used, data = _timed(lambda: tokenize_documents(_loaded(path, folder), tokenizer))
    unit = 1e9 if sys.platform == "darwin" else 1e6  # ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return [
        ("seconds", wall, f"<= {SECONDS_BAR:g}"),
        ("processor seconds", used, ""),
        ("GB resident", peak, f"<= {GIGABYTES_BAR:g}"),
        ("tokens", PackedDataset(data, 2, "concat").num_tokens, ""),
    ]


def _loaded(path: Path, folder: Path) -> datasets.Dataset:
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    return load_text_dataset(path)


def _tokens(args: DataArguments, folder: Path) -> list[tuple[str, float, str]]:
    datasets.disable_caching()
    tokenizer, path = AutoTokenizer.from_pretrained(args.tokenizer), folder / "short.jsonl"
    with open(args.text, encoding="utf-8") as file:
        text = file.read(args.characters)
    texts = [text[start : start + 1000] for start in range(0, len(text), 1000)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data, backend = _loaded(path, folder), tokenizer.backend_tokenizer

    def alone() -> int:
        groups = (texts[start : start + 1000] for start in range(0, len(texts), 1000))
        return sum(len(ids) for group in groups for ids in backend.encode_batch_fast(group, add_special_tokens=False))

    rates: dict[str, list[float]] = {}
    for _ in range(3):  # in turns
        wall, used, count = _timed(alone)
        more, longer, made = _timed(lambda: tokenize_documents(data, tokenizer))
        tokens = PackedDataset(made, 2, "concat").num_tokens - len(texts)  # without their ends
        for name, value in {
            "tokens/s": tokens / more,
            "tokens/s of tokenizers alone": count / wall,
            "tokens per processor second": tokens / longer,
            "tokens per processor second of tokenizers": count / used,
        }.items():
            rates.setdefault(name, []).append(value)
    best = {name: max(values) for name, values in rates.items()}
    ratio = best["tokens per processor second"] / best["tokens per processor second of tokenizers"]
    bars = {"tokens/s": f">= {TOKENS_BAR:g}"}
    return [(name, value, bars.get(name, "")) for name, value in best.items()] + [
        ("ours / tokenizers, processor seconds", ratio, f">= {LIMIT_BAR:g}")
    ]


def _step(args: DataArguments, folder: Path) -> list[tuple[str, float, str]]:
    torch.set_num_threads(1)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=4096, **sizes))
    optimizer, batches = torch.optim.AdamW(model.parameters()), {}
    for count in (1, 8):
        names, draw = [f"s{place}" for place in range(count)], np.random.default_rng(0)
        blocks = {}
        for name in names:
            ids = [draw.integers(0, 4096, size).tolist() for size in draw.integers(50, 800, 4000 // count)]
            rows = datasets.Dataset.from_dict({"input_ids": ids})
            rows.save_to_disk(str(folder / f"{count}" / name))
            blocks[name] = PackedDataset(datasets.load_from_disk(str(folder / f"{count}" / name)), 512)
        law = MixtureLaw({name: place + 1 for place, name in enumerate(names)}, 4, 10 + 5 * args.rounds)
        loader = DataLoader(Mixture(blocks, law, 0), batch_size=4, collate_fn=stack_blocks)
        batches[count] = iter(loader)
    seconds: dict[int, list[float]] = {1: [], 8: []}
    waits: dict[int, list[float]] = {1: [], 8: []}
    for turn in range(args.rounds + 1):
        for count in (1, 8) if turn % 2 else (8, 1):
            for _ in range(5):
                begin = time.process_time()
                batch = {name: value for name, value in next(batches[count]).items() if name != "source"}
                waits[count].append(time.process_time() - begin)
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                seconds[count].append(time.process_time() - begin)
    step = {count: statistics.median(values[5:]) for count, values in seconds.items()}  # the first turn warms up
    wait = {count: statistics.median(values[5:]) for count, values in waits.items()}
    return [
        ("step of one source, processor ms", 1e3 * step[1], ""),
        ("step of eight sources, processor ms", 1e3 * step[8], ""),
        ("batch of one source, processor ms", 1e3 * wait[1], ""),
        ("batch of eight sources, processor ms", 1e3 * wait[8], ""),
        ("step of eight / of one", step[8] / step[1], f"<= {STEP_BAR:g}"),
        ("the same by the batch alone", 1 + (wait[8] - wait[1]) / step[1], f"<= {STEP_BAR:g}"),
    ]


if __name__ == "__main__":
    run_script(main)
