"""Learning-rate schedules as pure functions of the step, and a text description of them before a run."""

from hf_moe_cpt.optim.schedules import (
    DEFAULT_COSINE_PHASES,
    DEFAULT_PHASES,
    PHASE_NAMES,
    SCHEDULES,
    STARTING_PHASES,
    Boundaries,
    Phases,
    ScheduleCurve,
    build_lr_scheduler,
    check_schedule,
    cosine,
    cosine_inf,
    default_phases,
    describe_schedule,
    inv_sqrt_inf,
    learning_rate_at,
    phase_at,
    schedule_curve,
)


__all__ = [
    "DEFAULT_COSINE_PHASES",
    "DEFAULT_PHASES",
    "PHASE_NAMES",
    "SCHEDULES",
    "STARTING_PHASES",
    "Boundaries",
    "Phases",
    "ScheduleCurve",
    "build_lr_scheduler",
    "check_schedule",
    "cosine",
    "cosine_inf",
    "default_phases",
    "describe_schedule",
    "inv_sqrt_inf",
    "learning_rate_at",
    "phase_at",
    "schedule_curve",
]
