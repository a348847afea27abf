"""The benchmark of sharding: what it refuses before anything starts, and what a row holds."""

import csv

import pytest

from hf_moe_cpt.scripts.bench_sharding import BenchArguments, main, make_jobs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engines": ["fsdp3-2"]}, r"--engines 'fsdp3-2': write single, or one of ddp, fsdp2 with its ranks: fsdp2-2"),
        ({"engines": ["ddp"]}, r"--engines 'ddp': write single"),
        ({"engines": ["single-2"]}, r"--engines 'single-2': write single"),
        ({"engines": ["ddp-0"]}, r"--engines 'ddp-0': write single"),
        ({"engines": ["ddp-3"], "rows": 16}, r"--rows 16 do not fall evenly to the 3 ranks of ddp-3"),
        ({"model": "granular"}, r"--model 'granular' is unknown: choose from"),
    ],
)
def test_what_cannot_be_run_is_refused_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        make_jobs(BenchArguments(**{"device": "cpu", **changes}))


@pytest.mark.slow
def test_an_engine_reports_and_a_failure_is_a_row(tmp_path, capfd):
    words = "--model dense-tiny --layers 1 --rows 2 --length 16 --steps 2 --warmup 1 --device cpu".split()
    main([*words, "--engines", "single", "--output_dir", str(tmp_path)])
    (row,) = _rows(tmp_path)
    assert row["status"] == "ok" and float(row["last loss"]) < float(row["first loss"])
    assert float(row["least ms"]) <= float(row["step ms"]) <= float(row["most ms"])
    main([*words, "--engines", "ddp-2", "--timeout", "0.01", "--output_dir", str(tmp_path)])
    (row,) = _rows(tmp_path)
    assert row["ranks"] == "2" and "it had not ended after 0.01 seconds" in row["status"]
    assert "raise --timeout" in capfd.readouterr().out


def _rows(folder):
    with (folder / "sharding.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
