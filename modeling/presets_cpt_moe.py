"""The paper's five models, and a tiny twin of each, as values of `CptMoeConfig` fields.

PB = penalty-balanced top-k routing, SB = Sinkhorn-balanced. Expert width is left to the configuration's own rule,
`intermediate_size / (experts per token + shared experts)`, which gives every model of a size the same active FLOPs.
Source: arXiv 2503.05029, section 4 (sizes); embedding and attention shapes follow from its 570M and 2B parameters.
"""

_PAPER_SIZE = {
    "vocab_size": 128_256,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 2048,
}

# The same ratios as above (FFN width 2.75 x hidden size) at a size that a CPU trains in minutes.
_TINY_SIZE = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}

_DENSE = {"num_experts": 0}
_GRANULAR = {"num_experts": 31, "num_experts_per_tok": 3, "num_shared_experts": 1}
_SWITCH = {"num_experts": 8, "num_experts_per_tok": 1, "num_shared_experts": 0}
_PENALTY_BALANCED = {"router_type": "softmax_topk", "router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.001}
_SINKHORN_BALANCED = {"router_type": "sinkhorn", "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}

PRESETS: dict[str, dict[str, int | float | str]] = {
    "dense-570m": _PAPER_SIZE | _DENSE,
    "pb-granular-2b": _PAPER_SIZE | _GRANULAR | _PENALTY_BALANCED,
    "sb-granular-2b": _PAPER_SIZE | _GRANULAR | _SINKHORN_BALANCED,
    "pb-switch-2b": _PAPER_SIZE | _SWITCH | _PENALTY_BALANCED,
    "sb-switch-2b": _PAPER_SIZE | _SWITCH | _SINKHORN_BALANCED,
    "dense-tiny": _TINY_SIZE | _DENSE,
    "pb-granular-tiny": _TINY_SIZE | _GRANULAR | _PENALTY_BALANCED,
    "sb-granular-tiny": _TINY_SIZE | _GRANULAR | _SINKHORN_BALANCED,
    "pb-switch-tiny": _TINY_SIZE | _SWITCH | _PENALTY_BALANCED,
    "sb-switch-tiny": _TINY_SIZE | _SWITCH | _SINKHORN_BALANCED,
}
