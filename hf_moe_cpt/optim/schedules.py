"""Learning-rate schedules of continual pre-training as pure functions of the optimizer step.

`step` is the number of updates already made, so the value at `step` is used by update number step + 1: the first
update uses the value at 0 (which is 0 while warming up) and the last one the value at num_steps - 1. The value at
num_steps, and at every step after it, is min_lr (constant_lr if the phases have no anneal).

Letters: t step, T num_steps, u steps since a phase began, s = u / length of that phase, in [0, 1].
Source: Thérien et al. 2025 (arXiv 2503.05029), CosineInf; Ibrahim et al. 2024 (arXiv 2403.08763), InvSqrtInf; Hägele
et al. 2024 (arXiv 2405.18392), WSD with a decay of 1 - sqrt; Wen et al. 2024 (arXiv 2410.05192), WSD-S; Bergsma et al.
2025 (arXiv 2502.15938), linear decay to zero. Ours: their table and plot in text, a LambdaLR whose saved state is the
step alone, and a run that goes on longer than it was meant to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, NotRequired, TypedDict, Unpack

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


__all__ = [
    "DEFAULT_COSINE_PHASES", "DEFAULT_PHASES", "DEFAULT_WSD_PHASES", "PHASE_NAMES", "SCHEDULES",
    "STARTING_PHASES", "Boundaries", "Extension", "Phases", "ScheduleCurve", "build_lr_scheduler",
    "check_schedule", "cosine", "cosine_inf", "default_phases", "default_rates", "describe_schedule", "inv_sqrt_inf",
    "learning_rate_at", "linear", "phase_at", "schedule_curve", "wsd",
]  # fmt: skip

BARS = " ▁▂▃▄▅▆▇█"
STARTING_PHASES = ("scratch", "constant", "decayed")
PHASE_NAMES = ("warmup", "cooldown", "constant", "anneal")
LEAST_WARMUP = 10  # steps


class Boundaries(NamedTuple):
    """First step after each phase; a phase is empty where its end equals the one before it."""

    warmup: int
    cooldown: int
    constant: int
    anneal: int  # == num_steps


@dataclass(frozen=True)
class Phases:
    """Lengths of the four phases as fractions of the run; each in [0, 1], summing to one."""

    warmup: float
    cooldown: float
    constant: float
    anneal: float

    def __post_init__(self) -> None:
        values = (self.warmup, self.cooldown, self.constant, self.anneal)
        shown = ", ".join(f"{name}={value}" for name, value in zip(PHASE_NAMES, values, strict=True))
        for name, value in zip(PHASE_NAMES, values, strict=True):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"phase {name}={value} is outside [0, 1] ({shown}): give fractions of the run.")
        if abs(math.fsum(values) - 1.0) > 1e-6:
            raise ValueError(f"phases must sum to 1, got {shown}: sum {math.fsum(values):.6g}; adjust one of them.")

    def boundaries(self, num_steps: int) -> Boundaries:
        """Steps at which the phases end: cumulative fractions of num_steps, rounded half up, so no step is lost."""
        ends, total = [], 0.0
        for fraction in (self.warmup, self.cooldown, self.constant):
            total += fraction
            ends.append(min(num_steps, math.floor(total * num_steps + 0.5 + 1e-9)))
        return Boundaries(*ends, num_steps) if self.anneal > 0 else Boundaries(*ends[:2], num_steps, num_steps)


# Infinite schedules, by the phase in which the starting checkpoint was saved (paper: 1/70/10/19 and 0/0/80/20).
DEFAULT_PHASES: dict[str, Phases] = {
    "scratch": Phases(0.01, 0.70, 0.10, 0.19),
    "constant": Phases(0.0, 0.0, 0.80, 0.20),
    "decayed": Phases(0.01, 0.70, 0.10, 0.19),
}
# Cosine has a warm-up and an anneal only. Without a warm-up it starts at constant_lr, see `learning_rate_at`.
DEFAULT_COSINE_PHASES: dict[str, Phases] = {
    "scratch": Phases(0.01, 0.0, 0.0, 0.99),
    "constant": Phases(0.0, 0.0, 0.0, 1.0),
    "decayed": Phases(0.01, 0.0, 0.0, 0.99),
}
# WSD has no cooldown. WSD-S goes on from a decayed checkpoint at the full rate at once.
DEFAULT_WSD_PHASES: dict[str, Phases] = {
    "scratch": Phases(0.01, 0.0, 0.89, 0.10),
    "constant": Phases(0.0, 0.0, 0.90, 0.10),
    "decayed": Phases(0.01, 0.0, 0.89, 0.10),
}
_TO_THE_END = ("cosine", "linear")  # of these there is a warm-up and an anneal only
TO_ZERO = ("wsd", "wsd_s", "linear")  # unless told otherwise


def default_phases(schedule: str, starting_phase: str, num_steps: int | None = None) -> Phases:
    """Phases of the paper for a schedule and the phase ("scratch", "constant", "decayed") the run starts from.

    num_steps: of the run. A run that warms up does so for `LEAST_WARMUP` steps at least, or for a tenth of a shorter
    run, which one in a hundred would leave without (ours); the phase after it gives them.
    """
    _check_name(schedule)
    if starting_phase not in DEFAULT_PHASES:
        raise ValueError(f"starting phase {starting_phase!r} is unknown: choose one of {', '.join(STARTING_PHASES)}.")
    if schedule == "wsd_s" and starting_phase == "decayed":
        starting_phase = "constant"
    kinds = {"wsd": DEFAULT_WSD_PHASES, "wsd_s": DEFAULT_WSD_PHASES} | dict.fromkeys(
        _TO_THE_END, DEFAULT_COSINE_PHASES
    )
    phases = kinds.get(schedule, DEFAULT_PHASES)[starting_phase]
    more = 0.0 if num_steps is None else min(LEAST_WARMUP / num_steps, 0.1) - phases.warmup
    if more <= 0 or not phases.warmup:
        return phases
    giving = "anneal" if schedule in _TO_THE_END else "constant" if schedule in kinds else "cooldown"
    return replace(phases, warmup=phases.warmup + more, **{giving: getattr(phases, giving) - more})


def default_rates(
    schedule: str, max_lr: float, constant_lr: float | None = None, min_lr: float | None = None
) -> tuple[float, float]:
    """Rates of the constant phase and of the end, where they are not given.

    The end is a tenth of the peak, or 0 for `TO_ZERO`; the constant phase midway between both, or the peak for WSD.
    """
    _check_name(schedule)
    low = min_lr if min_lr is not None else 0.0 if schedule in TO_ZERO else max_lr / 10
    usual = max_lr if schedule.startswith("wsd") else (max_lr + low) / 2
    return usual if constant_lr is None else constant_lr, low


def cosine(step: int, num_steps: int, warmup: float, max_lr: float, min_lr: float) -> float:
    """Linear warm-up from 0 to max_lr over round(warmup * T) steps, then half a cosine to min_lr at T."""
    ends = Phases(warmup, 0.0, 0.0, 1.0 - warmup).boundaries(num_steps)
    if step < ends.warmup:
        return max_lr * step / ends.warmup
    if step >= num_steps:
        return min_lr if ends.anneal > ends.warmup else max_lr
    return _half_cosine((step - ends.warmup) / (num_steps - ends.warmup), max_lr, min_lr)


def cosine_inf(step: int, num_steps: int, phases: Phases, max_lr: float, constant_lr: float, min_lr: float) -> float:
    """Warm-up to max_lr, half a cosine to constant_lr, constant, exponential anneal to min_lr at T."""
    return _infinite(step, num_steps, phases, max_lr, constant_lr, min_lr, _half_cosine)


def inv_sqrt_inf(
    step: int,
    num_steps: int,
    phases: Phases,
    max_lr: float,
    constant_lr: float,
    min_lr: float,
    steepness: float = 10.0,
) -> float:
    """`cosine_inf` whose cooldown follows h(s) = 1 / sqrt(1 + steepness * s) - 1, scaled to meet both ends."""
    return _infinite(step, num_steps, phases, max_lr, constant_lr, min_lr, partial(_inv_sqrt, steepness=steepness))


def linear(step: int, num_steps: int, warmup: float, max_lr: float, min_lr: float = 0.0) -> float:
    """`cosine` with a straight line for the half cosine."""
    ends = Phases(warmup, 0.0, 0.0, 1.0 - warmup).boundaries(num_steps)
    if step < ends.warmup or ends.anneal == ends.warmup:
        return max_lr * min(1.0, step / ends.warmup)
    if step >= num_steps:
        return min_lr
    return max_lr + (min_lr - max_lr) * (step - ends.warmup) / (num_steps - ends.warmup)


def wsd(step: int, num_steps: int, phases: Phases, max_lr: float, constant_lr: float, min_lr: float = 0.0) -> float:
    """Warm-up to constant_lr, constant, down to min_lr at T by 1 - sqrt(s); max_lr is read with a cooldown only."""
    return _infinite(step, num_steps, phases, max_lr, constant_lr, min_lr, _half_cosine, _one_minus_sqrt)


class Extension(NamedTuple):
    """A run that goes on longer than its schedule was made for: from step `step`, at which its rate was `rate`.

    Unless it warms up again the rate stays there until the longer schedule falls below it; if it does, it climbs from
    there to the longer schedule in `LEAST_WARMUP` steps, or a tenth of those that are left. A run that was still
    warming up stays there until the longer warm-up is as far, and goes on with it.
    """

    step: int
    rate: float
    rewarm: bool = False
    was_warming: bool = False

    def limit(self, step: int, num_steps: int, warmup_end: int, rate: float) -> float:
        """The rate at a step, of which the longer schedule, warm at `warmup_end`, says `rate`."""
        if step < self.step:
            return rate
        if self.rewarm:
            steps = max(1, min(LEAST_WARMUP, (num_steps - self.step) // 10))
            return self.rate + (rate - self.rate) * min(1.0, (step - self.step) / steps)
        if step < warmup_end:
            return max(self.rate, rate) if self.was_warming else self.rate
        return rate if self.was_warming else min(rate, self.rate)


class ScheduleSettings(TypedDict):
    """A schedule by name with what it needs: the keyword arguments of `check_schedule` and `learning_rate_at`."""

    schedule: str
    num_steps: int
    phases: Phases
    max_lr: float
    constant_lr: float
    min_lr: float
    steepness: NotRequired[float]
    extension: NotRequired[Extension | None]


SCHEDULES: dict[str, Callable[..., float]] = {
    "cosine_inf": cosine_inf, "inv_sqrt_inf": inv_sqrt_inf, "cosine": cosine,
    "wsd": wsd, "wsd_s": wsd, "linear": linear,
}  # fmt: skip


def learning_rate_at(
    step: int,
    *,
    schedule: str,
    num_steps: int,
    phases: Phases,
    max_lr: float,
    constant_lr: float,
    min_lr: float,
    steepness: float = 10.0,
    extension: Extension | None = None,
) -> float:
    """Learning rate of update step + 1 under a schedule by name; arguments are taken as checked by `check_schedule`.

    "cosine" and "linear" read phases.warmup only. Without a warm-up they start at constant_lr: a run that does not
    warm up continues a checkpoint, and no schedule lets it jump to max_lr (set constant_lr=max_lr if it should).
    """
    if extension is not None:
        given = {"num_steps": num_steps, "phases": phases, "max_lr": max_lr, "constant_lr": constant_lr}
        rate = learning_rate_at(step, schedule=schedule, **given, min_lr=min_lr, steepness=steepness)
        return extension.limit(step, num_steps, phases.boundaries(num_steps).warmup, rate)
    if schedule in _TO_THE_END:
        top = max_lr if phases.warmup > 0 else constant_lr
        return SCHEDULES[schedule](step, num_steps, phases.warmup, top, min_lr)
    if schedule == "inv_sqrt_inf":
        return inv_sqrt_inf(step, num_steps, phases, max_lr, constant_lr, min_lr, steepness)
    return SCHEDULES[schedule](step, num_steps, phases, max_lr, constant_lr, min_lr)


def phase_at(step: int, *, num_steps: int, phases: Phases) -> str:
    """Phase of update step + 1: "warmup", "cooldown", "constant" or "anneal" (also after the end, if it annealed)."""
    ends = phases.boundaries(num_steps)
    for name, end in zip(PHASE_NAMES, ends, strict=True):
        if step < end:
            return name
    lengths = [end - begin for begin, end in zip((0, *ends), ends, strict=False)]
    return [name for name, length in zip(PHASE_NAMES, lengths, strict=True) if length > 0][-1]


def check_schedule(
    *,
    schedule: str,
    num_steps: int,
    phases: Phases,
    max_lr: float,
    constant_lr: float,
    min_lr: float,
    steepness: float = 10.0,
    extension: Extension | None = None,
) -> None:
    """Refuse, with one line that names field, value and remedy, what the schedules cannot mean."""
    _check_name(schedule)
    if num_steps is None or num_steps < 1:
        raise ValueError(
            f"{schedule} without steps: num_steps={num_steps}, and its phases are fractions of it; set max_steps >= 1."
        )
    for name, value in (("max_lr", max_lr), ("constant_lr", constant_lr), ("min_lr", min_lr)):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name}={value} is no learning rate: give a finite number >= 0.")
    if not min_lr <= constant_lr <= max_lr or max_lr == 0:
        raise ValueError(
            f"learning rates must satisfy 0 <= min_lr <= constant_lr <= max_lr > 0, got min_lr={min_lr}, "
            f"constant_lr={constant_lr}, max_lr={max_lr}: reorder them."
        )
    if extension is not None and extension.rate == 0 and not (extension.rewarm or extension.was_warming):
        raise ValueError(
            f"the run ended at step {extension.step} with a rate of 0, at which nothing is learnt: extend it with "
            "rewarm, or from a checkpoint of before its decay."
        )
    if schedule in _TO_THE_END:
        if phases.cooldown > 0 or phases.constant > 0:
            raise ValueError(
                f"{schedule} has no cooldown and no constant phase, got cooldown={phases.cooldown}, "
                f"constant={phases.constant}: give both to anneal, or choose cosine_inf."
            )
    elif phases.anneal > 0 and min_lr == 0 and schedule not in TO_ZERO:
        raise ValueError(f"{schedule} anneals exponentially and cannot reach min_lr=0: set min_lr > 0 (max_lr / 10).")
    if schedule == "inv_sqrt_inf" and not (math.isfinite(steepness) and steepness > 0):
        raise ValueError(f"steepness={steepness} gives inv_sqrt_inf no slope: set it > 0 (10 is the usual value).")


class RateTrial(NamedTuple):
    """What some steps at a rate did: nats per token learnt of the new text, and forgotten of the old if measured."""

    rate: float
    adaptation: float
    forgetting: float | None = None


NO_DIFFERENCE = 0.005  # nats per token, below which two trials count as equal


def recommended_rate(trials: Sequence[RateTrial], max_forgetting: float | None = None) -> tuple[RateTrial | None, str]:
    """The trial to go on with, and the reason in a sentence; no trial where none taught anything.

    The one that learnt most of those within `max_forgetting`; without such a budget, the one that learnt most beyond
    what it forgot. Of trials that differ by less than `NO_DIFFERENCE` the lowest rate is taken.
    """
    trials = sorted(trials)
    good = [trial for trial in trials if math.isfinite(trial.adaptation) and trial.adaptation > 0]
    if not good:
        return None, "no rate taught the model anything: try lower ones, and look at the new text."
    gain = {trial: trial.adaptation for trial in good}
    why = "it learnt most"
    if max_forgetting is not None:
        within = [trial for trial in good if (trial.forgetting or 0.0) <= max_forgetting]
        if not within:
            least = min(good, key=lambda trial: trial.forgetting)
            return least, f"it forgets least, and still more than {max_forgetting:g} nats: replay more."
        gain, why = (
            {trial: gain[trial] for trial in within},
            f"it learnt most within {max_forgetting:g} nats forgotten",
        )
    elif any(trial.forgetting is not None for trial in good):
        gain = {trial: trial.adaptation - max(0.0, trial.forgetting or 0.0) for trial in good}
        why = "it learnt most beyond what it forgot"
    best = max(gain.values())
    chosen = next(trial for trial in gain if gain[trial] >= best - NO_DIFFERENCE)
    if gain[chosen] < best:
        why += f", as good as higher ones within {NO_DIFFERENCE:g} nats"
    if chosen == trials[-1]:
        why += "; it is the highest that was tried, so try higher ones too"
    elif chosen == trials[0] and len(trials) > 1:
        why += "; it is the lowest that was tried, so try lower ones too"
    return chosen, f"{why}."


def build_lr_scheduler(optimizer: Optimizer, **settings: Unpack[ScheduleSettings]) -> LambdaLR:
    """A LambdaLR that multiplies each group's initial learning rate (max_lr in a plain run) by rate / max_lr.

    Groups with other initial rates keep their proportion to max_lr. Its state is the step alone, so that changed
    rates, phases or num_steps take effect at once when a run is resumed.
    """
    check_schedule(**settings)
    return StepLambdaLR(optimizer, partial(_ratio_at, **settings))


def _ratio_at(step: int, *, max_lr: float, **settings: Any) -> float:
    """A function of the module, so that a scheduler can be pickled."""
    return learning_rate_at(step, max_lr=max_lr, **settings) / max_lr


def _check_name(schedule: str) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is unknown: choose one of {', '.join(SCHEDULES)}.")


def _half_cosine(s: float, begin: float, end: float) -> float:
    return end + (begin - end) / 2 * (1 + math.cos(math.pi * s))


def _one_minus_sqrt(s: float, begin: float, end: float) -> float:
    return end + (begin - end) * (1 - math.sqrt(s))


def _exponential(s: float, begin: float, end: float) -> float:
    return begin * (end / begin) ** s


def _inv_sqrt(s: float, begin: float, end: float, steepness: float) -> float:
    fall = 1 / math.sqrt(1 + steepness * s) - 1
    return begin + (end - begin) * fall / (1 / math.sqrt(1 + steepness) - 1)


def _infinite(
    step: int,
    num_steps: int,
    phases: Phases,
    max_lr: float,
    constant_lr: float,
    min_lr: float,
    cooldown: Callable[[float, float, float], float],
    anneal: Callable[[float, float, float], float] = _exponential,
) -> float:
    """The four phases; without a cooldown nothing could come down from max_lr, so warm-up then ends at constant_lr."""
    ends = phases.boundaries(num_steps)
    if step < ends.warmup:
        peak = max_lr if ends.cooldown > ends.warmup else constant_lr
        return peak * step / ends.warmup
    if step < ends.cooldown:
        return cooldown((step - ends.warmup) / (ends.cooldown - ends.warmup), max_lr, constant_lr)
    if step < ends.constant or ends.anneal == ends.constant:
        return constant_lr
    if step >= num_steps:
        return min_lr
    return anneal((step - ends.constant) / (ends.anneal - ends.constant), constant_lr, min_lr)


@dataclass(frozen=True)
class ScheduleCurve:
    """Sampled schedule: ascending steps up to num_steps, their rates, and each non-empty phase's first step."""

    steps: list[int]
    rates: list[float]
    phase_starts: dict[str, int]


