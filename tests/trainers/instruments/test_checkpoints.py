"""Half-written checkpoints are recognised, and folders and disks that cannot be used are refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_moe_cpt.trainers.instruments.checkpoints import (
    checkpoints_in,
    discard_half_written,
    is_whole,
    last_whole_checkpoint,
    require_free_space,
    require_unused,
    resolve_resume,
)


def _checkpoint(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir()
    save_file({"w": torch.arange(100.0)}, folder / "model.safetensors")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def _truncate_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])


BREAKS = {
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "cut state": lambda folder: (folder / "trainer_state.json").write_text('{"global_st'),
    "state of another step": lambda folder: (folder / "trainer_state.json").write_text('{"global_step": 1}'),
    "cut weights": _truncate_weights,
    "empty weights": lambda folder: (folder / "model.safetensors").write_bytes(b""),
}


@pytest.mark.parametrize("broken", BREAKS.values(), ids=BREAKS)
def test_half_written_checkpoints_are_passed_over_and_removed(tmp_path, broken):
    whole = [_checkpoint(tmp_path, step) for step in (5, 10)]
    last = _checkpoint(tmp_path, 100)
    assert last_whole_checkpoint(tmp_path) == last
    broken(last)
    assert not is_whole(last)
    assert resolve_resume(tmp_path, "last") == resolve_resume(tmp_path, True) == whole[-1]
    with pytest.raises(ValueError, match=r"was not written to its end: use .*checkpoint-10\."):
        resolve_resume(tmp_path, str(last))
    assert discard_half_written(tmp_path) == [last]
    assert checkpoints_in(tmp_path) == whole


def test_a_renamed_checkpoint_can_be_named(tmp_path):
    renamed = _checkpoint(tmp_path, 5).rename(tmp_path / "the-good-one")
    assert resolve_resume(tmp_path, str(renamed)) == renamed


def test_nothing_to_resume_from(tmp_path):
    assert resolve_resume(tmp_path, None) is None
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        resolve_resume(tmp_path, "last")


def test_folders_in_use_are_refused(tmp_path):
    require_unused(tmp_path)
    require_unused(tmp_path / "missing")
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(ValueError, match="is not empty .it holds 'model.safetensors'.: name another folder"):
        require_unused(tmp_path)


def test_a_small_disk_is_refused(tmp_path):
    require_free_space(tmp_path / "not" / "made", 1000, 1000, copies=2)
    with pytest.raises(ValueError, match=r"GB free, but 2 checkpoint\(s\) and the final model need about"):
        require_free_space(tmp_path, 10**15, 10**12, copies=2)
