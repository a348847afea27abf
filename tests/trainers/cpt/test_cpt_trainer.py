"""What a run logs, learns, saves and refuses, for models of ours and of transformers."""

import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer
from hf_moe_cpt.trainers.cpt.starting_point import read_state
from tests.helpers.cpt_runs import config, logged, trainer
from tests.helpers.tiny_models import tiny_model, tokenized


FAST = {"learning_rate": 1e-1, "constant_learning_rate": 1e-1}


@pytest.mark.parametrize("kind", ["llama", "mixtral", "cpt_moe", "cpt_moe switch", "cpt_moe sinkhorn"])
def test_every_parameter_moves_and_the_loss_falls(tmp_path, kind):
    run = trainer(tmp_path / "run", kind, max_steps=12, starting_phase="constant", **FAST)
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    run.train()
    losses = logged(run.state.log_history, "lm_loss")
    assert losses[-1] < losses[0]
    still = [name for name, value in run.model.named_parameters() if torch.equal(before[name], value)]
    assert still == []


def test_the_log_names_every_measurement(tmp_path):
    run = trainer(tmp_path / "run", evaluated=True, eval_strategy="steps", eval_steps=6)
    run.train()
    entry = next(entry for entry in run.state.log_history if "loss" in entry)
    wanted = {
        "loss",
        "lm_loss",
        "lm_loss/new",
        "lm_loss/replay",
        "aux_loss",
        "z_loss",
        "learning_rate",
        "grad_norm",
        "mri",
        "mri_normalized",
        "mri/layer_00",
        "mri/layer_01",
        "mri_normalized/layer_00",
        "tokens_per_second",
        "model_tflops",
        "tokens_seen",
    }
    assert wanted <= set(entry)
    assert entry["mri_normalized/layer_00"] == pytest.approx(entry["mri/layer_00"] * 7 / 3)
    assert logged(run.state.log_history, "tokens_seen") == [32.0 * step for step in range(1, 7)]


def test_the_loss_is_the_pure_loss_plus_the_penalties(tmp_path):
    run = trainer(tmp_path / "run", packing="concat")
    run.train()
    for entry in run.state.log_history[:-1]:
        assert entry["loss"] == pytest.approx(
            entry["lm_loss"] + 0.01 * entry["aux_loss"] + 0.001 * entry["z_loss"], rel=1e-5
        )


def test_forgetting_and_adaptation_are_measured_against_the_start(tmp_path):
    run = trainer(
        tmp_path / "run", evaluated=True, replay_ratio=0.0, eval_strategy="steps", eval_steps=3, max_steps=24
    )
    run.train()
    new = logged(run.state.log_history, "eval_new_loss")
    old = logged(run.state.log_history, "eval_replay_loss")
    assert logged(run.state.log_history, "adaptation") == pytest.approx([new[0] - loss for loss in new])
    assert logged(run.state.log_history, "forgetting") == pytest.approx([loss - old[0] for loss in old])
    assert new[0] - new[-1] > 0.1


def test_evaluation_loss_holds_no_penalty(tmp_path):
    run = trainer(tmp_path / "run", evaluated=True, packing="concat")
    measured = run.evaluate()["eval_new_loss"]
    blocks = run.eval_dataset["new"]
    ids = torch.stack([block["input_ids"] for block in blocks])
    with torch.no_grad():
        logits = run.model.eval()(ids).logits[:, :-1]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten())
    assert measured == pytest.approx(want.item(), rel=1e-5)


