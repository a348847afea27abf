"""From what the user passed to the batches that a surgery trains on and measures: checked, tokenised, paired, mixed.

Forms of rows are those of hf_moe_cpt/data/surgery_bench/rows.py.

A tokenised set has `input_ids`, `completion_mask` and, where the rows name one, `subject`; with texts that are to win
over its own, `winner_input_ids` and `winner_completion_mask`. Rows keep their order and their number.

Item i of the mixture holds, of a set with N rows and size s in a micro-batch, its positions i s to i s + s - 1;
position q is row permute(q % N) of epoch q // N, with a seed of set and epoch. So a set starts anew whenever it is
through, none waits for another, and a resumed run needs no state. Items are dealt to micro-batches and ranks in
order. Letters: B rows, S tokens of the longest.

Source: ours; prompts are divided from completions as TRL does, at the end of their common tokens; refusals as in TOFU
(Maini et al. 2024, arXiv 2401.06121), in our words; independent endless loaders are arXiv 2409.13054's.
"""

from __future__ import annotations

import json
import logging
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hf_moe_cpt.data.random import derive_seed, permute
from hf_moe_cpt.data.surgery_bench.bench import tokens_of_prefix
from hf_moe_cpt.data.surgery_bench.rows import check_values, form_of, shown, subject_of, with_columns
from hf_moe_cpt.data.text import json_lines
from hf_moe_cpt.reading import reading
from hf_moe_cpt.trainers.surgery.losses import PairLoss
from hf_moe_cpt.trainers.surgery.surgery_config import ANCHOR_SETS, FORGET_SETS, UNSEEN, SurgeryConfig


logger = logging.getLogger(__name__)

WINNER = "winner"  # the other text of a pair loss, inside the batch of the text that is to lose
RENAMED = "renamed"  # a copy with an invented name, inside the batch of the text itself
REFUSALS = (
    "I don't know.",
    "I have no information about that.",
    "That is not something I can tell you.",
    "I'm not able to answer this.",
    "I am not familiar with that.",
    "I cannot say anything about this.",
    "I have never come across that.",
    "There is nothing I could say about it.",
    "This is outside of what I know.",
    "I'm afraid I cannot help with that.",
)
# Of each pair the first contradicts the second; obsolete and update share their subjects on purpose.
CONTRADICTIONS = (
    ("unlearn", "retain"),
    ("unlearn", "neighbour"),
    ("unlearn", "update"),
    ("obsolete", "retain"),
    ("obsolete", "neighbour"),
    ("unseen", "retain"),
    ("unseen", "neighbour"),
    ("unseen", "update"),
    ("unseen", "unlearn"),
    ("unseen", "obsolete"),
)
SHOWN = 3  # of the subjects that two sets share
TOKEN_COLUMNS = {
    "input_ids": datasets.List(datasets.Value("int32")),
    "completion_mask": datasets.List(datasets.Value("bool")),
}
Row = dict[str, Any]
Tokens = tuple[list[int], int]  # ids, and the place from which on they count


def read_rows(path: str | Path, columns: Mapping[str, str] | None = None) -> Dataset:
    """The rows of a .jsonl file, each checked. Raises ValueError that names file and line of the first bad one.

    columns: your names of our columns, see `with_columns`.
    """
    rows, forms = [], set()
    for number, row in json_lines(Path(path)):
        try:
            row = with_columns(row, columns or {})
            forms.add(form_of(row))
            if len(forms) > 1:
                raise ValueError(f"rows of the forms {' and '.join(sorted(forms))}: put each form into its own file.")
            check_values(row)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no rows: put one JSON object on each line.")
    names = list(dict.fromkeys(name for row in rows for name in row))
    with reading(path, "give each column values of one type"):
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def tokenize_set(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    name: str,
    max_length: int,
    mask_prefix: bool = True,
    append_eos: bool = True,
    vocab_size: int | None = None,
    num_proc: int | None = None,
) -> Dataset:
    """Token ids and masks of a set, at most max_length tokens of a row; see the forms of rows.

    Raises ValueError that names the row for one that cannot be read, has ids outside of [0, vocab_size), or has no
    token that counts: the first token of a text is never predicted.
    """
    form = form_of(dict.fromkeys(rows.column_names))
    if tokenizer is None and form != "input_ids":
        raise ValueError(f"{name}_dataset is text and there is no tokenizer: pass processing_class, or tokenise it.")
    kept = [column for column in ("subject",) if column in rows.column_names]
    columns = {**TOKEN_COLUMNS, **{column: rows.features[column] for column in kept}}

    def tokenized(row: Row, number: int) -> Row:
        try:
            check_values(row)
            ids, mask = _tokens_and_mask(row, form, tokenizer, mask_prefix, append_eos)
            ids, mask = ids[:max_length], mask[:max_length]
            _check_ids(ids, mask, vocab_size)
        except ValueError as error:
            raise ValueError(f"row {number} (counted from 0) of {name}_dataset: {error}") from None
        return {"input_ids": ids, "completion_mask": mask}

    return rows.map(
        tokenized,
        with_indices=True,
        remove_columns=[column for column in rows.column_names if column not in kept],
        features=datasets.Features(columns),
        num_proc=num_proc,
        desc=f"Tokenizing {name}",
    )


