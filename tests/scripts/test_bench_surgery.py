"""The benchmark of surgery steps on tiny models: what it times, its ratios and bars, and what it refuses."""

import csv
import dataclasses
import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from hf_moe_cpt.scripts import bench_surgery_contenders as parts
from hf_moe_cpt.scripts.bench_preference import Measurement
from hf_moe_cpt.scripts.bench_preference_contenders import build_model
from hf_moe_cpt.scripts.bench_surgery import KEPT, SLACK, kept_rows, main


LAYERS = {"hidden_size": 32, "head_dim": 8, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL = json.dumps({"vocab_size": 64, **LAYERS})
SIZES = ["--overrides", SMALL, "--length", "16", "--rounds", "2", "--warmup", "1", "--device", "cpu"]
WORKLOAD = parts.SurgeryWorkload(
    "llama-tiny", SMALL, "float32", 2, 16, gradient_checkpointing=False, device="cpu", seed=0
)


def _read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_run_writes_times_and_ratios_and_prints_them_last(tmp_path):
    printed = io.StringIO()
    words = ["--memory_steps", "0", "--commit", "abc1234", "--output_dir", str(tmp_path), "--preset", "paper"]
    with redirect_stdout(printed):
        main([*SIZES, *words])
    rows = _read(tmp_path / "surgery_paper.csv")
    assert [row["contender"] for row in rows] == list(parts.CONTENDERS)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["by-term", "summed", "by-term-logged"])
def test_a_timed_step_is_the_step_of_the_training_loop(name):
    """Three steps leave the weights that `train()` leaves, whichever way they are made."""
    steps, trained = parts.SurgerySteps(name, WORKLOAD), parts.SurgerySteps("by-term", WORKLOAD)
    for _ in range(3):
        steps.step()
    trained.trainer.args.max_steps = 3
    trained.trainer.get_train_dataloader = lambda: trained.batches[:3]
    untouched = build_model(WORKLOAD).state_dict()
    trained.trainer.train()
    for key, want in trained.trainer.model.state_dict().items():
        got = steps.trainer.model.state_dict()[key]
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
        assert not torch.equal(got, untouched[key]), key


def test_rows_fill_every_batch():
    for preset, sets in (("paper", 4), ("safe", 5)):
        steps = parts.SurgerySteps("by-term", dataclasses.replace(WORKLOAD, preset=preset))
        assert len(steps.batches) == 4 and all(len(batch) == sets for batch in steps.batches)
        assert {tuple(one["input_ids"].shape) for batch in steps.batches for one in batch.values()} == {(2, 16)}
        assert list(steps.trainer.sets) == list(parts.PRESETS[preset]["sets"])


def test_what_is_kept_of_a_reference_is_told_from_the_peaks():
    whole, head = parts.reference_mebibytes(WORKLOAD)
    linear = 2 * 64 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert whole == pytest.approx(4 * (linear + 5 * 32) / 2**20) and head == pytest.approx(4 * 64 * 32 / 2**20)
    live = Measurement("by-term-copy", peak_mib=10.0)
    for left, verdict in ((head, "met"), (whole / 2, "missed")):
        (row,) = kept_rows([live, Measurement("by-term", peak_mib=10.0 - whole + left)], WORKLOAD, {"commit": "a"})
        assert row["quantity"] == KEPT and row["ratio"] == pytest.approx(left / whole)
        assert (row["bar"], row["verdict"]) == (pytest.approx(head / whole + SLACK), verdict)
    assert kept_rows([live], WORKLOAD, {}) == []


@pytest.mark.slow
def test_memory_of_a_step_by_term_is_that_of_one_term(tmp_path):
    """On a CPU, in processes of their own; large enough that weights and activations are what counts."""
    larger = json.dumps({"vocab_size": 64, **LAYERS, "hidden_size": 64, "num_hidden_layers": 6})
    words = [*SIZES, "--overrides", larger, "--length", "64", "--memory_steps", "1"]
    main([*words, "--contenders", "by-term", "summed", "by-term-copy", "--output_dir", str(tmp_path)])
    rows = _read(tmp_path / "surgery_safe_ratios.csv")
    verdicts = {(row["baseline"], row["quantity"]): row["verdict"] for row in rows}
    assert verdicts["summed", "memory"] == verdicts["by-term-copy", KEPT] == "met", rows


REFUSED = {
    "unknown contender": (("--contenders", "dpo"), "--contenders 'dpo' is unknown: choose from by-term, summed"),
    "unknown preset": (("--preset", "bold"), "--preset 'bold' is unknown: choose from paper, safe"),
    "unknown dtype": (("--dtype", "int4"), "--dtype 'int4' is unknown: choose from float32, bfloat16, mixed"),
    "no rows": (("--batch_size", "0"), "--batch_size 0 must be at least 1"),
    "no such model": (("--model", "gpt-9"), "--model 'gpt-9' is neither a folder with a config.json nor a Hub id"),
}


@pytest.mark.parametrize("words, message", REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused_with_one_line(tmp_path, words, message):
    with pytest.raises(ValueError, match=message) as caught:
        main([*words, "--output_dir", str(tmp_path / "out")])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
