"""The loss of a preference pair, with every component of RainbowPO as an independent switch.

    z    = beta * phi * [(l_w - l_l) - alpha * (r_w - r_l) - advantage]
    loss = f(z) + sft_weight * (-l_w)

Letters: B pairs; w chosen, l rejected; l and r log-probability of a completion under policy and reference, in nats,
summed over its tokens or, length-normalised, per token; alpha the reference's share; advantage the lead that the
chosen completion must have, in the unit of l (h, or (1 - alpha) h as a part of the mixed reference); H in [0, 1] the
reference's entropy per token over ln V, V the size of the vocabulary; phi the contextual scale; f the link.
Source: Zhao et al. 2025 (RainbowPO, arXiv 2410.04203), with phi averaged over tokens as in the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


ENTROPY_FLOOR = 1e-6  # an entropy of exactly 0, as half precision rounds a sure answer to, would make phi infinite

LEAST_DISPERSION = 1e-4  # of mean(-ln H); below it a reference is uniform but for rounding


class Pair(NamedTuple):
    """One number per pair and side, (B,) each."""

    chosen: Tensor
    rejected: Tensor


class PreferenceTerms(NamedTuple):
    """What a batch of pairs costs and what it is made of, (B,) each; loss = preference + sft_weight * sft."""

    loss: Tensor
    preference: Tensor  # f(z), with its smoothed labels
    sft: Tensor  # -l_w, in nats, per token if length-normalised
    phi: Tensor  # contextual scale, 1 without
    margin: Tensor  # the bracket [...], before beta and phi
    logits: Tensor  # z


def _cauchy(z: Tensor) -> Tensor:
    """-log(1/2 + atan(z) / pi); the angle of (-z, 1) is the same without cancellation at very negative z."""
    return -torch.log(torch.atan2(torch.ones_like(z), -z) / math.pi)


LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": lambda z: -functional.logsigmoid(z),
    "hinge": lambda z: torch.relu(1.0 - z),
    "square": lambda z: (z - 0.5).square(),
    "square_hinge": lambda z: torch.relu(0.5 - z).square(),
    "cauchy": _cauchy,
}
SCORE_TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda gap: gap, "log": torch.log}


def per_token(sums: Pair, lengths: Pair) -> Pair:
    """Sums over a completion's tokens divided by its number of tokens, at least 1."""
    return Pair(*(total / length.clamp(min=1) for total, length in zip(sums, lengths, strict=True)))


def normalized_entropy(entropy_sums: Pair, lengths: Pair, vocabulary_size: int) -> Tensor:
    """H (B,) in [0, 1]: entropy per token over ln V, averaged over both completions of a pair.

    entropy_sums: the reference's entropies of the next token, in nats, summed over a completion's tokens.
    """
    if vocabulary_size < 2:
        raise ValueError(f"vocabulary_size={vocabulary_size} has no entropy to speak of: give at least 2.")
    entropy = per_token(entropy_sums, lengths)
    return (entropy.chosen + entropy.rejected) / (2.0 * math.log(vocabulary_size))


def mallows_phi(entropy: Tensor, dispersion_scale: float) -> Tensor:
    """phi (B,) >= 0: -dispersion_scale * ln H, small where the reference is unsure, so where people may disagree.

    entropy: H (B,), clipped to [ENTROPY_FLOOR, 1].
    """
    return -dispersion_scale * entropy.clamp(ENTROPY_FLOOR, 1.0).log()


def dispersion_scale_of(entropy: Tensor) -> float:
    """The scale with which phi of these H (N,) has mean 1, so that beta keeps its meaning.

    Raises ValueError for no pairs, for a value that is not finite, and where all H are 0 or nearly all are 1.
    """
    values = entropy.detach().double().flatten()
    if values.numel() == 0:
        raise ValueError("dispersion_scale cannot be calibrated on no pairs: give training pairs or a number.")
    mean = mallows_phi(values, 1.0).mean().item()
    if not math.isfinite(mean) or mean < LEAST_DISPERSION or values.max().item() <= ENTROPY_FLOOR:
        raise ValueError(
            f"dispersion_scale cannot be calibrated on entropies in [{values.min().item():.3g}, "
            f"{values.max().item():.3g}] of ln V: the reference is sure of everything, of nothing, or not finite; "
            "check the reference model, or give a number."
        )
    return 1.0 / mean


