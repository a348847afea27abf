"""Which methods the preference world compares, with which settings, and which training runs that makes.

Every method trains from the same policy on the same pairs for the same number of steps, and may choose among the same
number of settings: learning rates times strengths of its beta, judged by true reward on prompts of their own ("tune").
The choice is then trained afresh with other seeds and judged on other prompts ("test").

The betas of the presets are meant for answers of hundreds of tokens. Here a method's beta is
strength * (SQUARE_FACTOR for square links) / (1 with length normalisation, else tokens of a mean base answer), so
that one strength asks the same of a method with sums as of one with means. Source: ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_moe_cpt.data.permutation import derive_seed
from hf_moe_cpt.data.preference_world import PreferenceWorld
from hf_moe_cpt.scripts.compare_preference_policy import PolicyPlan
from hf_moe_cpt.trainers.rainbowpo.presets import PRESETS, preset_settings


ABLATIONS: dict[str, dict[str, Any]] = {
    "rainbowpo-no-ln": {"length_normalization": False},
    "rainbowpo-no-phi": {"contextual_scaling": "none"},
    "rainbowpo-no-mixing": {"mixing_alpha": 1.0},  # the reference in full; its share of the home advantage is then 0
    "rainbowpo-no-margin": {"home_advantage": 0.0},
}
METHODS = (*PRESETS, *ABLATIONS)
TUNING_SEED = 0
SQUARE_FACTOR = 1 / 3  # a square link is content at a margin of 1 / (2 beta), where the logistic one still pulls
LENGTH_PENALTY = 0.1  # R-DPO's, in units of the logit per token; the preset's 0.01 is for differences of 100 tokens
LLM_SCALE = ("learning_rate", "beta")


@dataclass(frozen=True)
class Scale:
    """Budget of every run, and how many runs there are."""

    num_pairs: int  # of a training set
    epochs: int
    batch_size: int  # pairs of an optimizer step
    learning_rates: tuple[float, ...]
    strengths: tuple[float, ...]
    seeds: int  # of the final runs
    tune_samples: int  # of each prompt
    test_samples: int
    frontier_samples: int
    eval_pairs: int  # before ties are left out
    max_tokens: int = 24  # of a sample, about twice the longest answer of the base policy

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return self.epochs * (self.num_pairs // self.batch_size)


SETTINGS = {
    "small": Scale(1536, 2, 64, (1e-3, 2e-3), (1 / 3, 1.0), 4, 24, 48, 1024, 400),
    "normal": Scale(4096, 3, 64, (5e-4, 1e-3, 2e-3), (0.1, 1 / 3, 1.0, 3.0), 8, 64, 128, 4096, 1000),
}
POLICY_STEPS = {"small": 800, "normal": 2000}


@dataclass(frozen=True)
class Run:
    """One training run and its examination."""

    method: str
    learning_rate: float
    strength: float
    seed: int
    split: str  # "tune" or "test": the prompts that it is judged on

    @property
    def name(self) -> str:
        """Also its file in the folder, without the ending."""
        return f"{self.method}-{self.split}-lr{self.learning_rate:g}-strength{self.strength:.3g}-seed{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """Everything that decides the numbers, besides which methods and how many seeds are asked for."""

    world: PreferenceWorld
    policy: PolicyPlan
    scale: Scale
    pairs_from: str  # "base" or "reference"

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same in a folder that is taken up again, as JSON can hold it, by flat names."""
        scale = dataclasses.asdict(self.scale)
        for name in ("learning_rates", "strengths", "seeds"):  # they say which runs there are, not what a run is
            del scale[name]
        parts = {"world": dataclasses.asdict(self.world), "policy": dataclasses.asdict(self.policy), "scale": scale}
        flat = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        flat["world.ambiguity_levels"] = list(self.world.ambiguity_levels)
        return flat | {"pairs_from": self.pairs_from}

    def first_pair(self, seed: int) -> int:
        """Index of the first training pair of a seed: no pair is in two training sets."""
        return seed * self.scale.num_pairs

    def tuning_runs(self, method: str) -> list[Run]:
        """The grid of a method."""
        return [
            Run(method, rate, strength, TUNING_SEED, "tune")
            for strength in self.scale.strengths
            for rate in self.scale.learning_rates
        ]

    def final_runs(self, chosen: Run) -> list[Run]:
        """The chosen settings with seeds that the choice has not seen."""
        seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + self.scale.seeds)
        return [dataclasses.replace(chosen, seed=seed, split="test") for seed in seeds]

    def trainer_settings(self, run: Run) -> dict[str, Any]:
        """Fields of `RainbowPOConfig` that make this run its method."""
        settings = method_settings(run.method, run.strength, self.world.mean_base_tokens)
        return settings | {
            "learning_rate": run.learning_rate,
            "max_steps": self.scale.steps,
            "per_device_train_batch_size": self.scale.batch_size,
            "seed": derive_seed("trainer", run.seed) % 2**31,
        }


def method_settings(method: str, strength: float, mean_tokens: float) -> dict[str, Any]:
    """Switches of a preset or ablation with its beta for answers of `mean_tokens` tokens; without a learning rate.

    A home advantage that is a constant keeps the preset's value per token; ODPO's keeps its product with beta.
    """
    check_methods([method])
    changes = ABLATIONS.get(method, {})
    preset = preset_settings(method if method in PRESETS else "rainbowpo") | changes
    settings = {name: value for name, value in preset.items() if name not in LLM_SCALE}
    per_token = settings.get("length_normalization", True)
    square = settings.get("link", "logistic").startswith("square")
    beta = strength * (SQUARE_FACTOR if square else 1.0) / (1.0 if per_token else mean_tokens)
    source = settings.get("home_advantage_from", "constant")
    if source == "score":
        settings["home_advantage"] = preset["home_advantage"] * preset["beta"] / beta
    elif source == "length":
        settings["home_advantage"] = LENGTH_PENALTY / beta
    elif not per_token:
        settings["home_advantage"] = preset["home_advantage"] * mean_tokens
    return settings | {"beta": beta}


def check_methods(methods: Sequence[str]) -> None:
    """Raise ValueError for the first name that is no method."""
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"--methods {method!r} is unknown: choose from {', '.join(METHODS)}.")
