"""Whole training steps of models as people own them, through stock `Trainer`, with Liger, and through `CPTTrainer`.

python scripts/benchmarks/jobs.py --runs olmoe:stock olmoe:auto qwen3:liger qwen3:auto llama:liger llama:auto

A run is model:way. Models have the layers of OLMoE-1B-7B, ten of Qwen3-30B-A3B's or a dense Llama of 0.55 B, or are
presets of ours as pb-granular-2b and dense-570m; random bfloat16 weights, rows of one document. Ways: stock, `Trainer`
with fused AdamW; liger, the same with all of Liger; kernels, the same with `use_kernels`, what CPTTrainer adds to;
nearest, `CPTTrainer` with fused AdamW; plain and auto, `CPTTrainer` with those `kernels` and an optimizer of its
choice; bits8 and bits16, auto with moments of that size. Each runs in a process of its own. A step is timed from one
idle device to the next; the first, which compiles, stands apart. Writes jobs.csv. Source: ours.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.attempts import Attempt
from hf_moe_cpt.cli import run_program, run_script
from hf_moe_cpt.machine import check_names, choose_device, machine_facts
from hf_moe_cpt.modeling.configuration_cpt_moe import PRESETS, CptMoeConfig
from hf_moe_cpt.reports.tables import write_csv
from hf_moe_cpt.scripts.benchmarks.harness import GIBIBYTE, BenchmarkArguments, StepClock, middle
from hf_moe_cpt.scripts.benchmarks.report import text_of
from hf_moe_cpt.trainers.common.kernels import use_kernels
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer


MODELS: dict[str, dict[str, Any]] = {
    "olmoe": {"model_type": "olmoe", "intermediate_size": 1024},
    "qwen3": {"model_type": "qwen3_moe", "num_hidden_layers": 10, "norm_topk_prob": True, "head_dim": 128},
    "llama": {"model_type": "llama", "vocab_size": 128256, "hidden_size": 1024, "intermediate_size": 2816,
              "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8},
}  # fmt: skip
TINY = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16, "head_dim": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 8,
        "num_experts_per_tok": 2}  # fmt: skip
WAYS = ("stock", "liger", "kernels", "nearest", "plain", "auto", "bits8", "bits16")
OF_OURS: dict[str, dict[str, Any]] = {"plain": {"kernels": "plain"}, "nearest": {"optim": "adamw_torch_fused"},
                                      "bits8": {"optim": "adamw_stochastic_8bit"},
                                      "bits16": {"optim": "adamw_stochastic"}, "auto": {}}  # fmt: skip


@dataclass
class JobArguments(BenchmarkArguments):
    """What is run."""

    runs: list[str] = HfArg(
        default_factory=lambda: ["olmoe:stock", "olmoe:auto"],
        help=f"model:way. Models: {', '.join(MODELS)}, presets; ways: {', '.join(WAYS)}.",
    )
    batch_size: int = HfArg(default=8, help="Rows of a step.")
    length: int = HfArg(default=2048, help="Tokens of a row.")
    steps: int = HfArg(default=12, help="Timed steps.")
    warmup: int = HfArg(default=3, help="Steps before them, the first apart.")
    tiny: bool = HfArg(default=False, help="Two layers, 32 wide: a check of this script on a CPU.")
    timeout: float = HfArg(default=400.0, help="Seconds that one run may take.")


def build_model(name: str, tiny: bool, device: torch.device) -> PreTrainedModel:
    """The model with random bfloat16 weights, on the device."""
    if name in PRESETS:
        config = CptMoeConfig.from_preset(name, use_cache=False)
    else:
        settings = dict(MODELS[name])
        config = AutoConfig.for_model(settings.pop("model_type"), use_cache=False, **settings)
        config.output_router_logits = True
    for field, value in TINY.items() if tiny else ():
        if hasattr(config, field):
            setattr(config, field, value)
    config.pad_token_id = config.eos_token_id = 1
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def build_trainer(model: PreTrainedModel, way: str, args: JobArguments, folder: str, clock: StepClock) -> Trainer:
    """The trainer of a way over rows of random tokens."""
    count, vocab_size = args.batch_size * (args.warmup + args.steps), model.config.vocab_size
    ids = torch.randint(2, vocab_size, (count, args.length), generator=torch.Generator().manual_seed(1))
    rows = Dataset.from_dict({"input_ids": ids.tolist()})
    common = {
        "output_dir": folder, "per_device_train_batch_size": args.batch_size, "max_steps": args.warmup + args.steps,
        "learning_rate": 1e-5, "logging_steps": min(5, args.steps), "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": clock.device.type == "cpu", "bf16": True,
    }  # fmt: skip
    fused = {"optim": "adamw_torch_fused"}
    if way in OF_OURS:
        cpt = CPTConfig(**common, **OF_OURS[way], max_length=args.length, eval_on_start=False)
        return CPTTrainer(model, cpt, rows, callbacks=[clock])
    rows = rows.map(lambda row: {"labels": row["input_ids"]})
    stock = TrainingArguments(**common, **fused, use_liger_kernel=way == "liger")
    if way == "kernels":
        stock.kernels = "auto"
        use_kernels(model, stock, fuses_head=True)
    return Trainer(model, stock, train_dataset=rows, callbacks=[clock])


def one_main(argv: Sequence[str]) -> None:
    """Run one job and print what was measured as a line of JSON; `models` starts it."""
    (args,) = parse_arguments((JobArguments,), argv, program="jobs.py one", description=__doc__)
    name, _, way = args.runs[0].partition(":")
    logging.basicConfig(level=logging.INFO)
    device = choose_device(args.device)
    clock = StepClock(device, 0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(build_model(name, args.tiny, device), way, args, folder, clock)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    peak = torch.cuda.max_memory_allocated() / GIBIBYTE if device.type == "cuda" else None
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps({"seconds": clock.seconds, "peak_gib": peak, "loss": losses[-1]}))


def models_main(argv: Sequence[str]) -> None:
    """Run every job in turn; write and print the rows."""
    (args,) = parse_arguments((JobArguments,), argv, program="jobs.py", description=__doc__)
    args.check_least({"batch_size": 1, "length": 2, "steps": 1, "warmup": 1})
    check_names("--runs", [run.partition(":")[0] for run in args.runs], [*MODELS, *PRESETS])
    check_names("--runs", [run.partition(":")[2] for run in args.runs], WAYS)
    facts = machine_facts(choose_device(args.device), args.commit)
    given = list(argv)
    path, rows = Path(args.output_dir) / "jobs.csv", []
    for run in tqdm(args.runs, unit="run"):
        row = {"run": run, "status": "ok"}
        with Attempt() as attempt:
            row |= measured(run, given, args)
        rows.append(row | ({} if attempt.reason is None else {"status": attempt.reason}) | facts)
        write_csv(path, rows)  # what is measured stays, whatever comes
    for row in rows:
        if row["status"] != "ok":
            print(f"{row['run']}: {row['status']}")
    print(text_of(path))


def measured(run: str, given: list[str], args: JobArguments) -> dict[str, Any]:
    """The row of a run, from a process of its own. Raises RuntimeError with the last line it said if that fails."""
    start = [sys.executable, "-m", "hf_moe_cpt.scripts.benchmarks.jobs", "one", *given, "--runs", run]
    done = subprocess.run(start, capture_output=True, text=True, timeout=args.timeout)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    milliseconds = [1000 * second for second in found["seconds"]]
    taken = milliseconds[args.warmup :]
    return {
        "step_ms": middle(taken),
        "step_ms_min": min(taken),
        "step_ms_max": max(taken),
        "tokens_per_second": 1000 * args.batch_size * args.length / middle(taken),
        "peak_gib": found["peak_gib"],
        "first_step_s": milliseconds[0] / 1000,
        "loss": found["loss"],
        "steps_ms": " ".join(f"{value:.1f}" for value in milliseconds),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run every job, or the one that a first word `one` asks for."""
    run_program({"models": models_main, "one": one_main}, argv)


if __name__ == "__main__":
    run_script(main)