def _first_step(settings: ScheduleSettings) -> int:
    """From which step on a schedule says what a run does."""
    extension = settings.get("extension")
    return 0 if extension is None else min(extension.step, settings["num_steps"])


def schedule_curve(*, num_points: int = 400, **settings: Unpack[ScheduleSettings]) -> ScheduleCurve:
    """Sample the rate at about num_points steps, phase boundaries always among them; an extension from its first step.

    What was before it is not known here: it is not of the longer schedule.
    """
    check_schedule(**settings)
    num_steps, first = settings["num_steps"], _first_step(settings)
    begins = [first, *(max(first, end) for end in settings["phases"].boundaries(num_steps))]
    starts = {n: begin for n, begin, end in zip(PHASE_NAMES, begins, begins[1:], strict=False) if end > begin}
    even = {first + round(i * (num_steps - first) / max(1, num_points - 1)) for i in range(num_points)}
    steps = sorted(even | {first, num_steps} | set(starts.values()))
    return ScheduleCurve(steps, [learning_rate_at(step, **settings) for step in steps], starts)


def describe_schedule(
    *, tokens_per_step: int | None = None, width: int = 72, height: int = 8, **settings: Unpack[ScheduleSettings]
) -> str:
    """Table of phases (steps, tokens if tokens_per_step is given, rate at begin and end) above a plot in text.

    The "end" of a phase is the value its last step runs into, which is the next phase's first.
    """
    curve, num_steps = schedule_curve(**settings, num_points=width + 1), settings["num_steps"]
    first, told = _first_step(settings), f"schedule {settings['schedule']}"
    told += "" if settings.get("extension") is None else f", extended at step {first:,}"
    rate_at = dict(zip(curve.steps, curve.rates, strict=True))
    begins = list(curve.phase_starts.values())
    rows = [("phase", "from step", "steps", "share", "tokens", "lr begin", "lr end")]
    for (name, begin), end in zip(curve.phase_starts.items(), [*begins[1:], num_steps], strict=True):
        steps = end - begin
        tokens = f"{steps * tokens_per_step:,}" if tokens_per_step else ""
        share = f"{100 * steps / max(1, num_steps - first):.1f}%"
        rows.append((name, f"{begin:,}", f"{steps:,}", share, tokens, f"{rate_at[begin]:.3g}", f"{rate_at[end]:.3g}"))
    steps = num_steps - first
    total = f"{steps * tokens_per_step:,}" if tokens_per_step else ""
    rows.append(("total", "", f"{steps:,}", "100.0%", total, f"{rate_at[first]:.3g}", f"{rate_at[num_steps]:.3g}"))
    plot_rates = [learning_rate_at(first + round(i * steps / (width - 1)), **settings) for i in range(width)]
    return "\n".join([told, *_align(rows), "", *_plot(plot_rates, first, num_steps, height)])


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    """Pad columns: first left, others right; a column without any entry below its heading is left out."""
    kept = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in kept]
    padded = [
        [cell.rjust(size) if i else cell.ljust(size) for cell in column]
        for i, (column, size) in enumerate(zip(kept, widths, strict=True))
    ]
    return ["  ".join(row) for row in zip(*padded, strict=True)]


