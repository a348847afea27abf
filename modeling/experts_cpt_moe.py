"""Feed-forward blocks: the gated MLP of dense layers and shared experts, the routed experts, and the two together.

T tokens, H hidden size, E routed experts, K experts per token, I width. Every block is
W_down (act(W_gate x) * W_up x), without biases. Layout and dispatch are those of transformers' MoE models
(`use_experts_implementation`), so any registered experts implementation runs these weights. Source: arXiv 2503.05029.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .expert_shards_cpt_moe import register_padded_shard
from .routers_cpt_moe import ROUTER_CLASSES, dtype_of_autocast


class CptMoeMLP(nn.Module):
    """Gated MLP (GEGLU with the default activation), (..., H) -> (..., H)."""

    def __init__(self, config: PreTrainedConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.down_proj.is_output_projection = True
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


@use_experts_implementation
class CptMoeExperts(nn.Module):
    """All routed experts of a layer as two 3-D parameters; `forward` below is the definition ("eager")."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum over a token's K experts of gate x expert(token): (T, H), (T, K), (T, K) -> (T, H), dtype of the tokens.

        Never drops a token. An id equal to `num_experts` marks, under expert parallelism, an expert of another rank:
        it adds nothing.
        """
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert == self.num_experts:
                continue
            token, slot = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            weighted = expert_output * top_k_weights[token, slot, None]
            output.index_add_(0, token, weighted.to(output.dtype))
        return output


class CptMoeSparseMoeBlock(nn.Module):
    """Router, routed experts and, added with weight 1, the shared experts: (B, S, H) -> (B, S, H)."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.gate = ROUTER_CLASSES[config.router_type](config)
        self.experts = CptMoeExperts(config)
        self.shared_experts = None
        if config.num_shared_experts > 0:
            self.shared_experts = CptMoeMLP(config, config.num_shared_experts * config.moe_intermediate_size)

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        """token_mask: (B * S,) bool, False for padding; only the router's balancing looks at it."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, gates, index = self.gate(tokens, token_mask)
        output = self._run_experts(tokens, index, gates)
        if self.shared_experts is not None:
            output = output + self.shared_experts(tokens)
        return output.view_as(hidden_states)

    def _run_experts(self, tokens: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """The routed experts, under autocast in its dtype.

        Autocast knows linear layers and not grouped products: float32 weights would be multiplied in float32, which
        halved the speed of the training step on an H200 (LOG.md) and waited for the device in every layer.
        """
        dtype = dtype_of_autocast(tokens.device.type)
        if dtype is None:
            return self.experts(tokens, index, gates)
        if getattr(self.experts, "_is_expert_parallel", False):  # its weights are cast where they are whole
            return self.experts(tokens.to(dtype), index, gates)
        weights = {name: weight.to(dtype) for name, weight in self.experts.named_parameters()}
        return torch.func.functional_call(self.experts, weights, (tokens.to(dtype), index, gates))


register_padded_shard(dtype_of_autocast)
