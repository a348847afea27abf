"""The trainer against TRL's losses, a computation from full logits, and itself under other references and batches.

Which requests and pairs are refused or dropped before training; meters, and the watch for policies that run away.
"""

import json
import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig, LlavaConfig, T5Config
from trl import DPOConfig, DPOTrainer

from hf_moe_cpt.trainers.rainbowpo import rainbowpo_trainer
from hf_moe_cpt.trainers.rainbowpo.losses import LINKS, Pair, preference_terms
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig
from tests.helpers.cpt_runs import logged
from tests.helpers.preference_runs import pairs, saved_model, settings, trainer, word_tokenizer
from tests.helpers.tiny_models import TEMPLATE, VOCABULARY, tiny_model


def test_means_are_weighted_and_ranges_cover_everything():
    meter = rainbowpo_trainer.PreferenceMeter()
    meter.add({"a": (torch.tensor(6.0), 3), "b": (torch.tensor(1.0), torch.tensor(4))})
    meter.add({"a": (torch.tensor(4.0), 1), "b": (torch.tensor(2.0), torch.tensor(2))})
    meter.add_range("phi", torch.tensor([1.0, 0.5]))
    meter.add_range("phi", torch.tensor([2.0, 0.7]))
    assert meter.pop() == {"a": 2.5, "b": 0.5, "phi/min": 0.5, "phi/max": 2.0}
    assert meter.pop() == {}


def _accuracy(differences: list[float], reference: bool = True) -> float:
    """Of chosen sequences that became likelier than in the reference by so many nats, all of -100 nats before."""
    before = torch.full((len(differences),), -100.0)
    logps, lengths = Pair(before + torch.tensor(differences), before), Pair(*[torch.full_like(before, 20.0)] * 2)
    ref_logps = Pair(before, before) if reference else None
    options = {"beta": 0.1, "mixing_alpha": 0.0, "mix_home_advantage": False, "length_normalization": False}
    options |= {"link": "logistic", "label_smoothing": 0.0, "sft_weight": 0.0}
    terms = preference_terms(logps, lengths, ref_logps, 0.0, 1.0, **options)
    total, number = rainbowpo_trainer.pair_statistics(terms, logps, ref_logps, lengths, 0.1, False)[
        "rewards/accuracies"
    ]
    return total.item() / number


def test_a_pair_that_rounding_ranks_is_half_a_hit():
    assert _accuracy([0.0, 0.0]) == _accuracy([1e-5, 1e-5]) == _accuracy([-1e-5, 0.0]) == 0.5
    assert _accuracy([1e-2, 1.0]) == 1.0 and _accuracy([-1e-2, -1.0]) == 0.0 and _accuracy([0.0, 0.1]) == 0.75
    assert _accuracy([1e-2], reference=False) == 1.0 and _accuracy([1e-5], reference=False) == 0.5


def _log(chosen: float, preferred: float = 10.0) -> dict[str, float]:
    return {"logps_norm/chosen": chosen, "length/preferred": preferred, "length/chosen": 10.0}


@pytest.mark.parametrize(
    "log, message", [(_log(-2.5), "Lower the learning rate"), (_log(-1.0, 14.0), "raise beta")], ids=["fall", "length"]
)
def test_what_runs_away_is_said_once_with_a_remedy(log, message):
    watch = rainbowpo_trainer.RunawayWatch()
    watch.start = {"chosen": -1.0, "length": 1.0}
    assert [watch.look(_log(-1.0 - 0.01 * step)) for step in range(20)] == [[]] * 20  # a steady run is left in peace
    assert watch.look({"loss": 1.0}) == []
    said = [warning for _ in range(rainbowpo_trainer.WINDOW + 2) for warning in watch.look(log)]
    assert len(said) == 1 and message in said[0]


