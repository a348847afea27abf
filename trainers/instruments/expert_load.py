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
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_moe_cpt.analysis.moe_layers import find_experts, moe_layers
from hf_moe_cpt.analysis.routing import max_routing_imbalance_from_load
from hf_moe_cpt.trainers.instruments.ranks import has_process_group
from hf_moe_cpt.trainers.instruments.sharded_experts import num_experts_of


MAX_PENDING_NUMBERS = 1 << 23  # expert numbers that wait to be counted: 64 MiB of integers


@dataclass(frozen=True)
class ImbalanceSummary:
    """Balance of the experts since the last `pop`, averaged over optimizer steps; one value per layer.

    mri: in [K/E, 1]. normalized: mri x E/K, 1 when perfectly balanced. load_entropy: over log E, in [0, 1], 1 when
    perfectly balanced.
    """

    mri: list[float]
    normalized: list[float]
    load_entropy: list[float]


def _takes_states_only(experts: nn.Module) -> bool:
    return list(inspect.signature(type(experts).forward).parameters)[1:] == ["hidden_states"]


class ExpertLoadMeter:
    """Expert loads of each optimizer step, and from them the balance of the experts in each layer.

    A step may consist of several micro-batches on several ranks: loads are added over all of them before the maximum
    is taken, so MRI means the same for any way of splitting the batch. Layers are counted together, a few kernels for
    all of them: one by one, the launches alone cost a training step of a small model some percent.
    """

    def __init__(self, model: nn.Module) -> None:
        self.experts = find_experts(model)
        self._widths = [num_experts_of(module) for module in self.experts]
        self._observing = False
        self._pending: list[tuple[int, Tensor]] = []  # layer, its (T, K) experts, not counted yet
        self._pending_numbers = 0
        self._counts: dict[torch.device, Tensor] = {}  # (L, widest E + 1): load of each expert, then tokens
        self._rows: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
        self._balance_of_steps: list[Tensor] = []  # each (L, 3): MRI, MRI x E/K, entropy over log E
        self._keep: Tensor | None = None
        self._num_experts: Tensor | None = None
        self._top_of_router: dict[int, Tensor] = {}
        self._handles = [
            module.register_forward_pre_hook(self._hook(layer), with_kwargs=True)
            for layer, module in enumerate(self.experts)
        ]
        if any(_takes_states_only(module) for module in self.experts):
            self._handles += [self._watch_router(i, layer.router) for i, layer in enumerate(moe_layers(model))]

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
            self._count_pending()
        finally:
            self._observing = False
            self._keep, self._pending, self._pending_numbers = None, [], 0

    def _hook(self, layer: int):
        def hear(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if not self._observing:
                return
            index = self._chosen(layer, args, kwargs)
            self._pending.append((layer, index))
            self._pending_numbers += index.numel()
            if self._pending_numbers > MAX_PENDING_NUMBERS:
                self._count_pending()

        return hear

    def _chosen(self, layer: int, args: tuple, kwargs: dict) -> Tensor:
        """The experts that a call was given, (T, K) integers."""
        given = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)]
        index = next((part for part in given if not part.is_floating_point()), None)
        # Llama 4 gives every expert every token, and its scores say which of them count
        return self._top_of_router.pop(layer) if index is None else index.detach().flatten(0, -2)

    def _watch_router(self, layer: int, router: nn.Module) -> RemovableHandle:
        top_k = next(part.top_k for part in router.modules() if hasattr(part, "top_k"))

        def keep(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> None:
            if self._observing:
                self._top_of_router[layer] = output[1].detach().flatten(0, -2).topk(top_k).indices

        return router.register_forward_hook(keep)

    def _count_pending(self) -> None:
        """Add what was heard to the counts, all layers of one shape at once."""
        pending, self._pending, self._pending_numbers = self._pending, [], 0
        for (device, (num_tokens, _)), group in groupby(pending, key=lambda item: (item[1].device, item[1].shape)):
            layers, indices = zip(*group, strict=True)
            counts = self._counts_on(device)
            rows = self._rows_on(device, layers)
            cells = torch.stack(indices).long() + rows[:, None, None] * counts.shape[1]  # (layers, T, K)
            if self._keep is None:
                votes, tokens = torch.ones_like(cells), torch.full_like(rows, num_tokens)
            else:
                keep = self._keep.to(device).bool().long()
                votes, tokens = keep[None, :, None].expand_as(cells).contiguous(), keep.sum().expand_as(rows)
            counts.view(-1).scatter_add_(0, cells.flatten(), votes.flatten())
            counts[:, -1].index_add_(0, rows, tokens)

    def _counts_on(self, device: torch.device) -> Tensor:
        if device not in self._counts:
            self._counts[device] = torch.zeros(
                len(self.experts), max(self._widths) + 1, dtype=torch.int64, device=device
            )
        return self._counts[device]

    def _rows_on(self, device: torch.device, layers: tuple[int, ...]) -> Tensor:
        """The numbers of these layers, copied to the device once: a copy from the host waits for the device."""
        if (device, layers) not in self._rows:
            self._rows[device, layers] = torch.tensor(layers, device=device)
        return self._rows[device, layers]

    def end_step(self) -> None:
        """Turn the loads counted since the last call into each layer's balance; a collective, but no host sync."""
        if not self._counts:
            return
        counts, *others = self._counts.values()
        for other in others:
            counts = counts + other.to(counts.device)
        self._counts = {}
        if has_process_group():
            dist.all_reduce(counts)
        load, tokens = counts[:, :-1].double(), counts[:, -1].double()
        widths = self._num_experts_on(counts.device)
        mri = max_routing_imbalance_from_load(load, tokens)
        ideal = load.sum(-1) / tokens / widths  # K / E
        share = load / load.sum(-1, keepdim=True)
        entropy = torch.special.entr(share).sum(-1) / widths.double().log()
        self._balance_of_steps.append(torch.stack([mri, mri / ideal, entropy], dim=-1))

    def _num_experts_on(self, device: torch.device) -> Tensor:
        """E of each layer (L,), copied to the device once."""
        if self._num_experts is None:
            self._num_experts = torch.tensor(self._widths, device=device)
        return self._num_experts

    def pop(self) -> ImbalanceSummary | None:
        """Mean over the steps since the last call, or None if there were none; the one host synchronisation."""
        if not self._balance_of_steps:
            return None
        mean = torch.stack(self._balance_of_steps).mean(0)
        self._balance_of_steps = []
        return ImbalanceSummary(*mean.T.tolist())
