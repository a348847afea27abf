"""A routing analysis as tables for the terminal: a line for each checkpoint, then one for each text. Source: ours."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hf_moe_cpt.scripts.quickstart_results import text_table


READING = """\
MRI: share of the tokens that visit the busiest expert; times E/K it is 1 in perfect balance. same experts: share of a
token's experts that {first} chose too, {chance:.3f} by chance. vocabulary: share of the visits of a token id to the
expert it visited most in {first}. co-activation: mean change of P(j | i). slowdown: an estimate for {ranks} ranks.
Means over layers."""


def tables(analysis: Mapping[str, Any]) -> str:
    """Both tables and how to read them."""
    shapes = analysis["layers"]
    chance = statistics.fmean(layer["experts_per_token"] / layer["num_experts"] for layer in shapes)
    first = analysis["checkpoints"][0]["name"]
    ranks = analysis["expert_parallel"][first]["num_ranks"]
    parts = ["", text_table(checkpoint_rows(analysis)), ""]
    if len(analysis["domains"]) > 1:
        parts += [text_table(text_rows(analysis)), ""]
    parts.append(READING.format(first=first, chance=chance, ranks=ranks))
    parts += [f"not there: {part}: {why}" for part, why in analysis["skipped"].items()]
    return "\n".join(parts)


def checkpoint_rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line for each checkpoint, on all text."""
    rows = []
    for checkpoint in analysis["checkpoints"]:
        name = checkpoint["name"]
        measures = analysis["metrics"][name]["all"]
        rows.append(
            {
                "checkpoint": name,
                "tokens": checkpoint["num_tokens"],
                "MRI": _mean(measures["mri"]),
                "MRI xE/K": _mean(measures["mri_normalized"]),
                "load entropy": _mean(measures["load_entropy"]),
                "dead experts": sum(measures["dead_experts"]),
                "router entropy": _mean(measures["router_entropy"]),
                "same experts": _mean(analysis["saturation"].get(name, {}).get("all")),
                "vocabulary input": _mean(analysis["vocabulary_specialization"][name]["input"]),
                "vocabulary output": _mean(analysis["vocabulary_specialization"][name]["output"]),
                "co-activation change": _mean((analysis["coactivation_change"] or {}).get(name)),
                "slowdown": _mean(analysis["expert_parallel"][name]["contiguous"]["slowdown"]),
            }
        )
    return rows


def text_rows(analysis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line for each checkpoint and kind of text."""
    return [
        {
            "checkpoint": name,
            "text": text,
            "MRI": _mean(texts[text]["mri"]),
            "MRI xE/K": _mean(texts[text]["mri_normalized"]),
            "worst layer": max(range(len(texts[text]["mri"])), key=texts[text]["mri_normalized"].__getitem__),
            "dead experts": sum(texts[text]["dead_experts"]),
            "same experts": _mean(analysis["saturation"].get(name, {}).get(text)),
        }
        for name, texts in analysis["metrics"].items()
        for text in analysis["domains"]
    ]


def _mean(values: Sequence[float | None] | None) -> float | None:
    """Over the layers that have a value; None if none has."""
    known = [value for value in values or () if value is not None]
    return statistics.fmean(known) if known else None
