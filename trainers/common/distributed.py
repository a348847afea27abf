"""Several ranks: what is sharded over them, what they tell each other beside training, and how they are left. Ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from hf_moe_cpt.machine import has_process_group


def reshard(model: nn.Module) -> None:
    """Let every part of a model that FSDP2 shards hold its shards again, of which optimizers are made.

    A pass without a backward leaves the last part gathered: an optimizer made then would train tensors that are thrown
    away.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reduce_in_float32(plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Let FSDP2 sum gradients over ranks in float32, and hand out losses as they are.

    accelerate's policy for mixed precision does both in the short type, and a loss of 12.2488 is logged as 12.25. A
    policy that somebody chose stays as it is.
    """
    policy = None if plugin is None else plugin.mixed_precision_policy
    if not isinstance(policy, MixedPrecisionPolicy) or policy.param_dtype not in (torch.bfloat16, torch.float16):
        return
    if policy.param_dtype == policy.reduce_dtype == policy.output_dtype:
        plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def reduce_at_once(model: nn.Module) -> None:
    """Let FSDP2 reduce the gradients of the next backward pass in it, also where accumulation would put it off.

    What is put off lies where nobody can take it apart again.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(True)
        model.set_requires_all_reduce(True)


class RankAgreement:
    """Small exchanges over a gloo group of their own, on the CPU. To be made on all ranks at the same place.

    A question is asked at the end of a step and answered at the end of the next, so nobody waits; all ranks get the
    same answer at the same step.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.world_size = dist.get_world_size() if has_process_group() else 1
        self._group = dist.new_group(backend="gloo", timeout=timeout) if self.world_size > 1 else None
        self._asked: tuple[Tensor, Any] | None = None

    def any_of(self, flag: bool) -> bool:
        """Whether any rank had `flag` set at the call before; in one process, whether it is now. A collective."""
        if self._group is None:
            return flag
        answer = self._asked
        if answer is not None:
            answer[1].wait()
        asked = torch.tensor(int(flag))
        self._asked = asked, dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return answer is not None and bool(answer[0])

    def of_all(self, values: list[float]) -> Tensor:
        """(ranks, values): the values of every rank, in double precision, on the CPU. A collective."""
        own = torch.tensor(values, dtype=torch.float64)
        if self._group is None:
            return own[None]
        rows = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(rows, own, group=self._group)
        return torch.stack(rows)


@contextmanager
def repeatable_on_cpu(device: torch.device) -> Iterator[None]:
    """The same numbers in every run on the CPU, whatever the number of threads: torch's deterministic algorithms.

    The backward pass of the gather in front of grouped experts adds rows in the order in which threads come by, unless
    told otherwise; the switch costs nothing measurable. On CUDA it would ask for an environment variable of cuBLAS, so
    it stays as it is there (`full_determinism` of TrainingArguments is for that).
    """
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=not was_on or only_warned)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=only_warned)
