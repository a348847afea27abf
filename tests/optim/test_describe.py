"""The printed schedule tells the numbers of the schedule itself, and the manual's example runs."""

import re
from pathlib import Path

import pytest

from hf_moe_cpt.optim import DEFAULT_PHASES, Phases, cosine_inf, describe_schedule, schedule_curve


PAPER = {
    "schedule": "cosine_inf",
    "num_steps": 192_720,
    "phases": DEFAULT_PHASES["scratch"],
    "max_lr": 3e-4,
    "constant_lr": 1.65e-4,
    "min_lr": 3e-5,
}


def rows_of(text):
    table = text.split("\n\n")[0].splitlines()[1:]
    return {line.split()[0]: re.split(r"\s{2,}", line.strip())[1:] for line in table}


def test_table_has_steps_tokens_and_rates_of_each_phase():
    rows = rows_of(describe_schedule(**PAPER, tokens_per_step=2_097_152))
    assert rows["warmup"] == ["0", "1,927", "1.0%", "4,041,211,904", "0", "0.0003"]
    assert rows["anneal"] == ["156,103", "36,617", "19.0%", "76,791,414,784", "0.000165", "3e-05"]
    assert rows["total"][-3:-2] == ["404,163,133,440"]


def test_tokens_and_empty_phases_are_left_out():
    rows = rows_of(describe_schedule(**{**PAPER, "phases": DEFAULT_PHASES["constant"]}))
    assert set(rows) == {"phase", "constant", "anneal", "total"}
    assert "tokens" not in rows["phase"]


def test_plot_columns_rise_and_fall_with_the_rate():
    text = describe_schedule(**{**PAPER, "phases": Phases(0.5, 0.0, 0.0, 0.5)}, width=41, height=6)
    plot = [line[11:] for line in text.splitlines() if "┤" in line]
    heights = [sum(8 if line[i] == "█" else " ▁▂▃▄▅▆▇".index(line[i]) for line in plot) for i in range(41)]
    assert len(plot) == 6 and heights[0] == 0 and max(heights) == heights[20] == 48
    assert heights[:21] == sorted(heights[:21]) and heights[20:] == sorted(heights[20:], reverse=True)


def test_curve_hits_phase_boundaries_and_equals_the_schedule():
    curve = schedule_curve(**PAPER, num_points=50)
    assert curve.phase_starts == {"warmup": 0, "cooldown": 1_927, "constant": 136_831, "anneal": 156_103}
    assert {0, 1_927, 136_831, 156_103, 192_720} <= set(curve.steps) and curve.steps == sorted(curve.steps)
    settings = {name: value for name, value in PAPER.items() if name != "schedule"}
    assert curve.rates == [cosine_inf(step, **settings) for step in curve.steps]


def test_one_step_run_can_be_described():
    assert "1 steps" in describe_schedule(**{**PAPER, "num_steps": 1})


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="without steps"):
        describe_schedule(**{**PAPER, "num_steps": 0})


def test_examples_of_the_manual_run(tmp_path, monkeypatch, capsys):
    manual = Path(__file__).parents[2] / "docs" / "schedules.md"
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", manual.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, str(manual), "exec"), {})
    assert "156,103" in capsys.readouterr().out
    assert (tmp_path / "schedule.svg").stat().st_size > 1_000
