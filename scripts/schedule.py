"""Print a learning-rate schedule, and plot it into an SVG file, before a run is started.

hf-moe-cpt schedule --max_steps 1000 --starting_phase decayed --plot schedule.svg
hf-moe-cpt schedule --max_steps 2000 --checkpoint run/checkpoint-1000
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.optim.schedules import (
    PHASE_NAMES,
    SCHEDULES,
    STARTING_PHASES,
    Phases,
    default_phases,
    default_rates,
    describe_schedule,
    schedule_curve,
)
from hf_moe_cpt.reports import plot_schedule


@dataclass
class ScheduleArguments:
    """The schedule"""

    max_steps: int = HfArg(help="Optimizer steps of the run.")
    schedule: str = HfArg(default="cosine_inf", metadata={"choices": list(SCHEDULES)}, help="Its name.")
    starting_phase: str = HfArg(
        default="scratch", metadata={"choices": list(STARTING_PHASES)}, help="Where the model comes from."
    )
    phases: list[float] | None = HfArg(
        default=None, help=f"Shares of max_steps: {', '.join(PHASE_NAMES)}; unset: the paper's."
    )
    learning_rate: float = HfArg(default=3e-4, help="Peak rate.")
    constant_learning_rate: float | None = HfArg(
        default=None, help="Of the constant phase; unset: midway between peak and minimum, the peak for wsd."
    )
    min_learning_rate: float | None = HfArg(
        default=None, help="At the end; unset: a tenth of the peak, 0 for wsd, linear."
    )
    steepness: float = HfArg(default=10.0, metadata={"range": "(0, inf)"}, help="Of inv_sqrt_inf's cooldown.")
    tokens_per_step: int | None = HfArg(default=None, metadata={"range": "[1, inf)"}, help="Adds a column of tokens.")
    checkpoint: str | None = HfArg(
        default=None, help="What a run resumed from this checkpoint will do, with its own settings up to --max_steps."
    )
    rewarm: bool = HfArg(default=False, help="With --checkpoint: it climbs to the longer schedule.")
    plot: str | None = HfArg(default=None, help="Also draw the curve into this SVG file.")

    def __post_init__(self) -> None:
        if self.phases is not None and len(self.phases) != len(PHASE_NAMES):
            raise ValueError(f"--phases takes {', '.join(PHASE_NAMES)}, got {len(self.phases)} number(s).")
        if self.plot and not self.plot.endswith(".svg"):
            raise ValueError(f"--plot {self.plot!r} would hold an SVG: give it a name that ends with .svg.")


ARGUMENTS = (ScheduleArguments,)


def main(argv: Sequence[str] | None = None) -> None:
    """Describe the schedule that the arguments mean."""
    (args,) = parse_arguments(ARGUMENTS, argv, program="hf-moe-cpt schedule", description=__doc__)
    given = (args.learning_rate, args.constant_learning_rate, args.min_learning_rate)
    constant_lr, min_lr = default_rates(args.schedule, *given)
    phases = default_phases(args.schedule, args.starting_phase, args.max_steps)
    settings = {
        "schedule": args.schedule,
        "num_steps": args.max_steps,
        "phases": Phases(*args.phases) if args.phases else phases,
        "max_lr": args.learning_rate,
        "constant_lr": constant_lr,
        "min_lr": min_lr,
        "steepness": args.steepness,
    }
    if args.checkpoint is not None:
        from hf_moe_cpt.trainers.cpt.cpt_data import resumed_settings  # a trainer takes seconds to import

        settings = resumed_settings(args.checkpoint, args.max_steps, args.rewarm)
    print(describe_schedule(**settings, tokens_per_step=args.tokens_per_step))
    if args.plot:
        print(f"plot written to {plot_schedule(args.plot, **vars(schedule_curve(**settings)))}")


if __name__ == "__main__":
    run_script(main)