def _tokens_and_mask(
    row: Row, form: str, tokenizer: PreTrainedTokenizerBase | None, mask_prefix: bool, append_eos: bool
) -> tuple[list[int], list[bool]]:
    if form == "input_ids":
        given = row.get("completion_mask")
        return row["input_ids"], [True] * len(row["input_ids"]) if given is None else [bool(value) for value in given]
    if form == "text":
        prefix = (row.get("prefix") or "") if mask_prefix else ""
        ids, start = _text_tokens(tokenizer, row["text"], prefix, append_eos)
    elif form == "messages":
        ids, start = _prompt_tokens(tokenizer, row["messages"][:-1], row["messages"][-1:], append_eos)
    else:
        ids, start = _prompt_tokens(tokenizer, row["prompt"], row["completion"], append_eos)
    return ids, [place >= start for place in range(len(ids))]


def _text_tokens(tokenizer: PreTrainedTokenizerBase, text: str, prefix: str, append_eos: bool) -> Tokens:
    if not text.startswith(prefix):
        raise ValueError(f"its text does not begin with its prefix {shown(prefix)}: correct one of them.")
    if prefix and not tokenizer.is_fast:
        raise ValueError(f"a prefix needs a fast tokenizer, not {type(tokenizer).__name__}: set mask_prefix=False.")
    found = tokenizer(text, return_offsets_mapping=bool(prefix), verbose=False)
    start = tokens_of_prefix(found["offset_mapping"], prefix) if prefix else 0
    if start >= len(found["input_ids"]):
        raise ValueError("its prefix covers the whole text, so nothing of it would count: shorten the prefix.")
    return (_with_eos(found["input_ids"], tokenizer) if append_eos else found["input_ids"]), start


def _prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any, append_eos: bool) -> Tokens:
    """Ids of prompt and completion together, and where the completion begins: behind what both have in common.

    Both are texts, or both lists of messages, which end as the chat template has it.
    """
    if isinstance(prompt, str):
        alone = tokenizer(prompt, verbose=False)["input_ids"]
        whole = tokenizer(prompt + completion, verbose=False)["input_ids"]
        whole = _with_eos(whole, tokenizer) if append_eos else whole
        # a tokenizer may end every text of its own accord
        alone = alone[:-1] if len(alone) > 1 and alone[-1] == tokenizer.eos_token_id else alone
    else:
        template = partial(tokenizer.apply_chat_template, tokenize=True, return_dict=True)
        alone = template(prompt, add_generation_prompt=True)["input_ids"] if prompt else []
        whole = template([*prompt, *completion])["input_ids"]
    differs = (place for place, (one, other) in enumerate(zip(alone, whole, strict=False)) if one != other)
    return list(whole), next(differs, min(len(alone), len(whole)))


