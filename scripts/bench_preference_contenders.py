"""The trainers whose steps are compared, each around models of its own with equal weights, on equal batches.

A step is what `Trainer` does for a batch: `training_step` (copy to the device, policy forward, reference forward where
there is one, loss, metrics, backward), gradient clipping, the optimizer. Source: ours.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
)

from hf_moe_cpt.arguments import json_object
from hf_moe_cpt.extras import require
from hf_moe_cpt.scripts import benchmark_tools as tools
from hf_moe_cpt.scripts.bench_step_models import MODELS, config_of


NUM_BATCHES = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "mixed": torch.float32}


@dataclass(frozen=True)
class Contender:
    """A trainer and its settings. is_ours: `RainbowPOTrainer`, else `trl.DPOTrainer`."""

    is_ours: bool
    settings: Mapping[str, Any]
    has_reference: bool = True


# A number for dispersion_scale, since calibrating is no part of a step; 0.29 is that of the paper's code.
CONTENDERS = {
    "rainbowpo": Contender(True, {"dispersion_scale": 0.29}),
    "sigmoid_norm": Contender(False, {"loss_type": ["sigmoid_norm"], "beta": 10.0}),
    "rainbowpo-no-reference": Contender(True, {"mixing_alpha": 0.0, "contextual_scaling": "none"}, False),
    "sigmoid": Contender(False, {"loss_type": ["sigmoid"], "beta": 0.1}),
}


@dataclass(frozen=True)
class Workload:
    """Which model steps on which pairs; everything that is the same for all contenders.

    batch_size: pairs of a step. length: tokens of a sequence, the first quarter of them prompt; completions are random
    tokens, a third to all of the rest. lora_rank: of adapters on all linear layers, whose reference is the model
    without them; 0 trains all weights.
    """

    model: str
    overrides: str | None
    dtype: str
    batch_size: int
    length: int
    gradient_checkpointing: bool
    device: str
    seed: int
    lora_rank: int = 0


def check_model(workload: Workload) -> None:
    """Raise ValueError for a model or for overrides that cannot be, before anything is built."""
    if workload.model not in MODELS:
        if workload.overrides is not None:
            raise ValueError(f"--overrides goes with the names {', '.join(MODELS)}, not with {workload.model!r}.")
        is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", workload.model)
        if not (Path(workload.model) / "config.json").is_file() and not is_hub_id:
            raise ValueError(
                f"--model {workload.model!r} is neither a folder with a config.json nor a Hub id nor one of "
                f"{', '.join(MODELS)}."
            )
        return
    _named_config(workload)


def _named_config(workload: Workload) -> PreTrainedConfig:
    config, changes = config_of(workload.model), json_object("--overrides", workload.overrides)
    for name in changes:
        if not hasattr(config, name):
            raise ValueError(f"--overrides {workload.overrides!r}: {workload.model} has no field {name!r}.")
    return type(config)(**{**config.to_dict(), **changes})


def build_model(workload: Workload) -> PreTrainedModel:
    """The model on the device; the same weights at every call."""
    dtype, device = DTYPES[workload.dtype], torch.device(workload.device)
    if workload.model not in MODELS:
        return AutoModelForCausalLM.from_pretrained(workload.model, dtype=dtype).to(device)
    torch.manual_seed(workload.seed)
    with device:
        return AutoModelForCausalLM.from_config(_named_config(workload), dtype=dtype, attn_implementation="sdpa")


def build_tokenizer(workload: Workload) -> PreTrainedTokenizerBase:
    """The model's, or for one without a tokenizer three words; the batches hold ids that no tokenizer made."""
    if workload.model not in MODELS:
        return AutoTokenizer.from_pretrained(workload.model)
    words = Tokenizer(WordLevel({"<end>": 0, "a": 1, "b": 2}, unk_token="<end>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")


def random_pairs(workload: Workload, vocabulary_size: int) -> list[list[dict[str, list[int]]]]:
    """NUM_BATCHES lists of tokenised pairs; one completion in each list has the full length, so that shapes agree."""
    generator = torch.Generator().manual_seed(workload.seed)
    prompt_length = max(1, workload.length // 4)
    longest = workload.length - prompt_length

    def tokens(number: int) -> list[int]:
        return torch.randint(3, vocabulary_size, (number,), generator=generator).tolist()

    def completion(is_full: bool) -> list[int]:
        share = 1.0 if is_full else float(torch.rand((), generator=generator)) * 2 / 3 + 1 / 3
        return tokens(max(1, round(share * longest)))

    return [
        [
            {
                "prompt_ids": tokens(prompt_length),
                "chosen_ids": completion(number == 0),
                "rejected_ids": completion(False),
            }
            for number in range(workload.batch_size)
        ]
        for _ in range(NUM_BATCHES)
    ]


class Steps:
    """One contender ready to step: models on the device, optimizer, the collated batches of the workload."""

    def __init__(self, name: str, workload: Workload) -> None:
        self.trainer = _trainer(CONTENDERS[name], workload)
        arguments = self.trainer.args
        self.trainer.create_optimizer()
        self.model, self.optimizer = self.trainer.accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        if workload.gradient_checkpointing:
            self.trainer.model.gradient_checkpointing_enable(arguments.gradient_checkpointing_kwargs)
        self.trainer.current_gradient_accumulation_steps = 1  # the training loop sets it
        pairs = random_pairs(workload, self.trainer.model.config.get_text_config().vocab_size)
        self.batches = [self.trainer.data_collator(rows) for rows in pairs]
        self.num_done = 0
        self.loss: torch.Tensor | None = None  # of the last step, on the device

    def step(self) -> None:
        """Train on the next batch."""
        batch = self.batches[self.num_done % NUM_BATCHES]
        self.loss = self.trainer.training_step(self.model, dict(batch))
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_done += 1

    def log(self) -> None:
        """What `Trainer` does every `logging_steps`: the metrics collected since the last time become numbers."""
        self.trainer.log({"loss": float(self.loss)})


def _classes() -> dict[bool, tuple[type, type]]:
    """Configuration and trainer by `Contender.is_ours`."""
    trl = require("trl", needed_by="bench_preference.py")
    from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig
    from hf_moe_cpt.trainers.rainbowpo.rainbowpo_trainer import RainbowPOTrainer

    return {False: (trl.DPOConfig, trl.DPOTrainer), True: (RainbowPOConfig, RainbowPOTrainer)}


def _trainer(contender: Contender, workload: Workload) -> Any:
    """The trainer, set up but for what only its training loop does."""
    config_class, trainer_class = _classes()[contender.is_ours]
    config = config_class(
        output_dir=tempfile.mkdtemp(prefix="bench_preference_"),  # nothing is written into it
        per_device_train_batch_size=workload.batch_size,
        max_length=None,
        bf16=workload.dtype == "mixed",
        gradient_checkpointing=workload.gradient_checkpointing,
        use_cpu=workload.device == "cpu",
        seed=workload.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **contender.settings,
    )
    Path(config.output_dir).rmdir()
    adapters = {}
    if workload.lora_rank:
        peft = require("peft", needed_by="--lora_rank")
        adapters["peft_config"] = peft.LoraConfig(r=workload.lora_rank, target_modules="all-linear")
    has_model_as_reference = contender.has_reference and not workload.lora_rank
    trainer = trainer_class(
        model=build_model(workload),
        ref_model=build_model(workload) if has_model_as_reference else None,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " a"}]),
        processing_class=build_tokenizer(workload),
        **adapters,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def chosen_contenders(names: Sequence[str] | None) -> list[str]:
    """The named contenders, all if None, in the order of the table. Raises ValueError for a name it does not have."""
    tools.check_names("--contenders", names, CONTENDERS)
    return [name for name in CONTENDERS if names is None or name in names]


def workload_facts(workload: Workload) -> dict[str, Any]:
    """The workload as columns."""
    return dataclasses.asdict(workload) | {"trl": tools.package_version("trl")}
