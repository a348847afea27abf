"""When a run uses Liger-Kernel, and that a run with it logs and learns what a run without it does."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import HfArgumentParser

from hf_moe_cpt.trainers.cpt import liger_switch
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer
from hf_moe_cpt.trainers.cpt.liger_switch import decide_liger
from tests.helpers.cpt_runs import HALF, config, trainer, without_clocks
from tests.helpers.tiny_models import VOCABULARY, tiny_model, tokenized


# What Triton's interpreter can run of Liger.
FUSED = {"use_liger_kernel": True, "liger_kernel_config": {"rms_norm": False, "swiglu": False, "geglu": False}}
UNFUSED = {"fused_linear_cross_entropy": False}
in_the_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="on CPU tensors Liger needs the interpreter")


def _args(asked=None, device="cuda", n_gpu=1, kernels=None) -> SimpleNamespace:
    return SimpleNamespace(
        use_liger_kernel=asked, device=torch.device(device), n_gpu=n_gpu, liger_kernel_config=kernels
    )


CASES = {
    "unset, one CUDA device": (_args(), "cpt_moe", True, True),
    "unset, on the CPU": (_args(device="cpu", n_gpu=0), "cpt_moe", True, False),
    "unset, several devices in one process": (_args(n_gpu=2), "cpt_moe", True, False),
    "unset, not installed": (_args(), "cpt_moe", False, False),
    "unset, another model": (_args(), "llama", True, False),
    "off": (_args(False), "cpt_moe", True, False),
    "on": (_args(True, "cpu", 0), "cpt_moe", True, True),
    "on for another model without the fused loss": (_args(True, kernels=UNFUSED), "llama", True, True),
    "off for another model": (_args(False), "llama", True, False),
}


@pytest.mark.parametrize("args, kind, is_installed, want", CASES.values(), ids=CASES)
def test_decision(monkeypatch, args, kind, is_installed, want):
    monkeypatch.setattr(liger_switch, "is_installed", lambda package: {"liger_kernel": is_installed}[package])
    assert decide_liger(args, tiny_model(kind)) is want


@pytest.mark.parametrize("kernels", [None, {"rope": False}, {"fused_linear_cross_entropy": True}])
def test_a_loss_fused_into_the_head_of_another_model_is_refused(tmp_path, kernels):
    with pytest.raises(ValueError, match="set liger_kernel_config=.*fused_linear_cross_entropy") as caught:
        trainer(tmp_path / "run", "mixtral", use_liger_kernel=True, liger_kernel_config=kernels)
    assert "\n" not in str(caught.value)


def test_the_command_line_has_three_answers(tmp_path):
    base = ["--output_dir", str(tmp_path), "--max_steps", "1"]
    answers = {(): None, ("--use_liger_kernel",): True, ("--use_liger_kernel", "false"): False}
    for given, want in answers.items():
        (parsed,) = HfArgumentParser(CPTConfig).parse_args_into_dataclasses([*base, *given])
        assert parsed.use_liger_kernel is want


def test_the_callers_arguments_stay_undecided(tmp_path):
    args = config(tmp_path / "run")
    run = CPTTrainer(tiny_model("cpt_moe"), args, tokenized(60, 1, 1, HALF), tokenized(60, 2, HALF, VOCABULARY))
    assert args.use_liger_kernel is None
    assert run.args.use_liger_kernel is False


@pytest.fixture
def fused_calls(monkeypatch):
    """How many tokens each call of the fused head saw."""
    pytest.importorskip("liger_kernel")
    from hf_moe_cpt.kernels import fused_head
    from hf_moe_cpt.kernels.liger import register_with_liger

    register_with_liger()
    calls = []
    compute = fused_head.linear_cross_entropy
    monkeypatch.setattr(fused_head, "linear_cross_entropy", lambda *args: calls.append(len(args[0])) or compute(*args))
    return calls


def _tiny_run(folder: Path, kind: str = "cpt_moe", **changes) -> CPTTrainer:
    """Two steps of two micro-batches of 8 tokens and two evaluations of one block each."""
    args = config(
        folder,
        max_steps=2,
        max_length=8,
        packing="concat",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        replay_ratio=0.5,
        **changes,
    )
    held_out = [Dataset.from_dict({"input_ids": [list(range(low, low + 8))]}) for low in (3, 30)]
    return CPTTrainer(tiny_model(kind), args, tokenized(9, 1, 1, HALF), tokenized(9, 2, HALF, VOCABULARY), *held_out)


@in_the_interpreter
@pytest.mark.parametrize("kind", ["cpt_moe", "cpt_moe sinkhorn"])
def test_a_run_logs_and_learns_the_same(tmp_path, fused_calls, kind):
    plain = _tiny_run(tmp_path / "plain", kind, eval_strategy="steps", eval_steps=2)
    plain.train()
    assert fused_calls == []
    fused = _tiny_run(tmp_path / "fused", kind, eval_strategy="steps", eval_steps=2, **FUSED)
    fused.train()
    assert fused_calls == [8] * (2 + 4 + 2)  # both evaluations at the start, the micro-batches, both at the end
    want, got = without_clocks(plain.state.log_history), without_clocks(fused.state.log_history)
    assert len(want) == len(got)
    assert {"lm_loss/new", "lm_loss/replay", "eval_new_loss", "forgetting"} <= {key for entry in want for key in entry}
    for left, right in zip(want, got, strict=True):
        assert right == pytest.approx(left, rel=1e-4, abs=1e-5)


@in_the_interpreter
def test_an_evaluation_before_training_and_a_prediction(tmp_path, fused_calls):
    plain, fused = _tiny_run(tmp_path / "plain"), _tiny_run(tmp_path / "fused", **FUSED)
    want, got = plain.evaluate(), fused.evaluate()
    assert fused_calls == [8, 8]
    assert got["eval_new_loss"] == pytest.approx(want["eval_new_loss"], rel=1e-6)
    logits = fused.predict(fused.eval_dataset["new"]).predictions
    assert logits.shape[-1] == VOCABULARY
    assert fused_calls == [8, 8]


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_default(tmp_path, fused_calls):
    run = trainer(tmp_path / "run", use_cpu=False, bf16=True, max_steps=2)
    assert run.args.use_liger_kernel is True
    run.train()
    assert fused_calls == [32, 32]
