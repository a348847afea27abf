"""What a preference trainer logs: sums kept on the device and divided when somebody looks.

B pairs, S tokens of the padded sequences. Rows of a batch are the chosen sequences, then the rejected ones.
Source: names of TRL's `DPOTrainer` where it has them; the others ours.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from hf_moe_cpt.trainers.instruments.ranks import has_process_group
from hf_moe_cpt.trainers.rainbowpo.objective import Pair, PreferenceTerms, per_token


ROUNDINGS = 4  # in a log-probability of a text


class PreferenceMeter:
    """Weighted means, minima and maxima by name between two logs; `pop` is the one host synchronisation."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (2,) sum of values, sum of weights
        self._ranges: dict[str, Tensor] = {}  # (2,) least, most

    def add(self, values: Mapping[str, tuple[Tensor, Tensor | int]]) -> None:
        """Add (sum of values, number of values) for each name, 0-d tensors or numbers."""
        for name, (total, weight) in values.items():
            both = torch.stack([total.detach().double(), torch.as_tensor(weight, device=total.device).double()])
            self._sums[name] = self._sums[name] + both if name in self._sums else both

    def add_range(self, name: str, values: Tensor) -> None:
        """Widen the range of a name by values of any shape."""
        low, high = torch.aminmax(values.detach().double())
        if name in self._ranges:
            low = torch.minimum(low, self._ranges[name][0])
            high = torch.maximum(high, self._ranges[name][1])
        self._ranges[name] = torch.stack([low, high])

    def pop(self) -> dict[str, float]:
        """Means by name, `<name>/min` and `<name>/max` of ranges; a collective when a process group exists."""
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values()))
        ranges = torch.stack(list(self._ranges.values())) if self._ranges else sums.new_zeros(0, 2)
        if has_process_group():
            dist.all_reduce(sums)
            ranges = torch.stack([ranges[:, 0], -ranges[:, 1]])
            dist.all_reduce(ranges, op=dist.ReduceOp.MIN)
            ranges = torch.stack([ranges[0], -ranges[1]], dim=1)
        means = dict(zip(self._sums, (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist(), strict=True))
        for name, (low, high) in zip(self._ranges, ranges.tolist(), strict=True):
            means |= {f"{name}/min": low, f"{name}/max": high}
        self._sums, self._ranges = {}, {}
        return means


def token_statistics(outputs: FusedCausalLMOutput, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Entropy, mean logits and top-1 accuracy over completion tokens, with TRL's names. mask: (2B, S - 1)."""
    length, mask = mask.shape[1], mask.bool()
    chosen, rejected = mask.chunk(2)
    of_chosen, of_rejected = outputs.mean_logits[:, -length:].masked_fill(~mask, 0.0).chunk(2)
    top1 = outputs.is_top1[:, -length:].chunk(2)[0] & chosen
    return {
        "entropy": (outputs.entropy[:, -length:].masked_fill(~mask, 0.0).sum(), mask.sum()),
        "logits/chosen": (of_chosen.sum(), chosen.sum()),
        "logits/rejected": (of_rejected.sum(), rejected.sum()),
        "mean_token_accuracy": (top1.sum(), chosen.sum()),
    }


def pair_statistics(
    terms: PreferenceTerms, logps: Pair, ref_logps: Pair | None, lengths: Pair, beta: float, is_per_token: bool
) -> dict[str, tuple[Tensor, int]]:
    """Means over pairs: rewards in the units of the objective, log-probabilities summed and per token, lengths.

    A reward is beta * (log-probability - reference's), of sums or per token as the objective has it; without a
    reference beta * log-probability. A pair whose rewards differ by no more than rounding is half a hit, as where the
    policy still is its reference: ROUNDINGS times eps of the largest value that the four log-probabilities can reach
    between them, their sum, as each is a sum over tokens and holds some roundings of its own size.
    """
    normed = per_token(logps, lengths)
    own = normed if is_per_token else logps
    reference = None if ref_logps is None else per_token(ref_logps, lengths) if is_per_token else ref_logps
    rewards = own if reference is None else Pair(*(ours - theirs for ours, theirs in zip(own, reference, strict=True)))
    rewards = Pair(*(beta * reward for reward in rewards))
    prefers_chosen = own.chosen > own.rejected
    margins, taken = rewards.chosen - rewards.rejected, [*own, *(reference or ())]
    noise = ROUNDINGS * torch.finfo(margins.dtype).eps * beta * sum(value.abs() for value in taken)
    values = {
        "rewards/chosen": rewards.chosen,
        "rewards/rejected": rewards.rejected,
        "rewards/accuracies": ((margins > noise).double() + (margins >= -noise)) / 2,
        "rewards/margins": margins,
        "logps/chosen": logps.chosen,
        "logps/rejected": logps.rejected,
        "logps_norm/chosen": normed.chosen,
        "logps_norm/rejected": normed.rejected,
        "margin/effective": terms.margin,
        "loss/preference": terms.preference,
        "length/chosen": lengths.chosen,
        "length/rejected": lengths.rejected,
        "length/preferred": torch.where(prefers_chosen, lengths.chosen, lengths.rejected),
    }
    return {name: (value.sum(), value.numel()) for name, value in values.items()}
