"""Where the time of a training step goes: kernels by name, gathered into a few classes.

A class is told from the name of a kernel alone, by the first pattern that matches. So the product of the head counts
as a dense product, and what a compiler fused counts as element-wise. Source: ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


CLASSES = {
    name: re.compile(pattern, re.IGNORECASE)
    for name, pattern in {
        "experts product": r"gated_up|gated_backward|grouped_product|weight_gradient|GroupProblemShape|grouped_?g?e?mm"
        r"|_fused_up_proj|_fused_down_proj|_moe_bwd|scatter2scatter|groupXtY",
        "experts order": r"permute_kernel|combine_kernel|gather_partials|block_histogram|block_offset|_scatter_kernel"
        r"|router_tail|sinkhorn|topk|_moe_router|token_gather|radixsort|bitonic|histc|kernelHistogram",
        "attention": r"flash|fmha|sdpa|scaled_dot_product|attention",
        "optimizer": r"multi_tensor|adam",
        "head and loss": r"cross_entropy|nll_loss|log_?softmax|softmax",
        "dense product": r"gemm|nvjet|cutlass|cublas|splitk|xmma|aten::(add|ba)?(b|d)?mm|aten::linear",
        "element-wise": r"elementwise|vectorized|reduce_kernel|norm|rope|rotary|copy|memcpy|memset|fill|index|cat"
        r"|embedding|triton_|silu|gelu|swiglu|geglu|scan|aten::(mul|add|sub|div|sum|mean|to|pow|neg|where|zeros)",
    }.items()
}
OTHER = "other"


def class_of(kernel: str) -> str:
    """The class of a kernel by its name."""
    return next((name for name, pattern in CLASSES.items() if pattern.search(kernel)), OTHER)


def profile_steps(step: Callable[[], Any], steps: int, device: torch.device) -> list[dict[str, Any]]:
    """Kernels of some steps, longest first: class, name, milliseconds and calls of one step, share of all kernels.

    On a CPU the operators of torch stand in for kernels.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    kernels = []
    for event in recorded.key_averages():
        if event.device_type != kind or getattr(event, "is_user_annotation", False):
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if microseconds > 0:
            kernels.append((event.key, microseconds / 1000 / steps, event.count / steps))
    total = sum(milliseconds for _, milliseconds, _ in kernels)
    return [
        {"class": class_of(name), "kernel": name, "ms": milliseconds, "calls": calls, "share": milliseconds / total}
        for name, milliseconds, calls in sorted(kernels, key=lambda kernel: -kernel[1])
    ]


def class_table(kernels_of_run: dict[str, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a run: milliseconds of a step in each class and in all kernels."""
    rows = []
    for run, kernels in kernels_of_run.items():
        spent = {name: 0.0 for name in (*CLASSES, OTHER)}
        for kernel in kernels:
            spent[kernel["class"]] += kernel["ms"]
        rows.append({"kernel ms of run": run, **{name: f"{ms:.2f}" for name, ms in spent.items()}})
        rows[-1]["all kernels"] = f"{sum(spent.values()):.2f}"
    return rows
