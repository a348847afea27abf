"""Which tokens of a preference batch are completions, their sums and numbers.

B pairs, S tokens of the padded sequences; rows are the B chosen sequences, then the rejected ones. A token is counted
where it is predicted, so masks have S - 1 columns. Source: the layout of TRL's `DataCollatorForPreference`.
"""

from torch import Tensor

from hf_moe_cpt.trainers.rainbowpo.objective import Pair


def mask_and_labels(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Which predicted tokens belong to a completion (2B, S - 1), and labels with -100 elsewhere (2B, S)."""
    mask = inputs["completion_mask"]
    return mask[:, 1:], inputs["input_ids"].masked_fill(mask == 0, -100)


def completion_sums(values: Tensor, mask: Tensor) -> Pair:
    """Sums over completion tokens of values (2B, S - 1), which may have virtual tokens of prompt learning in front."""
    return Pair(*(values[:, -mask.shape[1] :] * mask).sum(dim=1).chunk(2))


def completion_lengths(mask: Tensor) -> Pair:
    """Tokens of each completion."""
    return Pair(*mask.sum(dim=1).chunk(2))
