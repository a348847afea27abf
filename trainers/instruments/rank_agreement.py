"""What the ranks of a run tell each other on the CPU, beside the collectives of training, at no cost to a device.

A question is asked at the end of a step and answered at the end of the next, so nobody waits; all ranks get the same
answer at the same step. In one process the answers are its own. Source: ours.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_moe_cpt.trainers.instruments.ranks import has_process_group


class RankAgreement:
    """Small exchanges over a gloo group of their own. To be made on all ranks at the same place."""

    def __init__(self, timeout: timedelta) -> None:
        self.world_size = dist.get_world_size() if has_process_group() else 1
        self._group = dist.new_group(backend="gloo", timeout=timeout) if self.world_size > 1 else None
        self._asked: tuple[Tensor, Any] | None = None

    def any_of(self, flag: bool) -> bool:
        """Ask whether any rank has `flag` set, and answer the question of the call before. A collective, once a step.

        In one process the question is answered at once.
        """
        if self._group is None:
            return flag
        answer = self.answer()
        asked = torch.tensor(int(flag))
        self._asked = asked, dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return answer

    def answer(self) -> bool:
        """The answer to the last question, once; False if there is none."""
        if self._asked is None:
            return False
        (flag, work), self._asked = self._asked, None
        work.wait()
        return bool(flag)

    def of_all(self, values: list[float]) -> Tensor:
        """(ranks, values): the values of every rank, in double precision, on the CPU. A collective."""
        own = torch.tensor(values, dtype=torch.float64)
        if self._group is None:
            return own[None]
        rows = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(rows, own, group=self._group)
        return torch.stack(rows)
