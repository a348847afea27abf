"""The benchmark of trainers' steps on tiny models: what it times, its ratios and bars, its failures, its refusals."""

import csv
import dataclasses
import gc
import io
import json
import math
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from hf_moe_cpt.scripts.benchmarks import trainers as bench


pytest.importorskip("trl")

LAYERS = {"hidden_size": 32, "head_dim": 8, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL = json.dumps({"vocab_size": 64, **LAYERS})
LINEAR_WEIGHTS = 2 * 64 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64)
NORMS = 5 * 32
SIZES = ["--overrides", SMALL, "--length", "16", "--rounds", "3", "--warmup", "1", "--device", "cpu"]
PREFERENCE = bench.Workload("rainbowpo", "llama-tiny", SMALL, "float32", 2, 16, False, "cpu", seed=0)
SURGERY = dataclasses.replace(PREFERENCE, trainer="surgery", preset="safe")


def _read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run of all baselines of rainbowpo without memory, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("bench") / "out", io.StringIO()
    with redirect_stdout(printed):
        bench.main([*SIZES, "--memory_steps", "0", "--commit", "abc1234", "--output_dir", str(folder)])
    return folder, printed.getvalue()


def test_a_row_for_each_baseline_says_what_was_measured(finished):
    rows = {row["contender"]: row for row in _read(finished[0] / "preference.csv")}
    assert list(rows) == list(bench.PREFERENCE_BASELINES)
    for row in rows.values():
        assert (row["status"], row["commit"], row["peak_mib"]) == ("ok", "abc1234", "")
        assert 0 < float(row["total_ms_min"]) <= float(row["total_ms"]) <= float(row["total_ms_max"])
        assert 0 < float(row["log_ms"]) and 0 < float(row["step_ms"]) <= float(row["total_ms"])
        assert int(row["parameters"]) == LINEAR_WEIGHTS + NORMS
    for name in ("sigmoid", "sigmoid_norm"):  # policy and reference start equal
        assert float(rows[name]["first_loss"]) == pytest.approx(math.log(2), abs=1e-5)
    assert float(rows["rainbowpo"]["first_loss"]) > math.log(2)  # the home advantage
    padded, free = (float(rows[name]["first_loss"]) for name in ("rainbowpo", "rainbowpo-padding-free"))
    assert free == pytest.approx(padded, rel=1e-5)


def test_ratios_come_last_and_belong_to_their_bars(finished):
    folder, printed = finished
    rows = _read(folder / "preference_ratios.csv")
    names = [(row["contender"], row["baseline"], row["quantity"], row["bar"]) for row in rows]
    assert names == [
        ("rainbowpo", "sigmoid_norm", "time", "1.03"),
        ("rainbowpo-no-reference", "sigmoid", "time", "0.75"),
        ("rainbowpo-padding-free", "rainbowpo", "time", "0.625"),
    ]
    assert all(float(row["least"]) <= float(row["ratio"]) <= float(row["most"]) for row in rows)
    last = printed.rstrip("\n").split("\n")[-3:]
    assert last[0].startswith("rainbowpo / sigmoid_norm") and last[1].startswith("rainbowpo-no-reference / sigmoid")
    assert [line.split()[-1] for line in last] == [row["verdict"] for row in rows]


def test_ratios_are_medians_over_rounds_of_step_and_share_of_a_log():
    args = bench.TrainersArguments(logging_steps=2)
    ours = bench.Measurement("rainbowpo", peak_mib=104.0, step_ms=[10.0, 30.0, 8.0], log_ms=[2.0, 2.0, 4.0])
    theirs = bench.Measurement("sigmoid_norm", peak_mib=100.0, step_ms=[9.5, 29.0, 19.0], log_ms=[1.0, 2.0, 2.0])
    time, peak = bench.ratio_rows([ours, theirs], args, {})
    assert (time["ratio"], time["least"], time["most"]) == pytest.approx((31 / 30, 0.5, 1.1))
    quartiles = (0.5 + 31 / 30) / 2, (31 / 30 + 1.1) / 2
    assert (time["lower_quartile"], time["upper_quartile"]) == pytest.approx(quartiles)
    assert (time["verdict"], peak["verdict"], peak["ratio"]) == ("missed", "missed", 1.04)
    assert bench.result_row(ours, args, {})["total_ms"] == 11.0
    theirs.reason = "out of memory"
    assert bench.ratio_rows([ours, theirs], args, {}) == []


