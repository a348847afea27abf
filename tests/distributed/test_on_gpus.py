"""Ranks on GPUs, bfloat16 and NCCL give the losses of one GPU with the same global batch, but for rounding."""

import pytest
import torch

from tests.distributed.jobs import ON_GPUS
from tests.distributed.test_same_numbers import LOSSES
from tests.helpers.rank_runs import TRAINERS


pytestmark = [pytest.mark.slow, pytest.mark.gpu]
# How much further losses may move than by rounding the weights at the start once: that is what gathering them does, in
# every step, and EP adds up experts of two ranks that are rounded each. Gathered in float32 nothing is rounded more.
MORE = 4.0
CELLS = [(ranks, name) for ranks in (2, 4) for name in ON_GPUS[ranks]]


def moved(log, other):
    """Relative differences of all losses, in the order of the log."""
    pairs = [(a[key], b[key]) for a, b in zip(log, other, strict=True) for key in sorted(LOSSES & set(a))]
    return [abs(b - a) / abs(a) for a, b in pairs]


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("num_ranks, name", CELLS, ids=[name for _, name in CELLS])
def test_losses_are_those_of_one_gpu(results_of, num_ranks, name, kind):
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"{num_ranks} GPUs are needed")
    job = ON_GPUS[num_ranks][name]
    one = {name: found[kind]["log"] for name, found in results_of(1, ON_GPUS, "gpu-").items()}
    want = one["whole" if job.get("balance", True) else "without balance"]
    got = moved(want, results_of(num_ranks, ON_GPUS, "gpu-")[name][kind]["log"])
    assert len(got) >= 3 and max(got) <= MORE * max(moved(one["whole"], one["rounded"]))
    if name == "FSDP2 gathered in float32":
        assert max(got[:2]) < 1e-6  # before the first step, and of it
