"""A disk that is full during a save: one line is said, training goes on, and the old checkpoint stands."""

import logging
import resource
from collections.abc import Callable
from pickle import PicklingError

import pytest
import torch
from transformers import TrainerCallback

from hf_moe_cpt.trainers.instruments.checkpoints import UNFINISHED, checkpoints_in, is_whole
from tests.helpers.cpt_runs import logged, trainer
from tests.helpers.small_disk import small_disk


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


class AtStep(TrainerCallback):
    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


@pytest.fixture(scope="module")
def checkpoint_bytes(tmp_path_factory) -> int:
    folder = tmp_path_factory.mktemp("roomy") / "run"
    run = trainer(folder, save_strategy="steps", save_steps=2, max_steps=2)
    run.train()
    return sum(path.stat().st_size for path in (folder / "checkpoint-2").rglob("*"))


@pytest.mark.parametrize("has_snapshot", [False, True], ids=["at once", "in the background"])
def test_a_full_disk_is_survived(tmp_path, checkpoint_bytes, caplog, has_snapshot):
    disk = tmp_path / "disk"
    changes = {"snapshot_dir": str(tmp_path / "snapshots")} if has_snapshot else {}
    with small_disk(disk, int(1.7 * checkpoint_bytes)):
        run = trainer(disk / "run", **SAVING, **changes)
        with caplog.at_level(logging.WARNING):
            assert run.train().global_step == 6
        said = [record.getMessage() for record in caplog.records if "was not saved" in record.getMessage()]
        assert len(said) == 2  # steps 4 and 6
        assert f"{disk / 'run' / 'checkpoint-4'} was not saved (" in said[0]
        assert "training goes on, checkpoint-2 stands. Make room, or lower save_total_limit." in said[0]
        assert [path.name for path in checkpoints_in(disk / "run")] == ["checkpoint-2"]
        assert is_whole(disk / "run" / "checkpoint-2") and not (disk / "run" / UNFINISHED).exists()
        again = trainer(disk / "run", max_steps=6)
        again.train(resume_from_checkpoint="last")
    losses = logged(run.state.log_history, "loss")
    assert logged(again.state.log_history, "loss") == losses and len(losses) == 6


def test_a_limit_on_files_is_survived_and_the_next_save_is_whole(tmp_path, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    run = trainer(tmp_path / "run", **SAVING, save_total_limit=1)
    run.add_callback(AtStep(4, lambda: limit(6000)))
    run.add_callback(AtStep(5, lambda: limit(limits[0])))
    try:
        run.train()
    finally:
        limit(limits[0])
    assert caplog.text.count("was not saved") == 1 and "checkpoint-2 stands" in caplog.text
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-6"]
    assert is_whole(tmp_path / "run" / "checkpoint-6")


def test_errors_that_are_no_failure_to_write_are_raised(tmp_path):
    run = trainer(tmp_path / "run", **SAVING)
    run.add_callback(AtStep(2, lambda: setattr(run.args, "label_names", lambda: None)))
    with pytest.raises((AttributeError, PicklingError), match="lambda"):
        run.train()
    assert checkpoints_in(tmp_path / "run") == []


def test_a_snapshot_is_the_run_at_its_step_and_old_ones_go(tmp_path):
    plain = trainer(tmp_path / "plain", **SAVING, save_total_limit=1)
    plain.train()
    run = trainer(tmp_path / "run", **SAVING, save_total_limit=1, snapshot_dir=str(tmp_path / "snapshots"))
    run.train()
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-6"]
    saved, wanted = (
        torch.load(tmp_path / name / "checkpoint-6" / "optimizer.pt")["state"] for name in ("run", "plain")
    )
    assert all(torch.equal(saved[key]["exp_avg"], wanted[key]["exp_avg"]) for key in wanted)
    assert list((tmp_path / "snapshots").rglob("*.pt")) == []
