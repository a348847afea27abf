"""Test the claims of RainbowPO in worlds where the true reward of every answer is known.

A small policy imitates the base policy of a world. Cells, which are settings of the objective on some pairs, start
from it and train on the same pairs in the same order; along each run the policy is examined. The endpoint of a run is
the mean true reward at a divergence of 1, 2 and 4 nats from the reference, between two checkpoints linearly, so that
no method wins by going further. A claim is a contrast of cells, compared world by world, seed by seed, prompt by
prompt: interval and p-value come from a bootstrap that draws the (world, seed) runs and, crossed with them, the
prompts of each world; p-values of all claims are corrected together (Holm). More: docs/preference_world.md.

The numbers of a preset are meant for answers of hundreds of tokens. A strength s stands for beta = s * plain_beta *
(SQUARE_FACTOR for square links) / (1 with length normalisation, else tokens of a mean base answer); plain_beta is 1,
and the presets' 10 where answers are long. Kept is what a number says in the logit: the home advantage times beta,
also (1 - alpha) of it where it is mixed, and an SFT weight over beta. Learning rate, strength and R-DPO's penalty are
tuned: from the best place of DPO or LN-DPO, which begin in the middle of a grid, to the best neighbour until the best
lies inside, on prompts and pairs of their own; a cell whose best is still at the edge is marked.

With --minutes no run begins after that time; what is there is judged, and the same command goes on. The factorial
comes first, then the doses of length bias and ambiguity, then the rest.

The loss is `preference_terms`, the one of `RainbowPOTrainer`, on batches whose reference values were computed once; a
test holds this loop to the trainer.

KL is that of whole answers, policy against reference, in nats: a Monte Carlo mean over the policy's samples of the sum
over their tokens of the exact divergence between the two next-token distributions.

Letters: N sequences or prompts, R rows, P tokens of a prompt (the same for all), T tokens of the longest answer, V
vocabulary, U runs of a cell. An answer ends with its first EOS; what follows it is padding. Sampling inverts the
cumulative distribution at uniform numbers that are a function of (seed, row, position), so an answer depends on its
model, prompt and row alone. Source: ours.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, set_seed
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_program, run_script
from hf_moe_cpt.data.preference_world import EOS_ID, PAD_ID, PreferenceWorld, token_counts
from hf_moe_cpt.data.random import derive_seed
from hf_moe_cpt.data.rejection_sampling import SelectionRule, select_pairs
from hf_moe_cpt.evaluation.resumable import ResumableFolder
from hf_moe_cpt.machine import check_names, machine_facts
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.reports import text_table
from hf_moe_cpt.scripts.replication.sweep import (
    Crew,
    Place,
    Records,
    Walk,
    check_request,
    end_of,
    open_folder,
    plotting,
    quiet_process,
    tell_rest,
    walk,
    write_page,
    write_results,
)
from hf_moe_cpt.trainers.rainbowpo.losses import (
    LINKS,
    Pair,
    dispersion_scale_of,
    length_advantage,
    mallows_phi,
    normalized_entropy,
    preference_terms,
    score_advantage,
)
from hf_moe_cpt.trainers.rainbowpo.rainbowpo_config import preset_settings


PLAN = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
ARCHITECTURES = ("llama", "cpt_moe")
ADAM_BETAS = (0.9, 0.98)
FIRST_SUPERVISED_INDEX = 10**9  # far from the indices of pairs, so that no answer is both imitated and judged


@dataclass(frozen=True)
class PolicyPlan:
    """Size and supervised training of the policy that all methods start from."""

    architecture: str = "llama"
    hidden_size: int = 48
    num_layers: int = 2
    num_heads: int = 2
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
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "max_position_embeddings": 512,
            "bos_token_id": None,
            "eos_token_id": EOS_ID,
            "pad_token_id": PAD_ID,
        }
        if self.architecture == "llama":
            return LlamaConfig(**sizes)
        if self.architecture == "cpt_moe":
            return CptMoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, num_shared_experts=0)
        raise ValueError(f"--architecture {self.architecture!r} is unknown: choose one of {', '.join(ARCHITECTURES)}.")


def half_precision(device: str) -> torch.autocast:
    """Training forwards in bfloat16 on a GPU, float32 on a CPU; weights are float32 on both."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def train_policy(
    world: PreferenceWorld, plan: PolicyPlan, folder: Path, seed: int = 0, device: str = "cpu"
) -> list[float]:
    """Imitate the base policy on prompts of the training split, save model and tokenizer to `folder`.

    Returns the cross-entropy of each step, in nats per answer token.
    """
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(plan.config(world)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=ADAM_BETAS, weight_decay=0.0)
    warmup = max(1, plan.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (plan.steps - step) / max(1, plan.steps - warmup))
    )
    losses = []
    for step in range(plan.steps):
        begin = FIRST_SUPERVISED_INDEX + step * plan.batch_size
        indices = np.arange(begin, begin + plan.batch_size)
        prompts = torch.from_numpy(world.prompts(indices)).to(device)
        answers = torch.from_numpy(world.base_completions(indices)).to(device)
        labels = answers.masked_fill(~answer_mask(answers), -100)
        with half_precision(device):
            logits = answer_logits(model, prompts, answers)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
    model.save_pretrained(folder)
    world.tokenizer().save_pretrained(folder)
    return torch.stack(losses).tolist()


def load_policy(folder: Path) -> PreTrainedModel:
    """The saved model in float32, in evaluation mode, from this machine alone."""
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()


