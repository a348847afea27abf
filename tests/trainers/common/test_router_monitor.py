"""Loads, MRI and saturation of mixtures that we did not write, in transformers', TRL's and our trainers.

They are compared with counts from recorded router logits. Where numbers are compared the learning rate is 0, so that
routing can be counted after training, batch by batch.
"""

import logging
import math

import pytest
import torch
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_moe_cpt.routing.hooks import find_experts
from hf_moe_cpt.routing.metrics import router_saturation
from hf_moe_cpt.trainers.common.router_monitor import PROBE_FILE, ExpertLoadMeter, RouterMonitorCallback
from tests.helpers.cpt_runs import trainer as cpt_trainer
from tests.helpers.preference_runs import pairs, settings, word_tokenizer
from tests.helpers.tiny_models import tiny_model, tokenized
from tests.helpers.tiny_moes import moe_model, padded_batch


def _balance(meter: ExpertLoadMeter, model, *batches: torch.Tensor, mask: torch.Tensor | None = None) -> dict:
    """What the meter says of one step of these micro-batches."""
    for ids in batches:
        with meter.observe(mask):
            model(ids, attention_mask=mask)
    meter.end_step()
    return meter.pop()


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "gpt_oss", "cpt_moe"])
def test_mri_equals_a_count_from_router_logits(kind):
    model = moe_model(kind)
    ids = torch.randint(0, 32, (3, 7))
    summary = _balance(ExpertLoadMeter(model), model, ids)
    router_logits = model(ids, output_router_logits=True).router_logits
    chosen, experts = model.config.num_experts_per_tok, router_logits[0].shape[-1]
    for layer, logits in enumerate(router_logits):
        busiest = logits.topk(chosen).indices.flatten().bincount(minlength=experts).max().item()
        assert summary["mri"][layer] == pytest.approx(busiest / ids.numel())
        assert summary["mri_normalized"][layer] == pytest.approx(busiest / ids.numel() * experts / chosen)
    assert len(summary["mri"]) == 2


def test_routers_that_return_logits_only_are_counted_by_what_they_chose():
    model, seen = moe_model("deepseek_v3"), []
    find_experts(model)[0].register_forward_hook(lambda module, args, output: seen.append(args[1]))
    found = _balance(ExpertLoadMeter(model), model, torch.randint(0, 32, (2, 9)))["mri"]
    assert found == pytest.approx([seen[0].flatten().bincount(minlength=8).max().item() / 18])


def test_a_step_means_the_same_in_one_batch_or_in_three_and_with_padding():
    model = tiny_model("mixtral")
    ids = torch.randint(0, 32, (6, 7))
    meter = ExpertLoadMeter(model)
    want = _balance(meter, model, ids)
    assert _balance(meter, model, *ids.chunk(3)) == want
    mask = torch.cat([torch.ones(6, 7), torch.zeros(6, 3)], dim=1).long()
    assert _balance(meter, model, torch.nn.functional.pad(ids, (0, 3)), mask=mask) == want
    meter.close()  # which removes the hooks
    assert _balance(meter, model, ids) == {}


def test_recomputation_by_checkpointing_does_not_count_twice():
    model = tiny_model("mixtral").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(0, 32, (2, 6))
    meter = ExpertLoadMeter(model)
    with meter.observe():
        loss = model(ids, labels=ids).loss
    (counts,) = meter._counts.values()
    before = counts.clone()
    loss.backward()
    assert torch.equal(before, counts) and not meter._pending
    assert before[:, :-1].sum(-1).tolist() == [ids.numel() * 2] * 2
    assert before[:, -1].tolist() == [ids.numel()] * 2


SMALL = {"max_steps": 3, "learning_rate": 0.0, "weight_decay": 0.0}
PROBE = padded_batch(7)
NAMES = ("mri", "mri_normalized", "load_entropy")


def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


def plain_trainer(folder, model=None, monitor=None, **changes) -> Trainer:
    args = settings(folder, **{**SMALL, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **changes})
    return Trainer(
        tiny_model("mixtral") if model is None else model,
        TrainingArguments(**args),
        padded,
        tokenized(24, 0),
        tokenized(6, 1),
        callbacks=[] if monitor is None else [monitor],
    )


def remember_batches(trainer) -> list[dict[str, torch.Tensor]]:
    """What every training step of the trainer is given from now on."""
    batches, step = [], trainer.training_step

    def remembering(model, inputs, *others):
        batches.append({name: inputs[name].clone() for name in ("input_ids", "attention_mask")})
        return step(model, inputs, *others)

    trainer.training_step = remembering
    return batches


