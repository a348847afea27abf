"""The record beside a model says what was done to it: against the log, the weights and the arguments of the run."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_moe_cpt.trainers.surgery.surgery_record import RECORD_FILE, card_section, objective_text
from tests.helpers.cpt_runs import logged
from tests.helpers.surgery_runs import token_sets, trainer


MEASURED = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
BEST = {
    **MEASURED,
    "save_strategy": "best",
    "metric_for_best_model": "surgery_gap",
    "greater_is_better": False,
    "load_best_model_at_end": True,
}


def _record(folder):
    return json.loads((folder / RECORD_FILE).read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_record_is_that_of_the_weights_beside_it(tmp_path, kind):
    run = trainer(tmp_path / "run", kind, max_steps=12, learning_rate=0.2, forget_loss="ga", forget_target=4.0, **BEST)
    run.train()
    run.save_model()
    record, state = _record(tmp_path / "run"), run.state
    gaps = dict(zip(range(0, 13, 2), logged(state.log_history, "eval_surgery_gap"), strict=True))
    best = min((gap, step) for step, gap in gaps.items() if step)
    assert best[1] < 12  # else it could not be told from the last one
    assert (record["step"], record["steps_made"], record["stopped_by"]) == (best[1], 12, "max_steps=12")
    assert record["gap"]["start"] == gaps[0] and record["gap"]["last"] == gaps[12] and record["gap"]["best"] == best[0]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    for name, want in run.model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], want), name
    assert run.evaluate()["eval_surgery_gap"] == pytest.approx(best[0], rel=1e-5) == record["measured"]["surgery_gap"]
    checkpoint = _record(tmp_path / "run" / f"checkpoint-{best[1]}")
    assert checkpoint["step"] == checkpoint["steps_made"] == best[1] and checkpoint["stopped_by"] is None


def test_the_record_names_the_terms_the_rows_and_the_target(tmp_path):
    def gentle(logp, mask, settings, ref_logp=None):
        return (logp.exp() * mask).sum(1) / mask.sum(1)

    options = {"forget_loss": gentle, "obsolete_loss": "pair_dpo", "neighbour_weight": 0.0, "kl_direction": "reverse"}
    run = trainer(tmp_path / "run", max_steps=1, **options, **MEASURED)
    run.train()
    run.save_model()
    assert run.args.forget_loss is gentle
    assert torch.load(tmp_path / "run" / "training_args.bin", weights_only=False).forget_loss == "gentle"
    record = _record(tmp_path / "run")
    terms = "0.5 * gentle[unlearn] + 0.1 * pair_dpo[obsolete] + 1 * CE[update] + 1 * KL(now || before)[retain]"
    assert record["objective"] == terms == objective_text(run.args, list(run.sets))
    assert record["rows"] == dict.fromkeys(("unlearn", "obsolete", "update", "retain", "unseen"), 12)
    assert record["forget_target"] == logged(run.state.log_history, "eval_unseen_ce")[-1]
    assert record["forget_target_is"] == "unseen" and record["gap"]["best"] is None
    assert record["settings"]["forget_loss"] == "gentle" and record["settings"]["learning_rate"] == 1e-2
    assert str(tmp_path) not in json.dumps(record)
    for part in (terms, f"{record['forget_target']:.4g} nats", "weights of step 1 of 1; stopped by: max_steps=1"):
        assert part in card_section(record)


def test_what_stopped_a_run_is_told_and_a_model_beyond_the_limit_is_called_so(tmp_path, caplog):
    run = trainer(tmp_path / "run", max_steps=20, max_retain_kl=1e-6, **BEST)
    run.train()
    run.save_model()
    record = _record(tmp_path / "run")
    assert "above max_retain_kl=1e-06" in record["stopped_by"] and record["steps_made"] == 2
    assert record["gap"]["last"] == record["measured"]["surgery_gap"] == str(math.inf)
    assert record["gap"]["best"] is None and record["step"] == 2
    assert "No measured model had a finite gap, so the one of step 2 stays" in caplog.text
    caplog.clear()
    run.evaluate()
    assert "Stopping" not in caplog.text  # nothing runs any more


def test_target_experts_are_named_and_the_paper_has_no_target(tmp_path):
    run = trainer(tmp_path / "run", "mixtral", target_experts=2, max_steps=1)
    run.train()
    run.save_model()
    assert _record(tmp_path / "run")["target_experts"] == run.targets.names and len(run.targets.names) == 2
    sets = {name: rows for name, rows in token_sets().items() if name[:6] not in ("neighb", "unseen")}
    paper = trainer(tmp_path / "paper", "llama", sets, "paper", max_steps=1)
    paper.train()
    paper.save_model()
    record = _record(tmp_path / "paper")
    terms = "0.1 * ga[unlearn] + 0.1 * ga[obsolete] + 2 * CE[update] + 0.5 * KL(before || now)[retain]"
    assert record["objective"] == terms and record["forget_target"] is None
    assert "forgetting aims at: none" in card_section(record) and "start not measured" in card_section(record)
