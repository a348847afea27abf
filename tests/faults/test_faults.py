"""Faults that are real: full disks, processes that are killed, stopped or asked to leave, a network that is cut.

The servers of tests/faults/soak.py fork the runs, so that a start costs no imports.
"""

import json
import logging
import math
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from pickle import PicklingError

import pytest
import torch

from hf_moe_cpt.trainers.common.checkpointing import HEARTBEATS, SHARDS, UNFINISHED, checkpoints_in, is_whole, step_of
from tests.faults.soak import PATIENCE, Rank, Soak
from tests.helpers.cpt_runs import AtStep, logged, trainer
from tests.helpers.faulty_hardware import small_disk


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


@pytest.fixture(scope="module")
def checkpoint_bytes(tmp_path_factory) -> int:
    folder = tmp_path_factory.mktemp("roomy") / "run"
    run = trainer(folder, "llama", save_strategy="steps", save_steps=2, max_steps=2)
    run.train()
    return sum(path.stat().st_size for path in (folder / "checkpoint-2").rglob("*"))


@pytest.mark.parametrize(
    "has_snapshot", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["at once", "in the background"]
)
def test_a_full_disk_is_survived(tmp_path, checkpoint_bytes, caplog, has_snapshot):
    disk = tmp_path / "disk"
    changes = {"snapshot_dir": str(tmp_path / "snapshots")} if has_snapshot else {}
    with small_disk(disk, int(1.7 * checkpoint_bytes)):
        run = trainer(disk / "run", "llama", **SAVING, **changes)
        with caplog.at_level(logging.WARNING):
            assert run.train().global_step == 6
        said = [record.getMessage() for record in caplog.records if "was not saved" in record.getMessage()]
        assert len(said) == 2  # steps 4 and 6
        assert f"{disk / 'run' / 'checkpoint-4'} was not saved (" in said[0]
        assert "training goes on, checkpoint-2 stands. Make room, or lower save_total_limit." in said[0]
        assert [path.name for path in checkpoints_in(disk / "run")] == ["checkpoint-2"]
        assert is_whole(disk / "run" / "checkpoint-2") and not (disk / "run" / UNFINISHED).exists()
        again = trainer(disk / "run", "llama", max_steps=6)
        again.train(resume_from_checkpoint="last")
    losses = logged(run.state.log_history, "loss")
    assert logged(again.state.log_history, "loss") == losses and len(losses) == 6


def test_a_limit_on_files_is_survived_and_the_next_save_is_whole(tmp_path, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    run = trainer(tmp_path / "run", "llama", **SAVING, save_total_limit=1)
    run.add_callback(AtStep(4, lambda _: limit(6000)))
    run.add_callback(AtStep(5, lambda _: limit(limits[0])))
    try:
        run.train()
    finally:
        limit(limits[0])
    assert caplog.text.count("was not saved") == 1 and "checkpoint-2 stands" in caplog.text
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-6"]
    assert is_whole(tmp_path / "run" / "checkpoint-6")


def test_errors_that_are_no_failure_to_write_are_raised(tmp_path):
    run = trainer(tmp_path / "run", "llama", **SAVING)
    run.add_callback(AtStep(2, lambda _: setattr(run.args, "label_names", lambda: None)))
    with pytest.raises((AttributeError, PicklingError), match="lambda"):
        run.train()
    assert checkpoints_in(tmp_path / "run") == []


def test_a_snapshot_is_the_run_at_its_step_and_old_ones_go(tmp_path):
    plain = trainer(tmp_path / "plain", "llama", **SAVING, save_total_limit=1)
    plain.train()
    run = trainer(tmp_path / "run", "llama", **SAVING, save_total_limit=1, snapshot_dir=str(tmp_path / "snapshots"))
    run.train()
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-6"]
    saved, wanted = (torch.load(tmp_path / name / "checkpoint-6/optimizer.pt")["state"] for name in ("run", "plain"))
    assert all(torch.equal(saved[key]["exp_avg"], wanted[key]["exp_avg"]) for key in wanted)
    assert list((tmp_path / "snapshots").rglob("*.pt")) == []


SETTINGS = {"max_steps": 12, "save_steps": 3}
MANY_STEPS = 60  # seconds of work, so that a signal arrives in the middle of them also on a busy machine
STEPS = 300  # some ten seconds


@pytest.fixture(scope="module")
def soaks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Soak]]:
    """A run in one process, and the same on two ranks; their servers import at the same time."""
    made = [Soak(tmp_path_factory.mktemp("soak"), ranks, seed=1, settings=dict(SETTINGS)) for ranks in (1, 2)]
    yield made
    for soak in made:
        soak.close()


def _result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def _kill_after_save(soak: Soak) -> None:
    assert soak.ranks[0].wait_for("saved", PATIENCE).get("saved")
    for rank in soak.ranks:
        rank.kill()
        rank.end()


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_if_nothing_had_been(soaks):
    one = soaks[0]
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