LIKE_TRAIN = [(bench.PreferenceSteps, name, "rainbowpo", 1e-7) for name in ("rainbowpo", "sigmoid_norm")]
LIKE_TRAIN += [(bench.SurgerySteps, name, "surgery", 2e-6) for name in ("by-term", "summed", "by-term-logged")]


@pytest.mark.slow
@pytest.mark.parametrize("kind, name, trainer, tolerance", LIKE_TRAIN, ids=[name for _, name, *_ in LIKE_TRAIN])
def test_a_timed_step_is_the_step_of_the_training_loop(kind, name, trainer, tolerance):
    """Three steps leave the weights that `train()` leaves after the same three batches, however they are made."""
    workload = PREFERENCE if trainer == "rainbowpo" else SURGERY
    steps, trained = kind(name, workload), kind(name if trainer == "rainbowpo" else "by-term", workload)
    for _ in range(3):
        steps.step()
    loop = trained.trainer
    loop.args.max_steps, loop.args.lr_scheduler_type, loop.args.warmup_steps = 3, "constant", 0
    loop.get_train_dataloader = lambda: trained.batches[:3]
    untouched = bench.build_model(workload).state_dict()
    loop.train()
    wanted = loop.model.state_dict()
    for key, got in steps.trainer.model.state_dict().items():
        torch.testing.assert_close(got, wanted[key], rtol=0, atol=tolerance)
        assert not torch.equal(got, untouched[key]), key


def test_batches_have_full_length_and_completions_of_their_own():
    batches = bench.random_pairs(PREFERENCE, 64)
    for rows in batches:
        assert max(len(row["prompt_ids"] + row["chosen_ids"]) for row in rows) == 16
        assert all(len(row["prompt_ids"]) == 4 and row["chosen_ids"] != row["rejected_ids"] for row in rows)
        assert all(4 <= len(row["rejected_ids"]) <= 12 for row in rows)
    assert batches == bench.random_pairs(PREFERENCE, 64) and batches[0] != batches[1]


@pytest.mark.slow
def test_a_failure_is_a_row_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    broken = bench.PreferenceBaseline(is_ours=False, settings={"loss_type": ["magic"]})
    monkeypatch.setitem(bench.PREFERENCE_BASELINES, "sigmoid", broken)
    words = [*SIZES, "--baselines", "sigmoid_norm", "sigmoid", "--memory_steps", "0", "--output_dir", str(tmp_path)]
    bench.main(words)
    good, bad = _read(tmp_path / "preference.csv")
    assert (good["status"], bad["status"], bad["total_ms"]) == ("ok", "failed", "")
    assert "Unknown loss type: magic" in bad["reason"] and f"sigmoid: {bad['reason']}" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_is_taken_in_a_process_of_its_own(tmp_path):
    words = [*SIZES, "--rounds", "1", "--baselines", "sigmoid", "--memory_steps", "1"]
    bench.main([*words, "--output_dir", str(tmp_path)])
    (row,) = _read(tmp_path / "preference.csv")
    assert row["status"] == "ok" and not row["reason"]
    # Policy, its gradients and two moments, and the reference, held at once; on top come buffers of the head.
    weights = 4 * int(row["parameters"]) / 2**20
    assert 5 * weights < float(row["peak_mib"]) < 64


@pytest.mark.slow
def test_memory_on_a_cpu_is_what_lives_and_what_a_step_adds():
    gc.collect()  # what other tests left behind must not go in between
    kept = torch.zeros(1000)
    before = bench.living_bytes()
    more, view = torch.zeros(500), kept[10:]
    assert bench.living_bytes() - before == 2000 and len(view) == 990
    del more

    class Step:
        def step(self) -> None:
            one = torch.empty(300_000)
            del one
            torch.empty(100_000), torch.empty(50_000)

    assert bench._peak_on_cpu(Step(), 2) - before == 4 * 300_000


