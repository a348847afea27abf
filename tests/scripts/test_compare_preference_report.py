"""Intervals against scipy, and rows, choices and the table of records made by hand."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from hf_moe_cpt.scripts.compare_preference_plan import Run
from hf_moe_cpt.scripts.compare_preference_report import choose, comparison_table, method_rows, t_interval, t_quantile


METHODS = ["dpo", "rainbowpo"]


def test_t_quantiles_are_scipys():
    for degrees, probability in itertools.product([1, 2, 3, 4, 7, 10, 29, 60], [0.5, 0.8, 0.975, 0.999]):
        assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9, abs=1e-9)
    values = [0.3, 0.9, 0.4, 0.45]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert t_interval(values) == pytest.approx(((low + high) / 2, (high - low) / 2))
    assert t_interval([2.0]) == (2.0, None)
    with pytest.raises(ValueError, match="an interval needs at least one value"):
        t_interval([])
    with pytest.raises(ValueError, match=r"probability=1 must be in \[1/2, 1\) and degrees=0 at least 1"):
        t_quantile(1, 0)


def record(reward: float) -> dict:
    return {"grades": {"reward": reward, "kl": 1.0}, "settings": {"beta": 2.0}, "seconds": {"training": 3.0}}


def test_rows_choices_and_table_of_hand_made_records():
    runs = {(method, seed): Run(method, 1e-3, 1.0, seed, "test") for method in METHODS for seed in (1, 2)}
    rewards = {("dpo", 1): 0.5, ("dpo", 2): 0.7, ("rainbowpo", 1): 0.9, ("rainbowpo", 2): 1.2}
    records = {run.name: record(rewards[key]) for key, run in runs.items()}
    final = {method: [runs[method, 1], runs[method, 2]] for method in METHODS}
    rows = method_rows(METHODS, final, records)
    assert [row["method"] for row in rows] == ["rainbowpo", "dpo"]
    assert rows[1]["reward_over_rainbowpo"] == t_interval([0.5 - 0.9, 0.7 - 1.2])
    assert choose(final["dpo"], records) is runs["dpo", 2]
    records[runs["dpo", 2].name] = {"error": "out of memory"}
    assert choose(final["dpo"], records) is runs["dpo", 1] and choose([runs["dpo", 2]], records) is None
    failed = method_rows(METHODS, final, records)[-1]
    assert failed == {"method": "dpo", "error": "out of memory"}
    reference = {"reward": -0.25, "kl/0.9": 0.125}
    table = comparison_table({"rows": rows, "reference": reference, "best_reward": 2.0})
    half = stats.t.ppf(0.975, 1) * np.std([0.9, 1.2], ddof=1) / math.sqrt(2)
    assert f"1.05 ± {half:.2f}" in table and "2.00" in table.splitlines()[-2]
    assert "0.9*" in table.splitlines()[1] and all(cell in table.splitlines()[3] for cell in ("-0.25", "0.12"))
