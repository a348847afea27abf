"""What autograd keeps between the forward and the backward pass of a decoder, counted on a model without memory.

The model is made under `FakeTensorMode`, where tensors have shapes, types and storages and no contents: a forward pass
of a model of any size then takes a second or so of one core, and torch itself says what every operation saves. Two
passes, over one sequence and over two, tell what grows with the batch from what does not:

    kept(B sequences) = fixed + B * sequence

`fixed` is above all copies of parameters, such as those that autocast makes; parameters themselves are not counted.
Limits: what a kernel allocates inside an operation is not seen, and attention is torch's CPU one, which like the fused
GPU kernels keeps queries, keys, values, output and a number per head and token. Source: ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


@dataclass(frozen=True)
class KeptBytes:
    """Bytes that a decoder keeps for its backward pass, final norm included and head excluded.

    fixed: whatever the batch: copies of parameters, padding. Of one sequence: outside: kept outside of layers; layers:
    kept by each; layer_input: what one layer is given.
    """

    fixed: int
    outside: int
    layers: tuple[int, ...]
    layer_input: int

    def of_batch(self, sequences: int, checkpointing: bool = False) -> int:
        """Bytes kept for so many sequences, without `fixed`.

        checkpointing: layers keep their input alone and are computed again one at a time, so the largest counts once.
        """
        if checkpointing:
            return sequences * (self.outside + len(self.layers) * self.layer_input + max(self.layers, default=0))
        return sequences * (self.outside + sum(self.layers))


@dataclass
class _Count:
    """One forward pass: bytes by place, -1 being outside of all layers."""

    bytes_of_place: dict[int, int] = field(default_factory=dict)
    layer_input: int = 0
    place: int = -1
    seen: set[int] = field(default_factory=set)
    alive: list[Tensor] = field(default_factory=list)  # so that no storage's address is used twice

    def add(self, tensor: Tensor) -> Tensor:
        """Count the storage behind a tensor that an operation saves, once."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.bytes_of_place[self.place] = self.bytes_of_place.get(self.place, 0) + storage.nbytes()
        self.alive.append(tensor)
        return tensor


def count_kept(
    build: Callable[[], nn.Module],
    layers_of: Callable[[nn.Module], Sequence[nn.Module]],
    sequence_length: int,
    autocast: torch.dtype | None = None,
) -> KeptBytes:
    """Count what the module that `build` makes keeps for its backward pass, on sequences of this many tokens.

    build: makes a decoder, called as `module(input_ids=ids, use_cache=False)`; it runs in fake mode, so it must not
    look at values. layers_of: its repeated layers in order, which attribution and checkpointing go by. autocast: the
    type of CPU autocast around the pass, or None. Raises ValueError if the sequence is empty.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length={sequence_length} must be at least 1.")
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = build()
        one, two = (_count(module, layers_of(module), (batch, sequence_length), autocast) for batch in (1, 2))
    grown = {place: two.bytes_of_place[place] - size for place, size in one.bytes_of_place.items()}
    return KeptBytes(
        fixed=sum(one.bytes_of_place.values()) - sum(grown.values()),
        outside=grown.pop(-1, 0),
        layers=tuple(size for _, size in sorted(grown.items())),
        layer_input=one.layer_input,
    )


def _count(
    module: nn.Module, layers: Sequence[nn.Module], shape: tuple[int, int], autocast: torch.dtype | None
) -> _Count:
    count = _Count()
    states = [*module.parameters(), *module.buffers()]
    count.seen.update(state.untyped_storage()._cdata for state in states)
    handles = [handle for place, layer in enumerate(layers) for handle in _watch(layer, place, count)]
    mixed = contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    ids = torch.zeros(shape, dtype=torch.long)
    try:
        with torch.autograd.graph.saved_tensors_hooks(count.add, lambda tensor: tensor), mixed:
            module(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return count


def _watch(layer: nn.Module, place: int, count: _Count) -> list[torch.utils.hooks.RemovableHandle]:
    """Attribute what is saved while a layer runs to it."""

    def enter(_: nn.Module, given: tuple, named: dict) -> None:
        states = given[0] if given else named["hidden_states"]
        count.place, count.layer_input = place, max(count.layer_input, states.nbytes)

    def leave(*_: object) -> None:
        count.place = -1

    return [layer.register_forward_pre_hook(enter, with_kwargs=True), layer.register_forward_hook(leave)]
