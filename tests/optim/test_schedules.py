"""Schedules against the paper's values, transformers' cosine, torch's annealing and their own limits.

Then what is printed of them, and the LambdaLR around them: values, state, resuming.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from hf_moe_cpt.optim.schedules import (
    DEFAULT_COSINE_PHASES,
    DEFAULT_PHASES,
    SCHEDULES,
    STARTING_PHASES,
    Extension,
    Phases,
    RateTrial,
    build_lr_scheduler,
    check_schedule,
    cosine,
    cosine_inf,
    default_phases,
    describe_schedule,
    inv_sqrt_inf,
    learning_rate_at,
    phase_at,
    recommended_rate,
    schedule_curve,
)


MAX, CONST, MIN = 3e-4, 1.65e-4, 3e-5
PAPER_STEPS = 192_720
SCRATCH = DEFAULT_PHASES["scratch"]
RATES = {"max_lr": MAX, "constant_lr": CONST, "min_lr": MIN}
PAPER = {"num_steps": PAPER_STEPS, "phases": SCRATCH, **RATES}


def test_phases_have_the_papers_lengths_and_names():
    ends = SCRATCH.boundaries(PAPER_STEPS)
    assert [end - begin for begin, end in zip((0, *ends), ends, strict=False)] == [1_927, 134_904, 19_272, 36_617]
    assert DEFAULT_PHASES["constant"].boundaries(95_370) == (0, 0, 76_296, 95_370)
    assert SCRATCH.boundaries(150) == (2, 107, 122, 150)  # 1.5, 106.5, 121.5: rounded half up, and no step is lost
    assert SCRATCH.boundaries(1) == (0, 1, 1, 1)
    at = [phase_at(step, num_steps=100, phases=SCRATCH) for step in (0, 1, 70, 71, 80, 81, 100, 900)]
    assert at == ["warmup", "cooldown", "cooldown", "constant", "constant", "anneal", "anneal", "anneal"]
    assert phase_at(0, num_steps=100, phases=DEFAULT_PHASES["constant"]) == "constant"
    assert phase_at(0, num_steps=100, phases=DEFAULT_COSINE_PHASES["constant"]) == "anneal"


@pytest.mark.parametrize(
    "share, want", [(0.01, 3.0e-4), (0.20, 2.77e-4), (0.36, 2.325e-4), (0.50, 1.93e-4), (0.90, 7.36e-5), (1.0, 3.0e-5)]
)
def test_paper_check_values(share, want):
    got = cosine_inf(round(share * PAPER_STEPS), **PAPER)
    assert got == pytest.approx(want, rel=2e-3)  # the sheet gives three digits


def test_phases_are_what_they_are_called():
    """Warm-up linear from 0, constant exact, an anneal by the same factor every step."""
    assert cosine_inf(0, **PAPER) == 0.0
    assert cosine_inf(1_000, **PAPER) == pytest.approx(MAX * 1_000 / 1_927, rel=1e-12)
    assert cosine_inf(1_927, **PAPER) == MAX
    assert {cosine_inf(step, **PAPER) for step in range(136_831, 156_103, 97)} == {CONST}
    rates = [cosine_inf(step, **PAPER) for step in range(160_000, 160_050)]
    ratios = [after / before for before, after in zip(rates, rates[1:], strict=False)]
    assert ratios == pytest.approx([(MIN / CONST) ** (1 / 36_617)] * len(ratios), rel=1e-12)
    phases = Phases(0.01, 0.0, 0.79, 0.20)  # the paper's continual row, read literally: 0 -> 3e-4, then a jump
    rates = [cosine_inf(step, 1_000, phases, MAX, CONST, MIN) for step in range(1_000)]
    assert rates[0] == 0.0 and max(rates) == CONST
    phases = Phases(0.1, 0.6, 0.3, 0.0)
    assert [cosine_inf(step, 10, phases, MAX, CONST, MIN) for step in (7, 9, 10, 99)] == [CONST] * 4
    assert phase_at(99, num_steps=10, phases=phases) == "constant"


@pytest.mark.parametrize("schedule", ["cosine_inf", "inv_sqrt_inf", "cosine"])
def test_continuing_from_the_constant_phase_never_rewarms(schedule):
    phases = default_phases(schedule, "constant")
    rates = [learning_rate_at(step, schedule=schedule, num_steps=500, phases=phases, **RATES) for step in range(501)]
    assert rates[0] == max(rates) == CONST
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == MIN


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_after_the_end_it_stays_at_the_minimum(schedule):
    phases = default_phases(schedule, "scratch")
    settings = {"num_steps": 77, "phases": phases, **RATES}
    assert learning_rate_at(76, schedule=schedule, **settings) > MIN
    assert {learning_rate_at(step, schedule=schedule, **settings) for step in (77, 78, 10_000)} == {MIN}


@pytest.mark.parametrize("num_steps, warmup", [(200, 0.05), (1_000, 0.01), (37, 0.0)])
def test_cosine_equals_transformers(num_steps, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=MAX)
    warmup_steps = round(warmup * num_steps)
    theirs = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup_steps, num_steps, min_lr=MIN)
    for step in range(num_steps):
        assert cosine(step, num_steps, warmup, MAX, MIN) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_cooldown_equals_torch_cosine_annealing():
    phases = Phases(0.0, 1.0, 0.0, 0.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=MAX)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=CONST)
    for step in range(50):
        assert cosine_inf(step, 50, phases, MAX, CONST, MIN) == pytest.approx(theirs.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        theirs.step()


@given(steepness=st.floats(0.01, 1e4), num_steps=st.integers(100, 5_000))
def test_inverse_square_root_meets_both_ends_and_falls(steepness, num_steps):
    phases = Phases(0.1, 0.6, 0.1, 0.2)
    ends = phases.boundaries(num_steps)
    points = sorted({ends.warmup + i * (ends.cooldown - ends.warmup) // 20 for i in range(21)})
    rates = [inv_sqrt_inf(step, num_steps, phases, MAX, CONST, MIN, steepness) for step in points]
    middle = ends.cooldown - ends.warmup
    h = 1 / math.sqrt(1 + steepness * (points[10] - ends.warmup) / middle) - 1
    want = MAX + (CONST - MAX) * h / (1 / math.sqrt(1 + steepness) - 1) if middle else MAX
    assert rates[10 if middle else 0] == pytest.approx(want, rel=1e-9)
    assert rates[0] == pytest.approx(MAX, rel=1e-12) and rates[-1] == pytest.approx(CONST, rel=1e-12)
    assert all(after < before for before, after in zip(rates, rates[1:], strict=False))


@given(
    cuts=st.tuples(*[st.floats(0, 1)] * 3).map(sorted),
    num_steps=st.integers(1, 400),
    schedule=st.sampled_from(["cosine_inf", "inv_sqrt_inf"]),
)
def test_any_phases_stay_finite_bounded_and_reach_the_end(cuts, num_steps, schedule):
    a, b, c = cuts
    phases = Phases(a, b - a, c - b, 1 - c)
    rates = [
        learning_rate_at(step, schedule=schedule, num_steps=num_steps, phases=phases, **RATES)
        for step in range(num_steps + 1)
    ]
    assert all(0 <= rate <= MAX * (1 + 1e-12) for rate in rates)
    assert rates[-1] == (MIN if phases.boundaries(num_steps).constant < num_steps else CONST)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"num_steps": 0}, r"cosine_inf without steps: num_steps=0.*max_steps"),
        ({"schedule": "cubic"}, r"'cubic' is unknown: choose one of cosine_inf, inv_sqrt_inf, cosine"),
        ({"min_lr": 2e-4}, r"min_lr=0.0002, constant_lr=0.000165"),
        ({"constant_lr": 4e-4}, r"min_lr <= constant_lr <= max_lr.*constant_lr=0.0004"),
        ({"max_lr": float("nan")}, r"max_lr=nan is no learning rate"),
        ({"min_lr": 0.0}, r"cannot reach min_lr=0"),
        ({"schedule": "cosine"}, r"cosine has no cooldown.*cooldown=0.7, constant=0.1"),
        ({"schedule": "inv_sqrt_inf", "steepness": 0.0}, r"steepness=0.0"),
    ],
)
def test_refusals_name_field_value_and_remedy(change, text):
    asked = {"schedule": "cosine_inf", **PAPER, **change}
    with pytest.raises(ValueError, match=text):
        check_schedule(**asked)
    with pytest.raises(ValueError, match=text):
        build_lr_scheduler(torch.optim.SGD([torch.zeros(1)]), **asked)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: Phases(0.01, 0.7, 0.8, 0.19), r"warmup=0.01, cooldown=0.7, constant=0.8, anneal=0.19: sum 1.7"),
        (lambda: Phases(0.2, 0.5, 0.5, -0.2), r"phase anneal=-0.2 is outside \[0, 1\]"),
        (lambda: default_phases("cosine_inf", "warm"), r"'warm' is unknown: choose one of scratch, constant, decayed"),
    ],
)
def test_phases_must_be_known_fractions_that_sum_to_one(make, text):
    with pytest.raises(ValueError, match=text):
        make()


PRINTED = {"schedule": "cosine_inf", **PAPER}


def rows_of(text):
    table = text.split("\n\n")[0].splitlines()[1:]
    return {line.split()[0]: re.split(r"\s{2,}", line.strip())[1:] for line in table}


def test_table_plot_and_curve_say_what_the_schedule_does():
    rows = rows_of(describe_schedule(**PRINTED, tokens_per_step=2_097_152))
    assert rows["warmup"] == ["0", "1,927", "1.0%", "4,041,211,904", "0", "0.0003"]
    assert rows["anneal"] == ["156,103", "36,617", "19.0%", "76,791,414,784", "0.000165", "3e-05"]
    assert rows["total"][-3:-2] == ["404,163,133,440"]
    rows = rows_of(describe_schedule(**{**PRINTED, "phases": DEFAULT_PHASES["constant"]}))
    assert set(rows) == {"phase", "constant", "anneal", "total"} and "tokens" not in rows["phase"]
    assert "1 steps" in describe_schedule(**{**PRINTED, "num_steps": 1})
    text = describe_schedule(**{**PRINTED, "phases": Phases(0.5, 0.0, 0.0, 0.5)}, width=41, height=6)
    plot = [line[11:] for line in text.splitlines() if "┤" in line]
    heights = [sum(8 if line[i] == "█" else " ▁▂▃▄▅▆▇".index(line[i]) for line in plot) for i in range(41)]
    assert len(plot) == 6 and heights[0] == 0 and max(heights) == heights[20] == 48
    assert heights[:21] == sorted(heights[:21]) and heights[20:] == sorted(heights[20:], reverse=True)
    curve = schedule_curve(**PRINTED, num_points=50)
    assert curve.phase_starts == {"warmup": 0, "cooldown": 1_927, "constant": 136_831, "anneal": 156_103}
    assert {0, 1_927, 136_831, 156_103, 192_720} <= set(curve.steps) and curve.steps == sorted(curve.steps)
    assert curve.rates == [cosine_inf(step, **PAPER) for step in curve.steps]


def test_examples_of_the_manual_run(tmp_path, monkeypatch, capsys):
    manual = Path(__file__).parents[2] / "docs" / "schedules.md"
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", manual.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, str(manual), "exec"), {})
    assert "156,103" in capsys.readouterr().out
    assert (tmp_path / "schedule.svg").stat().st_size > 1_000


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


@pytest.mark.parametrize("stop", [0, 17])
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


def test_tensor_learning_rates_are_updated_in_place_and_groups_keep_their_proportion():
    weight, optimizer, scheduler = build(lr=torch.tensor(3e-4))
    rate = optimizer.param_groups[0]["lr"]
    scheduler.load_state_dict({"last_epoch": 30})
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(float(scheduler.get_last_lr()[0]), rel=1e-6)
    assert 0 < float(rate) < 3e-4
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (3e-4, 3e-5)]
    optimizer = torch.optim.AdamW(groups)
    phases = default_phases("cosine_inf", "scratch")
    scheduler = build_lr_scheduler(optimizer, schedule="cosine_inf", num_steps=40, phases=phases, **RATES)
    for _ in range(25):
        optimizer.step()
        scheduler.step()
    first, second = scheduler.get_last_lr()
    assert second == pytest.approx(first / 10, rel=1e-12)


def test_wsd_and_linear_are_those_of_transformers():
    """Both of transformers', decay to zero included: the 1 - sqrt of Hägele et al. 2024 and a straight line."""
    T, warmup, decay = 200, 20, 40
    phases = Phases(warmup / T, 0.0, (T - warmup - decay) / T, decay / T)
    wsd = get_wsd_schedule(optimizer_at_the_peak(), warmup, decay, num_training_steps=T, decay_type="1-sqrt")
    linear = get_linear_schedule_with_warmup(optimizer_at_the_peak(), warmup, T)
    rates = {"max_lr": MAX, "constant_lr": MAX, "min_lr": 0.0}
    for step in range(T + 1):
        for name, theirs in (("wsd", wsd), ("wsd_s", wsd), ("linear", linear)):
            own = phases if name != "linear" else Phases(warmup / T, 0.0, 0.0, 1 - warmup / T)
            got = learning_rate_at(step, schedule=name, num_steps=T, phases=own, **rates)
            assert got == pytest.approx(MAX * theirs.lr_lambdas[0](step), abs=1e-12), (name, step)


