"""How many tokens each expert of each layer gets, counted while any MoE of transformers trains.

Experts modules of transformers are called as `experts(hidden_states, top_k_index, top_k_weights)`: a pre-hook there
sees the experts that were really chosen, whatever the router did to choose them. Counting is a scatter-add on the
device; the host waits for it only in `pop`.

Letters: L MoE layers, E experts, K experts per token, T tokens of a call. Source: paper 1, Eq. 1 (MRI).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_moe_cpt.analysis.routing import max_routing_imbalance_from_load
from hf_moe_cpt.trainers.instruments.ranks import has_process_group


def find_experts(model: nn.Module) -> list[nn.Module]:
    """The experts module of each MoE layer in layer order; empty for a dense model."""
    return [module for module in model.modules() if _is_experts(module)]


def _is_experts(module: nn.Module) -> bool:
    if not hasattr(module, "num_experts"):
        return False
    return "top_k_index" in inspect.signature(type(module).forward).parameters or (
        getattr(module, "gate_up_proj", None) is not None and getattr(module, "down_proj", None) is not None
    )


@dataclass(frozen=True)
class ImbalanceSummary:
    """Maximum routing imbalance since the last `pop`, averaged over optimizer steps.

    mri: one value per layer in [K/E, 1]. normalized: mri x E/K, 1 when perfectly balanced.
    """

    mri: list[float]
    normalized: list[float]


class ExpertLoadMeter:
    """Expert loads of each optimizer step, and from them the maximum routing imbalance (MRI) per layer.

    A step may consist of several micro-batches on several ranks: loads are added over all of them before the maximum
    is taken, so MRI means the same for any way of splitting the batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.experts = find_experts(model)
        self._observing = False
        self._loads: list[Tensor | None] = [None] * len(self.experts)
        self._tokens: list[Tensor | int] = [0] * len(self.experts)
        self._mri_of_steps: list[Tensor] = []  # each (L, 2): MRI, MRI x E/K
        self._keep: Tensor | None = None
        self._num_experts: Tensor | None = None
        self._handles = [
            module.register_forward_pre_hook(self._hook(layer), with_kwargs=True)
            for layer, module in enumerate(self.experts)
        ]

    def close(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def observe(self, token_mask: Tensor | None = None) -> Iterator[None]:
        """Count the forward passes inside this context; recomputation by checkpointing happens outside of it.

        token_mask: (B, T) or (T,), true for tokens that count; None counts all.
        """
        self._observing = True
        self._keep = None if token_mask is None else token_mask.flatten()
        try:
            yield
        finally:
            self._observing = False
            self._keep = None

    def _hook(self, layer: int):
        def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if not self._observing:
                return
            top_k_index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
            self._count(layer, module.num_experts, top_k_index.detach())

        return count

    def _count(self, layer: int, num_experts: int, top_k_index: Tensor) -> None:
        ones = torch.ones_like(top_k_index, dtype=torch.int64)
        if self._keep is not None:
            ones = ones * self._keep.to(ones)[:, None]
        load = ones.new_zeros(num_experts).scatter_add_(0, top_k_index.flatten().long(), ones.flatten())
        previous = self._loads[layer]
        self._loads[layer] = load if previous is None else previous + load
        self._tokens[layer] = self._tokens[layer] + ones[:, 0].sum()

    def end_step(self) -> None:
        """Turn the loads counted since the last call into one MRI per layer; a collective, but no host sync."""
        if not self.experts or any(load is None for load in self._loads):
            return
        widest = max(load.numel() for load in self._loads)
        device = self._loads[0].device
        counts = torch.zeros(len(self._loads), widest + 1, dtype=torch.int64, device=device)
        for layer, load in enumerate(self._loads):
            counts[layer, : load.numel()] = load
            counts[layer, -1] = self._tokens[layer]
        if has_process_group():
            dist.all_reduce(counts)
        load, tokens = counts[:, :-1].double(), counts[:, -1].double()
        mri = max_routing_imbalance_from_load(load, tokens)
        ideal = load.sum(-1) / tokens / self._num_experts_on(device)  # K / E
        self._mri_of_steps.append(torch.stack([mri, mri / ideal], dim=-1))
        self._loads = [None] * len(self.experts)
        self._tokens = [0] * len(self.experts)

    def _num_experts_on(self, device: torch.device) -> Tensor:
        """E of each layer (L,), copied to the device once: a copy from the host waits for the device."""
        if self._num_experts is None:
            self._num_experts = torch.tensor([load.numel() for load in self._loads], device=device)
        return self._num_experts

    def pop(self) -> ImbalanceSummary | None:
        """Mean over the steps since the last call, or None if there were none; the one host synchronisation."""
        if not self._mri_of_steps:
            return None
        mean = torch.stack(self._mri_of_steps).mean(0)
        self._mri_of_steps = []
        mri, normalized = mean.T.tolist()
        return ImbalanceSummary(mri, normalized)
