"""Ranks of a gloo group as forks of the test's process: they have imported everything already.

Where there is a GPU they are processes of their own: a backward pass starts threads for it, after which torch refuses
one in a fork. Source: ours.
"""

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn

import dill
import torch
import torch.distributed as dist


def on_ranks(num_ranks: int, folder: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """`work(*args)` on every rank of a group of its own; what each returned. A failure on a rank raises its text."""
    folder.mkdir(exist_ok=True)
    ranks = [(rank, num_ranks, folder) for rank in range(num_ranks)]
    if torch.cuda.is_available():
        packed = dill.dumps((work, args))
        others = [get_context("spawn").Process(target=_unpack, args=(*rank, packed)) for rank in ranks]
        for other in others:
            other.start()
        for other in others:
            other.join()
    else:
        for child in [os.fork() or _run(*rank, work, args) for rank in ranks]:
            os.waitpid(child, 0)
    found = [pickle.loads((folder / f"rank-{rank}").read_bytes()) for rank in range(num_ranks)]
    failures = [f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(found) if failure is not None]
    assert not failures, "\n".join(sorted(failures, key=lambda text: "closed by peer" in text))  # the cause first
    return [result for result, _ in found]


def _unpack(rank: int, num_ranks: int, folder: Path, packed: bytes) -> None:
    torch.manual_seed(0)  # as the test's process has it
    _run(rank, num_ranks, folder, *dill.loads(packed))


def _run(rank: int, num_ranks: int, folder: Path, work: Callable[..., Any], args: tuple) -> NoReturn:
    result = None
    try:
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks))
        os.environ.update(LOCAL_WORLD_SIZE=str(num_ranks), MASTER_ADDR="localhost", MASTER_PORT="0")
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=num_ranks)
        result = work(*args)
    finally:
        failure = traceback.format_exc() if sys.exc_info()[0] is not None else None
        (folder / f"rank-{rank}").write_bytes(pickle.dumps((result, failure)))
        os._exit(0)  # without what the test's process does at its end
