"""Choices that depend on a key and on what they are for, and on nothing that was drawn before. Source: ours."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from hf_moe_cpt.data.permutation import derive_seed


Item = TypeVar("Item")


class Draws:
    """Random numbers by name: the same key and purpose give the same number, in any order, on any machine.

    key: integers and strings that name whose choices these are, such as (seed, version, subject). A purpose is words
    and numbers too; two that read the same are the same.
    """

    def __init__(self, *key: int | str):
        self._hash = hashlib.blake2b(derive_seed(*key).to_bytes(8, "little"), digest_size=8)

    def child(self, *purpose: int | str) -> "Draws":
        """Draws of their own for a part of what these are for."""
        child = object.__new__(Draws)
        child._hash = self._hash.copy()
        child._hash.update(("/".join(map(str, purpose)) + "//").encode())
        return child

    def below(self, limit: int, *purpose: int | str) -> int:
        """An integer in [0, limit), limit in [1, 2**32]; uneven by less than 2**-32."""
        return self._word("/".join(map(str, purpose))) % limit

    def choice(self, items: Sequence[Item], *purpose: int | str) -> Item:
        """One of the items, each alike."""
        return items[self.below(len(items), *purpose)]

    def chance(self, percent: int, *purpose: int | str) -> bool:
        """True in `percent` of 100 cases."""
        return self.below(100, *purpose) < percent

    def shuffled(self, items: Sequence[Item], *purpose: int | str) -> list[Item]:
        """The items in an order in which each of them is as likely in each place."""
        start = "/".join(map(str, purpose))
        rank = [self._word(f"{start}/{place}") for place in range(len(items))]
        return [items[place] for place in sorted(range(len(items)), key=rank.__getitem__)]

    def _word(self, purpose: str) -> int:
        """64 random bits; derive_seed would do the same at three times the cost."""
        copy = self._hash.copy()
        copy.update(purpose.encode())
        return int.from_bytes(copy.digest(), "little")
