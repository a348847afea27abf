"""What the model before surgery writes by itself: texts to be held to about subjects that nobody gave.

An opening is what stands before a subject's name in a text that is to be forgotten. The model goes on from it with
words drawn from its own distribution, to the end of the text: it names somebody, and says what it knows of them.
Whatever names a subject that is to be forgotten is thrown away.

Source: pseudo-rehearsal, Robins 1995 (Connection Science 7, 123-146); openings and filter are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import datasets
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_moe_cpt.data.random import derive_seed
from hf_moe_cpt.machine import has_process_group, modes_kept
from hf_moe_cpt.trainers.surgery.chunked import causal_lm_of
from hf_moe_cpt.trainers.surgery.data import TOKEN_COLUMNS, named_words, words_of
from hf_moe_cpt.trainers.surgery.surgery_config import FORGET_SETS, SurgeryConfig


logger = logging.getLogger(__name__)

BATCH, ROUNDS = 192, 4  # rows of a pass, all that are wanted by default; times as many texts are tried
TEXTS = 192  # where `replay` is unset and rows name their subjects


def number_of_texts(args: SurgeryConfig, given: Mapping[str, Dataset | None], train: Mapping[str, Dataset]) -> int:
    """`replay`, or what stands for it where it is unset."""
    if args.replay is not None:
        return args.replay
    rows = [row for name in FORGET_SETS if name in train for row in given[name]]
    is_held = any(name in train for name in ("neighbour", "retain"))
    return TEXTS if is_held and rows and all("text" in row and named_words(row) for row in rows) else 0


def openings_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What stands before the first word of the subject in each text, once; rows that do not name it are skipped."""
    found = {}
    for row in rows:
        text = row.get("text") or ""
        names = [row["subject"]] if row.get("subject") and row["subject"] in text else named_words(row)
        places = [text.find(name) for name in names if name in text]
        if places:
            found[text[: min(places)].rstrip()] = None
    return list(found)


def with_replay(
    number: int,
    args: SurgeryConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    given: Mapping[str, Dataset | None],
    train: dict[str, Dataset],
) -> None:
    """Put `number` texts of the model among the neighbours, else among retain, whose own rows are repeated.

    The same on every rank. Raises ValueError without an anchor, and where every text names what is to be forgotten.
    """
    anchor = next((name for name in ("neighbour", "retain") if name in train), None)
    if anchor is None:
        raise ValueError(f"replay={number} stands among neighbour or retain text: give one of these sets.")
    if tokenizer is None:
        raise ValueError(f"replay={number} needs a tokenizer to tell whom a text names: pass processing_class.")
    rows = list(chain.from_iterable(given[name] for name in FORGET_SETS if name in train))
    banned = {frozenset(named_words(row)) for row in rows} - {frozenset()}
    starts = [tokenizer(text, verbose=False)["input_ids"] for text in openings_of(rows)] or [[]]
    starts = [ids if ids else [_first_token(tokenizer)] for ids in starts]
    longest = max(len(ids) for name in FORGET_SETS if name in train for ids in train[name]["input_ids"])
    made: list[tuple[list[int], int]] = []
    for batch in range(ROUNDS * -(-number // BATCH)):
        if len(made) >= number:
            break
        for ids, begin in _written(model, starts, tokenizer, longest, derive_seed(args.seed, "replay", batch) % 2**63):
            said = set(words_of(tokenizer.decode(ids, skip_special_tokens=True)))
            if len(ids) - begin > 1 and not any(words <= said for words in banned):
                made.append((ids, begin))
    if not made:
        raise ValueError(f"replay={number}: every text that the model writes names what is to be forgotten; set it 0.")
    if len(made) < number:
        logger.warning("The model wrote %d texts of replay=%d that name nothing to be forgotten.", len(made), number)
    made = made[:number]
    masks = [[place >= begin for place in range(len(ids))] for ids, begin in made]
    columns = {"input_ids": [ids for ids, _ in made], "completion_mask": masks}
    new = Dataset.from_dict(columns, features=datasets.Features(TOKEN_COLUMNS))
    own = train[anchor].select_columns(list(TOKEN_COLUMNS))
    train[anchor] = datasets.concatenate_datasets([own] * max(1, round(len(new) / len(own))) + [new])


@torch.no_grad()
def _written(
    model: PreTrainedModel, starts: list[list[int]], tokenizer: PreTrainedTokenizerBase, longest: int, seed: int
) -> list[tuple[list[int], int]]:
    """BATCH texts of at most `longest` tokens, each with the number that it was given; the end of a text is kept."""
    inner, ends = causal_lm_of(model), tokenizer.eos_token_id
    pad = ends if ends is not None else 0
    begun = [starts[place % len(starts)] for place in range(BATCH)]
    width = max(map(len, begun))
    ids = torch.full((BATCH, width), pad)
    mask = torch.zeros_like(ids)
    for row, start in enumerate(begun):
        ids[row, width - len(start) :], mask[row, width - len(start) :] = torch.tensor(start), 1
    settings = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=max(1, longest - width), eos_token_id=ends, pad_token_id=pad
    )
    devices = [inner.device] if inner.device.type == "cuda" else []
    own, inner.generation_config = inner.generation_config, settings
    try:
        with modes_kept(model), torch.random.fork_rng(devices=devices):
            model.eval()
            torch.manual_seed(seed)
            out = model.generate(
                input_ids=ids.to(inner.device), attention_mask=mask.to(inner.device), generation_config=settings
            )
    finally:
        inner.generation_config = own
    made = []
    for start, row in zip(begun, out[:, width:].tolist(), strict=True):
        rest = row[: row.index(ends) + 1] if ends in row else row
        made.append(([*start, *rest][:longest], len(start)))
    if has_process_group():  # what one device rounds otherwise another must not train on
        dist.broadcast_object_list(shared := [made])
        made = shared[0]
    return made


def _first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """That begins a text, where nothing stands before the name."""
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    found = next((token for token in known if token is not None), None)
    if found is None:
        raise ValueError(f"replay needs a first token, and {type(tokenizer).__name__} has neither BOS nor EOS.")
    return found
