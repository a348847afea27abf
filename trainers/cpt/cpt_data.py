"""From what the user passed to what the Trainer iterates: tokenised, packed, mixed with replay. Source: ours."""

from __future__ import annotations

import inspect
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase

from hf_moe_cpt.data.packing import PackedDataset
from hf_moe_cpt.data.replay import ReplayMixture
from hf_moe_cpt.data.streaming import StreamingReplayMixture
from hf_moe_cpt.data.tokenization import tokenize_documents
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig


class NumberedBlocks(TorchDataset):
    """Blocks that carry their position as "block", so that each is counted once however it is batched."""

    def __init__(self, blocks: PackedDataset) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {**self.blocks[position], "block": position}


def check_model_fits(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, args: CPTConfig) -> None:
    """Refuse a tokenizer with more tokens than the model, and blocks longer than its context."""
    config = model.config.get_text_config()
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {config.vocab_size}: use the tokenizer that "
            "belongs to the model, or model.resize_token_embeddings(len(tokenizer))."
        )
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and args.max_length > context:
        raise ValueError(
            f"max_length={args.max_length} is longer than the model's context of {context} tokens: lower max_length."
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if args.packing == "document" and "position_ids" not in inspect.signature(base.forward).parameters:
        raise ValueError(
            f"packing='document' needs position_ids, which {type(base).__name__} does not take: set packing='concat'."
        )


def build_train_dataset(
    args: CPTConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    new: Dataset | IterableDataset,
    replay: Dataset | IterableDataset | None,
) -> TorchDataset:
    """The mixture of both sources, exactly `max_steps` optimizer batches long (endless when streaming)."""
    _check_sources(args, new, replay)
    global_batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    with args.main_process_first(desc="tokenising"):
        sources = [None if data is None else _tokenize(data, args, tokenizer, vocab_size) for data in (new, replay)]
    common: dict[str, Any] = {
        "replay_ratio": args.replay_ratio,
        "batch_size": global_batch,
        "num_batches": args.max_steps,
        "seed": args.seed if args.data_seed is None else args.data_seed,
    }
    if isinstance(new, IterableDataset):
        return StreamingReplayMixture(
            *sources,
            **common,
            max_length=args.max_length,
            packing=args.packing,
            micro_batch_size=args.train_batch_size,
            shuffle_buffer=args.shuffle_buffer,
        )
    packed = [None if data is None else PackedDataset(data, args.max_length, args.packing) for data in sources]
    return ReplayMixture(*packed, **common)


def build_eval_dataset(
    args: CPTConfig, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, held_out: Dataset
) -> NumberedBlocks:
    """Held-out text packed like the training text, in its own order."""
    if isinstance(held_out, IterableDataset):
        raise ValueError(
            "eval_dataset is a stream, and losses need the same text each time: pass a map-style Dataset."
        )
    with args.main_process_first(desc="tokenising held-out text"):
        blocks = PackedDataset(_tokenize(held_out, args, tokenizer, vocab_size), args.max_length, args.packing)
    return NumberedBlocks(blocks)


def _tokenize(
    data: Dataset | IterableDataset, args: CPTConfig, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> Dataset | IterableDataset:
    return tokenize_documents(
        data,
        tokenizer,
        text_column=args.text_column,
        num_proc=args.dataset_num_proc,
        add_eos=tokenizer is not None,
        vocab_size=vocab_size,
    )


def _check_sources(args: CPTConfig, new: object, replay: object) -> None:
    if args.replay_ratio > 0 and replay is None:
        raise ValueError(
            f"replay_ratio={args.replay_ratio} without replay_dataset: pass the old text, or set it to 0."
        )
    if args.replay_ratio == 0 and replay is not None:
        raise ValueError("replay_dataset without replay_ratio: set replay_ratio above 0, or leave replay_dataset out.")
    for name, data in (("train_dataset", new), ("replay_dataset", replay)):
        if data is not None and not isinstance(data, Dataset | IterableDataset):
            raise ValueError(
                f"{name} is a {type(data).__name__}: pass a datasets.Dataset or IterableDataset "
                "(datasets.Dataset.from_dict({'text': [...]}) makes one from a list)."
            )
    if replay is not None and isinstance(new, IterableDataset) != isinstance(replay, IterableDataset):
        raise ValueError("train_dataset and replay_dataset must both be streams, or both not: load them the same way.")
