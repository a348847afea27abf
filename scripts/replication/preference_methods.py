"""Compare preference methods in a world where the true reward of every answer is known.

A tiny policy is trained on the world's base policy in seconds; every preset of RainbowPO and a few ablations start
from it, on the same pairs, for the same number of steps, and may choose among the same number of settings: learning
rates times strengths of their beta, judged by true reward on prompts of their own ("tune"). The choice is then trained
afresh with other seeds and judged on other prompts ("test"). Differences to another method are taken seed by seed, on
the same pairs: intervals tell the spread of pairs, data order and samples, in one world and from one policy. What is
measured and how: docs/preference_world.md.

The betas of the presets are meant for answers of hundreds of tokens. Here a method's beta is strength * (SQUARE_FACTOR
for square links) / (1 with length normalisation, else tokens of a mean base answer), so that one strength asks the
same of a method with sums as of one with means.

KL is that of whole answers, policy against reference, in nats: a Monte Carlo mean over the policy's samples of the sum
over their tokens of the exact divergence between the two next-token distributions. It has the same expectation as the
sum of log-ratios and varies less.

Letters: N sequences or prompts, S samples of each, R rows = N * S, P tokens of a prompt (the same for all), T tokens
of the longest answer, V vocabulary. An answer ends with its first EOS; what follows it is padding. Sampling inverts
the cumulative distribution at uniform numbers that are a function of (seed, row, position), so an answer depends on
its model, prompt and row alone. Source: ours.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    set_seed,
)
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_program, run_script
from hf_moe_cpt.data.preference_world import (
    EOS_ID,
    PAD_ID,
    PreferencePairs,
    PreferenceWorld,
    answer_lengths,
    token_counts,
)
from hf_moe_cpt.data.random import derive_seed
from hf_moe_cpt.evaluation.resumable import ResumableFolder
from hf_moe_cpt.evaluation.statistics import preference_accuracy
from hf_moe_cpt.machine import check_names, machine_facts
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.reports.plots import plotting
from hf_moe_cpt.reports.tables import text_table
from hf_moe_cpt.scripts.replication.sweep import (
    SCALE_OF_SWEEP,
    Column,
    Crew,
    Estimate,
    Records,
    check_request,
    open_folder,
    quiet_process,
    t_interval,
    table_row,
    write_page,
    write_results,
)
from hf_moe_cpt.trainers.rainbowpo.presets import PRESETS, preset_settings
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import RainbowPOConfig
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_trainer import RainbowPOTrainer


ARCHITECTURES = ("llama", "cpt_moe")
ADAM_BETAS = (0.9, 0.98)
FIRST_SUPERVISED_INDEX = 10**9  # far from the indices of pairs, so that no answer is both imitated and judged


@dataclass(frozen=True)
class PolicyPlan:
    """Size and supervised training of the policy that all methods start from."""

    architecture: str = "llama"
    hidden_size: int = 48
    num_layers: int = 2
    steps: int = 800
    batch_size: int = 64
    learning_rate: float = 3e-3

    def config(self, world: PreferenceWorld) -> PretrainedConfig:
        """An untrained model of this size over the world's vocabulary. Raises ValueError for an unknown name."""
        sizes = {
            "vocab_size": len(world.vocabulary),
            "hidden_size": self.hidden_size,
            "intermediate_size": 2 * self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": None,
            "eos_token_id": EOS_ID,
            "pad_token_id": PAD_ID,
        }
        if self.architecture == "llama":
            return LlamaConfig(**sizes)
        if self.architecture == "cpt_moe":
            return CptMoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, num_shared_experts=0)
        raise ValueError(f"--architecture {self.architecture!r} is unknown: choose one of {', '.join(ARCHITECTURES)}.")


def train_policy(world: PreferenceWorld, plan: PolicyPlan, folder: Path, seed: int = 0) -> list[float]:
    """Imitate the base policy on prompts of the training split, save model and tokenizer to `folder`.

    Returns the cross-entropy of each step, in nats per answer token.
    """
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(plan.config(world))
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=ADAM_BETAS, weight_decay=0.0)
    warmup = max(1, plan.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (plan.steps - step) / max(1, plan.steps - warmup))
    )
    losses = []
    for step in range(plan.steps):
        begin = FIRST_SUPERVISED_INDEX + step * plan.batch_size
        indices = np.arange(begin, begin + plan.batch_size)
        prompts = torch.from_numpy(world.prompts(indices))
        answers = torch.from_numpy(world.base_completions(indices))
        labels = answers.masked_fill(~answer_mask(answers), -100)
        logits = answer_logits(model, prompts, answers)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    model.save_pretrained(folder)
    world.tokenizer().save_pretrained(folder)
    return losses


