"""The benchmark of optimizers: a row for each way, bytes by their definition, a twin that both trainers continue."""

import csv
from pathlib import Path

import pytest

from hf_moe_cpt.optim import adamw
from hf_moe_cpt.scripts.benchmarks import updates


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def by_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "IS_INTERPRETED", False)


@pytest.mark.slow
def test_each_way_is_timed_and_its_bytes_are_counted(tmp_path: Path) -> None:
    words = "time --layers 0 --width 16 --seconds 0.01 --device cpu --ways float32 nearest stochastic torchao"
    updates.main([*words.split(), "--output_dir", str(tmp_path)])
    rows = {row["way"]: row for row in read(tmp_path / "optimizer.csv")}
    for way, held in (("float32", 16), ("nearest", 8), ("stochastic", 8)):
        assert float(rows[way]["bytes_a_parameter"]) == pytest.approx(held, rel=1e-4), way
    assert all(float(row["step_ms"]) > 0 for row in rows.values() if row["status"] == "ok")
    assert {int(row["parameters"]) for row in rows.values() if row["status"] == "ok"} == {2 * 50304 * 16 + 16}


@pytest.mark.slow
@pytest.mark.parametrize("task", updates.TASKS)
def test_a_twin_is_continued_in_each_way(task: str, tmp_path: Path) -> None:
    words = f"learn --task {task} --steps 3 --first_steps 2 --batch_size 2 --rates 1e-4 --device cpu"
    updates.main([*words.split(), "--ways", "float32", "nearest", "stochastic", "--output_dir", str(tmp_path)])
    rows = {row["way"]: row for row in read(tmp_path / f"{task}.csv")}
    assert {row["status"] for row in rows.values()} == {"ok"}
    changed = {way: float(row["changed"]) for way, row in rows.items()}
    assert changed["float32"] >= changed["stochastic"] > changed["nearest"] > 0
    assert all(float(row["ever_changed"]) >= float(row["changed"]) for row in rows.values())


@pytest.mark.slow
def test_each_family_has_a_row_without_balance_and_one_with_its_way(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--families", "cpt_moe", "--steps", "2", "--batch_size", "2"]
    updates.main(["balance", *options, "--output_dir", str(tmp_path)])
    rows = read(tmp_path / "router_balance.csv")
    assert [(row["family"], row["router_balance"]) for row in rows] == [("cpt_moe", "none"), ("cpt_moe", "bias")]
    assert {row["status"] for row in rows} == {"ok"}
    for row in rows:
        assert 1.0 <= float(row["mri_normalized"]) <= float(row["worst_layer"]) <= updates.EXPERTS / updates.CHOSEN


@pytest.mark.parametrize(
    "words",
    [["time", "--ways", "adam"], ["learn", "--task", "sft"], ["learn", "--steps", "0"], ["balance", "--steps", "1"]],
)
def test_refuses_names_and_numbers_that_it_has_not(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"--(ways|task|steps)"):
        updates.main(words)
