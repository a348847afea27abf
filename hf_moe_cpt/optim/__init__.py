"""Learning-rate schedules as pure functions of the step, and a text description of them before a run."""

from hf_moe_cpt.optim.schedules import *  # noqa: F403
