"""From the raw measurements of a model to the numbers that the comparison shows, by name.

    accuracy/<set>              MCQ accuracy of a set's questions; chance is 1/3
    accuracy/<set>_paraphrase   the same questions in roundabout words
    accuracy/changed            of the update set, questions about facts that changed
    old_answers                 share of these whose old answer is likelier than the new one
    ce/<set>                    nats per token, the mean over texts of their means
    gauge                       ce/unlearn - ce/unseen: 0 is forgotten, above is over-forgotten
    kl/<set>, agreement/<set>   KL(before || now) in nats and share of equal first choices, means over tokens

Source: ours; the accuracy is the paper's, by the perplexity of options (arXiv 2409.13054).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from hf_moe_cpt.analysis import robustness
from hf_moe_cpt.analysis.multiple_choice import mcq_accuracy
from hf_moe_cpt.analysis.surgery_score import forgetting_part, harmonic_mean


def measures_of(raw: Mapping[str, Any]) -> dict[str, float]:
    """Everything that `raw` of `evaluate_model` has a part for."""
    found: dict[str, float] = {}
    for name, kinds in raw.get("questions", {}).items():
        for kind, columns in kinds.items():
            label = name if kind == "mcq" else f"{name}_{kind}"
            found[f"accuracy/{label}"] = _accuracy(columns)
    asked = raw.get("questions", {}).get("update", {}).get("mcq")
    if asked is not None:
        found |= _about_changes(asked)
    for name, columns in raw.get("texts", {}).items():
        found[f"ce/{name}"] = -fmean(fmean(logp) for logp in columns["logp"])
    if {"ce/unlearn", "ce/unseen"} <= found.keys():
        found["gauge"] = found["ce/unlearn"] - found["ce/unseen"]
    for name, columns in raw.get("divergence", {}).items():
        found[f"kl/{name}"] = float(np.concatenate(columns["kl"]).mean())
        found[f"agreement/{name}"] = float(np.concatenate(columns["agrees"]).mean())
    return found


def option_losses(columns: Mapping[str, Sequence[Any]]) -> np.ndarray:
    """(questions, options): nats per token of each option."""
    return -np.asarray(columns["logp"], dtype=np.float64) / np.asarray(columns["tokens"])


def _accuracy(columns: Mapping[str, Sequence[Any]]) -> float:
    return float(mcq_accuracy(option_losses(columns), np.asarray(columns["answer"])))


def _about_changes(columns: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    places = [place for place, old in enumerate(columns["old_answer"]) if old is not None]
    if not places:
        return {}
    losses = option_losses(columns)
    changed = {name: [columns[name][place] for place in places] for name in ("logp", "tokens", "answer")}
    old, new = (losses[places, [columns[name][place] for place in places]] for name in ("old_answer", "answer"))
    return {"accuracy/changed": _accuracy(changed), "old_answers": float(np.mean(old < new))}


def validation_score(measures: Mapping[str, float]) -> float:
    """What settings are chosen by, in [0, 1]: the harmonic mean of what was forgotten, learnt and kept.

    Forgotten: 1 - |accuracy on unlearn - accuracy on unseen|; learnt and kept: accuracy on update and retain.
    """
    forgotten = forgetting_part(measures["accuracy/unlearn"], measures["accuracy/unseen"])
    return harmonic_mean((forgotten, measures["accuracy/update"], measures["accuracy/retain"]))


def curve_of(raw: Mapping[str, Any]) -> dict[str, list[float]]:
    """Of a relearning curve: `steps`, and the accuracy at each for subjects that were taught and for the others."""
    groups = {name: values for name, values in raw.items() if name != "steps"}
    return {"steps": list(raw["steps"])} | {
        name: [fmean(answers["right"]) for answers in values] for name, values in groups.items()
    }


def steps_until(curve: Mapping[str, Sequence[float]], accuracy: float) -> float | None:
    """Steps of relearning until the taught subjects' accuracy is reached, between measurements in a straight line.

    None if it never is; 0 if it was from the start.
    """
    return robustness.steps_until(curve["steps"], curve["taught"], accuracy)