def test_adapters_have_the_model_without_them_as_reference():
    workload = dataclasses.replace(PREFERENCE, lora_rank=2)
    for name in ("rainbowpo", "sigmoid"):
        steps = bench.PreferenceSteps(name, workload)
        steps.step()
        names = [name for name, weight in steps.trainer.model.named_parameters() if weight.requires_grad]
        assert steps.trainer.ref_model is None and names and all("lora_" in name for name in names)
        assert float(steps.loss) > 0


@pytest.mark.slow
def test_surgery_writes_times_and_ratios_and_prints_them_last(tmp_path):
    printed = io.StringIO()
    words = ["--memory_steps", "0", "--commit", "abc1234", "--output_dir", str(tmp_path), "--preset", "paper"]
    with redirect_stdout(printed):
        bench.main(["--trainer", "surgery", *SIZES, *words])
    rows = _read(tmp_path / "surgery_paper.csv")
    assert [row["contender"] for row in rows] == list(bench.SURGERY_BASELINES)
    for row in rows:
        assert (row["status"], row["commit"], row["peak_mib"], row["preset"]) == ("ok", "abc1234", "", "paper")
        assert 0 < float(row["total_ms_min"]) <= float(row["total_ms"]) <= float(row["total_ms_max"])
        # the same weights, rows and objective, however it is added up
        assert float(row["first_loss"]) == pytest.approx(float(rows[0]["first_loss"]), rel=1e-5)
    ratios = _read(tmp_path / "surgery_paper_ratios.csv")
    assert [(row["contender"], row["baseline"], row["bar"]) for row in ratios] == [
        ("by-term", "summed", "1.05"),
        ("by-term-copy", "summed-copy", "1.05"),
        ("by-term", "by-term-copy", ""),
        ("by-term-logged", "by-term", ""),
    ]
    assert printed.getvalue().rstrip("\n").split("\n")[-1].startswith("by-term-logged / by-term")


def test_rows_fill_every_batch():
    for preset, sets in (("paper", 4), ("safe", 5)):
        steps = bench.SurgerySteps("by-term", dataclasses.replace(SURGERY, preset=preset))
        assert len(steps.batches) == 4 and all(len(batch) == sets for batch in steps.batches)
        assert {tuple(one["input_ids"].shape) for batch in steps.batches for one in batch.values()} == {(2, 16)}
        assert list(steps.trainer.sets) == list(bench.PRESETS[preset]["sets"])


def test_what_is_kept_of_a_reference_is_told_from_the_peaks():
    whole, head = bench.reference_mebibytes(SURGERY)
    assert whole == pytest.approx(4 * (LINEAR_WEIGHTS + NORMS) / 2**20) and head == pytest.approx(4 * 64 * 32 / 2**20)
    live = bench.Measurement("by-term-copy", peak_mib=10.0)
    for left, verdict in ((head, "met"), (whole / 2, "missed")):
        (row,) = bench.kept_rows(
            [live, bench.Measurement("by-term", peak_mib=10.0 - whole + left)], SURGERY, {"commit": "a"}
        )
        assert row["quantity"] == bench.KEPT and row["ratio"] == pytest.approx(left / whole)
        assert (row["bar"], row["verdict"]) == (pytest.approx(head / whole + bench.SLACK), verdict)
    assert bench.kept_rows([live], SURGERY, {}) == []


@pytest.mark.slow
def test_memory_of_a_step_by_term_is_that_of_one_term(tmp_path):
    """On a CPU, in processes of their own; large enough that weights and activations are what counts."""
    larger = json.dumps({"vocab_size": 64, **LAYERS, "hidden_size": 64, "num_hidden_layers": 6})
    words = ["--trainer", "surgery", *SIZES, "--overrides", larger, "--length", "64", "--memory_steps", "1"]
    bench.main([*words, "--baselines", "by-term", "summed", "by-term-copy", "--output_dir", str(tmp_path)])
    rows = _read(tmp_path / "surgery_safe_ratios.csv")
    verdicts = {(row["baseline"], row["quantity"]): row["verdict"] for row in rows}
    assert verdicts["summed", "memory"] == verdicts["by-term-copy", bench.KEPT] == "met", rows
