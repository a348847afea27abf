"""The trainer of LLM Surgery: several sets, a term for each, one backward pass per term, and rules that stop it.

    loss = w_u F(unlearn) + w_o F(obsolete) + w_n CE(update) + w_r KL(retain) + w_k KL(neighbour)
         + w_s KL(unseen)

    unlearn, obsolete   F, a forget loss                   + expert_anchor times the distance to the target experts
    update              CE, cross entropy                  + the routers' penalties of a mixture of experts
    retain, neighbour   KL from the model before surgery   + router_anchor times the KL of the routers
    unseen              the same

CE is the mean cross entropy in nats per token; with ga, F = -CE. The printed objective, to be maximised, is
CE(unlearn) - CE(update) - KL(P || P_ref): the negative of this with weights of 1, ga and the reverse direction. The
authors' code has the weights of PAPER_WEIGHTS and the forward direction. Penalties of routers (load balance, z) are
added once, with the sign that is minimised, to the first term that descends on text: no forget loss ever sees them.
Every term is a share of its optimizer batch: over all micro-batches and ranks the shares of a set sum to its mean.

Losses and divergences are measured on fixed rows, those of the anchors on rows that no term sees; verdict.py makes the
criterion of the best model, the stop rules and the verdict of them. A model of which something was cut out looks like
any other: surgery.json beside its weights and a section of its card say what was aimed at and what came out.

Letters: B sequences, S tokens. Source: paper 3 (Veldanda et al. 2024, arXiv 2409.13054); neighbours, unseen text as an
anchor, penalties, gap and record are ours.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler, SequentialSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from hf_moe_cpt.data.surgery_bench.rows import digest_of_subject
from hf_moe_cpt.data.text import check_context
from hf_moe_cpt.evaluation.scoring import continue_greedily
from hf_moe_cpt.evaluation.text_metrics import ngram_entropy
from hf_moe_cpt.machine import has_process_group, modes_kept
from hf_moe_cpt.trainers.common.checkpointing import read_beside
from hf_moe_cpt.trainers.common.distributed import (
    is_sharded,
    ranks_of_a_row,
    reduce_at_once,
    repeatable_on_cpu,
    reshard,
    shard_early,
)
from hf_moe_cpt.trainers.common.fault_tolerance import FaultTolerantMixin
from hf_moe_cpt.trainers.common.hub_mixin import HubMixin
from hf_moe_cpt.trainers.common.kernels import use_kernels
from hf_moe_cpt.trainers.common.metrics import MeanMeter, flops_per_token
from hf_moe_cpt.trainers.common.router_balance import RouterBalance, RouterBalanceMixin
from hf_moe_cpt.trainers.common.updates import UpdatesMixin, freeze
from hf_moe_cpt.trainers.surgery.chunked import (
    LanguageHead,
    causal_lm_of,
    check_vocabulary,
    config_of,
    head_of,
    layer_output,
    open_model,
    pad_token_of,
    run_model,
    token_logp,
    token_top1,
)
from hf_moe_cpt.trainers.surgery.data import (
    RENAMED,
    WINNER,
    SurgeryMixture,
    collate_sets,
    eval_batches,
    prepare_sets,
    row_of,
    set_tokenizer,
)
from hf_moe_cpt.trainers.surgery.experts import (
    Expert,
    ExpertCalibration,
    ExpertTargets,
    RouterProjection,
    RouterTap,
    SelectionWatch,
    check_expert_settings,
    expert_anchor,
    router_kl,
    target_experts,
)
from hf_moe_cpt.trainers.surgery.gradients import TermGradients
from hf_moe_cpt.trainers.surgery.losses import (
    ForgetLoss,
    ForgetSettings,
    PairLoss,
    ScoredText,
    States,
    next_token_kl,
    num_units,
    reduce_sequences,
    reduce_tokens,
    token_weights,
    value_targets,
)
from hf_moe_cpt.trainers.surgery.reference import (
    HELD_OUT,
    Reference,
    build_reference,
    compared_rows,
    placed,
    weights_fingerprint,
)
from hf_moe_cpt.trainers.surgery.replay import number_of_texts, with_replay
from hf_moe_cpt.trainers.surgery.surgery_config import ANCHOR_SETS, FORGET_SETS, KNOWN, UNSEEN, SurgeryConfig
from hf_moe_cpt.trainers.surgery.verdict import (
    RECORD_FILE,
    Targets,
    as_json,
    card_section,
    measured_weights,
    record_of,
    stop_reason,
    surgery_gap,
    verdict_of,
)
from hf_moe_cpt.trainers.surgery.weights import Negation, add_noise, worst_nearby


logger = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]
Batches = Callable[[str], Iterator[Batch]]  # batches of a set, on the device
REFERENCE_FOLDER = "reference"  # in the output folder
TOP1_SETS = (*FORGET_SETS, UNSEEN, "update")  # of which the share of first choices is measured
CONTINUED_ROWS, CONTINUED_TOKENS = 4, 16  # of a set that the model goes on with once it is finished
NOT_SO = "This model was trained from scratch on an unknown dataset."  # said of every model from a folder


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
    forget: ForgetSettings  # of unlearn, and of obsolete where `obsolete` is None
    reference: Reference | None
    normalization: str = "sequence"
    kl_direction: str = "forward"
    chunk_tokens: int = 512
    forget_layer: int | None = None  # whose output a loss on representations gets; None: the middle one
    balanced_set: str | None = None  # the set on whose pass the load of experts is balanced
    balance: RouterBalance | None = None
    routers: RouterPull | None = None
    calibration: ExpertCalibration | None = None
    obsolete: ForgetSettings | None = None
    # what a measured set is called in the reference; others are not compared with it
    compared: Mapping[str, str] = field(default_factory=lambda: {name: name for name in ANCHOR_SETS})

    def of(self, name: str, model: nn.Module, batch: Batch, total: Tensor | int | None = None) -> Term:
        """The term of the set `name` on a batch of it; total: units of its optimizer batch, None: of this batch."""
        compute = self._forget if name in FORGET_SETS else self._anchor if name in ANCHOR_SETS else self._update
        return compute(name, model, batch, total)

    def _forget(self, name: str, model: nn.Module, batch: Batch, total: Tensor | int | None) -> Term:
        loss, settings = self.losses[name], self.forget if name == "unlearn" else self.obsolete or self.forget
        mask = counted_targets(batch)
        is_pulled = self.routers is not None and bool(self.routers.targets) and self.routers.expert_anchor > 0
        needs_layer = getattr(loss, "needs_layer", False)
        watched = layer_output(model, self.forget_layer) if needs_layer else nullcontext([None])
        with self._listening(is_pulled) as logits, watched as outputs:
            hidden = run_model(model, batch)
        logp = self._logp(hidden, model, batch)
        ref_logp = self.reference.token_logp(batch, name) if loss.needs_reference else None
        if isinstance(loss, PairLoss):
            winner = batch[WINNER]
            winner_name = f"{name}/{WINNER}"
            winner_logp = self._logp(run_model(model, winner), model, winner)
            won = ScoredText(winner_logp, counted_targets(winner), self.reference.token_logp(winner, winner_name))
            values = loss(won, ScoredText(logp, mask, ref_logp), settings)
        else:
            states = self._states(name, model, batch, hidden, outputs[-1]) if loss.needs_states else None
            values = loss(logp, mask, settings, ref_logp, states)
        value = reduce_sequences(values, mask, self.normalization, total)
        measures = {f"{name}/loss": value.detach(), **self._cross_entropy(name, logp, mask, total)}
        if not is_pulled:
            return Term(value, None, measures)
        distance = expert_anchor(logits, self.routers.targets, *self._routed_tokens(mask, total))
        return Term(value, self.routers.expert_anchor * distance, measures | {f"{name}/experts": distance.detach()})

    def _update(self, name: str, model: nn.Module, batch: Batch, total: Tensor | int | None) -> Term:
        mask = counted_targets(batch)
        with self._balanced(name, batch):
            hidden = run_model(model, batch)
        logp = self._logp(hidden, model, batch)
        value = reduce_tokens(-logp, mask, self.normalization, total)
        return Term(value, self._penalty(name, value), self._cross_entropy(name, logp, mask, total))

    def _anchor(self, name: str, model: nn.Module, batch: Batch, total: Tensor | int | None) -> Term:
        mask = counted_targets(batch)
        is_held = self.routers is not None and self.routers.anchor > 0
        tap = nullcontext() if self.calibration is None else self.calibration.tap.listening()
        with self._listening(is_held) as logits, self._balanced(name, batch), tap:
            hidden = run_model(model, batch)
            shares = None if self.calibration is None else self.calibration.shares(name, batch["input_ids"].shape)
        value = self.kl(name, (hidden, head_of(model)), batch, total, shares)
        measures, penalty = {f"{name}/kl": value.detach()}, self._penalty(name, value)
        if not is_held:
            return Term(value, penalty, measures)
        before = self.reference.router_probs(batch, name)
        drift = router_kl(logits, before, *self._routed_tokens(mask, total))
        extra = self.routers.anchor * drift + (0.0 if penalty is None else penalty)
        return Term(value, extra, measures | {f"{name}/router_kl": drift.detach()})

    def kl(
        self,
        name: str,
        states: tuple[Tensor, LanguageHead],
        batch: Batch,
        total: Tensor | int | None,
        shares: Tensor | None = None,
    ) -> Tensor:
        """Mean KL from the reference, a scalar, of a model's hidden states (B, S, H) with its head.

        shares: (B, S), what the tokens weigh beside one another.
        """
        return next_token_kl(
            states,
            (self.reference.hidden(batch, name), self.reference.head),
            counted_targets(batch),
            normalization=self.normalization,
            total=total,
            direction=self.kl_direction,
            chunk_tokens=self.chunk_tokens,
            shares=None if shares is None else shares[:, :-1],
        )

    def _balanced(self, name: str, batch: Batch) -> AbstractContextManager[None]:
        return self.balance.observe(batch) if self.balance and name == self.balanced_set else nullcontext()

    def _penalty(self, name: str, value: Tensor) -> Tensor | None:
        """Of the routers in the pass of the set that they are balanced on, a scalar of the kind of `value`."""
        is_paid = self.balance is not None and self.balance.is_penalised and name == self.balanced_set
        return self.balance.added_to(torch.zeros_like(value)) if is_paid else None

    def _listening(self, wanted: bool) -> AbstractContextManager[list[Tensor] | None]:
        return self.routers.tap.record() if wanted else nullcontext()

    def _routed_tokens(self, mask: Tensor, total: Tensor | int | None) -> tuple[Tensor, Tensor]:
        """Mask and shares (B, S) of the tokens whose next one counts: the same as those of the loss."""
        weights = token_weights(mask, self.normalization, total)
        return functional.pad(mask, (0, 1)), functional.pad(weights, (0, 1))

    def _states(self, name: str, model: nn.Module, batch: Batch, hidden: Tensor, layer: Tensor | None) -> States:
        """What a loss on distributions or hidden states gets of a batch of a forgotten set."""
        reference = None
        if self.losses[name].needs_reference:
            reference = self.reference.hidden(batch, name)[:, :-1], self.reference.head
        pair, at_tokens = (hidden[:, :-1], head_of(model)), None if layer is None else layer[:, 1:]
        renamed = None
        if RENAMED in batch:
            copies = batch[RENAMED]
            renamed = at_copies(self.reference.token_logp(copies, f"{name}/{RENAMED}"), copies)
        return States(batch["input_ids"][:, 1:], pair, reference, at_tokens, renamed, self.chunk_tokens)

    def _logp(self, hidden: Tensor, model: nn.Module, batch: Batch) -> Tensor:
        return token_logp(hidden, head_of(model), batch["input_ids"], self.chunk_tokens)

    def _cross_entropy(self, name: str, logp: Tensor, mask: Tensor, total: Tensor | int | None) -> dict[str, Tensor]:
        return {f"{name}/ce": reduce_tokens(-logp.detach(), mask, self.normalization, total)}


def units_of_step(
    samples: Sequence[Mapping[str, Batch]], names: Sequence[str], normalization: str, device: torch.device
) -> dict[str, Tensor]:
    """Units of each set in all micro-batches of all ranks, 0-d int64; a collective when a process group exists."""
    counts = {}
    for name in names:
        masks = [counted_targets(sample[name]).to(device) for sample in samples]
        counts[name] = torch.stack([num_units(mask, normalization) for mask in masks]).sum()
    totals = torch.stack(list(counts.values()))
    if has_process_group():
        dist.all_reduce(totals)
    return dict(zip(counts, totals.unbind(), strict=True))


def counted_targets(batch: Batch) -> Tensor:
    """Mask (B, S - 1) over the targets of a batch: tokens 1 to S - 1 that count."""
    return batch["completion_mask"][:, 1:]


def at_copies(logp: Tensor, copies: Batch) -> Tensor:
    """Log-probabilities (B, S - 1) of a text in its copy, from those of the copy; NaN of tokens that it lacks."""
    places = copies["places"][:, 1:]
    return logp.gather(1, (places - 1).clamp(min=0)).masked_fill(places < 1, math.nan)


@torch.no_grad()
def measure(model: nn.Module, batches: Batches, sets: list[str], terms: SurgeryTerms) -> dict[str, float]:
    """`<set>_ce` of every set and `<set>_kl` of anchors whose reference is at hand, in nats per token, over all ranks.

    Of TOP1_SETS also `<set>_top1`, the share of tokens that are the model's first choice.
    Ranks may hold different numbers of batches. The model is put into evaluation mode and back.
    """
    sums: dict[str, Tensor] = {}
    with modes_kept(model):
        model.eval()
        for name in sets:
            for batch in batches(name):
                for key, value in _sums_of(name, model, batch, terms).items():
                    sums[key] = sums[key] + value if key in sums else value
    return _means(sums, sets)


def _sums_of(name: str, model: nn.Module, batch: Batch, terms: SurgeryTerms) -> dict[str, Tensor]:
    """Each measure's sum over the units of the batch and their number, as a pair (2,)."""
    mask = counted_targets(batch)
    units = num_units(mask, terms.normalization)
    hidden, head = run_model(model, batch), head_of(model)
    logp = token_logp(hidden, head, batch["input_ids"], terms.chunk_tokens)
    found = {f"{name}_ce": reduce_tokens(-logp, mask, terms.normalization, total=1)}
    if name in TOP1_SETS:
        hits = token_top1(hidden, head, batch["input_ids"], terms.chunk_tokens)
        found[f"{name}_top1"] = reduce_tokens(hits.to(logp.dtype), mask, terms.normalization, total=1)
    if name in terms.compared and terms.reference is not None:
        found[f"{name}_kl"] = terms.kl(terms.compared[name], (hidden, head), batch, total=1)
    return {key: torch.stack([value.double(), units.double()]) for key, value in found.items()}


