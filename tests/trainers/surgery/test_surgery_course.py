"""The course of a surgery: targets, stop rules, the best model, resuming, adapters, experts, and what goes wrong."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from hf_moe_cpt.trainers.surgery.model_pass import head_of, run_model, token_logp
from hf_moe_cpt.trainers.surgery.set_mixture import collate_sets
from hf_moe_cpt.trainers.surgery.surgery_terms import counted_targets
from tests.helpers.cpt_runs import logged
from tests.helpers.preference_runs import word_tokenizer
from tests.helpers.surgery_runs import history, token_sets, trainer
from tests.helpers.tiny_models import tiny_model


MEASURED = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
BEST = {
    **MEASURED,
    "save_strategy": "best",
    "metric_for_best_model": "surgery_gap",
    "greater_is_better": False,
    "load_best_model_at_end": True,
}


def _weights(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def test_unseen_text_sets_the_target_before_the_first_step(tmp_path):
    run = trainer(tmp_path / "run", follow_unseen=False, **MEASURED)
    assert run.forget_target is None
    run.train()
    start = run.state.log_history[0]
    assert run.forget_target == start["eval_unseen_ce"] == run.terms.forget.target
    assert logged(run.state.log_history, "eval_unseen_ce")[-1] != run.forget_target
    want = sum(abs(start[f"eval_{name}_ce"] - run.forget_target) for name in ("unlearn", "obsolete"))
    assert start["eval_surgery_gap"] == pytest.approx(want + start["eval_update_ce"], rel=1e-5)


def test_the_target_follows_unseen_text_and_so_does_the_gap(tmp_path):
    run = trainer(tmp_path / "run", **MEASURED)
    run.train()
    end = [entry for entry in run.state.log_history if "eval_unseen_ce" in entry][-1]
    assert end["step"] > 0 and run.forget_target == end["eval_unseen_ce"] == run.terms.forget.target
    want = sum(abs(end[f"eval_{name}_ce"] - end["eval_unseen_ce"]) for name in ("unlearn", "obsolete"))
    kl = sum(max(0.0, end.get(f"eval_{name}_kl", 0.0)) for name in ("retain", "neighbour"))
    assert end["eval_surgery_gap"] == pytest.approx(want + end["eval_update_ce"] + kl, rel=1e-5)


def test_a_run_stops_when_the_anchor_slips(tmp_path, caplog):
    run = trainer(tmp_path / "run", max_steps=20, max_retain_kl=1e-3, **MEASURED)
    run.train()
    assert run.state.global_step < 20
    assert logged(run.state.log_history, "eval_surgery_gap")[-1] == float("inf")
    assert "above max_retain_kl=0.001" in caplog.text


def test_a_run_stops_when_every_set_has_reached_its_target(tmp_path, caplog):
    run = trainer(tmp_path / "run", max_steps=40, forget_target=2.0, update_target=3.8, learning_rate=3e-2, **MEASURED)
    run.train()
    assert 0 < run.state.global_step < 40
    assert "every set has reached its target" in caplog.text


def test_the_best_model_is_the_one_that_stays(tmp_path):
    run = trainer(tmp_path / "run", max_steps=8, learning_rate=5e-2, **BEST)
    run.train()
    gaps = logged(run.state.log_history, "eval_surgery_gap")
    assert run.state.best_metric == pytest.approx(min(gaps[1:]))
    assert run.evaluate()["eval_surgery_gap"] == pytest.approx(run.state.best_metric, rel=1e-5)
    run.save_model()
    assert str(tmp_path) in run.state.best_model_checkpoint
    assert str(tmp_path) not in (tmp_path / "run" / "trainer_state.json").read_text()


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
        return control


@pytest.mark.parametrize("model", ["llama", "cpt_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path, model):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 3}
    whole = trainer(tmp_path / "whole", model, **options)
    whole.train()
    stopped = trainer(tmp_path / "stopped", model, callbacks=[StopAt(4)], **options)
    stopped.train()
    resumed = trainer(tmp_path / "stopped", model, **options)
    resumed.train(resume_from_checkpoint="last")
    assert history(resumed)[:-1] == history(whole)[:-1]
    for name, value in _weights(resumed).items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


@pytest.mark.parametrize("loss", ["npo", "cap"])
def test_an_adapter_is_its_own_reference(tmp_path, loss):
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    run = trainer(tmp_path / "run", peft_config=adapter, forget_loss=loss, **MEASURED)
    base = {n: p.clone() for n, p in run.model.named_parameters() if "lora_" not in n}
    run.train()
    assert run.state.log_history[0]["eval_retain_kl"] == pytest.approx(0.0, abs=1e-6)
    assert logged(run.state.log_history, "eval_retain_kl")[-1] > 1e-6
    for name, parameter in run.model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name


def test_the_three_references_give_the_same_run(tmp_path):
    runs = {}
    for kind in ("copy", "cache", "given"):
        options = {"ref_model": tiny_model("mixtral")} if kind == "given" else {"reference": kind}
        run = trainer(tmp_path / kind, "mixtral", forget_loss="npo", router_anchor=0.3, **options, **MEASURED)
        run.train()
        runs[kind] = history(run)
    for kind in ("cache", "given"):
        for ours, theirs in zip(runs[kind][:-1], runs["copy"][:-1], strict=True):
            assert ours.keys() == theirs.keys()
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5), kind


def _words(rows):
    """The tokens as words of the tiny tokenizer."""
    return Dataset.from_dict(
        {"text": [" ".join(f"w{2 + token % 40}" for token in ids[:10]) for ids in rows["input_ids"]]}
    )


@pytest.mark.parametrize("loss", ["idk_dpo", "pair_dpo"])
def test_the_winner_of_a_pair_wins(tmp_path, loss):
    sets = token_sets()
    if loss == "idk_dpo":
        sets |= {f"{name}_dataset": _words(sets[f"{name}_dataset"]) for name in ("unlearn", "obsolete")}
        options = {"processing_class": word_tokenizer(), "refusals": ["w40 w41"], "forget_loss": loss}
        name = "unlearn"
    else:
        options, name = {"obsolete_loss": loss}, "obsolete"
    run = trainer(tmp_path / "run", sets=sets, max_steps=8, **{f"{name}_weight": 2.0}, **options)
    batch = run._prepare_inputs(collate_sets([run.train_dataset[0]], run.pad_token_id))[name]

    def margin():
        with torch.no_grad():
            loser, winner = (
                (
                    token_logp(run_model(run.model, one).hidden, head_of(run.model), one["input_ids"])
                    * counted_targets(one)
                )
                for one in (batch, batch["winner"])
            )
        return winner.sum(1) - loser.sum(1)

    before = margin()
    run.train()
    assert (margin() > before + 1.0).all()
    assert logged(run.state.log_history, f"{name}/loss")


def test_only_the_target_experts_and_their_routers_move(tmp_path):
    run = trainer(tmp_path / "run", "mixtral", target_experts=2, weight_decay=0.1, **MEASURED)
    before = _weights(run)
    run.train()
    assert len(run.targets.chosen) == 2
    moved = {name for name, value in _weights(run).items() if not torch.equal(value, before[name])}
    layers = {layer for layer, _ in run.targets.chosen}
    allowed = {
        f"model.layers.{n}.mlp.{part}"
        for n in layers
        for part in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    }
    assert moved and moved <= allowed
    for layer in layers:
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        rows = {e for e in range(4) if not torch.equal(run.model.state_dict()[name][e], before[name][e])}
        assert rows == {expert for place, expert in run.targets.chosen if place == layer}
    assert logged(run.state.log_history, "unlearn/experts")


def test_routers_can_be_frozen_and_held_and_are_watched(tmp_path):
    run = trainer(tmp_path / "run", "cpt_moe", freeze_router=True, router_anchor=1.0, **MEASURED)
    before = _weights(run)
    run.train()
    for name, value in _weights(run).items():
        assert torch.equal(value, before[name]) == (".gate." in name), name
    overlaps = logged(run.state.log_history, "eval_unlearn_expert_overlap")
    assert overlaps[0] == 1.0 and 0.0 <= overlaps[-1] <= 1.0
    assert logged(run.state.log_history, "retain/router_kl")[0] == pytest.approx(0.0, abs=1e-5)


class Poison(TrainerCallback):
    """Makes the model useless after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))


def test_a_loss_that_is_no_number_stops_the_run_and_the_last_good_model_comes_back(tmp_path):
    run = trainer(tmp_path / "run", max_steps=8, callbacks=[Poison(5)], **BEST)
    with pytest.raises(FloatingPointError, match=r"loss of step 6 is not finite.* holds the weights of .*checkpoint"):
        run.train()
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    plain = trainer(tmp_path / "plain", callbacks=[Poison(1)])
    with pytest.raises(FloatingPointError, match="No model was saved before"):
        plain.train()


def test_own_losses_can_be_passed(tmp_path):
    def gentle(logp, mask, settings, ref_logp=None):
        return (logp.exp() * mask).sum(1) / mask.sum(1)

    run = trainer(tmp_path / "run", forget_loss=gentle, forget_target=None)
    run.train()
    assert logged(run.state.log_history, "unlearn/loss")[0] > 0
