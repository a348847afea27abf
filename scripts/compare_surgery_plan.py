"""What the comparison of surgery methods trains: sizes, methods with their settings, and the runs that they make.

A cell is a seed of one architecture: a world of its own, a model that has read it ("before"), one that never read what
is to be forgotten ("retrained"), and one run of each method from the model before. Methods share steps and rows of a
step, and each had the same number of settings to choose from: learning rates times strengths, judged by validation
questions about worlds of their own. A strength multiplies the weights of the forget losses, or what a method has
instead. Source: ours; the objective and the weights of "paper" are those of arXiv 2409.13054.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig, PretrainedConfig

from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.trainers.surgery.surgery_config import SurgeryConfig
from hf_moe_cpt.trainers.surgery.surgery_presets import preset_settings


BEFORE, RETRAINED = "before", "retrained"
FORGET_WEIGHTS = ("unlearn_weight", "obsolete_weight")
TUNING_SEED = 0  # final runs have the seeds from 1 on
GPU_REAL_CHARACTERS = 12_000_000


@dataclass(frozen=True)
class Method:
    """A preset, what differs from it, and the fields that a strength multiplies."""

    preset: str
    changes: dict[str, Any]
    scaled: tuple[str, ...]


METHODS = {
    "paper": Method("paper", {}, FORGET_WEIGHTS),
    "safe": Method("safe", {}, FORGET_WEIGHTS),
    "descent-kl": Method("paper", dict.fromkeys(FORGET_WEIGHTS, 0.0), ("retain_weight",)),
    # alone in its objective, a weight changes nothing under Adam
    "ascent-only": Method(
        "paper", {"update_weight": 0.0, "retain_weight": 0.0, "allow_unanchored": True}, ("learning_rate",)
    ),
    "npo-retain": Method("paper", {"forget_loss": "npo"}, FORGET_WEIGHTS),
}


@dataclass(frozen=True)
class Scale:
    """Sizes of everything that one setting trains and asks."""

    # --- the world and the models that read it ---
    subjects: int  # of each of the five groups
    kinds: tuple[str, ...]
    forms: tuple[str, ...]  # documents of a subject
    changed_facts: int  # of the eight of each updated subject
    keep_hubs: bool  # whether retain holds the texts about cities, firms and schools too
    real_characters: int  # of real text read beside the bench; 0: none
    vocab_size: int
    max_length: int
    epochs: int  # in which the texts of the bench are read; real text is read once
    batch_size: int
    training_rate: float
    models: dict[str, dict[str, Any]]  # fields of the configuration, by architecture
    seeds: dict[str, int]  # final runs of a method, by architecture
    # --- the operation ---
    steps: int
    rows: int  # of each set in a step
    eval_steps: int  # between two measurements of "safe", whose stop rules need them
    eval_rows: int  # of each set in such a measurement
    learning_rates: tuple[float, ...]
    strengths: tuple[float, ...]
    # --- the questions ---
    max_questions: int  # of each set and kind
    max_documents: int  # of each set
    relearn_steps: int  # the 2k of "no faster in k steps than the retrained model in 2k"
    relearn_every: int
    relearn_rate: float


_LLAMA = {"num_hidden_layers": 2, "hidden_size": 192, "intermediate_size": 256, "num_attention_heads": 4}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 1, "num_shared_experts": 1}
_LARGE = {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12}
_LARGE_MOE = {
    "num_hidden_layers": 12,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 512,
}

SETTINGS = {
    "small": Scale(
        subjects=12,
        kinds=("person",),
        forms=("quiz",) * 4,
        changed_facts=6,
        keep_hubs=False,
        real_characters=0,
        vocab_size=1600,
        max_length=256,
        epochs=11,
        batch_size=4,
        training_rate=2e-3,
        models={"llama": _LLAMA | {"initializer_range": 0.05}, "cpt_moe": _LLAMA | _EXPERTS},
        seeds={"llama": 3, "cpt_moe": 3},
        steps=120,
        rows=2,
        eval_steps=20,
        eval_rows=32,
        learning_rates=(5e-4, 1e-3, 2e-3, 4e-3),
        strengths=(1.0, 3.0, 10.0),
        max_questions=200,
        max_documents=64,
        relearn_steps=40,
        relearn_every=10,
        relearn_rate=5e-4,
    ),
    "gpu": Scale(
        subjects=24,
        kinds=("person", "place", "product", "rule"),
        forms=(*("quiz",) * 6, *("article",) * 2),
        changed_facts=6,
        keep_hubs=True,
        real_characters=GPU_REAL_CHARACTERS,
        vocab_size=16_384,
        max_length=512,
        epochs=8,
        batch_size=32,
        training_rate=6e-4,
        models={"llama": _LARGE, "cpt_moe": _LARGE_MOE},
        seeds={"llama": 3, "cpt_moe": 1},
        steps=240,
        rows=16,
        eval_steps=40,
        eval_rows=64,
        learning_rates=(1.5e-4, 3e-4, 6e-4, 1.2e-3),
        strengths=(1.0, 3.0, 10.0),
        max_questions=600,
        max_documents=300,
        relearn_steps=40,
        relearn_every=10,
        relearn_rate=1.5e-4,
    ),
}

Choices = dict[str, dict[str, tuple[float, float]]]  # (learning rate, strength) by architecture and method

# What `--tune` chose, each architecture for itself.
_SMALL: Choices = {
    "llama": {
        "paper": (1e-3, 3.0),
        "safe": (2e-3, 3.0),
        "descent-kl": (4e-3, 3.0),
        "ascent-only": (4e-3, 1.0),
        "npo-retain": (2e-3, 3.0),
    },
    "cpt_moe": {
        "paper": (2e-3, 1.0),
        "safe": (2e-3, 1.0),
        "descent-kl": (4e-3, 1.0),
        "ascent-only": (4e-3, 10.0),
        "npo-retain": (4e-3, 1.0),
    },
}


def _scaled(choices: Choices, share: float) -> Choices:
    """The same strengths with a share of the learning rates."""
    return {
        architecture: {name: (share * rate, strength) for name, (rate, strength) in methods.items()}
        for architecture, methods in choices.items()
    }


# The gpu setting was not tuned: it takes the small one's choices, in the ratio of the rates of training.
_SHARE = SETTINGS["gpu"].training_rate / SETTINGS["small"].training_rate
CHOSEN: dict[str, Choices] = {"small": _SMALL, "gpu": _scaled(_SMALL, _SHARE)}


@dataclass(frozen=True)
class Run:
    """One model that is examined: of a method, or BEFORE or RETRAINED, which have neither rate nor strength."""

    method: str
    architecture: str
    seed: int
    split: str = "test"  # of the questions: "validation" for the choice of settings
    learning_rate: float = 0.0
    strength: float = 1.0

    @property
    def name(self) -> str:
        """Also its file in the folder, without the ending."""
        start = f"{self.architecture}-seed{self.seed}-{self.split}-{self.method}"
        return f"{start}-lr{self.learning_rate:g}-strength{self.strength:g}" if self.method in METHODS else start

    @property
    def cell(self) -> str:
        """Architecture and seed, which have their own models before and retrained."""
        return f"{self.architecture}-seed{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """Everything that decides the numbers, besides which methods, architectures and seeds are asked for."""

    setting: str
    scale: Scale
    device: str  # "cpu" or "cuda"
    first_seed: int = TUNING_SEED + 1  # of the final runs

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same in a folder that is taken up again, as JSON can hold it."""
        scale = dataclasses.asdict(self.scale)
        for name in ("seeds", "learning_rates", "strengths"):  # they say which runs there are, not what a run is
            del scale[name]
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in scale.items()}
        return {"setting": self.setting, "device": self.device} | lists

    def tuning_runs(self, architecture: str, method: str) -> list[Run]:
        """The grid of a method."""
        return [
            Run(method, architecture, TUNING_SEED, "validation", rate, strength)
            for strength in self.scale.strengths
            for rate in self.scale.learning_rates
        ]

    def final_runs(self, architecture: str, method: str, rate: float = 0.0, strength: float = 1.0) -> list[Run]:
        """Runs of one method, or of BEFORE or RETRAINED, with the seeds that no choice has seen."""
        seeds = range(self.first_seed, self.first_seed + self.scale.seeds[architecture])
        return [Run(method, architecture, seed, "test", rate, strength) for seed in seeds]

    def surgery_settings(self, run: Run) -> dict[str, Any]:
        """Fields of `SurgeryConfig` that make this run its method; where and on what it runs is left open."""
        method, scale = METHODS[run.method], self.scale
        defaults = {field.name: field.default for field in dataclasses.fields(SurgeryConfig)}
        settings = preset_settings(method.preset) | method.changes | {"learning_rate": run.learning_rate}
        for name in method.scaled:
            settings[name] = run.strength * settings.get(name, defaults[name])
        sets = ("unlearn", "obsolete", "update", "retain", "neighbour")
        return settings | {
            **{f"{name}_batch_size": scale.rows for name in sets},
            "max_steps": scale.steps,
            "eval_steps": scale.eval_steps,  # only where a preset measures at all
            "eval_rows": scale.eval_rows,
            "max_length": scale.max_length,
            "gradient_checkpointing": False,  # the same numbers in less time
            "seed": run.seed,
        }


def model_config(comparison: Comparison, architecture: str, vocab_size: int) -> PretrainedConfig:
    """The configuration of an untrained model; token 0 ends a text and token 1 pads."""
    kind = {"llama": LlamaConfig, "cpt_moe": CptMoeConfig}[architecture]
    return kind(
        **comparison.scale.models[architecture],
        vocab_size=vocab_size,
        max_position_embeddings=2 * comparison.scale.max_length,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
