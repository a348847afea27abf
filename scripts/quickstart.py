"""See continual pre-training at work in minutes: two tiny models learn prose, go on with code, and what they forgot.

The text is the Python installation's own (docs/corpus.md), or yours with --data-dir. Nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging as transformers_logging

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.quickstart import (
    MOE_PRESETS,
    RECOVERY,
    SCALES,
    Plan,
    QuickstartData,
    QuickstartFolder,
    checkpoint_bytes,
    compare_routing,
    make_plan,
    prepare_data,
    run_stage,
    summarise,
    table_rows,
    write_quickstart_report,
)
from hf_moe_cpt.reports.tables import text_table


DEVICES = ("auto", "cpu", "cuda", "mps")
PROMPT_TOKENS, CONTINUATION_TOKENS = 24, 48


@dataclass
class QuickstartArguments:
    """What a user may change; everything else is in the table of quickstart_plan.py."""

    preset: str = field(
        default="pb-granular-tiny",
        metadata={"help": f"Mixture of experts to train beside its dense twin: {', '.join(MOE_PRESETS)}."},
    )
    steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps of pre-training; continuing takes half of them. "
            + "; ".join(f"{scale.steps} for {size} presets" for size, scale in SCALES.items())
            + " if unset."
        },
    )
    device: str = field(
        default="auto", metadata={"help": f"{', '.join(DEVICES)}; auto takes cuda where there is one."}
    )
    output_dir: str = field(
        default="quickstart-output",
        metadata={"help": "Folder for models, results.json and report.html; a killed quickstart goes on in it."},
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Your text in place of Python's: a folder with two subfolders, the old domain first by name."
        },
    )
    seed: int = field(default=0, metadata={"help": "Decides the split of the text, the weights and the data order."})


ARGUMENTS = (QuickstartArguments,)


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare the text, run the six stages, print the table, write the report."""
    (args,) = parse_arguments(ARGUMENTS, argv, program="hf-moe-cpt quickstart", description=__doc__)
    plan = make_plan(args.preset, args.steps, args.seed, resolve_device(args.device), args.data_dir)
    folder = QuickstartFolder(args.output_dir, plan)
    folder.claim()
    if not folder.results.is_file():
        with _quiet_libraries():
            folder.conclude(run(plan, folder))
    results = json.loads(folder.results.read_text(encoding="utf-8"))
    write_quickstart_report(results, folder.report)
    print(summary(results, folder))


def resolve_device(name: str) -> str:
    """The device to train on: "cpu", "cuda" or "mps". Raises ValueError if it is unknown or not there."""
    if name not in DEVICES:
        raise ValueError(f"--device {name!r} is unknown: choose one of {', '.join(DEVICES)}.")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if available["cuda"] else "cpu"
    if not available[name]:
        raise ValueError(f"--device {name!r}: torch finds no such device here; use --device cpu.")
    return name


def run(plan: Plan, folder: QuickstartFolder) -> dict[str, Any]:
    """Everything that takes time; what an earlier, killed run finished in the folder is not done again."""
    print(f"text, tokenizer and models go to {folder.root}", flush=True)
    data = prepare_data(plan, folder)
    if folder.record(plan.stages[0].name) is None:
        folder.require_space(checkpoint_bytes(plan, len(data.tokenizer)))
    records: dict[str, dict[str, Any]] = {}
    with tqdm(total=sum(stage.steps for stage in plan.stages), unit="step", dynamic_ncols=True) as bar:
        for stage in plan.stages:
            record = folder.record(stage.name)
            if record is None:
                record = run_stage(stage, plan, data, folder, bar)
                folder.finish(stage.name, record, keep_work=stage.is_pretraining)
            else:
                bar.update(stage.steps)
            records[stage.name] = record
        bar.set_description("done")
    results = summarise(plan, records, data.facts)
    results["routing"] = compare_routing(plan, data, folder, records)
    results["samples"] = [sample(plan, data, folder, held_out) for held_out in (data.old.held_out, data.new.held_out)]
    return results


def sample(plan: Plan, data: QuickstartData, folder: QuickstartFolder, held_out: datasets.Dataset) -> dict[str, str]:
    """What the mixture of experts that was continued with replay makes of the beginning of a held-out document."""
    name = next(stage.name for stage in plan.stages if stage.replay_ratio > 0)
    path = folder.model(name)
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True).to(plan.device)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    prompt = held_out[0]["input_ids"][:PROMPT_TOKENS]
    set_seed(plan.seed)
    output = model.generate(
        torch.tensor([prompt], device=model.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
        max_new_tokens=CONTINUATION_TOKENS,
        do_sample=True,
        temperature=0.7,
        top_k=50,
    )[0]
    return {
        "model": name,
        "prompt": tokenizer.decode(prompt),
        "continuation": tokenizer.decode(output[len(prompt) :], skip_special_tokens=True),
    }


def summary(results: dict[str, Any], folder: QuickstartFolder) -> str:
    """What is printed at the end: the table, how to read it, two samples, and where things are."""
    old, new = results["domains"].values()
    model = folder.model(results["samples"][0]["model"])
    lines = [
        "",
        text_table(table_rows(results)),
        "",
        f"losses: held-out, nats per token; forgetting: rise on {old}; adaptation: fall on {new}",
        f"MRI: share of tokens at the busiest expert, mean over layers, {results['ideal_mri']:.3f} if balanced",
        f"recovery step: {RECOVERY}",
        "seconds: training steps only",
    ]
    for domain, item in zip((old, new), results["samples"], strict=True):
        lines += ["", f"{item['model']} goes on with {domain} at >>>:", f"{item['prompt']}>>>{item['continuation']}"]
    lines += [
        "",
        f"report: {folder.report}",
        f"routing: {folder.routing / 'report.html'}",
        f"numbers: {folder.results}",
        f'models: import hf_moe_cpt; AutoModelForCausalLM.from_pretrained("{Path(model).as_posix()}")',
    ]
    return "\n".join(lines)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """One bar for the whole job: no bar for each little step, and no advice of transformers between them."""
    bars_were_on = not datasets.are_progress_bars_disabled()
    level = transformers_logging.get_verbosity()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
        if bars_were_on:
            datasets.enable_progress_bars()


if __name__ == "__main__":
    run_script(main)
