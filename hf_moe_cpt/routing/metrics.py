"""What routers do, in numbers: balance, certainty, drift between checkpoints, what a shift of the data costs.

    MRI      tokens that visit the busiest expert / T                 in [K/E, 1], maximum routing imbalance
    RS       mean over tokens of |S_before(x) n S_after(x)| / K       saturation; S(x) the K experts of token x
    P(j | i) N(i, j) / N(i)                                           co-activation; N(i, j) tokens that visit both
    DS(d, e) tokens of domain d that visit e / tokens of d            K/E throughout: the domain does not matter
    VS       mean over ids v of n(v, e*(v)) / occ(v)                  average = "ids"
             sum over v of n(v, e*(v)) / sum over v of occ(v)         average = "occurrences"

In VS, n(v, e) are the tokens with id v that visit e, occ(v) the tokens with id v, e*(v) the expert that v visits most
at a reference checkpoint, its own or the one before continual training; the id is that of the router's input token, or
of the token that follows it ("output"). g is the softmax of a router's logits before any bias or group limit that it
chooses by; where gates are sigmoids (DeepSeek-V3) g has the same order of experts. Saturation is K/E for two unrelated
routers. All pairs of a token's experts count in P, not only neighbours in the order of their scores as in OLMoE's
code.

What if the experts of a layer were spread over R ranks, f_r the share of all assignments that falls on rank r?

    max load = max_r f_r in [1/R, 1]        slowdown = R max_r f_r in [1, R], time over that of equally busy ranks

An estimate: it knows neither communication, nor the rest of the step, nor that loads of one batch are less even than
those of the whole text, which makes the true slowdown larger. Placements follow the longest-processing-time rule
(Graham 1969) with equally many experts on each rank.

Letters: D domains, T tokens, K experts per token, E routed experts (shared experts never count), V vocabulary, R
ranks.
Sources: MRI is Eq. 1 of Thérien et al. 2025 (arXiv 2503.05029), who define forgetting as the rise of the old
validation loss and compare with the checkpoint before continual training; their norm for the change of P and their
average in VS are not stated. Saturation, co-activation, DS and VS: Muennighoff et al. 2024 (OLMoE, arXiv 2409.02060).
The coefficient of variation is the importance of Shazeer et al. 2017 (arXiv 1701.06538) before squaring. The rest is
ours.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


def check_top_k_index(top_k_index: Tensor, num_experts: int | None = None) -> None:
    """Raise ValueError unless top_k_index is (T, K) integers; with num_experts also unless all lie in [0, E).

    The second check reads the values, which waits for the device.
    """
    if top_k_index.ndim != 2:
        raise ValueError(f"top_k_index must be (T, K), got {tuple(top_k_index.shape)}: flatten batch and time first.")
    if top_k_index.is_floating_point() or top_k_index.dtype == torch.bool:
        raise ValueError(f"top_k_index must hold integers, got {top_k_index.dtype}: pass expert numbers, not scores.")
    if num_experts is not None and top_k_index.numel():
        least, most = int(top_k_index.min()), int(top_k_index.max())
        if least < 0 or most >= num_experts:
            raise ValueError(
                f"top_k_index holds {least if least < 0 else most}, outside [0, num_experts={num_experts}): pass the "
                "number of routed experts of this layer."
            )


def check_same_tokens(name: str, tokens: Tensor, top_k_index: Tensor) -> None:
    """Raise ValueError unless `tokens` is (T,) like the rows of top_k_index."""
    if tokens.shape != top_k_index.shape[:1]:
        raise ValueError(
            f"{name} must be ({top_k_index.shape[0]},) like the tokens, got {tuple(tokens.shape)}: flatten both."
        )


def expert_load(top_k_index: Tensor, num_experts: int, token_mask: Tensor | None = None) -> Tensor:
    """Count the tokens that chose each expert, without a device synchronisation: (E,) int64, summing to K * T.

    top_k_index: (T, K) integers in [0, E), the K of a token distinct. token_mask: (T,), True or 1 for tokens that
    count (False for padding).
    """
    check_top_k_index(top_k_index)
    index = top_k_index.long()
    if token_mask is None:
        votes = torch.ones_like(index)
    else:
        check_same_tokens("token_mask", token_mask, index)
        votes = token_mask.bool().long().to(index.device).unsqueeze(1).expand_as(index)
    load = torch.zeros(num_experts, dtype=torch.long, device=index.device)
    return load.scatter_add_(0, index.flatten(), votes.flatten())


def max_routing_imbalance(top_k_index: Tensor, num_experts: int, token_mask: Tensor | None = None) -> Tensor:
    """MRI: share of the tokens that visit the busiest expert; scalar float64 in [K/E, 1], NaN without tokens.

    Arguments as in `expert_load`; the denominator is the number of tokens that count, not of assignments.
    """
    load = expert_load(top_k_index, num_experts, token_mask)
    num_tokens = top_k_index.shape[0] if token_mask is None else token_mask.bool().sum().to(load.device)
    return max_routing_imbalance_from_load(load.double(), num_tokens)


def max_routing_imbalance_from_load(load: Tensor, num_tokens: int | Tensor) -> Tensor:
    """MRI from counts: (..., E) and the number of tokens behind them, an int or a tensor (...) -> (...).

    Loads of parts of a batch must be added first: the MRI of a whole is at most the mean of its parts' MRI.
    """
    return load.amax(dim=-1) / num_tokens


def normalized_imbalance(mri: float | Tensor, num_experts: int, num_experts_per_tok: int) -> float | Tensor:
    """MRI x E / K: load of the busiest expert over the mean load, in [1, E/K]; 1 is perfect balance.

    Comparable between architectures, which MRI is not (its ideal is 3/31 for Granular and 1/8 for Switch).
    """
    if not 1 <= num_experts_per_tok <= num_experts:
        raise ValueError(
            f"num_experts_per_tok={num_experts_per_tok} must lie in [1, num_experts={num_experts}]: check the config."
        )
    return mri * num_experts / num_experts_per_tok


def load_entropy(load: Tensor) -> Tensor:
    """Entropy of the load over log E: (..., E) -> (...) in [0, 1]; 1 is uniform, 0 one expert, NaN without tokens."""
    share = load.double() / load.sum(dim=-1, keepdim=True)
    if load.shape[-1] == 1:
        return share.squeeze(-1)
    return torch.special.entr(share).sum(dim=-1) / math.log(load.shape[-1])


def recovery_step(mri: Sequence[float], shift_step: int, level: float | Sequence[float]) -> int | None:
    """Steps after the shift until the MRI is back at or below `level` and stays there; None if it never is.

    mri: one value per step, of the whole run. shift_step: index of the first step on the new distribution; 0 is
    returned if the level was never exceeded from it on. level: a number, or one value per step, such as the MRI of a
    Sinkhorn-balanced run (the paper's yardstick). NaN counts as above the level.
    """
    if not 0 <= shift_step < len(mri):
        raise ValueError(f"shift_step={shift_step} is outside the {len(mri)} points of mri: pass a point's index.")
    levels = [level] * len(mri) if isinstance(level, int | float) else list(level)
    if len(levels) != len(mri):
        raise ValueError(f"level has {len(levels)} points and mri {len(mri)}: give one level per point or one in all.")
    quiet = [value <= limit for value, limit in zip(mri[shift_step:], levels[shift_step:], strict=True)]
    last_loud = max((i for i, is_quiet in enumerate(quiet) if not is_quiet), default=-1)
    return last_loud + 1 if last_loud + 1 < len(quiet) else None


@dataclass(frozen=True)
class ImbalanceShift:
    """Routing imbalance around a change of the data; the first three in the unit of the input."""

    before: float  # mean over the last points before the shift
    peak: float  # highest smoothed value after it
    after: float  # mean over the last points of the run
    recovery_step: int | None  # points after the shift until it stays at or below before * (1 + tolerance)


def imbalance_around_shift(
    mri_before: Sequence[float],
    mri_after: Sequence[float],
    tolerance: float = 0.05,
    smooth: int = 5,
    baseline: int = 20,
) -> ImbalanceShift:
    """Summarise MRI (or MRI x E/K) logged before and after a shift.

    smooth: points of the trailing mean taken after the shift (it starts anew there, so the first point is the raw
    one and the spike is not diluted by what came before). baseline: points averaged for `before` and `after`.
    """
    for name, curve in (("mri_before", mri_before), ("mri_after", mri_after)):
        if len(curve) == 0:
            raise ValueError(f"{name} has no points: log the imbalance on both sides of the shift.")
    for name, value in (("smooth", smooth), ("baseline", baseline)):
        if value < 1:
            raise ValueError(f"{name}={value} must be >= 1: it counts points.")
    before = statistics.fmean(mri_before[-baseline:])
    curve = [statistics.fmean(mri_after[max(0, i + 1 - smooth) : i + 1]) for i in range(len(mri_after))]
    peak = max((value for value in curve if not math.isnan(value)), default=math.nan)
    recovered = recovery_step(curve, 0, before * (1 + tolerance))
    return ImbalanceShift(before, peak, statistics.fmean(mri_after[-baseline:]), recovered)


def load_cv(load: Tensor) -> Tensor:
    """Standard deviation of the load over its mean: (..., E) -> (...) float64 in [0, sqrt(E/K - 1)]; 0 is uniform.

    load: tokens of each expert, from `expert_load`. The deviation is that of all E experts (divided by E, not E - 1).
    NaN without tokens.
    """
    values = load.double()
    return values.std(dim=-1, correction=0) / values.mean(dim=-1)


def dead_experts(load: Tensor) -> Tensor:
    """Number of experts that no token chose: (..., E) -> (...) int64 in [0, E]; more of them in a short text."""
    return (load <= 0).sum(dim=-1)


# Rows of probabilities add up to 1 within this in any type down to bfloat16.
_ROUNDING_OF_A_SUM = 0.02


def router_distribution(logits: Tensor) -> Tensor:
    """g = softmax of the logits, (..., E) -> (..., E) in float32 at least, without a device synchronisation.

    Some routers record probabilities under the name of logits: if every row is at least 0 and sums to 1 it is taken as
    it is.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    is_done = (wide >= 0).all() & ((wide.sum(-1) - 1).abs() < _ROUNDING_OF_A_SUM).all()
    return torch.where(is_done, wide, torch.softmax(wide, dim=-1))


def router_entropy(probs: Tensor) -> Tensor:
    """Entropy of g over log E: (..., E) -> (...) in [0, 1]; 1 is undecided, 0 certain. Needs all E probabilities."""
    if probs.shape[-1] == 1:
        return torch.zeros_like(probs[..., 0])
    return torch.special.entr(probs).sum(dim=-1) / math.log(probs.shape[-1])


def router_confidence(probs: Tensor) -> Tensor:
    """Largest probability: (..., E) or only those of the chosen experts (..., K) -> (...) in [1/E, 1].

    From chosen experts alone it is the same number wherever the router chooses by g; with a bias on the choice
    (DeepSeek-V3) it is that of the surest expert chosen, which may lie below 1/E.
    """
    return probs.amax(dim=-1)


def domain_specialization(load: Tensor, num_tokens: Tensor) -> Tensor:
    """DS from counts: load (D, E) and the tokens of each domain (D,) -> (D, E) float64 in [0, 1], rows sum to K.

    load: `expert_load` of each domain. A domain without tokens is a row of NaN.
    """
    if load.ndim != 2 or num_tokens.shape != load.shape[:1]:
        raise ValueError(
            f"load is {tuple(load.shape)} and num_tokens {tuple(num_tokens.shape)}: they must be (D, E) and (D,)."
        )
    return load.double() / num_tokens.double()[:, None]


CHUNK_TOKENS = 1 << 18  # scratch memory of the counters is a few times CHUNK_TOKENS * K * 8 bytes


class SaturationCounter:
    """Router saturation of a stream of tokens; holds K + 1 numbers, the tokens that kept 0, 1, ..., K experts."""

    def __init__(self, experts_per_token: int) -> None:
        self.tokens_by_overlap = torch.zeros(experts_per_token + 1, dtype=torch.int64)

    def add(self, before: Tensor, after: Tensor) -> None:
        """before, after: (T, K) integers of the same tokens in the same order; the K of a token distinct."""
        check_top_k_index(before)
        check_top_k_index(after)
        num_experts_per_token = self.tokens_by_overlap.numel() - 1
        if before.shape != after.shape or before.shape[1] != num_experts_per_token:
            raise ValueError(
                f"before is {tuple(before.shape)} and after {tuple(after.shape)}, K is {num_experts_per_token}: "
                "saturation compares the same tokens in the same layer, with as many experts each."
            )
        for old, new in zip(before.cpu().split(CHUNK_TOKENS), after.cpu().split(CHUNK_TOKENS), strict=True):
            shared = shared_experts(old, new)
            self.tokens_by_overlap += torch.bincount(shared, minlength=num_experts_per_token + 1)

    def saturation(self) -> float:
        """Of all tokens added, in [0, 1]; NaN without any."""
        counts = self.tokens_by_overlap.tolist()
        kept = sum(overlap * tokens for overlap, tokens in enumerate(counts))
        return kept / (sum(counts) * (len(counts) - 1)) if sum(counts) else float("nan")


def router_saturation(before: Tensor, after: Tensor, token_mask: Tensor | None = None) -> float:
    """Share of a token's experts that it had before too, a mean over tokens: a number in [0, 1], NaN without tokens.

    before, after: (T, K) integers, the experts of the same tokens in the same order at two checkpoints; the K of a
    token distinct, in any order. token_mask: (T,), True or 1 for tokens that count (False for padding).
    """
    check_top_k_index(before)
    if token_mask is not None:
        check_same_tokens("token_mask", token_mask, before)
        if before.shape == after.shape:
            before, after = before[token_mask.bool()], after[token_mask.bool()]
    counter = SaturationCounter(before.shape[1])
    counter.add(before, after)
    return counter.saturation()


def shared_experts(before: Tensor, after: Tensor) -> Tensor:
    """|S_before(x) n S_after(x)| of each token: two (T, K) integers, the K of a token distinct -> (T,) integers.

    Columns are compared one by one, K^2 passes over contiguous bytes: on a CPU four times as fast as all at once.
    """
    old, new = before.T.contiguous(), after.T.contiguous()
    shared = torch.zeros(old.shape[1], dtype=torch.uint8 if len(old) < 256 else torch.int16, device=old.device)
    for old_column in old:
        for new_column in new:
            shared += (old_column == new_column).view(torch.uint8)
    return shared


class CoactivationCounter:
    """Pairs of experts in a stream of tokens; holds `counts` (E, E) int64, symmetric, with N(i) on its diagonal."""

    def __init__(self, num_experts: int) -> None:
        self.counts = torch.zeros(num_experts, num_experts, dtype=torch.int64)

    def add(self, top_k_index: Tensor) -> None:
        """top_k_index: (T, K) integers in [0, E), the K of a token distinct. Raises ValueError for K = 1."""
        num_experts = len(self.counts)
        check_top_k_index(top_k_index, num_experts)
        if top_k_index.shape[1] == 1:
            raise ValueError(
                "Co-activation needs at least two experts per token, and K is 1: with a single expert no token has a "
                "pair; leave it out for this model."
            )
        for part in top_k_index.cpu().split(CHUNK_TOKENS):
            self.counts += _pair_counts(part, num_experts)

    def conditional(self) -> Tensor:
        """P(j | i) of all tokens added, as `expert_coactivation` returns it."""
        return self.counts.double() / self.counts.diagonal().clamp(min=1)[:, None]


def expert_coactivation(top_k_index: Tensor, num_experts: int) -> Tensor:
    """P(j | i), row i: share of the tokens of expert i that also visit j: (E, E) float64 in [0, 1].

    The diagonal is 1 and rows sum to K; a row of an expert without tokens is 0 throughout. top_k_index: (T, K)
    integers in [0, E), the K of a token distinct. Balanced, unrelated choices give (K - 1)/(E - 1) off the diagonal.
    Raises ValueError for K = 1, where no token has a pair.
    """
    counter = CoactivationCounter(num_experts)
    counter.add(top_k_index)
    return counter.conditional()


def coactivation_change(before: Tensor, after: Tensor) -> float:
    """Mean of |P_after(j | i) - P_before(j | i)| over the E (E - 1) ordered pairs i != j: a number in [0, 1].

    before, after: (E, E) from `expert_coactivation` of the same layer. 0 is unchanged.
    """
    if before.shape != after.shape or before.ndim != 2 or before.shape[0] != before.shape[1] or len(before) < 2:
        raise ValueError(
            f"before is {tuple(before.shape)} and after {tuple(after.shape)}: both must be (E, E) of one layer, E > 1."
        )
    is_pair = ~torch.eye(len(before), dtype=torch.bool, device=before.device)
    return float((after - before).abs()[is_pair].mean())


def _pair_counts(top_k_index: Tensor, num_experts: int) -> Tensor:
    """N (E, E) of a chunk: one histogram for each of the K (K - 1) / 2 pairs of places, mirrored."""
    dtype = torch.int16 if num_experts**2 <= 1 << 15 else torch.int32
    places = [place.contiguous() for place in top_k_index.to(dtype).T]
    upper = torch.zeros(num_experts**2, dtype=torch.int64)
    for first, place in enumerate(places):
        for other in places[first + 1 :]:
            upper += torch.bincount(place * num_experts + other, minlength=num_experts**2)
    pairs = upper.view(num_experts, num_experts)
    load = torch.bincount(top_k_index.flatten(), minlength=num_experts)
    return pairs + pairs.T + torch.diag(load)


Average = Literal["occurrences", "ids"]
AVERAGES = ("occurrences", "ids")
UNSEEN = -1  # favourite of an id that did not occur


class VocabularyCounter:
    """Experts of each token id in a stream; holds `counts` (V, E) int32 and `occurrences` (V,) int64."""

    def __init__(self, vocab_size: int, num_experts: int) -> None:
        if (vocab_size + 1) * num_experts >= 1 << 31:
            raise ValueError(f"A table of {vocab_size} x {num_experts} passes 2^31 cells: count a part of the ids.")
        self._table = torch.zeros(vocab_size + 1, num_experts, dtype=torch.int32)  # row 0 takes tokens without an id
        self.counts = self._table[1:]
        self.occurrences = torch.zeros(vocab_size, dtype=torch.int64)

    def add(self, token_ids: Tensor, top_k_index: Tensor) -> None:
        """token_ids: (T,) integers below V; negative ones do not count, as for a last token, which none follows.

        top_k_index: (T, K) integers in [0, E), the K of a token distinct.
        """
        vocab_size, num_experts = self.counts.shape
        check_top_k_index(top_k_index, num_experts)
        check_same_tokens("token_ids", token_ids, top_k_index)
        if token_ids.numel() and int(token_ids.max()) >= vocab_size:
            raise ValueError(
                f"token_ids holds {int(token_ids.max())}, outside the vocabulary of {vocab_size}: pass the number of "
                "rows of the model's embedding."
            )
        for ids, index in zip(token_ids.cpu().split(CHUNK_TOKENS), top_k_index.cpu().split(CHUNK_TOKENS), strict=True):
            rows = ids.to(torch.int32).clamp(min=-1) + 1
            first_cell, ones = rows * num_experts, torch.ones_like(rows)
            for expert in index.T:
                self._table.view(-1).index_add_(0, first_cell + expert, ones)
            self.occurrences += torch.bincount(rows, minlength=vocab_size + 1)[1:]


def favourite_experts(counts: Tensor) -> Tensor:
    """e*(v): (V, E) -> (V,) int64, the expert that each id visits most, the lowest of equals, -1 for unseen ids."""
    most, favourite = counts.max(dim=-1)
    lowest = (counts == most[:, None]).to(torch.uint8).argmax(dim=-1)  # the first 1: max promises no order of equals
    return torch.where(most > 0, lowest, torch.full_like(favourite, UNSEEN))


def vocabulary_specialization(
    token_ids: Tensor,
    top_k_index: Tensor,
    vocab_size: int,
    num_experts: int,
    *,
    favourite: Tensor | None = None,
    average: Average = "occurrences",
    min_occurrences: int = 1,
) -> float:
    """VS of one layer, in [0, 1]; at least K/E with its own favourites; NaN if no id counts.

    token_ids: (T,), negative ones do not count. top_k_index: (T, K) integers in [0, E). favourite: (V,) e*(v) of the
    reference checkpoint from `favourite_experts`, ids with -1 do not count; None takes the data's own.
    min_occurrences: ids that occur less often do not count; rare ids push VS up, since one token always agrees with
    itself.
    """
    counter = VocabularyCounter(vocab_size, num_experts)
    counter.add(token_ids, top_k_index)
    return vocabulary_specialization_from_counts(
        counter.counts, counter.occurrences, favourite=favourite, average=average, min_occurrences=min_occurrences
    )


def vocabulary_specialization_from_counts(
    counts: Tensor,
    occurrences: Tensor,
    *,
    favourite: Tensor | None = None,
    average: Average = "occurrences",
    min_occurrences: int = 1,
) -> float:
    """VS from the tables of `VocabularyCounter`: counts (V, E), occurrences (V,); the rest as above."""
    if average not in AVERAGES:
        raise ValueError(f"average={average!r} is unknown: choose from {', '.join(AVERAGES)}.")
    if min_occurrences < 1:
        raise ValueError(
            f"min_occurrences={min_occurrences} must be at least 1: an id that never occurs has no share."
        )
    favourite = favourite_experts(counts) if favourite is None else favourite
    if favourite.shape != occurrences.shape:
        raise ValueError(
            f"favourite is {tuple(favourite.shape)} and the vocabulary has {len(occurrences)} ids: both checkpoints "
            "must share a tokenizer."
        )
    counted = (favourite >= 0) & (occurrences >= min_occurrences)
    if not bool(counted.any()):
        return float("nan")
    loyal = counts[counted].gather(1, favourite[counted].long()[:, None]).squeeze(1).double()
    total = occurrences[counted].double()
    return float((loyal / total).mean() if average == "ids" else loyal.sum() / total.sum())


def specialized_tokens(
    counts: Tensor, occurrences: Tensor, num_tokens: int, min_occurrences: int = 10
) -> list[list[tuple[int, float, int]]]:
    """The ids that go to each expert most reliably: for each of the E experts at most num_tokens (id, share, occ).

    share: n(v, e) / occ(v) in (0, 1], falling; of equal shares the id that occurs more often comes first. Only ids
    with at least min_occurrences tokens.
    """
    ids = (occurrences >= min_occurrences).nonzero().squeeze(1)
    visits, total = counts[ids].long(), occurrences[ids]
    # one sortable integer: 30 bits of the share above 31 bits of the occurrences
    key = ((visits << 30) // total[:, None].clamp(min=1) << 31) + total[:, None].clamp(max=(1 << 31) - 1)
    best = key.topk(min(num_tokens, len(ids)), dim=0).indices
    found = []
    for expert, rows in enumerate(best.T):
        triples = [(int(ids[row]), int(visits[row, expert]), int(total[row])) for row in rows]
        found.append([(token, times / occ, occ) for token, times, occ in triples if times])
    return found


def imbalance_curve(
    name: str,
    steps: Sequence[int],
    layers: Sequence[Sequence[float]],
    *,
    ideal: float,
    shift_step: int | None = None,
    tolerance: float = 0.05,
    smooth: int = 5,
) -> dict[str, Any]:
    """An entry of "training" in the dictionary of `analyse_traces`.

    steps: rising optimizer steps. layers: for each layer the MRI at each of them. ideal: K/E. shift_step: first step
    on the new text, None without a shift. `recovery_step` counts optimizer steps after the shift until the mean over
    layers, and over the last `smooth` points, stays within `tolerance` of its level before; None if it never does or
    nothing came before.
    """
    if not steps or not layers or any(len(layer) != len(steps) for layer in layers):
        raise ValueError(
            f"{name}: {len(steps)} steps and layers of {sorted({len(layer) for layer in layers})} values: give every "
            "layer one value a step."
        )
    if any(later <= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
        raise ValueError(f"{name}: steps must rise, and do not: sort the log and drop what was logged twice.")
    mean = [statistics.fmean(values) for values in zip(*layers, strict=True)]
    recovery = None
    if shift_step is not None:
        cut = bisect_left(steps, shift_step)
        if 0 < cut < len(steps):
            points = imbalance_around_shift(mean[:cut], mean[cut:], tolerance, smooth).recovery_step
            recovery = None if points is None else steps[cut + points] - shift_step
    return {
        "name": name,
        "steps": list(steps),
        "layers": [list(layer) for layer in layers],
        "mean": mean,
        "ideal": ideal,
        "shift_step": shift_step,
        "recovery_step": recovery,
    }


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


def forgetting(loss_before: float, loss_after: float) -> float:
    """Rise of the loss on the old distribution, nats per token: > 0 forgot, < 0 improved on the old data too."""
    return loss_after - loss_before


def adaptation(loss_before: float, loss_after: float) -> float:
    """Fall of the loss on the new distribution, nats per token: > 0 learnt, < 0 became worse."""
    return loss_before - loss_after


@dataclass(frozen=True)
class ContinualOutcome:
    """Held-out losses of both distributions, in nats per token, at the starting checkpoint and after the run."""

    old_before: float
    old_after: float
    new_before: float
    new_after: float  # the paper's adaptation, lower is better

    @property
    def forgetting(self) -> float:
        """Rise on the old distribution; lower is better."""
        return forgetting(self.old_before, self.old_after)

    @property
    def adaptation(self) -> float:
        """Fall on the new distribution; higher is better."""
        return adaptation(self.new_before, self.new_after)
