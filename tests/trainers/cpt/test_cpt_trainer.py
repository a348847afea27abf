"""What a run of CPTTrainer logs, learns, saves and refuses, for models of ours and of transformers.

Penalties count once per optimizer batch, in any split of it and never in evaluation; runs with Liger's kernels are
runs without them; checkpoints say whether to warm up again, and Adam's moments travel to the next run.
"""

import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_moe_cpt.data.packing import MixtureLaw
from hf_moe_cpt.kernels import cross_entropy as fused_head
from hf_moe_cpt.trainers.cpt.cpt_data import (
    detect_starting_phase,
    extension_of,
    load_moments,
    read_state,
    with_more_replay,
    write_state,
)
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer
from tests.helpers.cpt_runs import HALF, AtStep, config, logged, stop_at, trainer, without_clocks
from tests.helpers.tiny_models import VOCABULARY, tiny_model, tokenized


FAST = {"learning_rate": 3e-2, "constant_learning_rate": 3e-2}


@pytest.mark.parametrize("kind", ["llama", "mixtral", "cpt_moe", "cpt_moe switch", "cpt_moe sinkhorn"])
def test_every_parameter_moves_and_the_loss_falls(tmp_path, kind):
    run = trainer(tmp_path / "run", kind, max_steps=4, starting_phase="constant", **FAST)
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    run.train()
    losses = logged(run.state.log_history, "lm_loss")
    assert losses[-1] < losses[0]
    still = [name for name, value in run.model.named_parameters() if torch.equal(before[name], value)]
    assert still == []


def test_the_log_names_every_measurement_and_the_console_no_single_layer(tmp_path, capsys):
    run = trainer(tmp_path / "run", evaluated=True, packing="concat", eval_strategy="steps", eval_steps=3, max_steps=3)
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    wanted = {"loss", "lm_loss", "lm_loss/new", "lm_loss/replay", "aux_loss", "z_loss", "learning_rate", "grad_norm"}
    wanted |= {"mri", "mri_normalized", "mri/layer_00", "mri/layer_01", "mri_normalized/layer_00"}
    wanted |= {"tokens_per_second", "model_tflops", "tokens_seen"}
    assert wanted <= set(entries[0])
    assert entries[0]["mri_normalized/layer_00"] == pytest.approx(entries[0]["mri/layer_00"] * 7 / 3)
    assert logged(entries, "tokens_seen") == [32.0, 64.0, 96.0]
    for entry in entries:  # the pure loss and the penalties
        whole = entry["lm_loss"] + 0.01 * entry["aux_loss"] + 0.001 * entry["z_loss"]
        assert entry["loss"] == pytest.approx(whole, rel=1e-5)
    printed = capsys.readouterr().out
    assert "'mri':" in printed and "layer_00" not in printed


def test_forgetting_and_adaptation_are_measured_against_the_start(tmp_path):
    often = {"eval_strategy": "steps", "eval_steps": 5, "max_steps": 10}
    run = trainer(tmp_path / "run", "llama", evaluated=True, replay_ratio=0.0, **often, **FAST)
    run.train()
    new = logged(run.state.log_history, "eval_new_loss")
    old = logged(run.state.log_history, "eval_replay_loss")
    assert logged(run.state.log_history, "adaptation") == pytest.approx([new[0] - loss for loss in new])
    assert logged(run.state.log_history, "forgetting") == pytest.approx([loss - old[0] for loss in old])
    assert new[0] - new[-1] > 0.1


def test_a_constant_phase_checkpoint_is_continued_without_warming_up_and_a_decayed_one_with(tmp_path):
    fractions = {"cooldown_fraction": 0.0, "warmup_fraction": 0.0, "constant_fraction": 0.5, "anneal_fraction": 0.5}
    trainer(tmp_path / "first", "llama", save_strategy="steps", save_steps=1, max_steps=2, **fractions).train()
    constant, decayed = (str(tmp_path / "first" / f"checkpoint-{step}") for step in (1, 2))
    assert read_state(constant)["phase"] == "constant" and read_state(decayed)["phase"] == "anneal"
    rates = {}
    for name, start in {"constant": constant, "decayed": decayed}.items():
        run = trainer(tmp_path / name, AutoModelForCausalLM.from_pretrained(start), max_steps=100)
        assert run.starting_phase == name
        scheduler = run.create_scheduler(100, run.create_optimizer())
        rates[name] = scheduler.get_last_lr()[0]
    assert rates == pytest.approx({"constant": run.args.constant_learning_rate, "decayed": 0.0})


