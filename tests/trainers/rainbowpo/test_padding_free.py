"""Sequences of pairs laid into one row, against the same pairs padded: losses, gradients, logs, predictions."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM

from hf_moe_cpt.trainers.rainbowpo.data import LENGTHS
from tests.helpers.cpt_runs import logged
from tests.helpers.preference_runs import pairs, saved_model, trainer


SETTINGS = {
    "rainbowpo": ("llama", {}),
    "a mixture, its penalty and adapters": ("mixtral", {"router_aux_loss_coef": 0.5, "peft": True}),
    "our own mixture": ("cpt_moe", {"router_aux_loss_coef": 0.5}),
    "sums with scores": ("llama", {"preset": "odpo", "home_advantage": 2.0, "score_transform": "identity"}),
    "sums with lengths": ("llama", {"preset": "r-dpo"}),
    "no reference": ("llama", {"preset": "simpo"}),
    "sums with phi": ("llama", {"preset": "mallows-dpo"}),
    "precomputed": ("llama", {"precompute_ref_log_probs": True}),
    "cut at the start": ("llama", {"max_length": 7, "truncation_mode": "keep_end"}),
}


def _run(folder, kind, is_padding_free, **changes):
    changes = dict(changes)
    if changes.pop("peft", False):
        changes["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    data = pairs(12, scores=changes.get("preset") == "odpo")
    return trainer(folder, saved_model(folder.parent, kind), data, padding_free=is_padding_free, **changes)


QUICK = "rainbowpo"
CASES = [
    pytest.param(*case, id=name, marks=() if name == QUICK else pytest.mark.slow) for name, case in SETTINGS.items()
]


@pytest.mark.parametrize("kind, changes", CASES)
def test_losses_and_gradients_are_those_of_padded_pairs(tmp_path, kind, changes):
    """The policy moved away from its reference, so that every term counts."""
    found = []
    for is_padding_free in (False, True):
        run = _run(tmp_path / str(is_padding_free), kind, is_padding_free, **changes)
        run._calibrate()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in run.model.parameters():
                if weight.requires_grad:
                    weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
        batch = next(iter(run.get_train_dataloader()))
        assert (LENGTHS in batch) == is_padding_free
        assert is_padding_free == (batch["input_ids"].shape[0] == 1)
        run.model.train()
        loss, outputs = run.compute_loss(run.model, batch, return_outputs=True)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])
        metrics = run.meters["train"].pop() | run.balance.pop()
        found.append((outputs, gradient, metrics))
    (padded, its_gradient, its_metrics), (free, gradient, metrics) = found
    for name in ("loss", "rewards", "logps", "lengths"):
        torch.testing.assert_close(free[name], padded[name], rtol=1e-4, atol=1e-5)
    assert (gradient - its_gradient).norm() < 1e-4 * its_gradient.norm() and its_gradient.norm() > 0
    assert metrics == pytest.approx(its_metrics, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_training_evaluation_and_prediction_are_those_of_padded_pairs(tmp_path):
    runs = []
    for is_padding_free in (False, True):
        changes = {"eval_dataset": pairs(6, seed=1), "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4}
        run = _run(tmp_path / str(is_padding_free), "llama", is_padding_free, gradient_accumulation_steps=2, **changes)
        assert run.args.padding_free == is_padding_free
        run.train()
        runs.append((run, run.evaluate()["eval_loss"], run.predict(pairs(6, seed=2)).predictions))
    (padded, its_loss, its_rewards), (free, loss, rewards) = runs
    assert logged(free.state.log_history, "loss") == pytest.approx(logged(padded.state.log_history, "loss"), rel=1e-4)
    assert loss == pytest.approx(its_loss, rel=1e-4) and free.dispersion_scale == pytest.approx(
        padded.dispersion_scale, rel=1e-5
    )
    assert free.state.log_history[1]["num_tokens"] == padded.state.log_history[1]["num_tokens"] > 0
    assert rewards.shape == (6, 2) and rewards == pytest.approx(its_rewards, rel=1e-3, abs=1e-4)


REFUSED = {
    "virtual tokens": ({"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}, "virtual"),
    "another reference": ({"ref": "mixtral"}, "ref_model is a MixtralForCausalLM and the policy another"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_laid_into_one_row_is_refused(tmp_path, changes, message):
    if "ref" in changes:
        changes = {"ref_model": AutoModelForCausalLM.from_pretrained(saved_model(tmp_path, changes["ref"]))}
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, padding_free=True, **changes)
