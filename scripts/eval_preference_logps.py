"""Log-probabilities of the two answers of preference pairs under a causal LM, in batches and without gradients.

A pair is tokenised as trainers do: the prompt alone, and prompt and answer as a whole; an answer begins where these
begin to differ, and ends with EOS where it is a string. Letters: B rows of a batch, S their tokens, P the positions
that predict an answer's token in any of them, V vocabulary. Source: ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_moe_cpt.scripts.rejection_sample_models import Prompt


class AnswerTokens(NamedTuple):
    """ids: prompt and answer, cut at the limit. start: place of the answer's first token, at least 1 if it is read."""

    ids: list[int]
    start: int
    was_cut: bool


class AnswerScore(NamedTuple):
    """Summed log-probability of an answer in nats, and its tokens."""

    logp: float
    num_tokens: int


def tokenize_answers(
    prompt: Prompt, answers: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[AnswerTokens]:
    """Each answer after the prompt; all begin at the same place, the first where any of them leaves the prompt.

    prompt: a string with answers as strings, or messages with answers as lists of messages.
    """
    if isinstance(prompt, str):
        eos = tokenizer.eos_token or ""
        texts = [answer if eos and answer.endswith(eos) else answer + eos for answer in answers]
        prompt_ids = tokenizer(prompt)["input_ids"]
        wholes = [tokenizer(prompt + text)["input_ids"] for text in texts]
    else:
        options = {"tokenize": True, "return_dict": True}
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)["input_ids"]
        wholes = [tokenizer.apply_chat_template(prompt + answer, **options)["input_ids"] for answer in answers]
    start = min(_common_start(prompt_ids, whole) for whole in wholes)
    limit = max(map(len, wholes)) if max_length is None else max_length
    return [AnswerTokens(whole[:limit], start, len(whole) > limit) for whole in wholes]


def _common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading elements are equal."""
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return min(len(one), len(other))


def is_readable(answers: Sequence[AnswerTokens]) -> bool:
    """Whether at least one token of every answer is left and has a token before it."""
    return all(1 <= answer.start < len(answer.ids) for answer in answers)


def answer_scores(
    model: PreTrainedModel,
    answers: Sequence[AnswerTokens],
    batch_size: int,
    progress: Callable[[int], Any] = lambda count: None,
) -> list[AnswerScore]:
    """One score for each answer, in their order; progress gets the size of each finished batch.

    Rows of similar length go together, padded on the right, the longest first, so that memory fails at once.
    """
    order = sorted(range(len(answers)), key=lambda place: -len(answers[place].ids))
    scores: dict[int, AnswerScore] = {}
    for begin in range(0, len(order), batch_size):
        places = order[begin : begin + batch_size]
        scores |= zip(places, _batch(model, [answers[place] for place in places]), strict=True)
        progress(len(places))
    return [scores[place] for place in range(len(answers))]


@torch.inference_mode()
def _batch(model: PreTrainedModel, answers: Sequence[AnswerTokens]) -> list[AnswerScore]:
    width, device = max(len(answer.ids) for answer in answers), model.device
    ids, mask = torch.zeros(len(answers), width, dtype=torch.long), torch.zeros(len(answers), width, dtype=torch.long)
    for row, answer in enumerate(answers):
        ids[row, : len(answer.ids)] = torch.tensor(answer.ids)
        mask[row, : len(answer.ids)] = 1
    first = min(answer.start for answer in answers) - 1
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, logits_to_keep=width - first).logits  # (B, P, V)
    else:
        logits = model(**inputs).logits[:, first:]
    scores = []
    for row, answer in enumerate(answers):  # row by row: only one row of logits is held in float32
        predicting = logits[row, answer.start - 1 - first : len(answer.ids) - 1 - first].float()
        targets = torch.tensor(answer.ids[answer.start :], device=device)
        loss = torch.nn.functional.cross_entropy(predicting, targets, reduction="sum")
        scores.append(AnswerScore(-float(loss), len(targets)))
    return scores