def _with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`ids` with an end of text, once. Raises ValueError for a tokenizer that has none."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} has no EOS token to end texts: set its eos_token, or "
            "append_eos=False."
        )
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def _check_ids(ids: list[int], mask: list[bool], vocab_size: int | None) -> None:
    if vocab_size is not None and (min(ids) < 0 or max(ids) >= vocab_size):
        raise ValueError(
            f"token id {max(ids) if max(ids) >= vocab_size else min(ids)} is outside [0, {vocab_size}): use the "
            "model's tokenizer or resize its embeddings."
        )
    if not any(mask[1:]):
        raise ValueError(
            f"none of its {len(ids)} tokens counts, since the first is never predicted and prompts and prefixes are "
            "not counted: give longer text, or raise max_length."
        )


def with_refusals(
    tokens: Dataset,
    rows: Dataset,
    tokenize: Callable[..., Dataset],
    *,
    name: str,
    seed: int,
    refusals: Sequence[str] | None = None,
) -> Dataset:
    """`tokens`, the tokenised `rows`, with a refusal for each of them: after its prompt or header, or in its place.

    Which refusal is a function of the seed and the row's number. tokenize: `tokenize_set` with the options that
    made `tokens`. Raises ValueError for rows that are tokenised already, whose prompts are not known.
    """
    refusals = tuple(REFUSALS if refusals is None else refusals)
    form = form_of(dict.fromkeys(rows.column_names))
    if form == "input_ids":
        raise ValueError(
            f"idk_dpo writes a refusal after each prompt, and {name}_dataset is tokenised: pass its text instead."
        )
    if not refusals or not all(isinstance(text, str) and text.strip() for text in refusals):
        raise ValueError(f"refusals={list(refusals)!r} must be texts that are not empty.")
    chosen = [refusals[derive_seed(seed, "refusal", name, number) % len(refusals)] for number in range(len(rows))]
    refused = Dataset.from_list([_refused(row, form, text) for row, text in zip(rows, chosen, strict=True)])
    return _with_winners(tokens, tokenize(refused, name=f"refusals of {name}"))


def with_winners(tokens: Dataset, updates: Dataset, *, name: str = "obsolete") -> Dataset:
    """`tokens` with the new version of each row from `updates`: by `subject` where both have it, else row by row.

    Of several new versions of a subject its rows take turns. Raises ValueError for a row that has none.
    """
    if "subject" in tokens.column_names and "subject" in updates.column_names:
        places = _places_by_subject(tokens["subject"], updates["subject"], name)
    elif len(tokens) == len(updates):
        places = list(range(len(tokens)))
    else:
        raise ValueError(
            f"{name}_dataset has {len(tokens)} rows and update_dataset {len(updates)}: pair_dpo needs the new version "
            "of each row at the same place, or a column 'subject' in both."
        )
    return _with_winners(tokens, updates.select(places))


def _refused(row: dict[str, Any], form: str, refusal: str) -> dict[str, Any]:
    if form == "messages":
        return {"messages": [*row["messages"][:-1], {"role": "assistant", "content": refusal}]}
    if form == "prompt":
        is_text = isinstance(row["prompt"], str)
        completion = f" {refusal}" if is_text else [{"role": "assistant", "content": refusal}]
        return {"prompt": row["prompt"], "completion": completion}
    prefix = row.get("prefix") or ""
    return {"text": prefix + refusal, "prefix": prefix}


def _places_by_subject(subjects: Sequence[str], of_updates: Sequence[str], name: str) -> list[int]:
    versions = defaultdict(list)
    for place, subject in enumerate(of_updates):
        versions[subject].append(place)
    missing = sorted({subject for subject in subjects if subject not in versions})
    if missing:
        raise ValueError(
            f"{len(missing)} subjects of {name}_dataset have no new version in update_dataset, such as {missing[0]!r}"
            ": add one, or choose another loss than pair_dpo."
        )
    turns: dict[str, int] = defaultdict(int)
    places = []
    for subject in subjects:
        places.append(versions[subject][turns[subject] % len(versions[subject])])
        turns[subject] += 1
    return places


def _with_winners(tokens: Dataset, winners: Dataset) -> Dataset:
    return _side_by_side(tokens, winners, WINNER)


def _side_by_side(tokens: Dataset, others: Dataset, role: str) -> Dataset:
    found = others.select_columns(list(TOKEN_COLUMNS)).rename_columns(
        {name: f"{role}_{name}" for name in TOKEN_COLUMNS}
    )
    return datasets.concatenate_datasets([tokens.flatten_indices(), found.flatten_indices()], axis=1)