def answer_mask(answers: Tensor) -> Tensor:
    """(N, T) bool: tokens up to and with the first EOS of each row."""
    ended = answers == EOS_ID
    return ended.cumsum(1) - ended.long() == 0


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
    pieces = zip(prompts.split(batch_size), uniforms.to(prompts.device).split(batch_size), strict=True)
    return torch.cat([_sample_batch(model, *piece) for piece in pieces])


def _sample_batch(model: PreTrainedModel, prompts: Tensor, uniforms: Tensor) -> Tensor:
    answers = torch.full(uniforms.shape, PAD_ID, device=prompts.device)
    going = torch.arange(len(prompts), device=prompts.device)  # rows that have no EOS yet: the others leave the batch
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


MIN_EFFECTIVE_SAMPLES = 20  # below it the best policy is not estimated any more but guessed
FRONTIER_SLOPES = np.concatenate([[0.0], np.geomspace(0.05, 20.0, 60)])  # nats per unit of reward


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


# ---- cells: what is compared ----

SQUARE_FACTOR = 1 / 3  # a square link is content at a margin of 1 / (2 beta), where the logistic one still pulls
MARGIN_LOGIT = 0.75  # beta h (1 - alpha) of RainbowPO
PENALTY = 0.05  # of R-DPO, logits a token, where its tuning begins
FACTORS = ("LN", "mixing", "margin", "phi")
LENGTH_BIAS, AMBIGUITY = 0.1, 0.5  # logits a token; of half of the prompts, whose answers differ by so much less
VARIANTS = {  # of a world and its policy
    "main": {},
    "clear": {"ambiguity": 0.0},
    "unbiased": {"length_bias": 0.0},
    "biased": {"length_bias": 0.3},
    "weak": {"policy_share": 0.25},
}


@dataclass(frozen=True)
class Cell:
    """Settings of the objective on some pairs. tuned_as: the cell whose tuned numbers it takes, by default its own."""

    name: str
    settings: tuple[tuple[str, Any], ...]  # overrides of switches, in the unit of logits; see `switches_of`
    variant: str = "main"
    epochs: int = 0  # 0: those of the scale
    pairs: str = "base"  # or "rs", "rs+"
    tuned_as: str = ""

    def like(self, name: str, **changes: Any) -> Cell:
        """The same with other data, on this cell's tuned numbers."""
        return replace(self, name=name, tuned_as=self.tuned_as or self.name, **changes)


def _preset(name: str, label: str = "", **changes: Any) -> Cell:
    """A preset's cell; home advantage and SFT weight as they stand in its logit."""
    preset = preset_settings(name)
    settings = {key: preset[key] for key in preset if key not in ("learning_rate", "beta", "dispersion_scale")}
    if settings["home_advantage_from"] != "length":
        settings["home_advantage"] *= preset["beta"]
    settings["sft_weight"] /= preset["beta"]
    return Cell(label or name, tuple((settings | changes).items()))


def factorial_name(levels: Sequence[bool]) -> str:
    """The name of a cell of the factorial."""
    return " ".join(f"{'+' if is_on else '-'}{factor}" for factor, is_on in zip(FACTORS, levels, strict=True))


def _factorial() -> list[Cell]:
    cells = []
    for levels in itertools.product((False, True), repeat=4):
        ln, mixing, margin, phi = levels
        changes = {"length_normalization": ln, "mixing_alpha": 0.25 if mixing else 1.0, "mix_home_advantage": False}
        changes |= {"home_advantage": MARGIN_LOGIT * margin, "contextual_scaling": "mallows" if phi else "none"}
        cells.append(_preset("rainbowpo", factorial_name(levels), **changes))
    return cells


def all_cells() -> dict[str, Cell]:
    """Every cell by its name."""
    cells = {cell.name: cell for cell in _factorial()}
    dpo, ln_dpo = (cells[factorial_name((ln, False, False, False))] for ln in (False, True))
    rainbow = cells[factorial_name((True, True, True, True))]
    no_phi = cells[factorial_name((True, True, True, False))]
    more = [_preset("simpo"), _preset("r-dpo"), _preset("odpo")]
    for link in LINKS:
        if link != "logistic":
            more.append(replace(ln_dpo, name=f"ln-dpo, {link}", settings=(*ln_dpo.settings, ("link", link))))
    more.append(replace(ln_dpo, name="ln-dpo, SFT", settings=(*ln_dpo.settings, ("sft_weight", 0.01))))
    for variant in ("unbiased", "biased"):
        more += [cell.like(f"{cell.name}, {variant}", variant=variant) for cell in (dpo, ln_dpo)]
    more += [cell.like(f"{cell.name}, clear", variant="clear") for cell in (rainbow, no_phi)]
    no_mixing = cells[factorial_name((True, False, True, True))]
    more += [cell.like(f"{cell.name}, weak", variant="weak") for cell in (rainbow, no_mixing)]
    for cell in (rainbow, ln_dpo):
        more += [cell.like(f"{cell.name}, {epochs} epochs", epochs=epochs) for epochs in (1, 3)]
    more += [cell.like(f"{cell.name}, {how}", pairs=how) for cell in (dpo, ln_dpo) for how in ("rs", "rs+")]
    return cells | {cell.name: cell for cell in more}