def _plot(rates: list[float], first: int, num_steps: int, height: int) -> list[str]:
    """Columns of eighth blocks under an axis from 0 to the highest rate."""
    top = max(rates) or 1.0
    eighths, lines = [round(8 * height * rate / top) for rate in rates], []
    for row in reversed(range(height)):
        label = f"{top:.2e}" if row == height - 1 else ""
        lines.append(f"{label:>9} ┤" + "".join(BARS[min(8, max(0, e - 8 * row))] for e in eighths))
    lines.append(f"{'0':>9} └" + "─" * len(rates))
    begin = f"{first:,}"
    return [*lines, " " * 11 + begin + f"{num_steps:,} steps".rjust(len(rates) - len(begin))]


class StepLambdaLR(LambdaLR):
    """LambdaLR that saves `last_epoch` (updates made) only; overrides `state_dict` and `load_state_dict`.

    torch's own also saves base_lrs and restores them: a run resumed with another peak would keep the old one.
    """

    def state_dict(self) -> dict[str, Any]:
        """The number of updates made, under torch's names."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the step of a saved state (also of a plain LambdaLR) and set each group's rate for it at once."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict.get("_step_count", self.last_epoch + 1)
        rates = [base * rate(self.last_epoch) for base, rate in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, base, rate in zip(self.optimizer.param_groups, self.base_lrs, rates, strict=True):
            group["initial_lr"] = base
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = rates
