"""The smallest preference pairs, and runs of `RainbowPOTrainer` and TRL's on them."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_trainer import RainbowPOTrainer
from tests.helpers.tiny_models import QUICK, VOCABULARY, tiny_model, word_tokenizer


def text(generator: torch.Generator, low: int, high: int) -> str:
    """Between low and high random words."""
    length = int(torch.randint(low, high + 1, (), generator=generator))
    return " ".join(f"w{int(word)}" for word in torch.randint(2, VOCABULARY - 2, (length,), generator=generator))


def pairs(count: int, seed: int = 0, scores: bool = False) -> Dataset:
    """Pairs of text whose completions differ in length."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        {
            "prompt": text(generator, 2, 5) + " ",
            "chosen": text(generator, 1, 9),
            "rejected": text(generator, 1, 9),
            **({"score_chosen": 1.0 + 0.1 * number, "score_rejected": 0.3} if scores else {}),
        }
        for number in range(count)
    ]
    return Dataset.from_list(rows)


def saved_model(folder: Path, kind: str = "llama", **changes: Any) -> str:
    """Folder of a tiny model on disk, as references are loaded from disk; its output is far from uniform."""
    path = folder / f"model {kind}"
    if not path.exists():
        model = tiny_model(kind, **changes)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(20.0)
        model.save_pretrained(path)
        word_tokenizer().save_pretrained(path)
    return str(path)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two steps of four pairs on the CPU in float32, every step logged."""
    pace = {"max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "learning_rate": 1e-3}
    own = {"lr_scheduler_type": "constant", "bf16": False, "gradient_checkpointing": False}
    return {"output_dir": str(folder), **QUICK, **pace, **own, **changes}


def trainer(folder: Path, model: str | PreTrainedModel | None = None, data: Dataset | None = None, **changes: Any):
    """A `RainbowPOTrainer` on 16 pairs; arguments of the trainer itself are told by their names."""
    of_trainer = {
        name: changes.pop(name)
        for name in ("ref_model", "peft_config", "eval_dataset", "processing_class")
        if name in changes
    }
    of_trainer.setdefault("processing_class", word_tokenizer())
    preset = changes.pop("preset", None)
    arguments = settings(folder / "run", **changes)
    args = RainbowPOConfig.from_preset(preset, **arguments) if preset else RainbowPOConfig(**arguments)
    return RainbowPOTrainer(
        saved_model(folder) if model is None else model,
        args=args,
        train_dataset=pairs(16) if data is None else data,
        **of_trainer,
    )
