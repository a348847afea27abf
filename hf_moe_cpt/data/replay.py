"""Which position of training reads which block: an exact share of replay in every batch, in a stateless order.

Letters: B = global optimizer batch in blocks (all ranks, all accumulation steps), r = replay ratio, i = position in
[0, B * num_batches), q = ordinal of an item within its source. Replay items before position i: floor(i * r + 1/2).
Source: ratio of new to old data per batch, Thérien et al. 2025 (arXiv 2503.05029), section on replay; the law is ours.
"""

import operator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from hf_moe_cpt.data.permutation import derive_seed, permute


SOURCES = ("new", "replay")
_MAX_DENOMINATOR = 10**9


def exact_ratio(replay_ratio: float | Fraction) -> Fraction:
    """The fraction a user means: 0.3 is 3/10, 1/3 is one third. Refuses anything outside [0, 1)."""
    if isinstance(replay_ratio, bool) or not isinstance(replay_ratio, (int, float, Fraction)):
        raise ValueError(f"replay_ratio is {replay_ratio!r}: give a number in [0, 1).")
    if not 0 <= replay_ratio < 1:  # also refuses nan
        raise ValueError(
            f"replay_ratio is {replay_ratio}: it is the share of replay in every batch and must lie in [0, 1); "
            "a percentage such as 30 is written 0.3."
        )
    ratio = Fraction(str(replay_ratio)).limit_denominator(_MAX_DENOMINATOR)
    if ratio == 1 or (ratio == 0 and replay_ratio > 0):
        raise ValueError(f"replay_ratio is {replay_ratio}: closer than 1e-9 to {ratio}, give a plainer number.")
    return ratio


@dataclass(frozen=True)
class ReplayLaw:
    """Assigns positions to sources; pure arithmetic, shared by the map-style and the streaming mixture."""

    ratio: Fraction  # r, from exact_ratio
    batch_size: int  # B, blocks per optimizer step over all ranks and accumulation steps
    num_batches: int  # optimizer steps

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1.")

    @property
    def num_positions(self) -> int:
        """Blocks that the whole budget reads, from both sources together."""
        return self.batch_size * self.num_batches

    def replay_before(self, position: int) -> int:
        """Replay items among positions [0, position): floor(position * r + 1/2), in exact arithmetic."""
        share, whole = self.ratio.numerator, self.ratio.denominator
        return (2 * position * share + whole) // (2 * whole)

    def assign(self, position: int) -> tuple[str, int]:
        """The source that serves a position, and how many items of that source came before it."""
        before = self.replay_before(position)
        if self.replay_before(position + 1) > before:
            return "replay", before
        return "new", position - before

    def composition(self, batch: int) -> tuple[int, int]:
        """(new blocks, replay blocks) of optimizer batch `batch`; they add up to batch_size."""
        first = batch * self.batch_size
        num_replay = self.replay_before(first + self.batch_size) - self.replay_before(first)
        return self.batch_size - num_replay, num_replay

    def count(self, source: str) -> int:
        """Blocks that the whole budget reads from a source."""
        num_replay = self.replay_before(self.num_positions)
        return num_replay if source == "replay" else self.num_positions - num_replay


def check_replay(replay: object | None, ratio: Fraction) -> None:
    """Replay data and a replay ratio above zero go together; one without the other is a mistake worth stopping for."""
    if ratio > 0 and replay is None:
        raise ValueError(f"replay_ratio is {float(ratio):g} but there is no replay data: give some or set 0.")
    if ratio == 0 and replay is not None:
        raise ValueError("replay data was given but replay_ratio is 0: set a ratio above 0 or leave the data out.")


class ReplayMixture(torch.utils.data.Dataset):
    """Map-style mixture of new and replay blocks; position i belongs to optimizer batch i // batch_size.

    Read it in sequence: order, epochs and ratio are functions of (seed, position), so a resumed run needs no saved
    state and skips in O(1). Replay slots are spread evenly, hence micro-batches and ranks are even too. Item q of a
    source is element permute(q % N, N, seed of the epoch) of epoch q // N, with N blocks in the source.

    new, replay: map-style datasets of dictionaries with the same keys; replay is None exactly when replay_ratio is 0.
    An item is the source's dictionary plus "source": 0 for new, 1 for replay (see SOURCES).
    """

    def __init__(
        self,
        new: torch.utils.data.Dataset,
        replay: torch.utils.data.Dataset | None,
        replay_ratio: float | Fraction,
        batch_size: int,
        num_batches: int,
        seed: int,
    ):
        self.law = ReplayLaw(exact_ratio(replay_ratio), batch_size, num_batches)
        check_replay(replay, self.law.ratio)
        self.blocks = {"new": new} if replay is None else {"new": new, "replay": replay}
        for source, blocks in self.blocks.items():
            if len(blocks) == 0:
                raise ValueError(f"the {source} source is empty: it needs at least one block of tokens.")
        self.seed = seed

    def __len__(self) -> int:
        return self.law.num_positions

    def __getitem__(self, position: int) -> dict[str, Any]:
        source, _, index = self.locate(position)
        return {**self.blocks[source][index], "source": SOURCES.index(source)}

    def locate(self, position: int) -> tuple[str, int, int]:
        """(source, epoch of that source, index in that source) of a position, without reading any data."""
        position = operator.index(position)
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of {len(self)}")
        source, ordinal = self.law.assign(position)
        length = len(self.blocks[source])
        epoch, offset = divmod(ordinal, length)
        return source, epoch, permute(offset, length, derive_seed(self.seed, source, epoch))

    def composition(self, batch: int) -> tuple[int, int]:
        """(new blocks, replay blocks) of optimizer batch `batch`."""
        return self.law.composition(batch)

    def summary(self) -> dict[str, float]:
        """What the budget reads: <source>_blocks, and <source>_epochs = blocks read / blocks in the source."""
        figures: dict[str, float] = {}
        for source, blocks in self.blocks.items():
            figures[f"{source}_blocks"] = self.law.count(source)
            figures[f"{source}_epochs"] = self.law.count(source) / len(blocks)
        return figures