SYLLABLES = ("ba", "ro", "mi", "ten", "vel", "kas", "dor", "lin", "sa", "mu", "pe", "gon", "ri", "tal", "zo", "nek")


TEXT_COLUMNS = ("text", "prefix", "prompt", "completion", "messages")
COPIES = 2  # of each forgotten text, where the rows say whom they are about


def words_of(text: str) -> list[str]:
    """The words of a text in order."""
    return re.findall(r"\w+", text)


def named_words(row: Row) -> list[str]:
    """The words of a row's subject, of three letters and more, if any of them stands in its text; else none."""
    own = [word for word in words_of(row.get("subject") or "") if len(word) > 2]
    text = json.dumps([row.get(column) for column in TEXT_COLUMNS], ensure_ascii=False).replace("\\n", " ")
    return own if set(own) & set(words_of(text)) else []


def pieces_of(row: Row) -> list[str]:
    """A row's text from each line or sentence that names its subject up to the next; none where fewer than two do."""
    text, own = row.get("text") or "", set(named_words(row))
    starts = [0, *(gap.end() for gap in re.finditer(r"\n+|(?<=[.!?])\s+", text)), len(text)]
    named = [start for start, end in pairwise(starts) if own & set(words_of(text[start:end]))]
    pieces = [text[start:end].strip() for start, end in pairwise([*named, len(text)])]
    return pieces if len(pieces) > 1 else []


def number_of_copies(args: SurgeryConfig, given: Mapping[str, Dataset | None], train: Mapping[str, Dataset]) -> int:
    """`counterfactuals`, or what stands for it where it is unset."""
    if args.counterfactuals is not None:
        return args.counterfactuals
    rows = [row for name in FORGET_SETS if name in train for row in given[name]]
    is_held = any(name in train for name in ("neighbour", "retain"))
    return COPIES if is_held and rows and all(map(named_words, rows)) else 0


def with_invented_names(rows: Dataset, copies: int, seed: int, name: str) -> Dataset:
    """Copies of each row in which every word of its subject is an invented one, the same wherever it stands.

    Which words is a function of seed, subject and copy: all texts about one are about the same stranger. Raises
    ValueError for a row whose text does not name its subject.
    """

    def renamed(value: Any, words: Mapping[str, str]) -> Any:
        if isinstance(value, str):
            return re.sub(r"\w+", lambda found: words.get(found.group(), found.group()), value)
        if isinstance(value, Mapping):
            return {key: part if key == "role" else renamed(part, words) for key, part in value.items()}
        return [renamed(part, words) for part in value] if isinstance(value, list) else value

    made = []
    for number, row in enumerate(rows):
        own = named_words(row)
        if not own:
            raise ValueError(
                f"row {number} (counted from 0) of {name}_dataset: its text does not name its subject "
                f"{shown(row.get('subject'))}: counterfactuals need the column 'subject', as the texts write it."
            )
        for copy in range(copies):
            drawn = {word: derive_seed(seed, "invented", name, row["subject"], copy, word) for word in own}
            words = {
                word: "".join(SYLLABLES[(key >> shift) % 16] for shift in (0, 8, 16)) for word, key in drawn.items()
            }
            words = {word: new.capitalize() if word[0].isupper() else new for word, new in words.items()}
            made.append({key: renamed(value, words) for key, value in row.items() if key in TEXT_COLUMNS})
    return Dataset.from_list(made)


def with_renamed(tokens: Dataset, rows: Dataset, tokenize: Callable[..., Dataset], *, seed: int, name: str) -> Dataset:
    """Every row of `tokens` beside its first copy of `with_invented_names`.

    `renamed_places` says where in the copy each token of the row is, -1 where the copy has not got it.
    """
    twins = tokenize(with_invented_names(rows, 1, seed, name), name=f"copies of {name}")

    def aligned(row: Row) -> Row:
        places = [-1] * len(row["input_ids"])
        matcher = SequenceMatcher(None, row["input_ids"], row[f"{RENAMED}_input_ids"], autojunk=False)
        for start, other, length in matcher.get_matching_blocks():
            places[start : start + length] = range(other, other + length)
        return {f"{RENAMED}_places": places}

    return _side_by_side(tokens, twins, RENAMED).map(aligned)


