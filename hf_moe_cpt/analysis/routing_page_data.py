"""What of an analysis goes into the page: numbers to five digits, and of the largest parts the part that can be read.

The page stays small enough for a browser and a mail: with 64 layers of 256 experts the whole co-activation of one
checkpoint alone is four million numbers. What is left out is said in a list of notes that the page shows; the files
beside the page hold everything. Letters: L MoE layers, E experts, C checkpoints. Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


DIGITS = 5
MAX_MATRIX_NUMBERS = 400_000  # of all co-activation matrices together
LEAST_MATRIX_EXPERTS, MOST_MATRIX_EXPERTS = 16, 64
MAX_TOKENS = 120_000  # entries of the lists of tokens, all experts together
MAX_STEPS = 500  # points of a training curve

Analysis = Mapping[str, Any]


def page_data(analysis: Analysis) -> dict[str, Any]:
    """The analysis as the page embeds it: the same keys and nesting, but for what follows.

    coactivation: of each layer an (n, n) block, its experts in "coactivation_experts", (L, n) in ascending order.
    top_tokens: entries [place in "tokens", share, count]. training: points thinned. notes: sentences on what is not
    there. NaN becomes None.
    """
    notes: list[str] = []
    data = dict(analysis)
    data["coactivation_experts"], data["coactivation"] = _blocks(analysis, notes)
    data["tokens"], data["top_tokens"] = _tokens(analysis, notes)
    data["training"] = [_thinned(run, notes) for run in analysis.get("training") or []]
    return rounded(data) | {"notes": list(dict.fromkeys(notes))}


def rounded(value: Any, digits: int | None = DIGITS) -> Any:
    """Nested lists and dictionaries with floats to so many significant digits (None: all); NaN and infinity are None.

    Arrays and tensors become lists.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(value) if digits is None else float(f"{value:.{digits}g}")
    if isinstance(value, list | tuple):
        return [rounded(part, digits) for part in value]
    if isinstance(value, dict | Mapping):
        return {str(name): rounded(part, digits) for name, part in value.items()}
    return rounded(value.tolist(), digits) if hasattr(value, "tolist") else value


def _blocks(analysis: Analysis, notes: list[str]) -> tuple[list[list[int]] | None, dict[str, list[Any]] | None]:
    """For each layer the experts with the strongest ties in any checkpoint, and the matrices among them."""
    matrices = analysis.get("coactivation")
    if not matrices:
        return None, None
    num_layers = len(analysis["layers"])
    fitting = math.isqrt(MAX_MATRIX_NUMBERS // (num_layers * len(matrices)))
    size = min(MOST_MATRIX_EXPERTS, max(LEAST_MATRIX_EXPERTS, fitting))
    chosen: list[list[int]] = []
    blocks: dict[str, list[Any]] = {name: [] for name in matrices}
    for layer in range(num_layers):
        whole = {name: np.asarray(matrix[layer], dtype=float) for name, matrix in matrices.items()}
        experts = _strongest(list(whole.values()), size)
        chosen.append(experts.tolist())
        for name, matrix in whole.items():
            blocks[name].append([[float(f"{v:.3g}") for v in row] for row in matrix[np.ix_(experts, experts)]])
    widest = max(layer["num_experts"] for layer in analysis["layers"])
    if widest > size:
        notes.append(
            f"Of up to {widest} experts of a layer the co-activation maps show the {size} with the strongest ties; "
            "analysis.json or coactivation.npz hold all."
        )
    return chosen, blocks


def _strongest(matrices: Sequence[np.ndarray], size: int) -> np.ndarray:
    """The `size` experts with the greatest P(j | i) to or from another one in any of the matrices, ascending."""
    ties = np.zeros(matrices[0].shape[0])
    for matrix in matrices:
        others = np.where(np.eye(len(matrix), dtype=bool), 0.0, np.nan_to_num(matrix))
        ties = np.maximum(ties, np.maximum(others.max(0), others.max(1)))
    return np.sort(np.argsort(-ties, kind="stable")[:size])


def _tokens(analysis: Analysis, notes: list[str]) -> tuple[list[str], dict[str, list[Any]]]:
    """A list of all tokens that are named, and the lists of the experts with places in it."""
    named = analysis.get("top_tokens") or {}
    lists = [tokens for layers in named.values() for experts in layers for tokens in experts]
    longest = max(map(len, lists), default=0)
    kept = min(longest, max(1, MAX_TOKENS // max(1, len(lists))))
    if kept < longest:
        notes.append(f"Of each expert's {longest} tokens the page shows {kept}; tokens.csv holds all.")
    place: dict[str, int] = {}
    short = {
        name: [
            [
                [
                    [place.setdefault(entry["token"], len(place)), float(f"{entry['share']:.3g}"), entry["count"]]
                    for entry in tokens[:kept]
                ]
                for tokens in experts
            ]
            for experts in layers
        ]
        for name, layers in named.items()
    }
    return list(place), short


def _thinned(run: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """A training curve with the same points left in every layer: extremes of the mean in equal runs."""
    mean = run["mean"]
    if len(mean) <= MAX_STEPS:
        return dict(run)
    num_runs = MAX_STEPS // 4
    edges = [i * len(mean) // num_runs for i in range(num_runs + 1)]
    kept: set[int] = set()
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        inside = range(begin, end)
        kept |= {begin, end - 1, min(inside, key=mean.__getitem__), max(inside, key=mean.__getitem__)}
    order = sorted(kept)
    notes.append(
        f"Of the {len(mean):,} points of {run['name']} the page shows {len(order)}, lowest and highest means among "
        "them; training.csv holds all."
    )
    return {
        **run,
        "steps": [run["steps"][i] for i in order],
        "mean": [mean[i] for i in order],
        "layers": [[layer[i] for i in order] for layer in run["layers"]],
    }