def test_a_fall_before_the_first_log_is_measured_from_the_first_step(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = trainer(tmp_path, learning_rate=0.5, max_steps=4, logging_steps=2, dispersion_scale=1.0)
        before = run.compute_loss(run.model.eval(), next(iter(run.get_train_dataloader())), True)[1]
        run.train()
    start = (before.logps[:, 0] / before.lengths[:, 0]).mean().item()
    assert run.runaway_watch.start["chosen"] == pytest.approx(start, rel=1e-5)
    assert f"fell from {start:.2f} to" in caplog.text
    run._save(str(tmp_path))
    assert json.loads((tmp_path / "rainbowpo.json").read_text())["start"] == run.runaway_watch.start


def test_a_model_is_in_evaluation_for_a_while_and_then_as_it_was():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)))
    model.train()
    model[1][0].eval()
    before, ones = [module.training for module in model.modules()], torch.ones(64)
    with pytest.raises(KeyError), rainbowpo_trainer.in_evaluation(model):
        assert not any(module.training for module in model.modules())
        assert torch.equal(model[1](ones), ones)
        raise KeyError
    assert [module.training for module in model.modules()] == before
    assert not torch.equal(model[1](ones), ones)


def _conversation(words: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": words}, {"role": "assistant", "content": answer}]


def test_a_text_prompt_beside_messages_is_taken_from_the_messages(tmp_path):
    """As the released preference sets have it."""
    said = [("w3 w4", "w5 w6", "w7"), ("w8", "w9 w10 w11", "w12 w13"), ("w14", "w15", "w16 w17")]
    rows = [{"prompt": p, "chosen": _conversation(p, c), "rejected": _conversation(p, r)} for p, c, r in said]
    published = Dataset.from_list(rows)
    bare = published.remove_columns("prompt")
    tokenised = [trainer(tmp_path, data=data).train_dataset for data in (published, bare)]
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert tokenised[0][column][:] == tokenised[1][column][:]
    tokenizer = word_tokenizer()
    assert tokenizer.decode(tokenised[0]["prompt_ids"][0]).split() == ["u", "w3", "w4", "</s>", "a"]
    assert tokenizer.decode(tokenised[0]["chosen_ids"][0]).split() == ["w5", "w6", "</s>"]


def test_pairs_that_teach_nothing_also_after_the_cut_are_dropped_and_counted(tmp_path, caplog):
    rows = pairs(3).to_list()
    rows += [{"prompt": "w3 ", "chosen": "w4", "rejected": "w4"}, {"prompt": "w3 ", "chosen": "", "rejected": "w4"}]
    with caplog.at_level(logging.WARNING):
        run = trainer(tmp_path, data=Dataset.from_list(rows))
    assert len(run.train_dataset) == 3
    assert "Dropped 2 of 5 pairs of the train data set: 1 with identical completions, 1 with an empty" in caplog.text
    bad = Dataset.from_list([{"chosen_ids": [4, 0], "rejected_ids": [4, 0]}])
    with pytest.raises(ValueError, match="No pair of the x data set can teach anything: 1 pairs, 1 with identical"):
        rainbowpo_trainer.drop_empty_pairs(bad, word_tokenizer(), None, "x")
    rows = [
        {"prompt": "w3 ", "chosen": "w4 w5 w6 w7", "rejected": "w4 w5 w6 w8"},
        {"prompt": "w3 ", "chosen": "w4 w5 w6", "rejected": "w4 w9"},
        {"prompt": "w3 w4 w5 w6 ", "chosen": "w4", "rejected": "w9"},
    ]
    with caplog.at_level(logging.WARNING):
        run = trainer(tmp_path, data=Dataset.from_list(rows), max_length=4)
    assert len(run.train_dataset) == 1
    assert "Dropped 2 of 3 pairs" in caplog.text
    assert "1 with identical completions, 0 with an empty one, 1 whose prompt alone fills max_length." in caplog.text
    assert len(trainer(tmp_path, data=Dataset.from_list(rows), max_length=4, truncation_mode="keep_end").train_dataset)
    with pytest.raises(ValueError, match="No pair .*: 3 pairs, 0 with .*, 3 whose prompt alone fills max_length"):
        trainer(tmp_path, data=Dataset.from_list(rows), max_length=1)


@pytest.mark.parametrize("has_prompt", [True, False])
def test_an_empty_answer_is_seen_behind_what_a_template_writes_after_it(tmp_path, caplog, has_prompt):
    """Templates go on after the end of the text, with a line break for one, so tokens alone do not show it."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("</s> {% endfor", "</s> w2 {% endfor")
    rows = []
    for answers in (("w4 w5", "w6"), (" ", "w6"), ("w7", ""), ("w8", "w8")):
        chosen, rejected = (_conversation("w3", answer) for answer in answers)
        row = {"chosen": chosen, "rejected": rejected}
        rows.append({"prompt": chosen[:1], **{k: v[1:] for k, v in row.items()}} if has_prompt else row)
    with caplog.at_level(logging.WARNING):
        run = trainer(tmp_path, data=Dataset.from_list(rows), processing_class=tokenizer)
    assert len(run.train_dataset) == 1
    assert "Dropped 3 of 4 pairs of the train data set: 1 with identical completions, 2 with an empty" in caplog.text


def test_a_call_of_a_tool_is_no_empty_answer(tmp_path):
    call = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "w9"}}]}]
    row = {"prompt": [{"role": "user", "content": "w3"}], "chosen": call}
    row["rejected"] = [{"role": "assistant", "content": "w4", "tool_calls": None}]
    tokenizer = word_tokenizer()
    content, calls = "{{ message['content'] }}", "{% for c in message['tool_calls'] or [] %}w5 {% endfor %}"
    tokenizer.chat_template = TEMPLATE.replace(content, f"{content} {calls}")
    assert len(trainer(tmp_path, data=Dataset.from_list([row]), processing_class=tokenizer).train_dataset) == 1


def test_pairs_of_a_stream_are_dropped_and_counted_as_they_pass(tmp_path, caplog):
    same = {"prompt": "w3 ", "chosen": "w4", "rejected": "w4"}
    rows = pairs(4).to_list() + [same] * 12 + pairs(4, seed=1).to_list()
    run = trainer(tmp_path, data=Dataset.from_list(rows).to_iterable_dataset(), dispersion_scale=1.0)
    with caplog.at_level(logging.WARNING):
        assert len(list(run.train_dataset)) == 8
    said = [record.getMessage() for record in caplog.records if "stream" in record.getMessage()]
    assert [message.split(" pair")[0] for message in said] == ["Dropped 1", "Dropped 10"]


def _without_eos():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


IMAGES = Dataset.from_list([{"prompt": "w2 ", "chosen": "w3", "rejected": "w4", "image": "x.png"}])
MESSAGES = [{"role": "user", "content": "w3"}]
MIXED = Dataset.from_list([{"prompt": MESSAGES, "chosen": "w4", "rejected": "w5"}])
BARE = Dataset.from_list([{"prompt": "w3", "chosen": MESSAGES[0], "rejected": MESSAGES[0]}])
SCORED = pairs(4, scores=True)
BY_SCORE = {"home_advantage_from": "score"}
IN_WORDS = SCORED.map(lambda row: {"score_chosen": "good"})
MISSING = SCORED.map(lambda row, index: {"score_rejected": None if index == 2 else 0.5}, with_indices=True)
EQUAL = SCORED.map(lambda row: {"score_rejected": row["score_chosen"]})
WRONG = "scores in the column score_{} of the train data set are no numbers, the first {} in row {}"
REFUSED = {
    "no rows": ({"data": pairs(2).select([])}, "The train data set has no rows: give at least one pair"),
    "no rows to evaluate": ({"eval_dataset": pairs(2).select([])}, "The eval data set has no rows"),
    "half a pair": (
        {"data": pairs(2).remove_columns("rejected")},
        "needs a column 'rejected', and the train data set",
    ),
    "messages before text": ({"data": MIXED}, r"\(prompt: messages, chosen: text, rejected: text\): make all"),
    "one message for a list": ({"data": BARE}, "chosen: dict, rejected: dict"),
    "scores in words": ({**BY_SCORE, "data": IN_WORDS}, f"4 of 4 {WRONG.format('chosen', repr('good'), 0)}"),
    "a score is missing": ({**BY_SCORE, "data": MISSING}, f"1 of 4 {WRONG.format('rejected', None, 2)}"),
    "no scores": (BY_SCORE, r"needs the column\(s\) score_chosen, score_rejected in the train"),
    "no logarithm": ({**BY_SCORE, "score_transform": "log", "data": EQUAL}, "4 of 4 pairs have scores that give no"),
    "no end of text": ({"processing_class": _without_eos()}, "tokenizer has no end-of-text token"),
    "images": ({"data": IMAGES}, "takes language models and text, not images"),
    "no pair to calibrate on": (
        {"model": tiny_model("llama")},
        "this model was never saved: pass ref_model or peft_config, set precompute_ref_log_probs",
    ),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_wrong_requests_are_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        trainer(tmp_path, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "tokenizer has no end-of-text token, so completions could not end"),
        ({"processing_class": word_tokenizer(), "compute_metrics": len}, "needs logits, which are never formed"),
    ],
    ids=["the tokenizer of the model", "logits"],
)
def test_what_the_trainer_is_given_itself_is_checked_too(tmp_path, given, message):
    folder = saved_model(tmp_path)
    _without_eos().save_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        rainbowpo_trainer.RainbowPOTrainer(
            folder, args=RainbowPOConfig(**settings(tmp_path / "run")), train_dataset=pairs(4), **given
        )


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SEES = LlavaConfig(
    text_config=LlamaConfig(vocab_size=VOCABULARY, **SMALL),
    vision_config=CLIPVisionConfig(image_size=8, patch_size=4, **SMALL),
)
ENCODES = T5Config(vocab_size=VOCABULARY, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
OTHER_MODELS = {
    "a vision model": (SEES, "takes language models and text, not images: use trl.DPOTrainer"),
    "an encoder and a decoder": (ENCODES, "A t5 model has an encoder: RainbowPOTrainer takes causal language models"),
}


@pytest.mark.parametrize("config, message", OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_other_models_are_refused_by_name_before_they_are_loaded(tmp_path, config, message):
    config.save_pretrained(tmp_path / "model")  # no weights, so loading it would fail otherwise
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, str(tmp_path / "model"))


@pytest.mark.slow
def test_a_model_that_was_never_saved_trains_where_no_copy_is_needed(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    for changes in ({"preset": "simpo"}, {"precompute_ref_log_probs": True}, {"peft_config": lora}):
        trainer(tmp_path, tiny_model("llama"), max_steps=1, **changes).train()


def _moved(model, seed: int = 1) -> None:
    """Change a policy, so that it differs from its reference, in the same way at every call."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def _batch(run, rows: int = 4) -> dict[str, torch.Tensor]:
    names = {"prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"}
    data = [{k: v for k, v in row.items() if k in names or k.startswith("score")} for row in run.train_dataset]
    return run.data_collator(data[:rows])


def _loss_and_gradient(run, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    run.model.train()
    run.model.zero_grad()
    loss = run.compute_loss(run.model, _batch(run, rows))
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])