def test_a_constant_phase_checkpoint_is_continued_without_warming_up_and_a_decayed_one_with(tmp_path):
    first = trainer(
        tmp_path / "first",
        save_strategy="steps",
        save_steps=3,
        max_steps=6,
        cooldown_fraction=0.0,
        warmup_fraction=0.0,
        constant_fraction=0.5,
        anneal_fraction=0.5,
    )
    first.train()
    constant, decayed = (str(tmp_path / "first" / f"checkpoint-{step}") for step in (3, 6))
    assert read_state(constant)["phase"] == "constant" and read_state(decayed)["phase"] == "anneal"
    rates = {}
    for name, start in {"constant": constant, "decayed": decayed}.items():
        run = trainer(tmp_path / name, AutoModelForCausalLM.from_pretrained(start), max_steps=100, logging_steps=1)
        assert run.starting_phase == name
        run.args.max_steps = 100
        scheduler = run.create_scheduler(100, run.create_optimizer())
        rates[name] = scheduler.get_last_lr()[0]
    assert rates == pytest.approx({"constant": run.args.constant_learning_rate, "decayed": 0.0})


def test_moments_are_carried_over_only_if_asked(tmp_path):
    trainer(tmp_path / "first", save_strategy="steps", save_steps=6).train()
    start = str(tmp_path / "first" / "checkpoint-6")
    steps = {}
    for keep in (False, True):
        run = trainer(
            tmp_path / f"keep {keep}", AutoModelForCausalLM.from_pretrained(start), keep_optimizer_state=keep
        )
        run.train()
        steps[keep] = {int(state["step"]) for state in run.optimizer.state.values()}
    assert steps == {False: {6}, True: {12}}


def test_lora_adapters_train_through_it(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    run = trainer(tmp_path / "run", model, max_steps=8, save_strategy="steps", save_steps=8)
    run.train()
    assert logged(run.state.log_history, "lm_loss/new")
    assert (tmp_path / "run" / "checkpoint-8" / "adapter_model.safetensors").is_file()


def test_a_loss_that_is_no_number_stops_the_run_and_saves_nothing_after_it(tmp_path):
    run = trainer(tmp_path / "run", max_steps=6, save_strategy="steps", save_steps=2)
    calls = []

    def poison(module, args, output):
        calls.append(1)
        return output * float("nan") if len(calls) == 5 else output

    run.model.lm_head.register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match=r"step 5 is not finite \(blocks 8 to 9 of the mixture\)"):
        run.train()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    run = tmp_path / "run"
    trainer(run, save_strategy="steps", save_steps=6).train()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="is not empty .it holds 'checkpoint-6'.: name another folder"):
        trainer(run).train()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_disk_is_checked_before_training(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run", save_strategy="steps")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match=r"has 0.00 GB free, but 1 checkpoint\(s\)"):
        run.train()


REFUSED = {
    "blocks longer than the context": (
        {"max_length": 65},
        "llama",
        {},
        "max_length=65 is longer than the model's context of 64 tokens",
    ),
    "replay without a ratio": (
        {"replay_ratio": 0.0},
        "llama",
        {"replay_dataset": tokenized(9, 0)},
        "without replay_ratio",
    ),
    "ratio without replay": ({}, "llama", {}, "replay_ratio=0.3 without replay_dataset"),
    "a list": (
        {"replay_ratio": 0.0},
        "llama",
        {"train_dataset": ["text"]},
        "train_dataset is a list: pass a datasets",
    ),
    "ids beyond the vocabulary": (
        {"replay_ratio": 0.0},
        "llama",
        {"train_dataset": Dataset.from_dict({"input_ids": [[1, 48]]})},
        "48",
    ),
    "too little text": (
        {"replay_ratio": 0.0},
        "llama",
        {"train_dataset": Dataset.from_dict({"input_ids": [[1, 2]]})},
        "max_length",
    ),
    "no text at all": (
        {"replay_ratio": 0.0},
        "llama",
        {"train_dataset": Dataset.from_dict({"words": ["a"]})},
        "neither 'text' nor",
    ),
}


@pytest.mark.parametrize("changes, kind, data, message", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_before_training(tmp_path, changes, kind, data, message):
    with pytest.raises(ValueError, match=message):
        CPTTrainer(tiny_model(kind), config(tmp_path / "run", **changes), **{"train_dataset": tokenized(9, 0), **data})
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_single_layers_stay_out_of_the_console(tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    run = trainer(tmp_path / "run")
    run.train()
    printed = capsys.readouterr().out
    assert "'mri':" in printed and "layer_00" not in printed
