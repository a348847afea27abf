"""Stand-ins for kernels while kept tensors are counted: the same tensors saved, nothing computed.

Fused kernels cannot run on tensors without memory. What matters to the count is which tensors an operation saves for
its backward pass, and that is written down here, kernel by kernel. Letters: T tokens, H hidden size, K experts per
token, I width of an expert, R rows of experts. Sources: the kernels of this package and of Liger-Kernel; the experts
are compared with the real ones in the tests.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.moe import ExpertsInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface


ATTENTION = "hf_moe_cpt_counted"
EXPERTS_OF = {
    "grouped_mm": "hf_moe_cpt_counted_grouped_mm",
    "hf_moe_cpt": "hf_moe_cpt_counted_fused",
    "hf_moe_cpt_low_memory": "hf_moe_cpt_counted_low_memory",
}
ROWS_PER_TILE = 128  # to which our kernels pad the rows of an expert at sizes that are worth planning


class _Saves(torch.autograd.Function):
    """Returns an empty tensor like the first, and saves the others."""

    @staticmethod
    def forward(ctx: Any, like: Tensor, *saved: Tensor) -> Tensor:
        ctx.save_for_backward(*saved)
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("A stand-in for counting has no backward pass.")


def register_counted() -> None:
    """Make attention and experts for counting known to transformers, under names that nobody else uses."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
    ExpertsInterface.register(EXPERTS_OF["grouped_mm"], _grouped_mm_experts)
    ExpertsInterface.register(EXPERTS_OF["hf_moe_cpt"], _fused_experts)
    ExpertsInterface.register(EXPERTS_OF["hf_moe_cpt_low_memory"], _low_memory_experts)


def fuse_counted(model: nn.Module) -> None:
    """Let norms and gated MLPs save what Liger-Kernel's do: the input and a number per row; gate, up and product.

    Its rotation works in place, where ours makes new tensors in another order than attention returns.
    """
    for module in model.modules():
        if hasattr(module, "rotate_query_and_key"):
            module.rotate_query_and_key = _rotate_in_place
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(_norm, module)
        elif type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation", "GELUTanh") and all(
            isinstance(getattr(module, name, None), nn.Linear) for name in ("gate_proj", "up_proj", "down_proj")
        ):
            module.forward = types.MethodType(_gated_mlp, module)


def _attention(module: nn.Module, *states: Tensor, **options: Any) -> tuple[Tensor, None]:
    """torch's, causal without a mask, as on a GPU: a mask that is made only for fake tensors must not count."""
    query, key, value, *_ = states
    options["is_causal"] = True
    options.pop("softcap", None)  # a fused kernel caps in passing
    return sdpa_attention_forward(module, query, key, value, None, **options)


def _rotate_in_place(query: Tensor, key: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return query, key


def _norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    per_row = hidden_states.new_empty(hidden_states.shape[:-1], dtype=torch.float32)
    return _Saves.apply(hidden_states, hidden_states, self.weight, per_row)


def _gated_mlp(self: nn.Module, hidden_states: Tensor) -> Tensor:
    gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
    return self.down_proj(_Saves.apply(gate, gate, up))


def _widths(self: nn.Module) -> tuple[int, int, int]:
    """E experts, 2 I columns of gate and up, H."""
    experts, double_width, hidden = self.gate_up_proj.shape
    if getattr(self, "is_transposed", False):
        double_width, hidden = hidden, double_width
    return experts, double_width, hidden


def _grouped_mm_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """transformers' grouped_mm: rows in and out, gate and up, their activation and product, three orders of rows."""
    rows, (experts, double_width, hidden) = top_k_index.numel(), _widths(self)
    make = hidden_states.new_empty
    orders = [make(rows, dtype=torch.int64) for _ in range(3)]
    products = [make(rows, width) for width in (hidden, hidden, double_width, double_width // 2, double_width // 2)]
    counts = make(experts, dtype=torch.int32)
    gates = top_k_weights.new_empty(rows, 1)
    weights = (self.gate_up_proj, self.down_proj)
    return _Saves.apply(hidden_states, *weights, *orders, *products, counts, gates)


def _fused_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Ours: tokens, gates, gate and up before the activation, the routing table."""
    return _our_experts(self, hidden_states, top_k_index, top_k_weights, keeps_gate_and_up=True)


def _low_memory_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return _our_experts(self, hidden_states, top_k_index, top_k_weights, keeps_gate_and_up=False)


def _our_experts(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, keeps_gate_and_up: bool
) -> Tensor:
    experts, double_width, _ = _widths(self)
    slots = top_k_index.numel()
    tiles = slots // ROWS_PER_TILE + min(experts, slots)
    make = hidden_states.new_empty
    table = [make(slots, dtype=torch.int32), make(tiles * ROWS_PER_TILE, dtype=torch.float32)]
    table.append(make(tiles, dtype=torch.int32))
    if keeps_gate_and_up:
        table.append(make(tiles * ROWS_PER_TILE, double_width))
    return _Saves.apply(hidden_states, hidden_states, top_k_weights, self.gate_up_proj, self.down_proj, *table)
