"""Means of device scalars between two logs, without waiting for the device in between. Source: ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from hf_moe_cpt.trainers.instruments.ranks import has_process_group


class MeanMeter:
    """Running means by name; `pop` averages over calls and ranks and is the one host synchronisation."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}  # of names that are not there in every call
        self._calls = 0

    def add(self, values: Mapping[str, Tensor], present: Mapping[str, Tensor] | None = None) -> None:
        """Add one value (a 0-d tensor without gradient) for each name; the names must stay the same until `pop`.

        present: for names that there is nothing to say of at times, whether there is (0-d bool): else the value does
        not count, whatever it is.
        """
        for name, there in (present or {}).items():
            self._counts[name] = self._counts[name] + there if name in self._counts else there.to(torch.int64)
        for name, value in values.items():
            value = torch.where(present[name], value, 0.0) if present and name in present else value
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._calls += 1

    def pop(self) -> dict[str, float]:
        """Mean of each name since the last call, without names that never counted; a collective with several ranks."""
        if not self._sums:
            return {}
        names = list(self._sums)
        sums = torch.stack([self._sums[name] for name in names]).double()
        counts = torch.stack([self._counts.get(name, sums.new_tensor(self._calls)).double() for name in names])
        self._sums, self._counts, self._calls = {}, {}, 0
        both = torch.stack([sums, counts])
        if has_process_group():
            dist.all_reduce(both)
        return {name: total / count for name, total, count in zip(names, *both.tolist(), strict=True) if count}
