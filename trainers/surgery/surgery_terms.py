"""From a batch of one set to its term of the objective: one pass of the model, what it is compared with, one scalar.

    unlearn, obsolete   a forget loss                      + expert_anchor times the distance to the target experts
    update              cross entropy                      + the routers' penalties of a mixture of experts
    retain, neighbour   KL from the reference              + router_anchor times the KL of the routers

Penalties of routers (load balance, z) are added once, with the sign that is minimised, to the first term that descends
on text: no forget loss ever sees them. Every term is a share of its optimizer batch: over all micro-batches and ranks
the shares of a set sum to its mean. Letters: B sequences, S tokens. Source: paper 3; objective.py has the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from hf_moe_cpt.trainers.instruments.ranks import has_process_group
from hf_moe_cpt.trainers.surgery.counted_tokens import num_units, reduce_sequences, reduce_tokens, token_weights
from hf_moe_cpt.trainers.surgery.expert_targets import Expert, expert_anchor
from hf_moe_cpt.trainers.surgery.forget_losses import ForgetLoss, ForgetSettings
from hf_moe_cpt.trainers.surgery.model_pass import ModelPass, head_of, next_token_kl, run_model, token_logp
from hf_moe_cpt.trainers.surgery.pair_losses import PairLoss, ScoredText
from hf_moe_cpt.trainers.surgery.reference import Reference
from hf_moe_cpt.trainers.surgery.routers import RouterTap, Routing, router_kl
from hf_moe_cpt.trainers.surgery.set_mixture import WINNER
from hf_moe_cpt.trainers.surgery.settings_checks import ANCHOR_SETS, FORGET_SETS


Batch = Mapping[str, Tensor]


@dataclass
class Term:
    """The loss of one set in one micro-batch, unweighted, and what is logged of it."""

    loss: Tensor
    extra: Tensor | None  # penalties that carry weights of their own
    measures: dict[str, Tensor]  # of this micro-batch, without gradient


@dataclass
class RouterPull:
    """What holds the routers of a mixture of experts, with the weights of both pulls."""

    tap: RouterTap
    anchor: float = 0.0  # of the KL to their old selves, on what is retained
    expert_anchor: float = 0.0  # of the distance to the target experts, on what is forgotten
    targets: Sequence[Expert] = field(default_factory=list)


@dataclass
class SurgeryTerms:
    """The terms of one run; `of` computes one of them."""

    losses: Mapping[str, ForgetLoss | PairLoss]  # by forgotten set
    forget: ForgetSettings
    reference: Reference | None
    normalization: str = "sequence"
    kl_direction: str = "forward"
    chunk_tokens: int = 512
    penalised_set: str | None = None  # the set whose pass pays the routers' penalties
    routers: RouterPull | None = None
    routed_tokens: Tensor | None = None  # of the penalised set in the optimizer batch; None: those of the batch

    def of(self, name: str, model: nn.Module, batch: Batch, total: Tensor | int | None = None) -> Term:
        """The term of the set `name` on a batch of it; total: units of its optimizer batch, None: of this batch."""
        compute = self._forget if name in FORGET_SETS else self._anchor if name in ANCHOR_SETS else self._update
        return compute(name, model, batch, total)

    def _forget(self, name: str, model: nn.Module, batch: Batch, total: Tensor | int | None) -> Term:
        loss = self.losses[name]
        mask = counted_targets(batch)
        is_pulled = self.routers is not None and bool(self.routers.targets) and self.routers.expert_anchor > 0
        with self._listening(is_pulled) as routing:
            logp = self._logp(run_model(model, batch), model, batch)
        ref_logp = self.reference.token_logp(batch, name) if loss.needs_reference else None
        if isinstance(loss, PairLoss):
            winner = batch[WINNER]
            winner_name = f"{name}/{WINNER}"
            winner_logp = self._logp(run_model(model, winner), model, winner)
            won = ScoredText(winner_logp, counted_targets(winner), self.reference.token_logp(winner, winner_name))
            values = loss(won, ScoredText(logp, mask, ref_logp), self.forget)
        else:
            values = loss(logp, mask, self.forget, ref_logp)
        value = reduce_sequences(values, mask, self.normalization, total)
        measures = {f"{name}/loss": value.detach(), **self._cross_entropy(name, logp, mask, total)}
        if not is_pulled:
            return Term(value, None, measures)
        distance = expert_anchor(routing.logits, self.routers.targets, *self._routed_tokens(mask, total))
        return Term(value, self.routers.expert_anchor * distance, measures | {f"{name}/experts": distance.detach()})

    def _update(self, name: str, model: nn.Module, batch: Batch, total: Tensor | int | None) -> Term:
        mask = counted_targets(batch)
        passed = run_model(model, batch, with_router_penalty=name == self.penalised_set)
        logp = self._logp(passed, model, batch)
        value = reduce_tokens(-logp, mask, self.normalization, total)
        return Term(value, self._share_of_penalty(passed, batch), self._cross_entropy(name, logp, mask, total))

    def _anchor(self, name: str, model: nn.Module, batch: Batch, total: Tensor | int | None) -> Term:
        mask = counted_targets(batch)
        is_held = self.routers is not None and self.routers.anchor > 0
        with self._listening(is_held) as routing:
            passed = run_model(model, batch, with_router_penalty=name == self.penalised_set)
        value, _ = next_token_kl(
            (passed.hidden, head_of(model)),
            (self.reference.hidden(batch, name), self.reference.head),
            mask,
            normalisation=self.normalization,
            total=total,
            direction=self.kl_direction,
            chunk_tokens=self.chunk_tokens,
        )
        measures, penalty = {f"{name}/kl": value.detach()}, self._share_of_penalty(passed, batch)
        if not is_held:
            return Term(value, penalty, measures)
        before = self.reference.router_probs(batch, name)
        drift = router_kl(routing.logits, before, *self._routed_tokens(mask, total))
        extra = self.routers.anchor * drift + (0.0 if penalty is None else penalty)
        return Term(value, extra, measures | {f"{name}/router_kl": drift.detach()})

    def _share_of_penalty(self, passed: ModelPass, batch: Batch) -> Tensor | None:
        """A penalty is a mean over routed tokens: weighted by them, micro-batches and ranks add up to one mean."""
        if passed.router_penalty is None or self.routed_tokens is None:
            return passed.router_penalty
        return passed.router_penalty * (num_routed(batch) / self.routed_tokens)

    def _listening(self, wanted: bool) -> AbstractContextManager[Routing | None]:
        return self.routers.tap.record() if wanted else nullcontext()

    def _routed_tokens(self, mask: Tensor, total: Tensor | int | None) -> tuple[Tensor, Tensor]:
        """Mask and shares (B, S) of the tokens whose next one counts: the same as those of the loss."""
        weights = token_weights(mask, self.normalization, total)
        return functional.pad(mask, (0, 1)), functional.pad(weights, (0, 1))

    def _logp(self, passed: ModelPass, model: nn.Module, batch: Batch) -> Tensor:
        return token_logp(passed.hidden, head_of(model), batch["input_ids"], self.chunk_tokens)

    def _cross_entropy(self, name: str, logp: Tensor, mask: Tensor, total: Tensor | int | None) -> dict[str, Tensor]:
        return {f"{name}/ce": reduce_tokens(-logp.detach(), mask, self.normalization, total)}


def units_of_step(
    samples: Sequence[Mapping[str, Batch]], names: Sequence[str], normalization: str, device: torch.device
) -> dict[str, Tensor]:
    """Units of each set in all micro-batches of all ranks, 0-d int64; a collective when a process group exists.

    `<set>/routed` besides: the tokens of a set that routers see.
    """
    counts = {}
    for name in names:
        masks = [counted_targets(sample[name]).to(device) for sample in samples]
        counts[name] = torch.stack([num_units(mask, normalization) for mask in masks]).sum()
        counts[f"{name}/routed"] = torch.stack([num_routed(sample[name]).to(device) for sample in samples]).sum()
    totals = torch.stack(list(counts.values()))
    if has_process_group():
        dist.all_reduce(totals)
    return dict(zip(counts, totals.unbind(), strict=True))


def num_routed(batch: Batch) -> Tensor:
    """How many tokens of a batch are no padding, 0-d."""
    return batch["attention_mask"].sum()


def counted_targets(batch: Batch) -> Tensor:
    """Mask (B, S - 1) over the targets of a batch: tokens 1 to S - 1 that count."""
    return batch["completion_mask"][:, 1:]
