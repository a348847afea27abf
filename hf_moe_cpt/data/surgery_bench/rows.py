"""Rows of text as users and the Hub have them: their forms, other names of columns, and whom a row is about.

| columns | what counts |
|---|---|
| `text`, and `prefix` if there is a header | the text; with mask_prefix without its header |
| `prompt` and `completion`, text or messages | the completion |
| `messages` | the last message, which the assistant must have said |
| `input_ids`, and `completion_mask` | what the mask says; everything without one |

Source: ours; the forms are TRL's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def read_columns(
    given: Sequence[str] | None, option: str = "--columns", example: str = "text=article"
) -> dict[str, str]:
    """{our name: yours} of words such as `prompt=question`. Raises ValueError for other words, naming the option."""
    named = [word.partition("=") for word in given or ()]
    for ours, sign, yours in named:
        if not (ours and sign and yours):
            raise ValueError(f"{option} {ours}{sign}{yours} must give our name and yours, as {example}.")
    return {ours: yours.replace("\\n", "\n") for ours, _, yours in named}  # a shell passes both signs on


def with_columns(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with our names of columns beside its own.

    columns: {ours: yours}; yours is a column of the row, or a text with columns in braces, such as
    "Question: {question}\\nAnswer:". Raises ValueError for a column that the row has not.
    """
    found = dict(row)
    for ours, yours in columns.items():
        if yours in row:
            found[ours] = row[yours]
            continue
        try:
            if "{" not in yours:
                raise KeyError(yours)
            found[ours] = yours.format_map({name: row[name] for name in row if row[name] is not None})
        except (KeyError, IndexError, ValueError) as error:
            told = f"has no column {error}, which columns asks for; it has {sorted(row)}."
            raise ValueError(told) from None
    return found


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
        "'input_ids', or name yours with --columns."
    )


def check_values(row: Mapping[str, Any]) -> None:
    """Raise ValueError for a row that does not hold what its form wants."""
    form = form_of(row)
    if form == "text" and not (isinstance(row["text"], str) and row["text"].strip()):
        raise ValueError(f"'text' is {shown(row['text'])}: it must be text that is not empty.")
    if form == "prompt":
        kinds = {type(row["prompt"]), type(row["completion"])}
        if kinds not in ({str}, {list}) or not row["completion"]:
            raise ValueError(
                f"'prompt' and 'completion' are {shown(row['prompt'])} and {shown(row['completion'])}: both must be "
                "text, or both lists of messages, and the completion not empty."
            )
    if form == "messages":
        messages = row["messages"]
        is_list = isinstance(messages, list) and all(isinstance(m, Mapping) and "role" in m for m in messages)
        if not is_list or not messages or messages[-1]["role"] != "assistant":
            raise ValueError(
                f"'messages' is {shown(messages)}: it must be a list of messages that the assistant ends."
            )
    if form == "input_ids":
        ids, mask = row["input_ids"], row.get("completion_mask")
        if not isinstance(ids, list) or not ids or not all(isinstance(token, int) for token in ids):
            raise ValueError(f"'input_ids' is {shown(ids)}: it must be a list of integers that is not empty.")
        if mask is not None and len(mask) != len(ids):
            raise ValueError(f"'completion_mask' has {len(mask)} entries for {len(ids)} tokens: give one for each.")


def as_text(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[str, str]:
    """(text, prefix) of a row of any form but input_ids; the prefix, with which the text begins, is not counted.

    tokenizer: lays messages out. Raises ValueError for rows that are tokens, and for messages without a chat template.
    """
    check_values(row)
    form = form_of(row)
    if form == "text":
        return row["text"], row.get("prefix") or ""
    if form == "input_ids":
        raise ValueError("'input_ids' are tokens, and questions and words are asked of texts: give the text.")
    said = row["messages"] if form == "messages" else row["completion"]
    before, last = (said[:-1], said[-1:]) if form == "messages" else (row["prompt"], said)
    if isinstance(before, str):
        return before + last, before
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError("messages need a tokenizer with a chat template: give text, or prompt and completion.")
    whole = tokenizer.apply_chat_template([*before, *last], tokenize=False)
    prefix = tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True) if before else ""
    start = tokenizer.bos_token or ""  # which the tokenizer puts there by itself
    return whole.removeprefix(start), prefix.removeprefix(start) if whole.startswith(prefix) else ""


def subject_of(row: Mapping[str, Any]) -> str:
    """Whom a row is about: its `subject`, or a name made of what it holds, so that equal rows are one subject."""
    if isinstance(row.get("subject"), str) and row["subject"].strip():
        return row["subject"]
    names = ("text", "prompt", "completion", "messages", "question", "input_ids")
    columns = [name for name in names if row.get(name) is not None]
    held = json.dumps([row[name] for name in columns[: 1 if "text" in columns else None]], sort_keys=True)
    return f"row {hashlib.blake2b(held.encode(), digest_size=8).hexdigest()}"


def digest_of_subject(subject: str) -> str:
    """Twelve hexadecimal digits by which a subject is known without being named."""
    return hashlib.blake2b(subject.encode(), digest_size=6).hexdigest()


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
