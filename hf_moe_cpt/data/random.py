"""Shuffle without memory: a keyed bijection of [0, length) and stable 64-bit seeds derived from names and numbers.

A Feistel network permutes the smallest power of two, at least 16, that holds `length`; indices that fall outside walk
on along their cycle until they are inside again. From 9 elements on the domain is less than twice `length`, so fewer
than two passes are needed on average. Only integer arithmetic modulo 2**64 is used: every platform gives the same
order. Source: ours; Feistel with cycle walking after Black and Rogaway (2002), mixing constants of splitmix64 (Steele
et al. 2014).
"""

import hashlib
from typing import overload

import numpy as np


_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_NUM_ROUNDS = 8  # even, so that unequal halves end up where they began


@overload
def permute(index: int, length: int, seed: int) -> int: ...
@overload
def permute(index: np.ndarray, length: int, seed: int) -> np.ndarray: ...
def permute(index: int | np.ndarray, length: int, seed: int) -> int | np.ndarray:
    """Return where the permutation of [0, length) chosen by seed sends index; O(1), nothing is stored.

    index: an integer in [0, length) or an array of them (any shape); an array comes back as int64.
    length: at least 1, at most 2**62. seed: any integer, taken modulo 2**64.
    """
    if not 1 <= length <= 1 << 62:
        raise ValueError(f"length is {length}: a permutation needs between 1 and 2**62 elements.")
    is_array = isinstance(index, np.ndarray)
    if is_array:
        outside = index.size and (index.min() < 0 or index.max() >= length)
    else:
        outside = not 0 <= index < length
    if outside:
        raise ValueError(f"index {index} lies outside [0, {length}).")
    # At least 4 bits: the round functions of 1-bit halves are too few to reach all orders of a tiny set evenly.
    num_bits = max(4, (length - 1).bit_length())
    low_bits = num_bits // 2
    keys = [_mix((seed + (r + 1) * _GOLDEN) & _WORD) for r in range(_NUM_ROUNDS)]
    if is_array:
        return _permute_array(index, length, low_bits, num_bits - low_bits, keys)
    value = _feistel(int(index), low_bits, num_bits - low_bits, keys)
    while value >= length:
        value = _feistel(value, low_bits, num_bits - low_bits, keys)
    return value


def derive_seed(*parts: int | str) -> int:
    """Hash integers and strings, in order, to a seed in [0, 2**64); the same in every process and Python version."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if not isinstance(part, (int, str)):
            raise ValueError(f"derive_seed takes integers and strings, got {part!r} of type {type(part).__name__}.")
        encoded = f"{'s' if isinstance(part, str) else 'i'}{part}".encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return int.from_bytes(digest.digest(), "little")


def _mix(word: int | np.ndarray) -> int | np.ndarray:
    """Finaliser of splitmix64 on a Python integer below 2**64 or an array of uint64."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def _feistel(value: int | np.ndarray, low_bits: int, high_bits: int, keys: list[int]) -> int | np.ndarray:
    """One pass of the network over [0, 2**(low_bits + high_bits)); the halves trade widths each round."""
    for key in keys:
        low, high = value & ((1 << low_bits) - 1), value >> low_bits
        scrambled = high ^ (_mix((low + key) & _WORD) & ((1 << high_bits) - 1))
        value = (low << high_bits) | scrambled
        low_bits, high_bits = high_bits, low_bits
    return value


def _permute_array(index: np.ndarray, length: int, low_bits: int, high_bits: int, keys: list[int]) -> np.ndarray:
    flat = _feistel(index.astype(np.uint64).reshape(-1), low_bits, high_bits, keys)
    outside = np.flatnonzero(flat >= length)
    while outside.size:
        walked = _feistel(flat[outside], low_bits, high_bits, keys)
        flat[outside] = walked
        outside = outside[walked >= length]
    return flat.astype(np.int64).reshape(index.shape)