def test_a_constant_phase_goes_on_at_the_rate_that_was_saved(tmp_path):
    """It started at 1.65e-4 without a warm-up after a constant phase at 1e-5."""
    phases = {"cooldown_fraction": 0.0, "warmup_fraction": 0.0, "constant_fraction": 1.0, "anneal_fraction": 0.0}
    rates = {"learning_rate": 1e-5, "constant_learning_rate": 1e-5, **phases}
    trainer(tmp_path / "first", "llama", save_strategy="steps", save_steps=1, max_steps=1, **rates).train()
    start = str(tmp_path / "first" / "checkpoint-1")
    for chosen, want in ((None, 1e-5), (2e-4, 2e-4)):
        given = {"learning_rate": 3e-4, "constant_learning_rate": chosen, "max_steps": 100}
        run = trainer(tmp_path / f"{chosen}", AutoModelForCausalLM.from_pretrained(start), **given)
        scheduler = run.create_scheduler(100, run.create_optimizer())
        assert scheduler.get_last_lr()[0] == pytest.approx(want)


def test_a_finished_run_is_extended_without_a_jump_of_its_rate(tmp_path):
    """From 3e-5 the rate went to 1.93e-4. It is the same after another stop, for the extension is saved."""
    often = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    trainer(tmp_path / "run", "llama", max_steps=4, **often).train()
    end = read_state(str(tmp_path / "run" / "checkpoint-4"))["learning_rate"]
    run = trainer(tmp_path / "run", "llama", max_steps=8, allow_changes="max_steps", **often)
    run.add_callback(stop_at(6))
    run.train("last")
    again = trainer(tmp_path / "run", "llama", max_steps=8, **often)
    again.train("last")
    rates = logged(again.state.log_history, "learning_rate")
    assert len(rates) == 8 and max(rates[4:]) == pytest.approx(end) == pytest.approx(1e-3)
    climbing = trainer(tmp_path / "run", "llama", max_steps=40, allow_changes="max_steps,rewarm", rewarm=True, **often)
    climbing.extension = extension_of(tmp_path / "run" / "checkpoint-4", climbing.args)
    scheduler = climbing.create_scheduler(40, climbing.create_optimizer())
    rates = [base(step) for base in scheduler.lr_lambdas[:1] for step in (4, 5, 6, 7)]
    assert rates[0] * 1e-2 == pytest.approx(end) and sorted(rates) == rates and rates[3] * 1e-2 > 5e-3


LONGER = {
    "linear": {"weight_schedule": "linear", "mixture": {"a": {"weight": 1, "end_weight": 0}, "b": 1, "c": 2}},
    "anneal": {"weight_schedule": "anneal", "mixture": {"a": {"weight": 1, "end_weight": 5}, "b": 1, "c": 2}},
    "capped": {"mixture": {"a": {"weight": 1, "max_epochs": 0.2}, "b": 1, "c": 2}},
    "constant": {"mixture": {"a": 1, "b": 1, "c": 2}},
    "other weights": {"mixture": {"a": 1, "b": 1, "c": 2}},
    "larger batch": {"mixture": {"a": 1, "b": 1, "c": 2}},
}


