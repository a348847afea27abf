"""Every public method of transformers' Trainer and TRL's DPOTrainer on ours: what the parent promises, it keeps."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback
from trl import DPOTrainer

from tests.helpers.preference_runs import pairs, trainer


class _Silent(TrainerCallback):
    """Does nothing."""


def _batch(run):
    return next(iter(run.get_train_dataloader()))


def _predict(run):
    """Before calibration; the rewards are those that are logged."""
    found = run.predict(pairs(6, seed=2))
    assert found.predictions.shape == (6, 2) and found.label_ids is None
    chosen, rejected = found.predictions.mean(0)
    assert found.metrics["test_rewards/chosen"] == pytest.approx(chosen, abs=1e-5)
    assert found.metrics["test_rewards/margins"] == pytest.approx(chosen - rejected, abs=1e-5)
    assert found.metrics["test_loss"] == pytest.approx(found.metrics["test_loss/preference"], rel=1e-5)
    assert run.predict(pairs(2), metric_key_prefix="other").metrics.keys() >= {"other_loss", "other_phi/mean"}


def _evaluate(run):
    own, given, named = run.evaluate(), run.evaluate(pairs(4, seed=1)), run.evaluate({"x": pairs(4, seed=1)})
    assert own["eval_loss"] == given["eval_loss"] == named["eval_x_loss"]
    assert run.evaluate(metric_key_prefix="held")["held_loss"] == own["eval_loss"]


def _evaluation_loop(run):
    loader = run.get_eval_dataloader()
    found = run.evaluation_loop(loader, "x", prediction_loss_only=False)
    assert found.predictions.shape == (4, 2) and found.num_samples == 4
    assert run.evaluation_loop(loader, "x", prediction_loss_only=True).predictions is None
    run.meters["eval"].pop()


def _prediction_step(run):
    loss, rewards, labels = run.prediction_step(run.model, _batch(run), prediction_loss_only=False)
    assert loss.dim() == 0 and rewards.shape == (4, 2) and labels is None
    assert run.prediction_step(run.model, _batch(run), True)[1:] == (None, None)


def _compute_loss(run):
    run.model.eval()
    loss, outputs = run.compute_loss(run.model, _batch(run), return_outputs=True)
    assert torch.equal(outputs.loss, loss) and torch.equal(outputs["loss"], loss)
    assert outputs.logps.shape == outputs.lengths.shape == (4, 2) and (outputs.lengths > 0).all()
    assert run.compute_loss(run.model, _batch(run)) == loss
    assert run.compute_loss(run.model, _batch(run), num_items_in_batch=8).item() == pytest.approx(loss.item() / 2)
    run.meters["eval"].pop()


def _training_step(run):
    loss = run.training_step(run.model, _batch(run))
    assert not loss.requires_grad and any(p.grad is not None for p in run.model.parameters())
    run.model.zero_grad()
    run.meters["train"].pop()


def _get_batch_samples(run):
    batches, count = run.get_batch_samples(iter(run.get_train_dataloader()), 2, run.args.device)
    assert len(batches) == 2 and count == 8  # pairs
    run.balance.begin_step(batches, run.args.device)


def _loaders(run):
    raw = pairs(4, seed=3)
    for loader in (run.get_train_dataloader(), run.get_eval_dataloader(raw), run.get_test_dataloader(raw)):
        assert {"input_ids", "completion_mask"} <= next(iter(loader)).keys()
    assert run.num_examples(run.get_train_dataloader()) == 8


def _optimizers(run):
    run.create_optimizer_and_scheduler(4)
    assert run.optimizer is run.create_optimizer() and run.lr_scheduler is run.create_scheduler(4)
    assert run.get_decay_parameter_names(run.model)
    assert issubclass(run.get_optimizer_cls_and_kwargs(run.args, run.model)[0], torch.optim.Optimizer)
    assert run.get_num_trainable_parameters() == sum(weight.numel() for weight in run.model.parameters())
    assert all(rate >= 0.0 for rate in run.get_learning_rates()) and run.get_optimizer_group()
    run.optimizer = run.lr_scheduler = None


def _train(run):
    assert run.train().global_step == 2
    folder = Path(run.args.output_dir)
    run.save_model()
    run.save_state()
    run.save_metrics("eval", {"eval_loss": 1.0}, combined=False)
    run.log_metrics("eval", {"eval_loss": 1.0})
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == run.model.config.vocab_size
    assert json.loads((folder / "eval_results.json").read_text()) == {"eval_loss": 1.0}
    run.create_model_card(model_name="x")
    assert "RainbowPO" in (folder / "README.md").read_text()


def _log(run):
    run.log({"loss": 1.0})
    assert run.state.log_history[-1]["loss"] == 1.0


def _callbacks(run):
    run.add_callback(_Silent)
    assert isinstance(run.pop_callback(_Silent), _Silent)
    run.add_callback(_Silent())
    run.remove_callback(_Silent)
    assert run.pop_callback(_Silent) is None


def _small(run):
    assert run.is_local_process_zero() and run.is_world_process_zero()
    assert run.get_sp_size() == run.get_cp_size() == run.get_tp_size() == 1
    assert run.get_total_train_batch_size(run.args) == 4
    assert run.floating_point_ops(_batch(run)) > 0
    run.store_flos()
    with run.compute_loss_context_manager(), run.autocast_smart_context_manager():
        pass


def _reference(run):
    chosen, rejected = run.compute_ref_log_probs(run.ref_model, _batch(run))
    assert chosen.shape == rejected.shape == (4, 2)
    assert np.isfinite(chosen.numpy()).all()


def _search(run):
    with pytest.raises((RuntimeError, ValueError)):  # the parent's: DPOTrainer takes no model_init
        run.hyperparameter_search(backend="optuna")


CASES = {  # in this order: what calibrates, and what must not need it, before what trains
    ("predict",): _predict,
    ("evaluate",): _evaluate,
    ("evaluation_loop",): _evaluation_loop,
    ("prediction_step",): _prediction_step,
    ("compute_loss",): _compute_loss,
    ("training_step",): _training_step,
    ("get_batch_samples",): _get_batch_samples,
    ("get_train_dataloader", "get_eval_dataloader", "get_test_dataloader", "num_examples"): _loaders,
    ("create_optimizer_and_scheduler", "create_optimizer", "create_scheduler"): _optimizers,
    ("get_decay_parameter_names", "get_optimizer_cls_and_kwargs", "get_num_trainable_parameters"): _optimizers,
    ("get_learning_rates", "get_optimizer_group"): _optimizers,
    ("train", "save_model", "save_state", "save_metrics", "log_metrics", "create_model_card"): _train,
    ("log",): _log,
    ("add_callback", "pop_callback", "remove_callback"): _callbacks,
    ("is_local_process_zero", "is_world_process_zero", "get_sp_size", "get_cp_size", "get_tp_size"): _small,
    ("get_total_train_batch_size", "floating_point_ops", "store_flos"): _small,
    ("compute_loss_context_manager", "autocast_smart_context_manager"): _small,
    ("compute_ref_log_probs",): _reference,
    ("hyperparameter_search", "call_model_init"): _search,
}
ELSEWHERE = {  # covered by tests of their own, or called by `train` and `__init__` alone
    "push_to_hub": "tests/hub",
    "init_hf_repo": "tests/hub",
    "create_accelerator_and_postprocess": "__init__",
    "set_initial_training_values": "train",
    "end": "train",
    "metrics_format": "log_metrics",
}


def test_what_the_parents_promise_is_kept(tmp_path):
    run = trainer(tmp_path, data=pairs(8), eval_dataset=pairs(4, seed=1), max_steps=2, save_only_model=False)
    for case in dict.fromkeys(CASES.values()):
        case(run)


def test_every_public_method_has_a_case():
    """A new one of the parents must be looked at."""
    public = {
        name
        for parent in (Trainer, DPOTrainer)
        for name, _ in inspect.getmembers(parent, callable)
        if not name.startswith("_")
    }
    assert public - {name for names in CASES for name in names} == ELSEWHERE.keys() & public
