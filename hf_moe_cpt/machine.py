"""The machine at hand: which device, its memory, and the facts that a result file keeps."""

from __future__ import annotations

import datetime
import gc
import importlib
import importlib.metadata
import inspect
import platform
import subprocess
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn


DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")  # of weights, as the commands call them


def check_names(option: str, names: Sequence[str] | None, known: Collection[str]) -> None:
    """Raise ValueError for the first name that is not known; None passes."""
    for name in names or ():
        if name not in known:
            raise ValueError(f"{option} {name!r} is unknown: choose from {', '.join(known)}.")


def choose_device(name: str, known: Sequence[str] = DEVICES) -> torch.device:
    """The device of this name, which is one of `known`; "auto" is cuda where there is one, else the CPU.

    Raises ValueError if it is unknown or not there.
    """
    if name not in known:
        raise ValueError(f"--device {name!r} is unknown: choose one of {', '.join(known)}.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not {"cuda": torch.cuda, "mps": torch.mps}[name].is_available():
        raise ValueError(f"--device {name!r}: torch finds no such device here; use --device cpu.")
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more, so that the next measurement starts from the same state."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def has_process_group() -> bool:
    """Whether torch.distributed is initialised, so that sums have to be taken over ranks."""
    return dist.is_available() and dist.is_initialized()


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers, such as those of several processes, and adapters."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, all of one that is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Every parameter has its requires_grad again afterwards: PEFT trains all of an adapter that it switches on."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, was_trained in trained:
            parameter.requires_grad_(was_trained)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module has its mode, and every parameter its requires_grad, again after this context."""
    modes = [(module, module.training) for module in model.modules()]
    with gradients_kept(model):
        try:
            yield
        finally:
            for module, was_training in modes:
                module.training = was_training


def own_penalty_off(model: nn.Module) -> dict[str, bool]:
    """Keywords with which a model adds no penalty of its own to its loss, whatever its configuration says."""
    accepted = inspect.signature(inner_model(model).forward).parameters
    return {"output_router_logits": False} if "output_router_logits" in accepted else {}


def leave_process_group() -> None:
    """Destroy the process group, if there is one. To be called at the end of a script, when no trainer is alive.

    The group's threads must end before Python does: with torch 2.13 and gloo one run in twenty aborted at its exit
    ("terminate called without an active exception"). They live on in whatever still holds the group, such as a
    DistributedDataParallel wrapper inside a reference cycle, so what is unreachable is collected first.
    """
    if has_process_group():
        gc.collect()
        dist.destroy_process_group()


def machine_facts(device: torch.device, commit: str | None) -> dict[str, str]:
    """What numbers of this run belong to: device, versions, date, commit (git's if None)."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "transformers": package_version("transformers"),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": git_commit() if commit is None else commit,
    }


def package_version(package: str) -> str:
    """Version of an installed package, "" if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def git_commit() -> str:
    """Short hash of the checkout this file lies in, with a + if files differ from it; "" where there is no git."""
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""
