"""What if the experts of a layer were spread over ranks: an estimate of the step, and a better placement.

Under expert parallelism every rank computes the tokens of its own experts, and all wait for the busiest one. With
f_r the share of all assignments that falls on rank r of R:

    max load = max_r f_r                 in [1/R, 1]
    slowdown = R max_r f_r               in [1, R], time of the experts over their time if ranks were equally busy

An estimate: it knows neither communication, nor the rest of the step, nor that loads of one batch are less even than
those of the whole text, which makes the true slowdown larger. Letters: E routed experts, R ranks. Source: ours; the
placement is the longest-processing-time rule (Graham 1969) with equally many experts on each rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PlacementEstimate:
    """One layer under a placement."""

    placement: list[int]  # rank of each expert
    max_load: float  # share of all assignments on the busiest rank
    slowdown: float  # max_load * R


def contiguous_placement(num_experts: int, num_ranks: int) -> list[int]:
    """Rank of each expert where ranks hold neighbours: E integers in [0, R), sizes that differ by at most 1."""
    _check_ranks(num_experts, num_ranks)
    return [expert * num_ranks // num_experts for expert in range(num_experts)]


def suggested_placement(load: Sequence[float], num_ranks: int) -> list[int]:
    """Rank of each expert, busiest expert first onto the idlest rank that has room: E integers in [0, R).

    load: tokens or shares of each expert. A rank has room for ceil(E / R) experts. Never busier than the contiguous
    placement, which is returned where the rule does worse.
    """
    num_experts = len(load)
    contiguous = contiguous_placement(num_experts, num_ranks)
    room = [-(-num_experts // num_ranks)] * num_ranks
    loads, placement = [0.0] * num_ranks, [0] * num_experts
    for expert in sorted(range(num_experts), key=lambda expert: (-load[expert], expert)):
        rank = min((rank for rank in range(num_ranks) if room[rank]), key=lambda rank: (loads[rank], rank))
        placement[expert], room[rank], loads[rank] = rank, room[rank] - 1, loads[rank] + load[expert]
    return placement if max(loads) <= max(rank_loads(load, contiguous, num_ranks)) else contiguous


def rank_loads(load: Sequence[float], placement: Sequence[int], num_ranks: int) -> list[float]:
    """Sum of the loads of each rank's experts: R numbers in the unit of load."""
    if len(load) != len(placement):
        raise ValueError(f"placement has {len(placement)} experts and load {len(load)}: give each expert a rank.")
    loads = [0.0] * num_ranks
    for value, rank in zip(load, placement, strict=True):
        if not 0 <= rank < num_ranks:
            raise ValueError(f"placement names rank {rank}, outside [0, num_ranks={num_ranks}).")
        loads[rank] += value
    return loads


def estimate_placement(load: Sequence[float], placement: Sequence[int], num_ranks: int) -> PlacementEstimate:
    """Max load and slowdown of a placement. load: tokens or shares of each expert, not all 0."""
    loads = rank_loads(load, placement, num_ranks)
    total = sum(loads)
    if total <= 0:
        raise ValueError("load is 0 for every expert: an estimate needs a layer that routed tokens.")
    return PlacementEstimate(list(placement), max(loads) / total, num_ranks * max(loads) / total)


def _check_ranks(num_experts: int, num_ranks: int) -> None:
    if not 1 <= num_ranks <= num_experts:
        raise ValueError(f"num_ranks={num_ranks} must lie in [1, {num_experts}], the experts of a layer.")
