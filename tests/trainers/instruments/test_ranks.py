"""Leaving the process group: the group must really end, also while a wrapper around it waits in a cycle."""

import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_moe_cpt.trainers.instruments.ranks import has_process_group, leave_process_group


def test_nothing_to_leave():
    assert not has_process_group()
    leave_process_group()


def test_the_group_ends_with_the_wrappers_around_it(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    wrapper = DistributedDataParallel(nn.Linear(2, 2))
    wrapper(torch.ones(1, 2)).sum().backward()
    wrapper.cycle = [wrapper]
    seen = weakref.ref(wrapper)
    del wrapper
    assert has_process_group()
    leave_process_group()
    assert not has_process_group() and seen() is None