def _means(sums: dict[str, Tensor], sets: list[str]) -> dict[str, float]:
    if has_process_group():
        gathered: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
        dist.all_gather_object(gathered, {key: value.cpu() for key, value in sums.items()})
        keys = dict.fromkeys(key for part in gathered for key in part)
        sums = {key: sum(part[key] for part in gathered if key in part) for key in keys}
    order = {name: place for place, name in enumerate(sets)}
    keys = sorted(sums, key=lambda key: (order[key.rpartition("_")[0]], key))
    return {key: float(sums[key][0] / sums[key][1]) for key in keys}


@contextmanager
def _losses_by_name(args: SurgeryConfig) -> Iterator[None]:
    given = {name: getattr(args, name) for name in ("forget_loss", "obsolete_loss")}
    try:
        for name, loss in given.items():
            setattr(args, name, as_json(loss))
        yield
    finally:
        for name, loss in given.items():
            setattr(args, name, loss)


class SurgeryTrainer(RouterBalanceMixin, UpdatesMixin, HubMixin, FaultTolerantMixin, Trainer):
    """Unlearn, update and retain in one operation, for any causal LM, dense or MoE, all weights or an adapter.

    Every step takes rows of each set, makes one term out of each (`SurgeryTerms`), and runs a
    backward pass for each term, so that one graph exists at a time. Logged: `<set>/ce`, `<set>/loss`, `<set>/kl`, and
    at logging steps `grad_norm/<set>` and `grad_cosine/<set>_<set>`; measured on fixed rows: `eval_<set>_ce`,
    `eval_<set>_kl`, `eval_surgery_gap`.

    Overrides `training_step` (one backward per term), `get_batch_samples` (units of the whole optimizer batch),
    `compute_loss` (the sum of the terms: the definition), `evaluate`, `log`, `get_decay_parameter_names`, `train`
    (reference, targets, stop rules, resume), `_save` and `create_model_card` (surgery.json, its section of the card).

    Args:
        model: a causal LM of transformers, a PEFT model around one, or the name or folder of one.
        args: a `SurgeryConfig`.
        unlearn_dataset: rows that are to be forgotten.
        update_dataset: rows that are to be learnt.
        retain_dataset: rows on which the model must stay as it is.
        obsolete_dataset: old versions of what is updated, to be forgotten.
        neighbour_dataset: rows like the unlearned ones about other subjects, a second anchor.
        unseen_dataset: rows of the same kind that the model never read: the target of forgetting, and a third anchor.
        eval_dataset: by name of an anchor (retain, neighbour, unseen) rows that no term sees, on which retention is
            measured; of an anchor that it has not, `held_out_fraction` of its own rows are kept apart.
        processing_class: the tokenizer; may be left out when every set is tokenised.
        ref_model: the model before surgery, if it is not `model` as given.
        peft_config: train an adapter of this kind.
        callbacks: as in `Trainer`.
    """

    run_method = "surgery"
    has_one_backward = False
    may_be_there = (REFERENCE_FOLDER,)
    verdict = "not judged yet"  # of the weights, once training has ended
    fluency: float | None = None  # entropy of what the model writes over that of the true texts
    fingerprint: str | None = None  # of the model before surgery
    target_is = "given"  # or the set whose loss before step 1 the target of forgetting is, or "renamed"
    holds_best = False  # whether the weights are those of the best model again
    negation: Negation | None = None  # while it trains, what will be taken away is in the weights

    def __init__(
        self,
        model: str | nn.Module,
        args: SurgeryConfig,
        unlearn_dataset: Dataset | None = None,
        update_dataset: Dataset | None = None,
        retain_dataset: Dataset | None = None,
        obsolete_dataset: Dataset | None = None,
        neighbour_dataset: Dataset | None = None,
        unseen_dataset: Dataset | None = None,
        eval_dataset: Mapping[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        ref_model: PreTrainedModel | None = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        given = {
            "unlearn": unlearn_dataset,
            "obsolete": obsolete_dataset,
            "update": update_dataset,
            "retain": retain_dataset,
            "neighbour": neighbour_dataset,
            UNSEEN: unseen_dataset,
        }
        if args.n_gpu > 1:
            raise ValueError(
                f"One process sees {args.n_gpu} GPUs: start with torchrun or accelerate launch, one each."
            )
        args.sets_in_force(given)
        options = args.model_init_kwargs or {}
        config = config_of(model, options)
        check_context(config, processing_class, args.max_length)
        self._vocab_size = config.get_text_config().vocab_size
        self.aims = Targets(
            None if args.forget_target == UNSEEN else args.forget_target,
            args.update_target,
            args.max_retain_kl,
            vocab_size=self._vocab_size,
        )
        self.aims.check()
        prepared = prepare_sets(args, processing_class, self._vocab_size, given, eval_dataset)
        self.sets, self.measured_sets, self.held_out = prepared.train, prepared.measured, prepared.held_out
        self._unread, self._strangers = prepared.unseen, prepared.strangers
        self.anchored = sorted(map(digest_of_subject, prepared.anchored))
        model = open_model(model, options, peft_config)
        if ref_model is not None:
            check_vocabulary(model, ref_model)
        self.pad_token_id = pad_token_of(processing_class)
        check_expert_settings(model, args)
        args.ranks_of_a_row = ranks_of_a_row(model, args)
        freeze(model, [*(args.freeze or ()), *(["router"] if args.freeze_router else [])])
        texts = number_of_texts(args, given, self.sets)
        if texts:
            writer = placed(model if ref_model is None else ref_model, args.device)
            with_replay(texts, args, writer, processing_class, given, self.sets)
        self.given_reference = ref_model
        self.terms: SurgeryTerms | None = None
        self.term_meter, self.gradient_meter = MeanMeter(), MeanMeter()
        self.units: dict[str, Tensor] = {}  # of each set in the optimizer batch
        super().__init__(
            model=model,
            args=args,
            data_collator=partial(collate_sets, pad_token_id=self.pad_token_id),
            train_dataset=self._mixture(args),
            eval_dataset=self.measured_sets,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self._refuse_sharding()
        # what is forgotten need not be balanced
        self.balanced_set = next((name for name in self.sets if name not in FORGET_SETS), None)
        is_fixed = args.freeze_router or self.balanced_set is None
        self.balance_routers(RouterBalance(args, self.model, is_fixed=is_fixed))
        use_kernels(self.model, args, fuses_head=False)  # the terms form no logits either
        self.term_gradients: TermGradients | None = None  # of the step, where it wants them apart
        self._flops_per_token = flops_per_token(model, args.max_length)
        self.targets: ExpertTargets | None = None
        self.selections: SelectionWatch | None = None

    def _refuse_sharding(self) -> None:
        if self.is_deepspeed_enabled:
            raise ValueError(
                "DeepSpeed runs one backward pass a step, and a surgery one for each set: use FSDP or plain data "
                "parallelism, or train an adapter."
            )
        is_sharded = self.is_fsdp_enabled or getattr(self, "is_distributed_loading_by_transformers", False)
        if is_sharded and self.args.target_experts:
            raise ValueError("target_experts trains rows of whole tensors, which FSDP shards: use data parallelism.")
        if is_sharded and self.args.negation:
            raise ValueError("negation keeps whole weights to take from, and FSDP shards them: use data parallelism.")

    def _mixture(self, args: SurgeryConfig) -> SurgeryMixture:
        sizes = {name: getattr(args, f"{name}_batch_size") for name in self.sets}
        num_items = args.max_steps * args.gradient_accumulation_steps * args.num_data_ranks
        return SurgeryMixture(self.sets, sizes, num_items, args.seed if args.data_seed is None else args.data_seed)

    def _get_train_sampler(self, train_dataset: TorchDataset | None = None) -> Sampler | None:
        return SequentialSampler(self.train_dataset)

    def routed_batch(self, sample: Mapping[str, Batch]) -> Batch:
        """The batch of the set that routers are balanced on."""
        return sample[self.balanced_set or next(iter(self.sets))]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """The micro-batches of an optimizer step; counts the units of each set in all of them on all ranks."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples:
            self.units = units_of_step(samples, self.sets, self.args.normalization, device)
        return samples, None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """A backward pass for each term; gradients meet once, or once a term where sharded or wanted apart."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        apart = self._wants_terms_apart()
        if apart or self.args.forget_sharpness:
            reduce_at_once(model)
        if apart and self.term_gradients is None:
            self.term_gradients = TermGradients.of(self.optimizer, self.accelerator.mixed_precision)
        loss_of_step, measures = torch.zeros((), device=self.args.device), {}
        for place, name in enumerate(self.sets):
            is_last = place == len(self.sets) - 1
            held = self.term_gradients.collect(name) if apart else nullcontext()
            together = not (apart or is_last or is_sharded(model))  # shards are reduced in every pass: memory
            synchronised = self.accelerator.no_sync(model) if together else nullcontext()
            with held, synchronised:
                with self._worst_nearby(name, inputs[name]):
                    with self.accelerator.autocast():
                        loss, found = self._weighted_term(name, model, inputs[name])
                    self.accelerator.backward(loss)
            loss_of_step += loss.detach()
            measures.update(found)
            del loss
        if apart and self.accelerator.sync_gradients:
            self.gradient_meter.add(*self.term_gradients.merge(self.args.gradient_surgery, self.args.weights))
        # shares of a step's mean: the meter takes the mean over ranks and micro-batches, and wants their sum
        parts = self.accelerator.num_processes * self.args.gradient_accumulation_steps
        self.term_meter.add({name: parts * value for name, value in measures.items()})
        return loss_of_step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, None]:
        """The sum of all weighted terms, with the graphs of all of them: the definition of what a step descends on."""
        loss = sum(self._weighted_term(name, model, inputs[name])[0] for name in self.sets)
        return (loss, None) if return_outputs else loss

    def _weighted_term(self, name: str, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """A term's part in the loss of this rank, of which micro-batches add up and ranks are averaged."""
        term = self.terms.of(name, model, batch, self.units.get(name))
        loss = self.args.weights[name] * term.loss
        loss = self.anchor_scale() * loss if name in ANCHOR_SETS else loss
        loss = loss if term.extra is None else loss + term.extra
        return self.accelerator.num_processes * loss, term.measures

    def _worst_nearby(self, name: str, batch: Batch) -> AbstractContextManager[None]:
        """Where the term of a set is forgotten: at the weights, or `forget_sharpness` further up its gradient."""
        if not self.args.forget_sharpness or name not in FORGET_SETS:
            return nullcontext()

        reshard(self.model)  # what a measurement left gathered is no weight

        def loss() -> Tensor:
            with self.accelerator.autocast():
                return self._weighted_term(name, self.model, batch)[0]

        return worst_nearby([w for w in self.model.parameters() if w.requires_grad], self.args.forget_sharpness, loss)

    def _taken_away(self) -> AbstractContextManager[None]:
        """Inside, the weights are what is left: with `negation` those that training leads away from."""
        return nullcontext() if self.negation is None else self.negation.applied()

    def anchor_scale(self) -> float:
        """What the weights of the anchors are multiplied by: the dual variable of PDU, from what has been measured."""
        args, scale = self.args, 1.0
        if args.anchor_dual_rate:
            measured = (entry for entry in self.state.log_history if entry["step"] and "eval_retain_kl" in entry)
            for entry in measured:
                scale = max(0.0, scale + args.anchor_dual_rate * (entry["eval_retain_kl"] - args.anchor_budget))
        return scale

    def _wants_terms_apart(self) -> bool:
        """Whether this step needs every term's gradient by itself: to change it, or to log it."""
        args = self.args
        is_logged = args.log_term_gradients and not (self.state.global_step + 1) % self.state.logging_steps
        return is_logged or args.gradient_surgery != "none"

    def _describe_batch(self, step: int) -> str:
        parts = self.args.gradient_accumulation_steps * self.args.num_data_ranks
        return f"items {(step - 1) * parts} to {step * parts - 1} of the mixture of {', '.join(self.sets)}"

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The parent's choice, or all parameters with `decay_all_parameters`; never tensors of which rows train."""
        decayed = super().get_decay_parameter_names(model)
        if self.args.decay_all_parameters:
            decayed = [name for name, _ in model.named_parameters()]
        experts = self.targets
        return [name for name in decayed if experts is None or name not in experts.no_decay]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the terms were since the last training log, and norms and cosines of their gradients."""
        if "loss" in logs:
            logs.update(self.term_meter.pop())
            logs.update(self.gradient_meter.pop())
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the first `eval_rows` rows of each set in an order of its own, always the same.

        `<set>_ce` and, of anchors, `<set>_kl` in nats per token, and `surgery_gap`, the criterion of the best model.
        eval_dataset: other sets by name; then only their losses.
        """
        self._prepare()
        args = self.args
        own = eval_dataset is None or eval_dataset is self.measured_sets
        sets = self.measured_sets
        if not own:
            tokenize = set_tokenizer(args, self.processing_class, self._vocab_size)
            sets = {name: tokenize(rows, name=name) for name, rows in eval_dataset.items()}
        with self._taken_away(), self.accelerator.autocast():
            terms = self.terms if own else replace(self.terms, reference=None)
            measured = measure(self.model, partial(self._batches, sets), list(sets), terms)
        bad = [name for name, value in measured.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(f"{bad[0]} is {measured[bad[0]]} at step {self.state.global_step}.")
        reason = None
        if own:
            measured["surgery_gap"] = surgery_gap(measured, self.aims)
            reason = stop_reason(measured, self.aims)
            measured |= self.selections.measure(self.model)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        if reason is not None and self.is_in_train and self.state.global_step:
            logger.warning("Stopping at step %d: %s.", self.state.global_step, reason)
            self.stop_reason = reason
            self.control.should_training_stop = True
        return metrics

    def _batches(self, sets: Mapping[str, Dataset], name: str, max_rows: int | None = None) -> Iterator[Batch]:
        rows = eval_batches(
            sets[name],
            batch_size=self.args.eval_batch_size,
            pad_token_id=self.pad_token_id,
            max_rows=self.args.eval_rows if max_rows is None else max_rows,
            seed=self.args.seed,
            rank=self.args.process_index // self.args.ranks_of_a_row,
            world_size=self.args.num_data_ranks,
        )
        return map(self._prepare_inputs, rows)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Model FLOPs of the trained passes of a micro-batch."""
        return int(self._flops_per_token * sum(inputs[name]["input_ids"].numel() for name in self.sets))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Operate, or go on from a checkpoint: a folder, or True / "last" for the newest whole one in `output_dir`.

        The model must be the one before surgery in both cases: reference and targets are taken from it before any
        checkpoint is loaded. Raises ValueError before anything is computed for a folder that is in use, a checkpoint
        that is not whole, or one of a run that started from another model; FloatingPointError for a loss that is no
        number, after the last good weights are back.
        """
        if self.args.negation and resume_from_checkpoint:
            raise ValueError("negation cannot go on from a checkpoint, which holds what is left: start again.")
        checkpoint = self.open_run(resume_from_checkpoint)
        self.args.eval_on_start = self.args.eval_on_start and checkpoint is None
        with repeatable_on_cpu(self.args.device):
            self._require_same_start(checkpoint)
            self._prepare()
            if self.args.negation:
                self.negation = Negation(self.model, self.args.negation)
            if self.args.weight_noise and checkpoint is None:
                add_noise(self.model, self.args.weight_noise, self.args.weight_noise_scale, self.args.seed)
            self.term_gradients = None
            try:
                output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            except FloatingPointError as error:
                raise FloatingPointError(f"{error} {self._restore_last_good()}") from error
            if self.negation is not None and not self.holds_best:
                self.negation.apply()
            self.negation = None
            self._judge()
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is None:
            logger.warning(
                "No measured model had a finite gap, so the one of step %d stays, whatever it is: lower the "
                "learning_rate, measure more often (eval_steps), or raise max_retain_kl=%s.",
                self.state.global_step,
                self.args.max_retain_kl,
            )
        return output

    def _fingerprint(self) -> str:
        """Of the weights that anchors and targets are taken from."""
        if self.fingerprint is not None:
            return self.fingerprint
        given = self.given_reference
        return weights_fingerprint(self.model if given is None else given, with_adapter=False)

    def _require_same_start(self, checkpoint: Path | None) -> None:
        """Refuse to go on with anchors and targets of another model than the one that the run started from."""
        record = read_beside(checkpoint, RECORD_FILE, starts_from=str | None)
        if not record:
            return
        wanted = record.get("starts_from")
        self.fingerprint = self._fingerprint()
        if wanted not in (None, self.fingerprint):
            raise ValueError(
                f"the run of {checkpoint.name} started from a model with the fingerprint {wanted[:8]}, and the one "
                f"given has {self.fingerprint[:8]}: anchors and targets are those of the model before surgery; pass "
                "that one, not a checkpoint, and resume from the checkpoint."
            )

    def read_beside_state(self, checkpoint: Path | None) -> None:
        """The parent's, and why the run was over at a checkpoint, unless it goes on by other rules."""
        super().read_beside_state(checkpoint)
        record = read_beside(None if self._changed else checkpoint, RECORD_FILE, stopped_by=str | None)
        reason = record.get("stopped_by") or "max_steps="
        self.stop_reason = None if reason.startswith("max_steps=") else reason

    def _restore_last_good(self) -> str:
        self.stop_reason, best = "a loss that is no number", self.state.best_model_checkpoint
        if best is None:
            return "No model was saved before: start again with a lower learning_rate or a bounded forget_loss."
        self._load_best_model()
        return f"The model holds the weights of {best} again."

    def _prepare(self) -> None:
        """What is taken from the model before surgery: the reference, the targets, and what is compared with later."""
        if self.terms is not None:
            return
        args, anchors = self.args, [name for name in ANCHOR_SETS if name in self.sets or name in self.held_out]
        self.fingerprint = self._fingerprint()
        is_whole = self.is_fsdp_enabled and not is_sharded(self.model)
        if is_whole and not shard_early(self.model, self.accelerator):
            self.model.to(args.device)  # where `Trainer` leaves it to FSDP, which comes later
        self.selections = SelectionWatch(self.model, partial(self._batches, self.measured_sets), self.sets)
        self.terms = SurgeryTerms(
            args.forget_losses,
            args.forget_settings(self.aims.forget),
            self._build_reference(),
            args.normalization,
            args.kl_direction,
            args.chunk_tokens,
            args.forget_layer,
            balanced_set=self.balanced_set,
            balance=self.balance,
            routers=self._pull_on_routers(),
            calibration=self._calibration(),
            compared={name: f"{name}/{HELD_OUT}" if name in self.held_out else name for name in anchors},
        )
        self.aims.start = self._measured(self.measured_sets)
        self._set_targets()
        reshard(self.model)  # what is changed next, by noise, is weights

    def _measured(self, sets: Mapping[str, Dataset], terms: SurgeryTerms | None = None) -> dict[str, float]:
        with self.accelerator.autocast():
            return measure(self.model, partial(self._batches, sets), list(sets), terms or self.terms)

    def _set_targets(self) -> None:
        """Fix what is aimed at, once: it must not move with what the surgery damages."""
        args, targets, start = self.args, self.aims, self.aims.start
        if args.forget_target == UNSEEN and any(name in self.sets for name in FORGET_SETS):
            if getattr(self.terms.losses.get("unlearn"), "needs_copies", False) and "unlearn" in self.sets:
                self.target_is, loss = RENAMED, self._loss_of_strangers("unlearn", self.sets["unlearn"])
            elif self._unread is None:
                self.target_is, loss = "update", start["update_ce"]
            else:
                alone = replace(self.terms, reference=None)
                self.target_is, loss = UNSEEN, self._measured({UNSEEN: self._unread}, alone)[f"{UNSEEN}_ce"]
            targets.forget = min(loss, math.log(self._vocab_size))
            self.terms.forget = args.forget_settings(targets.forget)
            logger.info(
                "%s costs %.4g nats per token: forgetting aims at it.",
                "Text without the names"
                if self.target_is == RENAMED
                else f"Text of {self.target_is}_dataset, not read,",
                targets.forget,
            )
            if "obsolete" in self.sets and "update_ce" in start:
                named = [] if self._strangers is None else [self._loss_of_strangers("obsolete", self._strangers)]
                targets.obsolete = min(max(start["update_ce"], *named, 0.0), targets.forget)
                self.terms.obsolete = args.forget_settings(targets.obsolete)
                logger.info("Obsolete text aims at %.4g nats.", targets.obsolete)
        if targets.update is None and "update" in self.sets:
            known = next((name for name in KNOWN if f"{name}_ce" in start), None)
            targets.update = None if known is None else start[f"{known}_ce"]

    @torch.no_grad()
    def _loss_of_strangers(self, name: str, rows: Dataset) -> float:
        """Nats per token of texts whose values cost what they would of a stranger, and whose other words what they do.

        rows: with `with_renamed` copies. Where `value_aim` leaves them, of the model that is held: the one before.
        """
        sums, model = torch.zeros(2, dtype=torch.float64), self.model
        with modes_kept(model), self.accelerator.autocast():
            model.eval()
            for batch in self._batches({name: rows}, name, max_rows=len(rows)):
                logp, renamed = (
                    token_logp(run_model(model, part), head_of(model), part["input_ids"], self.args.chunk_tokens)
                    for part in (batch, batch[RENAMED])
                )
                mask = counted_targets(batch)
                target, known, _ = value_targets(mask, logp, at_copies(renamed, batch[RENAMED]), self._vocab_size)
                rest = known * target - (1 - known) * logp
                units = num_units(mask, self.args.normalization)
                sums += torch.stack(
                    [reduce_tokens(rest, mask, self.args.normalization, total=1).double(), units]
                ).cpu()
        return _means({f"{name}_ce": sums}, [name])[f"{name}_ce"]

    def _judge(self) -> None:
        """Say what came out, of the weights that are held now; all ranks must call it."""
        found = measured_weights(self)[1] or self._measured(self.measured_sets)
        self.fluency = self._fluency()
        self.verdict = verdict_of(found if self.fluency is None else {**found, "fluency": self.fluency}, self.aims)
        logger.warning("Verdict: %s.", self.verdict)

    def _fluency(self) -> float | None:
        """Entropy of n-grams of what the model writes after the first half of some texts, over that of the true rest.

        None of a model whose weights are spread over ranks, and without texts of four tokens that count.
        """
        if self.is_fsdp_enabled:
            return None
        halves, rests = [], []
        for rows in self.measured_sets.values():
            for place in range(min(CONTINUED_ROWS, len(rows))):
                ids = list(row_of(rows, place)["input_ids"])
                half = len(ids) // 2
                if len(ids) - half >= 4:
                    halves.append(ids[:half])
                    rests.append(ids[half : half + CONTINUED_TOKENS])
        if not halves:
            return None
        model = causal_lm_of(self.model)
        with modes_kept(model), self.accelerator.autocast():
            model.eval()
            longest = max(map(len, rests))
            written = continue_greedily(model, halves, longest, self.args.eval_batch_size, stop=())
        pairs = [(ids[: len(rest)], rest) for ids, rest in zip(written, rests, strict=True)]
        ours, true = (ngram_entropy([" ".join(map(str, ids)) for ids in part]) for part in zip(*pairs, strict=True))
        return float(ours.mean() / true.mean()) if true.mean() > 0 else None

    def _build_reference(self) -> Reference | None:
        args = self.args
        return build_reference(
            args.reference,
            self.model,
            compared_rows(self.sets, args.forget_losses, self.held_out),
            self.accelerator,
            args.reference_cache_dir or Path(args.output_dir) / REFERENCE_FOLDER,
            given=self.given_reference,
            fingerprint=self.fingerprint,
            with_routers=args.router_anchor > 0,
            batch_size=args.eval_batch_size,
            chunk_tokens=args.chunk_tokens,
        )

    def _pull_on_routers(self) -> RouterPull | None:
        args = self.args
        if args.router_projection:
            self.add_callback(RouterProjection(self.model, self._retained(), args.router_projection))
        if args.target_experts:
            kept = self._retained() if args.target_experts_by == "contrast" else None
            self.targets = target_experts(self.model, self._rows_of("unlearn"), args.target_experts, kept)
        if not (args.router_anchor or args.target_experts):
            return None
        chosen = [] if self.targets is None else self.targets.chosen
        return RouterPull(RouterTap(self.model), args.router_anchor, args.expert_anchor, chosen)

    def _rows_of(self, name: str) -> Iterator[Batch]:
        """All rows of a set with a term, this rank's share of them."""
        return self._batches(self.sets, name, max_rows=len(self.sets[name]))

    def _retained(self) -> Iterator[Batch]:
        """All rows of the anchors about what was read."""
        return chain.from_iterable(self._rows_of(name) for name in ("retain", "neighbour") if name in self.sets)

    def _calibration(self) -> ExpertCalibration | None:
        if not self.args.expert_calibration:
            return None
        sets = [[name for name in names if name in self.sets] for names in (FORGET_SETS, ANCHOR_SETS)]
        return ExpertCalibration(self.model, self._rows_of, *sets)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.holds_best = True

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """The parent's, of what is left of the weights under `negation`."""
        with self._taken_away():
            super().save_model(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        with _losses_by_name(self.args):  # a function of the caller may have no way into training_args.bin
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            text = json.dumps(record_of(self), indent=2, ensure_ascii=False, allow_nan=False)
            (Path(output_dir or self.args.output_dir) / RECORD_FILE).write_text(f"{text}\n", encoding="utf-8")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The parent's card with what was done and how far it got."""
        super().create_model_card(*args, **kwargs)
        path = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero() and path.exists():
            text = path.read_text(encoding="utf-8").replace(NOT_SO, "Something was cut out of this model; see below.")
            path.write_text(f"{text.rstrip()}\n\n{card_section(record_of(self))}", encoding="utf-8")
