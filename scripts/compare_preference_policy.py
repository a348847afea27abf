"""The tiny policy of the preference world: trained on the base policy's answers in seconds, sampled, and scored.

Letters: N sequences, P tokens of a prompt (the same for all), T tokens of the longest answer, V vocabulary. An answer
ends with its first EOS; what follows it is padding. Sampling inverts the cumulative distribution at uniform numbers
that are a function of (seed, row, position), so an answer depends on its model, prompt and row alone. Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, set_seed

from hf_moe_cpt.data.permutation import derive_seed
from hf_moe_cpt.data.preference_world import EOS_ID, PAD_ID, PreferenceWorld, token_counts
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig


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