def counted(model, batches, per_step: int) -> list[dict[str, float]]:
    """Balance of every optimizer step, from recorded router logits and torch's own entropy: keys as in the log."""
    top_k, steps = model.config.num_experts_per_tok, []
    for begin in range(0, len(batches), per_step):
        loads, tokens = 0, 0
        for batch in batches[begin : begin + per_step]:
            with torch.no_grad():
                logits = torch.stack(model.eval()(**batch, output_router_logits=True).router_logits)
            keep = batch["attention_mask"].flatten().bool()
            loads = loads + torch.nn.functional.one_hot(logits[:, keep].topk(top_k).indices).sum((1, 2)).double()
            tokens += keep.sum()
        mri, experts = loads.max(-1).values / tokens, loads.shape[1]
        entropy = torch.distributions.Categorical(probs=loads).entropy() / math.log(experts)
        values = dict(zip(NAMES, (mri, mri * experts / top_k, entropy), strict=True))
        found = {name: value.mean().item() for name, value in values.items()}
        found |= {f"{name}/layer_{i:02d}": v for name, value in values.items() for i, v in enumerate(value.tolist())}
        steps.append(found)
    return steps


def routing_logged(trainer) -> list[dict[str, float]]:
    """The monitor's part of each training log."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    wanted = (*NAMES, "router_saturation")
    return [{k: v for k, v in entry.items() if k.partition("/")[0] in wanted} for entry in entries]


CASES = {
    "checkpointing, evaluation at each step": {"eval_strategy": "steps", "eval_steps": 1},
    "reentrant checkpointing": {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_transformers_trainer_logs_what_loops_count(tmp_path, changes):
    changes = {"gradient_checkpointing_kwargs": {"use_reentrant": False}, **changes}
    trainer = plain_trainer(tmp_path, monitor=RouterMonitorCallback(), gradient_checkpointing=True, **changes)
    batches = remember_batches(trainer)
    trainer.train()
    assert len(batches) == 6  # two a step
    for got, want in zip(routing_logged(trainer), counted(trainer.model, batches, 2), strict=True):
        assert got == pytest.approx(want, rel=1e-6)


def test_logs_between_are_means_over_steps_and_every_makes_the_trainer_log(tmp_path):
    trainer = plain_trainer(tmp_path, monitor=RouterMonitorCallback(every=2), max_steps=5, logging_steps=5)
    batches = remember_batches(trainer)
    trainer.train()
    steps = counted(trainer.model, batches, 2)
    found = {entry["step"]: entry.get("mri") for entry in trainer.state.log_history if "loss" in entry}
    assert found == {
        2: pytest.approx((steps[0]["mri"] + steps[1]["mri"]) / 2),
        4: pytest.approx((steps[2]["mri"] + steps[3]["mri"]) / 2),
        5: None,
    }


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trainers_of_trl_log_what_loops_count_of_the_policy(tmp_path, kind):
    trl = pytest.importorskip("trl")
    args = settings(tmp_path, **SMALL)
    shared = {"processing_class": word_tokenizer(), "callbacks": [RouterMonitorCallback()]}
    if kind == "SFT":
        trainer = trl.SFTTrainer(tiny_model("mixtral"), trl.SFTConfig(**args), train_dataset=tokenized(9, 0), **shared)
        model = trainer.model
    else:
        lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        trainer = trl.DPOTrainer(
            tiny_model("mixtral"), args=trl.DPOConfig(**args), train_dataset=pairs(16), peft_config=lora, **shared
        )
        model = trainer.model.get_base_model()
    batches = remember_batches(trainer)
    trainer.train()
    assert len(batches) == 3
    assert routing_logged(trainer) == [pytest.approx(step, rel=1e-6) for step in counted(model, batches, 1)]


def test_our_trainer_logs_the_same_with_and_without_its_own_meter(tmp_path):
    histories = []
    for own in (True, False):
        run = cpt_trainer(tmp_path / str(own), log_expert_load=own, max_steps=3)
        if not own:
            run.add_callback(RouterMonitorCallback())
        run.train()
        histories.append([{k: v for k, v in entry.items() if k.startswith("mri")} for entry in run.state.log_history])
    assert histories[0] == histories[1] and len(histories[0][0]) == 6


def test_llama4_counts_the_expert_of_the_largest_score(tmp_path):
    model = moe_model("llama4")
    trainer = plain_trainer(tmp_path, model, RouterMonitorCallback(), max_steps=1)
    batches = remember_batches(trainer)
    scores = []
    for layer in model.model.layers:
        layer.feed_forward.router.register_forward_hook(lambda m, args, out: scores.append(out[0]))
    trainer.train()
    masks = [batch["attention_mask"].flatten().bool() for batch in batches]
    for layer in range(2):
        best = torch.cat([scores[2 * i + layer].argmax(-1)[mask] for i, mask in enumerate(masks)])
        want = best.bincount().max().item() / len(best)
        assert routing_logged(trainer)[0][f"mri/layer_{layer:02d}"] == pytest.approx(want)


# ---- saturation ----


def experts_of(model) -> list[torch.Tensor]:
    """(T, K) of each layer for the tokens of PROBE that count."""
    with torch.no_grad():
        logits = model.eval()(**PROBE, output_router_logits=True).router_logits
    keep = PROBE["attention_mask"].flatten().bool()
    return [layer.topk(2).indices[keep] for layer in logits]


def test_saturation_is_that_of_the_probe_against_the_start(tmp_path):
    model = tiny_model("mixtral")
    before = experts_of(model)
    trainer = plain_trainer(tmp_path, model, RouterMonitorCallback(probe=PROBE, probe_every=2), learning_rate=0.1)
    trainer.train()
    entries = routing_logged(trainer)
    assert ["router_saturation" in entry for entry in entries] == [False, True, False]
    trainer = plain_trainer(tmp_path / "b", tiny_model("mixtral"), learning_rate=0.1, max_steps=3)
    trainer.add_callback(RouterMonitorCallback(probe=[PROBE]))
    trainer.train()
    want = [router_saturation(*layer) for layer in zip(before, experts_of(trainer.model), strict=True)]
    last = routing_logged(trainer)[-1]
    assert [last["router_saturation/layer_00"], last["router_saturation/layer_01"]] == pytest.approx(want)
    assert last["router_saturation"] == pytest.approx(sum(want) / 2) and want != [1.0, 1.0]


def test_watching_changes_no_number_of_the_training(tmp_path):
    losses = []
    for name, monitor in (("with", RouterMonitorCallback(probe=PROBE)), ("without", None)):
        trainer = plain_trainer(tmp_path / name, monitor=monitor, learning_rate=0.01)
        trainer.model.config.attention_dropout = 0.1
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in trainer.model.modules())
        assert trainer.model.training
    assert losses[0] == losses[1]


def test_a_resumed_run_is_compared_with_the_start_of_the_first(tmp_path, caplog):
    def run(**changes) -> Trainer:
        monitor = RouterMonitorCallback(probe=PROBE)
        return plain_trainer(tmp_path, tiny_model("cpt_moe"), monitor, **changes)

    first = run(learning_rate=0.1, save_strategy="steps", save_steps=2)
    first.train()
    assert (tmp_path / PROBE_FILE).is_file()
    second = run(learning_rate=0.1)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert routing_logged(second)[-1]["router_saturation"] == routing_logged(first)[-1]["router_saturation"] < 1
    (tmp_path / PROBE_FILE).unlink()
    third = run()
    with caplog.at_level(logging.WARNING):
        third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "has no routing of the starting model on this probe: saturation is told against step 2" in caplog.text


# ---- where the values go, and what is refused ----


class Reporter(TrainerCallback):
    """As W&B's: in the list before the callbacks of the user."""

    def __init__(self) -> None:
        self.seen: list[dict] = []

    def on_log(self, args, state, control, logs=None, **_):
        self.seen.append(dict(logs))


