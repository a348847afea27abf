"""Where a text begins to count: the first token behind its header. Source: ours."""

from __future__ import annotations

from collections.abc import Sequence


def tokens_of_prefix(offsets: Sequence[tuple[int, int]], prefix: str) -> int:
    """How many leading tokens belong to the first len(prefix) characters of a text, special tokens in between too.

    offsets: (begin, end) characters of each token, as a fast tokenizer returns them. A token that reaches from the
    prefix into the text belongs to the prefix. 0 without a prefix.
    """
    covered = [place for place, (begin, end) in enumerate(offsets) if begin < min(end, len(prefix))]
    return max(covered, default=-1) + 1
