"""Arguments that all trainers share: what to do when a machine, a disk, a rank or a batch goes bad. Source: ours."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_moe_cpt.trainers.instruments.bad_steps import POLICIES


@dataclass
class FaultSettings:
    """For a subclass of `TrainingArguments`, before it among the bases: `class CPTConfig(FaultSettings, ...)`."""

    # --- when a machine, a disk, a rank or a batch goes bad ---
    snapshot_dir: str | None = field(
        default=None,
        metadata={
            "help": "Fast folder of each host, such as one under /dev/shm, into which a checkpoint is written; "
            "a thread copies it to output_dir while training goes on. Unset: training waits for output_dir."
        },
    )
    save_on_sigterm: bool = field(
        default=True,
        metadata={"help": "On SIGTERM finish the step, save, and end with exit code 143; not with save_strategy no."},
    )
    hang_timeout: float = field(
        default=1500.0,
        metadata={
            "help": "Seconds without any progress after which a run on several ranks ends and names the rank that "
            "holds it up; more than the longest save takes. 0 leaves the watch out."
        },
    )
    bad_step_policy: str = field(
        default="stop",
        metadata={
            "help": "When the loss of a step is no number or a spike: stop; skip, drop the step's gradients; rewind, "
            "go back to the last checkpoint and leave the step out. skip reads the loss at every step.",
            "choices": list(POLICIES),
        },
    )
    spike_sigmas: float = field(
        default=0.0,
        metadata={
            "help": "Standard deviations above the mean of the last spike_window losses from which on a loss is a "
            "spike; 0: only NaN and infinity are bad."
        },
    )
    spike_window: int = field(default=50, metadata={"help": "Losses that a loss is compared with, at least 8."})
    bad_step_limit: int = field(
        default=5, metadata={"help": "Steps in a row that are skipped, or times that the run goes back, at most."}
    )
    log_step_timing: bool = field(
        default=True, metadata={"help": "Log seconds of a step, of waiting for data, and of the slowest rank."}
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is loaded."""
        if self.bad_step_policy not in POLICIES:
            raise ValueError(f"bad_step_policy={self.bad_step_policy!r} is unknown: choose {', '.join(POLICIES)}.")
        if self.bad_step_policy != "stop" and getattr(self, "fp16", False):
            raise ValueError(
                f"bad_step_policy={self.bad_step_policy!r} with fp16, whose scaler leaves steps out by itself: use "
                "bf16, or stop."
            )
        for name, least in (("spike_sigmas", 0), ("hang_timeout", 0), ("bad_step_limit", 1), ("spike_window", 8)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if self.snapshot_dir is not None and self.snapshot_dir == getattr(self, "output_dir", None):
            raise ValueError(f"snapshot_dir={self.snapshot_dir!r} is output_dir: name a folder on a faster disk.")
        super().__post_init__()
