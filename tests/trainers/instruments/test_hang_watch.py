"""Who is to blame when nothing moves, and where the seconds of a step go."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState

from hf_moe_cpt.trainers.instruments.checkpoints import HEARTBEATS
from hf_moe_cpt.trainers.instruments.hang_watch import HangWatch, Heartbeat, blame
from hf_moe_cpt.trainers.instruments.step_timing import StepTiming


WAITS = Heartbeat(10, 50, 7, "in the step")
LATER = Heartbeat(12, 50, 7, "in the step")
CASES = {
    "a process that is stopped": (
        [WAITS, WAITS],
        [LATER, WAITS],
        "rank 1 is stopped or dead (no sign of life for 9 s)",
    ),
    "a host that nobody sees": (
        [WAITS, None],
        [LATER, None],
        "of rank 1 nothing is seen (has it ended, or is output_dir not shared by all hosts?)",
    ),
    "a loader that hangs": (
        [WAITS, Heartbeat(10, 49, 6, "waiting for data"), WAITS],
        [LATER, Heartbeat(12, 49, 6, "waiting for data"), LATER],
        "rank 1 is behind, at step 6 (waiting for data)",
    ),
    "a network that is cut": (
        [WAITS, WAITS],
        [LATER, LATER],
        "all ranks are alive and none moves, at step 7 (in the step)",
    ),
}


@pytest.mark.parametrize("before, now, said", CASES.values(), ids=CASES)
def test_what_holds_the_run_up_is_told(before, now, said):
    assert blame(before, now, 9.0) == said


def test_a_watch_ends_what_stands_still_and_nothing_else(tmp_path):
    watches = [HangWatch(tmp_path, 0.5, rank, 2) for rank in range(2)]
    said = {0: [], 1: []}
    for rank, watch in enumerate(watches):
        watch.end = said[rank].append
        watch.start()
    for step in range(12):  # longer than the timeout, but in steps
        for watch in watches:
            watch.did(step, "in the step")
        time.sleep(0.1)
    assert said == {0: [], 1: []}
    watches[0].did(12, "in the step")  # and rank 1 waits for its data
    time.sleep(1.5)
    for watch in watches:
        watch.stop()
    assert len(said[0]) == len(said[1]) == 1
    assert "Nothing has moved on rank 0 for 1 s" in said[0][0]
    assert "(hang_timeout): rank 1 is behind, at step 11 (in the step)." in said[0][0]
    assert not (tmp_path / HEARTBEATS).exists()


class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, seconds):
        time.sleep(seconds)
        return self.weight


class ThreeRanks:
    """What three ranks would tell each other: the second is slower by a quarter of a second."""

    def of_all(self, values):
        own = torch.tensor(values, dtype=torch.float64)
        return torch.stack([own, own + torch.tensor([0.0, 0.1, 0.25]), own])


def test_seconds_of_a_step_and_the_slowest_rank():
    model = Slow()
    timing = StepTiming(model)
    step = SimpleNamespace(args=None, state=TrainerState(), control=TrainerControl())
    assert timing.pop() == {}
    for _ in range(2):
        with timing.waiting_for_data():
            time.sleep(0.1)
        model(0.05)
        model.eval()(0.1)  # a reference's or an evaluation's
        model.train()
        timing.on_step_end(step.args, step.state, step.control)
    alone = timing.pop()
    assert alone.keys() == {"runtime/step", "runtime/data_wait"}
    assert 0.25 <= alone["runtime/step"] < 0.4 and 0.1 <= alone["runtime/data_wait"] < 0.15
    timing.agreement = ThreeRanks()
    with timing.waiting_for_data():
        pass
    model(0.05)
    timing.on_step_end(step.args, step.state, step.control)
    ranks = timing.pop()
    assert 0.05 <= ranks["runtime/rank_min"] < 0.1 and ranks["runtime/slowest_rank"] == 1
    assert ranks["runtime/rank_max"] == pytest.approx(ranks["runtime/rank_min"] + 0.25, abs=1e-4)
    assert ranks["runtime/data_wait"] == pytest.approx(0.1, abs=0.02)
