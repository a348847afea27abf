"""Hardware that fails: a disk that is soon full, two hosts whose cable can be cut. Source: ours."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system in memory of `size` bytes; skips the test where mounting is not permitted."""
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@dataclass(frozen=True)
class Hosts:
    """Network namespaces; the interface of the cable has the same name in both."""

    names: tuple[str, str]
    interface: str

    def command(self, host: int) -> list[str]:
        """Words in front of a command that is to run on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    def plug(self, is_in: bool) -> None:
        """Put the cable in, or cut it: what is sent then is lost without a word."""
        for host in (0, 1):
            _ip(*self.command(host)[1:], "ip", "link", "set", self.interface, "up" if is_in else "down")


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Hosts 10.77.0.1 and 10.77.0.2; skips the test where namespaces are not permitted."""
    names = tuple(f"hmc{os.getpid()}-{host}" for host in (0, 1))
    hosts = Hosts(names, "cable")
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces are not permitted here: {getattr(error, 'stderr', error)}")
        for host, name in enumerate(names):
            _ip("-n", name, "address", "add", f"10.77.0.{host + 1}/24", "dev", "cable")
            _ip("-n", name, "link", "set", "lo", "up")
        hosts.plug(True)
        yield hosts
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
