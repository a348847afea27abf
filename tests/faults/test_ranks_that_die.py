"""Real processes that are killed, stopped, asked to leave, and come back in another number.

The servers of scripts/soak_checkpoints.py fork the runs, so that a start costs no imports.
"""

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_moe_cpt.scripts.soak_checkpoints import PATIENCE, Soak
from hf_moe_cpt.trainers.instruments.checkpoints import HEARTBEATS, checkpoints_in, is_whole
from tests.helpers.small_disk import small_disk


pytestmark = pytest.mark.slow


SETTINGS = {"max_steps": 12, "save_steps": 3}
MANY_STEPS = 60  # seconds of work, so that a signal arrives in the middle of them also on a busy machine


@pytest.fixture(scope="module")
def soaks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Soak]]:
    """A run in one process, and the same on two ranks; their servers import at the same time."""
    made = [Soak(tmp_path_factory.mktemp("soak"), ranks, seed=1, settings=dict(SETTINGS)) for ranks in (1, 2)]
    yield made
    for soak in made:
        soak.close()


@pytest.fixture
def one(soaks: list[Soak]) -> Soak:
    return soaks[0]


@pytest.fixture
def two(soaks: list[Soak]) -> Soak:
    return soaks[1]


def _start(soak: Soak, folder: Path, attempt: int = 0, **changes: object) -> None:
    folder.mkdir(exist_ok=True)
    for rank in soak.ranks:
        rank.start({"folder": str(folder), "attempt": attempt, **SETTINGS, **changes})


def _result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def _kill_after_save(soak: Soak) -> None:
    assert soak.ranks[0].wait_for("saved", PATIENCE).get("saved")
    for rank in soak.ranks:
        rank.kill()
        rank.wait_for("exit", PATIENCE)


def _losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in _result(folder)["history"]]


def test_killed_at_random_moments_it_ends_as_if_nothing_had_been(one, tmp_path):
    reference = one.reference()
    while one.tally.kills < 5:
        one.round(reference, 5 - one.tally.kills)
    assert one.tally.is_clean, one.tally.table()
    assert one.tally.most_steps_again <= SETTINGS["save_steps"] + 1
    changed = _result(reference)  # the comparison finds one bit
    changed["history"][3]["loss"] = math.nextafter(changed["history"][3]["loss"], math.inf)
    other = one.folder / "other"
    other.mkdir()
    (other / "result.json").write_text(json.dumps(changed))
    lines = (reference / "rows-00000-0.jsonl").read_text().splitlines()
    (other / "rows-00000-0.jsonl").write_text("\n".join([*lines[:4], lines[3].replace("[4,", "[5,"), *lines[5:]]))
    one._compare(other, reference)
    assert (one.tally.different_results, one.tally.rows_out_of_order, one.tally.rows_repeated) == (1, 1, 4)
    assert not one.tally.is_clean


def test_sigterm_to_any_rank_saves_on_all_and_they_leave(one, two, tmp_path):
    for soak, told in ((one, 0), (two, 1)):
        name = f"ranks-{len(soak.ranks)}"
        _start(soak, tmp_path / f"{name}-whole", max_steps=MANY_STEPS)
        soak._wait_for_end(tmp_path / f"{name}-whole")
        folder = tmp_path / name
        _start(soak, folder, max_steps=MANY_STEPS)
        assert "began" in soak.ranks[0].wait_for("began", PATIENCE)
        os.kill(soak.ranks[told].pid, signal.SIGTERM)
        for rank in soak.ranks:
            rank.wait_for("exit", PATIENCE)
        assert [rank.exit_code for rank in soak.ranks] == [143] * len(soak.ranks)
        last = checkpoints_in(folder / "run")[-1]
        step = int(last.name.rpartition("-")[2])
        assert is_whole(last) and 1 <= step < MANY_STEPS
        said = (
            f"SIGTERM: stopped after step {step} of {MANY_STEPS} and saved. Go on with resume_from_checkpoint='last'."
        )
        assert said in (folder / "log-00000-0").read_text()
        _start(soak, folder, attempt=1, max_steps=MANY_STEPS)
        soak._wait_for_end(folder)
        assert _result(folder) == _result(tmp_path / f"{name}-whole")


def test_another_number_of_ranks_goes_on_with_the_same_losses(one, two, tmp_path):
    plain, elastic = tmp_path / "plain", tmp_path / "elastic"
    _start(one, plain, dropout=0.0)
    one._wait_for_end(plain)
    for attempt, soak in enumerate((one, two, one)):
        _start(soak, elastic, attempt, dropout=0.0)
        if attempt < 2:
            _kill_after_save(soak)
    one._wait_for_end(elastic)
    assert {path.name.split("-")[1] for path in elastic.glob("rows-*-1.jsonl")} == {"00001"}  # two ranks in the middle
    assert _losses(elastic) == pytest.approx(_losses(plain), rel=1e-5)
    rows = {}
    for path in sorted(elastic.glob("rows-*.jsonl")):
        for line in path.read_text().splitlines():
            step, found = json.loads(line)
            rows.setdefault(path.name.split("-")[1], {}).setdefault(step, []).extend(found)
    lineage = {step: found for attempt in sorted(rows) for step, found in rows[attempt].items()}
    want = dict(json.loads(line) for line in (plain / "rows-00000-0.jsonl").read_text().splitlines())
    assert lineage == want


def test_a_rank_that_stands_still_is_named(two, tmp_path):
    folder = tmp_path / "run"
    _start(two, folder, hang_timeout=8.0, max_steps=2000)
    assert "began" in two.ranks[0].wait_for("began", PATIENCE)
    signs, deadline = [folder / "run" / HEARTBEATS / f"rank-{rank}" for rank in (0, 1)], time.monotonic() + PATIENCE
    while not all(sign.exists() for sign in signs) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(two.ranks[1].pid, signal.SIGSTOP)
    try:
        two.ranks[0].wait_for("exit", PATIENCE)
        assert two.ranks[0].exit_code == 1
    finally:
        two.ranks[1].kill()
        two.ranks[1].wait_for("exit", PATIENCE)
    log = (folder / "log-00000-0").read_text()
    assert "(hang_timeout): rank 1 is stopped or dead (no sign of life for " in log
    assert (folder / "run" / HEARTBEATS / "rank-0").exists()


@pytest.mark.parametrize("is_sharded", [False, True], ids=["whole weights", "sharded"])
def test_ranks_outlive_a_full_disk_together(two, tmp_path, is_sharded):
    roomy, narrow = tmp_path / "roomy", tmp_path / "narrow"
    settings = {"is_sharded": is_sharded, "save_total_limit": None, "max_steps": 6}
    _start(two, roomy, **settings)
    two._wait_for_end(roomy)
    checkpoint = roomy / "run" / "checkpoint-3"
    size = sum(path.stat().st_size for path in checkpoint.rglob("*"))
    with small_disk(narrow / "run", int(1.6 * size)):
        _start(two, narrow, **settings)
        two._wait_for_end(narrow)
        assert [path.name for path in checkpoints_in(narrow / "run")] == ["checkpoint-3"]
        assert is_whole(narrow / "run" / "checkpoint-3")
    log = (narrow / "log-00000-0").read_text()
    assert log.count("was not saved (rank ") == 1 and log.count("checkpoint-3 stands") == 1
    assert "No space left on device" in log
    assert _result(narrow) == _result(roomy)
    assert (checkpoint / "pytorch_model_fsdp_0" / "__1_0.distcp").exists() == is_sharded
