"""What a run of continual pre-training starts from: its data, and the phase and the moments of its checkpoint.

Text is tokenised, packed and mixed with replay. Every model that `CPTTrainer` saves carries `cpt_state.json`; a later
run reads there whether to warm up again (paper 1, sections 3.2 and 5). Source: ours, but for that.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, IterableDataset
from torch.optim import Optimizer
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import cached_file

from hf_moe_cpt.data.packing import PackedDataset, ReplayMixture, StreamingReplayMixture
from hf_moe_cpt.data.random import derive_seed
from hf_moe_cpt.data.text import load_text_dataset, tokenize_documents
from hf_moe_cpt.reading import read_json
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig


logger = logging.getLogger(__name__)

STATE_FILE = "cpt_state.json"
OPTIMIZER_FILE = "optimizer.pt"
# Saved in this phase of a schedule -> the starting phase of a run that continues from it.
CONTINUES_AS = {"warmup": "constant", "cooldown": "constant", "constant": "constant", "anneal": "decayed"}


@dataclass
class DataArguments:
    """Which text is new and which is replayed; a name is a Hub id, a folder, or a .jsonl .parquet .arrow .txt file."""

    dataset_name: list[str] = field(metadata={"help": "New text: one or more names."})
    replay_dataset_name: list[str] | None = field(default=None, metadata={"help": "Old text, for --replay_ratio."})
    eval_dataset_name: list[str] | None = field(default=None, metadata={"help": "Held-out new text."})
    replay_eval_dataset_name: list[str] | None = field(default=None, metadata={"help": "Held-out old text."})
    dataset_split: str = field(default="train", metadata={"help": "Split of data sets on the Hub."})
    held_out_fraction: float = field(
        default=0.0,
        metadata={"range": "[0, 1)", "help": "Share of the documents to hold out where no held-out text is named."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read while training instead of tokenising first."})


def load_data(args: DataArguments, training: CPTConfig) -> dict[str, Dataset | IterableDataset | None]:
    """The trainer's four data sets by its argument names; documents are held out by hash of seed where asked."""
    pairs = {
        ("train_dataset", "eval_dataset"): (args.dataset_name, args.eval_dataset_name),
        ("replay_dataset", "replay_eval_dataset"): (args.replay_dataset_name, args.replay_eval_dataset_name),
    }
    loaded: dict[str, Dataset | IterableDataset | None] = {}
    for (train_key, eval_key), (train_name, eval_name) in pairs.items():
        train = None if train_name is None else _load(train_name, args, training, args.streaming)
        held_out = None if eval_name is None else _load(eval_name, args, training, streaming=False)
        if train is not None and held_out is None and args.held_out_fraction > 0:
            train, held_out = _hold_out(train, args.held_out_fraction, training.seed)
        loaded[train_key], loaded[eval_key] = train, held_out
    if training.replay_ratio == 0:  # old text without replay is there to measure forgetting
        loaded["replay_dataset"] = None
    return loaded


def _load(names: list[str], args: DataArguments, training: CPTConfig, streaming: bool) -> Dataset | IterableDataset:
    source = names[0] if len(names) == 1 else names
    return load_text_dataset(source, split=args.dataset_split, streaming=streaming, text_column=training.text_column)


def _hold_out(data: Dataset | IterableDataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    if isinstance(data, IterableDataset):
        raise ValueError("held_out_fraction cannot split a stream: name held-out text with --eval_dataset_name.")
    if not 0 < fraction < 1 or len(data) < 2:
        raise ValueError(
            f"held_out_fraction={fraction} of {len(data)} document(s) leaves one side empty: give a share in (0, 1) "
            "and at least two documents, or name held-out text with --eval_dataset_name."
        )
    parts = data.train_test_split(test_size=fraction, seed=derive_seed(seed, "held out") % 2**32)
    return parts["train"], parts["test"]


class NumberedBlocks(TorchDataset):
    """Blocks that carry their position as "block", so that each is counted once however it is batched."""

    def __init__(self, blocks: PackedDataset) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {**self.blocks[position], "block": position}


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


def named_eval_sets(new: Dataset | dict[str, Dataset] | None, replay: Dataset | None) -> dict[str, Dataset]:
    """Held-out sets by the names under which their losses are logged."""
    named = dict(new) if isinstance(new, dict) else ({} if new is None else {"new": new})
    return named if replay is None else {**named, "replay": replay}


def write_state(folder: str | Path, state: dict[str, Any]) -> None:
    """Write `cpt_state.json` into a saved model: where on its schedule it stood."""
    (Path(folder) / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")


def read_state(name_or_path: str) -> dict[str, Any] | None:
    """The facts saved with a model, by folder or Hub id; None if it was not saved by `CPTTrainer`."""
    try:
        path = cached_file(
            name_or_path,
            STATE_FILE,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # a folder that is gone since the model was loaded
        return None
    return None if path is None else read_json(path, phase=Literal[*CONTINUES_AS])


def detect_starting_phase(name_or_path: str | None) -> str:
    """ "scratch" without a checkpoint; else "constant" or "decayed", as the checkpoint says ("decayed" if silent)."""
    if not name_or_path:
        return "scratch"
    state = read_state(name_or_path)
    if state is None:
        logger.info("%s does not say where its schedule stood: it counts as decayed and warms up again.", name_or_path)
        return "decayed"
    return CONTINUES_AS[state.get("phase", "anneal")]


def load_moments(optimizer: Optimizer, checkpoint: str | Path) -> None:
    """Give `optimizer` the moments saved in `checkpoint`; its learning rates and other settings stay as they are.

    Raises ValueError if there are none, or if they belong to other parameters.
    """
    path = Path(checkpoint) / OPTIMIZER_FILE
    if not path.is_file():
        raise ValueError(
            f"keep_optimizer_state: {str(checkpoint)!r} holds no {OPTIMIZER_FILE}. Start from a checkpoint-N folder "
            "that was saved without save_only_model, or set keep_optimizer_state=False."
        )
    saved = torch.load(path, map_location="cpu", weights_only=True)
    current = optimizer.state_dict()
    shapes_now = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    shapes_saved = {index: entry["exp_avg"].shape for index, entry in saved["state"].items() if "exp_avg" in entry}
    if len(shapes_saved) != len(shapes_now) or any(shapes_now[i] != shape for i, shape in shapes_saved.items()):
        raise ValueError(
            f"keep_optimizer_state: the moments in {str(path)!r} belong to other parameters ({len(shapes_saved)} "
            f"against {len(shapes_now)}): start from the checkpoint of this model, or set keep_optimizer_state=False."
        )
    optimizer.load_state_dict({"state": saved["state"], "param_groups": current["param_groups"]})
    logger.info("Adam moments of %d parameters carried over from %s.", len(shapes_now), path)
