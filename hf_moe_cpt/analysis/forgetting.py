"""Forgetting and adaptation of continual pre-training, from held-out language-model losses.

Losses are mean cross-entropies in nats per token, without penalties, of the same held-out tokens before and after.
Source: Thérien et al. 2025 (arXiv 2503.05029) define forgetting as the rise of the old distribution's validation
loss; for adaptation they report the plain validation loss on the new one (`loss_after`), of which ours is the fall.
"""

from dataclasses import dataclass


def forgetting(loss_before: float, loss_after: float) -> float:
    """Rise of the loss on the old distribution, nats per token: > 0 forgot, < 0 improved on the old data too."""
    return loss_after - loss_before


def adaptation(loss_before: float, loss_after: float) -> float:
    """Fall of the loss on the new distribution, nats per token: > 0 learnt, < 0 became worse."""
    return loss_before - loss_after


@dataclass(frozen=True)
class ContinualOutcome:
    """Held-out losses of both distributions, in nats per token, at the starting checkpoint and after the run."""

    old_before: float
    old_after: float
    new_before: float
    new_after: float  # the paper's adaptation, lower is better

    @property
    def forgetting(self) -> float:
        """Rise on the old distribution; lower is better."""
        return forgetting(self.old_before, self.old_after)

    @property
    def adaptation(self) -> float:
        """Fall on the new distribution; higher is better."""
        return adaptation(self.new_before, self.new_after)
