"""Means over counted tokens against plain loops in float64; padding may hold anything; parts of a batch add up."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_moe_cpt.trainers.surgery.counted_tokens import (
    NORMALISATIONS,
    counted,
    mean_over_tokens,
    num_units,
    reduce_sequences,
    reduce_tokens,
    sequence_weights,
    token_weights,
)
from tests.helpers.tolerances import assert_matches


def _batch(num_sequences: int, num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (B, S) in float64 that are NaN, inf or -inf wherever they do not count; some sequences may be empty."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_sequences, num_tokens, generator=generator, dtype=torch.float64)
    mask = torch.rand(num_sequences, num_tokens, generator=generator) < 0.6
    rubbish = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
    kind = torch.randint(3, values.shape, generator=generator)
    return torch.where(mask, values, rubbish[kind]), mask


def _means(values: torch.Tensor, mask: torch.Tensor) -> list[float | None]:
    rows = [[v for v, m in zip(*pair, strict=True) if m] for pair in zip(values.tolist(), mask.tolist(), strict=True)]
    return [sum(row) / len(row) if row else None for row in rows]


@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_means_are_those_of_plain_loops(num_sequences, num_tokens, seed):
    values, mask = _batch(num_sequences, num_tokens, seed)
    means = _means(values, mask)
    want = torch.tensor([mean or 0.0 for mean in means], dtype=torch.float64)
    assert_matches("means", mean_over_tokens(values, mask), want)
    kept = [mean for mean in means if mean is not None]
    by_sequence = sum(kept) / max(len(kept), 1)
    by_token = sum(values[mask].tolist()) / max(int(mask.sum()), 1)
    for normalisation, mean in (("sequence", by_sequence), ("token", by_token)):
        assert reduce_tokens(values, mask, normalisation).item() == pytest.approx(mean, rel=1e-12, abs=1e-12)
        assert reduce_sequences(want, mask, normalisation).item() == pytest.approx(mean, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("as_number", [False, True])
def test_parts_of_a_batch_add_up_to_it(normalisation, as_number):
    values, mask = _batch(6, 9, seed=1)
    mask[2] = False
    losses = mean_over_tokens(values, mask)
    total = num_units(mask, normalisation)
    total = int(total) if as_number else total
    parts = [slice(0, 1), slice(1, 3), slice(3, 6)]
    for whole, pieces in (
        (
            reduce_tokens(values, mask, normalisation),
            [reduce_tokens(values[part], mask[part], normalisation, total) for part in parts],
        ),
        (
            reduce_sequences(losses, mask, normalisation),
            [reduce_sequences(losses[part], mask[part], normalisation, total) for part in parts],
        ),
    ):
        assert_matches("sum of parts", torch.stack(pieces).sum(), whole)


def test_a_long_text_counts_once_by_sequence_and_by_its_length_by_token():
    mask = torch.tensor([[True, False, False], [True, True, True], [False, False, False]])
    losses = torch.tensor([1.0, 5.0, 0.0])
    assert reduce_sequences(losses, mask, "sequence").item() == 3.0
    assert reduce_sequences(losses, mask, "token").item() == 4.0
    assert sequence_weights(mask, "token").tolist() == [0.25, 0.75, 0.0]
    assert sequence_weights(mask, "sequence").tolist() == [0.5, 0.5, 0.0]
    assert token_weights(mask, "sequence").sum(1).tolist() == pytest.approx([0.5, 0.5, 0.0])
    assert [int(num_units(mask, name)) for name in NORMALISATIONS] == [2, 4]


def test_nothing_counts_without_a_nan():
    values, mask = torch.full((2, 3), torch.nan), torch.zeros(2, 3, dtype=torch.bool)
    for normalisation in NORMALISATIONS:
        assert reduce_tokens(values, mask, normalisation).item() == 0.0
        assert reduce_tokens(values, mask, normalisation, 0).item() == 0.0
    assert mean_over_tokens(values, mask).tolist() == [0.0, 0.0]


def test_no_gradient_reaches_what_does_not_count():
    values, mask = _batch(3, 5, seed=2)
    values.requires_grad_()
    mean_over_tokens(values, mask).sum().backward()
    want = torch.where(mask, 1.0 / mask.sum(1, keepdim=True).clamp(min=1).double(), 0.0)
    assert_matches("gradient", values.grad, want)


def test_half_precision_is_summed_in_float32():
    values, mask = torch.full((1, 4096), 0.1, dtype=torch.bfloat16), torch.ones(1, 4096, dtype=torch.bool)
    mean = mean_over_tokens(values, mask)
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(values[0, 0].item(), rel=1e-6)


def test_refusals():
    values, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for one, other in ((values[0], mask[0]), (values, mask[:, :2]), (values, mask.long())):
        with pytest.raises(ValueError, match=r"values .* and mask .* must both be \(sequences, tokens\), the mask"):
            counted(one, other)
    with pytest.raises(ValueError, match="normalisation='batch' is unknown: choose one of sequence, token"):
        reduce_tokens(values, mask, "batch")
    with pytest.raises(ValueError, match=r"losses \(3,\) must be one per sequence of the mask, \(2,\)"):
        reduce_sequences(torch.zeros(3), mask, "token")