PARITY = {  # preset -> TRL's loss, its beta, factor of the loss
    "ln-dpo": ("sigmoid_norm", 10.0, 1.0),
    "dpo": ("sigmoid", 0.1, 1.0),
    "ipo": ("ipo", 0.7, 0.7**2),
}


@pytest.mark.parametrize(
    "preset, kind",
    [
        ("dpo", "mixtral"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("ln-dpo", "llama"), ("ipo", "mixtral"))),
    ],
)
def test_the_presets_that_trl_has_are_trls(tmp_path, preset, kind):
    loss_type, beta, factor = PARITY[preset]
    args = DPOConfig(**settings(tmp_path / "trl"), loss_type=[loss_type], beta=beta)
    model, shared = saved_model(tmp_path, kind), {"train_dataset": pairs(16), "processing_class": word_tokenizer()}
    theirs = DPOTrainer(model, args=args, **shared)
    ours = trainer(tmp_path, model, preset=preset, beta=beta, router_balance="none")
    theirs.aux_loss_enabled = False  # a penalty of another form
    for run in (theirs, ours):
        _moved(run.model)
    (want, want_gradient), (got, gradient) = _loss_and_gradient(theirs), _loss_and_gradient(ours)
    assert got == pytest.approx(factor * want.item(), rel=1e-6)
    torch.testing.assert_close(gradient, factor * want_gradient, rtol=1e-5, atol=1e-6)


