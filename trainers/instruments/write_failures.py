"""Which errors mean that a checkpoint could not be written, which a run survives, and how they are told. Source: ours.

A full disk shows in many ways: as OSError, as SafetensorError, as RuntimeError of torch's zip writer, and as
CheckpointException of torch.distributed.checkpoint, which is no Exception.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException


WRITING_FAILED = (OSError, SafetensorError, CheckpointException)
OF_TORCH_SAVE = ("PytorchStreamWriter", "file write failed", "inline_container")


class WriteFailures:
    """Keeps the first failure of this rank, so that it takes part in what all ranks do together until the end."""

    def __init__(self) -> None:
        self.first: str | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A failure to write inside is noted and ends the block; other errors are raised."""
        try:
            yield
        except WRITING_FAILED as error:
            self._note(error)
        except RuntimeError as error:
            if not any(words in str(error) for words in OF_TORCH_SAVE):
                raise
            self._note(error)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)`, or None if it fails to write."""
        with self.kept():
            return function(*args, **kwargs)

    def _note(self, error: BaseException) -> None:
        if self.first is None:
            line = next((line for line in _text_of(error).splitlines() if line.strip()), "")
            self.first = f"{type(error).__name__}: {line.strip()[:200]}"

    def of_any_rank(self, world_size: int) -> str | None:
        """The first failure among all ranks, with the rank's number if there are several. A collective."""
        if world_size == 1:
            return self.first
        failures = gather_object([self.first])
        return next((f"rank {rank}: {text}" for rank, text in enumerate(failures) if text is not None), None)


def free_space(folder: Path) -> str:
    """How much room the disk of `folder` has, as text."""
    return f"{shutil.disk_usage(folder).free / 1e9:.2f} GB free"


def _text_of(error: BaseException) -> str:
    """The first of the failures that an error stands for."""
    if isinstance(error, shutil.Error):  # of many files
        return str(error.args[0][0][2])
    if isinstance(error, CheckpointException):  # of many ranks
        return next((f"{failure[0]!r} on rank {rank}" for rank, failure in sorted(error.failures.items())), "")
    return str(error)
