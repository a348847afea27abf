"""Print a learning-rate schedule, and plot it into an SVG file, before a run is started."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hf_moe_cpt.analysis.schedule_plot import plot_schedule
from hf_moe_cpt.optim.describe import describe_schedule, schedule_curve
from hf_moe_cpt.optim.schedules import PHASE_NAMES, SCHEDULES, STARTING_PHASES, Phases, default_phases


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-moe-cpt schedule", description=__doc__)
    parser.add_argument("--schedule", default="cosine_inf", choices=list(SCHEDULES))
    parser.add_argument("--max-steps", type=int, required=True, help="optimizer steps of the run")
    parser.add_argument(
        "--starting-phase", default="scratch", choices=STARTING_PHASES, help="where the model comes from"
    )
    parser.add_argument(
        "--phases", type=float, nargs=4, metavar=[name.upper() for name in PHASE_NAMES], help="shares of max-steps"
    )
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="peak rate")
    parser.add_argument("--constant-learning-rate", type=float, help="default: midway between peak and minimum")
    parser.add_argument("--min-learning-rate", type=float, help="default: a tenth of the peak")
    parser.add_argument("--steepness", type=float, default=10.0, help="of inv_sqrt_inf's cooldown")
    parser.add_argument("--tokens-per-step", type=int, help="adds a column of tokens")
    parser.add_argument("--plot", metavar="FILE.svg", help="also draw the curve into this file")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Describe the schedule that the arguments mean."""
    args = _parser().parse_args(argv)
    min_lr = args.learning_rate / 10 if args.min_learning_rate is None else args.min_learning_rate
    constant_lr = args.constant_learning_rate
    settings = {
        "schedule": args.schedule,
        "num_steps": args.max_steps,
        "phases": Phases(*args.phases) if args.phases else default_phases(args.schedule, args.starting_phase),
        "max_lr": args.learning_rate,
        "constant_lr": (args.learning_rate + min_lr) / 2 if constant_lr is None else constant_lr,
        "min_lr": min_lr,
        "steepness": args.steepness,
    }
    print(describe_schedule(**settings, tokens_per_step=args.tokens_per_step))
    if args.plot:
        print(f"plot written to {plot_schedule(args.plot, **vars(schedule_curve(**settings)))}")


if __name__ == "__main__":
    main()
