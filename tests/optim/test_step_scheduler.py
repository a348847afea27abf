"""The LambdaLR around the schedules: values, state, resuming with the same and with other arguments."""

import pytest
import torch

from hf_moe_cpt.optim.schedules import SCHEDULES, build_lr_scheduler, default_phases, learning_rate_at


RATES = {"max_lr": 3e-4, "constant_lr": 1.65e-4, "min_lr": 3e-5}


def build(schedule="cosine_inf", num_steps=40, lr=3e-4, **rates):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=lr)
    settings = {"schedule": schedule, "num_steps": num_steps, "phases": default_phases(schedule, "scratch")}
    return weight, optimizer, build_lr_scheduler(optimizer, **settings, **{**RATES, **rates})


def train(weight, optimizer, scheduler, steps):
    rates = []
    for _ in range(steps):
        weight.grad = weight.detach().clone()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_update_k_uses_the_rate_at_step_k_minus_one(schedule):
    got = train(*build(schedule), steps=45)
    settings = {"schedule": schedule, "num_steps": 40, "phases": default_phases(schedule, "scratch"), **RATES}
    assert got == pytest.approx([learning_rate_at(step, **settings) for step in range(45)], rel=1e-12)


@pytest.mark.parametrize("stop", [0, 1, 17, 39])
def test_resumed_run_equals_uninterrupted_bit_for_bit(stop, tmp_path):
    whole_weight, *whole = build()
    want = train(whole_weight, *whole, steps=40)
    weight, optimizer, scheduler = build()
    first = train(weight, optimizer, scheduler, steps=stop)
    torch.save((weight, optimizer.state_dict(), scheduler.state_dict()), tmp_path / "state.pt")
    saved_weight, saved_optimizer, saved_scheduler = torch.load(tmp_path / "state.pt", weights_only=True)
    weight, optimizer, scheduler = build()
    weight.data.copy_(saved_weight)
    optimizer.load_state_dict(saved_optimizer)
    scheduler.load_state_dict(saved_scheduler)
    assert first + train(weight, optimizer, scheduler, steps=40 - stop) == want
    assert torch.equal(weight, whole_weight)


def test_changed_arguments_take_effect_on_resume():
    weight, optimizer, scheduler = build()
    train(weight, optimizer, scheduler, steps=20)
    optimizer_state, state = optimizer.state_dict(), scheduler.state_dict()
    assert set(state) == {"last_epoch", "_step_count"}
    weight, optimizer, scheduler = build(num_steps=80, lr=6e-4, max_lr=6e-4)
    optimizer.load_state_dict(optimizer_state)
    scheduler.load_state_dict(state)
    changed = {"num_steps": 80, **RATES, "max_lr": 6e-4}
    want = [
        learning_rate_at(step, schedule="cosine_inf", phases=default_phases("cosine_inf", "scratch"), **changed)
        for step in range(20, 80)
    ]
    assert scheduler.get_last_lr() == pytest.approx(want[:1], rel=1e-12)
    assert train(weight, optimizer, scheduler, steps=60) == pytest.approx(want, rel=1e-12)


def test_tensor_learning_rate_is_updated_in_place():
    weight, optimizer, scheduler = build(lr=torch.tensor(3e-4))
    rate = optimizer.param_groups[0]["lr"]
    scheduler.load_state_dict({"last_epoch": 30})
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(float(scheduler.get_last_lr()[0]), rel=1e-6)
    assert 0 < float(rate) < 3e-4


def test_groups_keep_their_proportion():
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (3e-4, 3e-5)]
    optimizer = torch.optim.AdamW(groups)
    phases = default_phases("cosine_inf", "scratch")
    scheduler = build_lr_scheduler(optimizer, schedule="cosine_inf", num_steps=40, phases=phases, **RATES)
    for _ in range(25):
        optimizer.step()
        scheduler.step()
    first, second = scheduler.get_last_lr()
    assert second == pytest.approx(first / 10, rel=1e-12)


def test_bad_arguments_are_refused_before_the_optimizer_is_touched():
    with pytest.raises(ValueError, match="without steps"):
        build(num_steps=0)
