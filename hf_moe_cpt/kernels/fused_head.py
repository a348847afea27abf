"""A language model's head fused with its loss: `fuse_head(model)` makes one model train without forming its logits.

For models with the method `head_and_loss` of `CptMoeForCausalLM`. Needs Triton, not Liger-Kernel.
B sequences, S tokens of each, H hidden size, V vocabulary. Source: ours, on `linear_cross_entropy`.
"""

from types import MethodType

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_moe_cpt.kernels.linear_cross_entropy import IGNORED_LABEL, linear_cross_entropy


def fuse_head(model: PreTrainedModel) -> None:
    """Fuse head and loss of this one model. Twice is the same as once."""
    if not hasattr(model, "head_and_loss"):
        raise ValueError(f"{type(model).__name__} has no method `head_and_loss` that a fused head could replace.")
    model.head_and_loss = MethodType(fused_head_and_loss, model)


def fused_head_and_loss(
    self: PreTrainedModel,
    hidden_states: Tensor,
    labels: Tensor | None = None,
    skip_logits: bool | None = None,
    **kwargs: object,  # what transformers passes to a loss function
) -> tuple[Tensor | None, Tensor | None]:
    """`head_and_loss` of a model: (B, S, H) and labels (B, S) -> None for the logits, and the cross entropy.

    The model's own method serves where logits are wanted (skip_logits; None means: in evaluation) or no labels are
    given, where a hook, an adapter or sharding stands between the head and its weight, and where the loss function is
    neither transformers' for causal LMs nor one that takes token losses (`of_tokens`).
    """
    are_skipped = self.training if skip_logits is None else skip_logits
    of_tokens = (
        _mean_of_tokens if self.loss_function is ForCausalLMLoss else getattr(self.loss_function, "of_tokens", None)
    )
    if labels is None or not are_skipped or of_tokens is None or not _is_bare_linear(self.lm_head):
        return type(self).head_and_loss(self, hidden_states, labels, skip_logits, **kwargs)
    targets = kwargs.get("shift_labels")
    if targets is None:
        targets = F.pad(labels, (0, 1), value=IGNORED_LABEL)[..., 1:]
    targets = targets.to(hidden_states.device)
    loss_sum, losses = linear_cross_entropy(hidden_states.flatten(0, -2), self.lm_head.weight, targets.flatten())
    return None, of_tokens(loss_sum, losses.view(targets.shape), targets, kwargs.get("num_items_in_batch"))


def _is_bare_linear(head: nn.Module) -> bool:
    """Whether calling the head is nothing but a product with its weight: no bias, hook, adapter or sharded weight."""
    return (
        type(head) is nn.Linear
        and head.bias is None
        and type(head.weight) in (Tensor, nn.Parameter)
        and not (head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head))
    )


def _mean_of_tokens(
    loss_sum: Tensor, losses: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None
) -> Tensor:
    """What `ForCausalLMLoss` makes of token losses: their sum / `num_items_in_batch`, or the mean if that is None."""
    total = targets.ne(IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
    return loss_sum / (total.to(loss_sum.device) if isinstance(total, Tensor) else total)
