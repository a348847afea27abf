"""What the balancing switch reaches: small models of many families, from scratch, with `none` and with what they take.

python scripts/benchmarks/router_balance.py --device cpu

Each is trained for --steps on a made language with the same batches. Writes router_balance.csv:
held-out loss, and of the steps after the first half the mean of MRI x E/K (1 is perfect balance) and the layer where
it is largest. Source: ours.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.machine import check_names, choose_device, machine_facts
from hf_moe_cpt.reports.tables import text_table, write_csv
from hf_moe_cpt.scripts.benchmarks import harness as tools
from hf_moe_cpt.scripts.benchmarks.harness import Attempt
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer


VOCABULARY, WORDS, LENGTH, EXPERTS, CHOSEN = 1024, 512, 64, 16, 2  # the text has half of the tokens
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
    "max_position_embeddings": LENGTH, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None,
    "num_experts_per_tok": CHOSEN,
}  # fmt: skip
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
ONE_GROUP = {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
FAMILIES: dict[str, dict[str, Any]] = {  # what a family needs besides SIZES
    "mixtral": {"num_local_experts": EXPERTS, "sliding_window": None},
    "olmoe": {"num_experts": EXPERTS},
    "qwen3_moe": {"num_experts": EXPERTS},
    "gpt_oss": {"num_local_experts": EXPERTS, "layer_types": ["full_attention"] * 4},
    "granitemoe": {"num_local_experts": EXPERTS},
    "jetmoe": {"num_local_experts": EXPERTS, "kv_channels": 16},
    "deepseek_v3": {**ONE_GROUP, **LATENT, "head_dim": 8},
    "glm4_moe": ONE_GROUP,
    "ernie4_5_moe": {"moe_num_experts": EXPERTS, "moe_k": CHOSEN, "moe_layer_start_index": 0},
    "cpt_moe": {"num_experts": EXPERTS, "router_type": "bias_topk", "moe_intermediate_size": 64},
}
TAKE_A_BIAS = ("deepseek_v3", "glm4_moe", "ernie4_5_moe", "cpt_moe")


@dataclass
class BalanceArguments(tools.BenchmarkArguments):
    """What is trained, and how long."""

    families: list[str] = HfArg(default_factory=lambda: list(FAMILIES), help=f"Any of: {', '.join(FAMILIES)}.")
    steps: int = HfArg(default=150, help="Optimizer steps of each run.")
    batch_size: int = HfArg(default=16, help=f"Sequences of {LENGTH} tokens of a step.")
    learning_rate: float = HfArg(default=3e-3, help="Peak rate.")
    coefficients: list[float] = HfArg(default_factory=lambda: [0.01], help="Of the penalty, a run with each.")
    seeds: int = HfArg(default=1, help="Runs of each, with weights and data of their own.")
    output_dir: str = HfArg(default="runs/router_balance", help="Folder for the results.")

    def __post_init__(self) -> None:
        check_names("--families", self.families, FAMILIES)
        self.check_least({"steps": 2, "batch_size": 1, "seeds": 1})


def sentences(number: int, seed: int) -> Dataset:
    """Documents of a language in which four tokens can follow each, with chances of 1/2, 1/4, 1/8, 1/8: 1.21 nats."""
    followers = torch.randint(1, WORDS, (WORDS, 4), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(1, WORDS, (number,), generator=generator)]
    chosen = torch.multinomial(torch.tensor([4.0, 2.0, 1.0, 1.0]), number * 2 * LENGTH, True, generator=generator)
    for choices in chosen.view(2 * LENGTH, number)[1:]:
        tokens.append(followers[tokens[-1], choices])
    return Dataset.from_dict({"input_ids": torch.stack(tokens, dim=1).tolist()})


def train_one(family: str, args: BalanceArguments, seed: int, folder: str, **balance: Any) -> dict[str, Any]:
    """Train a fresh model of a family: held-out loss and the balance that it kept."""
    torch.manual_seed(seed)
    fields = {name: value for name, value in SIZES.items() if family != "jetmoe" or "head" not in name}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**fields, **FAMILIES[family]}))
    config = CPTConfig(
        folder, max_length=LENGTH, packing="concat", per_device_train_batch_size=args.batch_size, logging_steps=1,
        max_steps=args.steps, learning_rate=args.learning_rate, save_strategy="no", report_to="none",
        disable_tqdm=True, eval_on_start=False, use_cpu=args.device == "cpu", seed=seed, **balance,
    )  # fmt: skip
    train = sentences(args.steps * args.batch_size, 2 + 10 * seed)
    trainer = CPTTrainer(model, config, train, eval_dataset=sentences(64, 1))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    late = [row for row in trainer.state.log_history if "mri_normalized" in row and 2 * row["step"] > args.steps]
    layers = [name for name in late[0] if name.startswith("mri_normalized/")]
    means = {name: sum(row[name] for row in late) / len(late) for name in layers}
    return {
        "loss": trainer.evaluate()["eval_new_loss"],
        "mri_normalized": sum(means.values()) / len(means),
        "worst_layer": max(means.values()),
    }


def measured(args: BalanceArguments) -> Iterator[dict[str, Any]]:
    """A row for each family, seed and way."""
    for family in args.families:
        penalties = [{"router_balance": "aux", "router_aux_loss_coef": value} for value in args.coefficients]
        ways = [{"router_balance": "bias"}] if family in TAKE_A_BIAS else penalties
        for seed in range(args.seeds):
            for way in [{"router_balance": "none"}, *ways]:
                row = {"family": family, "seed": seed, **way}
                with Attempt() as attempt, tempfile.TemporaryDirectory() as folder:
                    row |= train_one(family, args, seed, folder, **way)
                yield row | {"status": attempt.reason or "ok"}


def main(argv: Sequence[str] | None = None) -> None:
    """Train all; write and print the rows."""
    (args,) = parse_arguments((BalanceArguments,), argv, program="router_balance.py", description=__doc__)
    rows = list(tqdm(measured(args), unit="run"))
    settings = {name: getattr(args, name) for name in ("steps", "batch_size", "learning_rate")}
    facts = machine_facts(choose_device(args.device), args.commit)
    names = dict.fromkeys(name for row in rows for name in row)
    write_csv(Path(args.output_dir) / "router_balance.csv", [
        {name: row.get(name) for name in names} | settings | facts for row in rows
    ])  # fmt: skip
    print(text_table([{name: _shown(row.get(name)) for name in names} for row in rows]))


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_script(main)
