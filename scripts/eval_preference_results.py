"""From judged responses and scored pairs to measures with intervals, as JSON, CSV and a table. Source: ours.

A measure is a number of `count` prompts or pairs, with the ends of its confidence interval where it has one: Wilson's
for shares, that of the regression for length-controlled ones, mean +- z standard errors for means.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

from hf_moe_cpt.analysis.preference_accuracy import (
    length_controlled_share,
    pair_outcomes,
    preference_accuracy,
    share_of_wins,
)
from hf_moe_cpt.scripts.benchmark_tools import write_csv
from hf_moe_cpt.scripts.eval_preference_folder import Row, write_lines
from hf_moe_cpt.scripts.quickstart_folder import write_json


SIDES = ("policy", "reference")
VERDICT_OF_OUTCOME = {1.0: "win", 0.5: "tie", 0.0: "loss"}


class Measure(NamedTuple):
    """A value of `count` prompts or pairs; low and high are the ends of its interval."""

    value: float
    low: float | None
    high: float | None
    count: int


def judge(
    responses: dict[str, Sequence[Row]], rewards: dict[str, Sequence[float | None]], tie_margin: float
) -> list[Row]:
    """One row for each prompt that both sides answered: both responses, rewards, margin and verdict.

    Equal responses are a tie whatever rounding does to their rewards. Lengths are characters.
    """
    rows = []
    for policy, reference, reward, ref_reward in zip(
        *(responses[side] for side in SIDES), *(rewards[side] for side in SIDES), strict=True
    ):
        if policy["response"] is None or reference["response"] is None:
            continue
        margin = 0.0 if policy["response"] == reference["response"] else reward - ref_reward
        (outcome,) = pair_outcomes([margin], tie_margin).tolist()
        rows.append(
            {
                "index": policy["index"],
                "prompt": policy["prompt"],
                "response": policy["response"],
                "ref_response": reference["response"],
                "reward": reward,
                "ref_reward": ref_reward,
                "margin": margin,
                "verdict": VERDICT_OF_OUTCOME[outcome],
                "length": len(policy["response"]),
                "ref_length": len(reference["response"]),
                "finished": policy.get("finished"),
                "ref_finished": reference.get("finished"),
            }
        )
    return rows


def win_measures(judged: Sequence[Row], confidence: float) -> dict[str, Measure]:
    """Shares of wins, counts, rewards and lengths of at least one judged row."""
    outcome_of = {verdict: outcome for outcome, verdict in VERDICT_OF_OUTCOME.items()}
    outcomes = [outcome_of[row["verdict"]] for row in judged]
    lengths = [row["length"] - row["ref_length"] for row in judged]
    count = len(judged)
    controlled = length_controlled_share(outcomes, lengths, confidence)
    measures = {
        "win rate": Measure(*share_of_wins(outcomes, confidence), count),
        "length-controlled win rate": Measure(*controlled[:3], count),
        "length effect": Measure(controlled.length_effect, None, None, count),
    }
    for outcome, plural in ((1.0, "wins"), (0.5, "ties"), (0.0, "losses")):
        measures[plural] = Measure(outcomes.count(outcome), None, None, count)
    margins = [row["margin"] for row in judged]
    measures |= {
        "mean reward of policy": _mean([row["reward"] for row in judged], confidence),
        "mean reward of reference": _mean([row["ref_reward"] for row in judged], confidence),
        "mean reward margin": _mean(margins, confidence),
        "median reward margin": Measure(statistics.median(margins), None, None, count),
        "mean characters of policy": _mean([row["length"] for row in judged], confidence),
        "mean characters of reference": _mean([row["ref_length"] for row in judged], confidence),
    }
    for side, name in zip(SIDES, ("finished", "ref_finished"), strict=True):
        known = [row[name] for row in judged if row[name] is not None]
        if known:
            measures[f"share of unfinished responses of {side}"] = Measure(
                known.count(False) / len(known), None, None, len(known)
            )
    return measures


def _mean(values: Sequence[float], confidence: float) -> Measure:
    """Mean with its normal interval; no interval of a single value."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Measure(mean, None, None, count)
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * statistics.stdev(values) / math.sqrt(count)
    return Measure(mean, mean - reach, mean + reach, count)


def accuracy_measures(
    scored: Sequence[Row], ref_scored: Sequence[Row] | None, confidence: float
) -> dict[str, Measure]:
    """The three accuracies of the policy's log-probabilities; with a reference's also those of the log-ratios."""
    readable = [row for row in scored if row["chosen_logp"] is not None]
    columns = {
        name: [row[name.removesuffix("s")] for row in readable]
        for name in ("chosen_logps", "rejected_logps", "chosen_lengths", "rejected_lengths")
    }
    kinds: dict[str, dict[str, list[float]]] = {"of log-probabilities": {}}
    if ref_scored is not None:
        of_reference = [row for row in ref_scored if row["chosen_logp"] is not None]
        names = ("chosen_logps", "rejected_logps")
        kinds["of log-ratios"] = {
            f"ref_{name}": [row[name.removesuffix("s")] for row in of_reference] for name in names
        }
    measures = {}
    for kind, reference in kinds.items():
        found = preference_accuracy(**columns, **reference, confidence=confidence)
        shares = {
            "accuracy": found.plain,
            "length-normalised accuracy": found.length_normalized,
            "length-controlled accuracy": found.length_controlled,
        }
        measures |= {f"{name} {kind}": Measure(*share[:3], found.num_pairs) for name, share in shares.items()}
    lengths = {side: statistics.fmean(columns[f"{side}_lengths"]) for side in ("chosen", "rejected")}
    count = len(readable)
    return measures | {f"mean tokens of {side}": Measure(mean, None, None, count) for side, mean in lengths.items()}


def write_results(
    root: Path,
    measures: dict[str, Measure],
    notes: Sequence[str],
    facts: dict[str, Any],
    lines: dict[str, Sequence[Row]],
) -> None:
    """summary.json, summary.csv and one file of JSON lines for each entry of `lines`. NaN becomes null in JSON."""
    for name, rows in lines.items():
        write_lines(root / f"{name}.jsonl", rows)
    plain = {
        name: {key: _plain(value) for key, value in measure._asdict().items()} for name, measure in measures.items()
    }
    write_json(root / "summary.json", {"measures": plain, "notes": list(notes), **facts})
    write_csv(root / "summary.csv", [{"measure": name, **measure._asdict()} for name, measure in measures.items()])


def _plain(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def table_rows(measures: dict[str, Measure], confidence: float) -> list[dict[str, Any]]:
    """The measures for a terminal."""
    interval = f"{100 * confidence:.4g} % interval"
    return [
        {
            "measure": name,
            "value": _text(measure.value),
            interval: None if measure.low is None else f"{_text(measure.low)} to {_text(measure.high)}",
            "of": measure.count,
        }
        for name, measure in measures.items()
    ]


def _text(value: float) -> str | None:
    if math.isnan(value):
        return None
    return str(value) if isinstance(value, int) else f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
