"""Draw a learning-rate schedule as a standalone SVG before it is run. Source: ours."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_moe_cpt.analysis.chart import Mark, Series, line_chart


def plot_schedule(
    path: str | os.PathLike[str],
    *,
    steps: Sequence[int],
    rates: Sequence[float],
    phase_starts: Mapping[str, int] | None = None,
    title: str = "How does the learning rate move over the run?",
) -> Path:
    """Write steps against rates, with the first step of each named phase marked; returns the path.

    The three arguments are the fields of `hf_moe_cpt.optim.schedule_curve(...)`: pass `**vars(curve)`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    chart = line_chart(
        [Series("learning rate", steps, rates)],
        title=title,
        x_label="optimizer step",
        y_label="learning rate",
        vertical=[Mark(step, name) for name, step in (phase_starts or {}).items()],
        from_zero=True,
        max_points=max(800, len(steps)),
        standalone=True,
    )
    target.write_text(chart, encoding="utf-8")
    return target
