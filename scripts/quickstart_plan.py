"""What the quickstart runs: sizes from a small fixed table, and six training runs in order.

Two models, a mixture of experts and its dense twin, learn the old domain; each is then continued on the new one twice,
with replay of the old and without. Shares follow paper 1 (arXiv 2503.05029): continuing takes half the steps of
pre-training, replay is 30 % of a batch. Sizes and rates are ours, chosen on two CPU cores.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from hf_moe_cpt.modeling.presets_cpt_moe import PRESETS


REPLAY_RATIO = 0.3
HELD_OUT_FRACTION = 0.05
CHARACTERS_PER_TOKEN = 4  # a little more than a tokenizer of this size needs, so that no text is seen twice
LEAST_CHARACTERS, MOST_CHARACTERS = 2_000_000, 40_000_000  # of a domain
LEAST_STEPS = 4
MOE, DENSE = "moe", "dense"


@dataclass(frozen=True)
class Scale:
    """Sizes of all runs with models of one size."""

    steps: int  # optimizer steps of pre-training
    batch_size: int  # blocks of an optimizer step
    max_length: int  # tokens of a block
    learning_rate: float  # peak; the schedule's constant rate is midway to the minimum, a tenth of the peak
    vocab_size: int  # of the tokenizer
    held_out_tokens: int  # of each domain, evaluated EVALUATIONS times in a run


# By the last part of a preset's name.
SCALES = {
    "tiny": Scale(
        steps=360, batch_size=8, max_length=128, learning_rate=3e-3, vocab_size=4096, held_out_tokens=12_288
    ),
    "2b": Scale(
        steps=600, batch_size=16, max_length=1024, learning_rate=3e-4, vocab_size=16_384, held_out_tokens=131_072
    ),
}
DENSE_TWINS = {"tiny": "dense-tiny", "2b": "dense-570m"}
MOE_PRESETS = tuple(name for name in PRESETS if not name.startswith("dense"))
EVALUATIONS = 3  # of held-out text during a run, the last one at its end
# Warm-up is longer than the paper's 1 %, which would be two steps. No anneal: the run ends in the constant phase.
PRETRAINING_PHASES = {
    "warmup_fraction": 0.05,
    "cooldown_fraction": 0.70,
    "constant_fraction": 0.25,
    "anneal_fraction": 0.0,
}


@dataclass(frozen=True)
class Stage:
    """One training run."""

    name: str
    model: str  # MOE or DENSE
    steps: int
    starts_from: str | None = None  # name of the stage whose model is continued; None: a fresh model
    replay_ratio: float = 0.0

    @property
    def is_pretraining(self) -> bool:
        """Whether the stage learns the old domain from scratch."""
        return self.starts_from is None


@dataclass(frozen=True)
class Plan:
    """Everything that decides the numbers of a quickstart, besides the machine and the text."""

    preset: str
    dense_preset: str
    scale: Scale
    seed: int
    device: str
    data_dir: str | None

    @property
    def stages(self) -> list[Stage]:
        """The six runs in the order in which they are made."""
        steps = self.scale.steps
        first = [Stage(f"{model}-pretrained", model, steps) for model in (MOE, DENSE)]
        percent = f"{100 * REPLAY_RATIO:.0f}"
        return first + [
            Stage(f"{stage.model}-{name}", stage.model, steps // 2, stage.name, ratio)
            for stage in first
            for name, ratio in ((f"replay-{percent}", REPLAY_RATIO), ("no-replay", 0.0))
        ]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step."""
        return self.scale.batch_size * self.scale.max_length

    @property
    def characters_per_domain(self) -> int:
        """Text to collect, so that pre-training sees none of it twice."""
        held_in = CHARACTERS_PER_TOKEN * self.scale.steps * self.tokens_per_step
        return min(max(round(held_in / (1 - HELD_OUT_FRACTION)), LEAST_CHARACTERS), MOST_CHARACTERS)

    def settings(self) -> dict[str, Any]:
        """The plan as JSON can hold it, to recognise an unfinished quickstart as the same."""
        return dataclasses.asdict(self)


def make_plan(preset: str, steps: int | None, seed: int, device: str, data_dir: str | None) -> Plan:
    """The plan for a preset; steps: of pre-training, None for the table's.

    Raises ValueError for a preset that is no mixture of experts, or too few steps.
    """
    preset = preset.replace("-2b-tiny", "-tiny")  # the long names that CptMoeConfig.from_preset takes too
    if preset not in MOE_PRESETS:
        raise ValueError(f"--preset {preset!r} is no mixture of experts: choose one of {', '.join(MOE_PRESETS)}.")
    if steps is not None and steps < LEAST_STEPS:
        raise ValueError(f"--steps {steps} leaves nothing to continue from: give at least {LEAST_STEPS}.")
    size = preset.rpartition("-")[2]
    scale = SCALES[size] if steps is None else dataclasses.replace(SCALES[size], steps=steps)
    return Plan(preset, DENSE_TWINS[size], scale, seed, device, data_dir)
