"""What a disk did to a checkpoint is found and named; old checkpoints go, and never the only whole one."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_moe_cpt.trainers.instruments.background_copy import BackgroundCopy, bring_host_part, wait_for_hosts
from hf_moe_cpt.trainers.instruments.checkpoint_folders import publish, remove_old
from hf_moe_cpt.trainers.instruments.checkpoint_manifest import MANIFEST, damaged_file, write_manifest
from hf_moe_cpt.trainers.instruments.checkpoints import UNFINISHED, checkpoints_in, is_whole, resolve_resume


SHARD = "pytorch_model_fsdp_0/__1_0.distcp"


def _written(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "pytorch_model_fsdp_0").mkdir(parents=True)
    (checkpoint / SHARD).write_bytes(bytes(range(256)) * 40)
    save_file({"w": torch.arange(100.0)}, checkpoint / "model.safetensors")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    write_manifest(checkpoint, step)
    return checkpoint


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_damaged_shard_is_named_and_the_checkpoint_before_it_is_taken(tmp_path, caplog):
    older, newer = _written(tmp_path, 9), _written(tmp_path, 12)
    assert resolve_resume(tmp_path, "last", read_back=True) == newer
    _flip_a_bit(newer / SHARD)
    assert is_whole(newer)  # by its sizes; only reading it back tells
    assert damaged_file(newer) == SHARD and damaged_file(older) is None
    with caplog.at_level(logging.WARNING):
        assert resolve_resume(tmp_path, "last", read_back=True) == older
    assert f"Passing over {newer}: its file {SHARD} is damaged (not what was written)." in caplog.text
    with pytest.raises(ValueError, match=r"cannot be used, its file .*__1_0.distcp is damaged .*: use .*checkpoint-9"):
        resolve_resume(tmp_path, str(newer), read_back=True)


@pytest.mark.parametrize("harm", ["missing", "cut", "list"])
def test_a_checkpoint_with_a_list_is_whole_only_with_every_file(tmp_path, harm):
    checkpoint = _written(tmp_path, 3)
    shard = checkpoint / SHARD
    if harm == "missing":
        shard.unlink()
    elif harm == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        (checkpoint / MANIFEST).write_text("{")
    assert not is_whole(checkpoint)


def test_auto_starts_anew_where_there_is_nothing(tmp_path):
    assert resolve_resume(tmp_path, "auto") is None
    assert resolve_resume(tmp_path, "auto") != _written(tmp_path, 3) == resolve_resume(tmp_path, "auto")


def test_old_ones_go_but_never_the_only_whole_one(tmp_path):
    one, two, three, four = (_written(tmp_path, step) for step in (1, 2, 3, 4))
    assert remove_old(tmp_path, None, []) == remove_old(tmp_path, 0, []) == remove_old(tmp_path, 4, []) == []
    assert remove_old(tmp_path, 2, [one]) == [two, three]
    assert checkpoints_in(tmp_path) == [one, four]
    (four / SHARD).unlink()
    assert remove_old(tmp_path, 1, []) == [four]  # half of it is gone, so the older one is what counts
    assert checkpoints_in(tmp_path) == [one]
    assert list(tmp_path.iterdir()) == [one] or list((tmp_path / UNFINISHED).iterdir()) == []


def test_a_checkpoint_takes_the_place_of_one_of_the_same_step(tmp_path):
    old = _written(tmp_path, 3)
    (old / "of the old one").write_text("x")
    new = publish(_written(tmp_path / UNFINISHED, 3), tmp_path)
    assert new == old and is_whole(new) and not (new / "of the old one").exists()


def test_hosts_bring_their_parts_and_tell_of_failures(tmp_path):
    run, parts = tmp_path / UNFINISHED, [tmp_path / f"host{host}" / "checkpoint-3" for host in range(2)]
    run.mkdir()
    for host, part in enumerate(parts):
        part.mkdir(parents=True)
        (part / f"shard-{host}").write_text(str(host))
    copy = BackgroundCopy()
    copy.start(lambda: bring_host_part(parts[1], run, 1))
    assert copy.wait() is None and not parts[1].exists()
    with pytest.raises(OSError, match="host 0 did not bring its part of the checkpoint within 0.2 s"):
        wait_for_hosts(run, 2, timeout=0.2)
    copy.start(lambda: bring_host_part(parts[0] / "missing", run, 0))
    assert "No such file" in copy.wait()
    with pytest.raises(OSError, match="host 0: FileNotFoundError"):
        wait_for_hosts(run, 2, timeout=5)
    bring_host_part(parts[0], run, 0)
    wait_for_hosts(run, 2, timeout=5)
    assert sorted(path.name for path in (run / "checkpoint-3").iterdir()) == ["shard-0", "shard-1"]
