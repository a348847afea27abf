"""What contradicts itself in the arguments of a surgery, said in one line before anything is loaded. Source: ours."""

from __future__ import annotations

import math
from typing import Any

from hf_moe_cpt.trainers.surgery.counted_tokens import NORMALISATIONS
from hf_moe_cpt.trainers.surgery.divergence import KL_DIRECTIONS
from hf_moe_cpt.trainers.surgery.forget_losses import ForgetLoss
from hf_moe_cpt.trainers.surgery.objective import TERMS, check_weights, forget_loss_of
from hf_moe_cpt.trainers.surgery.pair_losses import PairLoss


FORGET_SETS = ("unlearn", "obsolete")
ANCHOR_SETS = ("retain", "neighbour")
UNSEEN = "unseen"
CHOICES = {
    "normalization": NORMALISATIONS,
    "kl_direction": tuple(KL_DIRECTIONS),
    "gradient_surgery": ("none", "project", "pcgrad"),
    "reference": ("auto", "copy", "adapter", "cache"),
}
_POSITIVE = ("max_length", "chunk_tokens", "eval_rows", "eval_batch_size", *(f"{name}_batch_size" for name in TERMS))
_AT_LEAST_0 = ("router_anchor", "expert_anchor", "target_experts")
_ABOVE_0_OR_NONE = ("update_target", "max_retain_kl", "max_term_grad_norm")
_MUST_STAY = {
    "remove_unused_columns": (False, "batches are made of several sets"),
    "logging_nan_inf_filter": (False, "a loss that is no number must stop the run"),
    "per_device_train_batch_size": (1, "set <set>_batch_size, rows of each set in a micro-batch"),
}


def check_settings(config: Any) -> None:
    """Raise ValueError for the first contradiction in a `SurgeryConfig`."""
    check_weights(config.weights)
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name}={getattr(config, name)!r} is unknown: choose one of {', '.join(choices)}.")
    for name in _POSITIVE:
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1; a set is left out by a weight of 0.")
    for name in _AT_LEAST_0:
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)} must be a finite number, at least 0; 0 leaves it out.")
    for name in _ABOVE_0_OR_NONE:
        value = getattr(config, name)
        if value is not None and not value > 0.0:
            raise ValueError(f"{name}={value} must be above 0, or unset to leave the rule out.")
    for name, (value, reason) in _MUST_STAY.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name}={getattr(config, name)} must stay {value}: {reason}.")
    if config.max_steps < 1:
        raise ValueError(f"max_steps={config.max_steps} must be at least 1: the sets are endless, so steps end a run.")
    config.forget_target = _checked_target(config.forget_target)
    config.forget_settings(1.0)  # raises for wrong numbers
    _check_losses(config)
    if config.fp16 and config.max_term_grad_norm is not None:
        raise ValueError("max_term_grad_norm with fp16 would clip scaled gradients: use bf16, or leave it unset.")


def losses_of_sets(config: Any) -> dict[str, ForgetLoss | PairLoss]:
    """The forget loss of each forgotten set."""
    own = config.forget_loss if config.obsolete_loss is None else config.obsolete_loss
    return {"unlearn": forget_loss_of(config.forget_loss), "obsolete": forget_loss_of(own)}


def check_sets(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The sets of `given` (by name, None if not given) that have a weight. Raises ValueError unless they suffice.

    A missing set is refused where its weight was set above 0 and the set cannot be optional: a surgery needs text to
    forget or to learn, and text that holds the model where it forgets.
    """
    in_force = {name: data for name, data in given.items() if name in TERMS and data is not None}
    in_force = {name: data for name, data in in_force.items() if config.weights[name] > 0}
    for name, data in in_force.items():
        if len(data) == 0:
            raise ValueError(
                f"{name}_dataset is empty and {name}_weight={config.weights[name]}: give it rows, or the weight 0."
            )
    if not any(name in in_force for name in (*FORGET_SETS, "update")):
        raise ValueError(
            "There is nothing to forget and nothing to learn: pass unlearn_dataset, obsolete_dataset or "
            "update_dataset, with a weight above 0."
        )
    forgotten = [name for name in FORGET_SETS if name in in_force]
    if forgotten and not any(name in in_force for name in ANCHOR_SETS) and not config.allow_unanchored:
        raise ValueError(
            f"{' and '.join(forgotten)} would be forgotten with nothing that holds the rest of the model: pass "
            "retain_dataset (or neighbour_dataset) with a weight above 0, or set allow_unanchored=True."
        )
    losses = losses_of_sets(config)
    if "obsolete" in forgotten and losses["obsolete"].name == "pair_dpo" and given.get("update") is None:
        raise ValueError("pair_dpo lets new texts win over old ones: pass update_dataset, or choose another loss.")
    if config.forget_target == UNSEEN and forgotten and given.get(UNSEEN) is None:
        raise ValueError(
            "forget_target='unseen' aims at the loss of text that the model never read: pass unseen_dataset (held-out "
            "text of the same kind), or a number of nats per token, at most ln(vocabulary size)."
        )
    return in_force


def _checked_target(target: float | str | None) -> float | str | None:
    """The target as a number, "unseen" or None; parsers hand numbers over as text."""
    if target is None or target == UNSEEN:
        return target
    if isinstance(target, str) and target.lower() in ("none", "null"):
        return None
    try:
        value = float(target)
    except (TypeError, ValueError):
        value = math.nan
    if not 0.0 < value < math.inf:
        raise ValueError(f"forget_target={target!r} must be a number of nats per token above 0, 'unseen', or None.")
    return value


def _check_losses(config: Any) -> None:
    losses = losses_of_sets(config)
    if losses["unlearn"].name == "pair_dpo" and config.unlearn_weight > 0:
        raise ValueError(
            "forget_loss='pair_dpo' needs a new version of each text, which the unlearn set has not: set "
            "obsolete_loss='pair_dpo' and another forget_loss, or unlearn_weight=0."
        )
    for name, loss in losses.items():
        if loss.needs_target and config.forget_target is None and config.weights[name] > 0:
            raise ValueError(
                f"{loss.name} needs forget_target: 'unseen' with unseen_dataset, or a number of nats per token."
            )
