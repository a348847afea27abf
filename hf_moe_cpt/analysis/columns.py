"""Read what a user hands to a metric: columns with a number for each row, and rows with a number for each token.

Everything becomes float64. An error is one line: what came, what is allowed, what to do. Source: ours.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


Column = Sequence[float] | np.ndarray
TokenRows = Sequence[Sequence[float] | np.ndarray]  # a text each


def read_column(name: str, values: Column, *, num_rows: int | None = None, infinite: bool = False) -> np.ndarray:
    """(N,) float64, N at least 1, and num_rows if that is given; NaN is refused, infinities unless `infinite`."""
    read = read_numbers(name, values, infinite=infinite)
    if read.ndim != 1 or len(read) == 0:
        raise ValueError(f"{name} must be (N,) with at least one row, got shape {read.shape}.")
    if num_rows is not None and len(read) != num_rows:
        raise ValueError(f"{name} has {len(read)} rows and the other columns {num_rows}: give one value for each row.")
    return read


def read_shares(name: str, values: Column, *, num_rows: int | None = None) -> np.ndarray:
    """(N,) float64 in [0, 1], as `read_column`."""
    read = read_column(name, values, num_rows=num_rows)
    if read.min() < 0 or read.max() > 1:
        raise ValueError(f"{name} lies between {read.min():g} and {read.max():g}: every value must lie in [0, 1].")
    return read


def read_token_rows(
    name: str, rows: TokenRows, *, binary: bool = False, infinite: bool = False, like: Sequence[np.ndarray] = ()
) -> list[np.ndarray]:
    """Each row as (n,) float64 with n at least 1; lengths may differ.

    binary: only 0 and 1 (or False and True). like: rows of another column that must have the same lengths.
    """
    if isinstance(rows, str) or len(rows) == 0:
        raise ValueError(f"{name} must be a sequence of texts, each with one number for each token; got {rows!r:.40}.")
    read = [read_numbers(f"{name}[{place}]", row, infinite=infinite) for place, row in enumerate(rows)]
    for place, row in enumerate(read):
        if row.ndim != 1 or len(row) == 0:
            raise ValueError(
                f"{name}[{place}] must be (n,) with at least one token, got shape {row.shape}: leave empty texts out."
            )
        if binary and ((row != 0) & (row != 1)).any():
            wrong = row[(row != 0) & (row != 1)][0]
            raise ValueError(f"{name}[{place}] holds {wrong:g}: for each token it is 1 (yes) or 0 (no).")
    if like and [len(row) for row in read] != [len(row) for row in like]:
        raise ValueError(f"{name} has other numbers of tokens than the other columns: give one number for each token.")
    return read


def read_numbers(name: str, values: Any, *, infinite: bool = False) -> np.ndarray:
    """float64 of any shape; NaN is refused, infinities unless `infinite`."""
    try:
        read = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers in rows of one length, got {values!r:.60}.") from None
    wrong = np.isnan(read) if infinite else ~np.isfinite(read)
    if wrong.any():
        allowed = "no value may be NaN" if infinite else "every value must be finite"
        raise ValueError(f"{name} holds {read[wrong][0]} at place {int(np.argmax(wrong))}: {allowed}.")
    return read


def read_strings(name: str, texts: Sequence[str], *, num_rows: int | None = None) -> list[str]:
    """A list of strings, at least one, and num_rows if that is given."""
    if isinstance(texts, str) or len(texts) == 0:
        raise ValueError(f"{name} must be a sequence of at least one string, got {texts!r:.40}.")
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{place}] must be a string, got {type(text).__name__}.")
    if num_rows is not None and len(texts) != num_rows:
        raise ValueError(f"{name} has {len(texts)} rows and the other columns {num_rows}: give one text for each row.")
    return list(texts)
