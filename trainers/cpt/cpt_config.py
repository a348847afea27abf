"""Arguments of continual pre-training. Defaults and phases: paper 1 (Thérien et al. 2025), sections 3 to 5."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from hf_moe_cpt.data.packing import PACKINGS, exact_ratio
from hf_moe_cpt.optim.schedules import (
    SCHEDULES,
    STARTING_PHASES,
    Phases,
    check_schedule,
    default_phases,
    default_rates,
)
from hf_moe_cpt.reading import reading, unique_keys
from hf_moe_cpt.settings import check_settings
from hf_moe_cpt.trainers.common.arguments import FLAGS_OF_SCRIPTS, OPTIONS_OF_EPOCHS, SharedArguments, refuse_unread


PHASE_FIELDS = ("warmup_fraction", "cooldown_fraction", "constant_fraction", "anneal_fraction")


ROLES = ("new", "replay")
WEIGHT_SCHEDULES = ("constant", "linear", "anneal")


@dataclass
class SourceSettings:
    """How a source takes part in a mixture.

    weight: its share of every batch, in any unit. end_weight: where `weight_schedule` leads it; None keeps it. role:
    new text, or replay of the old, on which forgetting is measured. max_epochs: its weight is lowered so that it is
    read at most so often.
    """

    weight: Any
    role: str = "new"
    end_weight: float | None = None
    max_epochs: float | None = None


@dataclass
class CPTConfig(SharedArguments, TrainingArguments):
    """Arguments of `CPTTrainer`: those of `TrainingArguments` and of its other bases, and:

    Other defaults than the parent's: learning_rate 3e-4, adam_beta2 0.95, weight_decay 0.1 (the paper's), and
    remove_unused_columns and logging_nan_inf_filter off (a column names the source; the filter waits for the device at
    every step and hides what the trainer stops for), logging_steps 10, eval_on_start on (the reference of forgetting).
    """

    # --- the run: `max_steps` optimizer steps fix the token budget, whatever the replay ratio ---
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate, reached after warm-up."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Second Adam coefficient."})
    weight_decay: float = field(default=0.1, metadata={"help": "Decoupled weight decay of matrices."})
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two log entries."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: a column names the source."})
    eval_on_start: bool = field(
        default=True, metadata={"help": "Evaluate before step 1, the reference of forgetting and adaptation."}
    )

    # --- the schedule ---
    cpt_schedule: str = field(
        default="cosine_inf", metadata={"help": f"Learning-rate schedule: {', '.join(SCHEDULES)}."}
    )
    constant_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Rate of the constant phase; unset: that of a checkpoint saved before any decay, else midway "
            "between peak and minimum, the peak for wsd and wsd_s."
        },
    )
    min_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Rate at the last step; unset: a tenth of learning_rate, 0 for wsd and linear."},
    )
    warmup_fraction: float | None = field(
        default=None, metadata={"help": "Share of max_steps that warms up; set all four fractions or none."}
    )
    cooldown_fraction: float | None = field(
        default=None, metadata={"help": "Share of max_steps from the peak down to the constant rate."}
    )
    constant_fraction: float | None = field(default=None, metadata={"help": "Share of max_steps at constant rate."})
    anneal_fraction: float | None = field(
        default=None, metadata={"help": "Share of max_steps from the constant rate down to the minimum."}
    )
    inv_sqrt_steepness: float = field(
        default=10.0, metadata={"range": "(0, inf)", "help": "Steepness of inv_sqrt_inf's cooldown."}
    )
    starting_phase: str = field(
        default="auto",
        metadata={
            "help": "What the model comes from: scratch, constant (saved before any decay: no re-warm-up) or decayed "
            "(warms up again). auto reads it from the checkpoint; a checkpoint that does not say counts as decayed."
        },
    )
    rewarm: bool = field(
        default=False,
        metadata={"help": "Let a run that goes on beyond its max_steps climb to the rate of the longer schedule."},
    )
    max_forgetting: float | None = field(
        default=None,
        metadata={
            "range": "(0, inf)",
            "help": "Nats per token by which held-out text of any replayed source may get worse: the evaluation that "
            "finds more saves, and does what on_forgetting says.",
        },
    )
    on_forgetting: str = field(
        default="stop",
        metadata={
            "choices": ["stop", "replay"],
            "help": "Above max_forgetting: stop ends the run; replay doubles the share of what is forgotten, up to "
            "half of a batch for all old text, and ends the run when that does not help.",
        },
    )
    keep_optimizer_state: bool = field(
        default=False, metadata={"help": "Carry the Adam moments of the starting checkpoint over."}
    )

    # --- the data ---
    replay_ratio: float = field(
        default=0.0, metadata={"help": "Share of each optimizer batch that comes from replay_dataset, in [0, 1)."}
    )
    mixture: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Several sources in place of replay_ratio, by name: a weight, or a JSON object of weight, role "
            "(new or replay), end_weight and max_epochs. The script makes it of --sources."
        },
    )
    weight_schedule: str = field(
        default="constant",
        metadata={
            "help": f"How weights come to end_weight: {', '.join(WEIGHT_SCHEDULES)} (linear over the run; anneal: for "
            "the last phase of the schedule)."
        },
    )
    max_length: int = field(default=2048, metadata={"help": "Tokens of a packed block."})
    packing: str = field(
        default="document",
        metadata={
            "help": "document: attention and loss stay inside a document; concat: they run across; "
            "padded: one document a row, which the trainer takes for a model that reads across boundaries."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Column with the raw text."})
    document_start: str = field(
        default="auto",
        metadata={
            "help": "What begins a document: auto (what the tokenizer puts there by itself), none, or its text."
        },
    )
    document_end: str = field(
        default="auto", metadata={"help": "What ends a document: auto (EOS), none, or its text, e.g. '<|im_end|>'."}
    )
    vocabulary: str = field(
        default="keep",
        metadata={
            "choices": ["keep", "extend"],
            "help": "extend gives the model rows for tokens that were added to its tokenizer (for the script).",
        },
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise."})
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Documents in the shuffle buffer of streaming data; 1 keeps their order."}
    )

    # --- the model ---
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained when the model is given by name (JSON)."}
    )
    log_expert_load: bool = field(
        default=True, metadata={"help": "Log maximum routing imbalance (MRI) per layer for MoE models."}
    )

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs", "mixture"]

    def __post_init__(self) -> None:
        """Fill what is unset and refuse contradictions, before anything is loaded."""
        check_settings(self)
        given = (self.constant_learning_rate, self.min_learning_rate)
        self.constant_learning_rate, self.min_learning_rate = default_rates(
            self.cpt_schedule, self.learning_rate, *given
        )
        if self.label_names not in (None, ["labels"]):
            raise ValueError(f"label_names={self.label_names!r}: the labels are made of the tokens, leave it out.")
        self._check_data()
        self._check_parent()
        if self.starting_phase not in ("auto", *STARTING_PHASES):
            raise ValueError(
                f"starting_phase={self.starting_phase!r} is unknown: choose auto, {', '.join(STARTING_PHASES)}."
            )
        known = self.starting_phase if self.starting_phase != "auto" else "scratch"
        check_schedule(**self.schedule_settings(known))
        super().__post_init__()
        if self.accelerator_config.split_batches:
            raise ValueError("accelerator_config.split_batches would make a step of fewer blocks: leave it off.")

    def _check_data(self) -> None:
        if not 0.0 <= self.replay_ratio < 1.0:
            raise ValueError(
                f"replay_ratio={self.replay_ratio} is outside [0, 1): it is the share of each batch that is replayed, "
                "e.g. 0.3 for 30 %."
            )
        self.check_mixture()
        if self.on_forgetting == "replay" and self.max_forgetting is None:
            raise ValueError("on_forgetting='replay' without max_forgetting: set the nats that may be forgotten.")
        if self.packing not in PACKINGS:
            raise ValueError(f"packing={self.packing!r} is unknown: choose one of {', '.join(PACKINGS)}.")
        if self.max_length < 2:
            raise ValueError(f"max_length={self.max_length} leaves nothing to predict: give at least 2 tokens.")
        if self.shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer={self.shuffle_buffer} is no buffer: give at least 1 document.")

    def check_mixture(self) -> None:
        """Raise ValueError for a mixture that nothing can be made of, and for weights that change to nothing."""
        if isinstance(self.mixture, str):
            with reading(f"mixture={self.mixture[:200]!r}", "give a JSON object, a source by name"):
                self.mixture = json.loads(self.mixture, object_pairs_hook=unique_keys)
        if self.weight_schedule not in WEIGHT_SCHEDULES:
            raise ValueError(
                f"weight_schedule={self.weight_schedule!r} is unknown: choose one of {', '.join(WEIGHT_SCHEDULES)}."
            )
        if self.mixture is None:
            return
        if self.replay_ratio:
            raise ValueError(f"mixture has weights for all sources: leave replay_ratio={self.replay_ratio} out.")
        if self.on_forgetting == "replay" and self.weight_schedule != "constant":
            raise ValueError("on_forgetting='replay' changes weights itself: leave weight_schedule at constant.")
        changing = [name for name, source in self.sources().items() if source.end_weight is not None]
        if bool(changing) != (self.weight_schedule != "constant"):
            raise ValueError(
                f"weight_schedule={self.weight_schedule!r} and end_weight of {', '.join(changing) or 'no source'}: "
                "set both, weight_schedule to linear or anneal, or neither."
            )

    def _check_parent(self) -> None:
        if self.max_steps < 1:
            raise ValueError(
                f"max_steps={self.max_steps}: {self.cpt_schedule} without steps has no phases and the run no token "
                "budget; set max_steps to the number of optimizer steps."
            )
        unread = {"lr_scheduler_kwargs": "choose cpt_schedule, its phases and rates"}
        refuse_unread(self, TrainingArguments, FLAGS_OF_SCRIPTS | OPTIONS_OF_EPOCHS | unread)
        if self.warmup_steps or self.lr_scheduler_type != "linear":
            raise ValueError(
                f"lr_scheduler_type={self.lr_scheduler_type!r} and warmup_steps={self.warmup_steps} do not apply "
                f"here: choose cpt_schedule and set {', '.join(PHASE_FIELDS)}."
            )
        if self.remove_unused_columns or self.logging_nan_inf_filter:
            raise ValueError(
                "remove_unused_columns and logging_nan_inf_filter must stay off: the first drops the source of each "
                "sequence, the second hides a loss that is not a number."
            )

    def sources(self) -> dict[str, SourceSettings]:
        """How each source takes part; without a mixture "new" and, with a replay ratio, "replay"."""
        if self.mixture is None:
            ratio = exact_ratio(self.replay_ratio)
            named = {"new": SourceSettings(1 - ratio), "replay": SourceSettings(ratio, "replay")}
            return named if ratio else {"new": named["new"]}
        if not self.mixture or not isinstance(self.mixture, dict):
            raise ValueError(f"mixture={self.mixture!r} must name its sources: {{'german': 0.7, 'english': 0.3}}.")
        return {name: _source_settings(name, given) for name, given in self.mixture.items()}

    def phases(self, starting_phase: str) -> Phases:
        """Phases of the run: the four fractions if set, else the paper's for a model that comes from that phase."""
        given = [getattr(self, name) for name in PHASE_FIELDS]
        if all(value is None for value in given):
            return default_phases(self.cpt_schedule, starting_phase, self.max_steps)
        if any(value is None for value in given):
            missing = ", ".join(name for name, value in zip(PHASE_FIELDS, given, strict=True) if value is None)
            raise ValueError(f"Set all four fractions or none: {missing} is unset (0 leaves a phase out).")
        return Phases(*given)

    def schedule_settings(self, starting_phase: str) -> dict[str, Any]:
        """Keyword arguments of the functions in `hf_moe_cpt.optim.schedules` for this run."""
        return {
            "schedule": self.cpt_schedule,
            "num_steps": self.max_steps,
            "phases": self.phases(starting_phase),
            "max_lr": self.learning_rate,
            "constant_lr": self.constant_learning_rate,
            "min_lr": self.min_learning_rate,
            "steepness": self.inv_sqrt_steepness,
        }


def _source_settings(name: str, given: Any) -> SourceSettings:
    """Raises ValueError, in one line that names the source, for what it cannot be."""
    values = dict(given) if isinstance(given, dict) else {"weight": given}
    known = [option.name for option in fields(SourceSettings)]
    unknown = [key for key in values if key not in known]
    if unknown or "weight" not in values:
        raise ValueError(f"source {name!r}: give weight, and of the rest {', '.join(known[1:])}; got {values}.")
    for key in ("weight", "end_weight", "max_epochs"):
        value = values.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
        if not (is_number or (value is None and key != "weight")) or (key == "max_epochs" and value == 0):
            raise ValueError(
                f"source {name!r}: {key}={value!r} is no {'weight' if 'weight' in key else 'number > 0'}."
            )
    if values.get("role", "new") not in ROLES:
        raise ValueError(f"source {name!r}: role={values['role']!r} is unknown: choose {' or '.join(ROLES)}.")
    return SourceSettings(**values)
