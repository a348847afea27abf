"""Ranks on GPUs, bfloat16 and NCCL give the losses of one GPU with the same global batch, but for rounding."""

import pytest
import torch

from tests.distributed.jobs import ON_GPUS
from tests.distributed.test_same_numbers import LOSSES
from tests.helpers.rank_runs import TRAINERS


pytestmark = [pytest.mark.slow, pytest.mark.gpu]
# Relative, of numbers of 8 bits after three steps in which a router may choose another expert; RainbowPO's losses are
# of small differences between large log-probabilities.
ROUNDING = {"cpt": 2**-7, "surgery": 2**-7, "rainbowpo": 2**-4}
CELLS = [(ranks, name) for ranks in (2, 4) for name in ON_GPUS[ranks]]


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("num_ranks, name", CELLS, ids=[name for _, name in CELLS])
def test_losses_are_those_of_one_gpu(results_of, num_ranks, name, kind):
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"{num_ranks} GPUs are needed")
    job = ON_GPUS[num_ranks][name]
    want = results_of(1, ON_GPUS, "gpu-")["whole" if job.get("balance", True) else "without balance"][kind]["log"]
    got = results_of(num_ranks, ON_GPUS, "gpu-")[name][kind]["log"]
    losses = [(entry[key], other[key]) for entry, other in zip(want, got, strict=True) for key in LOSSES & set(entry)]
    assert len(losses) >= 3
    for one, several in losses:
        assert several == pytest.approx(one, rel=ROUNDING[kind])
