"""Routers: which experts see a token and with what weight.

T tokens, H hidden size, E routed experts, K experts per token; z (T, E) logits. Sources: arXiv 2503.05029, section 3
(both routers); Sinkhorn start vector and raw gates from the authors' GPT-NeoX (megatron/model/router.py).

Every router computes in at least fp32, whatever the dtype of weights and activations and under autocast as well.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig


EPSILON = 1e-8  # added to the denominators of the Sinkhorn scalings, as in GPT-NeoX and Megatron


class CptMoeRouter(nn.Module):
    """What both routers share: the bias-free map z = W x, and gates read from the scores of the chosen experts.

    A router says what its scores are and which experts it chooses. Gates are always taken from the unbalanced scores,
    so that gradient reaches W; the choice itself carries none.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))

    def forward(
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route tokens (T, H) to experts.

        token_mask: (T,) bool, False for padding; padding is routed but takes no part in any balancing.
        Returns logits (T, E), gates (T, K) and expert ids (T, K); logits and gates in fp32 (fp64 for fp64 input).
        """
        with _without_autocast(hidden_states.device.type):
            dtype = torch.promote_types(hidden_states.dtype, torch.float32)
            logits = F.linear(hidden_states.to(dtype), self.weight.to(dtype))
            scores = self.scores(logits)
            with torch.no_grad():
                index = self.choose(logits, scores, token_mask)
            gates = scores.gather(1, index)
            if self.norm_topk_prob:
                gates = gates / gates.sum(dim=-1, keepdim=True)
        return logits, gates, index

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Softmax over all E experts."""
        return logits.softmax(dim=-1)

    def choose(self, logits: torch.Tensor, scores: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        """The K experts with the largest scores, best first: (T, K)."""
        return scores.topk(self.top_k, dim=-1).indices


class CptMoeTopKRouter(CptMoeRouter):
    """Penalty-balanced top-k: softmax, the K largest, raw softmax values as gates; balance comes from the losses.

    Training and evaluation are identical.
    """


class CptMoeSinkhornRouter(CptMoeRouter):
    """Sinkhorn-balanced top-k: training routes by the top K of a balanced plan, evaluation by plain top-k.

    The plan needs the whole batch, which decoding token by token does not have; hence the difference. With K = 1 the
    gate is a sigmoid (a softmax would tie it to the scores of experts that were not chosen), else a softmax.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.num_iterations = config.sinkhorn_iterations

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid() if self.top_k == 1 else logits.softmax(dim=-1)

    def choose(self, logits: torch.Tensor, scores: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        if not self.training:
            return super().choose(logits, scores, token_mask)
        plan = sinkhorn_plan(logits, self.num_iterations, token_mask)
        if token_mask is not None:
            plan = torch.where(token_mask[:, None], plan, scores)
        return plan.topk(self.top_k, dim=-1).indices


ROUTER_CLASSES: dict[str, type[CptMoeRouter]] = {
    "softmax_topk": CptMoeTopKRouter,
    "sinkhorn": CptMoeSinkhornRouter,
}


def sinkhorn_plan(logits: torch.Tensor, num_iterations: int, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Scale exp(z) until tokens and experts carry (nearly) equal mass: (T, E), rows sum to about 1/T, columns to 1/E.

    T counts the tokens that take part; rows of the others are 0. Computed without gradient. Uses the operator
    `torch.ops.hf_moe_cpt.sinkhorn_plan(logits, num_iterations, token_mask)` where one is registered: whoever registers
    it must serve every device and agree with `plain_sinkhorn_plan`.
    """
    fused: Callable | None = getattr(torch.ops.hf_moe_cpt, "sinkhorn_plan", None)
    with torch.no_grad():
        return (fused or plain_sinkhorn_plan)(logits.detach(), num_iterations, token_mask)


def plain_sinkhorn_plan(
    logits: torch.Tensor, num_iterations: int, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The definition of `sinkhorn_plan`: a fixed number of passes, each over rows and then columns.

    Each row's largest logit is subtracted first, or exp would overflow at z = 88. The column scaling starts from the
    column sums, so one pass already balances well ("favourable initial condition", Anthony et al. 2024).
    """
    num_tokens, num_experts = logits.shape
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    mass = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    if token_mask is not None:
        mass = mass.masked_fill(~token_mask[:, None], 0.0)
        num_tokens = token_mask.sum().clamp(min=1)
    per_expert = 1.0 / (num_experts * (mass.sum(dim=0) + EPSILON))  # (E,)
    per_token = torch.ones_like(mass[:, 0])  # (T,)
    for _ in range(num_iterations):
        per_token = 1.0 / (num_tokens * ((mass * per_expert).sum(dim=1) + EPSILON))
        per_expert = 1.0 / (num_experts * ((mass * per_token[:, None]).sum(dim=0) + EPSILON))
    return per_token[:, None] * mass * per_expert


def is_under_autocast(device_type: str) -> bool:
    """Whether autocast is on for a kind of device; never on "meta", which torch has no autocast for."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def dtype_of_autocast(device_type: str) -> torch.dtype | None:
    """The dtype that autocast computes products in on a kind of device; None where it is off."""
    return torch.get_autocast_dtype(device_type) if is_under_autocast(device_type) else None


def _without_autocast(device_type: str) -> AbstractContextManager:
    return torch.autocast(device_type, enabled=False) if is_under_autocast(device_type) else nullcontext()
