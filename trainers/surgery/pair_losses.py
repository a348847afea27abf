"""Two texts, one of which is to win: a refusal over what is to be forgotten, or the new version over the old.

    loss = -(2 / (b n_l)) log sigmoid(b m)        m = (L_l - L_l,r) - (L_w - L_w,r)

Letters: w the winner, l the loser, r the reference; L the summed -log p of a text in nats, n_l the loser's tokens; b
beta; m the margin in nats by which the policy prefers the winner more than its reference does.
    d loss / d logp of the loser's tokens  = +2 sigmoid(-b m) / n_l
    d loss / d logp of the winner's tokens = -2 sigmoid(-b m) / n_l
With a winner that stands still it is npo. The division by n_l puts both on the scale of a mean cross entropy, if the
texts are of like length. The winner's pull dies out with the loser's: at b = 0.1 a margin of 50 nats leaves 1 % of it,
however much of the winner is still unknown; where the new text must be learnt to the end, keep a cross entropy on it.
Source: Rafailov et al. 2023 (DPO, arXiv 2305.18290), with refusals as in TOFU (Maini et al. 2024, arXiv 2401.06121).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from hf_moe_cpt.trainers.surgery.forget_losses import ForgetSettings, log_likelihood, preference_loss


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
