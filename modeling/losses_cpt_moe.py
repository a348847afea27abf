"""Router penalties of penalty-balanced training, one term per layer, and the weight with which they enter the loss.

T tokens, K experts per token, E routed experts. Sources: arXiv 2503.05029 (coefficients), Switch Transformers eq. 4-6
(load balance), ST-MoE eq. 5 (z-loss). The paper leaves open whether layers are summed or averaged: summed here.
"""

import torch
import torch.distributed as dist


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
    """Load balance and z-loss summed over layers, before their coefficients: two scalars.

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
