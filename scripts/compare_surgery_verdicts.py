"""What the results say: verdicts on what is claimed of surgery, and whether the method "safe" meets its targets.

A claim holds in a seed or it does not; it is confirmed if it holds in all, refuted if in none, and mixed otherwise.
Targets are about means over seeds of differences and ratios within a seed. Source: ours; the claims follow
arXiv 2409.13054 and what is known of gradient ascent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from hf_moe_cpt.scripts.compare_surgery_plan import BEFORE, RETRAINED


DIVERGED = 2.0  # times the loss of unseen text before surgery: further than forgotten
EQUAL = 0.05  # accuracies that differ by less are called equal
LEFT_OVER = 0.10  # accuracy above the retrained model's that counts as old knowledge
SAFE, PAPER, ASCENT, DESCENT, NPO = "safe", "paper", "ascent-only", "descent-kl", "npo-retain"
LEARNING = (PAPER, SAFE, DESCENT, NPO)  # methods with a term for updates

Record = Mapping[str, Any]
Measures = Mapping[str, float]
Cell = Mapping[str, Record]  # the records of one seed by method


class Claim(NamedTuple):
    """Something that is said of the methods."""

    text: str
    methods: tuple[str, ...]  # that must have been run, beside BEFORE and RETRAINED
    holds: Callable[[Cell], bool]  # in a seed
    numbers: Callable[[Cell], str]  # that decide it


class Target(NamedTuple):
    """Something that the method safe should reach."""

    text: str
    others: tuple[str, ...]  # models that it is compared with
    value: Callable[[Sequence[Cell]], float]
    is_met: Callable[[float], bool]
    form: str  # how the value is written


def cells_of(records: Sequence[Record]) -> list[Cell]:
    """The records of one architecture by seed, and by method within a seed."""
    seeds = sorted({record["seed"] for record in records})
    return [{record["method"]: record for record in records if record["seed"] == seed} for seed in seeds]


def claims_of(architecture: str, records: Sequence[Record]) -> list[dict[str, str]]:
    """A row for each claim whose methods were run: verdict, and the numbers that decide it."""
    rows = []
    for claim in CLAIMS:
        cells = [cell for cell in cells_of(records) if {*claim.methods, BEFORE, RETRAINED} <= cell.keys()]
        if not cells:
            continue
        held = sum(claim.holds(cell) for cell in cells)
        mixed = f"mixed, {held} of {len(cells)} seeds"
        verdict = "confirmed" if held == len(cells) else "refuted" if held == 0 else mixed
        numbers = "; ".join(map(claim.numbers, cells))
        rows.append({"architecture": architecture, "claim": claim.text, "verdict": verdict, "in each seed": numbers})
    return rows


def _loss_ratio(cell: Cell, method: str) -> float:
    """Loss on the unlearn set over the loss on unseen text before surgery."""
    return cell[method]["measures"]["ce/unlearn"] / cell[BEFORE]["measures"]["ce/unseen"]


def _spread(cell: Cell) -> float:
    """Largest minus smallest accuracy on updates among the methods that learn them."""
    values = [cell[method]["measures"]["accuracy/update"] for method in LEARNING if method in cell]
    return max(values) - min(values)


def _left_over(cell: Cell) -> tuple[float, float]:
    """What descent and KL alone leave of unlearn and obsolete above the retrained model, as accuracy."""
    ours, retrained = (cell[method]["measures"] for method in (DESCENT, RETRAINED))
    return tuple(ours[name] - retrained[name] for name in ("accuracy/unlearn", "accuracy/obsolete"))


CLAIMS = (
    Claim(
        f"ascent diverges: the loss on unlearn passes {DIVERGED:g} x that of unseen text (paper)",
        (PAPER,),
        lambda cell: _loss_ratio(cell, PAPER) > DIVERGED,
        lambda cell: f"{_loss_ratio(cell, PAPER):.2f}",
    ),
    Claim(
        "ascent diverges (ascent-only)",
        (ASCENT,),
        lambda cell: _loss_ratio(cell, ASCENT) > DIVERGED,
        lambda cell: f"{_loss_ratio(cell, ASCENT):.2f}",
    ),
    Claim(
        "bounded losses do not diverge (safe, npo-retain)",
        (SAFE, NPO),
        lambda cell: max(_loss_ratio(cell, SAFE), _loss_ratio(cell, NPO)) <= DIVERGED,
        lambda cell: f"{_loss_ratio(cell, SAFE):.2f}, {_loss_ratio(cell, NPO):.2f}",
    ),
    Claim(
        f"updates are learnt equally: accuracies within {100 * EQUAL:g} points",
        LEARNING,
        lambda cell: _spread(cell) <= EQUAL,
        lambda cell: f"{100 * _spread(cell):.1f}",
    ),
    Claim(
        f"no ascent leaves old answers: {100 * LEFT_OVER:g} points above the retrained model (unlearn, obsolete)",
        (DESCENT,),
        lambda cell: min(_left_over(cell)) > LEFT_OVER,
        lambda cell: ", ".join(f"{100 * value:.1f}" for value in _left_over(cell)),
    ),
)


def targets_of(architecture: str, records: Sequence[Record]) -> list[dict[str, str]]:
    """A row for each target of the method safe whose runs are there: what was asked for, what came, whether met."""
    rows = []
    for target in TARGETS:
        cells = [cell for cell in cells_of(records) if {SAFE, *target.others} <= cell.keys()]
        if cells:
            value = target.value(cells)
            row = {"architecture": architecture, "target": target.text, "value": target.form.format(value)}
            rows.append(row | {"met": "yes" if target.is_met(value) else "no"})
    return rows


def _mean(value: Callable[[Measures, Measures], float], other: str) -> Callable[[Sequence[Cell]], float]:
    """The mean over seeds of a function of the measures of safe and of another model."""
    return lambda cells: fmean(value(cell[SAFE]["measures"], cell[other]["measures"]) for cell in cells)


def relearning_lead(cells: Sequence[Cell]) -> float:
    """Mean over k and seeds of accuracy after k steps of relearning, less that of the retrained model after 2k.

    On the subjects that are taught; k are the steps above 0 for which 2k was measured too.
    """
    leads = []
    for cell in cells:
        curves = (cell[method]["relearn"] for method in (SAFE, RETRAINED))
        ours, theirs = (dict(zip(curve["steps"], curve["taught"], strict=True)) for curve in curves)
        leads += [ours[k] - theirs[2 * k] for k in ours if k and 2 * k in theirs]
    return fmean(leads)


TARGETS = (
    Target(
        "accuracy on unlearn within 3 points of the retrained model's",
        (RETRAINED,),
        _mean(lambda ours, theirs: 100 * (ours["accuracy/unlearn"] - theirs["accuracy/unlearn"]), RETRAINED),
        lambda value: abs(value) <= 3,
        "{:+.1f} points",
    ),
    Target(
        "accuracy on update at least 40 points above the model before",
        (BEFORE,),
        _mean(lambda ours, theirs: 100 * (ours["accuracy/update"] - theirs["accuracy/update"]), BEFORE),
        lambda value: value >= 40,
        "{:+.1f} points",
    ),
    Target(
        "accuracy on update at least 90 % of the retrained model's",
        (RETRAINED,),
        _mean(lambda ours, theirs: 100 * ours["accuracy/update"] / theirs["accuracy/update"], RETRAINED),
        lambda value: value >= 90,
        "{:.1f} %",
    ),
    Target(
        "accuracy on retain falls by 1 point at most",
        (BEFORE,),
        _mean(lambda ours, theirs: 100 * (theirs["accuracy/retain"] - ours["accuracy/retain"]), BEFORE),
        lambda value: value <= 1,
        "{:+.1f} points",
    ),
    *(
        Target(
            f"KL on retain at most 1/5 of that of {method}",
            (method,),
            _mean(lambda ours, theirs: ours["kl/retain"] / theirs["kl/retain"], method),
            lambda value: value <= 0.2,
            "{:.3f}",
        )
        for method in (PAPER, ASCENT)
    ),
    Target(
        "size of the gauge at most 10 % of the loss of unseen text",
        (),
        _mean(lambda ours, _: 100 * abs(ours["gauge"]) / ours["ce/unseen"], SAFE),
        lambda value: value <= 10,
        "{:.1f} %",
    ),
    Target(
        "relearning in k steps no faster than the retrained model learns in 2k: accuracies, mean over k",
        (RETRAINED,),
        lambda cells: 100 * relearning_lead(cells),
        lambda value: value <= 0,
        "{:+.1f} points",
    ),
)
