"""Rows of a surgery as token ids and a mask of the tokens that count, whatever form they came in.

| columns | what counts |
|---|---|
| `text`, and `prefix` if there is a header | the text; with mask_prefix without its header |
| `prompt` and `completion`, text or messages | the completion |
| `messages` | the last message, which the assistant must have said |
| `input_ids`, and `completion_mask` | what the mask says; everything without one |

A tokenised set has `input_ids`, `completion_mask` and, where the rows name one, `subject`. Rows keep their order and
their number. Source: ours; prompts are divided from completions as TRL does, at the end of their common tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_moe_cpt.data.file_checks import json_lines
from hf_moe_cpt.data.prefix_tokens import tokens_of_prefix


TOKEN_COLUMNS = {
    "input_ids": datasets.List(datasets.Value("int32")),
    "completion_mask": datasets.List(datasets.Value("bool")),
}
Tokens = tuple[list[int], int]  # ids, and the place from which on they count


def read_rows(path: str | Path) -> Dataset:
    """The rows of a .jsonl file, each checked. Raises ValueError that names file and line of the first bad one."""
    rows, forms = [], set()
    for number, row in json_lines(Path(path)):
        try:
            forms.add(form_of(row))
            if len(forms) > 1:
                raise ValueError(f"rows of the forms {' and '.join(sorted(forms))}: put each form into its own file.")
            _check_values(row)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no rows: put one JSON object on each line.")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def form_of(row: Mapping[str, Any]) -> str:
    """Which of the forms a row (or a mapping of columns) has: input_ids, messages, prompt or text.

    Raises ValueError for none of them.
    """
    if "input_ids" in row:
        return "input_ids"
    if "messages" in row:
        return "messages"
    if "prompt" in row and "completion" in row:
        return "prompt"
    if "text" in row:
        return "text"
    raise ValueError(
        f"the columns {', '.join(row) or '(none)'} are no text: give 'text', 'prompt' and 'completion', 'messages' or "
        "'input_ids'."
    )


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
    """Token ids and masks of a set, at most max_length tokens of a row; see the table at the top.

    Raises ValueError that names the row for one that cannot be read, has ids outside of [0, vocab_size), or has no
    token that counts: the first token of a text is never predicted.
    """
    form = form_of(dict.fromkeys(rows.column_names))
    if tokenizer is None and form != "input_ids":
        raise ValueError(f"{name}_dataset is text and there is no tokenizer: pass processing_class, or tokenise it.")
    kept = [column for column in ("subject",) if column in rows.column_names]
    columns = {**TOKEN_COLUMNS, **{column: rows.features[column] for column in kept}}
    return rows.map(
        _Tokenise(tokenizer, form, name, max_length, mask_prefix, append_eos, vocab_size),
        with_indices=True,
        remove_columns=[column for column in rows.column_names if column not in kept],
        features=datasets.Features(columns),
        num_proc=num_proc,
        desc=f"Tokenizing {name}",
    )


class _Tokenise:
    """One row to its columns; a class so that processes can be handed it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        form: str,
        name: str,
        max_length: int,
        mask_prefix: bool,
        append_eos: bool,
        vocab_size: int | None,
    ) -> None:
        self.tokenizer, self.form, self.name = tokenizer, form, name
        self.max_length, self.mask_prefix, self.append_eos = max_length, mask_prefix, append_eos
        self.vocab_size = vocab_size

    def __call__(self, row: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            ids, mask = self._tokens_and_mask(row)
            _check_ids(ids, mask, self.vocab_size)
        except ValueError as error:
            raise ValueError(f"row {number} (counted from 0) of {self.name}_dataset: {error}") from None
        return {"input_ids": ids, "completion_mask": mask}

    def _tokens_and_mask(self, row: dict[str, Any]) -> tuple[list[int], list[bool]]:
        _check_values(row)
        if self.form == "input_ids":
            ids = list(row["input_ids"])[: self.max_length]
            given = row.get("completion_mask")
            return ids, [True] * len(ids) if given is None else [bool(value) for value in given][: self.max_length]
        ids, start = self.tokens(row)
        ids = ids[: self.max_length]
        return ids, [place >= start for place in range(len(ids))]

    def tokens(self, row: Mapping[str, Any]) -> Tokens:
        if self.form == "text":
            return self._text_tokens(row["text"], (row.get("prefix") or "") if self.mask_prefix else "")
        return prompt_tokens(self.tokenizer, *prompt_and_completion(row), append_eos=self.append_eos)

    def _text_tokens(self, text: str, prefix: str) -> Tokens:
        if not text.startswith(prefix):
            raise ValueError(f"its text does not begin with its prefix {_shown(prefix)}: correct one of them.")
        if prefix and not self.tokenizer.is_fast:
            raise ValueError(
                f"a prefix needs a fast tokenizer, not {type(self.tokenizer).__name__}: set mask_prefix=False."
            )
        found = self.tokenizer(text, return_offsets_mapping=bool(prefix), verbose=False)
        start = tokens_of_prefix(found["offset_mapping"], prefix) if prefix else 0
        if start >= len(found["input_ids"]):
            raise ValueError("its prefix covers the whole text, so nothing of it would count: shorten the prefix.")
        return (with_eos(found["input_ids"], self.tokenizer) if self.append_eos else found["input_ids"]), start


def prompt_and_completion(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """Both as texts, or both as lists of messages; of `messages` the last one is the completion."""
    if "messages" in row:
        return row["messages"][:-1], row["messages"][-1:]
    return row["prompt"], row["completion"]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any, *, append_eos: bool) -> Tokens:
    """Ids of prompt and completion together, and where the completion begins: behind what both have in common.

    append_eos: for texts; messages end as the chat template has it.
    """
    if isinstance(prompt, str):
        alone = tokenizer(prompt, verbose=False)["input_ids"]
        whole = tokenizer(prompt + completion, verbose=False)["input_ids"]
        whole = with_eos(whole, tokenizer) if append_eos else whole
        # a tokenizer may end every text of its own accord
        alone = alone[:-1] if len(alone) > 1 and alone[-1] == tokenizer.eos_token_id else alone
    else:
        options = {"tokenize": True, "return_dict": True}
        alone = (
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)["input_ids"] if prompt else []
        )
        whole = tokenizer.apply_chat_template([*prompt, *completion], **options)["input_ids"]
    differs = [place for place, (one, other) in enumerate(zip(alone, whole, strict=False)) if one != other]
    return list(whole), differs[0] if differs else min(len(alone), len(whole))


