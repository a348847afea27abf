"""Expert parallelism for any number of experts: how E experts are dealt to N ranks, and padding where they differ.

Experts are dealt in order, C = ceil(E / N) to each rank, so expert i lives on rank i // C. Where N does not divide E
the last ranks hold fewer: 31 experts are 16 + 15 on 2 ranks, 8 + 8 + 8 + 7 on 4, and 7 times 4 and one 3 on 8. There
padding experts, zeros, fill the rank up to C while the experts run. They belong to no parameter: no router knows their
ids, no token reaches them, no optimizer holds them, and they are not saved. Source: ours, on transformers' styles.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_cpt_moe import PADDED_SHARD


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


def padded_forward(experts: nn.Module, dtype_of_autocast: Callable[[str], torch.dtype | None]) -> Callable:
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


def register_padded_shard(dtype_of_autocast: Callable[[str], torch.dtype | None]) -> None:
    """Make the style known to transformers, where it has expert parallelism of this kind (from 5.23 on)."""
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
                module.forward = padded_forward(module, dtype_of_autocast)
            shard = distribute_tensor(weight, mesh, [self.placement], src_data_rank=None)
            module._parameters[param] = nn.Parameter(shard, requires_grad=weight.requires_grad)

    ALL_PARALLEL_STYLES.register(PADDED_SHARD, PaddedExpertShard(Shard(0), shards_expert_dim=True))
