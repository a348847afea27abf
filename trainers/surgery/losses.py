"""What the terms of a surgery are made of: masked means, and the losses of a text that is to be forgotten.

    loss(logp, mask, settings, ref_logp) -> (B,)        d loss / d logp_t = w_t / n
    loss(..., ref_logp, states) -> (B,)                 of distributions and hidden states
    pair(winner, loser, settings) -> (B,)               a refusal, or the new version of a text, wins over the text

Letters: B sequences, S tokens; logp (B, S) log-probability of the true next token in nats; mask (B, S) bool, True for
tokens that count, n of them in a sequence; p = e^logp; l = -logp, L its sum over the n tokens, L_r that sum under the
reference; z, z_r logits (V) of model and reference, P = softmax(z), e_y one at the true token; b beta; tau and d the
target; [x] x without gradient; w_t the weight of a token against plain ascent, which weighs 1; L_w, L_w,r of a pair's
winner. All are on the scale of the mean cross entropy: w_t does not grow with the length of a text.
docs/surgery_objective.md compares them.

What a masked position holds is never looked at, so that padding may be infinite or NaN. A sequence without tokens has
the value 0 and no share in the mean of its batch. Half precision is summed in float32.
Sources: the docstring of each loss; "ours" where there is no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hf_moe_cpt.data.surgery_bench import SETS
from hf_moe_cpt.trainers.surgery.chunked import CHUNK_TOKENS, LanguageHead, chunked_kl_sum, per_token


TERMS = SETS  # each set has a term in the objective
NORMALIZATIONS = ("sequence", "token")


def masked(values: Tensor, mask: Tensor) -> Tensor:
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


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` (B, S) over the n tokens that count, (B,); 0 where there are none."""
    return masked(values, mask).sum(1) / token_count(mask)


def token_count(mask: Tensor) -> Tensor:
    """n (B,) int64, at least 1 so that it can divide."""
    return mask.sum(1).clamp(min=1)


def num_units(mask: Tensor, normalization: str) -> Tensor:
    """How many sequences with tokens, or how many tokens, this mask (B, S) holds; 0-d int64 on the mask's device.

    The sum over all micro-batches and ranks of an optimizer batch is the `total` of the functions below.
    """
    return mask.any(1).sum() if normalization == "sequence" else mask.sum()