def with_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`ids` with an end of text, once. Raises ValueError for a tokenizer that has none."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} has no EOS token to end texts: set its eos_token, or "
            "append_eos=False."
        )
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def _check_values(row: Mapping[str, Any]) -> None:
    form = form_of(row)
    if form == "text" and not (isinstance(row["text"], str) and row["text"].strip()):
        raise ValueError(f"'text' is {_shown(row['text'])}: it must be text that is not empty.")
    if form == "prompt":
        kinds = {type(row["prompt"]), type(row["completion"])}
        if kinds not in ({str}, {list}) or not row["completion"]:
            raise ValueError(
                f"'prompt' and 'completion' are {_shown(row['prompt'])} and {_shown(row['completion'])}: both must be "
                "text, or both lists of messages, and the completion not empty."
            )
    if form == "messages":
        messages = row["messages"]
        is_list = isinstance(messages, list) and all(isinstance(m, Mapping) and "role" in m for m in messages)
        if not is_list or not messages or messages[-1]["role"] != "assistant":
            raise ValueError(
                f"'messages' is {_shown(messages)}: it must be a list of messages that the assistant ends."
            )
    if form == "input_ids":
        ids, mask = row["input_ids"], row.get("completion_mask")
        if not isinstance(ids, list) or not ids or not all(isinstance(token, int) for token in ids):
            raise ValueError(f"'input_ids' is {_shown(ids)}: it must be a list of integers that is not empty.")
        if mask is not None and len(mask) != len(ids):
            raise ValueError(f"'completion_mask' has {len(mask)} entries for {len(ids)} tokens: give one for each.")


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


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
