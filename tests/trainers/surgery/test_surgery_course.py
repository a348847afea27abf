"""The course of a surgery: targets, stop rules, the best model, resuming, adapters, experts, and what goes wrong.

A step of a surgery is the step on the sum of its terms, however it is split (over ranks: tests/distributed); the
paper's is the authors' loop.
"""

import math
from statistics import fmean

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from hf_moe_cpt.trainers.surgery.chunked import head_of, run_model, token_logp
from hf_moe_cpt.trainers.surgery.data import collate_sets
from hf_moe_cpt.trainers.surgery.losses import TERMS
from hf_moe_cpt.trainers.surgery.surgery_trainer import counted_targets
from hf_moe_cpt.trainers.surgery.verdict import card_section, measured_weights, record_of, surgery_gap
from tests.helpers.cpt_runs import AtStep, logged, stop_at
from tests.helpers.preference_runs import word_tokenizer
from tests.helpers.surgery_runs import BEST, EVALUATED, history, knowing_model, known_texts, token_sets, trainer
from tests.helpers.tiny_models import VOCABULARY, tiny_model, tokenized
from tests.helpers.tolerances import assert_matches


def _weights(run):
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def _loss(model, rows):
    with torch.no_grad():
        return fmean(float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss) for ids in rows)


def test_what_is_aimed_at_is_fixed_before_the_first_step(tmp_path, caplog):
    """A yardstick that followed unseen text rose with it: the worst model had the smallest gap, and nobody said so."""
    sets, options = (
        known_texts(),
        {"learning_rate": 1e-2, "unlearn_weight": 5.0, "unseen_weight": 0.0, "eval_rows": 64},
    )
    want = min(_loss(knowing_model().eval(), sets["unseen_dataset"]["input_ids"]), math.log(VOCABULARY))
    run = trainer(tmp_path / "run", knowing_model(), sets, max_steps=20, **options, **EVALUATED)
    run.train()
    assert run.aims.forget == run.terms.forget.target == pytest.approx(want, rel=1e-5)
    start, *_, end = (entry for entry in run.state.log_history if "eval_unseen_ce" in entry)
    assert run.aims.update == start["eval_obsolete_ce"]
    drift = end["eval_unseen_ce"] - start["eval_unseen_ce"]
    assert abs(drift) > 0.3, "or nothing is shown"
    aims = {"unlearn": want, "obsolete": run.aims.obsolete}
    gap = sum(abs(end[f"eval_{name}_ce"] - aim) for name, aim in aims.items()) + abs(drift)
    gap += max(0.0, end["eval_update_ce"] - run.aims.update) + end["eval_retain_kl"]
    assert end["eval_surgery_gap"] == pytest.approx(gap, rel=1e-4)
    assert f"the loss of unseen text has moved by {drift:+.3g} nats" in run.verdict in caplog.text


def test_text_to_be_learnt_says_how_far_to_forget_where_there_is_no_unseen_text(tmp_path):
    sets = {name: rows for name, rows in known_texts().items() if name[:6] in ("unlear", "update", "retain")}
    run = trainer(tmp_path / "run", knowing_model(), sets, max_steps=1, eval_rows=64)
    run.train()
    model = knowing_model().eval()
    known, unread = (_loss(model, sets[f"{name}_dataset"]["input_ids"]) for name in ("unlearn", "update"))
    assert run.aims.forget == pytest.approx(unread, rel=1e-5) and run.target_is == "update"
    assert run.aims.update == pytest.approx(known, rel=1e-5) and known < unread


