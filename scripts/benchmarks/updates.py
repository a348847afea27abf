"""What an optimizer costs, whether its updates arrive, and how balanced experts stay: small models on a made language.

python scripts/benchmarks/updates.py time --layers 16
python scripts/benchmarks/updates.py learn --task cpt --rates 1e-4 2e-5
python scripts/benchmarks/updates.py learn --task rainbowpo --rates 1e-6
python scripts/benchmarks/updates.py balance --device cpu --coefficients 0.001 0.01

time: a step of each optimizer on random weights of OLMoE-1B-7B's shapes, 6.9e9 parameters with 16 layers, with nothing
else of a training step. Writes optimizer.csv.

learn: a small twin is trained on a made language in float32 and saved as bfloat16, as public checkpoints are; each way
continues it (cpt, on another language with OLMoE's layers; rainbowpo, on pairs with Llama's) on the same batches.
Writes <task>.csv: held-out loss at the end, and the share of weights that are not, and that ever were not, what they
were before. The losses of float32 are what the others are held against.

balance: a fresh model of each family is trained with `router_balance` none and with what it takes on the same batches.
Writes router_balance.csv: held-out loss, and of the steps after the first half the mean of MRI x E/K (1 is perfect
balance) and the layer where it is largest. Source: ours.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    OlmoeConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_program, run_script
from hf_moe_cpt.extras import require
from hf_moe_cpt.machine import check_names, choose_device, machine_facts, package_version, release_memory
from hf_moe_cpt.optim.adamw import StochasticAdamW
from hf_moe_cpt.reports import text_table, write_csv
from hf_moe_cpt.scripts.benchmarks import report as tools
from hf_moe_cpt.scripts.benchmarks.report import Attempt
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer


WAYS = {  # type of the weights, `optim`, `optim_args`
    "float32": (torch.float32, "adamw_torch_fused", None),
    "nearest": (torch.bfloat16, "adamw_torch_fused", None),
    "stochastic": (torch.bfloat16, "adamw_stochastic", None),
    "stochastic8": (torch.bfloat16, "adamw_stochastic_8bit", None),
    "torchao": (torch.bfloat16, "adamw_torch_8bit", "bf16_stochastic_round=True"),
}


# ---- the cost of a step ----


@dataclass
class TimeArguments(tools.BenchmarkArguments):
    """What is timed."""

    ways: list[str] = HfArg(default_factory=lambda: list(WAYS), help=f"Any of: {', '.join(WAYS)}.")
    layers: int = HfArg(default=16, help="Layers of OLMoE-1B-7B's shapes, 0.42e9 parameters each, besides both ends.")
    width: int = HfArg(default=2048, help="Hidden size; OLMoE's is 2048.")
    seconds: float = HfArg(default=3.0, help="For which each is repeated.")
    output_dir: str = HfArg(default="runs/updates", help="Folder for the results.")

    def __post_init__(self) -> None:
        check_names("--ways", self.ways, WAYS)
        self.check_least({"layers": 0, "width": 16})


def shapes_of(layers: int, width: int) -> list[tuple[int, ...]]:
    """Of the tensors of OLMoE: both ends; a layer's experts, attention, router and norms."""
    layer = [(64, width, width), (64, width, width // 2), *[(width, width)] * 4, (64, width), *[(width,)] * 4]
    return [(50304, width), (50304, width), (width,), *layer * layers]


def build_optimizer(way: str, weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the trainers would make, at a small rate."""
    settings: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.1}
    if way in ("stochastic", "stochastic8"):
        return StochasticAdamW(weights, bits=8 if way == "stochastic8" else 16, **settings)
    if way == "torchao":
        return require("torchao.optim", needed_by="--ways torchao").AdamW8bit(
            weights, bf16_stochastic_round=True, **settings
        )
    return torch.optim.AdamW(weights, fused=True, **settings)


def time_one(way: str, args: TimeArguments, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a step, and bytes beside the gradients; everything dies with this call."""
    weights = [
        torch.nn.Parameter(torch.empty(shape, dtype=WAYS[way][0], device=device).normal_(0, 0.02))
        for shape in shapes_of(args.layers, args.width)
    ]
    for weight in weights:
        weight.grad = torch.empty_like(weight).normal_(0, 1e-3)
    optimizer = build_optimizer(way, weights)
    optimizer.step()
    held = sum(_bytes(tensor) for weight in weights for tensor in (weight, *optimizer.state[weight].values()))
    number = sum(weight.numel() for weight in weights)
    return {
        "parameters": number,
        "step_ms": tools.Stopwatch(device).milliseconds(optimizer.step, args.seconds),
        "bytes_a_parameter": held / number + weights[0].element_size(),
    }


def _bytes(tensor: Any) -> int:
    """Of a tensor, or of the parts of one that is quantised."""
    if not isinstance(tensor, torch.Tensor):
        return 0
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(getattr(tensor, name).nbytes for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def time_main(argv: Sequence[str]) -> None:
    """Time each way; write and print the rows."""
    (args,) = parse_arguments((TimeArguments,), argv, program="updates.py time", description=__doc__)
    device = choose_device(args.device)
    rows = []
    for way in tqdm(args.ways, unit="way"):
        with Attempt() as attempt:
            rows.append({"way": way, **time_one(way, args, device), "status": "ok"})
        if attempt.reason is not None:
            rows.append({"way": way, "status": attempt.reason})
        release_memory(device)
    _write(rows, Path(args.output_dir) / "optimizer.csv", args, device)


def _write(rows: list[dict[str, Any]], path: Path, args: tools.BenchmarkArguments, device: torch.device) -> None:
    facts = machine_facts(device, args.commit) | {"torchao": package_version("torchao")}
    names = dict.fromkeys(name for row in rows for name in row)
    write_csv(path, [{name: row.get(name) for name in names} | facts for row in rows])
    print(text_table([{name: _shown(row.get(name)) for name in names} for row in rows]))


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- whether a twin learns ----


VOCABULARY, LENGTH = 512, 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2 * LENGTH,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
TASKS = {
    "cpt": lambda: OlmoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2),
    "rainbowpo": lambda: LlamaConfig(**SIZES),
}


@dataclass
class LearnArguments(tools.BenchmarkArguments):
    """What is trained, how long and how fast."""

    task: str = HfArg(default="cpt", help=f"One of: {', '.join(TASKS)}.")
    ways: list[str] = HfArg(default_factory=lambda: list(WAYS), help=f"Any of: {', '.join(WAYS)}.")
    rates: list[float] = HfArg(default_factory=lambda: [1e-4, 2e-5], help="Learning rates.")
    steps: int = HfArg(default=100, help="Optimizer steps of each run.")
    first_steps: int = HfArg(default=100, help="Steps in which the twin is made; with 1 it stays fresh.")
    batch_size: int = HfArg(default=8, help=f"Sequences of {LENGTH} tokens, or pairs, of a step.")
    output_dir: str = HfArg(default="runs/updates", help="Folder for the results.")

    def __post_init__(self) -> None:
        check_names("--task", [self.task], TASKS)
        check_names("--ways", self.ways, WAYS)
        self.check_least({"steps": 1, "first_steps": 1, "batch_size": 1})


def sentences(number: int, seed: int, language: int, length: int = LENGTH) -> list[list[int]]:
    """Documents of a language in which four tokens can follow each, with chances of 1/2, 1/4, 1/8, 1/8: 1.21 nats."""
    words = torch.Generator().manual_seed(language)
    followers = torch.randint(1, VOCABULARY, (VOCABULARY, 4), generator=words)
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(1, VOCABULARY, (number,), generator=generator)]
    chosen = torch.multinomial(torch.tensor([4.0, 2.0, 1.0, 1.0]), number * length, True, generator=generator)
    for choices in chosen.view(length, number)[1:]:
        tokens.append(followers[tokens[-1], choices])
    return torch.stack(tokens, dim=1).tolist()


def text_of(documents: list[list[int]]) -> Dataset:
    """Tokenised documents for `CPTTrainer`."""
    return Dataset.from_dict({"input_ids": documents})


def cpt_trainer(
    model: PreTrainedModel, args: LearnArguments, folder: str, language: int, **settings: Any
) -> CPTTrainer:
    """On text of a language, at the given rate; evaluated on 64 documents that are not trained on."""
    steps = settings["max_steps"]
    config = CPTConfig(
        folder, max_length=LENGTH, per_device_train_batch_size=args.batch_size, logging_steps=10, save_strategy="no",
        report_to="none", disable_tqdm=True, eval_on_start=False, starting_phase="decayed",
        use_cpu=args.device == "cpu", **settings,
    )  # fmt: skip
    held_out = text_of(sentences(64, 1, language))
    return CPTTrainer(model, config, text_of(sentences(steps * args.batch_size, 2, language)), eval_dataset=held_out)


def rainbowpo_trainer(model: str, args: LearnArguments, folder: str, **settings: Any) -> Any:
    """On `pairs`, at the given rate; evaluated on 64 that are not trained on."""
    from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig
    from hf_moe_cpt.trainers.rainbowpo.rainbowpo_trainer import RainbowPOTrainer

    config = RainbowPOConfig(
        folder, per_device_train_batch_size=args.batch_size, per_device_eval_batch_size=args.batch_size,
        logging_steps=10, save_strategy="no", report_to="none", disable_tqdm=True, bf16=False,
        lr_scheduler_type="constant", gradient_checkpointing=False, use_cpu=args.device == "cpu",
        model_init_kwargs={"dtype": settings.pop("dtype")}, **settings,
    )  # fmt: skip
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")
    train, held_out = (pairs(number, seed) for number, seed in ((settings["max_steps"] * args.batch_size, 3), (64, 5)))
    return RainbowPOTrainer(model, args=config, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer)


def pairs(number: int, seed: int) -> Dataset:
    """Prompts in the first language, with an answer in the second and one in the third, neither of which it knows."""
    prompts, good, bad = (sentences(number, seed + place, language) for place, language in ((0, 1), (0, 2), (1, 3)))

    def text(tokens: list[int]) -> str:
        return " ".join(f"w{token}" for token in tokens)

    rows = zip(prompts, good, bad, strict=True)
    return Dataset.from_list(
        [{"prompt": text(p[:16]) + " ", "chosen": text(g[16:48]), "rejected": text(b[16:48])} for p, g, b in rows]
    )


def make_twin(args: LearnArguments, folder: str) -> str:
    """Train a fresh twin on the first language, and save it as bfloat16; the folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TASKS[args.task](), dtype=torch.float32)
    trainer = cpt_trainer(model, args, f"{folder}/first", 1, max_steps=args.first_steps, learning_rate=2e-3)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.model.to(torch.bfloat16).save_pretrained(f"{folder}/twin")
    return f"{folder}/twin"


class ChangedWeights(TrainerCallback):
    """Which weights are not what they were, now and after any step so far."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.weights = list(model.parameters())
        self.started = [weight.detach().clone() for weight in self.weights]
        self.ever = [torch.zeros_like(weight, dtype=torch.bool) for weight in self.weights]

    def now(self) -> list[torch.Tensor]:
        """True where a weight differs."""
        return [weight != old for weight, old in zip(self.weights, self.started, strict=True)]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remember what differs after this step."""
        for ever, now in zip(self.ever, self.now(), strict=True):
            ever |= now

    def shares(self) -> list[float]:
        """Of all weights: those that differ now, and those that ever did."""
        number = sum(weight.numel() for weight in self.weights)
        return [sum(int(mask.sum()) for mask in masks) / number for masks in (self.now(), self.ever)]


def learn_one(twin: str, way: str, rate: float, args: LearnArguments, folder: str) -> dict[str, Any]:
    """Continue the twin and say where it got."""
    dtype, optim, optim_args = WAYS[way]
    settings = {"max_steps": args.steps, "learning_rate": rate, "optim": optim, "optim_args": optim_args}
    if args.task == "cpt":
        model = AutoModelForCausalLM.from_pretrained(twin, dtype=dtype)
        trainer = cpt_trainer(model, args, folder, 2, **settings)
    else:
        trainer = rainbowpo_trainer(twin, args, folder, dtype=str(dtype).removeprefix("torch."), **settings)
    trainer.remove_callback(PrinterCallback)
    changes = ChangedWeights(trainer.model)
    trainer.add_callback(changes)
    loss = "eval_new_loss" if args.task == "cpt" else "eval_loss"
    before = trainer.evaluate()[loss]
    trainer.train()
    changed, ever_changed = changes.shares()
    return {"loss_before": before, "loss": trainer.evaluate()[loss], "changed": changed, "ever_changed": ever_changed}


def measured(args: LearnArguments) -> Iterator[dict[str, Any]]:
    """A row for each way and rate."""
    with tempfile.TemporaryDirectory() as folder:
        twin = make_twin(args, folder)
        for place, (rate, way) in enumerate([(rate, way) for rate in args.rates for way in args.ways]):
            row = {"task": args.task, "rate": rate, "way": way}
            with Attempt() as attempt:
                row |= learn_one(twin, way, rate, args, f"{folder}/{place}")
            yield row | {"status": attempt.reason or "ok"}


def learn_main(argv: Sequence[str]) -> None:
    """Train each way at each rate; write and print the rows."""
    (args,) = parse_arguments((LearnArguments,), argv, program="updates.py learn", description=__doc__)
    rows = list(tqdm(measured(args), total=len(args.rates) * len(args.ways), unit="run"))
    settings = {"steps": args.steps, "first_steps": args.first_steps, "batch_size": args.batch_size}
    path = Path(args.output_dir) / f"{args.task}.csv"
    _write([row | settings for row in rows], path, args, choose_device(args.device))


# ---- how balanced experts stay ----


EXPERTS, CHOSEN = 16, 2
SMALL = {
    "vocab_size": 2 * VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
    "max_position_embeddings": LENGTH, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None,
    "num_experts_per_tok": CHOSEN,
}  # fmt: skip
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
ONE_GROUP = {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
FAMILIES: dict[str, dict[str, Any]] = {  # what a family needs besides SMALL
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


def train_one(family: str, args: BalanceArguments, seed: int, folder: str, **balance: Any) -> dict[str, Any]:
    """Train a fresh model of a family: held-out loss and the balance that it kept."""
    torch.manual_seed(seed)
    fields = {name: value for name, value in SMALL.items() if family != "jetmoe" or "head" not in name}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**fields, **FAMILIES[family]}))
    config = CPTConfig(
        folder, max_length=LENGTH, packing="concat", per_device_train_batch_size=args.batch_size, logging_steps=1,
        max_steps=args.steps, learning_rate=args.learning_rate, save_strategy="no", report_to="none",
        disable_tqdm=True, eval_on_start=False, use_cpu=args.device == "cpu", seed=seed, **balance,
    )  # fmt: skip
    train = text_of(sentences(args.steps * args.batch_size, 2 + 10 * seed, 1, 2 * LENGTH))
    trainer = CPTTrainer(model, config, train, eval_dataset=text_of(sentences(64, 1, 1, 2 * LENGTH)))
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


def balanced(args: BalanceArguments) -> Iterator[dict[str, Any]]:
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


def balance_main(argv: Sequence[str]) -> None:
    """Train all; write and print the rows."""
    (args,) = parse_arguments((BalanceArguments,), argv, program="updates.py balance", description=__doc__)
    rows = list(tqdm(balanced(args), unit="run"))
    settings = {name: getattr(args, name) for name in ("steps", "batch_size", "learning_rate")}
    path = Path(args.output_dir) / "router_balance.csv"
    _write([row | settings for row in rows], path, args, choose_device(args.device))


PROGRAMS = {"time": time_main, "learn": learn_main, "balance": balance_main}


def main(argv: Sequence[str] | None = None) -> None:
    """The program that the first word names, `time` without one."""
    run_program(PROGRAMS, argv)


if __name__ == "__main__":
    run_script(main)
