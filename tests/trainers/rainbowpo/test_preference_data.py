"""Which requests and pairs are refused or dropped before training, and what the collator adds."""

import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from hf_moe_cpt.trainers.rainbowpo.preference_data import drop_empty_pairs, without_text_prompt
from tests.helpers.preference_runs import pairs, saved_model, trainer, word_tokenizer
from tests.helpers.tiny_models import tiny_model


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
        drop_empty_pairs(bad, 0, "x")


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


REFUSED = {
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


def test_a_model_that_was_never_saved_trains_where_no_copy_is_needed(tmp_path):
    trainer(tmp_path / "simpo", tiny_model("llama"), preset="simpo").train()
    trainer(tmp_path / "cached", tiny_model("llama"), precompute_ref_log_probs=True).train()
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer(tmp_path / "adapter", tiny_model("llama"), peft_config=lora).train()


def test_logits_are_never_asked_for(tmp_path):
    from hf_moe_cpt.trainers.rainbowpo.rainbowpo_trainer import RainbowPOTrainer
    from tests.helpers.preference_runs import RainbowPOConfig, settings

    with pytest.raises(ValueError, match="compute_metrics needs logits, which are never formed"):
        RainbowPOTrainer(
            saved_model(tmp_path),
            args=RainbowPOConfig(**settings(tmp_path / "run")),
            train_dataset=pairs(4),
            processing_class=word_tokenizer(),
            compute_metrics=len,
        )
