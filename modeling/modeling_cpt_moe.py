"""The `cpt_moe` model and its heads: a pre-norm decoder with dense or mixture-of-experts feed-forward blocks.

B batch, S sequence, H hidden size, A attention heads, D head size, V vocabulary; T = B x S tokens, E routed experts,
K experts per token; z (T, E) router logits.

Sources: arXiv 2503.05029 (architecture, two of the routers, penalties); GPT-NeoX, the authors' training code, for the
Sinkhorn start vector, raw gates and initialisation (megatron/model/router.py); Switch Transformers eq. 4-6 and ST-MoE
eq. 5 for the penalties; DeepSeek-V3 (arXiv 2412.19437, eq. 13-16) for the third router. The code has the form of
transformers' own MoE models, so that its attention and experts interfaces, parallel plans and kernels apply. This file
travels to the Hub with a checkpoint: it imports torch, transformers and the configuration beside it.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation, use_kernel_forward_from_hub
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs, maybe_install_capturing_hooks

from .configuration_cpt_moe import PADDED_SHARD, CptMoeConfig


logger = logging.get_logger(__name__)

NEWEST_TESTED = (5, 24)  # major and minor of the newest transformers that the tests passed with

HAS_WIDER_PRODUCT = hasattr(torch.ops.aten.mm, "dtype")  # of bfloat16 on a GPU, float32 out

# The keyword, and the field of an output, that holds the cache: past_key_values before transformers 5.24.
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(MoeModelOutputWithPast)} else "past_key_values"


def warn_of_untested_release(version: str = transformers.__version__) -> None:
    """Say once, in one line, that the major or minor of transformers is newer than the newest tested."""
    if tuple(int(part) for part in version.split(".")[:2]) > NEWEST_TESTED:
        tested = ".".join(map(str, NEWEST_TESTED))
        logger.warning_once(f"cpt_moe models are tested with transformers up to {tested}; this is {version}.")


warn_of_untested_release()


@use_kernel_forward_from_hub("RMSNorm")
class CptMoeRMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, in fp32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.promote_types(input_dtype, torch.float32))
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def norm_of(config: CptMoeConfig) -> nn.Module:
    """A norm of the configured kind over the hidden size."""
    norm_class = CptMoeRMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
    return norm_class(config.hidden_size, eps=config.rms_norm_eps)


class CptMoeRotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions, for any `rope_type` of transformers."""

    def __init__(self, config: CptMoeConfig) -> None:
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: CptMoeConfig, device: torch.device | None = None, **kwargs
    ) -> tuple[torch.Tensor, float]:
        """Inverse frequencies (rotated dimensions / 2,) and the factor on the result, 1. Called by transformers."""
        width = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponent = torch.arange(0, width, 2, dtype=torch.float, device=device) / width
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponent), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids (B, S) -> two tensors (B, S, rotated dimensions) in the dtype of hidden_states."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=hidden_states.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate as many leading dimensions of each head as cos has; states (B, A, S, D), cos, sin (B, S, rotated)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, kept = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, kept), dim=-1)


