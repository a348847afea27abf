"""Arguments of LLM Surgery: one weight and one batch size for each set, and how forgetting is bounded.

"paper" follows the authors' code in everything that decides a number: four sets, weights, plain ascent, forward KL,
AdamW with decay on every parameter, a constant rate, 120 steps, no rule that stops it, and the model of the last step.
What the code leaves to the launch is not in it: how many GPUs, hence how many sequences of each set make a step.
"safe" is the defaults.

Source: Veldanda et al. 2024 (arXiv 2409.13054) for the objective; akshajkumarv/llm_surgery_code, config_surgery.yaml
at 87826d1 (2024-09-25), for "paper"; bounds, stop rules and expert options are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from hf_moe_cpt.settings import check_settings
from hf_moe_cpt.trainers.common.arguments import FLAGS_OF_SCRIPTS, OPTIONS_OF_EPOCHS, SharedArguments, refuse_unread
from hf_moe_cpt.trainers.surgery.chunked import KL_DIRECTIONS
from hf_moe_cpt.trainers.surgery.losses import (
    DESCENT,
    FORGET_LOSSES,
    NORMALIZATIONS,
    PAIR_LOSSES,
    STATE_LOSSES,
    TERMS,
    ForgetLoss,
    ForgetSettings,
    PairLoss,
    forget_loss_of,
)


UNSEEN = "unseen"
KNOWN = ("obsolete", "unlearn")  # the first of them in force says before step 1 what text costs that is known
FORGET_SETS = ("unlearn", "obsolete")
ANCHOR_SETS = ("retain", "neighbour", UNSEEN)
PAPER_WEIGHTS = {"unlearn": 0.1, "obsolete": 0.1, "update": 2.0, "retain": 0.5, "neighbour": 0.0, UNSEEN: 0.0}
CHOICES = {
    "normalization": NORMALIZATIONS,
    "kl_direction": tuple(KL_DIRECTIONS),
    "gradient_surgery": ("none", "project"),
    "target_experts_by": ("use", "contrast"),
    "reference": ("auto", "copy", "adapter", "cache"),
}
_POSITIVE = ("max_length", "chunk_tokens", "eval_rows", "eval_batch_size", *(f"{name}_batch_size" for name in TERMS))
_AT_LEAST_0 = ("router_anchor", "expert_anchor", "target_experts", "forget_sharpness")
_AT_LEAST_0 += ("anchor_dual_rate", "anchor_budget", "weight_noise_scale", "negation", "router_projection")
_ABOVE_0_OR_NONE = ("update_target", "max_retain_kl")
_MUST_STAY = {
    "remove_unused_columns": (False, "batches are made of several sets"),
    "logging_nan_inf_filter": (False, "a loss that is no number must stop the run"),
    "per_device_train_batch_size": (1, "set <set>_batch_size, rows of each set in a micro-batch"),
}


# Without a published result on forgetting, and without a table of ours: field, or field and value; what to use.
GONE: dict[Any, str] = {
    "max_term_grad_norm": "max_grad_norm clips the step, gradient_surgery='project' tells terms apart",
    "forget_max_weight": "it was of unlikelihood; wga weighs what is known",
    ("gradient_surgery", "pcgrad"): "'project' is what was published for forgetting (GRU)",
}

PRESETS: dict[str, dict[str, Any]] = {
    "safe": {},  # the defaults of SurgeryConfig
    "paper": {
        **{f"{name}_weight": weight for name, weight in PAPER_WEIGHTS.items()},
        **{f"{name}_batch_size": 1 for name in PAPER_WEIGHTS},
        "forget_loss": "ga",
        "forget_target": None,
        "counterfactuals": 0,
        "replay": 0,
        "update_pieces": False,
        "kl_direction": "forward",
        "normalization": "sequence",
        "mask_prefix": False,
        "append_eos": False,
        "max_length": 4096,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_steps": 120,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.01,
        "decay_all_parameters": True,
        "max_grad_norm": 1.0,
        "reference": "copy",
        "gradient_checkpointing": True,
        "logging_steps": 8,
        "seed": 42,
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "metric_for_best_model": None,
    },
}


def preset_settings(name: str) -> dict[str, Any]:
    """The fields of `SurgeryConfig` that a preset sets. Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown: choose one of {', '.join(PRESETS)}.")
    return dict(PRESETS[name])


