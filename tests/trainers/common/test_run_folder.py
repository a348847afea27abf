"""A run has its folder for itself, goes on with its own settings, ends once, and its model always lies somewhere.

All three trainers are asked the same; what a run must come to is what it comes to when nothing happens to it.
"""

import json
import math
import os
import shutil
import signal
import time

import pytest
import torch
from datasets import Dataset

from hf_moe_cpt.trainers.common.checkpointing import LOCK, SET_ASIDE, checkpoints_in
from hf_moe_cpt.trainers.common.run_folder import STATE_FILE, RunLock, compare_settings, describe_rows
from tests.helpers import cpt_runs, preference_runs, surgery_runs
from tests.helpers.cpt_runs import logged, stop_at
from tests.helpers.faulty_hardware import small_disk
from tests.helpers.tiny_models import tiny_model, tokenized


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
RUNS = {  # of each trainer: how a run in a folder is made, and what its log calls the tokens so far
    "cpt": (lambda folder, **changes: cpt_runs.trainer(folder / "run", "llama", **SAVING | changes), "tokens_seen"),
    "rainbowpo": (lambda folder, **changes: preference_runs.trainer(folder, **SAVING | changes), "num_tokens"),
    "surgery": (lambda folder, **changes: surgery_runs.trainer(folder / "run", **SAVING | changes), None),
}


