"""Whole steps of tiny models in processes of their own: rows, the same losses under an engine, and a run cut short.

And what the planner takes from the committed benchmarks: its estimates against every peak, its file of speeds.
"""

import csv
from pathlib import Path

import pytest

from hf_moe_cpt.planning.plan import SPEED_OF_GPU
from hf_moe_cpt.scripts.benchmarks import jobs
from tests.helpers.source_tree import PROJECT


BENCHMARKS = PROJECT / "docs/benchmarks"
GUIDE = (PROJECT / "docs/scaling.md").read_text(encoding="utf-8")
STATED_ERROR, SHARDED_ERROR = 0.03, 0.05
SIZES = "--tiny --device cpu --dtype float32 --batch_size 2 --length 16 --steps 2 --warmup 1"


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "jobs.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_an_engine_makes_the_steps_of_one_process(tmp_path):
    jobs.main([*SIZES.split(), "--runs", "llama:auto", "llama:auto:ddp-2", "--output_dir", str(tmp_path)])
    alone, dealt = read(tmp_path)
    for row in (alone, dealt):
        assert row["status"] == "ok" and row["peak_gib"] == "" and len(row["steps_ms"].split()) == 3
        assert float(row["step_ms_min"]) <= float(row["step_ms"]) <= float(row["step_ms_max"])
    assert float(dealt["loss"]) == pytest.approx(float(alone["loss"]), abs=1e-3)


@pytest.mark.slow
def test_a_run_that_does_not_end_is_a_row(tmp_path, capfd):
    jobs.main([*SIZES.split(), "--runs", "llama:auto", "--timeout", "0.01", "--output_dir", str(tmp_path)])
    (row,) = read(tmp_path)
    assert row["status"] == "it had not ended after 0.01 seconds: raise --timeout"
    assert "raise --timeout" in capfd.readouterr().out


@pytest.mark.slow
def test_every_compared_peak_is_met_within_the_stated_error() -> None:
    peaks = list(jobs.measured_peaks(BENCHMARKS))
    errors = {(peak.source, peak.run): jobs.estimated_gib(peak) / peak.gib - 1 for peak in peaks}
    assert len(errors) == len(peaks) >= 18
    assert ("h200/step.csv", "pb-granular-2b:fused:hf_moe_cpt") in errors
    assert {key: error for key, error in errors.items() if abs(error) > STATED_ERROR} == {}
    of_ranks = {peak.run: jobs.estimated_gib(peak) / peak.gib - 1 for peak in jobs.peaks_of_ranks(BENCHMARKS)}
    assert len(of_ranks) >= 5 and {run: error for run, error in of_ranks.items() if abs(error) > SHARDED_ERROR} == {}
    assert jobs.error_table(BENCHMARKS) in GUIDE


@pytest.mark.slow
def test_speeds_are_those_of_the_committed_steps(tmp_path) -> None:
    jobs.main(["speeds", "--benchmarks", str(BENCHMARKS), "--output", str(tmp_path / "speeds.csv")])
    committed = PROJECT / "hf_moe_cpt/planning/speeds.csv"
    assert committed.read_text() == (tmp_path / "speeds.csv").read_text(), "run scripts/benchmarks/jobs.py speeds"
    assert SPEED_OF_GPU["h100"] == pytest.approx(jobs.device_ratio(BENCHMARKS), abs=5e-5)