CELLS = all_cells()
FACTORIAL = [cell.name for cell in _factorial()]
DPO, LN_DPO, RAINBOW = (PLAN["names"][name] for name in ("DPO", "LN-DPO", "RainbowPO"))
PILOTS = {False: DPO, True: LN_DPO}  # where the tuning of the others begins, by length normalisation


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, or a check of this world, as a contrast of cells at TARGET nats.

    kind: "more", the contrast is above 0; "less", below; "no gain", at most the margin; "nothing", within it.
    """

    text: str
    weights: Mapping[str, float]
    kind: str


def effect(*factors: str, where: Mapping[str, bool] | None = None) -> dict[str, float]:
    """Weights of a main effect (one factor) or interaction (more), among the cells with the levels of `where`."""
    chosen = [
        dict(zip(FACTORS, levels, strict=True))
        for levels in itertools.product((False, True), repeat=4)
        if all(dict(zip(FACTORS, levels, strict=True))[name] == level for name, level in (where or {}).items())
    ]
    share = 2 / len(chosen)
    return {
        factorial_name(list(levels.values())): share * math.prod(1 if levels[name] else -1 for name in factors)
        for levels in chosen
    }


def difference(first: str, second: str, *others: str) -> dict[str, float]:
    """first - second, or (first - second) - (third - fourth)."""
    weights: dict[str, float] = {}
    for name, sign in zip((first, second, *others), (1.0, -1.0, -1.0, 1.0), strict=False):
        weights[name] = weights.get(name, 0.0) + sign
    return weights


def _claim(says: str, kind: str, **contrast: Any) -> Claim:
    if "effect" in contrast:
        return Claim(says, effect(*contrast["effect"], where=contrast.get("where")), kind)
    cells = [name.partition(",") for name in contrast["cells"]]
    return Claim(
        says, difference(*(PLAN["names"].get(name, name) + comma + rest for name, comma, rest in cells)), kind
    )


CLAIMS = tuple(_claim(**claim) for claim in PLAN["claims"])


def switches_of(cell: Cell, strength: float, penalty: float, mean_tokens: float, plain_beta: float) -> dict[str, Any]:
    """Switches of the objective for answers of `mean_tokens` tokens.

    A constant home advantage of a cell is that of the logit, so h = advantage / beta; R-DPO's is `penalty` for each
    token; an SFT weight is one of preference loss at beta 1. plain_beta: beta of strength 1 per token.
    """
    settings = dict(cell.settings)
    is_square = settings["link"].startswith("square")
    beta = strength * plain_beta * (SQUARE_FACTOR if is_square else 1.0)
    beta /= 1.0 if settings["length_normalization"] else mean_tokens
    logit = penalty if settings["home_advantage_from"] == "length" else settings["home_advantage"]
    return settings | {"beta": beta, "home_advantage": logit / beta, "sft_weight": settings["sft_weight"] * beta}


# ---- runs ----

NATS = (1.0, 2.0, 4.0)
TARGET = 2.0  # nats, at which settings are chosen and claims are tested
AXES = {"rate": 2.0, "strength": 3.0, "penalty": 3.0}  # factor of a step of the grid
TUNING_SEED, PILOT_ROUNDS = 0, 6


@dataclass(frozen=True)
class Scale:
    """Budget of every run, and how many there are."""

    num_pairs: int
    epochs: int
    batch_size: int
    worlds: int
    seeds: int  # of each world
    rounds: int  # in which a grid may grow
    samples: int  # of each prompt
    checkpoints: int
    policy: PolicyPlan
    world: tuple[tuple[str, Any], ...] = (("num_requests", 28),)  # 228 test prompts
    rate: float = 1e-3  # in the middle of the grid
    plain_beta: float = 1.0
    max_tokens: int = 24
    frontier_samples: int = 512


def _scale(policy: Mapping[str, Any], world: Mapping[str, Any] | None = None, **fields: Any) -> Scale:
    given = {} if world is None else {"world": tuple(world.items())}
    return Scale(policy=PolicyPlan(**policy), **given, **fields)


SETTINGS = {name: _scale(**fields) for name, fields in PLAN["settings"].items()}


@dataclass(frozen=True)
class PolicyRun:
    """The training of a world's policy."""

    world: int
    variant: str
    method: str = "policy"

    @property
    def name(self) -> str:
        """Also its file and folder."""
        return f"policy-{self.world}-{_slug(self.variant)}"


@dataclass(frozen=True)
class Run:
    """A cell trained on the pairs of a seed of a world, examined on a split. place: steps from the grid's middle."""

    cell: Cell
    world: int
    seed: int
    split: str
    place: tuple[tuple[str, int], ...] = ()

    @property
    def method(self) -> str:
        """For the bar."""
        return self.cell.name

    @property
    def name(self) -> str:
        """Also its file in the folder."""
        place = "".join(f"-{axis}{step:+d}" for axis, step in self.place)
        return f"{_slug(self.cell.name)}-{self.split}-w{self.world}-s{self.seed}{place}"


@dataclass(frozen=True)
class FrontierRun:
    """`frontier_of` of the first world."""

    name: str = "frontier"
    method: str = "frontier"


def _slug(name: str) -> str:
    for sign, word in (("+", "p"), ("-", "m")):
        name = name.replace(sign, word)
    return "_".join(part for part in "".join(c if c.isalnum() else " " for c in name).split())


def _policy_variant(variant: str) -> str:
    return variant if variant in ("clear", "weak") else "main"  # a length bias is the annotator's


@dataclass
class Batch:
    """Pairs with what does not change in training, on the device."""

    prompts: Tensor
    answers: Pair  # (N, T) each
    lengths: Pair
    scores: Pair
    ref_logps: Pair
    entropy: Tensor

    def take(self, rows: Tensor) -> Batch:
        """Some of the pairs."""
        pairs = {name: Pair(*(side[rows] for side in getattr(self, name)))
                 for name in ("answers", "lengths", "scores", "ref_logps")}  # fmt: skip
        return Batch(prompts=self.prompts[rows], entropy=self.entropy[rows], **pairs)


