"""Processes that start at once: a server imports slow libraries once, then forks a child for every script.

A child is a process of its own: it has what the server imported, and nothing of what an earlier script did. Run as a
program, this file is the server; each line of JSON that it reads is a job, each line that it writes an exit code. It
imports Python's library only, so that it also serves where the package must not be found. Source: ours.
"""

import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path


FORK = multiprocessing.get_context("fork")


class NotInstalled:
    """Finder that hides packages: importing them fails as if they were not installed."""

    def __init__(self, hidden: list[str]) -> None:
        self.hidden = hidden

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Python's import protocol."""
        if name.partition(".")[0] in self.hidden:
            raise ModuleNotFoundError(name)


class WarmProcess:
    """A server with `imported` modules, in which `hidden` packages cannot be found, started with `environment`.

    Scripts that may find them run in a server forked from it, which has imported `then` as well. What libraries read
    from the environment when they are imported (HF_ENDPOINT, HF_HOME) is the same for all scripts.
    """

    def __init__(
        self,
        environment: dict[str, str],
        imported: tuple[str, ...],
        hidden: tuple[str, ...] = (),
        then: tuple[str, ...] = (),
    ) -> None:
        words = [sys.executable, __file__, json.dumps({"imported": imported, "hidden": hidden, "then": then})]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._server = subprocess.Popen(words, env=environment, **pipes)

    def run(
        self,
        script: Path,
        arguments: list[str],
        environment: dict[str, str],
        ranks: int = 1,
        seconds: int = 800,
        hidden: bool = True,
    ) -> subprocess.CompletedProcess:
        """Run a file as `python script *arguments` does, in its folder; a child that takes longer is ended.

        ranks: as many processes at once, as torchrun starts them; what they print comes together, and the exit code is
        the first that is not 0. hidden: whether what is hidden stays so.
        """
        job = {"script": str(script), "arguments": arguments, "environment": environment, "seconds": seconds}
        print(json.dumps({**job, "ranks": ranks, "hidden": hidden}), file=self._server.stdin, flush=True)
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError(f"the server of warm processes ended with {self._server.wait()}, see its error output")
        said = ["".join(_said(script, kind, rank).read_text() for rank in range(ranks)) for kind in ("out", "err")]
        return subprocess.CompletedProcess([str(script)], int(answer), *said)

    def close(self) -> None:
        """End the server, which has nothing to clean up."""
        self._server.kill()
        self._server.communicate()


def serve(imported: list[str], hidden: list[str], then: list[str]) -> None:
    """Import, then run job after job."""
    sys.path.pop(0)  # the folder of this file
    if hidden:
        sys.meta_path.insert(0, NotInstalled(hidden))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    _import(imported)
    other = None
    for line in sys.stdin:
        job = json.loads(line)
        if job["hidden"]:
            code = _run_job(job)
        else:
            if other is None:
                other, end = FORK.Pipe()
                FORK.Process(target=_serve_with_hidden, args=(end, other, then, job["environment"])).start()
                end.close()
            other.send(job)
            code = other.recv()
        print(code, file=answers, flush=True)


def _serve_with_hidden(jobs: Connection, servers_end: Connection, then: list[str], environment: dict) -> None:
    servers_end.close()  # or the end of the server would never be the end of its jobs
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, NotInstalled)]
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    _import(then)
    while True:
        try:
            job = jobs.recv()
        except EOFError:
            return
        jobs.send(_run_job(job))


def _import(modules: list[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # or the first collection of each child would copy all of this memory


def _run_job(job: dict) -> int:
    """The exit code. multiprocessing ends a child without tearing down its modules: that is slow."""
    if threading.active_count() > 1:
        raise RuntimeError(f"a thread would not survive the fork: {threading.enumerate()}")
    port = _free_port()
    children = [FORK.Process(target=_run, args=(job, rank, port)) for rank in range(job["ranks"])]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return next((child.exitcode for child in children if child.exitcode), 0)


def _run(job: dict, rank: int, port: int) -> None:
    """What `python script` does, in this process, or one process of `torchrun script` if there are several."""
    signal.alarm(job["seconds"])
    script = Path(job["script"])
    for number, kind in ((1, "out"), (2, "err")):
        with _said(script, kind, rank).open("wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(job["environment"])
    if job["ranks"] > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "LOCAL_WORLD_SIZE": job["ranks"]}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
    os.chdir(script.parent)
    sys.argv = [str(script), *job["arguments"]]
    sys.path[:0] = [str(script.parent), *filter(None, job["environment"].get("PYTHONPATH", "").split(os.pathsep))]
    runpy.run_path(str(script), run_name="__main__")


def _said(script: Path, kind: str, rank: int) -> Path:
    return script.with_suffix(f".{rank}.{kind}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
