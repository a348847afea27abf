"""The load balance loss of a preference batch that lies on several ranks: that of one process with all of its pairs.

TRL takes Mixtral's loss of the rank's own pairs, E sum_i f_i P_i over all layers together; it is not linear in the
batch, so that its mean over ranks is another number than that of the whole batch. Here f counts over all ranks and P
is divided by all tokens.

Letters: L layers, T tokens of a rank, E experts, K experts per token. Source: Mixtral's loss as transformers has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_moe_cpt.trainers.instruments.ranks import has_process_group


@contextmanager
def recorded_router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """The list that a causal LM's router logits, one (T, E) per layer, are put into by a pass inside this context."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: list[Tensor] = []
    handle = base.base_model.register_forward_hook(
        lambda _, __, outputs: found.extend(getattr(outputs, "router_logits", None) or ())
    )
    try:
        yield found
    finally:
        handle.remove()


def balance_of_batch(
    model: nn.Module, aux_loss: Tensor, router_logits: Sequence[Tensor], attention_mask: Tensor
) -> Tensor:
    """TRL's load balance loss; in training that of the pairs of all ranks, which meet for it."""
    if not (model.training and router_logits and has_process_group() and dist.get_world_size() > 1):
        return aux_loss
    return balance_over_ranks(router_logits, model.config.get_text_config().num_experts_per_tok, attention_mask)


def balance_over_ranks(router_logits: Sequence[Tensor], top_k: int, attention_mask: Tensor) -> Tensor:
    """A scalar whose mean over ranks, and the mean of whose gradients, are those of the loss of the whole batch.

    router_logits: one (T, E) per layer; attention_mask: whatever has T elements, 0 for padding. A collective.
    """
    num_experts = router_logits[0].shape[-1]
    probabilities = torch.stack([layer.float().softmax(dim=-1) for layer in router_logits])  # (L, T, E)
    mask = attention_mask.reshape(1, -1, 1).to(probabilities)
    chosen = torch.zeros_like(probabilities).scatter_(-1, probabilities.topk(top_k, dim=-1).indices, 1.0)
    counts = (chosen * mask).double().sum(dim=(0, 1))
    totals = torch.cat([counts, mask.double().sum().view(1) * len(router_logits)])
    dist.all_reduce(totals)
    num_tokens = totals[-1].clamp(min=1)  # of all layers and ranks
    share = (totals[:-1] / num_tokens).float()
    own = (probabilities * mask).sum(dim=(0, 1)) / num_tokens.float()
    return dist.get_world_size() * num_experts * (share * own).sum()