class Worker:
    """Trains policies and cells and examines them."""

    def __init__(self, scale: Scale, root: Path, device: str) -> None:
        self.scale, self.root, self.device = scale, root, device
        torch.set_float32_matmul_precision("high")  # TF32 where there is any
        self._policies: dict[tuple[int, str], PreTrainedModel] = {}
        self._batches: dict[tuple[Any, ...], Batch] = {}

    def world(self, number: int, variant: str) -> PreferenceWorld:
        """A world with its annotator."""
        changes = VARIANTS[variant]
        levels = (0.0, changes.get("ambiguity", AMBIGUITY))
        bias = changes.get("length_bias", LENGTH_BIAS)
        return PreferenceWorld(seed=number, ambiguity_levels=levels, length_bias=bias, **dict(self.scale.world))

    def carry_out(self, run: PolicyRun | Run | FrontierRun) -> dict[str, Any]:
        """Train; the record says what came out."""
        if isinstance(run, Run):
            return self.trained(run)
        if isinstance(run, FrontierRun):
            return {"frontier": frontier_of(self)}
        folder, partial = self.root / run.name, self.root / f".{run.name}.partial"
        plan = self.scale.policy
        plan = replace(plan, steps=round(plan.steps * VARIANTS[run.variant].get("policy_share", 1.0)))
        shutil.rmtree(partial, ignore_errors=True)
        losses = train_policy(self.world(run.world, run.variant), plan, partial, run.world, self.device)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        return {"loss": float(np.mean(losses[-20:]))}

    def policy(self, world: int, variant: str) -> PreTrainedModel:
        """The reference of a world."""
        key = world, _policy_variant(variant)
        if key not in self._policies:
            self._policies[key] = load_policy(self.root / PolicyRun(*key).name).to(self.device)
        return self._policies[key]

    # ---- pairs ----

    def batch(self, run: Run) -> Batch:
        """The labelled pairs of a run, the same for all cells of its kind; no pair is in two seeds."""
        key = run.world, run.cell.variant, run.seed, run.cell.pairs
        if key not in self._batches:
            while len(self._batches) > 3:
                self._batches.pop(next(iter(self._batches)))
            self._batches[key] = self._labelled(run)
        return self._batches[key]

    def _labelled(self, run: Run) -> Batch:
        world, reference = self.world(run.world, run.cell.variant), self.policy(run.world, run.cell.variant)
        begin = run.seed * self.scale.num_pairs
        indices = np.arange(begin, begin + self.scale.num_pairs)
        if run.cell.pairs == "base":
            pairs = world.pairs(indices)
            prompts, answers = pairs.prompts, (pairs.chosen, pairs.rejected)
            scores = Pair(*(torch.from_numpy(s).float() for s in (pairs.score_chosen, pairs.score_rejected)))
        else:
            prompts, answers, scores = self._selected(world, reference, indices, run)
        sides = [torch.from_numpy(side).to(self.device) for side in answers]
        prompts = torch.from_numpy(prompts).to(self.device)
        logps, entropies = [], []
        for side in sides:
            log_probabilities = answer_log_probabilities(reference, prompts, side)
            logps.append(taken(log_probabilities, side))
            entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
            entropies.append((entropy * answer_mask(side)).sum(1))
        lengths = Pair(*(answer_mask(side).sum(1).float() for side in sides))
        entropy = normalized_entropy(Pair(*entropies), lengths, reference.config.vocab_size)
        scores = Pair(*(score.to(self.device) for score in scores))
        return Batch(prompts, Pair(*sides), lengths, scores, Pair(*logps), entropy)

    def _selected(
        self, world: PreferenceWorld, reference: PreTrainedModel, indices: np.ndarray, run: Run
    ) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], Pair]:
        """Pairs by rejection sampling among six answers of the reference to each prompt, as many as `indices`."""
        count, rule = 6, SelectionRule(rewards="percentile") if run.cell.pairs == "rs+" else SelectionRule(
            rewards="raw", pairs="first_round"
        )  # fmt: skip
        prompts = np.repeat(world.prompts(indices), count, axis=0)
        uniforms = uniform_numbers(run.seed, f"candidates {run.world}", len(prompts), self.scale.max_tokens + 1)
        drawn = sample_answers(reference, torch.from_numpy(prompts).to(self.device), uniforms[:, :-1]).cpu().numpy()
        gumbel = -np.log(-np.log(uniforms[:, -1].clamp(min=1e-12).numpy())) - np.euler_gamma
        rewards = world.rewards(prompts, drawn)
        scores = rewards + world.length_bias * token_counts(drawn) + world.label_temperature * gumbel
        rows: list[tuple[int, int]] = []
        for place, index in enumerate(indices):
            own = slice(place * count, (place + 1) * count)
            found = select_pairs([str(row.tolist()) for row in drawn[own]], scores[own], int(index), rule)
            rows += [(place * count + pair.chosen, place * count + pair.rejected) for pair in found.pairs]
        rows = rows[: len(indices)]
        chosen, rejected = (np.array(side) for side in zip(*rows, strict=True))
        kept = Pair(*(torch.from_numpy(scores[side]).float() for side in (chosen, rejected)))
        return prompts[chosen], (drawn[chosen], drawn[rejected]), kept

    # ---- training ----

    def trained(self, run: Run) -> dict[str, Any]:
        """The record of a run: settings, curve, and rewards of each prompt at the divergences of NATS."""
        scale, cell, batch = self.scale, run.cell, self.batch(run)
        at = {axis: AXES[axis] ** step for axis, step in run.place}
        world = self.world(run.world, cell.variant)
        switches = switches_of(
            cell, at.get("strength", 1.0), PENALTY * at.get("penalty", 1.0), world.mean_base_tokens, scale.plain_beta
        )
        rate = scale.rate * at.get("rate", 1.0)
        steps = (cell.epochs or scale.epochs) * (len(batch.prompts) // scale.batch_size)
        reference = self.policy(run.world, cell.variant)
        policy = copy.deepcopy(reference)
        stops = {max(1, round(steps * ((place + 1) / scale.checkpoints) ** 1.5)) for place in range(scale.checkpoints)}
        exam = Exam(world, run.split, scale, self.device)
        curve = [exam.examined(reference, reference, run.seed)]
        for step in optimised(policy, batch, switches, rate, steps, scale.batch_size, derive_seed("order", run.seed)):
            if step in stops:
                curve.append(exam.examined(policy, reference, run.seed))
                if curve[-1]["kl"] > (TARGET if run.split == "tune" else max(NATS)):
                    break
        return {
            "beta": switches["beta"],
            "learning_rate": rate,
            "home_advantage": switches["home_advantage"],
            "curve": [{name: point[name] for name in ("kl", "reward", "length")} for point in curve],
            "at": {f"{nats:g}": reward_at(curve, nats) for nats in NATS},
        }


def optimised(
    policy: PreTrainedModel,
    batch: Batch,
    switches: Mapping[str, Any],
    rate: float,
    steps: int,
    batch_size: int,
    order_seed: int,
) -> Any:
    """Train `policy` in place; yields the number of steps made after each. AdamW, linear decay after a tenth."""
    settings = dict(switches)
    source, transform = settings.pop("home_advantage_from"), settings.pop("score_transform")
    h, scaling = settings.pop("home_advantage"), settings.pop("contextual_scaling")
    scale = dispersion_scale_of(batch.entropy) if scaling == "mallows" else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate, weight_decay=0.0)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    generator, order = torch.Generator().manual_seed(order_seed % 2**63), torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if len(order) < batch_size:
            order = torch.randperm(len(batch.prompts), generator=generator)
        rows, order = order[:batch_size], order[batch_size:]
        own = batch.take(rows.to(batch.prompts.device))
        answers = torch.cat(own.answers)
        with half_precision(answers.device.type):
            logits = answer_logits(policy, own.prompts.repeat(2, 1), answers)
        log_probabilities = logits.log_softmax(-1)
        advantage: Tensor | float = h
        if source == "score":
            advantage = score_advantage(own.scores, h, transform)
        elif source == "length":
            advantage = length_advantage(own.lengths, h)
        phi = 1.0 if scale is None else mallows_phi(own.entropy, scale)
        logps = Pair(*taken(log_probabilities, answers).chunk(2))
        terms = preference_terms(logps, own.lengths, own.ref_logps, advantage, phi, **settings)
        terms.loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step