def _from_full_logits(model, batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities (2B, S - 1) of the tokens, entropies and mask, in float64, from the whole logits."""
    logits = model.double()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    logp = functional.log_softmax(logits, dim=-1)
    tokens = logp.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return tokens, -(logp.exp() * logp).sum(-1), batch["completion_mask"][:, 1:].double()


def _expected(run, batch) -> float:
    """The objective as it is printed, from two fresh copies of the model and full logits."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(run.model.config._name_or_path) for _ in range(2))
    policy.load_state_dict(run.model.state_dict())
    args = run.args
    tokens, _, mask = _from_full_logits(policy, batch)
    ref_tokens, entropies, _ = _from_full_logits(reference, batch)
    length = mask.sum(1)
    of, ref = (
        (values * mask).sum(1) / (length if args.length_normalization else 1) for values in (tokens, ref_tokens)
    )
    entropy = ((entropies * mask).sum(1) / length / torch.tensor(float(VOCABULARY)).double().log()).view(2, -1).mean(0)
    phi = -run.dispersion_scale * entropy.log() if args.contextual_scaling == "mallows" else 1.0
    policy_gap, reference_gap = (values.view(2, -1)[0] - values.view(2, -1)[1] for values in (of, ref))
    margin = policy_gap - args.mixing_alpha * reference_gap - (1 - args.mixing_alpha) * args.home_advantage
    return LINKS[args.link](args.beta * phi * margin).mean().item()


REFERENCES = [(0.25, "mallows"), (0.0, "mallows"), (1.0, "none"), (0.0, "none")]
# Every use of the reference; links and the other switches are tested where the loss is
COMBINATIONS = [("logistic", True, *one) for one in REFERENCES] + [("cauchy", False, *REFERENCES[0])]


@pytest.mark.parametrize("link, length_normalization, alpha, scaling", COMBINATIONS)
def test_loss_is_that_of_the_full_logits(tmp_path, link, length_normalization, alpha, scaling):
    switches = {"mixing_alpha": alpha, "contextual_scaling": scaling, "length_normalization": length_normalization}
    run = trainer(tmp_path, link=link, beta=2.0 if length_normalization else 0.2, **switches)
    run._calibrate()
    _moved(run.model)
    run.model.train()
    got = run.compute_loss(run.model, _batch(run)).item()
    assert got == pytest.approx(_expected(run, _batch(run)), rel=2e-5)


def test_no_reference_is_loaded_or_asked_where_none_is_used(tmp_path):
    run = trainer(tmp_path, preset="simpo")
    assert run.ref_model is None
    calls = []
    run.model.register_forward_hook(lambda *_: calls.append(1))
    run.model.train()
    run.compute_loss(run.model, _batch(run))
    assert len(calls) == 1


def test_every_kind_of_reference_gives_the_same_losses(tmp_path):
    path, runs = saved_model(tmp_path), {}
    kinds = {
        "plain": {},
        "cached": {
            "precompute_ref_log_probs": True,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
        },
        "explicit": {"ref_model": AutoModelForCausalLM.from_pretrained(path)},
    }
    for name, changes in kinds.items():
        runs[name] = trainer(tmp_path / name, path, **changes)
        runs[name].train()
    losses = {name: logged(run.state.log_history, "loss") for name, run in runs.items()}
    assert len(losses["plain"]) == 2 and losses["plain"][0] != losses["plain"][1]
    for name in kinds:
        assert losses[name] == pytest.approx(losses["plain"], rel=1e-5), name
    assert runs["explicit"].dispersion_scale == pytest.approx(runs["plain"].dispersion_scale, rel=1e-6)
    assert runs["cached"].ref_model is None
    again = trainer(tmp_path / "again", path, precompute_ref_log_probs=True)
    assert again.train_dataset["ref_chosen_logps"][:] == runs["cached"].train_dataset["ref_chosen_logps"][:]


def test_an_adapter_is_switched_off_for_the_reference(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = trainer(tmp_path / "a", saved_model(tmp_path), peft_config=lora)
    assert adapted.ref_model is None
    _moved(adapted.model)
    full = trainer(tmp_path / "b", adapted.model.get_base_model().config._name_or_path)
    batch = _batch(adapted)
    reference = [run.compute_ref_log_probs(run.ref_model or run.model, _batch(run)) for run in (adapted, full)]
    torch.testing.assert_close(reference[0], reference[1])
    for run in (adapted, full):
        run._calibrate()
    merged = adapted.model.merge_and_unload(safe_merge=True)
    full.model.load_state_dict(merged.state_dict())
    full.model.train()
    merged_loss = full.compute_loss(full.model, batch).item()
    again = trainer(tmp_path / "c", saved_model(tmp_path), peft_config=lora)
    _moved(again.model)
    again._calibrate()
    again.model.train()
    assert again.compute_loss(again.model, batch).item() == pytest.approx(merged_loss, rel=1e-5)


def test_router_penalty_enters_once_and_outside_of_the_link(tmp_path):
    path = saved_model(tmp_path, "mixtral", output_router_logits=True)
    run = {coef: trainer(tmp_path, path, router_aux_loss_coef=coef) for coef in (0.0, 0.5)}  # 0: none
    loss = {}
    for coef, each in run.items():
        each._calibrate()
        each.model.train()
        loss[coef] = each.compute_loss(each.model, _batch(each)).item()
    measured = run[0.5].meters["train"].pop() | run[0.5].balance.pop()
    assert loss[0.5] - loss[0.0] == pytest.approx(0.5 * measured["aux_loss"], rel=1e-4)
    assert measured["loss/preference"] + measured["loss/aux"] == pytest.approx(loss[0.5], rel=1e-6)
    assert measured["aux_loss"] > 0
    run[0.5].model.eval()
    without = run[0.5].compute_loss(run[0.5].model, _batch(run[0.5])).item()
    assert without == pytest.approx(loss[0.0], rel=1e-5)  # never in the evaluation loss


@pytest.mark.parametrize("padding_free", [False, True])
def test_routers_are_compared_with_those_of_the_start(tmp_path, padding_free):
    saturation = {}
    for rate in (0.0, 0.3):
        model = tiny_model("mixtral")
        changes = {"router_probe_pairs": 4, "max_steps": 3, "learning_rate": rate, "padding_free": padding_free}
        run = trainer(tmp_path / f"{rate}", model, preset="cpo", **changes)
        run.train()
        saturation[rate] = [entry["router_saturation"] for entry in run.state.log_history if "loss" in entry]
    assert saturation[0.0] == [1.0] * 3
    assert saturation[0.3][-1] < 1.0 and f"{saturation[0.3][-1]:.3f} of" in run.run_details()["router_saturation"]


def test_calibration_makes_phi_one_on_the_training_pairs_and_is_kept(tmp_path):
    run = trainer(tmp_path, saved_model(tmp_path), max_steps=4, save_strategy="steps", save_steps=2)
    run.train()
    phi = [entry["phi/mean"] for entry in run.state.log_history if "phi/mean" in entry]
    assert len(phi) == 4  # one epoch of 16 pairs
    assert sum(phi) / 4 == pytest.approx(1.0, rel=1e-5)
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"Scale of phi: {run.dispersion_scale:.4g}" in card

    checkpoint = tmp_path / "run" / "checkpoint-2"
    resumed = trainer(tmp_path, saved_model(tmp_path), pairs(16), max_steps=4, dispersion_scale="auto")
    resumed.compute_ref_log_probs = None  # calibrating again would need it; so does the loss
    with pytest.raises(TypeError):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.dispersion_scale == run.dispersion_scale
    whole = trainer(tmp_path, saved_model(tmp_path), max_steps=4)
    whole.train(resume_from_checkpoint=str(checkpoint))
    assert logged(whole.state.log_history, "loss") == pytest.approx(logged(run.state.log_history, "loss"), rel=1e-6)


def test_scores_and_lengths_are_home_advantages(tmp_path):
    data = pairs(16, scores=True)
    by_score = {"home_advantage": 2.0, "score_transform": "identity"}
    odpo = trainer(tmp_path, data=data, preset="odpo", beta=0.5, max_steps=1, **by_score)
    rdpo = trainer(tmp_path, data=data, preset="r-dpo", beta=0.5, max_steps=1, home_advantage=0.1)
    dpo = trainer(tmp_path, data=data, preset="dpo", beta=0.5, max_steps=1)
    for run in (odpo, rdpo, dpo):
        run.train()
    # At the first step policy and reference agree, so the margin is the advantage alone.
    first = next(iter(dpo.get_train_dataloader()))
    margin = {name: run.state.log_history[0]["margin/effective"] for name, run in (("odpo", odpo), ("rdpo", rdpo))}
    length = first["completion_mask"].sum(1).view(2, -1).double()
    assert dpo.state.log_history[0]["margin/effective"] == pytest.approx(0.0, abs=1e-5)
    assert margin["rdpo"] == pytest.approx(0.1 * (length[0] - length[1]).mean().item(), rel=1e-4)
    scores = next(iter(odpo.get_train_dataloader()))["scores"]
    assert scores.shape == (4, 2) and scores[:, 1].tolist() == pytest.approx([0.3] * 4)
    assert margin["odpo"] == pytest.approx(-2.0 * (scores[:, 0] - scores[:, 1]).mean().item(), rel=1e-4)


def test_evaluation_reports_under_its_own_names(tmp_path):
    run = trainer(tmp_path, saved_model(tmp_path), eval_dataset={"a": pairs(6, seed=1), "b": pairs(6, seed=2)})
    metrics = run.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_a_rewards/margins", "eval_b_phi/mean"} <= metrics.keys()
    assert metrics["eval_a_loss"] == pytest.approx(metrics["eval_a_loss/preference"], rel=1e-5)


UNUSED = {"ref_model": tiny_model("llama"), "precompute_ref_log_probs": True, "sync_ref_model": True}


@pytest.mark.parametrize("name", UNUSED)
def test_a_reference_without_use_is_said_and_not_kept(tmp_path, caplog, name):
    """So that a sweep over mixing_alpha can end at 0."""
    with caplog.at_level(logging.WARNING):
        run = trainer(tmp_path, preset="simpo", max_steps=1, **{name: UNUSED[name]})
        run.train()
    assert f"{name} has no effect: mixing_alpha=0 and contextual_scaling='none' use no reference" in caplog.text
    assert run.ref_model is None and "ref_chosen_logps" not in run.train_dataset.column_names


def test_a_uniform_reference_is_refused_before_training(tmp_path):
    model = tiny_model("llama")
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    model.save_pretrained(tmp_path / "uniform")
    with pytest.raises(ValueError, match="dispersion_scale cannot be calibrated on entropies in"):
        trainer(tmp_path, str(tmp_path / "uniform"))


@pytest.mark.parametrize("kind", [pytest.param("llama", marks=pytest.mark.slow), "mixtral"])
def test_an_update_is_the_mean_over_its_pairs_however_they_are_dealt(tmp_path, kind):
    """Five pairs at once, and as micro-batches of two, two and one: TRL's mean of means moves 31 % away."""
    weights, logs = [], []
    for size, parts in ((5, 1), (2, 3)):
        run = trainer(
            tmp_path / str(size),
            saved_model(tmp_path, kind),
            pairs(5),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=1.0,
            load_scope="rank" if kind == "mixtral" else None,
            router_aux_loss_coef=0.0,
            dispersion_scale=1.0,
        )
        run.train()
        start = AutoModelForCausalLM.from_pretrained(saved_model(tmp_path, kind))
        moved = [after - before for after, before in zip(run.model.parameters(), start.parameters(), strict=True)]
        weights.append(torch.cat([one.detach().flatten() for one in moved]))
        logs.append(run.state.log_history[0])
    assert (weights[1] - weights[0]).norm() < 1e-4 * weights[0].norm()
    for name in ("loss", "loss/preference", "rewards/margins", "logps/chosen", "phi/mean"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-4), name


@pytest.mark.slow
def test_a_compiled_model_is_its_own_reference_and_has_one(tmp_path):
    """Both were asked whether they are true, which torch's compiled modules do not say."""
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "preset": "rainbowpo"}
    plain, run = trainer(tmp_path / "plain", preset="rainbowpo"), trainer(tmp_path / "compiled", **compiled)
    assert run.train().training_loss == pytest.approx(plain.train().training_loss, rel=1e-4)