QUICKLY = ("linear", "capped", "larger batch")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICKLY else pytest.param(kind, marks=pytest.mark.slow) for kind in LONGER]
)
def test_an_extended_run_reads_on_where_each_source_stood(tmp_path, kind):
    """Its mixture was that of the longer run from the first step on: blocks were read twice, others never.

    Against every block in its turn; weights do not jump, a cap holds for all steps together, and a run that is stopped
    and goes on reads the same.
    """
    texts = {name: tokenized(90, seed, 1, HALF) for seed, name in enumerate("abc")}
    settings = {"replay_ratio": 0.0, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 2}
    settings |= LONGER[kind]

    def run(stop=None, **changes):
        args = config(tmp_path / "run", **{**settings, **changes})
        trained = CPTTrainer(tiny_model("llama"), args, texts)
        if stop is not None:
            trained.add_callback(stop_at(stop))
        trained.train("auto")
        return trained

    def items(mixture, first, last):
        return [mixture.law.assign(position) for position in range(first, last)]

    law = run(max_steps=8).mixture.law
    seen = {name: law.count(name) for name in "abc"}
    more = {"max_steps": 20, "allow_changes": "max_steps mixture optimizer_batch max_length learning_rate"}
    if kind == "other weights":
        more["mixture"] = {"a": 4, "b": 0, "c": 1}
    size = more["per_device_train_batch_size"] = 12 if kind == "larger batch" else 8
    longer = run(10, **more).mixture
    read_on = items(longer, 8 * size, 20 * size)
    for name, item in read_on:
        assert item == seen[name]
        seen[name] += 1
    blocks = {name: longer.blocks[name].blocks_per_epoch for name in "abc"}
    wanted = {"linear": (0, 1, 2), "anneal": (5, 1, 2), "other weights": (4, 0, 1)}.get(kind, (1, 1, 2))
    if kind == "capped":
        assert seen["a"] <= 0.2 * blocks["a"] < seen["a"] + 1
    else:
        shares = [float(share) for share in longer.law.weights(8)]
        assert shares == pytest.approx([weight / sum(wanted) for weight in wanted], abs=2e-6)
    del more["allow_changes"]
    again = run(**more)
    assert items(again.mixture, 10 * size, 20 * size) == read_on[2 * size :]
    assert again.state.global_step == 20 and again.mixture.law.count("a") == seen["a"]


def test_every_source_of_a_mixture_is_measured(tmp_path):
    weights = {"a": 0.5, "b": {"weight": 0.25}, "old": {"weight": 0.25, "role": "replay"}}
    args = config(tmp_path / "run", replay_ratio=0.0, mixture=weights, max_steps=4, per_device_train_batch_size=4)
    texts = {"a": tokenized(90, 1, 1, HALF), "b": tokenized(60, 5, 1, HALF), "old": tokenized(60, 2, HALF, VOCABULARY)}
    held_out = {"a": tokenized(20, 3, 1, HALF), "old": tokenized(20, 4, HALF, VOCABULARY)}
    run = CPTTrainer(tiny_model("llama"), args, texts, eval_dataset=held_out)
    run.train()
    first = run.state.log_history[1]
    assert {"lm_loss/a", "lm_loss/b", "lm_loss/old"} <= {key for entry in run.state.log_history for key in entry}
    metrics = run.evaluate()
    assert metrics["forgetting/old"] == metrics["forgetting"] and metrics["adaptation/a"] == metrics["adaptation"]
    assert all(run.mixture.composition(batch) == (2, 1, 1) for batch in range(4)) and first
    with pytest.raises(ValueError, match="mixture names a, b, old and train_dataset a, b: give each of them"):
        CPTTrainer(tiny_model("llama"), args, {name: texts[name] for name in "ab"})
    with pytest.raises(ValueError, match="several sources and mixture go together"):
        CPTTrainer(tiny_model("llama"), args, texts["a"])


def test_a_budget_for_forgetting_ends_the_run_with_a_checkpoint(tmp_path, caplog):
    """Without replay, at a high rate: the same run without a budget says at which step it is overdrawn."""
    often = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 8, "replay_ratio": 0.0}
    free = trainer(tmp_path / "free", "llama", evaluated=True, **often, **FAST)
    free.train()
    rises = logged(free.state.log_history, "forgetting")[1:]  # of the evaluations after a step
    limit = sorted(rises)[len(rises) // 2]
    ends = next(step for step, rise in enumerate(rises, start=1) if rise > limit)
    run = trainer(
        tmp_path / "run", "llama", evaluated=True, max_forgetting=limit, save_strategy="steps", **often, **FAST
    )
    run.train()
    assert 1 <= run.state.global_step == ends < 8 and (tmp_path / "run" / f"checkpoint-{ends}").is_dir()
    assert f"above max_forgetting={limit:g}: the run ends here" in caplog.text


REPLAYED = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 10, "replay_ratio": 0.1, "save_strategy": "steps"}


