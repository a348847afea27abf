"""The table of the balancing switch, two steps of it."""

import csv

import pytest

from hf_moe_cpt.scripts.benchmarks.router_balance import CHOSEN, EXPERTS, main


@pytest.mark.slow
def test_each_family_has_a_row_without_balance_and_one_with_its_way(tmp_path):
    options = ["--device", "cpu", "--families", "cpt_moe", "--steps", "2", "--batch_size", "2"]
    main([*options, "--output_dir", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "router_balance.csv").open()))
    ways = [("cpt_moe", "none"), ("cpt_moe", "bias")]
    assert [(row["family"], row["router_balance"]) for row in rows] == ways
    assert {row["status"] for row in rows} == {"ok"}
    for row in rows:
        assert 1.0 <= float(row["mri_normalized"]) <= float(row["worst_layer"]) <= EXPERTS / CHOSEN
