"""Bring the routing of a batch to the host without making the device wait for it. Source: ours.

The copy goes into pinned memory behind the batch's own kernels; `arrays` waits only for that copy, so that whoever
asks after starting the next batch finds it done. Letters: B sequences, S tokens, T of them no padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hf_moe_cpt.analysis.routing_tap import LayerRouting


class HostCopy:
    """Tensors on their way to the host."""

    def __init__(self, tensors: Sequence[Tensor], events: Sequence[torch.cuda.Event]) -> None:
        self._tensors, self._events = tensors, events

    def arrays(self) -> list[np.ndarray]:
        """In the order of layers, experts, probabilities and entropy of each; waits for the copies."""
        for event in self._events:
            event.synchronize()
        return [tensor.numpy() for tensor in self._tensors]


def copy_to_host(routing: Sequence[LayerRouting], mask: Tensor) -> HostCopy:
    """Start copying the T rows that count. mask: (B, S) on the host, not 0 for tokens that count."""
    kept = mask.flatten().nonzero().squeeze(1)
    is_full = len(kept) == mask.numel()
    rows_on: dict[torch.device, Tensor] = {}
    copies, events = [], []
    for layer in routing:
        for tensor in (layer.experts, layer.probabilities, layer.entropy):
            if tensor is None:
                continue
            if not is_full:
                if tensor.device not in rows_on:
                    rows_on[tensor.device] = kept.to(tensor.device)
                tensor = tensor.index_select(0, rows_on[tensor.device])
            copies.append(_begin_copy(tensor))
    for device in {layer.experts.device for layer in routing if layer.experts.is_cuda}:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        events.append(event)
    return HostCopy(copies, events)


def _begin_copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.cpu()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
