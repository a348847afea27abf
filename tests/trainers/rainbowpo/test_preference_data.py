"""Which requests and pairs are refused or dropped before training, and what the collator adds."""

import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig, LlavaConfig, T5Config

from hf_moe_cpt.trainers.rainbowpo.preference_data import drop_empty_pairs, without_text_prompt
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_trainer import RainbowPOTrainer
from tests.helpers.preference_runs import TEMPLATE, pairs, saved_model, settings, trainer, word_tokenizer
from tests.helpers.tiny_models import VOCABULARY, tiny_model


def _conversation(words: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": words}, {"role": "assistant", "content": answer}]


CONVERSATIONS = [("w3 w4", "w5 w6", "w7"), ("w8", "w9 w10 w11", "w12 w13"), ("w14", "w15", "w16 w17")]


def _published(with_prompt: bool) -> Dataset:
    """A text prompt beside lists of messages, as the released preference sets have it."""
    rows = [
        {"chosen": _conversation(p, c), "rejected": _conversation(p, r)} | ({"prompt": p} if with_prompt else {})
        for p, c, r in CONVERSATIONS
    ]
    return Dataset.from_list(rows)


def test_a_text_prompt_beside_messages_is_taken_from_the_messages(tmp_path):
    assert "prompt" not in without_text_prompt(_published(True)).column_names
    assert "prompt" in without_text_prompt(pairs(2)).column_names
    model = saved_model(tmp_path)
    tokenised = [trainer(tmp_path, model, _published(has)).train_dataset for has in (True, False)]
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert tokenised[0][column][:] == tokenised[1][column][:]
    tokenizer = word_tokenizer()
    assert tokenizer.decode(tokenised[0]["prompt_ids"][0]).split() == ["u", "w3", "w4", "</s>", "a"]
    assert tokenizer.decode(tokenised[0]["chosen_ids"][0]).split() == ["w5", "w6", "</s>"]


def test_pairs_that_teach_nothing_are_dropped_and_counted(tmp_path, caplog):
    rows = pairs(3).to_list()
    rows += [{"prompt": "w3 ", "chosen": "w4", "rejected": "w4"}, {"prompt": "w3 ", "chosen": "", "rejected": "w4"}]
    with caplog.at_level(logging.WARNING):
        run = trainer(tmp_path, data=Dataset.from_list(rows))
    assert len(run.train_dataset) == 3
    assert (
        "Dropped 2 of 5 pairs of the train data set: 1 with identical completions, 1 with an empty one." in caplog.text
    )
    bad = Dataset.from_list([{"chosen_ids": [4, 0], "rejected_ids": [4, 0]}])
    with pytest.raises(ValueError, match="No pair of the x data set can teach anything: 1 pairs, 1 with identical"):
        drop_empty_pairs(bad, word_tokenizer(), None, "x")


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
    tokenizer.chat_template = TEMPLATE.replace(
        "{{ message['content'] }}",
        "{{ message['content'] }} {% for c in message['tool_calls'] or [] %}w5 {% endfor %}",
    )
    assert len(trainer(tmp_path, data=Dataset.from_list([row]), processing_class=tokenizer).train_dataset) == 1


def test_what_is_equal_or_gone_after_the_cut_is_dropped(tmp_path, caplog):
    rows = [
        {"prompt": "w3 ", "chosen": "w4 w5 w6 w7", "rejected": "w4 w5 w6 w8"},
        {"prompt": "w3 ", "chosen": "w4 w5 w6", "rejected": "w4 w9"},
        {"prompt": "w3 w4 w5 w6 ", "chosen": "w4", "rejected": "w9"},
    ]
    with caplog.at_level(logging.WARNING):
        run = trainer(tmp_path, data=Dataset.from_list(rows), max_length=4)
    assert len(run.train_dataset) == 1
    assert (
        "Dropped 2 of 3 pairs of the train data set: 1 with identical completions, 0 with an empty one, "
        "1 whose prompt alone fills max_length." in caplog.text
    )
    assert len(trainer(tmp_path, data=Dataset.from_list(rows), max_length=4, truncation_mode="keep_end").train_dataset)
    with pytest.raises(ValueError, match="No pair .*: 3 pairs, 0 with .*, 3 whose prompt alone fills max_length"):
        trainer(tmp_path, data=Dataset.from_list(rows), max_length=1)


def test_pairs_of_a_stream_are_dropped_and_counted_as_they_pass(tmp_path, caplog):
    same = {"prompt": "w3 ", "chosen": "w4", "rejected": "w4"}
    rows = pairs(4).to_list() + [same] * 12 + pairs(4, seed=1).to_list()
    run = trainer(tmp_path, data=Dataset.from_list(rows).to_iterable_dataset(), dispersion_scale=1.0)
    with caplog.at_level(logging.WARNING):
        assert len(list(run.train_dataset)) == 8
    said = [record.getMessage() for record in caplog.records if "stream" in record.getMessage()]
    assert [message.split(" pair")[0] for message in said] == ["Dropped 1", "Dropped 10"]


def test_scores_reach_the_batch(tmp_path):
    run = trainer(tmp_path, data=pairs(16, scores=True), home_advantage_from="score", home_advantage=0.1)
    batch = next(iter(run.get_train_dataloader()))
    assert batch["scores"].shape == (4, 2) and batch["scores"].dtype == torch.float32
    assert batch["scores"][:, 1].tolist() == pytest.approx([0.3] * 4)


def _without_eos():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


def _with_images() -> Dataset:
    return Dataset.from_list([{"prompt": "w2 ", "chosen": "w3", "rejected": "w4", "image": "x.png"}])


MESSAGES = [{"role": "user", "content": "w3"}]
REFUSED = {
    "no rows": ({"data": pairs(2).select([])}, "The train data set has no rows: give at least one pair"),
    "no rows to evaluate": ({"eval_dataset": pairs(2).select([])}, "The eval data set has no rows"),
    "half a pair": (
        {"data": pairs(2).remove_columns("rejected")},
        "needs a column 'rejected', and the train data set has prompt, chosen",
    ),
    "messages before text": (
        {"data": Dataset.from_list([{"prompt": MESSAGES, "chosen": "w4", "rejected": "w5"}])},
        r"do not go together \(prompt: messages, chosen: text, rejected: text\): make all of them text, or",
    ),
    "one message for a list": (
        {"data": Dataset.from_list([{"prompt": "w3", "chosen": MESSAGES[0], "rejected": MESSAGES[0]}])},
        "chosen: dict, rejected: dict",
    ),
    "scores in words": (
        {"home_advantage_from": "score", "data": pairs(4, scores=True).map(lambda row: {"score_chosen": "good"})},
        "4 of 4 scores in the column score_chosen of the train data set are no numbers, the first 'good' in row 0",
    ),
    "a score is missing": (
        {
            "home_advantage_from": "score",
            "data": pairs(4, scores=True).map(
                lambda row, index: {"score_rejected": None if index == 2 else 0.5}, with_indices=True
            ),
        },
        "1 of 4 scores in the column score_rejected of the train data set are no numbers, the first None in row 2",
    ),
    "no scores": (
        {"home_advantage_from": "score"},
        r"needs the column\(s\) score_chosen, score_rejected in the train",
    ),
    "scores that have no logarithm": (
        {"home_advantage_from": "score", "score_transform": "log", "data": "equal scores"},
        "16 of 16 pairs have scores that give no home advantage",
    ),
    "no end of text": ({"processing_class": _without_eos()}, "tokenizer has no end-of-text token"),
    "images": ({"data": _with_images()}, "takes language models and text, not images"),
    "a reference without use": (
        {"preset": "simpo", "ref_model": "itself"},
        "ref_model is set, but mixing_alpha=0 and contextual_scaling='none' use no reference",
    ),
    "columns without use": (
        {"preset": "simpo", "precompute_ref_log_probs": True},
        "precompute_ref_log_probs is set, but",
    ),
    "no pair to calibrate on": (
        {"model": "never saved"},
        "this model was never saved: pass ref_model or peft_config, set precompute_ref_log_probs",
    ),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_wrong_requests_are_refused_in_one_line(tmp_path, changes, message):
    changes = dict(changes)
    if changes.get("data") == "equal scores":
        changes["data"] = pairs(16, scores=True).map(lambda row: {"score_rejected": row["score_chosen"]})
    if changes.get("ref_model") == "itself":
        changes["ref_model"] = AutoModelForCausalLM.from_pretrained(saved_model(tmp_path))
    if changes.get("model") == "never saved":
        changes["model"] = tiny_model("llama")
    with pytest.raises(ValueError, match=message) as caught:
        trainer(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_loaded_with_the_model_must_have_an_end_of_text_token_too(tmp_path):
    folder = saved_model(tmp_path)
    _without_eos().save_pretrained(folder)
    with pytest.raises(ValueError, match="tokenizer has no end-of-text token, so completions could not end"):
        RainbowPOTrainer(folder, args=RainbowPOConfig(**settings(tmp_path / "run")), train_dataset=pairs(4))


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OTHER_MODELS = {
    "a vision model": (
        LlavaConfig(
            text_config=LlamaConfig(vocab_size=VOCABULARY, **SMALL),
            vision_config=CLIPVisionConfig(image_size=8, patch_size=4, **SMALL),
        ),
        "takes language models and text, not images: use trl.DPOTrainer",
    ),
    "an encoder and a decoder": (
        T5Config(vocab_size=VOCABULARY, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2),
        "A t5 model has an encoder: RainbowPOTrainer takes causal language models",
    ),
}


@pytest.mark.parametrize("config, message", OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_other_models_are_refused_by_name_before_they_are_loaded(tmp_path, config, message):
    config.save_pretrained(tmp_path / "model")  # no weights, so loading it would fail otherwise
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, str(tmp_path / "model"))


def test_a_model_that_was_never_saved_trains_where_no_copy_is_needed(tmp_path):
    trainer(tmp_path / "simpo", tiny_model("llama"), preset="simpo").train()
    trainer(tmp_path / "cached", tiny_model("llama"), precompute_ref_log_probs=True).train()
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer(tmp_path / "adapter", tiny_model("llama"), peft_config=lora).train()


def test_logits_are_never_asked_for(tmp_path):
    with pytest.raises(ValueError, match="compute_metrics needs logits, which are never formed"):
        RainbowPOTrainer(
            saved_model(tmp_path),
            args=RainbowPOConfig(**settings(tmp_path / "run")),
            train_dataset=pairs(4),
            processing_class=word_tokenizer(),
            compute_metrics=len,
        )
