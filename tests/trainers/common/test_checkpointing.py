"""Checkpoints are whole or passed over, damage is named, old ones go; folders and disks that do not do are refused.

Weights that are stored under other names come back as `from_pretrained` reads them.
"""

import json
import logging
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_moe_cpt.trainers.common import checkpointing
from tests.helpers.tiny_models import tiny_model, word_tokenizer
from tests.helpers.tiny_moes import moe_model


SHARD = "pytorch_model_fsdp_0/__1_0.distcp"


def _written(folder: Path, step: int, listed: bool = True) -> Path:
    """A checkpoint of ours, or without a list of files, as others write it."""
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "pytorch_model_fsdp_0").mkdir(parents=True)
    (checkpoint / SHARD).write_bytes(bytes(range(256)) * 40)
    save_file({"w": torch.arange(100.0)}, checkpoint / "model.safetensors")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    for name in ("optimizer.bin", "rng_state_1.pth"):
        (checkpoint / name).write_bytes(bytes(64))
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


@pytest.mark.parametrize("lost, state", [("optimizer.bin", "an optimizer"), ("rng_state_1.pth", "random numbers")])
def test_a_checkpoint_without_a_state_and_list_of_files_is_not_gone_on_with(tmp_path, lost, state):
    """Trainer would go on with moments, a schedule or random numbers that begin anew, and say nothing."""
    older, newer = _written(tmp_path, 9, listed=False), _written(tmp_path, 12, listed=False)
    assert checkpointing.resolve_resume(tmp_path, "last") == newer
    (newer / lost).unlink()
    assert checkpointing.resolve_resume(tmp_path, "last") == older
    with pytest.raises(ValueError, match=f"cannot be used, it holds no state of {state}: use .*checkpoint-9"):
        checkpointing.resolve_resume(tmp_path, str(newer))


def test_old_ones_go_but_never_the_only_whole_one(tmp_path):
    one, two, three, four = (_written(tmp_path, step) for step in (1, 2, 3, 4))
    assert [checkpointing.remove_old(tmp_path, limit, []) for limit in (None, 0, 4)] == [[], [], []]
    assert checkpointing.remove_old(tmp_path, 2, [one]) == [two, three]
    assert checkpointing.checkpoints_in(tmp_path) == [one, four]
    (four / SHARD).unlink()
    assert checkpointing.remove_old(tmp_path, 1, []) == [four]  # half of it is gone, so the older one is what counts
    assert checkpointing.checkpoints_in(tmp_path) == [one]
    aside = (
        tmp_path
        / checkpointing.SET_ASIDE
        / "checkpoint-4-its-file-pytorch_model_fsdp_0-__1_0.distcp-is-missing-or-cut"
    )
    assert (aside / "model.safetensors").exists()  # somebody may want what is left of it
    left = [path for path in (tmp_path / checkpointing.UNFINISHED).glob("*")]
    assert left == []


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


BREAKS = {  # what happened, whether the checkpoint had a list of its files, and what is said
    "no state": (lambda folder: (folder / "trainer_state.json").unlink(), False, "not written to its end"),
    "cut state": (lambda folder: (folder / "trainer_state.json").write_text('{"global_st'), False, "state is cut"),
    "a list as state": (lambda folder: (folder / "trainer_state.json").write_text("[]"), False, "state is cut"),
    "another step": (lambda folder: (folder / "trainer_state.json").write_text('{"global_step": 1}'), False, "step 1"),
    "cut weights": (lambda folder: os.truncate(folder / "model.safetensors", 400), False, "model.safetensors is cut"),
    "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), False, "safetensors is cut"),
    "a listed file is gone": (lambda folder: (folder / SHARD).unlink(), True, "distcp is missing or cut"),
    "a listed file is cut": (lambda folder: os.truncate(folder / SHARD, 10239), True, "distcp is missing or cut"),
    "cut list": (lambda folder: (folder / checkpointing.MANIFEST).write_text("{"), True, "its list of files"),
    "a bit": (lambda folder: _flip_a_bit(folder / SHARD), True, "distcp is damaged"),
    "no right to read": (lambda folder: _not_readable(folder / "trainer_state.json"), False, "it cannot be read ("),
}


def _not_readable(path: Path) -> None:
    """For root too, who may read any file."""
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("breaks, listed, said", BREAKS.values(), ids=BREAKS)
def test_checkpoints_with_something_wrong_are_passed_over_and_set_aside(tmp_path, caplog, breaks, listed, said):
    whole = [_written(tmp_path, step, listed) for step in (5, 10)]
    last = _written(tmp_path, 100, listed)
    assert checkpointing.last_whole_checkpoint(tmp_path) == last
    breaks(last)
    (tmp_path / checkpointing.UNFINISHED).mkdir()
    for asked in ("last", True, "auto"):
        assert checkpointing.resolve_resume(tmp_path, asked, read_back=True) == whole[-1]
    with pytest.raises(ValueError, match=rf"{re.escape(said)}.*: use .*checkpoint-10\."):
        checkpointing.resolve_resume(tmp_path, str(last), read_back=True)
    (aside,) = checkpointing.tidy_up(tmp_path, whole[-1])
    assert checkpointing.checkpoints_in(tmp_path) == whole and not (tmp_path / checkpointing.UNFINISHED).exists()
    assert aside.parent.name == checkpointing.SET_ASIDE and aside.name.startswith("checkpoint-100-")
    assert len(list(aside.rglob("*"))) >= 3 and f"is set aside as {aside}: " in caplog.text and said in caplog.text


