"""Whether anything is both to be forgotten and to be kept: subjects where rows name them, else whole texts.

Source: ours.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from datasets import Dataset


logger = logging.getLogger(__name__)

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
SHOWN = 3


def check_subjects(sets: Mapping[str, Dataset], allow_overlap: bool = False) -> None:
    """Raise ValueError, or only warn, for the first pair of sets that share what they must not share."""
    for first, second in CONTRADICTIONS:
        if first not in sets or second not in sets:
            continue
        column = next((name for name in ("subject", "text") if _both_have(sets, first, second, name)), None)
        shared = sorted(_values(sets[first], column) & _values(sets[second], column)) if column else []
        if not shared:
            continue
        shown = ", ".join(repr(value if len(value) <= 40 else f"{value[:37]}...") for value in shared[:SHOWN])
        more = f" and {len(shared) - SHOWN} more" if len(shared) > SHOWN else ""
        text = f"{len(shared)} {column}(s) are in both {first}_dataset and {second}_dataset: {shown}{more}"
        if not allow_overlap:
            raise ValueError(f"{text}: take them out of one of them, or set allow_overlap=True.")
        logger.warning("%s.", text)


def _both_have(sets: Mapping[str, Dataset], first: str, second: str, column: str) -> bool:
    return all(column in sets[name].column_names for name in (first, second))


def _values(rows: Dataset, column: str) -> set[str]:
    return {value for value in rows[column] if isinstance(value, str)}