def score_advantage(scores: Pair, home_advantage: float, transform: str) -> Tensor:
    """Advantage (B,) by which a score is better (ODPO): home_advantage * transform(chosen - rejected score)."""
    return home_advantage * SCORE_TRANSFORMS[transform](scores.chosen - scores.rejected)


def check_scores(scores: Pair, transform: str) -> None:
    """Raise ValueError unless `score_advantage` of these scores is finite. Waits for the scores' device."""
    gap = scores.chosen - scores.rejected
    unusable = ~torch.isfinite(SCORE_TRANSFORMS[transform](gap))
    if unusable.any():
        rule = "scores must be finite" + (", the chosen one the higher" if transform == "log" else "")
        raise ValueError(
            f"{int(unusable.sum())} of {gap.numel()} pairs have scores that give no home advantage, the first "
            f"{scores.chosen[unusable][0].item():g} (chosen) and {scores.rejected[unusable][0].item():g} (rejected): "
            f"with score_transform={transform!r} {rule}; drop those pairs."
        )


def length_advantage(lengths: Pair, home_advantage: float) -> Tensor:
    """Advantage (B,) against length (R-DPO): -home_advantage * (tokens of chosen - tokens of rejected).

    It asks less of a longer winner and more of a shorter one. R-DPO's own weight is beta * home_advantage.
    """
    return -home_advantage * (lengths.chosen - lengths.rejected)


def link_loss(z: Tensor, link: str, label_smoothing: float = 0.0) -> Tensor:
    """Loss of margins z of any shape, if a share label_smoothing in [0, 0.5) of the labels is wrong."""
    if link not in LINKS:
        raise ValueError(f"link={link!r} is unknown: choose one of {', '.join(LINKS)}.")
    loss = LINKS[link](z)
    return loss if label_smoothing == 0.0 else (1.0 - label_smoothing) * loss + label_smoothing * LINKS[link](-z)


def preference_terms(
    logps: Pair,
    lengths: Pair,
    ref_logps: Pair | None,
    home_advantage: Tensor | float,
    phi: Tensor | float,
    *,
    beta: float,
    mixing_alpha: float,
    mix_home_advantage: bool,
    length_normalization: bool,
    link: str,
    label_smoothing: float,
    sft_weight: float,
) -> PreferenceTerms:
    """Loss of each pair and its parts; gradients flow through `logps` alone if the other tensors carry none.

    logps, ref_logps: log-probabilities summed over a completion's tokens, in nats; ref_logps may be None if
    mixing_alpha is 0. lengths: tokens of each completion. home_advantage: h, or (B,) one for each pair, in nats, per
    token if length_normalization. phi: 1, or (B,) of `mallows_phi`.
    """
    if length_normalization:
        logps = per_token(logps, lengths)
        ref_logps = None if ref_logps is None else per_token(ref_logps, lengths)
    margin = logps.chosen - logps.rejected
    if mixing_alpha != 0.0:
        if ref_logps is None:
            raise ValueError(f"mixing_alpha={mixing_alpha} needs ref_logps: give them, or set mixing_alpha=0.")
        margin = margin - mixing_alpha * (ref_logps.chosen - ref_logps.rejected)
    margin = margin - (1.0 - mixing_alpha if mix_home_advantage else 1.0) * home_advantage
    phi = phi if isinstance(phi, Tensor) else torch.full_like(margin, phi)
    logits = beta * phi * margin
    preference = link_loss(logits, link, label_smoothing)
    sft = -logps.chosen
    loss = preference if sft_weight == 0.0 else preference + sft_weight * sft
    return PreferenceTerms(loss, preference, sft, phi, margin, logits)