def load_policy(folder: Path) -> PreTrainedModel:
    """The saved model in float32, in evaluation mode, from this machine alone."""
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()


def answer_mask(answers: Tensor) -> Tensor:
    """(N, T) bool: tokens up to and with the first EOS of each row."""
    counts = torch.from_numpy(token_counts(answers.numpy()))
    return torch.arange(answers.shape[1]) < counts[:, None]


def answer_logits(model: PreTrainedModel, prompts: Tensor, answers: Tensor) -> Tensor:
    """(N, T, V) logits that predict each answer token. Rows are right-padded, which a causal model does not see."""
    tokens = torch.cat([prompts, answers], dim=1)
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
    return logits[:, prompts.shape[1] - 1 : -1].float()


@torch.no_grad()
def answer_log_probabilities(
    model: PreTrainedModel, prompts: Tensor, answers: Tensor, batch_size: int = 2048
) -> Tensor:
    """(N, T, V) log-probabilities of every token at every place of each answer, in nats."""
    parts = [
        answer_logits(model, prompts[begin : begin + batch_size], answers[begin : begin + batch_size]).log_softmax(-1)
        for begin in range(0, len(prompts), batch_size)
    ]
    return torch.cat(parts)


def taken(log_probabilities: Tensor, answers: Tensor) -> Tensor:
    """(N,) log-probability of each whole answer, in nats: the sum over its tokens, EOS included."""
    chosen = log_probabilities.gather(2, answers[:, :, None])[:, :, 0]
    return (chosen * answer_mask(answers)).sum(dim=1)


def uniform_numbers(seed: int, purpose: str, num_rows: int, num_columns: int) -> Tensor:
    """(rows, columns) in [0, 1), one stream per row: the same numbers however many rows there are."""
    key = derive_seed(seed, purpose)
    raw = [
        np.random.Philox(key=key, counter=[0, row, 0, 0]).random_raw(num_columns).astype(np.uint64) >> np.uint64(11)
        for row in range(num_rows)
    ]
    return torch.from_numpy(np.stack(raw).astype(np.float64) * 2.0**-53)


@torch.no_grad()
def sample_answers(model: PreTrainedModel, prompts: Tensor, uniforms: Tensor, batch_size: int = 4096) -> Tensor:
    """(N, T) answers at temperature 1, cut after T tokens; padding after EOS.

    uniforms: (N, T) in [0, 1), one for each token of each answer.
    """
    pieces = zip(prompts.split(batch_size), uniforms.split(batch_size), strict=True)
    return torch.cat([_sample_batch(model, *piece) for piece in pieces])


def _sample_batch(model: PreTrainedModel, prompts: Tensor, uniforms: Tensor) -> Tensor:
    answers = torch.full(uniforms.shape, PAD_ID)
    going = torch.arange(len(prompts))  # rows that have no EOS yet: the others leave the batch
    tokens, cache = prompts, None
    for place in range(uniforms.shape[1]):
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cumulative = output.logits[:, -1].double().softmax(-1).cumsum(-1)
        threshold = uniforms[going, place, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=cumulative.shape[1] - 1)
        answers[going, place] = drawn
        stays = drawn != EOS_ID
        if not stays.any():
            break
        going, tokens, cache = going[stays], drawn[stays, None], output.past_key_values
        cache.batch_select_indices(stays.nonzero()[:, 0])
    return answers


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
        scale = {name: v for name, v in dataclasses.asdict(self.scale).items() if name not in SCALE_OF_SWEEP}
        parts = {"world": dataclasses.asdict(self.world), "policy": dataclasses.asdict(self.policy), "scale": scale}
        flat = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
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
    check_names("--methods", [method], METHODS)
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


MIN_EFFECTIVE_SAMPLES = 20  # below it the best policy is not estimated any more but guessed
FRONTIER_SLOPES = np.concatenate([[0.0], np.geomspace(0.05, 20.0, 60)])  # nats per unit of reward


