"""Checkpoints are whole or passed over, damage is named, old ones go; folders and disks that do not do are refused.

Weights that are stored under other names come back as `from_pretrained` reads them.
"""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_moe_cpt.trainers.common import checkpointing
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tiny_moes import moe_model


SHARD = "pytorch_model_fsdp_0/__1_0.distcp"


def _written(folder: Path, step: int, listed: bool = True) -> Path:
    """A checkpoint of ours, or without a list of files, as others write it."""
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "pytorch_model_fsdp_0").mkdir(parents=True)
    (checkpoint / SHARD).write_bytes(bytes(range(256)) * 40)
    save_file({"w": torch.arange(100.0)}, checkpoint / "model.safetensors")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if listed:
        checkpointing.write_manifest(checkpoint, step)
    return checkpoint


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_damaged_shard_is_named_and_the_checkpoint_before_it_is_taken(tmp_path, caplog):
    older, newer = _written(tmp_path, 9), _written(tmp_path, 12)
    assert checkpointing.resolve_resume(tmp_path, "last", read_back=True) == newer
    _flip_a_bit(newer / SHARD)
    assert checkpointing.is_whole(newer)  # by its sizes; only reading it back tells
    assert checkpointing.damaged_file(newer) == SHARD and checkpointing.damaged_file(older) is None
    with caplog.at_level(logging.WARNING):
        assert checkpointing.resolve_resume(tmp_path, "last", read_back=True) == older
    assert f"Passing over {newer}: its file {SHARD} is damaged (not what was written)." in caplog.text
    with pytest.raises(ValueError, match=r"cannot be used, its file .*__1_0.distcp is damaged .*: use .*checkpoint-9"):
        checkpointing.resolve_resume(tmp_path, str(newer), read_back=True)


def test_old_ones_go_but_never_the_only_whole_one(tmp_path):
    one, two, three, four = (_written(tmp_path, step) for step in (1, 2, 3, 4))
    assert [checkpointing.remove_old(tmp_path, limit, []) for limit in (None, 0, 4)] == [[], [], []]
    assert checkpointing.remove_old(tmp_path, 2, [one]) == [two, three]
    assert checkpointing.checkpoints_in(tmp_path) == [one, four]
    (four / SHARD).unlink()
    assert checkpointing.remove_old(tmp_path, 1, []) == [four]  # half of it is gone, so the older one is what counts
    assert checkpointing.checkpoints_in(tmp_path) == [one]
    assert list(tmp_path.iterdir()) == [one] or list((tmp_path / checkpointing.UNFINISHED).iterdir()) == []


def test_a_checkpoint_takes_the_place_of_one_of_the_same_step(tmp_path):
    old = _written(tmp_path, 3)
    (old / "of the old one").write_text("x")
    new = checkpointing.publish(_written(tmp_path / checkpointing.UNFINISHED, 3), tmp_path)
    assert new == old and checkpointing.is_whole(new) and not (new / "of the old one").exists()


def test_hosts_bring_their_parts_and_tell_of_failures(tmp_path):
    run, parts = tmp_path / checkpointing.UNFINISHED, [tmp_path / f"host{host}" / "checkpoint-3" for host in range(2)]
    run.mkdir()
    for host, part in enumerate(parts):
        part.mkdir(parents=True)
        (part / f"shard-{host}").write_text(str(host))
    copy = checkpointing.BackgroundCopy()
    copy.start(lambda: checkpointing.bring_host_part(parts[1], run, 1))
    assert copy.wait() is None and not parts[1].exists()
    with pytest.raises(OSError, match="host 0 did not bring its part of the checkpoint within 0.2 s"):
        checkpointing.wait_for_hosts(run, 2, timeout=0.2)
    copy.start(lambda: checkpointing.bring_host_part(parts[0] / "missing", run, 0))
    assert "No such file" in copy.wait()
    with pytest.raises(OSError, match="host 0: FileNotFoundError"):
        checkpointing.wait_for_hosts(run, 2, timeout=5)
    checkpointing.bring_host_part(parts[0], run, 0)
    checkpointing.wait_for_hosts(run, 2, timeout=5)
    assert sorted(path.name for path in (run / "checkpoint-3").iterdir()) == ["shard-0", "shard-1"]