LOSS_NAMES = ", ".join([*FORGET_LOSSES, *STATE_LOSSES, *PAIR_LOSSES])


@dataclass
class SurgeryConfig(SharedArguments, TrainingArguments):
    """Arguments of `SurgeryTrainer`: those of `TrainingArguments` and of its other bases, and:

    Other defaults than the parent's: learning_rate 2e-5, up during a tenth of the steps and down to 0, max_steps 200,
    adam_beta2 0.95, logging_steps 10; it measures every 10 steps (eval_strategy, eval_steps, eval_on_start) and keeps
    and loads the model with the smallest `surgery_gap` (save_strategy "best", load_best_model_at_end,
    save_total_limit 1).
    remove_unused_columns and logging_nan_inf_filter are off; per_device_train_batch_size stays 1, since a batch holds
    `<set>_batch_size` rows of every set. Every contradiction raises ValueError before anything is loaded.
    """

    # --- the run ---
    learning_rate: float = HfArg(default=2e-5, help="Learning rate.")
    lr_scheduler_type: str = HfArg(default="linear", help="Schedule of the learning rate.")
    warmup_steps: float = HfArg(default=0.1, help="Steps of warm-up, or their share.")
    max_steps: int = HfArg(default=200, help="Optimizer steps at most.")
    adam_beta2: float = HfArg(default=0.95, help="Second Adam coefficient.")
    logging_steps: float = HfArg(default=10, help="Optimizer steps between two log entries.")
    eval_strategy: str = HfArg(default="steps", help="When to measure: steps, or no.")
    eval_steps: float | None = HfArg(default=10, help="Optimizer steps between two measurements.")
    eval_on_start: bool = HfArg(default=True, help="Measure before step 1.")
    save_strategy: str = HfArg(default="best", help="best: the model with the smallest gap; steps; no.")
    save_total_limit: int | None = HfArg(default=1, help="Checkpoints that are kept.")
    load_best_model_at_end: bool = HfArg(default=True, help="End with the best model, not the last.")
    metric_for_best_model: str | None = HfArg(default="surgery_gap", help="Criterion of the best model.")
    greater_is_better: bool | None = HfArg(default=False, help="Whether a greater criterion is better.")
    remove_unused_columns: bool = HfArg(default=False, help="Must stay off: batches are of several sets.")
    per_device_train_batch_size: int = HfArg(default=1, help="Must stay 1: set <set>_batch_size.")

    # --- the objective: weights are at least 0, and every term is minimised ---
    unlearn_weight: float = HfArg(default=2.0, help="Weight of forgetting unlearn_dataset.")
    obsolete_weight: float = HfArg(default=0.5, help="Weight of forgetting obsolete_dataset.")
    update_weight: float = HfArg(default=2.0, help="Weight of the cross entropy of update_dataset.")
    retain_weight: float = HfArg(default=3.0, help="Weight of the KL on retain_dataset.")
    neighbour_weight: float = HfArg(default=3.0, help="Weight of the KL on neighbour_dataset.")
    unseen_weight: float = HfArg(
        default=3.0, help="Weight of the KL on unseen_dataset: what the forgotten texts share with it stays as it was."
    )
    forget_loss: str = HfArg(default="aim", help=f"Forget loss: {LOSS_NAMES}; in Python also a function.")
    obsolete_loss: str | None = HfArg(default=None, help="Another forget loss for obsolete_dataset; unset: the same.")
    # None is no value: with it in the type the parsers hand over text, and without it they take numbers alone.
    forget_target: float | str | None = HfArg(
        default="unseen",
        help="Nats per token, at most ln(vocabulary size), or unseen: the loss of unseen_dataset, else of "
        "update_dataset, before step 1. Aim of aim, bound of simnpo, a stop rule.",
    )
    forget_beta: float | None = HfArg(default=None, help="Beta of the forget loss; unset: its own.")
    forget_layer: int | None = HfArg(
        default=None, help="Layer, counted from 0, whose output rmu steers; unset: the middle one."
    )
    satimp_beta2: float = HfArg(default=1.0, help="Second exponent of satimp.")
    kl_direction: str = HfArg(
        default="forward",
        metadata={"choices": list(KL_DIRECTIONS)},
        help="forward: KL(before || now), as coded; reverse: as printed.",
    )
    normalization: str = HfArg(
        default="sequence",
        metadata={"choices": list(CHOICES["normalization"])},
        help="Means over sequences first, or over all tokens.",
    )
    forget_sharpness: float = HfArg(
        default=0.0,
        help="Forget at the worst point within this distance of the weights, against relearning and rounding (SAM).",
    )
    counterfactuals: int | None = HfArg(
        default=None,
        help="Copies of each forgotten text with an invented name, to be held to. Unset: 2 where all texts "
        "name their subject.",
    )
    replay: int | None = HfArg(
        default=None,
        help="Texts that the model before writes itself, to be held to. Unset: 192 where texts name their subjects.",
    )
    update_pieces: bool = HfArg(
        default=True,
        help="Teach each line or sentence that names its subject alone too.",
    )
    anchor_dual_rate: float = HfArg(
        default=0.0,
        help="What the anchors' weight grows by when measured, times (KL on held-out retain - anchor_budget) (PDU).",
    )
    anchor_budget: float = HfArg(default=0.05, help="KL on held-out retain, in nats, that anchor_dual_rate allows.")
    weight_noise: float = HfArg(
        default=0.0,
        help="Share in [0, 1) of the weights that noise replaces before step 1, for distilling alone (UNDO).",
    )
    weight_noise_scale: float = HfArg(default=0.1, help="Of that noise, beside Xavier's initial weights.")
    negation: float = HfArg(
        default=0.0,
        help="Above 0: learn what is to be forgotten alone, then take this many times the change off the weights.",
    )
    gradient_surgery: str = HfArg(
        default="none",
        metadata={"choices": list(CHOICES["gradient_surgery"])},
        help="project: forgetting gives way where it pulls against the anchors.",
    )
    log_term_gradients: bool = HfArg(
        default=False, help="Log norms and cosines of the terms' gradients at logging steps, which then hold them all."
    )

    # --- the rows of a micro-batch, on each device ---
    unlearn_batch_size: int = HfArg(default=8, help="Rows of unlearn_dataset in a micro-batch.")
    obsolete_batch_size: int = HfArg(default=8, help="Rows of obsolete_dataset in a micro-batch.")
    update_batch_size: int = HfArg(default=8, help="Rows of update_dataset in a micro-batch.")
    retain_batch_size: int = HfArg(default=8, help="Rows of retain_dataset in a micro-batch.")
    neighbour_batch_size: int = HfArg(default=8, help="Rows of neighbour_dataset in a micro-batch.")
    unseen_batch_size: int = HfArg(default=8, help="Rows of unseen_dataset in a micro-batch.")
    max_length: int = HfArg(default=1024, help="Tokens of a row; longer ones are cut.")
    mask_prefix: bool = HfArg(default=True, help="Leave the column prefix out of all losses.")
    append_eos: bool = HfArg(default=True, help="End each text with EOS, which counts as a token.")
    allow_overlap: bool = HfArg(default=False, help="Only warn of subjects both to be forgotten and to be kept.")
    refusals: list[str] | None = HfArg(
        default=None, help="Answers that win under idk_dpo; unset: ten that one cannot tell."
    )
    dataset_num_proc: int | None = HfArg(default=None, help="Processes that tokenise.")

    # --- the anchor ---
    reference: str = HfArg(
        default="auto",
        metadata={"choices": list(CHOICES["reference"])},
        help="The model before surgery: copy; adapter: the base under a PEFT adapter; cache: its hidden states "
        "on disk; auto: adapter with PEFT, else cache.",
    )
    reference_cache_dir: str | None = HfArg(
        default=None, help="Folder of the cache; unset: `reference` in output_dir."
    )
    allow_unanchored: bool = HfArg(
        default=False, help="Allow forgetting without retain or neighbour text to hold the model."
    )
    chunk_tokens: int = HfArg(default=512, help="Tokens whose logits exist at a time.")

    # --- stop rules, checked when measuring ---
    eval_rows: int = HfArg(default=64, help="Rows of each set that are measured, always the same.")
    eval_batch_size: int = HfArg(default=8, help="Rows of a batch when measuring, on each device.")
    held_out_fraction: float = HfArg(
        default=0.2,
        help="Share of the subjects (else rows) of retain, neighbour and unseen that no term sees: retention is "
        "measured on them.",
    )
    update_target: float | None = HfArg(
        default=None,
        help="Nats per token at which update_dataset counts as learnt; unset: the loss of obsolete_dataset, else of "
        "unlearn_dataset, before step 1.",
    )
    max_retain_kl: float | None = HfArg(
        default=None, help="Stop beyond this KL on held-out retain, in nats per token."
    )

    # --- mixtures of experts ---
    freeze_router: bool = HfArg(default=False, help="Do not train the routers.")
    router_anchor: float = HfArg(
        default=0.0, help="Weight of the KL of the routers to their old selves on retained text."
    )
    target_experts: int = HfArg(
        default=0, help="Train only this many experts, those that the unlearn set uses most; 0: all."
    )
    target_experts_by: str = HfArg(
        default="use",
        metadata={"choices": list(CHOICES["target_experts_by"])},
        help="By use on the unlearn set, or beyond retained text.",
    )
    expert_calibration: bool = HfArg(
        default=False,
        help="Anchors hold experts as often as forgotten texts use them (TRACE).",
    )
    router_projection: float = HfArg(
        default=0.0,
        help="Routers stay along this share of their inputs of kept text (GRIP).",
    )
    expert_anchor: float = HfArg(default=1.0, help="With target_experts: how hard routers are pulled to them.")

    # --- the model ---
    decay_all_parameters: bool = HfArg(default=False, help="Weight decay on norms and biases too, as the authors.")
    model_init_kwargs: dict[str, Any] | str | None = HfArg(
        default=None, help="Of from_pretrained, as JSON, where the model is a name."
    )

    def __new__(cls, *_: Any, **kwargs: Any) -> SurgeryConfig:
        """Raise ValueError for a field or mode that went, with what to use."""
        for name, value in kwargs.items():
            instead = GONE.get(name) or (GONE.get((name, value)) if isinstance(value, str) else None)
            if instead is not None:
                raise ValueError(f"{name}={value!r} is gone: {instead}.")
        return super().__new__(cls)

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    def __post_init__(self) -> None:
        """Refuse contradictions, before anything is loaded."""
        check_settings(self)
        self._check_numbers()
        self.forget_target = _checked_target(self.forget_target)
        self.forget_settings(1.0)  # raises for wrong numbers
        self._check_losses()
        super().__post_init__()

    def _check_numbers(self) -> None:
        for name, weight in self.weights.items():
            if not 0.0 <= weight < math.inf:
                raise ValueError(
                    f"{name}_weight={weight} must be a finite number, at least 0: a forget loss already has the sign "
                    "of what is minimised; 0 leaves a set out."
                )
        if not any(self.weights.values()):
            raise ValueError("all weights are 0: give at least one set a weight above 0.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(choices)}.")
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be at least 1; a set is left out by a weight of 0."
                )
        for name in ("counterfactuals", "replay"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} must be at least 0; unset: a number where names are known.")
        for name in _AT_LEAST_0:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number, at least 0; 0 leaves it out.")
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(
                f"held_out_fraction={self.held_out_fraction} must lie in [0, 1): some rows must hold the model."
            )
        if not 0 <= self.weight_noise < 1:
            raise ValueError(f"weight_noise={self.weight_noise} must lie in [0, 1): 0 leaves the weights as they are.")
        if self.router_projection > 1.0 or (self.router_projection and self.freeze_router):
            raise ValueError(
                f"router_projection={self.router_projection} must lie in [0, 1], and freeze_router leaves it nothing."
            )
        for name in _ABOVE_0_OR_NONE:
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ValueError(f"{name}={value} must be above 0, or unset to leave the rule out.")
        refuse_unread(self, TrainingArguments, FLAGS_OF_SCRIPTS | OPTIONS_OF_EPOCHS)
        for name, (value, reason) in _MUST_STAY.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}={getattr(self, name)} must stay {value}: {reason}.")
        if self.max_steps < 1:
            raise ValueError(
                f"max_steps={self.max_steps} must be at least 1: the sets are endless, so steps end a run."
            )

    def _check_losses(self) -> None:
        losses = self.forget_losses
        if losses["unlearn"].name == "pair_dpo" and self.unlearn_weight > 0:
            raise ValueError(
                "forget_loss='pair_dpo' needs a new version of each text, which the unlearn set has not: set "
                "obsolete_loss='pair_dpo' and another forget_loss, or unlearn_weight=0."
            )
        for name, loss in losses.items():
            if loss.needs_target and self.forget_target is None and self.weights[name] > 0:
                raise ValueError(
                    f"{loss.name} needs forget_target: 'unseen' with unseen_dataset, or a number of nats per token."
                )

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> SurgeryConfig:
        """The settings "paper" or "safe"; `overrides` are any fields, and win. ValueError for another name."""
        return cls(**{**preset_settings(name), **overrides})

    @property
    def forget_losses(self) -> dict[str, ForgetLoss | PairLoss]:
        """The forget loss of each forgotten set."""
        own = self.forget_loss if self.obsolete_loss is None else self.obsolete_loss
        if self.negation:
            return dict.fromkeys(FORGET_SETS, DESCENT)
        return {"unlearn": forget_loss_of(self.forget_loss), "obsolete": forget_loss_of(own)}

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term of the objective."""
        return {name: getattr(self, f"{name}_weight") for name in TERMS}

    def forget_settings(self, target: float | None) -> ForgetSettings:
        """The numbers of the forget losses, with the target in nats per token once it is known."""
        return ForgetSettings(target, self.forget_beta, self.satimp_beta2)

    def sets_in_force(self, given: dict[str, Any]) -> dict[str, Any]:
        """The sets of `given` (by name, None if not given) that have a weight. Raises ValueError unless they suffice.

        A missing set is refused where its weight was set above 0 and the set cannot be optional: a surgery needs text
        to forget or to learn, and text that holds the model where it forgets.
        """
        in_force = {
            name: data for name, data in given.items() if name in TERMS and data is not None and self.weights[name] > 0
        }
        for name, data in in_force.items():
            if len(data) == 0:
                raise ValueError(
                    f"{name}_dataset is empty and {name}_weight={self.weights[name]}: give it rows, or the weight 0."
                )
        if not any(name in in_force for name in (*FORGET_SETS, "update")) and not self.weight_noise:
            raise ValueError(
                "There is nothing to forget and nothing to learn: pass unlearn_dataset, obsolete_dataset or "
                "update_dataset, with a weight above 0."
            )
        forgotten = [name for name in FORGET_SETS if name in in_force]
        if self.negation and ("update" in in_force or not forgotten):
            raise ValueError(
                f"negation={self.negation} only forgets: give unlearn_dataset or obsolete_dataset, and learn "
                "update_dataset in a surgery afterwards (update_weight=0 leaves it out of this one)."
            )
        anchored = self.negation or any(name in in_force for name in ANCHOR_SETS if name != UNSEEN)
        if forgotten and not anchored and not self.allow_unanchored:
            raise ValueError(
                f"{' and '.join(forgotten)} would be forgotten with nothing that holds the rest of the model: pass "
                "retain_dataset (or neighbour_dataset) with a weight above 0, or set allow_unanchored=True."
            )
        is_paired = "obsolete" in forgotten and self.forget_losses["obsolete"].name == "pair_dpo"
        if is_paired and given.get("update") is None:
            raise ValueError("pair_dpo lets new texts win over old ones: pass update_dataset, or choose another loss.")
        is_told = given.get(UNSEEN) or "update" in in_force  # what text costs that was not read
        is_told = is_told or ("unlearn" in in_force and getattr(self.forget_losses["unlearn"], "needs_copies", False))
        if self.forget_target == UNSEEN and forgotten and not is_told:
            raise ValueError(
                "forget_target='unseen' aims at the loss of text that the model never read: pass unseen_dataset "
                "(held-out text of the same kind), or a number of nats per token, at most ln(vocabulary size)."
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