@dataclass(frozen=True)
class JudgedSamples:
    """Answers of one model with their true rewards, `samples` rows for each prompt, one prompt after the other."""

    prompts: np.ndarray  # (R, P)
    answers: Tensor  # (R, T)
    rewards: np.ndarray  # (R,)
    samples: int


class WorldExam:
    """Held-out prompts, the reference's samples on them and clean pairs: what every policy is measured against."""

    def __init__(
        self,
        world: PreferenceWorld,
        reference: PreTrainedModel,
        split: str,
        *,
        samples: int,
        max_tokens: int,
        num_pairs: int,
    ) -> None:
        self.world, self.reference, self.split = world, reference, split
        self.samples, self.max_tokens, self.num_pairs = samples, max_tokens, num_pairs

    @cached_property
    def reference_samples(self) -> JudgedSamples:
        """Independent of the samples of any policy."""
        return self.sample(self.reference, self.samples, "reference", seed=0)

    @cached_property
    def pairs(self) -> PreferencePairs:
        """Pairs of base answers ordered by the truth, without those that are equally good."""
        pairs = self.world.clean().pairs(np.arange(self.num_pairs), self.split)
        apart = pairs.reward_chosen > pairs.reward_rejected
        return PreferencePairs(*(column[apart] for column in pairs))

    @cached_property
    def reference_sums(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the clean pairs' answers under the reference."""
        return self._pair_sums(self.reference)

    def sample(self, model: PreTrainedModel, samples: int, purpose: str, seed: int) -> JudgedSamples:
        """`samples` answers to each prompt of the split, judged; drawn with the numbers of (purpose, seed)."""
        prompts = np.repeat(self.world.distinct_prompts(self.split), samples, axis=0)
        uniforms = uniform_numbers(seed, purpose, len(prompts), self.max_tokens)
        answers = sample_answers(model, torch.from_numpy(prompts), uniforms)
        return JudgedSamples(prompts, answers, self.world.rewards(prompts, answers.numpy()), samples)

    def grade(self, model: PreTrainedModel, seed: int) -> dict[str, float]:
        """Every measure of a policy, means over prompts and samples; of one ambiguity level with `/level` behind.

        seed: of the policy's samples; those of the reference are always the same.
        """
        judged = self.sample(model, self.samples, "policy", seed)
        divergence = sequence_divergence(model, self.reference, torch.from_numpy(judged.prompts), judged.answers)
        levels = self.world.ambiguity(judged.prompts)
        grades = {
            "reward": float(judged.rewards.mean()),
            "win_rate": win_rate(judged, self.reference_samples),
            "kl": float(divergence.mean()),
            "length": float(token_counts(judged.answers.numpy()).mean()),
            "unfinished": float(1 - answer_lengths(judged.answers.numpy())[1].mean()),
        }
        for level in sorted(set(self.world.ambiguity_levels)):
            rows = levels == level
            if rows.any():
                grades |= {
                    f"reward/{level:g}": float(judged.rewards[rows].mean()),
                    f"kl/{level:g}": float(divergence.numpy()[rows].mean()),
                }
        return grades | self.accuracies(model)

    def accuracies(self, model: PreTrainedModel) -> dict[str, float]:
        """Share of clean pairs that the policy orders rightly: by its probability, per token, by its log-ratio."""
        chosen, rejected = self._pair_sums(model)
        lengths = token_counts(self.pairs.chosen), token_counts(self.pairs.rejected)
        plain = preference_accuracy(chosen, rejected, *lengths)
        ratio = preference_accuracy(chosen, rejected, *lengths, *self.reference_sums)
        return {
            "accuracy": plain.plain.value,
            "accuracy_per_token": plain.length_normalized.value,
            "accuracy_of_ratio": ratio.plain.value,
        }

    def _pair_sums(self, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        prompts = torch.from_numpy(self.pairs.prompts)
        sides = (torch.from_numpy(side) for side in (self.pairs.chosen, self.pairs.rejected))
        first, second = (taken(answer_log_probabilities(model, prompts, side), side) for side in sides)
        return first, second


def sequence_divergence(
    policy: PreTrainedModel, reference: PreTrainedModel, prompts: Tensor, answers: Tensor
) -> Tensor:
    """(R,) sum over an answer's tokens of KL(policy || reference) of the next token, in nats, at least 0.

    answers: (R, T) samples of the policy; then the mean over rows estimates the KL of whole answers of up to T tokens.
    """
    log_policy = answer_log_probabilities(policy, prompts, answers)
    log_reference = answer_log_probabilities(reference, prompts, answers)
    per_token = (log_policy.exp() * (log_policy - log_reference)).sum(dim=-1)
    return (per_token * answer_mask(answers)).sum(dim=1)


def win_rate(policy: JudgedSamples, reference: JudgedSamples) -> float:
    """Share of (policy sample, reference sample) pairs of the same prompt that the policy wins, ties as halves."""
    ours = policy.rewards.reshape(-1, policy.samples, 1)
    theirs = reference.rewards.reshape(-1, 1, reference.samples)
    return float(((ours > theirs) + 0.5 * (ours == theirs)).mean())


def best_frontier(rewards: np.ndarray, slopes: Sequence[float] = FRONTIER_SLOPES) -> list[tuple[float, float]]:
    """(KL in nats, reward) of the best policies there are, one for each slope, both means over prompts.

    rewards: (N, S) true rewards of the reference's samples. Among all policies with the same mean KL to the reference,
    weights proportional to reference * exp(slope * reward) have the largest mean reward. Slopes at which fewer than
    MIN_EFFECTIVE_SAMPLES of a prompt's samples carry the weight, on average over prompts, are left out.
    """
    points = []
    for slope in slopes:
        tilted = slope * (rewards - rewards.max(axis=1, keepdims=True))
        weights = np.exp(tilted)
        weights /= weights.sum(axis=1, keepdims=True)
        if (1 / np.square(weights).sum(axis=1)).min() < MIN_EFFECTIVE_SAMPLES:
            break
        kl = (weights * np.log(np.clip(weights * rewards.shape[1], 1e-300, None))).sum(axis=1)
        points.append((float(kl.mean()), float((weights * rewards).sum(axis=1).mean())))
    return points


class Worker:
    """Trains and grades the runs of one comparison, from the policy saved in `policy_folder`."""

    def __init__(self, comparison: Comparison, policy_folder: Path) -> None:
        self.comparison, self.policy_folder = comparison, policy_folder
        self.tokenizer = comparison.world.tokenizer()
        self._exams: dict[str, WorldExam] = {}
        self._pairs: dict[int, datasets.Dataset] = {}

    @cached_property
    def reference(self) -> PreTrainedModel:
        """The policy before any preference training."""
        return load_policy(self.policy_folder)

    def exam(self, split: str) -> WorldExam:
        """The examination on the prompts of a split."""
        if split not in self._exams:
            scale = self.comparison.scale
            samples = scale.tune_samples if split == "tune" else scale.test_samples
            limits = {"samples": samples, "max_tokens": scale.max_tokens, "num_pairs": scale.eval_pairs}
            self._exams[split] = WorldExam(self.comparison.world, self.reference, split, **limits)
        return self._exams[split]

    def training_pairs(self, seed: int) -> datasets.Dataset:
        """The labelled pairs of a seed, the same for all methods."""
        if seed not in self._pairs:
            world, scale = self.comparison.world, self.comparison.scale
            begin = self.comparison.first_pair(seed)
            indices = np.arange(begin, begin + scale.num_pairs)
            answers = None
            if self.comparison.pairs_from == "reference":
                prompts = torch.from_numpy(world.prompts(indices))
                shape = (len(indices), scale.max_tokens)
                first, second = (
                    sample_answers(self.reference, prompts, uniform_numbers(seed, side, *shape)).numpy()
                    for side in ("first answer", "second answer")
                )
                answers = first, second
            self._pairs[seed] = world.dataset(world.pairs(indices, completions=answers))
        return self._pairs[seed]

    def carry_out(self, run: Run) -> dict[str, Any]:
        """Train and grade; the record holds the settings, the grades, the last training metrics and seconds."""
        settings = self.comparison.trainer_settings(run)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of arguments that TRL sets by default
            warnings.filterwarnings("ignore", "beta=.* is of the scale of")  # of long answers
            trainer = RainbowPOTrainer(
                load_policy(self.policy_folder),
                args=_arguments(settings, folder),
                train_dataset=self.training_pairs(run.seed),
                processing_class=self.tokenizer,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        trained = time.perf_counter()
        grades = self.exam(run.split).grade(trainer.model.eval(), run.seed)
        return {
            "method": run.method,
            "split": run.split,
            "seed": run.seed,
            "strength": run.strength,
            "settings": settings,
            "grades": grades,
            "training": trainer.state.log_history[-1],
            "seconds": {"training": trained - started, "grading": time.perf_counter() - trained},
        }


def _arguments(settings: dict[str, Any], folder: str) -> RainbowPOConfig:
    """Plain single-precision training on the CPU that saves nothing; the schedule is the same for all."""
    return RainbowPOConfig(
        output_dir=folder,
        **settings,
        per_device_eval_batch_size=256,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


BASELINE = "rainbowpo"  # whose reward the others' are compared with, if it is among the methods
DIFFERENCE = f"reward_over_{BASELINE}"
LEGEND = (
    "means over held-out prompts, 95 % intervals over seeds; * KL on prompts of one ambiguity; accuracy: log-ratio on "
    "clean pairs"
)
REFERENCE_ROW, BEST_ROW = "(reference)", "(best possible)"


def choose(runs: Sequence[Run], records: Records) -> Run | None:
    """The run of a grid with the largest true reward; of equal ones the first. None if all failed."""
    finished = [run for run in runs if "grades" in records[run.name]]
    return max(finished, key=lambda run: records[run.name]["grades"]["reward"], default=None)


def method_rows(
    methods: Sequence[str], final_runs: Mapping[str, Sequence[Run]], records: Records
) -> list[dict[str, Any]]:
    """One row for each method, best reward first, failed ones last: settings, and each grade as (mean, half width).

    final_runs: of each method, none if every run of its grid failed.
    """
    rows = []
    of_baseline = _rewards(final_runs.get(BASELINE, ()), records)
    for method in methods:
        runs = final_runs[method]
        failed = [records[run.name]["error"] for run in runs if "error" in records[run.name]]
        finished = [records[run.name] for run in runs if "grades" in records[run.name]]
        if failed or not finished:
            rows.append({"method": method, "error": failed[0] if failed else "every run of its grid failed"})
            continue
        row = {
            "method": method,
            "learning_rate": runs[0].learning_rate,
            "strength": runs[0].strength,
            "beta": finished[0]["settings"]["beta"],
            "seeds": len(finished),
        }
        row |= {name: t_interval([record["grades"][name] for record in finished]) for name in finished[0]["grades"]}
        rewards = _rewards(runs, records)
        if method != BASELINE and rewards.keys() == of_baseline.keys():
            row[DIFFERENCE] = t_interval([rewards[seed] - of_baseline[seed] for seed in rewards])
        rows.append(row | {"seconds": statistics.fmean(record["seconds"]["training"] for record in finished)})
    return sorted(rows, key=lambda row: -row["reward"].mean if "reward" in row else math.inf)


def _rewards(runs: Sequence[Run], records: Records) -> dict[int, float]:
    finished = [run for run in runs if "grades" in records[run.name]]
    return {run.seed: records[run.name]["grades"]["reward"] for run in finished}


_COLUMNS: tuple[Column, ...] = (
    ("true reward", "reward", 1, 2),
    (f"reward minus {BASELINE}'s", DIFFERENCE, 1, 2),
    ("win rate %", "win_rate", 100, 1),
    ("KL nats", "kl", 1, 2),
    ("length tokens", "length", 1, 1),
    ("unfinished %", "unfinished", 100, 1),
    ("accuracy %", "accuracy_of_ratio", 100, 1),
)


def comparison_table(results: Mapping[str, Any]) -> str:
    """The rows as text, between what the policy was before and the best that any policy can reach."""
    reference = {name: Estimate(value, None) for name, value in results["reference"].items()}
    by_level = [(f"KL {name[3:]}*", name, 1, 2) for name in reference if name.startswith("kl/")]
    columns = [*_COLUMNS[:4], *by_level, *_COLUMNS[4:]]
    settings = {"learning rate": "learning_rate", "strength": "strength", "beta": "beta"}
    best = {"reward": Estimate(results["best_reward"], None)}
    rows = [{"method": REFERENCE_ROW} | reference, *results["rows"], {"method": BEST_ROW} | best]
    failed = [f"{row['method']} failed: {row['error']}" for row in results["rows"] if "error" in row]
    return "\n".join([text_table([table_row(row, columns, settings) for row in rows]), LEGEND, *failed])


def csv_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each method, each grade as its mean and, under `name_95`, half its interval."""
    lines = []
    for row in results["rows"]:
        line: dict[str, Any] = {}
        for name, value in row.items():
            line |= {name: value[0], f"{name}_95": value[1]} if isinstance(value, (tuple, list)) else {name: value}
        lines.append(line)
    reference = {"method": REFERENCE_ROW, **results["reference"]}
    return [*lines, reference, {"method": BEST_ROW, "reward": results["best_reward"]}]


def draw(path: Path, results: Mapping[str, Any]) -> None:
    """Reward against KL beside the best reward that is possible at each KL, and rewards as bars; needs matplotlib."""
    pyplot = plotting(path)
    rows = [row for row in results["rows"] if "reward" in row]
    if pyplot is None or not rows:
        return
    figure, (plane, bars) = pyplot.subplots(1, 2, figsize=(15, 7), width_ratios=(3, 2), layout="constrained")
    plane.plot(*zip(*results["frontier"], strict=True), color="black", label="best policies there are")
    plane.axhline(results["best_reward"], color="black", linestyle=":", label="best answer to every prompt")
    plane.scatter([0], [results["reference"]["reward"]], marker="*", s=140, color="black", label="reference")
    colors = pyplot.get_cmap("tab20").colors
    for number, row in enumerate(rows):
        color = colors[number % len(colors)]
        tried = [point for point in results["tuning"] if point["method"] == row["method"]]
        plane.scatter([p["kl"] for p in tried], [p["reward"] for p in tried], s=14, color=color, alpha=0.45)
        errors = {"xerr": row["kl"].half_width or 0, "yerr": row["reward"].half_width or 0}
        plane.errorbar(row["kl"].mean, row["reward"].mean, **errors, fmt="o", color=color, label=row["method"])
    plane.set(xlabel="KL to the reference (nats per answer)", ylabel="mean true reward")
    plane.set_title("dots: the settings that each method tried, on other prompts")
    figure.legend(*plane.get_legend_handles_labels(), fontsize=8, ncols=8, loc="outside lower center")
    plane.grid(alpha=0.3)
    places = range(len(rows), 0, -1)
    widths = [row["reward"].half_width or 0 for row in rows]
    bars.barh(places, [row["reward"].mean for row in rows], xerr=widths, color=colors[0], error_kw={"elinewidth": 1})
    bars.set_yticks(places, [row["method"] for row in rows])
    bars.axvline(results["reference"]["reward"], color="black", linestyle="--")
    bars.set(xlabel="mean true reward, 95 % interval over seeds (dashed: reference)")
    bars.grid(axis="x", alpha=0.3)
    bars.set_axisbelow(True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


PAIRS_FROM = ("base", "reference")


@dataclass
class CompareArguments:
    """The world, the methods and how much work to spend; the rest is in `SETTINGS`."""

    setting: str = HfArg(default="small", help=f"Size of the comparison: {', '.join(SETTINGS)}.")
    methods: list[str] = HfArg(default_factory=lambda: list(METHODS), help=f"Any of: {', '.join(METHODS)}.")
    seeds: int | None = HfArg(
        default=None,
        help="Final runs of each method; "
        + ", ".join(f"{scale.seeds} ({name})" for name, scale in SETTINGS.items())
        + " if unset. More can be added later.",
    )
    output_dir: str = HfArg(
        default="runs/preference-methods",
        help="Folder for the policy, a record of each run, results and plot; finished runs are kept.",
    )
    workers: int = HfArg(default=2, help="Processes with one thread each; 1: this process does it all.")
    architecture: str = HfArg(default="llama", help=f"Of the policy: {', '.join(ARCHITECTURES)}.")
    ambiguity: float = HfArg(
        default=0.9, help="Of half of the prompts, in [0, 1]: by how much less their answers differ."
    )
    length_bias: float = HfArg(default=0.1, help="What the annotator's score gains by a token more.")
    label_temperature: float = HfArg(default=1.0, help="Noise of the annotator's labels; 0: none.")
    pairs_from: str = HfArg(
        default="base", help="Who wrote the answers of the pairs: base (policy) or reference (model)."
    )
    world_seed: int = HfArg(default=0, help="Another number, another world and another policy.")


def compare_main(argv: Sequence[str]) -> None:
    """Train the policy, run the grids, run the choices with other seeds, write and print what came out."""
    (args,) = parse_arguments((CompareArguments,), argv, program="preference_methods.py", description=__doc__)
    comparison = make_comparison(args)
    folder = open_folder(args.output_dir, comparison.fingerprint())
    quiet_process()
    make_policy(comparison, folder.root)
    results = compare(comparison, list(dict.fromkeys(args.methods)), folder, args.workers)
    write_results(folder.root, results, csv_rows(results), draw, comparison_table)


def make_comparison(args: CompareArguments) -> Comparison:
    """What the arguments ask for. Raises ValueError for what cannot be run, before anything is."""
    check_request(args, SETTINGS, METHODS)
    check_names("--pairs_from", [args.pairs_from], PAIRS_FROM)
    scale = SETTINGS[args.setting]
    if args.seeds is not None:
        scale = dataclasses.replace(scale, seeds=args.seeds)
    world = PreferenceWorld(
        seed=args.world_seed,
        ambiguity_levels=(0.0, args.ambiguity),
        length_bias=args.length_bias,
        label_temperature=args.label_temperature,
    )
    policy = PolicyPlan(args.architecture, steps=POLICY_STEPS[args.setting])
    policy.config(world)
    return Comparison(world, policy, scale, args.pairs_from)


def make_policy(comparison: Comparison, root: Path) -> None:
    """Train the policy that all runs start from, if it is not there; it appears whole or not at all."""
    if (root / "policy").is_dir():
        return
    partial = root / ".policy.partial"
    shutil.rmtree(partial, ignore_errors=True)
    print(f"training the policy for {comparison.policy.steps} steps", flush=True)
    train_policy(comparison.world, comparison.policy, partial, seed=comparison.world.seed)
    os.replace(partial, root / "policy")


def compare(comparison: Comparison, methods: Sequence[str], folder: ResumableFolder, workers: int) -> dict[str, Any]:
    """All runs that are not finished, then everything that is printed, as JSON can hold it."""
    grids = {method: comparison.tuning_runs(method) for method in methods}
    total = sum(len(grid) + comparison.scale.seeds for grid in grids.values())
    given = comparison, folder.root / "policy"
    bar = tqdm(total=total, unit="run", dynamic_ncols=True)
    with Crew(folder, workers, Worker, *given) as crew, bar:
        records = crew.records([run for grid in grids.values() for run in grid], bar)
        chosen = {method: choose(grid, records) for method, grid in grids.items()}
        final = {method: comparison.final_runs(run) if run else [] for method, run in chosen.items()}
        records |= crew.records([run for runs in final.values() for run in runs], bar)
        bar.set_description("done")
    exam = Worker(*given).exam("test")
    samples = comparison.scale.frontier_samples
    judged = exam.sample(exam.reference, samples, "frontier", seed=0)
    graded = {run.name: run for grid in grids.values() for run in grid if "grades" in records[run.name]}
    return {
        "comparison": comparison.fingerprint(),
        "machine": machine_facts(torch.device("cpu"), commit=None),
        "rows": method_rows(methods, final, records),
        "reference": exam.grade(exam.reference, seed=0),
        "best_reward": float(comparison.world.best_rewards(judged.prompts).mean()),
        "frontier": best_frontier(judged.rewards.reshape(-1, samples)),
        "tuning": [
            {"method": run.method, "learning_rate": run.learning_rate, "strength": run.strength}
            | records[name]["grades"]
            for name, run in graded.items()
        ],
    }


PROGRAM, GUIDE = "preference_methods.py", "[the preference world](../../preference_world.md)"
PROGRAMS = {"compare": compare_main, "page": lambda argv: write_page(argv, PROGRAM, GUIDE, comparison_table)}


def main(argv: Sequence[str] | None = None) -> None:
    """The program that the first word names: `compare`, the first, or `page`."""
    run_program(PROGRAMS, argv)


if __name__ == "__main__":
    run_script(main)
