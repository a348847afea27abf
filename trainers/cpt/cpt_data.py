"""What a run of continual pre-training starts from: its data, and the phase and the moments of its checkpoint.

Text is tokenised, packed and mixed with replay. Every model that `CPTTrainer` saves carries `cpt_state.json`; a later
run reads there whether to warm up again (paper 1, sections 3.2 and 5). Source: ours, but for that.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_type_hints

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, Value, load_from_disk
from torch.optim import Optimizer
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from hf_moe_cpt.data.packing import (
    LawInParts,
    Mixture,
    MixtureLaw,
    PackedDataset,
    StreamingMixture,
    blocks_per_epoch,
    changing_shares,
    exact_shares,
)
from hf_moe_cpt.data.random import derive_seed
from hf_moe_cpt.data.text import (
    column_names,
    configurations_of,
    count_bytes,
    load_text_dataset,
    processes_for,
    record_of,
    tokenize_documents,
)
from hf_moe_cpt.hub.checkpoint_io import appearing_whole, check_output
from hf_moe_cpt.optim.schedules import Extension, default_rates
from hf_moe_cpt.reading import read_json, reading, unique_keys
from hf_moe_cpt.reports import aligned
from hf_moe_cpt.settings import fits, named
from hf_moe_cpt.trainers.common.checkpointing import read_beside
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig


logger = logging.getLogger(__name__)

STATE_FILE = "cpt_state.json"
OPTIMIZER_FILE = "optimizer.pt"
# Saved in this phase of a schedule -> the starting phase of a run that continues from it.
CONTINUES_AS = {"warmup": "constant", "cooldown": "constant", "constant": "constant", "anneal": "decayed"}


@dataclass
class DataArguments:
    """Which text is new and which is replayed; a name is a Hub id, or a folder or file of text, code, JSON, CSV."""

    dataset_name: list[str] | None = field(default=None, metadata={"help": "New text: one or more names."})
    replay_dataset_name: list[str] | None = field(default=None, metadata={"help": "Old text, for --replay_ratio."})
    sources: list[str] | None = field(
        default=None,
        metadata={
            "help": "Any number of sources in place of these two, each NAME=PATH:WEIGHT, with :replay behind it for "
            "old text, or NAME=PATH:held_out. In a YAML file a list of mappings: name, path, config, split, column, "
            "weight, role, end_weight, max_epochs."
        },
    )
    eval_dataset_name: list[str] | None = field(default=None, metadata={"help": "Held-out new text."})
    replay_eval_dataset_name: list[str] | None = field(default=None, metadata={"help": "Held-out old text."})
    dataset_split: str = field(default="train", metadata={"help": "Split of data sets on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of data sets on the Hub."})
    held_out_fraction: float = field(
        default=0.0,
        metadata={"range": "[0, 1)", "help": "Share of the documents to hold out where no held-out text is named."},
    )
    keep_overlap: bool = field(
        default=False, metadata={"help": "Train also on documents that are held out: copies count as the same."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read while training instead of tokenising first."})
    tokenized_data: str | None = field(
        default=None,
        metadata={"help": "Folder that hf-moe-cpt tokenize writes of these sources, and cpt reads in their place."},
    )

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.sources is None):
            raise ValueError(
                "--dataset_name is missing: name new text, or several sources with --sources."
                if self.sources is None
                else "--dataset_name and --sources both name text: give one of them."
            )


@dataclass
class Source:
    """A named source of text: where it lies, which column and split of it, and how it takes part in the mixture."""

    name: str
    path: str | list[str]
    config: str | None = None
    split: str | None = None
    column: str | None = None
    weight: float | None = None
    role: str = "new"
    end_weight: float | None = None
    max_epochs: float | None = None

    @classmethod
    def of(cls, given: Any) -> Source:
        """From a mapping or its JSON, or from `NAME=PATH:WEIGHT:ROLE` in which weight and role may be left out."""
        if isinstance(given, str) and given.startswith("{"):
            with reading(f"--sources {given[:200]!r}", "write NAME=PATH:WEIGHT, or a JSON object"):
                given = json.loads(given, object_pairs_hook=unique_keys)
        if isinstance(given, str):
            name, found, rest = given.partition("=")
            path, *more = re.split(r":(?=new$|replay$|held_out$|[0-9.eE+-]+(?::|$))", rest)
            given = {"name": name, "path": path} | {"role" if word.isidentifier() else "weight": word for word in more}
            if not found or not path:
                raise ValueError(f"--sources {name!r}: write NAME=PATH:WEIGHT, e.g. german=texts/german:0.4.")
            if "weight" in given:
                given["weight"] = float(given["weight"])
        known = [option.name for option in fields(cls)]
        if not isinstance(given, Mapping) or not {"name", "path"} <= set(given) or not set(given) <= set(known):
            raise ValueError(
                f"--sources {given!r}: a source needs name and path, and may have {', '.join(known[2:])}."
            )
        for name, hint in get_type_hints(cls).items():
            if name in given and not fits(given[name], hint):
                raise ValueError(f"--sources: {name}={given[name]!r} is no {named(hint)}.")
        if not given["name"] or Path(given["name"]).name != given["name"] or not given["name"].isprintable():
            raise ValueError(f"--sources {given['name']!r}: a name is a word without slashes, and no dot alone.")
        source = cls(**given)
        if (source.weight is None) != (source.role == "held_out"):
            raise ValueError(f"--sources {source.name!r}: text to train on needs a weight, held-out text has none.")
        return source


def load_data(args: DataArguments, training: CPTConfig) -> dict[str, Any]:
    """The trainer's data sets by its argument names; documents are held out by hash of seed where asked.

    Of --sources the mixture of `training` is made. A held-out source with the name of another belongs to it.
    """
    sources = _sources_of(args, training)
    with first_rank_first(training, "reading text"):
        if args.tokenized_data is None:
            train, held_out = _read_sources(sources, args, training)
        else:
            train, held_out = _read_tokenized(sources, args, training)
    if args.sources is None and training.replay_ratio == 0:  # old text is there to measure forgetting
        train.pop("replay", None)
    if args.sources is not None:
        return {"train_dataset": train, "eval_dataset": held_out or None}
    return {
        "train_dataset": train.get("new"),
        "replay_dataset": train.get("replay"),
        "eval_dataset": held_out.get("new"),
        "replay_eval_dataset": held_out.get("replay"),
    }


@contextmanager
def first_rank_first(args: CPTConfig, doing: str) -> Iterator[None]:
    """Work with data: the first rank does it, and says what is to be said; the others find it in the cache."""
    with args.main_process_first(desc=doing):
        before = logging.root.manager.disable
        logging.disable(logging.WARNING if args.process_index else before)
        try:
            yield
        finally:
            logging.disable(before)


def _sources_of(args: DataArguments, training: CPTConfig) -> list[Source]:
    if args.sources is None:
        both = {"new": args.dataset_name, "replay": args.replay_dataset_name}
        held = {"new": args.eval_dataset_name, "replay": args.replay_eval_dataset_name}
        sources = [Source(name, path) for name, path in both.items() if path is not None]
        return sources + [Source(name, path, role="held_out") for name, path in held.items() if path is not None]
    sources = [Source.of(given) for given in args.sources]
    mixed = [source for source in sources if source.role != "held_out"]
    keys = [(source.name, source.role == "held_out") for source in sources]
    if len(set(keys)) < len(keys) or not mixed:
        raise ValueError("--sources: name each source once, and at least one to train on.")
    training.mixture = {
        source.name: {
            key: value
            for key in ("weight", "role", "end_weight", "max_epochs")
            if (value := getattr(source, key)) is not None
        }
        for source in mixed
    }
    training.check_mixture()
    return sources


def _read_sources(
    sources: list[Source], args: DataArguments, training: CPTConfig
) -> tuple[dict[str, Dataset | IterableDataset], dict[str, Dataset]]:
    """Documents to train on and held out, by the names of the sources."""
    held_out = {source.name: _load(source, args, training, False) for source in sources if source.role == "held_out"}
    train = {}
    for source in sources:
        if source.role != "held_out":
            train[source.name] = _load(source, args, training, args.streaming)
            if source.name not in held_out and args.held_out_fraction > 0:
                parts = _hold_out(train[source.name], args.held_out_fraction, training.seed)
                train[source.name], held_out[source.name] = parts
    return _apart(train, held_out, training, args.keep_overlap), held_out


TOKENIZED_FILE = "tokenized.json"


def _what_tokens_depend_on(sources: list[Source], args: DataArguments, training: CPTConfig) -> dict[str, Any]:
    described = {
        f"{source.name}{', held out' if source.role == 'held_out' else ''}": [
            [source.path] if isinstance(source.path, str) else list(source.path),
            source.config or args.dataset_config,
            source.split or args.dataset_split,
            source.column or training.text_column,
        ]
        for source in sources
    }
    facts = {name: getattr(args, name) for name in ("held_out_fraction", "keep_overlap")}
    facts |= {"seed": training.seed} if args.held_out_fraction else {}
    return {**facts, **{f"source {name}": value for name, value in described.items()}}


def write_tokenized(
    args: DataArguments, training: CPTConfig, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> str:
    """Write every source, tokenised, into `args.tokenized_data`, and return a table of what was written.

    The folder appears whole or not at all. Raises ValueError if it holds something, and for streams.
    """
    if args.tokenized_data is None or args.streaming:
        raise ValueError(
            "--tokenized_data must name the folder to write, and --streaming be off: it reads, and writes none."
        )
    output = check_output(args.tokenized_data, None, "--tokenized_data")
    sources = _sources_of(args, training)
    train, held_out = _read_sources(sources, args, training)
    rows = [("source", "documents", "tokens")]
    with appearing_whole(output) as folder:
        for part, named in (("train", train), ("held_out", held_out)):
            for name, data in named.items():
                tokenised = _tokenize(data, training, tokenizer, vocab_size)
                if training.text_column in data.column_names:
                    count_bytes(data, training.text_column, tokenised)
                processes = processes_for(tokenised, training.dataset_num_proc)
                tokenised.save_to_disk(str(_place(folder, part, name)), num_proc=processes)
                tokens = PackedDataset(tokenised, 2, "concat").num_tokens
                rows.append((f"{part}/{name}", f"{len(tokenised):,}", f"{tokens:,}"))
        facts = _what_tokens_depend_on(sources, args, training)
        (folder / TOKENIZED_FILE).write_text(json.dumps(facts, indent=2) + "\n")
    return "\n".join(aligned(rows, num_left=1))


def _place(folder: Path, part: str, name: str) -> Path:
    if Path(name).name != name:
        raise ValueError(f"source {name!r} cannot name a folder: leave slashes and dots out of its name.")
    return folder / part / name


def _read_tokenized(
    sources: list[Source], args: DataArguments, training: CPTConfig
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """What `write_tokenized` wrote, memory-mapped; refuses what was made of other text or cut otherwise."""
    folder = Path(args.tokenized_data)
    if not (folder / TOKENIZED_FILE).is_file():
        raise ValueError(f"--tokenized_data {str(folder)!r} was not written by hf-moe-cpt tokenize: run that first.")
    written, now = read_json(folder / TOKENIZED_FILE), _what_tokens_depend_on(sources, args, training)
    now = json.loads(json.dumps(now))
    for name in [*written, *now]:
        if written.get(name) != now.get(name):
            raise ValueError(
                f"--tokenized_data {str(folder)!r} has {name} = {written.get(name)} and this run {now.get(name)}: "
                "take it back, or run hf-moe-cpt tokenize into another folder."
            )
    parts: dict[str, dict[str, Dataset]] = {"train": {}, "held_out": {}}
    for part, read in parts.items():
        for path in sorted((folder / part).glob("*")):
            with reading(path, "run hf-moe-cpt tokenize into another folder"):
                read[path.name] = load_from_disk(str(path))
    return parts["train"], parts["held_out"]


def _load(source: Source, args: DataArguments, training: CPTConfig, streaming: bool) -> Dataset | IterableDataset:
    names = [source.path] if isinstance(source.path, str) else source.path
    of_all = args.dataset_config  # of those that have it: files beside them have none
    if any(path.exists() and of_all not in configurations_of(path) for path in map(Path, names)):
        of_all = None
    column = source.column or training.text_column
    data = load_text_dataset(
        names[0] if len(names) == 1 else names,
        split=source.split or args.dataset_split,
        streaming=streaming,
        text_column=column,
        config_name=source.config or of_all,
    )
    is_named_otherwise = column != training.text_column and column in column_names(data)
    return data.rename_column(column, training.text_column) if is_named_otherwise else data


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


def _apart(
    train: dict[str, Dataset | IterableDataset], held_out: dict[str, Dataset], training: CPTConfig, keep_overlap: bool
) -> dict[str, Dataset | IterableDataset]:
    """Text to train on without the documents that are held out, whatever source they are in; copies are counted."""
    numbers = [_numbers_of(data, training) for data in held_out.values()]
    unseen = np.unique(np.concatenate(numbers)) if numbers and not keep_overlap else np.empty(0, np.int64)
    for name, data in train.items():
        if isinstance(data, IterableDataset):
            if len(unseen):
                train[name] = data.filter(_is_none_of, fn_kwargs={"unseen": frozenset(unseen.tolist())})
            continue
        own = _numbers_of(data, training)
        copies, kept = len(own) - len(np.unique(own)), np.flatnonzero(~np.isin(own, unseen))
        if copies:
            logger.warning("%s: %d of %d documents are copies of others in it.", name, copies, len(own))
        if not len(kept):
            raise ValueError(
                f"{name}: all of its {len(own)} documents are held out too: name other text, or --keep_overlap."
            )
        if len(kept) < len(own):
            logger.warning("%s: %d documents are held out too and are not trained on.", name, len(own) - len(kept))
            train[name] = data.select(kept)
    return train


def _numbers_of(data: Dataset, training: CPTConfig) -> np.ndarray:
    """64 bits of each document that are the same for the same text, white space around it apart."""
    kind = Features({"number": Value("int64")})
    processes = processes_for(data, training.dataset_num_proc)
    numbered = data.map(
        _number_batch, batched=True, remove_columns=data.column_names, features=kind, num_proc=processes
    )
    return numbered.with_format("numpy")["number"][:].astype(np.int64)


def _number_batch(batch: Mapping[str, list]) -> dict[str, list[int]]:
    return {"number": [_number(value) for value in next(iter(batch.values()))]}


def _number(document: str | list[int]) -> int:
    plain = document.strip() if isinstance(document, str) else repr(list(document))
    return int.from_bytes(
        hashlib.blake2b(plain.encode("utf-8", "replace"), digest_size=8).digest(), "little", signed=True
    )


def _is_none_of(row: Mapping[str, Any], unseen: frozenset[int]) -> bool:
    return _number(next(iter(row.values()))) not in unseen


class NumberedBlocks(TorchDataset):
    """Blocks that carry their position as "block", so that each is counted once however it is batched."""

    def __init__(self, blocks: PackedDataset, num_bytes: int | None) -> None:
        self.blocks = blocks
        self.tokens_per_byte = blocks.num_tokens / num_bytes if num_bytes else None  # of the text, in UTF-8

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {**self.blocks[position], "block": position}


def build_train_dataset(
    args: CPTConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    sources: Mapping[str, Dataset | IterableDataset],
    starting_phase: str,
) -> Mixture | StreamingMixture:
    """The mixture of all sources, exactly `max_steps` optimizer batches long."""
    documents = {}
    with first_rank_first(args, "tokenising"):
        for name, data in sources.items():
            with _naming(name):
                documents[name] = _tokenize(data, args, tokenizer, vocab_size)
    seed = args.seed if args.data_seed is None else args.data_seed
    if any(isinstance(data, IterableDataset) for data in documents.values()):
        return StreamingMixture(
            documents,
            mixture_law(args, starting_phase, None),
            seed,
            max_length=args.max_length,
            packing=args.packing,
            micro_batch_size=args.train_batch_size,
            shuffle_buffer=args.shuffle_buffer,
        )
    blocks = {}
    for name, data in documents.items():
        with _naming(name):
            blocks[name] = PackedDataset(data, args.max_length, args.packing)
    law = mixture_law(args, starting_phase, {name: blocks_per_epoch(data) for name, data in blocks.items()})
    return Mixture(blocks, law, seed)


class MixtureFrom(NamedTuple):
    """From which step on a run reads another mixture than its settings say of a run from the beginning.

    weights: of that step, as fractions in words; None is what the settings say. read: blocks of each source before it.
    """

    step: int
    weights: dict[str, str] | None
    read: dict[str, int]


def mixture_law(
    args: CPTConfig, starting_phase: str, lengths: Mapping[str, Fraction] | None, since: MixtureFrom | None = None
) -> MixtureLaw:
    """Which source serves which block, counted from `since` on.

    lengths: blocks in an epoch of each source; None for streams.
    """
    sources, at = args.sources(), 0 if since is None else since.step
    size, steps = optimizer_batch(args), args.max_steps - at
    weights = {name: source.weight for name, source in sources.items()}
    if since is not None and since.weights is not None:
        weights = {name: Fraction(since.weights[name]) for name in sources}
    capped = {name: source.max_epochs for name, source in sources.items() if source.max_epochs is not None}
    if capped and lengths is None:
        raise ValueError(f"max_epochs of {', '.join(capped)}: a stream does not say how long it is, leave it out.")
    read = dict.fromkeys(sources, 0) if since is None else since.read
    most = {name: max(0, int(Fraction(str(cap)) * lengths[name]) - read[name]) for name, cap in capped.items()}
    if args.weight_schedule == "constant":
        weights, lowered = _within(weights, most, size * steps)
        if lowered and args.process_index == 0:
            logger.warning("max_epochs lowers the weight of %s.", ", ".join(lowered))
        law = MixtureLaw(weights, size, steps)
    else:
        is_late = args.weight_schedule == "anneal"
        change = max(0, args.phases(starting_phase).boundaries(args.max_steps).constant - at) if is_late else None
        ends = [source.weight if source.end_weight is None else source.end_weight for source in sources.values()]
        law = MixtureLaw(weights, size, steps, changing_shares(list(weights.values()), ends, steps, change))
        for name, cap in capped.items():
            if (wanted := read[name] + law.count(name)) > (limit := read[name] + most[name]):
                raise ValueError(
                    f"max_epochs={cap} of {name} is {limit} blocks and its changing weight takes {wanted}: lower the "
                    "weight, or give it more text."
                )
    return law


def optimizer_batch(args: CPTConfig) -> int:
    """Blocks of an optimizer step."""
    return args.train_batch_size * args.num_data_ranks * args.gradient_accumulation_steps


def law_of(
    args: CPTConfig,
    starting_phase: str,
    mixture: Mixture | StreamingMixture,
    law: MixtureLaw | LawInParts,
    parts: Sequence[MixtureFrom],
) -> MixtureLaw | LawInParts:
    """The law of a run whose mixture changed at some steps, of the `law` of one whose did not."""
    blocks = getattr(mixture, "blocks", None)
    lengths = blocks and {name: blocks_per_epoch(data) for name, data in blocks.items()}
    for part in parts:
        law = LawInParts(law, part.step, mixture_law(args, starting_phase, lengths, part), part.read)
    return law


def mixture_state(law: MixtureLaw | LawInParts, step: int) -> dict[str, Any]:
    """What a checkpoint says of the mixture: blocks that were read of each source, the weights of the last step."""
    step = min(step, law.num_batches)  # of a run that was shortened
    weights = law.weights(max(0, step - 1))
    return {
        "blocks_read": {name: law.count(name, step) for name in law.names},
        "weights": {name: str(weight) for name, weight in zip(law.names, weights, strict=True)},
    }


def mixture_that_goes_on(
    state: Mapping[str, Any],
    args: CPTConfig,
    starting_phase: str,
    mixture: Mixture | StreamingMixture,
    law: MixtureLaw | LawInParts,
    changed: Collection[str],
) -> list[MixtureFrom]:
    """How a resumed run reads on: each source from the block at which it stood, with weights that do not jump.

    What the settings say of a whole run is another mixture for the steps that are through, where a run with changing
    weights or a cap is extended, or where weights or the batch were changed by name.
    """
    parts = [MixtureFrom(*part) for part in state.get("mixture_from", ())]
    parts, step = [part for part in parts if part.step < args.max_steps], state.get("step", 0)
    is_known = set(state.get("weights", ())) == set(mixture.law.names)
    if not is_known or not 0 < step < args.max_steps or any(part.step == step for part in parts):
        return parts
    law = law_of(args, starting_phase, mixture, law, parts)
    if all(state[name] == value for name, value in mixture_state(law, step).items()):
        return parts
    chosen = {"mixture", "replay_ratio", "weight_schedule"} & set(changed)
    goes_on = not chosen and (args.weight_schedule != "constant" or is_raised(parts))
    return [*parts, MixtureFrom(step, state["weights"] if goes_on else None, state["blocks_read"])]


def is_raised(parts: Sequence[MixtureFrom]) -> bool:
    """Whether replay takes more than the settings say."""
    return bool(parts) and parts[-1].weights is not None


def _within(weights: dict[str, Any], most: dict[str, int], num_blocks: int) -> tuple[dict[str, Any], list[str]]:
    """Weights under which no source gives more blocks than `most`, and which sources had more.

    The others take their place in their proportions.
    """
    shares, whole = exact_shares(list(weights.values()))
    free, fixed = {name: Fraction(share, whole) for name, share in zip(weights, shares, strict=True)}, {}
    while True:
        left = 1 - sum(fixed.values())
        scale = left / sum(free.values()) if free else Fraction(0)
        over = [name for name in free if name in most and free[name] * scale * num_blocks > most[name]]
        if not over:
            break
        fixed |= {name: Fraction(most[name], num_blocks) for name in over}
        free = {name: share for name, share in free.items() if name not in over}
        if not sum(free.values()):
            raise ValueError(
                f"max_epochs leaves {sum(most.values())} of the {num_blocks} blocks that max_steps reads: lower "
                "max_steps, raise max_epochs, or give a source without it."
            )
    within = {name: fixed.get(name, free.get(name, 0) * scale) for name in weights} if fixed else weights
    return within, list(fixed)


MOST_REPLAY = Fraction(1, 2)  # of a batch, to which a budget for forgetting raises it


def with_more_replay(args: CPTConfig, law: MixtureLaw | LawInParts, at: int, forgotten: list[str]) -> dict[str, Any]:
    """Weights from batch `at` on, in which what is forgotten has twice its share; empty where no more can be given.

    forgotten: names of held-out text; where none of them is a source, all replayed sources are meant. Old text gets at
    most `MOST_REPLAY` together, a source with max_epochs no more than it has; new sources keep their proportions.
    """
    sources = args.sources()
    before = dict(zip(law.names, law.weights(at - 1), strict=True))
    old = [name for name in law.names if sources[name].role == "replay"]
    meant = [name for name in old if name in forgotten] or old
    meant = [name for name in meant if sources[name].max_epochs is None]
    now, asked = sum(before[name] for name in old), sum(before[name] for name in meant)
    if not asked or now >= MOST_REPLAY:
        return {}
    factor = 1 + min(asked, MOST_REPLAY - now) / asked
    weights = {name: share * factor if name in meant else share for name, share in before.items()}
    left = (1 - sum(weights[name] for name in old)) / (1 - now)
    return {name: share if name in old else share * left for name, share in weights.items()}


def refuse_another_order(checkpoint: Path, args: CPTConfig, mixture: Mixture | StreamingMixture) -> None:
    """Raise ValueError for a checkpoint of before epochs ran on into one another, if the run reads past the first."""
    saved = read_beside(checkpoint, "run_state.json").get("settings") or {}
    if not saved or "mixture" in saved or args.packing == "padded":
        return
    again = [name for name in mixture.law.names if (epochs := epochs_of(mixture, name)) is None or epochs > 1]
    if again and "mixture" not in (args.allow_changes or ()):
        raise ValueError(
            f"{checkpoint.name} is of an earlier version, which read {', '.join(again)} in another order from the "
            "second epoch on: start a new run from its weights, or go on with --allow_changes mixture."
        )


MANY_EPOCHS = 4  # up to which repeated text is nearly as good as new: Muennighoff et al. 2023, arXiv 2305.16264


def describe_mixture(trainer: Any) -> str:
    """A table of what the run of a CPTTrainer reads of each source, before its first step."""
    mixture, settings = trainer.mixture, trainer.args.sources()
    law = mixture.law
    rows = [("source", "role", "share", "documents", "tokens", "blocks read", "epochs")]
    for name in law.names:
        number, epochs = law.count(name), epochs_of(mixture, name)
        blocks = getattr(mixture, "blocks", {}).get(name)
        known = ("?", "?") if blocks is None else (f"{len(blocks.documents):,}", f"{blocks.num_tokens:,}")
        share = f"{100 * number / law.num_positions:.2f} %"
        told = "?" if epochs is None else f"{epochs:.2f}"
        rows.append((name, settings[name].role, share, *known, f"{number:,}", told))
    return "\n".join(aligned(rows, num_left=2))


def epochs_of(mixture: Mixture | StreamingMixture, name: str) -> float | None:
    """How often a run reads a source; None for a stream."""
    if not isinstance(mixture, Mixture):
        return None
    return float(mixture.law.count(name) / blocks_per_epoch(mixture.blocks[name]))


def warn_of_epochs(mixture: Mixture | StreamingMixture) -> None:
    """Say which sources are read more often than helps."""
    often = {name: epochs_of(mixture, name) for name in mixture.law.names}
    often = {name: epochs for name, epochs in often.items() if epochs is not None and epochs > MANY_EPOCHS}
    if often:
        logger.warning(
            "Read more often than %d times, beyond which text teaches little that is new: %s. Add text, lower the "
            "weight, or set max_epochs.",
            MANY_EPOCHS,
            ", ".join(f"{name} {epochs:.1f} times" for name, epochs in often.items()),
        )


def build_eval_dataset(
    args: CPTConfig, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, held_out: Dataset, name: str = "text"
) -> NumberedBlocks:
    """Held-out text packed like the training text, in its own order. name: for what is wrong with it."""
    if isinstance(held_out, IterableDataset):
        raise ValueError(
            "eval_dataset is a stream, and losses need the same text each time: pass a map-style Dataset."
        )
    with first_rank_first(args, "tokenising held-out text"), _naming(f"held-out {name}"):
        blocks = PackedDataset(_tokenize(held_out, args, tokenizer, vocab_size), args.max_length, args.packing)
    is_text = "input_ids" not in held_out.column_names
    known = record_of(held_out).get("num_bytes")
    return NumberedBlocks(blocks, count_bytes(held_out, args.text_column) if is_text else known)


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Errors say of which source they tell."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _tokenize(
    data: Dataset | IterableDataset, args: CPTConfig, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> Dataset | IterableDataset:
    return tokenize_documents(
        data,
        tokenizer,
        text_column=args.text_column,
        num_proc=args.dataset_num_proc,
        document_start=args.document_start,
        document_end="none" if tokenizer is None else args.document_end,
        vocab_size=vocab_size,
    )


def named_sources(
    args: CPTConfig, new: Dataset | IterableDataset | dict[str, Any], replay: Dataset | IterableDataset | None
) -> dict[str, Dataset | IterableDataset]:
    """Text to train on by the names of `args.sources()`, in their order; refuses what does not fit them."""
    settings = args.sources()
    if isinstance(new, dict) != (args.mixture is not None):
        raise ValueError("train_dataset of several sources and mixture go together: give both by the same names.")
    if args.mixture is not None:
        if replay is not None or set(new) != set(settings):
            raise ValueError(
                f"mixture names {', '.join(settings)} and train_dataset {', '.join(new)}: give each of them, and no "
                "replay_dataset."
            )
        given = {name: new[name] for name in settings}
    else:
        if args.weight_schedule != "constant":
            raise ValueError(f"weight_schedule={args.weight_schedule!r} needs a mixture, and an end_weight in it.")
        if args.replay_ratio > 0 and replay is None:
            raise ValueError(
                f"replay_ratio={args.replay_ratio} without replay_dataset: pass the old text, or set it to 0."
            )
        if args.replay_ratio == 0 and replay is not None:
            raise ValueError(
                "replay_dataset without replay_ratio: set replay_ratio above 0, or leave replay_dataset out."
            )
        given = {"new": new} if replay is None else {"new": new, "replay": replay}
    argument = {"new": "train_dataset", "replay": "replay_dataset"} if args.mixture is None else {}
    for name, data in given.items():
        if not isinstance(data, Dataset | IterableDataset):
            raise ValueError(
                f"{argument.get(name, name)} is a {type(data).__name__}: pass a datasets.Dataset or IterableDataset "
                "(datasets.Dataset.from_dict({'text': [...]}) makes one from a list)."
            )
    return given


def named_eval_sets(new: Dataset | dict[str, Dataset] | None, replay: Dataset | None) -> dict[str, Dataset]:
    """Held-out sets by the names under which their losses are logged."""
    named = dict(new) if isinstance(new, dict) else ({} if new is None else {"new": new})
    return named if replay is None else {**named, "replay": replay}


def extend_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, old_tokenizer: PreTrainedTokenizerBase
) -> int:
    """Give the model rows for the tokens that only `tokenizer` has; returns their number.

    A new row, of the embeddings and of a head of its own, is the mean of the rows of the pieces that `old_tokenizer`
    makes of the token's text. Rows are padded to a multiple of 64, which tensor cores want; spare ones are the mean of
    all. Ids below the size of `old_tokenizer` keep their meaning: it is for tokenizers to which tokens were added.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = embeddings.weight.shape[0]
    first = min(rows, len(old_tokenizer))
    changed = [
        token for token, index in old_tokenizer.get_vocab().items() if index != tokenizer.get_vocab().get(token)
    ]
    if changed:
        raise ValueError(
            f"the tokenizer gives {len(changed)} tokens of the model another id ({changed[0]!r} for one): add tokens "
            "to the model's own tokenizer, tokenizer.add_tokens(...), and save that."
        )
    if len(tokenizer) <= first:
        return 0
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = {id(table): table for part in (embeddings, head) if part is not None for table in (part.weight,)}
    if getattr(head, "bias", None) is not None:
        tables[id(head.bias)] = head.bias
    with torch.no_grad():
        for table in tables.values():
            table[first:] = table[:first].float().mean(0).to(table.dtype)
        for token in range(first, len(tokenizer)):
            text = tokenizer.decode([token])
            pieces = old_tokenizer(text, add_special_tokens=False)["input_ids"]
            pieces = [piece for piece in pieces if piece < first]
            for table in tables.values() if pieces else ():
                table[token] = table[pieces].float().mean(0).to(table.dtype)
    logger.warning("%d new tokens: embeddings have %d rows.", len(tokenizer) - first, embeddings.weight.shape[0])
    return len(tokenizer) - first


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


