"""What a causal LM makes of texts: log-probabilities token by token, greedy continuations, distance to another model.

Rows go through the model in batches of similar length, padded, the longest first, so that memory fails at once. Only
positions that count meet the head, a chunk at a time. With several processes each scores every world-size-th row and
all get all results, by the row's place: no row is scored twice or lost.

Letters: B rows of a batch, S their tokens, N positions that count, H hidden size, V vocabulary. Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel

from hf_moe_cpt.trainers.instruments.ranks import has_process_group
from hf_moe_cpt.trainers.surgery.divergence import forward_kl
from hf_moe_cpt.trainers.surgery.model_pass import LanguageHead, head_of, run_model


LOGITS_AT_ONCE = 2**24  # numbers in the logits of a chunk: 64 MiB in float32, of which a handful live at a time
LEAST_LOGP = -1e4  # what a token of probability 0 counts as where log-probabilities are averaged


class CountedText(NamedTuple):
    """Token ids of which those from place `start` on count; start is at least 1 and below the length."""

    ids: Sequence[int]
    start: int


class TokenScores(NamedTuple):
    """Of the n tokens that count, in order; all (n,). Log-probabilities in nats.

    mean, std: of log p(v) over the vocabulary, v drawn from p; empty where they were not asked for.
    """

    logp: np.ndarray
    hit: np.ndarray  # whether the token is the most likely one
    mean: np.ndarray
    std: np.ndarray


class Distances(NamedTuple):
    """Of the n tokens that count, (n,) each: KL of the reference from the model in nats, and whether both's first
    choices are the same."""

    kl: np.ndarray
    agrees: np.ndarray


def score_tokens(
    model: PreTrainedModel,
    texts: Sequence[CountedText],
    batch_size: int,
    *,
    with_moments: bool = False,
    bar: str | None = None,
) -> list[TokenScores]:
    """One entry for each text, in their order. bar: label of a progress bar, None for none."""
    head = head_of(model)

    def score(batch: Sequence[CountedText]) -> list[TokenScores]:
        states, targets = _counted_states(model, batch)
        parts = [
            _score_chunk(chunk, labels, head, with_moments)
            for chunk, labels in zip(_chunks(states, head), _chunks(targets, head), strict=True)
        ]
        return [TokenScores(*columns) for columns in _by_text(parts, batch)]

    return over_rows(texts, lambda text: len(text.ids), score, batch_size, bar)


def score_distances(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    texts: Sequence[CountedText],
    batch_size: int,
    *,
    bar: str | None = None,
) -> list[Distances]:
    """How far `model` is from `reference` at each token that counts, one entry for each text, in their order."""
    heads = head_of(model), head_of(reference)
    if heads[0].weight.shape[0] != heads[1].weight.shape[0]:
        raise ValueError(
            f"the model has {heads[0].weight.shape[0]} words and the one before {heads[1].weight.shape[0]}: their "
            "KL is defined for one vocabulary only; leave the part 'divergence' out."
        )

    def compare(batch: Sequence[CountedText]) -> list[Distances]:
        chunks = [_chunks(_counted_states(one, batch)[0], heads[0]) for one in (model, reference)]
        parts = []
        for pair in zip(*chunks, strict=True):
            ours, theirs = (_log_softmax(states, head) for states, head in zip(pair, heads, strict=True))
            parts.append((forward_kl(ours, theirs), ours.argmax(-1) == theirs.argmax(-1)))
        return [Distances(*columns) for columns in _by_text(parts, batch)]

    return over_rows(texts, lambda text: len(text.ids), compare, batch_size, bar)


def continue_greedily(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    *,
    stop: Sequence[int],
    bar: str | None = None,
) -> list[list[int]]:
    """The most likely next token again and again, up to max_new_tokens or before one of `stop`; in order of prompts.

    The model's own generation settings (penalties, sampling) are left aside.
    """
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop) or None,
        pad_token_id=stop[0] if stop else 0,
    )

    def generate(batch: Sequence[Sequence[int]]) -> list[list[int]]:
        width = max(map(len, batch))
        ids = torch.full((len(batch), width), settings.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):  # on the left: what is generated follows the prompt
            ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
        output = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
        )
        return [_before_stop(row, stop) for row in output[:, width:].tolist()]

    own = model.generation_config
    model.generation_config = settings
    try:
        return over_rows(prompts, len, generate, batch_size, bar)
    finally:
        model.generation_config = own


@torch.no_grad()
def over_rows(
    rows: Sequence[Any],
    length: Callable[[Any], int],
    run: Callable[[Sequence[Any]], list[Any]],
    batch_size: int,
    bar: str | None = None,
) -> list[Any]:
    """What `run` makes of batches of rows, one result for each row, in their order and on every process.

    Must be called by all processes of a group, with the same rows.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if has_process_group() else (0, 1)
    order = sorted(range(len(rows)), key=lambda place: -length(rows[place]))[rank::world]
    results: dict[int, Any] = {}
    with tqdm(total=len(order), desc=bar, disable=bar is None or rank > 0, leave=False, mininterval=1) as progress:
        for begin in range(0, len(order), batch_size):
            places = order[begin : begin + batch_size]
            results |= zip(places, run([rows[place] for place in places]), strict=True)
            progress.update(len(places))
    if world > 1:
        shares: list[Any] = [None] * world
        dist.all_gather_object(shares, results)
        results = {place: result for share in shares for place, result in share.items()}
    return [results[place] for place in range(len(rows))]


