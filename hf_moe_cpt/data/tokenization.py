"""Turn documents into token ids, one row per document, each ending in EOS; nothing else survives. Source: ours."""

from itertools import chain
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase


_INT32_LIMIT = 1 << 31


def tokenize_documents(
    dataset: datasets.Dataset | datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase | None,
    text_column: str = "text",
    num_proc: int | None = None,
    add_eos: bool = True,
    vocab_size: int | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Return `dataset` with the single column input_ids (int32), one row per non-empty document.

    A Dataset is written to the datasets cache, memory-mapped, and found there again by the next run with the same
    data and tokenizer; an IterableDataset is tokenised as it is read. A dataset that has input_ids passes through,
    whatever else it holds, with EOS appended where it is absent; only then may tokenizer be None (with add_eos=False).
    The tokenizer adds no special tokens; EOS comes from us. vocab_size: ids must lie in [0, vocab_size); None checks
    only for negative ids. num_proc: processes for a Dataset, ignored for an IterableDataset.
    """
    columns = column_names(dataset)
    is_tokenised = "input_ids" in columns
    if not is_tokenised and text_column not in columns:
        raise ValueError(
            f"the dataset has neither {text_column!r} nor 'input_ids' but {columns}: "
            "name its text column in text_column."
        )
    if tokenizer is None and (add_eos or not is_tokenised):
        raise ValueError(
            "tokenizer is None: it may be left out only for data that has input_ids, together with add_eos=False."
        )
    eos_id = tokenizer.eos_token_id if add_eos else None
    if add_eos and eos_id is None:
        raise ValueError(
            f"the tokenizer {type(tokenizer).__name__} has no EOS token to end documents: set tokenizer.eos_token."
        )
    arguments: dict[str, Any] = {"eos_id": eos_id, "vocab_size": vocab_size}
    if is_tokenised:
        function, source_column = _finish_ids, "input_ids"
    else:
        function, source_column = _tokenize_texts, text_column
        arguments |= {"tokenizer": tokenizer, "text_column": text_column}
    options: dict[str, Any] = {
        "batched": True,
        "with_indices": True,
        "remove_columns": [source_column],
        "fn_kwargs": arguments,
        "features": datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
    }
    if isinstance(dataset, datasets.Dataset):
        options |= {"num_proc": num_proc, "desc": "Checking token ids" if is_tokenised else "Tokenizing documents"}
    return dataset.select_columns([source_column]).with_format(None).map(function, **options)


def column_names(dataset: datasets.Dataset | datasets.IterableDataset) -> list[str]:
    """Columns of a dataset; reads one row of a stream that does not declare them."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the streamed dataset is empty: it needs at least one document.")
    return list(first)


def _tokenize_texts(
    batch: dict[str, list],
    rows: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    eos_id: int | None,
    vocab_size: int | None,
) -> dict[str, list]:
    texts = batch[text_column]
    for row, text in zip(rows, texts, strict=True):
        if not isinstance(text, str):
            raise ValueError(
                f"row {row} (counted from 0) of column {text_column!r} is {_shorten(text)}, a {type(text).__name__} "
                "and not a string: remove or repair that row."
            )
    # verbose=False: a document longer than the model's context is cut into blocks later, so its length is no warning.
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    return _finish_ids({"input_ids": encoded["input_ids"]}, rows, eos_id=eos_id, vocab_size=vocab_size)


def _finish_ids(
    batch: dict[str, list], rows: list[int], *, eos_id: int | None, vocab_size: int | None
) -> dict[str, list]:
    """Check ids, drop documents without content, end the others in EOS exactly once."""
    documents = batch["input_ids"]
    _check_ids(documents, rows, _INT32_LIMIT if vocab_size is None else vocab_size)
    if eos_id is None:
        return {"input_ids": [ids for ids in documents if len(ids)]}
    filled = [ids for ids in documents if len(ids) > 1 or (len(ids) == 1 and ids[0] != eos_id)]
    if filled and vocab_size is not None and not 0 <= eos_id < vocab_size:
        raise ValueError(
            f"the tokenizer's EOS is id {eos_id}, outside [0, {vocab_size}): tokenizer and model disagree, "
            "use the model's tokenizer or resize its embeddings."
        )
    return {"input_ids": [ids if ids[-1] == eos_id else [*ids, eos_id] for ids in filled]}


def _check_ids(documents: list, rows: list[int], limit: int) -> None:
    for row, ids in zip(rows, documents, strict=True):
        if not isinstance(ids, list) or any(not isinstance(token, int) for token in ids[:1]):
            raise ValueError(f"row {row} (counted from 0) of input_ids is {_shorten(ids)}, not a list of integers.")
    try:
        ids_of_batch = np.fromiter(chain.from_iterable(documents), dtype=np.int64)
    except TypeError as error:
        raise ValueError(
            f"rows {rows[0]} to {rows[-1]} of input_ids hold something that is no integer: {error}."
        ) from None
    if ids_of_batch.size and (ids_of_batch.min() < 0 or ids_of_batch.max() >= limit):
        place = int(np.flatnonzero((ids_of_batch < 0) | (ids_of_batch >= limit))[0])
        ends = np.cumsum([len(ids) for ids in documents])
        row = rows[int(np.searchsorted(ends, place, side="right"))]
        raise ValueError(
            f"token id {ids_of_batch[place]} in row {row} (counted from 0) is outside [0, {limit}): tokenizer and "
            "model disagree, use the model's tokenizer or resize its embeddings."
        )


def _shorten(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
