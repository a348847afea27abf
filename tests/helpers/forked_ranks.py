"""Ranks of a gloo group as forks of the test's process: they have imported everything already. Source: ours."""

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(num_ranks: int, folder: Path, work: Callable[..., Any], *args: Any) -> list[Any]:
    """`work(*args)` on every rank of a group of its own; what each returned. A failure on a rank raises its text."""
    folder.mkdir(exist_ok=True)
    children = [_fork(rank, num_ranks, folder, work, args) for rank in range(num_ranks)]
    for child in children:
        os.waitpid(child, 0)
    found = [pickle.loads((folder / f"rank-{rank}").read_bytes()) for rank in range(num_ranks)]
    failures = [f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(found) if failure is not None]
    assert not failures, "\n".join(sorted(failures, key=lambda text: "closed by peer" in text))  # the cause first
    return [result for result, _ in found]


def _fork(rank: int, num_ranks: int, folder: Path, work: Callable[..., Any], args: tuple) -> int:
    child = os.fork()
    if child:
        return child
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
