"""What a rewritten checkpoint will hold, tensor by tensor, before anything is computed.

A planned tensor knows name, shape and type, and yields its values in pieces when it is written. Source: ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from hf_moe_cpt.hub.streaming_source import CheckpointReader


_NEVER_NEEDED = re.compile(r"rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class PlannedTensor:
    """pieces: yields tensors that, concatenated along the first dimension, are the value; called once."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[torch.Tensor]]
    sources: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def copied(
    reader: CheckpointReader, name: str, shape: tuple[int, ...], new_name: str | None = None, factor: float = 1.0
) -> PlannedTensor:
    """A tensor of the source, under the same name if no other is given, times a factor."""
    dtype = reader.require(name, shape)

    def pieces() -> Iterator[torch.Tensor]:
        yield scaled(reader.tensor(name), factor)

    return PlannedTensor(new_name or name, tuple(shape), dtype, pieces, (name,))


def constant(name: str, shape: tuple[int, ...], dtype: torch.dtype, value: float = 0.0) -> PlannedTensor:
    """A tensor with the same number everywhere."""
    return PlannedTensor(name, tuple(shape), dtype, lambda: iter([torch.full(shape, value, dtype=dtype)]))


def scaled(weight: torch.Tensor, factor: float) -> torch.Tensor:
    """weight x factor in its own type, rounded once."""
    if factor == 1.0:
        return weight
    return (weight.to(torch.promote_types(weight.dtype, torch.float32)) * factor).to(weight.dtype)


def skeleton(reader: CheckpointReader, model: PreTrainedModel) -> list[PlannedTensor]:
    """Everything outside the feed-forward blocks, whose names all Llama-like families share.

    model: a `cpt_moe` model on the meta device, the source's or the target's.
    """
    return [copied(reader, name, shape) for name, shape in shapes_of(model).items() if ".mlp." not in name]


def shapes_of(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shape by name of what a checkpoint of the model holds: a tied head is not stored."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}


def refuse_unused(reader: CheckpointReader, plan: Iterable[PlannedTensor], also_used: Iterable[str] = ()) -> None:
    """Raise ValueError if the source holds a tensor that the plan has no place for.

    Biases that are zero throughout, the copy of a tied embedding and stored rotary frequencies mean nothing and pass.
    """
    used = {name for tensor in plan for name in tensor.sources} | set(also_used)
    for name in sorted(set(reader.shapes) - used):
        tied = name == "lm_head.weight" and reader.config.tie_word_embeddings
        if tied or _NEVER_NEEDED.search(name):
            continue
        if name.endswith(".bias"):
            if not reader.tensor(name).any():
                continue
            reason = "the target has no such bias"
        else:
            reason = "the target has no such tensor"
        raise ValueError(f"{reader.name}: {name} cannot be carried over ({reason}): this model stays what it is.")
