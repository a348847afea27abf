"""Loss per sequence, per data source and per held-out block, from the one cross-entropy that is computed anyway.

A causal LM of transformers computes its loss through `self.loss_function`. `LossTap.attach` puts the tap there, which
returns the same number as `ForCausalLMLoss` and hands the sums of each sequence to whoever listens. A head that is
fused with its loss has no logits to pass on and gives the tap its token losses instead (`of_tokens`). No second pass
over the logits, no host synchronisation.

Letters: B sequences, T tokens, V vocabulary, S sources, N held-out blocks. Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_moe_cpt.data.packing import IGNORED_LABEL
from hf_moe_cpt.trainers.instruments.ranks import has_process_group


Listener = Callable[[Tensor], None]  # takes (B, 2) float64: nats and predicted tokens of each sequence


def shifted_labels(labels: Tensor) -> Tensor:
    """Labels (B, T) moved one to the left, so that position t holds the token that position t predicts."""
    return nn.functional.pad(labels, (0, 1), value=IGNORED_LABEL)[..., 1:]


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every position in nats, float32 (B, T); 0 where the target is ignored.

    logits: (B, T, V), any float type. targets: (B, T), already shifted, -100 where ignored.
    """
    flat = nn.functional.cross_entropy(
        logits.float().flatten(0, -2),
        targets.flatten().to(logits.device),
        ignore_index=IGNORED_LABEL,
        reduction="none",
    )
    return flat.view(targets.shape)


class LossTap:
    """Stands where a model computes its loss and tells a listener the loss of each sequence."""

    def __init__(self) -> None:
        self._listener: Listener | None = None

    def attach(self, model: nn.Module) -> None:
        """Let `model` compute its loss through this tap; models without `loss_function` are refused."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not isinstance(base, PreTrainedModel):
            raise ValueError(
                f"The model is a {type(base).__name__}, which has no `loss_function`: pass a causal LM of "
                "transformers (a PreTrainedModel, or a PEFT model around one)."
            )
        base.loss_function = self

    @contextmanager
    def tell(self, listener: Listener) -> Iterator[None]:
        """Hand the losses computed inside this context to `listener`."""
        self._listener = listener
        try:
            yield
        finally:
            self._listener = None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: object,  # transformers passes attention and loss options of every kind through this hook
    ) -> Tensor:
        """The loss of `ForCausalLMLoss`: the sum over tokens / `num_items_in_batch`, or the mean if that is None."""
        targets = shifted_labels(labels) if shift_labels is None else shift_labels
        losses = token_losses(logits, targets)
        return self.of_tokens(losses.sum(), losses, targets, num_items_in_batch)

    def of_tokens(
        self, loss_sum: Tensor, losses: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The same from what a fused head has: the sum, which carries the gradient, and the losses it is the sum of.

        losses: (B, T), in nats, 0 where ignored. targets: (B, T), already shifted, -100 where ignored.
        """
        counted = targets.ne(IGNORED_LABEL).to(losses.device)
        if self._listener is not None:
            self._listener(torch.stack([losses.detach().double().sum(-1), counted.double().sum(-1)], dim=-1))
        return loss_sum / (counted.sum() if num_items_in_batch is None else num_items_in_batch)


class SourceLosses:
    """Sums of token losses and token counts per source since the last `pop`, on the device of the loss."""

    def __init__(self, source_names: tuple[str, ...]) -> None:
        self.source_names = source_names
        self._sums: Tensor | None = None  # (S, 2)

    def listener(self, source_of_sequence: Tensor) -> Listener:
        """A listener that adds sequences under `source_of_sequence` (B,), integers in [0, S)."""

        def add(per_sequence: Tensor) -> None:
            sums = per_sequence.new_zeros(len(self.source_names), 2)
            sums.index_add_(0, source_of_sequence.to(per_sequence.device), per_sequence)
            self._sums = sums if self._sums is None else self._sums + sums

        return add

    def pop(self) -> dict[str, float]:
        """`lm_loss` and `lm_loss/<source>`: mean nats per token since the last call, over all ranks; then reset.

        Every rank must call it at the same step: it is a collective when a process group exists. The one host sync.
        """
        if self._sums is None:
            return {}
        sums, self._sums = self._sums, None
        if has_process_group():
            dist.all_reduce(sums)
        nats, tokens = sums.T.tolist()
        by_source = zip(self.source_names, nats, tokens, strict=True)
        losses = {f"lm_loss/{name}": sum_ / count for name, sum_, count in by_source if count > 0}
        return {"lm_loss": sum(nats) / max(sum(tokens), 1), **losses}


class HeldOutLoss:
    """Mean loss over all predicted tokens of N held-out blocks, whatever the batch size and the number of ranks.

    Each block has its own place in a table, so a block that several ranks see (data loaders repeat blocks to fill the
    last batch) counts once.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._table: Tensor | None = None  # (N, 2)

    def listener(self, block_of_sequence: Tensor) -> Listener:
        """A listener that puts sequences into the places `block_of_sequence` (B,), integers in [0, N)."""

        def put(per_sequence: Tensor) -> None:
            if self._table is None:
                self._table = per_sequence.new_zeros(self.num_blocks, 2)
            self._table[block_of_sequence.to(per_sequence.device)] = per_sequence

        return put

    def mean(self) -> float:
        """Nats per token over all blocks of all ranks; a collective when a process group exists."""
        if has_process_group():
            dist.all_reduce(self._table, op=dist.ReduceOp.MAX)  # a place is 0 on the ranks that did not fill it
        nats, tokens = self._table.sum(0).tolist()
        return nats / tokens
