"""Defaults of the paper, and every contradiction refused with one line before anything is loaded."""

import pytest

from hf_moe_cpt.optim.schedules import DEFAULT_PHASES, SCHEDULES, Phases, describe_schedule
from hf_moe_cpt.scripts.schedule import main as schedule_main
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig


def _config(tmp_path, **changes) -> CPTConfig:
    return CPTConfig(output_dir=str(tmp_path / "run"), **{"max_steps": 100, "report_to": "none", **changes})


def test_defaults_are_the_papers_and_own_fractions_replace_them(tmp_path):
    config = _config(tmp_path, max_steps=1000)  # shorter runs warm up for longer
    rates = (config.learning_rate, config.constant_learning_rate, config.min_learning_rate)
    assert rates == pytest.approx((3e-4, 1.65e-4, 3e-5))
    assert (config.adam_beta1, config.adam_beta2, config.weight_decay, config.max_grad_norm) == (0.9, 0.95, 0.1, 1.0)
    assert config.phases("scratch") == DEFAULT_PHASES["scratch"]
    assert config.phases("constant") == Phases(0.0, 0.0, 0.8, 0.2)
    own = _config(tmp_path, warmup_fraction=0.1, cooldown_fraction=0.4, constant_fraction=0.5, anneal_fraction=0.0)
    assert own.phases("decayed") == Phases(0.1, 0.4, 0.5, 0.0)


REFUSED = {
    "ratio of one": ({"replay_ratio": 1.0}, r"replay_ratio=1.0 is outside \[0, 1\)"),
    "ratio in percent": ({"replay_ratio": 30}, r"replay_ratio=30 is outside \[0, 1\)"),
    "no steps": ({"max_steps": -1}, "max_steps=-1: cosine_inf without steps"),
    "fractions that do not sum": (
        {"warmup_fraction": 0.1, "cooldown_fraction": 0.1, "constant_fraction": 0.1, "anneal_fraction": 0.1},
        "phases must sum to 1, got warmup=0.1",
    ),
    "some fractions": ({"warmup_fraction": 0.1}, "cooldown_fraction, constant_fraction, anneal_fraction is unset"),
    "unknown schedule": ({"cpt_schedule": "cubic"}, "schedule 'cubic' is unknown: choose one of cosine_inf"),
    "unknown packing": ({"packing": "bfd"}, "packing='bfd' is unknown: choose one of document, concat"),
    "unknown start": ({"starting_phase": "warm"}, "starting_phase='warm' is unknown: choose auto, scratch"),
    "rates out of order": ({"constant_learning_rate": 1.0}, "min_lr <= constant_lr <= max_lr"),
    "blocks of one token": ({"max_length": 1}, "max_length=1 leaves nothing to predict"),
    "no buffer": ({"shuffle_buffer": 0}, "shuffle_buffer=0 is no buffer"),
    "the parent's scheduler": ({"lr_scheduler_type": "cosine"}, "do not apply here: choose cpt_schedule"),
    "the parent's warm-up": ({"warmup_steps": 10}, "do not apply here: choose cpt_schedule"),
    "dropped columns": ({"remove_unused_columns": True}, "must stay off"),
    "hidden NaN": ({"logging_nan_inf_filter": True}, "must stay off"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_contradictions_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        _config(tmp_path, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_command_draws_the_rates_that_a_run_has(tmp_path, capsys, schedule):
    """WSD and the straight line to zero were drawn with the rates of the others."""
    schedule_main(["--max_steps", "100", "--schedule", schedule, "--learning_rate", "0.001"])
    args = _config(tmp_path, cpt_schedule=schedule, max_steps=100, learning_rate=1e-3)
    assert capsys.readouterr().out.strip() == describe_schedule(**args.schedule_settings("scratch")).strip()