def test_wsd_s_goes_on_from_a_decayed_checkpoint_at_the_full_rate():
    assert default_phases("wsd_s", "decayed").warmup == 0 and default_phases("wsd", "decayed").warmup > 0
    for schedule in ("wsd", "linear"):
        check_schedule(
            schedule=schedule, num_steps=9, phases=default_phases(schedule, "scratch"), **RATES | {"min_lr": 0.0}
        )


@given(
    steps=st.sampled_from([10, 100, 1000]),
    part=st.floats(0.0, 1.0),
    schedule=st.sampled_from(list(SCHEDULES)),
    start=st.sampled_from(STARTING_PHASES),
    more=st.integers(1, 20000),
)
def test_a_run_that_goes_on_longer_never_jumps_and_rises_only_if_asked_or_still_warming(
    steps, part, schedule, start, more
):
    """Stopped in its warm-up the rate fell to that of the longer warm-up, or stayed there for the whole run."""
    saved = 1 + round(part * (steps - 1))
    short = {"schedule": schedule, "num_steps": steps, "phases": default_phases(schedule, start, steps), **RATES}
    at_end, was_warming = learning_rate_at(saved, **short), saved <= short["phases"].boundaries(steps).warmup
    phases, rates = default_phases(schedule, start, steps + more), {}
    for rewarm in (False, True):
        extension = Extension(saved, at_end, rewarm, was_warming)
        longer = {**short, "num_steps": steps + more, "phases": phases, "extension": extension}
        every = sorted({*range(saved, min(saved + 300, steps + more)), *range(saved, steps + more, 97), steps + more})
        rates[rewarm] = [learning_rate_at(step, **longer) for step in every]
    assert rates[True][-1] == pytest.approx(MIN) and rates[True][0] == at_end
    assert rates[False][0] == pytest.approx(at_end)
    if was_warming:
        assert max(rates[False]) >= at_end and rates[False][-1] == pytest.approx(MIN)
    else:
        assert rates[False] == sorted(rates[False], reverse=True)


