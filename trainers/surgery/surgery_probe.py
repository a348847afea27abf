"""What a surgery has done so far: losses and divergences on the same rows of each set every time it is asked.

    gap = sum over forgotten sets |CE - target|  +  max(0, CE(update) - update_target)  +  KL(retain) + KL(neighbour)

in nats per token, over the sets in force, with an update_target of 0 if there is none and without the first part if
forgetting has no target. It is 0 for a model that forgot exactly as far as text it never read, learnt the new texts by
heart and changed nowhere else, and infinite beyond max_retain_kl: the criterion of the best model. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from hf_moe_cpt.trainers.instruments.ranks import has_process_group
from hf_moe_cpt.trainers.surgery.counted_tokens import num_units, reduce_tokens
from hf_moe_cpt.trainers.surgery.model_pass import head_of, next_token_kl, run_model, token_logp
from hf_moe_cpt.trainers.surgery.settings_checks import ANCHOR_SETS, FORGET_SETS, UNSEEN
from hf_moe_cpt.trainers.surgery.surgery_terms import Batch, SurgeryTerms, counted_targets


UNSEEN_LOSS = f"eval_{UNSEEN}_ce"
GAP_FORMULA = (
    "surgery_gap = |CE(forgotten) - forget_target| + max(0, CE(update) - update_target) + KL(retain) + KL(neighbour)"
)
Batches = Callable[[str], Iterator[Batch]]  # batches of a set, on the device


@torch.no_grad()
def measure(model: nn.Module, batches: Batches, sets: list[str], terms: SurgeryTerms) -> dict[str, float]:
    """`<set>_ce` of every set and `<set>_kl` of anchors whose reference is at hand, in nats per token, over all ranks.

    Ranks may hold different numbers of batches. The model is put into evaluation mode and back.
    """
    was_training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    try:
        for name in sets:
            for batch in batches(name):
                for key, value in _sums_of(name, model, batch, terms).items():
                    sums[key] = sums[key] + value if key in sums else value
    finally:
        model.train(was_training)
    return _means(sums, sets)


def _sums_of(name: str, model: nn.Module, batch: Batch, terms: SurgeryTerms) -> dict[str, Tensor]:
    """Each measure's sum over the units of the batch and their number, as a pair (2,)."""
    mask = counted_targets(batch)
    units = num_units(mask, terms.normalization)
    hidden, head = run_model(model, batch).hidden, head_of(model)
    logp = token_logp(hidden, head, batch["input_ids"], terms.chunk_tokens)
    found = {f"{name}_ce": reduce_tokens(-logp, mask, terms.normalization, total=1)}
    if name in ANCHOR_SETS and terms.reference is not None:
        reference = terms.reference.hidden(batch, name), terms.reference.head
        found[f"{name}_kl"], _ = next_token_kl(
            (hidden, head),
            reference,
            mask,
            normalisation=terms.normalization,
            total=1,
            direction=terms.kl_direction,
            chunk_tokens=terms.chunk_tokens,
        )
    return {key: torch.stack([value.double(), units.double()]) for key, value in found.items()}


def _means(sums: dict[str, Tensor], sets: list[str]) -> dict[str, float]:
    if has_process_group():
        gathered: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
        dist.all_gather_object(gathered, {key: value.cpu() for key, value in sums.items()})
        keys = [key for key in {key: None for part in gathered for key in part}]
        sums = {key: sum(part[key] for part in gathered if key in part) for key in keys}
    order = {name: place for place, name in enumerate(sets)}
    keys = sorted(sums, key=lambda key: (order[key.rpartition("_")[0]], key))
    return {key: float(sums[key][0] / sums[key][1]) for key in keys}


def surgery_gap(
    measured: Mapping[str, float],
    forget_target: float | None,
    update_target: float | None = None,
    max_retain_kl: float | None = None,
) -> float:
    """The criterion of the best model in nats per token, at least 0; lower is better. See the head of this file."""
    if max_retain_kl is not None and measured.get("retain_kl", 0.0) > max_retain_kl:
        return math.inf
    forgotten = [measured[f"{name}_ce"] for name in FORGET_SETS if f"{name}_ce" in measured]
    gap = 0.0 if forget_target is None else sum(abs(loss - forget_target) for loss in forgotten)
    if "update_ce" in measured:
        gap += max(0.0, measured["update_ce"] - (update_target or 0.0))
    return gap + sum(max(0.0, measured.get(f"{name}_kl", 0.0)) for name in ANCHOR_SETS)


def stop_reason(
    measured: Mapping[str, float],
    forget_target: float | None,
    update_target: float | None = None,
    max_retain_kl: float | None = None,
) -> str | None:
    """Why to stop at what was measured, or None: the anchor has slipped, or every set has reached its target."""
    if max_retain_kl is not None and measured.get("retain_kl", 0.0) > max_retain_kl:
        return f"the KL on retained text is {measured['retain_kl']:.4g}, above max_retain_kl={max_retain_kl:.4g}"
    forgotten = {name: measured[f"{name}_ce"] for name in FORGET_SETS if f"{name}_ce" in measured}
    if forgotten and (forget_target is None or min(forgotten.values()) < forget_target):
        return None
    if "update_ce" in measured and (update_target is None or measured["update_ce"] > update_target):
        return None
    reached = [f"{name} {loss:.4g} nats (target {forget_target:.4g})" for name, loss in forgotten.items()]
    if "update_ce" in measured:
        reached.append(f"update {measured['update_ce']:.4g} nats (target {update_target:.4g})")
    return f"every set has reached its target: {', '.join(reached)}" if reached else None


def last_unseen_loss(checkpoint: str | Path, default: float | None) -> float | None:
    """The loss of unseen text that a checkpoint's log ends with, in nats per token; default if it was not measured."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    return next((entry[UNSEEN_LOSS] for entry in reversed(state.log_history) if UNSEEN_LOSS in entry), default)
