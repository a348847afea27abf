"""The same numbers in every run on the CPU, whatever the number of threads. Source: ours, a measured difference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def repeatable_on_cpu(device: torch.device) -> Iterator[None]:
    """Use torch's deterministic algorithms inside, if `device` is the CPU, and put the setting back afterwards.

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
