"""A run of many goes on after one of them fails: the error becomes one line of the results. Source: ours."""

from __future__ import annotations

import re
from types import TracebackType

import torch


_REASON_LENGTH = 300


class Unavailable(Exception):
    """What was asked for cannot be done here; the message says why."""


class Attempt:
    """`with Attempt() as attempt:` turns an error of the block into `attempt.reason`, one line, and goes on after it.

    For code that is other people's and fails in ways nobody can list: a missing package, memory, a compiler. Whoever
    interrupts the run ends it.
    """

    def __init__(self) -> None:
        self.reason: str | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self.reason = one_line(error)
        return True


def one_line(error: Exception) -> str:
    """The message as a short single line, led by the kind of error unless it is a plain refusal."""
    message = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        wanted = re.search(r"allocate [\d.]+ \w+", message)
        message = f"out of memory: tried to {wanted[0]}" if wanted else "out of memory"
    elif not (type(error) in (Unavailable, ValueError) and message):
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    return message if len(message) <= _REASON_LENGTH else f"{message[:_REASON_LENGTH]} ..."
