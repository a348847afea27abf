"""Tiny checkpoints on disk, and what is compared about them: logits, and whether a folder has been touched."""

import hashlib
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.helpers.tiny_models import SIZES, VOCABULARY


FOUR, SIX = {"num_experts": 4, "num_experts_per_tok": 2}, {"num_experts": 6, "num_experts_per_tok": 3}
MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": SIX | {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 16, "qkv_bias": False},
    "qwen3_moe": SIX | {"moe_intermediate_size": 8, "head_dim": 12},
    "olmoe": FOUR,
    "glm4_moe": {"num_experts_per_tok": 2, "moe_intermediate_size": 8},
}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def model_of(model_type: str, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A model of transformers, or of ours, with weights large enough for every block to matter."""
    fields = {**SIZES, "initializer_range": 0.3, **MIXTURES.get(model_type, {}), **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields), dtype=dtype)
    for name, weight in model.named_parameters():
        if weight.dim() == 1 and name.endswith("norm.weight"):  # all ones say nothing about where they went
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model.eval()


def biased(model: PreTrainedModel) -> PreTrainedModel:
    """The model with attention biases that matter."""
    for name, weight in model.named_parameters():
        if ".self_attn." in name and name.endswith(".bias"):
            torch.nn.init.uniform_(weight, -1.0, 1.0)
    return model


def saved(model: PreTrainedModel, folder: Path, max_shard_size: int | str = "5GB") -> Path:
    """Save as anybody does."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@torch.no_grad()
def logits_of(model_or_folder: PreTrainedModel | Path, **loading: object) -> torch.Tensor:
    """Logits (3, 21, V) in evaluation on fixed random tokens."""
    model = model_or_folder
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model, **loading)
    tokens = torch.randint(VOCABULARY, (3, 21), generator=torch.Generator().manual_seed(1))
    return model.eval()(tokens).logits


def fingerprint(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