def continue_rate(args: CPTConfig, checkpoint: str) -> None:
    """Let the constant phase go on at the rate of the checkpoint, unless one was chosen; no higher than the peak."""
    rate = (read_state(checkpoint) or {}).get("learning_rate")
    usual, _ = default_rates(args.cpt_schedule, args.learning_rate, None, args.min_learning_rate)
    if not rate or args.constant_learning_rate != usual:
        return
    args.constant_learning_rate = min(rate, args.learning_rate)
    args.min_learning_rate = min(args.min_learning_rate, args.constant_learning_rate)
    told = "the rate of %s" if rate <= args.learning_rate else f"learning_rate, below the rate of %s, {rate:g}"
    logger.warning(f"The constant phase goes on at %g, {told}.", args.constant_learning_rate, checkpoint)


def extension_of(checkpoint: Path, args: CPTConfig) -> Extension | None:
    """How a resumed run goes on that was meant to end earlier, or that was extended before."""
    state = read_state(str(checkpoint)) or {}
    rate, before = state.get("learning_rate"), state.get("extension")
    if rate is None or args.max_steps <= state["max_steps"]:
        return None if before is None else Extension(*before)
    extension = Extension(state["step"], rate, args.rewarm, state.get("phase") == "warmup")
    logger.warning(
        "The run goes on from step %d, at a rate of %g, to %d in place of %d steps: %s.",
        *(state["step"], rate, args.max_steps, state["max_steps"]),
        "it climbs to the longer schedule"
        if args.rewarm
        else "it goes on warming up"
        if extension.was_warming
        else "its rate rises no more, unless --rewarm asks for it",
    )
    return extension


