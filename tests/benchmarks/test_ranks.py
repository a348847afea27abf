"""The benchmark of ranks runs without a hand on it, on CPU ranks, and its ways compute the same."""

import csv

import pytest

from tests.distributed.jobs import HAS_EP
from tests.helpers.fresh_process import TWO_RANKS, launch


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_EP, reason="needs transformers 5.23 and torch 2.13")]


def test_every_way_runs_and_agrees_with_the_one_without_traffic(tmp_path):
    words = ["scripts/benchmarks/ranks.py", "--device", "cpu", "--tiny", "--parts", "layers", "model"]
    launch(*TWO_RANKS, *words, "--output_dir", str(tmp_path))
    with (tmp_path / "ranks.csv").open() as file:
        rows = {(row["part"], row["way"]): row for row in csv.DictReader(file)}
    assert set(rows) == {("layers", "single"), *((p, w) for p in ("layers", "model") for w in ("fsdp2", "ep"))} | {
        ("model", "ddp")
    }
    assert not any(row["note"] for row in rows.values())
    for way in ("fsdp2", "ep"):
        assert max(float(rows["layers", way][f"error_{name}"]) for name in ("y", "dx", "dw")) < 1e-5
        assert float(rows["model", way]["loss"]) == pytest.approx(float(rows["model", "ddp"]["loss"]), rel=1e-2)