def _counted_states(model: PreTrainedModel, batch: Sequence[CountedText]) -> tuple[Tensor, Tensor]:
    """Hidden states (N, H) that predict the tokens that count, and these tokens (N,), text after text."""
    width = max(len(text.ids) for text in batch)
    ids, mask = torch.zeros(len(batch), width, dtype=torch.long), torch.zeros(len(batch), width, dtype=torch.long)
    counts = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, text in enumerate(batch):
        length = len(text.ids)
        ids[row, :length], mask[row, :length], counts[row, text.start : length] = torch.tensor(text.ids), 1, True
    ids, mask, counts = (tensor.to(model.device) for tensor in (ids, mask, counts[:, 1:]))
    hidden = run_model(model, {"input_ids": ids, "attention_mask": mask}).hidden
    return hidden[:, :-1][counts], ids[:, 1:][counts]


def _chunks(tensor: Tensor, head: LanguageHead) -> tuple[Tensor, ...]:
    return tensor.split(max(1, LOGITS_AT_ONCE // head.weight.shape[0]))


def _log_softmax(states: Tensor, head: LanguageHead) -> Tensor:
    logits = functional.linear(states, head.weight, head.bias)
    return head.form.apply(logits.to(torch.promote_types(logits.dtype, torch.float32))).log_softmax(-1)


def _score_chunk(states: Tensor, targets: Tensor, head: LanguageHead, with_moments: bool) -> tuple[Tensor, ...]:
    logp = _log_softmax(states, head)
    target_logp = logp.gather(-1, targets[:, None])[:, 0]
    hit = logp.argmax(-1) == targets
    if not with_moments:
        return target_logp, hit, target_logp[:0], target_logp[:0]
    floored = logp.clamp_min(LEAST_LOGP)  # 0 * inf is no number
    mean = (floored.exp() * floored).sum(-1)
    variance = (floored.exp() * (floored - mean[:, None]).square()).sum(-1)
    return target_logp, hit, mean, variance.sqrt()


def _by_text(parts: Sequence[tuple[Tensor, ...]], batch: Sequence[CountedText]) -> Iterator[tuple[np.ndarray, ...]]:
    """The columns of all chunks, cut into those of each text; a column without entries stays so."""
    columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    begin = 0
    for text in batch:
        end = begin + len(text.ids) - text.start
        yield tuple(column[begin:end] for column in columns)
        begin = end


def _before_stop(ids: list[int], stop: Sequence[int]) -> list[int]:
    ends = [place for place, token in enumerate(ids) if token in stop]
    return ids[: ends[0]] if ends else ids