def test_attach_puts_the_values_before_the_reporters(tmp_path):
    for attach in (True, False):
        reporter, monitor = Reporter(), RouterMonitorCallback(per_layer=False)
        trainer = plain_trainer(tmp_path / str(attach), monitor=reporter, max_steps=1)
        assert monitor.attach(trainer) is monitor if attach else trainer.add_callback(monitor) is None
        trainer.train()
        assert ("mri" in reporter.seen[0]) == attach
        assert routing_logged(trainer)[0].keys() == set(NAMES)


def test_a_dense_model_is_told_once_and_nothing_is_logged(tmp_path, caplog):
    trainer = plain_trainer(tmp_path, tiny_model("llama"), RouterMonitorCallback(probe=PROBE))
    with caplog.at_level(logging.WARNING, logger="hf_moe_cpt"):
        trainer.train()
    warned = [record.getMessage() for record in caplog.records if "RouterMonitorCallback" in record.getMessage()]
    assert len(warned) == 1 and "RouterMonitorCallback logs nothing: LlamaForCausalLM is a dense model" in warned[0]
    assert routing_logged(trainer) == [{}] * 3


REFUSED = {
    "no steps": ({"every": 0}, "every=0 must be at least 1"),
    "no batch": ({"probe": []}, "probe holds no batch"),
    "text": ({"probe": ["a b"]}, "A batch of the probe has str: it needs input_ids"),
    "one sequence": ({"probe": {"input_ids": torch.tensor([1, 2])}}, r"input_ids \(2,\) and attention_mask \(2,\)"),
}


@pytest.mark.parametrize("options, text", REFUSED.values(), ids=REFUSED)
def test_refusals(options, text):
    with pytest.raises(ValueError, match=text):
        RouterMonitorCallback(**options)
