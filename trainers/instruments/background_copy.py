"""Bring a checkpoint from a fast local folder to where it belongs while training goes on. Source: ours."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hf_moe_cpt.trainers.instruments.write_failures import WriteFailures


DONE = "copied-by-host-"  # beside the checkpoint in `_unfinished`: one mark for each host
POLL_SECONDS = 0.1


class BackgroundCopy:
    """At most one copy at a time, in a thread; what it fails with is known after `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failures = WriteFailures()

    @property
    def is_started(self) -> bool:
        """Whether there is a copy that nobody has waited for yet."""
        return self._thread is not None

    def start(self, job: Callable[[], None]) -> None:
        """Run `job` in a thread."""
        self._failures = WriteFailures()
        self._thread = threading.Thread(target=self._failures.call, args=(job,), name="checkpoint copy")
        self._thread.start()

    def wait(self) -> str | None:
        """Wait for the copy in progress, if there is one; returns why it failed, or None."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        return self._failures.first


def bring_host_part(snapshot: Path, unfinished: Path, host: int) -> None:
    """Copy what this host wrote of a checkpoint into `unfinished` and leave a mark there, or one of failure."""
    target = unfinished / snapshot.name
    failures = WriteFailures()
    failures.call(shutil.copytree, snapshot, target, dirs_exist_ok=True)
    shutil.rmtree(snapshot, ignore_errors=True)
    failures.call((unfinished / f"{DONE}{host}").write_text, failures.first or "")
    if failures.first is not None:
        raise OSError(failures.first)


def wait_for_hosts(unfinished: Path, num_hosts: int, timeout: float) -> None:
    """Return when all hosts have brought their parts. Raises OSError if one could not, or not within `timeout` s."""
    deadline = time.monotonic() + timeout
    waiting_for = set(range(num_hosts))
    while waiting_for:
        for host in sorted(waiting_for):
            mark = unfinished / f"{DONE}{host}"
            if mark.exists():
                if text := mark.read_text():
                    raise OSError(f"host {host}: {text}")
                waiting_for.discard(host)
        if waiting_for and time.monotonic() > deadline:
            raise OSError(f"host {min(waiting_for)} did not bring its part of the checkpoint within {timeout:g} s")
        if waiting_for:
            time.sleep(POLL_SECONDS)
