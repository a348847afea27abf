"""The benchmark of training steps on tiny models: results, failures, names and what they refuse."""

import csv
import io
import math
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from hf_moe_cpt.modeling.configuration_cpt_moe import PRESETS
from hf_moe_cpt.planning.plan import config_of
from hf_moe_cpt.scripts.benchmarks import step as bench
from hf_moe_cpt.scripts.benchmarks.report import Unavailable


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
RUNS = [
    "dense-tiny",
    "dense-tiny:fused",
    "pb-granular-tiny:checkpointing",
    "qwen2-moe-granular-tiny:eager",
    "mixtral-switch-tiny:hf_moe_cpt_of_tomorrow",
]
CPU = torch.device("cpu")
DEFAULT = bench.StepRun("", "", "grouped_mm", fused=False, compile=False, checkpointing=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run with models that work and models that do not, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("bench") / "out", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        for name in ("dense-tiny", "pb-granular-tiny", "pb-switch-tiny"):
            patch.setitem(PRESETS, name, PRESETS[name] | SMALL)
        sizes = ["--batch_size", "2", "--seq_length", "16", "--steps", "3", "--warmup", "1"]
        switches = ["--device", "cpu", "--check_sync", "--commit", "abc1234"]
        bench.main(["--runs", *RUNS, *sizes, *switches, "--output-dir", str(folder)])
    return folder, printed.getvalue()


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_row_for_each_run_says_what_was_measured(finished):
    rows = {row["run"]: row for row in read(finished[0] / "step.csv")}
    assert list(rows) == RUNS
    dense, granular, qwen = (rows[RUNS[place]] for place in (0, 2, 3))
    for row in (dense, granular, qwen):
        assert row["status"] == "ok" and row["torch"] == torch.__version__ and row["commit"] == "abc1234"
        median = float(row["step_ms"])
        assert 0 < float(row["step_ms_min"]) <= median <= float(row["step_ms_max"])
        assert float(row["tokens_per_second"]) == pytest.approx(32 / (median * 1e-3), rel=1e-4)
        assert float(row["times_first_run"]) == pytest.approx(median / float(dense["step_ms"]), rel=1e-4)
        assert math.log(64) - 0.5 < float(row["loss"]) < math.log(64) + 0.5
        assert row["host_syncs"] == row["peak_gib"] == "" and float(row["product_tflops"]) > 0
    assert (granular["experts"], granular["checkpointing"]) == ("grouped_mm", "True")
    assert (dense["experts"], qwen["experts"], qwen["checkpointing"]) == ("", "eager", "False")
    linear = 2 * 64 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert int(dense["parameters"]) == linear + 5 * 32


@pytest.mark.slow
def test_failures_are_rows_with_the_reason(finished):
    reasons = {row["run"]: row["reason"] for row in read(finished[0] / "step.csv") if row["status"] == "failed"}
    assert reasons == {
        RUNS[1]: "fused kernels need a CUDA device",
        RUNS[4]: "'hf_moe_cpt_of_tomorrow' is not registered with transformers' experts interface",
    }
    assert all(f"{run}: {reason}\n" in finished[1] for run, reason in reasons.items())


@pytest.mark.slow
def test_table_comes_last(finished):
    lines = finished[1].rstrip("\n").split("\n")
    assert [line.split()[0] for line in lines[-3:]] == [RUNS[0], *RUNS[2:4]]  # those that did not fail


def test_switches_of_a_run_go_before_those_of_all():
    fused = bench.StepRun("", "", "eager", fused=True, compile=False, checkpointing=False)
    run = bench.parse_run("pb-switch-2b:plain:compile:hf_moe_cpt", fused)
    assert (run.model, run.experts, run.fused, run.compile) == ("pb-switch-2b", "hf_moe_cpt", False, True)
    assert (
        bench.parse_run("mixtral-switch-2b", fused).experts == "eager"
        and bench.parse_run("llama-570m", fused).experts == ""
    )


def test_default_runs_are_understood():
    runs = bench.StepArguments().chosen_runs()
    assert tuple(run.name for run in runs) == bench.DEFAULT_RUNS and runs[0].model == "dense-570m"
    assert {run.experts for run in runs} == {"", "grouped_mm", "hf_moe_cpt"}


TWINS = {
    "llama-570m": ("dense-570m", 0),
    "mixtral-switch-2b": ("pb-switch-2b", 0),
    # the gate of the shared expert and the biases of queries, keys and values
    "qwen2-moe-granular-2b": ("pb-granular-2b", 24 * (1024 + 3 * 1024)),
}


@pytest.mark.parametrize("stock, ours, more", [(name, *twin) for name, twin in TWINS.items()], ids=TWINS)
def test_stock_models_have_the_size_of_ours(stock, ours, more):
    with torch.device("meta"):
        counts = [AutoModelForCausalLM.from_config(config_of(name)).num_parameters() for name in (stock, ours)]
    assert counts[0] == counts[1] + more


def test_what_liger_changes_for_a_whole_process_is_undone():
    before = modeling_llama.apply_rotary_pos_emb
    with pytest.raises(RuntimeError), bench.classes_kept("llama-tiny"):
        modeling_llama.apply_rotary_pos_emb = None
        raise RuntimeError
    assert modeling_llama.apply_rotary_pos_emb is before


def test_a_loss_that_is_not_finite_is_a_failure(monkeypatch):
    monkeypatch.setattr(bench, "timed_steps", lambda *_: ([1.0], torch.tensor(float("nan"))))
    args = bench.StepArguments(runs=["dense-tiny"], batch_size=1, seq_length=8, warmup=1)
    with pytest.raises(FloatingPointError, match="the loss is nan after 11 steps"):
        bench.measure(bench.StepMeasurement(args.chosen_runs()[0]), args, CPU, bench.tqdm(disable=True))


@pytest.mark.gpu
def test_host_syncs_are_counted():
    device, number = torch.device("cuda"), torch.ones(1, device="cuda")
    assert bench.count_host_syncs(lambda: number.add_(1), device) == 0
    assert bench.count_host_syncs(lambda: (number.item(), number.item()), device) == 2


def test_models_liger_does_not_know_are_named():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("qwen2-moe-granular-tiny"))
    with pytest.raises(Unavailable, match="Liger has no kernels for the model type qwen2_moe"):
        bench.fuse(model, torch.device("cuda"))
