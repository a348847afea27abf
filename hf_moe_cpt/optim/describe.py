"""Show a learning-rate schedule before it is run: a table of its phases and a plot in text. Source: ours."""

from __future__ import annotations

from dataclasses import dataclass

from hf_moe_cpt.optim.schedules import PHASE_NAMES, Phases, check_schedule, learning_rate_at


BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class ScheduleCurve:
    """Sampled schedule: ascending steps from 0 to num_steps, their rates, and each non-empty phase's first step."""

    steps: list[int]
    rates: list[float]
    phase_starts: dict[str, int]


def schedule_curve(
    *,
    schedule: str,
    num_steps: int,
    phases: Phases,
    max_lr: float,
    constant_lr: float,
    min_lr: float,
    steepness: float = 10.0,
    num_points: int = 400,
) -> ScheduleCurve:
    """Sample the rate at about num_points steps, phase boundaries always among them."""
    rates_of = {"max_lr": max_lr, "constant_lr": constant_lr, "min_lr": min_lr, "steepness": steepness}
    check_schedule(schedule=schedule, num_steps=num_steps, phases=phases, **rates_of)
    ends = phases.boundaries(num_steps)
    starts = {name: begin for name, begin, end in zip(PHASE_NAMES, (0, *ends), ends, strict=False) if end > begin}
    even = {round(i * num_steps / max(1, num_points - 1)) for i in range(num_points)}
    steps = sorted(even | {0, num_steps} | set(starts.values()))
    rates = [
        learning_rate_at(step, schedule=schedule, num_steps=num_steps, phases=phases, **rates_of) for step in steps
    ]
    return ScheduleCurve(steps, rates, starts)


def describe_schedule(
    *,
    schedule: str,
    num_steps: int,
    phases: Phases,
    max_lr: float,
    constant_lr: float,
    min_lr: float,
    steepness: float = 10.0,
    tokens_per_step: int | None = None,
    width: int = 72,
    height: int = 8,
) -> str:
    """Table of phases (steps, tokens if tokens_per_step is given, rate at begin and end) above a plot in text.

    The "end" of a phase is the value its last step runs into, which is the next phase's first.
    """
    settings = {
        "schedule": schedule,
        "num_steps": num_steps,
        "phases": phases,
        "max_lr": max_lr,
        "constant_lr": constant_lr,
        "min_lr": min_lr,
        "steepness": steepness,
    }
    curve = schedule_curve(**settings, num_points=width + 1)
    rate_at = dict(zip(curve.steps, curve.rates, strict=True))
    begins = list(curve.phase_starts.values())
    rows = [("phase", "from step", "steps", "share", "tokens", "lr begin", "lr end")]
    for (name, begin), end in zip(curve.phase_starts.items(), [*begins[1:], num_steps], strict=True):
        steps = end - begin
        tokens = f"{steps * tokens_per_step:,}" if tokens_per_step else ""
        share = f"{100 * steps / num_steps:.1f}%"
        rows.append((name, f"{begin:,}", f"{steps:,}", share, tokens, f"{rate_at[begin]:.3g}", f"{rate_at[end]:.3g}"))
    total = f"{num_steps * tokens_per_step:,}" if tokens_per_step else ""
    rows.append(("total", "", f"{num_steps:,}", "100.0%", total, f"{rate_at[0]:.3g}", f"{rate_at[num_steps]:.3g}"))
    plot_rates = [learning_rate_at(round(i * num_steps / (width - 1)), **settings) for i in range(width)]
    return "\n".join([f"schedule {schedule}", *_align(rows), "", *_plot(plot_rates, num_steps, height)])


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    """Pad columns: first left, others right; a column without any entry below its heading is left out."""
    kept = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in kept]
    padded = [
        [cell.rjust(size) if i else cell.ljust(size) for cell in column]
        for i, (column, size) in enumerate(zip(kept, widths, strict=True))
    ]
    return ["  ".join(row) for row in zip(*padded, strict=True)]


def _plot(rates: list[float], num_steps: int, height: int) -> list[str]:
    """Columns of eighth blocks under an axis from 0 to the highest rate."""
    top = max(rates)
    eighths = [round(8 * height * rate / top) for rate in rates]
    lines = []
    for row in reversed(range(height)):
        label = f"{top:.2e}" if row == height - 1 else ""
        lines.append(f"{label:>9} ┤" + "".join(BARS[min(8, max(0, e - 8 * row))] for e in eighths))
    lines.append(f"{'0':>9} └" + "─" * len(rates))
    last = f"{num_steps:,} steps"
    lines.append(" " * 11 + "0" + last.rjust(len(rates) - 1))
    return lines
