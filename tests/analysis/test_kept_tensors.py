"""Kept tensors are counted right: against what operations are known to save. S tokens, H states, W width."""

import pytest
import torch
from torch import Tensor, nn

from hf_moe_cpt.analysis.kept_tensors import KeptBytes, count_kept


S, H, W = 6, 8, 20


class Block(nn.Module):
    """A layer whose products and activation save tensors that can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, W, bias=False), nn.Linear(W, H, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(states)))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(11, H), nn.ModuleList([Block(), Block(), Block()])
        self.scale = nn.Parameter(torch.ones(H))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        states = self.embed(input_ids)
        for layer in self.layers:
            states = layer(states)
        return states * self.scale


def test_a_sequence_of_known_operations() -> None:
    """Each layer: input, width before and after the activation. Outside: ids of the embedding, input of the scale."""
    kept = count_kept(Decoder, lambda decoder: list(decoder.layers), S)
    assert kept.layers == (4 * S * (H + 2 * W),) * 3
    assert kept.outside == 8 * S + 4 * S * H
    assert kept.layer_input == 4 * S * H
    assert kept.fixed == 0
    assert kept.of_batch(5) == 5 * (kept.outside + 3 * kept.layers[0])
    assert kept.of_batch(5, checkpointing=True) == 5 * (kept.outside + 3 * kept.layer_input + kept.layers[0])


def test_autocast_keeps_a_copy_of_every_matrix_whatever_the_batch() -> None:
    """First products save bfloat16 copies of the embedding's float32 output; later states are bfloat16 themselves."""
    kept = count_kept(Decoder, lambda decoder: list(decoder.layers), S, torch.bfloat16)
    assert kept.fixed == 2 * 6 * H * W
    assert kept.layers == (2 * S * (H + 2 * W),) * 3
    assert kept.layer_input == 4 * S * H  # the first is the widest


def test_the_largest_layer_counts_when_layers_are_computed_again() -> None:
    kept = KeptBytes(fixed=7, outside=1, layers=(10, 30, 20), layer_input=2)
    assert kept.of_batch(2) == 2 * 61
    assert kept.of_batch(2, checkpointing=True) == 2 * (1 + 3 * 2 + 30)


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^sequence_length=0 must be at least 1\.$"):
        count_kept(Decoder, lambda decoder: list(decoder.layers), 0)
