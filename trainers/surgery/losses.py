"""Sums and means over the tokens that count: of one sequence, and of a batch by sequences or by tokens.

Letters: B sequences, S positions; mask (B, S) bool, True where a token counts; n tokens that count in a sequence.
What a masked position holds is never looked at, so that padding may be infinite or NaN. A sequence without tokens has
the value 0 and no share in the mean of its batch. Half precision is summed in float32. Source: ours.

What is minimised on a text that is to be forgotten: functions of the log-probabilities of its tokens.

    loss(logp, mask, settings, ref_logp) -> (B,)        d loss / d logp_t = w_t / n

Letters: B sequences, S tokens; logp (B, S) log-probability of the true next token in nats; mask (B, S) bool, True for
tokens that count, n of them in a sequence; p = e^logp; l = -logp, L its sum over the n tokens, L_r that sum under the
reference; b beta; tau and d the target; [x] x without gradient; w_t the weight of a token against plain ascent, which
weighs 1. All are on the scale of the mean cross entropy: w_t does not grow with the length of a text.
Sources: the records of FORGET_LOSSES; "ours" where there is no other.

Two texts, one of which is to win: a refusal over what is to be forgotten, or the new version over the old.

    loss = -(2 / (b n_l)) log sigmoid(b m)        m = (L_l - L_l,r) - (L_w - L_w,r)

Letters: w the winner, l the loser, r the reference; L the summed -log p of a text in nats, n_l the loser's tokens; b
beta; m the margin in nats by which the policy prefers the winner more than its reference does.
    d loss / d logp of the loser's tokens  = +2 sigmoid(-b m) / n_l
    d loss / d logp of the winner's tokens = -2 sigmoid(-b m) / n_l
With a winner that stands still it is npo. The division by n_l puts both on the scale of a mean cross entropy, if the
texts are of like length. The winner's pull dies out with the loser's: at b = 0.1 a margin of 50 nats leaves 1 % of it,
however much of the winner is still unknown; where the new text must be learnt to the end, keep a cross entropy on it.
Source: Rafailov et al. 2023 (DPO, arXiv 2305.18290), with refusals as in TOFU (Maini et al. 2024, arXiv 2401.06121).

What LLM Surgery minimises: one weighted term per set, of which only forgetting needs a loss of its own.

    loss = w_u F(unlearn) + w_o F(obsolete) + w_n CE(update) + w_r KL(retain) + w_k KL(neighbour)

CE is the mean cross entropy in nats per token, F a forget loss (with ga, F = -CE), KL the divergence from the model
before surgery. The printed objective, to be maximised, is CE(unlearn) - CE(update) - KL(P || P_ref): the negative of
this with weights of 1, ga and the reverse direction. The authors' code has the weights of PAPER_WEIGHTS and the
forward direction. Means are those of counted_tokens.py: over sequences first, as the paper has it, or over all tokens.
Source: Veldanda et al. 2024 (arXiv 2409.13054); neighbour is ours: text of the same kind about other subjects.

How far a model's next-token distribution has moved from its reference: KL, in both directions, by definition.

    forward  KL(P_ref || P) = sum_v P_ref(v) (log P_ref(v) - log P(v))     authors' code: covers what P_ref knows
    reverse  KL(P || P_ref) = sum_v P(v) (log P(v) - log P_ref(v))         printed: avoids what P_ref rules out

Letters: V vocabulary; logp and ref_logp (..., V) normalised log-probabilities in nats of model and reference; z the
logits under logp. Both are 0 where the distributions are equal. The reference is a constant: it gets no gradient.
Source: Veldanda et al. 2024 (arXiv 2409.13054). Their code minimises the cross entropy of the reference against the
model, which is the forward KL plus the reference's entropy: the same gradient, but not 0 at the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hf_moe_cpt.data.surgery_bench import SETS


NORMALISATIONS = ("sequence", "token")


def counted(values: Tensor, mask: Tensor) -> Tensor:
    """`values` (B, S) where they count and 0 elsewhere, at least in float32; no gradient reaches the others.

    Raises ValueError unless both are (B, S) and mask is bool.
    """
    if values.ndim != 2 or mask.shape != values.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"values {tuple(values.shape)} and mask {tuple(mask.shape)} {mask.dtype} must both be (sequences, "
            "tokens), the mask torch.bool: drop the first label of each row and mark the tokens that count with True."
        )
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return torch.where(mask, wide, torch.zeros_like(wide))


def sum_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` (B, S) over the tokens that count, (B,)."""
    return counted(values, mask).sum(1)


def mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` (B, S) over the n tokens that count, (B,); 0 where there are none."""
    return sum_over_tokens(values, mask) / token_count(mask)


def token_count(mask: Tensor) -> Tensor:
    """n (B,) int64, at least 1 so that it can divide."""
    return mask.sum(1).clamp(min=1)


def num_units(mask: Tensor, normalisation: str) -> Tensor:
    """How many sequences with tokens, or how many tokens, this mask (B, S) holds; 0-d int64 on the mask's device.

    The sum over all micro-batches and ranks of an optimizer batch is the `total` of the functions below.
    """
    _check_normalisation(normalisation)
    return mask.any(1).sum() if normalisation == "sequence" else mask.sum()


def sequence_weights(
    mask: Tensor, normalisation: str, total: Tensor | int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Share (B,) of each sequence in the mean of its optimizer batch.

    "sequence": 1 / total, whatever the length; "token": n / total. total: units of the whole optimizer batch as
    `num_units` counts them; None: those of this mask, and the shares then sum to 1.
    """
    units = num_units(mask, normalisation) if total is None else total
    own = mask.any(1) if normalisation == "sequence" else mask.sum(1)
    return own.to(dtype) / (units.clamp(min=1) if isinstance(units, Tensor) else max(units, 1))


def token_weights(
    mask: Tensor, normalisation: str, total: Tensor | int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Share (B, S) of each token in the mean of its optimizer batch: that of its sequence over n, 0 where masked."""
    return mask * (sequence_weights(mask, normalisation, total, dtype) / token_count(mask))[:, None]


def reduce_sequences(losses: Tensor, mask: Tensor, normalisation: str, total: Tensor | int | None = None) -> Tensor:
    """Mean of one loss per sequence (B,), a scalar; mask (B, S) says how long each sequence is."""
    if losses.shape != mask.shape[:1]:
        raise ValueError(f"losses {tuple(losses.shape)} must be one per sequence of the mask, ({mask.shape[0]},).")
    return (losses * sequence_weights(mask, normalisation, total, losses.dtype)).sum()


def reduce_tokens(values: Tensor, mask: Tensor, normalisation: str, total: Tensor | int | None = None) -> Tensor:
    """Mean of one value per token (B, S), a scalar: of the sequences' means, or of all tokens."""
    values = counted(values, mask)
    return (values * token_weights(mask, normalisation, total, values.dtype)).sum()


def _check_normalisation(normalisation: str) -> None:
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation={normalisation!r} is unknown: choose one of {', '.join(NORMALISATIONS)}.")


# Nats in place of a log-probability of -inf where sums under model and reference are subtracted: inf - inf is NaN.
IMPOSSIBLE = -1e4
DEFAULT_BETA = {"npo": 0.1, "simnpo": 4.5, "wga": 1.0, "satimp": 5.0, "idk_dpo": 0.1, "pair_dpo": 0.1}


@dataclass(frozen=True)
class ForgetSettings:
    """Numbers of the forget losses; each loss reads its own and no others. Wrong ones raise ValueError."""

    # nats per token: tau of cap, seqcap and expcap, such as ln V or the loss of unseen text; d of simnpo
    target: float | None = None
    beta: float | None = None  # None: DEFAULT_BETA of the loss
    satimp_beta2: float = 1.0  # exponent of 1 - p in satimp
    max_weight: float = 10.0  # unlikelihood: the most that p / (1 - p) may weigh; reached at p = 10 / 11

    def __post_init__(self) -> None:
        for name in ("target", "beta", "max_weight"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"{name}={value} must be a finite number above 0.")
        if not 0.0 <= self.satimp_beta2 < math.inf:
            raise ValueError(f"satimp_beta2={self.satimp_beta2} must be a finite number, at least 0.")

    def beta_of(self, loss: str) -> float:
        """Beta in force for the loss of this name."""
        return DEFAULT_BETA[loss] if self.beta is None else self.beta


ForgetFunction = Callable[[Tensor, Tensor, ForgetSettings, Tensor | None], Tensor]


def ga(logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None) -> Tensor:
    """-(1/n) sum l (B,), w = 1: ascent on the mean cross entropy. Unbounded, it never comes to rest."""
    return mean_over_tokens(logp, mask)


def cap(logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None) -> Tensor:
    """-(1/n) sum min(l, tau) (B,) in [-tau, 0], w = 1 where l < tau, else 0: ascent that stops token by token."""
    loss_of_token = -counted(logp, mask)
    target = _target(settings, "cap")
    return mean_over_tokens(-loss_of_token.masked_fill(loss_of_token >= target, target), mask)


def seqcap(logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None) -> Tensor:
    """-min(L/n, tau) (B,) in [-tau, 0], w = 1 while L/n < tau, else 0: ascent that stops text by text.

    Which tokens carry the loss is left to the other terms: with neighbours as an anchor, words that every text of the
    kind has stay likely, and names and values bear it, as in a text that was never read.
    """
    loss_of_text, target = mean_over_tokens(-logp, mask), _target(settings, "seqcap")
    return -loss_of_text.masked_fill(loss_of_text >= target, target).masked_fill(~mask.any(1), 0.0)


def aim(logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None) -> Tensor:
    """(L/n - tau)^2 / (2 tau) (B,), at least 0, w = 1 - L/(n tau): ascent that fades out at tau, descent beyond it.

    A text comes to rest at tau from either side. With a bound on one side alone, texts that are forgotten already
    drift on with those that are not: they are of one kind, and share what the ascent takes away. Beyond 2 tau the loss
    goes on as a straight line with w = -1, so that no text pulls harder than the first step does.
    """
    target = _target(settings, "aim")
    loss_of_text = -log_likelihood(logp, mask) / token_count(mask)
    loss = functional.huber_loss(loss_of_text, torch.full_like(loss_of_text, target), reduction="none", delta=target)
    return loss.div(target).masked_fill(~mask.any(1), 0.0)


def expcap(logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None) -> Tensor:
    """-(tau/n) sum (1 - e^(-l/tau)) (B,) in [-tau, 0], w = p^(1/tau): ascent that fades out beyond tau."""
    target = _target(settings, "expcap")
    return mean_over_tokens(target * torch.expm1(counted(logp, mask) / target), mask)


def npo(logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None) -> Tensor:
    """-(2 / (b n)) log sigmoid(b (L - L_r)) (B,), at least 0; w = 2 sigmoid(-b (L - L_r)), 1 at the start.

    The published loss, divided by n: its sums over tokens would weigh n times as much as a mean cross entropy. Inside
    the sigmoid they stay sums, so a text of n tokens is forgotten once it lost a few 1 / b nats in all.
    """
    if ref_logp is None:
        raise ValueError("npo compares with a reference: give ref_logp, or choose simnpo, cap or expcap.")
    beta = settings.beta_of("npo")
    return preference_loss(beta * (log_likelihood(ref_logp.detach(), mask) - log_likelihood(logp, mask)), beta, mask)


def simnpo(logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None) -> Tensor:
    """-(2/b) log sigmoid(b (L/n - d)) (B,), at least 0; w = 2 sigmoid(-b (L/n - d)): 2 far below d, 1 at d, then 0.

    d is `settings.target`, or 0 as published if that is None. With b = 4.5 a text comes to rest one to two nats per
    token above d.
    """
    beta = settings.beta_of("simnpo")
    target = 0.0 if settings.target is None else settings.target
    loss = -(2.0 / beta) * functional.logsigmoid(beta * (mean_over_tokens(-logp, mask) - target))
    return loss.masked_fill(~mask.any(1), 0.0)


def wga(logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None) -> Tensor:
    """-(1/n) sum w l (B,) in [-1/(e b), 0] with w = p^b held constant.

    Its gradient is that of (1 / (b n)) sum p^b, which falls to 0; its value falls and rises again: no stop signal.
    """
    return _weighted_ascent(logp, mask, lambda known: (settings.beta_of("wga") * known).exp())


def satimp(logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None) -> Tensor:
    """-(1/n) sum w l (B,) in [-1/(e b), 0] with w = p^b (1 - p)^b2 held constant; its value is no stop signal.

    What is known by heart (p near 1) weighs nothing until other terms have moved it.
    """
    beta, beta2 = settings.beta_of("satimp"), settings.satimp_beta2
    return _weighted_ascent(logp, mask, lambda known: (beta * known).exp() * (-known.expm1()).clamp(min=0.0) ** beta2)


def unlikelihood(logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None) -> Tensor:
    """-(1/n) sum log(1 - p) (B,), at least 0; w = min(p / (1 - p), max_weight).

    Beyond p = max_weight / (1 + max_weight) the loss goes on as a straight line in log p, so that what is known by
    heart keeps a pull, and a finite one: a clamp of p itself would leave none.
    """
    logp = counted(logp, mask)
    knee = -math.log1p(1.0 / settings.max_weight)
    curve = -torch.log1p(-logp.clamp(max=knee).exp())
    return mean_over_tokens(curve + settings.max_weight * functional.relu(logp - knee), mask)


def log_likelihood(logp: Tensor, mask: Tensor) -> Tensor:
    """-L (B,) in nats, the sum over the tokens that count; -inf counts as IMPOSSIBLE."""
    return sum_over_tokens(logp.nan_to_num(nan=math.nan, posinf=math.inf, neginf=IMPOSSIBLE), mask)


def preference_loss(logit: Tensor, beta: float, mask: Tensor) -> Tensor:
    """-(2 / (b n)) log sigmoid(logit) (B,), at least 0: what npo and the pair losses make of their margin.

    logit: beta times a difference of summed log-probabilities. mask: of the text to be forgotten, whose n divides;
    a text without tokens costs 0.
    """
    loss = -(2.0 / beta) * functional.logsigmoid(logit) / token_count(mask)
    return loss.masked_fill(~mask.any(1), 0.0)


def _weighted_ascent(logp: Tensor, mask: Tensor, weight_of: Callable[[Tensor], Tensor]) -> Tensor:
    logp = counted(logp, mask)
    weight = weight_of(logp.detach())
    # 0 * -inf is NaN, but what has become impossible weighs nothing
    return mean_over_tokens((weight * logp).masked_fill(weight == 0.0, 0.0), mask)


def _target(settings: ForgetSettings, loss: str) -> float:
    if settings.target is None:
        raise ValueError(
            f"{loss} needs a target in nats per token: give ForgetSettings(target=...), the loss of unseen text "
            "of the same kind, or ln(vocabulary size)."
        )
    return settings.target


@dataclass(frozen=True)
class ForgetLoss:
    """A forget loss and what is known of it. Callable like its function; the texts are those of the documentation."""

    name: str
    function: ForgetFunction
    formula: str = "of the caller"
    bound: str = "unknown"  # what the loss cannot fall below
    gradient_weight: str = "unknown"  # w_t
    source: str = "of the caller"
    needs_reference: bool = False
    needs_target: bool = False
    is_bounded: bool = False  # whether the ascent comes to rest by itself

    def __call__(self, logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None) -> Tensor:
        """The loss (B,) of each sequence. Raises ValueError if the function returns another shape."""
        loss = self.function(logp, mask, settings, ref_logp)
        if not isinstance(loss, Tensor) or loss.shape != logp.shape[:1]:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"forget loss {self.name} returned {got}, not one loss per sequence, ({logp.shape[0]},).")
        return loss


FORGET_LOSSES: dict[str, ForgetLoss] = {
    loss.name: loss
    for loss in (
        ForgetLoss(
            name="ga",
            function=ga,
            formula="-(1/n) sum l",
            bound="none",
            gradient_weight="1",
            source="Veldanda et al. 2024, 2409.13054",
        ),
        ForgetLoss(
            name="cap",
            function=cap,
            formula="-(1/n) sum min(l, tau)",
            bound="-tau",
            gradient_weight="1 where l < tau, else 0",
            source="ours",
            needs_target=True,
            is_bounded=True,
        ),
        ForgetLoss(
            name="seqcap",
            function=seqcap,
            formula="-min(L/n, tau)",
            bound="-tau",
            gradient_weight="1 while L/n < tau, else 0",
            source="ours",
            needs_target=True,
            is_bounded=True,
        ),
        ForgetLoss(
            name="aim",
            function=aim,
            formula="(L/n - tau)^2 / (2 tau)",
            bound="0",
            gradient_weight="max(1 - L/(n tau), -1)",
            source="ours; Huber 1964 for the straight line",
            needs_target=True,
            is_bounded=True,
        ),
        ForgetLoss(
            name="expcap",
            function=expcap,
            formula="-(tau/n) sum (1 - e^(-l/tau))",
            bound="-tau",
            gradient_weight="p^(1/tau)",
            source="ours",
            needs_target=True,
            is_bounded=True,
        ),
        ForgetLoss(
            name="npo",
            function=npo,
            formula="-(2/(b n)) log sigmoid(b (L - L_r))",
            bound="0",
            gradient_weight="2 sigmoid(-b (L - L_r))",
            source="Zhang et al. 2024, 2404.05868, divided by n",
            needs_reference=True,
            is_bounded=True,
        ),
        ForgetLoss(
            name="simnpo",
            function=simnpo,
            formula="-(2/b) log sigmoid(b (L/n - d))",
            bound="0",
            gradient_weight="2 sigmoid(-b (L/n - d))",
            source="Fan et al. 2024, 2410.07163",
            is_bounded=True,
        ),
        ForgetLoss(
            name="wga",
            function=wga,
            formula="-(1/n) sum [p^b] l",
            bound="-1/(e b)",
            gradient_weight="p^b",
            source="Wang et al. 2025, 2502.19301",
            is_bounded=True,
        ),
        ForgetLoss(
            name="satimp",
            function=satimp,
            formula="-(1/n) sum [p^b (1 - p)^b2] l",
            bound="-1/(e b)",
            gradient_weight="p^b (1 - p)^b2",
            source="Yang et al. 2025, 2505.11953",
            is_bounded=True,
        ),
        ForgetLoss(
            name="unlikelihood",
            function=unlikelihood,
            formula="-(1/n) sum log(1 - p)",
            bound="0",
            gradient_weight="min(p/(1 - p), max_weight)",
            source="Welleck et al. 2019, 1908.04319; the straight line is ours",
            is_bounded=True,
        ),
    )
}


class ScoredText(NamedTuple):
    """One text of each of B pairs under policy and reference; the two texts of a pair may differ in length."""

    logp: Tensor  # (B, S) nats
    mask: Tensor  # (B, S) bool
    ref_logp: Tensor  # (B, S) nats


PairFunction = Callable[[ScoredText, ScoredText, ForgetSettings], Tensor]


def preference_margin(winner: ScoredText, loser: ScoredText) -> Tensor:
    """m (B,) in nats, 0 at the start: what the winner gained on its reference less what the loser gained."""
    return _gain(winner) - _gain(loser)


def idk_dpo(winner: ScoredText, loser: ScoredText, settings: ForgetSettings) -> Tensor:
    """Loss (B,), at least 0, by which a refusal ("I don't know.") wins over the text that is to be forgotten."""
    return _pair_loss(winner, loser, settings.beta_of("idk_dpo"))


def pair_dpo(winner: ScoredText, loser: ScoredText, settings: ForgetSettings) -> Tensor:
    """Loss (B,), at least 0, by which the new version of a text wins over the old: obsolete and update in one term."""
    return _pair_loss(winner, loser, settings.beta_of("pair_dpo"))


@dataclass(frozen=True)
class PairLoss:
    """A loss of two texts and what is known of it. Callable like its function: (winner, loser, settings) -> (B,)."""

    name: str
    function: PairFunction
    winner: str  # what the winning text is
    formula: str = "-(2/(b n)) log sigmoid(b ((L - L_r) - (L_w - L_w,r)))"
    bound: str = "0"
    gradient_weight: str = "2 sigmoid(-b m); the winner's is its negative"
    source: str = "Rafailov et al. 2023, 2305.18290, divided by n"
    needs_reference: bool = True
    needs_target: bool = False
    is_bounded: bool = True

    def __call__(self, winner: ScoredText, loser: ScoredText, settings: ForgetSettings) -> Tensor:
        """The loss (B,) of each pair."""
        return self.function(winner, loser, settings)


PAIR_LOSSES: dict[str, PairLoss] = {
    "idk_dpo": PairLoss("idk_dpo", idk_dpo, winner="a refusal"),
    "pair_dpo": PairLoss("pair_dpo", pair_dpo, winner="the new version of the text"),
}


def _gain(text: ScoredText) -> Tensor:
    return log_likelihood(text.logp, text.mask) - log_likelihood(text.ref_logp.detach(), text.mask)


def _pair_loss(winner: ScoredText, loser: ScoredText, beta: float) -> Tensor:
    if winner.mask.shape[:1] != loser.mask.shape[:1]:
        raise ValueError(
            f"{winner.mask.shape[0]} winners and {loser.mask.shape[0]} losers are no pairs: give one winner per loser."
        )
    return preference_loss(beta * preference_margin(winner, loser), beta, loser.mask)


TERMS = tuple(name for name in SETS if name != "unseen")
PAPER_WEIGHTS = {"unlearn": 0.1, "obsolete": 0.1, "update": 2.0, "retain": 0.5, "neighbour": 0.0}


def sequence_cross_entropy(logp: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-probability (B,) of a sequence's tokens, in nats per token; 0 for a sequence without any.

    logp: (B, S) log-probability of the true next token. mask: (B, S) bool, tokens that count.
    """
    return mean_over_tokens(-logp, mask)


def forget_loss_of(loss: str | ForgetLoss | PairLoss | Callable[..., Tensor]) -> ForgetLoss | PairLoss:
    """The loss of this name, or the caller's own.

    A callable must be `loss(logp, mask, settings, ref_logp) -> (B,)`. It counts as unbounded and is given no
    reference; one that wants a reference, or comes to rest by itself, is passed as `ForgetLoss(name, function,
    needs_reference=True, is_bounded=True)`. Raises ValueError for anything else.
    """
    if isinstance(loss, (ForgetLoss, PairLoss)):
        return loss
    known = FORGET_LOSSES | PAIR_LOSSES
    if isinstance(loss, str) and loss in known:
        return known[loss]
    if not isinstance(loss, str) and callable(loss):
        return ForgetLoss(getattr(loss, "__name__", type(loss).__name__), loss)
    raise ValueError(
        f"forget_loss={loss!r} is unknown: choose one of {', '.join(known)}, or give a function of "
        "(logp, mask, settings, ref_logp)."
    )


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise ValueError unless every key is one of TERMS and every weight finite and at least 0, one of them above."""
    for name, weight in weights.items():
        if name not in TERMS:
            raise ValueError(f"{name!r} is no term of the objective: choose among {', '.join(TERMS)}.")
        if not 0.0 <= weight < math.inf:
            raise ValueError(
                f"{name}_weight={weight} must be a finite number, at least 0: a forget loss already has the sign of "
                "what is minimised; 0 leaves a set out."
            )
    if not any(weights.values()):
        raise ValueError("all weights are 0: give at least one set a weight above 0.")


def surgery_objective(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum of the terms, a scalar to be minimised. A term of weight 0 need not be there and is not read.

    terms: a scalar for each name of TERMS, every one with the sign of what is minimised. Raises ValueError for a
    missing term and for what `check_weights` refuses.
    """
    check_weights(weights)
    in_force = {name: weight for name, weight in weights.items() if weight}
    missing = [name for name in in_force if name not in terms]
    if missing:
        raise ValueError(f"no term for {', '.join(missing)}: compute it, or set its weight to 0.")
    return sum(weight * terms[name] for name, weight in in_force.items())


def forward_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(P_ref || P) (...,) in nats, at least 0 up to rounding; its gradient with respect to z is P - P_ref.

    A word that the reference rules out (-inf) adds nothing. No floor is set under P: one would stop the pull exactly
    where the model has lost a word that the reference likes.
    """
    return _divergence(ref_logp.detach(), logp)


def reverse_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """KL(P || P_ref) (...,) in nats, at least 0 up to rounding; its gradient over z is P (log P - log P_ref - KL)."""
    return _divergence(logp, ref_logp.detach())


KL_DIRECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"forward": forward_kl, "reverse": reverse_kl}


def kl_divergence(logp: Tensor, ref_logp: Tensor, direction: str = "forward") -> Tensor:
    """`forward_kl` or `reverse_kl` (...,) of logp and ref_logp (..., V).

    Raises ValueError for another direction, or if the shapes differ, as those of two vocabularies do.
    """
    check_direction(direction)
    if logp.shape != ref_logp.shape:
        raise ValueError(
            f"logp {tuple(logp.shape)} and ref_logp {tuple(ref_logp.shape)} must have one shape: model and reference "
            "need the same tokens and the same vocabulary."
        )
    return KL_DIRECTIONS[direction](logp, ref_logp)


def check_direction(direction: str) -> None:
    """Raise ValueError unless `direction` is a key of KL_DIRECTIONS."""
    if direction not in KL_DIRECTIONS:
        raise ValueError(f"kl_direction={direction!r} is unknown: choose one of {', '.join(KL_DIRECTIONS)}.")


def _divergence(left: Tensor, right: Tensor) -> Tensor:
    """sum_v e^left (left - right) over the last axis, where e^left = 0 counts as 0 in value and in gradient."""
    is_ruled_out = left == float("-inf")
    left, right = left.masked_fill(is_ruled_out, 0.0), right.masked_fill(is_ruled_out, 0.0)
    return (left.exp() * (left - right)).masked_fill(is_ruled_out, 0.0).sum(-1)