class Exam:
    """The prompts of a split; every policy answers them with the same random numbers."""

    def __init__(self, world: PreferenceWorld, split: str, scale: Scale, device: str) -> None:
        self.world, self.split, self.scale, self.device = world, split, scale, device

    @cached_property
    def prompts(self) -> np.ndarray:
        """(R, P), each prompt `samples` times."""
        return np.repeat(self.world.distinct_prompts(self.split), self.scale.samples, axis=0)

    def examined(self, policy: PreTrainedModel, reference: PreTrainedModel, seed: int) -> dict[str, Any]:
        """Mean KL, reward and length of a policy, and the reward of each prompt (N,)."""
        prompts = torch.from_numpy(self.prompts).to(self.device)
        uniforms = uniform_numbers(seed, f"exam {self.split}", len(prompts), self.scale.max_tokens)
        answers = sample_answers(policy, prompts, uniforms)
        kl = 0.0 if policy is reference else sequence_divergence(policy, reference, prompts, answers).mean().item()
        rewards = self.world.rewards(self.prompts, answers.cpu().numpy()).reshape(-1, self.scale.samples).mean(1)
        length = float(answer_mask(answers).sum(1).float().mean())
        return {"kl": kl, "reward": float(rewards.mean()), "length": length, "rewards": rewards}


def reward_at(curve: Sequence[Mapping[str, Any]], nats: float) -> list[float] | None:
    """Reward of each prompt where the curve first crosses a divergence, between checkpoints; None: nowhere."""
    for before, after in itertools.pairwise(curve):
        if before["kl"] <= nats <= after["kl"]:
            share = (nats - before["kl"]) / max(after["kl"] - before["kl"], 1e-12)
            mixed = (1 - share) * np.asarray(before["rewards"]) + share * np.asarray(after["rewards"])
            return [round(float(value), 4) for value in mixed]
    return None


# ---- tuning ----


class Search(Walk):
    """The way of a cell through its grid."""

    def __init__(self, cell: Cell, best: tuple[int, ...] = ()) -> None:
        self.cell = cell
        super().__init__((*best, 0, 0, 0)[: len(self.axes)])

    @property
    def axes(self) -> tuple[str, ...]:
        """What is tuned."""
        has_penalty = dict(self.cell.settings)["home_advantage_from"] == "length"
        return tuple(AXES)[: 3 if has_penalty else 2]

    def run_at(self, place: Sequence[int], split: str = "tune", world: int = 0, seed: int = TUNING_SEED) -> Run:
        """The run of a place in the grid."""
        return Run(self.cell, world, seed, split, tuple(zip(self.axes, place, strict=True)))

    def score_of(self, place: Place, record: Mapping[str, Any]) -> float:
        """Mean reward at TARGET; who does not get there is worth less, the more the less far."""
        found = record.get("at", {}).get(f"{TARGET:g}")
        return float(np.mean(found)) if found else -1e6 + (record["curve"][-1]["kl"] if "curve" in record else -1.0)