OF_OTHERS = {"max_steps": 6, "save_steps": 2, "save_total_limit": 2}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["rainbowpo", "surgery"])
def test_the_other_trainers_outlive_kills_and_full_disks(tmp_path, kind, ranks):
    soak = Soak(tmp_path, ranks, seed=1, settings={"kind": kind, **OF_OTHERS})
    try:
        reference = soak.reference()
        assert checkpoints_in(reference / "run")
        while soak.tally.kills < 3:
            soak.round(reference, 3 - soak.tally.kills)
        ends = soak.fill_disks(reference, 800 << 10) if ranks == 1 else {}
    finally:
        soak.close()
    assert soak.tally.is_clean, soak.tally.table()
    assert not ends or (ends["refused before the first step"] >= 2 and ends["the model is elsewhere"] >= 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rainbowpo", "surgery"])
def test_the_other_trainers_go_on_on_another_number_of_ranks_with_the_same_losses(tmp_path, kind):
    made = [Soak(tmp_path, ranks, seed=1, settings={"kind": kind, **OF_OTHERS}) for ranks in (1, 2)]
    (one, two), plain, elastic = made, tmp_path / "plain", tmp_path / "elastic"
    try:
        one.start(plain)
        one.wait_for_end(plain)
        for attempt, soak in enumerate((one, two, one)):
            soak.start(elastic, attempt)
            if attempt < 2:
                _kill_after_save(soak)
        one.wait_for_end(elastic)
    finally:
        for soak in made:
            soak.close()
    assert {path.name.split("-")[1] for path in elastic.glob("rows-*-1.jsonl")} == {"00001"}  # two ranks in the middle
    losses = [
        [entry["loss"] for entry in _result(folder)["history"] if "loss" in entry] for folder in (elastic, plain)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == OF_OTHERS["max_steps"]


@pytest.mark.slow
def test_sigterm_to_any_rank_saves_on_all_and_they_leave(soaks, tmp_path):
    for told, soak in enumerate(soaks):
        whole, folder = tmp_path / f"whole-{told}", tmp_path / f"told-{told}"
        soak.start(whole, max_steps=MANY_STEPS)
        soak.wait_for_end(whole)
        soak.start(folder, max_steps=MANY_STEPS)
        assert "began" in soak.ranks[0].wait_for("began", PATIENCE)
        os.kill(soak.ranks[told].pid, signal.SIGTERM)
        assert [rank.end() for rank in soak.ranks] == [143] * len(soak.ranks)
        last = checkpoints_in(folder / "run")[-1]
        step = step_of(last)
        assert is_whole(last) and 1 <= step < MANY_STEPS
        said = f"SIGTERM: stopped after step {step} of {MANY_STEPS} and saved. Go on with"
        assert said in (folder / "log-00000-0").read_text()
        soak.start(folder, attempt=1, max_steps=MANY_STEPS)
        soak.wait_for_end(folder)
        assert _result(folder) == _result(whole)


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_with_the_same_losses(soaks, tmp_path):
    (one, two), plain, elastic = soaks, tmp_path / "plain", tmp_path / "elastic"
    one.start(plain, dropout=0.0)
    one.wait_for_end(plain)
    for attempt, soak in enumerate((one, two, one)):
        soak.start(elastic, attempt, dropout=0.0)
        if attempt < 2:
            _kill_after_save(soak)
    one.wait_for_end(elastic)
    assert {path.name.split("-")[1] for path in elastic.glob("rows-*-1.jsonl")} == {"00001"}  # two ranks in the middle
    losses = [[entry["loss"] for entry in _result(folder)["history"]] for folder in (elastic, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    rows = {}
    for path in sorted(elastic.glob("rows-*.jsonl")):
        for line in path.read_text().splitlines():
            step, found = json.loads(line)
            rows.setdefault(path.name.split("-")[1], {}).setdefault(step, []).extend(found)
    lineage = {step: found for attempt in sorted(rows) for step, found in rows[attempt].items()}
    want = dict(json.loads(line) for line in (plain / "rows-00000-0.jsonl").read_text().splitlines())
    assert lineage == want


@pytest.mark.slow
def test_a_folder_in_use_is_refused_by_all_ranks_and_the_run_in_it_goes_on(soaks, tmp_path):
    for holder, late in (soaks, soaks[::-1]):
        folder = tmp_path / f"held-by-{len(holder.ranks)}"
        holder.start(folder, max_steps=2 * MANY_STEPS)
        assert "began" in holder.ranks[0].wait_for("began", PATIENCE)
        late.start(folder, attempt=1)
        assert [rank.end() for rank in late.ranks] == [1] * len(late.ranks)
        for number in range(len(late.ranks)):
            last = (folder / f"log-00001-{number}").read_text().strip().splitlines()[-1]
            assert "is in use by process" in last and "name another folder" in last
        assert not list(folder.glob("rows-00001-*")), "the second run made a step"
        holder.wait_for_end(folder)
        assert len([entry for entry in _result(folder)["history"] if "loss" in entry]) == 2 * MANY_STEPS


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named(soaks, tmp_path):
    soak, folder, ranks = soaks[1], tmp_path / "run", soaks[1].ranks
    soak.start(folder, hang_timeout=8.0, max_steps=2000)
    assert "began" in ranks[0].wait_for("began", PATIENCE)
    signs, deadline = [folder / "run" / HEARTBEATS / f"rank-{rank}" for rank in (0, 1)], time.monotonic() + PATIENCE
    while not all(sign.exists() for sign in signs) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    try:
        assert ranks[0].end() == 1
    finally:
        ranks[1].kill()
        ranks[1].end()
    assert "(hang_timeout): rank 1 is stopped or dead (no sign of life for " in (folder / "log-00000-0").read_text()
    assert signs[0].exists()


@pytest.mark.slow
@pytest.mark.parametrize("is_sharded", [False, True], ids=["whole weights", "sharded"])
def test_ranks_outlive_a_full_disk_together(soaks, tmp_path, is_sharded):
    two, roomy, narrow = soaks[1], tmp_path / "roomy", tmp_path / "narrow"
    settings = {"is_sharded": is_sharded, "save_total_limit": None, "max_steps": 6}
    two.start(roomy, **settings)
    two.wait_for_end(roomy)
    checkpoint = roomy / "run" / "checkpoint-3"
    kept = [path for path in checkpoint.rglob("*") if path.is_file()]
    final = [path for path in (roomy / "run").iterdir() if path.is_file()]
    pages = sum(path.stat().st_size // 4096 + 1 for path in kept + final)
    with small_disk(narrow / "run", 4096 * (pages + 8)):  # one checkpoint and the final model, but not two
        two.start(narrow, **settings)
        two.wait_for_end(narrow)
        assert [path.name for path in checkpoints_in(narrow / "run")] == ["checkpoint-3"]
        assert is_whole(narrow / "run" / "checkpoint-3")
    log = (narrow / "log-00000-0").read_text()
    assert len(re.findall(r"was not saved \(.*rank \d", log)) == 1 and log.count("checkpoint-3 stands") == 1
    assert re.search(r"No space left on device|inline_container", log)  # of the first file that does not fit
    assert _result(narrow) == _result(roomy)
    assert (checkpoint / SHARDS / "__1_0.distcp").exists() == is_sharded
    code = {path.name for path in (roomy / "run").glob("*.py")}
    assert code == {"configuration_cpt_moe.py", "modeling_cpt_moe.py"}  # and nothing of torch's


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two hosts on one machine, 10.77.0.1 and 2: network namespaces with a cable, "cable" in both, between them."""
    names = [f"hmc{os.getpid()}-{host}" for host in (0, 1)]
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
            _ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces are not permitted here: {getattr(error, 'stderr', error)}")
        for host, name in enumerate(names):
            _ip("-n", name, "address", "add", f"10.77.0.{host + 1}/24", "dev", "cable")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _plug(hosts: list[str], state: str) -> None:
    """Put the cable in, "up", or cut it, "down": what is sent then is lost without a word."""
    for name in hosts:
        _ip("-n", name, "link", "set", "cable", state)


@pytest.mark.slow
def test_a_cut_network_ends_both_ranks_and_costs_the_steps_since_the_last_checkpoint(hosts, tmp_path):
    order = {"folder": str(tmp_path), "max_steps": STEPS, "save_steps": 5, "hang_timeout": 8.0}
    _plug(hosts, "up")
    ranks = [
        Rank(rank, 2, port=29501, on=["ip", "netns", "exec", name], GLOO_SOCKET_IFNAME="cable")
        for rank, name in enumerate(hosts)
    ]
    try:
        for rank in ranks:
            rank.start({**order, "attempt": 0})
        assert ranks[0].wait_for("saved", PATIENCE)["saved"] == 5
        _plug(hosts, "down")
        assert [rank.end() for rank in ranks] == [1, 1]  # gloo alone would wait for half an hour
        assert any("(hang_timeout)" in (tmp_path / f"log-00000-{rank}").read_text() for rank in (0, 1))
        last = checkpoints_in(tmp_path / "run")[-1]

        _plug(hosts, "up")
        for rank in ranks:
            rank.start({**order, "attempt": 1, "hang_timeout": PATIENCE})  # a machine that is busy hangs for seconds
        assert ranks[0].wait_for("began", PATIENCE)["began"] == step_of(last)
        assert [rank.end() for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.close()
    history = json.loads((tmp_path / "result.json").read_text())["history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, STEPS + 1))
