"""Stop a run whose loss is no longer a number, before anything is saved over a good checkpoint. Source: ours."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hf_moe_cpt.trainers.instruments.ranks import has_process_group


NEVER = 2**62


class LossGuard:
    """Remembers the first optimizer step with a non-finite loss; `check` raises for it.

    `record` costs no host synchronisation on an accelerator. On the CPU it checks at once. is_active: False where
    another policy than to stop is in force (bad_steps.py).
    """

    def __init__(self, is_active: bool = True) -> None:
        self._is_active = is_active
        self._first_bad_step: Tensor | None = None

    def record(self, loss: Tensor, step: int, batch: str) -> None:
        """Note the loss of a micro-batch of optimizer step `step` (1-based); `batch` says what it was made of."""
        if not self._is_active:
            return
        loss = loss.detach()
        bad = torch.where(torch.isfinite(loss), NEVER, step)
        self._first_bad_step = bad if self._first_bad_step is None else torch.minimum(self._first_bad_step, bad)
        if loss.device.type == "cpu" and not has_process_group():
            self.check(lambda _: batch)

    def check(self, describe_batch) -> None:
        """Raise FloatingPointError if any loss since the last check was not finite, on any rank.

        describe_batch: function of the step (int) that says which data the batch held. A collective.
        """
        if self._first_bad_step is None:
            return
        first, self._first_bad_step = self._first_bad_step, None
        if has_process_group():
            dist.all_reduce(first, op=dist.ReduceOp.MIN)
        step = int(first)
        if step < NEVER:
            raise FloatingPointError(
                f"The loss of step {step} is not finite ({describe_batch(step)}). Training stopped and nothing was "
                "saved after it: resume from the last checkpoint with a lower learning_rate, or look at that batch."
            )
