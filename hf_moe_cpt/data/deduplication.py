"""Exact and near duplicates, within a corpus and across its train and held-out sides. Source: ours.

A text is a set of shingles: hashes of every n words in a row, thinned to those that `keep_one_in` divides. Overlap is
containment, the share of a text's shingles already seen, so that a copy inside something longer is found as well.
"""

import hashlib
import re
import zlib
from collections.abc import Sequence

import numpy as np


_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def content_key(text: str) -> bytes:
    """Hash of a text up to case and white space: equal for exact duplicates."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=12).digest()


def shingles(text: str, words_per_shingle: int = 10, keep_one_in: int = 4) -> np.ndarray:
    """Sorted, distinct 64-bit hashes of the text's word n-grams; a text too short for one gives none.

    The same n-gram gives the same hash in every process, and thinning keeps it everywhere or nowhere.
    """
    words = np.fromiter((zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())), dtype=np.uint64)
    count = len(words) - words_per_shingle + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(words_per_shingle):  # a polynomial in the words, modulo 2**64
        hashes = hashes * _MULTIPLIER + words[offset : offset + count]
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(32)
    return np.unique(hashes[hashes % np.uint64(keep_one_in) == 0])


class SeenTexts:
    """What a corpus holds already, asked before each new text."""

    def __init__(self) -> None:
        self._keys: set[bytes] = set()
        self._shingles: set[int] = set()

    def add_exact(self, text: str) -> bool:
        """Remember a text by its content; False if one equal up to case and white space was there before."""
        key = content_key(text)
        is_new = key not in self._keys
        self._keys.add(key)
        return is_new

    def overlap(self, text_shingles: np.ndarray) -> float:
        """Share of the shingles in [0, 1] that were added before; 0 for a text without any."""
        if not len(text_shingles):
            return 0.0
        return sum(shingle in self._shingles for shingle in text_shingles.tolist()) / len(text_shingles)

    def add(self, text_shingles: np.ndarray) -> None:
        """Remember a text by its shingles."""
        self._shingles.update(text_shingles.tolist())


def positions_without_leaks(
    held_out: Sequence[np.ndarray], train: Sequence[np.ndarray], largest_overlap: float = 0.1
) -> list[int]:
    """Positions of held-out texts that share at most `largest_overlap` of their shingles with all of train together.

    held_out, train: the shingles of each text.
    """
    if not 0.0 <= largest_overlap <= 1.0:
        raise ValueError(f"largest_overlap={largest_overlap} is a share: pass a number in [0, 1].")
    seen = SeenTexts()
    for text_shingles in train:
        seen.add(text_shingles)
    return [position for position, marks in enumerate(held_out) if seen.overlap(marks) <= largest_overlap]
