"""What is done to weights besides descending, against closed forms in float64."""

import math

import pytest
import torch
from peft import LoraConfig

from hf_moe_cpt.trainers.surgery.chunked import causal_lm_of
from hf_moe_cpt.trainers.surgery.losses import masked_mean
from hf_moe_cpt.trainers.surgery.weights import add_noise
from tests.helpers.cpt_runs import logged
from tests.helpers.surgery_runs import BEST, knowing_model, known_texts, token_sets, trainer
from tests.helpers.tiny_models import tiny_model
from tests.helpers.tolerances import assert_matches


@pytest.mark.parametrize("with_adapter", [False, True])
def test_negation_takes_what_was_learnt_from_the_weights(tmp_path, with_adapter):
    """theta_0 - a (theta - theta_0) in float64, theta of a run that descends on the same rows."""
    lora = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "down_proj"])}
    made = {}
    for name, options in {
        "learnt": {"forget_loss": lambda logp, mask, settings, ref_logp: -masked_mean(logp, mask)},
        "left": {"negation": 0.7},
    }.items():
        sets = token_sets("unlearn", "retain")
        if name == "learnt":
            sets = {"unlearn_dataset": sets["unlearn_dataset"]}
            options |= {"allow_unanchored": True}
        torch.manual_seed(0)
        model = tiny_model("llama").double()
        run = trainer(
            tmp_path / name, model, sets, forget_target=None, max_steps=2, **options, **(lora if with_adapter else {})
        )
        start = {key: weight.clone() for key, weight in causal_lm_of(run.model).state_dict().items()}
        run.train()
        if with_adapter:
            made[name] = causal_lm_of(run.model.merge_and_unload()).state_dict()
        else:
            made[name] = run.model.state_dict()
    before = {key.replace(".base_layer", ""): weight for key, weight in start.items()}
    moved = 0.0
    for key, learnt in made["learnt"].items():
        assert_matches(key, made["left"][key], before[key] - 0.7 * (learnt - before[key]), 1e-12)
        moved += float((learnt - before[key]).abs().sum())
    assert moved > 0 and list(run.sets) == ["unlearn"]
    assert {"retain_kl", "unlearn_ce"} <= run.aims.start.keys(), "retention is measured on rows that have no term"


def test_negation_measures_and_saves_what_is_left(tmp_path):
    sets, options = known_texts(), {"negation": 1.0, "update_weight": 0.0, "learning_rate": 1e-3, **BEST}
    run = trainer(tmp_path / "run", knowing_model(), sets, max_steps=6, **options)
    run.train()
    measured = {e["step"]: e["eval_unlearn_ce"] for e in run.state.log_history if "eval_unlearn_ce" in e}
    trained = logged(run.state.log_history, "unlearn/ce")
    assert measured[6] > measured[0] and trained[-1] < trained[0]
    best = run.state.best_global_step
    assert best and run.evaluate()["eval_unlearn_ce"] == pytest.approx(measured[best], rel=1e-5)
    with pytest.raises(ValueError, match="negation cannot go on from a checkpoint"):
        trainer(tmp_path / "run", knowing_model(), sets, max_steps=7, **options).train(resume_from_checkpoint="last")
    with pytest.raises(ValueError, match=r"negation=1.0 only forgets: give unlearn_dataset or obsolete_dataset"):
        trainer(tmp_path / "other", negation=1.0, sets=token_sets("unlearn", "update"))


def test_noise_is_that_of_each_expert(tmp_path):
    """A stack of experts is no convolution: E matrices with Xavier's deviation of their own two axes."""
    model = tiny_model("mixtral")
    stacks = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.ndim == 3}
    add_noise(model, 0.5, 1.0, 0)
    for name, before in stacks.items():
        noise = (model.get_parameter(name) - 0.5 * before) / 0.5
        assert noise.std().item() == pytest.approx(math.sqrt(2 / sum(before.shape[-2:])), rel=0.1), name
    assert stacks
