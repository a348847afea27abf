"""What is minimised on a text that is to be forgotten: functions of the log-probabilities of its tokens.

    loss(logp, mask, settings, ref_logp) -> (B,)        d loss / d logp_t = w_t / n

Letters: B sequences, S tokens; logp (B, S) log-probability of the true next token in nats; mask (B, S) bool, True for
tokens that count, n of them in a sequence; p = e^logp; l = -logp, L its sum over the n tokens, L_r that sum under the
reference; b beta; tau and d the target; [x] x without gradient; w_t the weight of a token against plain ascent, which
weighs 1. All are on the scale of the mean cross entropy: w_t does not grow with the length of a text.
Sources: the records of FORGET_LOSSES; "ours" where there is no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hf_moe_cpt.trainers.surgery.counted_tokens import counted, mean_over_tokens, sum_over_tokens, token_count


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
