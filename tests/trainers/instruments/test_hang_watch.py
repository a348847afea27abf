"""Who is to blame when nothing moves, and where the seconds of a step go."""

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState

from hf_moe_cpt.trainers.instruments import step_timing
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
    """On a clock of the test, so that a busy machine decides nothing: a round every 2 s, a timeout of 10 s."""
    watches = [HangWatch(tmp_path, 10.0, rank, 2) for rank in range(2)]
    for watch in watches:
        watch.folder.mkdir(parents=True, exist_ok=True)
    for step in range(12):  # longer than the timeout, but in steps
        for watch in watches:
            watch.did(step, "in the step")
        assert [watch.beat(2.0 * step) for watch in watches] == [None, None]
    watches[0].did(12, "in the step")  # and rank 1 waits for its data
    said = [[watch.beat(now) for watch in watches] for now in range(24, 38, 2)]
    assert said[:5] == [[None, None]] * 5 and said[5][0] is None  # rank 0 did something a round later than rank 1
    cause = "(hang_timeout): rank 1 is behind, at step 11 (in the step)."
    assert said[5][1] == f"Nothing has moved on rank 1 for 12 s {cause}"
    assert said[6][0] == f"Nothing has moved on rank 0 for 12 s {cause}"


def test_the_thread_of_a_watch_ends_the_process_once_and_cleans_up(tmp_path):
    watch, said, told = HangWatch(tmp_path, 0.1, 0, 1), [], threading.Event()
    watch.end = lambda message: (said.append(message), told.set())
    watch.start()
    assert told.wait(120.0)
    watch.stop()
    assert len(said) == 1 and "all ranks are alive and none moves, at step 0 (starting)" in said[0]
    assert not (tmp_path / HEARTBEATS).exists()


class Clock:
    """What `time` is to the code under test: it goes on when a test says so."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


class Slow(nn.Module):
    """A forward pass that takes as long as its input says."""

    def __init__(self, clock):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.clock = clock

    def forward(self, seconds):
        self.clock.now += seconds
        return self.weight


class ThreeRanks:
    """What three ranks would tell each other: the second is slower by a quarter of a second."""

    def of_all(self, values):
        own = torch.tensor(values, dtype=torch.float64)
        return torch.stack([own, own + torch.tensor([0.0, 0.1, 0.25]), own])


def test_seconds_of_a_step_and_the_slowest_rank(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(step_timing, "time", clock)
    model = Slow(clock)
    timing = StepTiming(model)
    step = SimpleNamespace(args=None, state=TrainerState(), control=TrainerControl())
    assert timing.pop() == {}
    for _ in range(2):
        with timing.waiting_for_data():
            clock.now += 0.1
        model(0.05)
        model.eval()(0.1)  # a reference's or an evaluation's
        model.train()
        timing.on_step_end(step.args, step.state, step.control)
    clock.now += 0.02  # in which the loss is read
    assert timing.pop() == pytest.approx({"runtime/step": 0.26, "runtime/data_wait": 0.1})
    timing.agreement = ThreeRanks()
    with timing.waiting_for_data():
        pass
    model(0.05)
    timing.on_step_end(step.args, step.state, step.control)
    ranks = timing.pop()
    wanted = {"runtime/step": 0.05, "runtime/data_wait": 0.1, "runtime/slowest_rank": 1}
    assert ranks == pytest.approx(wanted | {"runtime/rank_min": 0.05, "runtime/rank_max": 0.3})