def test_what_is_later_than_the_step_that_a_run_goes_on_from_is_set_aside_and_nothing_is_lost(tmp_path):
    for _ in range(2):  # the second time the same names are taken
        _written(tmp_path, 9)
        one = tmp_path / "checkpoint-3"
        one = one if one.exists() else _written(tmp_path, 3)
        checkpointing.tidy_up(tmp_path, one)
    names = sorted(path.name for path in (tmp_path / checkpointing.SET_ASIDE).iterdir())
    assert names == ["checkpoint-9-is-later-than-checkpoint-3", "checkpoint-9-is-later-than-checkpoint-3-2"]
    assert checkpointing.checkpoints_in(tmp_path) == [one]
    renamed = one.rename(tmp_path / "the-good-one")
    _written(tmp_path, 2), _written(tmp_path, 4)
    assert [path.name for path in checkpointing.tidy_up(tmp_path, renamed)] == [
        "checkpoint-4-is-later-than-the-good-one"
    ]


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
    with pytest.raises(ValueError, match="is not empty .it holds 'model.safetensors'.: name another folder.$"):
        checkpointing.require_unused(tmp_path, asked="auto")
    checkpointing.require_free_space(tmp_path / "not" / "made", 1000, 1000, copies=2)
    with pytest.raises(ValueError, match=r"GB free, but 2 checkpoint\(s\) and the final model need about"):
        checkpointing.require_free_space(tmp_path, 10**15, 10**12, copies=2)


LEFT = {  # what a run that was killed before its first checkpoint left behind, and whether it may begin anew
    "TRL's card": (lambda folder: (folder / "README.md").write_text("x"), True),
    "tensorboard": (lambda folder: (folder / "runs" / "a").mkdir(parents=True), True),
    "a failed first save": (lambda folder: (_written(folder, 1) / SHARD).unlink(), True),
    "a cut final model": (lambda folder: os.truncate(_weights(folder, "model.safetensors"), 300), True),
    "a first shard": (lambda folder: _weights(folder, "model-00001-of-00002.safetensors"), True),
    "a whole model": (lambda folder: _weights(folder, "model.safetensors"), False),
    "an adapter": (lambda folder: _weights(folder, "adapter_model.safetensors"), False),
}


def _weights(folder: Path, name: str) -> Path:
    save_file({"w": torch.arange(100.0)}, folder / name)
    return folder / name


@pytest.mark.parametrize("leave, may", LEFT.values(), ids=LEFT)
def test_the_same_command_begins_anew_where_its_run_left_no_checkpoint(tmp_path, leave, may):
    leave(tmp_path)
    with pytest.raises(ValueError, match=r"name another folder\.$"):
        checkpointing.require_unused(tmp_path, asked="auto")  # no run of ours began here
    (tmp_path / checkpointing.LOCK).write_text("process 1")
    if may:
        checkpointing.require_unused(tmp_path, asked="auto")
    else:
        with pytest.raises(ValueError, match=r"name another folder\.$"):
            checkpointing.require_unused(tmp_path, asked="auto")
    remedy = (
        "name another folder, or go on with the run in it with resume_from_checkpoint='auto'" if may else "folder."
    )
    with pytest.raises(ValueError, match=remedy):
        checkpointing.require_unused(tmp_path)
    _written(tmp_path, 2)
    with pytest.raises(ValueError, match="go on with the run in it with resume_from_checkpoint='last'"):
        checkpointing.require_unused(tmp_path)


def test_a_full_disk_is_told_by_tokenizers_too_and_other_errors_are_raised(tmp_path):
    failures = checkpointing.WriteFailures()
    failures.call(word_tokenizer().backend_tokenizer.save, str(tmp_path / "missing" / "tokenizer.json"))
    assert failures.first == "Exception: No such file or directory (os error 2)"
    with pytest.raises(Exception, match="of another kind"):
        failures.call(_raise, Exception("of another kind"))


def _raise(error: Exception) -> None:
    raise error


def test_snapshots_of_runs_with_one_name_lie_apart_and_in_nobody_elses_folder(tmp_path):
    places = [checkpointing.snapshot_folder(tmp_path / "fast", tmp_path / side / "run") for side in "ab"]
    assert places[0] != places[1] and places[0].name.startswith("_unfinished-run-")
    checkpointing._make_empty(places[0], is_private=True)
    assert places[0].stat().st_mode & 0o777 == 0o700
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "text").write_text("mine")
    places[1].symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="is a link or belongs to another user: name a folder of your own"):
        checkpointing._make_empty(places[1], is_private=True)
    assert (tmp_path / "elsewhere" / "text").exists()
    if os.geteuid() == 0:  # who alone can give folders away
        os.chown(places[0], 65534, 65534)
        with pytest.raises(PermissionError, match="belongs to another user"):
            checkpointing._make_empty(places[0], is_private=True)


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
