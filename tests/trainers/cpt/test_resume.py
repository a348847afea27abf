"""A run killed at any moment and resumed is, bit for bit, the run that was never killed."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_moe_cpt.trainers.common.checkpointing import UNFINISHED, checkpoints_in, is_whole
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer
from tests.helpers.cpt_runs import config, saved_history, stop_at, trainer, without_clocks
from tests.helpers.killed_run import settings
from tests.helpers.source_tree import PROJECT
from tests.helpers.tiny_models import tiny_model, tokenized


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    """The log and the weights of the whole run."""
    folder = tmp_path_factory.mktemp("never killed") / "run"
    run = trainer(folder, **settings())
    run.train()
    return run.state.log_history, {name: value.clone() for name, value in run.model.state_dict().items()}


def _assert_same(run: CPTTrainer, history: list, weights: dict[str, torch.Tensor]) -> None:
    assert without_clocks(run.state.log_history[:-1]) == without_clocks(history[:-1])  # the last is the run's summary
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("moment, step, last_whole", [("step", 5, 3), ("saving", 9, 6)])
def test_killed_and_resumed_equals_never_killed(tmp_path, never_killed, moment, step, last_whole):
    folder = tmp_path / "run"
    killed = subprocess.run(
        [sys.executable, "-m", "tests.helpers.killed_run", str(folder), moment, str(step)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert [path for path in checkpoints_in(folder) if not is_whole(path)] == []
    assert (folder / UNFINISHED / f"checkpoint-{step}").is_dir() == (moment == "saving")
    assert saved_history(folder / f"checkpoint-{last_whole}")
    resumed = trainer(folder, **settings())
    resumed.train(resume_from_checkpoint="last")
    _assert_same(resumed, *never_killed)


def test_experts_that_are_stored_under_other_names_come_back(tmp_path):
    options = {"model": "mixtral", "save_strategy": "steps", "save_steps": 3}
    whole, stopped = (trainer(tmp_path / name, **options) for name in ("whole", "stopped"))
    whole.train()
    stopped.add_callback(stop_at(4))
    stopped.train()
    resumed = trainer(tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint="last")
    _assert_same(resumed, whole.state.log_history, whole.model.state_dict())


def _streaming(folder: Path, **changes: object) -> CPTTrainer:
    args = config(folder, max_steps=8, save_strategy="steps", save_steps=4, shuffle_buffer=8, **changes)
    streams = [tokenized(60, seed).to_iterable_dataset(num_shards=4) for seed in (1, 2)]
    return CPTTrainer(tiny_model("cpt_moe"), args, *streams)


def test_streams_resume_where_they_stopped(tmp_path):
    whole = _streaming(tmp_path / "whole")
    whole.train()
    stopped = _streaming(tmp_path / "stopped")
    stopped.add_callback(stop_at(4))
    stopped.train()
    resumed = _streaming(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    _assert_same(resumed, whole.state.log_history, whole.model.state_dict())


def test_streams_give_the_same_run_with_any_number_of_workers(tmp_path):
    losses = []
    for workers in (0, 2):
        run = _streaming(tmp_path / str(workers), dataloader_num_workers=workers, gradient_accumulation_steps=2)
        run.train()
        losses.append(without_clocks(run.state.log_history[:-1]))
    assert losses[0] == losses[1]


def test_a_finished_run_can_be_resumed_to_nothing(tmp_path):
    done = trainer(tmp_path / "run", save_strategy="steps", save_steps=6)
    done.train()
    again = trainer(tmp_path / "run", save_strategy="steps", save_steps=6)
    assert again.train(resume_from_checkpoint="last").global_step == 6
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, done.model.state_dict()[name])


def test_threads_do_not_change_the_numbers_from_run_to_run(tmp_path):
    weights = []
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for repeat in range(2):
            model = tiny_model("cpt_moe", hidden_size=64, intermediate_size=128, num_experts=31)
            run = trainer(tmp_path / str(repeat), model, per_device_train_batch_size=32)
            run.train()
            weights.append({name: value.clone() for name, value in run.model.state_dict().items()})
    finally:
        torch.set_num_threads(threads)
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []
    assert not torch.are_deterministic_algorithms_enabled()
