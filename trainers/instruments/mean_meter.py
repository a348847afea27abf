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
        self._count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add one value (a 0-d tensor without gradient) for each name; the names must stay the same until `pop`."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._count += 1

    def pop(self) -> dict[str, float]:
        """Mean of each name since the last call; a collective when a process group exists."""
        if not self._sums:
            return {}
        names = list(self._sums)
        means = torch.stack([self._sums[name] for name in names]).double() / self._count
        self._sums, self._count = {}, 0
        if has_process_group():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        return dict(zip(names, means.tolist(), strict=True))
