"""Peak memory of the tensors in a contender's steps: models, gradients, optimizer, activations, buffers of operators.

On a GPU PyTorch's allocator keeps the account. On a CPU it does not: there the tensors that live between steps are
summed, and the profiler's record of every allocation inside the steps gives the rest. Both are exact and repeatable,
unlike the resident memory of a process. Source: ours.
"""

from __future__ import annotations

import gc
import json
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from hf_moe_cpt.scripts import benchmark_tools as tools
from hf_moe_cpt.scripts.bench_preference_contenders import Steps, Workload


_ALLOCATION = "[memory]"  # name of the profiler's events, whose Bytes are below 0 when memory is given back
_CPU = 0  # among the profiler's device types


class Steppable(Protocol):
    """Anything that trains a step when told to."""

    def step(self) -> None:
        """Train on the next batch."""


def peak_mebibytes(name: str, workload: Workload, num_steps: int) -> float:
    """Most memory that a contender holds in steps after the first two; call it in a process of its own."""
    return peak_of_steps(Steps(name, workload), torch.device(workload.device), num_steps)


def peak_of_steps(steps: Steppable, device: torch.device, num_steps: int) -> float:
    """Most memory in MiB that this process holds in steps after the first two."""
    for _ in range(2):  # the first makes the state of the optimizer
        steps.step()
    gc.collect()
    peak = _peak_on_gpu if device.type == "cuda" else _peak_on_cpu
    return peak(steps, num_steps) / tools.MEBIBYTE


def _peak_on_gpu(steps: Steppable, num_steps: int) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(num_steps):
        steps.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _peak_on_cpu(steps: Steppable, num_steps: int) -> int:
    before = living_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(num_steps):
            steps.step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    allocations = [event for event in events if event.get("name") == _ALLOCATION]
    held = most = 0
    for event in sorted(allocations, key=lambda event: event["ts"]):
        if event["args"]["Device Type"] == _CPU:
            held += event["args"]["Bytes"]
            most = max(most, held)
    return before + most


def living_bytes() -> int:
    """Memory of all plain tensors of this process on the CPU; what several share counts once."""
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
