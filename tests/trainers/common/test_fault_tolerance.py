"""Bad steps stop the run, are left out exactly, or are gone back for; who is to blame when nothing moves.

The bad losses are real: the row of the embedding of one token, which one document has, is not a number.
"""

import json
import logging
import math
import threading

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import TrainerCallback

from hf_moe_cpt.trainers.common import checkpointing
from hf_moe_cpt.trainers.common.checkpointing import HEARTBEATS, checkpoints_in, step_of
from hf_moe_cpt.trainers.common.fault_tolerance import LEAST_LOSSES, Heartbeat, LossHistory, Watchdog, blame
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig
from hf_moe_cpt.trainers.surgery.surgery_config import SurgeryConfig
from tests.helpers import cpt_runs, preference_runs, surgery_runs
from tests.helpers.tiny_models import VOCABULARY, tiny_model, tokenized


POISON = VOCABULARY - 1
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 7}


class Weights(TrainerCallback):
    """The weights and the first moments after every step."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        moments = [entry["exp_avg"] for entry in optimizer.state.values()]
        self.after.append([tensor.detach().clone() for tensor in (*model.parameters(), *moments)])


def _poisoned(model):
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = math.nan
    return model


def _cpt(folder, **changes):
    """A run whose mixture holds the token in one block; the step that gets it, counted from 1, comes second."""
    clean = tokenized(14, 1, 1, POISON)
    data = concatenate_datasets([Dataset.from_dict({"input_ids": [[POISON]]}), clean])
    args = cpt_runs.config(folder, **{"replay_ratio": 0.0, **SAVING, **changes})
    run = cpt_runs.CPTTrainer(_poisoned(tiny_model("llama", tie_word_embeddings=False)), args, data)
    places = [i for i in range(len(run.mixture)) if POISON in torch.as_tensor(run.mixture[i]["input_ids"])]
    return run, (places or [-99])[0] // run.global_batch_size + 1


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    """A seed with which the token comes in the middle of the run, and not at a step that is logged alone."""
    folder = tmp_path_factory.mktemp("seeds")
    return next(seed for seed in range(40) if _cpt(folder, seed=seed)[1] == 5)


def _same(first, second):
    return all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(first, second, strict=True))


def test_a_step_is_left_out_and_going_back_ends_the_same(tmp_path, caplog, seed, monkeypatch):
    monkeypatch.setattr(checkpointing, "require_finite", lambda model: None)  # the poison lies in its weights
    with pytest.raises(FloatingPointError, match=rf"Step {_cpt(tmp_path, seed=seed)[1]} is bad .*: its loss is nan"):
        _cpt(tmp_path / "stop", seed=seed)[0].train()
    run, step = _cpt(tmp_path / "skip", seed=seed, bad_step_policy="skip", logging_steps=3)
    assert [step_of(path) for path in checkpoints_in(tmp_path / "stop")] == list(range(2, step, 2))  # none after it
    weights = Weights()
    run.add_callback(weights)
    run.train()
    assert _same(weights.after[step - 1], weights.after[step - 2])
    assert not _same(weights.after[step], weights.after[step - 1])
    first = (step - 1) * 2
    assert f"Step {step} is left out (blocks {first} to {first + 1} of the mixture): its loss is nan." in caplog.text
    assert cpt_runs.logged(run.state.log_history, "steps_left_out") == [1]
    assert all(math.isfinite(loss) for loss in cpt_runs.logged(run.state.log_history, "loss"))

    caplog.clear()
    back, _ = _cpt(tmp_path / "rewind", seed=seed, bad_step_policy="rewind", logging_steps=3)
    back.train()
    assert f"Step {step} is bad: its loss is nan. Going back to checkpoint-{(step - 1) // 2 * 2};" in caplog.text
    assert f"Step {step} is left out" in caplog.text
    assert back.state.global_step == 7 and _same(list(back.model.parameters()), list(run.model.parameters()))
    logs = [cpt_runs.without_clocks(one.state.log_history) for one in (back, run)]
    logs = [[{k: v for k, v in entry.items() if k != "grad_norm"} for entry in log] for log in logs]
    first, second = (json.dumps(log, sort_keys=True) for log in logs)
    assert first == second  # as text, since what is NaN in both is the same


def test_going_back_needs_a_checkpoint_and_does_not_go_on_for_ever(tmp_path, seed):
    with pytest.raises(FloatingPointError, match="there is no whole checkpoint before it to go back to"):
        _cpt(tmp_path / "none", seed=seed, bad_step_policy="rewind", save_steps=50)[0].train()
    run, _ = _cpt(tmp_path / "all", seed=seed, bad_step_policy="skip", bad_step_limit=2)
    with torch.no_grad():
        run.model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="Step 3 is bad .*and so were the 2 steps before it .bad_step_limit"):
        run.train()


def test_the_other_trainers_leave_steps_out_too(tmp_path, caplog):
    policy = {"bad_step_policy": "skip", "max_steps": 3, "logging_steps": 1}
    sets = {"retain_dataset": tokenized(12, 3, 1, POISON)}
    sets["update_dataset"] = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 2 + [[POISON] * 3]})
    model = _poisoned(tiny_model("llama", tie_word_embeddings=False))
    surgery = surgery_runs.trainer(tmp_path / "surgery", model, sets=sets, **policy, update_batch_size=1)
    surgery.train()
    rows = preference_runs.pairs(12).filter(lambda row: "w45" not in str(row))
    bad = {name: " ".join(["w45"] * 3) if name == "chosen" else value for name, value in rows[0].items()}
    rows = concatenate_datasets([rows, Dataset.from_list([bad])])
    model = tiny_model("llama", tie_word_embeddings=False)
    alone = {"mixing_alpha": 0.0, "contextual_scaling": "none", "per_device_train_batch_size": 1}
    preference = preference_runs.trainer(tmp_path, model, rows, **{**policy, **alone, "max_steps": len(rows)})
    with torch.no_grad():  # a model that came so would be refused
        preference.model.get_input_embeddings().weight[45] = math.nan
    preference.train()
    for run in (surgery, preference):
        assert sum(cpt_runs.logged(run.state.log_history, "steps_left_out")) == 1
        assert all(torch.isfinite(p).all() for p in list(run.model.parameters())[1:])
    assert "of the mixture of update, retain): its loss is nan." in caplog.text


def test_a_leap_is_a_spike_and_a_drift_is_none():
    history = LossHistory(spike_sigmas=4.0, window=20)
    losses = [3.0 - 0.01 * i + 0.02 * (-1) ** i for i in range(30)]
    for loss in losses[:LEAST_LOSSES]:
        assert history.harm(loss + 50, 1.0) is None  # nothing is known yet
        history.losses.append(loss)
    for loss in losses[LEAST_LOSSES:]:
        assert history.harm(loss, 1.0) is None
        history.losses.append(loss)
    assert "standard deviations above the last 20" in history.harm(losses[-1] + 1.0, 1.0)
    assert history.harm(losses[-1] - 1.0, 1.0) is None  # downwards is welcome
    assert history.harm(2.7, math.inf) == "its gradient norm is inf"
    assert history.harm(-math.inf, 1.0) == "its loss is -inf"
    assert LossHistory(0.0, 20, losses).harm(1e9, 1.0) is None
    assert LossHistory(4.0, 20, [2.0] * 20).harm(2.001, 1.0) is None  # a loss that never moved


@pytest.mark.slow
def test_a_spike_of_real_losses_is_left_out(tmp_path, caplog):
    plain = tokenized(300, 1, 1, 8)
    odd = Dataset.from_dict({"input_ids": [torch.randperm(30).add(15).tolist()[:28]]})
    rule = {"bad_step_policy": "skip", "spike_sigmas": 6.0, "spike_window": 10, "bad_step_limit": 3}
    args = cpt_runs.config(tmp_path, replay_ratio=0.0, max_steps=60, per_device_train_batch_size=4, **rule)
    run = cpt_runs.CPTTrainer(tiny_model("cpt_moe"), args, concatenate_datasets([plain, odd]))
    rows = [i for i in range(len(run.mixture)) if (torch.as_tensor(run.mixture[i]["input_ids"]) >= 15).sum() > 5]
    run.train()
    with caplog.at_level(logging.WARNING):
        found = [record.args[0] for record in caplog.records if "is left out" in str(record.msg)]
    assert found and set(found) <= {row // 4 + 1 for row in rows}


REFUSED = {
    "policy": ({"bad_step_policy": "wait"}, "bad_step_policy='wait' is unknown: choose stop, skip, rewind"),
    "sigmas": ({"spike_sigmas": -1.0}, "spike_sigmas=-1.0 must be at least 0"),
    "window": ({"spike_window": 3}, "spike_window=3 must be at least 8"),
    "limit": ({"bad_step_limit": 0}, "bad_step_limit=0 must be at least 1"),
    "timeout": ({"hang_timeout": -1.0}, "hang_timeout=-1.0 must be at least 0"),
    "snapshots": ({"snapshot_dir": "run"}, "is output_dir: name a folder on a faster disk"),
    "fp16": ({"bad_step_policy": "skip", "fp16": True}, "'skip' with fp16, whose scaler leaves steps out by itself"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_settings_that_cannot_work_are_refused(changes, message):
    for kind, extra in ((CPTConfig, {"max_steps": 5}), (RainbowPOConfig, {"bf16": False}), (SurgeryConfig, {})):
        with pytest.raises(ValueError, match=message):
            kind(output_dir="run", use_cpu=True, **extra, **changes)


WAITS = Heartbeat(10, 50, 7, "in the step")
LATER = Heartbeat(12, 50, 7, "in the step")
NO_DATA = [Heartbeat(beats, 49, 6, "waiting for data") for beats in (10, 12)]
STOPPED = "rank 1 is stopped or dead (no sign of life for 9 s)"
BEHIND = "rank 1 is behind, at step 6 (waiting for data)"
CUT = "all ranks are alive and none moves, at step 7 (in the step)"
UNSEEN = "of rank 1 nothing is seen (has it ended, or is output_dir not shared by all hosts?)"
CASES = {
    "a process that is stopped": ([WAITS, WAITS], [LATER, WAITS], STOPPED),
    "a host that nobody sees": ([WAITS, None], [LATER, None], UNSEEN),
    "a loader that hangs": ([WAITS, NO_DATA[0], WAITS], [LATER, NO_DATA[1], LATER], BEHIND),
    "a network that is cut": ([WAITS, WAITS], [LATER, LATER], CUT),
}


@pytest.mark.parametrize("before, now, said", CASES.values(), ids=CASES)
def test_what_holds_the_run_up_is_told(before, now, said):
    assert blame(before, now, 9.0) == said


def test_a_watch_ends_what_stands_still_and_nothing_else(tmp_path):
    """On a clock of the test, so that a busy machine decides nothing: a round every 2 s, a timeout of 10 s."""
    watches = [Watchdog(tmp_path, 10.0, rank, 2) for rank in range(2)]
    for watch in watches:
        watch.folder.mkdir(parents=True, exist_ok=True)
    for step in range(12):  # longer than the timeout, but in steps
        for watch in watches:
            watch.did(step, "in the step")
        assert [watch.beat(2.0 * step) for watch in watches] == [None, None]
    watches[0].did(12, "in the step")  # and rank 1 waits for its data
    said = [[watch.beat(now) for watch in watches] for now in range(24, 38, 2)]
    assert said[:5] == [[None, None]] * 5 and said[5][0] is None  # rank 0 did something a round later than rank 1
    cause = "(hang_timeout): rank 1 is behind, at step 11 (in the step)."
    assert said[5][1] == f"Nothing has moved on rank 1 for 12 s {cause}"
    assert said[6][0] == f"Nothing has moved on rank 0 for 12 s {cause}"


def test_the_thread_of_a_watch_ends_the_process_once_and_cleans_up(tmp_path):
    watch, said, told = Watchdog(tmp_path, 0.1, 0, 1), [], threading.Event()
    watch.end = lambda message: (said.append(message), told.set())
    watch.start()
    assert told.wait(120.0)
    watch.stop()
    assert len(said) == 1 and "all ranks are alive and none moves, at step 0 (starting)" in said[0]
    assert not (tmp_path / HEARTBEATS).exists()