class Comparison:
    """Carries out what the cells of a stage need and is not there yet: policies, grids, runs."""

    def __init__(self, scale: Scale, cells: Mapping[str, Cell], crew: Crew, bar: tqdm) -> None:
        self.scale, self.cells, self.crew, self.bar = scale, cells, crew, bar
        self.searches: dict[str, Search] = {}
        self.runs: dict[str, dict[tuple[int, int], Run]] = {}
        self.records: Records = {}

    def carry_out(self, runs: Sequence[Run | FrontierRun]) -> Records:
        """Records of runs; before them the policies of the variants that a missing one needs, in all worlds."""
        root = self.crew.folder.root
        missing = [run for run in runs if not (root / f"runs/{run.name}.json").is_file()]
        variants = sorted({_policy_variant(run.cell.variant) if isinstance(run, Run) else "main" for run in missing})
        policies = [PolicyRun(world, variant) for variant in variants for world in range(self.scale.worlds)]
        for policy in policies:
            if not (root / policy.name).is_dir():  # records were carried to another machine, weights were not
                (root / f"runs/{policy.name}.json").unlink(missing_ok=True)
        self.bar.total += len(runs) + len(policies)
        for name, record in self.crew.records(policies, self.bar).items():
            if "error" in record:
                raise RuntimeError(f"{name} failed: {record['error']}")
        return self.crew.records(runs, self.bar)

    def stage(self, names: Sequence[str]) -> None:
        """Tune and run cells. Runs of one seed come together, so that a worker finds their pairs at hand."""
        tuned = list(dict.fromkeys(self.cells[name].tuned_as or name for name in names))
        self.tune([name for name in PILOTS.values() if name not in self.searches], PILOT_ROUNDS)
        self.tune([name for name in tuned if name not in self.searches], self.scale.rounds)
        seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + self.scale.seeds)
        for name in names:
            search = self.searches[self.cells[name].tuned_as or name]
            self.runs[name] = {
                (world, seed): replace(search.run_at(search.best, "test", world, seed), cell=self.cells[name])
                for world in range(self.scale.worlds)
                for seed in seeds
            }
        every = sorted((run for name in names for run in self.runs[name].values()), key=lambda r: (r.world, r.seed))
        self.records |= self.carry_out(every)

    def tune(self, names: Sequence[str], rounds: int) -> None:
        """Let the grid of every cell grow until its best lies inside, at most `rounds` times."""
        searches = {}
        for name in names:
            pilot = self.searches.get(PILOTS[dict(CELLS[name].settings)["length_normalization"]])
            searches[name] = Search(CELLS[name], pilot.best if pilot else ())
        walk(list(searches.values()), rounds, self.carry_out)
        self.searches |= searches


# ---- statistics ----

FRONTIER_PROMPTS = 40
RESAMPLES, CONFIDENCE = 4000, 0.95
SHARE_OF_GAIN = 0.1  # of what DPO gains at TARGET: less is nothing
REACHED = 0.75  # of the runs, so that a claim is not one about those that go far


def crossed_bootstrap(values: np.ndarray, worlds: Sequence[int], seed: int = 0) -> np.ndarray:
    """(RESAMPLES,) means of values (U, N) whose runs are drawn anew, and, for each world, its prompts."""
    generator = np.random.default_rng(seed)
    num_runs, num_prompts = values.shape
    runs = generator.multinomial(num_runs, [1 / num_runs] * num_runs, RESAMPLES) / num_runs
    total = np.zeros(RESAMPLES)
    for world in sorted(set(worlds)):
        prompts = generator.multinomial(num_prompts, [1 / num_prompts] * num_prompts, RESAMPLES) / num_prompts
        own = [place for place, other in enumerate(worlds) if other == world]
        total += (runs[:, own] * (prompts @ values[own].T)).sum(1)
    return total


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values. Source: Holm 1979."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def contrast(
    weights: Mapping[str, float], found: Mapping[str, Mapping[tuple[int, int], np.ndarray]]
) -> dict[str, Any] | None:
    """Value, interval and p-value (two-sided) of a contrast of cells; None where fewer than two runs have all."""
    common = set.intersection(*(set(found.get(name, {})) for name in weights))
    keys = sorted(common)
    if len(keys) < 2:
        return None
    values = np.stack([sum(weight * found[name][key] for name, weight in weights.items()) for key in keys])
    draws = crossed_bootstrap(values, [world for world, _ in keys])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    below = (1 + min((draws <= 0).sum(), (draws >= 0).sum())) / (RESAMPLES + 1)
    return {"value": float(values.mean()), "low": float(low), "high": float(high), "p": float(min(1.0, 2 * below)),
            "runs": len(keys)}  # fmt: skip


def verdict(kind: str, found: Mapping[str, float], margin: float) -> str:
    """confirmed, refuted or undecided; see `Claim`."""
    is_sure = found["adjusted"] < 1 - CONFIDENCE
    if kind in ("more", "less"):
        sign = 1 if kind == "more" else -1
        return "undecided" if not is_sure else "confirmed" if sign * found["value"] > 0 else "refuted"
    if found["high"] < margin and (kind == "no gain" or found["low"] > -margin):
        return "confirmed"
    is_gain = found["value"] > 0 or kind == "nothing"
    return "refuted" if is_sure and is_gain and abs(found["value"]) > margin else "undecided"