def test_a_run_that_ended_at_zero_is_extended_only_with_a_new_warm_up():
    settings = {"schedule": "wsd", "num_steps": 50, "phases": default_phases("wsd", "scratch"), **RATES}
    with pytest.raises(
        ValueError, match="ended at step 20 with a rate of 0, at which nothing is learnt: extend it wi"
    ):
        check_schedule(**settings, extension=Extension(20, 0.0))
    check_schedule(**settings, extension=Extension(20, 0.0, True))
    rows = rows_of(described := describe_schedule(**settings, extension=Extension(20, 1e-5)))
    assert described.startswith("schedule wsd, extended at step 20\n") and "warmup" not in rows
    assert rows["constant"][:2] == ["20", "25"] and rows["total"][0] == "30"
    assert schedule_curve(**settings, extension=Extension(47, 1e-5)).phase_starts == {"anneal": 47}


def optimizer_at_the_peak() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=MAX)


@pytest.mark.parametrize(
    "trials, budget, rate, why",
    [
        ([(1e-5, 0.1, 0.0), (1e-4, 0.4, 0.1), (1e-3, 0.5, 0.4)], None, 1e-4, "it learnt most beyond what it forgot."),
        (
            [(1e-5, 0.1, 0.0), (1e-4, 0.4, 0.1), (1e-3, 0.5, 0.4)],
            0.05,
            1e-5,
            "within 0.05 nats forgotten; it is the low",
        ),
        ([(1e-5, 0.1, 0.2), (1e-4, 0.4, 0.3)], 0.05, 1e-5, "it forgets least, and still more than 0.05 nats: replay"),
        ([(1e-5, 0.1, None), (1e-4, 0.4, None)], None, 1e-4, "it learnt most; it is the highest that was tried"),
        (
            [(1e-5, 0.1, None), (1e-4, 0.4, None), (2e-4, 0.403, None)],
            None,
            1e-4,
            "as good as higher ones within 0.005",
        ),
        ([(1e-4, 0.4, 0.1), (1e-3, float("nan"), None)], None, 1e-4, "it learnt most beyond what it forgot"),
        ([(1e-4, -0.4, 0.1), (1e-3, float("nan"), None)], None, None, "no rate taught the model anything"),
    ],
)
def test_a_rate_is_recommended_with_its_reason(trials, budget, rate, why):
    chosen, told = recommended_rate([RateTrial(*trial) for trial in trials], budget)
    assert (chosen and chosen.rate) == rate and why in told