def _forgetful(folder, knows: dict, **changes) -> CPTTrainer:
    """A run of a model that has weights which know the old text."""
    model = tiny_model("llama")
    model.load_state_dict(knows)
    pace = {"per_device_train_batch_size": 10, "save_steps": 2, "learning_rate": 1e-2}
    return trainer(folder, model, evaluated=True, **{**REPLAYED, **pace, **changes})


def test_a_budget_for_forgetting_raises_replay_and_a_resumed_run_reads_the_same(tmp_path, caplog):
    """Replayed text costs 0.1 of a batch, then 0.2 from the step at which the budget was overdrawn."""
    pace = {"max_steps": 30, "per_device_train_batch_size": 8, "replay_ratio": 0.0}
    old = CPTTrainer(tiny_model("llama"), config(tmp_path / "old", **pace), tokenized(60, 2, HALF, VOCABULARY))
    old.train()
    knows = {name: weight.clone() for name, weight in old.model.state_dict().items()}
    run = _forgetful(tmp_path / "run", knows, max_forgetting=0.01, on_forgetting="replay")
    run.train()
    assert run.state.global_step == 10 and "above max_forgetting" in caplog.text and "replay 20.0%" in caplog.text
    first = run._mixture_from[0].step
    replayed = [run.mixture.composition(batch)[1] for batch in range(10)]
    assert replayed[:first] == [1] * first and set(replayed[first : first + 2]) == {2}
    assert read_state(str(tmp_path / "run" / f"checkpoint-{first}"))["mixture_from"] == [
        [first, {"new": "4/5", "replay": "1/5"}, {"new": 9 * first, "replay": first}]
    ]
    history = without_clocks(run.state.log_history)
    for later in range(first + 2, 12, 2):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{later}")
    again = _forgetful(tmp_path / "run", knows, max_forgetting=0.01, on_forgetting="replay")
    again.train(str(tmp_path / "run" / f"checkpoint-{first}"))
    assert without_clocks(again.state.log_history) == history
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])


def test_more_replay_has_a_limit_and_leaves_the_proportions_of_the_new(tmp_path):
    weights = {"a": 0.4, "b": 0.2, "old": {"weight": 0.3, "role": "replay"}, "code": {"weight": 0.1, "role": "replay"}}
    args = config(tmp_path, replay_ratio=0.0, mixture=weights, max_forgetting=0.1, on_forgetting="replay")
    law = MixtureLaw({name: source.weight for name, source in args.sources().items()}, 10, 10)
    more = with_more_replay(args, law, 4, ["code"])
    assert more == {"a": Fraction(1, 3), "b": Fraction(1, 6), "old": Fraction(3, 10), "code": Fraction(1, 5)}
    more = with_more_replay(args, law, 4, ["elsewhere"])  # both, up to half
    assert (
        more["old"] + more["code"] == Fraction(1, 2) and more["old"] == 3 * more["code"] and more["a"] == 2 * more["b"]
    )
    assert with_more_replay(args, MixtureLaw(more, 10, 10), 5, ["code"]) == {}
    for change, message in (
        ({"max_forgetting": None}, "without max_forgetting"),
        ({"weight_schedule": "linear"}, "changes weights itself"),
    ):
        with pytest.raises(ValueError, match=message):
            config(
                tmp_path,
                **{"replay_ratio": 0.0, "mixture": weights, "max_forgetting": 0.1, **change},
                on_forgetting="replay",
            )


SINCE = ("mixture", "weight_schedule", "source_order", "tokens_new", "tokens_replay", "on_forgetting")


