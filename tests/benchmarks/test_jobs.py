"""Whole steps of tiny models in processes of their own: rows, the same losses under an engine, and a run cut short."""

import csv
from pathlib import Path

import pytest

from hf_moe_cpt.scripts.benchmarks import jobs


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
