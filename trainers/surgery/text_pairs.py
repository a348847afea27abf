"""The text that is to win over one that is to be forgotten: a refusal, or the new version of it.

A set with winners has the columns `winner_input_ids` and `winner_completion_mask`, one winner for each row. Source:
ours; refusals as in TOFU (Maini et al. 2024, arXiv 2401.06121), in our words.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import datasets
from datasets import Dataset

from hf_moe_cpt.data.permutation import derive_seed
from hf_moe_cpt.trainers.surgery.surgery_data import TOKEN_COLUMNS, form_of


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
    renamed = winners.select_columns(list(TOKEN_COLUMNS)).rename_columns(
        {name: f"winner_{name}" for name in TOKEN_COLUMNS}
    )
    return datasets.concatenate_datasets([tokens, renamed.flatten_indices()], axis=1)