def test_a_checkpoint_of_before_epochs_ran_on_is_refused_where_the_order_differs(tmp_path):
    """Its settings name no mixture. Read once, the order is the same and it goes on."""
    often = {"save_strategy": "steps", "save_steps": 2}
    for steps, is_refused in ((4, False), (400, True)):
        folder = tmp_path / str(steps)
        first = trainer(folder, "llama", max_steps=steps, **often)
        forget = lambda control, run=first: [run._settings.pop(name) for name in SINCE]  # noqa: E731
        first.add_callback(AtStep(1, forget))
        first.add_callback(stop_at(2))
        first.train()
        again = trainer(folder, "llama", max_steps=steps, **often)
        if not is_refused:
            again.train("last")
            continue
        with pytest.raises(
            ValueError, match="of an earlier version, which read new, replay in another order from the"
        ):
            again.train("last")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"a": 0.6, "b": 0.2, "old": {"weight": 0.2, "role": "replay"}}, "mixture was"),
        (
            {"b": 0.25, "a": 0.5, "old": {"weight": 0.25, "role": "replay"}},
            "source_order was .'a', 'b', 'old'. and is .'b'",
        ),
        ({"a": 0.5, "b": 0.25, "old": {"weight": 0.25, "role": "new"}}, "mixture was"),
        ({"a": 0.5, "b": 0.25, "old": {"weight": 0.25, "role": "replay", "max_epochs": 1}}, "mixture was"),
        ("text", "data_b was"),
    ],
)
def test_a_run_goes_on_with_the_same_sources_only(tmp_path, change, message):
    weights = {"a": 0.5, "b": 0.25, "old": {"weight": 0.25, "role": "replay"}}
    texts = {"a": tokenized(90, 1, 1, HALF), "b": tokenized(60, 5, 1, HALF), "old": tokenized(60, 2, HALF, VOCABULARY)}

    def run(mixture, texts):
        pace = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}
        args = config(tmp_path / "run", replay_ratio=0.0, mixture=mixture, **pace)
        return CPTTrainer(tiny_model("llama"), args, texts)

    first = run(weights, texts)
    first.add_callback(stop_at(2))
    first.train()
    if change == "text":
        change, texts = weights, texts | {"b": tokenized(60, 6, 1, HALF)}
    with pytest.raises(ValueError, match=message):
        run(change, texts).train("last")


def test_moments_are_carried_over_only_if_asked(tmp_path):
    trainer(tmp_path / "first", "llama", save_strategy="steps", max_steps=2, save_steps=2).train()
    steps = {}
    for keep in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "first" / "checkpoint-2")
        run = trainer(tmp_path / f"keep {keep}", model, keep_optimizer_state=keep, max_steps=1)
        run.train()
        steps[keep] = {int(state["step"]) for state in run.optimizer.state.values()}
    assert steps == {False: {1}, True: {3}}