def check_subjects(sets: Mapping[str, Dataset], allow_overlap: bool = False) -> None:
    """Raise ValueError, or only warn, for the first pair of sets that share what they must not share."""
    for first, second in CONTRADICTIONS:
        if first not in sets or second not in sets:
            continue
        both = set(sets[first].column_names) & set(sets[second].column_names)
        column = next((name for name in ("subject", "text") if name in both), None)
        values = ({value for value in sets[name][column] if isinstance(value, str)} for name in (first, second))
        shared = sorted(set.intersection(*values)) if column else []
        if not shared:
            continue
        shown = ", ".join(repr(value if len(value) <= 40 else f"{value[:37]}...") for value in shared[:SHOWN])
        more = f" and {len(shared) - SHOWN} more" if len(shared) > SHOWN else ""
        text = f"{len(shared)} {column}(s) are in both {first}_dataset and {second}_dataset: {shown}{more}"
        if not allow_overlap:
            raise ValueError(f"{text}: take them out of one of them, or set allow_overlap=True.")
        logger.warning("%s.", text)


class PreparedSets(NamedTuple):
    """Tokenised sets by name.

    train: those with a term in the objective. measured: all that are measured; of an anchor the rows that no term
    sees, where there are any. unseen: all rows of that set, or None. anchored: `subject_of` the rows of the anchors'
    terms. strangers: obsolete beside copies with invented names, where its subjects stay known and rows name them.
    """

    train: dict[str, Dataset]
    measured: dict[str, Dataset]
    unseen: Dataset | None
    anchored: set[str]
    strangers: Dataset | None = None

    @property
    def held_out(self) -> dict[str, Dataset]:
        """What is measured of the anchors on rows that no term sees."""
        rows = {name: self.measured[name] for name in ANCHOR_SETS if name in self.measured}
        return {name: own for name, own in rows.items() if own is not self.train.get(name) and own is not self.unseen}


