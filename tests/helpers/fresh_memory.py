"""Fill with NaN what `torch.empty` and its kin return to our own code. The idea is flash-linear-attention's."""

import sys
from collections.abc import Callable

import pytest
import torch


_ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))

# torch lists its allocators, by identity, when a device is first set as the default. That must happen before others
# stand in their place, or tensors "on meta" would take real memory.
with torch.device("meta"):
    torch.empty(0)


def fill_fresh_memory_with_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test ends; only floating-point memory, and only if the caller is a module of the package."""
    for owner, name in _ALLOCATORS:
        monkeypatch.setattr(owner, name, _filled(getattr(owner, name)))


def _filled(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_filled(*args: object, **kwargs: object) -> torch.Tensor:
        memory = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():  # the compiler cannot look at the caller
            return memory
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("hf_moe_cpt.") and memory.dtype.is_floating_point:
            with torch.no_grad():
                memory.fill_(float("nan"))
        return memory

    return allocate_filled