BREAKS = {  # what happened, and whether the checkpoint had a list of its files
    "no state": (lambda folder: (folder / "trainer_state.json").unlink(), False),
    "cut state": (lambda folder: (folder / "trainer_state.json").write_text('{"global_st'), False),
    "another step": (lambda folder: (folder / "trainer_state.json").write_text('{"global_step": 1}'), False),
    "cut weights": (lambda folder: os.truncate(folder / "model.safetensors", 400), False),
    "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), False),
    "a listed file is gone": (lambda folder: (folder / SHARD).unlink(), True),
    "a listed file is cut": (lambda folder: os.truncate(folder / SHARD, 10239), True),
    "cut list": (lambda folder: (folder / checkpointing.MANIFEST).write_text("{"), True),
}


@pytest.mark.parametrize("breaks, listed", BREAKS.values(), ids=BREAKS)
def test_half_written_checkpoints_are_passed_over_and_removed(tmp_path, breaks, listed):
    whole = [_written(tmp_path, step, listed) for step in (5, 10)]
    last = _written(tmp_path, 100, listed)
    assert checkpointing.last_whole_checkpoint(tmp_path) == last
    breaks(last)
    assert not checkpointing.is_whole(last)
    assert checkpointing.resolve_resume(tmp_path, "last") == checkpointing.resolve_resume(tmp_path, True) == whole[-1]
    with pytest.raises(ValueError, match=r"was not written to its end: use .*checkpoint-10\."):
        checkpointing.resolve_resume(tmp_path, str(last))
    assert checkpointing.discard_half_written(tmp_path) == [last]
    assert checkpointing.checkpoints_in(tmp_path) == whole


def test_what_resuming_finds_in_an_empty_folder_and_by_another_name(tmp_path):
    assert checkpointing.resolve_resume(tmp_path, None) is checkpointing.resolve_resume(tmp_path, "auto") is None
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        checkpointing.resolve_resume(tmp_path, "last")
    written = _written(tmp_path, 5, listed=False)
    assert checkpointing.resolve_resume(tmp_path, "auto") == written
    renamed = written.rename(tmp_path / "the-good-one")
    assert checkpointing.resolve_resume(tmp_path, str(renamed)) == renamed


def test_folders_in_use_and_small_disks_are_refused(tmp_path):
    checkpointing.require_unused(tmp_path)
    checkpointing.require_unused(tmp_path / "missing")
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(ValueError, match="is not empty .it holds 'model.safetensors'.: name another folder"):
        checkpointing.require_unused(tmp_path)
    checkpointing.require_free_space(tmp_path / "not" / "made", 1000, 1000, copies=2)
    with pytest.raises(ValueError, match=r"GB free, but 2 checkpoint\(s\) and the final model need about"):
        checkpointing.require_free_space(tmp_path, 10**15, 10**12, copies=2)


def _changed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind, shard", [("mixtral", "10KB"), ("olmoe", "5GB"), ("qwen3_moe", "5GB")])
def test_every_weight_of_a_mixture_comes_back(kind, shard, tmp_path):
    saved = _changed(moe_model(kind))
    saved.save_pretrained(tmp_path, max_shard_size=shard)
    model = moe_model(kind)
    assert (
        not checkpointing.stored_names(tmp_path) <= model.state_dict().keys()
    )  # else there would be nothing to translate
    assert checkpointing.load_translated(model, tmp_path)
    for name, want in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], want), name


def test_a_model_of_two_types_is_read_without_rounding(tmp_path):
    saved = _changed(tiny_model("mixtral"))
    saved.save_pretrained(tmp_path)
    model = tiny_model("mixtral").to(torch.bfloat16)
    model.lm_head.float()
    assert checkpointing.load_translated(model, tmp_path)
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight)
    for name, want in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], want.to(model.state_dict()[name].dtype)), name


def test_where_names_agree_or_no_model_is_nothing_is_done(tmp_path):
    assert checkpointing.stored_names(tmp_path) == set()
    for kind in ("llama", "cpt_moe"):
        _changed(tiny_model(kind)).save_pretrained(tmp_path / kind)
        model = tiny_model(kind)
        assert not checkpointing.load_translated(model, tmp_path / kind)
        for name, value in tiny_model(kind).state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
    tiny_model("mixtral").save_pretrained(tmp_path)
    assert not checkpointing.load_translated(torch.nn.Linear(2, 2), tmp_path)