def judged(found: Mapping[float, Any], margin: float, planned: int) -> list[dict[str, Any]]:
    """Every claim whose cells were run, with its adjusted p-value and verdict.

    At TARGET where at least REACHED of the `planned` runs have all its cells there, else at the smallest divergence.
    """
    rows = []
    for claim in CLAIMS:
        for nats in (TARGET, min(NATS)):
            result = contrast(claim.weights, found[nats])
            if result is not None and result["runs"] >= REACHED * planned:
                break
        if result is not None:
            rows.append({"claim": claim.text, "kind": claim.kind, "nats": nats} | result)
    for row, adjusted in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["adjusted"] = adjusted
        row["verdict"] = verdict(row["kind"], row, margin)
    return rows


# ---- the whole ----


def stages(cells: Mapping[str, Cell]) -> list[list[str]]:
    """Names of cells in the order in which they are run: the factorial, the doses, the rest."""
    doses = ("unbiased", "biased", "clear")
    found: list[list[str]] = [[], [], []]
    for name, cell in cells.items():
        found[0 if cell.name in FACTORIAL else 1 if cell.variant in doses else 2].append(name)
    return [names for names in found if names]


def compare(
    scale: Scale, cells: Mapping[str, Cell], folder: ResumableFolder, args: CompareArguments
) -> tuple[dict[str, Any], bool]:
    """All runs that are not finished, as far as time allows; what is printed, as JSON can hold it; if it is all."""
    given = scale, folder.root, args.device
    is_all = True
    frontier = FrontierRun()
    with (
        tqdm(total=0, unit="run", dynamic_ncols=True, mininterval=2) as bar,
        Crew(folder, args.workers, Worker, *given, until=end_of(args.minutes)) as crew,
    ):
        whole = Comparison(scale, cells, crew, bar)
        try:
            for names in stages(cells):
                whole.stage(names)
                whole.records |= whole.carry_out([frontier])
        except TimeoutError:
            is_all = False
    for own in whole.runs.values():  # of a stage that was not finished, too
        for run in own.values():
            whole.records.setdefault(run.name, folder.read(f"runs/{run.name}.json") or {})
    found = whole.records.get(frontier.name) or folder.read(f"runs/{frontier.name}.json") or {}
    results = summary(scale, whole, Worker(*given)) | {"frontier": found.get("frontier", [])}
    return results, is_all


def summary(scale: Scale, whole: Comparison, worker: Worker) -> dict[str, Any]:
    """The table of cells, effects and claims."""
    found: dict[str, dict[str, dict[tuple[int, int], np.ndarray]]] = {f"{nats:g}": {} for nats in NATS}
    rows = []
    for name, own in whole.runs.items():
        ready = {key: record for key, run in own.items() if "at" in (record := whole.records[run.name])}
        for nats, cell_values in found.items():
            cell_values[name] = {key: np.array(r["at"][nats]) for key, r in ready.items() if r["at"][nats]}
        search = whole.searches[whole.cells[name].tuned_as or name]
        row = {"cell": name, "edge": not search.is_inside, "runs": len(ready)}
        row |= {axis: step for axis, step in zip(search.axes, search.best, strict=True)}
        for record in list(ready.values())[:1]:
            row |= {field_: record[field_] for field_ in ("beta", "learning_rate", "home_advantage")}
        for nats, cell_values in found.items():
            values = list(cell_values[name].values())
            row[f"reward_at_{nats}"] = float(np.mean(values)) if values else None
            row[f"reached_{nats}"] = len(values)
        rows.append(row | {"curves": [record["curve"] for record in ready.values()]})
    starts = [curve[0]["reward"] for row in rows if "," not in row["cell"] for curve in row["curves"]]
    reference = float(np.mean(starts)) if starts else math.nan  # of all worlds and seeds alike
    reached = [row[f"reward_at_{TARGET:g}"] for row in rows if row["cell"] == DPO]
    gains = [reward - reference for reward in reached if reward is not None]
    margin = SHARE_OF_GAIN * (gains[0] if gains else 1.0)
    terms = [(factor,) for factor in FACTORS] + list(itertools.combinations(FACTORS, 2))
    effects = [
        {"effect": " x ".join(term), "nats": nats} | result
        for nats, values in found.items()
        for term in terms
        if (result := contrast(effect(*term), values)) is not None
    ]
    return {
        "comparison": {"scale": dataclasses.asdict(scale)},
        "machine": machine_facts(torch.device(worker.device), commit=None),
        "prompts": len(worker.world(0, "main").distinct_prompts("test")),
        "reference_reward": reference,
        "margin": margin,
        "rows": rows,
        "effects": effects,
        "claims": judged({nats: found[f"{nats:g}"] for nats in NATS}, margin, scale.worlds * scale.seeds),
        "tuning": [
            {"cell": name, **dict(zip(search.axes, place, strict=True)), "reward": score}
            for name, search in whole.searches.items()
            for place, score in search.scores.items()
        ],
    }