def rotate_query_and_key(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotate` for queries and keys (B, A, S, D), whose numbers of heads may differ."""
    return rotate(query, cos, sin), rotate(key, cos, sin)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition of attention, with its weights: (B, A, S, D) -> (B, S, A, D) and (B, A, S, keys)."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32))
    weights = nn.functional.dropout(weights.to(query.dtype), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class CptMoeAttention(nn.Module):
    """Causal self-attention with rotary positions, multi-head or grouped-query.

    Biases, norms of queries and keys, and a window are off unless the configuration has them.
    rotate_query_and_key: the seam for a fused rotation, which is set on one module.
    """

    rotate_query_and_key = staticmethod(rotate_query_and_key)

    def __init__(self, config: CptMoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.sliding_window = config.sliding_window
        query_width, key_width = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        has_bias = config.attention_bias or config.qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=has_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=has_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=has_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.attention_bias)
        self.o_proj.is_output_projection = True
        if config.qk_norm is not None:
            widths = (self.head_dim,) * 2 if config.qk_norm == "head" else (query_width, key_width)
            self.q_norm, self.k_norm = (CptMoeRMSNorm(width, eps=config.rms_norm_eps) for width in widths)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, S, H) -> (B, S, H) and the attention weights, or None where the implementation does not form them.

        The cache comes in `kwargs`, under the name that transformers gives it.
        """
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.config.qk_norm == "projection":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.view(head_shape), key.view(head_shape), value.view(head_shape)
        if self.config.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        query, key = self.rotate_query_and_key(query, key, *position_embeddings)
        past_key_values: Cache | None = kwargs.pop(CACHE_NAME, None)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1).contiguous()), weights


EPSILON = 1e-8  # added to the denominators of the Sinkhorn scalings, as in GPT-NeoX and Megatron


class BFloat16Product(torch.autograd.Function):
    """X W^T in float32, (T, H) and (E, H) -> (T, E), of bfloat16 on a GPU, on tensor cores: such products are exact.

    A gradient in float32 is the sum of three bfloat16, so its products are theirs. No (T, H) of float32 is made.
    """

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens, weight)
        return torch.mm(tokens, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        tokens, weight = ctx.saved_tensors
        pieces = in_three_pieces(grad)
        grad_tokens = pieces @ torch.cat((weight,) * 3) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_tokens, None
        grad_weight = torch.mm(pieces.T, tokens, out_dtype=torch.float32)
        return grad_tokens, grad_weight.view(3, *weight.shape).sum(0).to(weight.dtype)


def in_three_pieces(values: torch.Tensor) -> torch.Tensor:
    """float32 (T, E) -> bfloat16 (T, 3E): three parts of E columns that add up to the values but for 2^-24 of them."""
    pieces = [values.to(torch.bfloat16)]
    for _ in range(2):
        values = values - pieces[-1]
        pieces.append(values.to(torch.bfloat16))
    return torch.cat(pieces, dim=1)


def float32_linear(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """X W^T in at least float32 whatever the dtypes: (T, H), (E, H) -> (T, E)."""
    is_plain = tokens.is_cuda and HAS_WIDER_PRODUCT and not hasattr(weight, "to_local")  # of DTensor
    if is_plain and tokens.dtype == weight.dtype == torch.bfloat16:
        return BFloat16Product.apply(tokens, weight)
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    return F.linear(tokens.to(dtype), weight.to(dtype))


class CptMoeRouter(nn.Module):
    """What all routers share: the bias-free map z = W x, and gates read from the scores of the chosen experts.

    A router says what its scores are and which experts it chooses. Gates are always taken from the unbalanced scores,
    so that gradient reaches W; the choice itself carries none. Everything is computed in at least fp32, whatever the
    dtype of weights and activations, and under autocast as well.
    """

    def __init__(self, config: CptMoeConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))

    def forward(
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route tokens (T, H) to experts.

        token_mask: (T,) bool, False for padding; padding is routed but takes no part in any balancing.
        Returns logits (T, E), gates (T, K) and expert ids (T, K); logits and gates in fp32 (fp64 for fp64 input).
        """
        with maybe_autocast(hidden_states.device.type, enabled=False):
            logits = float32_linear(hidden_states, self.weight)
            scores = self.scores(logits)
            with torch.no_grad():
                index = self.choose(logits, scores, token_mask)
            gates = scores.gather(1, index)
            if self.norm_topk_prob:
                gates = gates / gates.sum(dim=-1, keepdim=True)
            if self.routed_scaling_factor != 1:
                gates = gates * self.routed_scaling_factor
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

    def __init__(self, config: CptMoeConfig) -> None:
        super().__init__(config)
        self.num_iterations = config.sinkhorn_iterations
        self.over_all_ranks = config.load_scope == "global"

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid() if self.top_k == 1 else logits.softmax(dim=-1)

    def choose(self, logits: torch.Tensor, scores: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        if not self.training:
            return super().choose(logits, scores, token_mask)
        plan = sinkhorn_plan(logits, self.num_iterations, token_mask, self.over_all_ranks)
        if token_mask is not None:
            plan = torch.where(token_mask[:, None], plan, scores)
        return plan.topk(self.top_k, dim=-1).indices


class CptMoeBiasRouter(CptMoeRouter):
    """Bias-balanced top-k (DeepSeek-V3): sigmoid scores, the K largest of score + b; gates know nothing of b.

    b, a buffer, has no gradient: whoever trains the model adds rate * sign(mean load - load) to it after each step, as
    the trainers of hf_moe_cpt do (`router_balance`). Training and evaluation are identical.
    """

    def __init__(self, config: CptMoeConfig) -> None:
        super().__init__(config)
        self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts, dtype=torch.float32))

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid()

    def choose(self, logits: torch.Tensor, scores: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        return (scores + self.e_score_correction_bias).topk(self.top_k, dim=-1).indices


ROUTER_CLASSES: dict[str, type[CptMoeRouter]] = {
    "softmax_topk": CptMoeTopKRouter,
    "sinkhorn": CptMoeSinkhornRouter,
    "bias_topk": CptMoeBiasRouter,
}


def sinkhorn_plan(
    logits: torch.Tensor, num_iterations: int, token_mask: torch.Tensor | None = None, over_all_ranks: bool = False
) -> torch.Tensor:
    """Scale exp(z) until tokens and experts carry (nearly) equal mass: (T, E), rows sum to about 1/T, columns to 1/E.

    T counts the tokens that take part; rows of the others are 0. Computed without gradient. Uses the operator
    `torch.ops.hf_moe_cpt.sinkhorn_plan(logits, num_iterations, token_mask)` where one is registered: whoever registers
    it must serve every device and agree with `plain_sinkhorn_plan`. With `over_all_ranks` these are the rank's rows of
    the plan of all ranks' tokens (a collective), which has no operator.
    """
    if over_all_ranks and _has_ranks():
        with torch.no_grad():
            return plain_sinkhorn_plan(logits.detach(), num_iterations, token_mask, over_all_ranks)
    fused: Callable | None = getattr(torch.ops.hf_moe_cpt, "sinkhorn_plan", None)
    with torch.no_grad():
        return (fused or plain_sinkhorn_plan)(logits.detach(), num_iterations, token_mask)


def plain_sinkhorn_plan(
    logits: torch.Tensor, num_iterations: int, token_mask: torch.Tensor | None = None, over_all_ranks: bool = False
) -> torch.Tensor:
    """The definition of `sinkhorn_plan`: a fixed number of passes, each over rows and then columns.

    Each row's largest logit is subtracted first, or exp would overflow at z = 88. The column scaling starts from the
    column sums, so one pass already balances well ("favourable initial condition", Anthony et al. 2024). Over all
    ranks the sums of columns are added up, E numbers a pass, and T is the number of their tokens.
    """
    num_tokens, num_experts = logits.shape
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    mass = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    if token_mask is not None:
        mass = mass.masked_fill(~token_mask[:, None], 0.0)
        num_tokens = token_mask.sum()
    columns = mass.sum(dim=0)  # (E,)
    if over_all_ranks:
        both = torch.cat([columns, columns.new_zeros(1) + num_tokens])
        dist.all_reduce(both)
        columns, num_tokens = both[:-1], both[-1]
    if isinstance(num_tokens, torch.Tensor):
        num_tokens = num_tokens.clamp(min=1)
    per_expert = 1.0 / (num_experts * (columns + EPSILON))
    per_token = torch.ones_like(mass[:, 0])  # (T,)
    for _ in range(num_iterations):
        per_token = 1.0 / (num_tokens * ((mass * per_expert).sum(dim=1) + EPSILON))
        columns = (mass * per_token[:, None]).sum(dim=0)
        if over_all_ranks:
            dist.all_reduce(columns)
        per_expert = 1.0 / (num_experts * (columns + EPSILON))
    return per_token[:, None] * mass * per_expert


def token_mask_of(attention_mask: torch.Tensor | None, sequence_length: int) -> torch.Tensor | None:
    """Which of a batch's tokens are no padding: (B * S,) bool, or None if there is no 2-D mask to tell.

    The mask may be longer than the tokens of this call, as with a cache: the last `sequence_length` columns count.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -sequence_length:].reshape(-1).bool()


def expert_counts(
    router_indices: torch.Tensor, num_experts: int, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """How many times each expert was really chosen: (E,) int64, summing to K x the tokens that count.

    router_indices: (T, K) expert ids; token_mask: (T,) bool. Never synchronises the device.
    """
    chosen = torch.ones_like(router_indices)
    if token_mask is not None:
        chosen = chosen * token_mask[:, None]
    counts = torch.zeros(num_experts, dtype=router_indices.dtype, device=router_indices.device)
    return counts.scatter_add_(0, router_indices.reshape(-1), chosen.reshape(-1))


def load_balancing_loss(
    router_logits: torch.Tensor, counts: torch.Tensor, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """One layer's E * sum_i f_i P_i, a scalar in (0, E], 1 when routing is uniform.

    f_i = share of all assignments that went to expert i, from `counts` (E,), which may cover more tokens than the
    logits (all ranks); P_i = mean softmax probability of expert i over the tokens of router_logits (T, E). Gradient
    flows through P only.
    """
    share = counts.to(router_logits.dtype) / counts.sum().clamp(min=1)
    probability = _mean_over_tokens(router_logits.softmax(dim=-1), token_mask)
    return router_logits.shape[-1] * (share.detach() * probability).sum()


def router_z_loss(router_logits: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """One layer's mean over tokens of logsumexp(z)^2, a scalar; router_logits: (T, E)."""
    return _mean_over_tokens(router_logits.logsumexp(dim=-1).square(), token_mask)


def router_penalties(
    router_logits: tuple[torch.Tensor, ...],
    router_indices: tuple[torch.Tensor, ...],
    token_mask: torch.Tensor | None = None,
    over_all_ranks: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Load balance and z-loss summed over layers (the paper leaves that open), before their coefficients: two scalars.

    router_logits: one (T, E) per layer; router_indices: one (T, K) per layer. With `over_all_ranks` the expert counts
    of all layers are added up over the default process group in one collective. Ranks that hold the same tokens, as
    under tensor parallelism, do no harm: counts are divided by their own total.
    """
    device = router_logits[0].device
    num_experts = router_logits[0].shape[-1]
    token_mask = None if token_mask is None else token_mask.to(device)
    logits = [layer.to(device) for layer in router_logits]
    counts = torch.stack([expert_counts(layer.to(device), num_experts, token_mask) for layer in router_indices])
    if over_all_ranks and _has_ranks():
        dist.all_reduce(counts)
    balance = [load_balancing_loss(z, count, token_mask) for z, count in zip(logits, counts, strict=True)]
    z_loss = [router_z_loss(z, token_mask) for z in logits]
    return torch.stack(balance).sum(), torch.stack(z_loss).sum()


def penalty_weight(
    labels: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    token_mask: torch.Tensor | None = None,
    over_all_ranks: bool = False,
) -> torch.Tensor | float:
    """This micro-batch's share of the optimizer batch: its predicted tokens / num_items_in_batch, 1.0 without it.

    The cross entropy is a sum over `num_items_in_batch`, so micro-batches and ranks add up. A penalty is a mean; given
    this share it adds up to one mean as well, instead of being counted once per accumulation step and rank.
    Tokens are counted as transformers' Trainer and ForCausalLMLoss count them.

    With `over_all_ranks` the ranks' common share is divided among them by the tokens that they routed, over which
    their means are taken, so that the sum of their penalties is that of one process with the whole batch (collective).
    """
    if num_items_in_batch is None:
        return 1.0
    predicted = ((labels[..., 1:] if shift_labels is None else shift_labels) != -100).sum()
    if not (over_all_ranks and _has_ranks()):
        return predicted / num_items_in_batch
    routed = torch.full_like(predicted, labels.numel()) if token_mask is None else token_mask.sum().to(predicted)
    totals = torch.stack([predicted, routed])
    dist.all_reduce(totals)
    return totals[0] / num_items_in_batch * (routed / totals[1])


def _has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _mean_over_tokens(values: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    if token_mask is None:
        return values.mean(dim=0)
    mask = token_mask.view(-1, *[1] * (values.ndim - 1))
    return torch.where(mask, values, 0.0).sum(dim=0) / token_mask.sum().clamp(min=1)


def dtype_of_autocast(device_type: str) -> torch.dtype | None:
    """The dtype that autocast computes products in on a kind of device; None where it is off."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # torch has no autocast for "meta"
        return None
    return torch.get_autocast_dtype(device_type)


class CptMoeMLP(nn.Module):
    """W_down (act(W_gate x) * W_up x), GEGLU with the default activation: (..., H) -> (..., H)."""

    def __init__(self, config: CptMoeConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.down_proj.is_output_projection = True
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


@use_experts_implementation
class CptMoeExperts(nn.Module):
    """All routed experts of a layer as two 3-D parameters; `forward` below is the definition ("eager")."""

    def __init__(self, config: CptMoeConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum over a token's K experts of gate x expert(token): (T, H), (T, K), (T, K) -> (T, H), dtype of the tokens.

        Never drops a token. An id equal to `num_experts` marks, under expert parallelism, an expert of another rank:
        it adds nothing.
        """
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert == self.num_experts:
                continue
            token, slot = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            weighted = expert_output * top_k_weights[token, slot, None]
            output.index_add_(0, token, weighted.to(output.dtype))
        return output


def experts_per_rank(num_experts: int, num_ranks: int) -> int:
    """C = ceil(E / N). Raises ValueError where that would leave a rank without any expert."""
    dealt = -(-num_experts // num_ranks)
    if dealt * (num_ranks - 1) >= num_experts:
        raise ValueError(
            f"{num_experts} experts on ep_size={num_ranks} ranks, {dealt} on each in order, leave a rank without any: "
            "choose a smaller ep_size."
        )
    return dealt


def with_padding(weight: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Weights (C', ...) of the experts of a rank -> (num_experts, ...), zeros after the first C'; gradients pass."""
    missing = num_experts - weight.shape[0]
    return F.pad(weight, (0, 0) * (weight.ndim - 1) + (0, missing)) if missing else weight


def padded_forward(experts: nn.Module) -> Callable:
    """The experts' forward on their local weights, padded and, under autocast, in its dtype."""
    forward = experts.forward

    def forward_with_padding(
        hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        dtype = dtype_of_autocast(hidden_states.device.type)
        given = dict(experts._parameters)
        weights = {name: with_padding(weight, experts.num_experts) for name, weight in given.items()}
        if dtype is not None:
            weights = {name: weight.to(dtype) for name, weight in weights.items()}
        # As transformers puts local tensors in the place of sharded ones; functional_call would call the exchange.
        experts._parameters.update(weights)
        try:
            return forward(hidden_states, top_k_index, top_k_weights)
        finally:
            experts._parameters.update(given)

    return forward_with_padding


def register_padded_shard() -> None:
    """Make the style known to transformers, where it has expert parallelism of this kind (from 5.23 on).

    Experts are dealt in order, C = ceil(E / N) to each of N ranks: 31 are 16 + 15 on 2 ranks, 8 + 8 + 8 + 7 on 4.
    Where the last ranks hold fewer, padding experts, zeros, fill them up to C while the experts run. They belong to
    no parameter: no router knows their ids, no token reaches them, no optimizer holds them, and they are not saved.
    """
    try:
        from torch.distributed.tensor import Shard, distribute_tensor
        from transformers.distributed.expert_parallel import MoEParamShard
        from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
    except ImportError:  # an older transformers, or a torch without distributed: nothing asks for the style there
        return

    class PaddedExpertShard(MoEParamShard):
        """Shard(0) of an expert weight, evenly or not; tells the experts how many ids a rank serves."""

        def shard_param(self, module: nn.Module, param: str, mesh: "torch.distributed.DeviceMesh") -> None:
            weight = module._parameters[param]
            if not module._is_expert_parallel:
                module.num_experts = experts_per_rank(weight.shape[0], mesh.size())
                module._is_expert_parallel = True
                module.forward = padded_forward(module)
            shard = distribute_tensor(weight, mesh, [self.placement], src_data_rank=None)
            module._parameters[param] = nn.Parameter(shard, requires_grad=weight.requires_grad)

    ALL_PARALLEL_STYLES.register(PADDED_SHARD, PaddedExpertShard(Shard(0), shards_expert_dim=True))


register_padded_shard()


class CptMoeSparseMoeBlock(nn.Module):
    """Router, routed experts and, added with weight 1, the shared experts: (B, S, H) -> (B, S, H)."""

    def __init__(self, config: CptMoeConfig) -> None:
        super().__init__()
        self.gate = ROUTER_CLASSES[config.router_type](config)
        self.experts = CptMoeExperts(config)
        self.shared_experts = None
        if config.num_shared_experts > 0:
            self.shared_experts = CptMoeMLP(config, config.num_shared_experts * config.moe_intermediate_size)

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
        """token_mask: (B * S,) bool, False for padding; only the router's balancing looks at it."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, gates, index = self.gate(tokens, token_mask)
        output = self._run_experts(tokens, index, gates)
        if self.shared_experts is not None:
            output = output + self.shared_experts(tokens)
        return output.view_as(hidden_states)

    def _run_experts(self, tokens: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """The routed experts, under autocast in its dtype.

        Autocast knows linear layers and not grouped products: float32 weights would be multiplied in float32, which
        halved the speed of the training step on an H200 (LOG.md) and waited for the device in every layer.
        """
        dtype = dtype_of_autocast(tokens.device.type)
        if dtype is None or all(weight.dtype == dtype for weight in self.experts.parameters()):
            return self.experts(tokens if dtype is None else tokens.to(dtype), index, gates)
        # A number repeated without memory stands for quantised weights, which are whole only inside of the call.
        is_stood_for = any(weight.ndim == 3 and not weight.stride(0) for weight in self.experts.parameters())
        if is_stood_for or getattr(self.experts, "_is_expert_parallel", False):
            return self.experts(tokens.to(dtype), index, gates)  # cast where weights are whole
        weights = {name: weight.to(dtype) for name, weight in self.experts.named_parameters()}
        return torch.func.functional_call(self.experts, weights, (tokens.to(dtype), index, gates))


@dataclass
class CptMoeCausalLMOutput(MoeCausalLMOutputWithPast):
    """What the language model returns. The losses never hide in one another:

    loss: what a trainer minimises. In training `lm_loss` + weighted penalties; in evaluation equal to `lm_loss`.
    lm_loss: cross entropy alone. aux_loss, z_loss: the penalties, summed over layers, before coefficient and weight;
    None where no router logits were recorded.
    router_logits, router_indices: per layer (T, E) and (T, K), the latter the experts really used.
    logits: None where the head was fused with its loss and never formed them.
    """

    lm_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None
    router_indices: tuple[torch.Tensor, ...] | None = None


class CptMoeDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: CptMoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.is_moe = config.num_experts > 0
        self.self_attn = CptMoeAttention(config, layer_idx)
        self.mlp = CptMoeSparseMoeBlock(config) if self.is_moe else CptMoeMLP(config, config.intermediate_size)
        self.input_layernorm = norm_of(config)
        self.post_attention_layernorm = norm_of(config)

    def forward(
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """(B, S, H) -> (B, S, H); token_mask: (T,) bool, False for padding; kwargs: those of the attention."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + (self.mlp(normed, token_mask) if self.is_moe else self.mlp(normed))


class CptMoePreTrainedModel(PreTrainedModel):
    """Weight initialisation, recorded outputs and what transformers must know about the family."""

    config_class = CptMoeConfig
    config: CptMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CptMoeDecoderLayer"]
    _skip_keys_device_placement = [CACHE_NAME]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(CptMoeRouter, index=0),
        "router_indices": OutputRecorder(CptMoeRouter, index=2),
        "hidden_states": CptMoeDecoderLayer,
        "attentions": CptMoeAttention,
    }

    def __init__(self, config: CptMoeConfig, *args, **kwargs) -> None:
        config.check_architecture()  # again: fields may have been set since the configuration was built
        super().__init__(config, *args, **kwargs)
        self._keep_in_fp32_modules_strict = ["e_score_correction_bias"] if config.router_type == "bias_topk" else []

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Our kernels on a GPU where their package is imported, else transformers' choice; what is asked for wins."""
        if requested_experts is None and self.config.is_moe and "hf_moe_cpt" in ALL_EXPERTS_FUNCTIONS:
            if torch.cuda.is_available():
                requested_experts = "hf_moe_cpt"
            else:
                logger.warning_once(
                    "No GPU for the hf_moe_cpt kernels: experts run with transformers' own implementation."
                )
        return super().get_correct_experts_implementation(requested_experts)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """small_init (std sqrt(2 / 5H)) for input matrices, wang_init (std 2 / (layers sqrt H)) for output ones.

        A given `initializer_range` is the std of all of them instead. Source: GPT-NeoX.
        """
        hidden_size, std = self.config.hidden_size, self.config.initializer_range
        input_std = (2 / (5 * hidden_size)) ** 0.5 if std is None else std
        output_std = 2 / (self.config.num_hidden_layers * hidden_size**0.5) if std is None else std
        if isinstance(module, nn.Linear):
            is_output = getattr(module, "is_output_projection", False)
            init.normal_(module.weight, std=output_std if is_output else input_std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=input_std)
        elif isinstance(module, CptMoeExperts):
            init.normal_(module.gate_up_proj, std=input_std)
            init.normal_(module.down_proj, std=output_std)
        elif isinstance(module, CptMoeRouter):
            init.normal_(module.weight, std=input_std)
            if isinstance(module, CptMoeBiasRouter):
                init.zeros_(module.e_score_correction_bias)
        else:
            super()._init_weights(module)

    def num_parameters(
        self, only_trainable: bool = False, exclude_embeddings: bool = False, only_active: bool = False
    ) -> int:
        """Count as transformers does; `only_active` leaves out the E - K routed experts that a token does not use."""
        total = super().num_parameters(only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        if not only_active:
            return total
        unused = self.config.num_experts - self.config.num_experts_per_tok
        for module in self.modules():
            if isinstance(module, CptMoeExperts):
                counted = [p for p in module.parameters() if p.requires_grad or not only_trainable]
                total -= sum(p.numel() // self.config.num_experts * unused for p in counted)
        return total


# Keywords that a forward does not name and that something below it reads, or that may be ignored.
_READ_BELOW = frozenset(TransformersKwargs.__annotations__) | frozenset(
    "return_dict output_router_indices debug_io debug_io_dir prune_layers "  # decorators of forward
    "shift_labels ignore_index "  # the loss
    "cache read_index write_index block_table max_seqlen_q max_seqlen_k logits_indices logits_processor_args "  # paged
    "token_type_ids".split()  # of tokenizers that think of BERT: all zeros for one text, no decoder reads them
)


def checks_keywords(forward: Callable) -> Callable:
    """For the decoder's forward, which every head calls: `**kwargs` swallows neither a rename nor a misspelling.

    The cache may be called `cache` or `past_key_values`; TypeError where both are given and differ. A keyword that
    nothing reads is a TypeError if it is a tensor or a cache, else a warning. Routers are recorded only on request:
    `output_router_logits` of the configuration is a wish of the language model, for its loss.
    """
    named = frozenset(inspect.signature(forward).parameters)

    @wraps(forward)
    def with_known_keywords(self: nn.Module, *args, **kwargs):
        # Before 5.24 `cache` may also be the pages of continuous batching, which the attention function wants.
        if CACHE_NAME == "cache" or isinstance(kwargs.get("cache"), Cache):
            cache = kwargs.pop("cache", None)
            if cache is not None:
                if kwargs.get("past_key_values") not in (None, cache):
                    raise TypeError("cache and past_key_values are two names of one argument: pass one of them.")
                kwargs["past_key_values"] = cache
        kwargs.setdefault("output_router_logits", False)
        unread = {name: value for name, value in kwargs.items() if not (name in named or name in _READ_BELOW)}
        if unread:
            attention = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager_attention_forward)
            unread = {name: unread[name] for name in unread.keys() - inspect.signature(attention).parameters.keys()}
        for name, value in unread.items():
            message = f"{type(self).__name__} does not read {name}={type(value).__name__}"
            if isinstance(value, torch.Tensor | Cache):
                raise TypeError(f"{message}: leave it out, or check its spelling and the version of transformers.")
            if value is not None:
                logger.warning_once(f"{message}: ignored. Check its spelling.")
        return forward(self, *args, **kwargs)

    return with_known_keywords


class CptMoeModel(CptMoePreTrainedModel):
    """Decoder without a head."""

    _auto_class = "AutoModel"

    def __init__(self, config: CptMoeConfig) -> None:
        super().__init__(config)
        # No padding_idx: where the end-of-text token also pads, its embedding would never train.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([CptMoeDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = norm_of(config)
        self.rotary_emb = CptMoeRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()
        if config.is_moe:
            # transformers would do so when the routers are first recorded, which torch.compile cannot trace.
            maybe_install_capturing_hooks(self)

    @checks_keywords
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """Token ids or embeddings -> hidden states (B, S, H).

        Packed documents are told apart by `position_ids` that restart, given without `attention_mask`. Recorded on
        request: `output_router_logits`, `output_router_indices`, `output_hidden_states`, `output_attentions`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        # The mask is made from what the caller passed: a fresh cache would hide packed documents from it, and without
        # position ids there is nothing to look for, which saves a device synchronisation.
        create_mask = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        causal_mask = create_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: past_key_values},
        )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)

        token_mask = token_mask_of(attention_mask, inputs_embeds.shape[1])
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                token_mask=token_mask,
                **{CACHE_NAME: past_key_values},  # by this name gradient checkpointing looks for it
                **kwargs,
            )
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: past_key_values if use_cache else None}
        )


class CptMoeForCausalLM(CptMoePreTrainedModel, GenerationMixin):
    """Decoder with a language-model head; reports the pure loss and the router penalties apart."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: CptMoeConfig) -> None:
        super().__init__(config)
        self.model = CptMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CptMoeCausalLMOutput:
        """Logits (B, S, V), or of the last `logits_to_keep` positions, and with `labels` (B, S) the losses.

        labels are shifted here, -100 is ignored. output_router_logits records the routers; the default is that of the
        configuration in training with labels, else False. In training with labels the penalties are added to `loss`,
        with their coefficients and `penalty_weight`.
        """
        is_trained_on = self.training and labels is not None
        # Who asks in training without labels weighs the penalties himself, as a trainer of several terms does.
        is_weighed = is_trained_on or (bool(output_router_logits) and self.training and torch.is_grad_enabled())
        if output_router_logits is None:
            output_router_logits = is_trained_on and self.config.output_router_logits
        output_router_indices = kwargs.pop("output_router_indices", False) or output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_router_indices=output_router_indices,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, lm_loss = self.lm_head(outputs.last_hidden_state[:, kept, :]), None
        if labels is not None:
            lm_loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        loss = lm_loss
        aux_loss = z_loss = None
        if outputs.get("router_logits"):
            if is_trained_on and torch.is_grad_enabled() and self.model.gradient_checkpointing:
                self._refuse_reentrant(self.model._gradient_checkpointing_func)
            config, token_mask = self.config, token_mask_of(attention_mask, outputs.last_hidden_state.shape[1])
            # Ranks meet only where the loss needs them to: uneven evaluation batches must not wait for each other.
            over_all_ranks = is_weighed and config.load_scope == "global" and config.router_aux_loss_coef > 0
            aux_loss, z_loss = router_penalties(
                outputs.router_logits, outputs.router_indices, token_mask, over_all_ranks
            )
            if is_trained_on:
                counted = (kwargs.get("shift_labels"), kwargs.get("num_items_in_batch"), token_mask)
                weight = penalty_weight(labels, *counted, over_all_ranks)
                penalty = config.router_aux_loss_coef * aux_loss + config.router_z_loss_coef * z_loss
                weight = weight.to(penalty.device) if isinstance(weight, torch.Tensor) else weight
                loss = lm_loss + (weight * penalty).to(lm_loss.device)
        return CptMoeCausalLMOutput(
            loss=loss,
            lm_loss=lm_loss,
            aux_loss=aux_loss,
            z_loss=z_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.get("router_logits") or None,
            router_indices=outputs.get("router_indices") or None,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def generate(self, *args, **kwargs):
        """transformers' own; says once where a Sinkhorn router that trains makes the text depend on the batch."""
        if self.training and self.config.router_type == "sinkhorn":
            logger.warning_once(
                "In train() a Sinkhorn router chooses experts by a plan of the batch, so text differs from that of "
                "eval(), which servers give: call model.eval() before model.generate()."
            )
        return super().generate(*args, **kwargs)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs
    ) -> None:
        if enable and self.config.has_router_penalty:
            self._refuse_reentrant(gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def _refuse_reentrant(self, checkpointing_func: Callable) -> None:
        has_coefficient = self.config.router_aux_loss_coef > 0 or self.config.router_z_loss_coef > 0
        if has_coefficient and getattr(checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True checkpointing cuts the router penalties off from the routers: pass "
                'gradient_checkpointing_kwargs={"use_reentrant": False}, or set both router loss coefficients to 0.'
            )


class CptMoeForSequenceClassification(GenericForSequenceClassification, CptMoePreTrainedModel):
    """Decoder with a linear classifier on each sequence's last token; its loss holds no router penalty."""

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: CptMoeConfig) -> None:
        # Not the mixin's own constructor: it asks AutoModel for the decoder, which remote code has not registered.
        CptMoePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = CptMoeModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class CptMoeForTokenClassification(GenericForTokenClassification, CptMoePreTrainedModel):
    """Decoder with a linear classifier on each token; its loss holds no router penalty."""

    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: CptMoeConfig) -> None:
        CptMoePreTrainedModel.__init__(self, config)  # not the mixin's, as above
        self.num_labels = config.num_labels
        self.model = CptMoeModel(config)
        self.dropout = nn.Dropout(0.1)  # the mixin's default
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()


class CptMoeForQuestionAnswering(GenericForQuestionAnswering, CptMoePreTrainedModel):
    """Decoder that scores each token as the start and as the end of an answer; its loss holds no router penalty."""

    _auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, config: CptMoeConfig) -> None:
        CptMoePreTrainedModel.__init__(self, config)  # not the mixin's, as above
        self.model = CptMoeModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "CptMoeForCausalLM",
    "CptMoeForQuestionAnswering",
    "CptMoeForSequenceClassification",
    "CptMoeForTokenClassification",
    "CptMoeModel",
    "CptMoePreTrainedModel",
]