def test_lora_adapters_train_through_it(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    run = trainer(tmp_path / "run", model, max_steps=2, save_strategy="steps", save_steps=2)
    run.train()
    assert logged(run.state.log_history, "lm_loss/new")
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_the_folder_and_the_disk_are_checked_before_training(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-1").touch()
    with pytest.raises(ValueError, match="is not empty .it holds 'checkpoint-1'.: name another folder"):
        trainer(tmp_path).train()
    run = trainer(tmp_path / "run", save_strategy="steps")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match=r"has 0.00 GB free, but 1 checkpoint\(s\)"):
        run.train()


ALONE = {"replay_ratio": 0.0}
REFUSED = {
    "blocks longer than the context": ({"max_length": 65}, {}, "longer than the model's context of 64"),
    "replay without a ratio": (ALONE, {"replay_dataset": tokenized(9, 0)}, "without replay_ratio"),
    "ratio without replay": ({}, {}, "replay_ratio=0.3 without replay_dataset"),
    "a list": (ALONE, {"train_dataset": ["text"]}, "train_dataset is a list: pass a datasets"),
    "ids beyond the vocabulary": (ALONE, {"train_dataset": Dataset.from_dict({"input_ids": [[1, 48]]})}, "48"),
    "too little text": (ALONE, {"train_dataset": Dataset.from_dict({"input_ids": [[1, 2]]})}, "max_length"),
    "no text at all": (ALONE, {"train_dataset": Dataset.from_dict({"words": ["a"]})}, "neither 'text' nor"),
}


@pytest.mark.parametrize("changes, data, message", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_before_training(tmp_path, changes, data, message):
    given = {"train_dataset": tokenized(9, 0), **data}
    with pytest.raises(ValueError, match=message):
        CPTTrainer(tiny_model("llama"), config(tmp_path / "run", **changes), **given)
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


@pytest.mark.parametrize("name", ["fused_linear_cross_entropy", "cross_entropy"])
def test_a_head_of_liger_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"liger_kernel_config sets {name}, .* kernels='auto' fuses") as caught:
        trainer(tmp_path / "run", "mixtral", use_liger_kernel=True, liger_kernel_config={name: True})
    assert "\n" not in str(caught.value)


in_the_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors need the interpreter")


@pytest.fixture
def fused_calls(monkeypatch):
    """How many tokens each call of the fused head saw."""
    calls = []
    compute = fused_head.linear_cross_entropy
    counted = lambda x, *args, **more: calls.append(len(x)) or compute(x, *args, **more)  # noqa: E731
    monkeypatch.setattr(fused_head, "linear_cross_entropy", counted)
    return calls


def _tiny_run(folder: Path, kind: str = "cpt_moe", is_fused: bool = False, **changes) -> CPTTrainer:
    """A step of two micro-batches of 8 tokens and two evaluations of one block each."""
    sizes = {"max_steps": 1, "max_length": 8, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    args = config(folder, packing="concat", replay_ratio=0.5, **sizes, **changes)
    held_out = [Dataset.from_dict({"input_ids": [list(range(low, low + 8))]}) for low in (3, 30)]
    run = CPTTrainer(tiny_model(kind), args, tokenized(9, 1, 1, HALF), tokenized(9, 2, HALF, VOCABULARY), *held_out)
    if is_fused:  # as `use_kernels` does on a GPU
        fused_head.fuse_head(run.model)
    return run


@in_the_interpreter
@pytest.mark.parametrize(
    "kind", ["cpt_moe", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("mixtral", "cpt_moe sinkhorn"))]
)
def test_a_run_logs_and_learns_the_same(tmp_path, fused_calls, kind):
    evaluated = {"eval_strategy": "steps", "eval_steps": 1}
    plain, fused = (_tiny_run(tmp_path, kind, is_fused, **evaluated) for is_fused in (False, True))
    plain.train()
    assert fused_calls == []
    fused.train()
    assert fused_calls == [8] * (2 + 2 + 2)  # both evaluations at the start, the micro-batches, both at the end
    want, got = without_clocks(plain.state.log_history), without_clocks(fused.state.log_history)
    assert len(want) == len(got)
    assert {"lm_loss/new", "lm_loss/replay", "eval_new_loss", "forgetting"} <= {key for entry in want for key in entry}
    for left, right in zip(want, got, strict=True):
        assert right == pytest.approx(left, rel=1e-4, abs=1e-5)


@in_the_interpreter
def test_an_evaluation_before_training_and_a_prediction(tmp_path, fused_calls):
    plain, fused = _tiny_run(tmp_path / "plain"), _tiny_run(tmp_path / "fused", is_fused=True)
    want, got = plain.evaluate(), fused.evaluate()
    assert fused_calls == [8, 8]
    assert got["eval_new_loss"] == pytest.approx(want["eval_new_loss"], rel=1e-6)
    logits = fused.predict(fused.eval_dataset["new"]).predictions
    assert logits.shape[-1] == VOCABULARY
    assert fused_calls == [8, 8]


HEAVY = {"router_aux_loss_coef": 1.0, "output_router_logits": True}
ALIKE = Dataset.from_dict({"input_ids": [list(range(1, 17))] * 8})


def _run(folder, kind: str, batch: int, accumulation: int) -> CPTTrainer:
    sizes = {"max_steps": 1, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    args = config(folder, replay_ratio=0.0, packing="concat", eval_on_start=False, **sizes)
    return CPTTrainer(tiny_model(kind, **HEAVY), args, ALIKE, eval_dataset=ALIKE)


@pytest.mark.parametrize("kind", ["mixtral", "cpt_moe"])
def test_penalty_weighs_the_same_for_any_accumulation(tmp_path, kind):
    curves = {}
    for batch, accumulation in ((4, 1), (1, 4)):
        run = _run(tmp_path / f"{batch}", kind, batch, accumulation)
        run.train()
        curves[batch] = [logged(run.state.log_history, key) for key in ("loss", "grad_norm")]
    assert curves[1][0] == pytest.approx(curves[4][0], rel=1e-5)
    assert curves[1][1] == pytest.approx(curves[4][1], rel=1e-4)


def test_evaluation_is_the_language_model_loss_alone(tmp_path):
    run = _run(tmp_path, "mixtral", 4, 1)  # which adds its penalty to what it calls its loss
    ids = torch.tensor([ALIKE[0]["input_ids"]])
    with torch.no_grad():
        logits = run.model.eval()(ids).logits[:, :-1]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert run.evaluate()["eval_new_loss"] == pytest.approx(want, rel=1e-5)


def test_the_checkpoint_says_whether_it_was_decayed(tmp_path):
    assert detect_starting_phase("") == detect_starting_phase(None) == "scratch"
    for silent in (tmp_path, tmp_path / "gone" / "since", "somebody/a-model-not-in-the-cache"):
        assert detect_starting_phase(str(silent)) == "decayed"
    undecayed = dict.fromkeys(("warmup", "cooldown", "constant"), "constant")
    for saved_in, continues_as in {**undecayed, "anneal": "decayed"}.items():
        write_state(tmp_path, {"phase": saved_in})
        assert read_state(str(tmp_path)) == {"phase": saved_in}
        assert detect_starting_phase(str(tmp_path)) == continues_as


def _optimizer(*shapes: tuple[int, ...], lr: float) -> torch.optim.AdamW:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)


def test_moments_travel_settings_do_not_and_foreign_ones_are_refused(tmp_path):
    new = _optimizer((2, 3), (4,), lr=0.25)
    with pytest.raises(ValueError, match="holds no optimizer.pt"):
        load_moments(new, tmp_path)
    for shape in ((5, 3), (2, 3)):
        old = _optimizer(shape, (4,), lr=1.0)
        for parameter in (parameter for group in old.param_groups for parameter in group["params"]):
            parameter.grad = torch.ones_like(parameter)
        old.step()
        torch.save(old.state_dict(), tmp_path / "optimizer.pt")
        if shape == (5, 3):
            with pytest.raises(ValueError, match="belong to other parameters"):
                load_moments(new, tmp_path)
    load_moments(new, tmp_path)
    assert [group["lr"] for group in new.param_groups] == [0.25, 0.25]
    for before, after in zip(old.state.values(), new.state.values(), strict=True):
        assert torch.equal(before["exp_avg"], after["exp_avg"])
        assert torch.equal(before["exp_avg_sq"], after["exp_avg_sq"])
        assert before["step"] == after["step"] == 1


class ForbidSync(TrainerCallback):
    """Raises at any host synchronisation between the edges of the steps after `first`."""

    def __init__(self, first: int) -> None:
        self.first = first

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= self.first:
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["cpt_moe", "cpt_moe sinkhorn", "cpt_moe switch"])
def test_no_step_waits_for_the_device(tmp_path, kind):
    """Models of transformers wait once in a forward pass, to look for packed documents; ours only if packed."""
    settings = {"max_steps": 8, "logging_steps": 8, "gradient_accumulation_steps": 2, "packing": "concat"}
    run = trainer(tmp_path / "run", kind, use_cpu=False, bf16=True, **settings)
    run.add_callback(ForbidSync(first=2))
    try:
        run.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(logged(run.state.log_history, "lm_loss/replay")) == 1
