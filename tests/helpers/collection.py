"""A collection of routing in a process of its own: `python -m tests.helpers.collection FOLDER [SHARDS]`.

With SHARDS it kills itself with SIGKILL in the middle of writing the shard after so many. Under torchrun the ranks
share the work.
"""

import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_moe_cpt.machine import leave_process_group
from hf_moe_cpt.routing import trace as trace_writer
from hf_moe_cpt.routing.trace import RoutingTrace, collect_routing
from tests.helpers.tiny_models import tiny_model, tokenized


SETTINGS = {"batch_size": 3, "max_length": 24, "tokens_per_shard": 90, "progress": False}


def texts() -> dict:
    """Two domains of documents of different lengths."""
    return {"prose": tokenized(14, 0), "code": tokenized(9, 1)}


def collect(folder: Path) -> RoutingTrace:
    """The trace that the killed, the resumed and the shared collection must all end with."""
    model = tiny_model("mixtral")
    if dist.is_initialized():
        model = DistributedDataParallel(model)  # whose forward passes would wait for ranks that have none to make
    return collect_routing(model, texts(), folder, name="tiny", **SETTINGS)


def die_after(shards: int) -> None:
    """From now on, writing of a shard dies half way once so many are there."""
    save_file, written = trace_writer.save_file, []

    def save_or_die(tensors: dict, path: Path) -> None:
        if len(written) == shards:
            Path(path).write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
        save_file(tensors, path)

    trace_writer.save_file = save_or_die


def main() -> None:
    if len(sys.argv) > 2:
        die_after(int(sys.argv[2]))
    if "LOCAL_RANK" in os.environ:
        dist.init_process_group("gloo")
    collect(Path(sys.argv[1]))
    leave_process_group()


if __name__ == "__main__":
    main()
