"""Guard, means and clocks of the trainers."""

import math
from types import SimpleNamespace

import pytest
import torch

from hf_moe_cpt.trainers.instruments import throughput
from hf_moe_cpt.trainers.instruments.forgetting_log import starting_losses
from hf_moe_cpt.trainers.instruments.loss_guard import LossGuard
from hf_moe_cpt.trainers.instruments.mean_meter import MeanMeter
from hf_moe_cpt.trainers.instruments.throughput import ThroughputMeter


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_guard_names_step_and_batch(value):
    guard = LossGuard()
    guard.record(torch.tensor(1.0), 6, "blocks 40 to 47")
    guard.check(str)
    with pytest.raises(FloatingPointError, match=r"step 7 is not finite \(blocks 48 to 55\)"):
        guard.record(torch.tensor(value), 7, "blocks 48 to 55")


def test_means_over_calls_and_reset():
    meter = MeanMeter()
    meter.add({"aux_loss": torch.tensor(1.0), "z_loss": torch.tensor(4.0)})
    meter.add({"aux_loss": torch.tensor(3.0), "z_loss": torch.tensor(6.0)})
    assert meter.pop() == {"aux_loss": 2.0, "z_loss": 5.0}
    assert meter.pop() == {}


def test_what_is_absent_does_not_count():
    meter, there, absent = MeanMeter(), torch.tensor(True), torch.tensor(False)
    for value, is_there in ((3.0, there), (math.nan, absent), (5.0, there)):
        values = {"loss": torch.tensor(1.0), "cosine": torch.tensor(value), "never": torch.tensor(value)}
        meter.add(values, {"cosine": is_there, "never": absent})
    assert meter.pop() == {"loss": 1.0, "cosine": 4.0}
    meter.add({"loss": torch.tensor(2.0), "cosine": torch.tensor(7.0)}, {"cosine": there})
    assert meter.pop() == {"loss": 2.0, "cosine": 7.0}


def test_paused_time_does_not_count_even_when_nested(monkeypatch):
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(throughput, "time", clock)

    def wait(seconds: float) -> None:
        clock.now += seconds

    meter = ThroughputMeter(tokens_per_step=100, flops_per_token=1e12, num_devices=2)
    assert meter.pop() == {}
    with meter.pause():  # before the clock runs, as the evaluation at the start
        wait(0.3)
    meter.begin()
    meter.end_step()
    wait(0.05)
    with meter.pause():
        wait(0.2)
        with meter.pause():
            wait(0.2)
    assert meter.pop() == pytest.approx({"tokens_per_second": 2000.0, "model_tflops": 1000.0})


def test_starting_losses_are_the_first_at_step_zero():
    history = [
        {"step": 0, "eval_new_loss": 4.0},
        {"step": 0, "eval_replay_loss": 2.0},
        {"step": 0, "eval_new_loss": 9.0},
        {"step": 5, "eval_new_loss": 3.0},
    ]
    assert starting_losses(history, ("new", "replay")) == {"new": 4.0, "replay": 2.0}
    assert starting_losses(history[3:], ("new", "replay")) == {}