def frontier_of(worker: Worker) -> list[tuple[float, float]]:
    """`best_frontier` of some test prompts of the first world."""
    world, policy, samples = worker.world(0, "main"), worker.policy(0, "main"), worker.scale.frontier_samples
    prompts = np.repeat(world.distinct_prompts("test")[:FRONTIER_PROMPTS], samples, axis=0)
    uniforms = uniform_numbers(0, "frontier", len(prompts), worker.scale.max_tokens)
    answers = sample_answers(policy, torch.from_numpy(prompts).to(worker.device), uniforms).cpu().numpy()
    return best_frontier(world.rewards(prompts, answers).reshape(-1, samples))


def _interval(row: Mapping[str, Any]) -> str:
    return f"{row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


def comparison_text(results: Mapping[str, Any]) -> str:
    """Claims, effects and cells as text."""
    claims = [
        {"claim": row["claim"], "reward [95 %]": _interval(row), "nats": f"{row['nats']:g}", "runs": str(row["runs"]),
         "p (Holm)": f"{row['adjusted']:.3f}", "expected": row["kind"], "verdict": row["verdict"]}
        for row in results["claims"]
    ]  # fmt: skip
    effects: dict[str, dict[str, str]] = {}
    for row in results["effects"]:
        effects.setdefault(row["effect"], {"effect": row["effect"]})[f"at {row['nats']} nats"] = _interval(row)
    cells = [
        {"cell": row["cell"], **{f"at {nats:g}": "" if row[f"reward_at_{nats:g}"] is None else
         f"{row[f'reward_at_{nats:g}']:.3f} ({row[f'reached_{nats:g}']})" for nats in NATS},
         "beta": f"{row['beta']:.3g}" if "beta" in row else "failed",
         "rate": f"{row['learning_rate']:.3g}" if "beta" in row else "", "edge": "edge" if row["edge"] else ""}
        for row in results["rows"]
    ]  # fmt: skip
    told = (
        f"{results['prompts']} test prompts; reference {results['reference_reward']:.3f}; nothing is less than "
        f"{results['margin']:.3f}; in brackets behind a reward: runs that got that far."
    )
    return "\n\n".join(text_table(table) for table in (claims, list(effects.values()), cells) if table) + f"\n{told}"


def csv_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each cell, effect and claim."""
    cells = [{"what": "cell"} | {k: v for k, v in row.items() if k != "curves"} for row in results["rows"]]
    rows = [*cells, *({"what": "effect"} | row for row in results["effects"])]
    rows += [{"what": "claim"} | row for row in results["claims"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def draw(path: Path, results: Mapping[str, Any]) -> None:
    """Reward against divergence along training, beside the best policies there are; needs matplotlib."""
    pyplot = plotting(path)
    rows = [row for row in results["rows"] if row["curves"] and "," not in row["cell"]]
    if pyplot is None or not rows:
        return
    figure, plane = pyplot.subplots(figsize=(10, 7), layout="constrained")
    if results["frontier"]:
        plane.plot(*zip(*results["frontier"], strict=True), color="black", label="best there are (first world)")
    colors = pyplot.get_cmap("tab20").colors
    for number, row in enumerate(rows):
        for place, curve in enumerate(row["curves"]):
            points = [(point["kl"], point["reward"]) for point in curve]
            label = row["cell"] if place == 0 else None
            plane.plot(*zip(*points, strict=True), color=colors[number % 20], alpha=0.5, label=label)
    for nats in NATS:
        plane.axvline(nats, color="gray", linestyle=":")
    plane.set(xlabel="KL to the reference (nats per answer)", ylabel="mean true reward", xlim=(0, 2 * max(NATS)))
    plane.legend(fontsize=7, ncols=2)
    plane.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


@dataclass
class CompareArguments:
    """How much work to spend, where; the rest is in `SETTINGS`."""

    setting: str = HfArg(default="small", help=f"Size of the comparison: {', '.join(SETTINGS)}.")
    methods: list[str] = HfArg(
        default_factory=lambda: list(CELLS), help="Names of cells; a claim is tested if all of its own are among them."
    )
    seeds: int | None = HfArg(default=None, help="Final runs of a cell in each world, if not the setting's.")
    output_dir: str = HfArg(default="runs/preference-methods", help="Folder; finished runs are kept.")
    workers: int = HfArg(default=2, help="Processes with one thread each; 1: this process does it all.")
    device: str = HfArg(default="cpu", help="cpu or cuda.")
    minutes: float | None = HfArg(
        default=None, help="No run begins later than this; what is there is told, the same command goes on."
    )


def compare_main(argv: Sequence[str]) -> None:
    """Train the policies, tune, run the cells, write and print what came out."""
    (args,) = parse_arguments((CompareArguments,), argv, program="preference_methods.py", description=__doc__)
    check_names("--device", [args.device], ("cpu", "cuda"))
    check_request(args, SETTINGS, CELLS)
    scale = SETTINGS[args.setting]
    folder = open_folder(args.output_dir, {"setting": args.setting, "scale": repr(replace(scale, seeds=0))})
    if args.seeds is not None:
        scale = replace(scale, seeds=args.seeds)
    quiet_process()
    cells = {name: cell for name, cell in CELLS.items() if name in args.methods}
    results, is_all = compare(scale, cells, folder, args)
    write_results(folder.root, results, csv_rows(results), draw, comparison_text)
    tell_rest(args, is_all)


PROGRAM, GUIDE = "preference_methods.py", "[the preference world](../../preference_world.md)"
PROGRAMS = {"compare": compare_main, "page": lambda argv: write_page(argv, PROGRAM, GUIDE, comparison_text)}


def main(argv: Sequence[str] | None = None) -> None:
    """The program that the first word names: `compare`, the first, or `page`."""
    run_program(PROGRAMS, argv)


if __name__ == "__main__":
    run_script(main)