def sequence_weights(
    mask: Tensor, normalization: str, total: Tensor | int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Share (B,) of each sequence in the mean of its optimizer batch.

    "sequence": 1 / total, whatever the length; "token": n / total. total: units of the whole optimizer batch as
    `num_units` counts them; None: those of this mask, and the shares then sum to 1.
    """
    total = num_units(mask, normalization) if total is None else torch.as_tensor(total)
    own = mask.any(1) if normalization == "sequence" else mask.sum(1)
    return own.to(dtype) / total.clamp(min=1)


def token_weights(
    mask: Tensor, normalization: str, total: Tensor | int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Share (B, S) of each token in the mean of its optimizer batch: that of its sequence over n, 0 where masked."""
    return mask * (sequence_weights(mask, normalization, total, dtype) / token_count(mask))[:, None]


def reduce_sequences(losses: Tensor, mask: Tensor, normalization: str, total: Tensor | int | None = None) -> Tensor:
    """Mean of one loss per sequence (B,), a scalar; mask (B, S) says how long each sequence is."""
    return (losses * sequence_weights(mask, normalization, total, losses.dtype)).sum()


def reduce_tokens(values: Tensor, mask: Tensor, normalization: str, total: Tensor | int | None = None) -> Tensor:
    """Mean of one value per token (B, S), a scalar: of the sequences' means, or of all tokens."""
    values = masked(values, mask)
    return (values * token_weights(mask, normalization, total, values.dtype)).sum()


def next_token_kl(
    states: tuple[Tensor, LanguageHead],
    reference: tuple[Tensor, LanguageHead],
    mask: Tensor,
    *,
    normalization: str = "sequence",
    total: Tensor | int | None = None,
    direction: str = "forward",
    chunk_tokens: int = CHUNK_TOKENS,
    shares: Tensor | None = None,
) -> Tensor:
    """Mean KL in nats per token, a scalar with gradient.

    states, reference: hidden states (B, S, H) and head of model and reference. mask: (B, S - 1) bool, positions whose
    next token counts. normalization, total: as in `token_weights`. shares: (B, S - 1), by which a token's weight is
    multiplied.
    """
    (hidden, head), (ref_hidden, ref_head) = states, reference
    hidden, ref_hidden = hidden[:, :-1].flatten(0, 1), ref_hidden[:, :-1].flatten(0, 1)
    weights = token_weights(mask, normalization, total)
    weights = (weights if shares is None else weights * shares).flatten()
    return chunked_kl_sum(hidden, head, ref_hidden, ref_head, weights, direction, chunk_tokens)


# Nats in place of a log-probability of -inf where sums under model and reference are subtracted: inf - inf is NaN.
IMPOSSIBLE = -1e4
DEFAULT_BETA = {"npo": 0.1, "simnpo": 4.5, "wga": 1.0, "satimp": 5.0, "idk_dpo": 0.1, "pair_dpo": 0.1}
DEFAULT_BETA |= {"undial": 10.0, "rmu": 20.0}


@dataclass(frozen=True)
class ForgetSettings:
    """Numbers of the forget losses; each loss reads its own and no others. Wrong ones raise ValueError."""

    target: float | None = None  # nats per token: tau of aim, such as ln V or the loss of unseen text; d of simnpo
    beta: float | None = None  # None: DEFAULT_BETA of the loss
    satimp_beta2: float = 1.0  # exponent of 1 - p in satimp

    def __post_init__(self) -> None:
        for name in ("target", "beta"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"{name}={value} must be a finite number above 0.")
        if not 0.0 <= self.satimp_beta2 < math.inf:
            raise ValueError(f"satimp_beta2={self.satimp_beta2} must be a finite number, at least 0.")

    def beta_of(self, loss: str) -> float:
        """Beta in force for the loss of this name."""
        return DEFAULT_BETA[loss] if self.beta is None else self.beta

    def target_of(self, loss: str) -> float:
        """The target, for the loss of this name, which cannot do without."""
        if self.target is None:
            raise ValueError(
                f"{loss} needs a target in nats per token: give ForgetSettings(target=...), the loss of unseen text "
                "of the same kind, or ln(vocabulary size)."
            )
        return self.target


def ga(logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None) -> Tensor:
    """-(1/n) sum l (B,), w = 1: ascent on the mean cross entropy. Unbounded, it never comes to rest.

    Source: Veldanda et al. 2024, 2409.13054.
    """
    return masked_mean(logp, mask)


def aim(logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None) -> Tensor:
    """(L/n - tau)^2 / (2 tau) (B,), at least 0, w = max(1 - L/(n tau), -1): ascent that fades out at tau.

    A text comes to rest at tau from either side: beyond it, it is descended on. With a bound on one side alone, texts
    that are forgotten already drift on with those that are not: they are of one kind, and share what the ascent takes
    away. Beyond 2 tau the loss goes on as a straight line with w = -1: no text pulls harder than the first step does.
    Source: ours; Huber 1964 for the straight line.
    """
    target = settings.target_of("aim")
    loss_of_text = -log_likelihood(logp, mask) / token_count(mask)
    loss = functional.huber_loss(loss_of_text, torch.full_like(loss_of_text, target), reduction="none", delta=target)
    return loss.div(target).masked_fill(~mask.any(1), 0.0)


def npo(logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None) -> Tensor:
    """-(2/(b n)) log sigmoid(b (L - L_r)) (B,), at least 0; w = 2 sigmoid(-b (L - L_r)), 1 at the start.

    Inside the sigmoid the sums over tokens stay sums, so a text of n tokens is forgotten once it lost a few 1 / b nats
    in all. Undivided, it would weigh n times as much as a mean cross entropy.
    Source: Zhang et al. 2024, 2404.05868, divided by n.
    """
    if ref_logp is None:
        raise ValueError("npo compares with a reference: give ref_logp, or choose simnpo or aim.")
    beta = settings.beta_of("npo")
    return preference_loss(beta * (log_likelihood(ref_logp.detach(), mask) - log_likelihood(logp, mask)), beta, mask)


def simnpo(logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None) -> Tensor:
    """-(2/b) log sigmoid(b (L/n - d)) (B,), at least 0; w = 2 sigmoid(-b (L/n - d)): 2 far below d, 1 at d, then 0.

    d is `settings.target`, or 0 as published if that is None. With b = 4.5 a text comes to rest one to two nats per
    token above d. Source: Fan et al. 2024, 2410.07163.
    """
    beta = settings.beta_of("simnpo")
    target = 0.0 if settings.target is None else settings.target
    loss = -(2.0 / beta) * functional.logsigmoid(beta * (masked_mean(-logp, mask) - target))
    return loss.masked_fill(~mask.any(1), 0.0)


def wga(logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None) -> Tensor:
    """-(1/n) sum [p^b] l (B,) in [-1/(e b), 0], w = p^b.

    Its gradient is that of (1 / (b n)) sum p^b, which falls to 0; its value falls and rises again: no stop signal.
    Source: Wang et al. 2025, 2502.19301.
    """
    return _weighted_ascent(logp, mask, lambda known: (settings.beta_of("wga") * known).exp())


def satimp(logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None) -> Tensor:
    """-(1/n) sum [p^b (1 - p)^b2] l (B,) in [-1/(e b), 0], w = p^b (1 - p)^b2; its value is no stop signal.

    What is known by heart (p near 1) weighs nothing until other terms have moved it.
    Source: Yang et al. 2025, 2505.11953.
    """
    beta, beta2 = settings.beta_of("satimp"), settings.satimp_beta2
    return _weighted_ascent(logp, mask, lambda known: (beta * known).exp() * (-known.expm1()).clamp(min=0.0) ** beta2)


def log_likelihood(logp: Tensor, mask: Tensor) -> Tensor:
    """-L (B,) in nats, the sum over the tokens that count; -inf counts as IMPOSSIBLE."""
    return masked(logp.nan_to_num(nan=math.nan, posinf=math.inf, neginf=IMPOSSIBLE), mask).sum(1)


def preference_loss(logit: Tensor, beta: float, mask: Tensor) -> Tensor:
    """-(2 / (b n)) log sigmoid(logit) (B,), at least 0: what npo and the pair losses make of their margin.

    logit: beta times a difference of summed log-probabilities. mask: of the text to be forgotten, whose n divides;
    a text without tokens costs 0.
    """
    loss = -(2.0 / beta) * functional.logsigmoid(logit) / token_count(mask)
    return loss.masked_fill(~mask.any(1), 0.0)


def _weighted_ascent(logp: Tensor, mask: Tensor, weight_of: Callable[[Tensor], Tensor]) -> Tensor:
    logp = masked(logp, mask)
    weight = weight_of(logp.detach())
    # 0 * -inf is NaN, but what has become impossible weighs nothing
    return masked_mean((weight * logp).masked_fill(weight == 0.0, 0.0), mask)


class States(NamedTuple):
    """What a loss on distributions or representations gets besides log-probabilities, of the S positions of `logp`."""

    targets: Tensor  # (B, S) int64, the true tokens
    model: tuple[Tensor, LanguageHead]  # hidden states (B, S, H) that predict them, and the head
    reference: tuple[Tensor, LanguageHead] | None = None  # the same of the model before surgery
    layer: Tensor | None = None  # (B, S, H) output of the layer `forget_layer` at the true tokens themselves
    renamed_logp: Tensor | None = None  # (B, S) nats, of the model before where the subject has an invented name
    chunk_tokens: int = CHUNK_TOKENS


def undial(
    logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None, states: States | None = None
) -> Tensor:
    """-(1/n) sum softmax(z_r - b e_y) . ln P (B,), at least 0: the old model's words with the true one made unlikely.

    Their code averages over masked positions too; here they do not count.
    Source: Dong et al. 2024, 2402.10052.
    """
    strength = settings.beta_of("undial")

    def distil(targets: Tensor, logits: Tensor, ref_logits: Tensor) -> Tensor:
        taught = ref_logits.scatter_add(1, targets[:, None], torch.full_like(ref_logits[:, :1], -strength))
        return -(taught.softmax(-1) * logits.log_softmax(-1)).sum(-1)

    return masked_mean(per_token(distil, states.targets, [states.model, states.reference], states.chunk_tokens), mask)


def ceu(
    logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None, states: States | None = None
) -> Tensor:
    """-(1/n) sum [P without y] . ln P (B,), at least 0: the model's own words with the true one taken out.

    Source: Yang 2025, 2503.01224.
    """

    def without(targets: Tensor, logits: Tensor) -> Tensor:
        taught = logits.detach().scatter(1, targets[:, None], -math.inf).softmax(-1)
        return -(taught * logits.log_softmax(-1)).sum(-1)

    return masked_mean(per_token(without, states.targets, [states.model], states.chunk_tokens), mask)


def flat_logits(
    logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None, states: States | None = None
) -> Tensor:
    """(1/n) sum (max z - mean z)^2 (B,), at least 0: all words alike; the loss of PDU, with `anchor_dual_rate`.

    They take the logits at the counted tokens themselves, here those that predict them.
    Source: Entesari et al. 2025, 2506.05314.
    """

    def margin(targets: Tensor, logits: Tensor) -> Tensor:
        return (logits.amax(-1) - logits.mean(-1)).square()

    return masked_mean(per_token(margin, states.targets, [states.model], states.chunk_tokens), mask)


def rmu(
    logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None, states: States | None = None
) -> Tensor:
    """(1/n) sum (h - b u)^2 / H (B,), at least 0: hidden states h of a layer pulled to one random direction.

    u is of length 1, drawn from [0, 1)^H, the same in every run. Theirs trains three layers' down projections only;
    `freeze` does that here. Source: Li et al. 2024, 2403.03218.
    """
    width = states.layer.shape[-1]
    direction = torch.rand(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    aim_at = settings.beta_of("rmu") * direction / direction.norm()
    wide = states.layer.to(torch.promote_types(states.layer.dtype, torch.float32))
    return masked_mean((wide - aim_at.to(wide)).square().mean(-1), mask)


def value_aim(
    logp: Tensor, mask: Tensor, settings: ForgetSettings, ref_logp: Tensor | None = None, states: States | None = None
) -> Tensor:
    """sum [k] H(l, tau) / max(sum [k], 1) (B,), at least 0: each token comes to rest at its loss without the name.

    tau = l_c, the old model's loss of the token in a copy of the text whose subject has an invented name, at most
    ln V; k = max(1 - p_c / p_r, 0) how much of its probability comes from the name: 0 for words that anybody would
    guess, and for tokens that the copy lacks (NaN). H(l, tau) = (l - tau)^2 / (2 tau), a straight line beyond 2 tau:
    no token pulls harder than under plain ascent on the values alone. Source: ours.
    """
    target, known, is_value = value_targets(mask, ref_logp, states.renamed_logp, states.model[1].weight.shape[0])
    share = -masked(logp.nan_to_num(nan=math.nan, neginf=IMPOSSIBLE), is_value) / target
    pull = target * functional.huber_loss(share, torch.ones_like(share), reduction="none")
    return (known * pull).sum(1) / known.sum(1).clamp(min=1.0)


def value_targets(
    mask: Tensor, ref_logp: Tensor, renamed_logp: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """tau, k of `value_aim` and where both are told, (B, S) each. A token at rest costs k tau + (1 - k) l_r."""
    is_value = mask & ~renamed_logp.isnan()
    target = (-masked(renamed_logp, is_value)).clamp(1e-6, math.log(vocab_size))
    known = -torch.expm1(-(masked(ref_logp.detach(), is_value) + target).clamp(min=0.0))
    return target, known.masked_fill(~is_value, 0.0), is_value


@dataclass(frozen=True)
class ForgetLoss:
    """A forget loss and what it needs. Callable like its function, whose docstring has formula, bound and source."""

    name: str
    function: Callable[..., Tensor]  # (logp, mask, settings, ref_logp), and `states` where it needs them
    needs_reference: bool = False
    needs_target: bool = False
    is_bounded: bool = False  # whether the ascent comes to rest by itself
    needs_states: bool = False  # targets, hidden states and heads
    needs_layer: bool = False  # also the output of one layer
    needs_copies: bool = False  # also what the model before makes of copies with invented names

    def __call__(
        self,
        logp: Tensor,
        mask: Tensor,
        settings: ForgetSettings,
        ref_logp: Tensor | None = None,
        states: States | None = None,
    ) -> Tensor:
        """The loss (B,) of each sequence. Raises ValueError without `states` that it needs, or for another shape."""
        if self.needs_states and states is None:
            raise ValueError(f"{self.name} is a loss of distributions or hidden states: give `states`.")
        loss = self.function(logp, mask, settings, ref_logp, *((states,) if self.needs_states else ()))
        if not isinstance(loss, Tensor) or loss.shape != logp.shape[:1]:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"forget loss {self.name} returned {got}, not one loss per sequence, ({logp.shape[0]},).")
        return loss


FORGET_LOSSES = {
    "ga": ForgetLoss("ga", ga),
    "aim": ForgetLoss("aim", aim, needs_target=True, is_bounded=True),
    "npo": ForgetLoss("npo", npo, needs_reference=True, is_bounded=True),
    "simnpo": ForgetLoss("simnpo", simnpo, is_bounded=True),
    "wga": ForgetLoss("wga", wga, is_bounded=True),
    "satimp": ForgetLoss("satimp", satimp, is_bounded=True),
}
# of negation, which learns what it takes away
DESCENT = ForgetLoss("descent", lambda logp, mask, settings, ref_logp: -masked_mean(logp, mask), is_bounded=True)
STATE_LOSSES = {
    "undial": ForgetLoss("undial", undial, needs_reference=True, is_bounded=True, needs_states=True),
    "ceu": ForgetLoss("ceu", ceu, is_bounded=True, needs_states=True),
    "flat_logits": ForgetLoss("flat_logits", flat_logits, is_bounded=True, needs_states=True),
    "value_aim": ForgetLoss(
        "value_aim", value_aim, needs_reference=True, is_bounded=True, needs_states=True, needs_copies=True
    ),
    "rmu": ForgetLoss("rmu", rmu, is_bounded=True, needs_states=True, needs_layer=True),
}


class ScoredText(NamedTuple):
    """One text of each of B pairs under policy and reference; the two texts of a pair may differ in length."""

    logp: Tensor  # (B, S) nats
    mask: Tensor  # (B, S) bool
    ref_logp: Tensor  # (B, S) nats

    def gain(self) -> Tensor:
        """L_r - L (B,) in nats: how much likelier the text became than it was under the reference."""
        return log_likelihood(self.logp, self.mask) - log_likelihood(self.ref_logp.detach(), self.mask)


@dataclass(frozen=True)
class PairLoss:
    """-(2/(b n)) log sigmoid(b ((L - L_r) - (L_w - L_w,r))), at least 0.

    w = 2 sigmoid(-b m); the winner's is its negative. m is the margin in nats by which the policy prefers the winner
    more than its reference does, n the loser's tokens. With a winner that stands still it is npo. The winner's pull
    dies out with the loser's: at b = 0.1 a margin of 50 nats leaves 1 % of it, however much of the winner is still
    unknown; where the new text must be learnt to the end, keep a cross entropy on it.
    Source: Rafailov et al. 2023, 2305.18290, divided by n; refusals as in TOFU (2401.06121).
    """

    name: str
    needs_reference: bool = True
    needs_target: bool = False
    is_bounded: bool = True

    def __call__(self, winner: ScoredText, loser: ScoredText, settings: ForgetSettings) -> Tensor:
        """The loss (B,) of each pair."""
        beta = settings.beta_of(self.name)
        return preference_loss(beta * (winner.gain() - loser.gain()), beta, loser.mask)


# the winner is a refusal ("I don't know.") to idk_dpo, the new version of the text to pair_dpo
# bounds at the target without a pull back, and what no paper forgets with
GONE = dict.fromkeys(("cap", "seqcap", "expcap"), "'aim' comes to rest at the same target, and from both sides")
GONE |= {"unlikelihood": "'wga' weighs what is known too, and was published for forgetting"}
PAIR_LOSSES = {name: PairLoss(name) for name in ("idk_dpo", "pair_dpo")}


def forget_loss_of(loss: str | ForgetLoss | PairLoss | Callable[..., Tensor]) -> ForgetLoss | PairLoss:
    """The loss of this name, or the caller's own.

    A callable must be `loss(logp, mask, settings, ref_logp) -> (B,)`. It counts as unbounded and is given no
    reference; one that wants a reference or `States`, or comes to rest by itself, is passed as `ForgetLoss(name,
    function, needs_reference=True, needs_states=True, is_bounded=True)`. Raises ValueError for anything else.
    """
    if isinstance(loss, (ForgetLoss, PairLoss)):
        return loss
    known = FORGET_LOSSES | STATE_LOSSES | PAIR_LOSSES
    if isinstance(loss, str) and loss in known:
        return known[loss]
    if isinstance(loss, str) and loss in GONE:
        raise ValueError(f"forget_loss={loss!r} is gone: {GONE[loss]}.")
    if not isinstance(loss, str) and callable(loss):
        return ForgetLoss(getattr(loss, "__name__", type(loss).__name__), loss)
    raise ValueError(
        f"forget_loss={loss!r} is unknown: choose one of {', '.join(known)}, or give a function of "
        "(logp, mask, settings, ref_logp)."
    )