def test_retention_is_measured_on_rows_that_no_term_sees(tmp_path):
    sets = token_sets()
    names = ("retain", "neighbour", "unseen")
    for name in names:  # three rows a subject
        rows = sets[f"{name}_dataset"]
        sets[f"{name}_dataset"] = rows.add_column("subject", [f"{name} {place // 3}" for place in range(len(rows))])
    run = trainer(tmp_path / "run", sets=sets, max_steps=8, **EVALUATED)
    trained = {name: {tuple(row["input_ids"]) for item in run.train_dataset for row in item[name]} for name in names}
    for name in names:
        apart, whole = run.measured_sets[name], sets[f"{name}_dataset"]
        assert len(apart) == 3 and len(set(apart["subject"])) == 1, "a share of the subjects, all rows of them"
        assert not trained[name] & {tuple(ids) for ids in apart["input_ids"]}
        assert len(trained[name]) + len(apart) == len(whole)
    run.train()
    model, before = run.model.eval(), tiny_model("llama").eval()
    found = []
    for ids in run.measured_sets["retain"]["input_ids"]:
        with torch.no_grad():
            now, then = (one(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for one in (model, before))
        found.append((then.exp() * (then - now)).sum(-1).mean())
    assert logged(run.state.log_history, "eval_retain_kl")[-1] == pytest.approx(fmean(map(float, found)), rel=1e-4)
    record = record_of(run)
    assert record["held_out"] == dict.fromkeys(names, 3)
    assert "on rows that no term saw (retain 3, neighbour 3, unseen 3)" in card_section(record)


def _known_values(model, rows):
    """Share of the values of subjects, tokens 4, 6 and 8 of each row, that are the first choice."""
    ids = torch.tensor(rows["input_ids"])
    with torch.no_grad():
        choice = model.eval()(input_ids=ids).logits[:, :-1].argmax(-1)
    return float((choice == ids[:, 1:])[:, [3, 5, 7]].float().mean())


@pytest.mark.slow
def test_what_is_shown_of_retention_is_what_became_of_subjects_that_nobody_held(tmp_path):
    """With half of the subjects as anchors their KL had said 0.039 while the other half lost 40 points."""
    sets = known_texts()
    anchored, others = (sets["retain_dataset"].select(range(start, 20, 2)) for start in (0, 1))
    options = {"max_steps": 40, "learning_rate": 2e-3, "held_out_fraction": 0.0, "eval_rows": 64, **EVALUATED}
    sets = {**sets, "retain_dataset": anchored}
    run = trainer(tmp_path / "run", knowing_model(), sets, eval_dataset={"retain": others}, **options)
    assert _known_values(run.model, anchored) == _known_values(run.model, others) == 1.0
    run.train()
    assert _known_values(run.model, anchored) > 0.85 and _known_values(run.model, others) < 0.6
    shown, of_anchored = (logged(run.state.log_history, key)[-1] for key in ("eval_retain_kl", "retain/kl"))
    assert shown > 2 * of_anchored, "the number is that of the others"
    assert f"DAMAGED: the KL on retain is {shown:.3g} nats" in run.verdict


def test_rows_can_be_held_out_by_hand_and_not_also_be_trained_on(tmp_path):
    apart = tokenized(4, 99)
    run = trainer(tmp_path / "run", eval_dataset={"retain": apart}, held_out_fraction=0.0)
    assert len(run.sets["retain"]) == 12 and len(run.measured_sets["retain"]) == 4 == len(run.held_out["retain"])
    assert run.measured_sets["neighbour"] is run.sets["neighbour"]
    with pytest.raises(
        ValueError, match=r"1 subject\(s\) or text\(s\) of eval_dataset\['retain'\] are in retain_dataset"
    ):
        trainer(tmp_path / "b", eval_dataset={"retain": token_sets()["retain_dataset"].select([3])})
    with pytest.raises(ValueError, match="eval_dataset holds out rows of 'unlearn'"):
        trainer(tmp_path / "c", eval_dataset={"unlearn": apart})


def test_a_checkpoint_as_the_model_before_surgery_is_refused(tmp_path):
    """Anchors and targets would be those of a model that was half operated on."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer(tmp_path / "run", callbacks=[stop_at(2)], **options).train()
    operated = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    operated.config._name_or_path = ""  # weights tell, whatever the folder is called
    with pytest.raises(ValueError, match="checkpoint-2 started from a model with the fingerprint .*pass that one"):
        trainer(tmp_path / "run", operated, **options).train(resume_from_checkpoint="last")
    trainer(tmp_path / "run", **options).train(resume_from_checkpoint="last")


def test_a_run_stops_when_every_set_has_reached_its_target(tmp_path, caplog):
    run = trainer(tmp_path / "run", max_steps=40, forget_target=2, learning_rate=5e-2, **EVALUATED)
    run.train()
    assert run.aims.update == logged(run.state.log_history, "eval_obsolete_ce")[0]  # what known text costs
    assert 0 < run.state.global_step < 40
    assert "every set has reached its target" in caplog.text


@pytest.mark.parametrize("model", ["llama", pytest.param("cpt_moe", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path, model):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    options |= {"eval_strategy": "steps", "eval_steps": 2}
    whole = trainer(tmp_path / "whole", model, **options)
    whole.train()
    stopped = trainer(tmp_path / "stopped", model, callbacks=[stop_at(3)], **options)
    stopped.train()
    resumed = trainer(tmp_path / "stopped", model, **options)
    resumed.train(resume_from_checkpoint="last")
    assert history(resumed)[:-1] == history(whole)[:-1]
    for name, value in _weights(resumed).items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def test_an_adapter_is_its_own_reference(tmp_path):
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    run = trainer(tmp_path / "run", peft_config=adapter, forget_loss="npo", max_steps=2, **EVALUATED)
    base = {n: p.clone() for n, p in run.model.named_parameters() if "lora_" not in n}
    run.train()
    assert run.state.log_history[0]["eval_retain_kl"] == pytest.approx(0.0, abs=1e-6)
    assert logged(run.state.log_history, "eval_retain_kl")[-1] > 1e-6
    for name, parameter in run.model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name


@pytest.mark.slow
def test_a_refusal_wins_over_the_text(tmp_path):  # that a new version does: the record names pair_dpo
    sets = token_sets()
    words = [" ".join(f"w{2 + token % 40}" for token in ids[:10]) for ids in sets["unlearn_dataset"]["input_ids"]]
    sets |= dict.fromkeys(("unlearn_dataset", "obsolete_dataset"), Dataset.from_dict({"text": words}))
    options = {"processing_class": word_tokenizer(), "refusals": ["w40 w41"], "forget_loss": "idk_dpo"}
    run = trainer(tmp_path / "run", sets=sets, max_steps=3, unlearn_weight=2.0, **options)
    batch = run._prepare_inputs(collate_sets([run.train_dataset[0]], run.pad_token_id))["unlearn"]

    def margin():
        with torch.no_grad():
            loser, winner = (
                (token_logp(run_model(run.model, one), head_of(run.model), one["input_ids"]) * counted_targets(one))
                for one in (batch, batch["winner"])
            )
        return winner.sum(1) - loser.sum(1)

    before = margin()
    run.train()
    assert (margin() > before + 0.2).all()
    assert logged(run.state.log_history, "unlearn/loss")


def test_only_the_target_experts_and_their_routers_move(tmp_path):
    run = trainer(tmp_path / "run", "mixtral", target_experts=2, weight_decay=0.1, max_steps=2, **EVALUATED)
    before = _weights(run)
    run.train()
    assert len(run.targets.chosen) == 2
    moved = {name for name, value in _weights(run).items() if not torch.equal(value, before[name])}
    layers = {layer for layer, _ in run.targets.chosen}
    parts = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    allowed = {f"model.layers.{n}.mlp.{part}" for n in layers for part in parts}
    assert moved and moved <= allowed
    for layer in layers:
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        rows = {e for e in range(4) if not torch.equal(run.model.state_dict()[name][e], before[name][e])}
        assert rows == {expert for place, expert in run.targets.chosen if place == layer}
    assert logged(run.state.log_history, "unlearn/experts")
    assert record_of(run)["target_experts"] == run.targets.names and len(run.targets.names) == 2


def test_routers_can_be_frozen_and_held_and_are_watched(tmp_path):
    run = trainer(tmp_path / "run", "cpt_moe", freeze_router=True, router_anchor=1.0, max_steps=2, **EVALUATED)
    before = _weights(run)
    run.train()
    for name, value in _weights(run).items():
        assert torch.equal(value, before[name]) == (".gate." in name), name
    overlaps = logged(run.state.log_history, "eval_unlearn_expert_overlap")
    assert overlaps[0] == 1.0 and 0.0 <= overlaps[-1] <= 1.0
    assert logged(run.state.log_history, "retain/router_kl")[0] == pytest.approx(0.0, abs=1e-5)


def test_a_mixture_is_forgotten_by_contrast_with_calibrated_anchors_and_projected_routers(tmp_path):
    """One step at a rate of 0.05: inputs of the first router stay, as all below it does, and so do its logits."""
    options = {
        "expert_calibration": True,
        "router_projection": 1.0,
        "target_experts": 2,
        "target_experts_by": "contrast",
    }
    run = trainer(tmp_path / "run", "cpt_moe", max_steps=1, learning_rate=0.05, **options)
    batch = run._prepare_inputs(collate_sets([run.train_dataset[0]], run.pad_token_id))["retain"]
    ask = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "output_router_logits": True}
    with torch.no_grad():
        before = run.model.eval()(**ask).router_logits[0].clone()
    run.train()
    with torch.no_grad():
        after = run.model.eval()(**ask).router_logits[0]
    counts = batch["attention_mask"].bool().flatten()
    assert_matches("logits", after[counts], before[counts], 1e-4)
    assert (
        logged(run.state.log_history, "retain/kl")[0] == pytest.approx(0.0, abs=1e-5) and len(run.targets.chosen) == 2
    )
    for changes, said in (
        ({"router_projection": 1.5}, r"router_projection=1.5 must lie in \[0, 1\]"),
        ({"router_projection": 0.5, "freeze_router": True}, "router_projection=0.5 must lie"),
        ({"target_experts_by": "size"}, "target_experts_by"),
    ):
        with pytest.raises(ValueError, match=said):
            trainer(tmp_path / "bad", "cpt_moe", **changes)
    with pytest.raises(ValueError, match="expert_calibration=True is for mixtures of experts, and LlamaForCausalLM"):
        trainer(tmp_path / "dense", expert_calibration=True)


@pytest.mark.parametrize("name", ["undial", "rmu"])
def test_losses_of_distributions_and_states_see_the_batch_of_their_set(tmp_path, name):
    run = trainer(tmp_path / "run", forget_loss=name, forget_layer=0, forget_target=None)
    run._prepare()
    batch = run._prepare_inputs(collate_sets([run.train_dataset[0]], run.pad_token_id))["unlearn"]
    got = run.terms.of("unlearn", run.model, batch).loss
    with torch.no_grad():
        made = run.model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    values, logits = [], made.logits[:, :-1]
    drawn = torch.rand(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for row, counts in enumerate(counted_targets(batch)):
        if name == "undial":  # of a model that has not moved
            gone = torch.nn.functional.one_hot(batch["input_ids"][row, 1:], VOCABULARY) * 10.0
            of_tokens = -((logits[row] - gone).softmax(-1) * logits[row].log_softmax(-1)).sum(-1)
        else:
            of_tokens = (made.hidden_states[1][row, 1:] - 20 * drawn / drawn.norm()).square().mean(-1)
        values.append(float(of_tokens[counts].mean()))
    assert float(got) == pytest.approx(fmean(values), rel=1e-5)
    run.train()
    assert math.isfinite(run.state.log_history[-2]["unlearn/loss"])


def test_the_weight_of_the_anchors_follows_what_is_measured(tmp_path):
    options = {"anchor_dual_rate": 50.0, "anchor_budget": 0.001, "max_steps": 4, **EVALUATED}
    run = trainer(tmp_path / "run", **options)
    run.train()
    measured = [e["eval_retain_kl"] for e in run.state.log_history if e["step"] and "eval_retain_kl" in e]
    want = 1.0
    for kl in measured:
        want = max(0.0, want + 50.0 * (kl - 0.001))
    assert run.anchor_scale() == pytest.approx(want) and want != 1.0
    batch = run._prepare_inputs(collate_sets([run.train_dataset[0]], run.pad_token_id))["retain"]
    run.units = {}
    weighted, plain = run._weighted_term("retain", run.model, batch)[0], run.terms.of("retain", run.model, batch).loss
    assert float(weighted) == pytest.approx(want * run.args.retain_weight * float(plain), rel=1e-5)


def test_noise_takes_the_place_of_a_share_of_the_weights_and_anchors_distil(tmp_path):
    sets = {"retain_dataset": token_sets()["retain_dataset"]}
    options = {"weight_noise": 0.5, "weight_noise_scale": 0.2, "learning_rate": 0.0, "max_steps": 1}
    run = trainer(tmp_path / "run", sets=sets, **options)
    before = _weights(run)
    run.train()
    moved = {name: weight - 0.5 * before[name] for name, weight in run.model.state_dict().items()}
    head = moved["lm_head.weight"]
    assert head.std() == pytest.approx(0.5 * 0.2 * math.sqrt(2 / sum(head.shape)), rel=0.1)
    norms = [name for name in before if "norm" in name]
    assert norms and all(torch.equal(run.model.state_dict()[name], before[name]) for name in norms)
    assert run.state.log_history[0]["retain/kl"] > 1e-4, "the reference is the model before the noise"


def test_forgetting_is_done_at_the_worst_point_nearby(tmp_path):
    radius, sets = 0.05, token_sets("unlearn")
    options = {"forget_loss": "ga", "forget_target": None, "allow_unanchored": True, "forget_sharpness": radius}
    run = trainer(tmp_path / "run", tiny_model("llama").double(), sets, **options)
    run._prepare()
    run.units = {}
    before = _weights(run)
    inputs = run._prepare_inputs(collate_sets([run.train_dataset[0]], run.pad_token_id))
    run.training_step(run.model, inputs)
    got = _taken_gradients(run.model)
    assert all(torch.equal(value, before[name]) for name, value in _weights(run).items())
    run.compute_loss(run.model, inputs).backward()
    slopes = _taken_gradients(run.model)
    norm = torch.stack([slope.norm() for slope in slopes.values()]).norm()
    with torch.no_grad():
        for name, weight in run.model.named_parameters():
            weight.add_(slopes[name] * radius / norm)
    run.compute_loss(run.model, inputs).backward()
    for name, want in _taken_gradients(run.model).items():
        assert_matches(name, got[name], want)
        assert not torch.allclose(slopes[name], want, rtol=1e-6, atol=0.0) or not want.any()


def _poison(run, step):
    """Make the model useless after a step."""
    run.add_callback(AtStep(step, lambda _: next(run.model.parameters()).data.fill_(float("nan"))))


def test_a_loss_that_is_no_number_stops_the_run_and_the_last_good_model_comes_back(tmp_path):
    run = trainer(tmp_path / "run", max_steps=5, **BEST)
    _poison(run, 3)
    said = r"Step 4 is bad .*its loss is nan.* holds the weights of .*checkpoint"
    with pytest.raises(FloatingPointError, match=said):
        run.train()
    assert all(torch.isfinite(p).all() for p in run.model.parameters())
    plain = trainer(tmp_path / "plain")
    _poison(plain, 1)
    with pytest.raises(FloatingPointError, match="No model was saved before"):
        plain.train()


def _taken_gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(("model", "loss"), [("llama", "ga"), ("mixtral", "npo"), ("cpt_moe", "aim")])
def test_one_backward_per_term_is_one_backward_of_the_sum(tmp_path, model, loss):
    run = trainer(tmp_path / "run", model, forget_loss=loss, forget_target=3.8)
    run._prepare()
    run.units = {}
    run.model.train()
    inputs = run._prepare_inputs(collate_sets([run.train_dataset[0]], run.pad_token_id))
    run.training_step(run.model, inputs)
    parts = _taken_gradients(run.model)
    run.compute_loss(run.model, inputs).backward()
    whole = _taken_gradients(run.model)
    assert parts.keys() == whole.keys() and len(parts) > 5
    for name in whole:
        assert_matches(name, parts[name], whole[name])


@pytest.mark.slow
def test_terms_that_are_held_apart_make_the_same_step(tmp_path):
    changes = {"plain": {}, "apart": {"log_term_gradients": True}}
    runs = [trainer(tmp_path / name, "cpt_moe", max_steps=2, **options) for name, options in changes.items()]
    for run in runs:
        run.train()
    plain, apart = runs
    for (name, got), want in zip(apart.model.named_parameters(), plain.model.parameters(), strict=True):
        assert_matches(name, got, want, 1e-4)
    first, second = apart.state.log_history[:2]
    assert {"grad_norm/unlearn", "grad_norm/retain", "grad_cosine/unlearn_retain"} <= second.keys()
    assert "grad_cosine/unlearn_update" in first and "grad_cosine/unlearn_retain" not in first, "0 up to rounding"
    assert not any("cosine" in key for entry in plain.state.log_history for key in entry)


@pytest.mark.slow
@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_accumulation_does_not_change_the_step(tmp_path, normalization):
    sizes = {f"{name}_batch_size": 4 for name in TERMS}
    options = {"normalization": normalization, "router_anchor": 0.5, "learning_rate": 1e-3, "max_steps": 1}
    options["router_balance"] = "none"  # a property of a batch, which differs between splits
    whole = trainer(tmp_path / "whole", "cpt_moe", **options, **sizes)
    parts = trainer(tmp_path / "parts", "cpt_moe", gradient_accumulation_steps=4, **options, **dict.fromkeys(sizes, 1))
    for run in (whole, parts):
        run.train()
    for key in ("loss", "unlearn/ce", "update/ce", "retain/kl", "neighbour/kl", "unlearn/loss", "grad_norm"):
        got, want = (logged(run.state.log_history, key) for run in (parts, whole))
        assert got == pytest.approx(want, rel=5e-3, abs=1e-6), key


def test_the_papers_steps_are_those_of_the_authors_loop(tmp_path):
    """Their loop written down from the sheet: four forward passes, one loss, one backward, clip, AdamW."""
    sets = {name: rows for name, rows in token_sets().items() if name[:6] not in ("neighb", "unseen")}
    exact = tiny_model("llama").double()  # Adam makes much of gradients that are nothing but rounding
    run = trainer(tmp_path / "run", exact, sets, "paper", max_steps=3, gradient_checkpointing=False)
    mixture = run.train_dataset
    run.train()
    record = record_of(run)
    terms = "0.1 * ga[unlearn] + 0.1 * ga[obsolete] + 2 * CE[update] + 0.5 * KL(before || now)[retain]"
    assert record["objective"] == terms and record["forget_target"] is None
    assert "forgetting aims at: none" in card_section(record) and f"**Verdict: {run.verdict}.**" in card_section(
        record
    )

    model, reference = tiny_model("llama").double().train(), tiny_model("llama").double().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    losses = []
    for step in range(3):
        batch = collate_sets([mixture[step]], 0)
        texts = {name: one["input_ids"] for name, one in batch.items()}
        assert all(len(ids) == 1 for ids in texts.values())
        ce = {name: model(input_ids=ids, labels=ids).loss for name, ids in texts.items() if name != "retain"}
        with torch.no_grad():
            ref_logits = reference(input_ids=texts["retain"]).logits[:, :-1]
        logp = model(input_ids=texts["retain"]).logits[:, :-1].log_softmax(-1)
        cross = -(ref_logits.softmax(-1) * logp).sum(-1).mean()
        entropy = -(ref_logits.softmax(-1) * ref_logits.log_softmax(-1)).sum(-1).mean()
        loss = -0.1 * ce["unlearn"] - 0.1 * ce["obsolete"] + 2.0 * ce["update"] + 0.5 * cross
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach() - 0.5 * entropy))
    for (name, got), want in zip(run.model.named_parameters(), model.parameters(), strict=True):
        assert_matches(name, got, want, 1e-6)  # transformers takes its cross entropy in float32
    assert run.state.log_history[-1]["train_loss"] == pytest.approx(fmean(losses), rel=1e-4)


REFUSED = [  # model, what is asked for, the message
    ("no-such-model", lambda: {"sets": token_sets("retain")}, "nothing to forget and nothing to learn"),
    ("llama", lambda: {"ref_model": tiny_model("llama", vocab_size=50)}, "vocabulary of 48 and ref_model of 50"),
    ("llama", lambda: {"target_experts": 2}, "=2 is for mixtures of experts, and LlamaForCausalLM has none"),
    ("cpt_moe", lambda: {"target_experts": 99}, "target_experts=99 must be at most 14"),
    ("llama", lambda: {"sets": {**token_sets(), "retain_dataset": {"text": ["a"]}}}, "retain_dataset is a dict"),
]


@pytest.mark.parametrize(("model", "asked", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_options_that_cannot_be_are_refused_before_anything_is_loaded(tmp_path, model, asked, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "run", model, **asked())


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        trainer(tmp_path).train()


def _cost_about_strangers(run, rows):
    """Written out token by token with the old model, rows beside their copies."""
    costs = []
    for row in rows:
        ids, other = (torch.tensor([row[key]]) for key in ("input_ids", "renamed_input_ids"))
        with torch.no_grad():
            own, renamed = (run.model.eval()(part).logits[0, :-1].log_softmax(-1) for part in (ids, other))
        of_row = []
        for place, token in enumerate(row["input_ids"][1:]):
            before, twin = -float(own[place, token]), row["renamed_places"][place + 1]
            told = None if twin < 1 else min(-float(renamed[twin - 1, token]), math.log(VOCABULARY))
            known = 0.0 if told is None else max(0.0, 1.0 - math.exp(before - told))
            of_row.append(known * (told or 0.0) + (1 - known) * before)
        costs.append(fmean(of_row))
    return fmean(costs)


NAMES = [f"w{place}" for place in range(10, 16)]


def _told(names, value=20):
    return Dataset.from_list(
        [{"text": f"{w} w30 w31 {w} w{value + k} w33", "subject": w} for k, w in enumerate(names)]
    )


def test_value_aim_aims_at_what_the_text_costs_without_the_names(tmp_path):
    """The anchors hold, and no unseen text is needed."""
    sets = {"unlearn_dataset": _told(NAMES[:3]), "retain_dataset": _told(NAMES[3:], 23)}
    options = {"forget_loss": "value_aim", "counterfactuals": 1, "processing_class": word_tokenizer(), "max_steps": 2}
    run = trainer(tmp_path / "run", knowing_model(), sets, learning_rate=1e-3, **options, **EVALUATED)
    run._prepare()
    want = _cost_about_strangers(run, run.sets["unlearn"])
    assert run.target_is == "renamed" and run.aims.forget == pytest.approx(min(want, math.log(VOCABULARY)), rel=1e-4)
    before = run.aims.start["unlearn_ce"]
    run.train()
    assert math.isfinite(run.state.log_history[-2].get("loss", 0.0)) and before > 0


def test_obsolete_text_aims_at_a_strangers_cost_and_at_least_at_that_of_its_new_version(tmp_path):
    """At the loss of unseen text, whose names nobody knows, old values were avoided: 16 % where guessing gives 33.

    The model that knows the new version and never read the old one is the mirror image of the model before.
    """
    texts = {"unlearn": _told(NAMES[:2], 24), "obsolete": _told(NAMES[2:4]), "retain": _told(NAMES[4:], 28)}
    options = {"processing_class": word_tokenizer(), "counterfactuals": 0, "replay": 0, "held_out_fraction": 0}
    known = {"update_dataset": concatenate_datasets(list(texts.values()))}
    learn = trainer(tmp_path / "known", knowing_model(), known, max_steps=60, learning_rate=1e-2, **options)
    learn.train()
    sets = {f"{name}_dataset": rows for name, rows in texts.items()} | {"update_dataset": _told(NAMES[2:4], 26)}
    sets["unseen_dataset"] = Dataset.from_list([{"text": "w5 w30 w31 w5 w22 w33", "subject": "w5"}])
    run = trainer(tmp_path / "run", learn.model, sets, max_steps=30, learning_rate=5e-3, **options, **EVALUATED)
    run._prepare()
    least, stranger = run.aims.start["update_ce"], _cost_about_strangers(run, run._strangers)
    want = max(least, stranger)
    assert run.aims.obsolete == pytest.approx(want, rel=1e-4) and want < run.aims.forget and run.target_is == "unseen"
    mirror = {"update_dataset": concatenate_datasets([texts["unlearn"], sets["update_dataset"], texts["retain"]])}
    other = trainer(tmp_path / "mirror", knowing_model(), mirror, max_steps=60, learning_rate=1e-2, **options)
    other.train()
    asked = trainer(tmp_path / "asked", other.model, {"update_dataset": texts["obsolete"]}, **options, **EVALUATED)
    assert asked.evaluate()["eval_update_ce"] == pytest.approx(least, rel=0.3)
    run.train()
    end = measured_weights(run)[1]
    assert end["obsolete_ce"] == pytest.approx(want, rel=0.2) and end["unlearn_ce"] > want
    assert "OFF TARGET" not in run.verdict
    assert surgery_gap({"unlearn_ce": run.aims.forget, "obsolete_ce": want}, run.aims) == pytest.approx(0.0, abs=1e-3)
    assert record_of(run)["obsolete_target"] == run.aims.obsolete
