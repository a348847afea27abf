"""Dictionaries of the form that `analyse_traces` returns, drawn at random, so that reports need no model."""

from typing import Any

import numpy as np


WORDS = (" the", "der ", "\n", "def", " <b>&", "\t", "</script>", '"', "é")
CHECKPOINTS = ("start", "german 40 %", "german 0 %")
DOMAINS = ("english", "german")


def random_analysis(
    num_layers: int = 3,
    num_experts: int = 6,
    experts_per_token: int = 2,
    checkpoints: tuple[str, ...] = CHECKPOINTS,
    steps: int = 40,
    seed: int = 0,
) -> dict[str, Any]:
    """Numbers in the true ranges; measures agree with the loads they belong to. Arrays stand for nested lists."""
    generator = np.random.default_rng(seed)
    K, E, L = experts_per_token, num_experts, num_layers
    analysis: dict[str, Any] = {
        "format": 1,
        "checkpoints": [
            {"name": name, "model": f"models/{name}", "step": 100 * i, "num_tokens": 5000}
            for i, name in enumerate(checkpoints)
        ],
        "domains": list(DOMAINS),
        "layers": [{"name": f"layers.{i}.experts", "num_experts": E, "experts_per_token": K} for i in range(L)],
        "training": [_run(generator, L, K / E, steps)],
        "skipped": {} if K > 1 else {"coactivation": "every token visits one expert"},
    }
    parts = ["metrics", "vocabulary_specialization", "domain_specialization", "saturation", "top_tokens"]
    parts += ["expert_parallel"] + (["coactivation", "coactivation_change"] if K > 1 else [])
    analysis |= {part: {} for part in parts}
    for place, name in enumerate(checkpoints):
        loads = {domain: _loads(generator, L, E, K) for domain in DOMAINS}
        analysis["domain_specialization"][name] = np.stack([K * load for load in loads.values()], 1)
        loads["all"] = np.mean(list(loads.values()), axis=0)
        analysis["metrics"][name] = {text: _measures(generator, load, K) for text, load in loads.items()}
        sides = {side: generator.uniform(K / E, 1, L) for side in ("input", "output")}
        analysis["vocabulary_specialization"][name] = sides | {"average": "occurrences"}
        if place:
            analysis["saturation"][name] = {text: generator.uniform(K / E, 1, L) for text in loads}
        if K > 1:
            matrix = generator.random((L, E, E), np.float32) * 2 * (K - 1) / (E - 1)
            matrix[:, range(E), range(E)] = 1
            analysis["coactivation"][name] = matrix
            first = analysis["coactivation"][checkpoints[0]]
            analysis["coactivation_change"][name] = np.abs(matrix - first).mean((1, 2))
        analysis["top_tokens"][name] = [[_tokens(generator) for _ in range(E)] for _ in range(L)]
        analysis["expert_parallel"][name] = _parallel(generator, L, E)
    if K == 1:
        analysis |= {"coactivation": None, "coactivation_change": None}
    return analysis


def _loads(generator: np.random.Generator, num_layers: int, num_experts: int, experts_per_token: int) -> np.ndarray:
    loads = np.minimum(generator.dirichlet(np.full(num_experts, 4.0), num_layers), 1 / experts_per_token)
    return loads / loads.sum(1, keepdims=True)


def _measures(generator: np.random.Generator, load: np.ndarray, experts_per_token: int) -> dict[str, Any]:
    num_layers, num_experts = load.shape
    of_load = {"load": load, "mri": load.max(1) * experts_per_token, "mri_normalized": load.max(1) * num_experts}
    of_load["load_entropy"] = -(load * np.log(np.maximum(load, 1e-300))).sum(1) / np.log(num_experts)
    of_load |= {"load_cv": load.std(1) / load.mean(1), "dead_experts": (load == 0).sum(1)}
    return of_load | {f"router_{name}": generator.random(num_layers) for name in ("entropy", "confidence")}


def _tokens(generator: np.random.Generator) -> list[dict[str, Any]]:
    shares = sorted(generator.random(4), reverse=True)
    return [
        {"token": str(generator.choice(WORDS)), "share": float(share), "count": int(generator.integers(3, 999))}
        for share in shares
    ]


def _parallel(generator: np.random.Generator, num_layers: int, num_experts: int) -> dict[str, Any]:
    placement = [[expert % 2 for expert in range(num_experts)] for _ in range(num_layers)]
    slowdowns = generator.uniform(1, 2, (2, num_layers))
    sides = [{"max_load": slowdown / 2, "slowdown": slowdown} for slowdown in slowdowns]
    return {"num_ranks": 2, "contiguous": sides[0], "suggested": sides[1] | {"placement": placement}}


def _run(generator: np.random.Generator, num_layers: int, ideal: float, steps: int) -> dict[str, Any]:
    layers = ideal * generator.uniform(1, 2, (num_layers, steps))
    curve = {"steps": list(range(1, steps + 1)), "layers": layers, "mean": layers.mean(0).tolist(), "ideal": ideal}
    return {"name": "run", **curve, "shift_step": steps // 2, "recovery_step": 5}