def _weights(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- the lock ----


def _in_child(work) -> int:
    """Process id of a fork that does `work` and then waits to be killed."""
    told, tell = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            work()
            os.write(tell, b".")
            time.sleep(600)
        finally:
            os._exit(1)
    os.close(tell)
    os.read(told, 1)
    os.close(told)
    return pid


def test_a_folder_is_locked_for_one_process_and_taken_over_from_a_dead_one(tmp_path):
    keep = []
    pid = _in_child(lambda: (keep.append(RunLock.of(tmp_path)), keep[0].sign()))
    try:
        with pytest.raises(
            ValueError, match=rf"is in use by process {pid} on .*: wait for it, end it, or name another"
        ):
            RunLock.of(tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    lock = RunLock.of(tmp_path)
    lock.sign()
    assert f"process {os.getpid()} on " in (tmp_path / LOCK).read_text()
    assert RunLock.of(tmp_path) is lock  # a second trainer of the same process
    status = os.waitpid(_exit_code(lambda: RunLock.of(tmp_path)), 0)[1]
    assert os.waitstatus_to_exitcode(status) == 3


def _exit_code(work) -> int:
    """Process id of a fork that ends with 3 if `work` is refused, else with 0."""
    pid = os.fork()
    if not pid:
        try:
            work()
        except ValueError:
            os._exit(3)
        os._exit(0)
    return pid


def test_two_runs_at_once_the_second_is_refused_before_it_computes_anything(tmp_path):
    run, second = RUNS["cpt"][0](tmp_path), []
    run.add_callback(cpt_runs.AtStep(1, lambda _: second.append(os.waitpid(_exit_code(_second(tmp_path)), 0)[1])))
    run.train()
    assert os.waitstatus_to_exitcode(second[0]) == 3


def _second(folder):
    return lambda: RUNS["cpt"][0](folder).train(resume_from_checkpoint="auto")


# ---- settings ----


def test_a_table_says_what_differs_and_what_would_make_numbers_lie_is_refused(tmp_path, caplog):
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    (checkpoint / "scheduler.pt").write_text("x")
    saved = {"seed": 1, "max_length": 16, "logging_steps": 5, "replay_ratio": math.nan, "gone": 3}
    now = {"seed": 2, "max_length": 8, "logging_steps": 1, "replay_ratio": 0.1, "new": 4}
    assert compare_settings(checkpoint, now, []) == []
    assert "does not say with which settings it was made: nothing is compared" in caplog.text
    (checkpoint / STATE_FILE).write_text(json.dumps({"settings": saved}))
    refusal = r"depend \(max_length was 16 and is 8, .*\): set them back, .* --allow_changes seed,max_length,replay_"
    with pytest.raises(ValueError, match=refusal):
        compare_settings(checkpoint, now, ["seed"])
    lines = [line.split() for line in caplog.text.splitlines()]
    assert ["seed", "1", "2", "allowed"] in lines and ["max_length", "16", "8", "refused"] in lines
    assert ["logging_steps", "5", "1"] in lines
    assert compare_settings(checkpoint, now, [*now]) == ["seed", "max_length", "replay_ratio"]
    assert compare_settings(checkpoint, {**saved, "logging_steps": 2, "replay_ratio": None}, ["replay_ratio"])
    with pytest.raises(ValueError, match="'max_lenght' is no setting that is compared: did you mean max_length?"):
        compare_settings(checkpoint, now, ["max_lenght"])
    (checkpoint / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match="optimizer_state was 'not saved' and is 'begins anew'"):
        compare_settings(checkpoint, now, ["seed", "max_length", "replay_ratio"])


def test_rows_are_known_by_their_number_and_their_tokens():
    rows = tokenized(100, 1)
    assert describe_rows(rows) == describe_rows(tokenized(100, 1)) != describe_rows(tokenized(100, 2))
    assert describe_rows(rows) != describe_rows(rows.select(range(99)))
    assert describe_rows(rows.to_iterable_dataset()) == "a stream"
    assert describe_rows(rows.select([])).startswith("0 rows")


CHANGES = {
    "ratio": ("cpt", {"replay_ratio": 0.5}, "replay_ratio"),
    "length": ("cpt", {"max_length": 8}, "max_length"),
    "steps": ("cpt", {"max_steps": 12}, "max_steps"),
    "batch": ("cpt", {"per_device_train_batch_size": 4}, "optimizer_batch was 2 and is 4"),
    "packing": ("cpt", {"packing": "concat"}, "packing"),
    "decay": ("rainbowpo", {"weight_decay": 0.3}, "weight_decay"),
    "data": ("rainbowpo", {"data": preference_runs.pairs(12)}, "data_train was"),
    "objective": ("rainbowpo", {"beta": 0.7}, "beta"),
    "weight": ("surgery", {"retain_weight": 0.1}, "retain_weight"),
    "seed": ("surgery", {"seed": 3}, "seed"),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Folders with a run of each trainer that was stopped after step 3 of 6, with a checkpoint of step 2."""
    folders = {}
    for kind, (make, _) in RUNS.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        run = make(folders[kind])
        run.add_callback(stop_at(3))
        run.train()
    return folders


@pytest.mark.parametrize("kind, change, said", CHANGES.values(), ids=CHANGES)
def test_changed_settings_are_refused_on_resume(stopped, kind, change, said):
    run = RUNS[kind][0](stopped[kind], **change)
    with pytest.raises(ValueError, match=f"was made with other settings, on which its numbers depend .*{said}"):
        run.train(resume_from_checkpoint="last")
    assert run.state.global_step == 0 and [path.name for path in checkpoints_in(stopped[kind] / "run")] == [
        "checkpoint-2"
    ]


@pytest.mark.parametrize("kind", [pytest.param("cpt", marks=pytest.mark.slow), "rainbowpo", "surgery"])
def test_what_is_allowed_to_change_does_change(tmp_path, kind):
    make = RUNS[kind][0]
    run = make(tmp_path)
    run.add_callback(stop_at(2))
    run.train()
    changes = {"learning_rate": 2e-3, "weight_decay": 0.25, "logging_steps": 2, "save_steps": 3}
    names = ["learning_rate", "weight_decay"] + ["constant_learning_rate", "min_learning_rate"] * (kind == "cpt")
    again = make(tmp_path, **changes, allow_changes=",".join(names))
    again.train(resume_from_checkpoint="auto")
    assert sorted(again._changed) == sorted(names)
    assert (again.state.save_steps, again.state.logging_steps) == (3, 2)  # transformers goes on with the checkpoint's
    assert "checkpoint-4" not in {path.name for path in checkpoints_in(tmp_path / "run")}
    decays = {group["weight_decay"] for group in again.optimizer.param_groups}
    assert decays == {0.25} or decays == {0.25, 0.0}  # no decay of norms
    fresh = make(tmp_path / "fresh", **changes)
    fresh.train()
    assert logged(again.state.log_history, "learning_rate")[-1] == logged(fresh.state.log_history, "learning_rate")[-1]


def test_the_same_batch_over_other_micro_batches_is_the_same_run(tmp_path):
    run = RUNS["cpt"][0](tmp_path, per_device_train_batch_size=2)
    run.add_callback(stop_at(2))
    run.train()
    again = RUNS["cpt"][0](tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert again.train(resume_from_checkpoint="last").global_step == 6


def test_tokens_are_counted_also_where_a_change_was_allowed(tmp_path):
    run = RUNS["cpt"][0](tmp_path)
    run.add_callback(stop_at(2))
    run.train()
    again = RUNS["cpt"][0](tmp_path, max_length=8, allow_changes=["max_length"])
    again.train(resume_from_checkpoint="last")
    assert logged(again.state.log_history, "tokens_seen") == [32, 64, 80, 96, 112, 128]
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "cpt_state.json").read_text())
    assert state["tokens_seen"] == 128


# ---- ends ----


@pytest.mark.parametrize("kind", RUNS)
def test_a_resumed_run_has_the_numbers_of_one_that_was_not_and_a_finished_one_is_left_alone(tmp_path, stopped, kind):
    make, tokens = RUNS[kind]
    whole = make(tmp_path)
    trained = whole.train()
    assert trained.training_loss == pytest.approx(sum(logged(whole.state.log_history, "loss")) / 6, rel=1e-6)
    losses = [trained.training_loss]
    half = shutil.copytree(stopped[kind], tmp_path / "half")  # other tests want it as it is
    for _ in range(2):  # the second time it is finished
        resumed = make(half)
        losses.append(resumed.train(resume_from_checkpoint="auto").training_loss)
        assert resumed.state.global_step == 6 and resumed.state.log_history[-1]["train_loss"] == losses[0]
        assert _same(_weights(resumed), _weights(whole))
    assert losses == [losses[0]] * 3
    if tokens:
        assert logged(resumed.state.log_history, tokens) == logged(whole.state.log_history, tokens)


def test_a_surgery_that_a_rule_has_ended_is_not_gone_on_with(tmp_path):
    rule = {**surgery_runs.EVALUATED, **SAVING, "eval_steps": 2, "max_retain_kl": 1e-9, "learning_rate": 1e-2}
    ended = surgery_runs.trainer(tmp_path / "run", **rule)
    assert ended.train().global_step == 2 and "above max_retain_kl" in ended.stop_reason
    again = surgery_runs.trainer(tmp_path / "run", **rule)
    assert again.train(resume_from_checkpoint="auto").global_step == 2 and again.stop_reason == ended.stop_reason
    on = surgery_runs.trainer(tmp_path / "run", **rule | {"max_retain_kl": None, "allow_changes": ["max_retain_kl"]})
    assert on.train(resume_from_checkpoint="auto").global_step == 6


@pytest.mark.parametrize("kind", RUNS)
def test_nothing_is_trained_into_the_folder_of_another_run(tmp_path, stopped, kind):
    checkpoint = checkpoints_in(stopped[kind] / "run")[0]
    run = RUNS[kind][0](stopped[kind])
    with pytest.raises(ValueError, match="go on with the run in it with resume_from_checkpoint='last'"):
        run.train()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty .it holds 'mine.txt'.: name another folder."):
        RUNS[kind][0](tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "run" / LOCK).exists() or not (tmp_path / "run" / LOCK).read_text()


@pytest.mark.parametrize("kind", ["rainbowpo"])
def test_the_same_command_goes_on_after_a_first_save_that_failed(tmp_path, kind, caplog):
    """TRL writes its card before the checkpoint, and loggers write beside it."""
    run = RUNS[kind][0](tmp_path)
    (run_dir := tmp_path / "run").mkdir(exist_ok=True)
    run.add_callback(cpt_runs.AtStep(2, lambda _: _die_at_the_first_save(run)))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    (run_dir / "runs").mkdir()
    assert (run_dir / "README.md").exists() and not checkpoints_in(run_dir)
    again = RUNS[kind][0](tmp_path)
    assert again.train(resume_from_checkpoint="auto").global_step == 6


def _die_at_the_first_save(run):
    def die(*_):
        raise KeyboardInterrupt

    run._save_optimizer_and_scheduler = die


def test_going_on_from_an_earlier_checkpoint_loses_none_of_the_later_ones(tmp_path, caplog):
    make = RUNS["cpt"][0]
    make(tmp_path).train()
    again = make(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    aside = sorted(path.name for path in (tmp_path / "run" / SET_ASIDE).iterdir())
    assert aside == ["checkpoint-4-is-later-than-checkpoint-2", "checkpoint-6-is-later-than-checkpoint-2"]
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


# ---- disks ----


@pytest.mark.parametrize("kind", RUNS)
def test_a_disk_that_is_too_small_is_told_before_training(tmp_path, kind):
    with small_disk(tmp_path / "disk", 96 * 1024):
        run = RUNS[kind][0](tmp_path, output_dir=str(tmp_path / "disk" / "run"))
        with pytest.raises(ValueError, match=r"GB free, but \d checkpoint\(s\) and the final model need about"):
            run.train()
        assert run.state.global_step == 0


@pytest.mark.parametrize("kind", RUNS)
def test_a_final_model_that_finds_no_room_lies_elsewhere_whole(tmp_path, kind):
    with small_disk(tmp_path / "disk", 1 << 20):
        place = {"output_dir": str(tmp_path / "disk" / "run"), "rescue_dir": str(tmp_path / "rescued")}
        run = RUNS[kind][0](tmp_path, **place, save_strategy="no", max_steps=1)
        run.train()
        left = os.statvfs(tmp_path / "disk")
        (tmp_path / "disk" / "other").write_bytes(bytes(max(0, left.f_bavail * left.f_bsize - 8192)))
        with pytest.raises(OSError, match=r"the model was not saved to .*No space left.*: it is whole in ") as raised:
            run.save_model()
        (rescued,) = (tmp_path / "rescued").iterdir()
        assert str(rescued) in str(raised.value) and "\n" not in str(raised.value)
        assert not list((tmp_path / "disk" / "run").glob("*.safetensors"))
    loaded = type(run.model).from_pretrained(rescued)
    assert _same(_weights(run), {name: value for name, value in loaded.state_dict().items()})


def test_a_batch_without_labels_is_called_so_and_can_be_left_out(tmp_path):
    """Documents of one token, of which nothing is predicted, fill the block of one step."""
    rows = Dataset.from_dict({"input_ids": [[5]] * 16 + [[3, 4, 5, 6] * 4] * 5})
    settings = {"replay_ratio": 0.0, "max_steps": 6, "per_device_train_batch_size": 1}
    run = cpt_runs.CPTTrainer(tiny_model("llama"), cpt_runs.config(tmp_path / "run", **settings), rows)
    step = 1 + next(place for place in range(6) if (run.mixture[place]["labels"][1:] == -100).all())
    with pytest.raises(ValueError, match=rf"Step {step} \(.* of the mixture\): none of its tokens has a label"):
        run.train()
    settings |= {"bad_step_policy": "skip"}
    run = cpt_runs.CPTTrainer(tiny_model("llama"), cpt_runs.config(tmp_path / "skip", **settings), rows)
    run.train()
    assert logged(run.state.log_history, "steps_left_out") == [1]
    losses = [loss for loss in logged(run.state.log_history, "loss") if math.isfinite(loss)]
    assert run.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses) / 5, rel=1e-6) and len(losses) == 5
