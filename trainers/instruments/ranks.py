"""Whether this process is one of several ranks, what of a model is sharded over them, and how they are left.

Source: ours.
"""

from __future__ import annotations

import dataclasses
import gc

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy


def has_process_group() -> bool:
    """Whether torch.distributed is initialised, so that sums have to be taken over ranks."""
    return dist.is_available() and dist.is_initialized()


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


def leave_process_group() -> None:
    """Destroy the process group, if there is one. To be called at the end of a script, when no trainer is alive.

    The group's threads must end before Python does: with torch 2.13 and gloo one run in twenty aborted at its exit
    ("terminate called without an active exception"). They live on in whatever still holds the group, such as a
    DistributedDataParallel wrapper inside a reference cycle, so what is unreachable is collected first.
    """
    if has_process_group():
        gc.collect()
        dist.destroy_process_group()
