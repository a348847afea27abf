"""Arguments of a surgery: presets to the letter, and every contradiction refused in one line before anything loads."""

import math

import pytest
from datasets import Dataset

from hf_moe_cpt.trainers.surgery.surgery_config import PAPER_WEIGHTS, SurgeryConfig


ROWS = Dataset.from_dict({"text": ["one", "two"]})


def _config(tmp_path, **changes):
    return SurgeryConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **changes)


def test_safe_is_the_default_and_overrides_win_over_a_preset(tmp_path):
    config = SurgeryConfig.from_preset("safe", output_dir=str(tmp_path), use_cpu=True, report_to="none")
    plain = _config(tmp_path)
    assert config.to_dict() == plain.to_dict()
    assert config.forget_losses["unlearn"].is_bounded and config.forget_target == "unseen"
    assert not config.log_term_gradients, "it holds the gradients of all terms at once"
    assert config.metric_for_best_model == "surgery_gap" and config.load_best_model_at_end
    config = SurgeryConfig.from_preset(
        "paper", output_dir=str(tmp_path), use_cpu=True, report_to="none", learning_rate=1e-5, unlearn_weight=0.0
    )
    assert config.learning_rate == 1e-5 and config.weights == {**PAPER_WEIGHTS, "unlearn": 0.0}
    assert (config.max_steps, config.seed, config.lr_scheduler_type.value) == (120, 42, "constant")
    assert {config.eval_strategy.value, config.save_strategy.value} == {"no"}
    assert not (config.mask_prefix or config.append_eos or config.load_best_model_at_end or config.eval_on_start)
    with pytest.raises(ValueError, match="preset 'gentle' is unknown: choose one of safe, paper"):
        SurgeryConfig.from_preset("gentle", output_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unlearn_weight": -1.0}, "unlearn_weight=-1.0 must be a finite number, at least 0"),
        ({f"{name}_weight": 0.0 for name in PAPER_WEIGHTS}, "all weights are 0"),
        ({"kl_direction": "sideways"}, "kl_direction='sideways' is unknown: choose one of forward, reverse"),
        ({"normalization": "word"}, "normalization='word' is unknown"),
        ({"gradient_surgery": "cut"}, "choose one of none, project"),
        ({"gradient_surgery": "pcgrad"}, "pcgrad' is gone: 'project'"),
        ({"max_term_grad_norm": 1.0}, "max_term_grad_norm=1.0 is gone: max_grad_norm"),
        ({"forget_loss": "unlikelihood"}, "unlikelihood' is gone: 'wga'"),
        ({"reference": "memory"}, "reference='memory' is unknown"),
        ({"forget_loss": "forget"}, "forget_loss='forget' is unknown"),
        ({"forget_loss": "seqcap"}, "forget_loss='seqcap' is gone: 'aim' comes to rest at the same target"),
        ({"forget_loss": "pair_dpo"}, "needs a new version of each text"),
        ({"forget_target": "soon"}, "must be a number of nats per token above 0, 'unseen', or None"),
        ({"forget_target": -2.0}, "forget_target=-2.0 must be a number"),
        ({"forget_target": None}, "aim needs forget_target"),
        ({"forget_beta": 0.0}, "beta=0.0 must be a finite number above 0"),
        ({"forget_max_weight": 3.0}, "forget_max_weight=3.0 is gone"),
        ({"satimp_beta2": math.nan}, "satimp_beta2=nan is no finite number"),
        ({"update_batch_size": 0}, "update_batch_size=0 must be at least 1"),
        ({"max_retain_kl": 0.0}, "max_retain_kl=0.0 must be above 0, or unset"),
        ({"router_anchor": -1.0}, "router_anchor=-1.0 must be a finite number, at least 0"),
        ({"max_steps": -1}, "max_steps=-1 must be at least 1"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True must stay False"),
        ({"per_device_train_batch_size": 8}, "must stay 1: set <set>_batch_size"),
    ],
)
def test_contradictions_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        _config(tmp_path, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "value"), [("3.5", 3.5), ("unseen", "unseen"), ("none", None)])
def test_targets_of_a_command_line_are_read(tmp_path, text, value):
    assert _config(tmp_path, forget_loss="simnpo", forget_target=text).forget_target == value


@pytest.mark.parametrize(
    ("changes", "sets", "message"),
    [
        ({}, {"unlearn": ROWS.select([]), "retain": ROWS, "unseen": ROWS}, "unlearn_dataset is empty and unlearn_wei"),
        ({}, {"retain": ROWS}, "nothing to forget and nothing to learn"),
        ({"update_weight": 0.0}, {"update": ROWS, "retain": ROWS}, "nothing to forget and nothing to learn"),
        ({}, {"unlearn": ROWS, "update": ROWS, "unseen": ROWS}, "or set allow_unanchored=True"),
        ({"retain_weight": 0.0}, {"unlearn": ROWS, "retain": ROWS, "unseen": ROWS}, "allow_unanchored"),
        ({}, {"unlearn": ROWS, "retain": ROWS}, "pass unseen_dataset"),
        ({"obsolete_loss": "pair_dpo"}, {"obsolete": ROWS, "retain": ROWS, "unseen": ROWS}, "pair_dpo lets new texts"),
    ],
)
def test_missing_and_empty_sets_are_refused(tmp_path, changes, sets, message):
    with pytest.raises(ValueError, match=message) as caught:
        _config(tmp_path, **changes).sets_in_force(sets)
    assert "\n" not in str(caught.value)


def test_sets_in_force_are_those_with_rows_and_a_weight(tmp_path):
    sets = {"unlearn": ROWS, "update": ROWS, "retain": ROWS, "obsolete": None, "unseen": ROWS}
    found = _config(tmp_path, update_weight=0.0).sets_in_force(sets)
    assert list(found) == ["unlearn", "retain", "unseen"]
    config = _config(tmp_path, allow_unanchored=True)
    assert list(config.sets_in_force({"unlearn": ROWS, "unseen": ROWS})) == ["unlearn", "unseen"]
    ascent = _config(tmp_path, forget_loss="ga", forget_target=None)
    assert list(ascent.sets_in_force({"unlearn": ROWS, "retain": ROWS})) == ["unlearn", "retain"]