def resumed_settings(checkpoint: str, max_steps: int, rewarm: bool) -> dict[str, Any]:
    """The schedule of a run that is resumed from `checkpoint` and goes to `max_steps`, as its trainer will make it."""
    saved, state = read_beside(Path(checkpoint), "run_state.json").get("settings"), read_state(checkpoint)
    if saved is None or state is None:
        raise ValueError(f"{checkpoint} is no checkpoint of hf-moe-cpt cpt: it does not say how it was made.")
    known = {option.name for option in fields(CPTConfig) if option.name.endswith(("_fraction", "learning_rate"))}
    known |= {"cpt_schedule", "inv_sqrt_steepness"}
    given = {name: value for name, value in saved.items() if name in known}
    args = CPTConfig(output_dir=checkpoint, max_steps=max_steps, rewarm=rewarm, use_cpu=True, **given)
    extension = extension_of(Path(checkpoint), args)
    return {**args.schedule_settings(state["starting_phase"]), "extension": extension}


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
    with reading(path):
        saved = torch.load(path, map_location="cpu", weights_only=True)["state"]
        shapes_saved = {index: entry["exp_avg"].shape for index, entry in saved.items() if "exp_avg" in entry}
    current = optimizer.state_dict()
    shapes_now = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    if len(shapes_saved) != len(shapes_now) or any(shapes_now[i] != shape for i, shape in shapes_saved.items()):
        raise ValueError(
            f"keep_optimizer_state: the moments in {str(path)!r} belong to other parameters ({len(shapes_saved)} "
            f"against {len(shapes_now)}): start from the checkpoint of this model, or set keep_optimizer_state=False."
        )
    with reading(path):
        optimizer.load_state_dict({"state": saved, "param_groups": current["param_groups"]})
    logger.info("Adam moments of %d parameters carried over from %s.", len(shapes_now), path)
