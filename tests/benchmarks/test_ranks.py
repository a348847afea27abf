"""The benchmark of ranks runs without a hand on it, on CPU ranks, and its ways compute the same."""

import csv

import pytest

from tests.distributed.jobs import HAS_EP
from tests.helpers.fresh_process import TWO_RANKS, launch


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_EP, reason="needs transformers 5.23 and torch 2.13")]


def test_every_way_runs_and_agrees_with_the_one_without_traffic(tmp_path):
    words = ["scripts/benchmarks/ranks.py", "--device", "cpu", "--tiny", "--parts", "layers", "model"]
    launch(*TWO_RANKS, *words, "--rounds", "2", "--profile", "--output_dir", str(tmp_path))
    with (tmp_path / "ranks.csv").open() as file:
        rows = {(row["part"], row["way"], row["round"]): row for row in csv.DictReader(file)}
    sharing = ("fsdp2", "ep", "ep-all-to-all")
    ways = {("layers", "single"), ("model", "ddp"), *((part, way) for part in ("layers", "model") for way in sharing)}
    assert set(rows) == {(*way, number) for way in ways for number in "01"}
    assert not any(row["note"] for row in rows.values())
    assert {path.name for path in tmp_path.glob("*.txt")} == {f"profile_{part}_{way}.txt" for part, way in ways}
    for way in sharing:
        assert max(float(rows["layers", way, "1"][f"error_{name}"]) for name in ("y", "dx", "dw")) < 1e-5
        assert float(rows["model", way, "0"]["loss"]) == pytest.approx(
            float(rows["model", "ddp", "0"]["loss"]), rel=1e-2
        )