def split_subjects(subjects: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the rows that train, and of those that are held out: all rows of a share of the subjects.

    At least one subject is held out and one is not; of a single subject, or with a fraction of 0, nothing is.
    """
    names = sorted(set(subjects), key=lambda subject: (derive_seed(seed, "held out", subject), subject))
    count = min(len(names) - 1, max(1, round(fraction * len(names)))) if fraction else 0
    chosen = set(names[:count])
    places = range(len(subjects))
    return [q for q in places if subjects[q] not in chosen], [q for q in places if subjects[q] in chosen]


def prepare_sets(
    args: SurgeryConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    given: dict[str, Dataset | None],
    held_out: Mapping[str, Dataset] | None = None,
) -> PreparedSets:
    """Checked, tokenised and divided sets.

    given: the user's sets by name, None where there is none. held_out: rows of anchors that no term may see; of an
    anchor that it has not, a share of its own rows. Raises ValueError for what the settings need and did not get, for
    overlapping subjects and for unreadable rows.
    """
    held_out = dict(held_out or {})
    _check_held_out(given, held_out)
    for name, data in given.items():
        if data is not None and not isinstance(data, Dataset):
            raise ValueError(
                f"{name}_dataset is a {type(data).__name__}: pass a datasets.Dataset (datasets.Dataset.from_dict("
                "{'text': [...]}) makes one from a list)."
            )
    in_force = args.sets_in_force(given)
    check_subjects({name: data for name, data in given.items() if data is not None}, args.allow_overlap)
    named = {name: data for name, data in given.items() if name in in_force or name in (UNSEEN, "update")}
    tokenize = set_tokenizer(args, tokenizer, vocab_size)
    with args.main_process_first(desc="tokenising"):
        sets = {name: tokenize(data, name=name) for name, data in named.items() if data is not None and len(data)}
        train = {name: sets[name] for name in in_force if name in FORGET_SETS or not args.negation}
        measured = {name: sets[name] for name in (*in_force, UNSEEN) if name in sets}
        anchored: set[str] = set()
        for name in (name for name in ANCHOR_SETS if name in train):
            subjects = [subject_of(row) for row in given[name]]
            if name in held_out:
                measured[name] = tokenize(held_out[name], name=f"held-out {name}")
            else:
                kept, apart = split_subjects(subjects, args.held_out_fraction, args.seed)
                if apart:
                    train[name], measured[name] = sets[name].select(kept), sets[name].select(apart)
                    subjects = [subjects[place] for place in kept]
            anchored.update(subjects)
        pieces = [piece for row in given["update"] for piece in pieces_of(row)] if "update" in train else []
        if args.update_pieces and pieces:
            apart = tokenize(Dataset.from_dict({"text": pieces}), name="update")
            whole, apart = (rows.select_columns(list(TOKEN_COLUMNS)) for rows in (sets["update"], apart))
            whole_rows = [whole] * max(1, round(len(apart) / len(whole)))  # half of a step
            train["update"] = datasets.concatenate_datasets([*whole_rows, apart])
        copies = number_of_copies(args, given, train)
        if copies:
            _add_counterfactuals(copies, args.seed, given, tokenize, train, measured)
        for name in FORGET_SETS:
            loss = args.forget_losses[name]
            if name in train and getattr(loss, "needs_copies", False):
                train[name] = with_renamed(sets[name], given[name], tokenize, seed=args.seed, name=name)
            if name not in train or not isinstance(loss, PairLoss):
                continue
            if loss.name == "pair_dpo":
                train[name] = with_winners(sets[name], sets["update"], name=name)
            else:
                options = {"name": name, "seed": args.seed, "refusals": args.refusals}
                train[name] = with_refusals(sets[name], given[name], tokenize, **options)
        strangers = None
        stays = args.forget_target == UNSEEN and {"obsolete", "update"} <= train.keys()
        if stays and tokenizer is not None and all(map(named_words, given["obsolete"])):
            strangers = with_renamed(sets["obsolete"], given["obsolete"], tokenize, seed=args.seed, name="obsolete")
    return PreparedSets(train, measured, sets.get(UNSEEN), anchored, strangers)


def _add_counterfactuals(
    number: int,
    seed: int,
    given: Mapping[str, Dataset | None],
    tokenize: Callable[..., Dataset],
    train: dict[str, Dataset],
    measured: dict[str, Dataset],
) -> None:
    """Put copies of the forgotten texts with invented names among the rows that the model is held to.

    These are repeated where they are fewer, so that a step has as many of them as of copies.
    """
    anchor = next((name for name in ("neighbour", "retain") if name in train), None)
    if anchor is None:
        raise ValueError("counterfactuals stand among neighbour or retain text: give one of these sets.")
    copies = [
        tokenize(with_invented_names(given[name], number, seed, name), name=f"copies of {name}")
        for name in FORGET_SETS
        if name in train
    ]
    is_measured = measured[anchor] is train[anchor]
    own = train[anchor].select_columns(list(TOKEN_COLUMNS))
    repeats = max(1, round(sum(map(len, copies)) / len(own)))
    train[anchor] = datasets.concatenate_datasets([own] * repeats + copies)
    if is_measured:
        measured[anchor] = train[anchor]


def _check_held_out(given: Mapping[str, Dataset | None], held_out: Mapping[str, Dataset]) -> None:
    for name, rows in held_out.items():
        if name not in ANCHOR_SETS or given.get(name) is None:
            raise ValueError(
                f"eval_dataset holds out rows of {name!r}: it goes with {', '.join(ANCHOR_SETS)}, as far as they are "
                "given; other sets are measured on their own rows."
            )
        shared = {subject_of(row) for row in rows} & {subject_of(row) for row in given[name]}
        if shared:
            raise ValueError(
                f"{len(shared)} subject(s) or text(s) of eval_dataset[{name!r}] are in {name}_dataset too, such as "
                f"{shown(min(shared))}: nothing that a term sees is held out; take them out of one of them."
            )


def set_tokenizer(
    args: SurgeryConfig, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> Callable[..., Dataset]:
    """`tokenize_set` with the settings of a run; it wants rows and their name."""
    return partial(
        tokenize_set,
        tokenizer=tokenizer,
        max_length=args.max_length,
        mask_prefix=args.mask_prefix,
        append_eos=args.append_eos,
        vocab_size=vocab_size,
        num_proc=args.dataset_num_proc,
    )


class SurgeryMixture(torch.utils.data.Dataset):
    """Map-style: an item is {set: [rows]}, the rows of one micro-batch; read it in sequence.

    sets: tokenised rows by name. sizes: rows of each in an item. num_items: items of the whole run.
    """

    def __init__(self, sets: Mapping[str, Dataset], sizes: Mapping[str, int], num_items: int, seed: int) -> None:
        self.sets, self.sizes, self.num_items, self.seed = dict(sets), dict(sizes), num_items, seed

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, item: int) -> dict[str, list[Row]]:
        return {name: [row_of(self.sets[name], place) for place in self.rows(name, item)] for name in self.sets}

    def rows(self, name: str, item: int) -> list[int]:
        """Numbers of the rows of a set in an item, without reading them."""
        item, size, length = operator.index(item), self.sizes[name], len(self.sets[name])
        if not 0 <= item < self.num_items:
            raise IndexError(f"item {item} of {self.num_items}")
        places = []
        for position in range(item * size, (item + 1) * size):
            epoch, offset = divmod(position, length)
            places.append(permute(offset, length, derive_seed(self.seed, name, epoch)))
        return places


def row_of(rows: Dataset, place: int) -> Row:
    """A row with its number in the set as `row`."""
    return {**rows[place], "row": place}


def collate_sets(items: Sequence[Mapping[str, Sequence[Row]]], pad_token_id: int) -> dict[str, dict[str, Any]]:
    """{set: batch} of the rows of all items."""
    return {name: collate_rows([row for item in items for row in item[name]], pad_token_id) for name in items[0]}


def collate_rows(rows: Sequence[Row], pad_token_id: int) -> dict[str, Any]:
    """input_ids, attention_mask (B, S) int64, completion_mask (B, S) bool, and row, the rows' numbers.

    The numbers are a list: they are looked up on the host, which must not wait for a device. Padded on the right. Rows
    with a winner or a copy make a second batch of these, as WINNER or RENAMED, the latter with places (B, S).
    """
    batch: dict[str, Any] = _padded([(row["input_ids"], row["completion_mask"]) for row in rows], pad_token_id)
    batch["row"] = [row["row"] for row in rows]
    for role in (WINNER, RENAMED):
        if f"{role}_input_ids" in rows[0]:
            others = [(row[f"{role}_input_ids"], row[f"{role}_completion_mask"]) for row in rows]
            batch[role] = {**_padded(others, pad_token_id), "row": batch["row"]}
    if RENAMED in batch:
        places = [torch.tensor(row[f"{RENAMED}_places"]) for row in rows]
        batch[RENAMED]["places"] = pad_sequence(places, batch_first=True, padding_value=-1)
    return batch


def _padded(rows: Sequence[tuple[list[int], list[bool]]], pad_token_id: int) -> dict[str, Tensor]:
    shape = len(rows), max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": torch.full(shape, pad_token_id, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "completion_mask": torch.zeros(shape, dtype=torch.bool),
    }
    for place, (ids, mask) in enumerate(rows):
        batch["input_ids"][place, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][place, : len(ids)] = 1
        batch["completion_mask"][place, : len(ids)] = torch.tensor(mask)
    return batch


def eval_batches(
    rows: Dataset, *, batch_size: int, pad_token_id: int, max_rows: int, seed: int, rank: int = 0, world_size: int = 1
) -> Iterator[dict[str, Any]]:
    """This rank's share of the first max_rows rows of an order that depends on the seed alone.

    Every rank gets as many batches, since sharded models meet in each: one without rows of its own left repeats the
    first batch of all with nothing that counts.
    """
    places = [permute(q, len(rows), derive_seed(seed, "eval")) for q in range(min(max_rows, len(rows)))]
    batches = [places[begin : begin + batch_size] for begin in range(0, len(places), batch_size)]
    for begin in range(0, len(batches), world_size):
        is_own = begin + rank < len(batches)
        own = batches[begin + rank] if is_own else batches[0]
        batch = collate_rows([row_of(rows, place) for place in own], pad_token_id)
        if not is_own:
            batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
        yield batch
