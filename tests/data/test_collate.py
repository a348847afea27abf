"""Blocks stack along a new first dimension, and blocks that do not fit are named."""

import pytest
import torch

from hf_moe_cpt.data.collate import stack_blocks


def test_tensors_and_sources_are_stacked():
    items = [{"input_ids": torch.tensor([1, 2]), "source": 0}, {"input_ids": torch.tensor([3, 4]), "source": 1}]
    batch = stack_blocks(items)
    assert batch["input_ids"].tolist() == [[1, 2], [3, 4]]
    assert batch["source"].tolist() == [0, 1] and batch["source"].dtype == torch.int64


def test_blocks_of_two_lengths_are_refused():
    with pytest.raises(ValueError, match=r"'input_ids' has the shapes \[\(2,\), \(3,\)\] in one batch"):
        stack_blocks([{"input_ids": torch.zeros(2)}, {"input_ids": torch.zeros(3)}])


@pytest.mark.parametrize("first, second", [({"a", "b"}, {"a"}), ({"a"}, {"a", "b"})])
def test_blocks_of_two_packings_are_refused(first, second):
    with pytest.raises(ValueError, match="'b': pack new and replay data in the same way"):
        stack_blocks([dict.fromkeys(first, 0), dict.fromkeys(second, 0)])
