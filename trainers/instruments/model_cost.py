"""What a token costs: active parameters and model FLOPs of any causal LM of transformers.

Letters: N parameters a token multiplies with, L layers, A attention heads x head width, T sequence length, E experts,
K experts per token. FLOPs of forward and backward per token: 6 N for the matrices and 6 L A T for causal attention
(12 L A T halved, because a token sees half of the sequence on average). Source: Kaplan et al. 2020 for 6 N; PaLM,
appendix B, for the attention term.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

from hf_moe_cpt.analysis.moe_layers import find_experts
from hf_moe_cpt.trainers.instruments.sharded_experts import num_experts_of


EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k")


def experts_per_token(config: PreTrainedConfig) -> int:
    """K of a MoE configuration, under whichever of the names in use; ValueError if there is none."""
    text_config = config.get_text_config()
    for name in EXPERTS_PER_TOKEN:
        if isinstance(value := getattr(text_config, name, None), int):
            return value
    raise ValueError(
        f"{type(config).__name__} names its experts per token by none of {', '.join(EXPERTS_PER_TOKEN)}: "
        "set `num_experts_per_tok` on the configuration."
    )


def active_parameters(model: nn.Module) -> int:
    """Parameters that one token multiplies with: no input embedding, and K of the E routed experts of each layer.

    A tied output head counts once, as the head. Positions in tables (embeddings) cost no multiplication.
    """
    experts = find_experts(model)
    inactive = 0
    if experts:
        chosen = experts_per_token(model.config)
        inactive = sum(_routed(module) * (1 - chosen / num_experts_of(module)) for module in experts)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    total = sum(parameter.numel() for parameter in model.parameters())
    return round(total - inactive) - (0 if tied else embedding.numel())


def _routed(experts: nn.Module) -> int:
    return sum(parameter.numel() for parameter in experts.parameters())


def flops_per_token(model: nn.Module, sequence_length: int) -> float:
    """Model FLOPs of forward and backward for one token of a sequence of `sequence_length`, without recomputation."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 6.0 * active_parameters(model) + 6.0 * config.num_hidden_layers * heads * head_dim * sequence_length
