"""A run that is killed or stopped and resumed is, bit for bit, the run that never was.

Run as a program, this file is a run that ends itself with SIGKILL in the middle of writing its second checkpoint.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_moe_cpt.trainers.common.checkpointing import UNFINISHED, checkpoints_in, is_whole
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer
from tests.helpers.cpt_runs import AtStep, config, saved_history, stop_at, trainer, without_clocks
from tests.helpers.source_tree import PROJECT
from tests.helpers.tiny_models import tiny_model, tokenized


SETTINGS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2}
SETTINGS |= {"evaluated": True, "eval_strategy": "steps", "eval_steps": 3, "gradient_accumulation_steps": 2}


def _run(folder: Path, kind: str) -> CPTTrainer:
    """Dropout draws random numbers, so the states of the generators count as well."""
    return trainer(folder, tiny_model(kind, attention_dropout=0.2), **SETTINGS)


def _assert_same(run: CPTTrainer, whole: CPTTrainer) -> None:
    logs = [without_clocks(each.state.log_history[:-1]) for each in (run, whole)]  # the last is the run's summary
    assert logs[0] == logs[1]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], value), name


@pytest.mark.slow
def test_killed_while_saving_and_resumed_equals_never_killed(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "tests.trainers.cpt.test_resume", str(folder)]
    killed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=800)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert [path for path in checkpoints_in(folder) if not is_whole(path)] == []
    assert (folder / UNFINISHED / "checkpoint-4").is_dir()
    assert saved_history(folder / "checkpoint-2")
    whole = _run(tmp_path / "whole", "cpt_moe")
    whole.train()
    resumed = _run(folder, "cpt_moe")
    resumed.train(resume_from_checkpoint="last")
    _assert_same(resumed, whole)


def test_a_stopped_run_goes_on_also_where_experts_are_stored_under_other_names(tmp_path):
    whole = _run(tmp_path / "whole", "mixtral")
    whole.train()
    stopped = _run(tmp_path / "stopped", "mixtral")  # which sets the seed anew
    stopped.add_callback(stop_at(3))
    stopped.train()
    for _ in range(2):  # the second time it is finished, and resumed to nothing
        resumed = _run(tmp_path / "stopped", "mixtral")
        assert resumed.train(resume_from_checkpoint="last").global_step == 4
        _assert_same(resumed, whole)


def _streaming(folder: Path, **changes: object) -> CPTTrainer:
    args = config(folder, max_steps=4, save_strategy="steps", save_steps=2, shuffle_buffer=8, **changes)
    streams = [tokenized(60, seed).to_iterable_dataset(num_shards=4) for seed in (1, 2)]
    return CPTTrainer(tiny_model("llama"), args, *streams)


def test_streams_resume_where_they_stopped(tmp_path):
    whole = _streaming(tmp_path / "whole")
    whole.train()
    stopped = _streaming(tmp_path / "stopped")
    stopped.add_callback(stop_at(2))
    stopped.train()
    resumed = _streaming(tmp_path / "stopped")
    resumed.train(resume_from_checkpoint=True)
    _assert_same(resumed, whole)


@pytest.mark.slow
def test_streams_give_the_same_run_with_any_number_of_workers(tmp_path):
    losses = []
    for workers in (0, 2):
        run = _streaming(tmp_path / str(workers), dataloader_num_workers=workers, gradient_accumulation_steps=2)
        run.train()
        losses.append(without_clocks(run.state.log_history[:-1]))
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_threads_do_not_change_the_numbers_from_run_to_run(tmp_path):
    weights = []
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for repeat in range(2):
            model = tiny_model("cpt_moe", hidden_size=64, intermediate_size=128, num_experts=31)
            run = trainer(tmp_path / str(repeat), model, per_device_train_batch_size=32, max_steps=2)
            run.train()
            weights.append({name: value.clone() for name, value in run.model.state_dict().items()})
    finally:
        torch.set_num_threads(threads)
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []
    assert not torch.are_deterministic_algorithms_enabled()


if __name__ == "__main__":
    doomed = _run(Path(sys.argv[1]), "cpt_moe")

    def die_while_saving(_: object) -> None:
        """The optimizer's state is saved with it, when the model is written already."""
        torch.save = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)

    doomed.add_callback(AtStep(4, die_while_saving))
    doomed.train()
