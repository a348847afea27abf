"""Numbers of the quickstart's table from logs written by hand."""

import pytest

from hf_moe_cpt.quickstart import DENSE, MOE, _imbalance, make_plan, summarise, table_rows
from hf_moe_cpt.reports.tables import text_table


def record(history: list[dict], ideal_mri: float | None) -> dict:
    sizes = {"parameters": 1000, "active_parameters": 400, "tokens_per_step": 2048}
    return {**sizes, "ideal_mri": ideal_mri, "history": history}


def trained(steps: int, mri: list[float] | None, rate: float, **losses: float) -> list[dict]:
    entries = [
        {"step": step, **losses, "tokens_per_second": rate, "learning_rate": 0.1} for step in range(1, steps + 1)
    ]
    for entry, value in zip(entries, mri or [], strict=False):
        entry["mri"] = value
    return entries


@pytest.fixture
def results():
    plan = make_plan("pb-granular-tiny", 8, 0, "cpu", None)
    records = {}
    for stage in plan.stages:
        ideal = 0.1 if stage.model == MOE else None
        if stage.is_pretraining:
            history = trained(8, [0.2] * 8 if ideal else None, 1024.0, **{"lm_loss/new": 5.0})
            history.append({"step": 8, "eval_new_loss": 4.0})
        else:
            history = [{"step": 0, "eval_new_loss": 7.0}, {"step": 0, "eval_replay_loss": 4.0}]
            history += trained(4, [0.4, 0.3, 0.2, 0.2] if ideal else None, 512.0, **{"lm_loss/new": 6.0})
            rise = 0.25 if stage.replay_ratio else 1.0
            history += [{"step": 4, "eval_new_loss": 5.5}, {"step": 4, "eval_replay_loss": 4.0 + rise}]
        records[stage.name] = record(history, ideal)
    return summarise(plan, records, {"prose": {"train_tokens": 1}, "code": {"train_tokens": 2}})


def test_rows(results):
    rows = {row["run"]: row for row in results["rows"]}
    assert rows["moe-pretrained"] == {
        "run": "moe-pretrained", "model": "pb-granular-tiny", "parameters": 1000, "active_parameters": 400, "steps": 8,
        "tokens": 8 * 2048, "replay_ratio": None, "prose after": 4.0, "seconds": 16.0, "tokens_per_second": 1024.0,
    }  # fmt: skip
    replayed = rows["moe-replay-30"]
    assert (replayed["prose before"], replayed["prose after"], replayed["forgetting"]) == (4.0, 4.25, 0.25)
    assert (replayed["code before"], replayed["code after"], replayed["adaptation"]) == (7.0, 5.5, 1.5)
    assert (replayed["MRI before"], replayed["MRI peak"]) == pytest.approx((0.2, 0.4))
    assert replayed["MRI after"] == pytest.approx(0.275)
    assert replayed["seconds"] == pytest.approx(4 * 2048 / 512)
    assert rows["moe-no-replay"]["forgetting"] == 1.0
    assert "MRI peak" not in rows["dense-replay-30"] and rows["dense-replay-30"]["model"] == "dense-tiny"


def test_curves_call_the_first_domain_old_in_every_run(results):
    curves = results["curves"]
    assert curves["moe-pretrained"]["loss/old"][0] == (1, 5.0) and "loss/new" not in curves["moe-pretrained"]
    assert curves["moe-no-replay"]["loss/new"][0] == (1, 6.0)
    assert curves["moe-no-replay"]["held_out/old"] == [(0, 4.0), (4, 5.0)]
    assert "mri" not in curves["dense-no-replay"]


def test_text_table_aligns_and_leaves_out_what_does_not_apply(results):
    lines = text_table(table_rows(results)).split("\n")
    assert lines[0].split() == ["prose", "prose", "code", "code", "MRI", "MRI", "MRI", "recovery"]
    assert lines[1].split()[:4] == ["run", "before", "after", "forgetting"]
    assert lines[3].split() == ["moe-pretrained", "–", "4.000", *"–" * 8, "16", "1,024"]
    assert lines[5].split() == (
        [
            "moe-replay-30",
            "4.000",
            "4.250",
            "0.250",
            "7.000",
            "5.500",
            "1.500",
            "0.200",
            "0.400",
            "0.275",
            "–",
            "16",
            "512",
        ]
    )
    assert max(map(len, lines)) <= 130


def test_recovery_is_read_from_a_mean_that_single_steps_do_not_disturb(results):
    assert next(row["recovery step"] for row in results["rows"] if row["run"] == "moe-no-replay") is None
    before = record(trained(40, [0.2] * 40, 1024.0), 0.1)
    after = record(trained(80, [0.7] * 10 + [0.2] * 40 + [0.24] + [0.2] * 29, 1024.0), 0.1)
    assert _imbalance(after, before) == pytest.approx(
        {"MRI before": 0.2, "MRI peak": 0.7, "MRI after": 0.2, "recovery step": 29}
    )


def test_long_names_of_the_tiny_presets_mean_the_same():
    assert make_plan("sb-granular-2b-tiny", 8, 0, "cpu", None) == make_plan("sb-granular-tiny", 8, 0, "cpu", None)


def test_plan_has_six_runs_with_the_ratios_of_the_paper():
    plan = make_plan("sb-switch-2b", None, 0, "cuda", None)
    assert [(stage.model, stage.starts_from, stage.replay_ratio) for stage in plan.stages] == [
        (MOE, None, 0.0), (DENSE, None, 0.0),
        (MOE, "moe-pretrained", 0.3), (MOE, "moe-pretrained", 0.0),
        (DENSE, "dense-pretrained", 0.3), (DENSE, "dense-pretrained", 0.0),
    ]  # fmt: skip
    assert plan.dense_preset == "dense-570m"
    assert {stage.steps for stage in plan.stages if not stage.is_pretraining} == {plan.scale.steps // 2}
    assert plan.characters_per_domain > 3 * plan.scale.steps * plan.tokens_per_step
